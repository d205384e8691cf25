"""The Hub's check of a README's front matter, as far as its rules are documented."""

import re
from typing import Any

import yaml


LICENSES = {
    "apache-2.0",
    "mit",
    "bsd-2-clause",
    "bsd-3-clause",
    "gpl-3.0",
    "agpl-3.0",
    "lgpl-3.0",
    "cc0-1.0",
    "openrail",
}
LICENSES |= {
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0",
    "creativeml-openrail-m",
}
LICENSES |= {"llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma", "other", "unknown", "isc", "unlicense"}
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
RELATIONS = {"finetune", "adapter", "merge", "quantized"}
PIPELINES = {"image-text-to-text", "image-feature-extraction", "text-generation", "image-classification"}
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def front_matter(content: str) -> str | None:
    match = re.match(r"---\s*\n(.*?)\n?---\s*(\n|$)", content, re.DOTALL)
    return match[1] if match else None


def card_data(content: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(front_matter(content) or "")
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _result_problems(model_index: Any) -> list[str]:
    if not isinstance(model_index, list):
        return ['"model-index" must be an array']
    problems = []
    for number, model in enumerate(model_index):
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            problems.append(f'"model-index[{number}].name" is required')
            continue
        for place, result in enumerate(model.get("results") or []):
            where = f"model-index[{number}].results[{place}]"
            problems += [f'"{where}.{key}" is required' for key in ("task", "dataset", "metrics") if key not in result]
            for key, needs in (("task", ("type",)), ("dataset", ("type", "name"))):
                problems += [
                    f'"{where}.{key}.{need}" is required' for need in needs if need not in (result.get(key) or {})
                ]
            for metric in result.get("metrics") or []:
                problems += [
                    f'"{where}.metrics.{need}" is required' for need in ("type", "value") if need not in metric
                ]
    return problems


def metadata_problems(content: str, kind: str) -> tuple[list[str], list[str]]:
    """Errors and warnings for the README of a `model`, `dataset` or `space`."""
    block = front_matter(content)
    if block is None:
        missing = ["empty or missing yaml metadata in repo card"]
        return (["Missing configuration in README"], []) if kind == "space" else ([], missing)
    try:
        data = yaml.safe_load(block)
    except yaml.YAMLError as error:
        return [f"YAML parse error: {error}"], []
    if not isinstance(data, dict):
        return ["metadata must be an object"], []
    errors, warnings = [], []
    for key in ("tags", "base_model", "datasets", "models", "language", "metrics", "license"):
        if key in data and not _is_names(data[key]):
            errors.append(f'"{key}" must be a string or an array of strings')
    for key in ("library_name", "pipeline_tag", "license_name", "license_link", "title", "emoji", "sdk", "app_file"):
        if key in data and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    licenses = data.get("license") or []
    for name in [licenses] if isinstance(licenses, str) else licenses:
        if name not in LICENSES:
            errors.append(f'"license" must be one of {sorted(LICENSES)}, found {name!r}')
    for key in ("base_model", "datasets", "models"):
        values = data.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            if not isinstance(value, str) or not REPOSITORY.fullmatch(value):
                errors.append(f'"{key}" with value {value!r} is not valid: use a model or dataset id of the Hub')
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
    if data.get("pipeline_tag", "image-text-to-text") not in PIPELINES:
        warnings.append(f"The pipeline tag {data['pipeline_tag']!r} is not in the official list")
    if "model-index" in data:
        errors += _result_problems(data["model-index"])
    if kind == "space":
        errors += [
            f'"{key}" must be one of {sorted(COLORS)}'
            for key in ("colorFrom", "colorTo")
            if data.get(key, "red") not in COLORS
        ]
        if data.get("sdk") not in ("gradio", "docker", "static"):
            errors.append('"sdk" must be one of gradio, docker, static')
        if len(data.get("short_description") or "") > 60:
            errors.append('"short_description" length must be at most 60 characters')
    return errors, warnings
