"""
Memory and time of the distillation losses and heads: `python -m benchmarks.speed.losses`.

Forward and backward for four teachers, whose features and the student's tokens are given. The rival computes the same
loss step by step as the method describes it: the adapted features of all teachers are kept until the loss, and with
them the squared errors, as tensors of the same shape.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.speed.options import parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    flags = parser(__doc__, repeats=3)
    flags.add_argument("--batch_size", type=int, default=16)
    return flags.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

import torch
from torch import nn

from benchmarks.speed import teachers
from benchmarks.speed.measure import Row, paired_row, paired_times, peak_memory, report, start
from train.distillation.distiller import Distiller
from train.distillation.losses import teacher_weights, token_weights
from train.teachers.features import TeacherFeatures


def unreduced(distiller: Distiller, tokens: torch.Tensor, features: Mapping[str, TeacherFeatures]) -> torch.Tensor:
    """The same loss of the same adapters, each step computed for all teachers before the next."""
    clip = features["clip"]
    assert clip.cls is not None and clip.cls_attention is not None
    adapted = {name: distiller[name](tokens, value.tokens)[1] for name, value in features.items()}
    errors = {name: nn.functional.mse_loss(tokens, value, reduction="none") for name, value in adapted.items()}
    weights = token_weights(clip.cls_attention, "cls_attention").unsqueeze(-1)
    losses = {name: (weights * value.float()).mean(dim=-1).sum(dim=-1) for name, value in errors.items()}
    shares = teacher_weights(clip.cls, adapted, "cls_similarity", distiller.clip_share)
    return torch.stack([shares[name] * losses[name] for name in losses]).sum(dim=0)


VARIANTS = {"ours": teachers.distillation_loss, "unreduced": unreduced}


def measured(variant: str, shapes: dict[str, Any], batch_size: int, device: str, dtype: str) -> Callable[[], Any]:
    """For a fresh process: one step; inputs and parameters are there before it."""
    distiller = teachers.build_distiller(shapes, device, dtype)
    return teachers.distillation_step(
        VARIANTS[variant], distiller, *teachers.distillation_inputs(shapes, batch_size, device, dtype)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    start(options)
    shapes, batch_size = (teachers.TOY_SHAPES, 2) if options.toy else (teachers.SHAPES, options.batch_size)
    common = {"shapes": shapes, "batch_size": batch_size, "device": options.device, "dtype": options.dtype}
    memory = {
        name: peak_memory("benchmarks.speed.losses:measured", {"variant": name, **common}, True, options.toy)
        for name in VARIANTS
    }
    distiller = teachers.build_distiller(shapes, options.device, options.dtype)
    tokens, features = teachers.distillation_inputs(shapes, batch_size, options.device, options.dtype)
    steps = {name: teachers.distillation_step(loss, distiller, tokens, features) for name, loss in VARIANTS.items()}
    torch.testing.assert_close(steps["ours"](), steps["unreduced"](), rtol=1e-3, atol=1e-3)
    times = paired_times(steps, options.repeats)
    given = sum(value.tokens.nbytes for value in features.values()) + tokens.nbytes
    gradients = sum(parameter.nbytes for parameter in distiller.parameters()) + tokens.nbytes
    rows = [
        Row(
            "distillation losses and heads: memory beyond inputs and parameters",
            memory["ours"] / 2**20,
            memory["unreduced"] / 2**20,
            "MB",
            at_most=0.25,
            note="rival: every teacher's [batch, tokens, width] made and kept",
        ),
        paired_row(
            "the same: time of forward and backward", times["ours"], times["unreduced"], note="adapters run twice"
        ),
    ]
    context = {
        "teachers": ", ".join(f"{name} {side}x{side}x{width}" for name, (width, side) in shapes["teachers"].items()),
        "student": f"{shapes['grid']}x{shapes['grid']}x{shapes['width']}",
        "batch": batch_size,
        "dtype": options.dtype,
        "inputs": f"{given / 2**20:.0f} MB",
        "gradients (the floor)": f"{gradients / 2**20:.0f} MB",
        "repeats": options.repeats,
    }
    report("Losses and heads", rows, context, options.out)


if __name__ == "__main__":
    main()
