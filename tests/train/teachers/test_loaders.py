"""Teachers are real models of transformers and timm, tiny and random, written to a folder and read back."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from torch import nn

from train.teachers.config import TeacherConfig, resolve_teacher
from train.teachers.features import FrozenTeacher
from train.teachers.loaders import load_teacher
from train.teachers.preprocessing import TeacherPreprocessor


SIZE = 32
SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "image_size": SIZE,
    "patch_size": 8,
}
SQUARE = {"height": SIZE, "width": SIZE}

TIMM_SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def vision_transformer() -> tuple:
    model = transformers.ViTModel(transformers.ViTConfig(**SMALL))
    return model, transformers.ViTImageProcessor(size=SQUARE), (4, 4), 24, lambda m, x: m(x).last_hidden_state[:, 1:]


def dinov2_with_registers() -> tuple:
    config = transformers.Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2, num_register_tokens=3)
    processor = transformers.BitImageProcessor(size={"shortest_edge": 40}, crop_size=SQUARE)
    model = transformers.Dinov2WithRegistersModel(config)
    return model, processor, (4, 4), 24, lambda m, x: m(x).last_hidden_state[:, 4:]


def dinov3() -> tuple:
    model = transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**{**SMALL, "num_attention_heads": 3}, num_register_tokens=2)
    )
    return model, transformers.ViTImageProcessor(size=SQUARE), (4, 4), 24, lambda m, x: m(x).last_hidden_state[:, 3:]


def siglip() -> tuple:
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 9,
    }
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=SMALL))
    processor = transformers.SiglipImageProcessor(size=SQUARE)
    return model, processor, (4, 4), 24, lambda m, x: m.vision_model(x).last_hidden_state


def convnext() -> tuple:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=64)
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 64})
    model = transformers.ConvNextModel(config)
    return model, processor, (2, 2), 24, lambda m, x: m(x).last_hidden_state.flatten(2).transpose(1, 2)


def swin() -> tuple:
    config = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 2], num_heads=[1, 2, 4], window_size=4
    )
    processor = transformers.ViTImageProcessor(size={"height": 64, "width": 64})
    return transformers.SwinModel(config), processor, (4, 4), 32, lambda m, x: m(x).last_hidden_state


def sam() -> tuple:
    vision = {**SMALL, "mlp_dim": 32, "output_channels": 12, "window_size": 2, "global_attn_indexes": [2]}
    del vision["intermediate_size"]
    decoder = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 16, "iou_head_hidden_dim": 16}
    prompt = {"hidden_size": 16, "image_size": SIZE, "patch_size": 8, "image_embedding_size": 4}
    config = transformers.SamConfig(vision_config=vision, mask_decoder_config=decoder, prompt_encoder_config=prompt)
    processor = transformers.SamImageProcessor(size={"longest_edge": SIZE}, pad_size=SQUARE)
    return (
        transformers.SamModel(config),
        processor,
        (4, 4),
        12,
        lambda m, x: m.vision_encoder(x).last_hidden_state.flatten(2).transpose(1, 2),
    )


FAMILIES = [vision_transformer, dinov2_with_registers, dinov3, siglip, convnext, swin, sam]


def perturb(model: nn.Module) -> nn.Module:
    """Random values everywhere, so that a bias or a scale left at its initial value shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def save(folder: Path, model: nn.Module, processor) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def save_vit(folder: Path) -> str:
    model, processor, *_ = vision_transformer()
    return save(folder, perturb(model), processor)


def save_clip(folder: Path, old_layout: bool = False) -> tuple[str, transformers.CLIPVisionModel]:
    clip = perturb(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL)))
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SQUARE)
    save(folder, clip, processor)
    weights = load_file(folder / "model.safetensors")
    plain = {key.removeprefix("vision_model."): value for key, value in weights.items()}
    prefix = "vision_model." if old_layout else ""
    save_file({prefix + key: value for key, value in plain.items()}, folder / "model.safetensors", {"format": "pt"})
    return str(folder), clip


