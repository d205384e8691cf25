"""What a whole checkpoint consists of, which checkpoint a run resumes, and which folder a run may write to."""

import hashlib
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from modeling_movekd.files import CARD_NAME, read_json, save_json
from train.config import MoveKDSFTConfig
from train.distributed import is_gloo_error


logger = logging.getLogger(__name__)

MANIFEST_NAME = "checkpoint_manifest.json"
# Files that resuming could read
STATE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".distcp")
# Of files above 64 MiB, 64 KiB out of every 16 MiB and the last 64 KiB: reading all of an optimizer takes minutes
WHOLE_FILE, SAMPLE, STRIDE = 64 << 20, 64 << 10, 16 << 20


def checksum(path: Path) -> str:
    """SHA-256 of a file's size and bytes; of a large file, of its size and of bytes all over the file."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE_FILE:
            digest.update(file.read())
        else:
            for start in (*range(0, size, STRIDE), size - SAMPLE):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def write_manifest(folder: Path, step: int, run: Mapping[str, Any]) -> None:
    """
    List the files of a checkpoint, with sizes and checksums. Call it when all processes have written theirs: a
    checkpoint without the list counts as incomplete. The model card may be edited and is left out.

    Args:
        folder (`Path`): The checkpoint.
        step (`int`): Its optimizer step.
        run (`Mapping[str, Any]`): What must be the same in a run that resumes it.
    """
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "checksum": checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST_NAME, CARD_NAME)
    }
    save_json({"step": step, "run": dict(run), "files": files}, folder / MANIFEST_NAME)


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """
    Verify that a checkpoint consists of the files that were written, and of no other that resuming could read.

    Returns:
        Its manifest.

    Raises:
        ValueError: if the checkpoint is incomplete, was changed, or cannot be resumed.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no checkpoint {folder}. Give an existing `checkpoint-N` folder, or `true`.")
    if not (folder / MANIFEST_NAME).is_file():
        raise ValueError(
            f"The checkpoint {folder} is incomplete: it has no {MANIFEST_NAME}, which is written last. Resume from an "
            "earlier one. A student of an earlier version goes on as `model_name_or_path`, with a new optimizer."
        )
    manifest = read_json(folder / MANIFEST_NAME)
    files: dict[str, Any] = manifest["files"]
    problems = [f"{name} is missing" for name in files if not (folder / name).is_file()]
    for name, entry in files.items():
        if (path := folder / name).is_file():
            if path.stat().st_size != entry["size"]:
                problems.append(f"{name} has {path.stat().st_size} bytes instead of {entry['size']}")
            elif checksum(path) != entry["checksum"]:
                problems.append(f"{name} has other content than was written")
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in STATE_SUFFIXES)
    problems += [f"{name} does not belong to it" for name in sorted(found) if name not in files]
    if problems:
        raise ValueError(
            f"The checkpoint {folder} is not as step {manifest['step']} wrote it: {'; '.join(problems)}. Restore "
            "these files, or resume from another checkpoint."
        )
    if manifest["run"]["save_only_model"]:
        raise ValueError(
            f"The checkpoint {folder} was saved with `save_only_model: true` and has no optimizer. Continue it as "
            "`model_name_or_path`."
        )
    return manifest


