"""Build the student, its processor, the teachers and the distiller of a run, and freeze what does not train."""

import copy
import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from accelerate.utils import concatenate, recursively_apply
from datasets import Dataset, IterableDataset
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    set_seed,
)
from transformers.utils import cached_file

from hub.checkpoint_parts import feature_layer, tower_config
from modeling_movekd import MoveKDConfig, MoveKDForConditionalGeneration, MoveKDVisionConfig, MoveKDVisionModel
from modeling_movekd.chat_templates import chat_template_name, set_chat_template, set_own_chat_template
from modeling_movekd.files import DISTILLER_NAME
from modeling_movekd.inference import check_weights, read_config
from modeling_movekd.processing import (
    add_image_token,
    build_processor,
    check_image_processor,
    load_processor,
    update_processor,
)
from train.arguments import ModelArguments
from train.build_encoder import build_tower, refuse_other_options
from train.config import MoveKDSFTConfig
from train.data.bad_rows import BadRows
from train.data.collator import MoveKDCollator
from train.data.image_collator import ImageCollator
from train.distillation.distiller import Distiller
from train.distillation.losses import CLIP
from train.encoder_options import check_sizes_fit
from train.presets import PRESETS
from train.teachers.cached import CachedTeacher, FeatureCache, Teacher
from train.teachers.config import TeacherConfig, resolve_teacher
from train.teachers.features import FrozenTeacher, TeacherFeatures
from train.teachers.loaders import load_teacher


logger = logging.getLogger(__name__)

DISTILLER_OPTIONS = (
    "head_side",
    "head_form",
    "feature_normalization",
    "grid_matching",
    "distillation_loss",
    "summary_heads",
    "summary_loss",
    "cosine_share",
    "token_weighting",
    "teacher_weighting",
    "clip_share",
    "teacher_dropping",
)


def build_student(
    args: MoveKDSFTConfig, model_args: ModelArguments
) -> tuple[MoveKDForConditionalGeneration, ProcessorMixin]:
    """
    Load the student at `model_name_or_path`, or build one from `vision_model` and `language_model`.

    Returns:
        The student and its processor.
    """
    source, parts = model_args.model_name_or_path, (args.vision_model, args.language_model)
    if (source is None and not all(parts)) or (source is not None and any(parts)):
        raise ValueError(
            f"`model_name_or_path` is {source}, `vision_model` {parts[0]} and `language_model` {parts[1]}. Give the "
            "first to continue a student, or the other two to build one."
        )
    model_kwargs = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    if source is not None:
        return _load_student(args, source, model_args.model_revision, **model_kwargs)

    # The new weights (experts, routers, projector) must depend on the seed alone
    set_seed(args.seed)
    language, tokenizer = load_language_model(str(args.language_model), **model_kwargs)
    own_template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    image_token_id = add_image_token(tokenizer)
    model = join_parts(args, str(args.vision_model), language, image_token_id, model_args.attn_implementation)
    chat_template = own_template if args.chat_template == "own" else args.chat_template
    if chat_template is None:
        raise ValueError(f"`chat_template` is 'own', but {args.language_model} has none. Choose 'vicuna_v1'.")
    image_processor = AutoImageProcessor.from_pretrained(args.vision_model, trust_remote_code=False)
    return model, build_processor(model.config, image_processor, tokenizer, chat_template)


def _load_student(
    args: MoveKDSFTConfig, source: str, revision: str | None, **kwargs: Any
) -> tuple[MoveKDForConditionalGeneration, ProcessorMixin]:
    if not isinstance(read_config(source, revision), MoveKDConfig):
        raise ValueError(
            f"{source} is an encoder without a language model. Give it as `vision_model`, and a `language_model`."
        )
    model = MoveKDForConditionalGeneration.from_pretrained(source, revision=revision, **kwargs)
    check_weights(model, source)
    refuse_other_options(args, model.config, source)
    processor = load_processor(source, revision)
    check_image_processor(processor.image_processor, model.config)
    saved_template = chat_template_name(processor)
    if args.chat_template not in ("own", saved_template):
        raise ValueError(
            f"`chat_template` is {args.chat_template!r}, but {source} was saved with {saved_template or 'another'!r}, "
            "which a run that continues it keeps. Set it to 'own'."
        )
    update_processor(processor)
    if saved_template is None:
        set_own_chat_template(processor, processor.chat_template)
    return model, processor


