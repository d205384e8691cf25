"""Loaders of teachers: any vision model of transformers or timm, and EVA-02's detection backbone."""

import logging
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from logging.handlers import BufferingHandler
from typing import Any

import timm
import timm.data
import timm.models
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPVisionModel,
    Pix2StructForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.utils import cached_file

from hub.weights import DTYPES
from modeling_movekd import MoveKDVisionModel
from modeling_movekd.vision_encoders import (
    forward_arguments,
    on_feature_path,
    pooling_weights,
    square_size,
    vision_part,
)
from train.teachers.config import (
    COMMIT,
    TEACHERS,
    TeacherConfig,
    hub_revision,
    resolve_teacher,
    teacher_commit,
)
from train.teachers.eva02 import Eva02DetectionBackbone, Eva02DetectionConfig, load_backbone
from train.teachers.features import (
    FrozenTeacher,
    TeacherFeatures,
    clip_features,
    pix2struct_features,
    timm_features,
    transformers_features,
)
from train.teachers.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    INTERPOLATIONS,
    TeacherPreprocessor,
)


logger = logging.getLogger(__name__)

# Weights that a file may hold beside the tower's
_BEYOND_THE_TOWER = re.compile(
    r"([^.]+\.)?(((cls_|distillation_)?classifier|(lm_)?head|decode(r|_head)|text_model|(text|visual)_projection)\.|logit_)"
)


# A loader gives the model, the function that takes the model and its pixels to features, and the preprocessor.
# Without `weights` it builds the model from the configuration alone.
Loaded = tuple[nn.Module, Callable[[nn.Module, torch.Tensor], TeacherFeatures], TeacherPreprocessor]


def _read_config(config: TeacherConfig, config_class: Any = AutoConfig) -> PreTrainedConfig:
    return config_class.from_pretrained(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )


def _read_model(config: TeacherConfig, auto_class: Any, weights: bool) -> tuple[Any, bool]:
    """
    A model of transformers, and whether it has the weights of its pooled output. With `weights`, every one that patch
    features pass through is in the file.
    """
    if not weights:
        if auto_class is AutoModel:
            code = {"trust_remote_code": config.trust_remote_code}
            return AutoModel.from_config(_read_config(config), **code), True
        return auto_class._from_config(_read_config(config, auto_class.config_class)), True
    model, info = auto_class.from_pretrained(
        config.model,
        revision=config.revision,
        dtype=DTYPES[config.dtype],
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
    )
    for problem, keys in (
        ("lacks", on_feature_path(info["missing_keys"])),
        ("does not fit in", info["mismatched_keys"]),
        ("has beyond the model", [key for key in info["unexpected_keys"] if not _BEYOND_THE_TOWER.match(key)]),
    ):
        if keys:
            raise ValueError(f"Teacher {config.name}: {config.model} {problem}: {sorted(keys)}.")
    return model, not pooling_weights(info["missing_keys"])


