"""Checks of the options of stage `encoder`, which has no language model and no text."""

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from train.installed import read_class


OF_TEXT = (
    *("language_model", "language_model_learning_rate", "load_in_4bit", "language_lora_rank", "language_lora_alpha"),
    *("language_lora_dropout", "language_lora_learning_rate", "language_lora_target_modules"),
    *("image_aspect_ratio", "distill_tiles", "chat_template", "eval_generate", "group_by_modality_length"),
    *("neftune_noise_alpha", "use_liger_kernel"),
)
# All other options that TRL adds to Trainer's are of text
ALSO_OF_IMAGES = ("dataset_num_proc",)


def check_student_image_sizes(args: Any) -> None:
    """Refuse `student_image_sizes` where the number of the student's tokens must stay the same."""
    if args.student_image_sizes is None:
        return
    if args.stage != "encoder":
        raise ValueError(
            f"`student_image_sizes` is {args.student_image_sizes}, but in stage '{args.stage}' the projector would "
            "get another number of tokens in each step. Leave it out, or set `stage: encoder`."
        )
    needed = {"head_side": "student", "token_weighting": "none"}
    if other := {name: getattr(args, name) for name, value in needed.items() if getattr(args, name) != value}:
        raise ValueError(
            f"`student_image_sizes` is {args.student_image_sizes}, with {other}: only heads on the student, without "
            f"weights of its tokens, fit any grid. Set { {name: needed[name] for name in other} } and `grid_matching` "
            "'upsample' or 'resample', as the preset `radio` does, or leave the sizes out."
        )


def check_sizes_fit(sizes: Sequence[int], image_size: int, patch_size: int) -> None:
    """
    Refuse sizes that are no grid of patches, or larger than the pixels that the data gives. The tower's own size need
    be no multiple, as in SigLIP's so400m-patch14-384.
    """
    smaller = [size for size in sizes if size != image_size]
    if not smaller or any(size % patch_size or not patch_size <= size < image_size for size in smaller):
        raise ValueError(
            f"`student_image_sizes` is {sizes}. Give multiples of the tower's patch size {patch_size}, below its "
            f"image size {image_size}, which may be one of them."
        )


def unused_options() -> set[str]:
    """The names of the options that have no effect in stage `encoder`."""
    trainers = read_class("trl", "SFTConfig"), read_class("transformers", "TrainingArguments")
    names = [{field.name for field in fields(options)} for options in trainers]
    return (names[0] - names[1] - set(ALSO_OF_IMAGES)) | set(OF_TEXT)


def refuse_unused_options(args: Any, preset: dict[str, Any]) -> None:
    """Refuse options of stage `encoder` that have no effect. Call it before defaults are filled in."""
    unused = unused_options()
    given = {}
    for field in fields(args):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(args, field.name)
        # 0 is what a configuration without LoRA fills in for alpha
        if field.name in unused and value != default and (field.name, value) != ("language_lora_alpha", 0):
            given[field.name] = value
    rows = args.distill_text_only_rows
    if rows not in (None, preset["distill_text_only_rows"]):
        given["distill_text_only_rows"] = rows
    if given:
        raise ValueError(
            f"Stage 'encoder' has no language model and no text, where {given} do nothing. Leave them out."
        )
    if not args.distill:
        raise ValueError("`distill` is false, but stage 'encoder' does nothing else. Leave it out, and name teachers.")
