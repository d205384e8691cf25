"""The paper's teachers with random weights, and the distillation losses on their features."""

from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, SamVisionConfig, SamVisionModel

from benchmarks.speed.models import CLIP_LARGE, TOY_CLIP
from train.distillation.distiller import Distiller
from train.plan.step import FLOP_FORMULAS
from train.teachers.config import TEACHERS
from train.teachers.eva02 import Eva02DetectionBackbone, Eva02DetectionConfig
from train.teachers.features import TeacherFeatures


SAM_LARGE: dict[str, Any] = {"hidden_size": 1024, "mlp_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SAM_LARGE |= {"global_attn_indexes": [5, 11, 17, 23], "image_size": 1024}
TOY_EVA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
TOY_SAM: dict[str, Any] = {"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOY_SAM |= {"global_attn_indexes": [1], "image_size": 64, "output_channels": 16, "window_size": 2}
# The student's width and grid, then each teacher's, at 336 and 1024 pixels
SHAPES: dict[str, Any] = {
    "width": 1024,
    "grid": 24,
    "teachers": {"clip": [1024, 24], "eva02": [1024, 64], "convnext": [3072, 32], "sam": [256, 64]},
}
TOY_SHAPES: dict[str, Any] = {
    "width": 16,
    "grid": 4,
    "teachers": {"clip": [16, 4], "eva02": [16, 8], "convnext": [24, 5], "sam": [8, 8]},
}


def clip(toy: bool = False) -> nn.Module:
    return CLIPVisionModel(CLIPVisionConfig(**(TOY_CLIP if toy else CLIP_LARGE)))


def eva02(toy: bool = False) -> nn.Module:
    return Eva02DetectionBackbone(Eva02DetectionConfig(**(TOY_EVA if toy else {})))


def convnext(toy: bool = False) -> nn.Module:
    name = "convnext_atto" if toy else TEACHERS["convnext"].model.partition(".")[0]
    return timm.create_model(name, pretrained=False, num_classes=0)


def sam(toy: bool = False) -> nn.Module:
    return SamVisionModel(SamVisionConfig(**(TOY_SAM if toy else SAM_LARGE)))


ENCODERS: dict[str, Callable[[bool], nn.Module]] = {"clip": clip, "eva02": eva02, "convnext": convnext, "sam": sam}


def image_size(name: str, toy: bool = False) -> int:
    if name in ("student", "clip"):
        return (TOY_CLIP if toy else CLIP_LARGE)["image_size"]
    return 64 if toy else int(TEACHERS[name].image_size or 0)


def runner(model: nn.Module, pixels: torch.Tensor) -> Callable[[], Any]:
    """The forward of a model up to its features, which timm's own forward would pool."""
    return torch.no_grad()(lambda: getattr(model, "forward_features", model)(pixels))


def flops(run: Callable[[], Any]) -> int:
    """Operations of a call; a multiplication and an addition count as two."""
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        run()
    return counter.get_total_flops()


def distillation_inputs(
    shapes: Mapping[str, Any], batch_size: int, device: str, dtype: str
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The student's tokens, a leaf with gradient, and the teachers' features."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch_size, *shape, generator=generator).to(device, getattr(torch, dtype))

    features = {}
    for name, (width, side) in shapes["teachers"].items():
        cls = (draw(width) / width, draw(4, side**2).softmax(dim=-1)) if name == "clip" else ()
        features[name] = TeacherFeatures(draw(side**2, width), (side, side), *cls)
    return draw(shapes["grid"] ** 2, shapes["width"]).requires_grad_(), features


def build_distiller(shapes: Mapping[str, Any], device: str, dtype: str) -> Distiller:
    torch.manual_seed(0)
    teachers = {name: (width, (side, side)) for name, (width, side) in shapes["teachers"].items()}
    distiller = Distiller(shapes["width"], (shapes["grid"], shapes["grid"]), teachers)
    return distiller.to(device, getattr(torch, dtype))


def distillation_loss(
    distiller: Distiller, tokens: torch.Tensor, features: Mapping[str, TeacherFeatures]
) -> torch.Tensor:
    return distiller(tokens, features).loss


def distillation_step(
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
