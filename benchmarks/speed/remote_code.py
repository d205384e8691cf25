"""
CPU time of loading a checkpoint by the code beside it: `python -m benchmarks.speed.remote_code`.

The checkpoint has the shapes of the demo's student. The rival is transformers' LLaVA-NeXT of the same shapes. Each
load is that of a fresh process, which has imported torch and transformers: the first copies and compiles the
checkpoint's code, a later one finds it in the cache of modules.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed.options import parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return parser(__doc__, repeats=5).parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

from benchmarks.speed.measure import ROOT, Row, paired_row, report


WEIGHTS = ROOT / "train" / "demo" / "weights"
LOAD = """
import sys, time
import torch, transformers
from transformers import AutoModelForImageTextToText
start = time.process_time()
AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "ours")
print(time.process_time() - start)
"""


def write_checkpoints(folder: Path) -> None:
    """Save the demo's student and the LLaVA-NeXT, with random experts and projectors, as `ours` and `stock`."""
    from transformers import (
        CLIPVisionModel,
        LlamaForCausalLM,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel

    clip = CLIPVisionModel.from_pretrained(WEIGHTS / "clip")
    language = LlamaForCausalLM.from_pretrained(WEIGHTS / "language_model")
    parts = {"vision_config": clip.config.to_dict(), "text_config": language.config.to_dict()}
    image_token = language.config.vocab_size - 1
    stock = LlavaNextForConditionalGeneration(LlavaNextConfig(**parts, image_token_index=image_token))
    stock.save_pretrained(folder / "stock")
    tower = MoveKDVisionModel.from_clip(clip, num_experts=3, lora_rank=8)
    MoveKDForConditionalGeneration.from_parts(tower, language, image_token_id=image_token).save_pretrained(
        folder / "ours"
    )


def load_seconds(checkpoint: Path, modules: Path) -> float:
    """CPU seconds of loading a checkpoint in a fresh process, with the folder `modules` as the cache of modules."""
    # Without PYTHONPATH: what counts is the code in the checkpoint
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(checkpoint), checkpoint.name]
    done = subprocess.run(command, env=environment, cwd=checkpoint, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"Loading {checkpoint} failed:\n{done.stdout}{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def measure(folder: Path, repeats: int) -> list[Row]:
    """Load both checkpoints `repeats` times in alternating order, each time without and with the cached code."""
    seconds: dict[str, list[float]] = {"ours": [], "ours, later": [], "stock": []}
    for repeat in range(repeats):
        for name in ("ours", "stock") if repeat % 2 == 0 else ("stock", "ours"):
            modules = folder / "modules"
            shutil.rmtree(modules, ignore_errors=True)
            seconds[name].append(load_seconds(folder / name, modules))
            if name == "ours":
                seconds["ours, later"].append(load_seconds(folder / name, modules))
    what, note = "of the demo's checkpoint by its own code, CPU time", "rival: LLaVA-NeXT of the same shapes"
    return [
        paired_row(f"first load {what}", seconds["ours"], seconds["stock"], at_most=1.1, note=note),
        paired_row(f"later load {what}", seconds["ours, later"], seconds["stock"], at_most=1.1, note=note),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoints(Path(folder))
        rows = measure(Path(folder), 1 if options.toy else options.repeats)
    report("Loading a checkpoint by its own code", rows, {"repeats": options.repeats}, options.out)


if __name__ == "__main__":
    main()
