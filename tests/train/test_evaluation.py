"""Evaluation during training: losses over the whole evaluation set, and generated answers."""

from pathlib import Path

import pytest
from datasets import Dataset

from tests.helpers.colored_rows import llava_rows
from tests.helpers.trainers import build_trainer
from train import run as stage_run


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


def test_answers_while_training(arguments, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One answer to all questions is soon learned."""
    rows = llava_rows(16, text_only=(1, 3, 5))
    for row in rows:
        row["conversations"][1]["value"] = "Yes."
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    settings = {"distill": False, "num_experts": 0, "teachers": None, "learning_rate": 1e-2, "max_steps": 40}
    settings |= {"eval_strategy": "steps", "eval_steps": 20, "eval_generate": 5, "eval_on_start": True}
    data_args, args, model_args = arguments(dataset_name=str(tmp_path / "rows"), **settings)
    data_args.dataset_test_split = "train"
    trainer = stage_run.train(data_args, args, model_args)
    found = [entry["eval_exact_match"] for entry in trainer.state.log_history if "eval_exact_match" in entry]
    assert len(found) == 3 and (found[0], found[-1]) == (0, 1)
    assert "What colour is it?\n  answer: Yes.\n  data:   Yes." in capsys.readouterr().out
    with pytest.raises(ValueError, match="`eval_generate` is 5 with `eval_strategy`"):
        build_trainer(*arguments(**settings | {"eval_strategy": "no", "eval_on_start": False}))