def save_timm(folder: Path, name: str, **arguments) -> tuple[str, nn.Module]:
    model = perturb(timm.create_model(name, num_classes=5, **arguments))
    size = arguments.get("img_size", 64)
    config = {"input_size": [3, size, size], "fixed_input_size": "img_size" in arguments, "mean": [0.1, 0.2, 0.3]}
    model.pretrained_cfg = {**model.pretrained_cfg, **config, "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    save_for_hf(model, str(folder), safe_serialization=True)
    return str(folder), model


def drop(folder: str | Path, key: str) -> None:
    file = Path(folder) / "model.safetensors"
    weights = load_file(file)
    del weights[key]
    save_file(weights, file, {"format": "pt"})


def pixels(size: int, batch_size: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_frozen(teacher: nn.Module) -> None:
    parent = nn.Sequential(teacher).train()
    assert parent.training and not any(module.training for module in teacher.modules())
    assert not any(weight.requires_grad for weight in teacher.parameters())


def assert_takes_bytes(teacher: FrozenTeacher) -> None:
    """As normalized by hand."""
    size = teacher.preprocessor.image_size
    image = torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (teacher.preprocessor.mean, teacher.preprocessor.std)
    )
    expected = teacher((image / 255 - mean) / std).tokens
    torch.testing.assert_close(teacher(image).tokens, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(teacher(image).tokens, teacher(image.float()).tokens)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_transformers_teacher_gives_the_patch_features_of_the_library(family, tmp_path: Path) -> None:
    model, processor, grid, width, expected = family()
    folder = save(tmp_path, perturb(model), processor)
    teacher = load_teacher(resolve_teacher({"name": "t", "model": folder}))
    assert (teacher.name, teacher.grid, teacher.width, teacher.dtype) == ("t", grid, width, torch.float32)
    assert teacher.config.loader == "transformers"

    x = pixels(teacher.preprocessor.image_size).requires_grad_()
    features = teacher(x)
    assert features.grid == grid and features.cls is None and features.cls_attention is None
    assert features.tokens.shape == (2, grid[0] * grid[1], width) and not features.tokens.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(features.tokens, expected(model, x), rtol=1e-5, atol=1e-5)
        outputs = getattr(model, "vision_model", getattr(model, "vision_encoder", model))(x)
    if family in (siglip, convnext, swin):
        torch.testing.assert_close(features.summary, outputs.pooler_output.flatten(1), rtol=1e-5, atol=1e-5)
    elif family is not sam:
        torch.testing.assert_close(features.summary, outputs.last_hidden_state[:, 0], rtol=1e-5, atol=1e-5)
    assert teacher.summary_width == (None if family is sam else width)
    assert (features.summary is None) == (family is sam)
    assert_frozen(teacher)
    assert_takes_bytes(teacher)
    torch.testing.assert_close(teacher(x).tokens, features.tokens, rtol=0, atol=0)

    assert teacher.preprocessor.fit == ("zero_pad" if family is sam else "center_crop")
    assert list(teacher.preprocessor.mean) == pytest.approx(processor.image_mean)
    assert list(teacher.preprocessor.std) == pytest.approx(processor.image_std)


@pytest.mark.parametrize("layout", ["tower", "tower in the old layout", "with the text tower"])
def test_clip_teacher(layout: str, tmp_path: Path) -> None:
    folder, clip = save_clip(tmp_path, old_layout="old" in layout)
    if "text" in layout:
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = transformers.CLIPConfig(text_config={**text, "vocab_size": 9}, vision_config=SMALL, projection_dim=8)
        whole = perturb(transformers.CLIPModel(config))
        clip = whole.vision_model
        whole.save_pretrained(folder)
    teacher = load_teacher(resolve_teacher({"name": "clip", "model": folder}))
    assert (teacher.grid, teacher.width) == ((4, 4), 24)
    x = pixels(SIZE)
    features = teacher(x)
    clip.set_attn_implementation("eager")
    with torch.no_grad():
        expected = clip(x, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(features.tokens, expected.hidden_states[-2][:, 1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.cls, expected.hidden_states[-2][:, 0], rtol=1e-5, atol=1e-5)
    assert features.summary is features.cls and teacher.summary_width == 24
    assert features.cls_attention.shape == (2, 4, 16)
    torch.testing.assert_close(features.cls_attention, expected.attentions[-2][:, :, 0, 1:], rtol=1e-5, atol=1e-6)
    assert (features.cls_attention.sum(-1) < 1).all()
    assert_frozen(teacher)


def test_clip_under_another_name_is_any_teacher(tmp_path: Path) -> None:
    folder, clip = save_clip(tmp_path, old_layout=True)
    x = pixels(SIZE)
    with torch.no_grad():
        expected = clip(x, output_hidden_states=True)
    last = load_teacher(resolve_teacher({"name": "other", "model": folder}))(x)
    assert last.cls is None and last.cls_attention is None
    torch.testing.assert_close(last.tokens, expected.last_hidden_state[:, 1:], rtol=1e-5, atol=1e-5)
    chosen = load_teacher(resolve_teacher({"name": "other", "model": folder, "output": 1}))(x)
    torch.testing.assert_close(chosen.tokens, expected.hidden_states[1][:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "grid", "width"),
    [
        (
            "vit_small_patch16_224",
            TIMM_SMALL,
            (4, 4),
            24,
        ),
        (
            "vit_small_patch14_reg4_dinov2",
            TIMM_SMALL,
            (4, 4),
            24,
        ),
        (
            "vit_base_patch16_siglip_224",
            TIMM_SMALL,
            (4, 4),
            24,
        ),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24]}, (2, 2), 24),
        ("resnet18", {"layers": [1, 1, 1, 1]}, (2, 2), 512),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 4], "window_size": 4},
            (4, 4),
            32,
        ),
    ],
)
def test_timm_teacher_gives_the_patch_features_of_the_library(name, arguments, grid, width, tmp_path: Path) -> None:
    folder, model = save_timm(tmp_path, name, **arguments)
    teacher = load_teacher(resolve_teacher({"name": "t", "model": folder}))
    size = arguments.get("img_size", 64)
    assert teacher.preprocessor == TeacherPreprocessor(size, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    assert (teacher.grid, teacher.width, teacher.config.loader) == (grid, width, "timm")
    x = pixels(size).requires_grad_()
    features = teacher(x)
    assert not features.tokens.requires_grad
    with torch.no_grad():
        raw = model.forward_features(x)
        if raw.dim() == 3:
            expected = raw[:, model.num_prefix_tokens :]
        else:
            expected = raw.flatten(1, 2) if raw.shape[-1] == width else raw.flatten(2).transpose(1, 2)
        summary = raw[:, 0] if getattr(model, "has_class_token", False) else model.forward_head(raw, pre_logits=True)
    torch.testing.assert_close(features.tokens, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.summary, summary, rtol=1e-5, atol=1e-5)
    assert_frozen(teacher)

    source = {"name": "t", "model": f"local-dir:{folder}", "output": -2}
    with torch.no_grad():
        kept = model.forward_intermediates(x, indices=[-2], output_fmt="NCHW", intermediates_only=True)[0]
    earlier = load_teacher(resolve_teacher(source))
    assert earlier.grid == tuple(kept.shape[2:]) and earlier.width == kept.shape[1]
    torch.testing.assert_close(earlier(x).tokens, kept.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(earlier(x).summary, summary, rtol=1e-5, atol=1e-5)


def test_a_pooled_output_without_weights_of_the_file_is_no_summary(tmp_path: Path) -> None:
    model, processor, *_ = siglip()
    folder = save(tmp_path / "siglip", perturb(model), processor)
    drop(folder, "vision_model.head.probe")
    assert load_teacher(resolve_teacher(folder)).summary_width is None


@pytest.mark.parametrize(
    ("name", "save_teacher", "size", "grid"),
    [
        ("t", save_vit, 48, (6, 6)),
        ("clip", lambda folder: save_clip(folder)[0], 48, (6, 6)),
        ("t", lambda folder: save_timm(folder, "vit_small_patch16_224", **TIMM_SMALL)[0], 48, (6, 6)),
        ("t", lambda folder: save_timm(folder, "convnext_atto", depths=[1] * 4, dims=[8] * 4)[0], 96, (3, 3)),
    ],
    ids=["vit", "clip", "timm-vit", "timm-convnext"],
)
def test_another_image_size(name: str, save_teacher, size: int, grid: tuple[int, int], tmp_path: Path) -> None:
    teacher = load_teacher(resolve_teacher({"name": name, "model": save_teacher(tmp_path), "image_size": size}))
    assert teacher.grid == grid and teacher.preprocessor.image_size == size
    assert teacher(pixels(size)).tokens.shape == (2, grid[0] * grid[1], teacher.width)


def test_own_dtype_also_under_autocast(tmp_path: Path) -> None:
    folder = save_vit(tmp_path)
    low = load_teacher(resolve_teacher({"model": folder, "dtype": "bfloat16"}))
    assert low.dtype == torch.bfloat16 and low(pixels(SIZE)).tokens.dtype == torch.bfloat16
    full = load_teacher(resolve_teacher(folder))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = full(pixels(SIZE).bfloat16()).tokens
    torch.testing.assert_close(mixed, full(pixels(SIZE).bfloat16().float()).tokens, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("save_teacher", "name", "key", "reported"),
    [
        (save_vit, "t", "encoder.layer.1.output.dense.bias", "layers.1.mlp.fc2.bias"),
        (lambda folder: save_clip(folder)[0], "clip", "encoder.layers.1.self_attn.k_proj.weight", None),
        (lambda folder: save_clip(folder, True)[0], "clip", "vision_model.pre_layrnorm.bias", "pre_layrnorm.bias"),
        (lambda folder: save_clip(folder, True)[0], "t", "vision_model.pre_layrnorm.bias", "pre_layrnorm.bias"),
        (lambda folder: save_timm(folder, "resnet18", layers=[1] * 4)[0], "t", "layer3.0.bn1.weight", None),
    ],
    ids=["vit", "clip", "old-clip", "old-clip-as-any", "timm"],
)
def test_a_missing_tensor_raises_and_is_named(save_teacher, name, key, reported, tmp_path: Path) -> None:
    folder = save_teacher(tmp_path)
    spec = resolve_teacher({"name": name, "model": folder})
    load_teacher(spec)
    drop(folder, key)
    with pytest.raises(ValueError, match=re.escape(reported or key)):
        load_teacher(spec)


def test_a_missing_tensor_raises_where_timm_only_logs(tmp_path: Path) -> None:
    # timm reads this variant (no pooling head) non-strictly
    folder, model = save_timm(tmp_path, "vit_base_patch16_siglip_gap_224", **TIMM_SMALL)
    load_teacher(resolve_teacher(folder))
    drop(folder, "blocks.1.norm2.weight")
    timm.create_model(f"local-dir:{folder}", pretrained=True)  # does not raise
    with pytest.raises(ValueError, match=r"lacks: \['blocks\.1\.norm2\.weight'\]"):
        load_teacher(resolve_teacher(folder))


def test_what_a_file_may_lack_or_hold_beyond(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**SMALL, num_labels=5)
    classifier = perturb(transformers.ViTForImageClassification(config))  # a head of its own, and no pooler
    folder = save(tmp_path / "classifier", classifier, transformers.ViTImageProcessor(size=SQUARE))
    x = pixels(SIZE)
    with torch.no_grad():
        expected = classifier.vit(x).last_hidden_state[:, 1:]
    torch.testing.assert_close(load_teacher(resolve_teacher(folder))(x).tokens, expected, rtol=1e-5, atol=1e-5)

    folder = save_vit(tmp_path / "deeper")
    file = tmp_path / "deeper" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"has beyond the model: .*2\."):
        load_teacher(resolve_teacher(folder))

    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 3, "intermediate_size": 40}))
    with pytest.raises(ValueError, match="cannot be read fully"):
        load_teacher(resolve_teacher(folder))


