"""The authors' tiny checkpoint, converted, and the base models of its first stage; a Hub, and what is pushed to it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hub.card_facts import weights_fingerprint
from hub.convert import convert
from tests.helpers.cards import RESULT
from tests.helpers.exported import STAYS, make_model, make_tower, save_model
from tests.helpers.hub_client import Client, client
from tests.helpers.hub_server import OWNER_TOKEN, Hub, serve


@pytest.fixture(scope="session")
def converted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted checkpoint, with its tower cut to the layers in use."""
    return convert(original, tmp_path_factory.mktemp("converted") / "cut")


@pytest.fixture(scope="session")
def converted_whole(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted checkpoint, with all layers of the tower."""
    return convert(original, tmp_path_factory.mktemp("converted") / "whole", keep_all_layers=True)


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """A copy of the original checkpoint that a test may damage."""
    folder = tmp_path / "source"
    folder.mkdir()
    for path in original.iterdir():
        if path.name in ("config.json", "generation_config.json", "model.safetensors") or "token" in path.name:
            shutil.copyfile(path, folder / path.name)
    vision = json.loads((original / "config.json").read_text())["mm_vision_tower"]
    shutil.copytree(original / vision, folder / vision)
    return folder


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """The loopback Hub."""
    with serve() as hub:
        yield hub


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as training leaves it, with everything in it that is not to be published."""
    folder = save_model(make_model(make_tower()), tmp_path_factory.mktemp("run") / "checkpoint")
    (folder / "training_facts.json").write_text(json.dumps({"stage": "finetune", "steps": 7}))
    registered = RESULT | {"task_id": "ocr", "date": "2026-11-30", "code": "movekd 0.1.0, lmms-eval 0.7.3"}
    evaluation = {"results": [RESULT | {"split": "test"}, registered], "weights": weights_fingerprint(folder)}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    save_file({"clip.head": torch.ones(2)}, folder / "distiller.safetensors")
    for name in STAYS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"token={OWNER_TOKEN}")
    return folder


@pytest.fixture(scope="session")
def owner(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A process that may write there, and never says its token."""
    with client(hub, tmp_path_factory.mktemp("home"), OWNER_TOKEN) as process:
        process.run("from pathlib import Path; from huggingface_hub import HfApi")
        process.run("import hub.push, hub.push_checkpoint, hub.push_commit")
        yield process
        assert OWNER_TOKEN not in process.log
