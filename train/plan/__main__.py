"""
Whether a recipe fits and how long it takes, before a weight is loaded.

    python -m train.plan --config train/recipes/v1.0-7b-pretrain.yaml --gpus 8 --gpu-memory 80GB
    python -m train.plan --config train/recipes/v1.0-7b-finetune.yaml --gpus 8 --gpu-memory 80GB \
        --vision_model openai/clip-vit-large-patch14-336 --language_model lmsys/vicuna-7b-v1.5

Any key of the recipe can follow as a flag. A recipe that continues a student which does not exist yet needs the
`--vision_model` and `--language_model` of the one before. Only configurations are read.
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


# Rows of data sets that are not at hand, in thousands as their names say, for the days; `--rows` for any other
NAMED_ROWS = {"blip_laion_cc_sbu_558k.json": 558_000, "llava_v1_5_mix665k.json": 665_000}


def training_days(flops_per_step: float, steps: int, gpus: int, peak_tflops: float, utilization: float) -> float:
    """Days for `steps` of `flops_per_step` over all GPUs, each at `utilization` of its `peak_tflops`."""
    return flops_per_step * steps / (gpus * peak_tflops * 1e12 * utilization) / 86_400


def parse_memory(text: str) -> int:
    """
    `"80GB"` (10^9 bytes) or `"80GiB"` (2^30) to bytes.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB)", text.strip())
    if match is None:
        raise ValueError(f"The memory is {text!r}; write it as 80GB or 80GiB.")
    return int(float(match[1]) * (10**9 if match[2] == "GB" else 2**30))


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in (header, *rows))
    ]
    return "\n".join(line.rstrip() for line in lines)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}"


@dataclass(frozen=True)
class StepMeasures:
    """
    What [`measure_step`] found of one GPU's part of a step.

    Args:
        counts (`ParameterCounts`): Of student and distiller.
        teacher_parameters (`dict[str, int]`): By teacher.
        teacher_bytes (`int`): Of all teachers' weights.
        activations (`dict[str, dict[bool, int]]`): Bytes by backend, with activation checkpointing (`True`) and
            without.
        row_bytes (`int`): Of the inputs of a row.
        row_flops (`dict[str, int]`): Of a row, by teacher and for the `"student"`.
        tokens (`dict[str, int]`): Tokens of a row assumed for `"memory"` and for `"FLOPs"`.
    """

    counts: ParameterCounts
    teacher_parameters: dict[str, int]
    teacher_bytes: int
    activations: dict[str, dict[bool, int]]
    row_bytes: int
    row_flops: dict[str, int]
    tokens: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """
    What [`plan_run`] found.

    Args:
        counts (`ParameterCounts`): Of student and distiller.
        teacher_parameters (`dict[str, int]`): By teacher.
        memory (`dict[str, dict[bool, BackendMemory]]`): By backend, with activation checkpointing (`True`) and
            without.
        student_flops (`int`), teacher_flops (`dict[str, int]`): Of one optimiser step over all GPUs, without what
            activation checkpointing computes again.
        accumulation (`int`): Micro-batches of one step.
        global_batch (`int`): Rows of one step.
        tokens (`dict[str, int]`): Tokens of a row assumed for `"memory"` and for `"FLOPs"`.
    """

    counts: ParameterCounts
    teacher_parameters: dict[str, int]
    memory: dict[str, dict[bool, BackendMemory]]
    student_flops: int
    teacher_flops: dict[str, int]
    accumulation: int
    global_batch: int
    tokens: dict[str, int]

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
    What does not depend on the number of GPUs, from configurations alone.

    Args:
        memory_tokens (`int`, *optional*): Length of the rows that must fit, image included; `max_length` by default.
        mean_tokens (`int`, *optional*): Length of the mean row, for the FLOPs; as above by default, which is too many.

    Raises:
        ValueError: if there is no length, or the optimiser is not one of [`train.plan.memory.OPTIMIZERS`].
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
    for checkpointing in (True, False):
        lengths = (args, model_args, batch_size, longest)
        # DDP casts weights as it goes, the others compute in bf16 weights
        casting = measure_activations(*lengths, dtype, autocast=half, checkpointing=checkpointing)
        cast = casting
        if half and len(backends) > 1:
            cast = measure_activations(*lengths, torch.bfloat16, autocast=False, checkpointing=checkpointing)
        for backend in backends:
            activations[backend][checkpointing] = casting if backend == "DDP" else cast
    return StepMeasures(
        count_parameters(model, tuple(model._no_split_modules or ()), optimizer),
        {name: teacher.num_parameters for name, teacher in teachers.items()},
        sum(teacher.bytes for teacher in teachers.values()),
        activations,
        input_bytes(model, teachers, args, longest),
        measure_flops(args, model_args, mean),
        {"memory": longest, "FLOPs": mean},
    )