def check_same_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Refuse to resume a checkpoint of a run that read its rows in another order."""
    saved: dict[str, Any] = read_json(folder / MANIFEST_NAME)["run"]
    order = {name: value for name, value in run.items() if name not in ("processes", "save_only_model")}
    differing = {name: (saved[name], value) for name, value in order.items() if value != saved[name]}
    if differing:
        raise ValueError(
            f"The checkpoint {folder} is of another run (there, here): {differing}. The rows would not go on where "
            "they stopped. Give the values of that run, or continue the student as `model_name_or_path`."
        )
    if saved["processes"] != run["processes"]:
        logger.warning(
            "%s was written by %d processes, and %d resume it: the rows stay the same, dropout does not.",
            *(folder, saved["processes"], run["processes"]),
        )


def _checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name[11:]), reverse=True)


def checkpoint_to_resume(asked: str | bool | None, output_dir: str) -> str | None:
    """
    The checkpoint that `resume_from_checkpoint` asks for, verified; with `True` the newest whole one of `output_dir`.

    Raises:
        ValueError: if there is none, or the one that is named is not whole.
    """
    if not asked:
        return None
    if asked is not True:
        check_checkpoint(Path(asked))
        return str(asked)
    for folder in _checkpoints(Path(output_dir)):
        try:
            check_checkpoint(folder)
        except ValueError as error:
            logger.warning("Passed over: %s", error)
            continue
        logger.warning("Resuming from %s.", folder)
        return str(folder)
    raise ValueError(
        f"`resume_from_checkpoint` is true, but {output_dir} has no whole checkpoint. Leave the option out to start "
        "from the beginning, or name a checkpoint."
    )


def prepare_output_folder(args: MoveKDSFTConfig) -> None:
    """
    Refuse an `output_dir` that holds a student or checkpoints, unless the run resumes or may overwrite them. Then
    remove the former checkpoints, which a later run would resume. All processes must call it.
    """
    folder = Path(args.output_dir)
    old = [path for name in ("model*.safetensors", "model.safetensors.index.json") for path in folder.glob(name)]
    checkpoints = _checkpoints(folder)
    if args.resume_from_checkpoint or not (old or checkpoints):
        return
    if not args.overwrite_output_dir:
        names = sorted(path.name for path in (*old, *checkpoints))
        raise ValueError(
            f"`output_dir` {folder} holds a run already: {', '.join(names[:5])}. Give another folder, go on with "
            "`resume_from_checkpoint: true`, or start anew with `overwrite_output_dir: true`, which removes the "
            "checkpoints."
        )
    PartialState().wait_for_everyone()  # all processes must have looked before anything changes
    if args.should_save:
        for checkpoint in checkpoints:
            shutil.rmtree(checkpoint)
    PartialState().wait_for_everyone()


@contextmanager
def disk_errors_named(folder: Path, pattern: str) -> Iterator[None]:
    """
    Say which folder could not be written, and remove its files of a pattern, which may be cut off. On a full disk,
    torch and safetensors name neither disk nor folder.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_gloo_error(error):
            raise
        for path in folder.glob(pattern):
            if path.is_file():
                path.unlink(missing_ok=True)
        raise OSError(
            f"{folder} could not be written: {error}. If the disk is full, free space; then go on with "
            "`resume_from_checkpoint: true`, which takes the newest whole checkpoint."
        ) from error


class CheckpointMixin(Trainer):
    """Mixin before a trainer whose checkpoints list their files, and which resumes whole ones of the same run only."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, after a check that the checkpoint to resume is whole and of this run."""
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            check_same_run(Path(checkpoint), self._run_settings())
        return super().train(checkpoint, *args, **kwargs)

    def _run_settings(self) -> dict[str, Any]:
        """What decides the rows of each step, and what a checkpoint holds."""
        rows = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None
        names = ("rows_per_step", "seed", "data_seed", "train_sampling_strategy", "group_by_modality_length")
        settings = {name: getattr(self.args, name) for name in (*names, "save_only_model")}
        return settings | {"rows": rows, "processes": self.args.world_size}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Also list the files, when all processes have written theirs and before older checkpoints are removed."""
        run_folder = self._get_output_dir(trial)
        folder = Path(run_folder) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # what a run left that was interrupted here
        self.accelerator.wait_for_everyone()
        # Trainer would remove the older checkpoints before this one is whole
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with disk_errors_named(folder, "**/*"):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    write_manifest(folder, self.state.global_step, self._run_settings())
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(run_folder, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse weights of another model. The distiller has a file of its own, and tied weights are saved once."""
        tied = self.accelerator.unwrap_model(self.model).all_tied_weights_keys
        missing = [key for key in load_result.missing_keys if not key.startswith("distiller.") and key not in tied]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint is not of this model; missing: {missing}, left over: {load_result.unexpected_keys}. "
                "Resume with the options of the run that wrote it."
            )
