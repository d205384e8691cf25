"""The two loaders of [`train.teachers`], transformers and timm, and what they give."""

import inspect
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from logging.handlers import BufferingHandler
from math import isqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import timm
import timm.data
import timm.models
import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModel, CLIPVisionModel

from modeling_movekd import MoveKDVisionModel


if TYPE_CHECKING:
    from train.teachers import TeacherConfig


INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Where a composite model of transformers (CLIP, SigLIP, SAM, LLaVA, ...) keeps its vision part
_VISION_PARTS = ("vision_model", "vision_encoder", "vision_tower", "visual")
# Parameters that put tokens of their own in front of the patches
_PREFIX_TOKENS = {"cls_token", "class_embedding", "dist_token", "distillation_token"} | {
    "reg_token",
    "register_tokens",
    "cls_register_token",
}
# What a file may hold beyond the tower, and what a tower may hold that its patch features never pass through
_BEYOND_THE_TOWER = re.compile(
    r"([^.]+\.)?(((cls_|distillation_)?classifier|(lm_)?head|decode(r|_head)|text_model|(text|visual)_projection)\.|logit_)"
)
_OFF_THE_FEATURE_PATH = re.compile(r"(^|\.)(pooler|head|head_dist|fc_norm|attn_pool)\.")


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


