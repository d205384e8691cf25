"""The demo under ZeRO-2 and ZeRO-3: killed and resumed runs, their checkpoints, and refused settings."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from safetensors.torch import load_file

from modeling_movekd import MoveKDVisionConfig, MoveKDVisionModel
from modeling_movekd.files import read_json
from tests.helpers.bare_process import load_as_stranger
from tests.helpers.launched import ROOT, SCRIPT, launch
from train.checkpoints import MANIFEST_NAME, write_manifest
from train.demo.scenes import scenes
from train.distributed import check_launch


ACCELERATE = ROOT / "train" / "accelerate"
SFT = ROOT / "train" / "sft.py"
RECIPES = ROOT / "train" / "recipes"


def launcher(stage: int) -> tuple[str | Path, ...]:
    """The shipped configuration on two processes, stage 3 in bfloat16 and stage 2 in float32."""
    flags = ("--config_file", ACCELERATE / f"zero{stage}.yaml", "--num_processes", "2", "--main_process_port", "0")
    return (*flags, "--mixed_precision", "no") if stage == 2 else flags


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory):
    """Writes a recipe of the demo, scaled down to a few rows and steps."""
    root = tmp_path_factory.mktemp("demo")
    scenes("finetune", 64).save_to_disk(root / "data")

    def make(name: str, recipe: str, **overrides: Any) -> Path:
        settings = yaml.safe_load((RECIPES / f"demo_{recipe}.yaml").read_text())
        settings |= {
            "dataset_name": str(root / "data"),
            "output_dir": str(root / name),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        path = root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings | overrides, sort_keys=False), encoding="utf-8")
        return path

    return make


def logged(checkpoint: Path) -> list[dict[str, float]]:
    """The log after the second step, without times and without TRL's count of tokens since the start."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    left_out = ("images_per_second", "num_tokens")
    return [{name: e[name] for name in e if name not in left_out} for e in history if e["step"] > 2]


def assert_equal(folder: Path, other: Path, name: str) -> None:
    one, two = load_file(folder / name), load_file(other / name)
    assert one.keys() == two.keys()
    assert [key for key, value in two.items() if not torch.equal(value, one[key])] == []


def runs(write, stage: int) -> dict[str, Path]:
    settings: dict[str, Any] = {"bf16": stage == 3}
    saving = {"save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.05}
    pretrain = write(f"zero{stage}-pretrain", "pretrain", **settings, max_steps=2, lora_dropout=0.05)
    settings |= saving | {"model_name_or_path": str(pretrain.with_suffix(""))}
    return {"pretrain": pretrain} | {
        name: write(f"zero{stage}-{name}", "finetune", **settings) for name in ("straight", "killed")
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_killed_and_resumed_is_the_same_run(write, stage: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    configs = runs(write, stage)
    died = launch(SCRIPT, "--die_after", "2", *configs.values(), launcher=launcher(stage))
    assert died.returncode != 0 and "SIGKILL" in died.stdout, died.stdout[-6000:]
    pretrain, straight, killed = (config.with_suffix("") for config in configs.values())
    assert (killed / "checkpoint-2").is_dir() and not (killed / "checkpoint-4").exists()
    for rank in range(2):
        facts = json.loads((straight / f"facts-{rank}.json").read_text())
        assert (facts["world_size"], facts["called"], facts["zero_stage"]) == (2, ["DeepSpeedEngine"], stage)

    copy = shutil.copytree(killed / "checkpoint-2", tmp_path / "checkpoint-2")
    flags = ("--config", configs["killed"], "--resume_from_checkpoint")
    resumed = launch(SFT, *flags, killed / "checkpoint-2", launcher=launcher(stage))
    assert resumed.returncode == 0, resumed.stdout[-6000:]
    last, expected = killed / "checkpoint-4", straight / "checkpoint-4"
    for name in ("model.safetensors", "distiller.safetensors"):
        assert_equal(last, expected, name)
    assert len(logged(last)) == 2 and logged(last) == logged(expected)
    # A distiller that was not restored would have the weights of the first stage
    first, middle, end = (load_file(folder / "distiller.safetensors") for folder in (pretrain, copy, last))
    heads = [key for key in first if ".head." in key]
    assert heads and not any(
        torch.equal(first[key], middle[key]) or torch.equal(middle[key], end[key]) for key in heads
    )

    dtype = torch.float32 if stage == 2 else torch.bfloat16
    assert {value.dtype for value in load_file(last / "model.safetensors").values()} == {dtype}
    assert load_as_stranger(last, tmp_path) == ["MoveKDForConditionalGeneration", []]
    if stage == 2:
        path = copy / "global_step2" / "mp_rank_00_model_states.pt"
        state = torch.load(path, weights_only=False)  # holds DeepSpeed's classes; this test wrote the file
        state["module"] = {key: value for key, value in state["module"].items() if "distiller" not in key}
        torch.save(state, path)
        # A run that had saved it so: otherwise the list of files refuses the checkpoint first
        write_manifest(copy, 2, read_json(copy / MANIFEST_NAME)["run"])
        lost = launch(SFT, *flags, copy, launcher=launcher(stage))
        assert lost.returncode != 0 and "distiller.detector.head.weight" in lost.stdout, lost.stdout[-6000:]


def test_one_process_where_several_were_asked_for_is_refused(write, tmp_path: Path) -> None:
    """Under `--cpu` accelerate ignores the configuration's backend."""
    flags = ("--config_file", ACCELERATE / "zero2.yaml", "--cpu", "--mixed_precision", "no")
    result = launch(SFT, "--config", write("alone", "pretrain", max_steps=1), launcher=flags)
    assert result.returncode != 0 and "asks for several processes, but one was started" in result.stdout
    assert not (write("alone", "pretrain").with_suffix("") / "model.safetensors").exists()


def plugin(**options: Any) -> SimpleNamespace:
    """Arguments of a single process with a DeepSpeed configuration."""
    deepspeed = HfDeepSpeedConfig({"zero_optimization": options})
    return SimpleNamespace(world_size=1, deepspeed_plugin=SimpleNamespace(hf_ds_config=deepspeed))


def test_zero3_that_would_save_no_weights_is_refused() -> None:
    check_launch(plugin(stage=2))
    check_launch(plugin(stage=3, stage3_gather_16bit_weights_on_model_save=True))
    for options in ({}, {"stage3_gather_16bit_weights_on_model_save": False}):
        with pytest.raises(ValueError, match="ZeRO-3 would save checkpoints without weights. Set `zero3_save_16bit"):
            check_launch(plugin(stage=3, **options))


def test_weights_that_are_spread_are_not_saved(tmp_path: Path) -> None:
    config = MoveKDVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = MoveKDVisionModel(config)
    weights = model.state_dict() | {"pre_layrnorm.bias": torch.empty(0)}
    with pytest.raises(ValueError, match=r"1 weights are partitioned over processes.*pre_layrnorm\.bias.*save_model"):
        model.save_pretrained(tmp_path / "given", state_dict=weights)
    model.pre_layrnorm.bias.data = torch.empty(0)  # as ZeRO-3 leaves parameters between steps
    with pytest.raises(ValueError, match=r"1 weights are partitioned over processes.*pre_layrnorm\.bias.*save_model"):
        model.save_pretrained(tmp_path / "own")
    assert not list(tmp_path.iterdir())
