"""LLaVA's checkpoints, and models to begin from, become checkpoints that compute the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from hub.convert import convert
from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel
from tests.helpers.conversions import assert_equal_weights, edit_json, weights_of


def test_original_llava_without_a_tower(
    original: Path, base_models: tuple[Path, Path], copy: Path, tmp_path: Path
) -> None:
    """As LLaVA-1.5 is published: language model and projector. The tower is CLIP's, the experts are new."""
    weights = load_file(copy / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "vision_tower" not in key and "_adapter_" not in key}
    save_file(kept, copy / "model.safetensors")
    save_file({"model.mm_projector.0.weight": torch.zeros(2)}, copy / "mm_projector.bin")  # lies beside it, unread
    edit_json(copy / "config.json", model_type="llava_llama", moe=..., kd=..., image_aspect_ratio="pad")
    dest = convert(
        copy, tmp_path / "dest", vision_model=str(base_models[0]), experts={"lora_rank": 2, "num_experts": 4}
    )
    model = MoveKDForConditionalGeneration.from_pretrained(dest)
    tower = model.config.vision_config
    assert (tower.num_experts, tower.lora_rank, tower.router_gradient) == (4, 2, "straight_through")
    new = json.loads((dest / "conversion.json").read_text())["new_weights"]
    assert new and all("expert" in key or "router" in key for key in new)
    assert not (dest / "distiller.safetensors").exists()
    assert torch.equal(model.lm_head.weight[:-1], weights["lm_head.weight"])
    # The experts begin at zero, so the tower is CLIP
    pixels = torch.randn(2, 3, tower.image_size, tower.image_size)
    clip = CLIPVisionModel.from_pretrained(base_models[0])(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(model.model.vision_tower(pixels).last_hidden_state, clip)
    routers = [value for key, value in model.named_parameters() if "router.weight" in key]
    assert all(value.std() > 0 for value in routers)
    again = convert(
        copy, tmp_path / "again", vision_model=str(base_models[0]), experts={"lora_rank": 2, "num_experts": 4}
    )
    assert_equal_weights(weights_of(again), weights_of(dest))


def test_authors_without_experts(copy: Path, tmp_path: Path) -> None:
    """Their ablation: distilled, without the mixture. None is added, and the way back is byte for byte."""
    weights = load_file(copy / "model.safetensors")
    plain = {key.replace("original_module.", ""): value for key, value in weights.items() if not is_mole(key)}
    save_file(plain, copy / "model.safetensors")
    edit_json(copy / "config.json", moe={"moe_encoder": False})
    dest = convert(copy, tmp_path / "dest", keep_all_layers=True)
    assert json.loads((dest / "config.json").read_text())["vision_config"]["num_experts"] == 0
    assert (dest / "distiller.safetensors").exists()
    assert_equal_weights(weights_of(convert(dest, tmp_path / "back", to="original")), plain)


def is_mole(key: str) -> bool:
    return ".moe_" in key or ".router." in key


@pytest.fixture(scope="module")
def transformers_llava(
    base_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, torch.nn.Module]]:
    """A checkpoint in one of the layouts in which transformers has saved it."""
    prefixes = {
        "saved": {},
        "published": {"vision_tower.": "vision_tower.vision_model."},
        "4.52": {
            "language_model.model.": "model.language_model.",
            "language_model.lm_head.": "lm_head.",
            "vision_tower.": "model.vision_tower.vision_model.",
            "multi_modal_projector.": "model.multi_modal_projector.",
            "image_newline": "model.image_newline",
        },
    }

    def make(model_type: str, layout: str) -> tuple[Path, torch.nn.Module]:
        folder = tmp_path_factory.mktemp("llava") / "source"
        tokenizer = AutoTokenizer.from_pretrained(base_models[1])
        tokenizer.add_special_tokens(
            {"extra_special_tokens": ["<image>", "<pad>"]}, replace_extra_special_tokens=False
        )
        clip, language = (
            CLIPVisionModel.from_pretrained(base_models[0]),
            LlamaForCausalLM.from_pretrained(base_models[1]),
        )
        config_class, model_class = {
            "llava": (LlavaConfig, LlavaForConditionalGeneration),
            "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
        }[model_type]
        size = clip.config.image_size
        grids = {"image_grid_pinpoints": [[size, 2 * size], [2 * size, size]]} if model_type == "llava_next" else {}
        text_config = language.config.to_dict() | {"vocab_size": len(tokenizer) + 10}
        config = config_class(
            vision_config=clip.config.to_dict(),
            text_config=text_config,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            **grids,
        )
        torch.manual_seed(0)
        model = model_class(config).eval()
        for parameter in model.parameters():
            parameter.data.normal_(std=0.2)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.copyfile(base_models[0] / "preprocessor_config.json", folder / "preprocessor_config.json")
        weights = load_file(folder / "model.safetensors")
        for theirs, changed in prefixes[layout].items():
            weights = {
                changed + key.removeprefix(theirs) if key.startswith(theirs) else key: value
                for key, value in weights.items()
            }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder, model

    return make


