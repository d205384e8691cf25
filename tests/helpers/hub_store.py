"""What the loopback Hub of [`hub_server`] keeps: repositories with their commits, and who may see them."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fastapi import Request


OWNER_TOKEN, READER_TOKEN = "hf_OwnerTokenThatNobodyMaySee", "hf_ReaderTokenThatNobodyMaySee"
USERS = {OWNER_TOKEN: ("owner", ("org",)), READER_TOKEN: ("reader", ())}
LFS_FROM = 10 * 2**20
LFS_NAMES = re.compile(r"\.(safetensors|bin|pt|pth|parquet|arrow|onnx|npz|model|gguf|zip)$")


@dataclass
class File:
    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        content = self.content
        if self.is_lfs:
            content = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n".encode()
            )
        return sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid

    def facts(self, path: str) -> dict[str, Any]:
        facts: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content), "oid": self.git_oid}
        if self.is_lfs:
            facts["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return facts


@dataclass
class Repository:
    kind: str
    id: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    log: dict[str, dict[str, Any]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    sdk: str | None = None
    hardware: str | None = None
    sleep_time: int | None = None
    secrets: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, File], title: str, parent: str | None) -> str:
        described = [(path, file.etag) for path, file in sorted(files.items())]
        oid = sha1(json.dumps([self.id, len(self.commits), title, parent, described]).encode()).hexdigest()
        self.commits[oid], self.refs[ref] = files, oid
        self.log[oid] = {"id": oid, "title": title, "message": "", "parent": parent, "authors": [{"user": "owner"}]}
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, tag, pull request (`refs/pr/1`) or (short) commit id."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.refs[ref]
        return next((oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)), None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        commit = self.resolve(revision)
        assert commit is not None, revision
        return {path: file.content for path, file in self.commits[commit].items()}


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


class Hub:
    """
    Switches: `cut_uploads` (so many of the next uploads lose their connection midway), `uploads_left` (later ones are
    refused, as by an expired link), `quota` (bytes of LFS), `commit_before` (somebody else commits to this repository
    just before the next commit), `damage` (a file that arrives with other content).

    Counters: `uploads` and `downloads` by sha256 of the object, `cuts`, `requests` (method and path).
    `tokens_elsewhere` counts requests that took a token to the other origin.
    """

    def __init__(self) -> None:
        self.url = self.elsewhere = ""
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.cut_uploads = self.cuts = self.tokens_elsewhere = 0
        self.uploads_left: int | None = None
        self.commit_before: str | None = None
        self.damage: str | None = None
        self.quota: int | None = None
        self.uploads: Counter[str] = Counter()
        self.downloads: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []

    def environment(self, home: Path, token: str | None = None, **variables: str) -> dict[str, str]:
        """What a client process needs, with a cache of its own in `home`; nothing of this user's Hub reaches it."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS"))
        }
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return kept | own | ({} if token is None else {"HF_TOKEN": token}) | variables

    def repository(self, repo_id: str, kind: str = "models") -> Repository:
        return self.repositories[kind, repo_id]

    def add(self, repo_id: str, files: Mapping[str, bytes] = {}, kind: str = "models", **settings: Any) -> Repository:
        """A repository as if somebody had pushed it."""
        repository = self.repositories[kind, repo_id] = Repository(kind, repo_id, **settings)
        stored = {path: File(content, is_large(path, len(content))) for path, content in files.items()}
        self.objects.update({file.sha256: file.content for file in stored.values() if file.is_lfs})
        repository.commit("refs/heads/main", stored, "initial commit", None)
        return repository

    def add_folder(self, repo_id: str, folder: Path, kind: str = "models", **settings: Any) -> Repository:
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        return self.add(repo_id, files, kind, **settings)

    def commit_file(self, repo_id: str, path: str, content: bytes, kind: str = "models") -> str:
        """As if somebody had changed one file of `main`."""
        repository = self.repositories[kind, repo_id]
        head = repository.refs["refs/heads/main"]
        file = File(content, is_large(path, len(content)))
        if file.is_lfs:
            self.objects[file.sha256] = content
        return repository.commit("refs/heads/main", repository.commits[head] | {path: file}, f"Change {path}", head)

    def user(self, request: Request) -> str | None:
        header = request.headers.get("authorization")
        if header is None:
            return None
        if (token := header.removeprefix("Bearer ")) not in USERS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return USERS[token][0]

    def may_write(self, request: Request, namespace: str) -> bool:
        user = self.user(request)
        return user is not None and any(namespace in (name, *orgs) for name, orgs in USERS.values() if name == user)

    def find(self, request: Request, write: bool = False, content: bool = False) -> Repository:
        kind = unquote(request.path_params.get("kind", "models"))
        repo_id = f"{request.path_params['namespace']}/{request.path_params['name']}"
        user, repository = self.user(request), self.repositories.get((kind, repo_id))
        owns = self.may_write(request, request.path_params["namespace"])
        if repository is None or (repository.private and not owns and user not in repository.readers):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and not owns:
            raise Refusal(403, "you don't have the necessary permissions")
        if content and repository.gated and not owns and user not in repository.readers:
            raise Refusal(401 if user is None else 403, f"Access to {kind[:-1]} {repo_id} is restricted.", "GatedRepo")
        return repository

    def find_commit(self, request: Request, repository: Repository) -> str:
        revision = unquote(request.path_params.get("revision") or "main")
        if (commit := repository.resolve(revision)) is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


def is_large(path: str, size: int) -> bool:
    return size > 0 and (size > LFS_FROM or LFS_NAMES.search(path) is not None)
