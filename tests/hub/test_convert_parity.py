"""The authors' checkpoint, converted, against what their code computes with it: inputs, logits, tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoProcessor, LlamaConfig

from hub.convert_layouts import WeightSource, empty_model, expected_weights, make_conversions, map_keys
from hub.convert_original_keys import key_from_original
from hub.weights import WeightFiles
from modeling_movekd import MoveKDConfig, MoveKDForConditionalGeneration
from tests.helpers.original_batches import IMAGE_POSITION, NAMES, expand, model_inputs
from tests.helpers.original_weights import state_dict_to_original
from tests.helpers.parity import assert_values, read_case, with_prefix


pytestmark = pytest.mark.parity

Golden = tuple[dict[str, torch.Tensor], dict[str, Any]]


@pytest.fixture(scope="module")
def expected(original: Path) -> Golden:
    return read_case(original / "expected.safetensors")


@pytest.fixture(scope="module", params=["converted", "converted_whole"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> MoveKDForConditionalGeneration:
    return MoveKDForConditionalGeneration.from_pretrained(folder).eval()


def test_configuration(original: Path, folder: Path) -> None:
    theirs = json.loads((original / "config.json").read_text())
    clip = json.loads((original / theirs["mm_vision_tower"] / "config.json").read_text())
    config = MoveKDConfig.from_pretrained(folder)
    text, vision, moe = config.text_config, config.vision_config, theirs["moe"]
    same = ("attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size")
    same += ("initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads")
    same += ("num_hidden_layers", "num_key_value_heads", "pad_token_id", "pretraining_tp", "rms_norm_eps", "use_cache")
    for name in same:
        assert getattr(text, name) == theirs[name], name
    assert text.model_type == "llama"
    assert text.rope_parameters["rope_theta"] == theirs["rope_theta"]
    assert text.tie_word_embeddings == config.tie_word_embeddings == theirs["tie_word_embeddings"]
    assert config.original_vocab_size == config.image_token_index == theirs["vocab_size"]
    assert text.vocab_size == theirs["vocab_size"] + 1
    assert str(config.dtype) == f"torch.{theirs['torch_dtype']}"
    assert config.image_aspect_ratio == theirs["image_aspect_ratio"]

    assert vision.num_experts == moe["moe_encoder_num_experts"]
    assert (vision.lora_rank, vision.lora_alpha) == (moe["moe_encoder_lora_rank"], moe["moe_encoder_lora_alpha"])
    assert vision.dense_routing == moe["moe_encoder_dense"]
    assert (vision.expert_bias, vision.router_gradient, vision.expert_init) == (True, "none", "kaiming")
    for name in ("hidden_act", "hidden_size", "image_size", "intermediate_size", "layer_norm_eps", "patch_size"):
        assert getattr(vision, name) == clip[name], name
    assert vision.num_attention_heads == clip["num_attention_heads"]
    depth, layer = clip["num_hidden_layers"], theirs["mm_vision_select_layer"]
    if vision.add_pooling_layer:
        assert (vision.num_hidden_layers, config.vision_feature_layer) == (depth, layer)
    else:
        assert (vision.num_hidden_layers, config.vision_feature_layer) == (depth + 1 + layer, -1)
    assert config.vision_feature_select_strategy == "default" and theirs["mm_vision_select_feature"] == "patch"
    dropped = json.loads((folder / "conversion.json").read_text())["dropped_config"]
    assert {name: theirs[name] for name in dropped} == dropped
    # What is left is all that neither says nor changes anything about the model
    assert {name.split("_")[0] for name in dropped} <= {
        "",
        "architectures",
        "freeze",
        "kd",
        "mm",
        "transformers",
        "tune",
    }


def test_processor(original: Path, folder: Path, expected: Golden) -> None:
    tensors, metadata = expected
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    config = json.loads((original / "config.json").read_text())
    clip = json.loads((original / config["mm_vision_tower"] / "preprocessor_config.json").read_text())
    images = processor.image_processor
    assert images.do_pad
    assert (list(images.image_mean), list(images.image_std)) == (clip["image_mean"], clip["image_std"])
    assert (int(images.resample), images.rescale_factor) == (clip["resample"], clip["rescale_factor"])
    assert dict(images.size) == clip["size"] and dict(images.crop_size) == clip["crop_size"]
    assert processor.tokenizer.padding_side == "left", "for batches that `generate` continues"
    for index, prompt in enumerate(metadata["prompts"]):
        # As in the chat template: the text behind a special token begins a new word
        ids = processor.tokenizer("<s> " + prompt.replace("<image>", "<image> "), return_tensors="pt").input_ids
        theirs = tensors[f"prompt{index}.input_ids"]
        assert torch.equal(ids.masked_fill(ids == processor.image_token_id, IMAGE_POSITION), theirs), prompt


@torch.no_grad()
def test_prompts(model: MoveKDForConditionalGeneration, expected: Golden) -> None:
    tensors, metadata = expected
    vision = model.get_image_features(tensors["pixel_values"], return_dict=True)
    features = vision.hidden_states[model.config.vision_feature_layer][:, 1:]
    assert_values(features, tensors["vision.selected_feature"], "selected features")
    assert_values(torch.stack(list(vision.pooler_output)), tensors["vision.projected"], "projected features")
    for index in range(len(metadata["prompts"])):
        case = with_prefix(tensors, f"prompt{index}.")
        input_ids, pixels = expand(case["input_ids"], model.config), tensors["pixel_values"][index : index + 1]
        noted: list[torch.Tensor] = []
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs, noted=noted: noted.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        logits = model(input_ids=input_ids, pixel_values=pixels).logits
        hook.remove()
        assert_values(noted[0], case["inputs_embeds"], f"inputs_embeds of prompt {index}")
        original = case["logits"].shape[-1]
        assert_values(logits[..., :original], case["logits"], f"logits of prompt {index}")
        # What is not the authors' can never win, whatever decodes
        assert (logits[..., original:].amax(dim=-1) < logits[..., :original].amax(dim=-1)).all()
        greedy = case["greedy_8_new_tokens"]
        generated = model.generate(
            input_ids=input_ids, pixel_values=pixels, max_new_tokens=greedy.shape[1], do_sample=False
        )
        assert torch.equal(generated[:, input_ids.shape[1] :], greedy)
        assert torch.equal(case["raw_generate_return"][:, 1:], greedy)


@torch.no_grad()
def test_batch(model: MoveKDForConditionalGeneration, expected: Golden) -> None:
    batch = with_prefix(expected[0], "batch.")
    inputs, _ = model_inputs(batch, model.config, batch["expanded_attention_mask"], batch["expanded_labels"])
    count = len(inputs["pixel_values"]) - inputs.pop("num_blank_images")
    outputs = model(**inputs | {"pixel_values": inputs["pixel_values"][:count]})
    mask = batch["expanded_attention_mask"].bool()
    original = batch["logits"].shape[-1]
    assert_values(outputs.logits[..., :original][mask], batch["logits"][mask], "logits of a batch")
    labels = batch["expanded_labels"]
    loss = nn.functional.cross_entropy(outputs.logits[:, :-1, :original].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, batch["lm_loss"], rtol=1e-5, atol=0)
    # With the row for <image> in the softmax it is larger by no more than that row's share
    assert loss <= outputs.loss < loss + 2 / original


def as_files(tensors: dict[str, torch.Tensor]) -> WeightFiles:
    """Files with these tensors that cannot be read, only planned with."""
    files = WeightFiles([])
    files.tensors, files.paths = tensors, dict.fromkeys(tensors, Path("shapes.safetensors"))
    return files


def shapes(entries: dict[str, dict]) -> dict[str, torch.Tensor]:
    return {
        key: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        for key, entry in entries.items()
    }


def full_size(reference: dict[str, torch.Tensor], layers: int, cut: bool) -> MoveKDForConditionalGeneration:
    """The model of the published sizes, on the meta device."""
    rows, width = reference["model.embed_tokens.weight"].shape
    intermediate = reference["model.layers.0.mlp.gate_proj.weight"].shape[0]
    text = LlamaConfig(
        vocab_size=rows + 1,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
    )
    vision = MoveKDConfig().vision_config.to_dict() | {"expert_bias": True, "router_gradient": "none"}
    vision |= {} if cut else {"num_hidden_layers": 24, "add_pooling_layer": True}
    return empty_model(
        MoveKDConfig(
            vision_config=vision,
            text_config=text.to_dict(),
            vision_feature_layer=-1 if cut else -2,
            image_token_index=rows,
        )
    )


@pytest.fixture(scope="module")
def reference(original: Path) -> dict[str, Any]:
    return json.loads((original / "reference_keys_7b.json").read_text())


def test_every_key_of_7b(reference: dict[str, Any]) -> None:
    stage1 = {key for entries in reference["stage1_v1_0"].values() for key in entries}
    full = shapes(reference["finetuned_v1_0"])
    assert stage1 <= full.keys()
    assert {
        key: tuple(entry["shape"]) for entries in reference["stage1_v1_0"].values() for key, entry in entries.items()
    } == {key: tuple(full[key].shape) for key in stage1}
    full |= shapes(reference["extra_keys_v1_1"] | reference["extra_keys_if_pix2struct"])
    layers = len([key for key in full if key.endswith("self_attn.q_proj.weight") and "vision" not in key])
    for cut in (False, True):
        model = full_size(full, layers, cut)
        mapping = map_keys([WeightSource(as_files(full), key_from_original)], model)
        conversions, distiller, new = make_conversions(mapping, model)
        assert not new
        planned = {key: tensor for conversion in conversions for key, tensor in conversion.shapes().items()}
        expected = expected_weights(model)
        assert {key: value.shape for key, value in planned.items()} == {
            key: value.shape for key, value in expected.items()
        }
        assert {key.split(".")[1] for conversion in distiller for key in conversion.shapes()} == set(
            NAMES.values()
        ) - {"clip"}
        assert all(tensor.dtype == torch.bfloat16 for tensor in planned.values())
        used = sum(len(conversion.inputs) for conversion in conversions + distiller)
        assert used + len(mapping.dropped) == len(full)
        assert bool(mapping.dropped) == cut
    counts = reference["parameter_counts"]
    assert sum(full[key].numel() for key in reference["finetuned_v1_0"]) == counts["total"]


def test_key_count_of_13b(reference: dict[str, Any]) -> None:
    summary, small = reference["summary_13b"], shapes(reference["finetuned_v1_0"])
    rows, width = summary["embed_tokens"]
    sizes = {"model.embed_tokens.weight": torch.empty(rows, width, device="meta")}
    sizes["model.layers.0.mlp.gate_proj.weight"] = torch.empty(13824, width, device="meta")
    model = full_size(sizes, 40, cut=False)
    back = state_dict_to_original(expected_weights(model), model.config.vision_config.num_experts)
    adapters = {key: tensor for key, tensor in small.items() if "_adapter_" in key}
    assert len(back) + len(adapters) == summary["finetuned_13b_v1_0_key_count"]
    total = sum(tensor.numel() for tensor in (*back.values(), *adapters.values())) - 2 * width  # a row for <image>
    assert total == summary["total_parameters"]
    assert {key: list(back[key].shape) for key in summary["mm_projector"]} == summary["mm_projector"]
