"""FSDP2 on two processes: equal to DDP for all kinds of batches, resumed after a kill, saved as whole models."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer, GemmaConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config

from modeling_movekd import MoveKDConfig, MoveKDForConditionalGeneration
from modeling_movekd.base_encoders_movekd import SIGLIP
from tests.helpers.bare_process import load_as_stranger
from tests.helpers.colored_rows import llava_rows
from tests.helpers.launched import DDP_CPU, ROOT, SCRIPT, launch, write_settings
from train.demo.scenes import scenes
from train.distributed import prepare_fsdp
from train.run import train


FSDP_SCRIPT = ROOT / "tests" / "helpers" / "fsdp_on_cpu.py"
FLAGS = ("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0")
LAUNCHERS = {
    state: ("--config_file", ROOT / "train" / "accelerate" / name, *FLAGS)
    for state, name in (("full", "fsdp2.yaml"), ("sharded", "fsdp2_sharded.yaml"))
}
# Five steps on two processes, with four rows each. In the first and third step one process has text alone, in the
# fourth both have
TEXT_ONLY = (4, 5, 6, 7, 9, 14, *range(16, 20), *range(24, 32), 33)
IMAGES = [[4, 3, 0, 0, 3], [0, 3, 4, 0, 4]]
# Plain gradient descent, since Adam would hide the scale of the gradients
SETTINGS: dict[str, Any] = {
    **{"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 1e9},
    **{"train_sampling_strategy": "sequential", "max_steps": 5},
}
RUNS: dict[str, dict[str, Any]] = {
    "own head": {"activation_checkpointing": False},
    "tied head": {"language": "tied", "max_steps": 3},
    # A process with text alone gives the frozen language model no gradient, unless the forward takes care of it
    "pretrain": {"stage": "pretrain", "distillation_preset": "student_heads"},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 2},
    "LoRA": {"language_lora_rank": 4, "max_steps": 3},
    "experts": {"expert_assignment": "teacher", "num_experts": 2, "balance_form": "bias", "max_steps": 3},
    "bfloat16": {"bf16": True, "max_steps": 1},
}
# In bfloat16 DDP casts operations and FSDP2 whole layers; the outputs of both are float32
SUMS = ("loss", "text", "kd", "balance", "grad_norm")
# The other runs take the same path, and are slow tests
QUICK = ("own head",)
SLOW = tuple(name for name in RUNS if name not in QUICK)


def facts(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"facts-{rank}.json").read_text())


def steps(folder: Path) -> list[dict[str, float]]:
    entries = [entry for entry in facts(folder)["log_history"] if "text" in entry]
    left_out = ("images_per_second", "num_tokens")
    return [{name: value for name, value in entry.items() if name not in left_out} for entry in entries]


def assert_sharded(folder: Path, state: str = "full") -> None:
    """FSDP2 ran on both processes, around every layer, with every parameter sharded."""
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
def folders(root: Path, write) -> Callable[[str], tuple[Path, Path]]:
    """The folders of a run with FSDP2 and with DDP. Runs of a kind share a launch of two processes."""

    @cache
    def launch_all(names: tuple[str, ...]) -> None:
        for kind, script, launcher in (("ddp", SCRIPT, DDP_CPU), ("fsdp", FSDP_SCRIPT, LAUNCHERS["full"])):
            configs = [write(f"{kind}/{name}", **SETTINGS | RUNS[name]) for name in names]
            result = launch(script, *configs, launcher=launcher)
            assert result.returncode == 0, result.stdout[-6000:]

    def folders(name: str) -> tuple[Path, Path]:
        launch_all(QUICK if name in QUICK else SLOW)
        return root / "fsdp" / name, root / "ddp" / name

    return folders


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_gives_what_ddp_gives(folders, name: str) -> None:
    """Losses, gradient norms and weights, also of the head, whose gradient TRL would not sum over the processes."""
    folder, other = folders(name)
    assert_sharded(folder)
    assert facts(other)["called"] == ["DistributedDataParallel"]
    assert len(steps(folder)) == len(steps(other)) > 0
    logs, weights = {"rel": 5e-6, "abs": 1e-6}, {"rtol": 1e-5, "atol": 1e-6}
    if name == "bfloat16":
        logs, weights = {"rel": 2e-4}, {"rtol": 0.0, "atol": 2e-3}
    for one, two in zip(steps(folder), steps(other), strict=True):
        if name == "bfloat16":  # single tokens go to other experts, and the student's loss to CLIP is nearly zero
            one, two = ({key: step[key] for key in SUMS} for step in (one, two))
        assert one == pytest.approx(two, **logs)
    assert_same_weights(folder, other, **weights)
    if name != "accumulation":
        assert [facts(folder, rank)["images"] for rank in range(2)] == [
            images[: len(steps(folder))] for images in IMAGES
        ]


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("own head", []),
        pytest.param("tied head", ["lm_head.weight"], marks=pytest.mark.slow),
        pytest.param("LoRA", [], marks=pytest.mark.slow),
    ],
)
def test_saves_what_anyone_can_load(folders, name: str, tied: list[str], tmp_path: Path) -> None:
    folder, _ = folders(name)
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_movekd.MoveKDForConditionalGeneration"
    assert {path.name for path in folder.glob("*.py")} == {
        path.name for path in (ROOT / "modeling_movekd").glob("*_movekd.py")
    }
    assert load_as_stranger(folder, tmp_path) == ["MoveKDForConditionalGeneration", tied]


@pytest.mark.parametrize("text_config", [LlamaConfig, Qwen3Config, GemmaConfig])
@pytest.mark.parametrize("switches", [{}, SIGLIP.settings | {"add_pooling_layer": False}], ids=["clip", "siglip"])
def test_every_layer_is_wrapped_by_itself(text_config: type, switches: dict[str, bool]) -> None:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    vision = size | {"model_type": "movekd_vision", "image_size": 16, "patch_size": 4} | switches
    config = MoveKDConfig(vision_config=vision, text_config=text_config(**size, vocab_size=64).to_dict())
    model = MoveKDForConditionalGeneration(config)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP")
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    wrapped = {name for name, part in model.named_modules() if policy(part)}
    language = {f"model.language_model.layers.{index}" for index in range(2)}
    vision_tower = {"embeddings", "encoder.layers.0", "encoder.layers.1"}
    assert wrapped == language | {f"model.vision_tower.{name}" for name in vision_tower}
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model.model.vision_tower)
    assert {name for name, part in model.model.vision_tower.named_modules() if policy(part)} == vision_tower


def test_what_would_run_as_ddp_is_refused(arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP was asked for, but NO would run"):
        train(*arguments())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"fsdp_version": 1}, "fsdp_version"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading"),
        ({"activation_checkpointing": True}, "fsdp_activation_checkpointing"),
    ],
)
def test_settings_that_would_fail_silently_are_refused(
    settings: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin writes into it
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2} | settings)
    state = SimpleNamespace(fsdp_plugin=plugin)
    with pytest.raises(ValueError, match=f"`{name}` is"):
        prepare_fsdp(SimpleNamespace(distributed_type=DistributedType.FSDP, state=state))


def write_demo(recipe: str, folder: Path, dataset: Path, **settings: Any) -> Path:
    """The settings of the demo on CPUs, with fewer and smaller steps."""
    content = yaml.safe_load((ROOT / "train" / "recipes" / f"demo_{recipe}.yaml").read_text(encoding="utf-8"))
    content |= {"dataset_name": str(dataset), "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True}
    content |= {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1} | settings
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "settings"),
    [("full", {}), ("sharded", {}), ("sharded", {"language_lora_rank": 4})],
    ids=["full", "sharded", "sharded LoRA"],
)
def test_the_demo_resumes_after_a_kill(state: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """One launch runs stage 1, stage 2, and stage 2 again until a process is killed. Another launch resumes it."""
    launcher = LAUNCHERS[state]
    for split in ("pretrain", "finetune"):
        scenes(split, 48).save_to_disk(tmp_path / "data" / split)
    first, straight, killed = (tmp_path / name for name in ("pretrain", "straight", "killed"))
    settings = settings | {"model_name_or_path": str(first), "save_strategy": "steps", "save_steps": 2}
    configs = [
        write_demo("pretrain", first, tmp_path / "data" / "pretrain"),
        *(write_demo("finetune", folder, tmp_path / "data" / "finetune", **settings) for folder in (straight, killed)),
    ]
    died = launch(FSDP_SCRIPT, "--die_after", "2", *configs, launcher=launcher, timeout=600)
    assert died.returncode != 0 and "SIGKILL" in died.stdout, died.stdout[-6000:]
    assert {path.name for path in killed.iterdir()} == {"checkpoint-2"}, "the run should have ended after two steps"

    settings["resume_from_checkpoint"] = str(killed / "checkpoint-2")
    config = write_demo("finetune", killed, tmp_path / "data" / "finetune", **settings)
    resumed = launch(FSDP_SCRIPT, config, launcher=launcher, timeout=600)
    assert resumed.returncode == 0, resumed.stdout[-6000:]
    for rank in range(2):
        assert facts(killed, rank)["distributed_type"] == "FSDP" and facts(killed, rank)["is_fsdp_module"]
        assert facts(killed, rank)["state_dict_type"] == f"{state.upper()}_STATE_DICT"
        assert len(facts(killed, rank)["images"]) == 2 and facts(killed, rank)["whole"] == []
    assert len(steps(killed)) == len(steps(straight)) == 4
    for one, two in zip(steps(killed)[2:], steps(straight)[2:], strict=True):
        assert one == pytest.approx(two, rel=1e-6)
    assert_same_weights(killed, straight, rtol=1e-6, atol=1e-7)
    checkpoint = killed / "checkpoint-4"
    assert (checkpoint / "pytorch_model_fsdp_0").is_dir() == (state == "sharded")
    for folder in (killed, checkpoint):
        assert load_as_stranger(folder, tmp_path)[0] == "MoveKDForConditionalGeneration"
    assert_same_weights(checkpoint, killed, rtol=0, atol=0)
