"""Puts the parts of a run together: student, processor, teachers, distiller; and says what of it trains."""

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from accelerate.utils import recursively_apply
from datasets import Dataset, IterableDataset
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    set_seed,
)
from transformers.utils import cached_file

from modeling_movekd import MoveKDConfig, MoveKDForConditionalGeneration, MoveKDVisionModel
from modeling_movekd.chat_templates import CHAT_TEMPLATES, chat_template_for
from modeling_movekd.processing import add_image_token, build_processor
from train.config import ModelArguments, MoveKDSFTConfig
from train.data.bad_rows import BadRows
from train.data.collator import MoveKDCollator
from train.distillation.distiller import Distiller
from train.teachers.cached import CachedTeacher, FeatureCache, Teacher
from train.teachers.config import TeacherConfig, resolve_teacher
from train.teachers.features import TeacherFeatures
from train.teachers.loaders import load_teacher


logger = logging.getLogger(__name__)

DISTILLER_NAME = "distiller.safetensors"
DISTILLER_KNOBS = (
    "head_side",
    "head_form",
    "feature_normalization",
    "grid_matching",
    "token_weighting",
    "teacher_weighting",
    "clip_share",
)
# What the saved student decides, and the arguments of a run that continues it must agree with
STUDENT_FIELDS = ("num_experts", "lora_rank", "lora_alpha", "lora_dropout", "expert_bias", "router_gradient")


def tower_settings(args: MoveKDSFTConfig) -> dict[str, Any]:
    """What a new student's tower is built with, as keywords of `MoveKDVisionModel.from_clip`."""
    settings = {name: getattr(args, name) for name in (*STUDENT_FIELDS, "expert_init")}
    return settings | {"feature_layer": -2 if args.cut_tower else None}


def image_settings(config: MoveKDConfig) -> dict[str, Any]:
    """What a saved student says of the arguments that decided how its tower sees an image."""
    return {
        "image_aspect_ratio": config.image_aspect_ratio,
        "cut_tower": not config.vision_config.add_pooling_layer,
    }


def _check_chat_template(asked: str, processor: ProcessorMixin, source: str) -> None:
    templates = {name: chat_template_for(processor, name) for name in CHAT_TEMPLATES}
    if asked == "own" or templates.get(asked, asked) == processor.chat_template:
        return
    saved = next((name for name, template in templates.items() if template == processor.chat_template), "another")
    raise ValueError(
        f"`chat_template` is {asked!r}, but {source} was saved with {saved!r}, which a run that continues it keeps. "
        "Set it to 'own'."
    )


def build_student(
    args: MoveKDSFTConfig, model_args: ModelArguments
) -> tuple[MoveKDForConditionalGeneration, ProcessorMixin]:
    """
    The student and its processor: a saved one if `model_name_or_path` is given, else a new one from `vision_model` and
    `language_model`.

    Raises:
        ValueError: if neither or both are given, the saved one was made with other settings or saved with another chat
            template, or the language model has no template of its own to keep.
    """
    source, parts = model_args.model_name_or_path, (args.vision_model, args.language_model)
    if (source is None and not all(parts)) or (source is not None and any(parts)):
        raise ValueError(
            f"`model_name_or_path` is {source}, `vision_model` {parts[0]} and `language_model` {parts[1]}: give the "
            "first to continue a checkpoint, or both others to build a student."
        )
    model_kwargs = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    if source is not None:
        model = MoveKDForConditionalGeneration.from_pretrained(
            source, revision=model_args.model_revision, **model_kwargs
        )
        tower = model.config.vision_config
        compared = STUDENT_FIELDS if tower.num_experts or args.num_experts else STUDENT_FIELDS[:1]
        saved = {name: getattr(tower, name) for name in compared} | image_settings(model.config)
        differing = {name: (value, getattr(args, name)) for name, value in saved.items()}
        if differing := {name: values for name, values in differing.items() if values[0] != values[1]}:
            raise ValueError(
                f"{source} was made with other settings than this run asks for (saved, asked): {differing}. They are "
                "part of the student and cannot be changed: give the saved ones."
            )
        # Else the tokenizer would ask at the terminal whether to run the model's code, which it has no use for
        processor = AutoProcessor.from_pretrained(source, revision=model_args.model_revision, trust_remote_code=False)
        _check_chat_template(args.chat_template, processor, source)
        return model, processor

    # The new weights (experts, routers, projector) depend on the seed alone
    set_seed(args.seed)
    language, tokenizer = load_language_model(str(args.language_model), **model_kwargs)
    own_template = tokenizer.chat_template
    image_token_id = add_image_token(tokenizer)
    model = join_parts(args, str(args.vision_model), language, image_token_id, model_args.attn_implementation)
    chat_template = own_template if args.chat_template == "own" else args.chat_template
    if chat_template is None:
        raise ValueError(f"`chat_template` is 'own', but {args.language_model} has none; choose 'vicuna_v1'.")
    image_processor = AutoImageProcessor.from_pretrained(args.vision_model, trust_remote_code=False)
    return model, build_processor(model.config, image_processor, tokenizer, chat_template)


