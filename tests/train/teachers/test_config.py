"""What a teacher's specification stands for, and the pixels its preprocessor makes."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Pix2StructVisionConfig,
    Pix2StructVisionModel,
    SamVisionConfig,
    SamVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_movekd.images import pad_to_square
from train.teachers.config import RELEASED_TEACHERS, TEACHERS, TeacherConfig, hub_revision, resolve_teacher
from train.teachers.eva02 import Eva02DetectionBackbone, Eva02DetectionConfig
from train.teachers.features import pix2struct_features, timm_features, transformers_features
from train.teachers.preprocessing import CLIP_MEAN, CLIP_STD, TeacherPreprocessor


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


@pytest.mark.parametrize("shape", [(40, 30), (28, 50), (36, 36), (9, 97), (200, 4)])
def test_own_geometry_is_that_of_the_library(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8))
    mean, std = (0.48, 0.45, 0.40), (0.26, 0.25, 0.27)
    square = {"height": SIZE, "width": SIZE}
    settings = {"image_mean": list(mean), "image_std": list(std)}
    processors = {
        ("center_crop", "bicubic"): CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=square, **settings),
        ("zero_pad", "bilinear"): SamImageProcessorPil(size={"longest_edge": SIZE}, pad_size=square, **settings),
    }
    for (fit, interpolation), processor in processors.items():
        preprocessor = TeacherPreprocessor(SIZE, mean, std, interpolation, fit)
        expected = processor([image], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(preprocessor([image], stretch=False), expected, rtol=1e-5, atol=1e-5)
        sliver = preprocessor([image.resize((500, 1))], stretch=False)  # whose shorter edge rounds to nothing
        assert sliver.shape == (1, 3, SIZE, SIZE) and sliver[..., 0, :].abs().min() > 0
        whole = image.resize((SIZE, SIZE))
        assert torch.equal(preprocessor([whole], stretch=False), preprocessor([whole]))


@pytest.mark.parametrize("shape", [(640, 480), (480, 640), (333, 500), (97, 9), (300, 299), (1, 700), (20, 20)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_padding_is_not_resized_and_pixels_stay_the_same(shape: tuple[int, int], interpolation: str) -> None:
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8))
    for size, background in ((512, (122, 116, 104)), (336, (0, 1, 255)), (225, (9, 9, 9)), (28, (255, 255, 255))):
        preprocessor = TeacherPreprocessor(size, CLIP_MEAN, CLIP_STD, interpolation)
        expected = preprocessor.resize([pad_to_square(image, background)])
        assert torch.equal(preprocessor.resize([image], background=background), expected)


def test_specs_of_built_in_rows() -> None:
    for name, row in TEACHERS.items():
        assert resolve_teacher(name) == row == resolve_teacher({"name": name}) == resolve_teacher(row)
        assert row.name == name and row.loader in ("transformers", "timm", "eva02")
        assert row.license
    assert {"clip", "eva02", "convnext", "sam", "pix2struct"} <= set(TEACHERS)
    changed = resolve_teacher({"name": "sam", "dtype": "bfloat16"})
    assert changed.model == TEACHERS["sam"].model and changed.dtype == "bfloat16"
    assert TEACHERS["sam"].dtype == "float32"
    # another model under a row's name keeps nothing of the row
    assert resolve_teacher({"name": "convnext", "model": "owner/model"}).image_size is None


@pytest.mark.parametrize("row", [row for row in TEACHERS.values() if row.loader == "timm"], ids=lambda row: row.name)
def test_timm_rows_name_pretrained_models(row: TeacherConfig) -> None:
    for config in (row, resolve_teacher(row.name, released=True)):
        assert config.model in timm.list_pretrained()
        published = timm.get_pretrained_cfg(config.model)
        assert (config.license, config.mean or published.mean) == (published.license, published.mean)
        assert (config.std or published.std) == published.std


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
PIX2STRUCT = {"hidden_size": 1536, "d_ff": 3968, "num_hidden_layers": 18, "num_attention_heads": 24}
TOWERS = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**LARGE, intermediate_size=4096, image_size=336, patch_size=14)),
    "eva02": lambda: Eva02DetectionBackbone(Eva02DetectionConfig()),
    "convnext": lambda: timm.create_model("convnext_xxlarge", num_classes=0),
    "sam": lambda: SamVisionModel(SamVisionConfig(**LARGE, mlp_dim=4096, global_attn_indexes=[5, 11, 17, 23])),
    "pix2struct": lambda: Pix2StructVisionModel(Pix2StructVisionConfig(**PIX2STRUCT)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**LARGE, image_size=518, patch_size=14)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**LARGE, intermediate_size=4096, num_register_tokens=4)),
    "siglip2": lambda: SiglipVisionModel(SiglipVisionConfig(**LARGE, intermediate_size=4096, image_size=384)),
    "c-radio": lambda: timm.create_model("vit_large_patch16_radio_v3", num_classes=0),
}


@pytest.mark.parametrize("row", TEACHERS.values(), ids=lambda row: row.name)
def test_facts_of_a_row(row: TeacherConfig) -> None:
    """Parameters and output shape of the published architecture, counted without its weights."""
    with torch.device("meta"):
        model = TOWERS[row.name]().eval()
        pixels = torch.zeros(1, 3, *[row.image_size or {"siglip2": 384, "c-radio": 512}[row.name]] * 2)
    counted = sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith("head."))
    assert counted == row.num_parameters
    if row.name == "pix2struct":  # looks into its mask, so one layer is run for the shape
        model = Pix2StructVisionModel(Pix2StructVisionConfig(**PIX2STRUCT | {"num_hidden_layers": 1}))
        pixels = torch.zeros(pixels.shape)
        features = partial(pix2struct_features, row.mean, row.std)
    else:
        features = partial(timm_features, None) if row.loader == "timm" else partial(transformers_features, None, {})
    with torch.no_grad():
        result = features(model, pixels)
    assert result.tokens.shape == (1, *row.output_shape)
    assert result.grid[0] * result.grid[1] == row.output_shape[0]


def test_teachers_as_the_authors_code_reads_them(tmp_path: Path) -> None:
    for name, row in TEACHERS.items():
        released = resolve_teacher(name, released=True)
        changed = {field for field in vars(row) if getattr(row, field) != getattr(released, field)}
        assert changed == set(RELEASED_TEACHERS.get(name, {}))
        assert resolve_teacher(released) == released
    assert resolve_teacher("convnext", released=True).model == "convnext_xxlarge.clip_laion2b_soup_ft_in1k"
    # said in so many words, it counts; so does a copy of the weights in a folder
    assert resolve_teacher({"name": "sam", "layout": "map"}, released=True).layout == "map"
    copy = {"name": "sam", "model": str(tmp_path), "loader": "transformers"}
    assert (resolve_teacher(copy).layout, resolve_teacher(copy, released=True).layout) == ("map", "interleaved")
    soup = {"name": "convnext", "model": TEACHERS["convnext"].model}
    assert resolve_teacher(soup, released=True).model == TEACHERS["convnext"].model
    assert resolve_teacher({"name": "mine", "model": "owner/sam"}, released=True).layout == "map"
    # another size has another shape
    assert resolve_teacher({"name": "sam", "dtype": "bfloat16"}).output_shape == (4096, 256)
    assert resolve_teacher({"name": "sam", "image_size": 512}).output_shape is None


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
        ("siglp2", "'siglp2' is no built-in teacher"),
        ({"name": "mine"}, "names no model"),
        ({"model": "owner/model", "size": 3}, r"unknown fields \['size'\]; known are \['name'"),
        ({"model": "owner/model", "name": "a.b"}, "Teacher name 'a.b'"),
        (
            {"model": "owner/model", "loader": "timmy"},
            r"loader is 'timmy', expected one of \(None, 'transformers', 'timm', 'eva02'\)",
        ),
        ({"model": "owner/model", "fit": "squash"}, "fit is 'squash', expected one of .*'zero_pad'"),
        ({"model": "owner/model", "layout": "rows"}, "layout is 'rows', expected one of .*'interleaved'"),
        ({"name": "convnext", "layout": "interleaved"}, "layout 'interleaved' is of a feature map of transformers"),
        ({"name": "sam", "file": "sam.pth"}, "loader 'transformers' reads no single file 'sam.pth'"),
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


def test_the_old_name_of_the_center_crop_is_accepted_for_one_release() -> None:
    with pytest.warns(FutureWarning, match="'centre_crop' is now 'center_crop'"):
        config = resolve_teacher({"model": "owner/model", "fit": "centre_crop"})
    assert config.fit == "center_crop"


def test_remote_code_with_a_pinned_commit_is_accepted() -> None:
    config = resolve_teacher({"model": "owner/model", "trust_remote_code": True, "revision": "0123456789" * 4})
    assert config.trust_remote_code


@pytest.mark.parametrize("row", TEACHERS.values(), ids=TEACHERS)
def test_every_row_says_what_it_is(row: TeacherConfig) -> None:
    assert row.license and row.num_parameters and row.output_shape
    assert row.revision is None or re.fullmatch("[0-9a-f]{40}", row.revision)
    assert not row.trust_remote_code
    repository, revision = hub_revision(resolve_teacher(row))
    assert repository.count("/") == 1 and revision == (row.revision or "main")


def test_where_a_teacher_is_read_from(tmp_path: Path) -> None:
    for spec in (str(tmp_path), f"local-dir:{tmp_path}"):
        assert hub_revision(TeacherConfig("eye", spec, "timm")) is None
    assert hub_revision(resolve_teacher("hf-hub:owner/eye@v2")) == ("owner/eye", "v2")
    assert hub_revision(resolve_teacher({"name": "sam", "revision": "v3"})) == ("facebook/sam-vit-large", "v3")


def test_a_model_of_the_hub_that_is_not_pinned_is_told(tmp_path: Path) -> None:
    """From a local cache as the Hub's client leaves it; a pinned one and a folder are read without a word."""
    commit, model = "0123456789" * 4, tmp_path / "model"
    config = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
    ViTModel(ViTConfig(**config, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(model)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(model)
    repository = tmp_path / "home" / "hub" / "models--owner--eye"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(model, repository / "snapshots" / commit)
    script = (
        "import sys\n"
        "from train.teachers.config import resolve_teacher, teacher_commit\n"
        "from train.teachers.loaders import load_teacher\n"
        "for spec in ('owner/eye', {'model': 'owner/eye', 'revision': sys.argv[2]}, sys.argv[1]):\n"
        "    teacher = load_teacher(resolve_teacher(spec))\n"
        "    print(teacher.name, teacher_commit(teacher.config))\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(model), commit]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["eye", commit, "eye", commit, "model", "None"]
    told = [line for line in finished.stderr.splitlines() if "not pinned" in line]
    assert len(told) == 1
    assert f"owner/eye was read at main, now commit {commit}" in told[0]
    assert f"{{model: owner/eye, revision: {commit}}}" in told[0]
