"""Bytes on each GPU that follow from the parameters alone: weights, gradients, optimizer states."""

from math import ceil
from typing import Any

from torch import nn

from train.build import parameter_groups
from train.config import MoveKDSFTConfig
from train.language_lora import language_lora_layers


BACKENDS = ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")
# DeepSpeed's defaults in elements: its reduction bucket, and the most parameters that ZeRO-3 keeps gathered
REDUCE_BUCKET, MAX_LIVE_PARAMETERS = 500_000_000, 1_000_000_000
# AdamW of torch, and of bitsandbytes, whose paged states may move to the machine's main memory
TORCH_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
OPTIMIZERS = (*TORCH_OPTIMIZERS, "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
# bitsandbytes stores a float32 scale for this many 8-bit elements, and keeps smaller tensors in float32
OPTIMIZER_BLOCK, SMALLEST_PACKED = 256, 4096


def optimizer_name(args: MoveKDSFTConfig) -> str:
    """
    The recipe's `optim`.

    Raises:
        ValueError: if the optimizer is not AdamW, or has `optim_args`, which may add states.
    """
    name = getattr(args.optim, "value", args.optim)
    if name not in OPTIMIZERS or args.optim_args:
        raise ValueError(
            f"`optim` is {name} with `optim_args` {args.optim_args}; bytes can be planned for {', '.join(OPTIMIZERS)} "
            "without arguments. Plan with the one nearest to it."
        )
    return name


def optimizer_bytes(name: str, size: int, elements: int, embedding: bool = False) -> int:
    """
    Bytes of the two states that AdamW keeps for a parameter.

    Args:
        name (`str`): As `optim` of the recipe.
        size (`int`): Bytes of an element of the parameter.
        elements (`int`): Elements of the parameter.
        embedding (`bool`, *optional*, defaults to `False`): Whether the parameter is an embedding's, whose states
            Trainer keeps in 32 bits.
    """
    if name in TORCH_OPTIMIZERS:
        return 2 * size * elements
    if "8bit" in name and not embedding and elements >= SMALLEST_PACKED:
        return 2 * (elements + 4 * ceil(elements / OPTIMIZER_BLOCK))
    return 2 * 4 * elements


def packed_bytes(elements: int) -> int:
    """
    Bytes of a weight in 4-bit NormalFloat (QLoRA, arXiv 2305.14314, section 3): each 64 elements have an 8-bit scale,
    each 256 scales a float32 scale. The two tables of codes and an offset come to 1092 bytes.
    """
    scales = ceil(elements / 64)
    return ceil(elements / 2) + scales + 4 * ceil(scales / 256) + 1092


def usable_backends(args: MoveKDSFTConfig) -> tuple[str, ...]:
    """The backends that can run the recipe: only DDP takes 4-bit weights, and FSDP2 only torch's optimizers."""
    sharded = BACKENDS[1:] if optimizer_name(args) in TORCH_OPTIMIZERS else BACKENDS[1:-1]
    return BACKENDS[:1] if args.load_in_4bit else (BACKENDS[0], *sharded)


def sharded_memory(backend: str, model: Any, args: MoveKDSFTConfig, gpus: int) -> dict[str, int]:
    """
    Bytes on each of `gpus` GPUs for a student with its distiller, after [`~train.build.set_trainable`].

    - DDP: whole weights, gradients and optimizer states in the weights' own dtype; its buckets copy the gradients.
    - ZeRO-2 and ZeRO-3: bf16 weights, bf16 gradients, float32 master weights and states. ZeRO-2 shards all but the
      weights, ZeRO-3 all. Buckets and gathered parameters are as large as DeepSpeed's defaults allow.
    - FSDP2: float32 trained weights, their gradients and states, and frozen weights in their own dtype, all sharded;
      two layers and the parameters outside layers are gathered in bf16.

    Without bf16 mixed precision, float32 takes the place of bf16.

    Returns:
        The bytes of `weights`, `gradients`, `optimizer`, and of the `buffers` for communication, an estimate.
    """
    trained, frozen = (sum(counts.values()) for counts in parameter_groups(model))
    everything, size, optimizer = trained + frozen, 2 if args.bf16 else 4, optimizer_name(args)
    learning = [value for value in model.parameters() if value.requires_grad]
    trained_bytes = sum(weight.nbytes for weight in learning)
    frozen_bytes = sum(weight.nbytes for weight in model.parameters()) - trained_bytes
    for layer in language_lora_layers(model).values() if args.load_in_4bit else ():
        weight: Any = layer.get_base_layer().weight
        frozen_bytes += packed_bytes(weight.numel()) - weight.nbytes
    states = optimizer_bytes(optimizer, 4, trained)  # of one long vector, as the sharding backends keep
    if backend == "DDP":
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        states = sum(
            optimizer_bytes(optimizer, weight.element_size(), weight.numel(), id(weight) in embeddings)
            for weight in learning
        )
        sizes = (trained_bytes + frozen_bytes, trained_bytes, states, trained_bytes if gpus > 1 else 0)
    elif backend == "FSDP2":
        layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
        inside = [sum(weight.numel() for weight in layer.parameters()) for layer in layers]
        outside = sum(weight.numel() for weight in model.parameters()) - sum(inside)
        gathered = size * (2 * max(inside, default=0) + outside) if gpus > 1 else 0
        sizes = ((4 * trained + frozen_bytes) // gpus, 4 * trained // gpus, states // gpus, gathered)
    else:
        bucket, sharded = size * min(REDUCE_BUCKET, trained), (size * trained // gpus, (4 * trained + states) // gpus)
        sizes = (size * everything, *sharded, bucket)
        if backend == "ZeRO-3":
            sizes = (size * everything // gpus, *sharded, bucket + size * min(MAX_LIVE_PARAMETERS, everything))
    return dict(zip(("weights", "gradients", "optimizer", "buffers"), sizes, strict=True))
