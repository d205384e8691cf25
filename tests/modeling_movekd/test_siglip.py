"""A tower that started from SigLIP: what it computes, without [CLS], and what is refused."""

import pytest
import torch
from transformers import (
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionModel,
)

from modeling_movekd import MoveKDConfig, MoveKDForConditionalGeneration, MoveKDVisionConfig, MoveKDVisionModel
from modeling_movekd.images import shared_crop
from modeling_movekd.processing import build_processor
from modeling_movekd.visualize import draw_layers
from modeling_movekd.visualize_page import picture_files
from tests.helpers.tiny import spread


@pytest.mark.parametrize("num_experts", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_starts_as_siglip_exactly(make_siglip, dtype, num_experts):
    """All hidden states, at an image size that the patches do not divide, and at others."""
    siglip = make_siglip(image_size=17).to(dtype)
    for feature_layer, layers in ((-2, 3), (-1, 4), (1, 1)):
        tower = MoveKDVisionModel.from_siglip(siglip, feature_layer, num_experts=num_experts, lora_rank=4)
        assert len(tower.encoder.layers) == tower.config.num_hidden_layers == layers
        for size, settings in ((17, {}), (24, {"interpolate_pos_encoding": True})):
            pixels = torch.randn(2, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(0))
            expected = siglip(pixels, output_hidden_states=True, **settings).hidden_states
            output = tower(pixels, output_hidden_states=True, **settings)
            for ours, theirs in zip(output.hidden_states, expected[: layers + 1], strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
            assert output.pooler_output is None and output.last_hidden_state.shape[1] == (size // 4) ** 2


@torch.no_grad()
def test_from_every_kind_of_siglip(make_siglip, pixels, tmp_path):
    siglip = make_siglip()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    both = SiglipModel(
        SiglipConfig(vision_config=siglip.config.to_dict(), text_config=SiglipTextConfig(**sizes).to_dict())
    )
    both.vision_model.load_state_dict(siglip.state_dict())
    headless = SiglipVisionModel(type(siglip.config)(**siglip.config.to_dict() | {"vision_use_head": False}))
    headless.load_state_dict({key: it for key, it in siglip.state_dict().items() if not key.startswith("head.")})
    both.save_pretrained(tmp_path / "both")
    siglip.save_pretrained(tmp_path / "vision")
    expected = siglip(pixels, output_hidden_states=True).hidden_states[-2]
    for source in (siglip, both, headless, tmp_path / "both", str(tmp_path / "vision")):
        tower = MoveKDVisionModel.from_encoder(source)
        assert torch.equal(tower(pixels).last_hidden_state, expected), source


def test_from_encoder_takes_clip_too(make_clip, make_siglip, tmp_path):
    make_clip().save_pretrained(tmp_path)
    for source in (make_clip(), tmp_path):
        ours = MoveKDVisionModel.from_encoder(source, num_experts=0)
        expected = MoveKDVisionModel.from_clip(source, num_experts=0)
        assert ours.config.to_dict() == expected.config.to_dict()
        assert all(torch.equal(value, expected.state_dict()[key]) for key, value in ours.state_dict().items())
    with pytest.raises(ValueError, match="SiglipVisionModel; expected a model with a CLIP vision tower"):
        MoveKDVisionModel.from_clip(make_siglip())
    with pytest.raises(ValueError, match="CLIPVisionModel; expected a model with a SigLIP vision tower"):
        MoveKDVisionModel.from_siglip(make_clip())


def test_a_tower_of_clip_has_the_configuration_of_before(make_tower):
    switches = {"class_token", "pre_norm", "patch_bias"}
    assert not switches & make_tower().config.to_dict().keys()
    siglip = make_tower(base="siglip").config
    assert switches <= siglip.to_dict().keys() and siglip.num_prefix_tokens == 0
    assert MoveKDVisionConfig().num_prefix_tokens == 1


@pytest.mark.parametrize("switch", [{"patch_bias": True}, {"pre_norm": False}, {"class_token": False}], ids=str)
def test_each_switch_by_itself(make_tower, pixels, tmp_path, switch):
    config = MoveKDVisionConfig(**make_tower().config.to_dict() | switch)
    tower = MoveKDVisionModel(config).eval()
    spread(tower, 3)
    tower.save_pretrained(tmp_path)
    assert torch.equal(
        MoveKDVisionModel.from_pretrained(tmp_path)(pixels).last_hidden_state, tower(pixels).last_hidden_state
    )


def test_weights_are_initialized(make_tower):
    torch.manual_seed(0)
    tower = MoveKDVisionModel(make_tower(base="siglip").config)
    assert torch.equal(tower.embeddings.position_ids, torch.arange(16)[None])
    assert not tower.embeddings.patch_embedding.bias.any()
    assert 0.01 < tower.embeddings.position_embedding.weight.std() < 0.03


def test_refusals(make_siglip, make_tower, make_language, pixels):
    with pytest.raises(ValueError, match="`feature_layer` is None.*SigLIP's pooling head.*cut_tower"):
        MoveKDVisionModel.from_siglip(make_siglip(), None)
    with pytest.raises(ValueError, match="`feature_layer` is 5.*of the 4 in `siglip`"):
        MoveKDVisionModel.from_siglip(make_siglip(), 5)
    naflex = make_siglip()
    naflex.config = Siglip2VisionConfig()
    with pytest.raises(ValueError, match="'siglip2_vision_model', a NaFlex SigLIP 2.*fixed resolution"):
        MoveKDVisionModel.from_encoder(naflex)
    tower = make_tower(base="siglip")
    with pytest.raises(ValueError, match=r"`cls_attention_layer` is 0, but this tower has no \[CLS\]"):
        tower(pixels, cls_attention_layer=0)
    with pytest.raises(ValueError, match="(?s)20.*16"):
        tower(torch.randn(1, 3, 20, 20))
    with pytest.raises(ValueError, match="`add_pooling_layer` is True, but without `class_token`"):
        MoveKDVisionConfig(class_token=False)
    with pytest.raises(ValueError, match="'default', which drops"):
        MoveKDForConditionalGeneration.from_parts(tower, make_language(), vision_feature_select_strategy="default")


@torch.no_grad()
def test_records_of_all_patches(make_tower, make_model, pixels):
    output = make_tower(base="siglip")(pixels, output_router_probabilities=True, output_expert_indices=True)
    assert len(output.expert_indices) == 3 and output.expert_indices[0].shape == (3, 16)
    assert output.last_hidden_state.is_contiguous()
    model = make_model("qwen3", tower={"base": "siglip"})
    assert model.config.vision_feature_select_strategy == "full" and model.config.image_seq_length == 16
    features = model.model.multi_modal_projector(model.model.vision_tower(pixels).last_hidden_state)
    assert torch.equal(torch.stack(model.get_image_features(pixels).pooler_output), features)


def test_the_configuration_chooses_the_strategy(make_tower, make_model):
    for base, strategy in (("clip", "default"), ("siglip", "full")):
        config = MoveKDConfig(vision_config=make_tower(base=base).config.to_dict())
        assert config.vision_feature_select_strategy == strategy
        assert MoveKDConfig.from_dict(config.to_dict()).vision_feature_select_strategy == strategy


@pytest.mark.parametrize("image_aspect_ratio", ["pad", "anyres"])
@torch.no_grad()
def test_images_of_a_whole_model(make_siglip, make_language, make_tokenizer, make_image, image_aspect_ratio, tmp_path):
    """Tokens and features agree where a patch does not divide the image, and the filter is SigLIP 2's."""
    tower = MoveKDVisionModel.from_siglip(make_siglip(image_size=18), lora_rank=4)
    model = MoveKDForConditionalGeneration.from_parts(
        tower, make_language("qwen3"), image_aspect_ratio=image_aspect_ratio
    )
    processor = build_processor(model.config, SiglipImageProcessor(resample=2), make_tokenizer())
    assert processor.image_processor.resample == 2 and processor.num_additional_image_tokens == 0
    for width, height in ((18, 18), (50, 20), (31, 90)):
        inputs = processor(text="<image>?", images=make_image(width, height), return_tensors="pt")
        assert model(**inputs).logits.isfinite().all()
        assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


@torch.no_grad()
def test_pictures_leave_out_the_attention(make_tower, make_siglip, make_image, pixels):
    tower = make_tower(base="siglip")
    pictures = tower.visualize(pixels, layer=1)
    assert pictures.cls_attention is None and pictures.experts is not None
    assert set(picture_files(pictures, 0)) == {"experts", "components"}
    expected = tower(pixels, output_hidden_states=True).hidden_states[2]
    assert torch.equal(pictures.tokens, expected)
    processor = SiglipImageProcessor(size={"height": 16, "width": 16})
    image = make_image(30, 20)
    assert shared_crop(image, processor) is image  # SigLIP stretches
    drawn = draw_layers(tower, processor, [image], [0, 2])
    assert list(drawn) == [0, 2] and drawn[2].cls_attention is None
