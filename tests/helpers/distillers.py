"""Small distillers of every preset, and teacher features for them."""

from typing import Any

import torch

from train.build import DISTILLER_OPTIONS
from train.config import PRESETS
from train.distillation.distiller import DistillationOutput, Distiller
from train.teachers.features import TeacherFeatures


WIDTH, GRID = 16, (4, 6)
# The second divides by the student's grid, the third does not
TEACHERS = {"clip": (WIDTH, GRID), "eva": (12, (8, 12)), "sam": (24, (5, 7))}
# "sam" has no summary
SUMMARY_WIDTHS = {"clip": WIDTH, "eva": 20}


def make_distiller(preset: str = "paper", teachers: dict[str, Any] = TEACHERS, **overrides: Any) -> Distiller:
    torch.manual_seed(0)
    options = {name: PRESETS[preset][name] for name in DISTILLER_OPTIONS}
    options |= {"summary_widths": SUMMARY_WIDTHS, "whitening_components": 8}
    distiller = Distiller(WIDTH, GRID, teachers, **options | overrides)
    if distiller.needs_statistics:
        distiller.fit_statistics([make_features(16, seed=7, teachers=teachers)])
    return distiller


def make_features(
    batch_size: int = 4, seed: int = 1, teachers: dict[str, Any] = TEACHERS
) -> dict[str, TeacherFeatures]:
    """Features with correlated channels far from zero, one of them ten times as large as the others."""
    mixing, draw = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    features = {}
    for name, (width, grid) in teachers.items():
        mix = torch.randn(width, width, generator=mixing) / width**0.5
        tokens = torch.randn(batch_size, grid[0] * grid[1], width, generator=draw) @ mix + 3
        tokens[..., 0] *= 10
        cls = torch.randn(batch_size, width, generator=draw)
        attention = torch.randn(batch_size, 2, 1 + grid[0] * grid[1], generator=draw).softmax(dim=-1)[..., 1:]
        if name == "clip":
            features[name] = TeacherFeatures(tokens, grid, cls, attention, summary=cls)
        else:
            summary = torch.randn(batch_size, SUMMARY_WIDTHS.get(name, 1), generator=draw) + 2
            features[name] = TeacherFeatures(tokens, grid, summary=summary if name in SUMMARY_WIDTHS else None)
    return features


def make_student(batch_size: int = 4, seed: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, GRID[0] * GRID[1], WIDTH, generator=torch.Generator().manual_seed(seed))


def compare(distiller: Distiller, student: torch.Tensor, features: dict[str, TeacherFeatures]) -> DistillationOutput:
    """The distiller's output, with the mean of the student's tokens as its summary."""
    return distiller(student, features, student_summary=student.mean(dim=1))


def images(features: dict[str, TeacherFeatures], part: slice) -> dict[str, TeacherFeatures]:
    return {
        name: TeacherFeatures(
            value.tokens[part],
            value.grid,
            *(None if tensor is None else tensor[part] for tensor in value[2:]),
        )
        for name, value in features.items()
    }
