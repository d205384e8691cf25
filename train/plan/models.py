"""A student and its teachers without weights: built on the meta device from configurations, then as fake tensors."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from modeling_movekd import MoveKDConfig, MoveKDForConditionalGeneration
from train.build import build_distiller, build_teachers, join_parts, set_trainable, teacher_configs
from train.config import ModelArguments, MoveKDSFTConfig
from train.distillation.heads import Target
from train.language_lora import inject_language_lora, language_lora_layers
from train.plan.memory import packed_bytes
from train.teachers.cached import INDEX_NAME, CachedTeacher, FeatureCache, Teacher
from train.teachers.features import FrozenTeacher
from train.teachers.loaders import load_teacher


class UnwrittenCache(FeatureCache):
    """The index of a feature cache that does not exist yet, in float16."""

    def __init__(self, teacher: FrozenTeacher) -> None:
        features = teacher.measure()._asdict()
        tensors = {
            name: ["float16" if name == "tokens" else "float32", list(value.shape[1:])]
            for name, value in features.items()
            if torch.is_tensor(value)
        }
        self.index = {"teachers": {teacher.name: {"grid": teacher.grid, "width": teacher.width, "tensors": tensors}}}


def teacher_inputs(teacher: Teacher, num_images: int) -> torch.Tensor | dict[str, torch.Tensor]:
    """A batch as the collator makes it for this teacher: pixels, or the tensors that the feature cache holds."""
    if isinstance(teacher, FrozenTeacher):
        size = teacher.preprocessor.image_size
        return torch.empty(num_images, 3, size, size)
    tensors = teacher.cache.index["teachers"][teacher.name]["tensors"]
    return {
        name: torch.empty(num_images, *shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in tensors.items()
    }


class PackedLinear(nn.Module):
    """A frozen 4-bit layer by its sizes: the weight is unpacked for the forward and once more for the backward."""

    def __init__(self, layer: Any, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = layer.in_features, layer.out_features, compute_dtype
        elements, device = layer.weight.numel(), layer.weight.device
        packed = torch.empty((elements + 1) // 2, 1, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        scales = packed_bytes(elements) - packed.nbytes
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8, device=device))
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


def build_planned_student(
    args: MoveKDSFTConfig, model_args: ModelArguments, dtype: torch.dtype = torch.float32
) -> MoveKDForConditionalGeneration:
    """
    The student on the meta device. A recipe that continues `model_name_or_path` can be planned before that folder
    exists, if `vision_model` and `language_model` are given too.

    Raises:
        ValueError: if there is no configuration to build from.
    """
    source, parts = model_args.model_name_or_path, args.vision_model and args.language_model
    with torch.device("meta"):
        if source is not None and (os.path.isdir(source) or not parts):
            try:
                config = MoveKDConfig.from_pretrained(source, revision=model_args.model_revision)
            except OSError as error:
                raise ValueError(
                    f"There is no student in {source} yet. Give `--vision_model` and `--language_model` of the stage "
                    "that makes it, to plan with their configurations."
                ) from error
            return MoveKDForConditionalGeneration._from_config(config, dtype=dtype)
        if not parts:
            raise ValueError("Give `vision_model` and `language_model`, or `model_name_or_path` of a saved student.")
        text_config = AutoConfig.from_pretrained(args.language_model, trust_remote_code=False)
        # A row for `<image>` from the start: to resize an embedding, transformers reads values, and here are none
        image_token_id = text_config.vocab_size
        text_config.vocab_size += 1
        clip = CLIPVisionModel._from_config(CLIPVisionConfig.from_pretrained(args.vision_model), dtype=dtype)
        return join_parts(args, clip, AutoModelForCausalLM.from_config(text_config, dtype=dtype), image_token_id)


def _use_fake_tensors(module: nn.Module) -> None:
    """Put tensors of the active mode in place of those on the meta device; tied parameters stay tied."""
    made: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, value in child._parameters.items():
            if value is not None and id(value) not in made:
                empty = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                made[id(value)] = nn.Parameter(empty, requires_grad=value.requires_grad)
            child._parameters[name] = None if value is None else made[id(value)]
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _build_planned_teachers(args: MoveKDSFTConfig, mode: FakeTensorMode) -> Mapping[str, Teacher]:
    if args.feature_cache is not None and (Path(args.feature_cache) / INDEX_NAME).is_file():
        return build_teachers(args)
    teachers = {config.name: load_teacher(config, weights=False) for config in teacher_configs(args)}
    with mode:
        for teacher in teachers.values():
            _use_fake_tensors(teacher)
            teacher.measure()
        if args.feature_cache is None:
            return teachers
        return {name: CachedTeacher(teacher.config, UnwrittenCache(teacher)) for name, teacher in teachers.items()}


def build_planned_run(
    args: MoveKDSFTConfig, model_args: ModelArguments, dtype: torch.dtype, lora_dtype: torch.dtype = torch.float32
) -> tuple[FakeTensorMode, MoveKDForConditionalGeneration, Mapping[str, Teacher]]:
    """
    The mode in which tensors have a shape and a dtype and no values; and in this mode the student with its distiller
    in `dtype`, LoRA of the language model in `lora_dtype`, frozen as the stage says, and the teachers by name.

    Raises:
        ValueError: if there is no configuration of the student, or the feature cache is not that of the recipe.
    """
    mode = FakeTensorMode()
    model, teachers = build_planned_student(args, model_args, dtype), _build_planned_teachers(args, mode)
    with torch.device("meta"):
        if distiller := build_distiller(args, model, teachers):
            model.distiller = distiller.to(dtype=dtype)
            for module in distiller.modules():
                if isinstance(module, Target):
                    module.needs_statistics = False
        if args.language_lora_rank:
            inject_language_lora(model, args)
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.data = parameter.data.to(lora_dtype)
        if args.load_in_4bit:
            for layer in language_lora_layers(model).values():
                layer.base_layer = PackedLinear(layer.get_base_layer(), torch.bfloat16 if args.bf16 else dtype)
    set_trainable(model, args)
    with mode:
        _use_fake_tensors(model)
    return mode, model, teachers
