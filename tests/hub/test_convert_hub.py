"""Conversion of checkpoints named by their ids on the Hub, by the real client over loopback."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.hub_client import Client, ClientError, client
from tests.helpers.hub_server import READER_TOKEN, Hub


@pytest.fixture(scope="module")
def process(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with client(hub, tmp_path_factory.mktemp("home"), READER_TOKEN) as process:
        process.run("from hub.convert import convert, main")
        yield process


def named(folder: Path, dest: Path, **fields: str) -> Path:
    """A copy whose configuration names other models."""
    shutil.copytree(folder, dest)
    config = json.loads((dest / "config.json").read_text())
    (dest / "config.json").write_text(json.dumps(config | fields))
    return dest


def downloads(hub: Hub, repo_id: str) -> set[str]:
    """The files of a repository whose content was asked for."""
    return {path.split("/main/")[-1].split("/")[-1] for method, path in hub.requests if f"/{repo_id}/resolve/" in path}


def test_convert_by_id(
    hub: Hub, process: Client, original: Path, base_models: tuple[Path, Path], converted: Path, tmp_path: Path
) -> None:
    source = named(original, tmp_path / "source", mm_vision_tower="openai/tiny")
    for name in ("expected", "stage1_state", "stage1_step", "stage2_step"):
        (source / f"{name}.safetensors").unlink()
    shutil.rmtree(source / json.loads((original / "config.json").read_text())["mm_vision_tower"])
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.bin"):
        torch.save({"weight": torch.zeros(1)}, source / name)
    (source / "evil.py").write_text("raise SystemExit")
    commit = hub.add_folder("authors/movekd", source).commits
    hub.add_folder("openai/tiny", base_models[0])

    process.run("convert('authors/movekd', dest)", dest=str(tmp_path / "dest"))
    expected, actual = (load_file(folder / "model.safetensors") for folder in (converted, tmp_path / "dest"))
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)
    facts = json.loads((tmp_path / "dest" / "conversion.json").read_text())
    assert facts["source"] == "authors/movekd" and facts["revision"] in commit
    assert facts["vision_model"] == "openai/tiny"
    fetched = downloads(hub, "authors/movekd")
    assert "model.safetensors" in fetched
    assert not fetched & {"pytorch_model.bin", "training_args.bin", "optimizer.bin", "evil.py"}
    # The tower's weights are in the source, so of CLIP its configuration is enough
    assert downloads(hub, "openai/tiny") == {"config.json", "preprocessor_config.json"}
    written = " ".join(path.read_text() for path in (tmp_path / "dest").glob("*.json"))
    assert READER_TOKEN not in process.log + written


def test_stage_1_by_id(
    hub: Hub, process: Client, original: Path, base_models: tuple[Path, Path], tmp_path: Path
) -> None:
    names = {"mm_vision_tower": "base/clip", "_name_or_path": "base/language"}
    hub.add_folder("authors/stage1", named(original / "stage1", tmp_path / "source", **names))
    hub.add_folder("base/clip", base_models[0])
    hub.add_folder("base/language", base_models[1])
    process.run("convert('authors/stage1', dest, keep_all_layers=True)", dest=str(tmp_path / "dest"))
    state = load_file(original / "stage1_state.safetensors")
    actual = load_file(tmp_path / "dest" / "model.safetensors")
    facts = json.loads((tmp_path / "dest" / "conversion.json").read_text())
    assert (facts["vision_model"], facts["language_model"]) == ("base/clip", "base/language")
    rows = len(state["lm_head.weight"])
    assert torch.equal(actual["lm_head.weight"][:rows], state["lm_head.weight"])
    assert torch.equal(actual["model.multi_modal_projector.linear_1.bias"], state["model.mm_projector.0.bias"])


def test_what_is_not_there(hub: Hub, process: Client, original: Path, tmp_path: Path) -> None:
    source = named(
        original / "stage1", tmp_path / "source", mm_vision_tower="base/absent", _name_or_path="base/absent"
    )
    hub.add_folder("authors/alone", source)
    for source_id, message in (("nobody/nothing", "nobody/nothing"), ("authors/alone", "--language-model")):
        with pytest.raises(ClientError, match=f"(?s)SystemExit: convert.py: .*{message}"):
            process.run("main([source_id, dest])", source_id=source_id, dest=str(tmp_path / "dest"))
    assert not (tmp_path / "dest").exists()
    assert READER_TOKEN not in process.log
