"""Teachers as data: a [`TeacherConfig`] for each frozen vision model whose patch features the student learns from.

A model's id is enough. Its own preprocessing configuration says the image size, the mean and the standard deviation;
the features of one blank image say the grid and the width.
"""

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from hub.weights import DTYPES
from modeling_movekd.files import cached_commit, read_json
from train.teachers.eva02 import Eva02DetectionConfig
from train.teachers.preprocessing import CLIP_MEAN, CLIP_STD, FITS, IMAGENET_MEAN, IMAGENET_STD, INTERPOLATIONS


COMMIT = r"[0-9a-f]{40}"
LOADERS = ("transformers", "timm", "eva02")
LAYOUTS = ("map", "interleaved")


@dataclass
class TeacherConfig:
    """
    One teacher.

    Args:
        name: Short name, used in logs (`kd/{name}`) and as the key of the teacher's adapters or heads. `"clip"` is the
            CLIP model that the student started from; only this teacher gives the [CLS] embedding and attention.
        model: Hub id, folder, or timm name (also `hf-hub:ID` and `local-dir:FOLDER`); for EVA-02's detection backbone
            also a detector's checkpoint (`.pth` or `.safetensors`).
        loader (*optional*): `"transformers"`, `"timm"` or `"eva02"`; by default inferred from `model`.
        file (*optional*): Path of the checkpoint inside `model`; for `"eva02"` only.
        revision (*optional*): Branch, tag or commit on the Hub. By default the main branch is read, and the log says
            how to pin it.
        image_size (*optional*): Side in pixels of the square input; by default that of the preprocessing
            configuration.
        mean (*optional*): Per-channel mean of pixels in [0, 1]; same default.
        std (*optional*): Per-channel standard deviation of pixels in [0, 1]; same default.
        interpolation (*optional*): `"bicubic"` or `"bilinear"`; same default.
        fit (*optional*): How the teacher's own geometry makes a square: `"center_crop"` or `"zero_pad"` (see
            [`~train.teachers.preprocessing.TeacherPreprocessor`]); same default.
        output (*optional*): Which output to distill: an integer for that entry of the hidden states (timm: of the
            intermediate features), or the name of a field of a transformers model's output that holds patches alone.
            By default the last hidden state. For `"clip"` an integer, by default -2, the layer LLaVA reads.
        layout (*optional*, defaults to `"map"`): `"map"`, or `"interleaved"`: the feature map as the original code
            reads SAM's (see [`train.teachers.features.interleave`]); for the original checkpoints only.
        dtype (*optional*, defaults to `"float32"`): `"float32"`, `"bfloat16"` or `"float16"`, whatever the student's.
        trust_remote_code (*optional*, defaults to `False`): Run code from the Hub; `revision` must then be a full
            commit hash.
        license (*optional*): License of the weights.
        num_parameters (*optional*): Size of the published vision tower without heads.
        output_shape (*optional*): `(h * w, width)` of one image's features.

    Raises:
        ValueError: for a value outside the choices above.
    """

    name: str
    model: str
    loader: str | None = None
    file: str | None = None
    revision: str | None = None
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    fit: str | None = None
    output: int | str | None = None
    layout: str = "map"
    dtype: str = "float32"
    trust_remote_code: bool = False
    license: str | None = None
    num_parameters: int | None = None
    output_shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(
                f"Teacher name {self.name!r}: only letters, digits, '-' and '_' can be used in state-dict keys."
            )
        if self.fit == "centre_crop":
            warnings.warn(
                f"Teacher {self.name}: fit 'centre_crop' is now 'center_crop'; the next release refuses the old name.",
                FutureWarning,
                stacklevel=2,
            )
            self.fit = "center_crop"
        choices = {
            "loader": (None, *LOADERS),
            "interpolation": (None, *INTERPOLATIONS),
            "fit": (None, *FITS),
            "layout": LAYOUTS,
            "dtype": tuple(DTYPES),
        }
        for field, values in choices.items():
            if getattr(self, field) not in values:
                raise ValueError(
                    f"Teacher {self.name}: {field} is {getattr(self, field)!r}, expected one of {values}."
                )
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(
                f"Teacher {self.name}: image_size is {self.image_size}, expected a positive number of pixels."
            )
        for field in ("mean", "std"):
            value = getattr(self, field)
            if value is not None:
                if len(value) != 3:
                    raise ValueError(f"Teacher {self.name}: {field} has {len(value)} values {value}, expected 3.")
                setattr(self, field, tuple(float(channel) for channel in value))
        if self.name == "clip" and (self.loader == "timm" or isinstance(self.output, str)):
            raise ValueError(
                f"Teacher clip is a hidden state of a transformers model, found loader {self.loader!r} and output "
                f"{self.output!r}."
            )
        if self.file is not None and self.loader not in (None, "eva02"):
            raise ValueError(f"Teacher {self.name}: loader {self.loader!r} reads no single file {self.file!r}.")
        if self.layout != "map" and (self.name == "clip" or self.loader == "timm"):
            raise ValueError(f"Teacher {self.name}: layout {self.layout!r} is of a feature map of transformers.")
        if self.trust_remote_code and not re.fullmatch(COMMIT, self.revision or ""):
            raise ValueError(
                f"Teacher {self.name}: trust_remote_code runs code of {self.model}; set revision to the full commit "
                f"hash that was read (40 hex digits), found {self.revision!r}."
            )


