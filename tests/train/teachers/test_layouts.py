"""Teachers whose features take a way of their own: Pix2Struct's patches, and SAM's layout in the authors' code."""

from pathlib import Path

import pytest
import torch
from transformers import (
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    Pix2StructImageProcessor,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from transformers.models.pix2struct.image_processing_pil_pix2struct import Pix2StructImageProcessorPil

from train.teachers.config import resolve_teacher
from train.teachers.features import interleave, pix2struct_patches
from train.teachers.loaders import load_teacher
from train.teachers.preprocessing import CLIP_MEAN, CLIP_STD, TeacherPreprocessor


def save_pix2struct(folder: Path) -> tuple[str, Pix2StructForConditionalGeneration]:
    vision = {"hidden_size": 16, "d_kv": 8, "d_ff": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 9, "hidden_size": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = Pix2StructForConditionalGeneration(Pix2StructConfig(vision_config=vision, text_config=text)).eval()
    model.save_pretrained(folder)
    return str(folder), model


def images(size: int) -> torch.Tensor:
    """Whole numbers from 0 to 255; the second image has one colour."""
    values = torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(0)).float()
    values[1] = 200
    return values


def test_pix2struct_is_that_of_the_library(tmp_path: Path) -> None:
    folder, model = save_pix2struct(tmp_path)
    teacher = load_teacher(resolve_teacher({"model": folder, "image_size": 96}))
    assert teacher.preprocessor == TeacherPreprocessor(96, CLIP_MEAN, CLIP_STD)
    assert (teacher.grid, teacher.width) == ((32, 32), 16)

    values = images(96)
    inputs = Pix2StructImageProcessorPil()([image.numpy() for image in values], return_tensors="pt")
    assert inputs["attention_mask"].sum(dim=1).tolist() == [45 * 45] * 2
    patches = pix2struct_patches(values)
    torch.testing.assert_close(patches, inputs["flattened_patches"][:, : 45 * 45], rtol=1e-4, atol=1e-4)
    mean, std = (torch.tensor(channels).view(3, 1, 1) for channels in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        hidden = model.encoder(**inputs).last_hidden_state[:, : 45 * 45]
    tokens = teacher((values / 255 - mean) / std).tokens.view(2, 32, 32, 16)
    torch.testing.assert_close(teacher(values.byte()).tokens.view_as(tokens), tokens, rtol=1e-4, atol=1e-4)
    # corners lie on corners
    corners = hidden.view(2, 45, 45, 16)[:, [0, 0, 44, 44], [0, 44, 0, 44]]
    torch.testing.assert_close(tokens[0, [0, 0, 31, 31], [0, 31, 0, 31]], corners[0], rtol=1e-4, atol=1e-4)

    low = load_teacher(resolve_teacher({"model": folder, "image_size": 96, "dtype": "bfloat16"}))
    difference = low((values / 255 - mean) / std).tokens[0].float() - tokens[0].flatten(0, 1)
    assert difference.abs().mean() < 0.03 * tokens[0].abs().mean()


def test_an_image_of_one_colour_stays_finite() -> None:
    patches = pix2struct_patches(torch.full((1, 3, 64, 64), 128.0))
    assert torch.equal(patches[..., 2:], torch.zeros_like(patches[..., 2:]))
    assert Pix2StructImageProcessor().max_patches == 2048  # what 45 x 45 comes from


@pytest.mark.parametrize("change", [{"output": 1}, {"layout": "interleaved"}])
def test_pix2struct_has_one_output(change: dict, tmp_path: Path) -> None:
    folder, _ = save_pix2struct(tmp_path)
    with pytest.raises(ValueError, match="Pix2Struct gives its last hidden state as a map"):
        load_teacher(resolve_teacher({"model": folder, **change}))


def test_a_missing_tensor_of_pix2struct_raises(tmp_path: Path) -> None:
    folder, model = save_pix2struct(tmp_path)
    state_dict = model.state_dict()
    del state_dict["encoder.encoder.layer.1.mlp.wo.weight"]
    model.save_pretrained(folder, state_dict=state_dict)
    with pytest.raises(ValueError, match=r"lacks: \['encoder\.encoder\.layer\.1\.mlp\.wo\.weight'\]"):
        load_teacher(resolve_teacher({"model": folder, "image_size": 96}))


def test_interleaved_layout_mixes_channels_with_positions(tmp_path: Path) -> None:
    feature_map = torch.arange(2 * 8 * 2 * 2.0).view(2, 8, 2, 2)  # channels are 4 times the height
    mixed = interleave(feature_map)
    assert mixed.shape == feature_map.shape and not torch.equal(mixed, feature_map)
    # each of the 2 columns as a 4 x 4 square, of which every second position of every second row is a channel
    for column in range(2):
        square = feature_map[1, :, :, column].reshape(4, 4)
        for row, offset in ((0, 0), (0, 1), (1, 0), (1, 1)):
            assert torch.equal(mixed[1, 4 * column + 2 * row + offset], square[row::2, offset::2])
    with pytest.raises(ValueError, match=r"found 5 \* 3 = 15"):
        interleave(torch.zeros(1, 5, 3, 3))
    with pytest.raises(ValueError, match=r"found 3 \* 3 = 9"):
        interleave(torch.zeros(1, 3, 3, 3))

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**size, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is of a feature map, found shape \(1, 17, 16\)"):
        load_teacher(resolve_teacher({"model": str(tmp_path), "layout": "interleaved"}))
