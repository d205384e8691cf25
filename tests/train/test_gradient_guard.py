"""Failures of training that would be silent: each is provoked and must raise."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from modeling_movekd.experts_movekd import ExpertRouter
from tests.helpers.colored_rows import llava_rows
from train import run as stage_run
from train import sft
from train.callbacks import STEPS_WATCHED


ROOT = Path(__file__).parents[2]


@pytest.fixture
def train(arguments, monkeypatch: pytest.MonkeyPatch):
    """`stage_run.train`, with a function that changes student and teachers between loading and training."""

    def run(change=lambda model, teachers: None, **settings):
        data_args, args, model_args = arguments(**settings)
        build_student, build_teachers = stage_run.build_student, stage_run.build_teachers
        student = build_student(args, model_args)
        teachers = build_teachers(args)
        change(student[0], teachers)
        with monkeypatch.context() as patch:
            patch.setattr(stage_run, "build_student", lambda *_: student)
            patch.setattr(stage_run, "build_teachers", lambda *_: teachers)
            return stage_run.train(data_args, args, model_args)

    return run


def test_parameter_without_gradient(train) -> None:
    def change(model, teachers) -> None:
        model.forgotten_projector = nn.Parameter(torch.ones(3))

    with pytest.raises(ValueError, match=r"no gradient in the first step: \['forgotten_projector'\]"):
        train(change)


def test_gradient_of_zero_throughout(train) -> None:
    # CLIP has all the weight, so that the other teacher's adapter is in the loss but gets no gradient
    with pytest.raises(ValueError, match="exactly zero in each of the first 10 steps.*distiller.vit.channels.weight"):
        train(clip_share=1.0, max_steps=STEPS_WATCHED)
    train(clip_share=1.0, max_steps=STEPS_WATCHED - 1)


def test_heads_of_summaries_get_a_gradient_too(train) -> None:
    train(distillation_preset="unic", max_steps=STEPS_WATCHED)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_steps_of_text_alone_are_not_watched(train, tmp_path: Path, preset: str) -> None:
    """Also if these steps distill black images, which do not reach the projector."""
    rows = llava_rows(4 * (11 + STEPS_WATCHED), text_only=tuple(range(44)))
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    data = {"dataset_name": str(tmp_path / "rows"), "train_sampling_strategy": "sequential", "max_length": None}
    trainer = train(**data, distillation_preset=preset, max_steps=11)
    assert trainer.gradient_guard.handles, "it goes on looking until there have been images"
    with pytest.raises(ValueError, match="first 10 steps with images.*distiller.vit.channels.weight"):
        train(**data, distillation_preset="paper", clip_share=1.0, max_steps=11 + STEPS_WATCHED)


def test_expert_cut_off(train) -> None:
    def cut_off(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[4:8] = 0  # the ranks of expert 1
        return gradient

    def change(model, teachers) -> None:
        model.model.vision_tower.encoder.layers[1].mlp.fc2_experts.weight_a.register_hook(cut_off)

    with pytest.raises(ValueError, match=r"layers.1.mlp.fc2_experts.weight_a\[expert 1\]"):
        train(change, max_steps=STEPS_WATCHED, learning_rate=1e-4)


def test_expert_without_tokens_is_excused(train) -> None:
    def change(model, teachers) -> None:
        for router in (module for module in model.modules() if isinstance(module, ExpertRouter)):
            router.bias.data = torch.tensor([100.0, 0.0, 0.0])

    # Saturated routers have no gradient either
    with pytest.raises(ValueError) as error:
        train(change, max_steps=STEPS_WATCHED, lambda_balance=0.0)
    assert "router" in str(error.value) and "expert 1]" not in str(error.value)


def test_expert_that_got_nothing_but_cls_is_excused(train) -> None:
    def only_cls(module: ExpertRouter, inputs: tuple, outputs: tuple[torch.Tensor, torch.Tensor]) -> tuple:
        probabilities, indices = outputs
        indices = torch.zeros_like(indices)
        indices[:, 0] = 1
        return probabilities, indices

    def change(model, teachers) -> None:
        model.model.vision_tower.encoder.layers[-1].mlp.router.register_forward_hook(only_cls)

    trainer = train(change, max_steps=STEPS_WATCHED)
    assert trainer.gradient_guard.expert_tokens[-1].tolist()[1:] == [0, 0]


def test_loss_that_is_not_finite(train) -> None:
    def change(model, teachers) -> None:
        teachers["vit"].model.layernorm.bias.fill_(torch.nan)

    with pytest.raises(ValueError, match=r"not finite.* kd/vit"):
        train(change)


def test_replaced_forward(train) -> None:
    trainer = train(max_steps=1)
    add_fused_lm_head(trainer.model, outputs=("log_probs", "entropy", "is_top1"))
    with pytest.raises(ValueError, match="replaced `model.forward`"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}, "reentrant"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "reentrant"),
        ({"teachers": None}, "`teachers` is empty"),
        ({"freeze_vision_tower": True}, "nothing to distill into"),
        ({"freeze_vision_tower": True, "distill": False, "vision_tower_learning_rate": 1e-6}, "does not train"),
        ({"stage": "pretrain", "num_experts": 0, "distill": False, "vision_tower_learning_rate": 1e-6}, "not train"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"stage": "pretrian"}, "`stage` is 'pretrian'; choose one of .*'pretrain'"),
        ({"head_side": "left"}, "`head_side` is 'left'"),
        ({"summary_loss": "mse"}, "`summary_loss` is 'mse', but `summary_heads` is false"),
        ({"summary_heads": True, "summary_loss": "l2"}, "`summary_loss` is 'l2'; choose one of"),
        ({"summary_heads": True, "cosine_share": 0.3}, "`summary_loss` 'cosine' has no share"),
        ({"distillation_preset": "papers"}, "`distillation_preset` is 'papers'"),
    ],
)
def test_settings_that_would_fail_in_silence(arguments, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(**({"activation_checkpointing": None} | settings))


def test_reentrant_checkpointing_set_later(train, arguments) -> None:
    data_args, args, model_args = arguments(activation_checkpointing=True)
    args.activation_checkpointing_kwargs = {"use_reentrant": True}
    with pytest.raises(ValueError, match="reentrant"):
        stage_run.train(data_args, args, model_args)


def test_teacher_of_another_size_does_not_fit_saved_heads(train, parts, tmp_path: Path) -> None:
    train(max_steps=1, stage="pretrain")
    other = [{"name": "clip", "model": parts["clip"]}, {"name": "vit", "model": parts["vit"], "image_size": 48}]
    with pytest.raises(ValueError, match=r"vit.tokens.weight.*\(16, 36\), \(16, 64\)"):
        train(max_steps=1, model_name_or_path=str(tmp_path / "output"), teachers=other)


def run_script(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train" / "sft.py"), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_script_reads_yaml_and_flags(parts, dataset_folder: str, tmp_path: Path, monkeypatch, capsys) -> None:
    recipe = {
        "dataset_name": dataset_folder,
        "vision_model": parts["clip"],
        "language_model": parts["language"],
        "teachers": [{"name": "clip", "model": parts["clip"]}, {"name": "vit", "model": parts["vit"]}],
        "output_dir": str(tmp_path / "output"),
        "max_steps": 7,
        "per_device_train_batch_size": 4,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": ["tensorboard", "trackio"],
    }
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    done = run_script("--config", str(path), "--max_steps", "2", "--lora_rank", "4")
    assert done.returncode == 0, done.stderr
    first = next(line for line in done.stdout.splitlines() if line.startswith("Stage"))
    assert "experts and routers 4,806" in first and "Teachers (frozen): clip 19,264, vit 15,488" in first
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents*")).parent)).Reload()
    scalars = events.Tags()["scalars"]
    assert {"train/text", "train/kd/vit", "train/balance", "train/experts/0", "train/images_per_second"} <= set(
        scalars
    )
    assert [event.step for event in events.Scalars("train/kd/vit")] == [1, 2]

    with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as database:
        tracked = [json.loads(row[0]) for row in database.execute("select metrics from metrics")]
    assert len([entry for entry in tracked if "train/kd/vit" in entry]) == 2

    path.write_text(yaml.safe_dump(recipe | {"lambda_distillation": 1}))
    with pytest.raises(SystemExit):
        sft.main(["--config", str(path)])
    assert "unknown keys: lambda_distillation (did you mean" in capsys.readouterr().err
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit):
        sft.main(["--config", str(path), "--nonsense", "1"])
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err
