"""A student and its teachers without weights: on the meta device from configurations alone, then as fake tensors."""

import inspect
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import timm.data
import timm.models
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionModel,
    Pix2StructForConditionalGeneration,
    PreTrainedConfig,
)

from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel
from modeling_movekd.configuration_movekd import MoveKDConfig
from train.build import DISTILLER_OPTIONS, set_trainable, teacher_configs, tower_settings
from train.config import ModelArguments, MoveKDSFTConfig
from train.distillation.distiller import Distiller
from train.distillation.heads import Target
from train.language_lora import inject_language_lora, language_lora_layers
from train.plan.memory import packed_bytes
from train.teachers.cache_shards import decode
from train.teachers.cached import INDEX_NAME
from train.teachers.config import TeacherConfig
from train.teachers.eva02 import Eva02DetectionBackbone, Eva02DetectionConfig
from train.teachers.features import (
    TeacherFeatures,
    clip_features,
    pix2struct_features,
    timm_features,
    transformers_features,
)
from train.teachers.loaders import DTYPES, VISION_PARTS, preprocessor_of_transformers
from train.teachers.preprocessing import CLIP_MEAN, CLIP_STD


@dataclass
class PlannedTeacher:
    """A teacher on the meta device; `features(model, pixel_values)` as of `FrozenTeacher`."""

    config: TeacherConfig
    model: nn.Module
    image_size: int
    features: Callable[[nn.Module, torch.Tensor], TeacherFeatures]

    @property
    def num_parameters(self) -> int:
        return sum(value.numel() for value in self.model.parameters())

    @property
    def bytes(self) -> int:
        return self.num_parameters * DTYPES[self.config.dtype].itemsize

    def input_bytes(self, num_images: int) -> int:
        """Of what the collator makes for it."""
        return 4 * 3 * self.image_size**2 * num_images

    @torch.no_grad()
    def run(self, num_images: int) -> TeacherFeatures:
        """Features of as many images, on fake tensors."""
        shape = (num_images, 3, self.image_size, self.image_size)
        with torch.autocast("cpu", enabled=False):
            return self.features(self.model, torch.empty(shape).to(DTYPES[self.config.dtype]))


@dataclass
class PlannedCache:
    """
    What stands for a teacher whose features are read from a cache.

    Args:
        tensors (`dict[str, tuple[torch.dtype, list[int]]]`): Of one image, as [`~train.teachers.cache_shards.encode`]
            makes them.
        grid (`tuple[int, int]`): Of the features.
    """

    config: TeacherConfig
    tensors: dict[str, tuple[torch.dtype, list[int]]]
    grid: tuple[int, int]
    num_parameters: int = 0
    bytes: int = 0

    def input_bytes(self, num_images: int) -> int:
        """Of what the collator makes for it."""
        return num_images * sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.tensors.values())

    def run(self, num_images: int) -> TeacherFeatures:
        """Features of as many images, on fake tensors."""
        encoded = {name: torch.empty(num_images, *shape, dtype=dtype) for name, (dtype, shape) in self.tensors.items()}
        return decode(encoded, self.grid)


class PackedLinear(nn.Module):
    """
    The size of a frozen layer in 4 bits and of what it computes: its weight is unpacked for the forward and once more
    for the backward.
    """

    def __init__(self, layer: Any, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = layer.in_features, layer.out_features, compute_dtype
        elements = layer.weight.numel()
        packed = torch.empty((elements + 1) // 2, 1, dtype=torch.uint8, device=layer.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        scales = packed_bytes(elements) - packed.nbytes
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8, device=packed.device))
        self.bias = layer.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inputs = hidden_states.to(self.compute_dtype)
        outputs = _UnpackedLinear.apply(inputs, self.weight, (self.out_features, self.in_features))
        return (outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)).to(hidden_states.dtype)


class _UnpackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, inputs: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        context.save_for_backward(packed)
        context.shape = shape
        return F.linear(inputs, inputs.new_empty(shape))

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(context.shape), None, None


def _vision_config(source: str) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
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
        text_config = AutoConfig.from_pretrained(args.language_model, trust_remote_code=False)
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
    A teacher on the meta device, from its configuration alone, with the image size that training would give it.

    Raises:
        ValueError: if that is nowhere to be found.
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
            code = {"trust_remote_code": config.trust_remote_code}
            architecture = AutoConfig.from_pretrained(config.model, revision=config.revision, **code)
            if architecture.model_type == "pix2struct":
                encoder = Pix2StructForConditionalGeneration(architecture).encoder
                standard = partial(pix2struct_features, config.mean or CLIP_MEAN, config.std or CLIP_STD)
                return PlannedTeacher(config, encoder.eval(), config.image_size or 1024, standard)
            model = AutoModel.from_config(architecture, **code)
            while part := next((name for name in VISION_PARTS if hasattr(model, name)), None):
                model = getattr(model, part)
    native: Any = getattr(model.config, "image_size", None)
    size = config.image_size or (
        native if config.loader == "eva02" else preprocessor_of_transformers(config).image_size
    )
    arguments: dict[str, Any] = {"output_hidden_states": True} if isinstance(config.output, int) else {}
    accepted = inspect.signature(model.forward).parameters
    if "interpolate_pos_encoding" in accepted and native not in (size, [size, size], (size, size)):
        arguments["interpolate_pos_encoding"] = True
    features = partial(transformers_features, config.output, arguments, layout=config.layout)
    return PlannedTeacher(config, model.eval(), size, features)


