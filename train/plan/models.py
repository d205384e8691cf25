"""A student and its teachers without weights: built on the meta device from configurations, then as fake tensors."""

import os
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from modeling_movekd import MoveKDConfig, MoveKDForConditionalGeneration, MoveKDVisionConfig, MoveKDVisionModel
from modeling_movekd.base_encoders_movekd import find_base_encoder, read_model_type
from train.arguments import ModelArguments
from train.build import build_distiller, build_teachers, join_parts, set_trainable, teacher_configs
from train.build_encoder import build_tower, is_saved_encoder
from train.config import MoveKDSFTConfig
from train.distillation.heads import Target
from train.forward import add_distilling_forward, add_encoder_forward
from train.language_lora import inject_language_lora, language_lora_layers
from train.teachers.cached import Teacher
from train.teachers.loaders import load_teacher


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
        vision = _base_encoder(str(args.vision_model), dtype)
        return join_parts(args, vision, AutoModelForCausalLM.from_config(text_config, dtype=dtype), image_token_id)


def build_planned_encoder(
    args: MoveKDSFTConfig, model_args: ModelArguments, dtype: torch.dtype = torch.float32
) -> MoveKDVisionModel:
    """
    The encoder of stage `encoder` on the meta device. A recipe that continues `model_name_or_path` can be planned
    before that folder exists, if `vision_model` is given too.

    Raises:
        ValueError: if there is no configuration to build from.
    """
    source, revision = model_args.model_name_or_path, model_args.model_revision
    if args.vision_model and not (source and os.path.isdir(source)):
        source, revision = args.vision_model, None
    if source is None:
        raise ValueError("Give `vision_model`, or `model_name_or_path` of a saved encoder.")
    try:
        saved = is_saved_encoder(source)
    except OSError as error:
        raise ValueError(f"There is no encoder in {source} yet. Give the `--vision_model` it starts from.") from error
    with torch.device("meta"):
        if saved:
            config = MoveKDVisionConfig.from_pretrained(source, revision=revision)
            return MoveKDVisionModel._from_config(config, dtype=dtype)
        return build_tower(args, _base_encoder(source, dtype))


def _base_encoder(source: str, dtype: torch.dtype) -> PreTrainedModel:
    kind = find_base_encoder(read_model_type(source))
    return kind.model_class._from_config(kind.config_class.from_pretrained(source), dtype=dtype)


@dataclass(frozen=True)
class PlannedRun:
    """
    The models of a run, ready for a step of training.

    Args:
        mode (`FakeTensorMode`): The mode in which tensors have a shape and a dtype, and no values.
        model (`MoveKDForConditionalGeneration` or `MoveKDVisionModel`): The student, or in stage `encoder` the
            encoder, with its distiller, frozen as the stage says.
        teachers (`dict[str, Teacher]`): By name.
        args (`MoveKDSFTConfig`): The recipe.
    """

    mode: FakeTensorMode
    model: MoveKDForConditionalGeneration | MoveKDVisionModel
    teachers: dict[str, Teacher]
    args: MoveKDSFTConfig


def build_planned_run(args: MoveKDSFTConfig, model_args: ModelArguments, cast: bool = False) -> PlannedRun:
    """
    Build the models in the recipe's dtype, or with `cast` in bf16, as ZeRO and FSDP2 compute.

    Raises:
        ValueError: if there is no configuration of the student, or the feature cache is not that of the recipe.
    """
    dtype = torch.bfloat16 if cast else getattr(torch, "float32" if model_args.dtype == "auto" else model_args.dtype)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    build = build_planned_encoder if args.stage == "encoder" else build_planned_student
    model, teachers = build(args, model_args, dtype), {}
    if args.feature_cache is not None:
        teachers = build_teachers(args)
    else:
        for config in teacher_configs(args):
            teacher = teachers[config.name] = load_teacher(config, weights=False)
            with mode:
                teacher.to_empty(device="cpu")
                teacher.measure()
    with torch.device("meta"):
        if distiller := build_distiller(args, model, teachers):
            model.distiller = distiller.to(dtype=dtype)
            for module in distiller.modules():
                if isinstance(module, Target):
                    module.needs_statistics = False
        if args.language_lora_rank:
            inject_language_lora(model, args)
            for layer in language_lora_layers(model).values():
                if cast:
                    layer.to(dtype)
                elif args.load_in_4bit and args.bf16:  # 4-bit weights are unpacked to bf16
                    layer.get_base_layer().to(torch.bfloat16)
    set_trainable(model, args)
    with mode:
        model.to_empty(device="cpu")
        model.tie_weights()
    model.train()
    balance_form = args.preset_options()["balance_form"]
    if isinstance(model, MoveKDVisionModel):
        add_encoder_forward(model, balance_form, args.expert_assignment)
    else:
        add_fused_lm_head(model)
        add_distilling_forward(model, balance_form, args.distill_tiles, args.expert_assignment)
    return PlannedRun(mode, model, teachers, args)
