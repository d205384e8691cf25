"""
Whether a recipe fits and how long it takes, before a weight is loaded.

    python -m train.plan --config train/recipes/v1.0-7b-pretrain.yaml --gpus 8 --gpu-memory 80GB
    python -m train.plan --config train/recipes/v1.0-7b-finetune.yaml --gpus 8 --gpu-memory 80GB \
        --vision_model openai/clip-vit-large-patch14-336 --language_model lmsys/vicuna-7b-v1.5

Any key of the recipe can follow as a flag. A recipe that continues a student which does not exist yet needs the
`--vision_model` and `--language_model` of the stage before. Only configurations are read.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl import TrlParser

from train.config import DataArguments, ModelArguments, MoveKDSFTConfig, accumulation_steps
from train.data.datasets import DataSource, data_sources
from train.data.sources import open_rows
from train.plan.memory import (
    BackendMemory,
    ParameterCounts,
    count_parameters,
    optimizer_name,
    sharded_memory,
    usable_backends,
)
from train.plan.models import build_planned_run
from train.plan.step import input_bytes, measure_activations, measure_flops
from train.teachers.cached import INDEX_NAME


# Rows of data sets that are not on this machine, in thousands as their names say; `--rows` for any other
NAMED_ROWS = {"blip_laion_cc_sbu_558k.json": 558_000, "llava_v1_5_mix665k.json": 665_000}


def training_days(flops_per_step: float, steps: int, gpus: int, peak_tflops: float, utilization: float) -> float:
    """Days for `steps` of `flops_per_step` over all GPUs, each at `utilization` of its `peak_tflops`."""
    return flops_per_step * steps / (gpus * peak_tflops * 1e12 * utilization) / 86_400


def parse_memory(text: str) -> int:
    """Bytes of `"80GB"` (10^9 each) or `"80GiB"` (2^30 each)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB)", text.strip())
    if match is None:
        raise ValueError(f"The memory is {text!r}; write it as 80GB or 80GiB.")
    return int(float(match[1]) * (10**9 if match[2] == "GB" else 2**30))


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their cells, the first aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class StepMeasures:
    """One GPU's part of a step, whatever the number of GPUs. `row_flops` has the teachers' and the `"student"`'s."""

    counts: ParameterCounts
    teacher_parameters: dict[str, int]
    teacher_bytes: int
    activations: dict[str, dict[bool, int]]  # by backend, and whether activations are recomputed
    row_bytes: int
    row_flops: dict[str, int]
    memory_tokens: int
    mean_tokens: int


@dataclass(frozen=True)
class Plan:
    """A step over all GPUs. FLOPs are without recomputation."""

    step: StepMeasures
    memory: dict[str, dict[bool, BackendMemory]]  # by backend, and whether activations are recomputed
    student_flops: int
    teacher_flops: dict[str, int]
    accumulation: int
    global_batch: int

    @property
    def flops(self) -> int:
        return self.student_flops + sum(self.teacher_flops.values())


def measure_step(
    args: MoveKDSFTConfig,
    model_args: ModelArguments,
    memory_tokens: int | None = None,
    mean_tokens: int | None = None,
) -> StepMeasures:
    """
    Measure what does not depend on the number of GPUs, from configurations alone.

    Args:
        memory_tokens (`int`, *optional*, defaults to `max_length`): Length of the rows that must fit, with the image.
        mean_tokens (`int`, *optional*, defaults to `memory_tokens`): Length of the mean row, for the FLOPs.

    Raises:
        ValueError: if there is no length, or the optimizer is not one of [`train.plan.memory.OPTIMIZERS`].
    """
    optimizer = optimizer_name(args)
    batch_size, longest = args.per_device_train_batch_size, memory_tokens or args.max_length
    if longest is None:
        raise ValueError("`max_length` is not set; say how long rows are with `--memory-tokens`.")
    mean = mean_tokens or longest
    dtype = getattr(torch, "float32" if model_args.dtype == "auto" else model_args.dtype)

    _, model, teachers = build_planned_run(args, model_args, dtype)
    backends, half = usable_backends(args), args.bf16
    activations: dict[str, dict[bool, int]] = {backend: {} for backend in backends}
    for recomputed in (True, False):
        lengths = (args, model_args, batch_size, longest)
        # DDP casts weights as it goes, the others compute in bf16 weights
        casting = measure_activations(*lengths, dtype, autocast=half, checkpointing=recomputed)
        cast = casting
        if half and len(backends) > 1:
            cast = measure_activations(*lengths, torch.bfloat16, autocast=False, checkpointing=recomputed)
        for backend in backends:
            activations[backend][recomputed] = casting if backend == "DDP" else cast
    weights = {name: list(teacher.parameters()) for name, teacher in teachers.items()}
    return StepMeasures(
        count_parameters(model, tuple(model._no_split_modules or ()), optimizer),
        {name: sum(value.numel() for value in values) for name, values in weights.items()},
        sum(value.nbytes for values in weights.values() for value in values),
        activations,
        input_bytes(model, teachers, args, longest),
        measure_flops(args, model_args, mean),
        longest,
        mean,
    )


