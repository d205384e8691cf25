"""
No step waits for the device. Tower, distiller and losses run forward and backward on the meta device, whose tensors
have no values, so that `.item()`, `.cpu()`, and a branch or a shape that depends on a value raise.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from modeling_movekd import MoveKDVisionConfig, MoveKDVisionModel
from tests.helpers.distillers import GRID, TEACHERS, WIDTH, make_distiller, make_features
from train.distillation.losses import balance_loss
from train.teachers.features import TeacherFeatures


PRESETS = ("paper", "released", "student_heads", "radio", "unic")
CONFIG = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
    "lora_rank": 4,
}
FEATURES = make_features()
FORMS = [{}, {"dense_routing": True}, {"expert_bias": True, "router_gradient": "none"}]


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.nonzero, bool])
def test_the_meta_device_shows_what_waits(read):
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        read(torch.ones(1, device="meta"))


@pytest.mark.parametrize(
    ("settings", "balance_form", "checkpointing"),
    [(FORMS[0], "per_layer", False), (FORMS[0], "per_layer", True), (FORMS[1], "pooled", False)]
    + [(FORMS[2], "pooled", True)],
    ids=str,
)
def test_tower_and_balance_loss(settings, balance_form, checkpointing):
    with torch.device("meta"):
        tower = MoveKDVisionModel(MoveKDVisionConfig(**CONFIG, **settings)).train()
        pixels = torch.randn(4, 3, 24, 24)
    if checkpointing:
        # The state of the random numbers is not a tensor on the device, and meta has none
        tower.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    outputs = tower(pixels, output_router_probabilities=True, output_expert_indices=True, cls_attention_layer=-1)
    balance = balance_loss(outputs.router_probabilities, outputs.expert_indices, balance_form)
    (outputs.last_hidden_state.square().mean() + balance.sum()).backward()
    experts = {name: value for name, value in tower.named_parameters() if "expert" in name or "router" in name}
    assert experts and all(value.grad.shape == value.shape for value in experts.values())


@pytest.mark.parametrize("settings", FORMS, ids=str)
@torch.no_grad()
def test_folded_tower(settings):
    with torch.device("meta"):
        tower = MoveKDVisionModel(MoveKDVisionConfig(**CONFIG, **settings)).eval()
        pixels = torch.randn(4, 3, 24, 24)
    tower.fold_experts()
    assert tower(pixels).last_hidden_state.shape == (4, 37, WIDTH)


@pytest.mark.parametrize("preset", PRESETS)
def test_distiller(preset):
    """Tensors without values that look like the CPU's, since meta has no autocast. Reading a value raises."""
    distiller = make_distiller(preset)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        with pytest.raises(DataDependentOutputException):
            torch.ones(1).item()
        state = {name: mode.from_tensor(value) for name, value in (distiller.state_dict(keep_vars=True)).items()}
        features = {
            name: TeacherFeatures(
                *(mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in teacher)
            )
            for name, teacher in FEATURES.items()
        }
        tokens = torch.randn(4, GRID[0] * GRID[1], WIDTH, requires_grad=True)
        output = torch.func.functional_call(
            distiller, state, (tokens, features), {"student_summary": tokens.mean(dim=1)}
        )
        assert set(output.teacher_losses) == set(TEACHERS)
        output.loss.mean().backward()
        assert tokens.grad.shape == tokens.shape