def test_bad_pixels_and_outputs_raise(tmp_path: Path) -> None:
    folder = save_vit(tmp_path)
    teacher = load_teacher(resolve_teacher(folder))
    with pytest.raises(ValueError, match=r"\(batch_size, 3, 32, 32\).*got \(2, 3, 24, 24\)"):
        teacher(pixels(24))
    with pytest.raises(ValueError, match=r"got \(3, 32, 32\)"):
        teacher(pixels(32)[0])
    with pytest.raises(ValueError, match=r"ViTModel of .*The model gives .*last_hidden_state.* and no 'features'"):
        load_teacher(resolve_teacher({"model": folder, "output": "features"}))
    with pytest.raises(ValueError, match=r"2 dimensions \(1, 24\)"):
        load_teacher(resolve_teacher({"model": folder, "output": "pooler_output"}))
    # a field is taken as patches alone, and 17 tokens with a CLS among them are no square
    with pytest.raises(ValueError, match=r"leave 17, .*4 \* 4 = 16 or 5 \* 5 = 25"):
        load_teacher(resolve_teacher({"model": folder, "output": "last_hidden_state"}))


def test_features_that_are_not_finite_raise(tmp_path: Path) -> None:
    folder = save_vit(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["embeddings.cls_token"][:] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="not finite in torch.float32"):
        load_teacher(resolve_teacher(folder))


