"""Tiny random towers, language models and processors that the model's tests share."""

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SiglipVisionModel,
)

from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel
from modeling_movekd.processing import build_processor
from tests.helpers.tiny import VOCABULARY, siglip_config, spread
from tests.helpers.tiny import make_tokenizer as byte_tokenizer


CLIP_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 24,
}
TEXT_SIZES = {"vocab_size": len(VOCABULARY), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_SIZES = TEXT_SIZES | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


def language_config(family: str) -> PreTrainedConfig:
    if family == "llama":
        return LlamaConfig(**LLAMA_SIZES)
    if family == "smollm":
        return LlamaConfig(**LLAMA_SIZES, tie_word_embeddings=True, rope_theta=1e5)
    if family == "qwen3":
        return Qwen3Config(**LLAMA_SIZES, head_dim=16)
    if family == "mistral":
        return MistralConfig(**LLAMA_SIZES, sliding_window=8)
    if family == "gpt2":
        return GPT2Config(**TEXT_SIZES, n_embd=32, n_layer=2, n_head=2, n_positions=256)
    raise ValueError(family)


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., CLIPVisionModel]:
    def make(seed: int = 0, **sizes) -> CLIPVisionModel:
        torch.manual_seed(seed)
        model = CLIPVisionModel(CLIPVisionConfig(**(CLIP_SIZES | sizes)))
        spread(model, seed)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_siglip() -> Callable[..., SiglipVisionModel]:
    """As SigLIP 2 of a fixed resolution too, which has the same class; the sizes of `make_clip`."""

    def make(seed: int = 0, **sizes) -> SiglipVisionModel:
        torch.manual_seed(seed)
        model = SiglipVisionModel(siglip_config(**{"num_hidden_layers": 4, "image_size": 16} | sizes))
        spread(model, seed)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_language() -> Callable[..., PreTrainedModel]:
    def make(family: str = "llama", seed: int = 1, **kwargs) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(language_config(family), **kwargs)
        spread(model, seed)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_tower(make_clip, make_siglip) -> Callable[..., MoveKDVisionModel]:
    """A tower whose experts do something: `expert_init="zero"` would hide them. `base` is "clip" or "siglip"."""

    def make(seed: int = 0, feature_layer: int | None = -2, base: str = "clip", **kwargs) -> MoveKDVisionModel:
        settings = {"lora_rank": 4, "lora_alpha": 8.0, "expert_init": "kaiming"} | kwargs
        encoder = {"clip": make_clip, "siglip": make_siglip}[base](seed)
        tower = MoveKDVisionModel.from_encoder(encoder, feature_layer=feature_layer, **settings)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in tower.named_parameters():
            if "router" in name or "expert" in name:
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return tower

    return make


@pytest.fixture(scope="session")
def make_model(make_tower, make_language) -> Callable[..., MoveKDForConditionalGeneration]:
    """A whole model; `tower` and `**kwargs` go to `make_tower` and `from_parts`."""

    def make(family: str = "llama", seed: int = 0, tower: dict | None = None, dtype=torch.float32, **kwargs):
        language = make_language(family, seed + 1, dtype=dtype)
        model = MoveKDForConditionalGeneration.from_parts(make_tower(seed, **(tower or {})), language, **kwargs)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[], PreTrainedTokenizerFast]:
    """One token a byte."""

    return lambda: byte_tokenizer(padding_side="left")


@pytest.fixture(scope="session")
def make_processor(make_tokenizer) -> Callable:
    def make(model: MoveKDForConditionalGeneration, **kwargs):
        return build_processor(model.config, CLIPImageProcessor(), make_tokenizer(), **kwargs)

    return make


@pytest.fixture(scope="session")
def make_image() -> Callable[..., Image.Image]:
    def make(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        return Image.fromarray(torch.randint(256, (height, width, 3), generator=generator).byte().numpy())

    return make


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(7))
