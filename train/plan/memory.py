"""Bytes on each GPU that follow from the parameters alone: weights, gradients, optimizer states."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import ceil, prod
from typing import Any

import torch
from torch import nn

from train.build import parameter_groups
from train.config import MoveKDSFTConfig


BACKENDS = ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")
# DeepSpeed's defaults in elements: its reduction bucket, and the most parameters that ZeRO-3 keeps gathered
REDUCE_BUCKET, MAX_LIVE_PARAMETERS = 500_000_000, 1_000_000_000

# Elements that an optimizer keeps for each trained one, in the parameter's own dtype
TORCH_OPTIMIZERS = {"adamw_torch": 2, "adamw_torch_fused": 2, "adagrad": 1, "rmsprop": 1, "sgd": 0}
# The same for bitsandbytes, with the bits of an element; paged states may move to the machine's main memory
BITSANDBYTES_OPTIMIZERS = {
    "adamw_bnb_8bit": (2, 8),
    "adamw_8bit": (2, 8),
    "paged_adamw_8bit": (2, 8),
    "paged_adamw_32bit": (2, 32),
    "lion_8bit": (1, 8),
    "paged_lion_8bit": (1, 8),
    "lion_32bit": (1, 32),
    "paged_lion_32bit": (1, 32),
    "rmsprop_bnb": (1, 32),
    "rmsprop_bnb_8bit": (1, 8),
    "rmsprop_bnb_32bit": (1, 32),
}
OPTIMIZERS = (*TORCH_OPTIMIZERS, "adafactor", *BITSANDBYTES_OPTIMIZERS)
# bitsandbytes stores a float32 scale for this many elements, and does not pack smaller tensors
OPTIMIZER_BLOCK, SMALLEST_PACKED = 256, 4096


def optimizer_name(args: MoveKDSFTConfig) -> str:
    """
    The recipe's `optim`.

    Raises:
        ValueError: if its states are not known here, or it has `optim_args`, which may add states.
    """
    name = getattr(args.optim, "value", args.optim)
    if name not in OPTIMIZERS or args.optim_args:
        raise ValueError(
            f"`optim` is {name} with `optim_args` {args.optim_args}; bytes can be planned for {', '.join(OPTIMIZERS)} "
            "without arguments. Plan with the one nearest to it."
        )
    return name


def optimizer_bytes(name: str, size: int, shape: Sequence[int], embedding: bool = False) -> int:
    """
    Bytes of the states that an optimizer keeps for one parameter.

    Args:
        name (`str`): As `optim` of the recipe.
        size (`int`): Bytes of an element of the parameter.
        shape (`Sequence[int]`): Shape of the parameter.
        embedding (`bool`, *optional*, defaults to `False`): Whether the parameter is an embedding's, whose states
            Trainer keeps in 32 bits.
    """
    elements = prod(shape)
    if name in TORCH_OPTIMIZERS:
        return TORCH_OPTIMIZERS[name] * size * elements
    if name == "adafactor":
        # One mean per row and one per column of a matrix (arXiv 1804.04235, section 3)
        return 4 * (elements if len(shape) < 2 else elements // shape[-1] + elements // shape[-2])
    states, bits = BITSANDBYTES_OPTIMIZERS[name]
    if bits == 32 or embedding or elements < SMALLEST_PACKED:
        return states * 4 * elements
    return states * (elements + 4 * ceil(elements / OPTIMIZER_BLOCK))


def packed_bytes(elements: int, double_quantized: bool = True) -> int:
    """
    Bytes of a weight in 4-bit NormalFloat with a scale for each 64 elements (QLoRA, arXiv 2305.14314, section 3).
    Scales are float32; double quantized, they have 8 bits, with a float32 scale for each 256 of them. The tables of
    codes and an offset come to 64 or 1092 bytes a layer.
    """
    scales = ceil(elements / 64)
    tables = 4 * 16 + (4 * 256 + 4 if double_quantized else 0)
    return ceil(elements / 2) + (scales + 4 * ceil(scales / 256) if double_quantized else 4 * scales) + tables


@dataclass(frozen=True)
class ParameterCounts:
    """
    Numbers of parameters of student and distiller; tied ones count once.

    Args:
        trained, frozen (`dict[str, int]`): By part.
        trained_bytes, frozen_bytes (`int`): As loaded; 4-bit weights with their scales.
        optimizer (`dict[str, int]`): Bytes of the optimizer's states over all GPUs: `"own"` for weights as loaded,
            `"float32"` for float32 weights, and `"flat"` for float32 weights in one long vector, as in DeepSpeed.
        largest_layer (`int`): The largest of the layers that FSDP2 shards one by one.
        outside_layers (`int`): Parameters outside these layers, which are gathered for the whole step.
    """

    trained: dict[str, int]
    frozen: dict[str, int]
    trained_bytes: int
    frozen_bytes: int
    optimizer: dict[str, int]
    largest_layer: int
    outside_layers: int


def count_parameters(model: Any, layer_classes: Sequence[str] = (), optimizer: str = "adamw_torch") -> ParameterCounts:
    """Count after [`~train.build.set_trainable`]; FSDP2 wraps the layers of `layer_classes`."""
    trained, frozen = parameter_groups(model)
    weights = list(model.parameters())
    scales = sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith(".scales"))
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    learning = [weight for weight in weights if weight.requires_grad]

    def states(size: Callable[[torch.Tensor], int]) -> int:
        return sum(optimizer_bytes(optimizer, size(w), w.shape, id(w) in embeddings) for w in learning)

    layers = [module for module in model.modules() if type(module).__name__ in layer_classes]
    sizes = [sum(weight.numel() for weight in layer.parameters()) for layer in layers]
    return ParameterCounts(
        trained,
        frozen,
        sum(weight.nbytes for weight in learning),
        sum(weight.nbytes for weight in weights if not weight.requires_grad) + scales,
        {
            "own": states(lambda weight: weight.element_size()),
            "float32": states(lambda weight: 4),
            "flat": optimizer_bytes(optimizer, 4, (sum(trained.values()),)),
        },
        max(sizes, default=0),
        sum(weight.numel() for weight in weights) - sum(sizes),
    )


@dataclass(frozen=True)
class BackendMemory:
    """
    Bytes on one GPU. `inputs` are all micro-batches of a step, which Trainer moves to the GPU together.
    `communication` (buckets, gathered parameters) and `activations` are estimates.
    """

    weights: int
    gradients: int
    optimizer: int
    teachers: int
    communication: int
    activations: int
    inputs: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def usable_backends(args: MoveKDSFTConfig) -> tuple[str, ...]:
    """The backends that can run the recipe: only DDP takes 4-bit weights, and FSDP2 only torch's optimizers."""
    if args.load_in_4bit:
        return BACKENDS[:1]
    return BACKENDS if optimizer_name(args) in TORCH_OPTIMIZERS else BACKENDS[:-1]


