"""The parts of a model card, with every value escaped for Markdown."""

import html
import json
import math
import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hub.card_facts import EvaluationResult
from hub.card_licenses import model_license


MAX_LENGTH = 300


def inline(value: Any, code: bool = True) -> str:
    """A value as plain text for one line or table cell. Identifiers become code, unless `code` is false."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(inline(part) for part in value)
    kept = "".join(" " if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in str(value))
    # Direction marks, surrogates and private characters
    line = " ".join("".join(char for char in kept if not unicodedata.category(char).startswith("C")).split())
    if len(line) > MAX_LENGTH:
        line = line[: MAX_LENGTH - 1] + "…"
    if code and re.fullmatch(r"[A-Za-z0-9][\w.+/@-]*", line, re.ASCII) and not re.fullmatch(r"[\d.]+", line):
        return f"`{line}`"
    line = re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", html.escape(line, quote=False))
    entities = {"{": "&#123;", "}": "&#125;", "://": "&#58;//", "www.": "www&#46;"}
    for part, entity in entities.items():
        line = line.replace(part, entity)
    return line


def python_string(value: str) -> str:
    """The value as a Python string that cannot end a fenced block or a template."""
    return re.sub(r"[<>`{}]", lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value))


def vllm_command(name: str, revision: str | None) -> str:
    """The command that serves a checkpoint with vLLM. Nothing in it ends a span of code, or is expanded by a shell."""
    model, revision = (shlex.quote(python_string(word)[1:-1]) for word in (name, revision or "main"))
    return f"python -m vllm.entrypoints.openai.api_server --model {model} --revision {revision} --trust-remote-code"


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def tower_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The vision tower's part of a configuration, which may be a tower's itself."""
    return mapping(config.get("vision_config", config))


def pairs(values: Mapping[str, Any]) -> str:
    """Names and values in one line, with nested ones in parentheses. Unknown values are left out."""
    return ", ".join(
        f"{inline(name)} ({pairs(value)})" if isinstance(value, Mapping) else f"{inline(name)} {inline(value)}"
        for name, value in values.items()
        if value is not None
    )


def known_rows(facts: Mapping[str, Any], labels: Mapping[str, str]) -> list[tuple[str, str]]:
    """Rows (label, value) of the fields that are known."""
    return [(label, inline(facts[name])) for name, label in labels.items() if facts.get(name) not in (None, "", [])]


