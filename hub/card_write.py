"""Write and check model cards, from the metadata of a checkpoint's training and evaluation."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hub.card_facts import (
    EvaluationResult,
    hub_id,
    note_license,
    read_evaluation,
    read_optional_json,
    read_training_facts,
)
from hub.card_licenses import HUB_LICENSES, check_license, derive_license, model_license
from hub.card_text import (
    BASE_MODEL_COLUMNS,
    RESULT_COLUMNS,
    architecture,
    entries_of,
    inline,
    limits,
    mapping,
    python_string,
    stage_view,
    stages_of,
    summary,
    table,
    tower_of,
)
from modeling_movekd.files import CARD_NAME, new_file


MARK = "<!-- Written by hub/card.py"
TEMPLATE = Path(__file__).with_name("model_card.md")
ENCODER_TYPES = ("movekd_vision", "clip_vision_model")
ROLES = {"vision_model": "vision tower", "language_model": "language model", "checkpoint": "whole model"}


def _eval_result(result: EvaluationResult) -> EvalResult:
    return EvalResult(
        task_type=result.task,
        dataset_type=result.dataset,
        dataset_name=result.dataset_name or result.dataset,
        dataset_config=result.subset,
        dataset_split=result.split,
        dataset_revision=result.revision,
        metric_type=result.metric,
        metric_value=result.value,
        # Not `dataset_args`, of which the index keeps one for all metrics of a split
        metric_args={"prompt": result.prompt},
    )


def card_metadata(
    facts: Mapping[str, Any],
    config: Mapping[str, Any],
    results: Sequence[EvaluationResult],
    name: str,
    license: str | None,
    encoder_only: bool,
) -> ModelCardData:
    """
    The card's front matter. Only identifiers get into it: a name that is not of the form that its field takes, such as
    that of a local folder where a Hub id belongs, is left out.
    """
    stages = stages_of(facts)
    base_models = [hub_id(model.get("model")) for model in _base_models(facts, encoder_only)]
    data, teachers = entries_of(stages, "data"), entries_of(stages, "teachers")
    tags = ["movekd"]
    if teachers:
        tags.append("knowledge-distillation")
    if tower_of(config).get("num_experts"):
        tags.append("mixture-of-experts")
    if _has_remote_code(config):
        tags.append("custom_code")
    for entry in teachers:
        model = hub_id(entry.get("model")) or str(entry.get("model")).split("/")[-1]
        if re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,95})?", model, re.ASCII):
            tags.append(f"teacher:{model}")
    other = license is not None and license not in HUB_LICENSES
    bases = list(dict.fromkeys(model for model in base_models if model))
    datasets = list(dict.fromkeys(found for entry in data if (found := hub_id(entry.get("name")))))
    return ModelCardData(
        license="other" if other else license,
        license_name=license if other else None,
        library_name="transformers",
        pipeline_tag="image-feature-extraction" if encoder_only else "image-text-to-text",
        base_model=bases or None,
        # A list without it reads as a merge
        base_model_relation="finetune" if bases else None,
        datasets=datasets or None,
        tags=tags,
        model_name=(re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-") or "model") if results else None,
        eval_results=[_eval_result(result) for result in results] or None,
    )


def _base_models(facts: Mapping[str, Any], encoder_only: bool) -> list[Mapping[str, Any]]:
    models = entries_of([facts], "base_models")
    return [entry for entry in models if not encoder_only or entry.get("role") != "language_model"]


def _has_remote_code(config: Mapping[str, Any]) -> bool:
    return not config or "auto_map" in config


def render_card(
    folder: Path,
    encoder_only: bool = False,
    repo_id: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    evaluated: bool = True,
) -> ModelCard:
    """As [`write_card`], without writing."""
    config = read_optional_json(folder / "config.json") or {}
    facts = read_training_facts(folder)
    if not config and facts is None:
        raise ValueError(f"{folder} is no checkpoint: it has neither config.json nor training_facts.json.")
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ValueError(f"`repo_id` {repo_id!r} is no id of the Hub (owner/name): {error}") from error
    is_encoder = config.get("model_type") in ENCODER_TYPES
    # What was measured of the whole model says nothing of its encoder
    results = read_evaluation(folder) if evaluated and (is_encoder or not encoder_only) else []
    encoder_only = encoder_only or is_encoder
    facts = facts or {}
    stages = stages_of(facts)
    base_models = _base_models(facts, encoder_only)
    stated = license or facts.get("license")
    derived, reason = derive_license(base_models)
    if stated is not None:
        derived, reason = check_license(stated), "as its owner states"
    name = repo_id or folder.resolve().name
    data = card_metadata(facts, config, results, name.split("/")[-1], derived, encoder_only)
    remote_code = _has_remote_code(config)
    pinned = python_string(revision or "main")
    conversion = mapping(facts.get("conversion"))
    if config.get("image_aspect_ratio") == "pad" and conversion.get("pads_images") is False:
        config["image_aspect_ratio"] = "square"  # which in a checkpoint the image processor alone tells
    new_weights = conversion.get("new_weights")
    new_weights = new_weights if isinstance(new_weights, list) else []
    if encoder_only:
        new_weights = [key for key in new_weights if str(key).startswith("model.vision_tower.")]
    listed = any(entry.get("license") for entry in entries_of(stages, "teachers"))
    licenses = "Those of the teachers are listed with them." if listed else ""
    title = inline(name.split("/")[-1], code=False)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        summary=summary(stages, encoder_only),
        model_class="AutoModel",
        processor_class="AutoImageProcessor" if encoder_only else "AutoProcessor",
        source=python_string(name),
        # The processor too: its tokenizer reads the configuration, and would ask at the terminal
        loading=f"revision={pinned}" + (", trust_remote_code=True" if remote_code else ""),
        remote_code=remote_code,
        architecture=architecture(config, encoder_only),
        base_models=table(
            [
                {**entry, "role": ROLES.get(str(entry.get("role"))), "license": model_license(entry) or "not known"}
                for entry in base_models
            ],
            BASE_MODEL_COLUMNS,
        ),
        stages=[stage_view(stage) for stage in stages],
        results=table([asdict(result) for result in results], RESULT_COLUMNS),
        new_weights=len(new_weights),
        limits=limits(config, encoder_only),
        license_text=f"{inline(derived)}, {reason}. {licenses}"
        if derived
        else f"No licence is stated here: {reason}. What the base models' own licences ask for holds. {licenses}",
    )
    card.text = re.sub(r"\n{3,}", "\n\n", card.text)  # what the template's branches leave
    if card.data.to_dict() != data.to_dict():
        raise ValueError(f"The card of {folder} would read {card.data.to_dict()}, meant was {data.to_dict()}.")
    return card


def write_card(
    folder: Path,
    encoder_only: bool = False,
    repo_id: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    evaluated: bool = True,
    overwrite: bool = False,
    dest: Path | None = None,
) -> Path:
    """
    Write the model card `README.md` of a checkpoint. It says what `training_facts.json`, `config.json` and
    `evaluation.json` say; what they do not know is left out.

    Args:
        folder: The checkpoint.
        encoder_only: Whether the card is of the vision encoder alone (found out from a `config.json` that is one's).
        repo_id: Where it will be published, `owner/name`.
        revision: Tag, branch or commit that the card loads; `main` if `None`.
        license: Identifier of its licence, instead of the one noted in training or derived from the base models. It is
            noted among the checkpoint's facts, so that later cards state it too.
        evaluated: Whether `evaluation.json` counts.
        overwrite: Whether to replace a card that was not written here.
        dest: Folder that the card is written to, if not the checkpoint's own.

    Returns:
        The path of the card.

    Raises:
        ValueError: if the folder is no checkpoint, a file or argument is unfit, or a card is there that was not
            written here.
    """
    path = Path(folder if dest is None else dest) / CARD_NAME
    if path.exists() and not overwrite and not is_generated(path):
        raise ValueError(f"{path} was not written here. Move it away, or say to overwrite it.")
    card = render_card(Path(folder), encoder_only, repo_id, revision, license, evaluated)
    with new_file(path) as temporary:
        card.save(temporary)
        check_card(temporary)
        if license is not None:
            note_license(Path(folder), check_license(license))
    return path


def is_generated(path: Path) -> bool:
    """Whether the card was written here and not changed by hand since, as far as its mark says."""
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")


def check_card(path: Path, online: bool = False) -> None:
    """
    Check a card: front matter that is YAML, results that make a model index, fields of the right form.

    Args:
        path: The card.
        online: Ask the Hub's own validator too (`HF_ENDPOINT`).

    Raises:
        ValueError: naming what is wrong with it.
    """
    content = Path(path).read_text(encoding="utf-8")
    if not REGEX_YAML_BLOCK.search(content):
        raise ValueError(f"{path} does not begin with metadata between two lines of ---.")
    try:
        card = ModelCard(content)
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ValueError(f"The metadata of {path} cannot be read: {error}") from error
    data = card.data.to_dict()
    problems = [f"`{name}` is missing" for name in ("library_name", "pipeline_tag", "tags") if not data.get(name)]
    for name in ("base_model", "datasets"):
        value = data.get(name) or []
        problems += [
            f"`{name}` has {part!r}, no id of the Hub"
            for part in ([value] if isinstance(value, str) else value)
            if not isinstance(part, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", part, re.ASCII)
        ]
    tags = data.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag.isprintable() for tag in tags):
        problems.append(f"`tags` is {tags!r}, expected a list of words")
    license = data.get("license")
    if license is not None and license != "other" and license not in HUB_LICENSES:
        problems.append(f"`license` is {license!r}, none the Hub knows; write `other`, and its name in `license_name`")
    if isinstance(data.get("base_model"), list) and "base_model_relation" not in data:
        problems.append("`base_model` is a list without `base_model_relation`, which reads as a merge")
    if ModelCard(str(card)).data.to_dict() != data:
        problems.append("it reads otherwise when it is written again")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}.")
    if online:
        card.validate()
