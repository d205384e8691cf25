"""The teachers and their pixels against golden numbers of the authors' code: through `load_teacher`, the collator."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.models._hub import save_for_hf
from transformers import (
    LlavaProcessor,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    Pix2StructVisionConfig,
    PreTrainedTokenizerFast,
    SamConfig,
    SamModel,
    SamVisionConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from modeling_movekd.chat_templates import set_chat_template
from tests.helpers.parity import assert_values, cases, read_case, with_prefix
from train.data.collator import MoveKDCollator
from train.teachers.config import resolve_teacher
from train.teachers.eva02 import Eva02DetectionBackbone, Eva02DetectionConfig, rotary_tables
from train.teachers.features import FrozenTeacher, pix2struct_patches
from train.teachers.loaders import load_teacher
from train.teachers.preprocessing import CLIP_MEAN, CLIP_STD, TeacherPreprocessor


pytestmark = pytest.mark.parity

TOKENIZER = Path(__file__).parents[2] / "fixtures" / "parity" / "conversation" / "tokenizer"
TEACHERS = {"convnext": "convnext", "eva": "eva02", "sam": "sam"}


def eva02_config(metadata: dict[str, Any]) -> Eva02DetectionConfig:
    assert metadata["intp_freq"] and metadata["qkv_bias"] and metadata["mlp_ffn_ln"] and not metadata["subln"]
    assert metadata["mlp_hidden"] == int(metadata["embed_dim"] * metadata["mlp_ratio"])
    return Eva02DetectionConfig(
        hidden_size=metadata["embed_dim"],
        intermediate_size=metadata["mlp_hidden"],
        num_hidden_layers=metadata["depth"],
        num_attention_heads=metadata["num_heads"],
        image_size=metadata["img_size"],
        patch_size=metadata["patch_size"],
        num_channels=metadata["in_chans"],
        pretrain_image_size=metadata["pretrain_img_size"],
        window_size=metadata["window_size"],
        window_block_indexes=metadata["window_block_indexes"],
        rotary_grid_size=metadata["pt_hw_seq_len"],
        layer_norm_eps=metadata["norm_eps"],
    )


def assert_teacher(teacher: FrozenTeacher, tensors: dict[str, torch.Tensor], name: str) -> None:
    """The tokens of a teacher against `output`, a map or tokens."""
    expected = tensors["output"]
    features = teacher(tensors["pixel_values"])
    assert features.grid == teacher.grid
    if expected.dim() == 4:
        assert features.grid == tuple(expected.shape[2:])
        expected = expected.flatten(2).transpose(1, 2)
    assert_values(features.tokens, expected, name)


def test_eva02(parity_dir: Path, tmp_path: Path) -> None:
    for path in cases(parity_dir, "teacher_eva02/*.safetensors"):
        tensors, metadata = read_case(path)
        config = eva02_config(metadata)
        parameters = with_prefix(tensors, "param.")
        model = Eva02DetectionBackbone(config).eval()
        model.load_state_dict(parameters, strict=True)

        side = config.image_size // config.patch_size
        head_dim = config.hidden_size // config.num_attention_heads
        for kind, length in (("win", config.window_size), ("glb", side)):
            tables = rotary_tables(length, head_dim, config.rotary_grid_size)
            for function, table in zip(("cos", "sin"), tables, strict=True):
                name = f"rope_{kind}.freqs_{function}"
                assert_values(table, tensors[f"buffer.{name}"], f"{path.name} {name}")
        with torch.no_grad():
            embedded = model.patch_embed(tensors["pixel_values"])
            states = model(tensors["pixel_values"], output_hidden_states=True).hidden_states
            assert_values(embedded, tensors["patch_embed_output"], f"{path.name} patch embedding")
            assert_values(model.position_embedding(side), tensors["abs_pos_resized"], f"{path.name} positions")
        for index, state in enumerate(states[1:]):
            expected = tensors[f"block_output.{index}"]
            assert_values(state.view(expected.shape), expected, f"{path.name} block {index}")

        folder = tmp_path / path.stem
        config.save_pretrained(folder)
        checkpoint = {f"backbone.net.{key}": value for key, value in parameters.items()}
        torch.save({"model": checkpoint}, folder / "detector.pth")
        spec = {"name": "eva02", "model": str(folder), "loader": "eva02", "file": "detector.pth"}
        teacher = load_teacher(resolve_teacher(spec, released=True))
        assert (teacher.preprocessor.mean, teacher.preprocessor.std) == (CLIP_MEAN, CLIP_STD)
        assert_teacher(teacher, tensors, path.name)


def timm_key(key: str) -> str:
    """The authors call a block's layer scale `weight`, timm `gamma`."""
    return re.sub(r"(blocks\.\d+)\.weight$", r"\1.gamma", key)


