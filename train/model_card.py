"""The facts of a run for its model card, without anything private about the machine."""

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import DistributedType
from huggingface_hub import ModelCard, constants
from huggingface_hub.file_download import repo_folder_name
from transformers import Trainer
from transformers.utils.hub import cached_file

from hub.card_facts import code_revision, public_name, read_training_facts, without_paths
from hub.card_write import is_generated, write_card
from modeling_movekd.base_encoders_movekd import find_base_encoder, read_model_type
from modeling_movekd.files import CARD_NAME, CONVERSION_NAME, TRAINING_FACTS_NAME, cached_commit, read_json
from train.arguments import DataArguments, ModelArguments
from train.build_encoder import image_settings, is_saved_encoder
from train.config import MoveKDSFTConfig
from train.data.datasets import data_sources
from train.distributed import whole_weights
from train.encoder_options import unused_options
from train.language_lora import language_lora_facts
from train.teachers.cached import CachedTeacher, FeatureCache, Teacher
from train.teachers.config import TeacherConfig, hub_revision, teacher_commit


PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "timm")
LOSSES = ("loss", "text", "kd", "balance", "mean_token_accuracy", "eval_loss")
# Arguments that the card lists, besides the preset's options and those with a line of their own in the card
SETTINGS = (
    *("num_experts", "lora_rank", "lora_alpha", "expert_assignment", "balance_rate"),
    *("freeze_vision_tower", "freeze_base_tower", "student_image_sizes", "image_aspect_ratio"),
    *("chat_template", "distill_tiles", "whitening_components", "feature_statistics_images", "max_length"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("group_by_modality_length", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
    *("max_grad_norm", "lr_scheduler_type", "warmup_steps", "label_smoothing_factor", "activation_checkpointing"),
)


@dataclass
class RunFacts:
    """
    What is known of a run before its first step.

    Args:
        known (`dict[str, Any]`): Entries of `training_facts.json`.
        seconds_before (`float`): Duration of the part of the run that this one resumes.
        started (`float`): Start of the run on the clock of `time.perf_counter`.
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
    Collect what may be gone or changed at the end of the run: the facts of the stage before, and the commits and
    licenses of models and data. Call it after they are loaded, so that the local cache knows the commits.
    """
    known: dict[str, Any] = {
        "recipe": None if recipe is None else public_name(Path(recipe).resolve()),
        "code": code_revision(),
        "license": args.license,
        "validation": _validation(data_args, args),
        "teachers": [teacher_facts(config) for config in teachers],
        "data": [
            {
                "name": public_name(source.name),
                "subset": source.subset,
                "split": source.split,
                "weight": source.weight,
                "revision": _commit(source.name, "dataset"),
            }
            for source in data_sources(data_args)
        ],
    }
    source, vision = model_args.model_name_or_path, args.vision_model
    roles = {"checkpoint": source, "vision_model": vision, "language_model": args.language_model}
    known["base_models"] = [base_model_facts(role, name) for role, name in roles.items() if name]
    revision = model_args.model_revision if source else None
    if vision and is_saved_encoder(vision):
        source = vision
    elif vision and args.process_index == 0:  # which writes the facts
        with whole_weights(args):
            known["vision_fingerprint"] = weights_fingerprint(vision)
    folder = None if source is None else facts_folder(source, revision)
    if folder is not None and (earlier := read_training_facts(folder)) is not None:
        new = [entry for entry in known["base_models"] if entry["role"] == "language_model"]
        # Facts may hold a license alone, without base models
        if bases := earlier.pop("base_models"):
            known["base_models"] = [*bases, *new]
        stages = earlier.pop("earlier_stages")
        known["vision_fingerprint"] = earlier.get("vision_fingerprint")
        known["earlier_stages"] = [*stages, earlier] if "stage" in earlier else stages
        known["license"] = args.license or (None if new else earlier.get("license"))
    return RunFacts(known, _seconds_before(args))


def facts_folder(source: str, revision: str | None) -> Path | None:
    """Where the facts of a folder or Hub id are: a folder, or `None` if a repository has none."""
    if Path(source).is_dir():
        return Path(source)
    lenient = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors")}
    found = (
        cached_file(source, name, revision=revision, **lenient) for name in (TRAINING_FACTS_NAME, CONVERSION_NAME)
    )
    return next((Path(name).parent for name in found if name is not None), None)


def _validation(data_args: DataArguments, args: MoveKDSFTConfig) -> str | None:
    if args.eval_strategy == "no":
        return None
    share = data_args.validation_share
    return f"{share:.4g} of the rows, held back" if share else f"split {data_args.dataset_test_split}"


def _seconds_before(args: MoveKDSFTConfig) -> float:
    path = Path(args.resume_from_checkpoint or "") / TRAINING_FACTS_NAME
    return float(read_json(path).get("seconds") or 0.0) if args.resume_from_checkpoint and path.is_file() else 0.0


def base_model_facts(role: str, source: str) -> dict[str, Any]:
    """The facts of a model that the student was built from."""
    return {
        "role": role,
        "model": public_name(source),
        "revision": _commit(source),
        "license": noted_license(source),
    }


def weights_fingerprint(vision_model: str) -> str:
    """
    Return a SHA-256 of the weights of a CLIP or SigLIP vision model, whatever their names, order and dtype.

    `spaces/encoders.py` computes the same of the encoder that it shows as plain CLIP or plain SigLIP.
    """
    vision = find_base_encoder(read_model_type(vision_model)).model_class.from_pretrained(vision_model)
    digests = sorted(sha256(weight.detach().float().numpy().tobytes()).hexdigest() for weight in vision.parameters())
    return sha256("".join(digests).encode()).hexdigest()


def teacher_facts(config: TeacherConfig) -> dict[str, Any]:
    """The facts of a teacher. `revision` is the commit, if the local cache knows it."""
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
    """The facts of the feature cache: its folder, dtype and teachers."""
    facts = cache.facts
    teachers = {name: of | {"model": public_name(of["model"])} for name, of in facts["teachers"].items()}
    return {"folder": public_name(cache.folder.resolve()), "dtype": facts["dtype"], "teachers": teachers}


def _commit(source: str, repo_type: str = "model") -> str | None:
    return None if Path(source).exists() else cached_commit(source, repo_type=repo_type)


def noted_license(source: str) -> str | None:
    """The license in a model's card or configuration, if these are on this machine."""
    folder = Path(source)
    if not folder.is_dir() and (commit := _commit(source)):
        repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model")
        folder = repository / "snapshots" / commit
    found = None
    if (folder / CARD_NAME).is_file():
        try:
            found = ModelCard.load(folder / CARD_NAME, ignore_metadata_errors=True).data.license
        except (ValueError, TypeError, yaml.YAMLError, UnicodeDecodeError):
            pass  # a card that cannot be parsed
    if found is None and (folder / "config.json").is_file():
        try:
            config = read_json(folder / "config.json")
            found = config.get("license") or (config.get("pretrained_cfg") or {}).get("license")
        except (ValueError, AttributeError):
            pass  # somebody else's file
    return found if isinstance(found, str) else None


def training_facts(
    trainer: Trainer, run: RunFacts, teachers: Mapping[str, Teacher], num_bad_rows: int
) -> dict[str, Any]:
    """The content of `training_facts.json` for a checkpoint of the run."""
    args, state = trainer.args, trainer.state
    last: dict[str, float] = {}
    for entry in state.log_history:
        last.update({name: value for name, value in entry.items() if isinstance(value, int | float)})
    evaluated = {name: last[name] for name in last if name.startswith("eval_") and name.split("_")[-1] != "second"}
    evaluated.pop("eval_runtime", None)
    caches = [teacher.cache for teacher in teachers.values() if isinstance(teacher, CachedTeacher)]
    # From the student, not from the arguments: nobody has compared them if the trainer was built by hand
    images = image_settings(trainer.model.config)
    unused, rows = unused_options() if args.stage == "encoder" else set(), _length(trainer.train_dataset)
    settings = [name for name in SETTINGS if name not in unused]
    facts: dict[str, Any] = {
        "stage": args.stage,
        "distillation_preset": args.distillation_preset if args.distill else None,
        "knobs": args.preset_options() | {"cut_tower": images["cut_tower"]},
        "hyperparameters": {name: getattr(args, name) for name in settings if hasattr(args, name)}
        | {name: value for name, value in images.items() if name != "cut_tower"},
        "vision_model": public_name(args.vision_model) if args.vision_model else None,
        "language_model": public_name(args.language_model) if args.language_model else None,
        "teachers": [teacher_facts(teacher.config) for teacher in teachers.values()],
        "steps": state.global_step,
        # Of a stream, Trainer counts the share of the steps
        "epochs": None if state.epoch is None or rows is None else round(state.epoch, 4),
        "rows": rows,
        "bad_rows": num_bad_rows,
        "learning_rate": args.learning_rate,
        "vision_tower_learning_rate": args.vision_tower_learning_rate,
        "language_model_learning_rate": args.language_model_learning_rate,
        "language_lora": language_lora_facts(trainer.model, args),
        "feature_cache": cache_facts(caches[0]) if caches else None,
        "global_batch_size": args.rows_per_step,
        "seed": args.seed,
        "dashboard": args.trackio_space_id if "trackio" in args.report_to else None,
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


def _backend(trainer: Trainer) -> str:
    kind = trainer.accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return f"DeepSpeed ZeRO-{trainer.accelerator.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return f"FSDP{trainer.accelerator.state.fsdp_plugin.fsdp_version}"
    return "one process" if kind == DistributedType.NO else "DDP"


def update_card(folder: Path, args: MoveKDSFTConfig) -> None:
    """
    Write the model card of a checkpoint, unless somebody else wrote one. Results of an older `evaluation.json` are
    left out.
    """
    card = folder / CARD_NAME
    if (folder / TRAINING_FACTS_NAME).is_file() and (not card.exists() or is_generated(card)):
        write_card(folder, repo_id=args.hub_model_id, evaluated=False)
