"""The two files a card is written from: what training noted of a run, and what an evaluation measured."""

import hashlib
import math
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from modeling_movekd.files import CONVERSION_NAME, EVALUATION_NAME, TRAINING_FACTS_NAME, read_json, save_json


_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


def public_name(source: str | os.PathLike) -> str:
    """
    What a model, data set or file may be called in public: a Hub id or a library's name as it is, and of a path on
    this machine, or an address, the last part alone.
    """
    name = re.sub(r"^(hf-hub|local-dir):", "", str(source).strip())
    if "://" in name:
        name = re.split(r"[?#]", name)[0]
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..", "~")]
    is_path = name.startswith(("/", ".", "~")) or "\\" in name or ":/" in name or len(parts) != 2
    if is_path or os.path.exists(name):
        return parts[-1] if parts else ""
    return name


def hub_id(name: Any) -> str | None:
    """The name if it is `owner/name` of the Hub, else `None`: a folder's name, or one of timm's, has no owner."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def without_paths(content: Any) -> Any:
    """The same content with every absolute path in it cut to its last part."""
    if isinstance(content, dict):
        return {str(without_paths(key)): without_paths(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_paths(value) for value in content]
    if isinstance(content, str) and re.match(r"(~?/|~$|[A-Za-z]:[/\\]|\\\\|\w+://)", content):
        return public_name(content)
    return content


def read_optional_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or `None` if there is no such file."""
    return read_json(path) if path.is_file() else None


def read_training_facts(folder: Path) -> dict[str, Any] | None:
    """
    `training_facts.json` of a checkpoint, without paths; `None` if there is none. Of one that was converted and not
    trained since, what `conversion.json` says of its source.

    Files from before `base_models` get it from the two fields of that time.

    Raises:
        ValueError: if it is no JSON object, or an entry that is a list of objects is none.
    """
    facts = read_optional_json(folder / TRAINING_FACTS_NAME)
    if facts is None:
        conversion = read_optional_json(folder / CONVERSION_NAME)
        if conversion is None:
            return None
        models = {"checkpoint": conversion.get("source"), "vision_model": conversion.get("vision_model")}
        facts = {"conversion": conversion}
        facts["base_models"] = [{"role": role, "model": name} for role, name in models.items() if name]
        if conversion.get("source"):
            facts["base_models"][0]["revision"] = conversion.get("revision")
        facts["license"] = conversion.get("license")
    elif "base_models" not in facts:
        models = {role: facts.get(role) for role in ("vision_model", "language_model")}
        facts["base_models"] = [{"role": role, "model": name} for role, name in models.items() if name]
    facts = without_paths(facts)
    earlier = facts.get("earlier_stages") or []
    for name in ("base_models", "teachers", "data", "earlier_stages"):
        entries = facts.get(name) or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"`{name}` in {folder / TRAINING_FACTS_NAME} is {entries!r}, expected a list of objects.")
        for entry in entries:
            entry |= {key: public_name(entry[key]) for key in ("model", "name") if isinstance(entry.get(key), str)}
    return facts | {"earlier_stages": earlier}


def note_license(folder: Path, license: str) -> None:
    """State a checkpoint's licence in the file that its facts are read from, from which every later card has it."""
    names = (TRAINING_FACTS_NAME, CONVERSION_NAME)
    path = next((folder / name for name in names if (folder / name).is_file()), folder / TRAINING_FACTS_NAME)
    save_json((read_optional_json(path) or {}) | {"license": license}, path)


@dataclass
class EvaluationResult:
    """
    One number of `evaluation.json`, which is `{"results": [...], "weights": ...}`; the latter, optional, is the
    [`weights_fingerprint`] of the checkpoint that was evaluated.

    Args:
        task: Task of the Hub, as `"image-text-to-text"`.
        dataset: Data set evaluated on, best as its Hub id.
        split: Its split.
        metric: What was measured, as `"exact_match"`.
        value: The number, finite.
        prompt: The prompt or template, in words: numbers with and without OCR tokens in it are different things.
        revision: Commit of the data set.
        subset: Its configuration.
        dataset_name: What the data set is called in a table.
        rows: Rows evaluated on.

    Raises:
        ValueError: for a field of another type, empty, of several lines, or a value that is not finite.
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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if field.name in ("value", "rows"):
                kinds = (int, float) if field.name == "value" else (int,)
                if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
                    raise ValueError(f"`{field.name}` is {value!r}, expected a finite number.")
            elif not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > 500:
                raise ValueError(f"`{field.name}` is {value!r}, expected one line of text, at most 500 characters.")
        names = ("task", "dataset", "split", "metric", "revision", "subset")
        for name in names:
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.,:+@ -]+(/[\w.-]+)?", value, re.ASCII):
                raise ValueError(f"`{name}` is {value!r}, expected an identifier: letters, digits and `._-`.")


def read_evaluation(folder: Path) -> list[EvaluationResult]:
    """
    The results in `evaluation.json` of a checkpoint; none if there is no such file.

    Raises:
        ValueError: for a missing, unknown or unfit field, naming it and the result; or if the file is of other weights
            than those in the folder.
    """
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


def copy_evaluation(folder: Path, dest: Path) -> None:
    """
    Take `evaluation.json`, if there is one, along to the same weights in other files, under their fingerprint.

    Raises:
        ValueError: as [`read_evaluation`] of `folder`.
    """
    content = read_optional_json(folder / EVALUATION_NAME)
    if content is None:
        return
    read_evaluation(folder)  # else results of other weights would get the fingerprint of these
    if "weights" in content:
        content["weights"] = weights_fingerprint(dest)
    save_json(content, dest / EVALUATION_NAME)


def weights_fingerprint(folder: Path) -> str:
    """
    Tells one checkpoint's weights from another's without reading all of them: a SHA-256 of the names, sizes, and
    evenly spaced samples of its safetensors files, as 16 hex digits.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("model*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for index in range(_SAMPLES):
                file.seek(index * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
