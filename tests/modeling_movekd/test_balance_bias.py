"""The bias that balances the load, and experts that are chosen in place of the routers."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from hub.export_forms import make_dense
from hub.export_merged import merge_experts
from modeling_movekd import MoveKDVisionConfig, MoveKDVisionModel
from modeling_movekd.experts_movekd import ExpertRouter


BIAS = torch.tensor([0.3, -0.3, 0.0])


@pytest.fixture
def tower(make_tower) -> MoveKDVisionModel:
    tower = make_tower(balance_bias=True)
    for layer in tower.encoder.layers:
        layer.mlp.router.balance_bias.copy_(BIAS)
    return tower


@torch.no_grad()
def test_the_bias_chooses_but_does_not_weigh(tower, make_tower, pixels) -> None:
    router, hidden = tower.encoder.layers[0].mlp.router, torch.randn(3, 17, 32)
    probabilities, chosen = router(hidden)
    exact = (hidden.double() @ router.weight.double().T + router.bias.double()).softmax(dim=-1)
    torch.testing.assert_close(probabilities.double(), exact, atol=1e-6, rtol=1e-5)
    assert torch.equal(chosen, (exact + BIAS.double()).argmax(dim=-1)) and (chosen != exact.argmax(dim=-1)).any()

    outputs = tower(pixels, output_expert_indices=True)
    plain = make_tower()
    assert not any("balance" in key for key in plain.state_dict()), "other checkpoints stay as they are"
    assert not torch.equal(
        torch.stack(plain(pixels, output_expert_indices=True).expert_indices), torch.stack(outputs.expert_indices)
    )


def test_a_move_is_the_rate_times_the_sign() -> None:
    router = ExpertRouter(MoveKDVisionConfig(num_experts=4, hidden_size=24, balance_bias=True))
    for load, moved in (((9, 1, 3, 3), [-1, 1, 1, 1]), ((4, 4, 4, 4), [-1, 1, 1, 1]), ((0, 8, 4, 4), [0, 0, 1, 1])):
        router.move_balance_bias(torch.tensor(load), 0.25)
        assert torch.equal(router.balance_bias, 0.25 * torch.tensor(moved))
    router = ExpertRouter(MoveKDVisionConfig(num_experts=4, hidden_size=24))
    with pytest.raises(ValueError, match="has no `balance_bias`"):
        router.move_balance_bias(torch.ones(4), 0.25)


@torch.no_grad()
def test_a_router_with_a_single_expert_becomes_balanced() -> None:
    torch.manual_seed(0)
    router = ExpertRouter(MoveKDVisionConfig(num_experts=4, hidden_size=24, balance_bias=True))
    router.weight.normal_(std=0.1)
    router.bias.copy_(torch.tensor([4.0, 0, 0, 0]))
    shares = []
    for _ in range(250):
        load = router(torch.randn(2048, 24))[1].bincount(minlength=4)
        shares.append(load / load.sum())
        router.move_balance_bias(load, 0.005)
    assert shares[0][0] > 0.99 and torch.stack(shares[-20:]).mean(dim=0).sub(0.25).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_loaded_folded_and_copied_it_routes_the_same(tower, pixels, tmp_path, dtype) -> None:
    bias = torch.tensor([0.3001, -0.3, 0.0])  # not a number of bfloat16
    tower.encoder.layers[0].mlp.router.balance_bias.copy_(bias)
    tower.to(dtype).save_pretrained(tmp_path)
    loaded = MoveKDVisionModel.from_pretrained(tmp_path, dtype=dtype).eval()
    assert loaded.config.balance_bias and loaded.dtype == dtype
    assert load_file(tmp_path / "model.safetensors")["encoder.layers.0.mlp.router.balance_bias"].dtype == torch.float32
    loaded.fold_experts()
    with torch.no_grad():
        expected = tower(pixels, output_expert_indices=True)
        for model in (loaded, copy.deepcopy(loaded)):
            assert torch.equal(model.encoder.layers[0].mlp.router.balance_bias, bias)
            outputs = model(pixels, output_expert_indices=True)
            assert all(map(torch.equal, outputs.expert_indices, expected.expert_indices))
            if dtype == torch.float32:
                torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_forms_without_a_choice_have_no_bias(tower, pixels, tmp_path) -> None:
    merged, report = merge_experts(tower, [*pixels, *pixels])
    assert not any("balance" in key for key in merged.state_dict()) and report["layers"]
    make_dense(tower, [])
    tower.save_pretrained(tmp_path)
    dense = MoveKDVisionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(dense(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    with pytest.raises(ValueError, match="`dense_routing` chooses no expert"):
        MoveKDVisionConfig(balance_bias=True, dense_routing=True)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_chosen_expert_serves_all_tokens_and_alone_gets_a_gradient(make_tower, pixels, checkpointing) -> None:
    tower = make_tower(expert_bias=True, balance_bias=True, lora_dropout=0.0).train()
    if checkpointing:
        tower.gradient_checkpointing_enable({"use_reentrant": False})
    outputs = tower(pixels, experts=torch.tensor([2, 0, 2])).last_hidden_state
    for layer in tower.encoder.layers:  # a bias above all probabilities leaves the router no choice
        layer.mlp.router.balance_bias.copy_(torch.tensor([0.0, 0.0, 2.0]))
    torch.testing.assert_close(tower(pixels).last_hidden_state[[0, 2]], outputs[[0, 2]], atol=1e-5, rtol=1e-5)

    outputs[[0, 2]].square().mean().backward()
    for name, parameter in tower.named_parameters():
        if "router" in name:
            assert parameter.grad is None
        elif "_experts" in name:
            gradient = parameter.grad.transpose(0, -1) if name.endswith("weight_b") else parameter.grad
            reached = gradient.reshape(3, -1).abs().amax(dim=1)
            assert reached[2] > 0 and not reached[:2].any(), name
    with pytest.raises(ValueError, match="the tower has no experts"):
        make_tower(num_experts=0)(pixels, detach_experts=True)


def test_the_gradient_can_be_kept_from_the_experts_alone(make_tower, pixels) -> None:
    tower, attached = make_tower(lora_dropout=0.0), make_tower(lora_dropout=0.0)
    outputs = tower(pixels, detach_experts=True).last_hidden_state
    expected = attached(pixels).last_hidden_state
    assert torch.equal(outputs, expected)
    outputs.square().mean().backward()
    expected.square().mean().backward()
    for (name, parameter), other in zip(tower.named_parameters(), attached.parameters(), strict=True):
        if "_experts" in name:
            assert parameter.grad is None and other.grad is not None
        else:
            torch.testing.assert_close(parameter.grad, other.grad, msg=name)
