"""Sends a folder to the Hub as one commit, and reads the commit back."""

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from hub.push_allowlist import is_ours
from modeling_movekd.files import CARD_NAME


SPACE_FOLDER = Path(__file__).resolve().parents[1] / "spaces"


@dataclass
class SpaceSettings:
    """
    The Space of a checkpoint.

    Args:
        folder (`Path`, *optional*, defaults to `spaces/`): The Space's files, with a README.md that names the SDK.
        repo_id (`str`, *optional*): Name of the Space, by default the checkpoint's.
        hardware (`str`, *optional*): Hardware to request after the upload.
        secrets (`dict`, *optional*): Secrets, set before the upload.
        variables (`dict`, *optional*): Variables, set before the upload beside `MODEL_ID` and `MODEL_REVISION`.
    """

    folder: Path = SPACE_FOLDER
    repo_id: str | None = None
    hardware: str | None = None
    secrets: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)


def folder_files(stage: Path) -> dict[str, Path]:
    return {path.relative_to(stage).as_posix(): path for path in sorted(stage.rglob("*")) if path.is_file()}


def create_repository(
    api: HfApi, repo_id: str, private: bool | None, kind: str = "model", sdk: str | None = None
) -> str:
    """Create the repository if it does not exist. Returns its full name."""
    repo_id = api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True, space_sdk=sdk).repo_id
    if private and not api.repo_info(repo_id, repo_type=kind).private:
        raise ValueError(
            f"{repo_id} is public, and pushing does not change that. Make it private in its settings, or push with "
            "`--no-private`."
        )
    return repo_id


def publish(
    api: HfApi,
    repo_id: str,
    stage: Path,
    message: str,
    create_pr: bool = False,
    revision: str | None = None,
    tag: str | None = None,
) -> CommitInfo:
    """Commit the files of a folder to a branch or pull request, read the commit back, and tag it."""
    branch = revision or "main"
    refs = api.list_repo_refs(repo_id)
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    tagged = {ref.name: ref.target_commit for ref in refs.tags}
    if branch not in heads and not branch.startswith("refs/"):
        if branch in tagged:
            raise ValueError(f"{branch} is a tag of {repo_id}, not a branch. Give a branch.")
        api.create_branch(repo_id, branch=branch)
    parent = heads.get(branch) or api.repo_info(repo_id, revision=branch).sha
    if tag in tagged and not (tagged[tag] == parent and _is_published(api, repo_id, parent, stage)):
        raise ValueError(
            f"{repo_id} has a tag {tag} already, at {tagged[tag]}, with other files. Give another tag, or delete that."
        )
    commit = _commit(api, repo_id, stage, message, parent, branch, create_pr)
    if tag is not None and tag not in tagged:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit


def _commit(
    api: HfApi,
    repo_id: str,
    stage: Path,
    message: str,
    parent: str | None,
    branch: str,
    create_pr: bool,
    kind: str = "model",
) -> CommitInfo:
    files = folder_files(stage)
    stale = [] if kind == "space" else _stale(api, repo_id, parent, files)
    if stale:
        print(f"Removed from {repo_id}, because the new checkpoint does not have them: {', '.join(stale)}")
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, str(path)) for name, path in files.items()
    ]
    operations += [CommitOperationDelete(name) for name in stale]
    commit = api.create_commit(
        repo_id,
        operations,
        commit_message=message,
        repo_type=kind,
        revision=branch,
        create_pr=create_pr,
        parent_commit=parent,
    )
    if wrong := _differences(api, repo_id, commit.oid, stage, kind):
        raise ValueError(f"{repo_id} differs from the sent files at {commit.oid}: {'; '.join(wrong)}. Push again.")
    return commit


def _stale(api: HfApi, repo_id: str, commit: str | None, files: Iterable[str]) -> list[str]:
    """Files of an earlier checkpoint that the new files do not replace."""
    return [name for name in api.list_repo_files(repo_id, revision=commit) if is_ours(name) and name not in files]


def _is_published(api: HfApi, repo_id: str, commit: str, stage: Path) -> bool:
    """Whether the commit has the content of all these files already, and no stale ones."""
    found = api.verify_repo_checksums(repo_id, revision=commit, local_dir=stage)
    missing = set(folder_files(stage)) & set(found.extra_paths)
    return not (found.mismatches or missing or _stale(api, repo_id, commit, folder_files(stage)))


def _differences(api: HfApi, repo_id: str, commit: str, stage: Path, kind: str = "model") -> list[str]:
    """Differences between a commit and the sent files: their sizes, and the content of config.json."""
    entries = api.list_repo_tree(repo_id, revision=commit, recursive=True, repo_type=kind)
    there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    wrong = []
    for name, path in folder_files(stage).items():
        size = path.stat().st_size
        if name not in there:
            wrong.append(f"{name} is missing")
        elif there[name].size != size:
            wrong.append(f"{name} has {there[name].size} bytes, not {size}")
    if not wrong and (stage / "config.json").exists():
        with tempfile.TemporaryDirectory() as folder:
            config = api.hf_hub_download(repo_id, "config.json", revision=commit, local_dir=folder, repo_type=kind)
            if Path(config).read_bytes() != (stage / "config.json").read_bytes():
                wrong.append("config.json has another content")
    return wrong


def publish_space(
    api: HfApi, settings: SpaceSettings, stage: Path, private: bool | None, model_id: str, commit: str
) -> str:
    sdk = RepoCard.load(stage / CARD_NAME).data.get("sdk")
    if sdk is None:
        raise ValueError(f"The front matter of {settings.folder / CARD_NAME} names no `sdk`.")
    model_is_private = api.repo_info(model_id).private
    if private is None and model_is_private:
        private = True  # a public Space would let everybody use the model
    repo_id = create_repository(api, settings.repo_id or model_id, private, "space", sdk)
    # Before the files are sent, as the upload starts the Space
    for key, value in {**settings.variables, "MODEL_ID": model_id, "MODEL_REVISION": commit}.items():
        api.add_space_variable(repo_id, key, value)
    for key, value in settings.secrets.items():
        api.add_space_secret(repo_id, key, value)
    parent = api.repo_info(repo_id, repo_type="space").sha
    pushed = _commit(api, repo_id, stage, f"Show {model_id} at {commit[:7]}", parent, "main", False, "space")
    if settings.hardware is not None:
        api.request_space_hardware(repo_id, settings.hardware)  # type: ignore[arg-type]
    if model_is_private and "HF_TOKEN" not in settings.secrets:
        print(f"{model_id} is private. Give the Space a secret HF_TOKEN that may read it.")
    return pushed.commit_url


@contextmanager
def explained(repo_id: str, token: str) -> Iterator[None]:
    """Turn errors of the Hub and the network into one error without tokens and signed URLs."""
    try:
        yield
    except (HfHubHTTPError, httpx2.HTTPError, RuntimeError, OSError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        response = getattr(cause, "response", None)
        status = 0 if response is None else response.status_code
        way_out = {
            401: "Log in again with `hf auth login` and a token that may write.",
            403: "Check that the token may write there, and that storage is left.",
            404: "Check the name, and that the token may read it.",
            412: "Somebody else has pushed in the meantime. Look at that commit, then push again.",
        }.get(status, "Run the same command again: files that have arrived are not sent again.")
        text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", str(cause).strip()).replace(token, "(token)")
        where = f"{error}: " if cause is not error else ""
        raise ValueError(f"Pushing to {repo_id} failed: {where}{type(cause).__name__}: {text}\n{way_out}") from None
