"""What teachers give: the patch features of a frozen model, whatever its outputs look like."""

import re
from collections.abc import Callable
from math import isqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Pix2StructImageProcessor
from transformers.image_utils import SizeDict

from train.teachers.config import TeacherConfig
from train.teachers.preprocessing import TeacherPreprocessor


# Whatever the size of the image, as its features are resized
PIX2STRUCT_GRID = (32, 32)
# Parameters that put tokens of their own in front of the patches
_PREFIX_TOKENS = {"cls_token", "class_embedding", "dist_token", "distillation_token"} | {
    "reg_token",
    "register_tokens",
    "cls_register_token",
}
# What a tower may hold that its patch features never pass through
OFF_THE_FEATURE_PATH = re.compile(r"(^|\.)(pooler|head|head_dist|fc_norm|attn_pool)\.")


class TeacherFeatures(NamedTuple):
    """
    What a teacher says about a batch of images, in the teacher's dtype, without gradient.

    Args:
        tokens: `(batch_size, h * w, width)`, patches only (no CLS, no registers), row by row over `grid`.
        grid: `(h, w)`.
        cls: `(batch_size, width)`, the CLS embedding; `"clip"` only.
        cls_attention: `(batch_size, num_heads, h * w)`, the CLS query's attention to the patches in the layer that
            gives the features, cut from the softmax over CLS and patches (its sum is below 1); `"clip"` only.
    """

    tokens: torch.Tensor
    grid: tuple[int, int]
    cls: torch.Tensor | None = None
    cls_attention: torch.Tensor | None = None


class FrozenTeacher(nn.Module):
    """
    A vision model that only ever gives features: no gradient, no training mode, its own dtype also under autocast.

    Built by [`~train.teachers.loaders.load_teacher`].

    Attributes: `name`, `config`, `preprocessor`, `grid` `(h, w)`, `width` (channels).

    Raises:
        ValueError: if weights are absent on this process, or if the features of a blank image are not finite, not the
            same twice, or not on a square grid.
    """

    def __init__(
        self,
        config: TeacherConfig,
        model: nn.Module,
        features: Callable[[nn.Module, torch.Tensor], TeacherFeatures],
        preprocessor: TeacherPreprocessor,
    ) -> None:
        super().__init__()
        absent = [name for name, weight in model.named_parameters() if weight.is_meta or hasattr(weight, "ds_id")]
        if absent:
            raise ValueError(
                f"Teacher {config.name}: {len(absent)} weights, {absent[0]} first, are not on this process. Every "
                "process needs the whole teacher: set fsdp_cpu_ram_efficient_loading and zero3_init_flag to false."
            )
        self.name = config.name
        self.config = config
        self.preprocessor = preprocessor
        self.model = model.requires_grad_(False)
        self._features = features
        self.eval()

        size = preprocessor.image_size
        try:
            blank, again = self(torch.zeros(1, 3, size, size)), self(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"Teacher {config.name}: {type(model).__name__} of {config.model} gives no grid of patch features for "
                f"a blank image of {size} x {size} pixels: {error}"
            ) from error
        if not torch.isfinite(blank.tokens).all():
            raise ValueError(
                f"Teacher {self.name}: features of a blank image are not finite in {self.dtype}; set another dtype."
            )
        if not torch.allclose(blank.tokens, again.tokens, rtol=1e-2, atol=1e-3 * blank.tokens.abs().max().item()):
            raise ValueError(
                f"Teacher {self.name}: {type(model).__name__} gives other features for the same image the second "
                "time; a model that masks or samples patches cannot teach."
            )
        self.grid: tuple[int, int] = blank.grid
        self.width: int = blank.tokens.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stays in evaluation mode, whatever the model around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> TeacherFeatures:
        """
        Args:
            pixel_values: `(batch_size, 3, image_size, image_size)` from this teacher's preprocessor, any float dtype.

        Raises:
            ValueError: for pixels of another shape.
        """
        size = self.preprocessor.image_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"Teacher {self.name} takes pixels of shape (batch_size, 3, {size}, {size}) from its preprocessor, "
                f"got {tuple(pixel_values.shape)}."
            )
        weight = next(self.model.parameters())
        with torch.autocast(weight.device.type, enabled=False):
            return self._features(self.model, pixel_values.to(device=weight.device, dtype=weight.dtype))


