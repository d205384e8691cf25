"""The base models under the small original checkpoint of the golden numbers."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


TOWER = "model.vision_tower.vision_tower."


def write_base_models(original: Path, folder: Path) -> tuple[Path, Path]:
    """
    Write the CLIP and the language model that the checkpoint started from. Stage 1 changes neither, and only the state
    at its end has their weights.
    """
    state = load_file(original / "stage1_state.safetensors")
    vision = folder / "vision"
    shutil.copytree(original / json.loads((original / "config.json").read_text())["mm_vision_tower"], vision)
    tower = {key.removeprefix(TOWER): value for key, value in state.items() if key.startswith(TOWER)}
    tower = {key: value for key, value in tower.items() if ".moe_" not in key and ".router." not in key}
    save_file(
        {key.replace("original_module.", ""): value for key, value in tower.items()},
        vision / "model.safetensors",
        metadata={"format": "pt"},
    )
    language = folder / "language"
    language.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copyfile(original / name, language / name)
    config = json.loads((original / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith(("mm_", "moe", "kd"))}
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (language / "config.json").write_text(json.dumps(config))
    weights = {key: value for key, value in state.items() if key.startswith(("model.", "lm_head."))}
    weights = {key: value for key, value in weights.items() if not key.startswith((TOWER, "model.mm_projector."))}
    save_file(weights, language / "model.safetensors", metadata={"format": "pt"})
    return vision, language
