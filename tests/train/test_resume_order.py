"""A resumed run sees the rows that the unbroken run would have seen, wherever it was interrupted."""

import re
from pathlib import Path
from typing import Any

import pytest
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader

from tests.helpers.colored_rows import llava_rows
from tests.helpers.trainers import build_trainer
from train.trainer import MoveKDTrainer


ROWS, EPOCHS = 22, 3
# Rows of 22 over two processes, with two rows a batch and two batches a step: an epoch has 6 batches and 3 steps
STEPS_PER_EPOCH = 3


class RowsOfOneProcess(MoveKDTrainer):
    """Records the rows of each batch. Takes the rows of the second of two processes, as accelerate deals them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[list[int]] = []

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        return prepare_data_loader(
            DataLoader(
                loader.dataset,
                batch_size=self.args.train_batch_size,
                sampler=self._get_train_sampler(),
                collate_fn=loader.collate_fn,
            ),
            num_processes=2,
            process_index=1,
            use_seedable_sampler=True,
        )

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tokens = [row[row >= 0] for row in inputs["labels"]]
        answers = self.processing_class.batch_decode(tokens, skip_special_tokens=True)
        self.seen.append([int(re.findall(r"\d+", answer)[0]) for answer in answers])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def rows_seen(self, checkpoint: Path | None = None) -> list[list[int]]:
        self.seen = []
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return self.seen


@pytest.mark.parametrize("settings", [{"group_by_modality_length": True}, {}], ids=["grouped", "random"])
def test_rows_of_a_process_after_every_kind_of_step(arguments, tmp_path: Path, settings: dict[str, Any]) -> None:
    rows = llava_rows(ROWS, text_only=tuple(range(0, ROWS, 3)))
    for number, row in enumerate(rows):
        row["conversations"][1]["value"] = f"This is row {number}."
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    small: dict[str, Any] = {"distill": False, "num_experts": 0, "teachers": None, "max_steps": -1, "seed": 3}
    small |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": EPOCHS}
    small |= {"save_strategy": "steps", "save_steps": 1, "dataset_name": str(tmp_path / "rows")}
    trainer = build_trainer(*arguments(**small, **settings), trainer_class=RowsOfOneProcess)
    straight = trainer.rows_seen()
    per_epoch = len(straight) // EPOCHS
    assert (trainer.state.global_step, per_epoch) == (EPOCHS * STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH)
    epochs = [straight[start : start + per_epoch] for start in range(0, len(straight), per_epoch)]
    assert epochs[0] != epochs[1] != epochs[2]
    # Within the first, second and last epoch, and at both boundaries
    for step in (1, 3, 4, 5, 6, 8):
        checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{step}"
        assert trainer.rows_seen(checkpoint) == straight[2 * step :], step


@pytest.mark.parametrize(
    "settings",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"accelerator_config": {"use_seedable_sampler": False}},
        {"accelerator_config": {"dispatch_batches": True}},
    ],
)
def test_orders_that_cannot_be_continued_are_refused(arguments, settings: dict[str, Any]) -> None:
    (name,) = settings.get("accelerator_config", settings)
    with pytest.raises(ValueError, match=f"`{name}`"):
        arguments(**settings)
