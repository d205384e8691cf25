"""Write and check the model card of a checkpoint."""

import re
from collections.abc import Mapping, Sequence
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
    pictures_of,
    read_evaluation,
    read_optional_json,
    read_training_facts,
    write_hub_results,
)
from hub.card_licenses import HUB_LICENSES, check_license, derive_license
from hub.card_text import (
    base_models_of,
    entries_of,
    inline,
    mapping,
    python_string,
    sections,
    stages_of,
    tower_of,
    vllm_command,
)
from modeling_movekd.files import CARD_NAME, new_file


MARK = "<!-- Written by hub/card.py"
TEMPLATE = Path(__file__).with_name("model_card.md")
ENCODER_TYPES = ("movekd_vision", "clip_vision_model")


def write_card(
    folder: Path, *, license: str | None = None, overwrite: bool = False, dest: Path | None = None, **options: Any
) -> Path:
    """
    Write the model card `README.md` of a checkpoint from `training_facts.json`, `config.json` and `evaluation.json`,
    and beside it the results for the Hub's leaderboards.

    Args:
        folder (`Path`): The checkpoint.
        license (`str`, *optional*): Identifier of the license, instead of the recorded or derived one. It is recorded
            in the checkpoint, so that later cards state it too.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a card that was not written here.
        dest (`Path`, *optional*): Folder of the card, by default `folder`.
        options (*optional*): The other options of [`render_card`].

    Returns:
        The path of the card.
    """
    path = Path(folder if dest is None else dest) / CARD_NAME
    if path.exists() and not overwrite and not is_generated(path):
        raise ValueError(f"{path} was not written here. Move it away, or use `--overwrite`.")
    card = render_card(Path(folder), license=license, **options)
    with new_file(path) as temporary:
        card.save(temporary)
        check_card(temporary)
        if license is not None:
            note_license(Path(folder), check_license(license))
    shown = {name: options[name] for name in ("encoder_only", "evaluated") if name in options}
    write_hub_results(results_to_show(Path(folder), **shown), path.parent)
    return path


def results_to_show(folder: Path, encoder_only: bool = False, evaluated: bool = True) -> list[EvaluationResult]:
    """The results in `evaluation.json`, except that those of the whole model do not hold for its encoder."""
    config = read_optional_json(folder / "config.json") or {}
    is_encoder = config.get("model_type") in ENCODER_TYPES
    return read_evaluation(folder) if evaluated and (is_encoder or not encoder_only) else []


def is_generated(path: Path) -> bool:
    """Whether the card was written here, and its owner left the mark in it."""
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")


def render_card(
    folder: Path,
    encoder_only: bool = False,
    repo_id: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    evaluated: bool = True,
) -> ModelCard:
    """
    The card that [`write_card`] writes.

    Args:
        folder (`Path`): The checkpoint.
        encoder_only (`bool`, *optional*, defaults to `False`): Make the card of the vision encoder alone. A folder
            that holds an encoder gets such a card anyway.
        repo_id (`str`, *optional*): Where the checkpoint will be published, `owner/name`.
        revision (`str`, *optional*, defaults to `"main"`): Tag, branch or commit that the card's code loads.
        license (`str`, *optional*): Identifier of the license, instead of the recorded or derived one.
        evaluated (`bool`, *optional*, defaults to `True`): Show the results in `evaluation.json`.
    """
    config = read_optional_json(folder / "config.json") or {}
    facts = read_training_facts(folder)
    if not config and facts is None:
        raise ValueError(f"{folder} is no checkpoint: it has neither config.json nor training_facts.json.")
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ValueError(f"`repo_id` {repo_id!r} is no id of the Hub (owner/name): {error}") from error
    results = results_to_show(folder, encoder_only, evaluated)
    encoder_only = encoder_only or config.get("model_type") in ENCODER_TYPES
    facts = facts or {}
    license, license_text = _license(license or facts.get("license"), facts, encoder_only)
    name = repo_id or folder.resolve().name
    conversion = mapping(facts.get("conversion"))
    if config.get("image_aspect_ratio") == "pad" and conversion.get("pads_images") is False:
        config["image_aspect_ratio"] = "square"  # the configuration does not tell, only the image processor does
    remote_code = _has_remote_code(config)
    data = _metadata(facts, config, results, name.split("/")[-1], license, encoder_only)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=inline(name.split("/")[-1], code=False),
        encoder_only=encoder_only,
        source=python_string(name),
        # For the processor too: without it, transformers asks at the terminal whether to run the model's code
        loading=f"revision={python_string(revision or 'main')}" + (", trust_remote_code=True" if remote_code else ""),
        remote_code=remote_code,
        vllm_command=vllm_command(name, revision) if remote_code and not encoder_only else None,
        pictures=pictures_of(folder),
        new_weights=_count_new_weights(conversion, encoder_only),
        license_text=license_text,
        **sections(facts, config, results, encoder_only),
    )
    card.text = re.sub(r"\n{3,}", "\n\n", card.text)
    if card.data.to_dict() != data.to_dict():
        raise ValueError(f"The metadata of {folder} becomes {card.data.to_dict()} in a card, not {data.to_dict()}.")
    return card


