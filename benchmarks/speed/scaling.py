"""
How time grows with the work: `python -m benchmarks.speed.scaling`. Writes curves as a PNG and their points as JSON.

For a tower of CLIP-B/16's size, seconds of the folded forward and of a training step over image size, batch, number of
experts and their rank; for the distillation losses and heads, seconds over the number of teachers. README.md explains
the curves.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.options import parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    flags = parser(__doc__, repeats=3)
    flags.add_argument("--picture", type=Path, default=Path("outputs/scaling.png"), help="PNG to write")
    return flags.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()


from benchmarks.speed import teachers
from benchmarks.speed.measure import in_words, machine, paired_times, start, write_json
from benchmarks.speed.models import TOY_CLIP, TowerCase, forward, training_step
from train.demo.run import save_figure


CLIP_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_BASE |= {"image_size": 224, "patch_size": 16, "projection_dim": 512}
CURVES = {
    "image size": [112, 224, 448, 672],
    "batch": [1, 2, 4, 8],
    "experts": [1, 2, 4, 8, 16],
    "rank": [8, 16, 32, 64, 128],
}
TOY_CURVES = {"image size": [28, 56], "batch": [1, 2], "experts": [1, 2], "rank": [2, 4]}


def tower_case(toy: bool, device: str, dtype: str, **changes: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The folded forward and the training step, with one of the sizes changed."""
    sizes = dict(TOY_CLIP if toy else CLIP_BASE)
    sizes["image_size"] = changes.get("image size", sizes["image_size"])
    case = TowerCase(
        sizes,
        batch_size=changes.get("batch", 2),
        num_experts=changes.get("experts", 3),
        lora_rank=changes.get("rank", 32),
        device=device,
        dtype=dtype,
    )
    folded = case.tower().eval()
    folded.fold_experts()
    return forward(folded, case.pixels()), training_step(case.tower(), case.pixels())


def measure_tower(curve: str, values: list[int], options: Any) -> dict[str, list[float]]:
    functions: dict[str, Callable[[], Any]] = {}
    for value in values:
        cases = tower_case(options.toy, options.device, options.dtype, **{curve: value})
        for kind, run in zip(("forward", "step"), cases, strict=True):
            functions[f"{kind} {value}"] = run
    times = paired_times(functions, options.repeats)
    return {kind: [statistics.median(times[f"{kind} {value}"]) for value in values] for kind in ("forward", "step")}


def measure_losses(options: Any) -> list[float]:
    shapes = teachers.TOY_SHAPES if options.toy else teachers.SHAPES
    names = list(shapes["teachers"])
    functions = {}
    for number in range(1, len(names) + 1):
        some = {**shapes, "teachers": {name: shapes["teachers"][name] for name in names[:number]}}
        distiller = teachers.build_distiller(some, options.device, options.dtype)
        inputs = teachers.distillation_inputs(some, 2, options.device, options.dtype)
        functions[str(number)] = teachers.distillation_step(teachers.distillation_loss, distiller, *inputs)
    return [statistics.median(values) for values in paired_times(functions, options.repeats).values()]


def draw(path: Path, curves: dict[str, dict[str, Any]]) -> None:
    """A panel for each curve, with logarithmic axes; the dotted lines grow in proportion to pixels and batch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(3.6 * len(curves), 3.6), layout="constrained")
    for axis, (name, curve) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        at = curve["at"]
        for kind, seconds in curve["seconds"].items():
            (line,) = axis.plot(at, seconds, marker="o", label=kind)
            if name in ("image size", "batch"):
                power = 2 if name == "image size" else 1
                ideal = [seconds[0] * (value / at[0]) ** power for value in at]
                axis.plot(at, ideal, linestyle=":", color=line.get_color())
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(at, [str(value) for value in at])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(name)
        axis.set_ylabel("seconds")
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    start(options)
    curves: dict[str, dict[str, Any]] = {}
    for name, values in (TOY_CURVES if options.toy else CURVES).items():
        curves[name] = {"at": values, "seconds": measure_tower(name, values, options)}
    losses = measure_losses(options)
    curves["teachers"] = {"at": list(range(1, 1 + len(losses))), "seconds": {"losses and heads": losses}}
    context = {**machine(), "tower": "CLIP-B/16, batch 2, 3 experts, rank 32", "repeats": options.repeats}
    lines = ["### Time over work", "", "| over | at | what | seconds |", "|---|---|---|---|"]
    for name, curve in curves.items():
        for kind, values in curve["seconds"].items():
            seconds = ", ".join(f"{value:.3g}" for value in values)
            lines.append(f"| {name} | {', '.join(map(str, curve['at']))} | {kind} | {seconds} |")
    print("\n".join([*lines, "", in_words(context)]))
    draw(options.picture, curves)
    if options.out:
        write_json({"context": context, "curves": curves}, options.out)


if __name__ == "__main__":
    main()
