"""The authors' checkpoints become ours and go back, and nothing is lost either way."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, GenerationConfig

from hub.convert import convert, main
from modeling_movekd import MoveKDForConditionalGeneration
from tests.helpers.conversions import assert_equal_weights, edit_json, nothing_left, split, weights_of


def test_nothing_of_the_source_is_lost(original: Path, converted: Path, converted_whole: Path) -> None:
    theirs = load_file(original / "model.safetensors")
    for folder in (converted, converted_whole):
        facts = json.loads((folder / "conversion.json").read_text())
        kept = sum(value.numel() for value in weights_of(folder).values())
        distiller = sum(value.numel() for value in load_file(folder / "distiller.safetensors").values())
        dropped = sum(theirs[key].numel() for key in facts["dropped_weights"])
        config = json.loads((folder / "config.json").read_text())
        rows = config["text_config"]["vocab_size"] - config["original_vocab_size"]
        added = 2 * rows * config["text_config"]["hidden_size"]
        assert kept + distiller + dropped == sum(value.numel() for value in theirs.values()) + added
        assert facts["new_weights"] == []
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert index == dict.fromkeys(weights_of(folder), "model.safetensors")
    assert facts["dropped_weights"] == {}


def test_loads_as_remote_code(converted: Path) -> None:
    model = AutoModel.from_pretrained(converted, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    assert type(model).__name__ == "MoveKDForConditionalGeneration"


def test_images_that_are_cut_to_squares_are_so_again_in_the_authors_layout(copy: Path, tmp_path: Path) -> None:
    edit_json(copy / "config.json", image_aspect_ratio="square")
    ours = convert(copy, tmp_path / "ours", keep_all_layers=True)
    back = convert(ours, tmp_path / "back", to="original")
    assert json.loads((back / "config.json").read_text())["image_aspect_ratio"] == "square"


def test_back_to_the_authors_layout(original: Path, converted_whole: Path, tmp_path: Path) -> None:
    back = convert(converted_whole, tmp_path / "back", to="original")
    assert_equal_weights(weights_of(back), load_file(original / "model.safetensors"))
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (back, original))
    said_of_the_run = json.loads((converted_whole / "conversion.json").read_text())["dropped_config"]
    compared = theirs.keys() - (said_of_the_run.keys() - {"architectures", "kd"})
    compared -= {"tokenizer_model_max_length", "tokenizer_padding_side"}  # in the tokenizer's own file
    assert {name: ours.get(name, "absent") for name in compared} == {name: theirs[name] for name in compared}
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (back / name).exists()
        if name.endswith("json"):
            assert json.loads((back / name).read_text()) == json.loads((original / name).read_text())
    again = convert(
        back, tmp_path / "again", keep_all_layers=True, vision_model=str(original / theirs["mm_vision_tower"])
    )
    assert_equal_weights(weights_of(again), weights_of(converted_whole))
    assert_equal_weights(
        load_file(again / "distiller.safetensors"), load_file(converted_whole / "distiller.safetensors")
    )


def test_the_old_name_of_the_original_layout(converted_whole: Path, tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="use `to='original'`"):
        main([str(converted_whole), str(tmp_path / "back"), "--to", "authors"])
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "move_llava_llama"


def test_a_cut_tower_has_no_way_back(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep-all-layers"):
        convert(converted, tmp_path / "dest", to="original")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(copy: Path, converted_whole: Path, tmp_path: Path, suffix: str) -> None:
    # Neighbours lie in different files, the experts of one packed weight among them
    split(copy, suffix)
    dest = convert(copy, tmp_path / "dest", keep_all_layers=True, max_shard_size=100_000)
    assert_equal_weights(weights_of(dest), weights_of(converted_whole))
    index = json.loads((dest / "model.safetensors.index.json").read_text())
    shards = sorted(dest.glob("model-*.safetensors"))
    assert len(shards) > 2 and all(path.stat().st_size < 120_000 for path in shards)
    assert index["weight_map"] == {key: path.name for path in shards for key in load_file(path)}
    model = MoveKDForConditionalGeneration.from_pretrained(dest)
    assert_equal_weights(model.state_dict(), weights_of(converted_whole))


def test_half_precision_stays(copy: Path, tmp_path: Path) -> None:
    weights = {key: value.bfloat16() for key, value in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    dest = convert(copy, tmp_path / "dest")
    assert {value.dtype for value in weights_of(dest).values()} == {torch.bfloat16}
    assert MoveKDForConditionalGeneration.from_pretrained(dest).dtype == torch.bfloat16


def test_padded_vocabulary(copy: Path, converted_whole: Path, tmp_path: Path) -> None:
    dest = convert(copy, tmp_path / "dest", keep_all_layers=True, pad_vocabulary_to=64)
    config = json.loads((dest / "config.json").read_text())
    rows, original = config["text_config"]["vocab_size"], config["original_vocab_size"]
    assert rows % 64 == 0 and rows > original + 1
    assert config["image_token_index"] == original
    assert GenerationConfig.from_pretrained(dest).suppress_tokens == list(range(original, rows))
    weights, without = weights_of(dest), weights_of(converted_whole)
    for key in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        assert weights[key].shape[0] == rows
        assert torch.equal(weights.pop(key)[:original], without.pop(key)[:original])
    assert_equal_weights(weights, without)
    back = convert(dest, tmp_path / "back", to="original")
    assert_equal_weights(weights_of(back), load_file(copy / "model.safetensors"))


def test_rows_that_the_tokenizer_leaves_free(copy: Path, tmp_path: Path) -> None:
    """`<image>` takes the first of them, and no row is added."""
    weights = load_file(copy / "model.safetensors")
    tokens = weights["lm_head.weight"].shape[0]
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[key] = torch.cat([weights[key], torch.randn(5, weights[key].shape[1])])
    save_file(weights, copy / "model.safetensors")
    edit_json(copy / "config.json", vocab_size=tokens + 5)
    dest = convert(copy, tmp_path / "dest", keep_all_layers=True)
    config = json.loads((dest / "config.json").read_text())
    assert (config["image_token_index"], config["text_config"]["vocab_size"]) == (tokens, tokens + 5)
    assert GenerationConfig.from_pretrained(dest).suppress_tokens == [tokens]
    assert torch.equal(weights_of(dest)["lm_head.weight"], weights["lm_head.weight"])
    back = convert(dest, tmp_path / "back", to="original")
    assert_equal_weights(weights_of(back), weights)


def test_the_image_is_never_generated(converted: Path, tmp_path: Path) -> None:
    """Not even where its row wins."""
    model = MoveKDForConditionalGeneration.from_pretrained(converted)
    image = model.config.image_token_index
    prompt = {"input_ids": torch.tensor([[1, 5, 9]]), "max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    usual = model.generate(**prompt)[:, 3:]
    with torch.no_grad():
        # Twice the winner's row wins wherever the winner's logit is positive
        model.lm_head.weight[image] = 2 * model.lm_head.weight[usual[0, 0]]
    assert model(prompt["input_ids"]).logits[0, -1].argmax() == image
    assert image not in model.generate(**prompt)


def test_generation_settings_without_sampling(copy: Path, tmp_path: Path) -> None:
    """LLaVA's files have them, and transformers would refuse to save."""
    edit_json(copy / "generation_config.json", temperature=0.9, top_p=0.6, max_length=100)
    dest = convert(copy, tmp_path / "dest")
    facts = json.loads((dest / "conversion.json").read_text())
    assert facts["dropped_generation_config"] == {"temperature": 0.9, "top_p": 0.6}
    assert GenerationConfig.from_pretrained(dest).max_length == 100
    assert GenerationConfig.from_pretrained(dest).eos_token_id == 2


def test_command_line(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--keep-all-layers", str(copy), str(tmp_path / "dest"), "--chat-template", "plain"])
    printed = capsys.readouterr().out
    assert "kd_mode" in printed and str(tmp_path / "dest") in printed
    assert json.loads((tmp_path / "dest" / "config.json").read_text())["vision_feature_layer"] == -2
    with pytest.raises(SystemExit) as error:
        main([str(copy), str(tmp_path / "dest")])
    assert "exists already" in str(error.value.code)
