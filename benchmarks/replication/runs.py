"""One run of the replication: both stages with the project's own trainer, then its answers and measures."""

import dataclasses
import shutil
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from transformers import PreTrainedModel, ProcessorMixin

from benchmarks.replication import world
from benchmarks.replication.arms import ARMS, RANK
from benchmarks.replication.design import ALL_TEACHERS, Arm, Schedule
from benchmarks.replication.measures import encoder_measures, prepare_measures
from benchmarks.replication.side_by_side import keep_encoders
from modeling_movekd import MoveKDForConditionalGeneration
from modeling_movekd.files import temporary_folder
from modeling_movekd.processing import load_processor
from train.arguments import DataArguments, ModelArguments
from train.build import build_collator, build_student
from train.cache_writer import CacheArguments, cache_features
from train.config import PRESETS, MoveKDSFTConfig
from train.data.bad_rows import BadRows
from train.data.datasets import load_train_and_validation
from train.demo.run import accuracy_by_family, answer_questions
from train.run import train
from train.teachers.config import TeacherConfig
from train.teachers.loaders import load_teacher
from train.trainer import MoveKDTrainer


@dataclass(frozen=True)
class Scale:
    """
    The size of an experiment.

    Args:
        pretrain, finetune (`int`): Pictures of each stage.
        validation, test (`int`): Questions of each evaluation.
        steps (`int`): Training steps of both stages together.
        tower_effort (`float`): Factor on the training steps of the networks.
        tower_pictures (`int`): Pictures that the networks train on.
    """

    pretrain: int = 2000
    finetune: int = 1000
    validation: int = 1200
    test: int = 2400
    steps: int = 700
    tower_effort: float = 1.0
    tower_pictures: int = 8000


QUICK = Scale(200, 200, 60, 120, 50, 0.05, 500)
# The split `test` has pictures that no earlier round was scored on
PICTURES_SEED = {"test": 3}
STAGES = ("pretrain", "finetune")
# Options of the common recipe that a stage without a language model does not have
LANGUAGE_OPTIONS = ("chat_template", "max_length")


def pictures_seed(split: str, networks: int) -> int:
    """Seed of a split's pictures. Every set of networks but the first has pictures of its own."""
    return PICTURES_SEED.get(split, 0) if networks == 0 else 10 + networks


@dataclass(frozen=True)
class Job:
    arm: str
    seed: int
    split: str
    schedule: Schedule

    def settings_in(self, stage: str, steps: int) -> dict[str, Any]:
        """The schedule as options of a stage. Before the last, projector and heads have one rate in all runs."""
        schedule = self.schedule
        encoder_steps = round((schedule.encoder_share or 0) * steps)
        pretrain_steps = round(schedule.pretrain_share * (steps - encoder_steps))
        weight = {} if schedule.kd_weight is None else {"lambda_kd": schedule.kd_weight}
        if stage == "finetune":
            names = ("vision_tower_learning_rate", "learning_rate", "language_model_learning_rate")
            rates = {name: getattr(schedule, name) for name in names}
            return weight | rates | {"max_steps": steps - encoder_steps - pretrain_steps}
        return weight | {
            "vision_tower_learning_rate": schedule.pretrain_vision_tower_learning_rate,
            "learning_rate": 2e-3,
            "max_steps": encoder_steps if stage == "encoder" else pretrain_steps,
        }


def prepare(folder: Path, scale: Scale, networks: int) -> None:
    """Write the pictures of every split, and cache the teachers' features of the training splits, if missing."""
    for split in (*STAGES, "validation", "test"):
        target = folder / "data" / split
        if not target.is_dir():
            questions = {"pretrain": 0, "finetune": len(world.FAMILIES)}.get(split, 1)
            target.parent.mkdir(exist_ok=True)
            with temporary_folder(target) as temporary:
                rows = world.rows(split, getattr(scale, split), pictures_seed(split, networks), questions)
                rows.save_to_disk(temporary / split)
                shutil.move(temporary / split, target)
    # Image geometries differ between presets and stages, and with them the cached features
    geometries = ("paper", "released") if networks == 0 else ("paper",)
    for name in geometries:
        for stage in STAGES if networks == 0 else ("encoder", *STAGES):
            parts = {"vision_model": towers(folder)["clip"], "language_model": towers(folder)["language_model"]}
            if stage == "encoder":
                del parts["language_model"]
            args = arguments(folder, ARMS[name], stage, 0, folder / "unused", **parts)
            cache_features(data_arguments(folder, stage), args, ModelArguments(), CacheArguments())
    prepare_measures(folder, towers(folder)["clip"])


def towers(folder: Path) -> dict[str, str]:
    return {name: str(folder / "towers" / name) for name in (*ALL_TEACHERS, "language_model")}


def data_of(stage: str) -> str:
    # The stage `encoder` sees the pictures of the first stage, without their captions
    return "pretrain" if stage == "encoder" else stage


def data_arguments(folder: Path, stage: str) -> DataArguments:
    return DataArguments(dataset_name=[str(folder / "data" / data_of(stage))])


