"""Experts folded into the layers around them: the same outputs, and weights that are never lost or held twice."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel


FORMS = [
    {},
    {"expert_bias": True},
    {"dense_routing": True, "expert_bias": True},
    {"num_experts": 1},
    {"base": "siglip"},
]


def mlps(tower: MoveKDVisionModel) -> list[nn.Module]:
    return [layer.mlp for layer in tower.encoder.layers]


def storage_bytes(module: nn.Module) -> int:
    """Bytes behind all parameters, memory that several of them share counted once."""
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in module.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def weights(tower: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tower.state_dict().items()}


def assert_same_weights(tower: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    assert tower.state_dict().keys() == expected.keys()
    for name, value in tower.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=0, rtol=0)


@pytest.mark.parametrize("settings", FORMS)
@torch.no_grad()
def test_same_output_and_no_weight_twice(make_tower, pixels, settings):
    tower = make_tower(**settings)
    expected, before, size = tower(pixels).last_hidden_state, weights(tower), storage_bytes(tower)
    tower.fold_experts()
    folded = tower(pixels, output_router_probabilities=True)
    torch.testing.assert_close(folded.last_hidden_state, expected, atol=2e-5, rtol=1e-5)
    assert folded.router_probabilities[0].shape[-1] == tower.config.num_experts
    assert_same_weights(tower, before)
    # Nothing but a bias of zeros for the second layer's ranks, where they have none
    zeros = 0 if settings.get("expert_bias") else sum(len(mlp.fc2_experts.weight_a) * 4 for mlp in mlps(tower))
    assert storage_bytes(tower) == size + zeros
    # It is the folded weights that are used
    for weight in mlps(tower)[0].folded:
        weight.mul_(2)
        assert (tower(pixels).last_hidden_state - expected).abs().max() > 0.01
        weight.div_(2)
    tower.unfold_experts()
    assert all(mlp.folded is None for mlp in mlps(tower)) and storage_bytes(tower) == size
    assert all(value.is_contiguous() for value in tower.parameters())
    assert_same_weights(tower, before)
    torch.testing.assert_close(tower(pixels).last_hidden_state, expected, atol=0, rtol=0)


def test_gradients_are_those_of_the_unfolded_tower(make_tower, pixels):
    tower, folded = make_tower(), make_tower()
    folded.fold_experts()
    for model in (tower, folded):
        model(pixels).last_hidden_state.square().mean().backward()
    gradients = dict(tower.named_parameters())
    for name, value in folded.named_parameters():
        torch.testing.assert_close(value.grad, gradients[name].grad, msg=name)


def test_an_optimizer_that_was_there_before_goes_on(make_tower, pixels):
    tower = make_tower()
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
    tower.fold_experts()
    tower.train()
    assert all(mlp.folded is None for mlp in mlps(tower))
    before = weights(tower)
    tower(pixels).last_hidden_state.square().mean().backward()
    optimizer.step()
    for name in ("fc1.weight", "fc2_experts.weight_b"):
        assert not torch.equal(
            tower.state_dict()[f"encoder.layers.0.mlp.{name}"], before[f"encoder.layers.0.mlp.{name}"]
        )


@torch.no_grad()
def test_weights_changed_in_place_are_seen(make_tower, pixels):
    tower, other = make_tower(), make_tower(seed=5)
    tower.fold_experts()
    mlps(tower)[1].fc2_experts.weight_b.mul_(3)
    unfolded = copy.deepcopy(tower)
    assert all(mlp.folded is None for mlp in mlps(unfolded)), "a copy shares nothing with what was folded"
    expected = unfolded(pixels).last_hidden_state
    torch.testing.assert_close(tower(pixels).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
    tower.load_state_dict(other.state_dict())
    torch.testing.assert_close(tower(pixels).last_hidden_state, other(pixels).last_hidden_state, atol=0, rtol=0)


@torch.no_grad()
def test_another_dtype_keeps_the_folded_form(make_tower, pixels):
    tower = make_tower().double()
    expected = tower(pixels.double()).last_hidden_state
    tower.float()
    tower.fold_experts()
    tower.double()
    assert all(weight.dtype == torch.float64 for mlp in mlps(tower) for weight in mlp.folded)
    torch.testing.assert_close(tower(pixels.double()).last_hidden_state, expected)


def test_saving(make_model, tmp_path, pixels):
    model = make_model()
    before = weights(model)
    model.fold_experts()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert_same_weights(again, before)
    again.fold_experts()
    assert all(mlp.folded is not None for mlp in mlps(again.model.vision_tower))


def test_a_folded_tower_becomes_part_of_a_model(make_tower, make_language, tmp_path):
    tower = make_tower()
    before = weights(tower)
    tower.fold_experts()
    model = MoveKDForConditionalGeneration.from_parts(tower, make_language())
    model.save_pretrained(tmp_path)
    assert_same_weights(MoveKDForConditionalGeneration.from_pretrained(tmp_path).model.vision_tower, before)


@pytest.mark.parametrize("name", ["fc1", "fc2", "fc2_experts", "activation_fn"])
@torch.no_grad()
def test_layers_with_hooks_are_run_themselves(make_tower, pixels, name):
    tower, calls = make_tower(), []
    expected = tower(pixels).last_hidden_state
    tower.fold_experts()
    handle = mlps(tower)[0].get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(tower(pixels).last_hidden_state, expected, atol=2e-5, rtol=1e-5)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="Linear and Linear with hooks"):
        tower.fold_experts()
    handle.remove()
    tower.fold_experts()
    tower(pixels)
    assert len(calls) == 1


@torch.no_grad()
def test_offloaded_weights_are_not_folded(make_tower, pixels):
    tower = make_tower()
    expected = tower(pixels).last_hidden_state
    cpu_offload(tower, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded weights as they are"):
        tower.fold_experts()
    torch.testing.assert_close(tower(pixels).last_hidden_state, expected)


def test_what_cannot_be_folded(make_tower, pixels):
    with pytest.raises(ValueError, match="in training mode"):
        make_tower().train().fold_experts()
    tower = make_tower()
    tower.fold_experts()
    inject_adapter_in_model(LoraConfig(target_modules=["fc1"], init_lora_weights=False), tower)
    plain = copy.deepcopy(tower)
    with torch.no_grad():
        for _ in range(2):
            expected = plain(pixels).last_hidden_state
            torch.testing.assert_close(tower(pixels).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
            tower.to(torch.float32)
        assert (make_tower()(pixels).last_hidden_state - plain(pixels).last_hidden_state).abs().max() > 0.01
    with pytest.raises(ValueError, match="before adapters are added"):
        plain.eval().fold_experts()


@torch.no_grad()
def test_plain_mlps_have_nothing_to_fold(make_tower, pixels):
    tower = make_tower(num_experts=0)
    expected = tower(pixels).last_hidden_state
    tower.fold_experts()
    torch.testing.assert_close(tower(pixels).last_hidden_state, expected, atol=0, rtol=0)


@torch.no_grad()
def test_compiles_whole(make_tower, pixels):
    tower = make_tower()
    tower.fold_experts()
    compiled = torch.compile(tower.encoder.layers[0].mlp, fullgraph=True, backend="eager")
    hidden = torch.randn(2, 17, 32)
    torch.testing.assert_close(compiled(hidden), mlps(tower)[0](hidden))
