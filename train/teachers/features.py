"""Teachers' features: a frozen model whose outputs, of any layout, become patch tokens with their grid."""

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import nn
from transformers import Pix2StructImageProcessor
from transformers.image_utils import SizeDict

from modeling_movekd.vision_encoders import (
    has_class_token,
    num_prefix_tokens,
    patch_features,
    patch_tokens,
    select_output,
)
from train.teachers.config import TeacherConfig
from train.teachers.preprocessing import ResizedImages, TeacherPreprocessor


# Pix2Struct's features are resized to this grid, whatever the size of the image
PIX2STRUCT_GRID = (32, 32)


class TeacherFeatures(NamedTuple):
    """
    A teacher's features of a batch of images, in the teacher's dtype, without gradient.

    Args:
        tokens: `(batch_size, h * w, width)`, patches only (no [CLS], no registers), row by row over `grid`.
        grid: `(h, w)`.
        cls: `(batch_size, width)`, the [CLS] embedding; `"clip"` only.
        cls_attention: `(batch_size, num_heads, h * w)`, the [CLS] query's attention to the patches in the layer that
            gives the features. It is cut from the softmax over [CLS] and patches, so its sum is below 1; `"clip"`
            only.
        summary: `(batch_size, summary_width)`, the [CLS] token of the last hidden state, or else the model's pooled
            feature if the checkpoint has the weights that pool it; `None` for a model that has neither.
    """

    tokens: torch.Tensor
    grid: tuple[int, int]
    cls: torch.Tensor | None = None
    cls_attention: torch.Tensor | None = None
    summary: torch.Tensor | None = None


class FrozenTeacher(nn.Module):
    """
    A vision model that only gives features: no gradient, no training mode, its own dtype also under autocast.

    Args:
        config: As [`~train.teachers.config.resolve_teacher`] gives it.
        model: The vision model.
        features: Takes the model and its pixels to [`TeacherFeatures`].
        preprocessor: Makes the model's pixels from images.
        weights (*optional*, defaults to `True`): Whether the model has its weights. Without them nothing is run until
            [`measure`] is called.

    Attributes: `name`, `config`, `preprocessor`, `grid` `(h, w)`, `width` (channels), `summary_width` (`None` without
        a summary).

    Raises:
        ValueError: if weights are absent on this process, or if the features of a blank image are not finite, differ
            between two forwards, or are not on a square grid.
    """

    grid: tuple[int, int]
    width: int
    summary_width: int | None

    def __init__(
        self,
        config: TeacherConfig,
        model: nn.Module,
        features: Callable[[nn.Module, torch.Tensor], TeacherFeatures],
        preprocessor: TeacherPreprocessor,
        weights: bool = True,
    ) -> None:
        super().__init__()
        self.name = config.name
        self.config = config
        self.preprocessor = preprocessor
        self.model = model.requires_grad_(False)
        self._features = features
        self.eval()
        if weights:
            self._check()

    def measure(self) -> TeacherFeatures:
        """
        Run the model on a blank image, and set `grid`, `width` and `summary_width` by its features.

        Raises:
            ValueError: if the features are not on a square grid.
        """
        size = self.preprocessor.image_size
        try:
            blank = self(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"Teacher {self.name}: {type(self.model).__name__} of {self.config.model} gives no grid of patch "
                f"features for a blank image of {size} x {size} pixels: {error}"
            ) from error
        self.grid, self.width = blank.grid, blank.tokens.shape[-1]
        self.summary_width = None if blank.summary is None else blank.summary.shape[-1]
        return blank

    def _check(self) -> None:
        absent = [name for name, weight in self.model.named_parameters() if weight.is_meta or hasattr(weight, "ds_id")]
        if absent:
            raise ValueError(
                f"Teacher {self.name}: {len(absent)} weights, {absent[0]} first, are not on this process. Every "
                "process needs the whole teacher: set fsdp_cpu_ram_efficient_loading and zero3_init_flag to false."
            )
        (blank, *_, summary), again = self.measure(), self.measure().tokens
        summaries = [] if summary is None else [summary]
        if not all(torch.isfinite(value).all() for value in (blank, *summaries)):
            raise ValueError(
                f"Teacher {self.name}: features of a blank image are not finite in {self.dtype}; set another dtype."
            )
        if not torch.allclose(blank, again, rtol=1e-2, atol=1e-3 * blank.abs().max().item()):
            raise ValueError(
                f"Teacher {self.name}: {type(self.model).__name__} gives other features for the same image the second "
                "time; a model that masks or samples patches cannot teach."
            )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stay in evaluation mode, whatever the model around the teacher does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: ResizedImages) -> TeacherFeatures:
        """
        Args:
            pixel_values: What this teacher's preprocessor makes of images: the bytes of `resize`, which are normalized
                here, or normalized pixels of any float dtype; `(batch_size, 3, image_size, image_size)`.

        Raises:
            ValueError: for pixels of another shape.
        """
        size = self.preprocessor.image_size
        weight = next(self.model.parameters())
        inputs = send_to_device(pixel_values, weight.device)
        pixels = inputs["pixels"] if isinstance(inputs, Mapping) else inputs
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(
                f"Teacher {self.name} takes pixels of shape (batch_size, 3, {size}, {size}) from its preprocessor, "
                f"got {tuple(pixels.shape)}."
            )
        if not pixels.is_floating_point():
            pixels = self.preprocessor.normalize(inputs)
        with torch.autocast(weight.device.type, enabled=False):
            return self._features(self.model, pixels.to(weight.dtype))


