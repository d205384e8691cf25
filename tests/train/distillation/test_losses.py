"""The loss functions against their formulas, image by image."""

import itertools
import math

import pytest
import torch

from train.distillation.losses import (
    balance_loss,
    check_finite,
    distillation_loss,
    keep_teachers,
    teacher_scores,
    teacher_weights,
    token_losses,
    token_weights,
)


BATCH, HEADS, PATCHES, WIDTH = 3, 2, 12, 8


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def attention_and_logits(scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The CLS attention to the patches, and the scores q . k / sqrt(d) that give it."""
    logits = scale * torch.randn(BATCH, HEADS, 1 + PATCHES)
    return logits.softmax(dim=-1)[..., 1:], logits[..., 1:]


def teacher_tokens(scale: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: scale * torch.randn(BATCH, PATCHES, WIDTH) for name in ("clip", "eva", "sam", "dinov2")}


def test_token_weights_of_the_paper_are_a_softmax_over_the_patches_in_each_head() -> None:
    attention, logits = attention_and_logits()
    weights = token_weights(attention, "cls_attention")
    expected = sum(logits[:, head].softmax(dim=-1) for head in range(HEADS)) / HEADS
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(BATCH))


def test_token_weights_of_the_paper_do_not_depend_on_how_much_a_head_looks_at_cls() -> None:
    attention, _ = attention_and_logits()
    scaled = attention * torch.tensor([0.01, 1.0])[:, None]
    torch.testing.assert_close(token_weights(scaled, "cls_attention"), token_weights(attention, "cls_attention"))


def test_released_token_weights_take_the_softmax_twice() -> None:
    attention, _ = attention_and_logits()
    weights = token_weights(attention, "released")
    exponentials = attention.mean(dim=1).exp()
    torch.testing.assert_close(weights, exponentials / exponentials.sum(dim=-1, keepdim=True))
    assert weights.max() / weights.min() < math.e, "the second softmax leaves little difference"
    assert token_weights(attention, "cls_attention").max() / weights.max() > 2


def test_no_token_weights_are_equal_ones() -> None:
    attention, _ = attention_and_logits()
    assert torch.equal(token_weights(attention, "none"), torch.full((BATCH, PATCHES), 1 / PATCHES))


def test_teacher_weights_of_the_paper() -> None:
    tokens, cls = teacher_tokens(), torch.randn(BATCH, WIDTH)
    weights = teacher_weights(cls, tokens, "cls_similarity", clip_share=0.7)
    assert list(weights) == list(tokens)
    for image in range(BATCH):
        others = ("eva", "sam", "dinov2")
        scores = {
            name: sum(torch.dot(cls[image], token).item() for token in tokens[name][image]) / PATCHES / WIDTH**0.5
            for name in others
        }
        total = sum(math.exp(score) for score in scores.values())
        assert weights["clip"][image].item() == pytest.approx(0.7)
        for name in others:
            assert weights[name][image].item() == pytest.approx(0.3 * math.exp(scores[name]) / total, rel=1e-5)


def test_only_released_teacher_weights_carry_gradient() -> None:
    cls = torch.randn(BATCH, WIDTH)
    for form, carries in (("cls_similarity", False), ("equal", False), ("released", True)):
        tokens = {name: value.requires_grad_() for name, value in teacher_tokens().items()}
        assert teacher_weights(cls, tokens, form, 0.8)["eva"].requires_grad is carries, form


def test_released_teacher_weights_are_flattened_where_the_batch_mean_is_dominated() -> None:
    cls = torch.ones(2, WIDTH)
    # In the first image eva has all the score, in the second half, so that the batch mean is 0.75 or nearly 1
    tokens = {"clip": torch.zeros(2, 1, WIDTH), "eva": torch.zeros(2, 1, WIDTH), "sam": torch.zeros(2, 1, WIDTH)}
    tokens["eva"][0] = 2.0
    mixed = teacher_weights(cls, tokens, "released", clip_share=0.8)
    torch.testing.assert_close(mixed["eva"], 0.2 * torch.tensor([1.0, 0.5]))
    alone = {name: value[:1] for name, value in tokens.items()}
    flattened = teacher_weights(cls[:1], alone, "released", clip_share=0.8)
    torch.testing.assert_close(flattened["eva"], 0.2 * torch.tensor([math.e / (math.e + 1)]))


@pytest.mark.parametrize("form", ["cls_similarity", "released", "equal"])
@pytest.mark.parametrize("names", [("clip",), ("clip", "eva"), ("eva", "clip", "sam", "dinov2")])
def test_teacher_weights_sum_to_one(form: str, names: tuple[str, ...]) -> None:
    tokens = teacher_tokens(scale=5.0)
    weights = teacher_weights(torch.randn(BATCH, WIDTH), {name: tokens[name] for name in names}, form, 0.2)
    assert tuple(weights) == names
    torch.testing.assert_close(sum(weights.values()), torch.ones(BATCH))
    torch.testing.assert_close(weights["clip"], torch.full((BATCH,), 1.0 if names == ("clip",) else 0.2))


def test_equal_teacher_weights() -> None:
    tokens = teacher_tokens()
    weights = teacher_weights(None, tokens, "equal", clip_share=0.1)
    torch.testing.assert_close(torch.stack(list(weights.values())).mean(dim=1), torch.tensor([0.1, 0.3, 0.3, 0.3]))
    del tokens["clip"]
    weights = teacher_weights(None, tokens, "equal", clip_share=0.1)
    torch.testing.assert_close(torch.stack(list(weights.values())), torch.full((3, BATCH), 1 / 3))


def test_teacher_weights_without_cls_say_which_form_does_without() -> None:
    tokens = {name: value for name, value in teacher_tokens().items() if name != "clip"}
    for form in ("cls_similarity", "released"):
        with pytest.raises(ValueError, match=f"{form}.*eva.*choose the form 'equal'"):
            teacher_weights(None, tokens, form, 0.8)


def test_distillation_loss() -> None:
    student, target = torch.randn(BATCH, PATCHES, WIDTH), torch.randn(BATCH, PATCHES, WIDTH)
    weights = torch.rand(BATCH, PATCHES)
    plain = distillation_loss(student, target, None, "none")
    weighted = distillation_loss(student, target, weights, "cls_attention")
    released = distillation_loss(student, target, weights, "released")
    for image in range(BATCH):
        errors = [((student[image, n] - target[image, n]) ** 2).sum().item() / WIDTH for n in range(PATCHES)]
        products = [weights[image, n].item() * errors[n] for n in range(PATCHES)]
        assert plain[image].item() == pytest.approx(sum(errors) / PATCHES, rel=1e-5)
        assert weighted[image].item() == pytest.approx(sum(products), rel=1e-5)
        assert released[image].item() == pytest.approx(sum(products) + sum(errors) / PATCHES, rel=1e-5)


def test_losses_of_a_token_written_out() -> None:
    student, target = 2 * torch.randn(BATCH, PATCHES, WIDTH), torch.randn(BATCH, PATCHES, WIDTH)
    losses = {form: token_losses(student, target, form) for form in ("mse", "cosine", "smooth_l1")}
    mixed = {share: token_losses(student, target, "cosine_smooth_l1", share) for share in (0.0, 0.5, 0.9, 1.0)}
    for image, token in itertools.product(range(BATCH), range(PATCHES)):
        s, t = student[image, token].tolist(), target[image, token].tolist()
        differences = [abs(a - b) for a, b in zip(s, t, strict=True)]
        product = sum(a * b for a, b in zip(s, t, strict=True))
        cosine = 1 - product / math.hypot(*s) / math.hypot(*t)
        smooth_l1 = sum(d * d / 2 if d < 1 else d - 0.5 for d in differences) / WIDTH
        expected = {"mse": sum(d * d for d in differences) / WIDTH, "cosine": cosine, "smooth_l1": smooth_l1}
        for form, value in expected.items():
            assert losses[form][image, token].item() == pytest.approx(value, rel=1e-4, abs=1e-6), form
        for share, loss in mixed.items():
            value = share * cosine + (1 - share) * smooth_l1
            assert loss[image, token].item() == pytest.approx(value, rel=1e-4, abs=1e-6), share
    with pytest.raises(ValueError, match="'l2'.*cosine_smooth_l1"):
        token_losses(student, target, "l2")


def test_of_the_teachers_that_are_dropped_none_has_the_largest_loss() -> None:
    losses = torch.rand(4, 20_000)
    kept = keep_teachers(losses, 0.3)
    largest = losses.argmax(dim=0)
    assert kept.gather(0, largest[None]).all()
    others = kept.float().sum(dim=0) - 1
    assert others.mean().item() == pytest.approx(3 * 0.7, abs=0.05)
    assert set(others.tolist()) == {0, 1, 2, 3}
    assert keep_teachers(losses, 0.0).all()
    assert torch.equal(keep_teachers(losses, 1.0).sum(dim=0), torch.ones(20_000, dtype=torch.long))


def test_distillation_loss_keeps_one_tensor_of_full_size_for_the_backward_pass() -> None:
    student = torch.randn(BATCH, PATCHES, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randn(BATCH, PATCHES, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    kept: set[int] = set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == student.numel():
            kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = distillation_loss(student, target, torch.rand(BATCH, PATCHES), "released")
    assert len(kept) == 1
    loss.sum().backward()
    assert student.grad is not None and student.grad.any()


def router(layers: int = 4, experts: int = 3) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    probabilities = tuple((2 * torch.randn(BATCH, PATCHES, experts)).softmax(dim=-1) for _ in range(layers))
    return probabilities, tuple(value.argmax(dim=-1) for value in probabilities)


def test_balance_loss() -> None:
    probabilities, indices = router()
    per_layer, pooled = (
        balance_loss(probabilities, indices, "per_layer"),
        balance_loss(probabilities, indices, "pooled"),
    )
    for image in range(BATCH):
        by_layer = [
            sum(
                probability[image, :, expert].mean().item() * (index[image] == expert).float().mean().item()
                for expert in range(3)
            )
            for probability, index in zip(probabilities, indices, strict=True)
        ]
        assert per_layer[image].item() == pytest.approx(3 * sum(by_layer) / 4, rel=1e-5)
        together = sum(
            torch.cat([value[image, :, expert] for value in probabilities]).mean().item()
            * torch.cat([value[image] == expert for value in indices]).float().mean().item()
            for expert in range(3)
        )
        assert pooled[image].item() == pytest.approx(together, rel=1e-5)
    stacked = balance_loss(torch.stack(probabilities), torch.stack(indices), "per_layer")
    assert torch.equal(stacked, per_layer)


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_balance_loss_is_one_at_balance_and_the_number_of_experts_at_collapse(experts: int) -> None:
    indices = torch.arange(experts).repeat(4).expand(1, BATCH, -1)
    choices = torch.eye(experts)[indices]
    torch.testing.assert_close(balance_loss(choices, indices, "per_layer"), torch.ones(BATCH))
    collapsed = torch.zeros_like(indices)
    loss = balance_loss(torch.eye(experts)[collapsed], collapsed, "per_layer")
    torch.testing.assert_close(loss, torch.full((BATCH,), float(experts)))


def test_balance_loss_pushes_down_the_expert_that_gets_most_tokens() -> None:
    logits = torch.zeros(1, BATCH, PATCHES, 3, requires_grad=True)
    balance_loss(
        logits.softmax(dim=-1), torch.zeros(1, BATCH, PATCHES, dtype=torch.long), "per_layer"
    ).sum().backward()
    assert (logits.grad[..., 0] > 0).all() and (logits.grad[..., 1:] < 0).all()


def test_unknown_forms_raise_with_the_choices() -> None:
    attention, _ = attention_and_logits()
    with pytest.raises(ValueError, match="'paper'.*cls_attention"):
        token_weights(attention, "paper")
    with pytest.raises(ValueError, match="'paper'.*cls_similarity"):
        teacher_weights(None, teacher_tokens(), "paper", 0.8)
    with pytest.raises(ValueError, match="'paper'.*per_layer"):
        balance_loss(*router(), "paper")


def test_bfloat16_inputs_give_float32_losses() -> None:
    attention, _ = attention_and_logits()
    tokens, cls = teacher_tokens(scale=3.0), torch.randn(BATCH, WIDTH)
    student, (probabilities, indices) = torch.randn(BATCH, PATCHES, WIDTH), router()
    rounded = {name: value.bfloat16() for name, value in tokens.items()}
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [
            (token_weights(attention.bfloat16(), form), token_weights(attention, form))
            for form in ("cls_attention", "released")
        ]
        scores, exact_scores = teacher_scores(cls.bfloat16(), rounded), teacher_scores(cls, tokens)
        pairs += [(scores[name], exact_scores[name]) for name in tokens]
        loss = distillation_loss(student.bfloat16(), rounded["eva"], None, "none")
        pairs += [(loss, distillation_loss(student, tokens["eva"], None, "none"))]
        balance = balance_loss(tuple(value.bfloat16() for value in probabilities), indices, "per_layer")
        pairs += [(balance, balance_loss(probabilities, indices, "per_layer"))]
    for rounded_value, exact in pairs:
        assert rounded_value.dtype == torch.float32
        assert (rounded_value - exact).abs().max() < 0.02 * exact.abs().max()
    # Only the inputs are rounded: no sum runs in half precision, also under autocast
    exact_scores = teacher_scores(cls.bfloat16().float(), {name: value.float() for name, value in rounded.items()})
    for name in tokens:
        torch.testing.assert_close(scores[name], exact_scores[name], rtol=1e-5, atol=1e-5)
    exact_loss = distillation_loss(student.bfloat16().float(), rounded["eva"].float(), None, "none")
    torch.testing.assert_close(loss, exact_loss, rtol=1e-6, atol=0)


def test_check_finite_names_the_terms() -> None:
    check_finite({})
    check_finite({"text": torch.tensor(1.0), "kd/eva": torch.ones(4), "steps": torch.arange(3)})
    terms = {"text": torch.tensor(1.0), "kd/eva": torch.tensor([1.0, math.nan, math.inf]), "kd/sam": torch.ones(2)}
    with pytest.raises(ValueError, match=r"not finite.*kd/eva \(2 of 3\)") as error:
        check_finite(terms)
    assert "kd/sam" not in str(error.value) and "text" not in str(error.value)
    with pytest.raises(ValueError, match="text.*kd"):
        check_finite({"text": torch.tensor(-math.inf), "kd": torch.tensor(math.nan, requires_grad=True)})