def join_parts(
    args: MoveKDSFTConfig,
    encoder: str | PreTrainedModel,
    language: PreTrainedModel,
    image_token_id: int,
    attn_implementation: str | None = None,
) -> MoveKDForConditionalGeneration:
    """A new student from a vision model, as [`build_tower`] takes it, and a loaded causal language model."""
    vision = build_tower(args, encoder, attn_implementation)
    return MoveKDForConditionalGeneration.from_parts(
        vision, language, image_token_id=image_token_id, image_aspect_ratio=args.image_aspect_ratio
    )


def load_language_model(source: str, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a causal language model of transformers and its tokenizer; `kwargs` are passed to `from_pretrained`.

    Raises:
        ValueError: if the model needs code of its repository, which is not run, or if weights are missing, which
            transformers would initialize at random.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, trust_remote_code=False, output_loading_info=True, **kwargs
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(
            f"`language_model` {source} cannot be loaded as a causal language model of transformers, and code in its "
            f"repository is not run: {error}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"`language_model` {source} lacks {len(missing)} weights, which would be random: {missing}. Give a "
            "complete checkpoint."
        )
    return model, tokenizer


def build_teachers(args: MoveKDSFTConfig) -> dict[str, Teacher]:
    """
    Load the frozen teachers, by name; none if `distill` is false. With `feature_cache` they are not loaded, and
    [`CachedTeacher`] takes their place.
    """
    configs = teacher_configs(args)
    if configs and args.feature_cache is not None:
        cache = FeatureCache(args.feature_cache, configs)
        if args.summary_heads:
            cache.check_summaries()
        return {config.name: CachedTeacher(config, cache) for config in configs}
    return {config.name: load_teacher(config) for config in configs}


def teacher_configs(args: MoveKDSFTConfig) -> list[TeacherConfig]:
    """The configurations of the teachers; none if `distill` is false."""
    if not args.distill:
        return []
    configs = [resolve_teacher(spec, args.distillation_preset == "released") for spec in args.teachers or []]
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise ValueError(f"Teachers need different names, got {names}. Give each mapping a `name` of its own.")
    return configs


def build_collator(
    args: MoveKDSFTConfig,
    processor: ProcessorMixin,
    teachers: Mapping[str, Teacher],
    max_positions: int | None = None,
) -> MoveKDCollator:
    """
    Build the collator of a stage. Stage `pretrain` trains with the template `plain`, whatever is published. Rows must
    fit into `max_positions` of the language model.
    """
    if args.stage == "pretrain":
        processor = set_chat_template(copy.deepcopy(processor), "plain")
    return MoveKDCollator(
        processor,
        max_length=args.max_length,
        labels="released" if args.distillation_preset == "released" else "answers",
        distill_text_only_rows=args.distill and bool(args.distill_text_only_rows),
        distill_tiles=args.distill_tiles,
        max_positions=max_positions,
        **_teacher_settings(args, teachers),
    )


def build_image_collator(
    args: MoveKDSFTConfig, image_processor: BaseImageProcessor, teachers: Mapping[str, Teacher]
) -> ImageCollator:
    """Build the collator of stage `encoder`."""
    return ImageCollator(image_processor, **_teacher_settings(args, teachers))


def _teacher_settings(args: MoveKDSFTConfig, teachers: Mapping[str, Teacher]) -> dict[str, Any]:
    """What a collator must know of the teachers."""
    return {
        "teacher_preprocessors": {
            name: teacher.preprocessor for name, teacher in teachers.items() if isinstance(teacher, FrozenTeacher)
        },
        "geometry": args.preset_options()["geometry"],
        "apply_orientation": args.distillation_preset != "released",
        "feature_cache": next((t.cache for t in teachers.values() if isinstance(t, CachedTeacher)), None),
    }


def build_distiller(
    args: MoveKDSFTConfig,
    model: MoveKDForConditionalGeneration | MoveKDVisionModel,
    teachers: Mapping[str, Teacher],
    checkpoint: str | None = None,
    revision: str | None = None,
) -> Distiller | None:
    """
    Build the adapters or heads between student and teachers. `None` without teachers.

    Args:
        args, model, teachers: The run's.
        checkpoint (`str`, *optional*): Folder or Hub id to load `distiller.safetensors` from, if it has the file and
            `args.reset_distiller` is false.
        revision (`str`, *optional*): Revision of a Hub id.
    """
    if not teachers:
        return None
    vision_config, options = tower_config(model.config), args.preset_options()
    if options["head_side"] == "teacher" and CLIP in teachers and not vision_config.class_token:
        raise ValueError(
            "The student started from SigLIP and not from the teacher 'clip', which has no adapter with `head_side` "
            "'teacher'. Set `distillation_preset` to 'student_heads', or leave that teacher out."
        )
    if args.student_image_sizes is not None:
        check_sizes_fit(args.student_image_sizes, vision_config.image_size, vision_config.patch_size)
    if CLIP not in teachers and args.clip_share not in (None, PRESETS[args.distillation_preset]["clip_share"]):
        raise ValueError(
            f"`clip_share` is {args.clip_share}, but no teacher is named '{CLIP}' (they are {sorted(teachers)}). "
            "Leave it out, or name one so."
        )
    side = vision_config.image_size // vision_config.patch_size
    set_seed(args.seed)
    distiller = Distiller(
        student_width=vision_config.hidden_size,
        student_grid=(side, side),
        teachers={name: (teacher.width, teacher.grid) for name, teacher in teachers.items()},
        summary_widths={name: teacher.summary_width for name, teacher in teachers.items() if teacher.summary_width},
        whitening_components=args.whitening_components,
        **{name: options[name] for name in DISTILLER_OPTIONS},
    )
    if args.reset_distiller:
        if checkpoint is None:
            raise ValueError(
                "`reset_distiller` is true, but no student or encoder is continued, so that there are no heads. Leave "
                "it out, or set `model_name_or_path` or `vision_model` to one."
            )
        logger.warning("The heads of %s are left out: distillation starts with new heads.", checkpoint)
    elif checkpoint is not None:
        saved = cached_file(checkpoint, DISTILLER_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
        if saved is None:
            logger.warning("%s has no %s; distillation starts with new heads.", checkpoint, DISTILLER_NAME)
        else:
            distiller.load(saved)
    return distiller


@torch.no_grad()
def fit_feature_statistics(
    args: MoveKDSFTConfig,
    distiller: Distiller | None,
    teachers: Mapping[str, Teacher],
    dataset: Dataset | IterableDataset,
    collator: MoveKDCollator | ImageCollator,
    bad_rows: BadRows | None = None,
) -> None:
    """
    Measure the statistics of the teachers' features on a sample of the data, if the distiller needs them. All
    processes measure the same sample. A stream must have an image within the rows that the run reads.
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
            if not row["images"] and row.get("problem") is None:
                continue
            collated = collator([row])
            if bad_rows is not None:
                bad_rows.add(collated["bad_rows"])
            if row["images"] and not collated["bad_rows"]:
                left -= len(row["images"])
                yield collated.get("cached_features") or collated["teacher_pixel_values"]

    def batches() -> Iterator[dict[str, TeacherFeatures]]:
        # Batch after sampling: the sample must not depend on the batch size
        rows = iter(tqdm(sample(), desc="teachers' statistics", unit=" rows", leave=False))
        while batch := list(islice(rows, args.per_device_train_batch_size)):
            inputs = recursively_apply(lambda value: value.to(args.device), concatenate(batch))
            yield {name: teacher.to(args.device)(inputs[name]) for name, teacher in teachers.items()}

    distiller.fit_statistics(batches())


def student_name(name: str, model: PreTrainedModel) -> str:
    """The name of a parameter as in a student with a language model, also if the model is a tower alone."""
    is_tower = isinstance(model, MoveKDVisionModel) and not name.startswith("distiller.")
    return f"vision_tower.{name}" if is_tower else name


def set_trainable(model: PreTrainedModel, args: MoveKDSFTConfig) -> None:
    """
    Freeze the parameters that the stage does not train. All stages train the projector and the distiller.

    - `encoder` trains the tower.
    - `pretrain` trains the experts and routers of the tower. Without experts it trains the whole tower, since there is
      nothing else to distill into; without distillation either, none of it.
    - `finetune` trains also the tower and the language model, or its LoRA with `language_lora_rank`.

    Always frozen are parameters that no loss reaches, with `freeze_vision_tower` the tower, and with
    `freeze_base_tower` the tower except its experts and routers.
    """
    used = _used_layers(model.config)
    for name, parameter in model.named_parameters():
        name = student_name(name, model)
        if "distiller." in name:  # first, since teachers may be named like parts of the student
            trains = True
        elif "vision_tower." in name:
            trains = not args.freeze_vision_tower and _tower_parameter_trains(name, model.config, args, used)
        elif "language_model." in name or "lm_head." in name:
            trains = args.stage == "finetune" and (not args.language_lora_rank or "lora_" in name)
        else:
            trains = True
        parameter.requires_grad_(trains)


def _used_layers(config: MoveKDConfig | MoveKDVisionConfig) -> int:
    """The number of the tower's layers up to the one that the projector reads, or would read."""
    depth, layer = tower_config(config).num_hidden_layers, feature_layer(config)
    layers = [layer] if isinstance(layer, int) else layer
    return max(index if index >= 0 else depth + 1 + index for index in layers)


def _tower_parameter_trains(
    name: str, config: MoveKDConfig | MoveKDVisionConfig, args: MoveKDSFTConfig, used: int
) -> bool:
    tower = tower_config(config)
    experts, depth = tower.num_experts > 0, tower.num_hidden_layers
    is_router = "router" in name
    unused = [f"encoder.layers.{index}." for index in range(used, depth)]
    if "post_layernorm." in name:
        return False
    if any(layer in name for layer in unused):
        # Behind the layer that is used, only the balance loss reaches routers and what is in front of a router
        if not experts or not args.lambda_balance:
            return False
        parts = (".router.", ".self_attn.", ".layer_norm")
        if f"encoder.layers.{depth - 1}." in name and not any(part in name for part in parts):
            return False
    elif is_router and args.router_gradient == "none" and not args.lambda_balance:
        return False
    if args.stage != "pretrain" and not args.freeze_base_tower:
        return True
    return ("expert" in name or is_router) if experts else args.distill


def parameter_groups(model: PreTrainedModel) -> tuple[dict[str, int], dict[str, int]]:
    """Count the trained and the frozen parameters of student and distiller, by part; 4-bit weights count unpacked."""
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        name = student_name(name, model)
        if "distiller." in name:
            group = "distiller"
        elif "vision_tower." in name:
            group = "experts and routers" if "expert" in name or "router" in name else "vision tower"
        elif "language_model." in name or "lm_head." in name:
            group = "LoRA of the language model" if ".lora_" in name else "language model"
        else:
            group = "projector"
        packed = 2 if parameter.dtype == torch.uint8 else 1  # a byte holds two 4-bit weights
        counts = trained if parameter.requires_grad else frozen
        counts[group] = counts.get(group, 0) + packed * parameter.numel()
    return trained, frozen


def parameter_summary(model: PreTrainedModel, teachers: Mapping[str, Teacher], args: MoveKDSFTConfig) -> str:
    """A line for the log: the parts that train and that are frozen, with their numbers of parameters."""
    trained, frozen = (
        ", ".join(f"{group} {count:,}" for group, count in counts.items()) for counts in parameter_groups(model)
    )
    sizes = {name: sum(value.numel() for value in teacher.parameters()) for name, teacher in teachers.items()}
    taught = ", ".join(f"{name} {f'{size:,}' if size else '(cached)'}" for name, size in sizes.items())
    return (
        f"Stage {args.stage}, preset {args.distillation_preset}. Trains: {trained or 'nothing'}. "
        f"Frozen: {frozen or 'nothing'}. Teachers (frozen): {taught or 'none'}. {args.batch_summary()}"
    )
