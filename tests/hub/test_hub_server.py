"""The loopback Hub itself, by the real client: what the tests of pushing and training do not already ask of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.hub_card_check import metadata_problems
from tests.helpers.hub_client import Client, ClientError, client
from tests.helpers.hub_server import OWNER_TOKEN, READER_TOKEN, Hub


@pytest.fixture(scope="module")
def owner(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with client(hub, tmp_path_factory.mktemp("home"), OWNER_TOKEN) as process:
        process.run("from huggingface_hub import HfApi, CommitOperationAdd, hf_hub_download; api = HfApi()")
        yield process


def test_who_is_asking(owner: Client) -> None:
    assert owner.run("result = api.whoami()")["name"] == "owner"
    with pytest.raises(ClientError, match="Invalid user token"):
        owner.run("HfApi(token='hf_wrong').whoami()")


def test_gated_files_are_for_those_let_in(hub: Hub, owner: Client) -> None:
    repository = hub.add("org/gated", {"config.json": b"{}"}, gated=True)
    read = "result = HfApi(token=token).hf_hub_download('org/gated', 'config.json')"
    assert owner.run("result = HfApi(token=False).model_info('org/gated').gated") == "manual"
    for token, status in ((False, 401), (READER_TOKEN, 403)):
        with pytest.raises(ClientError, match=f"GatedRepoError: {status}"):
            owner.run(read, token=token)
    repository.readers.add("reader")
    assert Path(owner.run(read, token=READER_TOKEN)).read_text() == "{}"


def test_private_repositories_do_not_exist_for_others(hub: Hub, owner: Client) -> None:
    hub.add("org/private", {"config.json": b"{}"}, private=True)
    for token, status in ((False, 401), (READER_TOKEN, 404)):
        with pytest.raises(ClientError, match=f"RepositoryNotFoundError: {status}"):
            owner.run("HfApi(token=token).model_info('org/private')", token=token)


def test_what_is_not_there_is_named(hub: Hub, owner: Client) -> None:
    hub.add("org/small", {"a.txt": b"a"})
    for code, error in (
        ("hf_hub_download('org/small', 'b.txt')", "RemoteEntryNotFoundError"),
        ("api.model_info('org/small', revision='v9')", "RevisionNotFoundError"),
        ("api.model_info('org/none')", "RepositoryNotFoundError"),
        ("list(api.list_repo_tree('org/small', 'folder'))", "RemoteEntryNotFoundError"),
    ):
        with pytest.raises(ClientError, match=error):
            owner.run(code)


def test_a_long_tree_comes_in_pages(hub: Hub, owner: Client) -> None:
    hub.add("org/many", {f"folder/{number}.txt": b"" for number in range(1500)})
    assert len(owner.run("result = api.list_repo_files('org/many')")) == 1500
    assert owner.run("result = [entry.path for entry in api.list_repo_tree('org/many')]") == ["folder"]


def test_folders_are_deleted_branches_removed_and_repositories_too(hub: Hub, owner: Client) -> None:
    hub.add("org/short", {"a/b.txt": b"", "c.txt": b""})
    owner.run("api.delete_folder('a', 'org/short'); api.create_branch('org/short', branch='side')")
    assert set(hub.repository("org/short").files()) == {"c.txt"}
    owner.run("api.delete_branch('org/short', branch='side')")
    assert set(hub.repository("org/short").refs) == {"refs/heads/main"}
    assert (
        owner.run("result = [commit.title for commit in api.list_repo_commits('org/short')]")[-1] == "initial commit"
    )
    owner.run("api.delete_repo('org/short')")
    assert ("models", "org/short") not in hub.repositories


def test_a_space_keeps_its_settings(hub: Hub, owner: Client) -> None:
    owner.run(
        "api.create_repo('org/space', repo_type='space', space_sdk='gradio', space_hardware='t4-small', "
        "space_secrets=[{'key': 'A', 'value': 'a'}], space_variables=[{'key': 'B', 'value': 'b'}])"
    )
    assert owner.run("result = api.get_space_runtime('org/space').hardware") == "t4-small"
    owner.run("api.request_space_hardware('org/space', 'cpu-basic'); api.delete_space_variable('org/space', 'B')")
    space = hub.repository("org/space", "spaces")
    assert (space.hardware, space.secrets, space.variables) == ("cpu-basic", {"A": "a"}, {})


def test_a_dataset_is_pushed_loaded_and_streamed(hub: Hub, owner: Client) -> None:
    code = """
import datasets
datasets.Dataset.from_list([{"number": number} for number in range(5)]).push_to_hub("org/numbers")
whole = datasets.load_dataset("org/numbers", split="train")["number"][:]
first = next(iter(datasets.load_dataset("org/numbers", split="train", streaming=True)))
result = [whole, first]
"""
    assert owner.run(code) == [[0, 1, 2, 3, 4], {"number": 0}]
    assert hub.repository("org/numbers", "datasets").files()


CARDS = {
    "---\nlicense: llama2\ntags: [movekd]\n---\nText": None,
    "---\nlicense: nonsense\n---\n": '"license" must be one of',
    "---\na: [1\n---\n": "YAML parse error",
    "---\nbase_model: not/an/id\n---\n": '"base_model" with value',
    "---\nmodel-index:\n- name: a\n  results:\n  - task: {type: x}\n---\n": "dataset.* is required",
}


@pytest.mark.parametrize("card", CARDS)
def test_cards_are_checked_before_they_are_committed(hub: Hub, owner: Client, card: str) -> None:
    hub.add("org/card")
    code = "api.create_commit('org/card', [CommitOperationAdd('README.md', card.encode())], commit_message='Card')"
    if (problem := CARDS[card]) is None:
        owner.run(code, card=card)
        assert hub.repository("org/card").files()["README.md"] == card.encode()
    else:
        with pytest.raises(ClientError, match=f"(?s)Invalid metadata in README.md.*{problem}"):
            owner.run(code, card=card)
        assert not hub.repository("org/card").files()


def test_the_front_matter_of_a_space_is_checked() -> None:
    assert metadata_problems("---\nsdk: gradio\ncolorFrom: red\n---\n", "space") == ([], [])
    errors, _ = metadata_problems(
        f"---\nsdk: shiny\ncolorFrom: pinkish\nshort_description: {'a' * 61}\n---\n", "space"
    )
    assert len(errors) == 3