def test_a_model_that_samples_patches_raises(tmp_path: Path) -> None:
    # a quarter of 8 x 8 patches is a square grid as well
    model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**{**SMALL, "patch_size": 4}, mask_ratio=0.75))
    folder = save(tmp_path, perturb(model), transformers.ViTImageProcessor(size=SQUARE))
    with pytest.raises(ValueError, match="ViTMAEModel gives other features for the same image the second time"):
        load_teacher(resolve_teacher(folder))


def test_a_model_that_takes_no_pixels_raises(tmp_path: Path) -> None:
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    transformers.BertModel(transformers.BertConfig(**size, vocab_size=9)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"BertModel takes \['input_ids', .*\] and no `pixel_values`"):
        load_teacher(resolve_teacher(str(tmp_path)))


def test_weights_that_are_not_on_this_process_raise() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    preprocessor = TeacherPreprocessor(SIZE, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="2 weights, weight first, are not on this process"):
        FrozenTeacher(TeacherConfig("t", "folder"), model, lambda model, pixel_values: None, preprocessor)


def test_preprocessing_settings(tmp_path: Path) -> None:
    model, *_ = vision_transformer()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no image processor; set .*'mean'"):
        load_teacher(resolve_teacher(str(tmp_path)))
    given = {"image_size": SIZE, "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "interpolation": "bilinear"}
    teacher = load_teacher(resolve_teacher({"model": str(tmp_path), **given}))
    assert teacher.preprocessor == TeacherPreprocessor(SIZE, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "bilinear")

    transformers.ViTImageProcessor(size=SQUARE, rescale_factor=1 / 127.5, resample=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"gives no \['mean', 'std', 'interpolation'\]"):
        load_teacher(resolve_teacher(str(tmp_path)))
    transformers.ViTImageProcessor(size={"height": 32, "width": 40}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"gives no \['image_size'\]"):
        load_teacher(resolve_teacher(str(tmp_path)))
    transformers.ViTImageProcessor(size=SQUARE, do_normalize=False).save_pretrained(tmp_path)
    teacher = load_teacher(resolve_teacher(str(tmp_path)))
    assert teacher.preprocessor == TeacherPreprocessor(SIZE, (0.0,) * 3, (1.0,) * 3, "bilinear")
