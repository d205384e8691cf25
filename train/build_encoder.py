"""Build a student's vision tower: from a CLIP checkpoint, or from an encoder that stage `encoder` has saved."""

import logging
from typing import Any

import torch
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedConfig, PreTrainedModel, set_seed

from hub.checkpoint_parts import tower_config
from modeling_movekd import MoveKDConfig, MoveKDVisionConfig, MoveKDVisionModel
from modeling_movekd.inference import check_weights, read_config
from modeling_movekd.processing import check_image_processor
from train.arguments import ModelArguments
from train.config import MoveKDSFTConfig
from train.teachers.config import resolve_teacher


logger = logging.getLogger(__name__)

# Options that a saved student has decided. A run that continues the student must give the same values.
STUDENT_FIELDS = ("num_experts", "lora_rank", "lora_alpha", "lora_dropout", "expert_bias", "router_gradient")


def tower_settings(args: MoveKDSFTConfig) -> dict[str, Any]:
    """The arguments of `MoveKDVisionModel.from_encoder` for a new student."""
    settings = {name: getattr(args, name) for name in (*STUDENT_FIELDS, "expert_init")}
    settings |= {"balance_bias": args.balance_form == "bias", "expert_teachers": expert_teachers(args)}
    return settings | {"feature_layer": -2 if args.cut_tower else None}


def expert_teachers(args: MoveKDSFTConfig) -> list[str] | None:
    """The names of the teachers in the order of their experts; `None` unless each teacher has one."""
    if args.expert_assignment == "router":
        return None
    return [resolve_teacher(spec, args.distillation_preset == "released").name for spec in args.teachers or []]


def refuse_other_experts(args: MoveKDSFTConfig, tower: MoveKDVisionConfig, source: str) -> None:
    """Refuse to train a saved student's experts and routers in another way than before."""
    if args.freeze_vision_tower or not tower.num_experts:
        return
    if tower.balance_bias != (args.balance_form == "bias"):
        raise ValueError(
            f"`balance_form` is {args.balance_form!r}, but the routers of {source} have "
            f"{'a' if tower.balance_bias else 'no'} bias that balances them. "
            f"{'Set it to `bias`' if tower.balance_bias else 'Choose another form'}, as before."
        )
    if (names := expert_teachers(args)) not in (None, tower.expert_teachers):
        raise ValueError(
            f"The teachers {names} are to have an expert each, but the experts of {source} were trained by "
            f"{tower.expert_teachers or 'all teachers'}. Give the same teachers in the same order, or set "
            "`expert_assignment: router`."
        )
    if args.distill and names is None and tower.expert_teachers:
        logger.warning(
            "The experts of %s were each trained by one teacher; from now on the routers choose them for all losses.",
            source,
        )


def image_settings(config: MoveKDConfig | MoveKDVisionConfig) -> dict[str, Any]:
    """The values of `cut_tower` and, with a language model, `image_aspect_ratio` that a student was built with."""
    tower = tower_config(config)
    settings = {"cut_tower": not tower.add_pooling_layer}
    return settings if tower is config else settings | {"image_aspect_ratio": config.image_aspect_ratio}


def keep_dropout(args: MoveKDSFTConfig, config: MoveKDConfig | MoveKDVisionConfig) -> None:
    """Set `lora_dropout` to that of a saved student, unless it is given: the preset's value is for new students."""
    if args.keeps_dropout:
        args.lora_dropout = tower_config(config).lora_dropout


def refuse_other_options(args: MoveKDSFTConfig, config: MoveKDConfig | MoveKDVisionConfig, source: str) -> None:
    """Refuse to continue a student with other options than it was built with."""
    tower = tower_config(config)
    keep_dropout(args, config)
    compared = STUDENT_FIELDS if tower.num_experts or args.num_experts else STUDENT_FIELDS[:1]
    saved = {name: getattr(tower, name) for name in compared} | image_settings(config)
    differing = {name: (value, getattr(args, name)) for name, value in saved.items() if value != getattr(args, name)}
    if differing:
        raise ValueError(
            f"{source} was built with other options than this run asks for (saved, asked): {differing}. Give the "
            "saved values."
        )
    refuse_other_experts(args, tower, source)