def clip_features(interpolate: bool, model: nn.Module, pixel_values: torch.Tensor) -> TeacherFeatures:
    """
    The last layer of a CLIP tower, with [CLS] and its attention.

    Args:
        interpolate: Whether the position embedding is resized to the pixels.
        model: A [`~modeling_movekd.MoveKDVisionModel`], cut to the layer that is distilled.
        pixel_values: `(batch_size, 3, size, size)`.
    """
    output = model(pixel_values, interpolate_pos_encoding=interpolate, cls_attention_layer=-1)
    tokens, grid = patch_tokens(output.last_hidden_state, prefix=1)
    cls = output.last_hidden_state[:, 0]
    return TeacherFeatures(tokens, grid, cls, output.cls_attention[..., 1:], summary=cls)


def transformers_features(
    output: int | str | None,
    arguments: dict[str, Any],
    model: nn.Module,
    pixel_values: torch.Tensor,
    layout: str = "map",
    pools: bool = True,
) -> TeacherFeatures:
    """
    One output of a vision model of transformers, and its summary.

    Args:
        output: See [`~train.teachers.config.TeacherConfig`].
        arguments: Keywords of the forward, as [`~modeling_movekd.vision_encoders.forward_arguments`] gives them.
        model: The vision model.
        pixel_values: `(batch_size, 3, size, size)`.
        layout: See [`~train.teachers.config.TeacherConfig`].
        pools (*optional*, defaults to `True`): Whether the checkpoint has a trained pooled output.

    Raises:
        ValueError: if there is no such output, or it is not on a square grid.
    """
    outputs = model(pixel_values=pixel_values, **arguments)
    if layout == "interleaved":
        return TeacherFeatures(*patch_tokens(interleave(select_output(outputs, output)), channels_last=False))
    features, last, pooled = patch_features(model, outputs, output), outputs.get("last_hidden_state"), None
    if last is not None and last.dim() == 3 and has_class_token(model):
        pooled = last[:, 0]
    elif pools:
        pooled = outputs.get("pooler_output")
    return TeacherFeatures(*features, summary=None if pooled is None else pooled.flatten(1))


