"""What is not whole or not safe becomes nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CohereConfig

from hub.convert import convert
from hub.convert_layouts import language_rename
from hub.convert_sources import count_tokens, load_tokenizer, read_source
from tests.helpers.conversions import (
    BAD_WEIGHTS,
    assert_equal_weights,
    change_weight,
    edit_json,
    nothing_left,
    split,
    weights_of,
)


VOCABULARY = 420  # of the original checkpoint


def test_language_models_that_scale_their_logits() -> None:
    config = CohereConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    with pytest.raises(ValueError, match="logit_scale"):
        language_rename(config)


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")


def drop_expert(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[next(key for key in weights if ".layers.0.mlp.moe_up.0.lora_A.weight" in key)]
    save_file(weights, folder / "model.safetensors")


def add_weight(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors") | {"model.extra": torch.ones(1)}, folder / "model.safetensors")


def reshape_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, folder / "model.safetensors")


def drop_all_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_file(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def lose_shard(folder: Path) -> None:
    split(folder, "safetensors")[1].unlink()


def traverse(folder: Path) -> None:
    split(folder, "safetensors")
    shutil.copyfile(folder / "model-00001-of-00003.safetensors", folder.parent / "outside.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../outside.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def traverse_absolutely(folder: Path) -> None:
    split(folder, "bin")
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": str(folder / "pytorch_model-00001-of-00003.bin")}})
    )


def link_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "outside.safetensors")


def link_out_below(folder: Path) -> None:
    (folder / "clip-link").symlink_to("/etc")


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def lay_trap(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights | {"trap": Trap(folder.parent / "sprung")}, folder / "pytorch_model.bin")


def lay_old_trap(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(
        weights | {"trap": Trap(folder.parent / "sprung")},
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )


def save_no_tensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"step": 3}, folder / "pytorch_model.bin")


def name_a_folder_elsewhere(folder: Path) -> None:
    edit_json(folder / "config.json", mm_vision_tower="/etc")


def name_a_folder_above(folder: Path) -> None:
    edit_json(folder / "config.json", mm_vision_tower="../source")


def change_projector(folder: Path) -> None:
    edit_json(folder / "config.json", mm_projector_type="linear")


def add_unknown_field(folder: Path) -> None:
    edit_json(folder / "config.json", mm_new_trick=True)


def change_width(folder: Path) -> None:
    edit_json(folder / "config.json", mm_hidden_size=7)


def select_no_layer(folder: Path) -> None:
    edit_json(folder / "config.json", mm_vision_select_layer=-20)


def change_type(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="resnet_of_mine", auto_map={"AutoConfig": "evil.Config"})


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def break_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_weight, r"lacks 1 weights.*norm\.weight"),
        (drop_expert, r"needs the experts 0 to \d; the checkpoint has \[1, 2"),
        (add_weight, r"has no weights for.*model\.extra"),
        (reshape_weight, r"norm\.weight: \(\d+,\) instead of \(\d+,\)"),
        (drop_all_weights, "neither weights"),
        (cut_file, "cannot be read as safetensors"),
        (lose_shard, "model-00002-of-00003.safetensors"),
        (traverse, r"\.\./outside\.safetensors"),
        (traverse_absolutely, "names .*only .bin files beside it"),
        (link_out, "outside of the folder"),
        (link_out_below, "outside of the folder"),
        (lay_trap, "more than tensors"),
        (lay_old_trap, "more than tensors"),
        (save_no_tensors, "no state dict"),
        (name_a_folder_elsewhere, "--vision-model"),
        (name_a_folder_above, "--vision-model"),
        (change_projector, "mm_projector_type"),
        (add_unknown_field, "mm_new_trick"),
        (change_width, "mm_hidden_size"),
        (select_no_layer, "layer -20"),
        (change_type, "cannot be converted"),
        (break_json, "no JSON"),
        (drop_tokenizer, "no tokenizer"),
    ],
)
def test_refused(copy: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(copy)
    with pytest.raises(ValueError, match=message):
        convert(copy, tmp_path / "dest")
    assert nothing_left(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
@pytest.mark.parametrize("key", ["model.norm.weight", "model.embed_tokens.weight"])
def test_values_that_no_weight_has(copy: Path, tmp_path: Path, kind: str, key: str) -> None:
    change, message = BAD_WEIGHTS[kind]
    change_weight(copy, key, change)
    with pytest.raises(ValueError, match=rf"`{key}` of .*model\.safetensors.*{message}"):
        convert(copy, tmp_path / "dest")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("rows", [0, 1, 100, -1])
@pytest.mark.parametrize("says", ["configuration", "tokenizer"])
def test_rows_cut_from_the_vocabulary(copy: Path, tmp_path: Path, key: str, rows: int, says: str) -> None:
    """New rows are for `<image>` and padding, not for words: neither the file nor the configuration can cut them."""
    change_weight(copy, key, lambda weight: weight[:rows])
    if says == "tokenizer":
        kept = len(load_file(copy / "model.safetensors")[key])
        change_weight(copy, "model.embed_tokens.weight", lambda weight: weight[:kept])
        change_weight(copy, "lm_head.weight", lambda weight: weight[:kept])
        edit_json(copy / "config.json", vocab_size=kept)
    with pytest.raises(
        ValueError, match=rf"weight` of .*has the shape \({rows % VOCABULARY},.*says {VOCABULARY} tokens"
    ):
        convert(copy, tmp_path / "dest")
    assert nothing_left(tmp_path)


def test_only_placeholders_of_images_may_lack_a_row(copy: Path, tmp_path: Path) -> None:
    """A tokenizer that has a token for images already, as Gemma 3's, is larger than the embedding, and right so."""
    source = read_source(copy)
    tokenizer = load_tokenizer(source)
    assert count_tokens(source, tokenizer) == VOCABULARY
    edit_json(copy / "tokenizer_config.json", image_token="<image_soft_token>")
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    assert len(tokenizer) == VOCABULARY + 1 and count_tokens(source, tokenizer) == VOCABULARY
    tokenizer.add_tokens(["<a word>"])
    assert count_tokens(source, tokenizer) == VOCABULARY + 2