def join_parts(
    args: MoveKDSFTConfig,
    clip: str | PreTrainedModel,
    language: PreTrainedModel,
    image_token_id: int,
    attn_implementation: str | None = None,
) -> MoveKDForConditionalGeneration:
    """A new student from a CLIP vision model (Hub id, folder or loaded) and a loaded causal language model."""
    vision = MoveKDVisionModel.from_clip(clip, **tower_settings(args))
    if attn_implementation is not None:
        vision.set_attn_implementation(attn_implementation)
    return MoveKDForConditionalGeneration.from_parts(
        vision, language, image_token_id=image_token_id, image_aspect_ratio=args.image_aspect_ratio
    )


def load_language_model(source: str, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A causal language model of transformers and its tokenizer; `kwargs` are those of `from_pretrained`.

    Raises:
        ValueError: if it needs code of its own, which is neither run nor asked about; if weights are missing, which
            transformers would draw at random and only log.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, trust_remote_code=False, output_loading_info=True, **kwargs
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(
            f"`language_model` {source} cannot be loaded as a causal language model of transformers (code that a "
            f"repository brings along is not run): {error}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"`language_model` {source} lacks {len(missing)} weights, which would be random: {missing}.")
    return model, tokenizer


def build_teachers(args: MoveKDSFTConfig, weights: bool = True) -> dict[str, Teacher]:
    """
    The frozen teachers by name, in the order given; empty if `distill` is false. With `feature_cache` none is loaded:
    a [`~train.teachers.cached.CachedTeacher`] reads that folder. `weights` is as in
    [`~train.teachers.loaders.load_teacher`].

    Raises:
        ValueError: if two teachers have one name.
    """
    configs = teacher_configs(args)
    if configs and args.feature_cache is not None:
        cache = FeatureCache(args.feature_cache, configs)
        return {config.name: CachedTeacher(config, cache) for config in configs}
    return {config.name: load_teacher(config, weights=weights) for config in configs}


def teacher_configs(args: MoveKDSFTConfig) -> list[TeacherConfig]:
    """The configurations of the teachers; none if `distill` is false. Raises as [`build_teachers`]."""
    if not args.distill:
        return []
    configs = [resolve_teacher(spec, args.distillation_preset == "released") for spec in args.teachers or []]
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise ValueError(f"Teachers need different names, got {names}; give each mapping a `name` of its own.")
    return configs


def build_distiller(
    args: MoveKDSFTConfig,
    model: MoveKDForConditionalGeneration,
    teachers: Mapping[str, Teacher],
    checkpoint: str | None = None,
    revision: str | None = None,
) -> Distiller | None:
    """
    The adapters or heads between the student and the teachers; read from `distiller.safetensors` where `checkpoint`, a
    folder or a Hub id, has one, new otherwise. `None` without teachers.
    """
    if not teachers:
        return None
    vision_config = model.config.vision_config
    side = vision_config.image_size // vision_config.patch_size
    set_seed(args.seed)
    distiller = Distiller(
        student_width=vision_config.hidden_size,
        student_grid=(side, side),
        teachers={name: (teacher.width, teacher.grid) for name, teacher in teachers.items()},
        whitening_components=args.whitening_components,
        **{name: args.knobs()[name] for name in DISTILLER_KNOBS},
    )
    if checkpoint is not None:
        saved = cached_file(checkpoint, DISTILLER_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
        if saved is None:
            logger.warning("%s has no %s: distillation begins with new heads.", checkpoint, DISTILLER_NAME)
        else:
            distiller.load(saved)
    return distiller


@torch.no_grad()
def fit_feature_statistics(
    args: MoveKDSFTConfig,
    distiller: Distiller | None,
    teachers: Mapping[str, Teacher],
    dataset: Dataset | IterableDataset,
    collator: MoveKDCollator,
    bad_rows: BadRows | None = None,
) -> None:
    """
    The first pass over a sample of the data that measures the teachers' features, where the distiller needs it. Every
    process measures the same sample and so gets the same statistics. Of a stream, which has no end, at least the first
    image has to be among as many rows as the run reads.

    Raises:
        ValueError: if the data has no images, or too many bad rows.
    """
    if distiller is None or not distiller.needs_statistics:
        return

    def shuffled() -> Iterator[dict[str, Any]]:
        if isinstance(dataset, IterableDataset):
            yield from dataset
            return
        for index in torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed)).tolist():
            yield dataset[index]

    def sample() -> Iterator[dict[str, Any]]:
        left = args.feature_statistics_images
        last = args.rows_of_run if isinstance(dataset, IterableDataset) else len(dataset)
        for number, row in enumerate(shuffled()):
            if left <= 0 or (left == args.feature_statistics_images and number >= last):
                return
            if bad_rows is not None and row.get("problem") is not None:
                bad_rows.add([(row["source"], row["problem"])])
            if row["images"]:
                left -= len(row["images"])
                yield row

    def batches() -> Iterator[dict[str, TeacherFeatures]]:
        # Cut only now: the sample must not depend on the batch size, which differs between layouts of one run
        rows = iter(tqdm(sample(), desc="teachers' statistics", unit=" rows", leave=False))
        while batch := list(islice(rows, args.per_device_train_batch_size)):
            collated = collator(batch)
            if bad_rows is not None:
                bad_rows.add(collated["bad_rows"])
            # Without weight stands a blank image, alone, where no image of the batch could be decoded
            if collated["image_weights"].all():
                inputs = recursively_apply(
                    lambda value: value.to(args.device),
                    collated.get("cached_features") or collated["teacher_pixel_values"],
                )
                yield {name: teacher.to(args.device)(inputs[name]) for name, teacher in teachers.items()}

    distiller.fit_statistics(batches())


def set_trainable(model: PreTrainedModel, args: MoveKDSFTConfig) -> None:
    """
    Freeze what the stage does not train. Both stages train projector and distiller.

    - `pretrain`: of the tower the experts and routers; of the language model nothing. Without experts the whole tower
      is trained, since distillation would otherwise have nothing to change; without distillation either, none of it.
    - `finetune`: tower and language model too; of the latter LoRA alone where `language_lora_rank` is set.

    Frozen in any case: the tower under `freeze_vision_tower`, and what no loss reaches of the layers behind the one
    that feeds the projector: a balance loss reaches the routers there and what lies in front of a router.
    """
    depth = model.config.vision_config.num_hidden_layers
    layer = model.config.vision_feature_layer
    layers = [layer] if isinstance(layer, int) else layer
    used = max(index if index >= 0 else depth + 1 + index for index in layers)
    unused = (*(f"encoder.layers.{index}." for index in range(used, depth)), "post_layernorm.")
    last = f"encoder.layers.{depth - 1}."
    experts = model.config.vision_config.num_experts > 0
    for name, parameter in model.named_parameters():
        is_expert = "expert" in name or "router" in name
        if "distiller." in name:  # first, as its parts have the teachers' names, which may be those of the student's
            trains = True
        elif "vision_tower." in name:
            behind = any(part in name for part in unused)
            balanced = experts and bool(args.lambda_balance) and "post_layernorm." not in name
            if last in name:
                balanced = balanced and any(part in name for part in (".router.", ".self_attn.", ".layer_norm"))
            if behind and not balanced:
                trains = False
            elif args.stage == "pretrain":
                trains = is_expert if experts else args.distill
            else:
                trains = True
            if "router" in name and not behind and args.router_gradient == "none":
                trains = trains and bool(args.lambda_balance)
            trains = trains and not args.freeze_vision_tower
        elif "language_model." in name or "lm_head." in name:
            trains = args.stage == "finetune" and (not args.language_lora_rank or "lora_" in name)
        else:
            trains = True
        parameter.requires_grad_(trains)


def parameter_groups(model: PreTrainedModel) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers of trained and of frozen parameters of student and distiller by part; 4-bit ones unpacked."""
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if "distiller." in name:
            group = "distiller"
        elif "vision_tower." in name:
            group = "experts and routers" if "expert" in name or "router" in name else "vision tower"
        elif "language_model." in name or "lm_head." in name:
            group = "LoRA of the language model" if ".lora_" in name else "language model"
        else:
            group = "projector"
        packed = 2 if parameter.dtype == torch.uint8 else 1  # two weights of 4 bits in each byte
        counts = trained if parameter.requires_grad else frozen
        counts[group] = counts.get(group, 0) + packed * parameter.numel()
    return trained, frozen


def parameter_summary(model: PreTrainedModel, teachers: Mapping[str, Teacher], args: MoveKDSFTConfig) -> str:
    """One line: what trains, what is frozen, and how many parameters each."""
    trained, frozen = (
        ", ".join(f"{group} {count:,}" for group, count in counts.items()) for counts in parameter_groups(model)
    )
    taught = ", ".join(
        f"{name} {sum(value.numel() for value in teacher.parameters()):,}" for name, teacher in teachers.items()
    )
    return (
        f"Stage {args.stage}, preset {args.distillation_preset}. Trains: {trained or 'nothing'}. "
        f"Frozen: {frozen or 'nothing'}. Teachers (frozen): {taught or 'none'}. {args.batch_summary()}"
    )
