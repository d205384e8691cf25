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
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from trl import TrlParser

from train.config import DataArguments, ModelArguments, MoveKDSFTConfig, accumulation_steps
from train.data import data_sources
from train.plan_step import build_planned_run, measure_activations, measure_flops


BACKENDS = ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")
# Rows of the data sets the recipes name, for the days; `--rows` for any other
KNOWN_ROWS = {
    "blip_laion_cc_sbu_558k.json": 558_128,
    "llava_v1_5_mix665k.json": 665_298,
    "lmms-lab/LLaVA-NeXT-Data": 779_289,
}
# Defaults of DeepSpeed, in elements: its reduction bucket, and the parameters ZeRO-3 keeps gathered at most
REDUCE_BUCKET, MAX_LIVE_PARAMETERS = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class ParameterCounts:
    """
    Numbers of parameters of student and distiller, tied ones once.

    Args:
        trained, frozen (`dict[str, int]`): By part.
        largest_layer (`int`): Of the layers that FSDP2 shards one by one, the largest.
        outside_layers (`int`): What lies in none of them and is gathered for the whole step.
    """

    trained: dict[str, int]
    frozen: dict[str, int]
    largest_layer: int
    outside_layers: int


@dataclass(frozen=True)
class BackendMemory:
    """Bytes on one GPU. `communication` (buckets, gathered parameters) and `activations` are estimates."""

    weights: int
    gradients: int
    optimizer: int
    teachers: int
    communication: int
    activations: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def count_parameters(model: nn.Module, layer_classes: Sequence[str] = ()) -> ParameterCounts:
    """By part, after [`~train.build.set_trainable`]; `layer_classes` are those that FSDP2 wraps."""
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if "vision_tower." in name:
            part = "experts and routers" if "expert" in name or "router" in name else "vision tower"
        elif "distiller." in name:
            part = "distiller"
        elif "language_model." in name or "lm_head." in name:
            part = "language model"
        else:
            part = "projector"
        counts = trained if parameter.requires_grad else frozen
        counts[part] = counts.get(part, 0) + parameter.numel()
    layers = [module for module in model.modules() if type(module).__name__ in layer_classes]
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    everything = sum(trained.values()) + sum(frozen.values())
    return ParameterCounts(trained, frozen, max(sizes, default=0), everything - sum(sizes))