def test_back_to_the_original_layout_every_shape_is_compared(converted_whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted_whole, tmp_path / "source"))
    change_weight(folder, "lm_head.weight", lambda weight: weight[:100])
    with pytest.raises(ValueError, match=r"of another shape: \['lm_head.weight'\]"):
        convert(folder, tmp_path / "dest", to="original")
    shutil.copyfile(converted_whole / "model.safetensors", folder / "model.safetensors")
    change_weight(folder, "model.language_model.norm.weight", BAD_WEIGHTS["nan"][0])
    with pytest.raises(ValueError, match="norm.weight` of .* not finite"):
        convert(folder, tmp_path / "dest", to="original")
    assert nothing_left(tmp_path)


def test_code_in_stage_1_files(original: Path, base_models: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(original / "stage1", tmp_path / "stage1")
    torch.save({"model.mm_projector.0.weight": Trap(tmp_path / "sprung")}, tmp_path / "stage1" / "mm_projector.bin")
    vision, language = map(str, base_models)
    with pytest.raises(ValueError, match="more than tensors"):
        convert(tmp_path / "stage1", tmp_path / "dest", vision_model=vision, language_model=language)
    assert nothing_left(tmp_path) and not (tmp_path / "sprung").exists()


def test_links_into_the_hubs_cache_are_followed(copy: Path, converted: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    shutil.copytree(copy, snapshot)
    (snapshot / "model.safetensors").rename(blobs / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    dest = convert(snapshot, tmp_path / "dest")
    assert_equal_weights(weights_of(dest), weights_of(converted))
    assert json.loads((dest / "conversion.json").read_text())["revision"] == "abc"


def test_other_arguments_refused(original: Path, converted: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    for arguments, settings, message in (
        ((original, tmp_path / "full"), {}, "exists already"),
        ((converted, tmp_path / "dest"), {}, "already"),
        ((original, tmp_path / "dest"), {"to": "onnx"}, "'movekd' or 'original'"),
        ((original, tmp_path / "dest"), {"experts": {"num_experts": 2}}, "experts of its own"),
        ((original, tmp_path / "dest"), {"chat_template": "own"}, "'own'"),
        ((original, tmp_path / "dest"), {"pad_vocabulary_to": 0}, "`pad_vocabulary_to` is 0"),
        (
            (converted, tmp_path / "dest"),
            {"to": "original", "experts": {"num_experts": 2}, "keep_all_layers": True},
            "'keep_all_layers', 'experts'.*Leave them out",
        ),
        (("no folder at all", tmp_path / "dest"), {}, "neither a folder nor"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(*arguments, **settings)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert nothing_left(tmp_path)