def arguments(folder: Path, arm: Arm, stage: str, seed: int, output: Path, **settings: Any) -> MoveKDSFTConfig:
    """The common recipe with the settings of an arm."""
    geometry = PRESETS[arm.settings.get("distillation_preset", "paper")]["geometry"]
    chosen: dict[str, Any] = {
        "stage": stage,
        "output_dir": str(output),
        "seed": seed,
        "chat_template": "own",
        "distill": bool(arm.teachers),
        "teachers": [{"name": teacher, "model": towers(folder)[teacher]} for teacher in arm.teachers] or None,
        "feature_cache": str(folder / "features" / geometry / stage) if arm.teachers else None,
        "feature_statistics_images": 512,
        "lora_rank": RANK,
        "lora_alpha": RANK,
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "max_length": 256,
        "bf16": False,
        "activation_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 25,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    settings = arm.settings | settings
    if stage == "pretrain":  # which trains the experts alone
        settings.pop("freeze_base_tower", None)
    if stage == "encoder":
        chosen = {name: value for name, value in chosen.items() if name not in LANGUAGE_OPTIONS}
    return MoveKDSFTConfig(**chosen | settings)


def run(job: Job, arm: Arm, folder: Path, scale: Scale, command: str, commit: str) -> dict[str, Any]:
    """Train all stages, ask the questions and measure; returns one line of the results."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    with temporary_folder(folder / "run") as temporary:
        trained = train_side_by_side if arm.side_by_side else train_arm
        model, processor, training = trained(job, arm, folder, scale, temporary)
        seconds = time.perf_counter() - started
        rows = load_from_disk(str(folder / "data" / job.split))
        answers = answer_questions(model, processor, rows, batch_size=100)
    measured = encoder_measures(model.model.vision_tower, towers(folder)["clip"], folder)
    return {
        "arm": job.arm,
        "seed": job.seed,
        "split": job.split,
        "command": command,
        "commit": commit,
        "date": date.today().isoformat(),
        "settings": arm.settings | job.schedule._asdict(),
        "accuracy": accuracy_by_family(answers, rows, world.FAMILIES),
        "questions": {family: rows["family"].count(family) for family in world.FAMILIES},
        **measured,
        "losses": training["losses"],
        "cost": {
            "seconds": round(seconds, 1),
            "tower_parameters": sum(value.numel() for value in model.model.vision_tower.parameters()),
            "trained_parameters": training["trained_parameters"],
        },
    }


def train_arm(
    job: Job, arm: Arm, folder: Path, scale: Scale, output: Path
) -> tuple[PreTrainedModel, ProcessorMixin, dict[str, Any]]:
    """All stages by [`train.run.train`]."""
    start = {"vision_model": towers(folder)["clip"], "language_model": towers(folder)["language_model"]}
    source = ModelArguments()
    if job.schedule.encoder_share:
        settings = job.settings_in("encoder", scale.steps) | {"vision_model": start["vision_model"]}
        args = arguments(folder, arm, "encoder", job.seed, output / "encoder", **settings)
        train(data_arguments(folder, "encoder"), args, source).end()
        start["vision_model"] = str(output / "encoder")
    frozen: dict[str, Any] = {}
    if arm.frozen_after_encoder:
        arm = dataclasses.replace(arm, teachers=())
        frozen = {"freeze_vision_tower": True, "vision_tower_learning_rate": None}
    for stage in STAGES:
        settings = start | job.settings_in(stage, scale.steps) | frozen
        args = arguments(folder, arm, stage, job.seed, output / stage, **settings)
        trainer = train(data_arguments(folder, stage), args, source)
        training = summary(trainer)
        trainer.end()
        start, source = {}, ModelArguments(model_name_or_path=str(output / stage))
    model = MoveKDForConditionalGeneration.from_pretrained(output / "finetune")
    processor = load_processor(output / "finetune")
    return model, processor, training


def train_side_by_side(
    job: Job, arm: Arm, folder: Path, scale: Scale, output: Path
) -> tuple[PreTrainedModel, ProcessorMixin, dict[str, Any]]:
    """Both stages of a model that keeps all encoders. No checkpoint describes such a model, so it stays in memory."""
    paths, weights = towers(folder), None
    teachers = {
        name: load_teacher(TeacherConfig(name=name, model=paths[name])) for name in ALL_TEACHERS if name != "clip"
    }
    parts = {"vision_model": paths["clip"], "language_model": paths["language_model"], "freeze_vision_tower": True}
    for stage in STAGES:
        settings = job.settings_in(stage, scale.steps)
        args = arguments(folder, arm, stage, job.seed, output / stage, **parts, **settings)
        model, processor = build_student(args, ModelArguments())
        keep_encoders(model, processor, teachers)
        if weights is not None:
            model.load_state_dict(weights)
        bad_rows = BadRows(args.output_dir, 0.0, 0)
        rows, _ = load_train_and_validation(data_arguments(folder, stage), bad_rows, args.seed, False, None)
        trainer = MoveKDTrainer(
            model,
            args,
            train_dataset=rows,
            bad_rows=bad_rows,
            data_collator=build_collator(args, processor, {}),
            processing_class=processor,
        )
        trainer.train()
        weights = model.state_dict()
        trainer.end()
    return model, processor, summary(trainer)


def summary(trainer: MoveKDTrainer) -> dict[str, Any]:
    """The last losses that were logged, and the number of parameters that trained."""
    last = next(entry for entry in reversed(trainer.state.log_history) if "text" in entry)
    losses = {name: value for name, value in last.items() if name in ("text", "kd", "balance") or "kd/" in name}
    trained = sum(value.numel() for value in trainer.model.parameters() if value.requires_grad)
    return {"losses": losses, "trained_parameters": trained}
