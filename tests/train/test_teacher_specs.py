"""What a teacher's specification stands for, and the pixels its preprocessor makes."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from train.teachers import TEACHERS, TeacherConfig, TeacherPreprocessor, resolve_teacher


SIZE = 32


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessor_is_that_of_the_library(interpolation: str) -> None:
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)) for side in (20, 32, 77)]
    preprocessor = TeacherPreprocessor(SIZE, (0.48, 0.45, 0.40), (0.26, 0.25, 0.27), interpolation)
    result = preprocessor(images)
    processor = ViTImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        resample=Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR,
        image_mean=[0.48, 0.45, 0.40],
        image_std=[0.26, 0.25, 0.27],
    )
    expected = processor(images, return_tensors="pt")["pixel_values"]
    assert result.shape == (3, 3, SIZE, SIZE) and result.dtype == torch.float32 and result.is_contiguous()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)

    copy = pickle.loads(pickle.dumps(preprocessor))
    assert copy == preprocessor and torch.equal(copy(images), result)
    assert preprocessor([]).shape == (0, 3, SIZE, SIZE)
    assert torch.equal(preprocessor([images[0].convert("L")]), preprocessor([images[0].convert("L").convert("RGB")]))


def test_specs_of_built_in_rows() -> None:
    for name, row in TEACHERS.items():
        assert resolve_teacher(name) == row == resolve_teacher({"name": name}) == resolve_teacher(row)
        assert row.name == name and row.loader in ("transformers", "timm")
    assert {"clip", "convnext", "sam"} <= set(TEACHERS)
    changed = resolve_teacher({"name": "sam", "dtype": "bfloat16"})
    assert changed.model == TEACHERS["sam"].model and changed.dtype == "bfloat16"
    assert TEACHERS["sam"].dtype == "float32"
    # another model under a row's name keeps nothing of the row
    assert resolve_teacher({"name": "convnext", "model": "owner/model"}).image_size is None


@pytest.mark.parametrize("row", [row for row in TEACHERS.values() if row.loader == "timm"], ids=lambda row: row.name)
def test_timm_rows_name_pretrained_models(row: TeacherConfig) -> None:
    assert row.model in timm.list_pretrained()


@pytest.mark.parametrize(
    ("model", "name", "loader"),
    [
        ("facebook/dinov2-with-registers-base", "dinov2-with-registers-base", "transformers"),
        ("timm/vit_large_patch14_dinov2.lvd142m", "vit_large_patch14_dinov2_lvd142m", "timm"),
        ("hf-hub:owner/model@main", "model", "timm"),
        ("convnext_tiny.in12k", "convnext_tiny_in12k", "timm"),
    ],
)
def test_specs_by_id(model: str, name: str, loader: str) -> None:
    config = resolve_teacher(model)
    assert (config.name, config.model, config.loader) == (name, model, loader)
    assert resolve_teacher({"model": model, "name": "mine"}).name == "mine"


def test_specs_by_folder(tmp_path: Path) -> None:
    (tmp_path / "detector.v2").mkdir()
    folder = f"{tmp_path}/detector.v2/"
    with pytest.raises(ValueError, match="no config.json"):
        resolve_teacher(folder)
    for content, loader in (({"model_type": "vit"}, "transformers"), ({"architecture": "resnet18"}, "timm")):
        (tmp_path / "detector.v2" / "config.json").write_text(json.dumps(content))
        config = resolve_teacher(folder)
        assert (config.name, config.loader) == ("detector_v2", loader)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("siglp2", "'siglp2' is no teacher of ours"),
        ({"name": "mine"}, "names no model"),
        ({"model": "owner/model", "size": 3}, r"unknown fields \['size'\]; known are \['name'"),
        ({"model": "owner/model", "name": "a.b"}, "Teacher name 'a.b'"),
        (
            {"model": "owner/model", "loader": "timmy"},
            r"loader is 'timmy', expected one of \(None, 'transformers', 'timm'\)",
        ),
        ({"model": "owner/model", "interpolation": "lanczos"}, "interpolation is 'lanczos'"),
        ({"model": "owner/model", "dtype": "int8"}, "dtype is 'int8'"),
        ({"model": "owner/model", "image_size": 0}, "image_size is 0"),
        ({"model": "owner/model", "mean": [0.5]}, "mean has 1 values"),
        ({"name": "clip", "loader": "timm"}, "Teacher clip is a hidden state .* found loader 'timm' and output None"),
        ({"name": "clip", "output": "pooler_output"}, "output 'pooler_output'"),
        ({"model": "owner/model", "trust_remote_code": True}, "40 hex digits.*found None"),
        ({"model": "owner/model", "trust_remote_code": True, "revision": "main"}, "found 'main'"),
    ],
)
def test_bad_specs_raise(spec: str | dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_teacher(spec)


def test_remote_code_with_a_pinned_commit_is_accepted() -> None:
    config = resolve_teacher({"model": "owner/model", "trust_remote_code": True, "revision": "0123456789" * 4})
    assert config.trust_remote_code
