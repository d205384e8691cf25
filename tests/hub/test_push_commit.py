"""What the real client makes of a Hub that breaks, refuses, or holds something already."""

import os
from pathlib import Path

import pytest

from tests.helpers.hub_client import Client, ClientError
from tests.helpers.hub_server import OWNER_TOKEN, READER_TOKEN, Hub


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """What stands in for a checked checkpoint: a large file (three parts) and two small ones by LFS, and a text."""
    folder = tmp_path / "staged"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name, size in (
        ("model-00001-of-00003", 11 * 2**20),
        ("model-00002-of-00003", 900),
        ("model-00003-of-00003", 800),
    ):
        (folder / f"{name}.safetensors").write_bytes(os.urandom(size))
    return folder


def publish(owner: Client, repo_id: str, stage: Path, token: str = OWNER_TOKEN, **arguments) -> list[str]:
    code = """
with hub.push_commit.explained(repo_id, token):
    api = HfApi(token=token)
    hub.push_commit.create_repository(api, repo_id, arguments.pop("private", None))
    commit = hub.push_commit.publish(api, repo_id, Path(stage), "Upload", **arguments)
    result = [commit.oid, commit.pr_url]
"""
    return owner.run(code, repo_id=repo_id, stage=str(stage), token=token, arguments=arguments)


def test_a_connection_that_is_cut_is_taken_up_again(hub: Hub, owner: Client, staged: Path) -> None:
    hub.cut_uploads, cuts = 1, hub.cuts
    publish(owner, "org/cut", staged)
    assert hub.cuts == cuts + 1
    large = (staged / "model-00001-of-00003.safetensors").read_bytes()
    assert hub.repository("org/cut").files()["model-00001-of-00003.safetensors"] == large


def test_what_arrived_before_a_break_is_not_sent_again(hub: Hub, owner: Client, staged: Path) -> None:
    # The files go side by side. Of their five parts three leave, in whatever order, one file whole and one not
    hub.uploads_left, uploads = 3, hub.uploads.copy()
    try:
        with pytest.raises(ClientError, match="(?s)Request has expired.*Check that the token may write"):
            publish(owner, "org/broken", staged)
    finally:
        hub.uploads_left = None
    assert set(hub.repository("org/broken").files()) == {".gitattributes"}  # all or nothing
    arrived = hub.uploads - uploads
    publish(owner, "org/broken", staged)
    sent = hub.uploads - uploads
    assert len(sent) == 3 and set(sent.values()) == {1} and 1 <= arrived.total() <= 2
    assert len(hub.repository("org/broken").files()) == 5


@pytest.mark.parametrize(
    ("token", "repo_id", "expected"),
    [
        ("hf_WrongTokenThatNobodyMaySee", "org/x", "hf auth login"),
        (READER_TOKEN, "org/x", "403.*rights to create"),
        (OWNER_TOKEN, "stranger/x", "403.*rights to create"),
    ],
)
def test_who_may_not_write_is_told_so(hub: Hub, owner: Client, staged: Path, token, repo_id, expected) -> None:
    with pytest.raises(ClientError, match=f"(?s){expected}") as error:
        publish(owner, repo_id, staged, token)
    assert token not in str(error.value) + owner.log


def test_a_full_storage_and_a_public_repository_are_errors(hub: Hub, owner: Client, staged: Path) -> None:
    hub.quota = 1000
    try:
        with pytest.raises(ClientError, match="(?s)storage limit reached.*that storage is left"):
            publish(owner, "org/full", staged)
    finally:
        hub.quota = None
    with pytest.raises(ClientError, match="org/full is public, and pushing does not change that"):
        publish(owner, "org/full", staged, private=True)
    assert set(hub.repository("org/full").files()) == {".gitattributes"}


def test_a_space_is_private_where_its_model_is(hub: Hub, owner: Client, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nsdk: gradio\n---\n")
    code = """
settings = hub.push_commit.SpaceSettings(Path(stage), name)
hub.push_commit.publish_space(HfApi(token=token), settings, Path(stage), private, model, "0123456789abcdef")
"""

    def publish_space(name: str, model: str, private: bool | None = None) -> bool:
        owner.run(code, stage=str(tmp_path), name=name, model=model, private=private, token=OWNER_TOKEN)
        return hub.repository(name, "spaces").private

    hub.add("org/secret", private=True)
    hub.add("org/open")
    assert publish_space("org/quiet-demo", "org/secret") and publish_space("org/quiet-demo", "org/secret")
    assert not publish_space("org/open-demo", "org/open")
    assert not publish_space("org/shown-demo", "org/secret", private=False)
    with pytest.raises(ClientError, match="org/open-demo is public, and pushing .*--no-private"):
        publish_space("org/open-demo", "org/secret")


def test_a_commit_in_the_meantime_is_a_conflict(hub: Hub, owner: Client, staged: Path) -> None:
    publish(owner, "org/busy", staged)
    (staged / "config.json").write_text('{"a": 1}')
    hub.commit_before = "org/busy"
    with pytest.raises(ClientError, match="(?s)412.*Somebody else has pushed in the meantime"):
        publish(owner, "org/busy", staged)
    assert hub.repository("org/busy").files()["config.json"] == b"{}"


def test_what_arrives_damaged_is_an_error(hub: Hub, owner: Client, staged: Path) -> None:
    hub.damage = "config.json"
    try:
        with pytest.raises(ClientError, match="differs from the sent files.*config.json has 9 bytes, not 2"):
            publish(owner, "org/damaged", staged)
    finally:
        hub.damage = None


def test_stale_shards_go_and_other_files_stay(hub: Hub, owner: Client, staged: Path) -> None:
    old = {
        "model.safetensors": b"old",
        "vocab.json": b"{}",
        "picture.png": b"p",
        "README.md": b"mine",
        "train.py": b"",
    }
    hub.add("org/old", old)
    publish(owner, "org/old", staged)
    files = set(hub.repository("org/old").files())
    assert files == {path.name for path in staged.iterdir()} | {"picture.png", "README.md", "train.py"}


def test_a_tag_does_not_move(hub: Hub, owner: Client, staged: Path) -> None:
    publish(owner, "org/tagged", staged, tag="v1")
    repository = hub.repository("org/tagged")
    publish(owner, "org/tagged", staged, tag="v1")  # nothing has changed
    assert len(repository.commits) == 2
    (staged / "model-00003-of-00003.safetensors").write_bytes(os.urandom(800))  # as large as the one before
    with pytest.raises(ClientError, match="has a tag v1 already, .* Give another tag"):
        publish(owner, "org/tagged", staged, tag="v1")
    assert len(repository.commits) == 2


def test_branches_and_pull_requests(hub: Hub, owner: Client, staged: Path) -> None:
    oid, _ = publish(owner, "org/branches", staged, revision="best")
    repository = hub.repository("org/branches")
    assert repository.refs["refs/heads/best"] == oid and set(repository.files()) == {".gitattributes"}
    oid, url = publish(owner, "org/branches", staged, create_pr=True)
    assert url == f"{hub.url}/org/branches/discussions/1" and repository.refs["refs/pr/1"] == oid
    assert set(repository.files()) == {".gitattributes"} and len(repository.files("refs/pr/1")) == 5