def clip_features(interpolate: bool, model: nn.Module, pixel_values: torch.Tensor) -> TeacherFeatures:
    """
    The last layer of a CLIP tower with CLS and its attention.

    Args:
        interpolate: Whether the position embedding is resized to the pixels.
        model: A [`~modeling_movekd.MoveKDVisionModel`], cut to the layer that is distilled.
        pixel_values: `(batch_size, 3, size, size)`; so below.
    """
    output = model(pixel_values, interpolate_pos_encoding=interpolate, cls_attention_layer=-1)
    tokens, grid = _patch_tokens(output.last_hidden_state, prefix=1)
    return TeacherFeatures(tokens, grid, output.last_hidden_state[:, 0], output.cls_attention[..., 1:])


def transformers_features(
    output: int | str | None,
    arguments: dict[str, Any],
    model: nn.Module,
    pixel_values: torch.Tensor,
    layout: str = "map",
) -> TeacherFeatures:
    """
    One output of a vision model of transformers; `output` and `layout` as in [`~train.teachers.config.TeacherConfig`].

    Args:
        arguments: Keywords of the forward.

    Raises:
        ValueError: if there is no such output, or it is on no square grid.
    """
    outputs = model(pixel_values=pixel_values, **arguments)
    if isinstance(output, int):
        raw = outputs.hidden_states[output]
    else:
        raw = getattr(outputs, output or "last_hidden_state", None)
        if raw is None:
            raise ValueError(f"{type(model).__name__} gives {[*outputs]} and no {output or 'last_hidden_state'!r}.")
    if layout == "interleaved":
        return TeacherFeatures(*_patch_tokens(interleave(raw), channels_last=False))
    tokens, grid = _patch_tokens(raw, 0 if isinstance(output, str) else _prefix_tokens(model, raw.shape[-1]))
    return TeacherFeatures(tokens, grid)


def interleave(feature_map: torch.Tensor) -> torch.Tensor:
    """
    SAM's features as the authors' code reads them: a reshape that mixes channels with positions.

    Args:
        feature_map: `(batch_size, channels, h, w)`, where `channels * h` is the square of an even number `r`.

    Returns:
        `(batch_size, 4 * w, r / 2, r / 2)`; of the same shape if `channels` is `4 * h` and `h` is `w`.

    Raises:
        ValueError: for another shape.
    """
    if feature_map.dim() != 4:
        raise ValueError(f"Layout 'interleaved' is of a feature map, found shape {tuple(feature_map.shape)}.")
    batch_size, channels, height, width = feature_map.shape
    side = isqrt(channels * height)
    if side**2 != channels * height or side % 2:
        raise ValueError(
            f"Layout 'interleaved' needs channels * height to be the square of an even number, found {channels} * "
            f"{height} = {channels * height}."
        )
    columns = feature_map.reshape(batch_size, channels * height, width).transpose(1, 2)
    return F.pixel_unshuffle(columns.reshape(batch_size, width, side, side), 2)


def pix2struct_patches(pixel_values: torch.Tensor, patch_size: int = 16) -> torch.Tensor:
    """
    What Pix2Struct takes: each image standardised by its own mean and standard deviation, resized to as many patches
    as its processor allows (2048, so 45 x 45), and flattened.

    Args:
        pixel_values: `(batch_size, 3, size, size)` on the scale 0 to 255.
        patch_size: Side of a patch in pixels.

    Returns:
        Float32 `(batch_size, patches, 2 + 3 * patch_size**2)`, row and column (from 1) in front, no padding.
    """
    processor = Pix2StructImageProcessor()
    images = pixel_values.float()
    # The processor for tensors divides by the sample's deviation, the models were trained with the population's
    deviation = images.std(dim=(1, 2, 3), keepdim=True, correction=0).clamp(min=images[0].numel() ** -0.5)
    images = (images - images.mean(dim=(1, 2, 3), keepdim=True)) / deviation
    size = SizeDict(height=patch_size, width=patch_size)
    patches = processor.extract_flattened_patches(images, processor.max_patches, size)
    return patches[:, : isqrt(processor.max_patches) ** 2]


