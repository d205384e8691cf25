"""Several processes: checks of the launch and of FSDP2's settings, and loading of whole models under ZeRO-3."""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def fsdp_is_asked_for() -> bool:
    """Whether `accelerate launch` was started with FSDP. Known before a process group exists."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def join_cpu_processes(args: TrainingArguments) -> None:
    """Join the processes of a launch on CPUs with `ddp_timeout`, which transformers passes on for GPUs only."""
    if args.use_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=args.ddp_timeout))


def check_launch(args: TrainingArguments) -> None:
    """Refuse launches in which each process would train by itself, and ZeRO-3 that would save no weights."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(
            f"{launched} processes were launched, but each would train by itself (world size {args.world_size}). "
            "On CPUs add `--use_cpu true`."
        )
    # `accelerate launch` sets MASTER_ADDR if the configuration has several processes, but starts only one for `--cpu`,
    # and for `distributed_type: MULTI_CPU` without mpirun
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and args.world_size == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "The configuration of `accelerate launch` asks for several processes, but one was started, as happens "
            "with `--cpu` and `distributed_type: MULTI_CPU`. Leave `--cpu` out and give the script `--use_cpu true` "
            "(see train/accelerate/ddp_cpu.yaml). For one process add `--num_processes 1` and unset MASTER_ADDR."
        )
    plugin = args.deepspeed_plugin
    gathers = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if plugin is not None and plugin.hf_ds_config.is_zero3() and not plugin.hf_ds_config.is_true(gathers):
        raise ValueError(
            "ZeRO-3 would save checkpoints without weights. Set `zero3_save_16bit_model: true` in accelerate's "
            f"configuration, or `{gathers}` in DeepSpeed's."
        )


@contextmanager
def whole_weights(args: TrainingArguments) -> Iterator[None]:
    """
    Load models whole inside this context, also if ZeRO-3 partitions the student later.

    Once arguments for ZeRO-3 exist, transformers partitions each model when it is built, whatever `zero3_init_flag`
    says. But towers are cut and copied as whole tensors, and the engine never gathers the frozen teachers.
    """
    plugin = args.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()


def prepare_fsdp(accelerator: Accelerator) -> None:
    """
    Check FSDP's settings, and keep float32 where accelerate's mixed precision would round more than DDP does: in the
    losses that the model returns, and in the sums of the gradients. Call it before the model is wrapped.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        if fsdp_is_asked_for():
            raise ValueError(
                f"FSDP was asked for, but {accelerator.distributed_type.value} would run, since accelerate has no "
                "FSDP on CPUs. Leave `--use_cpu` out, or launch with train/accelerate/ddp_cpu.yaml."
            )
        return
    plugin = accelerator.state.fsdp_plugin
    for setting, value, supported, reason in (
        ("fsdp_version", plugin.fsdp_version, 2, "FSDP1 is not tested with these losses"),
        (
            "fsdp_cpu_ram_efficient_loading",
            plugin.cpu_ram_efficient_loading,
            False,
            "all processes but the first would get empty teachers and an empty tower",
        ),
        (
            "fsdp_activation_checkpointing",
            plugin.activation_checkpointing,
            False,
            "the recomputed forward would draw another dropout; set `activation_checkpointing: true` in the recipe",
        ),
    ):
        if value != supported:
            raise ValueError(f"`{setting}` is {value}. Set it to {supported}: {reason}.")
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )


def saves_sharded_state(accelerator: Accelerator) -> bool:
    """Whether each process saves its part of the weights, in which case Trainer saves no whole weights."""
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    return is_fsdp and "SHARDED_STATE_DICT" in str(accelerator.state.fsdp_plugin.state_dict_type)


@contextmanager
def timeouts_named(args: TrainingArguments) -> Iterator[None]:
    """
    Say which timeout ended a run, and end the workers of data loaders: Python would wait for a stopped one forever.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader timed out" in str(error):
            reason = (
                f"A worker of the data loader gave no batch for {args.dataloader_timeout} seconds: it was stopped, or "
                "the disk or network is too slow. Raise `dataloader_timeout`, or set `dataloader_num_workers: 0`."
            )
        elif is_gloo_error(error) and "Timed out" in str(error):
            reason = (
                f"Another process did not answer for {args.ddp_timeout} seconds: it was stopped, or its work takes "
                "longer. Raise `ddp_timeout` if it works; then go on with `resume_from_checkpoint: true`."
            )
        else:
            raise
        for worker in multiprocessing.active_children():
            worker.kill()
        raise RuntimeError(reason) from error


def is_gloo_error(error: Exception) -> bool:
    """Whether processes on CPUs failed to reach each other, which torch raises as a plain `RuntimeError`."""
    return "gloo" in str(error).lower()
