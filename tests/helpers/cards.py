"""Checkpoints with the metadata that a card is written from."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard


FIXTURES = Path(__file__).parents[1] / "fixtures" / "card"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "model_type": "movekd",
    "auto_map": {"AutoModel": "modeling_movekd.MoveKDForConditionalGeneration"},
    "image_aspect_ratio": "pad",
    "vision_config": {"model_type": "movekd_vision", "num_experts": 3, "lora_rank": 32, "image_size": 336},
    "text_config": {"model_type": "llama"},
}
RESULT = {
    "task": "image-text-to-text",
    "dataset": "lmms-lab/textvqa",
    "split": "validation",
    "metric": "exact_match",
    "value": 0.582,
    "prompt": "with OCR tokens",
    "revision": COMMIT,
}


def facts_of_a_lab() -> dict[str, Any]:
    """The metadata of a real run of two tiny stages, with names of the Hub."""
    facts = json.loads((FIXTURES / "training_facts.json").read_text())
    facts["base_models"] = [
        {"role": "vision_model", "model": "openai/clip-vit-large-patch14-336", "revision": COMMIT, "license": None},
        {"role": "language_model", "model": "lmsys/vicuna-7b-v1.5", "revision": None, "license": None},
    ]
    for stage in (facts, *facts["earlier_stages"]):
        stage["teachers"][1] |= {"name": "sam", "model": "facebook/sam-vit-large", "license": "apache-2.0"}
        stage["data"][0] |= {"name": "owner/captions", "revision": COMMIT}
    return facts


def checkpoint(folder: Path, facts: Any = None, config: Any = CONFIG, results: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in (("training_facts", facts), ("config", config), ("evaluation", results)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def metadata(path: Path) -> dict[str, Any]:
    return ModelCard.load(path).data.to_dict()