def table(entries: Any, columns: Mapping[str, str]) -> str:
    """A Markdown table. Of the columns (field: heading), those without a value are left out."""
    known = [entry for entry in entries or [] if isinstance(entry, Mapping)]
    used = [name for name in columns if any(entry.get(name) not in (None, "") for entry in known)]
    rows = [["" if entry.get(name) is None else inline(entry[name]) for name in used] for entry in known]
    lines = [[columns[name] for name in used], ["---"] * len(used), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if used else ""


def architecture(config: Mapping[str, Any], encoder_only: bool) -> list[tuple[str, str]]:
    tower = tower_of(config)
    rows = known_rows(
        tower,
        {"image_size": "image size (pixels)", "patch_size": "patch size (pixels)", "hidden_size": "width of the tower"}
        | {"num_hidden_layers": "layers of the tower", "num_experts": "LoRA experts in each of its MLPs"}
        | ({"lora_rank": "rank of an expert", "lora_alpha": "alpha of an expert"} if tower.get("num_experts") else {}),
    )
    if not encoder_only:
        rows += known_rows(mapping(config.get("text_config")), {"model_type": "type of the language model"})
        rows += known_rows(config, {"image_aspect_ratio": "images"})
    return rows


STAGE_LABELS = {
    "recipe": "recipe",
    "code": "code",
    "distillation_preset": "preset",
    "steps": "steps",
    "epochs": "epochs",
    "global_batch_size": "global batch (rows)",
    "rows": "rows of data",
    "bad_rows": "rows skipped as unusable",
    "learning_rate": "learning rate",
    "vision_tower_learning_rate": "learning rate of the tower",
    "language_model_learning_rate": "learning rate of the language model",
    "seed": "seed",
    "dashboard": "dashboard (Trackio's Space)",
    "device": "device",
    "processes": "processes",
    "backend": "backend",
    "precision": "mixed precision",
    "dtype": "dtype of the weights",
}
NESTED_STAGE_LABELS = {
    "knobs": "options of the preset",
    "hyperparameters": "other options",
    "language_lora": "LoRA of the language model",
    "feature_cache": "teachers' features read from a cache",
    "best": "best checkpoint",
    "versions": "versions",
}
ROLES = {"vision_model": "vision tower", "language_model": "language model", "checkpoint": "whole model"}
BASE_MODEL_COLUMNS = {"role": "part", "model": "model", "revision": "revision", "license": "license"}
TEACHER_COLUMNS = {"name": "teacher", "model": "model", "revision": "revision"}
TEACHER_COLUMNS |= {"image_size": "pixels", "dtype": "dtype", "license": "license"}
DATA_COLUMNS = {"name": "data set", "subset": "subset", "split": "split", "revision": "revision", "weight": "weight"}
RESULT_COLUMNS = {"task": "task", "dataset": "data set", "subset": "subset", "split": "split", "metric": "metric"}
RESULT_COLUMNS |= {"value": "value", "rows": "rows", "prompt": "prompt", "revision": "revision of the data"}
RESULT_COLUMNS |= {"code": "code"}


def sections(
    facts: Mapping[str, Any], config: Mapping[str, Any], results: Sequence[EvaluationResult], encoder_only: bool
) -> dict[str, Any]:
    """The variables of the template that training, configuration and evaluation fill."""
    stages = stages_of(facts)
    base_models = [
        {**entry, "role": ROLES.get(str(entry.get("role"))), "license": model_license(entry) or "not known"}
        for entry in base_models_of(facts, encoder_only)
    ]
    return {
        "summary": summary(stages, encoder_only),
        "architecture": architecture(config, encoder_only),
        "base_models": table(base_models, BASE_MODEL_COLUMNS),
        "stages": [stage_view(stage) for stage in stages],
        "results": table([asdict(result) for result in results], RESULT_COLUMNS),
        "limits": limits(config, encoder_only),
    }


def stage_view(facts: Mapping[str, Any]) -> dict[str, Any]:
    """One stage for the template."""
    rows = known_rows(facts, STAGE_LABELS)
    if isinstance(facts.get("seconds"), int | float) and math.isfinite(facts["seconds"]):
        hours, minutes = divmod(round(facts["seconds"] / 60), 60)
        rows.append(("wall time", f"{hours} h {minutes} min"))
    nested = {label: pairs(mapping(facts.get(name))) for name, label in NESTED_STAGE_LABELS.items()}
    rows += [(label, listed) for label, listed in nested.items() if listed]
    evaluation = mapping(facts.get("evaluation"))
    return {
        "name": inline(facts["stage"]) if facts.get("stage") else "",
        "rows": rows,
        "teachers": table(facts.get("teachers"), TEACHER_COLUMNS),
        "data": table(facts.get("data"), DATA_COLUMNS),
        "losses": pairs(mapping(facts.get("losses"))),
        "evaluation": pairs(mapping(evaluation.get("metrics"))),
        "evaluation_rows": "" if evaluation.get("rows") is None else inline(evaluation["rows"]),
        "validation": inline(facts["validation"]) if facts.get("validation") else "",
    }


def summary(stages: Sequence[Mapping[str, Any]], encoder_only: bool) -> str:
    what = "A vision encoder" if encoder_only else "A vision-language model"
    names = list(dict.fromkeys(str(entry.get("name")) for entry in entries_of(stages, "teachers")))
    if not names:
        return f"{what} of the MoVE-KD family; no distillation is recorded."
    part = "" if encoder_only else " whose vision encoder is"
    return f"{what}{part} distilled from {len(names)} frozen teacher{'s' * (len(names) > 1)}: {inline(names)}."


def limits(config: Mapping[str, Any], encoder_only: bool) -> list[str]:
    limits = ["The model has the errors, gaps and biases of its base models, teachers and data."]
    if tower_of(config).get("num_experts"):
        limits.append("Each token is routed to one expert, so the experts cannot be merged exactly into a plain MLP.")
    if encoder_only:
        base = "CLIP" if tower_of(config).get("class_token", True) else "SigLIP"
        limits.append(f"The features no longer match the text model of {base}.")
    else:
        limits.append("Answers can sound sure and be wrong about the picture. Check them before you rely on them.")
    return limits


def stages_of(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [stage for stage in (*(facts.get("earlier_stages") or []), facts) if stage.get("stage")]


def entries_of(stages: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """The entries of a list, of all stages."""
    return [entry for stage in stages for entry in stage.get(name) or [] if isinstance(entry, Mapping)]


def base_models_of(facts: Mapping[str, Any], encoder_only: bool) -> list[Mapping[str, Any]]:
    models = entries_of([facts], "base_models")
    return [entry for entry in models if not encoder_only or entry.get("role") != "language_model"]
