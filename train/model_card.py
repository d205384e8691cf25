"""What a model card needs to say about a run: measured or configured, nothing inferred, and nothing of the machine."""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from accelerate.utils import DistributedType
from huggingface_hub import ModelCard
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from transformers.trainer_utils import get_last_checkpoint

from hub.card import CARD_NAME, is_generated, write_card
from hub.card_facts import TRAINING_FACTS_NAME, public_name, read_json, read_training_facts, without_paths
from train.build import image_settings
from train.config import DataArguments, ModelArguments, MoveKDSFTConfig, save_json
from train.data.datasets import data_sources
from train.language_lora import language_lora_facts
from train.teachers.cached import CachedTeacher, FeatureCache
from train.teachers.config import TeacherConfig, hub_revision, teacher_commit


if TYPE_CHECKING:
    from train.trainer import MoveKDTrainer

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "timm")
LOSSES = ("loss", "text", "kd", "balance", "mean_token_accuracy", "eval_loss")
# Of the arguments, those that tell one run from another, beside the knobs and what has a line of its own in the card
SETTINGS = (
    *("num_experts", "lora_rank", "lora_alpha", "lora_dropout", "freeze_vision_tower", "image_aspect_ratio"),
    *("chat_template", "distill_tiles", "whitening_components", "feature_statistics_images", "max_length"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("group_by_modality_length", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
    *("max_grad_norm", "lr_scheduler_type", "warmup_steps", "label_smoothing_factor", "activation_checkpointing"),
)


@dataclass
class RunFacts:
    """
    What is known of a run before its first step; from [`run_facts`], or empty where a trainer is built by hand.

    Args:
        known: Entries of `training_facts.json`.
        seconds_before: Wall time of the part of the run that this one resumes.
        started: When it began, on the clock of `time.perf_counter`.
    """

    known: dict[str, Any] = field(default_factory=dict)
    seconds_before: float = 0.0
    started: float = field(default_factory=time.perf_counter)


def run_facts(
    data_args: DataArguments,
    args: MoveKDSFTConfig,
    model_args: ModelArguments,
    teachers: Sequence[TeacherConfig],
    recipe: str | None = None,
) -> RunFacts:
    """
    Read at the start what may be gone or changed at the end: the facts of the stage before, and the commits and
    licences of what was loaded. Call it when models and data are loaded, so that the local cache knows their commits.

    Raises:
        ValueError: if the facts of the checkpoint that this run continues cannot be read.
    """
    known: dict[str, Any] = {
        "recipe": None if recipe is None else public_name(Path(recipe).resolve()),
        "license": args.license,
        "validation": _validation(data_args, args),
        "teachers": [teacher_facts(config) for config in teachers],
        "data": [
            {
                "name": public_name(source.name),
                "subset": source.subset,
                "split": source.split,
                "weight": source.weight,
                "revision": cached_commit(source.name, kind="dataset"),
            }
            for source in data_sources(data_args)
        ],
    }
    source = model_args.model_name_or_path
    if source is None:
        roles = {"vision_model": args.vision_model, "language_model": args.language_model}
        known["base_models"] = [base_model_facts(role, name) for role, name in roles.items() if name]
    elif (earlier := read_training_facts(Path(source))) is not None:
        # Facts that state a licence alone name no base models
        known["base_models"] = earlier.pop("base_models") or [base_model_facts("checkpoint", source)]
        stages = earlier.pop("earlier_stages")
        known["earlier_stages"] = [*stages, earlier] if "stage" in earlier else stages
        known["license"] = args.license or earlier.get("license")
    else:
        known["base_models"] = [base_model_facts("checkpoint", source)]
    return RunFacts(known, _seconds_before(args))


def _validation(data_args: DataArguments, args: MoveKDSFTConfig) -> str | None:
    if args.eval_strategy == "no":
        return None
    share = data_args.validation_share
    return f"{share:.4g} of the rows, held back" if share else f"split {data_args.dataset_test_split}"


def _seconds_before(args: MoveKDSFTConfig) -> float:
    folder = args.resume_from_checkpoint
    if not folder:
        return 0.0
    if not Path(folder).is_dir():
        folder = get_last_checkpoint(args.output_dir) if Path(str(args.output_dir)).is_dir() else None
    facts = read_json(Path(folder) / TRAINING_FACTS_NAME) if folder else None
    return float((facts or {}).get("seconds") or 0.0)


def base_model_facts(role: str, source: str) -> dict[str, Any]:
    """A model that the student was made of."""
    return {
        "role": role,
        "model": public_name(source),
        "revision": cached_commit(source),
        "license": noted_license(source),
    }


def teacher_facts(config: TeacherConfig) -> dict[str, Any]:
    """A teacher; `revision` is the commit that was read where the local cache knows it."""
    source = hub_revision(config)
    return {
        "name": config.name,
        "model": public_name(config.model),
        "revision": teacher_commit(config) or config.revision,
        "image_size": config.image_size,
        "dtype": config.dtype,
        "license": config.license or noted_license(source[0] if source else config.model.removeprefix("local-dir:")),
    }


def cache_facts(cache: FeatureCache) -> dict[str, Any]:
    """Where the teachers' features were read, of which commits they are, and how far they are off."""
    facts = cache.facts
    teachers = {name: of | {"model": public_name(of["model"])} for name, of in facts["teachers"].items()}
    return {"folder": public_name(cache.folder.resolve()), "dtype": facts["dtype"], "teachers": teachers}


def _snapshot_root(source: str, kind: str) -> Path:
    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type=kind)


def cached_commit(source: str, revision: str | None = None, kind: str = "model") -> str | None:
    """The commit that a branch or tag of a Hub repository stands for in the local cache; nothing is asked online."""
    if Path(source).exists() or source.count("/") != 1:
        return None
    reference = _snapshot_root(source, kind) / "refs" / (revision or "main")
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def noted_license(source: str) -> str | None:
    """The licence in the card or the configuration of a model, as far as they are on this machine."""
    folder = Path(source)
    if not folder.is_dir():
        commit = cached_commit(source)
        folder = _snapshot_root(source, "model") / "snapshots" / commit if commit else folder
    found = None
    if (folder / CARD_NAME).is_file():
        try:
            found = ModelCard.load(folder / CARD_NAME, ignore_metadata_errors=True).data.license
        except (ValueError, TypeError, yaml.YAMLError, UnicodeDecodeError):
            pass  # somebody else's file, of no use
    if found is None and (folder / "config.json").is_file():
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            found = config.get("license") or (config.get("pretrained_cfg") or {}).get("license")
        except (ValueError, AttributeError):
            pass
    return found if isinstance(found, str) else None


def training_facts(trainer: "MoveKDTrainer") -> dict[str, Any]:
    """The facts of the run so far, as they are saved with every checkpoint."""
    args, state, run = trainer.args, trainer.state, trainer.run_facts
    last: dict[str, float] = {}
    for entry in state.log_history:
        last.update({name: value for name, value in entry.items() if isinstance(value, int | float)})
    evaluated = {name: last[name] for name in last if name.startswith("eval_") and name.split("_")[-1] != "second"}
    evaluated.pop("eval_runtime", None)
    caches = [teacher.cache for teacher in trainer.teachers.values() if isinstance(teacher, CachedTeacher)]
    # As the student is, and not as it was asked for: a trainer may be given one of other settings
    images = image_settings(trainer.model.config)
    facts: dict[str, Any] = {
        "stage": args.stage,
        "distillation_preset": args.distillation_preset if args.distill else None,
        "knobs": args.knobs() | {"cut_tower": images["cut_tower"]},
        "hyperparameters": {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
        | {"image_aspect_ratio": images["image_aspect_ratio"]},
        "vision_model": public_name(args.vision_model) if args.vision_model else None,
        "language_model": public_name(args.language_model) if args.language_model else None,
        "teachers": [teacher_facts(teacher.config) for teacher in trainer.teachers.values()],
        "steps": state.global_step,
        "epochs": None if state.epoch is None else round(state.epoch, 4),
        "rows": _length(trainer.train_dataset),
        "bad_rows": len(trainer.bad_rows.reasons),
        "learning_rate": args.learning_rate,
        "vision_tower_learning_rate": args.vision_tower_learning_rate,
        "language_model_learning_rate": args.language_model_learning_rate,
        "language_lora": language_lora_facts(trainer.model, args),
        "feature_cache": cache_facts(caches[0]) if caches else None,
        "global_batch_size": args.rows_per_step,
        "seed": args.seed,
        "losses": {name: last[name] for name in last if name in LOSSES or name.startswith("kd/")},
        "evaluation": {"rows": _length(trainer.eval_dataset), "metrics": evaluated} if evaluated else None,
        "best": {"step": state.best_global_step, args.metric_for_best_model: state.best_metric}
        if args.load_best_model_at_end and state.best_metric is not None
        else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "processes": args.world_size,
        "backend": _backend(trainer),
        "precision": trainer.accelerator.mixed_precision,
        "dtype": str(trainer.model.dtype).removeprefix("torch."),
        "seconds": round(run.seconds_before + time.perf_counter() - run.started, 1),
        "versions": {package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
    }
    return without_paths(facts | run.known)


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _backend(trainer: "MoveKDTrainer") -> str:
    kind = trainer.accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return f"DeepSpeed ZeRO-{trainer.accelerator.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return f"FSDP{trainer.accelerator.state.fsdp_plugin.fsdp_version}"
    return "one process" if kind == DistributedType.NO else "DDP"


def save_facts_and_card(trainer: "MoveKDTrainer", folder: Path) -> None:
    """Write `training_facts.json` of the run so far, and the model card, beside weights just saved."""
    save_json(training_facts(trainer), folder / TRAINING_FACTS_NAME)
    update_card(folder, trainer.args)


def update_card(folder: Path, args: MoveKDSFTConfig) -> None:
    """
    Write the card of a folder that has facts, unless it has one that somebody else wrote. Results in an
    `evaluation.json` there are of older weights and left out.
    """
    card = folder / CARD_NAME
    if (folder / TRAINING_FACTS_NAME).is_file() and (not card.exists() or is_generated(card)):
        write_card(folder, repo_id=args.hub_model_id, evaluated=False)
