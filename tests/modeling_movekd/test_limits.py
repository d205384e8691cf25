"""A configuration is held against the weights before anything is built of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hub.convert import convert
from hub.export_forms import export
from hub.push_checkpoint import _stage
from modeling_movekd.files import check_config_size
from modeling_movekd.inference import load_checkpoint, load_tower
from tests.helpers.exported import make_model, make_tower, save_model
from tests.helpers.trainers import continue_student


ABSURD: list[tuple[tuple[str, ...], Any]] = [
    (("vision_config", "num_hidden_layers"), 10**6),
    (("vision_config", "image_size"), 10**7),
    (("vision_config", "num_experts"), 10**9),
    (("vision_config", "lora_rank"), 10**9),
    (("vision_config", "hidden_size"), 10**9),
    (("vision_config", "patch_size"), 0),
    (("vision_config", "num_channels"), -3),
    (("text_config", "num_hidden_layers"), 10**9),
    (("text_config", "num_hidden_layers"), 1e6),
    (("text_config", "num_hidden_layers"), "2"),
    (("text_config", "intermediate_size"), 10**12),
    (("text_config", "vocab_size"), 10**12),
    (("text_config", "max_position_embeddings"), 10**15),
    (("text_config", "num_attention_heads"), True),
    (("text_config", "rms_norm_eps"), float("nan")),
    (("text_config", "rope_parameters", "factor"), 1e30),
    (("vision_config", "layer_norm_eps"), float("inf")),
    (("image_seq_length",), 10**12),
    (("image_grid_pinpoints",), [[10**9, 10**9]]),
    (("image_grid_pinpoints",), [[1e9, 1e9]]),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model(make_tower()), tmp_path_factory.mktemp("run") / "checkpoint")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit(path: Path, keys: tuple[str, ...], value: Any) -> None:
    content = place = json.loads(path.read_text())
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))


USES: dict[str, Callable[[Path], Any]] = {
    "chat, predict, serve": lambda folder: load_checkpoint(folder, device="cpu"),
    "visualize": lambda folder: load_tower(folder, device="cpu"),
    "export": lambda folder: export(folder, folder.parent / "dest", "encoder"),
    "push": lambda folder: _stage(folder, folder.parent / "stage", None, 10**9),
    "convert": lambda folder: convert(folder, folder.parent / "dest", to="original"),
    "continued training": continue_student,
}


@pytest.mark.parametrize(("keys", "value"), ABSURD, ids=lambda it: it[-1] if isinstance(it, tuple) else None)
def test_a_checkpoint_that_asks_for_more_than_its_weights(copy: Path, keys: tuple[str, ...], value: Any) -> None:
    edit(copy / "config.json", keys, value)
    for use in USES.values():
        with pytest.raises(ValueError, match=f"`{keys[-1]}` of .*/copy is .*Restore"):
            use(copy)
    assert not (copy.parent / "dest").exists()


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_sizes_that_a_configuration_leaves_out_are_those_that_transformers_builds(copy: Path, part: str) -> None:
    kind = json.loads((copy / "config.json").read_text())[part]["model_type"]
    edit(copy / "config.json", (part,), {"model_type": kind})
    for use in USES.values():
        with pytest.raises(ValueError, match=r"of .*/copy is \d+, but its weights hold at most"):
            use(copy)


@pytest.mark.parametrize("field", ["crop_size", "size"])
def test_an_image_processor_that_asks_for_more_than_the_model_takes(copy: Path, field: str) -> None:
    size = {"shortest_edge": 10**7} if field == "size" else {"height": 10**7, "width": 10**7}
    edit(copy / "processor_config.json", ("image_processor", field), size)
    for name in ("chat, predict, serve", "visualize", "export"):
        with pytest.raises(ValueError, match="cuts images to .*10000000"):
            USES[name](copy)


@pytest.mark.parametrize(
    ("file", "keys", "value"),
    [
        ("config.json", ("num_hidden_layers",), 10**9),
        ("config.json", ("hidden_size",), 10**9),
        ("config.json", ("moe", "moe_encoder_num_experts"), 10**9),
        ("clip/config.json", ("num_hidden_layers",), 10**6),
        ("clip/config.json", ("image_size",), 10**7),
    ],
)
def test_a_source_that_asks_for_more_than_its_weights(
    original: Path, tmp_path: Path, file: str, keys: tuple[str, ...], value: int
) -> None:
    source = Path(shutil.copytree(original, tmp_path / "source"))
    path = source / file
    if file != "config.json":
        path = source / json.loads((source / "config.json").read_text())["mm_vision_tower"] / "config.json"
        keys = ("vision_config", *keys) if "vision_config" in json.loads(path.read_text()) else keys
    edit(path, keys, value)
    with pytest.raises(ValueError, match=f"`{keys[-1]}` of .* is {value}, but its weights hold at most"):
        convert(source, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_what_the_weights_hold_is_accepted() -> None:
    shapes = [(420, 64), (64, 48), (3, 4, 4)]
    config = {"num_hidden_layers": 3, "hidden_size": 64, "vocab_size": 420, "num_experts": 0, "head_dim": None}
    check_config_size(config | {"vision": {"image_size": 16, "patch_size": 4}, "max_window_layers": 70}, shapes, "x")