_CLIP_PIXELS: dict[str, Any] = {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic"}
_IMAGENET_PIXELS: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic"}

# Rows without a revision read the main branch, and the log says so.
TEACHERS: dict[str, TeacherConfig] = {
    row.name: row
    for row in (
        TeacherConfig(
            "clip",
            "openai/clip-vit-large-patch14-336",
            "transformers",
            revision="ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
            image_size=336,
            **_CLIP_PIXELS,
            license="mit",
            num_parameters=303_507_456,
            output_shape=(576, 1024),
        ),
        # The detector's own pixels; the original code gives it CLIP's
        TeacherConfig(
            "eva02",
            "Yuxin-CV/EVA-02",
            "eva02",
            file="eva02/det/eva02_L_coco_det_sys_o365.pth",
            image_size=1024,
            **_IMAGENET_PIXELS,
            license="mit",
            num_parameters=303_388_608,
            output_shape=(4096, 1024),
        ),
        TeacherConfig(
            "convnext",
            "convnext_xxlarge.clip_laion2b_soup",
            "timm",
            image_size=1024,
            **_CLIP_PIXELS,
            license="apache-2.0",
            num_parameters=843_391_872,
            output_shape=(1024, 3072),
        ),
        TeacherConfig(
            "sam",
            "facebook/sam-vit-large",
            "transformers",
            image_size=1024,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            interpolation="bilinear",
            fit="zero_pad",
            license="apache-2.0",
            num_parameters=308_278_272,
            output_shape=(4096, 256),
        ),
        # Pix2Struct standardizes each image itself, after mean and standard deviation are undone
        TeacherConfig(
            "pix2struct",
            "google/pix2struct-large",
            "transformers",
            image_size=1024,
            **_CLIP_PIXELS,
            license="apache-2.0",
            num_parameters=512_812_032,
            output_shape=(1024, 1536),
        ),
        TeacherConfig(
            "dinov2",
            "facebook/dinov2-large",
            "transformers",
            revision="47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
            image_size=518,
            license="apache-2.0",
            num_parameters=304_368_640,
            output_shape=(1369, 1024),
        ),
        TeacherConfig(
            "dinov3",
            "facebook/dinov3-vitl16-pretrain-lvd1689m",
            "transformers",
            revision="ea8dc2863c51be0a264bab82070e3e8836b02d51",
            image_size=512,
            license="dinov3-license",
            num_parameters=303_129_600,
            output_shape=(1024, 1024),
        ),
        TeacherConfig(
            "siglip2",
            "google/siglip2-large-patch16-384",
            "transformers",
            license="apache-2.0",
            num_parameters=303_688_704,
            output_shape=(576, 1024),
        ),
        TeacherConfig(
            "c-radio",
            "vit_large_patch16_radio_v3.c_radio",
            "timm",
            license="nvidia-open-model-license",
            num_parameters=304_202_752,
            output_shape=(1024, 1024),
        ),
    )
}

# How the original code differs: timm takes its string for a flag and resolves the model's default tag, EVA gets CLIP's
# pixels, and a reshape interleaves SAM's channels with its positions.
RELEASED_TEACHERS: dict[str, dict[str, Any]] = {
    "eva02": {"mean": CLIP_MEAN, "std": CLIP_STD},
    "convnext": {"model": "convnext_xxlarge.clip_laion2b_soup_ft_in1k"},
    "sam": {"layout": "interleaved"},
}


def resolve_teacher(spec: str | Mapping[str, Any] | TeacherConfig, released: bool = False) -> TeacherConfig:
    """
    The configuration that a name in a recipe or on the command line stands for.

    Args:
        spec: The name of a built-in row; a Hub id, folder or timm name, whose last part becomes the teacher's name; or
            a mapping of [`TeacherConfig`] fields, which changes a built-in row if it names one and no other model.
        released (*optional*, defaults to `False`): Read the teachers in `RELEASED_TEACHERS` as the original code does,
            also from a folder. A mapping's own fields still count; a [`TeacherConfig`] is left as it is.

    Raises:
        ValueError: for an unknown name or field, or a folder that neither transformers nor timm wrote.
    """
    if isinstance(spec, str):
        spec = {"name": spec} if spec in TEACHERS else {"model": spec}
    if isinstance(spec, TeacherConfig):
        config = spec
    else:
        fields = [field.name for field in dataclasses.fields(TeacherConfig)]
        if unknown := sorted(set(spec) - set(fields)):
            raise ValueError(f"Teacher {dict(spec)} has unknown fields {unknown}; known are {fields}.")
        row = TEACHERS.get(spec.get("name", ""))
        changes = RELEASED_TEACHERS.get(spec.get("name", ""), {}) if released else {}
        if row is not None and spec.get("model", row.model) in (row.model, changes.get("model")):
            # `output_shape` is that of the row's own size and output
            shape = None if {"image_size", "output"} & spec.keys() else row.output_shape
            config = dataclasses.replace(row, **{"output_shape": shape, **changes, **spec})
        elif "model" in spec:
            name = re.sub(r"^(hf-hub|local-dir):|@[^@/]*$", "", str(spec["model"])).rstrip("/").split("/")[-1]
            config = TeacherConfig(**{"name": re.sub(r"[^A-Za-z0-9_-]", "_", name), **changes, **spec})
        else:
            raise ValueError(
                f"Teacher {dict(spec)} names no model; give `model`, or a built-in name: {list(TEACHERS)}."
            )
    return dataclasses.replace(config, loader=config.loader or _infer_loader(config.model))


def _infer_loader(model: str) -> str:
    if os.path.isfile(model):
        return "eva02"
    if model.startswith(("hf-hub:", "local-dir:")):
        return "timm"
    if os.path.isdir(model):
        file = Path(model) / "config.json"
        keys = read_json(file) if file.is_file() else {}
        if "model_type" in keys:
            return "eva02" if keys["model_type"] == Eva02DetectionConfig.model_type else "transformers"
        if "architecture" in keys:
            return "timm"
        raise ValueError(
            f"{model} has no config.json of transformers (`model_type`) or timm (`architecture`); set `loader`."
        )
    if "/" in model:
        return "timm" if model.startswith("timm/") else "transformers"
    if timm.is_model(model.split(".")[0]):
        return "timm"
    raise ValueError(
        f"{model!r} is no built-in teacher, folder, timm model or Hub id (owner/name). Built in are {list(TEACHERS)}."
    )


def hub_revision(config: TeacherConfig) -> tuple[str, str] | None:
    """The Hub repository and revision that a resolved teacher is read from; None for files on this machine."""
    model, _, revision = config.model.removeprefix("hf-hub:").partition("@")
    if os.path.exists(model) or model.startswith("local-dir:"):
        return None
    if config.loader == "timm" and "/" not in model:
        pretrained = timm.get_pretrained_cfg(model, allow_unregistered=True)
        model = "" if pretrained is None else pretrained.hf_hub_id or ""
    return (model, config.revision or revision or "main") if model else None


def teacher_commit(config: TeacherConfig) -> str | None:
    """The commit that a resolved teacher was read at, as far as the local cache knows. Nothing is asked online."""
    source = hub_revision(config)
    if source is None or re.fullmatch(COMMIT, source[1]):
        return None if source is None else source[1]
    return cached_commit(*source)
