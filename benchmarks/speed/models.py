"""Networks of full and of toy size with random weights, and the steps of them that the timing scripts share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from benchmarks.speed.measure import ROOT
from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel
from modeling_movekd.processing import add_image_token, build_processor


CLIP_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_LARGE |= {"image_size": 336, "patch_size": 14, "projection_dim": 768}
TOY_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
TOY_CLIP |= {"image_size": 28, "patch_size": 14, "projection_dim": 16}
# SmolLM2-360M, and the tower of CLIP-B/16, DINOv2-B and SigLIP 2 B
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
LANGUAGE = {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15}
LANGUAGE |= {"num_key_value_heads": 5, "vocab_size": 49152}
TOKENIZER = ROOT / "train" / "demo" / "weights" / "language_model"


@dataclass
class TowerCase:
    """A tower and the CLIP that it is made from, as a fresh process can get them in JSON."""

    sizes: dict[str, int] = field(default_factory=lambda: CLIP_LARGE)
    batch_size: int = 2
    num_experts: int = 3
    lora_rank: int = 32
    lora_dropout: float = 0.05
    device: str = "cpu"
    dtype: str = "float32"

    def clip(self) -> CLIPVisionModel:
        torch.manual_seed(0)
        clip = CLIPVisionModel._from_config(
            CLIPVisionConfig(**self.sizes), dtype=getattr(torch, self.dtype), attn_implementation="sdpa"
        )
        return clip.to(self.device).requires_grad_(False).eval()

    def tower(self, checkpointing: bool = False) -> MoveKDVisionModel:
        """Experts and routers train; CLIP's weights do not."""
        experts: dict[str, Any] = {
            "num_experts": self.num_experts,
            "lora_rank": self.lora_rank,
            "lora_dropout": self.lora_dropout,
        }
        tower = MoveKDVisionModel.from_clip(self.clip(), **experts)
        for name, parameter in tower.named_parameters():
            parameter.requires_grad_("expert" in name or "router" in name)
        if checkpointing:
            tower.gradient_checkpointing_enable({"use_reentrant": False})
        return tower

    def pixels(self) -> torch.Tensor:
        size = self.sizes["image_size"]
        draw = torch.randn(self.batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
        return draw.to(self.device, getattr(torch, self.dtype))


def features(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """The last hidden state without [CLS]: LLaVA's features of our tower, and all layers of plain CLIP."""
    return model(pixels).last_hidden_state[:, 1:]


def forward(model: nn.Module, pixels: torch.Tensor) -> Callable[[], Any]:
    @torch.no_grad()
    def run() -> torch.Tensor:
        return features(model.eval(), pixels)

    return run


def training_step(model: nn.Module, pixels: torch.Tensor) -> Callable[[], Any]:
    """Forward, a loss on the features, backward; the gradients are dropped."""

    def run() -> None:
        features(model.train(), pixels).float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return run


def vision_language_model(
    clip: dict[str, int], language: dict[str, Any], **kwargs: Any
) -> tuple[MoveKDForConditionalGeneration, Any]:
    """A student and its processor, with the demo's tokenizer; `kwargs` are fields of the tower's config."""
    torch.manual_seed(0)
    vision = MoveKDVisionModel.from_clip(
        CLIPVisionModel(CLIPVisionConfig(**clip)), num_experts=3, lora_rank=32, **kwargs
    )
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model = MoveKDForConditionalGeneration.from_parts(
        vision, LlamaForCausalLM(LlamaConfig(**language)), image_token_id=add_image_token(tokenizer)
    )
    size = clip["image_size"]
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return model, build_processor(model.config, images, tokenizer, "vicuna_v1")
