"""
Training runs in processes of their own, which record what ran.

Started by `accelerate launch`, this file trains like `train/sft.py` with each configuration in turn. Every process
writes the record of each run to `facts-{rank}.json` in the output folder:

    accelerate launch ... tests/helpers/launched.py [--die_after STEP | --raise_after STEP | --stop_after STEP] \\
        one.yaml two.yaml

After all processes have written that step's checkpoint in the last run, the first process ends with SIGKILL
(`--die_after`), or the last process raises an error (`--raise_after`) or stands still (`--stop_after`).
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "helpers" / "launched.py"
DDP_CPU = ("--config_file", ROOT / "train" / "accelerate" / "ddp_cpu.yaml")
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from trl import TrlParser

from train import run as stage_run
from train.arguments import DataArguments, ModelArguments
from train.config import MoveKDSFTConfig
from train.encoder_trainer import MoveKDEncoderTrainer
from train.trainer import MoveKDTrainer


class RecordingMixin:
    """Records which model class is called, and the images of every training batch of this process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.called: set[tuple[str, bool | None]] = set()
        self.checkpointed: set[bool] = set()
        self.images: list[int] = []

    def compute_loss(self, model, inputs, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.called.add((type(model).__name__, getattr(model, "find_unused_parameters", None)))
            self.checkpointed.add(self.model.is_activation_checkpointing)
            self.images.append(int(inputs["image_weights"].sum()))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def facts(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        return {
            "world_size": torch.distributed.get_world_size() if running else 1,
            "backend": torch.distributed.get_backend() if running else None,
            "nodes": int(os.environ.get("GROUP_WORLD_SIZE", "1")),
            "distributed_type": self.accelerator.distributed_type.value,
            "zero_stage": self.deepspeed.zero_optimization_stage() if self.deepspeed is not None else None,
            # Between steps, parameters that ZeRO-3 has partitioned are empty
            "empty_parameters": sum(not parameter.numel() for parameter in self.model.parameters()),
            "called": [name for name, _ in self.called],
            "find_unused_parameters": [value for _, value in self.called],
            "checkpointed": list(self.checkpointed),
            "images": self.images,
            "weights": digest.hexdigest(),
            "log_history": self.state.log_history,
        }


class RecordingTrainer(RecordingMixin, MoveKDTrainer):
    """A recording trainer of the stages with a language model."""


class RecordingEncoderTrainer(RecordingMixin, MoveKDEncoderTrainer):
    """A recording trainer of stage `encoder`."""


class EndAfterSave(TrainerCallback):
    """Ends one process after every process has written the checkpoint of a step."""

    def __init__(self, flag: str, step: int) -> None:
        self.flag, self.step = flag, step

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.global_step != self.step:
            return
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if self.flag == "--die_after" and args.process_index == 0:
            os.kill(os.getpid(), signal.SIGKILL)  # no chance to tidy up
        if self.flag == "--raise_after" and args.process_index == args.world_size - 1:
            raise RuntimeError("The last process fails.")
        if self.flag == "--stop_after" and args.process_index == args.world_size - 1:
            time.sleep(600)


def record(data_args: DataArguments, args: MoveKDSFTConfig, model_args: ModelArguments, *callbacks: TrainerCallback):
    """Run `train.run.train` with a recording trainer, and return the trainer."""

    def recording(kind: type[RecordingMixin]) -> Any:
        def build(*arguments: Any, **kwargs: Any) -> RecordingMixin:
            trainer = kind(*arguments, **kwargs)
            for callback in callbacks:
                trainer.add_callback(callback)
            return trainer

        return build

    originals = stage_run.MoveKDTrainer, stage_run.MoveKDEncoderTrainer
    stage_run.MoveKDTrainer = recording(RecordingTrainer)
    stage_run.MoveKDEncoderTrainer = recording(RecordingEncoderTrainer)
    try:
        return stage_run.train(data_args, args, model_args)
    finally:
        stage_run.MoveKDTrainer, stage_run.MoveKDEncoderTrainer = originals


def launch(
    script: Path, *arguments: str | Path, launcher: Sequence[str | Path] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess:
    """
    Run a script by `accelerate launch` with the launcher's flags, or by plain Python if `launcher` is `None`. After
    `timeout` seconds all processes are ended and the test fails.
    """
    by_accelerate = [] if launcher is None else ["-m", "accelerate.commands.launch", *launcher]
    command = [str(part) for part in (sys.executable, *by_accelerate, script, *arguments)]
    environment = {
        # An earlier run in this process may have left these variables
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "FSDP_"))
    }
    environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher passes the signal on to its processes
        process.communicate(timeout=60)
        raise
    return subprocess.CompletedProcess(command, process.returncode, output)


def write_settings(folder: Path, parts: dict[str, str], dataset: str, **overrides: Any) -> Path:
    """Write the configuration of a small run with output in `folder`; keywords override it."""
    settings = {
        "dataset_name": dataset,
        "vision_model": parts["clip"],
        "language_model": parts["language"],
        "teachers": [{"name": "clip", "model": parts["clip"]}, {"name": "vit", "model": parts["vit"]}],
        "output_dir": str(folder),
        "lora_rank": 4,
        "lora_dropout": 0.0,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "feature_statistics_images": 7,
        "whitening_components": 8,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings | overrides, sort_keys=False), encoding="utf-8")
    return path


def run(config: Path, *callbacks: TrainerCallback) -> RecordingTrainer:
    """Train with a configuration file in this process, and write the record to the output folder."""
    parser = TrlParser((DataArguments, MoveKDSFTConfig, ModelArguments))
    trainer = record(*parser.parse_args_and_config(["--config", str(config)]), *callbacks)
    facts = Path(trainer.args.output_dir) / f"facts-{trainer.args.process_index}.json"
    facts.write_text(json.dumps(trainer.facts()), encoding="utf-8")
    return trainer


def main(arguments: Sequence[str]) -> None:
    callbacks = []
    if arguments[0].startswith("--"):
        callbacks, arguments = [EndAfterSave(arguments[0], int(arguments[1]))], arguments[2:]
    for index, config in enumerate(arguments):
        trainer = run(Path(config), *(callbacks if index == len(arguments) - 1 else []))
        trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    # Exit at once: gloo's threads outlive the process group, and have aborted the interpreter's shutdown
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
