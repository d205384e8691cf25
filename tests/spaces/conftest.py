"""A small checkpoint, and the Space over it, started as anybody would start it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor

from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel
from modeling_movekd.processing import build_processor


ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "spaces"
TOWERS = ROOT / "train" / "demo" / "weights"


@dataclass
class RunningSpace:
    """A started Space: its address, its process, what it wrote so far, and the folder its temporary files go to."""

    url: str
    process: subprocess.Popen
    log: Path
    temporary: Path

    def end(self) -> int:
        """Ask it to end, as a Space's host does; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@contextmanager
def running_space(folder: Path, arguments: Sequence[str] = (), **environment: str) -> Iterator[RunningSpace]:
    """
    A copy of `spaces/` in `folder`, far from the repository, run on a free port with this environment and no other.

    Raises:
        AssertionError: with its output, if it ends or does not listen within three minutes.
    """
    shutil.copytree(SPACE, folder / "space", ignore=shutil.ignore_patterns("__pycache__"))
    temporary, log = folder / "temporary", folder / "log.txt"
    temporary.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "TMPDIR": str(temporary),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **environment,
    }
    # The Space looks for a port itself: one found free here might be taken by the time it listens
    command = [sys.executable, "space/app.py", "--host", "127.0.0.1", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 180
        # With the end of the line, lest the port be read half written
        while not (found := re.search(r"Running on local URL:\s+(http://\S+)\n", log.read_text(errors="replace"))):
            assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")
            time.sleep(0.1)
        yield RunningSpace(found[1], process, log, temporary)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    The demo's CLIP and language model joined anew: what it says is random, in the demo's words, and never ends by
    itself, so that every answer is as long as it may be.
    """
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(0)
    vision = MoveKDVisionModel.from_clip(
        TOWERS / "clip", num_experts=3, lora_rank=4, lora_alpha=8.0, expert_init="kaiming"
    )
    language = AutoModelForCausalLM.from_pretrained(TOWERS / "language_model")
    model = MoveKDForConditionalGeneration.from_parts(vision, language)
    processor = CLIPImageProcessor.from_pretrained(TOWERS / "clip")
    tokenizer = AutoTokenizer.from_pretrained(TOWERS / "language_model")
    # Whole words alone, and not the same over and over
    others = [index for token, index in tokenizer.get_vocab().items() if not token.removeprefix("▁").isalpha()]
    model.generation_config.suppress_tokens = sorted(others)
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(folder)
    build_processor(model.config, processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoders() -> dict[str, str]:
    """Variables that set plain CLIP and a teacher beside the student."""
    return {"CLIP_ID": str(TOWERS / "clip"), "TEACHER_IDS": f"reader={TOWERS / 'reader'}"}


@pytest.fixture(scope="module")
def space(
    checkpoint: Path, encoders: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningSpace]:
    """The Space over the checkpoint, with the endpoints for programs."""
    folder = tmp_path_factory.mktemp("space")
    with running_space(folder, ("--mcp",), MODEL_ID=str(checkpoint), **encoders) as started:
        yield started