def authors_key(key: str) -> str:
    return re.sub(r"(blocks\.\d+)\.gamma$", r"\1.weight", key)


def test_convnext(parity_dir: Path, tmp_path: Path) -> None:
    for path in cases(parity_dir, "teacher_convnext/*.safetensors"):
        tensors, metadata = read_case(path)
        shape = {name: metadata[name] for name in ("depths", "dims", "norm_eps", "patch_size")}
        shape |= {"kernel_sizes": metadata["kernel_size"], "act_layer": metadata["act"]}
        assert not metadata["final_norm"] and metadata["mlp_ratio"] == 4  # timm's only one
        model = timm.create_model("convnext_xxlarge", num_classes=1, **shape)
        parameters = with_prefix(tensors, "param.")
        renamed = {timm_key(key): value for key, value in parameters.items()}
        assert {authors_key(key) for key in renamed} == set(parameters) != set(renamed)
        heads = {key: value for key, value in model.state_dict().items() if key.startswith("head.")}
        model.load_state_dict({**renamed, **heads}, strict=True)
        assert not set(renamed) & set(heads)

        size = metadata["img_size"]
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": [3, size, size]}
        save_for_hf(model, str(tmp_path / path.stem), model_args=shape, safe_serialization=True)
        spec = {"name": "convnext", "model": str(tmp_path / path.stem), "image_size": size}
        teacher = load_teacher(resolve_teacher({**spec, "loader": "timm"}))
        assert_teacher(teacher, tensors, path.name)
        for index in range(len(metadata["depths"])):
            expected = tensors[f"stage_output.{index}"]
            stage = load_teacher(resolve_teacher({**spec, "loader": "timm", "output": index}))
            assert_values(stage(tensors["pixel_values"]).tokens, expected, f"{path.name} stage {index}")


