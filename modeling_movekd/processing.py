"""Joins an image processor and a tokenizer into the stock LLaVA processor that a MoVE-KD model expects."""

from transformers import (
    BaseImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from .chat_templates import CHAT_TEMPLATES, IMAGE_TOKEN, set_chat_template
from .configuration_movekd import MoveKDConfig


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Make `<image>` a special token of the tokenizer, if it is not yet, and return its id."""
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def build_processor(
    config: MoveKDConfig,
    image_processor: BaseImageProcessor,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str = "vicuna_v1",
) -> LlavaProcessor | LlavaNextProcessor:
    """
    The stock `LlavaProcessor` for `pad`, `LlavaNextProcessor` for `anyres`, with CLIP's mean and standard deviation
    and the model's own image size. Images are resized by PIL, as CLIP and LLaVA were trained.

    Args:
        config: The model's configuration.
        image_processor: The CLIP checkpoint's image processor, from which mean and standard deviation are taken.
        tokenizer: The language model's tokenizer; `<image>` must be the token `config.image_token_index`.
        chat_template: A name of `CHAT_TEMPLATES` or a jinja template.

    Raises:
        ValueError: if the tokenizer's `<image>` is another id than the model's, naming both.
    """
    image_token_id = add_image_token(tokenizer)
    if image_token_id != config.image_token_index:
        raise ValueError(
            f"The tokenizer's {IMAGE_TOKEN} is token {image_token_id}, the model's is {config.image_token_index}. "
            "Build the model with `image_token_id=add_image_token(tokenizer)`."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    size = config.vision_config.image_size
    settings = {
        "image_mean": image_processor.image_mean,
        "image_std": image_processor.image_std,
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
        num_additional_image_tokens=1,  # [CLS], which the default strategy takes off again
        image_token=IMAGE_TOKEN,
        chat_template=chat_template,
    )
    return set_chat_template(processor, chat_template) if chat_template in CHAT_TEMPLATES else processor
