from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from train.data.sampler import (
    ModalityLengthGroupedSampler,
    length_grouped_indices,
    modality_length_grouped_indices,
    set_sampler_epoch,
)


def mixed_lengths(size: int = 61, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 300, (size,), generator=generator)
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return (lengths * signs).tolist()


def global_batches(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def test_every_row_once_and_full_batches_of_one_modality() -> None:
    lengths = mixed_lengths()
    order = list(ModalityLengthGroupedSampler(lengths, batch_size=2, world_size=3, seed=4))
    assert sorted(order) == list(range(len(lengths)))
    batches = global_batches(order, 6)
    modalities = [{lengths[index] > 0 for index in batch} for batch in batches]
    with_images = sum(length > 0 for length in lengths)
    full = (with_images - 1) // 6 + (len(lengths) - with_images - 1) // 6
    assert full > 5
    assert all(len(modality) == 1 for modality in modalities[:full])
    assert {True} in modalities[:full] and {False} in modalities[:full]
    remainder = [index for batch in batches[full:] for index in batch]
    assert remainder == sorted(remainder)


def test_depends_on_seed_and_epoch_alone() -> None:
    lengths = mixed_lengths()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    sampler = ModalityLengthGroupedSampler(lengths, batch_size=4, seed=7)
    first = list(sampler)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert list(sampler) == first
    assert list(ModalityLengthGroupedSampler(lengths, batch_size=4, seed=8)) != first
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_the_split_over_processes_leaves_global_batches_alone() -> None:
    lengths = mixed_lengths(96)
    layouts = [(12, 1), (6, 2), (3, 4), (1, 12)]
    orders = [list(ModalityLengthGroupedSampler(lengths, *layout, seed=3)) for layout in layouts]
    batches = [[sorted(batch) for batch in global_batches(order, 12)] for order in orders]
    assert all(other == batches[0] for other in batches)


def test_lengths_are_even_over_the_processes() -> None:
    lengths = [abs(length) for length in mixed_lengths(64)]
    order = length_grouped_indices(lengths, 4, 4, torch.Generator().manual_seed(0))
    for batch in global_batches(order, 16):
        totals = [sum(lengths[index] for index in chunk) for chunk in global_batches(batch, 4)]
        assert max(totals) - min(totals) < max(lengths)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_modality_alone(sign: int) -> None:
    lengths = [sign * abs(length) for length in mixed_lengths(30)]
    order = modality_length_grouped_indices(lengths, 4, 2, torch.Generator().manual_seed(0))
    assert sorted(order) == list(range(30))
    assert order == length_grouped_indices(lengths, 4, 2, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [1, 2, 7])
def test_fewer_rows_than_a_batch(size: int) -> None:
    lengths = mixed_lengths(size)
    assert sorted(ModalityLengthGroupedSampler(lengths, 8, 2)) == list(range(size))


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("kind", ["grouped", "random", "sequential", "stream"])
def test_resumes_anywhere_in_the_order_of_the_unbroken_run(kind: str, num_processes: int) -> None:
    """As Trainer sets the epoch and skips, on each process: at every batch of three epochs."""
    lengths = mixed_lengths()

    def loader(rank: int) -> DataLoader:
        samplers = {
            "grouped": ModalityLengthGroupedSampler(lengths, batch_size=4, world_size=num_processes, seed=5),
            "random": RandomSampler(lengths),
            "sequential": SequentialSampler(lengths),
        }
        rows: Any = range(len(lengths))
        if kind == "stream":
            rows = Dataset.from_dict({"row": [*rows]}).to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=9)
        rows = DataLoader(rows, batch_size=4, sampler=samplers.get(kind))
        return prepare_data_loader(
            rows, num_processes=num_processes, process_index=rank, use_seedable_sampler=True, data_seed=3
        )

    def epoch_of(prepared: DataLoader, epoch: int, skipped: int = 0) -> list[list[int]]:
        set_sampler_epoch(prepared, epoch)
        prepared = skip_first_batches(prepared, skipped) if skipped else prepared
        prepared.set_epoch(epoch)
        return [(batch["row"] if kind == "stream" else batch).tolist() for batch in prepared]

    for rank in range(num_processes):
        straight = loader(rank)
        epochs = [epoch_of(straight, epoch) for epoch in range(3)]
        assert (epochs[0] != epochs[1]) is (kind != "sequential")
        for epoch, batches in enumerate(epochs):
            for skipped in range(len(batches)):
                assert epoch_of(loader(rank), epoch, skipped) == batches[skipped:], (rank, epoch, skipped)


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="Row 1 has length 0"):
        ModalityLengthGroupedSampler([3, 0, -2], batch_size=2)
    with pytest.raises(ValueError, match="Row 1 has length 0"):
        modality_length_grouped_indices([3, 0, -2], 1, 1, torch.Generator())
    with pytest.raises(ValueError, match="got 2 and 0"):
        ModalityLengthGroupedSampler([3, -2], batch_size=2, world_size=0)
