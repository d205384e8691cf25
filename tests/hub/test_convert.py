"""Sources of every kind become checkpoints that compute the same; what is not whole or not safe becomes nothing."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    CohereConfig,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

import hub.weights
from hub.convert import convert, main
from hub.layouts import language_rename
from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel


ROOT = Path(__file__).parents[2]


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


@pytest.fixture
def copy(authors: Path, tmp_path: Path) -> Path:
    """A copy of the authors' checkpoint to spoil."""
    folder = tmp_path / "source"
    folder.mkdir()
    for path in authors.iterdir():
        if path.name in ("config.json", "generation_config.json", "model.safetensors") or "token" in path.name:
            shutil.copyfile(path, folder / path.name)
    vision = json.loads((authors / "config.json").read_text())["mm_vision_tower"]
    shutil.copytree(authors / vision, folder / vision)
    return folder


def split(folder: Path, suffix: str, shards: int = 3, order: Callable[[str], Any] = str) -> list[Path]:
    """Spread a checkpoint's weights over files, in an order of its own."""
    single = folder / "model.safetensors"
    weights = load_file(single)
    single.unlink()
    keys = sorted(weights, key=order)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    index, paths = {}, []
    for shard in range(shards):
        path = folder / f"{stem}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
        tensors = {key: weights[key].clone() for key in keys[shard::shards]}
        save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
        index |= dict.fromkeys(tensors, path.name)
        paths.append(path)
    name = f"{single.name if suffix == 'safetensors' else 'pytorch_model.bin'}.index.json"
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return paths


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in sorted(folder.glob("model*.safetensors")) for key, value in load_file(path).items()}


def assert_equal_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and torch.equal(actual[key], value), key


def nothing_left(folder: Path) -> bool:
    return not [path for path in folder.iterdir() if "dest" in path.name]


# ---- the authors' checkpoints


def test_nothing_of_the_source_is_lost(authors: Path, converted: Path, converted_whole: Path) -> None:
    theirs = load_file(authors / "model.safetensors")
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
    assert facts["dropped_weights"] == {}


def test_loads_as_remote_code(converted: Path) -> None:
    model = AutoModel.from_pretrained(converted, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    assert type(model).__name__ == "MoveKDForConditionalGeneration"


def test_back_to_the_authors_layout(authors: Path, converted_whole: Path, tmp_path: Path) -> None:
    back = convert(converted_whole, tmp_path / "back", to="authors")
    assert_equal_weights(weights_of(back), load_file(authors / "model.safetensors"))
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (back, authors))
    said_of_the_run = json.loads((converted_whole / "conversion.json").read_text())["dropped_config"]
    compared = theirs.keys() - (said_of_the_run.keys() - {"architectures", "kd"})
    compared -= {"tokenizer_model_max_length", "tokenizer_padding_side"}  # in the tokenizer's own file
    assert {name: ours.get(name, "absent") for name in compared} == {name: theirs[name] for name in compared}
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (back / name).exists()
        if name.endswith("json"):
            assert json.loads((back / name).read_text()) == json.loads((authors / name).read_text())
    again = convert(
        back, tmp_path / "again", keep_all_layers=True, vision_model=str(authors / theirs["mm_vision_tower"])
    )
    assert_equal_weights(weights_of(again), weights_of(converted_whole))
    assert_equal_weights(
        load_file(again / "distiller.safetensors"), load_file(converted_whole / "distiller.safetensors")
    )


