"""Two processes train like one: equal losses, gradient norms and weights, for all kinds of batches."""

import json
import re
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from tests.helpers.colored_rows import llava_rows
from tests.helpers.launched import DDP_CPU, ROOT, SCRIPT, launch, run, write_settings


# DeepSpeed's configuration cannot choose the CPU; the script's `use_cpu` does
ZERO2_CPU = (
    *("--config_file", ROOT / "train" / "accelerate" / "zero2.yaml", "--num_processes", "2"),
    *("--mixed_precision", "no", "--main_process_port", "0"),
)
# Plain gradient descent, since Adam would hide the scale of the gradients
DESCENT = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
MIXED = {"train_sampling_strategy": "sequential", "max_steps": 5}
RUNS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper, no checkpointing": {"activation_checkpointing": False, "lambda_kd": 5.0, "lambda_balance": 1.0},
    # Every process must have every gradient, also with a batch of text alone
    "paper, mixed": {"dataset": "mixed", "ddp_find_unused_parameters": False, **MIXED},
    "student_heads, mixed": {"dataset": "mixed", "distillation_preset": "student_heads", **MIXED},
    "released, mixed, pretrain": {
        **{"dataset": "mixed", "distillation_preset": "released", "stage": "pretrain", **MIXED},
        # Not the released form, which is no sum over the images of a batch
        "teacher_weighting": "cls_similarity",
    },
    # Of the 12 rows to evaluate on, the second process gets some twice
    "encoder": {
        **{"stage": "encoder", "language_model": None, "validation_share": 0.25, "eval_strategy": "steps"},
        **{"eval_steps": 4, "lambda_balance": 1.0, "ddp_find_unused_parameters": False},
    },
    "an expert for each teacher, bias": {
        **{"dataset": "mixed", "expert_assignment": "teacher", "num_experts": 2, **MIXED},
        **{"balance_form": "bias", "balance_rate": 0.01, "ddp_find_unused_parameters": False},
    },
    "grouped": {"dataset": "mixed", "group_by_modality_length": True, "activation_checkpointing": False},
}
# Images of each process in the five steps of `MIXED`, with four rows each. In the first and third step one process has
# text alone, in the fourth both have
TEXT_ONLY = (4, 5, 6, 7, 9, 14, *range(16, 20), *range(24, 32), 33)
IMAGES = [[4, 3, 0, 0, 3], [0, 3, 4, 0, 4]]


def facts(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"facts-{rank}.json").read_text())


def steps(folder: Path) -> list[dict[str, float]]:
    entries = [entry for entry in facts(folder)["log_history"] if {"text", "kd", "eval_kd"} & entry.keys()]
    # The last two are TRL's, which averages micro-batches without regard to their numbers of tokens
    left_out = ("images_per_second", "entropy", "mean_token_accuracy")
    left_out += ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return [{name: value for name, value in entry.items() if name not in left_out} for entry in entries]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / "distiller.safetensors")