def interleave(feature_map: torch.Tensor) -> torch.Tensor:
    """
    SAM's features as the original code reads them: a reshape mixes channels with positions.

    Args:
        feature_map: `(batch_size, channels, h, w)`, where `channels * h` is the square of an even number `r`.

    Returns:
        `(batch_size, 4 * w, r / 2, r / 2)`, which is the same shape if `channels` is `4 * h` and `h` is `w`.

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
    Pix2Struct's input: each image standardized by its own mean and standard deviation, resized to as many patches as
    the processor allows (2048, so 45 x 45), and flattened.

    Args:
        pixel_values: `(batch_size, 3, size, size)` on the scale 0 to 255.
        patch_size: Side of a patch in pixels.

    Returns:
        Float32 `(batch_size, num_patches, 2 + 3 * patch_size**2)`: row and column (from 1), then pixels; no padding.
    """
    processor = Pix2StructImageProcessor()
    images = pixel_values.float()
    # The processor divides tensors by the sample's deviation, but the models were trained with the population's
    deviation = images.std(dim=(1, 2, 3), keepdim=True, correction=0).clamp(min=images[0].numel() ** -0.5)
    images = (images - images.mean(dim=(1, 2, 3), keepdim=True)) / deviation
    size = SizeDict(height=patch_size, width=patch_size)
    patches = processor.extract_flattened_patches(images, processor.max_patches, size)
    return patches[:, : isqrt(processor.max_patches) ** 2]


def pix2struct_features(
    mean: tuple[float, ...], std: tuple[float, ...], model: Any, pixel_values: torch.Tensor
) -> TeacherFeatures:
    """
    Pix2Struct's last hidden state, resized to 32 x 32.

    Args:
        mean: By which `pixel_values` are normalized; this is undone, as Pix2Struct standardizes each image itself.
        std: As `mean`.
        model: Pix2Struct's encoder.
        pixel_values: `(batch_size, 3, size, size)`.
    """
    pixels = pixel_values.float()
    scale, shift = (pixels.new_tensor(channels).view(3, 1, 1) for channels in (std, mean))
    patch_size = isqrt(model.config.patch_embed_hidden_size // 3)
    patches = pix2struct_patches((pixels * scale + shift) * 255, patch_size).to(pixel_values.dtype)
    hidden = model(flattened_patches=patches).last_hidden_state
    side = isqrt(patches.shape[1])
    feature_map = hidden.transpose(1, 2).reshape(len(hidden), -1, side, side)
    resized = F.interpolate(feature_map, PIX2STRUCT_GRID, mode="bilinear", align_corners=True)
    return TeacherFeatures(*patch_tokens(resized, channels_last=False))


def timm_features(
    output: int | str | None, model: Any, pixel_values: torch.Tensor, pools: bool = True
) -> TeacherFeatures:
    """
    Features of a timm model, the last ones or those of block `output`, and its summary.

    Args:
        output: See [`~train.teachers.config.TeacherConfig`].
        model: A timm model without classifier.
        pixel_values: `(batch_size, 3, size, size)`.
        pools (*optional*, defaults to `True`): Whether the checkpoint has a trained pooled output.

    Raises:
        ValueError: for an `output` by name.
    """
    if isinstance(output, str):
        raise ValueError(f"output {output!r}: a timm model's outputs are None (the last) or an integer.")
    if output is not None:
        last, (raw,) = model.forward_intermediates(pixel_values, indices=[output], output_fmt="NCHW")
        features = patch_tokens(raw, 0, channels_last=False)
    else:
        last = model.forward_features(pixel_values)
        prefix = getattr(model, "num_prefix_tokens", None)
        prefix = num_prefix_tokens(model, last.shape[-1]) if prefix is None else prefix
        features = patch_tokens(last, prefix, getattr(model, "output_fmt", "NCHW") == "NHWC")
    summary = None
    if last.dim() == 3 and has_class_token(model):
        summary = last[:, 0]
    elif pools:
        summary = model.forward_head(last, pre_logits=True)
    return TeacherFeatures(*features, summary=summary)
