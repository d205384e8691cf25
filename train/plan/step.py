"""One training step without weights: the size of every tensor, nothing computed."""

import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from trl.trainer.utils import add_fused_lm_head

from modeling_movekd import MoveKDForConditionalGeneration
from train.config import ModelArguments, MoveKDSFTConfig
from train.forward import add_distilling_forward
from train.plan.models import build_planned_run, teacher_inputs
from train.teachers.cached import Teacher


class LiveBytes(TorchDispatchMode):
    """
    Bytes of the storages made inside and still alive, and their peak. Torch's own `MemTracker` does the same and more,
    but refuses frozen parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def ignore(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            self.known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known[storage] = True
        size = storage.nbytes()
        weakref.finalize(storage, self._free, size)
        self.current += size
        self.peak = max(self.peak, self.current)

    def _free(self, size: int) -> None:
        self.current -= size


# Kernels of a CPU that torch's counter does not know; TRL's head adds up its gradients by in-place products
_aten = torch.ops.aten
FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *args, **kwargs: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
    _aten.addmm_: lambda base, a, b, *args, **kwargs: 2 * a[0] * a[1] * b[1],
}


def measure_activations(
    args: MoveKDSFTConfig,
    model_args: ModelArguments,
    batch_size: int,
    sequence_length: int,
    dtype: torch.dtype,
    autocast: bool,
    checkpointing: bool,
) -> int:
    """
    Bytes at the peak of one micro-batch beside weights, gradients and optimizer: activations, inputs, the teachers'
    features, and temporary tensors. Each row has one image; text fills the rest of the sequence.

    Kernels are those of a CPU, so that a GPU's are estimated: attention is fused on both; norms under autocast are
    float32 on a GPU alone; and every position goes through the head, where a GPU takes only the labelled ones.

    Args:
        batch_size (`int`): Rows.
        sequence_length (`int`): Tokens of a row, with those of its image.
        dtype (`torch.dtype`): Of the student's and the distiller's weights.
        autocast (`bool`): Whether to compute under bfloat16 autocast.
        checkpointing (`bool`): Whether to recompute activations in the backward.

    Raises:
        ValueError: if the image alone is longer than `sequence_length`.
    """
    mode, model, teachers = build_planned_run(args, model_args, dtype, torch.float32 if autocast else dtype)
    memory = LiveBytes()
    with mode:
        _check_length(model, args, sequence_length)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            memory.ignore(*(() if parameter.grad is None else (parameter.grad,)))
        for module in (model, *teachers.values()):
            memory.ignore(*module.parameters(), *module.buffers())
        with memory, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for _ in step_phases(model, teachers, args, batch_size, sequence_length):
                pass
    return memory.peak


def measure_flops(args: MoveKDSFTConfig, model_args: ModelArguments, sequence_length: int) -> dict[str, int]:
    """
    FLOPs of one row: the forward of each teacher by name, and as `"student"` its forward and backward without
    recomputation. A product counts as two; attention counts in full, causal or not. Arguments and errors as above.
    """
    # Not together with the bytes: the counter's hooks keep activations alive
    mode, model, teachers = build_planned_run(args, model_args, torch.bfloat16, torch.bfloat16)
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    flops: dict[str, int] = {}
    with mode:
        _check_length(model, args, sequence_length)
        with counter:
            for phase in step_phases(model, teachers, args, 1, sequence_length):
                flops[phase] = counter.get_total_flops() - sum(flops.values())
    return flops


def image_shape(
    model: MoveKDForConditionalGeneration, args: MoveKDSFTConfig
) -> tuple[tuple[int, ...], list[list[int]] | None, int]:
    """
    The shape of the student's pixels of one image, for `anyres` of the size with the most tiles; this size; and the
    number of its crops that the teachers see.
    """
    size = model.config.vision_config.image_size
    if model.config.image_aspect_ratio != "anyres":
        return (3, size, size), None, 1
    grids = model.config.image_grid_pinpoints
    largest = max(grids, key=lambda grid: image_size_to_num_patches(grid, grids, size))
    crops = image_size_to_num_patches(largest, grids, size)
    return (crops, 3, size, size), [list(largest)], crops if args.distill_tiles == "all" else 1


def input_bytes(
    model: MoveKDForConditionalGeneration, teachers: Mapping[str, Teacher], args: MoveKDSFTConfig, sequence_length: int
) -> int:
    """Bytes of one row as the collator makes it: pixels of student and teachers, ids, labels and mask of the text."""
    shape, _, taught = image_shape(model, args)
    with torch.device("meta"):
        of_teachers = tree_leaves([teacher_inputs(teacher, taught) for teacher in teachers.values()])
    return 4 * math.prod(shape) + 3 * 8 * sequence_length + sum(tensor.nbytes for tensor in of_teachers)


@torch.no_grad()
def _check_length(model: MoveKDForConditionalGeneration, args: MoveKDSFTConfig, sequence_length: int) -> None:
    shape, image_sizes, _ = image_shape(model, args)
    (image,) = model.get_image_features(torch.empty(1, *shape, dtype=model.dtype), image_sizes).pooler_output
    if len(image) >= sequence_length:
        raise ValueError(
            f"An image takes {len(image)} tokens, the whole sequence has {sequence_length}; plan for more."
        )


@contextmanager
def _without_checks_of_values() -> Iterator[None]:
    """Keep transformers from comparing the numbers of image tokens and image features: fake ids have no values."""
    before = os.environ.get("TRANSFORMERS_DISABLE_TORCH_CHECK", "0")
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"
    try:
        yield
    finally:
        os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = before


def step_phases(
    model: MoveKDForConditionalGeneration,
    teachers: Mapping[str, Teacher],
    args: MoveKDSFTConfig,
    batch_size: int,
    sequence_length: int,
) -> Iterator[str]:
    """One micro-batch in the order of the trainer: each teacher's forward, then the student's forward and backward."""
    shape, image_sizes, taught = image_shape(model, args)
    features = {}
    for name, teacher in teachers.items():
        features[name] = teacher(teacher_inputs(teacher, batch_size * taught))
        yield name
    model.train()
    add_fused_lm_head(model)
    add_distilling_forward(model, args.preset_options()["balance_form"], args.distill_tiles)
    ids = torch.zeros(batch_size, sequence_length, dtype=torch.long)
    with _without_checks_of_values():
        outputs = model(
            input_ids=ids,
            labels=ids,
            pixel_values=torch.empty(batch_size, *shape),
            image_sizes=image_sizes and image_sizes * batch_size,
            image_weights=torch.ones(batch_size),
            teacher_features=features,
            fused_lm_head=True,
        )
    loss = outputs.loss + args.lambda_kd * outputs.kd.sum()
    if outputs.balance is not None:
        loss = loss + args.lambda_balance * outputs.balance.sum()
    loss.backward()
    yield "student"
