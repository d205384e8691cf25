"""The loaders of [`train.teachers.config`]: transformers and timm, and EVA-02's file."""

import inspect
import logging
import os
import re
from collections.abc import Callable
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
)
from transformers.utils import cached_file

from modeling_movekd import MoveKDVisionModel
from train.teachers.config import COMMIT, DTYPES, TEACHERS, TeacherConfig, cached_commit, hub_revision, resolve_teacher
from train.teachers.eva02 import Eva02DetectionBackbone, Eva02DetectionConfig, load_backbone
from train.teachers.features import (
    OFF_THE_FEATURE_PATH,
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

# Where a composite model of transformers (CLIP, SigLIP, SAM, LLaVA, ...) keeps its vision part
VISION_PARTS = ("vision_model", "vision_encoder", "vision_tower", "visual")
# What a file may hold beyond the tower
_BEYOND_THE_TOWER = re.compile(
    r"([^.]+\.)?(((cls_|distillation_)?classifier|(lm_)?head|decode(r|_head)|text_model|(text|visual)_projection)\.|logit_)"
)


# A loader gives the model, the function that takes it and its pixels to features, and the preprocessor.
Loaded = tuple[nn.Module, Callable[[nn.Module, torch.Tensor], TeacherFeatures], TeacherPreprocessor]


def _read_strictly(config: TeacherConfig, auto_class: Any) -> Any:
    model, info = auto_class.from_pretrained(
        config.model,
        revision=config.revision,
        dtype=DTYPES[config.dtype],
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
    )
    missing = sorted(key for key in info["missing_keys"] if not OFF_THE_FEATURE_PATH.search(key))
    unexpected = sorted(key for key in info["unexpected_keys"] if not _BEYOND_THE_TOWER.match(key))
    for problem, keys in (
        ("lacks", missing),
        ("does not fit in", info["mismatched_keys"]),
        ("has beyond the model", unexpected),
    ):
        if keys:
            raise ValueError(f"Teacher {config.name}: {config.model} {problem}: {sorted(keys)}.")
    while part := next((name for name in VISION_PARTS if isinstance(getattr(model, name, None), nn.Module)), None):
        model = getattr(model, part)
    return model


def _preprocessor(
    config: TeacherConfig, image_size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> TeacherPreprocessor:
    """For a model whose file says nothing of its pixels: what the configuration leaves open is as given here."""
    mean, std = config.mean or mean, config.std or std
    interpolation, fit = config.interpolation or "bicubic", config.fit or "centre_crop"
    return TeacherPreprocessor(config.image_size or image_size, mean, std, interpolation, fit)


def preprocessor_of_transformers(config: TeacherConfig) -> TeacherPreprocessor:
    """
    As the configuration says, and where it leaves something open as the model's image processor does.

    Raises:
        ValueError: if there is none, or it does something else than to make squares.
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


def load_clip(config: TeacherConfig) -> Loaded:
    """A CLIP tower cut to the layer that is distilled."""
    clip = _read_strictly(config, CLIPVisionModel)
    preprocessor = preprocessor_of_transformers(config)
    model = MoveKDVisionModel.from_clip(clip, -2 if config.output is None else int(config.output), num_experts=0)
    interpolate = model.config.image_size != preprocessor.image_size
    return model, partial(clip_features, interpolate), preprocessor


def load_transformers(config: TeacherConfig) -> Loaded:
    """The vision part of any model that takes `pixel_values`, or of Pix2Struct."""
    code = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if AutoConfig.from_pretrained(config.model, **code).model_type == "pix2struct":
        return _load_pix2struct(config)
    model = _read_strictly(config, AutoModel)
    accepted = inspect.signature(model.forward).parameters
    if "pixel_values" not in accepted:
        raise ValueError(f"Teacher {config.name}: {type(model).__name__} takes {[*accepted]} and no `pixel_values`.")
    preprocessor = preprocessor_of_transformers(config)
    size, native = preprocessor.image_size, getattr(model.config, "image_size", None)
    arguments: dict[str, Any] = {}
    if "interpolate_pos_encoding" in accepted and native not in (size, [size, size], (size, size)):
        arguments["interpolate_pos_encoding"] = True
    if isinstance(config.output, int):
        arguments["output_hidden_states"] = True
    return model, partial(transformers_features, config.output, arguments, layout=config.layout), preprocessor


def _load_pix2struct(config: TeacherConfig) -> Loaded:
    if config.output is not None or config.layout != "map":
        raise ValueError(
            f"Teacher {config.name}: Pix2Struct gives its last hidden state as a map; found output {config.output!r} "
            f"and layout {config.layout!r}."
        )
    encoder = _read_strictly(config, Pix2StructForConditionalGeneration).encoder
    preprocessor = _preprocessor(config, 1024, CLIP_MEAN, CLIP_STD)
    return encoder, partial(pix2struct_features, preprocessor.mean, preprocessor.std), preprocessor


def load_eva02(config: TeacherConfig) -> Loaded:
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
    return model, partial(transformers_features, config.output, arguments, layout=config.layout), preprocessor


def load_timm(config: TeacherConfig) -> Loaded:
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
    builder, log = logging.getLogger("timm.models._builder"), BufferingHandler(capacity=1000)
    level = builder.level
    builder.addHandler(log)
    builder.setLevel(logging.INFO)
    try:
        model = timm.create_model(pretrained=True, **timm.models.resolve_model_input_args(source, size))
    finally:
        builder.setLevel(level)
        builder.removeHandler(log)
    reports = [re.match(r"Missing keys \((.*?)\)", record.getMessage()) for record in log.buffer]
    missing = [key for report in reports if report for key in report[1].split(", ")]
    if missing := [key for key in missing if not OFF_THE_FEATURE_PATH.search(key)]:
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
    return model, partial(timm_features, config.output), preprocessor


LOADERS = {"transformers": load_transformers, "timm": load_timm, "eva02": load_eva02}


def _warn_unpinned(config: TeacherConfig) -> None:
    """Once a run: what was read may be something else tomorrow."""
    source = hub_revision(config)
    if source is None or re.fullmatch(COMMIT, source[1]) or os.environ.get("RANK", "0") != "0":
        return
    commit = cached_commit(config)
    key = f"name: {config.name}" if config.name in TEACHERS else f"model: {config.model}"
    logger.warning(
        f"Teacher {config.name} is not pinned: {source[0]} was read at {source[1]}, "
        f"{'an unknown commit' if commit is None else f'now commit {commit}'}. To pin it, write "
        f"{{{key}, revision: {commit or 'COMMIT'}}} in `teachers`."
    )


def load_teacher(config: TeacherConfig, device: torch.device | str | None = None) -> FrozenTeacher:
    """
    Read a teacher, strictly.

    Args:
        config: As [`resolve_teacher`] gives it.
        device: Where it runs, the CPU if None.

    Raises:
        ValueError: if a weight that the features pass through is not in the file, or the file holds more than a tower
            and its heads, with the keys; if the preprocessing configuration is absent or of an unknown kind.
    """
    config = resolve_teacher(config)
    loader = load_clip if config.name == "clip" else LOADERS[str(config.loader)]
    try:
        model, features, preprocessor = loader(config)
    except RuntimeError as error:  # how both libraries report missing keys and sizes that do not fit
        raise ValueError(f"Teacher {config.name}: {config.model} cannot be read fully: {error}") from error
    _warn_unpinned(config)
    return FrozenTeacher(config, model.to(device=device, dtype=DTYPES[config.dtype]), features, preprocessor)
