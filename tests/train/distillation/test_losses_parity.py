"""Preset `released` against golden numbers of the original code: distillation and balance losses, with gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.original_weights import state_dict_from_original
from tests.helpers.parity import assert_gradients, assert_values, cases, read_case, with_prefix
from train.config import PRESETS
from train.distillation.distiller import DistillationOutput, Distiller
from train.distillation.losses import balance_loss, teacher_scores, token_weights
from train.teachers.features import TeacherFeatures


pytestmark = pytest.mark.parity

NAMES = {"CLIP": "clip", "SAM": "sam", "EVA": "eva02", "Pix2Struct": "pix2struct", "ConvNeXt": "convnext"}
OPTIONS = ("head_side", "feature_normalization", "grid_matching")
# Gradients of the adapters through the teacher weights partly cancel
ADAPTER_TOLERANCE = 3e-4


def square(count: int) -> tuple[int, int]:
    side = round(count**0.5)
    return (side, side) if side * side == count else (1, count)


def features_of(
    tensors: dict[str, torch.Tensor], teachers: list[str], clip: str, attention: torch.Tensor
) -> dict[str, TeacherFeatures]:
    """The teachers' features, from maps if they have a grid, and from tokens otherwise."""
    features = {}
    for teacher in teachers:
        if teacher == "CLIP":
            tokens, cls = tensors[f"{clip}.tokens"], tensors[f"{clip}.cls_embedding"]
            features["clip"] = TeacherFeatures(tokens, square(tokens.shape[1]), cls, attention)
        elif (raw := tensors[f"raw.{teacher}"]).dim() == 4:
            features[NAMES[teacher]] = TeacherFeatures(raw.flatten(2).transpose(1, 2), tuple(raw.shape[2:]))
        else:
            features[NAMES[teacher]] = TeacherFeatures(raw, square(raw.shape[1]))
    return features


def released_distiller(
    metadata: dict[str, Any],
    student: torch.Tensor,
    features: dict[str, TeacherFeatures],
    parameters: dict[str, torch.Tensor],
) -> Distiller:
    distiller = Distiller(
        student.shape[2],
        square(student.shape[1]),
        {name: (value.tokens.shape[2], value.grid) for name, value in features.items()},
        token_weighting="released" if metadata["token_weight"] else "none",
        teacher_weighting="released" if metadata["teacher_weight"] else "equal",
        clip_share=metadata["kd_memory_w"],
        **{name: PRESETS["released"][name] for name in OPTIONS},
    )
    distiller.load_state_dict(with_prefix(state_dict_from_original(parameters), "distiller."), strict=True)
    return distiller


def assert_output(output: DistillationOutput, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    for index, teacher in enumerate(metadata["teachers"]):
        loss, share = output.teacher_losses[NAMES[teacher]], output.teacher_weights[NAMES[teacher]]
        assert_values(metadata["kd_w"] * loss, tensors["teacher_loss_times_kd_w"][:, index], f"{teacher} loss")
        assert_values(share, tensors["teacher_weight"][:, index], f"{teacher} weight")
    loss = metadata["kd_w"] * output.loss.mean()
    torch.testing.assert_close(loss, tensors["kd_loss"], rtol=1e-5, atol=0)


def test_distillation_loss(parity_dir: Path) -> None:
    fired = set()
    for path in cases(parity_dir, "kd_loss_*.safetensors"):
        tensors, metadata = read_case(path)
        teachers = metadata["teachers"]
        student = tensors["v_token"].clone().requires_grad_()
        features = features_of(tensors, teachers, "clip", tensors["clip.attentions_selected_cls_row_per_head"])
        distiller = released_distiller(metadata, student, features, with_prefix(tensors, "param."))

        targets = {name: distiller[name](student, features[name].tokens)[1].detach() for name in features}
        scores = teacher_scores(features["clip"].cls, targets)
        for index, teacher in enumerate(teachers):
            name = NAMES[teacher]
            expected = tensors["clip.tokens"] if teacher == "CLIP" else tensors[f"adapted.{teacher}"]
            assert_values(targets[name], expected, f"{path.name} {teacher} adapted")
            errors = (student.detach() - targets[name]).square().mean(dim=-1)
            assert_values(errors, tensors["per_token_mse"][..., index], f"{path.name} {teacher} error")
        # A tolerance for the whole tensor, since the scores are sums that partly cancel
        assert_values(torch.stack(list(scores.values()), dim=1), tensors["teacher_score"], f"{path.name} score")

        output = distiller(student, features)
        assert_output(output, tensors, metadata)
        teacher_loss = torch.stack(list(output.teacher_losses.values()), dim=1)
        assert_values(teacher_loss, tensors["teacher_loss"], f"{path.name} loss")
        (metadata["kd_w"] * output.loss.mean()).backward()
        expected = state_dict_from_original(with_prefix(tensors, "grad."))
        assert_gradients({"v_token": student.grad}, {"v_token": expected.pop("v_token")})
        gradients = {f"distiller.{name}": value.grad for name, value in distiller.named_parameters()}
        assert_gradients(gradients, expected, tolerance=ADAPTER_TOLERANCE)
        assert gradients.keys() == expected.keys()
        fired.add(metadata["dominant_branch_fired"])
    assert True in fired, "no case takes the branch of a dominant teacher"


def test_token_weights(parity_dir: Path) -> None:
    for path in cases(parity_dir, "kd_loss_*.safetensors"):
        tensors, _ = read_case(path)
        attention = tensors["clip.attentions_selected_cls_row_per_head"]
        assert_values(attention.mean(dim=1), tensors["clip.attention_cls_row_mean"], path.name)
        assert_values(token_weights(attention, "released"), tensors["token_weight"], path.name)


def test_distillation_loss_of_a_training_step(parity_dir: Path) -> None:
    """The same in a step of the whole model, where only this loss reaches the adapters."""
    tensors, metadata = read_case(parity_dir / "checkpoint" / "stage1_step.safetensors")
    state = load_file(parity_dir / "checkpoint" / "stage1_state.safetensors")
    parameters = {key: value for key, value in state.items() if "_adapter_" in key}
    attention = tensors["clip_teacher.cls_attention_row_head_mean"].unsqueeze(1)
    features = features_of(tensors, metadata["teachers"], "clip_teacher", attention)
    distiller = released_distiller(metadata, tensors["v_token"], features, parameters)

    output = distiller(tensors["v_token"], features)
    assert_output(output, tensors, metadata)
    assert_values(token_weights(attention, "released"), tensors["token_weight"], "token weight")
    (metadata["kd_w"] * output.loss.mean()).backward()
    expected = {key: value for key, value in with_prefix(tensors, "grad.").items() if "_adapter_" in key}
    assert expected
    gradients = {f"distiller.{name}": value.grad for name, value in distiller.named_parameters()}
    assert_gradients(gradients, state_dict_from_original(expected), tolerance=ADAPTER_TOLERANCE)


def test_balance_loss(parity_dir: Path) -> None:
    for path in cases(parity_dir, "balance_loss*.safetensors"):
        tensors, _ = read_case(path)
        probabilities = tensors["routing_probs"].clone().requires_grad_()
        indices = tensors["expert_index"].long()
        loss = balance_loss(tuple(probabilities), tuple(indices), PRESETS["released"]["balance_form"]).mean()
        loss.backward()
        torch.testing.assert_close(loss, tensors["balancing_loss"], rtol=1e-5, atol=0)
        assert_gradients({"p": probabilities.grad}, {"p": tensors["grad.routing_probs"]})
