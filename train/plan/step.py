"""One training step without weights: the size of every tensor, nothing computed."""

import math
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from modeling_movekd import MoveKDVisionConfig
from train.plan.models import PlannedRun
from train.teachers.cached import CachedTeacher, Teacher


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
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return outputs

    def _add(self, size: int) -> None:
        self.current += size
        self.peak = max(self.peak, self.current)


# Kernels of a CPU that torch's counter does not know; TRL's head adds up its gradients by in-place products
_aten = torch.ops.aten
FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *args, **kwargs: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
    _aten.addmm_: lambda base, a, b, *args, **kwargs: 2 * a[0] * a[1] * b[1],
}


def measure_activations(run: PlannedRun, tokens: int, autocast: bool) -> int:
    """
    Bytes at the peak of one micro-batch beside weights, gradients and optimizer: activations, inputs, the teachers'
    features, and temporary tensors. Each row has one image; text fills the rest of the sequence.

    Kernels are those of a CPU, so that a GPU's are estimated: attention is fused on both; norms under autocast are
    float32 on a GPU alone; and every position goes through the head, where a GPU takes only the labelled ones.

    Args:
        run (`PlannedRun`): The models. They recompute activations in the backward if the recipe does.
        tokens (`int`): Length of a row with its image.
        autocast (`bool`): Whether to compute under bfloat16 autocast.
    """
    memory = LiveBytes()
    with run.mode:
        if run.args.activation_checkpointing:
            run.model.activation_checkpointing_enable({"use_reentrant": False})
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                memory.ignore(parameter.grad)
        for module in (run.model, *run.teachers.values()):
            memory.ignore(*module.parameters(), *module.buffers())
        with memory, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for _ in step_phases(run, run.args.per_device_train_batch_size, tokens):
                pass
    return memory.peak


def measure_flops(run: PlannedRun, tokens: int) -> dict[str, int]:
    """
    FLOPs of one row: the forward of each teacher by name, and as `"student"` its forward and backward without
    recomputation. A product counts as two; attention counts in full, causal or not.
    """
    # Not together with the bytes: the counter's hooks keep activations alive
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    flops: dict[str, int] = {}
    with run.mode, counter:
        for phase in step_phases(run, 1, tokens):
            flops[phase] = counter.get_total_flops() - sum(flops.values())
    return flops


def image_shape(run: PlannedRun) -> tuple[tuple[int, ...], list[list[int]] | None, int]:
    """
    The shape of the student's pixels of one image, for `anyres` of the size with the most tiles; this size; and the
    number of its crops that the teachers see.
    """
    config = run.model.config
    if isinstance(config, MoveKDVisionConfig):
        return (3, config.image_size, config.image_size), None, 1
    size, grids = config.vision_config.image_size, config.image_grid_pinpoints
    if config.image_aspect_ratio != "anyres":
        return (3, size, size), None, 1
    largest = max(grids, key=lambda grid: image_size_to_num_patches(grid, grids, size))
    crops = image_size_to_num_patches(largest, grids, size)
    return (crops, 3, size, size), [list(largest)], crops if run.args.distill_tiles == "all" else 1


def teacher_inputs(teacher: Teacher, num_images: int) -> torch.Tensor | dict[str, torch.Tensor]:
    """A batch as the collator makes it for this teacher: pixels, or the tensors that the feature cache holds."""
    if isinstance(teacher, CachedTeacher):
        tensors = teacher.cache.index["teachers"][teacher.name]["tensors"]
        return {
            name: torch.empty(num_images, *shape, dtype=getattr(torch, dtype))
            for name, (dtype, shape) in tensors.items()
        }
    size = teacher.preprocessor.image_size
    return torch.empty(num_images, 3, size, size, dtype=torch.uint8)


def input_bytes(run: PlannedRun, tokens: int) -> int:
    """Bytes of one row as the collator makes it: pixels of student and teachers, ids, labels and mask of the text."""
    shape, _, taught = image_shape(run)
    with torch.device("meta"):
        of_teachers = tree_leaves([teacher_inputs(teacher, taught) for teacher in run.teachers.values()])
    return 4 * math.prod(shape) + 3 * 8 * tokens + sum(tensor.nbytes for tensor in of_teachers)


@torch.no_grad()
def check_length(run: PlannedRun, tokens: int) -> None:
    """Raise a `ValueError` if the image alone is longer than `tokens`."""
    shape, image_sizes, _ = image_shape(run)
    with run.mode:
        pixels = torch.empty(1, *shape, dtype=run.model.dtype)
        (image,) = run.model.get_image_features(pixels, image_sizes).pooler_output
    if len(image) >= tokens:
        raise ValueError(f"An image takes {len(image)} tokens, the whole sequence has {tokens}; plan for more.")


@contextmanager
def _without_checks_of_values() -> Iterator[None]:
    """Keep transformers from comparing the numbers of image tokens and image features: fake ids have no values."""
    before = os.environ.get("TRANSFORMERS_DISABLE_TORCH_CHECK", "0")
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"
    try:
        yield
    finally:
        os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = before


def step_phases(run: PlannedRun, batch_size: int, tokens: int) -> Iterator[str]:
    """One micro-batch in the order of the trainer: each teacher's forward, then the student's forward and backward."""
    shape, image_sizes, taught = image_shape(run)
    features = {}
    for name, teacher in run.teachers.items():
        features[name] = teacher(teacher_inputs(teacher, batch_size * taught))
        yield name
    images = {
        "pixel_values": torch.empty(batch_size, *shape),
        "image_weights": torch.ones(batch_size),
        "teacher_features": features,
    }
    if tokens:
        ids = torch.zeros(batch_size, tokens, dtype=torch.long)
        images["image_sizes"] = image_sizes and image_sizes * batch_size
        with _without_checks_of_values():
            outputs = run.model(input_ids=ids, labels=ids, fused_lm_head=True, **images)
        loss = outputs.loss + run.args.lambda_kd * outputs.kd.sum()
    else:
        outputs = run.model(**images)
        loss = run.args.lambda_kd * outputs.kd.sum()
    if outputs.balance is not None:
        loss = loss + run.args.lambda_balance * outputs.balance.sum()
    loss.backward()
    yield "student"
