"""The order of LLaVA's training rows: batches of one modality and of similar length, even over the processes."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def _split_evenly(indices: list[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Deal indices, sorted by falling length, into chunks of one size whose total lengths are close."""
    if len(indices) % num_chunks != 0:
        return [indices[start::num_chunks] for start in range(num_chunks)]
    chunk_size = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals = [0] * num_chunks
    for index in indices:
        open_chunks = [number for number in range(num_chunks) if len(chunks[number]) < chunk_size]
        chosen = min(open_chunks, key=lambda number: totals[number])
        chunks[chosen].append(index)
        totals[chosen] += lengths[index]
    return chunks


def length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator
) -> list[int]:
    """Shuffle, cut into global batches, and order each by length, spread evenly over the processes.

    Args:
        lengths: one length per row.
        batch_size: rows per process and step.
        world_size: processes times gradient accumulation steps; `batch_size * world_size` is the global batch.
        generator: source of the shuffle.

    Returns:
        A permutation of `range(len(lengths))`.
    """
    global_batch = batch_size * world_size
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    indices: list[int] = []
    for start in range(0, len(shuffled), global_batch):
        # Stable: rows of equal length stay in shuffled order.
        batch = sorted(shuffled[start : start + global_batch], key=lambda index: lengths[index], reverse=True)
        for chunk in _split_evenly(batch, lengths, world_size):
            indices.extend(chunk)
    return indices


def modality_length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator,
    shuffle_generator: torch.Generator | None = None,
) -> list[int]:
    """Group rows by modality, then by length: a global batch holds rows with images or rows without, never both.

    The last, incomplete batches of the two modalities come at the end, together and in the rows' own order.

    Args:
        lengths: positive for a row with images, negative for a text-only row.
        batch_size: rows per process and step.
        world_size: processes times gradient accumulation steps.
        generator: source of the order of the global batches.
        shuffle_generator: source of the shuffles inside either modality where both occur (default: `generator`).

    Returns:
        A permutation of `range(len(lengths))`. Which rows share a global batch depends on the product of `batch_size`
        and `world_size` only; the split over processes decides their order inside it.

    Raises:
        ValueError: for a length of zero, whose modality is unknown.
    """
    if 0 in lengths:
        raise ValueError(
            f"Row {list(lengths).index(0)} has length 0, so its modality is unknown: give rows with images a positive "
            "and text-only rows a negative length, and drop empty rows."
        )
    if all(length > 0 for length in lengths) or all(length < 0 for length in lengths):
        return length_grouped_indices(lengths, batch_size, world_size, generator)
    global_batch = batch_size * world_size
    full_batches: list[list[int]] = []
    remainder: list[int] = []
    for sign in (1, -1):
        rows = [index for index, length in enumerate(lengths) if length * sign > 0]
        row_lengths = [abs(lengths[index]) for index in rows]
        order = length_grouped_indices(row_lengths, batch_size, world_size, shuffle_generator or generator)
        shuffled = [rows[position] for position in order]
        batches = [shuffled[start : start + global_batch] for start in range(0, len(shuffled), global_batch)]
        # The last batch of a modality counts as incomplete even where it is full.
        full_batches.extend(batches[:-1])
        remainder.extend(batches[-1])
    permutation = torch.randperm(len(full_batches), generator=generator).tolist()
    return [index for number in permutation for index in full_batches[number]] + sorted(remainder)


class ModalityLengthGroupedSampler(Sampler[int]):
    """Sampler over `modality_length_grouped_indices`, a function of seed, epoch and batch layout alone.

    No global random state is read or changed, and nothing is remembered between epochs: a resumed run that sets the
    epoch and skips the rows it has seen continues exactly where the first stopped.

    Args:
        lengths: positive for a row with images, negative for a text-only row (`modality_length`).
        batch_size: rows per process and step.
        world_size: processes times gradient accumulation steps.
        seed: the same on every process.

    Raises:
        ValueError: for a length of zero, or a batch layout below one.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, world_size: int = 1, seed: int = 0) -> None:
        if batch_size < 1 or world_size < 1:
            raise ValueError(f"batch_size and world_size must be at least 1, got {batch_size} and {world_size}.")
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        if 0 in self.lengths:
            raise ValueError(f"Row {self.lengths.index(0)} has length 0, so its modality is unknown: drop empty rows.")

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives; accelerate's data loaders call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(modality_length_grouped_indices(self.lengths, self.batch_size, self.world_size, generator))
