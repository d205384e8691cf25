"""
Memory and time of the distillation losses and heads: `python -m benchmarks.speed.losses`.

Forward and backward for four teachers, whose features and the student's tokens are there already. The rival is the
method written down as it is described: every teacher's adapted features are made and kept until the loss is taken,
with the squared error of each as a tensor of the same shape.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.speed.measure import Row, paired_ratio, paired_times, parser, peak_memory, report
from train.distillation.distiller import Distiller
from train.distillation.losses import teacher_weights, token_weights
from train.teachers.features import TeacherFeatures


# Student's width and grid, then each teacher's, as at 336 and 1024 pixels
SHAPES: dict[str, Any] = {
    "width": 1024,
    "grid": 24,
    "teachers": {"clip": [1024, 24], "eva02": [1024, 64], "convnext": [3072, 32], "sam": [256, 64]},
}
TOY: dict[str, Any] = {
    "width": 16,
    "grid": 4,
    "teachers": {"clip": [16, 4], "eva02": [16, 8], "convnext": [24, 5], "sam": [8, 8]},
}


def inputs(shapes: Mapping[str, Any], batch_size: int, device: str, dtype: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """The student's tokens, a leaf with gradient, and the teachers' features."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch_size, *shape, generator=generator).to(device, getattr(torch, dtype))

    features = {}
    for name, (width, side) in shapes["teachers"].items():
        cls = (draw(width) / width, draw(4, side**2).softmax(dim=-1)) if name == "clip" else ()
        features[name] = TeacherFeatures(draw(side**2, width), (side, side), *cls)
    return draw(shapes["grid"] ** 2, shapes["width"]).requires_grad_(), features


def build(shapes: Mapping[str, Any], device: str, dtype: str) -> Distiller:
    torch.manual_seed(0)
    teachers = {name: (width, (side, side)) for name, (width, side) in shapes["teachers"].items()}
    distiller = Distiller(shapes["width"], (shapes["grid"], shapes["grid"]), teachers)
    return distiller.to(device, getattr(torch, dtype))


def ours(distiller: Distiller, tokens: torch.Tensor, features: Mapping[str, TeacherFeatures]) -> torch.Tensor:
    return distiller(tokens, features).loss


def unreduced(distiller: Distiller, tokens: torch.Tensor, features: Mapping[str, TeacherFeatures]) -> torch.Tensor:
    """The same loss of the same adapters, each step of it for all teachers before the next."""
    clip = features["clip"]
    assert clip.cls is not None and clip.cls_attention is not None
    adapted = {name: distiller[name](tokens, value.tokens)[1] for name, value in features.items()}
    errors = {name: nn.functional.mse_loss(tokens, value, reduction="none") for name, value in adapted.items()}
    weights = token_weights(clip.cls_attention, "cls_attention").unsqueeze(-1)
    losses = {name: (weights * value.float()).mean(dim=-1).sum(dim=-1) for name, value in errors.items()}
    shares = teacher_weights(clip.cls, adapted, "cls_similarity", distiller.clip_share)
    return torch.stack([shares[name] * losses[name] for name in losses]).sum(dim=0)


VARIANTS = {"ours": ours, "unreduced": unreduced}


def step(
    loss: Callable[..., torch.Tensor], distiller: Distiller, tokens: torch.Tensor, features: Mapping[str, Any]
) -> Callable[[], Any]:
    """Forward and backward; gives the loss of the batch and drops the gradients."""

    def run() -> torch.Tensor:
        value = loss(distiller, tokens, features).mean()
        value.backward()
        for tensor in (tokens, *distiller.parameters()):
            tensor.grad = None
        return value.detach()

    return run


def measured(variant: str, shapes: dict[str, Any], batch_size: int, device: str, dtype: str) -> Callable[[], Any]:
    """For a fresh process: what is counted is the memory beyond inputs and parameters."""
    return step(VARIANTS[variant], build(shapes, device, dtype), *inputs(shapes, batch_size, device, dtype))


def main(arguments: list[str] | None = None) -> None:
    flags = parser(__doc__, repeats=3)
    flags.add_argument("--batch_size", type=int, default=16)
    options = flags.parse_args(arguments)
    torch.set_num_threads(options.threads)
    shapes, batch_size = (TOY, 2) if options.toy else (SHAPES, options.batch_size)
    common = {"shapes": shapes, "batch_size": batch_size, "device": options.device, "dtype": options.dtype}
    memory = {
        name: peak_memory("benchmarks.speed.losses:measured", {"variant": name, **common}, True, options.toy)
        for name in VARIANTS
    }

    distiller = build(shapes, options.device, options.dtype)
    tokens, features = inputs(shapes, batch_size, options.device, options.dtype)
    steps = {name: step(loss, distiller, tokens, features) for name, loss in VARIANTS.items()}
    torch.testing.assert_close(steps["ours"](), steps["unreduced"](), rtol=1e-3, atol=1e-3)
    times = paired_times(steps, options.repeats)
    medians = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
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
        Row(
            "the same: time of forward and backward",
            medians["ours"],
            medians["unreduced"],
            ratio=paired_ratio(times["ours"], times["unreduced"]),
            note="adapters run twice",
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
