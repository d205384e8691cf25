"""The tower and its experts against golden numbers of the authors' code (see the fixtures' README)."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from hub.convert_original_keys import key_from_original
from modeling_movekd import MoveKDVisionConfig, MoveKDVisionModel
from modeling_movekd.experts_movekd import MixtureOfLoraExpertsMLP
from tests.helpers.original_weights import state_dict_from_original, state_dict_to_original
from tests.helpers.parity import assert_gradients, assert_values, cases, read_case, with_prefix


pytestmark = pytest.mark.parity

RELEASED = {"expert_bias": True, "router_gradient": "none", "expert_init": "kaiming"}


def test_mole_layers(parity_dir: Path) -> None:
    for path in cases(parity_dir, "mole_*.safetensors"):
        tensors, metadata = read_case(path)
        config = MoveKDVisionConfig(
            hidden_size=metadata["hidden_size"],
            intermediate_size=metadata["intermediate_size"],
            hidden_act=metadata["hidden_act"],
            num_attention_heads=1,
            num_experts=metadata["num_experts"],
            lora_rank=metadata["rank"],
            lora_alpha=metadata["alpha"],
            dense_routing=metadata["dense"],
            **RELEASED,
        )
        layer = MixtureOfLoraExpertsMLP(config).eval()
        layer.load_state_dict(state_dict_from_original(with_prefix(tensors, "param.")), strict=True)

        inputs = tensors["x"].clone().requires_grad_()
        probabilities, indices = layer.router(inputs)
        output = layer(inputs)
        loss = (output * tensors["w"]).sum()
        loss.backward()

        assert_values(probabilities, tensors["routing"], f"{path.name} routing")
        assert torch.equal(indices, tensors["expert_index"].long()), path.name
        assert_values(
            layer.expert_gates(probabilities, indices),
            tensors["routing"] if metadata["dense"] else tensors["expert_choice"],
            path.name,
        )
        assert_values(output, tensors["out"], f"{path.name} out")
        torch.testing.assert_close(loss, tensors["loss"], rtol=1e-5, atol=1e-5)
        expected = state_dict_from_original(with_prefix(tensors, "grad."))
        assert_gradients(
            {"x": inputs.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}, expected
        )
        without = {key_from_original(key)[0] for key in metadata["grad_none"]}
        assert {name for name, parameter in layer.named_parameters() if parameter.grad is None} == without


def test_vision_towers(parity_dir: Path) -> None:
    for config_path in cases(parity_dir, "vision_tower*.config.json"):
        settings = json.loads(config_path.read_text())
        tensors, metadata = read_case(config_path.with_name(config_path.name.replace(".config.json", ".safetensors")))
        clip = CLIPVisionModel(CLIPVisionConfig(**settings["clip_vision_config"]))
        tower = MoveKDVisionModel.from_clip(
            clip,
            feature_layer=None,
            num_experts=settings["moe"]["num_experts"],
            lora_rank=settings["moe"]["rank"],
            lora_alpha=settings["moe"]["alpha"],
            dense_routing=settings["moe"]["dense"],
            **RELEASED,
        )
        authors = with_prefix(tensors, "param.")
        state_dict = with_prefix(state_dict_from_original(authors), "vision_tower.")
        tower.load_state_dict(state_dict, strict=True)
        check_tower(tower, tensors, metadata, settings["select_layer"])

        # Cut to the layers in use, it gives the same features from the layers it keeps
        cut = MoveKDVisionModel.from_clip(clip, settings["select_layer"], **tower_settings(tower.config))
        cut.load_state_dict({key: value for key, value in state_dict.items() if key in cut.state_dict()}, strict=True)
        assert_values(cut(tensors["pixel_values"]).last_hidden_state[:, 1:], tensors["selected_feature"], "cut tower")

        back = state_dict_to_original(
            {f"vision_tower.{key}": value for key, value in tower.state_dict().items()}, tower.config.num_experts
        )
        assert back.keys() == authors.keys()
        assert all(torch.equal(back[key], authors[key]) for key in authors)


def tower_settings(config: MoveKDVisionConfig) -> dict:
    names = ("num_experts", "lora_rank", "lora_alpha", "dense_routing", *RELEASED)
    return {name: getattr(config, name) for name in names}


def check_tower(tower: MoveKDVisionModel, tensors: dict[str, torch.Tensor], metadata: dict, layer: int) -> None:
    depth = tower.config.num_hidden_layers
    for index in range(depth):
        outputs = tower(
            tensors["pixel_values"],
            output_hidden_states=True,
            output_router_probabilities=True,
            output_expert_indices=True,
            cls_attention_layer=index,
        )
        assert_values(outputs.cls_attention, tensors[f"attentions_cls_row.{index}"], f"[CLS] row of layer {index}")
        assert_values(outputs.router_probabilities[index], tensors[f"routing_probs.{index}"], f"routing {index}")
        assert torch.equal(outputs.expert_indices[index], tensors[f"expert_choice.{index}"].argmax(-1))
    for index in range(depth + 1):
        assert_values(outputs.hidden_states[index], tensors[f"hidden_states.{index}"], f"hidden state {index}")
    assert_values(outputs.last_hidden_state, tensors["last_hidden_state"], "last hidden state")
    assert_values(outputs.pooler_output, tensors["pooler_output"], "pooler output")
    features = outputs.hidden_states[layer][:, 1:]
    assert_values(features, tensors["selected_feature"], "selected feature")

    loss = (features * tensors["w"]).sum()
    loss.backward()
    torch.testing.assert_close(loss, tensors["loss"], rtol=1e-5, atol=1e-4)
    expected = with_prefix(state_dict_from_original(with_prefix(tensors, "grad.")), "vision_tower.")
    assert_gradients({name: parameter.grad for name, parameter in tower.named_parameters()}, expected)
    without = {key_from_original(key)[0].removeprefix("vision_tower.") for key in metadata["grad_none"]}
    packed_elsewhere = {name for name, parameter in tower.named_parameters() if parameter.grad is not None}
    assert not without & packed_elsewhere