def test_sam(parity_dir: Path, tmp_path: Path) -> None:
    for path in cases(parity_dir, "teacher_sam/*.safetensors"):
        tensors, metadata = read_case(path)
        vision = {key: metadata[key] for key in metadata if hasattr(SamVisionConfig(), key)}
        small = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 16}
        prompt = {"hidden_size": 16, "image_size": metadata["image_size"], "patch_size": metadata["patch_size"]}
        config = SamConfig(
            vision_config=vision,
            mask_decoder_config={**small, "iou_head_hidden_dim": 16},
            prompt_encoder_config={**prompt, "image_embedding_size": metadata["image_size"] // metadata["patch_size"]},
        )
        model = SamModel(config)
        model.vision_encoder.load_state_dict(with_prefix(tensors, "param."), strict=True)
        model.save_pretrained(tmp_path / path.stem)
        pixels = {name: getattr(resolve_teacher("sam"), name) for name in ("mean", "std", "interpolation", "fit")}
        spec = {"name": "sam", "model": str(tmp_path / path.stem), "image_size": metadata["image_size"], **pixels}
        assert_teacher(load_teacher(resolve_teacher(spec, released=True)), tensors, path.name)

        encoded = tensors["encoder_last_hidden_state"]
        teacher = load_teacher(resolve_teacher(spec))
        assert_teacher(teacher, tensors | {"output": encoded}, f"{path.name} encoder")
        interleaved = tensors["output"]
        assert interleaved.shape != encoded.shape or (interleaved - encoded).abs().max() > encoded.std()


def test_pix2struct(parity_dir: Path, tmp_path: Path) -> None:
    for path in cases(parity_dir, "teacher_pix2struct/*.safetensors"):
        tensors, metadata = read_case(path)
        vision = {key: metadata[key] for key in metadata if hasattr(Pix2StructVisionConfig(), key)}
        text = {"vocab_size": 9, "hidden_size": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        model = Pix2StructForConditionalGeneration(Pix2StructConfig(vision_config=vision, text_config=text))
        model.encoder.load_state_dict(with_prefix(tensors, "param."), strict=True)
        model.save_pretrained(tmp_path / path.stem)

        size = tensors["pixel_values"].shape[-1]
        row = resolve_teacher("pix2struct", released=True)
        spec = {"name": "pix2struct", "model": str(tmp_path / path.stem), "image_size": size}
        teacher = load_teacher(resolve_teacher({**spec, "mean": row.mean, "std": row.std}, released=True))
        assert [*teacher.grid] == metadata["output_grid"]
        assert_teacher(teacher, tensors, path.name)

        scale, shift = (torch.tensor(channels).view(3, 1, 1) for channels in (row.std, row.mean))
        patches = pix2struct_patches((tensors["pixel_values"] * scale + shift) * 255, metadata["patch_size"])
        assert patches.shape[1] == tensors["attention_mask_sum"][0] == metadata["grid_used"][0] ** 2
        assert_values(patches[:, :8], tensors["flattened_patches_first_8"], f"{path.name} patches")
        with torch.no_grad():
            hidden = teacher.model(flattened_patches=patches).last_hidden_state[:, :8]
        assert_values(hidden, tensors["encoder_last_hidden_state_first_8"], f"{path.name} hidden")


def processor_of(size: int, aspect: str) -> LlavaProcessor:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    side = {"height": size, "width": size}
    images = LlavaImageProcessorPil(do_pad=aspect == "pad", size={"shortest_edge": size}, crop_size=side)
    patches = {"patch_size": size // 2, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return set_chat_template(LlavaProcessor(images, tokenizer, **patches), "vicuna_v1")


def rows_of(images: list[Image.Image]) -> list[dict[str, Any]]:
    """A row for each image and, at the end, one without."""
    rows = []
    for of_row in [*([image] for image in images), []]:
        content = [{"type": "image"} for _ in of_row] + [{"type": "text", "text": "What is this?"}]
        reply = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
        rows.append({"messages": [{"role": "user", "content": content}, reply], "images": of_row})
    return rows


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_pixels_of_every_tower(aspect: str, parity_dir: Path) -> None:
    tensors, metadata = read_case(parity_dir / "preprocessing" / "process_images.safetensors")
    arrays = with_prefix(tensors, "image_uint8_hwc.")
    images = [Image.fromarray(arrays[str(index)].numpy()) for index in range(len(arrays))]
    fields = ("image_size", "mean", "std", "interpolation", "fit")
    preprocessors = {}
    for name in TEACHERS.values():
        row = resolve_teacher({"name": name, "image_size": metadata["teacher_size"]}, released=True)
        given = {field: getattr(row, field) for field in fields}
        preprocessors[name] = TeacherPreprocessor(**{**given, "fit": given["fit"] or "center_crop"})
    collator = MoveKDCollator(
        processor_of(metadata["student_size"], aspect),
        preprocessors,
        geometry="per_teacher",
        labels="released",
        distill_text_only_rows=True,
    )
    batch = collator(rows_of(images))
    pixels = {"student_clip": batch["pixel_values"]}
    resized = batch["teacher_pixel_values"]
    pixels |= {key: preprocessors[name].normalize(resized[name]) for key, name in TEACHERS.items()}
    assert f"student_clip.{aspect}" in tensors
    for key, value in pixels.items():
        # Resized by PIL as theirs; only the last bit of the arithmetic on floats may differ
        torch.testing.assert_close(
            value, tensors[f"{key}.{aspect}"], rtol=0, atol=5e-7, msg=lambda t, k=key: f"{k}: {t}"
        )
