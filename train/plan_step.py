"""A student, its teachers and one training step without weights: the size of every tensor, nothing computed."""

import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import timm.data
import timm.models
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CLIPVisionModel, PreTrainedConfig
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from trl.trainer.utils import add_fused_lm_head

from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel
from modeling_movekd.configuration_movekd import MoveKDConfig
from train.build import DISTILLER_KNOBS, set_trainable, teacher_configs, tower_settings
from train.config import ModelArguments, MoveKDSFTConfig
from train.distillation import Distiller
from train.distillation_heads import Target
from train.eva02 import Eva02DetectionBackbone, Eva02DetectionConfig
from train.losses import balance_loss
from train.teacher_loaders import (
    _VISION_PARTS,
    DTYPES,
    TeacherFeatures,
    _clip_features,
    _timm_features,
    _transformers_features,
)
from train.teachers import TeacherConfig


@dataclass
class PlannedTeacher:
    """A teacher on the meta device: `features(model, pixel_values)` as in [`~train.teachers.FrozenTeacher`]."""

    config: TeacherConfig
    model: nn.Module
    image_size: int
    features: Callable[[nn.Module, torch.Tensor], TeacherFeatures]

    @property
    def bytes(self) -> int:
        return sum(value.numel() for value in self.model.parameters()) * DTYPES[self.config.dtype].itemsize


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


def _vision_config(source: str) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(source)
    return getattr(config, "vision_config", config)


def build_planned_student(args: MoveKDSFTConfig, model_args: ModelArguments) -> MoveKDForConditionalGeneration:
    """
    The student on the meta device, from configurations alone.

    A recipe that continues `model_name_or_path` is planned before that folder exists if `vision_model` and
    `language_model` are given too.

    Raises:
        ValueError: if there is no configuration to build from.
    """
    source = model_args.model_name_or_path
    parts = args.vision_model and args.language_model
    with torch.device("meta"):
        if source is not None and not (parts and not os.path.isdir(source)):
            try:
                config = MoveKDConfig.from_pretrained(source)
            except OSError as error:
                raise ValueError(
                    f"There is no student in {source} yet. Give `--vision_model` and `--language_model` of the stage "
                    "that makes it, to plan with their configurations."
                ) from error
            return MoveKDForConditionalGeneration(config)
        if not parts:
            raise ValueError("Give `vision_model` and `language_model`, or `model_name_or_path` of a saved student.")
        text_config = AutoConfig.from_pretrained(args.language_model)
        image_token_id = text_config.vocab_size
        # The row of `<image>`; resizing an embedding looks at its values, of which there are none
        text_config.vocab_size += 1
        vision = MoveKDVisionModel.from_clip(
            CLIPVisionModel(_vision_config(str(args.vision_model))),
            **tower_settings(args),
        )
        return MoveKDForConditionalGeneration.from_parts(
            vision,
            AutoModelForCausalLM.from_config(text_config),
            image_token_id=image_token_id,
            image_aspect_ratio=args.image_aspect_ratio,
        )


def build_planned_teacher(config: TeacherConfig) -> PlannedTeacher:
    """
    A teacher on the meta device, from its configuration alone. Its image size is the row's, else the configuration's.

    Raises:
        ValueError: for a teacher whose shapes depend on what it sees.
    """
    with torch.device("meta"):
        if config.loader == "timm":
            return _planned_timm(config)
        if config.name == "clip":
            return _planned_clip(config)
        if config.loader == "eva02":
            own = os.path.isfile(os.path.join(config.model, "config.json"))
            model = Eva02DetectionBackbone(
                Eva02DetectionConfig.from_pretrained(config.model) if own else Eva02DetectionConfig()
            )
        else:
            architecture = AutoConfig.from_pretrained(config.model, revision=config.revision)
            if architecture.model_type == "pix2struct":
                raise ValueError(
                    f"Teacher {config.name}: Pix2Struct cuts its patches by what it sees, which a plan without pixels "
                    "cannot follow. Plan without it."
                )
            model = AutoModel.from_config(architecture)
            while part := next((name for name in _VISION_PARTS if hasattr(model, name)), None):
                model = getattr(model, part)
    native = model.config.image_size
    size = config.image_size or native
    arguments: dict[str, Any] = {"output_hidden_states": True} if isinstance(config.output, int) else {}
    if config.loader == "transformers" and native not in (size, [size, size], (size, size)):
        arguments["interpolate_pos_encoding"] = True
    features = partial(_transformers_features, config.output, arguments, layout=config.layout)
    return PlannedTeacher(config, model.eval(), size, features)


def _planned_timm(config: TeacherConfig) -> PlannedTeacher:
    source = f"local-dir:{config.model}" if os.path.isdir(config.model) else config.model
    source = f"hf-hub:{source}" if source.startswith("timm/") else source
    size = {"img_size": config.image_size}
    model = timm.create_model(pretrained=False, **timm.models.resolve_model_input_args(source, size))
    model.reset_classifier(0)
    image_size = timm.data.resolve_model_data_config(model, size)["input_size"][-1]
    return PlannedTeacher(config, model.eval(), image_size, partial(_timm_features, config.output))


