"""The Space in a process of its own, a checkpoint to show there, and a browser to look at it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel
from modeling_movekd.processing import add_image_token, build_processor


ROOT = Path(__file__).resolve().parents[2]
TOWERS = ROOT / "train" / "demo" / "weights"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
# Nothing but the page may be asked for: the browser itself neither updates nor reports
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@torch.no_grad()
def build_checkpoint(folder: Path) -> None:
    """A student of the demo's parts with random weights, which never ends an answer by itself and takes its time."""
    torch.manual_seed(0)
    clip = CLIPVisionModel.from_pretrained(TOWERS / "clip")
    tower = MoveKDVisionModel.from_clip(clip, lora_rank=4, lora_alpha=8.0, expert_init="kaiming")
    tokenizer = AutoTokenizer.from_pretrained(TOWERS / "language_model")
    image_token_id = add_image_token(tokenizer)
    config = LlamaConfig.from_pretrained(
        TOWERS / "language_model", num_hidden_layers=16, max_position_embeddings=4096, vocab_size=len(tokenizer)
    )
    model = MoveKDForConditionalGeneration.from_parts(tower, LlamaForCausalLM(config), image_token_id)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and ("vision_tower" not in name or "expert" in name or "router" in name):
            parameter.copy_(0.2 * torch.randn_like(parameter))
    # Plain words, which Markdown leaves alone
    vocabulary = tokenizer.get_vocab()
    model.generation_config.suppress_tokens = sorted(
        index for token, index in vocabulary.items() if not token.removeprefix("▁").isalpha()
    )
    model.eval().save_pretrained(folder)
    image_processor = CLIPImageProcessor.from_pretrained(TOWERS / "clip")
    build_processor(model.config, image_processor, tokenizer).save_pretrained(folder)


@contextmanager
def running_space(checkpoint: Path, log: Path, **environment: str) -> Iterator[str]:
    """
    `python spaces/app.py` with a checkpoint, ended with the context.

    Args:
        log: File that everything it says is written to.
        environment: More variables, such as `CLIP_ID`.

    Yields:
        Its address.

    Raises:
        RuntimeError: if it ends before it listens, with what it said.
    """
    own = {"MODEL_ID": str(checkpoint), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, ROOT / "spaces" / "app.py", "--host", "127.0.0.1"],
            stdout=subprocess.PIPE,
            stderr=said,
            env={**os.environ, **own, **environment},
            text=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    break
            else:
                raise RuntimeError(f"The Space ended with {process.wait()}:\n{log.read_text()}")
            yield found[0]
        finally:
            process.send_signal(signal.SIGTERM)
            with process.stdout:
                process.stdout.read()
            process.wait()


@contextmanager
def chromium() -> Iterator[Any]:
    """Debian's Chromium, driven by playwright; each of its contexts is an empty profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()
