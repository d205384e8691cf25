"""Saving and loading: every data type, shards, devices, adapters, and what must not load in silence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, GenerationConfig

from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel


CODE = {
    *("base_encoders_movekd.py", "configuration_movekd.py", "experts_movekd.py", "vision_movekd.py"),
    "visualization_movekd.py",
}


@pytest.fixture(scope="module")
def model(make_model) -> MoveKDForConditionalGeneration:
    return make_model()


@pytest.fixture(scope="module")
def batch(model, make_processor, make_image) -> dict[str, torch.Tensor]:
    images = [make_image(24, 16, seed=seed) for seed in range(2)]
    return dict(
        make_processor(model)(text=["<image>?", "a <image>"], images=images, padding=True, return_tensors="pt")
    )


@torch.no_grad()
def logits(model: MoveKDForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    assert not model.training
    return model(**(batch | {"pixel_values": batch["pixel_values"].to(model.dtype)})).logits


def edit_weights(folder: Path, edit) -> None:
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


# --- There and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "smollm", "gpt2"])
def test_save_and_load(make_model, batch, tmp_path, family, dtype):
    model = make_model(family, dtype=dtype)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {dtype}
        assert ("lm_head.weight" in file.keys()) == (family == "llama")
    loaded = MoveKDForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.dtype == dtype and not loaded.training
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    weights = loaded.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (family != "llama")
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text()


@pytest.mark.parametrize(
    "tower",
    [
        {},
        {"num_experts": 0},
        {"num_experts": 5, "expert_bias": True, "dense_routing": True},
        {"feature_layer": None},
        {"base": "siglip"},
    ],
    ids=str,
)
def test_save_and_load_the_tower(make_tower, pixels, tmp_path, tower):
    tower = make_tower(**tower)
    tower.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == CODE | {
        *("config.json", "model.safetensors", "model.safetensors.index.json")
    }
    loaded = MoveKDVisionModel.from_pretrained(tmp_path)
    for name in ("last_hidden_state", "pooler_output"):
        found, expected = getattr(loaded(pixels), name), getattr(tower(pixels), name)
        assert found is None and expected is None or torch.equal(found, expected)


def test_other_dtype_than_saved(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = MoveKDForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(loaded, batch).float(), logits(model, batch), atol=0.5, rtol=0.1)


def test_sharded(model, batch, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and set(index["weight_map"].values()) == {path.name for path in shards}
    assert set(index["weight_map"]) == set(model.state_dict())
    loaded = MoveKDForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model-*.safetensors")), "shards of an earlier save would be loaded with it"
    check_index_of_one_file(tmp_path)


def check_index_of_one_file(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weights = load_file(folder / "model.safetensors")
    assert index["weight_map"] == dict.fromkeys(weights, "model.safetensors")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())


def test_one_file_has_an_index_too(make_model, make_tower, tmp_path):
    """Engines load every file of safetensors that no index leaves out."""
    for name, model in {"tied": make_model("smollm"), "tower": make_tower(), "half": make_model().bfloat16()}.items():
        model.save_pretrained(tmp_path / name)
        check_index_of_one_file(tmp_path / name)


@pytest.mark.parametrize(
    "settings",
    [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}],
    ids=str,
)
def test_device_maps(model, batch, tmp_path, settings):
    model.save_pretrained(tmp_path)
    loaded = MoveKDForConditionalGeneration.from_pretrained(tmp_path, **settings)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    if not torch.cuda.is_available():
        assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_offloaded_to_disk(model, batch, tmp_path):
    """Each layer comes from disk when it runs, whole: a layer split over devices would fail here."""
    model.save_pretrained(tmp_path / "model")
    folder = tmp_path / "offload"
    loaded = MoveKDForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": 150_000}, offload_folder=folder
    )
    places = set(loaded.hf_device_map.values())
    assert places == {"cpu", "disk"}, places
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch))


def test_on_the_meta_device(model, batch):
    with torch.device("meta"):
        empty = MoveKDForConditionalGeneration(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    # Buffers are not part of the weights, so that the whole of a model comes from the meta device by loading alone
    for name, buffer in model.named_buffers():
        empty.get_buffer(name).copy_(buffer)
    assert torch.equal(logits(empty.eval(), batch), logits(model, batch))


def test_generation_config_is_kept(make_model, tmp_path):
    model = make_model()
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=[2, 9], do_sample=True, temperature=0.2)
    model.save_pretrained(tmp_path)
    loaded = MoveKDForConditionalGeneration.from_pretrained(tmp_path).generation_config
    assert (loaded.max_new_tokens, loaded.eos_token_id, loaded.temperature) == (7, [2, 9], 0.2)


def test_folder_holds_weights_code_and_configurations(model, tmp_path):
    model.save_pretrained(tmp_path)
    expected = CODE | {"modeling_movekd.py", "config.json", "generation_config.json", "model.safetensors"}
    expected |= {"model.safetensors.index.json"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["MoveKDForConditionalGeneration"] and config["model_type"] == "movekd"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_movekd.MoveKDConfig",
        "AutoModel": "modeling_movekd.MoveKDForConditionalGeneration",
        "AutoModelForImageTextToText": "modeling_movekd.MoveKDForConditionalGeneration",
    }
    for name in CODE | {"modeling_movekd.py"}:
        source = Path(__file__).parents[2] / "modeling_movekd" / name
        assert (tmp_path / name).read_text() == source.read_text()


def test_only_the_main_process_writes_weights(model, tmp_path):
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*.py"))


def test_hands_over_to_the_auto_classes(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)).__name__ == "MoveKDConfig"
    for auto in (AutoModel, AutoModelForImageTextToText):
        loaded = auto.from_pretrained(tmp_path, trust_remote_code=True)
        assert type(loaded).__name__ == "MoveKDForConditionalGeneration"
        assert torch.equal(logits(loaded, batch), logits(model, batch))


# --- Nothing stays random in silence -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lost",
    [
        "lm_head.weight",
        "model.multi_modal_projector.linear_1.bias",
        "model.vision_tower.encoder.layers.1.mlp.router.weight",
        "model.vision_tower.encoder.layers.0.mlp.fc2_experts.weight_b",
        "model.language_model.layers.0.mlp.up_proj.weight",
    ],
)
def test_incomplete_checkpoint(model, tmp_path, lost):
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: {key: value for key, value in weights.items() if key != lost})
    with pytest.raises(ValueError, match=f"lacks 1 weights of MoveKDForConditionalGeneration.*'{lost}'"):
        MoveKDForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"lacks 1 weights.*'{lost}'"):
        AutoModel.from_pretrained(tmp_path, trust_remote_code=True)


def test_loading_info_is_still_to_be_had(model, tmp_path):
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights | {"model.more": torch.ones(1)})
    _, info = MoveKDForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == {"model.more"}


@pytest.mark.parametrize("layout", ["vision_model.", ""])
def test_plain_clip_is_not_a_tower_with_experts(make_clip, tmp_path, layout):
    make_clip().save_pretrained(tmp_path)
    edit_weights(
        tmp_path, lambda weights: {layout + key.removeprefix("vision_model."): value for key, value in weights.items()}
    )
    with pytest.raises(ValueError, match="(?s)lacks.*router.*from_clip"):
        MoveKDVisionModel.from_pretrained(tmp_path)


def test_weights_of_another_shape(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["lora_rank"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match="mismatched"):
        MoveKDForConditionalGeneration.from_pretrained(tmp_path)


# --- Adapters ------------------------------------------------------------------------------------------------------


def test_lora_trains_merges_and_reloads(make_model, batch, tmp_path):
    peft = pytest.importorskip("peft")
    base = make_model()
    config = peft.LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)",
        modules_to_save=["multi_modal_projector", "router", "fc1_experts", "fc2_experts"],
    )
    model = peft.get_peft_model(make_model(), config)
    model.train()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        output = model(**batch, labels=batch["input_ids"], output_router_probabilities=True)
        assert len(output.router_probabilities) == 3
        output.loss.backward()
        optimizer.step()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    for part in ("router", "fc1_experts", "fc2_experts", "multi_modal_projector", "lora_A", "lora_B"):
        assert any(part in name for name in trained), part
    assert not any("vision_tower" in name and "self_attn" in name for name in trained)
    model.eval()
    expected = logits(model, batch)
    assert not torch.allclose(expected, logits(base, batch), atol=1e-3)

    model.save_pretrained(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(make_model(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(reloaded, batch), expected)
    merged = model.merge_and_unload()
    assert type(merged) is MoveKDForConditionalGeneration
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert not any(
        "lora_" in key or "modules_to_save" in key for key in load_file(tmp_path / "merged/model.safetensors")
    )
    loaded = MoveKDForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded, batch), logits(merged, batch))


def test_lora_on_all_linear_layers_leaves_the_mixture_alone(make_model, batch):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules="all-linear"))
    adapted = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert any("vision_tower" in name and "fc1" in name for name in adapted)
    assert any("language_model" in name for name in adapted)
    assert not any("router" in name or "expert" in name for name in adapted)
    torch.testing.assert_close(logits(model.eval(), batch), logits(make_model(), batch))
