"""A run that was killed and resumed equals an uninterrupted run, bit for bit; and what its checkpoints hold."""

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from modeling_movekd import MoveKDConfig
from tests.helpers.bare_process import load_as_stranger
from tests.helpers.colored_rows import llava_rows
from tests.helpers.disks import full_disk
from tests.helpers.launched import DDP_CPU, ROOT, SCRIPT, launch, run, write_settings
from train import run as stage_run
from train.checkpoints import (
    MANIFEST_NAME,
    SAMPLE,
    STRIDE,
    WHOLE_FILE,
    check_checkpoint,
    checkpoint_to_resume,
    checksum,
)


# With all randomness: the order of the rows and the dropout of the experts
SETTINGS = {"lora_dropout": 0.05, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3, "max_steps": 4}
FILES = ("model.safetensors", "distiller.safetensors", "optimizer.pt", "scheduler.pt")


def losses(folder: Path) -> list[dict[str, float]]:
    """The log after the second step, without times and without TRL's count of tokens since the start."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    left_out = ("images_per_second", "num_tokens")
    return [
        {name: value for name, value in entry.items() if name not in left_out}
        for entry in history
        if entry["step"] > 2
    ]


def read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=False)  # the state of a generator holds arrays; this test wrote the file


def differences(one: Any, two: Any, name: str = "") -> Iterator[str]:
    """The names of the entries that differ between two nested states."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in one.keys() | two.keys():
            yield from differences(one.get(key), two.get(key), f"{name}/{key}")
    elif isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        for index, pair in enumerate(zip(one, two, strict=True)):
            yield from differences(*pair, f"{name}/{index}")
    else:
        is_array = isinstance(one, torch.Tensor | np.ndarray)
        if type(one) is not type(two) or not (np.array_equal(one, two) if is_array else one == two):
            yield name


def assert_same(folder: Path, other: Path, processes: int) -> None:
    """The last checkpoints are equal: student, distiller, optimizer, scheduler, random states and log."""
    folder, other = folder / "checkpoint-4", other / "checkpoint-4"
    generators = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    for name in (*FILES, *generators):
        assert list(differences(read(folder / name), read(other / name), name)) == []
    assert len(losses(folder)) == 2 and losses(folder) == losses(other)


