"""Patch features of any vision encoder of transformers, for pictures, benchmarks and the teachers of `train`."""

import inspect
import os
import re
from collections.abc import Iterable, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModel, BaseImageProcessor


# Where a composite model (CLIP, SigLIP, SAM, LLaVA, ...) keeps its vision part
VISION_PARTS = ("vision_model", "vision_encoder", "vision_tower", "visual")
# Weights that patch features never pass through
_OFF_THE_FEATURE_PATH = re.compile(
    r"(^|\.)(pooler|head|head_dist|fc_norm|attn_pool|classifier|text_model|(text|visual)_projection)\.|logit_"
)
# Weights that a pooled output passes through, besides those of the patch features
_POOLING = re.compile(r"(^|\.)(pooler|head|fc_norm|attn_pool)\.")
# Parameters that put tokens of their own in front of the patches
_CLASS_TOKENS = ("cls_token", "class_embedding")
_PREFIX_TOKENS = (
    *_CLASS_TOKENS,
    *("dist_token", "distillation_token", "reg_token", "register_tokens", "cls_register_token"),
)


def vision_part(model: nn.Module) -> nn.Module:
    """
    The vision encoder inside a composite model; any other model as it is.

    Raises:
        ValueError: if the encoder takes no `pixel_values`.
    """
    while name := next((name for name in VISION_PARTS if isinstance(getattr(model, name, None), nn.Module)), None):
        model = getattr(model, name)
    accepted = inspect.signature(model.forward).parameters
    if "pixel_values" not in accepted:
        raise ValueError(f"{type(model).__name__} takes {[*accepted]} and no `pixel_values`; choose a vision model.")
    return model


def on_feature_path(keys: Iterable[str]) -> list[str]:
    """The keys, sorted, of weights that patch features pass through."""
    return sorted(key for key in keys if not _OFF_THE_FEATURE_PATH.search(key))


def pooling_weights(keys: Iterable[str]) -> list[str]:
    """The keys, sorted, of weights that pool the patch features."""
    return sorted(key for key in keys if _POOLING.search(key))


def square_size(processor: BaseImageProcessor) -> int | None:
    """Side in pixels of the square that an image processor makes; `None` if it makes others."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    sides = {size[key] for key in ("height", "width", "shortest_edge", "longest_edge") if size.get(key)}
    return sides.pop() if len(sides) == 1 else None


def forward_arguments(model: nn.Module, image_size: int, output_hidden_states: bool = False) -> dict[str, Any]:
    """
    Keywords that a model's forward needs beside `pixel_values`.

    Args:
        model: A vision encoder of transformers, as [`vision_part`] gives it.
        image_size: Side of the square input in pixels.
        output_hidden_states (*optional*, defaults to `False`): Whether other layers than the last are read.
    """
    arguments = {"output_hidden_states": True} if output_hidden_states else {}
    native: Any = getattr(model.config, "image_size", None)
    accepted = inspect.signature(model.forward).parameters
    if "interpolate_pos_encoding" in accepted and native not in (image_size, [image_size] * 2, (image_size,) * 2):
        arguments["interpolate_pos_encoding"] = True
    return arguments


def select_output(outputs: Any, output: int | str | None = None) -> torch.Tensor:
    """
    One output of a model's forward.

    Args:
        outputs: A model output of transformers.
        output: An index into `hidden_states`, a field's name, or `None` for `last_hidden_state`.

    Raises:
        ValueError: if there is none.
    """
    if isinstance(output, int):
        hidden_states = getattr(outputs, "hidden_states", None) or ()
        if not -len(hidden_states) <= output < len(hidden_states):
            raise ValueError(f"The model gives {len(hidden_states)} hidden states and no number {output}.")
        return hidden_states[output]
    features = getattr(outputs, output or "last_hidden_state", None)
    if features is None:
        raise ValueError(f"The model gives {[*outputs]} and no {output or 'last_hidden_state'!r}.")
    return features


def patch_features(
    model: nn.Module, outputs: Any, output: int | str | None = None
) -> tuple[torch.Tensor, tuple[int, int]]:
    """
    One output of a model's forward, patches only. A field by name holds patches alone; other outputs may have prefix
    tokens.

    Returns:
        Tokens `(batch_size, h * w, width)`, row by row, and the grid `(h, w)`.

    Raises:
        ValueError: as [`select_output`] and [`patch_tokens`].
    """
    features = select_output(outputs, output)
    prefix = 0 if isinstance(output, str) else num_prefix_tokens(model, features.shape[-1])
    return patch_tokens(features, prefix)


def num_prefix_tokens(model: nn.Module, width: int) -> int:
    """How many [CLS], distillation and register tokens a model puts before its patches, from its parameters."""
    sizes = {name: value.numel() for name, value in model.named_parameters() if name.split(".")[-1] in _PREFIX_TOKENS}
    return sum(sizes[name] // width for name in on_feature_path(sizes))


def has_class_token(model: nn.Module) -> bool:
    """Whether the first token of a model's hidden states is a [CLS] token, from its parameters."""
    return any(name.split(".")[-1] in _CLASS_TOKENS for name in on_feature_path(dict(model.named_parameters())))


