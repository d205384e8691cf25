"""
Publish a checkpoint on the Hub, or its encoder alone, or the demo Space with it.

    python hub/push.py outputs/finetune me/my-student --dry-run     # checks all and lists what would be sent
    python hub/push.py outputs/finetune me/my-student --tag
    python hub/push.py outputs/finetune me/my-encoder --encoder-only --private
    python hub/push.py outputs/finetune me/my-student --space --space-hardware zero-a10g --space-secrets HF_TOKEN

Log in first (`hf auth login`, or `HF_TOKEN` in the environment); no token is taken from the command line. What leaves
the machine is an allow-list (`hub/push_allowlist.py`): weights, configuration, processor, this package's code, card,
and beside them `distiller.safetensors`, with which others can continue the run, and the facts of training and
evaluation, from which the card is written. Optimiser states, data, logs and anything else stay.
"""

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any


# Run as a script, Python puts hub/ first on the path instead of the repository
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

import modeling_movekd
from hub.card import check_card, is_generated, write_card
from hub.card_facts import EVALUATION_NAME, copy_evaluation, public_name
from hub.export import export
from hub.files import read_json, weight_files
from hub.push_allowlist import PICKLES, checkpoint_files, space_files
from hub.push_commit import (
    CARD_NAME,
    SPACE_FOLDER,
    SpaceSettings,
    create_repository,
    explained,
    folder_files,
    publish,
    publish_space,
)
from hub.push_validate import validate
from hub.weights import MAX_SHARD_SIZE, Piece, WeightFiles, write_weights


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

    Files of an earlier checkpoint that the new one does not have are removed in the same commit, so that no stale
    shard is loaded; other files of the repository stay.

    Args:
        checkpoint: The folder.
        repo_id: Repository of the Hub, made if it does not exist.
        encoder_only: Publish the vision encoder alone.
        space: Publish the demo Space too, bound to the pushed commit.
        private: Make what is new private (`True`) or public (`False`); by default the Hub decides for a model, and a
            Space is private if its model is. One that is public and would have to be private is refused.
        create_pr: Open a pull request instead of writing to the branch.
        revision: The branch, made from `main` if it does not exist.
        tag: Tag the commit: `True` for v and this package's version, or a name.
        dry_run: Check and list; nothing is sent.
        token: Of a user who may write there; by default the one that is logged in.
        commit_message: Title of the commit.
        max_shard_size: Bytes; larger weight files are split anew.

    Returns:
        The URL of the commit, or of the pull request; `None` for a dry run.

    Raises:
        ValueError: if anything may not be published or is refused by the Hub, with the reason and the way out. Where
            an upload breaks off, what has arrived is kept, and is not sent again.
    """
    settings = SpaceSettings() if space is True else space or None
    _check_arguments(repo_id, create_pr, revision, tag, settings)
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give a checkpoint that training or `save_pretrained` wrote.")
    token = token or get_token()
    tag_name = f"v{modeling_movekd.__version__}" if tag is True else tag or None
    with tempfile.TemporaryDirectory(prefix=".push-", dir=folder.resolve().parent) as temporary:
        checkpoint_files(folder, token)  # before anything of it is read, let alone run
        if encoder_only and read_json(folder / "config.json").get("model_type") != "movekd_vision":
            folder = export(folder, Path(temporary) / "encoder", "encoder")
        stage, left = _stage(folder, Path(temporary) / "checkpoint", token, max_shard_size)
        _write_card(folder, stage, encoder_only, repo_id, tag_name or revision)
        loaded = validate(stage)
        print(f"Loaded in a process of its own: {loaded['model']}, {loaded['parameters']:,} parameters.")
        _show(stage, left, repo_id)
        staged_space = None
        if settings is not None:
            staged_space, left = _stage_space(settings, Path(temporary) / "space", token)
            _show(staged_space, left, f"spaces/{settings.repo_id or repo_id}")
        if dry_run:
            print("A dry run: nothing was sent.")
            return None
        if token is None:
            raise ValueError("Nobody is logged in. Run `hf auth login`, or set HF_TOKEN.")
        message = commit_message or f"Upload {'the encoder' if encoder_only else 'the model'}"
        with explained(repo_id, token):
            api = HfApi(token=token)
            repo_id = create_repository(api, repo_id, private)
            commit = publish(api, repo_id, stage, message, create_pr, revision, tag_name)
        print(f"Published and read back: {commit.pr_url or commit.commit_url}")
        if settings is not None and staged_space is not None:
            with explained(settings.repo_id or repo_id, token):
                url = publish_space(api, settings, staged_space, private, repo_id, commit.oid)
            print(f"Published the Space: {url}")
    return commit.pr_url or commit.commit_url


def _check_arguments(
    repo_id: str, create_pr: bool, revision: str | None, tag: bool | str | None, space: SpaceSettings | None
) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository, owner/name: {error}") from error
    if create_pr and (tag or revision not in (None, "main") or space is not None):
        raise ValueError(
            f"A pull request goes to main and is not yet part of it, so there can be no tag ({tag}), other branch "
            f"({revision}) or Space beside it. Push without a pull request, or without those."
        )


def _stage(folder: Path, stage: Path, token: str | None, max_shard_size: int) -> tuple[Path, list[str]]:
    """A folder of links to exactly what is published (weights split anew where too large), and what is not."""
    chosen, left = checkpoint_files(folder, token)
    stage.mkdir()
    weights = weight_files(folder)
    is_split = max(path.stat().st_size for path in weights) > max_shard_size
    split = {path.name for path in weights} | {"model.safetensors.index.json", EVALUATION_NAME} if is_split else set()
    for name in chosen:
        if name not in split:
            (stage / name).symlink_to((folder / name).resolve())
    config = read_json(folder / "config.json")
    if (public := _without_paths(config)) != config:
        (stage / "config.json").unlink()
        (stage / "config.json").write_text(json.dumps(public, indent=2) + "\n", encoding="utf-8")
    if is_split:
        files = WeightFiles(weights)
        pieces = [Piece([(files, key)], partial(_under, key)) for key in files.tensors]
        write_weights(pieces, stage, max_shard_size)
        copy_evaluation(folder, stage)
    return stage, left


def _without_paths(content: Any) -> Any:
    """Of where a part was loaded from the name alone, as it may have been a folder of this machine."""
    if not isinstance(content, dict):
        return content
    return {
        key: public_name(value) if key == "_name_or_path" and isinstance(value, str) else _without_paths(value)
        for key, value in content.items()
    }


def _under(key: str, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensors[0]}


def _write_card(folder: Path, stage: Path, encoder_only: bool, repo_id: str, revision: str | None) -> None:
    """The card of the folder if its owner wrote one, else one from its facts that loads this tag or branch."""
    card = stage / CARD_NAME
    if not card.exists() or is_generated(card):
        card.unlink(missing_ok=True)
        write_card(folder, encoder_only=encoder_only, repo_id=repo_id, revision=revision, dest=stage)
    check_card(card)


def _stage_space(settings: SpaceSettings, stage: Path, token: str | None) -> tuple[Path, list[str]]:
    if not settings.folder.is_dir():
        raise ValueError(f"{settings.folder} is no folder; give that of a Space.")
    chosen, left = space_files(settings.folder, token)
    for name in chosen:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).symlink_to((settings.folder / name).resolve())
    return stage, left


def _show(stage: Path, left: list[str], repo_id: str) -> None:
    files = folder_files(stage)
    print(f"For {repo_id}, {sum(path.stat().st_size for path in files.values()):,} bytes in {len(files)} files:")
    for name, path in files.items():
        print(f"  {path.stat().st_size:>14,}  {name}")
    if left:
        shown = sorted({f"{name.split('/')[0]}/" if "/" in name else name for name in left})
        marked = [f"{name} (a pickle)" if name.endswith(PICKLES) else name for name in shown]
        print(f"Stays here: {', '.join(marked)}")


def _from_environment(names: list[str]) -> dict[str, str]:
    if unset := [name for name in names if not os.environ.get(name)]:
        raise ValueError(f"Secrets are read from the environment, where {unset} are not set.")
    return {name: os.environ[name] for name in names}


def _variables(pairs: list[str]) -> dict[str, str]:
    if bad := [pair for pair in pairs if not pair.partition("=")[0] or "=" not in pair]:
        raise ValueError(f"The variables {bad} are not of the form NAME=VALUE.")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of the checkpoint")
    parser.add_argument("repo_id", metavar="repo", help="repository on the Hub: owner/name, or a name of your own")
    parser.add_argument("--encoder-only", action="store_true", help="publish the vision encoder alone")
    private_help = "make what is new private; a Space is so anyway if its model is, unless it is --no-private"
    parser.add_argument("--private", action=argparse.BooleanOptionalAction, help=private_help)
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--revision", help="branch, made if it does not exist; main by default")
    tag_help = "tag the commit, with v and this package's version if no name follows"
    parser.add_argument("--tag", nargs="?", const=True, help=tag_help)
    parser.add_argument("--dry-run", action="store_true", help="check everything and list the files; send nothing")
    parser.add_argument("--commit-message", help="title of the commit")
    parser.add_argument("--space", action="store_true", help="publish the demo Space too, bound to the pushed commit")
    parser.add_argument("--space-folder", type=Path, help="the Space's files; spaces/ of this repository by default")
    parser.add_argument("--space-repo", help="the Space's name; that of the repository by default")
    parser.add_argument("--space-hardware", help="hardware to ask for, as zero-a10g or t4-small")
    secrets_help = "environment variables whose values become the Space's secrets"
    parser.add_argument("--space-secrets", nargs="+", default=[], metavar="NAME", help=secrets_help)
    parser.add_argument("--space-variables", nargs="+", default=[], metavar="NAME=VALUE", help="its variables")
    given = vars(parser.parse_args(arguments))
    folder, repo, hardware = given.pop("space_folder"), given.pop("space_repo"), given.pop("space_hardware")
    secrets, variables = given.pop("space_secrets"), given.pop("space_variables")
    try:
        if given["space"]:
            given["space"] = SpaceSettings(
                folder or SPACE_FOLDER, repo, hardware, _from_environment(secrets), _variables(variables)
            )
        elif any((folder, repo, hardware, secrets, variables)):
            raise ValueError("The flags of the Space do nothing without `--space`.")
        push(**given)
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
