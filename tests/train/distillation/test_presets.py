"""The presets of other published recipes, against their losses written from the papers in float64."""

import pytest
import torch
from torch import nn

from tests.helpers.distillers import GRID, SUMMARY_WIDTHS, TEACHERS, make_distiller, make_features, make_student
from train.config import PRESETS
from train.distillation.heads import StudentHead
from train.teachers.features import TeacherFeatures


def cosine(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    product = (predicted * target).sum(dim=-1)
    return 1 - product / (predicted.square().sum(dim=-1) * target.square().sum(dim=-1)).sqrt()


def smooth_l1(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    error = (predicted - target).abs()
    return torch.where(error < 1, error.square() / 2, error - 0.5).mean(dim=-1)


LOSSES = {
    "mse": lambda predicted, target: (predicted - target).square().mean(dim=-1),
    "cosine": cosine,
    "90% cosine": lambda *tensors: 0.9 * cosine(*tensors) + 0.1 * smooth_l1(*tensors),
    "50% cosine": lambda *tensors: 0.5 * cosine(*tensors) + 0.5 * smooth_l1(*tensors),
}


def normalized(head: StudentHead, values: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """The sample's statistics, computed anew; the rotation of PHI-S has tests of its own."""
    values, sample = values.double(), sample.double().flatten(0, -2)
    centered = values - sample.mean(dim=0)
    if head.feature_normalization == "phi_s":
        return centered @ head.components.double().T
    return centered / sample.var(dim=0, correction=0).sqrt()


def predicted(head: StudentHead, features: torch.Tensor) -> torch.Tensor:
    wide, _, narrow = head.head
    hidden = features.double() @ wide.weight.double().T + wide.bias.double()
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ narrow.weight.double().T + narrow.bias.double()


@pytest.mark.parametrize(
    ("preset", "of_patches", "of_summary", "scale"),
    [
        ("radio", "mse", "cosine", 1.0),
        ("eupe", "90% cosine", "cosine", 1.0),
        ("unic", "50% cosine", "50% cosine", 0.5),
        ("theia", "90% cosine", None, 1.0),
    ],
)
def test_the_loss_of_the_paper_written_out(preset: str, of_patches: str, of_summary: str | None, scale: float) -> None:
    distiller, student, features = make_distiller(preset).eval(), make_student(), make_features()
    summary, sample, terms = make_student(seed=5)[:, 0], make_features(16, seed=7), []
    for name in TEACHERS:
        head, of_teacher = distiller[name], features[name]
        maps = predicted(head, student).transpose(1, 2).unflatten(2, GRID)
        larger = tuple(max(sides) for sides in zip(GRID, of_teacher.grid, strict=True))
        maps = nn.functional.interpolate(maps, larger, mode="bilinear", align_corners=False)
        target = normalized(head, of_teacher.tokens, sample[name].tokens)
        term = LOSSES[of_patches](maps.flatten(2).transpose(1, 2), target).mean(dim=1)
        if of_summary and name in SUMMARY_WIDTHS:
            target = normalized(head.summary, of_teacher.summary, sample[name].summary)
            term = term + LOSSES[of_summary](predicted(head.summary, summary), target)
        terms.append(scale * term)
    output = distiller(student, features, student_summary=summary)
    found = PRESETS[preset]["lambda_kd"] * output.loss
    torch.testing.assert_close(found.double(), torch.stack(terms).mean(dim=0), rtol=1e-4, atol=1e-5)
    assert distiller.teacher_dropping == (0.5 if preset == "unic" else 0)


def test_summaries_are_predicted_from_the_students_and_named_beside_their_teacher() -> None:
    distiller, features = make_distiller("paper", summary_heads=True), make_features()
    student, summary = make_student().requires_grad_(), make_student(seed=5)[:, 0].requires_grad_()
    output = distiller(student, features, student_summary=summary)
    assert distiller.loss_names == ["clip", "eva", "sam", "clip/summary", "eva/summary"]
    plain = make_distiller("paper")(student, features)
    for name in TEACHERS:
        of_summary = output.summary_losses.get(name, torch.zeros(4))
        assert (name in output.summary_losses) == (name != "sam")
        torch.testing.assert_close(output.teacher_losses[name], plain.teacher_losses[name] + of_summary)
    output.loss.sum().backward()
    assert summary.grad.any() and all(value.grad.any() for value in distiller.parameters())


@pytest.mark.parametrize("normalization", ["standardize", "whiten", "phi_s"])
def test_statistics_of_summaries_are_their_own(normalization: str, tmp_path) -> None:
    distiller = make_distiller("radio", feature_normalization=normalization).eval()
    sample = make_features(16, seed=7)["eva"].summary.unsqueeze(1)
    target = distiller["eva"].summary.target(sample).squeeze(1)
    torch.testing.assert_close(target.mean(dim=0), torch.zeros(target.shape[1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.var(dim=0, correction=0).mean(), torch.tensor(1.0), rtol=1e-4, atol=0)
    distiller.save(tmp_path / "distiller.safetensors")
    other = make_distiller("radio", feature_normalization=normalization, summary_widths=SUMMARY_WIDTHS).eval()
    torch.nn.init.zeros_(other["eva"].summary.mean)
    other.load(tmp_path / "distiller.safetensors")
    assert torch.equal(other["eva"].summary.mean, distiller["eva"].summary.mean)


def test_summaries_that_are_missing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"none of the teachers \['clip', 'eva', 'sam'\] has a \[CLS\] token"):
        make_distiller("radio", summary_widths={})
    distiller, student, features = make_distiller("radio"), make_student(), make_features()
    with pytest.raises(ValueError, match="no `student_summary` was given"):
        distiller(student, features)
    for summary, found in ((None, "no summary"), (torch.ones(4, 3), r"\(4, 3\)")):
        changed: dict[str, TeacherFeatures] = features | {"eva": features["eva"]._replace(summary=summary)}
        with pytest.raises(ValueError, match=f"eva gave {found}; the head of its summary was built for 20"):
            distiller(student, changed, student_summary=student[:, 0])


def test_teachers_share_equally_if_clip_has_no_share_of_its_own() -> None:
    for teachers in (TEACHERS, {"clip": TEACHERS["clip"]}):
        distiller = make_distiller("theia", teachers)
        output = distiller(make_student(), make_features(teachers=teachers))
        for share in output.teacher_weights.values():
            torch.testing.assert_close(share, torch.full((4,), 1 / len(teachers)))


def test_a_student_of_another_grid_is_compared_on_the_same_targets() -> None:
    distiller, features = make_distiller("theia"), make_features()
    student = make_student()
    maps = student.transpose(1, 2).unflatten(2, GRID)
    larger = nn.functional.interpolate(maps, (8, 12), mode="nearest").flatten(2).transpose(1, 2)
    output = distiller(larger, features, student_grid=(8, 12))
    for name in TEACHERS:  # nearest neighbors of (4, 6) cells, averaged over them, are the cells again
        prediction, target = distiller[name](larger, features[name].tokens, (8, 12))
        assert prediction.shape == target.shape
        assert torch.equal(target, distiller[name](student, features[name].tokens)[1])
    assert output.loss.isfinite().all()
    with pytest.raises(ValueError, match="gave 96 tokens.*24"):
        distiller(larger, features)
    paper = make_distiller("paper")
    with pytest.raises(ValueError, match=r"grid \(8, 12\) in this step, but with `head_side` 'teacher'"):
        paper(larger, features, student_grid=(8, 12))
