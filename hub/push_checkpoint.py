"""Publishes a checkpoint after checking and loading it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

import modeling_movekd
from hub.card_facts import copy_evaluation, public_name, write_hub_results
from hub.card_write import check_card, is_generated, results_to_show, write_card
from hub.export_forms import export
from hub.files import weight_files
from hub.push_allowlist import PICKLES, checkpoint_files, space_files
from hub.push_commit import SpaceSettings, create_repository, explained, folder_files, publish, publish_space
from hub.weights import MAX_SHARD_SIZE, WeightFiles, renamed, write_weights
from modeling_movekd.files import (
    CARD_NAME,
    DISTILLER_NAME,
    EVALUATION_NAME,
    read_json,
    save_json,
    temporary_folder,
)
from modeling_movekd.inference import read_config
from modeling_movekd.vision_movekd import save_weight_index


VALIDATE = Path(__file__).with_name("push_validate.py")


def push(
    checkpoint: str | Path,
    repo_id: str,
    *,
    encoder_only: bool = False,
    space: bool | SpaceSettings = False,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    tag: bool | str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> str | None:
    """
    Check a checkpoint, load it in a process of its own, and publish it as one commit.

    Files that an earlier checkpoint had and the new one does not have are removed in the same commit, so that no stale
    shard is loaded. Other files of the repository stay.

    Args:
        checkpoint (`str` or `Path`): The folder.
        repo_id (`str`): Repository of the Hub. It is created if it does not exist.
        encoder_only (`bool`, *optional*, defaults to `False`): Publish the vision encoder alone.
        space (`bool` or `SpaceSettings`, *optional*, defaults to `False`): Publish the demo Space too.
        private (`bool`, *optional*): Create private (`True`) or public (`False`) repositories. By default the Hub
            decides for a model, and a Space is private if its model is. An existing public repository is refused.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead of writing to the branch.
        revision (`str`, *optional*, defaults to `"main"`): The branch. It is created from `main` if it does not exist.
        tag (`bool` or `str`, *optional*): Tag of the commit; `True` for v and this package's version.
        dry_run (`bool`, *optional*, defaults to `False`): Check and list the files, and send nothing.
        token (`str`, *optional*): Token of a user who may write there, by default of the one who is logged in.
        commit_message (`str`, *optional*): Title of the commit.
        max_shard_size (`int`, *optional*, defaults to 5 GB): Larger weight files are split into shards of these bytes.

    Returns:
        The URL of the commit or of the pull request; `None` for a dry run.

    Raises:
        ValueError: if something may not be published, or the Hub refuses it. After a broken upload, push again: files
            that have arrived are not sent again.
    """
    settings = SpaceSettings() if space is True else space or None
    folder = Path(checkpoint)
    _check_arguments(folder, repo_id, create_pr, revision, tag, settings)
    token = token or get_token()
    tag_name = f"v{modeling_movekd.__version__}" if tag is True else tag or None
    with temporary_folder(folder.resolve().with_name("push")) as temporary:
        _prepare(folder, temporary, repo_id, settings, token, encoder_only, tag_name or revision, max_shard_size)
        if dry_run:
            print("Dry run: nothing was sent.")
            return None
        if token is None:
            raise ValueError("Nobody is logged in. Run `hf auth login`, or set HF_TOKEN.")
        message = commit_message or f"Upload {'the encoder' if encoder_only else 'the model'}"
        return _send(temporary, repo_id, settings, token, private, message, create_pr, revision, tag_name)


def _check_arguments(
    folder: Path,
    repo_id: str,
    create_pr: bool,
    revision: str | None,
    tag: bool | str | None,
    space: SpaceSettings | None,
) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository (owner/name): {error}") from error
    if create_pr and (tag or revision not in (None, "main") or space is not None):
        raise ValueError(
            f"A pull request goes to main and is not merged yet, so there can be no tag ({tag}), other branch "
            f"({revision}) or Space. Leave them out, or push without a pull request."
        )
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Give a checkpoint that training or `save_pretrained` wrote.")


def _prepare(
    folder: Path,
    temporary: Path,
    repo_id: str,
    settings: SpaceSettings | None,
    token: str | None,
    encoder_only: bool,
    revision: str | None,
    max_shard_size: int,
) -> None:
    """Gather the files to publish in `checkpoint` and `space` of a temporary folder, load the checkpoint, list all."""
    stage, space_stage = temporary / "checkpoint", temporary / "space"
    checkpoint_files(folder, token)  # before any of its files is read
    if encoder_only and read_json(folder / "config.json").get("model_type") != "movekd_vision":
        folder = export(folder, temporary / "encoder", "encoder")
    left = _stage(folder, stage, token, max_shard_size)
    _write_card(folder, stage, encoder_only, repo_id, revision)
    loaded = validate(stage)
    print(f"Loaded in a process of its own: {loaded['model']}, {loaded['parameters']:,} parameters.")
    _show(stage, left, repo_id)
    if settings is not None:
        left = _stage_space(settings, space_stage, token)
        _show(space_stage, left, f"spaces/{settings.repo_id or repo_id}")


def _send(
    temporary: Path,
    repo_id: str,
    settings: SpaceSettings | None,
    token: str,
    private: bool | None,
    message: str,
    create_pr: bool,
    revision: str | None,
    tag: str | None,
) -> str:
    """Publish what [`_prepare`] gathered. Returns the URL of the commit or of the pull request."""
    with explained(repo_id, token):
        api = HfApi(token=token)
        repo_id = create_repository(api, repo_id, private)
        commit = publish(api, repo_id, temporary / "checkpoint", message, create_pr, revision, tag)
    print(f"Published and read back: {commit.pr_url or commit.commit_url}")
    if settings is not None:
        with explained(settings.repo_id or repo_id, token):
            url = publish_space(api, settings, temporary / "space", private, repo_id, commit.oid)
        print(f"Published the Space: {url}")
    return commit.pr_url or commit.commit_url


def _stage(folder: Path, stage: Path, token: str | None, max_shard_size: int) -> list[str]:
    """Link the files to publish into a folder, and split large weights. Returns the names of the other files."""
    chosen, left = checkpoint_files(folder, token)
    for parent in [stage, *{(stage / name).parent for name in chosen} - {stage}]:
        parent.mkdir()
    weights = weight_files(folder)
    # Here and not in the process of its own, which reads no values of a model that does not fit into memory
    files = WeightFiles(weights)
    read_config(folder)
    files.check()
    if DISTILLER_NAME in chosen:
        WeightFiles([folder / DISTILLER_NAME]).close()
    is_split = max(path.stat().st_size for path in weights) > max_shard_size
    is_single = weights == [folder / "model.safetensors"]
    rewritten = {"model.safetensors.index.json"} if is_single or is_split else set()
    rewritten |= {path.name for path in weights} | {EVALUATION_NAME} if is_split else set()
    for name in chosen:
        if name not in rewritten:
            (stage / name).symlink_to((folder / name).resolve())
    config = read_json(folder / "config.json")
    if (public := _without_paths(config)) != config:
        save_json(public, stage / "config.json")  # replaces the link
    if is_split:
        write_weights([renamed(files, key, key) for key in files.tensors], stage, max_shard_size)
        copy_evaluation(folder, stage)
    elif is_single:
        save_weight_index(stage)  # earlier versions saved none
    return left


def _without_paths(content: Any) -> Any:
    """The content with each `_name_or_path` cut to a name, as it may be a folder of this machine."""
    if not isinstance(content, dict):
        return content
    return {
        key: public_name(value) if key == "_name_or_path" and isinstance(value, str) else _without_paths(value)
        for key, value in content.items()
    }


def _write_card(folder: Path, stage: Path, encoder_only: bool, repo_id: str, revision: str | None) -> None:
    """Write a card that loads this tag or branch, unless the owner wrote one."""
    card = stage / CARD_NAME
    if not card.exists() or is_generated(card):
        card.unlink(missing_ok=True)
        write_card(folder, encoder_only=encoder_only, repo_id=repo_id, revision=revision, dest=stage)
    else:
        write_hub_results(results_to_show(folder, encoder_only), stage)
    check_card(card)


def _stage_space(settings: SpaceSettings, stage: Path, token: str | None) -> list[str]:
    if not settings.folder.is_dir():
        raise ValueError(f"{settings.folder} is no folder. Give the folder of a Space.")
    chosen, left = space_files(settings.folder, token)
    for name in chosen:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).symlink_to((settings.folder / name).resolve())
    return left


def _show(stage: Path, left: list[str], repo_id: str) -> None:
    files = folder_files(stage)
    print(f"For {repo_id}, {sum(path.stat().st_size for path in files.values()):,} bytes in {len(files)} files:")
    for name, path in files.items():
        print(f"  {path.stat().st_size:>14,}  {name}")
    if left:
        shown = sorted({f"{name.split('/')[0]}/" if "/" in name else name for name in left})
        marked = [f"{name} (a pickle)" if name.endswith(PICKLES) else name for name in shown]
        print(f"Stays here: {', '.join(marked)}")


def validate(folder: Path) -> dict[str, Any]:
    """Run `hub/push_validate.py` in a process without this repository, network or token. Returns its answer."""
    size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    fits = size <= psutil.virtual_memory().available / 2
    kept = {
        name: value
        for name, value in os.environ.items()
        # Neither tokens nor the variables of a launcher
        if "TOKEN" not in name and not name.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"))
    }
    with tempfile.TemporaryDirectory(dir=folder.parent) as cache:
        own = {"HF_HOME": cache, "HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-P", str(VALIDATE), str(folder.resolve()), *([] if fits else ["--meta"])]
        result = subprocess.run(
            command, env=kept | own, cwd=cache, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    lines = result.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else {}
    except json.JSONDecodeError:
        answer = {}
    if result.returncode or "model" not in answer:
        reason = answer.get("problem") or (result.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise ValueError(f"The checkpoint does not load in a process of its own: {reason}")
    return answer
