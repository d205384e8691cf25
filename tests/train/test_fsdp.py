"""FSDP2 on two processes gives what DDP gives, whatever the batches hold; resumes after a kill; saves whole models."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from colours import llava_rows
from datasets import Dataset
from launched import DDP_CPU, ROOT, SCRIPT, launch, write_settings
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


FSDP_SCRIPT = ROOT / "tests" / "fsdp_on_cpu.py"
FSDP2_CPU = (
    *("--config_file", ROOT / "train" / "accelerate" / "fsdp2.yaml", "--num_processes", "2"),
    *("--mixed_precision", "no", "--main_process_port", "0"),
)
STATES = {"full": (), "sharded": ("--fsdp_state_dict_type", "SHARDED_STATE_DICT")}
# Of five steps on two processes, four rows each: one process alone has text without images in the first and the third
# step, both in the fourth
TEXT_ONLY = (4, 5, 6, 7, 9, 14, *range(16, 20), *range(24, 32), 33)
IMAGES = [[4, 3, 0, 0, 3], [0, 3, 4, 0, 4]]
# Plain gradient descent: the weights follow the size of every gradient, which Adam would divide away
SETTINGS: dict[str, Any] = {
    **{"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 1e9},
    **{"train_sampling_strategy": "sequential", "max_steps": 5},
}
RUNS: dict[str, dict[str, Any]] = {
    "own head": {"activation_checkpointing": False},
    "tied head": {"language": "tied", "max_steps": 3},
    # No gradient passes through the language model of a process that has text alone, unless something sees to it
    "pretrain": {"stage": "pretrain", "distillation_preset": "student_heads"},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 2},
    "LoRA": {"language_lora_rank": 4, "max_steps": 3},
}
# Run by an isolated interpreter, without network and without this repository on its path
STRANGER = """
import importlib.util, json, socket, sys
from pathlib import Path

sys.path[:] = [path for path in sys.path if "site-packages" in path or not (Path(path) / "modeling_movekd").is_dir()]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
assert importlib.util.find_spec("modeling_movekd") is None and importlib.util.find_spec("train") is None

def refuse(*args, **kwargs):
    raise AssertionError(f"a connection was tried: {args}")

socket.socket.connect = socket.getaddrinfo = refuse
from safetensors.torch import load_file
from transformers import AutoModel

report = []
for folder in sys.argv[1:]:
    model, saved = AutoModel.from_pretrained(folder, trust_remote_code=True), load_file(folder + "/model.safetensors")
    weights = model.state_dict()
    assert all((weights[name] == value).all() for name, value in saved.items())
    report.append([type(model).__name__, sorted(weights.keys() - saved.keys())])
print("REPORT" + json.dumps(report))
"""


def facts(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"facts-{rank}.json").read_text())


def steps(folder: Path) -> list[dict[str, float]]:
    entries = [entry for entry in facts(folder)["log_history"] if "text" in entry]
    left_out = ("images_per_second", "num_tokens")
    return [{name: value for name, value in entry.items() if name not in left_out} for entry in entries]


def assert_sharded(folder: Path, state: str = "full") -> None:
    """What ran was FSDP2 on both processes, around every layer, with no parameter left whole."""
    for rank in range(2):
        found = facts(folder, rank)
        assert (found["world_size"], found["backend"]) == (2, "gloo")
        assert (found["distributed_type"], found["fsdp_version"]) == ("FSDP", 2)
        assert found["state_dict_type"] == f"{state.upper()}_STATE_DICT"
        assert found["called"] == ["FSDPMoveKDForConditionalGeneration"] and found["is_fsdp_module"]
        assert found["whole"] == [] and found["trainable"] > 0
        layers = {name for name in found["fsdp_modules"] if name.rsplit(".", 1)[-1].isdigit()}
        expected = [
            f"model.{part}.layers.{index}" for part in ("vision_tower.encoder", "language_model") for index in "01"
        ]
        assert layers == set(expected)
        assert {"", "lm_head", "model.language_model.embed_tokens"} <= set(found["fsdp_modules"])


def assert_same_weights(folder: Path, other: Path, **tolerance: float) -> None:
    for name in ("model.safetensors", "distiller.safetensors"):
        one, two = load_file(folder / name), load_file(other / name)
        assert one.keys() == two.keys()
        for key, value in two.items():
            torch.testing.assert_close(one[key], value, **tolerance, msg=f"{name}: {key}")


def visit(*folders: Path) -> list[list]:
    """What a process that has nothing of ours loads from the folders."""
    home = folders[0].parent
    result = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, *map(str, folders)],
        cwd=home,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "cache"), "HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return json.loads(result.stdout.split("REPORT")[1])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fsdp")
    Dataset.from_list(llava_rows(40, text_only=TEXT_ONLY)).save_to_disk(root / "mixed")
    return root


@pytest.fixture(scope="module")
def write(root: Path, parts: dict[str, str]):
    """Writes the configuration of a small run in a folder of this name."""
    config = LlamaConfig.from_pretrained(parts["language"], tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(root / "tied")
    AutoTokenizer.from_pretrained(parts["language"]).save_pretrained(root / "tied")

    def write(folder: str, language: str | None = None, **settings: Any) -> Path:
        chosen = parts if language is None else parts | {"language": str(root / language)}
        return write_settings(root / folder, chosen, str(root / "mixed"), **settings)

    return write


@pytest.fixture(scope="module")
def runs(root: Path, write) -> Path:
    """The folder of all runs, by DDP and by FSDP2, one launch of two processes for each."""
    for kind, script, launcher in (("ddp", SCRIPT, DDP_CPU), ("fsdp", FSDP_SCRIPT, FSDP2_CPU)):
        configs = [write(f"{kind}/{name}", **SETTINGS | own) for name, own in RUNS.items()]
        result = launch(script, *configs, launcher=launcher)
        assert result.returncode == 0, result.stdout[-6000:]
    return root


@pytest.mark.parametrize("name", RUNS)
def test_gives_what_ddp_gives(runs: Path, name: str) -> None:
    """Losses, gradient norms and weights; the head's too, whose gradient TRL alone would not sum over processes."""
    folder, other = runs / "fsdp" / name, runs / "ddp" / name
    assert_sharded(folder)
    assert facts(other)["called"] == ["DistributedDataParallel"]
    assert len(steps(folder)) == len(steps(other)) > 0
    for one, two in zip(steps(folder), steps(other), strict=True):
        assert one == pytest.approx(two, rel=5e-6, abs=1e-6)
    assert_same_weights(folder, other, rtol=1e-5, atol=1e-6)
    if name != "accumulation":
        assert [facts(folder, rank)["images"] for rank in range(2)] == [
            images[: len(steps(folder))] for images in IMAGES
        ]


def test_saves_what_anyone_can_load(runs: Path) -> None:
    folders = [runs / "fsdp" / name for name in ("own head", "tied head", "LoRA")]
    for folder in folders:
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert auto_map["AutoModel"] == "modeling_movekd.MoveKDForConditionalGeneration"
        assert {path.name for path in folder.glob("*.py")} == {
            path.name for path in (ROOT / "modeling_movekd").glob("*_movekd.py")
        }
    name = "MoveKDForConditionalGeneration"
    assert visit(*folders) == [[name, []], [name, ["lm_head.weight"]], [name, []]]
