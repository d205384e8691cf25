"""Damaged files and a full disk: each command says a sentence, and leaves nothing behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from benchmarks import evaluate
from hub import convert as convert_script
from hub import export as export_script
from hub.convert import convert
from hub.export_forms import export
from hub.push_checkpoint import _stage
from modeling_movekd.files import new_file, save_json
from modeling_movekd.inference import load_checkpoint, load_tower
from tests.helpers.conversions import BAD_WEIGHTS, change_weight
from tests.helpers.disks import full_disk
from tests.helpers.exported import make_model, make_tower, save_model
from tests.helpers.trainers import continue_student
from train.data.json_rows import parse_line


DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that can be exported in each form."""
    return save_model(make_model(make_tower(num_experts=0)), tmp_path_factory.mktemp("run") / "checkpoint")


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "copy"))


USES: dict[str, Callable[[Path], Any]] = {
    "chat, predict, serve": lambda folder: load_checkpoint(folder, device="cpu"),
    "visualize": lambda folder: load_tower(folder, device="cpu"),
    "export encoder": lambda folder: export(folder, folder.parent / "dest", "encoder"),
    "export llava": lambda folder: export(folder, folder.parent / "dest", "llava"),
    "push": lambda folder: _stage(folder, folder.parent / "stage", None, 10**9),
    "convert": lambda folder: convert(folder, folder.parent / "dest", to="original"),
    "continued training": continue_student,
}
# The uses that read a file, by its name
READERS = {
    "model.safetensors": tuple(USES),
    "config.json": tuple(USES),
    "processor_config.json": ("chat, predict, serve", "visualize", "export encoder", "export llava", "convert"),
    "tokenizer.json": ("chat, predict, serve", "export llava"),
    "tokenizer_config.json": ("chat, predict, serve", "export llava"),
    "generation_config.json": ("chat, predict, serve", "export llava"),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scramble(path: Path) -> None:
    path.write_bytes(b"\xff\x00\x81" * 1000)


def nest(path: Path) -> None:
    path.write_text('{"a": ' + DEEP)


@pytest.mark.parametrize("damage", [cut, scramble, nest])
@pytest.mark.parametrize("name", READERS)
def test_damaged_files(copy: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(copy / name)
    for use in READERS[name]:
        with pytest.raises((ValueError, OSError)):
            USES[use](copy)
    assert not (copy.parent / "dest").exists() and not list(copy.parent.glob(".*"))


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_weights_that_no_model_has(copy: Path, kind: str) -> None:
    change, message = BAD_WEIGHTS[kind]
    change_weight(copy, "model.vision_tower.encoder.layers.1.mlp.fc1.bias", change)
    for name in set(USES) - {"convert"}:  # which is tested with the sources that it reads
        with pytest.raises(ValueError, match=f"encoder.layers.1.mlp.fc1.bias` of .*({message})"):
            USES[name](copy)
    assert not (copy.parent / "dest").exists()


@pytest.mark.parametrize(
    "change", [{"vision_config": 3}, {"text_config": {"model_type": "llama", "hidden_act": "none"}}, {"dtype": "x"}]
)
def test_configurations_of_another_kind(copy: Path, change: dict[str, Any]) -> None:
    content = json.loads((copy / "config.json").read_text())
    for name, value in change.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    (copy / "config.json").write_text(json.dumps(content))
    for use in ("chat, predict, serve", "export llava"):
        with pytest.raises((ValueError, OSError), match="copy"):
            USES[use](copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_token_index": 10**9}, "copy has 260 embeddings and <image> as token 1000000000"),
        ({"image_token_index": 5}, "copy has 260 embeddings and <image> as token 5"),
        ({"text_config": {"vocab_size": 100}}, "copy has 100 embeddings .* tokenizer has 260 tokens"),
        ({"vision_feature_layer": 99}, "`vision_feature_layer` is 99, but the tower has 2 layers"),
    ],
)
def test_configurations_that_would_fail_at_the_first_question(copy: Path, change: dict, message: str) -> None:
    content = json.loads((copy / "config.json").read_text())
    for name, value in change.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    (copy / "config.json").write_text(json.dumps(content))
    weights = load_file(copy / "model.safetensors")
    rows = content["text_config"]["vocab_size"]
    cut = {
        key: value[:rows] for key, value in weights.items() if key.endswith(("embed_tokens.weight", "lm_head.weight"))
    }
    save_file(weights | cut, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_checkpoint(copy, device="cpu")


def test_a_configuration_without_sizes_has_the_defaults_of_a_large_model(copy: Path) -> None:
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(content | {"text_config": {"model_type": "llama"}}))
    for use in ("chat, predict, serve", "export llava", "convert"):
        with pytest.raises(ValueError, match="of .*copy is [0-9]+, but its weights hold at most"):
            USES[use](copy)


def test_commands_say_one_sentence(copy: Path, original: Path, tmp_path: Path) -> None:
    cut(copy / "model.safetensors")
    with pytest.raises(SystemExit, match="model.safetensors cannot be read as safetensors: .* Download it again"):
        export_script.main([str(copy), str(tmp_path / "dest"), "--form", "clip"])
    source = Path(shutil.copytree(original, tmp_path / "source"))
    nest(source / "tokenizer_config.json")
    with pytest.raises(SystemExit, match="source.*"):
        convert_script.main([str(source), str(tmp_path / "dest")])
    assert isinstance(parse_line(DEEP.encode()), ValueError)


@pytest.mark.parametrize("size", [1000, 20_000])
def test_a_full_disk(plain: Path, original: Path, tmp_path: Path, size: int) -> None:
    writers: list[Callable[[], Any]] = [
        *(lambda form=form: export(plain, tmp_path / "dest", form) for form in ("encoder", "llava", "clip")),
        lambda: convert(original, tmp_path / "dest"),
        lambda: save_json({"a": "x" * 10**6}, tmp_path / "dest"),
    ]
    for write in writers:
        with full_disk(size), pytest.raises(OSError, match="dest could not be written: .*Free disk space"):
            write()
        assert not list(tmp_path.iterdir())
    (tmp_path / "dest").write_text("before")
    with full_disk(size), pytest.raises(OSError, match="Free disk space"), new_file(tmp_path / "dest") as temporary:
        temporary.write_text("x" * 10**6)
    assert (tmp_path / "dest").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_evaluation_without_its_package(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    find_spec = evaluate.importlib.util.find_spec
    monkeypatch.setattr(
        evaluate.importlib.util, "find_spec", lambda name: None if name == "lmms_eval" else find_spec(name)
    )
    assert evaluate.main([str(copy), "--tasks", "mme"]) == 1
    assert "pip install -e '.[eval]'" in capsys.readouterr().err
