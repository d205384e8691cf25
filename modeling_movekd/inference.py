"""Asking a checkpoint: what the command lines of this package share."""

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, ProcessorMixin

from .configuration_movekd import MoveKDConfig, MoveKDVisionConfig
from .modeling_movekd import MoveKDForConditionalGeneration
from .vision_movekd import MoveKDVisionOutput


def load_checkpoint(
    checkpoint: str | os.PathLike,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    fold: bool = True,
) -> tuple[MoveKDForConditionalGeneration, ProcessorMixin]:
    """
    A model ready to be asked, and its processor.

    Args:
        checkpoint: Hub id or folder of a whole model (not of an encoder alone).
        device: By default the first GPU, else the CPU.
        dtype: Name of a torch dtype; by default that of the weights on a GPU, float32 on a CPU.
        fold: Fold the experts, see [`MoveKDVisionModel.fold_experts`].

    Raises:
        ValueError: if the checkpoint is of another kind of model, naming it.
    """
    # This package's own code is used, whatever code lies in the folder
    for config_class in (MoveKDConfig, MoveKDVisionConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    config = AutoConfig.from_pretrained(checkpoint, revision=revision, trust_remote_code=False)
    if not isinstance(config, MoveKDConfig):
        raise ValueError(
            f"{checkpoint} is a {config.model_type!r} checkpoint; 'movekd' is needed. `hub/convert.py` makes one from "
            "LLaVA's or the MoVE-KD authors'."
        )
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or ("float32" if device.type == "cpu" else "auto")
    model = MoveKDForConditionalGeneration.from_pretrained(checkpoint, revision=revision, dtype=dtype)
    model = model.to(device).eval()
    if fold:
        model.fold_experts()
    # Training resizes with PIL; torchvision's resize differs by up to 0.015 after normalisation
    processor = AutoProcessor.from_pretrained(checkpoint, revision=revision, backend="pil", trust_remote_code=False)
    return model, processor


def user_message(text: str, images: Sequence[Image.Image] = ()) -> dict[str, Any]:
    """A turn of the user's in the form chat templates take: its images, then its text."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def prepare(
    processor: ProcessorMixin, conversations: Sequence[Sequence[Mapping[str, Any]]], device: torch.device
) -> dict[str, torch.Tensor]:
    """A batch of conversations as the model's inputs, padded on the left, each ending where an answer begins."""
    inputs = processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    return dict(inputs.to(device))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command line that asks a checkpoint: where it is, where it runs, how tokens are chosen."""
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=42, help="for a temperature above 0")
    parser.add_argument("--device", help="by default the first GPU, else the CPU")
    parser.add_argument("--dtype", help="such as bfloat16; by default that of the weights on a GPU, float32 on a CPU")


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `generate` for the temperature that [`add_arguments`] has read."""
    if options.temperature > 0:
        return {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
    return {"do_sample": False}


def longest_context(model: MoveKDForConditionalGeneration) -> int | None:
    """Positions of the language model, for prompt and answer together; `None` where it has no bound."""
    return getattr(model.config.text_config, "max_position_embeddings", None)


def check_length(model: MoveKDForConditionalGeneration, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> None:
    """
    Raises:
        ValueError: if the prompt and the answer are longer than the language model's positions, with both lengths.
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
    Several turns with one model. Each image passes the vision tower once, in the turn that brings it.

    Args:
        generation: Arguments of `generate`, such as `max_new_tokens`, `do_sample` and `temperature`.

    Attributes:
        messages: The turns so far, in the form chat templates take.
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
        The answer to the next turn, which is noted only once it is there.

        Raises:
            ValueError: if the conversation is too long for the language model.
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
