"""What a run on several processes needs: checks of launch and FSDP2 settings, and whole models under ZeRO-3."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def check_launch(args: TrainingArguments) -> None:
    """
    Raises:
        ValueError: if several processes were asked for or launched, but each would train by itself; or if ZeRO-3 would
            save no weights.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(
            f"{launched} processes were launched, but each would train by itself (world size {args.world_size}). "
            "On CPUs add `--use_cpu true`."
        )
    # `accelerate launch` gives an address to meet at only where the configuration has several processes, but starts a
    # single one for `--cpu`, and for `distributed_type: MULTI_CPU` without mpirun
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and args.world_size == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "The configuration of `accelerate launch` asks for several processes, but one was started: it ignores the "
            "backend under `--cpu` and under `distributed_type: MULTI_CPU`. Leave `--cpu` out and give the script "
            "`--use_cpu true` (see train/accelerate/ddp_cpu.yaml); for a single process add `--num_processes 1` and "
            "unset MASTER_ADDR."
        )
    plugin = args.deepspeed_plugin
    gathers = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if plugin is not None and plugin.hf_ds_config.is_zero3() and not plugin.hf_ds_config.is_true(gathers):
        raise ValueError(
            "ZeRO-3 would save checkpoints without weights. Set `zero3_save_16bit_model: true` in the configuration "
            f"of accelerate, or `{gathers}` in DeepSpeed's."
        )


@contextmanager
def whole_weights(args: TrainingArguments) -> Iterator[None]:
    """
    Load models in here as on a single process, whole, also where ZeRO-3 will partition the student later.

    Once arguments for ZeRO-3 exist, transformers partitions every model from its construction on, whatever
    `zero3_init_flag` says. Towers, though, are cut, copied and checked as whole tensors; the frozen teachers must stay
    whole, since no engine ever gathers them; and a single process may load a model for itself.
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
    To be called before the model is wrapped. Refuses what cannot work, and keeps the precision that DDP has where
    accelerate's mixed precision would round it: the losses that the wrapped model returns, which would come out in
    bfloat16, and the sums of the gradients over the processes.

    Raises:
        ValueError: if FSDP was asked for and something else would run, as accelerate does on CPUs. Or for a setting,
            naming it, its value and what to set: FSDP1, of which nothing here is tested; weights read by one process
            alone, which would leave the teachers and the cut tower of all others empty; FSDP's own activation
            checkpointing, which draws the dropout of the recomputed forward anew.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if accelerator.distributed_type != DistributedType.FSDP:
        if asked:
            raise ValueError(
                f"FSDP was asked for, but {accelerator.distributed_type.value} would run: accelerate has FSDP for "
                "accelerators alone. Leave `--use_cpu` out, or launch with train/accelerate/ddp_cpu.yaml."
            )
        return
    plugin = accelerator.state.fsdp_plugin
    for setting, value, supported, reason in (
        ("fsdp_version", plugin.fsdp_version, 2, "the older one is not tested with these losses"),
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
            "it recomputes with another dropout; set `activation_checkpointing: true` in the recipe instead",
        ),
    ):
        if value != supported:
            raise ValueError(f"`{setting}` is {value}, but only {supported} can be used here: {reason}.")
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )


def saves_sharded_state(accelerator: Accelerator) -> bool:
    """Whether checkpoints hold each process's part of the weights, beside which Trainer writes no whole ones."""
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    return is_fsdp and "SHARDED_STATE_DICT" in str(accelerator.state.fsdp_plugin.state_dict_type)
