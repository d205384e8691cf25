"""The loaders of [`train.teachers`], transformers and timm (and EVA-02's file), and what they give."""

import inspect
import logging
import os
import re
from collections.abc import Callable
from functools import partial
from logging.handlers import BufferingHandler
from math import isqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import timm
import timm.data
import timm.models
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPVisionModel,
    Pix2StructForConditionalGeneration,
    Pix2StructImageProcessor,
)
from transformers.image_utils import SizeDict
from transformers.utils import cached_file

from modeling_movekd import MoveKDVisionModel
from train.eva02 import Eva02DetectionBackbone, Eva02DetectionConfig, load_backbone
from train.teacher_preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    INTERPOLATIONS,
    TeacherPreprocessor,
)


if TYPE_CHECKING:
    from train.teachers import TeacherConfig


LAYOUTS = ("map", "interleaved")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Whatever the size of the image, as its features are resized
PIX2STRUCT_GRID = (32, 32)
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


def _preprocessor(
    config: "TeacherConfig", image_size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> TeacherPreprocessor:
    """For a model whose file says nothing of its pixels: what the configuration leaves open is as given here."""
    mean, std = config.mean or mean, config.std or std
    interpolation, fit = config.interpolation or "bicubic", config.fit or "centre_crop"
    return TeacherPreprocessor(config.image_size or image_size, mean, std, interpolation, fit)


def _preprocessor_of_transformers(config: "TeacherConfig") -> TeacherPreprocessor:
    given = {field: getattr(config, field) for field in ("image_size", "mean", "std", "interpolation")}
    fit = config.fit
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
        # SAM's way; elsewhere the longer edge says nothing of what becomes of the shorter
        zero_pad = getattr(processor, "do_pad", False) and size.longest_edge and not size.shortest_edge
        fit = fit or ("zero_pad" if zero_pad else "centre_crop")
        given = {field: read[field] if value is None else value for field, value in given.items()}
        if unknown := [field for field, value in given.items() if value is None]:
            raise ValueError(
                f"Teacher {config.name}: {type(processor).__name__} gives no {unknown} for square input scaled by "
                f"1/255 (size {processor.size}, resample {processor.resample}); set them in its configuration."
            )
    return TeacherPreprocessor(**given, fit=fit or "centre_crop")


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
    """The vision part of any model that takes `pixel_values`, or of Pix2Struct."""
    code = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if AutoConfig.from_pretrained(config.model, **code).model_type == "pix2struct":
        return _load_pix2struct(config)
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
    return model, partial(_transformers_features, config.output, arguments, layout=config.layout), preprocessor


def _transformers_features(
    output: int | str | None,
    arguments: dict[str, Any],
    model: nn.Module,
    pixel_values: torch.Tensor,
    layout: str = "map",
) -> TeacherFeatures:
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


def _load_pix2struct(config: "TeacherConfig") -> Loaded:
    if config.output is not None or config.layout != "map":
        raise ValueError(
            f"Teacher {config.name}: Pix2Struct gives its last hidden state as a map; found output {config.output!r} "
            f"and layout {config.layout!r}."
        )
    encoder = _read_strictly(config, Pix2StructForConditionalGeneration).encoder
    preprocessor = _preprocessor(config, 1024, CLIP_MEAN, CLIP_STD)
    return encoder, partial(_pix2struct_features, preprocessor.mean, preprocessor.std), preprocessor


def _pix2struct_features(
    mean: tuple[float, ...], std: tuple[float, ...], model: Any, pixel_values: torch.Tensor
) -> TeacherFeatures:
    pixels = pixel_values.float()
    scale, shift = (pixels.new_tensor(channels).view(3, 1, 1) for channels in (std, mean))
    patch_size = isqrt(model.config.patch_embed_hidden_size // 3)
    patches = pix2struct_patches((pixels * scale + shift) * 255, patch_size).to(pixel_values.dtype)
    hidden = model(flattened_patches=patches).last_hidden_state
    side = isqrt(patches.shape[1])
    feature_map = hidden.transpose(1, 2).reshape(len(hidden), -1, side, side)
    resized = F.interpolate(feature_map, PIX2STRUCT_GRID, mode="bilinear", align_corners=True)
    return TeacherFeatures(*_patch_tokens(resized, channels_last=False))


def load_eva02(config: "TeacherConfig") -> Loaded:
    """EVA-02's detection backbone, from a detector's checkpoint or a folder that `save_pretrained` wrote."""
    if config.file is None and not os.path.isfile(config.model):
        model = _read_strictly(config, Eva02DetectionBackbone)
    else:
        try:
            file = config.model
            architecture = Eva02DetectionConfig()
            if config.file is not None:
                file = cached_file(config.model, config.file, revision=config.revision)
                if os.path.isfile(os.path.join(config.model, "config.json")):
                    architecture = Eva02DetectionConfig.from_pretrained(config.model)
        except OSError as error:
            raise ValueError(f"Teacher {config.name}: {config.model} has no {config.file}: {error}") from error
        model = load_backbone(architecture, file)
    preprocessor = _preprocessor(config, model.config.image_size, IMAGENET_MEAN, IMAGENET_STD)
    arguments = {"output_hidden_states": True} if isinstance(config.output, int) else {}
    return model, partial(_transformers_features, config.output, arguments, layout=config.layout), preprocessor


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
    mean, std = config.mean or tuple(settings["mean"]), config.std or tuple(settings["std"])
    preprocessor = TeacherPreprocessor(height, mean, std, interpolation, config.fit or "centre_crop")
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
