"""The order of LLaVA's training rows: batches of one modality and of similar length, balanced over the processes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler


def _split_evenly(indices: list[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Deal indices, longest row first, into chunks of equal size and similar total length."""
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


def _check_lengths(lengths: Sequence[int]) -> None:
    if 0 in lengths:
        raise ValueError(f"Row {list(lengths).index(0)} has length 0, so its modality is unknown. Drop empty rows.")


def length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator
) -> list[int]:
    """
    Shuffle, cut into global batches, and order each batch by length, balanced over the processes.

    Args:
        lengths (`Sequence[int]`): Length of each row.
        batch_size (`int`): Rows per process and step.
        world_size (`int`): Processes times gradient accumulation steps.
        generator (`torch.Generator`): For the shuffle.

    Returns:
        A permutation of `range(len(lengths))`.
    """
    global_batch = batch_size * world_size
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    indices: list[int] = []
    for start in range(0, len(shuffled), global_batch):
        # A stable sort keeps rows of equal length in shuffled order
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
    """
    Group rows by modality, then by length: a global batch has only rows with images or only rows without.

    The last batches of the two modalities come at the end, together and in the order of the rows. Which rows share a
    global batch depends only on the product of `batch_size` and `world_size`.

    Args:
        lengths (`Sequence[int]`): Positive for a row with images, negative for a text-only row.
        batch_size (`int`): Rows per process and step.
        world_size (`int`): Processes times gradient accumulation steps.
        generator (`torch.Generator`): For the order of the global batches.
        shuffle_generator (`torch.Generator`, *optional*, defaults to `generator`): For the shuffles inside each
            modality if both occur.

    Returns:
        A permutation of `range(len(lengths))`.
    """
    _check_lengths(lengths)
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
        # As in the original code, the last batch counts as incomplete even if it is full
        full_batches.extend(batches[:-1])
        remainder.extend(batches[-1])
    permutation = torch.randperm(len(full_batches), generator=generator).tolist()
    return [index for number in permutation for index in full_batches[number]] + sorted(remainder)


class ModalityLengthGroupedSampler(Sampler[int]):
    """
    Samples in the order of [`modality_length_grouped_indices`], which depends on seed, epoch and batch layout alone.

    Nothing is remembered between epochs: a resumed run that sets the epoch and skips the rows already seen continues
    exactly where the first run stopped.

    Args:
        lengths (`Sequence[int]`): Positive for a row with images, negative for a text-only row (`modality_length`).
        batch_size (`int`): Rows per process and step.
        world_size (`int`, defaults to 1): Processes times gradient accumulation steps.
        seed (`int`, defaults to 0): The same on every process.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, world_size: int = 1, seed: int = 0) -> None:
        if batch_size < 1 or world_size < 1:
            raise ValueError(f"batch_size and world_size must be at least 1, got {batch_size} and {world_size}.")
        _check_lengths(lengths)
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration. The data loaders of accelerate call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(modality_length_grouped_indices(self.lengths, self.batch_size, self.world_size, generator))


def set_sampler_epoch(loader: DataLoader, epoch: int) -> None:
    """
    Set the epoch of a loader's sampler, under however many batch samplers accelerate has put it.

    `DataLoaderShard.set_epoch` looks two levels deep. On several processes a resumed epoch has three
    (`SkipBatchSampler`, `BatchSamplerShard`, `BatchSampler`), so that the sampler would repeat its first epoch.
    """
    batch_sampler: Any = loader.batch_sampler
    while hasattr(batch_sampler, "batch_sampler"):
        batch_sampler = batch_sampler.batch_sampler
    sampler: Any = getattr(batch_sampler, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