def assert_same_run(folder: Path, other: Path) -> None:
    assert len(steps(folder)) == len(steps(other)) > 0
    for one, two in zip(steps(folder), steps(other), strict=True):
        assert one.keys() == two.keys()
        assert one == pytest.approx(two, rel=5e-6, abs=1e-7)
    for name, value in weights(other).items():
        torch.testing.assert_close(weights(folder)[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def write(parts: dict[str, str], dataset_folder: str, tmp_path_factory: pytest.TempPathFactory):
    """Writes the configuration of one of `RUNS`."""
    root = tmp_path_factory.mktemp("runs")
    Dataset.from_list(llava_rows(40, text_only=TEXT_ONLY)).save_to_disk(root / "mixed")
    datasets = {"colors": dataset_folder, "mixed": str(root / "mixed")}

    def make(name: str, kind: str, **overrides: Any) -> Path:
        settings = DESCENT | RUNS[name] | overrides
        dataset = datasets[settings.pop("dataset", "colors")]
        return write_settings(root / kind / name, parts, dataset, **settings)

    return make


@pytest.fixture(scope="module")
def two_processes(write) -> dict[str, Path]:
    """Output folders of all runs, from one launch of two processes."""
    configs = {name: write(name, "two") for name in RUNS}
    result = launch(SCRIPT, *configs.values(), launcher=DDP_CPU)
    assert result.returncode == 0, result.stdout[-6000:]
    return {name: config.with_suffix("") for name, config in configs.items()}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_ran(two_processes, name: str) -> None:
    ranks = [facts(two_processes[name], rank) for rank in range(2)]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    for rank in ranks:
        assert (rank["world_size"], rank["backend"]) == (2, "gloo")
        assert rank["distributed_type"] in ("MULTI_GPU", "MULTI_CPU")
        assert rank["called"] == ["DistributedDataParallel"]
        assert rank["find_unused_parameters"] == [RUNS[name].get("ddp_find_unused_parameters", True)]
        assert rank["checkpointed"] == [RUNS[name].get("activation_checkpointing", True)]
    if RUNS[name].get("distillation_preset") == "released":
        assert [rank["images"] for rank in ranks] == [[4] * 5] * 2, "text-only rows get a black image each"
    elif "mixed" in name:
        assert [rank["images"] for rank in ranks] == IMAGES
    if "bias" in name:
        biases = [value for key, value in weights(two_processes[name]).items() if "balance_bias" in key]
        assert len(biases) == 2 and 0 < torch.stack(biases).abs().max() <= 0.051


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("layout", [(8, 1), (4, 2)], ids=["twice the batch", "accumulation"])
def test_one_process_gives_the_same(two_processes, write, name: str, layout: tuple[int, int]) -> None:
    batch_size, accumulation = layout
    settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer = run(write(name, f"one-{accumulation}", **settings))
    folder = Path(trainer.args.output_dir)
    assert facts(folder)["world_size"] == 1 and "DistributedDataParallel" not in facts(folder)["called"]
    assert_same_run(folder, two_processes[name])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_gives_the_same(two_processes, write, stage: int, tmp_path: Path) -> None:
    """Also with accumulation, with text alone on one process, and with LoRA and clipping."""
    pytest.importorskip("deepspeed")
    launcher = ZERO2_CPU
    if stage == 3:
        # By default ZeRO-3 does not partition parameters as small as a test's
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
        settings = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
        settings |= {"train_batch_size": "auto", "gradient_accumulation_steps": "auto"}
        (tmp_path / "zero3.json").write_text(json.dumps(settings))
        launcher = (
            *("--use_deepspeed", "--deepspeed_config_file", tmp_path / "zero3.json", "--num_machines", "1"),
            *("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"),
        )
    kind, adapted = f"zero{stage}", {"language_lora_rank": 4, "language_lora_dropout": 0.0, "max_grad_norm": 0.5}
    configs = {
        "paper": write("paper", kind, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        "student_heads, mixed": write("student_heads, mixed", kind),
        "lora": write("paper", f"{kind}-lora", **adapted),
    }
    result = launch(SCRIPT, *configs.values(), launcher=launcher)
    assert result.returncode == 0, result.stdout[-6000:]
    one_process = run(write("paper", f"{kind}-lora-one", per_device_train_batch_size=8, **adapted))
    for name, config in configs.items():
        folder = config.with_suffix("")
        ranks = [facts(folder, rank) for rank in range(2)]
        assert [rank["distributed_type"] for rank in ranks] == ["DEEPSPEED"] * 2
        assert [(rank["world_size"], rank["zero_stage"]) for rank in ranks] == [(2, stage)] * 2
        assert [rank["called"] for rank in ranks] == [["DeepSpeedEngine"]] * 2
        assert all((rank["empty_parameters"] > 50) == (stage == 3) for rank in ranks)
        if "mixed" in name:
            assert [rank["images"] for rank in ranks] == IMAGES
        assert_same_run(folder, Path(one_process.args.output_dir) if name == "lora" else two_processes[name])


@pytest.mark.slow
def test_two_nodes_give_the_same_and_end_together(two_processes, write) -> None:
    """Two launches that meet over the loopback, as those of two machines would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    configs = (write("paper", "nodes"), write("paper", "nodes-failing", save_strategy="steps", save_steps=1))

    def node(rank: int) -> subprocess.CompletedProcess:
        launcher = (
            *("--config_file", ROOT / "train" / "accelerate" / "multi_node.yaml", "--machine_rank", str(rank)),
            *("--main_process_ip", "127.0.0.1", "--main_process_port", str(port)),
            *("--num_processes", "2", "--mixed_precision", "no"),
        )
        return launch(SCRIPT, "--raise_after", "1", *configs, launcher=launcher)

    with ThreadPoolExecutor() as threads:
        results = list(threads.map(node, range(2)))
    assert all(result.returncode != 0 for result in results)
    assert "RuntimeError: The last process fails." in results[1].stdout, results[1].stdout[-6000:]
    assert {path.name for path in configs[1].with_suffix("").iterdir()} == {"checkpoint-1"}

    folder = configs[0].with_suffix("")
    for rank in range(2):
        assert (facts(folder, rank)["nodes"], facts(folder, rank)["world_size"]) == (2, 2)
        assert facts(folder, rank)["called"] == ["DistributedDataParallel"]
    assert_same_run(folder, two_processes["paper"])


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_job(write) -> None:
    config = write("paper", "failing", save_strategy="steps", save_steps=1)
    result = launch(SCRIPT, "--raise_after", "1", config, launcher=DDP_CPU, timeout=120)
    assert result.returncode != 0 and "RuntimeError: The last process fails." in result.stdout, result.stdout[-6000:]
    assert {path.name for path in config.with_suffix("").iterdir()} == {"checkpoint-1"}


@pytest.mark.slow
def test_a_process_that_stands_still_ends_the_job(write) -> None:
    config = write("paper", "standing", save_strategy="steps", save_steps=1, ddp_timeout=30)
    result = launch(SCRIPT, "--stop_after", "1", config, launcher=DDP_CPU)
    message = "Another process did not answer for 30 seconds: .* Raise `ddp_timeout` .* `resume_from_checkpoint: true`"
    assert result.returncode != 0 and re.search(message, result.stdout), result.stdout[-6000:]
    assert {path.name for path in config.with_suffix("").iterdir()} == {"checkpoint-1"}
