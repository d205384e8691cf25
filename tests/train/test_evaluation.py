"""Evaluation during training: losses over the whole evaluation set, and generated answers."""

from pathlib import Path

import pytest
from datasets import Dataset

from tests.helpers.colored_rows import llava_rows
from tests.helpers.trainers import build_trainer


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_evaluation_does_not_depend_on_the_batch_size(arguments, tmp_path: Path, preset: str) -> None:
    rows = llava_rows(21, text_only=(1, 2, 3, 9, 10, 11, 12, 13))
    for index, row in enumerate(rows):  # answers of different lengths
        row["conversations"][1]["value"] += " Yes." * (index % 5)
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    trainer = build_trainer(*arguments(dataset_name=str(tmp_path / "rows"), distillation_preset=preset))
    found = []
    for size in (1, 4, 10, 21):
        trainer.args.per_device_eval_batch_size = size
        metrics = trainer.evaluate(trainer.train_dataset)
        logged = trainer.state.log_history[-1]
        terms = {name: value for name, value in logged.items() if "per_second" not in name and "runtime" not in name}
        assert {
            "eval_text",
            "eval_kd",
            "eval_kd/vit",
            "eval_balance",
            "eval_entropy",
            "eval_experts/0",
        } <= terms.keys()
        weights = {"text": 1, "kd": trainer.args.lambda_kd, "balance": trainer.args.lambda_balance}
        total = sum(weight * logged[f"eval_{name}"] for name, weight in weights.items())
        assert metrics["eval_loss"] == pytest.approx(total, rel=1e-6)
        found.append(terms)
    for terms in found[1:]:
        assert terms == pytest.approx(found[0], rel=2e-5)