def _preprocessor(
    config: TeacherConfig, image_size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> TeacherPreprocessor:
    """The configuration's pixels, with these values where it leaves them open."""
    mean, std = config.mean or mean, config.std or std
    interpolation, fit = config.interpolation or "bicubic", config.fit or "center_crop"
    return TeacherPreprocessor(config.image_size or image_size, mean, std, interpolation, fit)


def preprocessor_of_transformers(config: TeacherConfig) -> TeacherPreprocessor:
    """
    The configuration's pixels, with the values of the model's image processor where it leaves them open.

    Raises:
        ValueError: if there is no image processor, or it does something else than to make squares.
    """
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
        size = processor.size
        resample = {value: key for key, value in INTERPOLATIONS.items()}.get(processor.resample)
        scaled = processor.do_rescale and abs(processor.rescale_factor * 255 - 1) < 1e-6
        normalized = processor.do_normalize
        read = {
            "image_size": square_size(processor),
            "mean": (tuple(processor.image_mean) if normalized else (0.0, 0.0, 0.0)) if scaled else None,
            "std": (tuple(processor.image_std) if normalized else (1.0, 1.0, 1.0)) if scaled else None,
            "interpolation": resample,
        }
        # SAM's image processor; others with a longest edge do not say how they fit the shorter one
        zero_pad = getattr(processor, "do_pad", False) and size.get("longest_edge") and not size.get("shortest_edge")
        fit = fit or ("zero_pad" if zero_pad else "center_crop")
        given = {field: read[field] if value is None else value for field, value in given.items()}
        if unknown := [field for field, value in given.items() if value is None]:
            raise ValueError(
                f"Teacher {config.name}: {type(processor).__name__} gives no {unknown} for square input scaled by "
                f"1/255 (size {processor.size}, resample {processor.resample}); set them in its configuration."
            )
    return TeacherPreprocessor(**given, fit=fit or "center_crop")


def load_clip(config: TeacherConfig, weights: bool = True) -> Loaded:
    """A CLIP tower cut to the layer that is distilled."""
    if not (kind := _read_config(config).model_type).startswith("clip"):
        raise ValueError(
            f"Teacher clip: {config.model} is of type {kind!r}, but the teacher of this name must be a CLIP. Give it "
            "another name."
        )
    clip, _ = _read_model(config, CLIPVisionModel, weights)
    preprocessor = preprocessor_of_transformers(config)
    model = MoveKDVisionModel.from_clip(clip, -2 if config.output is None else int(config.output), num_experts=0)
    interpolate = model.config.image_size != preprocessor.image_size
    return model, partial(clip_features, interpolate), preprocessor


def load_transformers(config: TeacherConfig, weights: bool = True) -> Loaded:
    """The vision part of any model that takes `pixel_values`, or of Pix2Struct."""
    if _read_config(config).model_type == "pix2struct":
        return _load_pix2struct(config, weights)
    model, pools = _read_model(config, AutoModel, weights)
    try:
        model = vision_part(model)
    except ValueError as error:
        raise ValueError(f"Teacher {config.name}: {error}") from error
    preprocessor = preprocessor_of_transformers(config)
    arguments = forward_arguments(model, preprocessor.image_size, isinstance(config.output, int))
    read = partial(transformers_features, config.output, arguments, layout=config.layout, pools=pools)
    return model, read, preprocessor


def _load_pix2struct(config: TeacherConfig, weights: bool) -> Loaded:
    if config.output is not None or config.layout != "map":
        raise ValueError(
            f"Teacher {config.name}: Pix2Struct gives its last hidden state as a map; found output {config.output!r} "
            f"and layout {config.layout!r}."
        )
    model, _ = _read_model(config, Pix2StructForConditionalGeneration, weights)
    encoder = model.encoder
    preprocessor = _preprocessor(config, 1024, CLIP_MEAN, CLIP_STD)
    return encoder, partial(pix2struct_features, preprocessor.mean, preprocessor.std), preprocessor


def load_eva02(config: TeacherConfig, weights: bool = True) -> Loaded:
    """EVA-02's detection backbone, from a detector's checkpoint or a folder that `save_pretrained` wrote."""
    if config.file is None and not os.path.isfile(config.model):
        model, _ = _read_model(config, Eva02DetectionBackbone, weights)
    else:
        architecture = Eva02DetectionConfig()
        if os.path.isfile(os.path.join(config.model, "config.json")):
            architecture = Eva02DetectionConfig.from_pretrained(config.model)
        if weights:
            file: Any = config.model
            try:
                if config.file is not None:
                    file = cached_file(config.model, config.file, revision=config.revision)
            except OSError as error:
                raise ValueError(f"Teacher {config.name}: {config.model} has no {config.file}: {error}") from error
            model = load_backbone(architecture, file)
        else:
            model = Eva02DetectionBackbone(architecture)
    preprocessor = _preprocessor(config, model.config.image_size, IMAGENET_MEAN, IMAGENET_STD)
    arguments = forward_arguments(model, preprocessor.image_size, isinstance(config.output, int))
    return model, partial(transformers_features, config.output, arguments, layout=config.layout), preprocessor


def load_timm(config: TeacherConfig, weights: bool = True) -> Loaded:
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
    # timm reads some variants non-strictly and only logs the missing keys
    builder, log = logging.getLogger("timm.models._builder"), BufferingHandler(capacity=1000)
    level = builder.level
    builder.addHandler(log)
    builder.setLevel(logging.INFO)
    try:
        model = timm.create_model(pretrained=weights, **timm.models.resolve_model_input_args(source, size))
    finally:
        builder.setLevel(level)
        builder.removeHandler(log)
    reports = [re.match(r"Missing keys \((.*?)\)", record.getMessage()) for record in log.buffer]
    missing = [key for report in reports if report for key in report[1].split(", ")]
    if lacking := on_feature_path(missing):
        raise ValueError(f"Teacher {config.name}: {config.model} lacks: {lacking}.")
    is_classifier = model.num_classes > 0
    model.reset_classifier(0)
    # A mean over the patches that neither a classifier nor weights of its own ever read is no summary
    pooling = pooling_weights(dict(model.named_parameters()))
    pools = (is_classifier or bool(pooling)) and not set(pooling) & set(missing)
    settings = timm.data.resolve_model_data_config(model, size)
    height, width = settings["input_size"][-2:]
    interpolation = config.interpolation or settings["interpolation"]
    if height != width or interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"Teacher {config.name}: {config.model} asks for {height}x{width} pixels, {interpolation}; squares can be "
            f"given, resized by {[*INTERPOLATIONS]}: set image_size and interpolation in its configuration."
        )
    mean, std = config.mean or tuple(settings["mean"]), config.std or tuple(settings["std"])
    preprocessor = TeacherPreprocessor(height, mean, std, interpolation, config.fit or "center_crop")
    return model, partial(timm_features, config.output, pools=pools), preprocessor