def is_saved_encoder(source: str) -> bool:
    """
    Whether a folder or Hub id holds a tower of this project, such as stage `encoder` saves.

    Raises:
        ValueError: if it holds a tower and a language model.
    """
    model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if model_type == MoveKDConfig.model_type:
        raise ValueError(
            f"`vision_model` {source} is a whole vision-language model. Continue it by `model_name_or_path`, or take "
            "its encoder out with `python hub/export.py --form encoder`."
        )
    return model_type == MoveKDVisionConfig.model_type


def load_encoder(
    args: MoveKDSFTConfig, source: str, revision: str | None = None, dtype: str = "auto"
) -> MoveKDVisionModel:
    """
    Load a saved encoder with its experts, as it is.

    Raises:
        ValueError: if it is no encoder, or was built with other options than the run asks for.
    """
    config = read_config(source, revision)
    if not isinstance(config, MoveKDVisionConfig):
        raise ValueError(
            f"{source} is a {config.model_type!r} checkpoint, but stage 'encoder' continues encoders of this project. "
            "Take the encoder out of a whole model with `python hub/export.py --form encoder`; give a CLIP or "
            "SigLIP as `vision_model`."
        )
    refuse_other_options(args, config, source)
    tower = MoveKDVisionModel.from_pretrained(source, revision=revision, dtype=dtype)
    check_weights(tower, source)
    return tower


def build_tower(
    args: MoveKDSFTConfig, source: str | PreTrainedModel, attn_implementation: str | None = None
) -> MoveKDVisionModel:
    """The tower of a new student: a CLIP or SigLIP (Hub id, folder or loaded) with experts, or a saved encoder."""
    if isinstance(source, str) and is_saved_encoder(source):
        tower = load_encoder(args, source)
    else:
        tower = MoveKDVisionModel.from_encoder(source, **tower_settings(args))
    if attn_implementation is not None:
        tower.set_attn_implementation(attn_implementation)
    return tower


def build_encoder(args: MoveKDSFTConfig, model_args: ModelArguments) -> tuple[MoveKDVisionModel, BaseImageProcessor]:
    """
    Load the encoder at `model_name_or_path`, or build one from `vision_model`.

    Returns:
        The encoder and its image processor, which resizes with PIL: for a new one that of `vision_model`.
    """
    source, revision, dtype = model_args.model_name_or_path, model_args.model_revision, model_args.dtype
    if (source is None) == (args.vision_model is None):
        raise ValueError(
            f"`model_name_or_path` is {source} and `vision_model` {args.vision_model}. Give the first to continue an "
            "encoder, or the second to start from a CLIP or SigLIP."
        )
    if source is not None:
        model = load_encoder(args, source, revision, dtype)
        if model_args.attn_implementation is not None:
            model.set_attn_implementation(model_args.attn_implementation)
    else:
        set_seed(args.seed)  # the new experts and routers must depend on the seed alone
        model = build_tower(args, str(args.vision_model), model_args.attn_implementation)
        model = model if dtype == "auto" else model.to(getattr(torch, dtype))
    processor = load_encoder_processor(args, model_args)
    check_image_processor(processor, model.config)
    return model, processor


def load_encoder_processor(args: MoveKDSFTConfig, model_args: ModelArguments) -> BaseImageProcessor:
    """The image processor of the encoder that is continued, or of the `vision_model` of a new one."""
    return AutoImageProcessor.from_pretrained(
        model_args.model_name_or_path or args.vision_model,
        revision=model_args.model_revision,
        backend="pil",
        trust_remote_code=False,
    )


def heads_to_continue(args: MoveKDSFTConfig, model_args: ModelArguments) -> tuple[str | None, str | None]:
    """Where the heads of a continued student or encoder are: a folder or Hub id, and its revision."""
    if model_args.model_name_or_path is not None:
        return model_args.model_name_or_path, model_args.model_revision
    return (args.vision_model if args.vision_model and is_saved_encoder(args.vision_model) else None), None
