"""Tiny towers and whole models. Every weight of them changes the output."""

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionModel,
    SiglipVisionModel,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from hub.card_facts import weights_fingerprint
from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel
from modeling_movekd.processing import build_processor
from tests.helpers.cards import RESULT
from tests.helpers.tiny import clip_config, llama_config, make_tokenizer, siglip_config, spread


SIZE = 16
# Files of a training run that must not be published
STAYS = [
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    "trainer_state.json",
    ".env",
    "data.jsonl",
]
STAYS += ["language_lora.safetensors", "runs/events.out.tfevents", "checkpoint-3/optimizer.pt", "notes.txt"]


def make_tower(feature_layer: int | None = -2, seed: int = 0, siglip: bool = False, **kwargs) -> MoveKDVisionModel:
    """Three layers, two of them after the cut, with routers that use all experts."""
    torch.manual_seed(seed)
    settings = {"image_size": SIZE} if siglip else {"hidden_act": "quick_gelu", "image_size": SIZE}
    settings = {name: kwargs.pop(name, value) for name, value in settings.items()}
    encoder = SiglipVisionModel(siglip_config(**settings)) if siglip else CLIPVisionModel(clip_config(**settings))
    spread(encoder, seed)
    tower = MoveKDVisionModel.from_encoder(encoder, feature_layer, **({"lora_rank": 4, "lora_alpha": 4.0} | kwargs))
    for name, part in tower.named_modules():
        if name.endswith(("router", "experts")):
            spread(part, seed + 1)
    return tower.eval()


def make_model(tower: MoveKDVisionModel, tied: bool = False, **kwargs) -> MoveKDForConditionalGeneration:
    torch.manual_seed(2)
    language = AutoModelForCausalLM.from_config(llama_config(tie_word_embeddings=tied))
    spread(language, 2)
    model = MoveKDForConditionalGeneration.from_parts(tower, language, **kwargs)
    spread(model.model.multi_modal_projector, 3)
    if model.model.image_newline is not None:
        model.model.image_newline.data.normal_(generator=torch.Generator().manual_seed(4))
    return model


def save_tower(tower: MoveKDVisionModel, folder: Path) -> Path:
    tower.save_pretrained(folder)
    LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(folder)
    return folder


def save_model(model: MoveKDForConditionalGeneration, folder: Path) -> Path:
    model.save_pretrained(folder)
    build_processor(model.config, CLIPImageProcessor(), make_tokenizer(padding_side="left")).save_pretrained(folder)
    (folder / "training_facts.json").write_text('{"recipe": "tiny"}')
    evaluation = {"results": [RESULT], "weights": weights_fingerprint(folder)}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def save_images(folder: Path, count: int) -> Path:
    """Images of a few large color fields: neighboring patches are alike, and no two images are."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    for index in range(count):
        fields = torch.randint(256, (4, 4, 3), generator=generator).byte().numpy()
        Image.fromarray(fields).resize((40, 24), Image.Resampling.BICUBIC).save(folder / f"{index:02d}.png")
    return folder


def make_pixels(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(6))
