"""Other vision encoders to look at beside a student: any of transformers with an image processor of its own."""

import inspect
import os
import re
from collections.abc import Sequence
from math import isqrt
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModel, BaseImageProcessor


# Where a composite model (CLIP, SigLIP, SAM, LLaVA, ...) keeps its vision part
VISION_PARTS = ("vision_model", "vision_encoder", "vision_tower", "visual")
# Weights that patch features never pass through
OFF_THE_FEATURE_PATH = re.compile(r"(^|\.)(pooler|head|classifier|text_model|(text|visual)_projection)\.|logit_")
# [CLS], a distillation token and registers; more tokens than these besides the patches are none that we know
MOST_PREFIX_TOKENS = 16


class OtherEncoder:
    """
    A vision encoder that gives the features of images patch by patch.

    Args:
        source: Hub id or folder; `ID@REVISION` for a branch, tag or commit.

    Attributes: `name` (the last part of `source`).

    Raises:
        ValueError: if the model or its image processor cannot be read, needs code from the Hub, lacks weights that its
            features pass through, or takes no pixels.
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
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise ValueError(f"The encoder {source} cannot be read: {error}") from error
        missing = sorted(key for key in info["missing_keys"] if not OFF_THE_FEATURE_PATH.search(key))
        if missing or info["mismatched_keys"]:
            raise ValueError(
                f"The encoder {source} lacks {len(missing)} weights, which would stay random: {missing}; of another "
                f"shape are {sorted(map(str, info['mismatched_keys']))}."
            )
        while part := next((name for name in VISION_PARTS if isinstance(getattr(model, name, None), nn.Module)), None):
            model = getattr(model, part)
        if "pixel_values" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"The encoder {source} is a {type(model).__name__}, which takes no `pixel_values`.")
        self.model = model.to(device).eval()
        self.device = torch.device(device)

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels, as the image processor says."""
        processor = self.processor
        size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        sides = {size[key] for key in ("height", "width", "shortest_edge", "longest_edge") if size.get(key)}
        if len(sides) != 1:
            raise ValueError(
                f"The encoder {self.source} takes no squares of one size: its {type(processor).__name__} has the size "
                f"{dict(size)}."
            )
        return sides.pop()

    def preprocess(self, crops: Sequence[Image.Image]) -> torch.Tensor:
        """Crops as pixels, resized and normalised as the image processor says, but not cropped again."""
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
            crops: RGB images, stretched to squares if they are none.
            layers: Counted from 0; `None` is the last hidden state.

        Returns:
            By layer, float32 `(len(crops), num_patches, width)`, row by row over a square grid.

        Raises:
            ValueError: if the model has no such layer, or gives no square grid.
        """
        pixels = self.preprocess(crops).to(self.device)
        accepted = inspect.signature(self.model.forward).parameters
        arguments = {} if set(layers) == {None} else {"output_hidden_states": True}
        native = getattr(self.model.config, "image_size", None)
        if "interpolate_pos_encoding" in accepted and native not in (self.image_size, [self.image_size] * 2):
            arguments["interpolate_pos_encoding"] = True
        try:
            outputs = self.model(pixel_values=pixels, **arguments)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"The encoder {self.source} cannot be run on images alone: {error}") from error
        hidden = getattr(outputs, "hidden_states", None) or ()
        tokens = []
        for layer in layers:
            if layer is not None and layer + 1 >= len(hidden):
                raise ValueError(f"The encoder {self.source} has {len(hidden) - 1} layers, and no layer {layer}.")
            features = getattr(outputs, "last_hidden_state", None) if layer is None else hidden[layer + 1]
            if features is None:
                raise ValueError(f"The encoder {self.source} gives {[*outputs]} and no last hidden state.")
            tokens.append(self._on_grid(features.float(), pixels.shape[-1]))
        return tokens

    def _on_grid(self, features: torch.Tensor, image_size: int) -> torch.Tensor:
        problem = f"The encoder {self.source} ({type(self.model).__name__}) gives no square grid of features"
        if features.dim() == 4:
            channels_first, channels_last = (features.shape[i] == features.shape[i + 1] for i in (2, 1))
            if channels_first == channels_last:
                raise ValueError(f"{problem}, but a map of shape {tuple(features.shape)}.")
            return features.flatten(2).transpose(1, 2) if channels_first else features.flatten(1, 2)
        if features.dim() != 3:
            raise ValueError(f"{problem}, but values of shape {tuple(features.shape)}.")
        patch_size = getattr(self.model.config, "patch_size", None)
        patch_size = patch_size if isinstance(patch_size, int) else None
        found = features.shape[1]
        patches = (image_size // patch_size) ** 2 if patch_size else 0
        if patches and 0 <= found - patches <= MOST_PREFIX_TOKENS:
            return features[:, found - patches :]
        if isqrt(found) ** 2 == found:  # a backbone that halves its grid from stage to stage
            return features
        raise ValueError(f"{problem}, but {found} tokens for {image_size} x {image_size} pixels.")
