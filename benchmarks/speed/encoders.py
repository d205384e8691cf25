"""
The student's tower beside the encoders that it was distilled from: `python -m benchmarks.speed.encoders`.

All have random weights of full size. One image at the size that each takes; the encoders are built, timed and dropped
one at a time, the student's tower beside each of them, and their times added up.
"""

import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, SamVisionConfig, SamVisionModel

from benchmarks.speed.measure import Row, paired_times, parser, report
from benchmarks.speed.tower import CLIP_LARGE
from benchmarks.speed.tower import TOY as TOY_TOWER
from modeling_movekd import MoveKDVisionModel
from train.plan.step import FLOP_FORMULAS
from train.teachers.config import TEACHERS
from train.teachers.eva02 import Eva02DetectionBackbone, Eva02DetectionConfig


SAM_LARGE: dict[str, Any] = {"hidden_size": 1024, "mlp_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SAM_LARGE |= {"global_attn_indexes": [5, 11, 17, 23], "image_size": 1024}
TOY_EVA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
TOY_SAM: dict[str, Any] = {"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOY_SAM |= {"global_attn_indexes": [1], "image_size": 64, "output_channels": 16, "window_size": 2}


def clip(toy: bool = False) -> nn.Module:
    return CLIPVisionModel(CLIPVisionConfig(**(TOY_TOWER if toy else CLIP_LARGE)))


def student(toy: bool = False) -> nn.Module:
    """Folded, as it runs at inference."""
    tower = MoveKDVisionModel.from_clip(clip(toy), num_experts=3, lora_rank=32).eval()
    tower.fold_experts()
    return tower


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
        return (TOY_TOWER if toy else CLIP_LARGE)["image_size"]
    return 64 if toy else int(TEACHERS[name].image_size or 0)


def runner(model: nn.Module, pixels: torch.Tensor) -> Callable[[], Any]:
    forward = getattr(model, "forward_features", model)  # timm's models would pool

    @torch.no_grad()
    def run() -> Any:
        return forward(pixels)

    return run


def flops(model: nn.Module, size: int) -> int:
    """Of one image's forward; `model` on the meta device. A product counts as two."""
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        runner(model, torch.empty(1, 3, size, size, device="meta"))()
    return counter.get_total_flops()


def counts(build: Callable[[bool], nn.Module], size: int, toy: bool) -> tuple[int, int]:
    """Parameters and FLOPs, without weights."""
    with torch.device("meta"):
        model = build(toy).eval()
    # Folding replaces parameters by larger ones that hold the experts too
    return sum(value.numel() for value in model.parameters()), flops(model, size)


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, repeats=1).parse_args(arguments)
    torch.set_num_threads(options.threads)
    dtype, toy = getattr(torch, options.dtype), options.toy

    def timed(build: Callable[[bool], nn.Module], name: str) -> Callable[[], Any]:
        model = build(toy).to(options.device, dtype).eval()
        size = image_size(name, toy)
        return runner(model, torch.randn(1, 3, size, size).to(options.device, dtype))

    ours_parameters, ours_flops = counts(student, image_size("student", toy), toy)
    run_student = timed(student, "student")
    ours: list[float] = []
    rows, seconds, parameters, operations = [], 0.0, 0, 0
    for name, build in ENCODERS.items():
        of_encoder, of_forward = counts(build, image_size(name, toy), toy)
        times = paired_times({"ours": run_student, name: timed(build, name)}, options.repeats)
        ours += times["ours"]
        median = statistics.median(times[name])
        seconds, parameters, operations = seconds + median, parameters + of_encoder, operations + of_forward
        note = f"{of_encoder / 1e6:.0f} M parameters, {of_forward / 1e9:.4g} GFLOPs"
        rows.append(
            Row(f"student / {name}, time", statistics.median(times["ours"]), median, times_faster=True, note=note)
        )
    summed: dict[str, Any] = {"times_faster": True, "note": "rival: CLIP + EVA-02 + ConvNeXt + SAM"}
    rows += [
        Row("student / all four, time", statistics.median(ours), seconds, at_least=20, **summed),
        Row("student / all four, FLOPs", ours_flops / 1e9, operations / 1e9, "G", at_least=30, **summed),
        Row("student / all four, parameters", ours_parameters / 1e6, parameters / 1e6, "M", at_least=5, **summed),
    ]
    context = {"batch": 1, "dtype": options.dtype, "repeats": options.repeats}
    report("Encoders side by side", rows, context, options.out)


if __name__ == "__main__":
    main()
