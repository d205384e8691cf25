"""
Load a checkpoint as others will: in a process of its own, offline, with only the code in its folder.

    python -P hub/push_validate.py CHECKPOINT

The last line of the output is one JSON object: `{"model": class, "parameters": count, "device": "cpu" or "meta"}`, or
`{"problem": text}` with exit status 1. With `--meta` the model is loaded on the meta device, which compares names and
shapes without reading the values.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]


def load(folder: str, meta: bool) -> dict[str, Any]:
    """Load configuration, processor and weights of a checkpoint, and check that they fit each other."""
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
        if (tokens := len(processor.tokenizer)) > (rows := config.text_config.vocab_size):
            raise ValueError(f"the tokenizer has {tokens} tokens, the embedding {rows} rows")
        tiles = getattr(config, "image_aspect_ratio", None) == "anyres" or config.model_type == "llava_next"
        expected = [list(grid) for grid in config.image_grid_pinpoints] if tiles else []
        grids = [list(grid) for grid in getattr(processor.image_processor, "image_grid_pinpoints", None) or []]
        if grids != expected:
            raise ValueError(f"the processor cuts tiles by the grids {grids}, the model takes {expected}")
        if not processor.chat_template:
            raise ValueError("the processor has no chat template")
        check_sides(processor.image_processor, vision.image_size)
        pixels = processor(text=processor.image_token, images=image, return_tensors="pt")["pixel_values"]
    else:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
        check_sides(processor, vision.image_size)
        pixels = processor(image, return_tensors="pt")["pixel_values"]
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
    device = "meta" if meta else "cpu"
    return {"model": type(model).__name__, "parameters": model.num_parameters(), "device": device}


def check_sides(image_processor: Any, image_size: int) -> None:
    """Check the sizes before an image is resized to them, which takes memory for each pixel."""
    sizes = {**dict(image_processor.size), **dict(getattr(image_processor, "crop_size", None) or {})}
    if max(sizes.values(), default=0) > 4 * image_size:
        raise ValueError(f"the processor cuts images to {sizes}, the model takes {image_size}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of the checkpoint")
    parser.add_argument("--meta", action="store_true", help="compare names and shapes without reading the values")
    options = parser.parse_args()
    # An editable install of this repository is on the path of every process
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]
    for name in ("modeling_movekd", "hub", "train"):
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        print(json.dumps(load(options.checkpoint, options.meta)))
    except Exception as error:
        print(json.dumps({"problem": f"{type(error).__name__}: {error}"}))
        sys.exit(1)
