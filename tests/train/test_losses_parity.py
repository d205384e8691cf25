"""Preset `released` against golden numbers of the authors' code: distillation and balance losses, with gradients."""

from pathlib import Path

import pytest
import torch
from parity import assert_gradients, assert_values, cases, read_case, with_prefix

from hub.authors import state_dict_from_authors
from train.config import PRESETS
from train.distillation import Distiller
from train.losses import balance_loss
from train.teachers import TeacherFeatures


pytestmark = pytest.mark.parity

NAMES = {"CLIP": "clip", "SAM": "sam", "EVA": "eva02", "Pix2Struct": "pix2struct", "ConvNeXt": "convnext"}
KNOBS = ("head_side", "feature_normalization", "grid_matching")


def square(count: int) -> tuple[int, int]:
    side = round(count**0.5)
    return (side, side) if side * side == count else (1, count)


def features_of(tensors: dict[str, torch.Tensor], teachers: list[str]) -> dict[str, TeacherFeatures]:
    features = {}
    for teacher in teachers:
        if teacher == "CLIP":
            tokens, cls = tensors["clip.tokens"], tensors["clip.cls_embedding"]
            attention = tensors["clip.attentions_selected_cls_row_per_head"]
        else:
            tokens, cls, attention = tensors[f"raw.{teacher}"], None, None
            tokens = tokens.flatten(2).transpose(1, 2) if tokens.dim() == 4 else tokens
        features[NAMES[teacher]] = TeacherFeatures(tokens, square(tokens.shape[1]), cls, attention)
    return features


def test_distillation_loss(parity_dir: Path) -> None:
    for path in cases(parity_dir, "kd_loss_*.safetensors"):
        tensors, metadata = read_case(path)
        student = tensors["v_token"].clone().requires_grad_()
        features = features_of(tensors, metadata["teachers"])
        distiller = Distiller(
            student.shape[2],
            square(student.shape[1]),
            {name: (value.tokens.shape[2], value.grid) for name, value in features.items()},
            token_weighting="released" if metadata["token_weight"] else "none",
            teacher_weighting="released" if metadata["teacher_weight"] else "equal",
            clip_share=metadata["kd_memory_w"],
            **{knob: PRESETS["released"][knob] for knob in KNOBS},
        )
        authors = state_dict_from_authors(with_prefix(tensors, "param."))
        distiller.load_state_dict(with_prefix(authors, "distiller."), strict=True)

        output = distiller(student, features)
        loss = metadata["kd_w"] * output.loss.mean()
        loss.backward()

        for index, teacher in enumerate(metadata["teachers"]):
            name = NAMES[teacher]
            if teacher != "CLIP":
                assert_values(distiller[name](student, features[name].tokens)[1], tensors[f"adapted.{teacher}"], teacher)
            assert_values(
                output.teacher_losses[name], tensors["teacher_loss"][:, index], f"{path.name} {teacher} loss"
            )
            if "teacher_weight" in tensors:
                share = tensors["teacher_weight"][:, index]
                assert_values(output.teacher_weights[name], share, f"{path.name} {teacher} weight")
        torch.testing.assert_close(loss, tensors["kd_loss"], rtol=1e-5, atol=0)
        gradients = {f"distiller.{name}": value.grad for name, value in distiller.named_parameters()}
        expected = state_dict_from_authors(with_prefix(tensors, "grad."))
        assert_gradients({"v_token": student.grad}, {"v_token": expected.pop("v_token")})
        assert_gradients(gradients, expected, tolerance=3e-4)
        assert gradients.keys() == expected.keys()


def test_token_weights(parity_dir: Path) -> None:
    from train.losses import token_weights

    for path in cases(parity_dir, "kd_loss_*.safetensors"):
        tensors, metadata = read_case(path)
        if metadata["token_weight"]:
            weights = token_weights(tensors["clip.attentions_selected_cls_row_per_head"], "released")
            assert_values(weights, tensors["token_weight"], path.name)


def test_balance_loss(parity_dir: Path) -> None:
    for path in cases(parity_dir, "balance_loss*.safetensors"):
        tensors, _ = read_case(path)
        probabilities = tensors["routing_probs"].clone().requires_grad_()
        indices = tensors["expert_index"].long()
        loss = balance_loss(tuple(probabilities), tuple(indices), PRESETS["released"]["balance_form"]).mean()
        loss.backward()
        torch.testing.assert_close(loss, tensors["balancing_loss"], rtol=1e-5, atol=0)
        assert_gradients({"p": probabilities.grad}, {"p": tensors["grad.routing_probs"]})
