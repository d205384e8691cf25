"""The mixture of LoRA experts: its formula, its initialization, its gradients, and the values it refuses."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from torch import nn
from transformers.activations import QuickGELUActivation

from modeling_movekd import MoveKDConfig, MoveKDVisionConfig, MoveKDVisionModel
from modeling_movekd.experts_movekd import MixtureOfLoraExpertsMLP, QuickGELU


def task_loss(tower: MoveKDVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    output = tower(pixels).last_hidden_state
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    return (output - target).square().mean()


def mole(tower: MoveKDVisionModel, part: str) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in tower.named_parameters() if part in name}


def expert_by_expert(mlp: MixtureOfLoraExpertsMLP, hidden: torch.Tensor) -> torch.Tensor:
    """The formula as the paper writes it: one expert after the other, one token's expert chosen by the router."""
    config = mlp.config
    probabilities = (hidden @ mlp.router.weight.T + mlp.router.bias).softmax(-1)
    chosen = probabilities.argmax(-1)

    def layer(linear, experts, inputs):
        output = linear(inputs)
        for i in range(config.num_experts):
            ranks = slice(i * config.lora_rank, (i + 1) * config.lora_rank)
            update = inputs @ experts.weight_a[ranks].T
            update = update + (0 if experts.bias_a is None else experts.bias_a[ranks])
            update = update @ experts.weight_b[:, ranks].T
            update = update + (0 if experts.bias_b is None else experts.bias_b[i])
            gate = probabilities[..., i] if config.dense_routing else (chosen == i).float()
            output = output + config.lora_alpha / config.lora_rank * gate[..., None] * update
        return output

    return layer(mlp.fc2, mlp.fc2_experts, mlp.activation_fn(layer(mlp.fc1, mlp.fc1_experts, hidden)))


@pytest.mark.parametrize("expert_bias", [False, True])
@pytest.mark.parametrize("dense_routing", [False, True])
@pytest.mark.parametrize("num_experts", [1, 2, 3, 5])
@torch.no_grad()
def test_packed_product_is_the_formula(make_tower, num_experts, dense_routing, expert_bias):
    tower = make_tower(num_experts=num_experts, dense_routing=dense_routing, expert_bias=expert_bias)
    hidden = torch.randn(3, 17, 32)
    for layer in tower.encoder.layers:
        expected = expert_by_expert(layer.mlp, hidden)
        torch.testing.assert_close(layer.mlp(hidden), expected, atol=1e-5, rtol=1e-5)
        without = layer.mlp.fc2(layer.mlp.activation_fn(layer.mlp.fc1(hidden)))
        assert (expected - without).abs().mean() > 0.01, "the experts do nothing here"


@pytest.mark.parametrize("dense_routing", [False, True])
@torch.no_grad()
def test_half_precision_stays_near(make_tower, pixels, dense_routing):
    tower = make_tower(dense_routing=dense_routing, lora_alpha=1.0)
    expected = tower(pixels).last_hidden_state
    for dtype in (torch.bfloat16, torch.float16):
        output = copy.deepcopy(tower).to(dtype)(pixels.to(dtype), output_router_probabilities=True)
        assert output.last_hidden_state.dtype == dtype
        assert {probabilities.dtype for probabilities in output.router_probabilities} == {torch.float32}
        assert nn.functional.cosine_similarity(output.last_hidden_state.float(), expected, dim=-1).mean() > 0.99


# --- Initialization ------------------------------------------------------------------------------------------------


def check_initialization(tower: MoveKDVisionModel, expert_init: str) -> None:
    for layer in tower.encoder.layers:
        assert layer.mlp.router.weight.std() > 0 and not layer.mlp.router.bias.any()
        for experts in (layer.mlp.fc1_experts, layer.mlp.fc2_experts):
            in_features, rank = experts.weight_a.shape[1], tower.config.lora_rank
            bound = (1 if expert_init == "zero" else 6) ** 0.5 / in_features**0.5
            assert 0.9 * bound < experts.weight_a.abs().max() <= bound
            if expert_init == "zero":
                assert not experts.weight_b.any()
            else:
                assert 0.9 * (6 / rank) ** 0.5 < experts.weight_b.abs().max() <= (6 / rank) ** 0.5
            assert not experts.bias_a.any() and not experts.bias_b.any()
    routers = [layer.mlp.router.weight for layer in tower.encoder.layers]
    assert not torch.equal(routers[0], routers[1])