def _planned_timm(config: TeacherConfig) -> PlannedTeacher:
    source = f"local-dir:{config.model}" if os.path.isdir(config.model) else config.model
    source = f"hf-hub:{source}" if source.startswith("timm/") else source
    size = {"img_size": config.image_size}
    model = timm.create_model(pretrained=False, **timm.models.resolve_model_input_args(source, size))
    model.reset_classifier(0)
    image_size = timm.data.resolve_model_data_config(model, size)["input_size"][-1]
    return PlannedTeacher(config, model.eval(), image_size, partial(timm_features, config.output))


def _planned_clip(config: TeacherConfig) -> PlannedTeacher:
    vision_config = _vision_config(config.model)
    size = preprocessor_of_transformers(config).image_size
    layer = -2 if config.output is None else int(config.output)
    model = MoveKDVisionModel.from_clip(CLIPVisionModel(vision_config), layer, num_experts=0)
    return PlannedTeacher(config, model.eval(), size, partial(clip_features, vision_config.image_size != size))


def _empty_copy(module: nn.Module, dtype: torch.dtype, lora_dtype: torch.dtype = torch.float32) -> nn.Module:
    """
    Gives a module on the meta device tensors of the mode we are in, tied ones still tied; parameters in `dtype`, those
    of LoRA in their own, packed ones as they are.
    """
    made: dict[int, nn.Parameter] = {}
    for path, child in module.named_modules():
        for name, value in child._parameters.items():
            if value is None:
                continue
            if id(value) not in made:
                wanted = lora_dtype if ".lora_" in path else dtype
                wanted = wanted if value.is_floating_point() else value.dtype
                empty = torch.empty(value.shape, dtype=wanted, device="cpu")
                made[id(value)] = nn.Parameter(empty, requires_grad=value.requires_grad)
            child._parameters[name] = made[id(value)]
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    return module


def _planned_cache(folder: Path, teacher: PlannedTeacher) -> PlannedCache:
    """As the folder says, or as one in float16 would be that is not there yet."""
    if (folder / INDEX_NAME).is_file():
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        facts = index["teachers"].get(teacher.config.name)
        if facts is None:
            raise ValueError(
                f"`feature_cache` {folder} has the teachers {list(index['teachers'])} and not {teacher.config.name}."
            )
        tensors = {name: (getattr(torch, dtype), shape) for name, (dtype, shape) in facts["tensors"].items()}
        return PlannedCache(teacher.config, tensors, (facts["grid"][0], facts["grid"][1]))
    features = teacher.run(1)
    shapes = {name: list(value.shape[1:]) for name, value in features._asdict().items() if torch.is_tensor(value)}
    kept = {name: (torch.float16 if name == "tokens" else torch.float32, shape) for name, shape in shapes.items()}
    return PlannedCache(teacher.config, kept, features.grid)


def _add_planned_lora(model: MoveKDForConditionalGeneration, args: MoveKDSFTConfig, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        inject_language_lora(model, args)
    if args.load_in_4bit:
        for layer in language_lora_layers(model).values():
            layer.base_layer = PackedLinear(layer.get_base_layer(), torch.bfloat16 if args.bf16 else dtype)


def build_planned_run(
    args: MoveKDSFTConfig, model_args: ModelArguments, dtype: torch.dtype, lora_dtype: torch.dtype = torch.float32
) -> tuple[FakeTensorMode, MoveKDForConditionalGeneration, dict[str, PlannedTeacher | PlannedCache]]:
    """
    The mode in which tensors have a size and a dtype and no values; and in it the student with its distiller in
    `dtype`, LoRA of the language model apart, frozen as the stage says, and by name the teachers, or what stands for
    them with `feature_cache`.

    Raises:
        ValueError: if there is no configuration of the student, or the feature cache lacks a teacher.
    """
    model = build_planned_student(args, model_args)
    if args.language_lora_rank:
        _add_planned_lora(model, args, dtype)
    running = {config.name: build_planned_teacher(config) for config in teacher_configs(args)}
    teachers: dict[str, PlannedTeacher | PlannedCache] = {}
    mode = FakeTensorMode()
    with mode:
        _empty_copy(model, dtype, lora_dtype)
        for name, teacher in running.items():
            _empty_copy(teacher.model, DTYPES[teacher.config.dtype]).requires_grad_(False)
            cached = args.feature_cache is not None
            teachers[name] = _planned_cache(Path(str(args.feature_cache)), teacher) if cached else teacher
        if teachers:
            model.distiller = _empty_copy(build_planned_distiller(args, model, teachers), dtype)
    set_trainable(model, args)
    return mode, model, teachers


def build_planned_distiller(
    args: MoveKDSFTConfig,
    model: MoveKDForConditionalGeneration,
    teachers: Mapping[str, PlannedTeacher | PlannedCache],
) -> Distiller:
    """The distiller for teachers on fake tensors, whose grids and widths are those of one image's features."""
    shapes = {}
    for name, teacher in teachers.items():
        features = teacher.run(1)
        shapes[name] = (features.tokens.shape[-1], features.grid)
    vision_config = model.config.vision_config
    side = vision_config.image_size // vision_config.patch_size
    distiller = Distiller(
        student_width=vision_config.hidden_size,
        student_grid=(side, side),
        teachers=shapes,
        whitening_components=args.whitening_components,
        **{name: args.preset_options()[name] for name in DISTILLER_OPTIONS},
    )
    for module in distiller.modules():
        if isinstance(module, Target):
            module.needs_statistics = False
    return distiller
