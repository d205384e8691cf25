"""The distiller: the loss of each preset, its gradients, its file, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.helpers.distillers import (
    GRID,
    SUMMARY_WIDTHS,
    TEACHERS,
    WIDTH,
    compare,
    images,
    make_distiller,
    make_features,
    make_student,
)
from train.build import DISTILLER_OPTIONS
from train.config import PRESETS
from train.distillation.distiller import NUM_PARTS, DistillationOutput, Distiller
from train.distillation.losses import teacher_weights, token_losses, token_weights
from train.teachers.features import TeacherFeatures


STUDENT_SIDE = {"head_side": "student", "grid_matching": "resample", "teacher_weighting": "equal"}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_loss_is_the_weighted_sum_over_teachers(preset: str) -> None:
    output = compare(make_distiller(preset), make_student(), make_features())
    assert isinstance(output, DistillationOutput)
    total = sum(output.teacher_weights[name] * output.teacher_losses[name] for name in TEACHERS)
    torch.testing.assert_close(output.loss, total)
    assert output.loss.shape == (4,) and output.loss.dtype == torch.float32 and output.loss.requires_grad
    assert list(output.teacher_losses) == list(output.teacher_weights) == list(TEACHERS)
    assert not any(
        value.requires_grad for value in (*output.teacher_losses.values(), *output.teacher_weights.values())
    )


def test_adapter_and_weights_of_the_paper_written_out() -> None:
    distiller, student, features = make_distiller("paper"), make_student(), make_features()
    output = compare(distiller, student, features)
    attention = features["clip"].cls_attention
    weights = (attention / attention.sum(dim=-1, keepdim=True)).mean(dim=1)
    adapted = {"clip": features["clip"].tokens}
    for name in ("eva", "sam"):
        channels, tokens = distiller[name].channels, distiller[name].tokens
        mixed = torch.einsum("bnc,dc->bnd", features[name].tokens, channels.weight) + channels.bias
        mixed = 0.5 * mixed * (1 + torch.erf(mixed / 2**0.5))
        adapted[name] = torch.einsum("bnd,mn->bmd", mixed, tokens.weight) + tokens.bias[:, None]
    for name, target in adapted.items():
        expected = ((student - target) ** 2).mean(dim=2).mul(weights).sum(dim=1)
        torch.testing.assert_close(output.teacher_losses[name], expected, rtol=1e-4, atol=1e-5)
    scores = [
        (features["clip"].cls[:, None] * adapted[name]).sum(dim=2).mean(dim=1) / WIDTH**0.5 for name in ("eva", "sam")
    ]
    shares = 0.2 * torch.stack(scores, dim=1).softmax(dim=1)
    torch.testing.assert_close(output.teacher_weights["eva"], shares[:, 0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.teacher_weights["clip"], torch.full((4,), 0.8))


def test_student_head_written_out() -> None:
    distiller, student, features = make_distiller("student_heads", head_form="mlp"), make_student(), make_features()
    output = compare(distiller, student, features)
    weights = token_weights(features["clip"].cls_attention, distiller.token_weighting)
    for name in TEACHERS:
        wide, _, narrow = distiller[name].head
        assert (wide.in_features, wide.out_features, narrow.out_features) == (WIDTH, 2 * WIDTH, 8)
        predicted = narrow(nn.functional.gelu(wide(student)))
        expected = (
            ((predicted - distiller[name].target(features[name].tokens)) ** 2).mean(dim=2).mul(weights).sum(dim=1)
        )
        torch.testing.assert_close(output.teacher_losses[name], expected)
        torch.testing.assert_close(output.teacher_weights[name], torch.full((4,), 0.2 if name == "clip" else 0.4))


def test_unit_heads_amplify_nothing() -> None:
    distiller = make_distiller("student_heads", head_form="unit_linear")
    student, features = make_student(), make_features()
    before = compare(distiller, student, features)
    head = distiller["eva"].head
    expected = student @ (head.weight / head.weight.norm(dim=1, keepdim=True)).T + head.bias
    torch.testing.assert_close(distiller["eva"](student, features["eva"].tokens)[0], expected)
    with torch.no_grad():
        head.weight.mul_(5)
    torch.testing.assert_close(compare(distiller, student, features).loss, before.loss)
    # A unit head's output for faint tokens is as faint; an MLP could amplify it
    faint = 0.01 * student
    spread = distiller["eva"](faint, features["eva"].tokens)[0].var(dim=(0, 1)).sqrt()
    assert (spread <= faint.flatten(0, 1).T.cov().trace().sqrt()).all()
    compare(distiller, student, features).loss.sum().backward()
    assert all(value.grad.any() for value in distiller.parameters())
    # The gradient turns the weight rows, and does not lengthen them
    lengthening = (head.weight.grad * head.weight).sum(dim=1).abs().max()
    assert lengthening < 1e-4 * head.weight.grad.norm() * head.weight.norm()


@pytest.mark.parametrize("loss", ["cosine", "smooth_l1", "cosine_smooth_l1"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_loss_works_with_every_preset(preset: str, loss: str) -> None:
    distiller, student, features = make_distiller(preset, distillation_loss=loss), make_student(), make_features()
    output = compare(distiller, student.requires_grad_(), features)
    # The other options of the preset hold: weights of tokens and teachers
    predicted, target = distiller["sam"](student, features["sam"].tokens)
    errors = token_losses(predicted, target, loss, PRESETS[preset]["cosine_share"])
    expected = errors.mean(dim=1)
    if distiller.token_weighting != "none":
        weights = token_weights(features["clip"].cls_attention, distiller.token_weighting)
        expected = (weights * errors).sum(dim=1) + (expected if preset == "released" else 0)
    torch.testing.assert_close(output.teacher_losses["sam"], expected.detach())
    output.loss.sum().backward()
    assert student.grad is not None and student.grad.any()
    assert all(value.grad is not None and value.grad.any() for value in distiller.parameters())


def test_dropped_teachers_leave_their_weight_to_the_others_in_training_alone() -> None:
    distiller, student, features = make_distiller(teacher_dropping=0.5), make_student(64), make_features(64)
    whole = compare(make_distiller(), student, features)
    torch.testing.assert_close(compare(distiller.eval(), student, features).loss, whole.loss)
    output = compare(distiller.train(), student, features)
    losses, shares = (torch.stack(list(values.values())) for values in (output.teacher_losses, output.teacher_weights))
    torch.testing.assert_close(losses, torch.stack(list(whole.teacher_losses.values())))
    torch.testing.assert_close(shares.sum(dim=0), torch.ones(64))
    assert (shares.gather(0, losses.argmax(dim=0)[None]) > 0).all()
    dropped = (shares == 0).sum(dim=0)
    assert set(dropped.tolist()) == {0, 1, 2}
    is_whole = dropped == 0
    torch.testing.assert_close(output.loss[is_whole], whole.loss[is_whole])
    torch.testing.assert_close(output.loss, (shares * losses).sum(dim=0))


def test_a_teacher_without_weight_is_not_the_one_that_is_kept() -> None:
    distiller = make_distiller(clip_share=0.0, teacher_dropping=1.0)
    features = make_features(32)
    features["clip"] = features["clip"]._replace(tokens=100 * features["clip"].tokens)
    output = compare(distiller, make_student(32), features)
    assert output.loss.isfinite().all()
    torch.testing.assert_close(output.teacher_weights["eva"] + output.teacher_weights["sam"], torch.ones(32))


@pytest.mark.parametrize("preset", ["paper", "student_heads"])
def test_an_images_loss_does_not_depend_on_its_batch(preset: str) -> None:
    distiller, student, features = make_distiller(preset), make_student(5), make_features(5)
    whole = compare(distiller, student, features)
    for part in (slice(0, 2), slice(2, 5)):
        split = compare(distiller, student[part], images(features, part))
        torch.testing.assert_close(split.loss, whole.loss[part])
        for name in TEACHERS:
            torch.testing.assert_close(split.teacher_losses[name], whole.teacher_losses[name][part])
            torch.testing.assert_close(split.teacher_weights[name], whole.teacher_weights[name][part])


@pytest.mark.parametrize("preset", PRESETS)
def test_gradient_reaches_every_parameter_and_no_teacher(preset: str) -> None:
    distiller, student = make_distiller(preset), make_student().requires_grad_()
    features = make_features()
    for value in features.values():
        for tensor in (value.tokens, value.cls, value.cls_attention):
            if tensor is not None:
                tensor.requires_grad_()
    compare(distiller, student, features).loss.mean().backward()
    assert student.grad is not None and student.grad.any()
    names = {name for name, _ in distiller.named_parameters()}
    options = PRESETS[preset]
    parts = ["head"] if options["head_form"] == "unit_linear" else ["head.0", "head.2"]
    if options["head_side"] == "student":
        modules = [f"{teacher}.{part}" for teacher in TEACHERS for part in parts]
    else:
        modules = [f"{teacher}.{part}" for teacher in ("eva", "sam") for part in ("channels", "tokens")]
    if options["summary_heads"]:
        modules += [f"{teacher}.summary.{part}" for teacher in SUMMARY_WIDTHS for part in parts]
    assert names == {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    for name, parameter in distiller.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    for name, value in features.items():
        assert all(
            tensor is None or tensor.grad is None for tensor in (value.tokens, value.cls, value.cls_attention)
        ), name


@pytest.mark.parametrize(("preset", "flows"), [("paper", False), ("released", True)])
def test_gradient_through_teacher_weights(preset: str, flows: bool) -> None:
    """The paper's teacher weights are detached; in the original code they pass a gradient to the adapters."""
    distiller, student, features = make_distiller(preset), make_student(), make_features()
    parameter = distiller["eva"].channels.weight
    # Small scores, since a saturated softmax has no gradient
    features["clip"] = features["clip"]._replace(cls=0.1 * features["clip"].cls)
    output = compare(distiller, student, features)
    (whole,) = torch.autograd.grad(output.loss.sum(), parameter)

    weights = token_weights(features["clip"].cls_attention, distiller.token_weighting)
    weights = weights + 1 / weights.shape[1] if preset == "released" else weights
    _, adapted = distiller["eva"](student, features["eva"].tokens)
    loss = ((student - adapted) ** 2).mean(dim=2).mul(weights).sum(dim=1) * output.teacher_weights["eva"]
    (fixed,) = torch.autograd.grad(loss.sum(), parameter)
    difference = (whole - fixed).abs().max() / whole.abs().max()
    assert difference > 1e-3 if flows else difference < 1e-5