@pytest.mark.parametrize("expert_init", ["zero", "kaiming"])
def test_every_way_of_building_initializes_alike(make_clip, expert_init, tmp_path):
    settings = {"expert_init": expert_init, "expert_bias": True, "lora_rank": 4}
    built = MoveKDVisionModel.from_clip(make_clip(), **settings)
    check_initialization(built, expert_init)
    check_initialization(MoveKDVisionModel(built.config), expert_init)
    check_initialization(MoveKDVisionModel._from_config(built.config), expert_init)


@torch.no_grad()
def test_kaiming_starts_off_clip(make_clip, pixels):
    clip = make_clip()
    expected = clip(pixels, output_hidden_states=True).hidden_states[-2]
    tower = MoveKDVisionModel.from_clip(clip, expert_init="kaiming", lora_alpha=8, lora_rank=4)
    assert not torch.allclose(tower(pixels).last_hidden_state, expected, atol=1e-2)


def test_from_clip_follows_the_seed(make_clip):
    towers = []
    for _ in range(2):
        torch.manual_seed(5)
        towers.append(MoveKDVisionModel.from_clip(make_clip()).state_dict())
    for key, value in towers[0].items():
        assert torch.equal(value, towers[1][key]), key


# --- Gradients -----------------------------------------------------------------------------------------------------


def test_router_learns_from_the_task_only_if_straight_through(make_tower, pixels):
    towers = {mode: make_tower(router_gradient=mode) for mode in ("straight_through", "none")}
    outputs = {mode: tower(pixels).last_hidden_state for mode, tower in towers.items()}
    assert torch.equal(outputs["straight_through"], outputs["none"])
    for tower in towers.values():
        task_loss(tower, pixels).backward()
    for parameter in mole(towers["straight_through"], "router").values():
        assert parameter.grad.abs().sum() > 0
    for parameter in mole(towers["none"], "router").values():
        assert parameter.grad is None
    # The last layer's experts lie below no router, so that for them it changes nothing
    for name, parameter in mole(towers["none"], "layers.2.mlp.fc1_experts").items():
        torch.testing.assert_close(parameter.grad, towers["straight_through"].get_parameter(name).grad)


def test_straight_through_gradient_is_that_of_the_chosen_probability(make_tower):
    """d output / d p_i of the chosen expert is that expert's own contribution: the gate's slope is one."""
    mlp = make_tower().encoder.layers[0].mlp
    probabilities = torch.tensor([[[0.2, 0.7, 0.1], [0.6, 0.3, 0.1]]], requires_grad=True)
    gates = mlp.expert_gates(probabilities, probabilities.argmax(-1))
    assert torch.equal(gates, torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]]))
    (gates * torch.tensor([2.0, 3.0, 5.0])).sum().backward()
    assert torch.equal(probabilities.grad, torch.tensor([[[0.0, 3.0, 0.0], [2.0, 0.0, 0.0]]]))


def test_balance_loss_reaches_the_router_without_straight_through(make_tower, pixels):
    tower = make_tower(router_gradient="none")
    output = tower(pixels, output_router_probabilities=True)
    sum(probabilities[..., 0].mean() for probabilities in output.router_probabilities).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in mole(tower, "router").values())


@pytest.mark.parametrize("settings", [{}, {"dense_routing": True}, {"expert_bias": True}, {"num_experts": 1}], ids=str)
def test_every_parameter_trains_from_the_zero_start(make_clip, pixels, settings):
    tower = MoveKDVisionModel.from_clip(make_clip(), lora_rank=4, lora_dropout=0.0, **settings)
    with torch.no_grad():
        for layer in tower.encoder.layers:
            layer.mlp.router.weight.mul_(20)  # the experts share the tokens, so that each gets some
    tower.train()
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
    indices = torch.cat(tower(pixels, output_expert_indices=True).expert_indices)
    assert len(indices.unique()) == tower.config.num_experts
    task_loss(tower, pixels).backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())
    # With B = 0 nothing reaches A or, but for the biases' share, the router: B itself moves
    assert not any(parameter.grad.any() for parameter in mole(tower, "weight_a").values())
    assert all(parameter.grad.any() for parameter in mole(tower, "weight_b").values())
    optimizer.step()
    optimizer.zero_grad()
    task_loss(tower, pixels).backward()
    silent = {name for name, parameter in tower.named_parameters() if not parameter.grad.any()}
    # One expert is always chosen with probability 1, and a key's bias shifts all scores of a query alike
    expected = set(mole(tower, "router")) if tower.config.num_experts == 1 else set()
    assert {name for name in silent if not name.endswith("k_proj.bias")} == expected