@dataclass(frozen=True)
class TeacherPreprocessor:
    """
    PIL images to a teacher's pixels: resized to a square on uint8 with PIL, scaled to [0, 1], normalised.

    An image is expected to be the square crop that all towers share; another shape is stretched.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"

    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        """Returns float32 pixels of shape `(len(images), 3, image_size, image_size)`."""
        size, resample = (self.image_size, self.image_size), INTERPOLATIONS[self.interpolation]
        arrays = [np.array(image.convert("RGB").resize(size, resample), dtype=np.float32) for image in images]
        stack = np.stack(arrays) if arrays else np.zeros((0, *size, 3), dtype=np.float32)
        pixels = torch.from_numpy(stack).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(channels, dtype=torch.float32).view(3, 1, 1) for channels in (self.mean, self.std))
        return ((pixels - mean) / std).contiguous()


# A loader gives the model, the function that takes it and its pixels to features, and the preprocessor.
Loaded = tuple[nn.Module, Callable[[nn.Module, torch.Tensor], TeacherFeatures], TeacherPreprocessor]


def _read_strictly(config: "TeacherConfig", auto_class: Any) -> Any:
    model, info = auto_class.from_pretrained(
        config.model,
        revision=config.revision,
        dtype=DTYPES[config.dtype],
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
    )
    missing = sorted(key for key in info["missing_keys"] if not _OFF_THE_FEATURE_PATH.search(key))
    unexpected = sorted(key for key in info["unexpected_keys"] if not _BEYOND_THE_TOWER.match(key))
    for problem, keys in (
        ("lacks", missing),
        ("does not fit in", info["mismatched_keys"]),
        ("has beyond the model", unexpected),
    ):
        if keys:
            raise ValueError(f"Teacher {config.name}: {config.model} {problem}: {sorted(keys)}.")
    while part := next((name for name in _VISION_PARTS if isinstance(getattr(model, name, None), nn.Module)), None):
        model = getattr(model, part)
    return model


def _preprocessor_of_transformers(config: "TeacherConfig") -> TeacherPreprocessor:
    given = {field: getattr(config, field) for field in ("image_size", "mean", "std", "interpolation")}
    if any(value is None for value in given.values()):
        try:
            processor = AutoImageProcessor.from_pretrained(
                config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Teacher {config.name}: {config.model} has no image processor; set {[*given]} in its configuration."
            ) from error
        size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        sides = {side for side in (size.height, size.width, size.shortest_edge, size.longest_edge) if side}
        resample = {value: key for key, value in INTERPOLATIONS.items()}.get(processor.resample)
        scaled = processor.do_rescale and abs(processor.rescale_factor * 255 - 1) < 1e-6
        normalized = processor.do_normalize
        read = {
            "image_size": sides.pop() if len(sides) == 1 else None,
            "mean": (tuple(processor.image_mean) if normalized else (0.0, 0.0, 0.0)) if scaled else None,
            "std": (tuple(processor.image_std) if normalized else (1.0, 1.0, 1.0)) if scaled else None,
            "interpolation": resample,
        }
        given = {field: read[field] if value is None else value for field, value in given.items()}
        if unknown := [field for field, value in given.items() if value is None]:
            raise ValueError(
                f"Teacher {config.name}: {type(processor).__name__} gives no {unknown} for square input scaled by "
                f"1/255 (size {processor.size}, resample {processor.resample}); set them in its configuration."
            )
    return TeacherPreprocessor(**given)


def load_clip(config: "TeacherConfig") -> Loaded:
    """A CLIP tower cut to the layer that is distilled."""
    clip = _read_strictly(config, CLIPVisionModel)
    preprocessor = _preprocessor_of_transformers(config)
    model = MoveKDVisionModel.from_clip(clip, -2 if config.output is None else int(config.output), num_experts=0)
    interpolate = model.config.image_size != preprocessor.image_size
    return model, partial(_clip_features, interpolate), preprocessor


def _clip_features(interpolate: bool, model: nn.Module, pixel_values: torch.Tensor) -> TeacherFeatures:
    output = model(pixel_values, interpolate_pos_encoding=interpolate, cls_attention_layer=-1)
    tokens, grid = _patch_tokens(output.last_hidden_state, prefix=1)
    return TeacherFeatures(tokens, grid, output.last_hidden_state[:, 0], output.cls_attention[..., 1:])


def load_transformers(config: "TeacherConfig") -> Loaded:
    """The vision part of any model that takes `pixel_values`."""
    model = _read_strictly(config, AutoModel)
    accepted = inspect.signature(model.forward).parameters
    if "pixel_values" not in accepted:
        raise ValueError(f"Teacher {config.name}: {type(model).__name__} takes {[*accepted]} and no `pixel_values`.")
    preprocessor = _preprocessor_of_transformers(config)
    size, native = preprocessor.image_size, getattr(model.config, "image_size", None)
    arguments: dict[str, Any] = {}
    if "interpolate_pos_encoding" in accepted and native not in (size, [size, size], (size, size)):
        arguments["interpolate_pos_encoding"] = True
    if isinstance(config.output, int):
        arguments["output_hidden_states"] = True
    return model, partial(_transformers_features, config.output, arguments), preprocessor


def _transformers_features(
    output: int | str | None, arguments: dict[str, Any], model: nn.Module, pixel_values: torch.Tensor
) -> TeacherFeatures:
    outputs = model(pixel_values=pixel_values, **arguments)
    if isinstance(output, int):
        raw = outputs.hidden_states[output]
    else:
        raw = getattr(outputs, output or "last_hidden_state", None)
        if raw is None:
            raise ValueError(f"{type(model).__name__} gives {[*outputs]} and no {output or 'last_hidden_state'!r}.")
    tokens, grid = _patch_tokens(raw, 0 if isinstance(output, str) else _prefix_tokens(model, raw.shape[-1]))
    return TeacherFeatures(tokens, grid)


def load_timm(config: "TeacherConfig") -> Loaded:
    """Any model of timm, by name, from the Hub or from a folder."""
    source = f"local-dir:{config.model}" if os.path.isdir(config.model) else config.model
    if source.startswith("timm/"):
        source = f"hf-hub:{source}"
    if config.revision is not None:
        if source.startswith("local-dir:"):
            raise ValueError(f"Teacher {config.name}: the folder {config.model} has no revision {config.revision!r}.")
        source = source if ":" in source else f"hf-hub:{timm.get_pretrained_cfg(source).hf_hub_id}"
        source = f"{source}@{config.revision}"
    size = {"img_size": config.image_size}
    # timm reads some variants non-strictly and only logs which keys it missed
    logger, log = logging.getLogger("timm.models._builder"), BufferingHandler(capacity=1000)
    level = logger.level
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    try:
        model = timm.create_model(pretrained=True, **timm.models.resolve_model_input_args(source, size))
    finally:
        logger.setLevel(level)
        logger.removeHandler(log)
    reports = [re.match(r"Missing keys \((.*?)\)", record.getMessage()) for record in log.buffer]
    missing = [key for report in reports if report for key in report[1].split(", ")]
    if missing := [key for key in missing if not _OFF_THE_FEATURE_PATH.search(key)]:
        raise ValueError(f"Teacher {config.name}: {config.model} lacks: {missing}.")
    model.reset_classifier(0)
    settings = timm.data.resolve_model_data_config(model, size)
    height, width = settings["input_size"][-2:]
    interpolation = config.interpolation or settings["interpolation"]
    if height != width or interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"Teacher {config.name}: {config.model} asks for {height}x{width} pixels, {interpolation}; squares can be "
            f"given, resized by {[*INTERPOLATIONS]}: set image_size and interpolation in its configuration."
        )
    preprocessor = TeacherPreprocessor(
        height, config.mean or tuple(settings["mean"]), config.std or tuple(settings["std"]), interpolation
    )
    return model, partial(_timm_features, config.output), preprocessor


def _timm_features(output: int | str | None, model: Any, pixel_values: torch.Tensor) -> TeacherFeatures:
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
    on_path = [(name, size) for name, size in parameters if not _OFF_THE_FEATURE_PATH.search(name)]
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