@pytest.mark.parametrize("layout", ["saved", "published", "4.52"])
@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
@torch.no_grad()
def test_llava_of_transformers(transformers_llava: Any, tmp_path: Path, model_type: str, layout: str) -> None:
    source, theirs = transformers_llava(model_type, layout)
    dest = convert(source, tmp_path / "dest", experts={"lora_rank": 2})
    ours = MoveKDForConditionalGeneration.from_pretrained(dest).eval()
    processor = AutoProcessor.from_pretrained(dest, trust_remote_code=False)
    assert ours.config.image_token_index == theirs.config.image_token_index == processor.image_token_id
    assert ours.config.text_config.vocab_size == theirs.config.text_config.vocab_size
    pixels = torch.randint(256, (20, 30, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    inputs = processor(Image.fromarray(pixels.numpy()), "USER: <image> What is it? ASSISTANT:", return_tensors="pt")
    assert processor.image_processor.do_pad
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits)


@torch.no_grad()
def test_clip_and_a_language_model(base_models: tuple[Path, Path], tmp_path: Path) -> None:
    vision, language = map(str, base_models)
    with pytest.raises(ValueError, match="--vision-model"):
        convert(language, tmp_path / "dest")
    dest = convert(language, tmp_path / "dest", vision_model=vision, experts={"lora_rank": 2})
    model = MoveKDForConditionalGeneration.from_pretrained(dest).eval()
    joined = MoveKDForConditionalGeneration.from_parts(
        MoveKDVisionModel.from_clip(vision, lora_rank=2), LlamaForCausalLM.from_pretrained(language)
    )
    for part in (model.config, joined.config):
        part.original_vocab_size = part.architectures = part.dtype = part.auto_map = None
        part._name_or_path = None
    ours, theirs = model.config.to_dict(), joined.config.to_dict()
    assert ours["vision_config"] == theirs["vision_config"] | {"dtype": ours["vision_config"]["dtype"]}
    assert {name: ours[name] for name in ours if "config" not in name and ours[name]} == {
        name: theirs[name] for name in theirs if "config" not in name and theirs[name]
    }
    input_ids = torch.tensor([[1, 7, 30]])
    expected = LlamaForCausalLM.from_pretrained(language)(input_ids).logits
    torch.testing.assert_close(model(input_ids).logits[..., : expected.shape[-1]], expected)
    new = json.loads((dest / "conversion.json").read_text())["new_weights"]
    assert {key.split(".")[1] for key in new} == {"vision_tower", "multi_modal_projector"}
    assert all(value.std() > 0 for name, value in model.named_parameters() if "projector" in name and "weight" in name)


@torch.no_grad()
def test_tied_language_model_in_half_precision(base_models: tuple[Path, Path], tmp_path: Path) -> None:
    vision, language = base_models
    config = LlamaForCausalLM.from_pretrained(language).config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    tied = LlamaForCausalLM(config).to(torch.bfloat16)
    tied.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(language).save_pretrained(tmp_path / "tied")
    dest = convert(tmp_path / "tied", tmp_path / "dest", vision_model=str(vision))
    assert "lm_head.weight" not in weights_of(dest)
    model = MoveKDForConditionalGeneration.from_pretrained(dest)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.dtype == torch.bfloat16
    input_ids = torch.tensor([[1, 7, 30]])
    torch.testing.assert_close(model(input_ids).logits[..., : config.vocab_size], tied(input_ids).logits)
