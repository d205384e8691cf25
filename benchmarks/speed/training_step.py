"""
What distillation adds to a training step: `python -m benchmarks.speed.training_step`.

One batch through [`~train.trainer.MoveKDTrainer.training_step`] (forward and backward), with the student, teachers and
losses of the small recipe's first stage, random weights and a smaller batch.

- With the teachers' features read from a cache, over the same step without distillation.
- With live teachers, over the sum of the step with cached features and of the teachers' forwards, each timed alone.
  The rival preprocesses the images for the teachers on the training process, and runs each teacher on one image at a
  time.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.speed.options import parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    flags = parser(__doc__, repeats=3)
    flags.add_argument("--batch_size", type=int, default=2)
    return flags.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from benchmarks.speed.measure import paired_row, paired_times, report, start
from benchmarks.speed.models import BASE, LANGUAGE, vision_language_model
from modeling_movekd import MoveKDVisionModel
from train.build import build_collator, build_distiller
from train.config import MoveKDSFTConfig
from train.data.datasets import load_conversations
from train.teachers.cache_shards import decode, encode
from train.teachers.config import TeacherConfig
from train.teachers.features import FrozenTeacher, TeacherFeatures, clip_features, transformers_features
from train.teachers.preprocessing import CLIP_MEAN, CLIP_STD, TeacherPreprocessor
from train.trainer import MoveKDTrainer


TOY_BASE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOY_LANGUAGE = TOY_BASE | {"num_key_value_heads": 1, "vocab_size": 2000}


class CachedFeatures(nn.Module):
    """Takes a teacher's place, as with `feature_cache`: decodes the features that the collator has read."""

    def __init__(self, teacher: FrozenTeacher) -> None:
        super().__init__()
        self.name, self.config, self.grid, self.width = teacher.name, teacher.config, teacher.grid, teacher.width
        self.summary_width = teacher.summary_width

    def forward(self, cached: Mapping[str, torch.Tensor]) -> TeacherFeatures:
        return decode(cached, self.grid)