def _license(stated: Any, facts: Mapping[str, Any], encoder_only: bool) -> tuple[str | None, str]:
    """The license's identifier, if there is one, and what the card says of it."""
    license, reason = derive_license(base_models_of(facts, encoder_only))
    if stated is not None:
        license, reason = check_license(stated), "as its owner states"
    text = f"No license is stated: {reason}. The licenses of the base models apply."
    if license is not None:
        text = f"{inline(license)}, {reason}."
    if any(entry.get("license") for entry in entries_of(stages_of(facts), "teachers")):
        text += " The tables of teachers list theirs."
    return license, text


def _count_new_weights(conversion: Mapping[str, Any], encoder_only: bool) -> int:
    keys = conversion.get("new_weights")
    keys = keys if isinstance(keys, list) else []
    return sum(not encoder_only or str(key).startswith("model.vision_tower.") for key in keys)


def _has_remote_code(config: Mapping[str, Any]) -> bool:
    return not config or "auto_map" in config


def _metadata(
    facts: Mapping[str, Any],
    config: Mapping[str, Any],
    results: Sequence[EvaluationResult],
    name: str,
    license: str | None,
    encoder_only: bool,
) -> ModelCardData:
    """The card's front matter. A name that is no identifier, such as the name of a local folder, is left out."""
    stages = stages_of(facts)
    teachers = entries_of(stages, "teachers")
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
    if dashboards := [name for name in (hub_id(stage.get("dashboard")) for stage in stages) if name]:
        # The Hub shows the Space of this tag in the tab of training metrics
        tags += ["trackio", f"trackio:https://huggingface.co/spaces/{dashboards[-1]}"]
    models = [hub_id(entry.get("model")) for entry in base_models_of(facts, encoder_only)]
    bases = list(dict.fromkeys(model for model in models if model))
    datasets = [hub_id(entry.get("name")) for entry in entries_of(stages, "data")]
    other = license is not None and license not in HUB_LICENSES
    return ModelCardData(
        license="other" if other else license,
        license_name=license if other else None,
        library_name="transformers",
        pipeline_tag="image-feature-extraction" if encoder_only else "image-text-to-text",
        base_model=bases or None,
        # Without it, the Hub takes a list for a merge
        base_model_relation="finetune" if bases else None,
        datasets=list(dict.fromkeys(name for name in datasets if name)) or None,
        tags=tags,
        model_name=(re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-") or "model") if results else None,
        eval_results=[_eval_result(result) for result in results] or None,
    )


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
        # Not `dataset_args`: the index keeps only one of them for all metrics of a split
        metric_args={"prompt": result.prompt} | ({"code": result.code} if result.code else {}),
    )


def check_card(path: Path) -> None:
    """Check the front matter of a card. The error lists everything that is wrong."""
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
        for part in [value] if isinstance(value, str) else value:
            if not isinstance(part, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", part, re.ASCII):
                problems.append(f"`{name}` has {part!r}, no id of the Hub")
    tags = data.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag.isprintable() for tag in tags):
        problems.append(f"`tags` is {tags!r}, expected a list of words")
    license = data.get("license")
    if license is not None and license != "other" and license not in HUB_LICENSES:
        problems.append(f"`license` is {license!r}, which the Hub does not know; write `other` and a `license_name`")
    if isinstance(data.get("base_model"), list) and "base_model_relation" not in data:
        problems.append("`base_model` is a list without `base_model_relation`, which the Hub takes for a merge")
    if ModelCard(str(card)).data.to_dict() != data:
        problems.append("the metadata changes when it is saved again")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}.")
