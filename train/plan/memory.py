"""Bytes of a run on each GPU that follow from its parameters alone: weights, gradients, optimiser states."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from math import ceil, prod
from typing import Any

import torch
from torch import nn

from train.build import parameter_groups
from train.config import MoveKDSFTConfig


BACKENDS = ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")
# Defaults of DeepSpeed, in elements: its reduction bucket, and the parameters ZeRO-3 keeps gathered at most
REDUCE_BUCKET, MAX_LIVE_PARAMETERS = 500_000_000, 1_000_000_000

# Elements that an optimiser keeps for each one that trains, in the parameters' own dtype
TORCH_OPTIMIZERS = {"adamw_torch": 2, "adamw_torch_fused": 2, "adagrad": 1, "rmsprop": 1, "sgd": 0}
# The same of bitsandbytes, by bits of an element; paged ones may move to the main memory of the machine
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
# Of bitsandbytes: a float32 scale for this many elements, and smaller tensors are not packed at all
OPTIMIZER_BLOCK, SMALLEST_PACKED = 256, 4096


def optimizer_name(args: MoveKDSFTConfig) -> str:
    """
    Raises:
        ValueError: for an optimiser whose states are not known here, or one with `optim_args`, which may add some.
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
    Bytes of the states that an optimiser keeps for one parameter.

    Args:
        name (`str`): As `optim` of the recipe.
        size (`int`): Bytes of an element of the parameter.
        shape (`Sequence[int]`): Of the parameter.
        embedding (`bool`): Whether it is an embedding's, whose states Trainer keeps in 32 bits.
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
    Bytes of a weight in 4-bit NormalFloat with its scales, one for each 64 elements: 8 bits each if they are quantised
    in turn, with a float32 scale for each 256 of them, float32 otherwise (QLoRA, arXiv 2305.14314, section 3). The
    tables of codes and an offset come to 1092 bytes a layer, or 64.
    """
    scales = ceil(elements / 64)
    tables = 4 * 16 + (4 * 256 + 4 if double_quantized else 0)
    return ceil(elements / 2) + (scales + 4 * ceil(scales / 256) if double_quantized else 4 * scales) + tables


@dataclass(frozen=True)
class ParameterCounts:
    """
    Numbers of parameters of student and distiller, tied ones once.

    Args:
        trained, frozen (`dict[str, int]`): By part.
        trained_bytes, frozen_bytes (`int`): As loaded, 4-bit weights with their scales.
        optimizer (`dict[str, int]`): Bytes of the optimiser's states over all GPUs, `"own"` with the weights as
            loaded, `"float32"` with float32 ones, and `"flat"` where these lie in one long vector, as in DeepSpeed.
        largest_layer (`int`): Of the layers that FSDP2 shards one by one, the largest.
        outside_layers (`int`): What lies in none of them and is gathered for the whole step.
    """

    trained: dict[str, int]
    frozen: dict[str, int]
    trained_bytes: int
    frozen_bytes: int
    optimizer: dict[str, int]
    largest_layer: int
    outside_layers: int


def count_parameters(model: Any, layer_classes: Sequence[str] = (), optimizer: str = "adamw_torch") -> ParameterCounts:
    """By part, after [`~train.build.set_trainable`]; `layer_classes` are those that FSDP2 wraps."""
    trained, frozen = parameter_groups(model)
    weights = list(model.parameters())
    scales = sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith(".scales"))
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    learning = [weight for weight in weights if weight.requires_grad]

    def states(size: Callable[[torch.Tensor], int]) -> int:
        return sum(optimizer_bytes(optimizer, size(w), w.shape, id(w) in embeddings) for w in learning)

    layers = [module for module in model.modules() if type(module).__name__ in layer_classes]
    sizes = [_elements(layer.parameters()) for layer in layers]
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
        _elements(weights) - sum(sizes),
    )


def _elements(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@dataclass(frozen=True)
class BackendMemory:
    """
    Bytes on one GPU. `inputs` are the micro-batches of a step, which Trainer puts there together; `communication`
    (buckets, gathered parameters) and `activations` are estimates.
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
    """Those that can run the recipe: 4-bit weights are for DDP alone, and FSDP2's tensors for torch's optimisers."""
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

    - DDP: weights, gradients and optimiser states in the weights' own dtype, whole; its buckets copy the gradients.
    - ZeRO-2 and ZeRO-3: bf16 weights, bf16 gradients, float32 master weights and states; ZeRO-2 shards the last two,
      ZeRO-3 all. Buckets and gathered parameters as large as DeepSpeed's defaults let them be.
    - FSDP2: float32 trained weights, their gradients and states, and frozen weights in their own dtype, all sharded;
      two layers and what lies outside of layers are gathered in bf16.

    Without bf16 mixed precision (`half` is false) what is bf16 above is float32. Teachers are whole on every GPU.

    Args:
        teachers, activations, inputs (`int`): Bytes.

    Raises:
        ValueError: for an unknown backend.
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