def plan_run(args: MoveKDSFTConfig, step: StepMeasures, gpus: int) -> Plan:
    """A step on `gpus` GPUs with a process each. Raises a `ValueError` if the global batch does not divide."""
    accumulation = args.gradient_accumulation_steps
    if args.global_batch_size is not None:
        accumulation = accumulation_steps(args.global_batch_size, args.per_device_train_batch_size, gpus)
    rows = args.per_device_train_batch_size * accumulation

    def memory(backend: str, activations: int) -> BackendMemory:
        inputs = rows * step.row_bytes
        return sharded_memory(backend, step.counts, gpus, step.teacher_bytes, activations, args.bf16, inputs)

    by_backend = {
        backend: {recomputed: memory(backend, size) for recomputed, size in sizes.items()}
        for backend, sizes in step.activations.items()
    }
    flops = {name: value * rows * gpus for name, value in step.row_flops.items()}
    return Plan(step, by_backend, flops.pop("student"), flops, accumulation, rows * gpus)


def _memory_lines(plan: Plan, args: MoveKDSFTConfig, gpu_memory: int, headroom: float) -> list[str]:
    usable, table, fitting = gpu_memory * (1 - headroom), [], []
    for backend, memory in plan.memory.items():
        kept, recomputed = memory[False], memory[True]
        shared = [kept.weights, kept.gradients, kept.optimizer, kept.teachers, kept.inputs, kept.communication]
        sizes = [*shared, recomputed.activations, recomputed.total, kept.activations, kept.total]
        names = {"recomputed": recomputed, "kept": kept}
        fits = [name for name, used in names.items() if used.total <= usable]
        fitting += [backend] if memory[bool(args.activation_checkpointing)].total <= usable else []
        table.append([backend, *(f"{size / 1e9:.1f}" for size in sizes), " or ".join(fits) or "no"])
    header = ["GB per GPU", "weights", "gradients", "optimizer", "teachers", "inputs", "buffers*"]
    header += ["recomputed*", "total", "kept*", "total", "fits"]
    return [
        format_table(header, table),
        f"In {gpu_memory / 1e9:.0f} GB less {headroom:.0%} for context and fragmentation, with activations "
        f"{'recomputed' if args.activation_checkpointing else 'kept'} as the recipe has them, fit: "
        f"{', '.join(fitting) or 'none'}.",
        "* estimated: activations (recomputed by checkpointing, or kept) by the kernels of a CPU, buffers by the",
        f"defaults of the libraries. The other bytes follow from the counts, with `optim` {optimizer_name(args)}.",
    ]