def test_a_cut_tower_has_no_way_back(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep-all-layers"):
        convert(converted, tmp_path / "dest", to="authors")
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
    back = convert(dest, tmp_path / "back", to="authors")
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
    back = convert(dest, tmp_path / "back", to="authors")
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


# ---- LLaVA's checkpoints, and models to begin from


def test_original_llava_without_a_tower(
    authors: Path, base_models: tuple[Path, Path], copy: Path, tmp_path: Path
) -> None:
    """As LLaVA-1.5 is published: language model and projector. The tower is CLIP's, the experts are new."""
    weights = load_file(copy / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "vision_tower" not in key and "_adapter_" not in key}
    save_file(kept, copy / "model.safetensors")
    save_file({"model.mm_projector.0.weight": torch.zeros(2)}, copy / "mm_projector.bin")  # lies beside it, unread
    edit_json(copy / "config.json", model_type="llava_llama", moe=..., kd=..., image_aspect_ratio="pad")
    dest = convert(
        copy, tmp_path / "dest", vision_model=str(base_models[0]), experts={"lora_rank": 2, "num_experts": 4}
    )
    model = MoveKDForConditionalGeneration.from_pretrained(dest)
    tower = model.config.vision_config
    assert (tower.num_experts, tower.lora_rank, tower.router_gradient) == (4, 2, "straight_through")
    new = json.loads((dest / "conversion.json").read_text())["new_weights"]
    assert new and all("expert" in key or "router" in key for key in new)
    assert not (dest / "distiller.safetensors").exists()
    assert torch.equal(model.lm_head.weight[:-1], weights["lm_head.weight"])
    # The experts begin at zero, so the tower is CLIP
    pixels = torch.randn(2, 3, tower.image_size, tower.image_size)
    clip = CLIPVisionModel.from_pretrained(base_models[0])(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(model.model.vision_tower(pixels).last_hidden_state, clip)
    routers = [value for key, value in model.named_parameters() if "router.weight" in key]
    assert all(value.std() > 0 for value in routers)
    again = convert(
        copy, tmp_path / "again", vision_model=str(base_models[0]), experts={"lora_rank": 2, "num_experts": 4}
    )
    assert_equal_weights(weights_of(again), weights_of(dest))


def test_authors_without_experts(copy: Path, tmp_path: Path) -> None:
    """Their ablation: distilled, without the mixture. None is added, and the way back is byte for byte."""
    weights = load_file(copy / "model.safetensors")
    plain = {key.replace("original_module.", ""): value for key, value in weights.items() if not is_mole(key)}
    save_file(plain, copy / "model.safetensors")
    edit_json(copy / "config.json", moe={"moe_encoder": False})
    dest = convert(copy, tmp_path / "dest", keep_all_layers=True)
    assert json.loads((dest / "config.json").read_text())["vision_config"]["num_experts"] == 0
    assert (dest / "distiller.safetensors").exists()
    assert_equal_weights(weights_of(convert(dest, tmp_path / "back", to="authors")), plain)


def is_mole(key: str) -> bool:
    return ".moe_" in key or ".router." in key


@pytest.fixture(scope="module")
def transformers_llava(
    base_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, torch.nn.Module]]:
    """A checkpoint in one of the layouts in which transformers has saved it."""
    prefixes = {
        "saved": {},
        "published": {"vision_tower.": "vision_tower.vision_model."},
        "4.52": {
            "language_model.model.": "model.language_model.",
            "language_model.lm_head.": "lm_head.",
            "vision_tower.": "model.vision_tower.vision_model.",
            "multi_modal_projector.": "model.multi_modal_projector.",
            "image_newline": "model.image_newline",
        },
    }

    def make(model_type: str, layout: str) -> tuple[Path, torch.nn.Module]:
        folder = tmp_path_factory.mktemp("llava") / "source"
        tokenizer = AutoTokenizer.from_pretrained(base_models[1])
        tokenizer.add_special_tokens(
            {"extra_special_tokens": ["<image>", "<pad>"]}, replace_extra_special_tokens=False
        )
        clip, language = (
            CLIPVisionModel.from_pretrained(base_models[0]),
            LlamaForCausalLM.from_pretrained(base_models[1]),
        )
        config_class, model_class = {
            "llava": (LlavaConfig, LlavaForConditionalGeneration),
            "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
        }[model_type]
        size = clip.config.image_size
        grids = {"image_grid_pinpoints": [[size, 2 * size], [2 * size, size]]} if model_type == "llava_next" else {}
        text_config = language.config.to_dict() | {"vocab_size": len(tokenizer) + 10}
        config = config_class(
            vision_config=clip.config.to_dict(),
            text_config=text_config,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            **grids,
        )
        torch.manual_seed(0)
        model = model_class(config).eval()
        for parameter in model.parameters():
            parameter.data.normal_(std=0.2)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.copyfile(base_models[0] / "preprocessor_config.json", folder / "preprocessor_config.json")
        weights = load_file(folder / "model.safetensors")
        for theirs, changed in prefixes[layout].items():
            weights = {
                changed + key.removeprefix(theirs) if key.startswith(theirs) else key: value
                for key, value in weights.items()
            }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder, model

    return make


@pytest.mark.parametrize("layout", ["saved", "published", "4.52"])
@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
@torch.no_grad()
def test_llava_of_transformers(transformers_llava: Any, tmp_path: Path, model_type: str, layout: str) -> None:
    source, theirs = transformers_llava(model_type, layout)
    dest = convert(source, tmp_path / "dest", experts={"lora_rank": 2})
    ours = MoveKDForConditionalGeneration.from_pretrained(dest).eval()
    processor = AutoProcessor.from_pretrained(dest, trust_remote_code=False)
    assert ours.config.image_token_index == theirs.config.image_token_index == processor.image_token_id
    assert ours.config.text_config.vocab_size == theirs.config.text_config.vocab_size
    pixels = torch.randint(256, (20, 30, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    inputs = processor(Image.fromarray(pixels.numpy()), "USER: <image> What is it? ASSISTANT:", return_tensors="pt")
    assert processor.image_processor.do_pad
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits)


@torch.no_grad()
def test_clip_and_a_language_model(base_models: tuple[Path, Path], tmp_path: Path) -> None:
    vision, language = map(str, base_models)
    with pytest.raises(ValueError, match="--vision-model"):
        convert(language, tmp_path / "dest")
    dest = convert(language, tmp_path / "dest", vision_model=vision, experts={"lora_rank": 2})
    model = MoveKDForConditionalGeneration.from_pretrained(dest).eval()
    joined = MoveKDForConditionalGeneration.from_parts(
        MoveKDVisionModel.from_clip(vision, lora_rank=2), LlamaForCausalLM.from_pretrained(language)
    )
    for part in (model.config, joined.config):
        part.original_vocab_size = part.architectures = part.dtype = part.auto_map = None
        part._name_or_path = None
    ours, theirs = model.config.to_dict(), joined.config.to_dict()
    assert ours["vision_config"] == theirs["vision_config"] | {"dtype": ours["vision_config"]["dtype"]}
    assert {name: ours[name] for name in ours if "config" not in name and ours[name]} == {
        name: theirs[name] for name in theirs if "config" not in name and theirs[name]
    }
    input_ids = torch.tensor([[1, 7, 30]])
    expected = LlamaForCausalLM.from_pretrained(language)(input_ids).logits
    torch.testing.assert_close(model(input_ids).logits[..., : expected.shape[-1]], expected)
    new = json.loads((dest / "conversion.json").read_text())["new_weights"]
    assert {key.split(".")[1] for key in new} == {"vision_tower", "multi_modal_projector"}
    assert all(value.std() > 0 for name, value in model.named_parameters() if "projector" in name and "weight" in name)


@torch.no_grad()
def test_tied_language_model_in_half_precision(base_models: tuple[Path, Path], tmp_path: Path) -> None:
    vision, language = base_models
    config = LlamaForCausalLM.from_pretrained(language).config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    tied = LlamaForCausalLM(config).to(torch.bfloat16)
    tied.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(language).save_pretrained(tmp_path / "tied")
    dest = convert(tmp_path / "tied", tmp_path / "dest", vision_model=str(vision))
    assert "lm_head.weight" not in weights_of(dest)
    model = MoveKDForConditionalGeneration.from_pretrained(dest)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.dtype == torch.bfloat16
    input_ids = torch.tensor([[1, 7, 30]])
    torch.testing.assert_close(model(input_ids).logits[..., : config.vocab_size], tied(input_ids).logits)


# ---- what is refused


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
        (add_weight, r"without a place.*model\.extra"),
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


def test_code_in_stage_1_files(authors: Path, base_models: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(authors / "stage1", tmp_path / "stage1")
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


def test_other_arguments_refused(authors: Path, converted: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    for arguments, settings, message in (
        ((authors, tmp_path / "full"), {}, "exists already"),
        ((converted, tmp_path / "dest"), {}, "already"),
        ((authors, tmp_path / "dest"), {"to": "onnx"}, "'movekd' or 'authors'"),
        ((authors, tmp_path / "dest"), {"experts": {"num_experts": 2}}, "experts of its own"),
        ((authors, tmp_path / "dest"), {"chat_template": "own"}, "'own'"),
        (("no folder at all", tmp_path / "dest"), {}, "neither a folder nor"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(*arguments, **settings)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert nothing_left(tmp_path)


def test_command_line(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--keep-all-layers", str(copy), str(tmp_path / "dest"), "--chat-template", "plain"])
    printed = capsys.readouterr().out
    assert "kd_mode" in printed and str(tmp_path / "dest") in printed
    assert json.loads((tmp_path / "dest" / "config.json").read_text())["vision_feature_layer"] == -2
    with pytest.raises(SystemExit) as error:
        main([str(copy), str(tmp_path / "dest")])
    assert "exists already" in str(error.value.code)


# ---- streaming


def test_interrupted(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays of a conversion that is stopped while it writes."""
    written = []

    def stop_at_the_second(tensors: dict, path: Path, **kwargs: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(hub.weights, "save_file", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        convert(copy, tmp_path / "dest", max_shard_size=100_000)
    assert written and not written[0].exists()
    assert nothing_left(tmp_path)


IN_A_PROCESS = """
import os, signal, sys
from pathlib import Path
sys.path[0] = sys.argv[1]
import hub.weights
from hub.convert import convert

def memory():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}

count, save_file = 0, hub.weights.save_file
def counted(*arguments, **settings):
    global count
    count += 1
    if count == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    save_file(*arguments, **settings)

hub.weights.save_file = counted
before = memory()["VmRSS"]
convert(sys.argv[2], sys.argv[3], max_shard_size=int(sys.argv[5]))
print("grown", memory()["VmHWM"] - before, count)
"""


def in_a_process(source: Path, dest: Path, die_at: int, max_shard_size: int) -> subprocess.CompletedProcess:
    arguments = [str(ROOT), str(source), str(dest), str(die_at), str(max_shard_size)]
    return subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, *arguments], capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.slow
def test_killed(copy: Path, tmp_path: Path) -> None:
    """What a killed conversion leaves has another name and no configuration."""
    ended = in_a_process(copy, tmp_path / "dest", die_at=2, max_shard_size=100_000)
    assert ended.returncode == -9, ended.stderr
    assert not (tmp_path / "dest").exists()
    (rest,) = tmp_path.glob(".dest.*.partial")
    assert list(rest.glob("model*")) and not list(rest.glob("*.json"))


def test_memory(copy: Path, tmp_path: Path) -> None:
    """Far less is in memory than the whole, however many shards there are."""
    weights = load_file(copy / "model.safetensors")
    layers, width, intermediate = 18, weights["model.norm.weight"].shape[0], 40_000
    template = {key: value for key, value in weights.items() if key.startswith("model.layers.0.")}
    weights = {key: value for key, value in weights.items() if not key.startswith("model.layers.")}
    for layer in range(layers):
        for key, value in template.items():
            if ".mlp." in key:
                shape = (width, intermediate) if "down_proj" in key else (intermediate, width)
                value = torch.zeros(shape)
            weights[key.replace(".0.", f".{layer}.", 1)] = value.clone()
    save_file(weights, copy / "model.safetensors")
    edit_json(copy / "config.json", num_hidden_layers=layers, intermediate_size=intermediate)
    shards = split(copy, "safetensors", shards=6)
    sizes = [path.stat().st_size for path in shards]
    ended = in_a_process(copy, tmp_path / "dest", die_at=0, max_shard_size=max(sizes))
    assert ended.returncode == 0, ended.stderr
    grown, count = map(int, ended.stdout.splitlines()[-1].split()[1:])
    assert count >= len(shards)
    # What a few modules and a tokenizer take is not the weights'
    assert grown < 1.3 * max(sizes) + 100e6 < 0.7 * sum(sizes), (grown, sizes)
