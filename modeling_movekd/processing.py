"""Join an image processor and a tokenizer into transformers' LLaVA processor."""

import os

from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    BaseImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from .chat_templates import (
    CHAT_TEMPLATES,
    IMAGE_TOKEN,
    chat_template_name,
    set_chat_template,
    set_own_chat_template,
)
from .configuration_movekd import MoveKDConfig, MoveKDVisionConfig


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Make `<image>` a special token of the tokenizer and return its id."""
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def build_processor(
    config: MoveKDConfig,
    image_processor: BaseImageProcessor,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str = "vicuna_v1",
) -> LlavaProcessor | LlavaNextProcessor:
    """
    Build a `LlavaProcessor` for `pad` or a `LlavaNextProcessor` for `anyres`. Both resize with PIL, as CLIP's and
    LLaVA's training did.

    Args:
        config (`MoveKDConfig`): Configuration of the model, which gives the image size.
        image_processor (`BaseImageProcessor`): That of the CLIP or SigLIP checkpoint, which gives mean, standard
            deviation and the filter that resizes.
        tokenizer (`PreTrainedTokenizerBase`): The language model's tokenizer.
        chat_template (`str`, *optional*, defaults to `"vicuna_v1"`): Name in `CHAT_TEMPLATES`, or a jinja template for
            [`~chat_templates.set_own_chat_template`].

    Raises:
        ValueError: If `<image>` has another id in the tokenizer than in the model, or the template cannot be used.
    """
    image_token_id = add_image_token(tokenizer)
    if image_token_id != config.image_token_index:
        raise ValueError(
            f"The tokenizer's {IMAGE_TOKEN} is token {image_token_id}, the model's is {config.image_token_index}. "
            "Build the model with `image_token_id=add_image_token(tokenizer)`."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"  # for `generate`; training pads on the right itself
    config.validate_image_grid()  # the fields may have changed since the configuration was built
    size = config.vision_config.image_size
    settings = {
        "image_mean": image_processor.image_mean,
        "image_std": image_processor.image_std,
        "resample": image_processor.resample,
        "crop_size": {"height": size, "width": size},
        "size": {"shortest_edge": size},
    }
    if config.image_aspect_ratio == "pad":
        processor_class, images = LlavaProcessor, LlavaImageProcessorPil(do_pad=True, **settings)
    else:
        processor_class = LlavaNextProcessor
        images = LlavaNextImageProcessorPil(image_grid_pinpoints=config.image_grid_pinpoints, **settings)
    processor = processor_class(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        # [CLS], which the default strategy removes again
        num_additional_image_tokens=config.vision_config.num_prefix_tokens,
        image_token=IMAGE_TOKEN,
    )
    if chat_template in CHAT_TEMPLATES:
        return set_chat_template(processor, chat_template)
    return set_own_chat_template(processor, chat_template)


def load_processor(source: str | os.PathLike, revision: str | None = None) -> ProcessorMixin:
    """
    Load the processor of a saved student, resizing with PIL as in training. Pixels resized by torchvision, which is
    the default on loading, differ by up to 0.015. Code beside the checkpoint is not run.
    """
    processor = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
    # `backend` given to the processor would also change the tokenizer's, which then makes no mask of the answers
    processor.image_processor = AutoImageProcessor.from_pretrained(
        source, revision=revision, backend="pil", trust_remote_code=False
    )
    return processor


def update_processor(processor: ProcessorMixin) -> ProcessorMixin:
    """
    Bring a processor that an earlier release saved to the present form, and return the same object: padding on the
    left, and the beginning-of-sequence token in the chat template. Its ids stay the same.
    """
    processor.tokenizer.padding_side = "left"
    name = chat_template_name(processor)
    return processor if name is None else set_chat_template(processor, name)


def check_image_processor(image_processor: BaseImageProcessor, config: MoveKDConfig | MoveKDVisionConfig) -> None:
    """
    Check that an image processor cuts images as the model takes them.

    Raises:
        ValueError: If it cuts other grids of tiles, or another image size.
    """
    if isinstance(config, MoveKDConfig):
        grids = getattr(image_processor, "image_grid_pinpoints", None)
        expected = config.image_grid_pinpoints if config.image_aspect_ratio == "anyres" else None
        if [list(grid) for grid in grids or []] != [list(grid) for grid in expected or []]:
            raise ValueError(
                f"The image processor cuts tiles by the grids {grids}, but the model takes {expected} "
                f"(`image_grid_pinpoints`). Save the processor that the model was trained with."
            )
        config = config.vision_config
    size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    sides = {size.get(name) for name in ("height", "width")} - {None}
    # A size that is resized to before the crop is a little larger, and takes memory for each pixel
    if sides - {config.image_size} or max(dict(image_processor.size).values(), default=0) > 4 * config.image_size:
        raise ValueError(
            f"The image processor cuts images to {dict(size)} of {dict(image_processor.size)}, but the model takes "
            f"{config.image_size} pixels a side. Save the processor that the model was trained with."
        )