def format_plan(
    plan: Plan,
    args: MoveKDSFTConfig,
    gpus: int,
    gpu_memory: int,
    headroom: float,
    rows: int | None,
    peak_tflops: float,
    utilization: float,
    rows_origin: str = "as given",
) -> str:
    """The report that the command prints; `rows_origin` says where the number of `rows` is from."""
    step, counts = plan.step, plan.step.counts
    parameters = [
        [part, f"{counts.trained.get(part, 0) / 1e6:,.2f}", f"{counts.frozen.get(part, 0) / 1e6:,.2f}"]
        for part in dict.fromkeys((*counts.trained, *counts.frozen))
    ]
    parameters += [[f"teacher {name}", "0.00", f"{n / 1e6:,.2f}"] for name, n in step.teacher_parameters.items()]
    lines = [
        f"Stage {args.stage} on {gpus} GPUs: global batch {plan.global_batch} = {args.per_device_train_batch_size} "
        f"per GPU x {plan.accumulation} accumulated x {gpus}; rows of {step.memory_tokens} tokens for memory, "
        f"{step.mean_tokens} for FLOPs, one image each.",
        "",
        format_table(["parameters (million)", "trained", "frozen"], parameters),
        "",
        *_memory_lines(plan, args, gpu_memory, headroom),
    ]
    if args.feature_cache is not None:
        there = (Path(args.feature_cache) / INDEX_NAME).is_file()
        kind = "as it is" if there else "which is not there yet, in float16"
        lines.append(f"Teachers are not in memory: their features are read from {args.feature_cache}, {kind}.")
    flops = [["student, forward and backward", f"{plan.student_flops / 1e15:,.3f}"]]
    flops += [[f"teacher {name}, forward", f"{value / 1e15:,.3f}"] for name, value in plan.teacher_flops.items()]
    lines += ["", format_table(["PFLOP per step, all GPUs", ""], flops)]
    if args.max_steps > 0:
        steps = args.max_steps
    elif rows is None:
        return "\n".join([*lines, "The number of rows is unknown: give `--rows` for the days."])
    else:
        lines.append(f"{rows:,} rows ({rows_origin}), {args.num_train_epochs:g} times.")
        steps = int(-(-rows * args.num_train_epochs // plan.global_batch))
    days = training_days(plan.flops, steps, gpus, peak_tflops, utilization)
    lines.append(
        f"{steps:,} steps at {utilization:.0%} of {peak_tflops:g} TFLOP/s per GPU: {days:.2f} days ({days * 24:.1f} "
        "hours), without recomputation, data loading and saving."
    )
    return "\n".join(lines)


def count_rows(sources: Sequence[DataSource]) -> tuple[int | None, str]:
    """
    Rows of all data sets, and where the number is from: counted where the data is on this machine, else as
    [`NAMED_ROWS`] has it. `None` where a data set is neither, or where weights decide how often a row is drawn.
    """
    if any(source.weight is not None for source in sources):
        return None, ""
    counts, origins = [], []
    for source in sources:
        here, named = Path(source.name).exists(), NAMED_ROWS.get(Path(source.name).name)
        counts.append(len(open_rows(source.name, source.split or "train", source.subset, False)) if here else named)
        origins.append("counted" if here else "as the file is named, to be checked with `--rows`")
    known = [count for count in counts if count is not None]
    return (sum(known) if len(known) == len(counts) else None), " and ".join(dict.fromkeys(origins))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m train.plan", description=__doc__.split("\n\n")[0])
    parser.add_argument("--gpus", type=int, required=True, help="Number of GPUs, with one process each.")
    parser.add_argument("--gpu-memory", required=True, help="Memory of one GPU, as 80GB or 80GiB.")
    parser.add_argument("--headroom", type=float, default=0.1, help="Share of it for context and fragmentation.")
    parser.add_argument("--gpu-peak", type=float, default=312.0, help="TFLOP/s in bf16, dense; an A100 has 312.")
    parser.add_argument("--utilization", type=float, default=0.4, help="Share of the peak that is reached.")
    parser.add_argument("--memory-tokens", type=int, help="Length of the rows that must fit; max_length by default.")
    parser.add_argument("--mean-tokens", type=int, help="Length of the mean row, for FLOPs; as above by default.")
    parser.add_argument("--rows", type=int, help="Rows of the data set, where it is not on this machine.")
    options, recipe = parser.parse_known_args(arguments)
    try:
        gpu_memory = parse_memory(options.gpu_memory)
    except ValueError as error:
        parser.error(str(error))
    bounds = {"gpus": (1, 10**6), "headroom": (0, 0.99), "gpu_peak": (0.1, 1e6), "utilization": (0.01, 1)}
    for name, (low, high) in bounds.items():
        if not low <= (value := getattr(options, name)) <= high:
            parser.error(f"--{name.replace('_', '-')} is {value}; it goes from {low:g} to {high:g}.")
    recipe_parser = TrlParser((DataArguments, MoveKDSFTConfig, ModelArguments))
    parsed: tuple[Any, ...] = recipe_parser.parse_args_and_config([*recipe, "--use_cpu", "true"])
    data_args, args, model_args = parsed
    rows, origin = (options.rows, "as given") if options.rows else count_rows(data_sources(data_args))
    if args.global_batch_size is not None:  # refuse before measuring, which takes a minute
        accumulation_steps(args.global_batch_size, args.per_device_train_batch_size, options.gpus)
    plan = plan_run(args, measure_step(args, model_args, options.memory_tokens, options.mean_tokens), options.gpus)
    speed = (options.gpu_peak, options.utilization)
    print(format_plan(plan, args, options.gpus, gpu_memory, options.headroom, rows, *speed, origin))


if __name__ == "__main__":
    main(sys.argv[1:])
