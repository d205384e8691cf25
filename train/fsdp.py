"""FSDP2: what of it a run can use, and what would go wrong without a word."""

import os
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType


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