def patch_tokens(
    features: torch.Tensor, prefix: int = 0, channels_last: bool | None = None
) -> tuple[torch.Tensor, tuple[int, int]]:
    """
    Features of any layout as patch tokens.

    Args:
        features: `(batch_size, prefix + h * w, width)`, `(batch_size, width, h, w)` or `(batch_size, h, w, width)`.
        prefix: Number of tokens before the patches.
        channels_last: Layout of a map; by default told from its square grid.

    Returns:
        Tokens `(batch_size, h * w, width)`, row by row, and the grid `(h, w)`.

    Raises:
        ValueError: if tokens are on no square grid, or the layout of a map cannot be told.
    """
    if features.dim() == 3:
        count = features.shape[1] - prefix
        side = isqrt(max(count, 0))
        if side == 0 or side * side != count:
            raise ValueError(
                f"{features.shape[1]} tokens less {prefix} that are no patches leave {count}, and a square grid has "
                f"h * w = {side} * {side} = {side * side} or {side + 1} * {side + 1} = {(side + 1) ** 2} patches."
            )
        return features[:, prefix:], (side, side)
    if features.dim() != 4:
        raise ValueError(
            f"Features have {features.dim()} dimensions {tuple(features.shape)}; 3 (tokens) or 4 (a map) are expected."
        )
    if channels_last is None:
        channels_first, channels_last = (features.shape[i] == features.shape[i + 1] for i in (2, 1))
        if channels_first == channels_last:
            raise ValueError(
                f"A map of shape {tuple(features.shape)} does not tell its channels from the sides of a square grid."
            )
    height, width = features.shape[1:3] if channels_last else features.shape[2:]
    tokens = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
    return tokens, (height, width)


class OtherEncoder:
    """
    A vision encoder beside a student: patch features of images, for pictures and benchmarks.

    Args:
        source: Hub id or folder; `ID@REVISION` for a branch, tag or commit.
        device: Where it runs.

    Attributes: `name` (the last part of `source`).

    Raises:
        ValueError: if the model or its image processor cannot be read, needs code from the Hub, takes no pixels, or
            lacks weights that its features pass through.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        model_id, _, revision = (source, "", "") if os.path.isdir(source) else source.partition("@")
        self.source = source
        self.name = Path(source).resolve().name if os.path.isdir(source) else model_id.rsplit("/", 1)[-1]
        settings = {"revision": revision or "main", "trust_remote_code": False}
        try:
            model, info = AutoModel.from_pretrained(
                model_id, dtype=torch.float32, output_loading_info=True, **settings
            )
            self.processor: BaseImageProcessor = AutoImageProcessor.from_pretrained(
                model_id, backend="pil", **settings
            )
            model = vision_part(model)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise ValueError(f"The encoder {source} cannot be read: {error}") from error
        missing = on_feature_path(info["missing_keys"])
        if missing or info["mismatched_keys"]:
            raise ValueError(
                f"The encoder {source} lacks {len(missing)} weights, which would stay random: {missing}; of another "
                f"shape are {sorted(map(str, info['mismatched_keys']))}."
            )
        self.model = model.to(device).eval()
        self.device = torch.device(device)

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels, as the image processor says."""
        size = square_size(self.processor)
        if size is None:
            raise ValueError(
                f"The encoder {self.source} takes no squares of one size: its {type(self.processor).__name__} has the "
                f"size {dict(self.processor.size)}."
            )
        return size

    def preprocess(self, crops: Sequence[Image.Image]) -> torch.Tensor:
        """Crops as pixels, resized and normalized as the image processor says, but not cropped again."""
        side = (self.image_size, self.image_size)
        resized = [image.resize(side, Image.Resampling(self.processor.resample)) for image in crops]
        geometry = ("do_resize", "do_center_crop", "do_pad")
        off = {name: False for name in geometry if getattr(self.processor, name, None) is not None}
        return self.processor(images=resized, return_tensors="pt", **off)["pixel_values"]

    @torch.inference_mode()
    def patch_tokens(self, crops: Sequence[Image.Image], layers: Sequence[int | None] = (None,)) -> list[torch.Tensor]:
        """
        Features whose patches lie over the same pixels for every encoder that gets the same crops.

        Args:
            crops: RGB images; other shapes are stretched to squares.
            layers: Counted from 0; `None` is the last hidden state.

        Returns:
            By layer, float32 `(len(crops), num_patches, width)`, row by row over a square grid.

        Raises:
            ValueError: if the model has no such layer, or gives no square grid.
        """
        pixels = self.preprocess(crops).to(self.device)
        try:
            arguments = forward_arguments(self.model, self.image_size, output_hidden_states=set(layers) != {None})
            outputs = self.model(pixel_values=pixels, **arguments)
            depth = len(getattr(outputs, "hidden_states", None) or ()) - 1
            if absent := [layer for layer in layers if layer is not None and layer >= depth]:
                raise ValueError(f"It has {max(depth, 0)} layers, and no layer {absent[0]}.")
            indices = [None if layer is None else layer + 1 for layer in layers]
            return [patch_features(self.model, outputs, index)[0].float() for index in indices]
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"The encoder {self.source} gives no patch features: {error}") from error