LOADERS = {"transformers": load_transformers, "timm": load_timm, "eva02": load_eva02}


def _warn_unpinned(config: TeacherConfig) -> None:
    """Say once a run that the branch which was read may hold other weights tomorrow."""
    source = hub_revision(config)
    if source is None or re.fullmatch(COMMIT, source[1]) or os.environ.get("RANK", "0") != "0":
        return
    commit = teacher_commit(config)
    key = f"name: {config.name}" if config.name in TEACHERS else f"model: {config.model}"
    logger.warning(
        f"Teacher {config.name} is not pinned: {source[0]} was read at {source[1]}, "
        f"{'an unknown commit' if commit is None else f'now commit {commit}'}. To pin it, write "
        f"{{{key}, revision: {commit or 'COMMIT'}}} in `teachers`."
    )


def load_teacher(
    config: TeacherConfig, device: torch.device | str | None = None, weights: bool = True
) -> FrozenTeacher:
    """
    Read a teacher, strictly.

    Args:
        config: As [`resolve_teacher`] gives it.
        device (*optional*): Where the teacher runs; by default the CPU.
        weights (*optional*, defaults to `True`): `False` reads configurations alone and builds the teacher on the meta
            device, unmeasured.

    Raises:
        ValueError: if the file lacks a weight that the features pass through, or holds more than a tower and its
            heads, naming the keys; if the preprocessing configuration is absent or of an unknown kind.
    """
    config = resolve_teacher(config)
    loader = load_clip if config.name == "clip" else LOADERS[str(config.loader)]
    try:
        with nullcontext() if weights else torch.device("meta"):
            model, features, preprocessor = loader(config, weights)
    except RuntimeError as error:  # how both libraries report missing keys and sizes that do not fit
        raise ValueError(f"Teacher {config.name}: {config.model} cannot be read fully: {error}") from error
    if weights:
        _warn_unpinned(config)
    return FrozenTeacher(config, model.to(device=device, dtype=DTYPES[config.dtype]), features, preprocessor, weights)