@pytest.mark.parametrize("preset", PRESETS)
def test_every_form_runs_without_waiting_for_the_device(preset: str) -> None:
    """A forward that read a value could not be captured as one graph."""
    distiller, student, features = make_distiller(preset).eval(), make_student(), make_features()
    compiled = torch.compile(distiller, fullgraph=True, backend="eager")
    torch.testing.assert_close(compare(compiled, student, features).loss, compare(distiller, student, features).loss)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_large_features_pass_in_parts_with_the_same_result(
    preset: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch passes in parts, some of them empty, and is recomputed in the backward."""
    found = []
    for largest in (2**19, 0):
        monkeypatch.setattr("train.distillation.distiller.LARGE_FEATURES", largest)
        distiller, student = make_distiller(preset), make_student(batch_size).requires_grad_()
        calls: list[int] = []
        distiller["sam"].register_forward_pre_hook(lambda module, inputs, calls=calls: calls.append(len(inputs[1])))
        output = compare(distiller, student, make_features(batch_size))
        output.loss.mean().backward()
        gradients = {name: parameter.grad for name, parameter in distiller.named_parameters()}
        found.append((output._asdict(), gradients | {"student": student.grad}))
    assert sum(calls) == 2 * batch_size and len(calls) == 2 * NUM_PARTS
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_half_precision_is_close(preset: str) -> None:
    distiller, student, features = make_distiller(preset), make_student(), make_features()
    exact = compare(distiller, student, features)
    rounded = {
        name: TeacherFeatures(*(x.bfloat16() if isinstance(x, torch.Tensor) else x for x in value))
        for name, value in features.items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [compare(distiller, student, features), compare(distiller, student.bfloat16(), rounded)]
    outputs += [compare(distiller, student, rounded), compare(distiller.bfloat16(), student.bfloat16(), rounded)]
    for output in outputs:
        assert output.loss.dtype == torch.float32
        for name in TEACHERS:
            torch.testing.assert_close(output.teacher_losses[name], exact.teacher_losses[name], rtol=0.05, atol=0.02)


def test_teachers_without_clip() -> None:
    teachers = {name: value for name, value in TEACHERS.items() if name != "clip"}
    for preset, options in PRESETS.items():
        weighted = {} if options["token_weighting"] != "none" else {"token_weighting": "cls_attention"}
        weighted |= {"grid_matching": "resample"} if options["grid_matching"] == "upsample" else {}
        with pytest.raises(ValueError, match=r"'clip'; there are only \['eva', 'sam'\].*'none' and 'equal'"):
            make_distiller(preset, teachers, **weighted)
        distiller = make_distiller(preset, teachers, token_weighting="none", teacher_weighting="equal").eval()
        output = compare(distiller, make_student(), make_features(teachers=teachers))
        assert all(torch.equal(share, torch.full((4,), 0.5)) for share in output.teacher_weights.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_clip_alone_has_all_the_weight(preset: str, tmp_path: Path) -> None:
    teachers = {"clip": TEACHERS["clip"]}
    distiller = make_distiller(preset, teachers, teacher_dropping=0.0)
    output = compare(distiller, make_student(), make_features(teachers=teachers))
    assert torch.equal(output.teacher_weights["clip"], torch.ones(4)) and output.loss.all()
    distiller.save(tmp_path / "distiller.safetensors")
    distiller.load(tmp_path / "distiller.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_side": "both"}, "`head_side` is 'both', expected one of"),
        ({"head_form": "linear"}, "`head_form` is 'linear'"),
        ({"head_form": "unit_linear"}, "adapters, which have no other form"),
        ({"feature_normalization": "zca"}, "`feature_normalization` is 'zca'"),
        ({"grid_matching": "crop"}, "`grid_matching` is 'crop'"),
        ({"token_weighting": "attention"}, "`token_weighting` is 'attention'"),
        ({"teacher_weighting": "attention"}, "`teacher_weighting` is 'attention'"),
        ({"clip_share": 1.5}, "`clip_share` is 1.5"),
        ({"whitening_components": 0}, "`whitening_components` is 0"),
        ({"teachers": {}}, "no teachers"),
        ({"teachers": TEACHERS | {"forward": (4, GRID)}}, "'forward'"),
        ({"teachers": TEACHERS | {"vit.large": (4, GRID)}}, "'vit.large'"),
        ({"teachers": TEACHERS | {"clip": (32, GRID)}}, "width 32.*the student 16"),
        ({"teachers": TEACHERS | {"clip": (WIDTH, (2, 2))}}, r"\(2, 2\).*\(4, 6\)"),
        (STUDENT_SIDE | {"teachers": TEACHERS | {"clip": (32, (2, 2))}}, r"attention cannot weigh.*'none'"),
        (STUDENT_SIDE | {"grid_matching": "learned"}, "'resample' or 'upsample' and `teacher_weighting` 'equal'"),
        ({"grid_matching": "upsample"}, "only heads on the student.*'resample'"),
        (STUDENT_SIDE | {"grid_matching": "upsample"}, "its tokens have no weights.*'none'"),
        ({"distillation_loss": "l2"}, "`distillation_loss` is 'l2'"),
        ({"cosine_share": -0.1}, "`cosine_share` is -0.1"),
        ({"teacher_dropping": 1.1}, "`teacher_dropping` is 1.1"),
        ({"teacher_dropping": 0.5, "teachers": {"clip": (WIDTH, GRID)}}, "the only teacher.*Set it to 0"),
        (STUDENT_SIDE | {"teacher_weighting": "cls_similarity"}, "got 'resample' and 'cls_similarity'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distiller(**{"student_width": WIDTH, "student_grid": GRID, "teachers": TEACHERS, **options})


@pytest.mark.parametrize("preset", PRESETS)
def test_inputs_that_do_not_fit_are_refused_with_both_numbers(preset: str) -> None:
    distiller, student, features = make_distiller(preset), make_student(), make_features()

    def refused(message: str, student: torch.Tensor = student, **changed: TeacherFeatures) -> None:
        with pytest.raises(ValueError, match=message):
            compare(distiller, student, features | changed)

    refused("student gave 23 tokens of width 16.*24", student[:, 1:])
    refused("24 tokens of width 15.*width 16", student[..., 1:])
    refused("eva saw 4 images, the student 3|clip saw 4 images, the student 3", student[:3])
    larger = {"eva": TEACHERS["eva"], "sam": (24, (10, 14))}
    refused(r"sam gave 140 tokens.*\(10, 14\).*35 on \(5, 7\)", sam=make_features(teachers=larger)["sam"])
    refused(r"eva gave 96 tokens.*\(12, 8\).*96 on \(8, 12\)", eva=features["eva"]._replace(grid=(12, 8)))
    wider = features["eva"]._replace(tokens=torch.ones(4, 96, 13))
    refused("eva.*width 13.*width 12", eva=wider)
    if PRESETS[preset]["token_weighting"] != "none":
        refused("cls_attention.*'none'", clip=features["clip"]._replace(cls_attention=None))
        refused("needs `cls` of teacher clip.*'equal'", clip=features["clip"]._replace(cls=None))
    refused("dinov2.*are needed", dinov2=features["eva"])
    del features["sam"]
    refused(r"\['clip', 'eva'\].*'sam'.*are needed")


def test_the_seed_decides_the_initial_weights() -> None:
    for preset in PRESETS:
        first, second = make_distiller(preset).state_dict(), make_distiller(preset).state_dict()
        assert first and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("preset", PRESETS)
def test_saved_and_loaded_it_gives_the_same_loss(preset: str, tmp_path: Path) -> None:
    path, distiller = tmp_path / "distiller.safetensors", make_distiller(preset).eval()
    distiller.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert set(load_file(path)) == set(distiller.state_dict())
    torch.manual_seed(99)
    other = Distiller(
        WIDTH,
        GRID,
        TEACHERS,
        summary_widths=SUMMARY_WIDTHS,
        whitening_components=8,
        **{name: PRESETS[preset][name] for name in DISTILLER_OPTIONS},
    )
    other.eval().load(path)
    outputs = [compare(module, make_student(), make_features()) for module in (other, distiller)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)


def test_keys_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "distiller.safetensors"
    make_distiller("paper").save(path)
    assert {key.rsplit(".", 1)[0] for key in load_file(path)} == {
        "eva.channels",
        "eva.tokens",
        "sam.channels",
        "sam.tokens",
    }
    make_distiller("student_heads", head_form="mlp").save(path)
    shapes = {key: tuple(value.shape) for key, value in load_file(path).items() if key.startswith("eva.")}
    assert shapes == {
        "eva.head.0.weight": (32, 16),
        "eva.head.0.bias": (32,),
        "eva.head.2.weight": (8, 32),
        "eva.head.2.bias": (8,),
        "eva.mean": (48,),
        "eva.variance": (48,),
        "eva.components": (8, 48),
    }


def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path, distiller = tmp_path / "distiller.safetensors", make_distiller("student_heads", head_form="mlp")
    before = {key: value.clone() for key, value in distiller.state_dict().items()}
    changed = {key: value + 1 for key, value in before.items()}
    for spoil, message in (
        (lambda state: state.pop("eva.head.2.bias"), r"missing \['eva.head.2.bias'\], left over \[\]"),
        (lambda state: state.pop("sam.components"), r"missing \['sam.components'\]"),
        (lambda state: state.update({"dino.mean": torch.ones(2)}), r"left over \['dino.mean'\]"),
        (lambda state: state.update({"eva.mean": torch.ones(2)}), r"'eva.mean': \(\(2,\), \(48,\)\)"),
        (lambda state: state["eva.mean"].fill_(torch.nan), r"not finite in \['eva.mean'\]"),
    ):
        state = {key: value.clone() for key, value in changed.items()}
        spoil(state)
        save_file(state, path)
        with pytest.raises(ValueError, match=message):
            distiller.load(path)
        assert all(torch.equal(value, before[key]) for key, value in distiller.state_dict().items())
    with pytest.raises(ValueError, match="nowhere.safetensors is missing"):
        distiller.load(tmp_path / "nowhere.safetensors")


def test_heads_of_other_options_are_refused_although_their_shapes_fit(tmp_path: Path) -> None:
    path, teachers = tmp_path / "distiller.safetensors", {"clip": TEACHERS["clip"]}
    make_distiller("student_heads", teachers, whitening_components=WIDTH).save(path)
    other = make_distiller("student_heads", teachers, feature_normalization="phi_s")
    message = (
        r"was trained with \{'feature_normalization': 'whiten'\}, and this run asks for .*'phi_s'.*reset_distiller"
    )
    with pytest.raises(ValueError, match=message):
        other.load(path)
    save_file(load_file(path), path)  # as earlier versions did, without options
    other.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path, distiller = tmp_path / "distiller.safetensors", make_distiller("paper")
    distiller.save(path)
    before, state = path.read_bytes(), distiller.state_dict()
    with pytest.raises(ValueError, match="missing or left over.*eva.tokens.bias"):
        distiller.save(path, {key: value for key, value in state.items() if key != "eva.tokens.bias"})
    with pytest.raises(ValueError, match="eva.tokens.bias.*spread over processes"):
        distiller.save(path, state | {"eva.tokens.bias": torch.empty(0)})
    # Also if the rename fails, since a folder has the file's name
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(OSError):
        distiller.save(tmp_path / "folder.safetensors")
    (tmp_path / "folder.safetensors").rmdir()
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_weights_are_those_of_the_functions() -> None:
    """The options reach the loss functions: each form gives other weights."""
    features, student = make_features(), make_student()
    for form in ("cls_similarity", "released", "equal"):
        distiller = make_distiller("paper", teacher_weighting=form, clip_share=0.3)
        targets = {name: distiller[name](student, features[name].tokens)[1] for name in TEACHERS}
        expected = teacher_weights(features["clip"].cls, targets, form, 0.3)
        output = compare(distiller, student, features)
        torch.testing.assert_close(output.teacher_weights["sam"], expected["sam"].detach())
        for other in {"cls_similarity", "released", "equal"} - {form}:
            others = teacher_weights(features["clip"].cls, targets, other, 0.3)
            assert (others["sam"] - expected["sam"]).abs().max() > 1e-3