def pix2struct_features(
    mean: tuple[float, ...], std: tuple[float, ...], model: Any, pixel_values: torch.Tensor
) -> TeacherFeatures:
    """Pix2Struct's last hidden state, resized to 32 x 32; pixels are normalised by `mean` and `std`, and put back."""
    pixels = pixel_values.float()
    scale, shift = (pixels.new_tensor(channels).view(3, 1, 1) for channels in (std, mean))
    patch_size = isqrt(model.config.patch_embed_hidden_size // 3)
    patches = pix2struct_patches((pixels * scale + shift) * 255, patch_size).to(pixel_values.dtype)
    hidden = model(flattened_patches=patches).last_hidden_state
    side = isqrt(patches.shape[1])
    feature_map = hidden.transpose(1, 2).reshape(len(hidden), -1, side, side)
    resized = F.interpolate(feature_map, PIX2STRUCT_GRID, mode="bilinear", align_corners=True)
    return TeacherFeatures(*_patch_tokens(resized, channels_last=False))


def timm_features(output: int | str | None, model: Any, pixel_values: torch.Tensor) -> TeacherFeatures:
    """
    The last features of a model of timm, or intermediate ones.

    Raises:
        ValueError: for an `output` by name.
    """
    if isinstance(output, str):
        raise ValueError(f"output {output!r}: a timm model's outputs are None (the last) or an integer.")
    if output is not None:
        only = {"output_fmt": "NCHW", "intermediates_only": True}
        (raw,) = model.forward_intermediates(pixel_values, indices=[output], **only)
        return TeacherFeatures(*_patch_tokens(raw, 0, channels_last=False))
    raw = model.forward_features(pixel_values)
    prefix = getattr(model, "num_prefix_tokens", None)
    prefix = _prefix_tokens(model, raw.shape[-1]) if prefix is None else prefix
    return TeacherFeatures(*_patch_tokens(raw, prefix, getattr(model, "output_fmt", "NCHW") == "NHWC"))


def _prefix_tokens(model: nn.Module, width: int) -> int:
    parameters = [(name, size.numel()) for name, size in model.named_parameters()]
    on_path = [(name, size) for name, size in parameters if not OFF_THE_FEATURE_PATH.search(name)]
    return sum(size // width for name, size in on_path if name.rpartition(".")[-1] in _PREFIX_TOKENS)


def _patch_tokens(
    raw: torch.Tensor, prefix: int = 0, channels_last: bool | None = None
) -> tuple[torch.Tensor, tuple[int, int]]:
    """`(batch, prefix + n, width)`, `(batch, width, h, w)` or `(batch, h, w, width)` to `(batch, h * w, width)`."""
    if raw.dim() == 3:
        count = raw.shape[1] - prefix
        side = isqrt(max(count, 0))
        if side == 0 or side * side != count:
            raise ValueError(
                f"{raw.shape[1]} tokens less {prefix} that are no patches leave {count}, and a square grid has h * w "
                f"= {side} * {side} = {side * side} or {side + 1} * {side + 1} = {(side + 1) ** 2} patches."
            )
        return raw[:, prefix:], (side, side)
    if raw.dim() != 4:
        raise ValueError(
            f"Features have {raw.dim()} dimensions {tuple(raw.shape)}; 3 (tokens) or 4 (a map) are expected."
        )
    if channels_last is None:
        channels_first, channels_last = raw.shape[2] == raw.shape[3], raw.shape[1] == raw.shape[2]
        if channels_first == channels_last:
            raise ValueError(
                f"A feature map of shape {tuple(raw.shape)} does not tell its channels from a square grid's sides."
            )
    height, width = raw.shape[1:3] if channels_last else raw.shape[2:]
    tokens = raw.flatten(1, 2) if channels_last else raw.flatten(2).transpose(1, 2)
    return tokens, (height, width)