def _planned_clip(config: TeacherConfig) -> PlannedTeacher:
    vision_config = _vision_config(config.model)
    size = config.image_size or vision_config.image_size
    layer = -2 if config.output is None else int(config.output)
    model = MoveKDVisionModel.from_clip(CLIPVisionModel(vision_config), layer, num_experts=0)
    return PlannedTeacher(config, model.eval(), size, partial(_clip_features, vision_config.image_size != size))


def _empty_copy(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Gives a module on the meta device tensors of the mode we are in, tied ones still tied; parameters in `dtype`."""
    made: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, value in child._parameters.items():
            if value is not None and id(value) not in made:
                empty = torch.empty(value.shape, dtype=dtype or value.dtype, device="cpu")
                made[id(value)] = nn.Parameter(empty, requires_grad=value.requires_grad)
            if value is not None:
                child._parameters[name] = made[id(value)]
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    return module


def build_planned_run(
    args: MoveKDSFTConfig, model_args: ModelArguments, dtype: torch.dtype
) -> tuple[FakeTensorMode, MoveKDForConditionalGeneration, dict[str, PlannedTeacher]]:
    """
    The mode in which tensors have a size and a dtype and no values; and in it the student with its distiller in
    `dtype`, frozen as the stage says, and the teachers by name.
    """
    model = build_planned_student(args, model_args)
    teachers = {config.name: build_planned_teacher(config) for config in teacher_configs(args)}
    mode = FakeTensorMode()
    with mode:
        _empty_copy(model, dtype)
        for teacher in teachers.values():
            _empty_copy(teacher.model, DTYPES[teacher.config.dtype]).requires_grad_(False)
        if teachers:
            model.distiller = _empty_copy(build_planned_distiller(args, model, teachers), dtype)
    set_trainable(model, args)
    return mode, model, teachers


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
    mode, model, teachers = build_planned_run(args, model_args, dtype)
    memory = LiveBytes()
    with mode:
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        modules: list[nn.Module] = [model, *(teacher.model for teacher in teachers.values())]
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
    mode, model, teachers = build_planned_run(args, model_args, torch.bfloat16)
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    flops: dict[str, int] = {}
    with mode, counter:
        for phase in step_phases(model, teachers, args, 1, sequence_length):
            flops[phase] = counter.get_total_flops() - sum(flops.values())
    return flops


def step_phases(
    model: MoveKDForConditionalGeneration,
    teachers: Mapping[str, PlannedTeacher],
    args: MoveKDSFTConfig,
    batch_size: int,
    sequence_length: int,
) -> Iterator[str]:
    """One micro-batch in the order of the trainer: each teacher's forward, then the student's forward and backward."""
    features = {}
    for name, teacher in teachers.items():
        dtype = DTYPES[teacher.config.dtype]
        pixels = torch.empty(batch_size, 3, teacher.image_size, teacher.image_size).to(dtype)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            features[name] = teacher.features(teacher.model, pixels)
        del pixels
        yield name
    size = model.config.vision_config.image_size
    shape: tuple[int, ...] = (3, size, size)
    image_sizes = None
    if model.config.image_aspect_ratio == "anyres":
        grids = model.config.image_grid_pinpoints
        largest = max(grids, key=lambda grid: image_size_to_num_patches(grid, grids, size))
        image_sizes = [list(largest)] * batch_size
        shape = (image_size_to_num_patches(largest, grids, size), *shape)
    model.train()
    add_fused_lm_head(model)
    _student_loss(model, args, torch.empty(batch_size, *shape), image_sizes, sequence_length, features).backward()
    yield "student"


def build_planned_distiller(
    args: MoveKDSFTConfig, model: MoveKDForConditionalGeneration, teachers: Mapping[str, PlannedTeacher]
) -> Distiller:
    """The distiller for teachers on fake tensors, whose grids and widths are those of one image's features."""
    shapes = {}
    for name, teacher in teachers.items():
        pixels = torch.empty(1, 3, teacher.image_size, teacher.image_size, dtype=DTYPES[teacher.config.dtype])
        with torch.no_grad():
            features = teacher.features(teacher.model, pixels)
        shapes[name] = (features.tokens.shape[-1], features.grid)
    vision_config = model.config.vision_config
    side = vision_config.image_size // vision_config.patch_size
    distiller = Distiller(
        student_width=vision_config.hidden_size,
        student_grid=(side, side),
        teachers=shapes,
        whitening_components=args.whitening_components,
        **{name: args.knobs()[name] for name in DISTILLER_KNOBS},
    )
    for module in distiller.modules():
        if isinstance(module, Target):
            module.needs_statistics = False
    return distiller


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
    knobs = args.knobs()
    if features:
        tokens = vision.hidden_states[model.config.vision_feature_layer][:, 1:]
        whole = tokens[:: len(tokens) // len(images)]
        loss = loss + knobs["lambda_kd"] * model.distiller(whole, features).loss.sum()
    probabilities, indices = vision.router_probabilities, vision.expert_indices
    if probabilities and indices:
        balance = balance_loss(probabilities, indices, knobs["balance_form"])
        loss = loss + knobs["lambda_balance"] * balance.sum()
    return loss