def build_teachers(base: dict[str, int], size: int, patch: int) -> dict[str, FrozenTeacher]:
    preprocessor = TeacherPreprocessor(size, CLIP_MEAN, CLIP_STD)
    sides = {"image_size": size, "patch_size": patch}
    clip = MoveKDVisionModel.from_clip(CLIPVisionModel(CLIPVisionConfig(**base, **sides)), num_experts=0)
    dinov2 = {name: value for name, value in base.items() if name != "intermediate_size"}
    plain = partial(transformers_features, None, {})
    models: dict[str, tuple[nn.Module, Callable[..., TeacherFeatures]]] = {
        "clip": (clip, partial(clip_features, False)),
        "dinov2": (Dinov2Model(Dinov2Config(**dinov2, image_size=size, patch_size=patch * 7 // 8)), plain),
        "siglip2": (SiglipVisionModel(SiglipVisionConfig(**base, **sides, vision_use_head=False)), plain),
    }
    return {
        name: FrozenTeacher(TeacherConfig(name, "random"), model, features, preprocessor)
        for name, (model, features) in models.items()
    }


def rows(number: int) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    words = "a red circle at the left below a blue square " * 3
    turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": words.strip()}]
    return [
        {"image": Image.fromarray(draw.integers(0, 255, (480, 640, 3), dtype=np.uint8)), "conversations": turns}
        for _ in range(number)
    ]


class Case:
    """A student beside one set of teachers: what a step needs."""

    def __init__(self, toy: bool, batch_size: int, folder: str) -> None:
        torch.manual_seed(0)
        self.base, self.language = (TOY_BASE, TOY_LANGUAGE) if toy else (BASE, LANGUAGE)
        self.size, self.patch = (64, 16) if toy else (224, 16)
        self.batch_size, self.folder = batch_size, folder
        self.teachers = build_teachers(self.base, self.size, self.patch)

    def trainer(self, teachers: Mapping[str, Any]) -> MoveKDTrainer:
        clip = {**self.base, "image_size": self.size, "patch_size": self.patch}
        model, processor = vision_language_model(clip, self.language, lora_dropout=0.05)
        args = MoveKDSFTConfig(
            output_dir=self.folder,
            stage="pretrain",
            distill=bool(teachers),
            teachers=list(teachers) or None,
            lora_dropout=0.05,
            per_device_train_batch_size=self.batch_size,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            activation_checkpointing=True,
            report_to=["none"],
            save_strategy="no",
        )
        trainer = MoveKDTrainer(
            model,
            args,
            teachers=teachers,
            distiller=build_distiller(args, model, teachers),
            train_dataset=load_conversations(rows(self.batch_size)),
            data_collator=build_collator(args, processor, teachers),
            processing_class=processor,
        )
        trainer.current_gradient_accumulation_steps = 1
        return trainer


def step(trainer: MoveKDTrainer, teachers: Mapping[str, Any], batch: dict[str, Any]) -> Callable[[], Any]:
    """Forward and backward with these teachers; the gradients are dropped."""

    def run() -> torch.Tensor:
        trainer.teachers = dict(teachers)
        (prepared,), count = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
        loss = trainer.training_step(trainer.model, prepared, count)
        trainer.model.zero_grad()
        return loss

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    start(options)
    with tempfile.TemporaryDirectory() as folder:
        table(options, Case(options.toy, options.batch_size, folder))


def table(options: Any, case: Case) -> None:
    teachers = case.teachers
    plain, live = case.trainer({}), case.trainer(teachers)
    cached = {name: CachedFeatures(teacher) for name, teacher in teachers.items()}
    batch = live.data_collator(list(live.train_dataset))
    pixels = batch.pop("teacher_pixel_values")
    with torch.no_grad():
        features = {name: encode(teachers[name](pixels[name]), "float16") for name in teachers}
    images = [row["image"] for row in rows(case.batch_size)]
    steps = {
        "plain": step(plain, {}, batch),
        "cached": step(live, cached, batch | {"cached_features": features}),
        "live": step(live, teachers, batch | {"teacher_pixel_values": pixels}),
    }

    def one_by_one() -> None:
        made: dict[str, torch.Tensor] = {}
        for name, teacher in teachers.items():
            made[name] = torch.cat([teacher.preprocessor([image]) for image in images])
            for image in made[name]:
                teacher(image[None])
        steps["cached"]()

    functions: dict[str, Callable[[], Any]] = {
        **steps,
        **{f"teacher {name}": partial(teacher, pixels[name]) for name, teacher in teachers.items()},
        "one by one": one_by_one,
    }
    times = paired_times(functions, options.repeats)
    live_parts = [times["cached"], *(times[f"teacher {name}"] for name in teachers)]
    sums = [sum(parts) for parts in zip(*live_parts, strict=True)]
    table_rows = [
        paired_row(
            "step with distillation from cached features / without distillation",
            times["cached"],
            times["plain"],
            at_most=1.05,
        ),
        paired_row("step with live teachers / student's step + teachers' forwards", times["live"], sums, at_most=1.03),
        paired_row(
            "step with live teachers / rival's",
            times["live"],
            times["one by one"],
            note="rival: preprocessing on the training process, teachers called image by image",
        ),
    ]
    context = {
        "student": f"CLIP {case.base['hidden_size']} x {case.base['num_hidden_layers']}, language model "
        f"{case.language['hidden_size']} x {case.language['num_hidden_layers']}",
        "teachers": ", ".join(teachers),
        "batch": case.batch_size,
        "tokens": batch["input_ids"].shape[1],
        "activation checkpointing": True,
        "dtype": "float32",
        "repeats": options.repeats,
    }
    report("Step of training", table_rows, context, options.out)


if __name__ == "__main__":
    main()
