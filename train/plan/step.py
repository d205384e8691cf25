"""One training step without weights: the size of every tensor, nothing computed."""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from trl.trainer.utils import add_fused_lm_head

from modeling_movekd import MoveKDForConditionalGeneration
from train.config import ModelArguments, MoveKDSFTConfig
from train.distillation.losses import balance_loss
from train.plan.models import PlannedCache, PlannedTeacher, build_planned_run
from train.teachers.features import TeacherFeatures


class LiveBytes(TorchDispatchMode):
    """
    Bytes of the storages made inside and still alive, and their peak. What was made before does not count. Torch's own
    `MemTracker` does the same and more, but refuses frozen parameters.
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


# Kernels of a CPU that torch's counter does not know; in-place products are how TRL's head adds up its gradients
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
    Bytes at the peak of one micro-batch beside weights, gradients and optimiser: what the backward needs, inputs, the
    teachers' features, and temporary tensors. Each row has one image; text fills the rest of the sequence.

    Kernels are those of a CPU, so a GPU's are estimated: attention is the fused one on both, norms under autocast are
    float32 on a GPU alone, and every position goes through the head, where a GPU takes the labelled ones.

    Args:
        batch_size (`int`): Rows.
        sequence_length (`int`): Tokens of a row, those of its image included.
        dtype (`torch.dtype`): Of the student's and the distiller's weights.
        autocast (`bool`): Whether to compute under bfloat16 autocast.
        checkpointing (`bool`): Whether to recompute activations in the backward.

    Raises:
        ValueError: if the image alone is longer than `sequence_length`.
    """
    mode, model, teachers = build_planned_run(args, model_args, dtype, torch.float32 if autocast else dtype)
    memory = LiveBytes()
    with mode:
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        running = [teacher.model for teacher in teachers.values() if isinstance(teacher, PlannedTeacher)]
        modules: list[nn.Module] = [model, *running]
        for module in modules:
            memory.ignore(*module.parameters(), *module.buffers())
        memory.ignore(*(parameter.grad for parameter in model.parameters() if parameter.grad is not None))
        with memory, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for _ in step_phases(model, teachers, args, batch_size, sequence_length):
                pass
    return memory.peak


def measure_flops(args: MoveKDSFTConfig, model_args: ModelArguments, sequence_length: int) -> dict[str, int]:
    """
    FLOPs of one row: by name the forward of each teacher, and as `"student"` its forward and backward, without
    recomputation. A product is two; attention counts in full, causal or not. Arguments as above.
    """
    # Not together with the bytes: the counter's hooks keep activations alive
    mode, model, teachers = build_planned_run(args, model_args, torch.bfloat16, torch.bfloat16)
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    flops: dict[str, int] = {}
    with mode, counter:
        for phase in step_phases(model, teachers, args, 1, sequence_length):
            flops[phase] = counter.get_total_flops() - sum(flops.values())
    return flops


def image_shape(
    model: MoveKDForConditionalGeneration, args: MoveKDSFTConfig
) -> tuple[tuple[int, ...], list[list[int]] | None, int]:
    """The shape of the student's pixels of one image, for anyres of one with the most tiles; its size, and how many
    crops of it the teachers see."""
    size = model.config.vision_config.image_size
    if model.config.image_aspect_ratio != "anyres":
        return (3, size, size), None, 1
    grids = model.config.image_grid_pinpoints
    largest = max(grids, key=lambda grid: image_size_to_num_patches(grid, grids, size))
    crops = image_size_to_num_patches(largest, grids, size)
    return (crops, 3, size, size), [list(largest)], crops if args.distill_tiles == "all" else 1


def input_bytes(
    model: MoveKDForConditionalGeneration,
    teachers: Mapping[str, PlannedTeacher | PlannedCache],
    args: MoveKDSFTConfig,
    sequence_length: int,
) -> int:
    """Bytes of one row as the collator makes it: pixels of student and teachers, ids, labels and mask of the text."""
    shape, _, taught = image_shape(model, args)
    taught_bytes = sum(teacher.input_bytes(taught) for teacher in teachers.values())
    return 4 * math.prod(shape) + 3 * 8 * sequence_length + taught_bytes


def step_phases(
    model: MoveKDForConditionalGeneration,
    teachers: Mapping[str, PlannedTeacher | PlannedCache],
    args: MoveKDSFTConfig,
    batch_size: int,
    sequence_length: int,
) -> Iterator[str]:
    """One micro-batch in the order of the trainer: each teacher's forward, then the student's forward and backward."""
    shape, image_sizes, taught = image_shape(model, args)
    image_sizes = image_sizes and image_sizes * batch_size
    features = {}
    for name, teacher in teachers.items():
        features[name] = teacher.run(batch_size * taught)
        yield name
    model.train()
    add_fused_lm_head(model)
    _student_loss(model, args, torch.empty(batch_size, *shape), image_sizes, sequence_length, features).backward()
    yield "student"


def _student_loss(
    model: MoveKDForConditionalGeneration,
    args: MoveKDSFTConfig,
    pixel_values: torch.Tensor,
    image_sizes: list[list[int]] | None,
    sequence_length: int,
    features: Mapping[str, TeacherFeatures],
) -> torch.Tensor:
    """As the trainer's forward, except that image and text are put together by their place, not by looking at ids."""
    vision = model.get_image_features(
        pixel_values, image_sizes, output_router_probabilities=True, output_expert_indices=True, return_dict=True
    )
    images = torch.stack(list(vision.pooler_output))
    if images.shape[1] >= sequence_length:
        raise ValueError(
            f"An image takes {images.shape[1]} tokens, the whole sequence has {sequence_length}; plan for more."
        )
    ids = torch.zeros(len(images), sequence_length - images.shape[1], dtype=torch.long)
    embeddings = torch.cat([images, model.get_input_embeddings()(ids).to(images.dtype)], dim=1)
    labels = torch.zeros(embeddings.shape[:2], dtype=torch.long)
    loss = model(inputs_embeds=embeddings, labels=labels, fused_lm_head=True).loss
    options = args.preset_options()
    if features:
        tokens = vision.hidden_states[model.config.vision_feature_layer][:, 1:]
        if args.distill_tiles == "base":
            tokens = tokens[:: len(tokens) // len(images)]
        loss = loss + options["lambda_kd"] * model.distiller(tokens, features).loss.sum()
    probabilities, indices = vision.router_probabilities, vision.expert_indices
    if probabilities and indices:
        balance = balance_loss(probabilities, indices, options["balance_form"])
        loss = loss + options["lambda_balance"] * balance.sum()
    return loss
