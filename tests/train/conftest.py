"""Tiny models of a run, saved as folders, and rows of generated images to train on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from tests.helpers.cached_rows import mixed_rows, write
from tests.helpers.colored_rows import llava_rows
from tests.helpers.trainers import SMALL_RUN
from train.arguments import DataArguments, ModelArguments
from train.config import MoveKDSFTConfig


TOKENIZER = Path(__file__).parents[1] / "fixtures" / "parity" / "conversation" / "tokenizer"


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a CLIP (4 x 4 patches), a ViT teacher (6 x 6 patches), and a language model with its tokenizer."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**size, num_hidden_layers=3, image_size=16, patch_size=4)).save_pretrained(
        folder / "clip"
    )
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder / "clip"
    )
    vit = size | {"hidden_size": 24, "num_hidden_layers": 2, "image_size": 36, "patch_size": 6}
    ViTModel(ViTConfig(**vit), add_pooling_layer=False).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 36, "width": 36}).save_pretrained(folder / "vit")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(folder / "language")
    config = LlamaConfig(
        **size, vocab_size=len(tokenizer), num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=512
    )
    LlamaForCausalLM(config).save_pretrained(folder / "language")
    return {name: str(folder / name) for name in ("clip", "vit", "language")}


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """48 rows with images, saved by `save_to_disk`."""
    folder = str(tmp_path_factory.mktemp("data") / "colors")
    Dataset.from_list(llava_rows(48)).save_to_disk(folder)
    return folder


@pytest.fixture
def arguments(parts: dict[str, str], dataset_folder: str, tmp_path: Path) -> Any:
    """Makes the three arguments of `train.run.train`, for a small run on CPUs; keywords override them."""

    def make(**overrides: Any) -> tuple[DataArguments, MoveKDSFTConfig, ModelArguments]:
        data = {"dataset_name": overrides.pop("dataset_name", dataset_folder)}
        model = {"model_name_or_path": overrides.pop("model_name_or_path", None)}
        settings: dict[str, Any] = SMALL_RUN | {
            "output_dir": str(tmp_path / "output"),
            "teachers": [{"name": "clip", "model": parts["clip"]}, {"name": "vit", "model": parts["vit"]}],
            "max_steps": 3,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "overwrite_output_dir": True,
            "feature_statistics_images": 24,
            "whitening_components": 8,
        }
        if model["model_name_or_path"] is None:
            settings |= {"vision_model": parts["clip"], "language_model": parts["language"]}
        return DataArguments(**data), MoveKDSFTConfig(**settings | overrides), ModelArguments(**model)

    return make


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("mixed") / "rows")
    Dataset.from_list(mixed_rows()).save_to_disk(folder)
    return folder


@pytest.fixture
def cached(arguments, mixed: str, tmp_path: Path) -> Callable[..., tuple[Any, ...]]:
    """Writes a cache and makes the arguments of a run that reads it."""

    def make(cache_dtype: str = "float16", rows_per_shard: int = 5, **overrides: Any) -> tuple[Any, ...]:
        settings = {"dataset_name": mixed, "max_length": None, "feature_cache": str(tmp_path / "cache")} | overrides
        write(arguments(**settings), cache_dtype, rows_per_shard)
        return arguments(**settings)

    return make
