"""The metadata that a card is written from: what training recorded of a run, and what an evaluation measured."""

import hashlib
import math
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

import modeling_movekd
from modeling_movekd.files import (
    CONVERSION_NAME,
    EVALUATION_NAME,
    HUB_RESULTS_NAME,
    TRAINING_FACTS_NAME,
    read_json,
    save_json,
    save_text,
)


# The pictures of a checkpoint: its card shows them, and a push sends them
PICTURE = re.compile(r"assets/[\w.-]+\.(png|jpe?g|webp)", re.ASCII)
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


def public_name(source: str | os.PathLike) -> str:
    """The name of a model, data set or file without paths: a Hub id stays, a path or URL becomes its last part."""
    name = re.sub(r"^(hf-hub|local-dir):", "", str(source).strip())
    if "://" in name:
        name = re.split(r"[?#]", name)[0]
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..", "~")]
    is_path = name.startswith(("/", ".", "~")) or "\\" in name or ":/" in name or len(parts) != 2
    if is_path or os.path.exists(name):
        return parts[-1] if parts else ""
    return name


def hub_id(name: Any) -> str | None:
    """The name if it is an `owner/name` of the Hub, else `None`."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def without_paths(content: Any) -> Any:
    """The same content with every absolute path and URL cut to its last part."""
    if isinstance(content, dict):
        return {str(without_paths(key)): without_paths(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_paths(value) for value in content]
    if isinstance(content, str) and re.match(r"(~?/|~$|[A-Za-z]:[/\\]|\\\\|\w+://)", content):
        return public_name(content)
    return content


def pictures_of(folder: Path) -> list[str]:
    """The pictures for the card of a checkpoint, relative to its folder."""
    names = sorted(f"assets/{path.name}" for path in (folder / "assets").glob("*"))
    return [name for name in names if PICTURE.fullmatch(name)]


def read_optional_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or `None` if there is no such file."""
    return read_json(path) if path.is_file() else None


def read_training_facts(folder: Path) -> dict[str, Any] | None:
    """
    The content of `training_facts.json` without paths, or `None` if there is no such file.

    For a converted checkpoint that was not trained since, the content is made from `conversion.json`.
    """
    facts = read_optional_json(folder / TRAINING_FACTS_NAME)
    if facts is None:
        conversion = read_optional_json(folder / CONVERSION_NAME)
        if conversion is None:
            return None
        models = {"checkpoint": conversion.get("source"), "vision_model": conversion.get("vision_model")}
        facts = {"conversion": conversion, "license": conversion.get("license"), "base_models": _base_models(models)}
        if conversion.get("source"):
            facts["base_models"][0]["revision"] = conversion.get("revision")
    elif "base_models" not in facts:  # a file of an early version
        facts["base_models"] = _base_models({role: facts.get(role) for role in ("vision_model", "language_model")})
    facts = without_paths(facts)
    for name in ("base_models", "teachers", "data", "earlier_stages"):
        entries = facts.get(name) or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"`{name}` in {folder / TRAINING_FACTS_NAME} is {entries!r}, expected a list of objects.")
        for entry in entries:
            entry |= {key: public_name(entry[key]) for key in ("model", "name") if isinstance(entry.get(key), str)}
    return facts | {"earlier_stages": facts.get("earlier_stages") or []}


def _base_models(models: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "model": name} for role, name in models.items() if name]


def note_license(folder: Path, license: str) -> None:
    """Record a checkpoint's license in the file that its metadata is read from."""
    names = (TRAINING_FACTS_NAME, CONVERSION_NAME)
    path = next((folder / name for name in names if (folder / name).is_file()), folder / TRAINING_FACTS_NAME)
    save_json((read_optional_json(path) or {}) | {"license": license}, path)


