"""
What the student costs beside plain CLIP and its teachers: `python -m benchmarks.speed.efficiency CHECKPOINT`.

Parameters, FLOPs of one image, latency and memory, as a table and as a picture. The teachers are those that the
checkpoint's `training_facts.json` names, or those of `--teachers`.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.options import parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    flags = parser(__doc__, repeats=3)
    flags.add_argument("checkpoint", help="folder or Hub id of a MoVE-KD model")
    flags.add_argument("--teachers", nargs="+", help="names, Hub ids or folders; by default the checkpoint's own")
    flags.add_argument("--picture", type=Path, default=Path("outputs/efficiency.png"), help="PNG to write")
    return flags.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.utils import cached_file

from benchmarks.speed.measure import in_words, machine, paired_times, peak_memory, start, write_json
from benchmarks.speed.teachers import flops, runner
from modeling_movekd import MoveKDConfig, MoveKDVisionModel
from modeling_movekd.files import TRAINING_FACTS_NAME, read_json
from train.demo.run import save_figure
from train.teachers.config import resolve_teacher
from train.teachers.features import FrozenTeacher
from train.teachers.loaders import load_teacher


COLUMNS = {"parameters": "M", "FLOPs": "G", "latency": "ms", "memory": "MB"}
CLIP_FIELDS = ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size", "hidden_act")


def student(checkpoint: str) -> MoveKDVisionModel:
    """The checkpoint's tower, folded, with random weights."""
    tower = MoveKDVisionModel._from_config(MoveKDConfig.from_pretrained(checkpoint).vision_config).eval()
    tower.fold_experts()
    return tower


def plain_clip(checkpoint: str) -> CLIPVisionModel:
    """The CLIP that the tower was made from, with random weights: one layer more if the tower was cut."""
    config = MoveKDConfig.from_pretrained(checkpoint)
    vision = config.vision_config
    cut = config.vision_feature_layer == -1
    fields = {name: getattr(vision, name) for name in CLIP_FIELDS}
    return CLIPVisionModel(CLIPVisionConfig(**fields, num_hidden_layers=vision.num_hidden_layers + cut))


def teacher_specs(checkpoint: str) -> list[Any]:
    """
    The teachers that the checkpoint's metadata file names.

    Raises:
        ValueError: if there is no such file, or it names no teacher.
    """
    found = cached_file(checkpoint, TRAINING_FACTS_NAME, _raise_exceptions_for_missing_entries=False)
    named = read_json(found).get("teachers") if found else None
    if not named:
        raise ValueError(
            f"{checkpoint} has no {TRAINING_FACTS_NAME} that names teachers. Name them with `--teachers`."
        )
    return [{field: row[field] for field in ("name", "model", "revision") if row.get(field)} for row in named]


def build(kind: str, checkpoint: str, spec: Any = None) -> tuple[nn.Module, int]:
    """A model and its image size; `kind` is `"student"`, `"plain CLIP"` or `"teacher"`."""
    if kind == "student":
        tower = student(checkpoint)
        return tower, tower.config.image_size
    if kind == "plain CLIP":
        clip = plain_clip(checkpoint)
        return clip, clip.config.image_size
    teacher = load_teacher(resolve_teacher(spec))
    return teacher, teacher.preprocessor.image_size


def forward(model: nn.Module, size: int, device: str, dtype: str) -> Callable[[], Any]:
    """One image through a model."""
    model = model.to(device, getattr(torch, dtype)).eval()
    pixels = torch.randn(1, 3, size, size).to(device, getattr(torch, dtype))
    return torch.no_grad()(lambda: model(pixels)) if isinstance(model, FrozenTeacher) else runner(model, pixels)


def building_and_forward(case: dict[str, Any], device: str, dtype: str) -> Callable[[], Any]:
    """For a fresh process: building counts too, imports do not."""
    return lambda: forward(*build(**case), device, dtype)()


def measure(case: dict[str, Any], device: str, dtype: str, repeats: int, toy: bool) -> dict[str, float]:
    """One row of the table; `case` holds the arguments of [`build`]."""
    model, size = build(**case)
    parameters = sum(value.numel() for value in model.parameters())
    run = forward(model, size, device, dtype)
    operations = flops(run)
    seconds = statistics.median(paired_times({"forward": run}, repeats, warm_up=0)["forward"])
    del model, run
    arguments = {"case": case, "device": device, "dtype": dtype}
    memory = peak_memory("benchmarks.speed.efficiency:building_and_forward", arguments, beyond=True, toy=toy)
    return {
        "parameters": parameters / 1e6,
        "FLOPs": operations / 1e9,
        "latency": 1000 * seconds,
        "memory": memory / 2**20,
    }


def draw(path: Path, table: dict[str, dict[str, float]]) -> None:
    """A panel of bars for each column, on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(COLUMNS), 1 + 0.5 * len(table)), layout="constrained")
    names = list(table)[::-1]
    for axis, (column, unit) in zip(figure.subplots(1, len(COLUMNS), sharey=True), COLUMNS.items(), strict=True):
        values = [table[name][column] for name in names]
        colors = ["tab:orange" if name == "student" else "tab:blue" for name in names]
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, [f"{value:.3g}" for value in values], padding=3)
        axis.set_xscale("log")
        axis.set_xlim(min(values) / 3, max(values) * 4)
        axis.set_title(f"{column} ({unit})")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def markdown(table: dict[str, dict[str, float]], context: dict[str, Any]) -> str:
    """The table, each value with its multiple of the student's."""
    lines = ["| encoder | " + " | ".join(f"{column} ({unit})" for column, unit in COLUMNS.items()) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for name, values in table.items():
        cells = [f"{values[column]:.4g} ({values[column] / table['student'][column]:.3g} x)" for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", in_words(context)])


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    start(options)
    cases = {kind: {"checkpoint": options.checkpoint, "kind": kind} for kind in ("student", "plain CLIP")}
    for spec in options.teachers or teacher_specs(options.checkpoint):
        teacher = {"checkpoint": options.checkpoint, "kind": "teacher", "spec": spec}
        cases[f"teacher {resolve_teacher(spec).name}"] = teacher
    how = (options.device, options.dtype, options.repeats, options.toy)
    table = {name: measure(case, *how) for name, case in cases.items()}
    taught = [values for name, values in table.items() if name.startswith("teacher")]
    table["all teachers"] = {column: sum(values[column] for values in taught) for column in COLUMNS}
    table["all teachers"]["memory"] = max(values["memory"] for values in taught)  # one process after the other
    context = {
        **machine(),
        "batch": 1,
        "dtype": options.dtype,
        "repeats": options.repeats,
        "memory": "peak of a fresh process, beyond its imports; of all teachers the largest",
    }
    print(markdown(table, context))
    draw(options.picture, table)
    print(f"\nPicture: {options.picture}")
    if options.out:
        write_json({"context": context, "rows": table}, options.out)


if __name__ == "__main__":
    main()