def assert_killed(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2"}, "the run should have ended after two steps"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def straight(folder: Path, parts: dict[str, str], dataset_folder: str) -> Path:
    """The output of four steps without interruption, in one process."""
    run(write_settings(folder / "straight", parts, dataset_folder, **SETTINGS))
    return folder / "straight"


@pytest.fixture(scope="module")
def killed(folder: Path, parts: dict[str, str], dataset_folder: str) -> Path:
    """The output of one process that was killed after the second step's checkpoint."""
    config = write_settings(folder / "killed", parts, dataset_folder, **SETTINGS)
    result = launch(SCRIPT, "--die_after", "2", config)
    assert result.returncode == -signal.SIGKILL, result.stdout[-6000:]
    assert_killed(folder / "killed")
    return folder / "killed"


@pytest.fixture
def resume(killed: Path, parts: dict[str, str], dataset_folder: str, tmp_path: Path):
    """Changes the checkpoint in a copy of the killed run, resumes in this process, and returns the output."""

    def resume(change=lambda checkpoint: None) -> Path:
        output = tmp_path / "resumed"
        shutil.copytree(killed, output)
        checkpoint = output / "checkpoint-2"
        change(checkpoint)
        run(write_settings(output, parts, dataset_folder, **SETTINGS, resume_from_checkpoint=str(checkpoint)))
        return output

    return resume


def test_killed_and_resumed_is_the_same_run(straight: Path, resume) -> None:
    assert_same(resume(), straight, processes=1)


def test_dropout_takes_part_and_is_kept(
    straight: Path, parts: dict[str, str], dataset_folder: str, tmp_path: Path
) -> None:
    run(write_settings(tmp_path / "other", parts, dataset_folder, **SETTINGS | {"lora_dropout": 0.0}))
    assert losses(tmp_path / "other" / "checkpoint-4") != losses(straight / "checkpoint-4")
    shutil.rmtree(tmp_path / "other" / "checkpoint-4")
    unsaid = SETTINGS | {"lora_dropout": None, "resume_from_checkpoint": "true"}
    run(write_settings(tmp_path / "other", parts, dataset_folder, **unsaid))
    assert MoveKDConfig.from_pretrained(tmp_path / "other").vision_config.lora_dropout == 0.0


def test_true_takes_the_newest_whole_checkpoint(
    straight: Path, killed: Path, parts: dict[str, str], dataset_folder: str, tmp_path: Path, caplog
) -> None:
    """A run was killed while it wrote its second checkpoint. Here all is written but the list of files."""
    output = tmp_path / "resumed"
    shutil.copytree(killed, output)
    shutil.copytree(straight / "checkpoint-4", output / "checkpoint-4")
    (output / "checkpoint-4" / MANIFEST_NAME).unlink()
    (output / "checkpoint-4" / "left_behind.bin").write_bytes(b"")
    run(write_settings(output, parts, dataset_folder, **SETTINGS, resume_from_checkpoint=True, save_total_limit=1))
    assert re.search(r"Passed over: .*checkpoint-4 is incomplete", caplog.text)
    assert re.search(r"Resuming from .*checkpoint-2\.", caplog.text) and "missing keys" not in caplog.text
    assert_same(output, straight, processes=1)
    check_checkpoint(output / "checkpoint-4")
    assert not (output / "checkpoint-2").exists(), "`save_total_limit` is 1"


@pytest.mark.parametrize("size", [30_000, 400_000])
def test_a_full_disk_while_a_checkpoint_is_saved(
    killed: Path, parts: dict[str, str], dataset_folder: str, tmp_path: Path, size: int
) -> None:
    """The run ends with a sentence, leaves no file that is cut off, and goes on from the checkpoint before."""
    output = tmp_path / "resumed"
    shutil.copytree(killed, output)
    config = write_settings(output, parts, dataset_folder, **SETTINGS, resume_from_checkpoint=True)
    message = "checkpoint-4 could not be written: .* If the disk is full, free space; .*`resume_from_checkpoint: true`"
    with full_disk(size), pytest.raises(OSError, match=message):
        run(config)
    assert not [path for path in (output / "checkpoint-4").rglob("*") if path.is_file()]
    assert checkpoint_to_resume(True, str(output)) == str(output / "checkpoint-2")


def test_a_full_disk_while_the_student_is_saved(arguments) -> None:
    data_args, args, model_args = arguments(max_steps=1)
    with full_disk(30_000), pytest.raises(OSError, match="output could not be written: .* If the disk is full"):
        stage_run.train(data_args, args, model_args)
    assert not list(Path(args.output_dir).glob("*.safetensors"))


def test_every_file_of_a_checkpoint_is_verified(straight: Path, tmp_path: Path) -> None:
    checkpoint, other = tmp_path / "checkpoint-2", straight / "checkpoint-4"
    shutil.copytree(straight / "checkpoint-2", checkpoint)
    files = check_checkpoint(checkpoint)["files"]
    assert {*FILES, "rng_state.pth", "trainer_state.json", "training_facts.json", "config.json"} <= files.keys()
    for name in files:
        path = checkpoint / name
        whole = path.read_bytes()
        damages = {
            "has other content": bytes([whole[0] ^ 1]) + whole[1:],
            "of another step": (other / name).read_bytes(),
            f"has {len(whole) - 1} bytes instead of {len(whole)}": whole[:-1],
        }
        if damages["of another step"] == whole:
            del damages["of another step"]
        for problem, damaged in damages.items():
            path.write_bytes(damaged)
            expected = "has other content|has .* bytes instead of" if problem == "of another step" else problem
            with pytest.raises(ValueError, match=f"step 2 wrote it: {re.escape(name)} ({expected})"):
                check_checkpoint(checkpoint)
        path.unlink()
        with pytest.raises(ValueError, match=f"{re.escape(name)} is missing. Restore"):
            check_checkpoint(checkpoint)
        path.write_bytes(whole)
    shutil.copy(checkpoint / "rng_state.pth", checkpoint / "rng_state_1.pth")
    with pytest.raises(ValueError, match="rng_state_1.pth does not belong to it"):
        check_checkpoint(checkpoint)
    (checkpoint / "rng_state_1.pth").unlink()
    (checkpoint / "README.md").write_text("My student", encoding="utf-8")
    check_checkpoint(checkpoint)


def test_a_change_in_a_large_file_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "optimizer.pt"
    path.write_bytes(bytes(WHOLE_FILE + 5 * SAMPLE))
    whole = checksum(path)
    for place in (0, 3 * STRIDE + 10, WHOLE_FILE + 5 * SAMPLE - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"1")
        assert checksum(path) != whole
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\0")
    assert checksum(path) == whole


def test_a_changed_checkpoint_is_refused_before_anything_is_loaded(resume) -> None:
    with pytest.raises(ValueError, match=r"distiller\.safetensors is missing"):
        resume(lambda checkpoint: (checkpoint / "distiller.safetensors").unlink())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 2}, r"'rows_per_step': \(4, 2\)"),
        ({"seed": 1}, r"'seed': \(42, 1\)"),
        ({"num_experts": 2}, "router|expert"),
        ({"resume_from_checkpoint": "nowhere"}, "There is no checkpoint nowhere"),
        ({"resume_from_checkpoint": None}, "holds a run already: checkpoint-2"),
    ],
)
def test_a_run_that_would_be_another_is_refused(
    killed: Path, parts: dict[str, str], dataset_folder: str, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    output = tmp_path / "resumed"
    shutil.copytree(killed, output)
    settings = {"resume_from_checkpoint": "true"} | settings
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(write_settings(output, parts, dataset_folder, **SETTINGS | settings))


def test_a_finished_folder_is_refused_or_overwritten(arguments, tmp_path: Path) -> None:
    small: dict[str, Any] = {"distill": False, "num_experts": 0, "teachers": None, "max_steps": 1}
    small["overwrite_output_dir"] = False
    output = tmp_path / "output"
    stage_run.train(*arguments(**small))
    before = (output / "model.safetensors").read_bytes()
    (output / "checkpoint-7").mkdir()
    with pytest.raises(ValueError, match="holds a run already: checkpoint-7, model.safetensors, model.saf"):
        stage_run.train(*arguments(**small, seed=1))
    assert (output / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="has no whole checkpoint"):
        stage_run.train(*arguments(**small, seed=1, resume_from_checkpoint=True))
    stage_run.train(*arguments(**small | {"seed": 1, "overwrite_output_dir": True}))
    assert (output / "model.safetensors").read_bytes() != before and not (output / "checkpoint-7").exists()


def test_two_processes(folder: Path, parts: dict[str, str]) -> None:
    """One launch trains without interruption, and then again until a process is killed. Another launch resumes it."""
    Dataset.from_list(llava_rows(24, text_only=(1, 5, 6, 7, 8, 13, 14, 15, 16, 22))).save_to_disk(folder / "mixed")
    # An epoch has three steps, so that the fourth is in the second epoch
    settings = SETTINGS | {"distillation_preset": "student_heads", "group_by_modality_length": True}
    straight, killed = folder / "straight-2", folder / "killed-2"
    configs = [write_settings(output, parts, str(folder / "mixed"), **settings) for output in (straight, killed)]
    died = launch(SCRIPT, "--die_after", "2", *configs, launcher=DDP_CPU, timeout=240)
    assert died.returncode != 0 and "SIGKILL" in died.stdout, died.stdout[-6000:]
    assert_killed(killed)
    for rank in range(2):
        facts = json.loads((straight / f"facts-{rank}.json").read_text())
        assert (facts["world_size"], facts["called"]) == (2, ["DistributedDataParallel"])

    config = write_settings(killed, parts, str(folder / "mixed"), **settings | {"max_steps": 3})
    flags = ("--config", config, "--max_steps", "4", "--resume_from_checkpoint", killed / "checkpoint-2")
    resumed = launch(ROOT / "train" / "sft.py", *flags, launcher=DDP_CPU)
    assert resumed.returncode == 0, resumed.stdout[-6000:]
    facts = json.loads((killed / "checkpoint-4" / "training_facts.json").read_text())
    assert (facts["processes"], facts["global_batch_size"], facts["steps"]) == (2, 8, 4)
    assert_same(killed, straight, processes=2)
    names = {f"{teacher}.{name}" for teacher in ("clip", "vit") for name in ("mean", "variance", "components", "head")}
    keys = load_file(killed / "checkpoint-2" / "distiller.safetensors").keys()
    assert {".".join(key.split(".")[:2]) for key in keys} == names


def test_checkpoint_in_the_middle(straight: Path, tmp_path: Path) -> None:
    checkpoint = straight / "checkpoint-2"
    assert not any("distiller" in name or "teacher" in name for name in load_file(checkpoint / "model.safetensors"))
    keys = load_file(checkpoint / "distiller.safetensors").keys()
    assert {key.rsplit(".", 1)[0] for key in keys} == {"vit.channels", "vit.tokens"}

    facts = json.loads((checkpoint / "training_facts.json").read_text())
    assert facts["steps"] == 2 and facts["losses"]["kd/vit"] > 0
    assert (facts["vision_model"], facts["language_model"]) == ("clip", "language")
    for path in checkpoint.glob("*.json"):
        assert not list(absolute_paths(json.loads(path.read_text()))), path.name

    assert load_as_stranger(checkpoint, tmp_path) == ["MoveKDForConditionalGeneration", []]


def absolute_paths(content: Any) -> Iterator[str]:
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from absolute_paths(value)
    elif isinstance(content, str) and Path(content).is_absolute():
        yield content
