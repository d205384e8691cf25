"""Load checkpoints and ask them: what the commands of this package share."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BaseImageProcessor,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

from .chat_templates import IMAGE_TOKEN
from .configuration_movekd import MoveKDConfig, MoveKDVisionConfig
from .files import check_config_size, check_source, read_json, reading, weight_shapes
from .modeling_movekd import MoveKDForConditionalGeneration
from .processing import check_image_processor, load_processor
from .prompts import prepare
from .vision_movekd import MoveKDVisionModel, MoveKDVisionOutput


def read_config(checkpoint: str | os.PathLike, revision: str | None = None) -> PreTrainedConfig:
    """
    Read a checkpoint's configuration, and check that it asks for nothing larger than its weights.

    Args:
        checkpoint (`str` or `os.PathLike`): Hub id or folder.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Raises:
        ValueError: If the configuration or the header of a weight file cannot be read, or they do not fit each other.
    """

    check_source(checkpoint)

    def find(name: str) -> str | None:
        # What cannot be found is reported where it is loaded
        lenient = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors")}
        return cached_file(checkpoint, name, revision=revision, **lenient)

    if (generation := find(GENERATION_CONFIG_NAME)) is not None:
        read_json(generation)  # transformers goes on without a file that it cannot read
    content, index = find(CONFIG_NAME), find(SAFE_WEIGHTS_INDEX_NAME)
    names = [SAFE_WEIGHTS_NAME] if index is None else sorted(set(read_json(index).get("weight_map", {}).values()))
    shapes = weight_shapes(path for name in names if (path := find(name)) is not None)
    if content is not None and shapes:
        check_config_size(read_json(content), shapes, checkpoint)
    # Registered classes are preferred over code in the checkpoint.
    for config_class in (MoveKDConfig, MoveKDVisionConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    with reading(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint, revision=revision, trust_remote_code=False)
    if shapes:
        check_config_size(config.to_dict(), shapes, checkpoint)  # with the defaults of what config.json leaves out
    return config


def check_weights(model: nn.Module, checkpoint: str | os.PathLike) -> None:
    """
    Raises:
        ValueError: If a weight of a loaded model is not finite.
    """
    for name, weight in model.named_parameters():
        check_finite(weight.detach(), f"`{name}` of {checkpoint}")


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """
    Raises:
        ValueError: If values of the tensor are not finite.
    """
    # Far faster than `isfinite` on each value; NaN is the smallest and the largest
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise ValueError(f"{name} has values that are not finite. Restore the file, or train again.")


def _choose_device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_checkpoint(
    checkpoint: str | os.PathLike,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    fold: bool = True,
) -> tuple[MoveKDForConditionalGeneration, ProcessorMixin]:
    """
    Load a whole model for inference, and its processor.

    Args:
        checkpoint (`str` or `os.PathLike`): Hub id or folder.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        device (`str` or `torch.device`, *optional*): Defaults to the first GPU, else the CPU.
        dtype (`str`, *optional*): Name of a torch dtype. Defaults to that of the weights on a GPU, float32 on a CPU.
        fold (`bool`, *optional*, defaults to `True`): Whether to call `fold_experts`.

    Raises:
        ValueError: If the checkpoint is of another kind of model.
    """
    config = read_config(checkpoint, revision)
    if not isinstance(config, MoveKDConfig):
        raise ValueError(
            f"{checkpoint} is a {config.model_type!r} checkpoint; 'movekd' is needed. `hub/convert.py` converts LLaVA "
            "checkpoints and original MoVE-KD checkpoints."
        )
    device = _choose_device(device)
    dtype = dtype or ("float32" if device.type == "cpu" else "auto")
    with reading(checkpoint):
        model = MoveKDForConditionalGeneration.from_pretrained(checkpoint, revision=revision, dtype=dtype)
        processor = load_processor(checkpoint, revision)
    model = model.to(device).eval()
    check_weights(model, checkpoint)
    if fold:
        model.fold_experts()
    check_image_processor(processor.image_processor, model.config)
    tokens, image_token = len(processor.tokenizer), model.config.image_token_index
    rows = model.get_input_embeddings().num_embeddings
    if tokens > rows or processor.image_token_id != image_token:
        raise ValueError(
            f"The model of {checkpoint} has {rows} embeddings and {IMAGE_TOKEN} as token {image_token}, the "
            f"tokenizer has {tokens} tokens and {IMAGE_TOKEN} as token {processor.image_token_id}. Download it again."
        )
    return model, processor


class _TowerOfModel(MoveKDVisionModel):
    """Loads the tower alone from the files of a whole model."""

    _keys_to_ignore_on_load_unexpected = [r"^(model|lm_head)\."]


def load_tower(
    checkpoint: str | os.PathLike, revision: str | None = None, device: str | torch.device | None = None
) -> tuple[MoveKDVisionModel, BaseImageProcessor]:
    """
    Load the vision tower of a whole model or of an encoder in float32, and its image processor.

    The arguments are those of [`load_checkpoint`].
    """
    config = read_config(checkpoint, revision)
    settings: dict[str, Any] = {"revision": revision or "main", "dtype": torch.float32}
    with reading(checkpoint):
        if isinstance(config, MoveKDConfig):
            tower = _TowerOfModel.from_pretrained(
                checkpoint, config=config.vision_config, key_mapping={r"^model\.vision_tower\.": ""}, **settings
            )
        elif isinstance(config, MoveKDVisionConfig):
            tower = MoveKDVisionModel.from_pretrained(checkpoint, config=config, **settings)
        else:
            raise ValueError(
                f"{checkpoint} is a {config.model_type!r} checkpoint; 'movekd' or 'movekd_vision' is needed. To draw "
                "another encoder, pass it as --teacher together with a student."
            )
        try:
            processor = AutoImageProcessor.from_pretrained(
                checkpoint, revision=revision or "main", backend="pil", trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{checkpoint} has no image processor ({error}). Save the image processor of the CLIP or SigLIP that "
                "the student was made from into its folder."
            ) from error
    check_image_processor(processor, config)
    tower = tower.to(_choose_device(device)).eval()
    check_weights(tower, checkpoint)
    return tower, processor


def user_message(text: str, images: Sequence[Image.Image] = ()) -> dict[str, Any]:
    """
    Return a user's turn as chat templates take it: the images, then the text. Several images go where the text has
    `<image>`, if it has one for each.
    """
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    pieces = text.split(IMAGE_TOKEN)
    if len(images) < 2 or len(pieces) != len(images) + 1:
        return {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    for place, piece in reversed(list(enumerate(pieces))):
        content[place:place] = [{"type": "text", "text": piece}] if piece.strip() else []
    return {"role": "user", "content": content}


@torch.inference_mode()
def answer_batch(
    model: MoveKDForConditionalGeneration,
    processor: ProcessorMixin,
    inputs: dict[str, torch.Tensor],
    **generation: Any,
) -> list[str]:
    """Generate and decode the answers to a batch from [`prepare`]. `generation` holds arguments of `generate`."""
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    output = model.generate(**inputs, **generation)
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def longest_context(model: MoveKDForConditionalGeneration) -> int | None:
    """Return how many tokens the prompt and the answer may have together, or `None` if there is no limit."""
    return getattr(model.config.text_config, "max_position_embeddings", None)


def check_length(model: MoveKDForConditionalGeneration, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> None:
    """
    Raises:
        ValueError: If the prompt and the answer together are longer than the language model's context.
    """
    length = inputs["input_ids"].shape[1]
    longest = longest_context(model)
    if longest is not None and length + new_tokens > longest:
        raise ValueError(
            f"The prompt has {length} tokens and the answer may have {new_tokens}; the language model takes {longest} "
            "in all. Begin a new conversation, or ask for a shorter answer."
        )


class Conversation:
    """
    A conversation with one model, which encodes each image only once.

    Args:
        model (`MoveKDForConditionalGeneration`): The model.
        processor (`ProcessorMixin`): Its processor.
        generation: Arguments of `generate`, such as `max_new_tokens`, `do_sample` and `temperature`.

    Attributes:
        messages (`list[dict]`): The turns so far, in the form that chat templates take.
    """

    def __init__(self, model: MoveKDForConditionalGeneration, processor: ProcessorMixin, **generation: Any) -> None:
        self.model, self.processor, self.generation = model, processor, generation
        self.reset()

    def reset(self) -> None:
        """Forget all turns and images."""
        self.messages: list[dict[str, Any]] = []
        self._features: list[torch.Tensor] = []

    @torch.inference_mode()
    def ask(self, text: str, images: Sequence[Image.Image] = (), streamer: Any = None, **generation: Any) -> str:
        """
        Answer the next turn. A turn that fails does not become part of the conversation.

        Raises:
            ValueError: If the conversation is longer than the language model's context.
        """
        settings = {**self.generation, **generation}
        messages = [*self.messages, user_message(text, images)]
        inputs = prepare(self.processor, [messages], self.model.device)
        check_length(self.model, inputs, settings.get("max_new_tokens", 0))
        pixels, sizes = inputs.pop("pixel_values", None), inputs.pop("image_sizes", None)
        features = list(self._features)
        if pixels is not None and images:
            new = slice(len(features), None)
            encoded = self.model.get_image_features(
                pixels[new].to(self.model.dtype), None if sizes is None else sizes[new], return_dict=True
            )
            features += list(encoded.pooler_output)
        if features:
            settings["mm_encoder_outputs"] = {"image": MoveKDVisionOutput(pooler_output=features)}
        output = self.model.generate(**inputs, streamer=streamer, **settings)
        answer = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self._features = features
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return answer