def plan_run(args: MoveKDSFTConfig, step: StepMeasures, gpus: int) -> Plan:
    """
    Everything but the time, on `gpus` GPUs with a process each.

    Raises:
        ValueError: if the global batch does not divide.
    """
    accumulation = args.gradient_accumulation_steps
    if args.global_batch_size is not None:
        accumulation = accumulation_steps(args.global_batch_size, args.per_device_train_batch_size, gpus)
    rows = args.per_device_train_batch_size * accumulation
    memory = {
        backend: {
            checkpointing: sharded_memory(
                backend, step.counts, gpus, step.teacher_bytes, activations, args.bf16, rows * step.row_bytes
            )
            for checkpointing, activations in by_checkpointing.items()
        }
        for backend, by_checkpointing in step.activations.items()
    }
    flops = {name: value * rows * gpus for name, value in step.row_flops.items()}
    student_flops = flops.pop("student")
    parts = (step.counts, step.teacher_parameters, memory, student_flops, flops, accumulation, rows * gpus)
    return Plan(*parts, step.tokens)


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
    counts, usable = plan.counts, gpu_memory * (1 - headroom)
    parts = list(dict.fromkeys((*counts.trained, *counts.frozen)))
    parameters = [
        [part, f"{counts.trained.get(part, 0) / 1e6:,.2f}", f"{counts.frozen.get(part, 0) / 1e6:,.2f}"]
        for part in parts
    ]
    parameters += [[f"teacher {name}", "0.00", f"{n / 1e6:,.2f}"] for name, n in plan.teacher_parameters.items()]
    lines = [
        f"Stage {args.stage} on {gpus} GPUs: global batch {plan.global_batch} = {args.per_device_train_batch_size} "
        f"per GPU x {plan.accumulation} accumulated x {gpus}; rows of {plan.tokens['memory']} tokens for memory, "
        f"{plan.tokens['FLOPs']} for FLOPs, one image each.",
        "",
        format_table(["parameters (million)", "trained", "frozen"], parameters),
        "",
    ]
    table, fitting = [], []
    for backend, by_checkpointing in plan.memory.items():
        kept, recomputed = by_checkpointing[False], by_checkpointing[True]
        shared = [kept.weights, kept.gradients, kept.optimizer, kept.teachers, kept.inputs, kept.communication]
        names = {True: "recomputed", False: "kept"}
        fits = [names[on] for on, used in by_checkpointing.items() if used.total <= usable]
        fitting += [backend] if by_checkpointing[bool(args.activation_checkpointing)].total <= usable else []
        sizes = [*shared, recomputed.activations, recomputed.total, kept.activations, kept.total]
        table.append([backend, *map(_gigabytes, sizes), " or ".join(fits) or "no"])
    header = ["GB per GPU", "weights", "gradients", "optimiser", "teachers", "inputs", "buffers*"]
    header += ["recomputed*", "total", "kept*", "total", "fits"]
    lines.append(format_table(header, table))
    lines += [
        f"In {gpu_memory / 1e9:.0f} GB less {headroom:.0%} for context and fragmentation, with activations "
        f"{'recomputed' if args.activation_checkpointing else 'kept'} as the recipe has them, fit: "
        f"{', '.join(fitting) or 'none'}.",
        "* estimated: activations (recomputed by checkpointing, or kept) by the kernels of a CPU, buffers by the",
        f"defaults of the libraries. The other bytes follow from the counts, with `optim` {optimizer_name(args)}.",
    ]
    if args.feature_cache is not None:
        there = (Path(args.feature_cache) / INDEX_NAME).is_file()
        kind = "as it is" if there else "which is not there yet, in float16"
        lines.append(f"Teachers are not in memory: their features are read from {args.feature_cache}, {kind}.")
    lines.append("")
    flops = [["student, forward and backward", f"{plan.student_flops / 1e15:,.3f}"]]
    flops += [[f"teacher {name}, forward", f"{value / 1e15:,.3f}"] for name, value in plan.teacher_flops.items()]
    lines.append(format_table(["PFLOP per step, all GPUs", ""], flops))
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


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m train.plan", description=__doc__.split("\n\n")[0])
    parser.add_argument("--gpus", type=int, required=True, help="Number of GPUs, one process each.")
    parser.add_argument("--gpu-memory", required=True, help="Memory of one, as 80GB or 80GiB.")
    parser.add_argument("--headroom", type=float, default=0.1, help="Share of it for context and fragmentation.")
    parser.add_argument("--gpu-peak", type=float, default=312.0, help="TFLOP/s in bf16, dense; an A100 has 312.")
    parser.add_argument("--utilization", type=float, default=0.4, help="Share of the peak that is reached.")
    parser.add_argument("--memory-tokens", type=int, help="Length of the rows that must fit; max_length by default.")
    parser.add_argument("--mean-tokens", type=int, help="Length of the mean row, for FLOPs; as above by default.")
    parser.add_argument("--rows", type=int, help="Rows of the data set, where it is not at hand.")
    options, recipe = parser.parse_known_args(arguments)
    try:
        capacity = (parse_memory(options.gpu_memory), options.headroom)
    except ValueError as error:
        parser.error(str(error))
    for name, low, high in (
        ("gpus", 1, 10**6),
        ("headroom", 0, 0.99),
        ("gpu_peak", 0.1, 1e6),
        ("utilization", 0.01, 1),
    ):
        if not low <= (value := getattr(options, name)) <= high:
            parser.error(f"--{name.replace('_', '-')} is {value}; it goes from {low:g} to {high:g}.")
    recipe_parser = TrlParser((DataArguments, MoveKDSFTConfig, ModelArguments))
    parsed: tuple[Any, ...] = recipe_parser.parse_args_and_config([*recipe, "--use_cpu", "true"])
    data_args, args, model_args = parsed
    rows, origin = (options.rows, "as given") if options.rows else count_rows(data_sources(data_args))
    if args.global_batch_size is not None:  # refused before it takes a minute
        accumulation_steps(args.global_batch_size, args.per_device_train_batch_size, options.gpus)
    step = measure_step(args, model_args, options.memory_tokens, options.mean_tokens)
    plan = plan_run(args, step, options.gpus)
    speed = (options.gpu_peak, options.utilization)
    print(format_plan(plan, args, options.gpus, *capacity, rows, *speed, origin))


def count_rows(sources: Sequence[DataSource]) -> tuple[int | None, str]:
    """
    Rows of the data sets together and where the number is from: counted where the data is on this machine, else as
    [`NAMED_ROWS`] has it. `None` where one is neither, or where weights decide how often a row is drawn.
    """
    if any(source.weight is not None for source in sources):
        return None, ""
    counts, origins = [], []
    for source in sources:
        at_hand = Path(source.name).exists()
        named = NAMED_ROWS.get(Path(source.name).name)
        counts.append(len(open_rows(source.name, source.split or "train", source.subset, False)) if at_hand else named)
        origins.append("counted" if at_hand else "as the file is named, to be checked with `--rows`")
    known = [count for count in counts if count is not None]
    return (sum(known) if len(known) == len(counts) else None), " and ".join(dict.fromkeys(origins))


if __name__ == "__main__":
    main(sys.argv[1:])
