"""A run that loads everything from the Hub, and publishes the trained student."""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load, load_file, save_file

from tests.helpers.colored_rows import llava_rows
from tests.helpers.hub_client import Client, ClientError, client
from tests.helpers.hub_server import OWNER_TOKEN, READER_TOKEN, Hub, serve
from tests.helpers.launched import write_settings
from train.config import MoveKDSFTConfig


@pytest.fixture(scope="module")
def hub(parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Private repositories that the reader may read: CLIP, a language model, a ViT with a tag, and images."""
    folder = tmp_path_factory.mktemp("data")
    for split, seed in (("train", 0), ("test", 1)):
        Dataset.from_list(llava_rows(12, seed=seed)).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    readers = {"private": True, "readers": {"reader"}}
    with serve() as hub:
        for name in ("clip", "language", "vit"):
            hub.add_folder(f"org/{name}", Path(parts[name]), **readers)
        hub.add_folder("org/colors", folder, "datasets", **readers)
        vit = hub.repository("org/vit")
        vit.refs["refs/tags/v1"] = first = vit.refs["refs/heads/main"]
        weights = load_file(Path(parts["vit"]) / "model.safetensors")
        save_file({key: 0 * value for key, value in weights.items()}, folder / "zero.safetensors", {"format": "pt"})
        hub.commit_file("org/vit", "model.safetensors", (folder / "zero.safetensors").read_bytes())
        assert vit.refs["refs/heads/main"] != first
        yield hub


@pytest.fixture(scope="module")
def reader(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A process with a token that may read but not publish."""
    with client(hub, tmp_path_factory.mktemp("home"), READER_TOKEN) as process:
        process.run("from train import sft")
        yield process


def settings(folder: Path, **overrides) -> Path:
    names = {"clip": "org/clip", "language": "org/language", "vit": "org/vit"}
    teachers = [{"name": "clip", "model": "org/clip"}, {"name": "vit", "model": "org/vit", "revision": "v1"}]
    saving = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 2}
    saving |= {"metric_for_best_model": "eval_loss", "greater_is_better": True, "learning_rate": 1e-2}
    publishing = {"push_to_hub": True, "hub_private_repo": True, "hub_token": OWNER_TOKEN}
    return write_settings(folder, names, "org/colors", teachers=teachers, **saving, **publishing, **overrides)


CONTINUED = """
from dataclasses import replace
from safetensors.torch import load_file
from trl import TrlParser
from train.build import build_distiller, build_student, build_teachers
from train.arguments import DataArguments, ModelArguments
from train.config import MoveKDSFTConfig

_, args, _ = TrlParser((DataArguments, MoveKDSFTConfig, ModelArguments)).parse_args_and_config(['--config', config])
args = replace(args, vision_model=None, language_model=None, push_to_hub=False)
model_args = ModelArguments(model_name_or_path='org/student', model_revision='main')
model, _ = build_student(args, model_args)
found = build_distiller(args, model, build_teachers(args), 'org/student', 'main').state_dict()
expected = load_file(folder + '/distiller.safetensors')
assert expected.keys() == found.keys() and all(found[key].equal(expected[key]) for key in expected)
assert model.lm_head.weight.equal(load_file(folder + '/model.safetensors')['lm_head.weight'])
"""


def test_a_run_from_the_hub_publishes_last_and_best(hub: Hub, reader: Client, tmp_path: Path) -> None:
    config = settings(tmp_path / "student", hub_model_id="org/student")
    reader.run("sft.main(['--config', config])", config=str(config))
    teacher = sha256(hub.repository("org/vit").files("v1")["model.safetensors"]).hexdigest()
    other = sha256(hub.repository("org/vit").files("main")["model.safetensors"]).hexdigest()
    assert hub.downloads[teacher] == 1 and not hub.downloads[other]

    repository, output = hub.repository("org/student"), tmp_path / "student"
    assert repository.private
    best = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["best_model_checkpoint"]
    for branch, folder in (("main", output), ("best", Path(best))):
        files = repository.files(branch)
        assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        assert files["distiller.safetensors"] == (folder / "distiller.safetensors").read_bytes()
        assert json.loads(files["training_facts.json"])["steps"] == (2 if branch == "main" else int(best[-1]))
        assert not [name for name in files if "/" in name or name.endswith((".pt", ".pth", ".bin"))]
        assert f'from_pretrained("org/student", revision="{branch}"'.encode() in files["README.md"]
    # The repository, its commit, the branch and the branch's commit: nothing was sent during the run
    assert len(repository.commits) == 3 and set(repository.refs) == {"refs/heads/main", "refs/heads/best"}

    # A second stage loads student and adapters from the Hub
    repository.readers.add("reader")
    reader.run(CONTINUED, config=str(config), folder=str(output))

    assert list(output.rglob("training_args.bin")) and list(output.rglob("optimizer.pt"))
    for path in output.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert OWNER_TOKEN.encode() not in content and READER_TOKEN.encode() not in content, path
    assert OWNER_TOKEN not in reader.log and READER_TOKEN not in reader.log


@pytest.mark.slow
def test_where_the_best_is_loaded_at_the_end_the_last_is_a_branch(hub: Hub, reader: Client, tmp_path: Path) -> None:
    config = settings(tmp_path / "student", hub_model_id="org/loaded", load_best_model_at_end=True)
    reader.run("sft.main(['--config', config])", config=str(config))
    state = json.loads((tmp_path / "student" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("checkpoint-1")
    repository = hub.repository("org/loaded")
    for branch, step in (("main", 1), ("last", 2)):
        expected = load_file(tmp_path / "student" / f"checkpoint-{step}" / "model.safetensors")
        found = load(repository.files(branch)["model.safetensors"])
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("name", "message"), [("elsewhere/student", "403"), ("org/public", "org/public is public")])
def test_what_could_not_be_published_stops_the_run_before_it_starts(
    hub: Hub, reader: Client, tmp_path: Path, name: str, message: str
) -> None:
    hub.add("org/public")
    config = settings(tmp_path / "student", hub_model_id=name)
    with pytest.raises(ClientError, match=message):
        reader.run("sft.main(['--config', config])", config=str(config))
    assert not list((tmp_path / "student").rglob("checkpoint-*"))


def test_publishing_whole_folders_meanwhile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`hub_strategy` is 'every_save', but a run is published at its end"):
        MoveKDSFTConfig(
            output_dir=str(tmp_path), distill=False, push_to_hub=True, hub_strategy="every_save", bf16=False
        )
