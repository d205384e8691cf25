"""EVA-02's detection backbone: what its attention sees, and which checkpoints are read."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from train.teachers.config import resolve_teacher
from train.teachers.eva02 import (
    Eva02DetectionBackbone,
    Eva02DetectionConfig,
    backbone_state_dict,
    load_backbone,
    rotary_tables,
)
from train.teachers.loaders import load_teacher
from train.teachers.preprocessing import CLIP_MEAN, IMAGENET_MEAN, IMAGENET_STD, TeacherPreprocessor


SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 40,
    "patch_size": 8,
    "pretrain_image_size": 56,
    "window_size": 3,
}


def build(**changes: Any) -> Eva02DetectionBackbone:
    model = Eva02DetectionBackbone(Eva02DetectionConfig(**{**SMALL, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def pixels(size: int = 40) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def checkpoint_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """As a detector saves it: with tables of the rotary embedding, and with more than the backbone."""
    tensors = {f"backbone.net.{key}": value for key, value in model.state_dict().items()}
    tensors["backbone.net.blocks.0.attn.rope.freqs_cos"] = torch.ones(9, 8)
    return tensors | {"backbone.simfp_4.0.weight": torch.ones(2, 2), "roi_heads.box_head.0.fc1.bias": torch.ones(2)}


def folder_of(model: Eva02DetectionBackbone, folder: Path, checkpoint: Any) -> dict[str, Any]:
    model.config.save_pretrained(folder)
    torch.save(checkpoint, folder / "detector.pth")
    return {"name": "eva02", "model": str(folder), "loader": "eva02", "file": "detector.pth"}


def test_the_published_architecture() -> None:
    with torch.device("meta"):
        model = Eva02DetectionBackbone(Eva02DetectionConfig())
    assert len(model.state_dict()) == 459
    assert [index for index, block in enumerate(model.blocks) if block.window_size is None] == [*range(2, 24, 3)]
    assert {block.window_size for block in model.blocks} == {None, 16}
    with pytest.raises(ValueError, match="`hidden_size` 24 over 4 heads is no multiple of 4"):
        Eva02DetectionConfig(**{**SMALL, "num_attention_heads": 4})


def test_windows_keep_to_themselves() -> None:
    changed = pixels()
    changed[:, :, 32:, 32:] += 1  # the last patch, in the last of 2 x 2 windows
    with torch.no_grad():
        for windowed, apart in (([0, 1, 2], True), ([0, 1], False), ([], False)):
            model = build(window_block_indexes=windowed)
            before, after = (model(x).last_hidden_state.view(2, 5, 5, 24) for x in (pixels(), changed))
            same = (before - after).abs().amax(dim=(0, 3)) == 0
            assert same[:3].all() == same[:, :3].all() == apart
            assert not same[3:, 3:].any()


def test_rotary_products_depend_on_the_offset_alone() -> None:
    cosine, sine = rotary_tables(4, 16)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 16, generator=generator)

    def turned(x: torch.Tensor, row: int, column: int) -> torch.Tensor:
        pairs = torch.stack([-x[1::2], x[0::2]], dim=-1).flatten()
        return x * cosine[4 * row + column] + pairs * sine[4 * row + column]

    product = turned(query, 0, 1) @ turned(key, 2, 2)
    torch.testing.assert_close(turned(query, 1, 2) @ turned(key, 3, 3), product)
    assert abs(turned(query, 0, 1) @ turned(key, 2, 3) - product) > 1e-3
    assert abs(turned(query, 0, 1) @ turned(key, 3, 2) - product) > 1e-3
    # a wider grid puts more positions over the same range
    torch.testing.assert_close(rotary_tables(8, 16)[0].view(8, 8, 16)[::2, ::2].flatten(0, 1), cosine)


NESTINGS = {
    "top level": lambda state: state,
    "model": lambda state: {"model": state, "iteration": 3},
    "module": lambda state: {"module": state},
    "ema_state": lambda state: {"ema_state": state},
    "beside raw weights": lambda state: {
        "model": {key: value * 2 for key, value in state.items()},
        "ema_state": state,
    },
    "nested": lambda state: {"model": {"ema_state": {"module": state}}},
    "below another module": lambda state: {"model": {f"student.{key}": value for key, value in state.items()}},
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_checkpoints_in_any_nesting(nesting: str, tmp_path: Path) -> None:
    model = build()
    spec = folder_of(model, tmp_path, NESTINGS[nesting](checkpoint_of(model)))
    state_dict = backbone_state_dict(tmp_path / "detector.pth")
    assert {key: value.tolist() for key, value in state_dict.items()} == {
        key: value.tolist() for key, value in model.state_dict().items()
    }
    teacher = load_teacher(resolve_teacher(spec))
    with torch.no_grad():
        expected = model(pixels()).last_hidden_state
    assert torch.equal(teacher(pixels()).tokens, expected)
    image = torch.arange(3 * 40 * 40).view(1, 3, 40, 40).byte()
    normalized = teacher.preprocessor.normalize(image)
    with torch.no_grad():
        torch.testing.assert_close(teacher(image).tokens, model(normalized).last_hidden_state, rtol=1e-5, atol=1e-5)
    assert (teacher.grid, teacher.width) == ((5, 5), 24)
    assert teacher.preprocessor == TeacherPreprocessor(40, IMAGENET_MEAN, IMAGENET_STD)
    assert load_teacher(resolve_teacher(spec, released=True)).preprocessor.mean == CLIP_MEAN


def test_safetensors_and_folders(tmp_path: Path) -> None:
    model = build()
    with torch.no_grad():
        outputs = model(pixels(), output_hidden_states=True)
    model.config.save_pretrained(tmp_path / "detector")
    save_file(checkpoint_of(model), tmp_path / "detector" / "detector.safetensors")
    model.save_pretrained(tmp_path / "backbone")
    folder = {"model": str(tmp_path / "detector"), "loader": "eva02", "file": "detector.safetensors"}
    for spec in (folder, str(tmp_path / "backbone")):
        teacher = load_teacher(resolve_teacher(spec))
        assert teacher.config.loader == "eva02"
        assert torch.equal(teacher(pixels()).tokens, outputs.last_hidden_state)
    second = load_teacher(resolve_teacher({**folder, "output": 2}))
    assert torch.equal(second(pixels()).tokens, outputs.hidden_states[2])
    larger = load_teacher(resolve_teacher({**folder, "image_size": 64}))
    assert larger.grid == (8, 8) and larger(pixels(64)).tokens.shape == (2, 64, 24)


def test_a_checkpoint_alone_is_taken_for_the_published_backbone(tmp_path: Path) -> None:
    torch.save(checkpoint_of(build()), tmp_path / "detector.pth")
    config = resolve_teacher({"name": "eva02", "model": str(tmp_path / "detector.pth")})
    assert config.loader == "eva02"
    with pytest.raises(ValueError, match=r"Missing key\(s\).*blocks\.23\.") as raised:
        with torch.device("meta"):  # the size is what is wrong, not worth its memory
            load_backbone(Eva02DetectionConfig(), config.model)
    assert "size mismatch for patch_embed.proj.weight" in str(raised.value)


def test_what_is_missing_or_left_over_is_named(tmp_path: Path) -> None:
    model = build()
    whole = checkpoint_of(model)
    lacking = {key: value for key, value in whole.items() if not key.endswith("blocks.1.attn.q_bias")}
    beyond = whole | {"backbone.net.blocks.3.norm1.weight": torch.ones(24)}
    other = whole | {"backbone.net.blocks.0.attn.proj.bias": torch.ones(12)}
    for checkpoint, message in (
        (lacking, r"Missing key\(s\).*blocks\.1\.attn\.q_bias"),
        (beyond, r"Unexpected key\(s\).*blocks\.3\.norm1\.weight"),
        (other, r"size mismatch for blocks\.0\.attn\.proj\.bias"),
        (whole | {"ema.backbone.net.pos_embed": torch.ones(1)}, "two backbones: a second pos_embed"),
        ({"model": model.state_dict()}, r"no tensor below 'backbone\.net\.'; it holds \['pos_embed'"),
        ([torch.ones(1)], "it holds <class 'list'>"),
    ):
        spec = resolve_teacher(folder_of(model, tmp_path, checkpoint))
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load_teacher(spec)
    model.save_pretrained(tmp_path / "backbone")
    lacking = {key: value for key, value in model.state_dict().items() if key != "blocks.2.attn.v_bias"}
    save_file(lacking, tmp_path / "backbone" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks: \['blocks\.2\.attn\.v_bias'\]"):
        load_teacher(resolve_teacher(str(tmp_path / "backbone")))
    with pytest.raises(ValueError, match="has no other.pth"):
        load_teacher(resolve_teacher({**folder_of(model, tmp_path, whole), "file": "other.pth"}))


class Payload:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": checkpoint_of(build()), "hook": Payload()}, tmp_path / "detector.pth")
    with pytest.raises(ValueError, match="Code in a checkpoint is never run"):
        backbone_state_dict(tmp_path / "detector.pth")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "detector.pth", weights_only=False)  # which does run it
    assert (tmp_path / "ran").exists()


def test_pixels_of_another_shape_raise() -> None:
    model = build()
    for shape in ((1, 3, 40, 32), (1, 3, 36, 36)):
        with pytest.raises(ValueError, match=f"Pixels are {shape[2]} x {shape[3]}"):
            model(torch.zeros(shape))
