"""Conversions hold little in memory, and leave nothing that loads where they are stopped."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hub.weights
from hub.convert import convert
from tests.helpers.conversions import edit_json, nothing_left, split


ROOT = Path(__file__).parents[2]


def test_interrupted(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays of a conversion that is stopped while it writes."""
    written = []

    def stop_at_the_second(tensors: dict, path: Path, **kwargs: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(hub.weights, "save_file", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        convert(copy, tmp_path / "dest", max_shard_size=100_000)
    assert written and not written[0].exists()
    assert nothing_left(tmp_path)


IN_A_PROCESS = """
import os, signal, sys
from pathlib import Path
sys.path[0] = sys.argv[1]
import hub.weights
from hub.convert import convert

def memory():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}

count, save_file = 0, hub.weights.save_file
def counted(*arguments, **settings):
    global count
    count += 1
    if count == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    save_file(*arguments, **settings)

hub.weights.save_file = counted
before = memory()["VmRSS"]
convert(sys.argv[2], sys.argv[3], max_shard_size=int(sys.argv[5]))
print("grown", memory()["VmHWM"] - before, count)
"""


def in_a_process(source: Path, dest: Path, die_at: int, max_shard_size: int) -> subprocess.CompletedProcess:
    arguments = [str(ROOT), str(source), str(dest), str(die_at), str(max_shard_size)]
    return subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, *arguments], capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.slow
def test_killed(copy: Path, tmp_path: Path) -> None:
    """What a killed conversion leaves has another name and no configuration."""
    ended = in_a_process(copy, tmp_path / "dest", die_at=2, max_shard_size=100_000)
    assert ended.returncode == -9, ended.stderr
    assert not (tmp_path / "dest").exists()
    (rest,) = tmp_path.glob(".dest.*.partial")
    assert list(rest.glob("model*")) and not list(rest.glob("*.json"))
    convert(copy, tmp_path / "dest")
    assert (tmp_path / "dest" / "config.json").is_file() and not list(tmp_path.glob(".*"))


def test_memory(copy: Path, tmp_path: Path) -> None:
    """Far less is in memory than the whole, however many shards there are."""
    weights = load_file(copy / "model.safetensors")
    layers, width, intermediate = 18, weights["model.norm.weight"].shape[0], 40_000
    template = {key: value for key, value in weights.items() if key.startswith("model.layers.0.")}
    weights = {key: value for key, value in weights.items() if not key.startswith("model.layers.")}
    for layer in range(layers):
        for key, value in template.items():
            if ".mlp." in key:
                shape = (width, intermediate) if "down_proj" in key else (intermediate, width)
                value = torch.zeros(shape)
            weights[key.replace(".0.", f".{layer}.", 1)] = value.clone()
    save_file(weights, copy / "model.safetensors")
    edit_json(copy / "config.json", num_hidden_layers=layers, intermediate_size=intermediate)
    shards = split(copy, "safetensors", shards=6)
    sizes = [path.stat().st_size for path in shards]
    ended = in_a_process(copy, tmp_path / "dest", die_at=0, max_shard_size=max(sizes))
    assert ended.returncode == 0, ended.stderr
    grown, count = map(int, ended.stdout.splitlines()[-1].split()[1:])
    assert count >= len(shards)
    # What a few modules and a tokenizer take is not the weights'
    assert grown < 1.3 * max(sizes) + 100e6 < 0.7 * sum(sizes), (grown, sizes)
