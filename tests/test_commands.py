"""Every command answers `--help` and wrong arguments before anything is imported that takes seconds."""

import os
import re
import subprocess
import sys

import pytest

from benchmarks.speed.commands import command_line, commands
from benchmarks.speed.measure import ROOT


HEAVY = {*"torch transformers trl accelerate datasets gradio pandas numpy matplotlib sklearn".split()}


def run(command: str, *arguments: str) -> tuple[int, str, set[str]]:
    """Exit status and output of a command, and the modules that it imported of those that take seconds."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command_line(command), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE))
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    return done.returncode, "\n".join([done.stdout, *said]), imported & HEAVY


def test_the_commands_are_found():
    assert {"train/sft.py", "train/plan/__main__.py", "hub/push.py", "modeling_movekd/chat.py"} <= {*commands()}


@pytest.mark.parametrize("command", commands())
def test_help_imports_nothing_that_takes_seconds(command: str):
    status, said, heavy = run(command, "--help")
    assert status == 0 and said.startswith("usage: ") and not heavy


TRAINING = ["--dataset_name", "x", "--output_dir", "y"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train/sft.py", ["--config", "absent.yaml"], "absent.yaml cannot be read"),
        ("train/sft.py", ["--config"], "--config: expected one argument"),
        ("train/sft.py", ["--lerning_rate", "1"], "--lerning_rate (did you mean --learning_rate?)"),
        ("train/sft.py", ["--seed", "1"], "the following arguments are required: --dataset_name"),
        ("train/sft.py", [*TRAINING, "--num_experts", "many"], "invalid int value: 'many'"),
        ("train/sft.py", [*TRAINING, "--lr_scheduler_type", "cosin"], "invalid choice: 'cosin'"),
        ("train/sft.py", TRAINING, "`distill` is true but `teachers` is empty"),
        ("train/sft.py", [*TRAINING, "--teachers", "clip", "--vision_model", "./outs"], "./outs is neither a folder"),
        ("train/feature_cache.py", [*TRAINING, "--cache_dtype", "int4"], "invalid choice: 'int4'"),
        ("train/plan/__main__.py", ["--gpus", "8"], "required: --gpu-memory"),
        ("train/plan/__main__.py", ["--gpus", "8", "--gpu-memory", "80GB", "--sed", "1"], "arguments: --sed"),
        ("modeling_movekd/chat.py", [], "required: checkpoint"),
        ("modeling_movekd/visualize.py", ["./outs", "a.png", "--out", "b"], "./outs is neither a folder"),
        ("modeling_movekd/predict.py", ["a", "b", "c", "--batch-size", "0"], "--batch-size is 0"),
        ("hub/convert.py", ["a", "b", "--to", "originl"], "`to` is 'originl'"),
        ("hub/export.py", ["a", "b", "--form", "clip", "--rank", "3"], "`rank` is for the form `merged`"),
        ("hub/push.py", ["a", "b", "--space-repo", "c"], "do nothing without `--space`"),
        ("benchmarks/replication/__main__.py", ["--arms", "nobody"], "has no arms ['nobody']"),
        ("benchmarks/speed/tower.py", ["--parts", "time"], "invalid choice: 'time'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_at_once(command: str, arguments: list[str], message: str):
    status, said, heavy = run(command, *arguments)
    assert status in (1, 2) and message in said and "Traceback" not in said and not heavy