@dataclass
class EvaluationResult:
    """
    One result in `evaluation.json`.

    Args:
        task (`str`): Task of the Hub, such as `"image-text-to-text"`.
        dataset (`str`): Data set, best as its Hub id.
        split (`str`): Split of the data set.
        metric (`str`): Metric, such as `"exact_match"`.
        value (`float`): The finite number that was measured.
        prompt (`str`): The prompt in words. Numbers with and without OCR tokens in the prompt cannot be compared.
        revision (`str`, *optional*): Commit of the data set.
        subset (`str`, *optional*): Configuration of the data set.
        dataset_name (`str`, *optional*): Name of the data set in a table.
        rows (`int`, *optional*): Number of rows.
        code (`str`, *optional*): Version and commit of the code that measured, as [`code_revision`] gives them.
        date (`str`, *optional*): Day of the measurement, such as `"2026-11-30"`.
        task_id (`str`, *optional*): Task in the `eval.yaml` of a data set that the Hub lists as a benchmark. With it
            the result goes to the benchmark's leaderboard too, by [`write_hub_results`].
    """

    task: str
    dataset: str
    split: str
    metric: str
    value: float
    prompt: str
    revision: str | None = None
    subset: str | None = None
    dataset_name: str | None = None
    rows: int | None = None
    code: str | None = None
    date: str | None = None
    task_id: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if name in ("value", "rows"):
                kinds = (int, float) if name == "value" else (int,)
                if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
                    raise ValueError(f"`{name}` is {value!r}, expected a finite number.")
            elif not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > 500:
                raise ValueError(f"`{name}` is {value!r}, expected one line of text, at most 500 characters.")
            elif name not in ("prompt", "dataset_name"):
                if not re.fullmatch(r"[\w.,:+@ -]+(/[\w.-]+)?", value, re.ASCII):
                    raise ValueError(f"`{name}` is {value!r}, expected an identifier: letters, digits and `._-`.")
        if self.task_id is not None and hub_id(self.dataset) is None:
            raise ValueError(
                f"`task_id` is {self.task_id!r}, a task of a benchmark on the Hub, but `dataset` is {self.dataset!r}. "
                "Give the benchmark's id there (owner/name), or leave out `task_id`."
            )


def read_evaluation(folder: Path) -> list[EvaluationResult]:
    """The results in `evaluation.json`, which must have been measured with the weights in the folder."""
    path = folder / EVALUATION_NAME
    content = read_optional_json(path)
    if content is None:
        return []
    if not isinstance(content.get("results"), list) or not content.keys() <= {"results", "weights"}:
        raise ValueError(f"{path} has the keys {list(content)}: a list `results` must, `weights` may be there.")
    known = {field.name for field in fields(EvaluationResult)}
    required = {field.name for field in fields(EvaluationResult) if field.default is not None}
    results = []
    for index, entry in enumerate(content["results"]):
        if not isinstance(entry, dict) or not required <= entry.keys() <= known:
            raise ValueError(f"{path}, result {index}: {entry!r} needs {sorted(required)}, of {sorted(known)}.")
        try:
            results.append(EvaluationResult(**entry))
        except ValueError as error:
            raise ValueError(f"{path}, result {index}: {error}") from error
    if "weights" in content and content["weights"] != (found := weights_fingerprint(folder)):
        raise ValueError(
            f"{path} is of the weights {content['weights']!r}, but the folder holds {found!r}. Evaluate this "
            "checkpoint again, or remove the file."
        )
    return results


def write_hub_results(results: Sequence[EvaluationResult], folder: Path) -> None:
    """
    Write the results on registered benchmarks in the Hub's own form, which its leaderboards read. Without any, an
    earlier file is removed.
    """
    entries = [
        EvalResultEntry(
            dataset_id=result.dataset,
            task_id=result.task_id,
            value=result.value,
            dataset_revision=result.revision,
            date=result.date,
            notes="; ".join(part for part in (result.metric, result.prompt, result.code) if part),
        )
        for result in results
        if result.task_id is not None
    ]
    path = folder / HUB_RESULTS_NAME
    if not entries:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    save_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True), path)


def code_revision() -> str:
    """This package's version, in a clone with its commit, and `-dirty` if files differ from the commit."""
    version, root = f"movekd {modeling_movekd.__version__}", Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return version
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return f"{version}@{subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}"
    except (OSError, subprocess.CalledProcessError):
        return version  # no git, or a clone of another user


def copy_evaluation(folder: Path, dest: Path) -> None:
    """Copy `evaluation.json`, if there is one, to a folder that holds the same weights in other files."""
    content = read_optional_json(folder / EVALUATION_NAME)
    if content is None:
        return
    read_evaluation(folder)  # refuses results of other weights, which would get the new fingerprint
    if "weights" in content:
        content["weights"] = weights_fingerprint(dest)
    save_json(content, dest / EVALUATION_NAME)


def weights_fingerprint(folder: Path) -> str:
    """16 hex digits of a SHA-256 over the names, the sizes and evenly spaced samples of the safetensors files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("model*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for index in range(_SAMPLES):
                file.seek(index * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
