"""The report of `python -m train.plan`: memory, FLOPs and days of a recipe."""

from collections.abc import Sequence
from dataclasses import dataclass

from train.arguments import ModelArguments
from train.build import parameter_groups
from train.config import MoveKDSFTConfig
from train.options import accumulation_steps
from train.plan.memory import optimizer_name, sharded_memory, usable_backends
from train.plan.models import PlannedRun, build_planned_run
from train.plan.step import check_length, input_bytes, measure_activations, measure_flops


# Share of a GPU's memory that is left to its context and to fragmentation
HEADROOM = 0.1


def training_days(flops_per_step: float, steps: int, gpus: int, peak_tflops: float, utilization: float) -> float:
    """Days for `steps` of `flops_per_step` over all GPUs, each at `utilization` of its `peak_tflops`."""
    return flops_per_step * steps / (gpus * peak_tflops * 1e12 * utilization) / 86_400


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
    """
    One GPU's part of a step, whatever the number of GPUs.

    Args:
        run (`PlannedRun`): The models.
        tokens (`int`): Length of a row with its image; 0 in stage `encoder`, whose rows are images.
        row_flops (`dict[str, int]`): FLOPs of one row: the teachers', and the `"student"`'s without recomputation.
        activations (`dict[str, int]`): Bytes by backend.
    """

    run: PlannedRun
    tokens: int
    row_flops: dict[str, int]
    activations: dict[str, int]


def measure_step(args: MoveKDSFTConfig, model_args: ModelArguments, tokens: int | None = None) -> StepMeasures:
    """
    Measure what does not depend on the number of GPUs, from configurations alone.

    Args:
        tokens (`int`, *optional*, defaults to `max_length`): Length of a row with its image.

    Raises:
        ValueError: if there is no length, the image is longer, or the optimizer cannot be planned.
    """
    backends = usable_backends(args)
    if args.stage == "encoder":
        if tokens:
            raise ValueError(f"`--tokens` is {tokens}, but rows of stage 'encoder' have no text. Leave it out.")
        tokens = 0
    elif (tokens := tokens or args.max_length) is None:
        raise ValueError("`max_length` is not set; say how long rows are with `--tokens`.")
    run = build_planned_run(args, model_args)
    if tokens:
        check_length(run, tokens)
    flops = measure_flops(run, tokens)  # first, since a recipe's recomputation would count
    casting = cast = measure_activations(run, tokens, autocast=args.bf16)
    if args.bf16 and len(backends) > 1:  # DDP casts weights as it goes, the others compute in bf16 weights
        cast = measure_activations(build_planned_run(args, model_args, cast=True), tokens, autocast=False)
    return StepMeasures(run, tokens, flops, {name: casting if name == "DDP" else cast for name in backends})


def accumulated(args: MoveKDSFTConfig, gpus: int) -> int:
    """Micro-batches of a step on `gpus` GPUs. Raises a `ValueError` if the global batch does not divide."""
    if args.global_batch_size is None:
        return args.gradient_accumulation_steps
    return accumulation_steps(args.global_batch_size, args.per_device_train_batch_size, gpus)


def backend_memory(step: StepMeasures, gpus: int) -> dict[str, dict[str, int]]:
    """Bytes on each GPU by backend. Trainer moves all micro-batches of a step to the GPU together."""
    args, model, teachers = step.run.args, step.run.model, step.run.teachers.values()
    rows = args.per_device_train_batch_size * accumulated(args, gpus)
    whole = {
        "teachers": sum(weight.nbytes for teacher in teachers for weight in teacher.parameters()),
        "inputs": rows * input_bytes(step.run, step.tokens),
    }
    return {
        backend: sharded_memory(backend, model, args, gpus) | whole | {"activations": activations}
        for backend, activations in step.activations.items()
    }


def _memory_lines(step: StepMeasures, gpus: int, gpu_memory: int) -> list[str]:
    args, table = step.run.args, []
    for backend, memory in backend_memory(step, gpus).items():
        total = sum(memory.values())
        fits = "yes" if total <= gpu_memory * (1 - HEADROOM) else "no"
        table.append([backend, *(f"{size / 1e9:.1f}" for size in (*memory.values(), total)), fits])
    header = ["weights", "gradients", "optimizer", "buffers*", "teachers", "inputs", "activations*"]
    return [
        format_table(["GB per GPU", *header, "total", "fits"], table),
        f"In {gpu_memory / 1e9:.0f} GB less {HEADROOM:.0%} for context and fragmentation, with activations "
        f"{'recomputed' if args.activation_checkpointing else 'kept'} as the recipe has them, fit: "
        f"{', '.join(row[0] for row in table if row[-1] == 'yes') or 'none'}.",
        "* estimated: activations by the kernels of a CPU, buffers by the defaults of the libraries. The other bytes",
        f"follow from the counts, with `optim` {optimizer_name(args)}.",
    ]


def format_plan(
    step: StepMeasures, gpus: int, gpu_memory: int, rows: int | None, peak_tflops: float, utilization: float
) -> str:
    """The report that the command prints."""
    args, micro_batches = step.run.args, accumulated(step.run.args, gpus)
    global_batch = args.per_device_train_batch_size * micro_batches * gpus
    trained, frozen = parameter_groups(step.run.model)
    for name, teacher in step.run.teachers.items():
        frozen[f"teacher {name}"] = sum(value.numel() for value in teacher.parameters())
    parameters = [
        [part, *(f"{counts.get(part, 0) / 1e6:,.2f}" for counts in (trained, frozen))]
        for part in dict.fromkeys((*trained, *frozen))
    ]
    lines = [
        f"Stage {args.stage} on {gpus} GPUs: global batch {global_batch} = {args.per_device_train_batch_size} per GPU "
        f"x {micro_batches} accumulated x {gpus}; "
        f"{f'rows of {step.tokens} tokens, one image each' if step.tokens else 'rows are images'}.",
        "",
        format_table(["parameters (million)", "trained", "frozen"], parameters),
        "",
        *_memory_lines(step, gpus, gpu_memory),
    ]
    if args.feature_cache is not None:
        lines.append(f"Teachers are not in memory: their features are read from {args.feature_cache}.")
    flops = {name: value * global_batch for name, value in step.row_flops.items()}
    names = {name: f"teacher {name}, forward" for name in flops} | {"student": "student, forward and backward"}
    table = [[names[name], f"{value / 1e15:,.3f}"] for name, value in flops.items()]
    lines += ["", format_table(["PFLOP per step, all GPUs", ""], table)]
    if args.max_steps > 0:
        steps = args.max_steps
    elif rows is None:
        return "\n".join([*lines, "Give `--rows`, the number of rows, for the days."])
    else:
        lines.append(f"{rows:,} rows, {args.num_train_epochs:g} times.")
        steps = int(-(-rows * args.num_train_epochs // global_batch))
    days = training_days(sum(flops.values()), steps, gpus, peak_tflops, utilization)
    lines.append(
        f"{steps:,} steps at {utilization:.0%} of {peak_tflops:g} TFLOP/s per GPU: {days:.2f} days ({days * 24:.1f} "
        "hours), without recomputation, data loading and saving."
    )
    return "\n".join(lines)
