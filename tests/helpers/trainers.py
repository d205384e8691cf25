"""Builds a trainer as `train.run.train` does, with a hook to change its parts first."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from modeling_movekd.inference import longest_context
from train import run as stage_run
from train.arguments import DataArguments, ModelArguments
from train.build import build_collator, build_distiller, build_student, build_teachers
from train.config import MoveKDSFTConfig
from train.data.datasets import load_conversations
from train.trainer import MoveKDTrainer


# Settings of a small run on CPUs
SMALL_RUN: dict[str, Any] = {
    "lora_rank": 4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "activation_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}


def continue_student(folder: Path) -> None:
    """Load a student as a run without teachers does that continues it."""
    args = MoveKDSFTConfig(**SMALL_RUN, output_dir="output", distill=False, chat_template="own")
    build_student(args, ModelArguments(model_name_or_path=str(folder)))


def build_trainer(
    data_args: DataArguments,
    args: MoveKDSFTConfig,
    model_args: ModelArguments,
    callbacks: Sequence[TrainerCallback] = (),
    prepare: Callable[..., Any] = lambda model, teachers, distiller: None,
    trainer_class: type[MoveKDTrainer] = MoveKDTrainer,
) -> MoveKDTrainer:
    """Build a trainer that has not trained. `prepare` may change model, teachers and distiller before."""
    model, processor = build_student(args, model_args)
    teachers = build_teachers(args)
    distiller = build_distiller(args, model, teachers, model_args.model_name_or_path)
    dataset = load_conversations(data_args.dataset_name)
    collator = build_collator(args, processor, teachers, longest_context(model))
    stage_run.fit_feature_statistics(args, distiller, teachers, dataset, collator)
    prepare(model, teachers, distiller)
    return trainer_class(
        model,
        args,
        teachers=teachers,
        distiller=distiller,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=processor,
        callbacks=list(callbacks),
    )