def test_an_expert_without_tokens_gets_a_zero_gradient(make_tower, pixels):
    tower = make_tower()
    with torch.no_grad():
        for layer in tower.encoder.layers:
            layer.mlp.router.bias.copy_(torch.tensor([0.0, 50.0, -50.0]))
    task_loss(tower, pixels).backward()
    for layer in tower.encoder.layers:
        gradient = layer.mlp.fc1_experts.weight_a.grad.unflatten(0, (3, 4))
        assert gradient[1].any() and not gradient[0].any() and not gradient[2].any()


def test_dropout_is_active_in_training_only(make_tower, pixels):
    tower = make_tower(lora_dropout=0.5)
    assert torch.equal(tower(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    tower.train()
    assert not torch.equal(tower(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    tower = make_tower(lora_dropout=0.0)
    expected, state = tower(pixels).last_hidden_state, torch.get_rng_state()
    tower.train()
    assert torch.equal(tower(pixels).last_hidden_state, expected) and torch.equal(torch.get_rng_state(), state)
    assert tower.encoder.layers[0].mlp.fc1_experts.dropout(pixels) is pixels


def test_dropout_takes_inputs_of_each_token_by_themselves(make_tower):
    """With as many ranks as channels and A the identity, the ranks are the inputs that were kept, scaled."""
    tower = make_tower(lora_dropout=0.5, lora_rank=32, lora_alpha=32.0, num_experts=1).train()
    experts = tower.encoder.layers[0].mlp.fc1_experts
    with torch.no_grad():
        experts.weight_a.copy_(torch.eye(32))
        ranks, _ = experts.down_project(torch.ones(40, 5, 32), torch.ones(40, 5, 1))
    assert sorted(ranks.unique().tolist()) == [0, 2] and abs(ranks.mean() - 1) < 0.1
    assert len(ranks.flatten(0, 1).unique(dim=0)) > 190


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_activation_is_the_quick_gelu_of_transformers(dtype):
    hidden = (5 * torch.randn(64, 33)).to(dtype).requires_grad_()
    expected = hidden.detach().clone().requires_grad_()
    output, reference = QuickGELU()(hidden), QuickGELUActivation()(expected)
    assert torch.equal(output, reference)
    weight = torch.randn(64, 33, dtype=dtype)
    (output * weight).sum().backward()
    (reference * weight).sum().backward()
    tolerance = {"atol": 0.1, "rtol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(hidden.grad, expected.grad, **tolerance)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(QuickGELU(), hidden)


def test_gradients_of_a_wide_input_are_summed_in_place(make_tower):
    """A new wide tensor for each sum or activation is what a step loses over its products."""
    mlp = make_tower(lora_dropout=0.0).encoder.layers[0].mlp.train()
    output = mlp(torch.randn(2, 5, 32, requires_grad=True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        output.sum().backward()
    wide = [10, mlp.fc1.out_features]
    added = [
        event.name for event in profiler.events() if event.input_shapes[:2] == [wide, wide] and "add" in event.name
    ]
    assert added == ["aten::add_"]


def test_what_hooks_see_of_a_layer_is_left_as_it_was(make_tower):
    """The experts are added into a layer's product in place only where nobody else holds it."""
    mlp, plain = make_tower().encoder.layers[0].mlp, make_tower().encoder.layers[0].mlp
    hidden, seen = torch.randn(2, 17, 32), []
    mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    mlp.fc2.register_full_backward_hook(lambda module, inputs, outputs: None)
    output = mlp(hidden)
    assert torch.equal(output, plain(hidden))
    assert torch.equal(seen[0], mlp.fc1(hidden.flatten(0, 1)))
    output.sum().backward()
    plain(hidden).sum().backward()
    for name, parameter in mlp.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)


@pytest.mark.parametrize("expert_bias", [False, True])
def test_autocast(make_tower, pixels, expert_bias):
    tower = make_tower(lora_alpha=1.0, expert_bias=expert_bias, lora_dropout=1e-9).train()
    expected = tower(pixels).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        output = tower(pixels).last_hidden_state
    assert nn.functional.cosine_similarity(output.float(), expected, dim=-1).mean() > 0.99
    output.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in tower.parameters())


def test_names_do_not_look_like_adapters(make_tower):
    """PEFT finds its own parameters by `lora_` and wraps `nn.Linear`: it must see neither in the mixture."""
    tower = make_tower(expert_bias=True)
    assert not any("lora_" in name for name, _ in tower.named_parameters())
    for layer in tower.encoder.layers:
        for part in (layer.mlp.router, layer.mlp.fc1_experts, layer.mlp.fc2_experts):
            assert not any(isinstance(module, nn.Linear) for module in part.modules())


# --- Configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("num_experts", -1, "0 .*or more"),
        ("lora_rank", 0, "at least 1"),
        ("lora_dropout", 1.0, r"\[0, 1\)"),
        ("lora_dropout", -0.1, r"\[0, 1\)"),
        ("router_gradient", "gumbel", "straight_through.*none"),
        ("expert_init", "ones", "zero.*kaiming"),
    ],
)
def test_bad_values_name_value_and_choices(make_clip, name, value, choices):
    with pytest.raises(ValueError, match=f"(?s){name}.*{choices}") as error:
        MoveKDVisionConfig(**{name: value})
    assert str(value) in str(error.value)
    with pytest.raises(ValueError, match=name):
        MoveKDVisionModel.from_clip(make_clip(), **{name: value})


@pytest.mark.parametrize(("name", "value"), [("num_experts", 2.5), ("lora_alpha", "big"), ("dense_routing", "yes")])
def test_bad_types_name_value_and_type(name, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"(?s){name}.*expected.*{value}"):
        MoveKDVisionConfig(**{name: value})


def test_a_value_made_bad_later_is_not_saved(tmp_path):
    config = MoveKDVisionConfig()
    config.expert_init = "ones"
    with pytest.raises(StrictDataclassError, match="'ones'.*'zero', 'kaiming'"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_bad_aspect_ratio_names_value_and_choices():
    with pytest.raises(ValueError, match="(?s)image_aspect_ratio.*pad.*anyres") as error:
        MoveKDConfig(image_aspect_ratio="square")
    assert "square" in str(error.value)


def test_configurations_survive_their_file(tmp_path):
    config = MoveKDConfig(
        vision_config={"num_experts": 5, "router_gradient": "none", "expert_init": "kaiming", "lora_alpha": 2},
        text_config={"model_type": "qwen3", "hidden_size": 64},
        image_aspect_ratio="anyres",
    )
    config.save_pretrained(tmp_path)
    loaded = MoveKDConfig.from_pretrained(tmp_path)
    assert isinstance(loaded.vision_config, MoveKDVisionConfig)
    assert loaded.text_config.model_type == "qwen3" and loaded.image_aspect_ratio == "anyres"
    for name in ("num_experts", "router_gradient", "expert_init", "lora_alpha"):
        assert getattr(loaded.vision_config, name) == getattr(config.vision_config, name)
    vision = MoveKDVisionConfig.from_pretrained(tmp_path)
    assert vision.num_experts == 5, "the tower's part of a whole model's configuration"


def test_default_configuration_is_the_paper_at_full_size():
    vision = MoveKDConfig().vision_config
    assert (vision.num_experts, vision.lora_rank, vision.lora_alpha, vision.lora_dropout) == (3, 32, 1.0, 0.05)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (1024, 23, 336, 14)
    with torch.device("meta"):
        tower = MoveKDVisionModel(vision)
    layers = tower.encoder.layers
    mixture = sum(parameter.numel() for parameter in (mole(tower, "expert") | mole(tower, "router")).values())
    assert mixture == len(layers) * (3 * 2 * 32 * (1024 + 4096) + 3 * 1024 + 3)