def sharded_memory(
    backend: str, counts: ParameterCounts, gpus: int, dtype: torch.dtype, teachers: int, activations: int
) -> BackendMemory:
    """
    Bytes on each of `gpus` GPUs under bf16 mixed precision and AdamW.

    - DDP: weights, gradients and both moments in the weights' own dtype, whole; its buckets copy the gradients.
    - ZeRO-2 and ZeRO-3: bf16 weights, bf16 gradients, float32 master weights and moments; ZeRO-2 shards the last two,
      ZeRO-3 all. Buckets and gathered parameters as large as DeepSpeed's defaults let them be.
    - FSDP2: float32 trained weights, their gradients and moments, and frozen weights in their own dtype, all sharded;
      two layers and what lies outside of layers are gathered in bf16.

    Teachers are whole on every GPU.

    Args:
        dtype (`torch.dtype`): The weights are loaded in.
        teachers, activations (`int`): Bytes.

    Raises:
        ValueError: for an unknown backend.
    """
    trained, frozen = sum(counts.trained.values()), sum(counts.frozen.values())
    everything, size = trained + frozen, dtype.itemsize
    if backend == "DDP":
        buckets = trained * size if gpus > 1 else 0
        return BackendMemory(everything * size, trained * size, 2 * trained * size, teachers, buckets, activations)
    if backend == "ZeRO-2":
        bucket = 2 * min(REDUCE_BUCKET, trained)
        shares = (2 * everything, 2 * trained // gpus, 12 * trained // gpus)
        return BackendMemory(*shares, teachers, bucket, activations)
    if backend == "ZeRO-3":
        communication = 2 * min(REDUCE_BUCKET, trained) + 2 * min(MAX_LIVE_PARAMETERS, everything)
        shares = (2 * everything // gpus, 2 * trained // gpus, 12 * trained // gpus)
        return BackendMemory(*shares, teachers, communication, activations)
    if backend == "FSDP2":
        gathered = 2 * (2 * counts.largest_layer + counts.outside_layers) if gpus > 1 else 0
        shares = ((4 * trained + size * frozen) // gpus, 4 * trained // gpus, 8 * trained // gpus)
        return BackendMemory(*shares, teachers, gathered, activations)
    raise ValueError(f"The backend is {backend!r}, expected one of {BACKENDS}.")


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


def plan_run(
    args: MoveKDSFTConfig,
    model_args: ModelArguments,
    gpus: int,
    memory_tokens: int | None = None,
    mean_tokens: int | None = None,
) -> Plan:
    """
    Everything but the time, from configurations alone.

    Args:
        gpus (`int`): Processes, one GPU each.
        memory_tokens (`int`, *optional*): Length of the rows that must fit, image included; `max_length` by default.
        mean_tokens (`int`, *optional*): Length of the mean row, for the FLOPs; as above by default, which is too many.

    Raises:
        ValueError: if the global batch does not divide, there is no length, or the recipe is of a kind that is not
            planned: LoRA, cached features, another optimiser than AdamW, or no bf16.
    """
    optimizer = getattr(args.optim, "value", args.optim)
    if optimizer not in ("adamw_torch", "adamw_torch_fused"):
        raise ValueError(f"`optim` is {optimizer}; bytes are planned for adamw_torch and adamw_torch_fused alone.")
    if args.language_lora_rank or args.load_in_4bit:
        raise ValueError(
            f"`language_lora_rank` is {args.language_lora_rank} and `load_in_4bit` {args.load_in_4bit}; a plan covers "
            "the language model in full only. Plan with `--language_lora_rank 0`, which needs more."
        )
    if args.feature_cache is not None:
        raise ValueError("`feature_cache` is set; a plan runs the teachers. Plan without it, which needs more.")
    if not args.bf16:
        raise ValueError("`bf16` is false; bytes are planned for bf16 mixed precision alone.")
    batch_size, longest = args.per_device_train_batch_size, memory_tokens or args.max_length
    if longest is None:
        raise ValueError("`max_length` is not set; say how long rows are with `--memory-tokens`.")
    mean = mean_tokens or longest
    accumulation = args.gradient_accumulation_steps
    if args.global_batch_size is not None:
        accumulation = accumulation_steps(args.global_batch_size, batch_size, gpus)
    dtype = getattr(torch, "float32" if model_args.dtype == "auto" else model_args.dtype)

    _, model, teachers = build_planned_run(args, model_args, dtype)
    counts = count_parameters(model, tuple(model._no_split_modules or ()))
    teacher_bytes = sum(teacher.bytes for teacher in teachers.values())
    teacher_parameters = {
        name: sum(value.numel() for value in teacher.model.parameters()) for name, teacher in teachers.items()
    }

    memory: dict[str, dict[bool, BackendMemory]] = {backend: {} for backend in BACKENDS}
    for checkpointing in (True, False):
        lengths = (args, model_args, batch_size, longest)
        # DDP casts weights as it goes, the others compute in bf16 weights
        casting = measure_activations(*lengths, dtype, autocast=True, checkpointing=checkpointing)
        half = measure_activations(*lengths, torch.bfloat16, autocast=False, checkpointing=checkpointing)
        for backend in BACKENDS:
            activations = casting if backend == "DDP" else half
            memory[backend][checkpointing] = sharded_memory(backend, counts, gpus, dtype, teacher_bytes, activations)
    flops = measure_flops(args, model_args, mean)
    rows = batch_size * accumulation * gpus
    return Plan(
        counts,
        teacher_parameters,
        memory,
        flops.pop("student") * rows,
        {name: value * rows for name, value in flops.items()},
        accumulation,
        rows,
        {"memory": longest, "FLOPs": mean},
    )


def format_plan(
    plan: Plan,
    args: MoveKDSFTConfig,
    gpus: int,
    gpu_memory: int,
    headroom: float,
    rows: int | None,
    peak_tflops: float,
    utilization: float,
) -> str:
    """The report that the command prints."""
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
        shared = [kept.weights, kept.gradients, kept.optimizer, kept.teachers, kept.communication]
        names = {True: "recomputed", False: "kept"}
        fits = [names[on] for on, used in by_checkpointing.items() if used.total <= usable]
        fitting += [backend] if by_checkpointing[bool(args.activation_checkpointing)].total <= usable else []
        sizes = [*shared, recomputed.activations, recomputed.total, kept.activations, kept.total]
        table.append([backend, *map(_gigabytes, sizes), " or ".join(fits) or "no"])
    header = ["GB per GPU", "weights", "gradients", "AdamW", "teachers", "buffers*"]
    header += ["recomputed*", "total", "kept*", "total", "fits"]
    lines.append(format_table(header, table))
    lines += [
        f"In {gpu_memory / 1e9:.0f} GB less {headroom:.0%} for context and fragmentation, with activations "
        f"{'recomputed' if args.activation_checkpointing else 'kept'} as the recipe has them, fit: "
        f"{', '.join(fitting) or 'none'}.",
        "* estimated: activations (recomputed by checkpointing, or kept) by the kernels of a CPU, buffers by the",
        "defaults of the libraries. The other bytes follow from the counts.",
        "",
    ]
    flops = [["student, forward and backward", f"{plan.student_flops / 1e15:,.3f}"]]
    flops += [[f"teacher {name}, forward", f"{value / 1e15:,.3f}"] for name, value in plan.teacher_flops.items()]
    lines.append(format_table(["PFLOP per step, all GPUs", ""], flops))
    if args.max_steps > 0:
        steps = args.max_steps
    elif rows is None:
        return "\n".join([*lines, "The number of rows is unknown: give `--rows` for the days."])
    else:
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
    parser.add_argument("--gpu-memory", type=parse_memory, required=True, help="Memory of one, as 80GB or 80GiB.")
    parser.add_argument("--headroom", type=float, default=0.1, help="Share of it for context and fragmentation.")
    parser.add_argument("--gpu-peak", type=float, default=312.0, help="TFLOP/s in bf16, dense; an A100 has 312.")
    parser.add_argument("--utilization", type=float, default=0.4, help="Share of the peak that is reached.")
    parser.add_argument("--memory-tokens", type=int, help="Length of the rows that must fit; max_length by default.")
    parser.add_argument("--mean-tokens", type=int, help="Length of the mean row, for FLOPs; as above by default.")
    parser.add_argument("--rows", type=int, help="Rows of the data set, where it is none of the recipes'.")
    options, recipe = parser.parse_known_args(arguments)
    recipe_parser = TrlParser((DataArguments, MoveKDSFTConfig, ModelArguments))
    parsed: tuple[Any, ...] = recipe_parser.parse_args_and_config([*recipe, "--use_cpu", "true"])
    data_args, args, model_args = parsed
    rows = options.rows or known_rows([source.name for source in data_sources(data_args)])
    plan = plan_run(args, model_args, options.gpus, options.memory_tokens, options.mean_tokens)
    capacity = (options.gpu_memory, options.headroom)
    print(format_plan(plan, args, options.gpus, *capacity, rows, options.gpu_peak, options.utilization))


def known_rows(names: Sequence[str]) -> int | None:
    """Rows of the named data sets together; `None` if one of them is not in [`KNOWN_ROWS`]."""
    rows = [KNOWN_ROWS.get(name, KNOWN_ROWS.get(Path(name).name)) for name in names]
    known = [count for count in rows if count is not None]
    return sum(known) if len(known) == len(rows) else None


if __name__ == "__main__":
    main(sys.argv[1:])