def sharded_memory(
    backend: str,
    counts: ParameterCounts,
    gpus: int,
    teachers: int,
    activations: int,
    half: bool = True,
    inputs: int = 0,
) -> BackendMemory:
    """
    Bytes on each of `gpus` GPUs.

    - DDP: whole weights, gradients and optimizer states in the weights' own dtype; its buckets copy the gradients.
    - ZeRO-2 and ZeRO-3: bf16 weights, bf16 gradients, float32 master weights and states. ZeRO-2 shards all but the
      weights, ZeRO-3 all. Buckets and gathered parameters are as large as DeepSpeed's defaults allow.
    - FSDP2: float32 trained weights, their gradients and states, and frozen weights in their own dtype, all sharded;
      two layers and the parameters outside layers are gathered in bf16.

    Without bf16 mixed precision (`half` is false), float32 takes the place of bf16. Teachers are whole on every GPU.
    `teachers`, `activations` and `inputs` are bytes.
    """
    trained, frozen = sum(counts.trained.values()), sum(counts.frozen.values())
    everything, size = trained + frozen, 2 if half else 4
    if backend == "DDP":
        buckets = counts.trained_bytes if gpus > 1 else 0
        shares = (counts.trained_bytes + counts.frozen_bytes, counts.trained_bytes, counts.optimizer["own"])
        return BackendMemory(*shares, teachers, buckets, activations, inputs)
    flat = (size * trained // gpus, (4 * trained + counts.optimizer["flat"]) // gpus)
    if backend == "ZeRO-2":
        bucket = size * min(REDUCE_BUCKET, trained)
        return BackendMemory(size * everything, *flat, teachers, bucket, activations, inputs)
    if backend == "ZeRO-3":
        communication = size * (min(REDUCE_BUCKET, trained) + min(MAX_LIVE_PARAMETERS, everything))
        return BackendMemory(size * everything // gpus, *flat, teachers, communication, activations, inputs)
    if backend == "FSDP2":
        gathered = size * (2 * counts.largest_layer + counts.outside_layers) if gpus > 1 else 0
        states = counts.optimizer["float32"] // gpus
        shares = ((4 * trained + counts.frozen_bytes) // gpus, 4 * trained // gpus, states)
        return BackendMemory(*shares, teachers, gathered, activations, inputs)
    raise ValueError(f"The backend is {backend!r}, expected one of {BACKENDS}.")
