"""
Loads a checkpoint as a stranger would: in a process of its own, with the code of its folder alone, offline.

    python -P hub/push_validate.py CHECKPOINT

The last line of the output is one JSON object: `{"model": class, "parameters": count, "device": "cpu" or "meta"}`, or
`{"problem": text}` with exit status 1. Weights beyond half of the free memory are loaded on the meta device, which
compares names and shapes without reading the values.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil


ROOT = Path(__file__).resolve().parents[1]


def validate(folder: Path, meta: bool | None = None) -> dict[str, Any]:
    """
    Load the checkpoint in a fresh process, without this repository, the network, or any token.

    Args:
        folder: The checkpoint.
        meta: Whether to compare names and shapes alone; by default where the weights would not fit in memory.

    Returns:
        What was loaded: `model` (class), `parameters` (count), `device`.

    Raises:
        ValueError: if the configuration, the processor or the weights do not load, with the reason.
    """
    if meta is None:
        size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
        meta = size > psutil.virtual_memory().available / 2
    kept = {
        name: value
        for name, value in os.environ.items()
        # Neither tokens, nor what a launcher says to its processes
        if "TOKEN" not in name and not name.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"))
    }
    with tempfile.TemporaryDirectory() as cache:
        own = {"HF_HOME": cache, "HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-P", __file__, str(folder.resolve()), *(["--meta"] if meta else [])]
        result = subprocess.run(
            command, env=kept | own, cwd=cache, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    lines = result.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else {}
    except json.JSONDecodeError:
        answer = {}
    if result.returncode or "model" not in answer:
        reason = answer.get("problem") or (result.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise ValueError(f"The checkpoint does not load in a process of its own: {reason}")
    return answer


def load(folder: str, meta: bool) -> dict[str, Any]:
    """
    Configuration, processor and weights of a checkpoint, read and held against each other.

    Raises:
        ValueError: for what does not fit.
    """
    import torch
    from PIL import Image
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    vision = getattr(config, "vision_config", config)
    image = Image.new("RGB", (vision.image_size, vision.image_size))
    if has_text := hasattr(config, "text_config"):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        if processor.image_token_id != config.image_token_index:
            raise ValueError(
                f"the processor's image token is {processor.image_token_id}, the model's {config.image_token_index}"
            )
        if not processor.chat_template:
            raise ValueError("the processor has no chat template")
        pixels = processor(text=processor.image_token, images=image, return_tensors="pt")["pixel_values"]
    else:
        pixels = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)(image, return_tensors="pt")[
            "pixel_values"
        ]
    if pixels.shape[-2:] != (vision.image_size, vision.image_size):
        raise ValueError(
            f"the processor cuts images to {tuple(pixels.shape[-2:])}, the model takes {vision.image_size}"
        )
    auto_class = AutoModelForImageTextToText if has_text else AutoModel
    model, report = auto_class.from_pretrained(
        folder,
        trust_remote_code=True,
        dtype="auto",
        device_map="meta" if meta else None,
        output_loading_info=True,
    )
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[name]:
            raise ValueError(f"the weights have {name.replace('_', ' ')}: {sorted(map(str, report[name]))}")
    if not meta and (bad := [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]):
        raise ValueError(f"weights that are not finite: {bad}")
    device = "meta" if meta else "cpu"
    return {"model": type(model).__name__, "parameters": model.num_parameters(), "device": device}


if __name__ == "__main__":
    # An installed clone is on the path of every process
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]
    for name in ("modeling_movekd", "hub", "train"):
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        print(json.dumps(load(sys.argv[1], "--meta" in sys.argv[2:])))
    except Exception as error:
        print(json.dumps({"problem": f"{type(error).__name__}: {error}"}))
        sys.exit(1)
