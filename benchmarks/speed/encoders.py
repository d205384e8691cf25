"""
The student's tower beside the encoders that it was distilled from: `python -m benchmarks.speed.encoders`.

All have random weights of full size, and one image at the size that each takes. Each encoder is timed beside the
student's tower and dropped before the next one is built; their times are added up.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.speed.options import parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return parser(__doc__, repeats=1).parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

import torch
from torch import nn

from benchmarks.speed.measure import Row, paired_times, report, start
from benchmarks.speed.teachers import ENCODERS, clip, flops, image_size, runner
from modeling_movekd import MoveKDVisionModel


def student(toy: bool = False) -> nn.Module:
    """Folded, as it runs at inference."""
    tower = MoveKDVisionModel.from_clip(clip(toy), num_experts=3, lora_rank=32).eval()
    tower.fold_experts()
    return tower


def counts(build: Callable[[bool], nn.Module], size: int, toy: bool) -> tuple[int, int]:
    """Parameters and FLOPs of one image's forward, on the meta device."""
    with torch.device("meta"):
        model = build(toy).eval()
        pixels = torch.empty(1, 3, size, size)
    return sum(value.numel() for value in model.parameters()), flops(runner(model, pixels))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    start(options)
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
