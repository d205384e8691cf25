"""
Memory of loading a large checkpoint, and time of importing the package: `python -m benchmarks.speed.loading`.

The checkpoint has the shapes of LLaVA-1.5-7B, but fewer layers, so that it fits a small machine. Layers are loaded one
tensor at a time, so more of them would not change the peak over the weights. The shards are sparse files of zeros,
which take no disk space.
"""

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.options import parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    flags = parser(__doc__, repeats=5)
    flags.add_argument("--layers", type=int, default=6, help="layers of the language model; the 7B has 32")
    return flags.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from benchmarks.speed.measure import ROOT, Row, peak_memory, report, start
from benchmarks.speed.models import CLIP_LARGE, TOY_CLIP
from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel
from modeling_movekd.files import save_json


VICUNA = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
TOY_LANGUAGE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 100}
BASELINE = "import torch, transformers.models.clip.modeling_clip, transformers.models.llava_next.modeling_llava_next"


def write_empty(folder: Path, tower: dict[str, int], language: dict[str, int], shard_size: int) -> int:
    """Write a checkpoint of zeros in bfloat16; returns the bytes of its weights."""
    with torch.device("meta"):
        vision = MoveKDVisionModel.from_clip(CLIPVisionModel(CLIPVisionConfig(**tower)), num_experts=3, lora_rank=32)
        text = LlamaForCausalLM(LlamaConfig(**{**language, "vocab_size": language["vocab_size"] + 1}))
        model = MoveKDForConditionalGeneration.from_parts(vision, text, image_token_id=language["vocab_size"])
    model, model.config.dtype = model.to(torch.bfloat16), torch.bfloat16
    model.config.save_pretrained(folder)
    weights = model.state_dict()
    plan = split_torch_state_dict_into_shards(
        weights, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_size
    )
    total = 0
    for file_name, names in plan.filename_to_tensors.items():
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            begin, end = end, end + weights[name].nbytes
            header[name] = {"dtype": "BF16", "shape": list(weights[name].shape), "data_offsets": [begin, end]}
        encoded = json.dumps(header).encode()
        with (folder / file_name).open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            file.truncate(8 + len(encoded) + end)
        total += end
    if plan.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": plan.tensor_to_filename}
        save_json(index, folder / "model.safetensors.index.json")
    return total


def loading(folder: str, device: str, dtype: str) -> Callable[[], Any]:
    """For a fresh process: load the checkpoint and read every weight once."""
    # The first use of a device and lazy imports must not count
    LlamaForCausalLM(LlamaConfig(**TOY_LANGUAGE, num_hidden_layers=1)).to(device)

    def run() -> MoveKDForConditionalGeneration:
        model = MoveKDForConditionalGeneration.from_pretrained(folder, dtype=dtype, device_map=device)
        for parameter in model.parameters():  # weights in the file's own dtype are mapped, and count once read
            parameter.detach().flatten()[::256].any()
        return model

    return run


def import_seconds(repeats: int, warm_up: int = 1) -> list[float]:
    """Seconds of CPU time of importing `modeling_movekd`, in processes that have imported its dependencies."""
    model = "from modeling_movekd import MoveKDForConditionalGeneration"  # the package itself imports nothing
    code = f"{BASELINE}, time; t = time.process_time(); {model}; print(time.process_time() - t)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    found = [
        float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats + warm_up)
    ]
    return found[warm_up:]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    start(options)
    tower, language = (TOY_CLIP, TOY_LANGUAGE) if options.toy else (CLIP_LARGE, VICUNA)
    layers = 2 if options.toy else options.layers
    with tempfile.TemporaryDirectory() as folder:
        weights = write_empty(Path(folder), tower, {**language, "num_hidden_layers": layers}, 10**9)
        where = {"folder": folder, "device": options.device}
        peak, converted = (
            peak_memory("benchmarks.speed.loading:loading", {**where, "dtype": dtype}, beyond=True, toy=options.toy)
            for dtype in ("auto", "float32")
        )
    seconds = statistics.median(import_seconds(1, 0) if options.toy else import_seconds(options.repeats))
    rows = [
        Row(
            f"loading a checkpoint with the shapes of the 7B, {layers} layers, bfloat16: peak over the weights",
            peak / 2**20,
            weights / 2**20,
            "MB",
            at_most=1.1,
            note="rival: bytes of the weights",
        ),
        Row(
            "the same, turned into float32 while loading",
            converted / 2**20,
            2 * weights / 2**20,
            "MB",
            note="rival: bytes of the weights in float32; the mapped shards count too",
        ),
        Row(
            "CPU time of importing `modeling_movekd` where transformers' CLIP and LLaVA-NeXT are imported",
            seconds * 1000,
            50.0,
            "ms",
            at_most=1.0,
            note="rival: 50 ms",
        ),
    ]
    report("Loading and import", rows, {"repeats": options.repeats, "shards": "1 GB, sparse"}, options.out)


if __name__ == "__main__":
    main()
