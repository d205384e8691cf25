"""
The losses of MoVE-KD (arXiv 2501.01709) as pure functions with one value for each image.

Results do not depend on how a batch is split over processes, except the `"released"` teacher weights, which use the
batch mean. Sums are float32 whatever the inputs' dtype, and no loss synchronizes with the device.
"""

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional


CLIP = "clip"
TOKEN_WEIGHTINGS = ("cls_attention", "released", "none")
TEACHER_WEIGHTINGS = ("cls_similarity", "released", "equal")
BALANCE_FORMS = ("per_layer", "pooled")
DISTILLATION_LOSSES = ("mse", "cosine", "smooth_l1", "cosine_smooth_l1")
DOMINANT_SHARE = 0.8


def token_weights(cls_attention: torch.Tensor, form: str) -> torch.Tensor:
    """
    Token weights of the paper's attention-guided distillation, from the CLS attention of the CLIP teacher.

    - `"cls_attention"`, as in the paper: softmax over the patches of q_cls . k / sqrt(d), averaged over the heads.
      This equals the attention row divided by its sum over the patches.
    - `"released"`, as in the original code: softmax over the patches of the attention averaged over the heads. After
      two softmaxes the weights are nearly equal.
    - `"none"`: equal weights.

    Args:
        cls_attention (`torch.Tensor` of shape `(batch_size, num_heads, num_patches)`): Attention of CLS to the
            patches, after the softmax over CLS and patches.
        form (`str`): One of the forms above.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_patches)`, float32, which sums to 1 for each image.
    """
    attention = cls_attention.float()
    if form == "cls_attention":
        return (attention / attention.sum(dim=-1, keepdim=True)).mean(dim=1)
    if form == "released":
        return attention.mean(dim=1).softmax(dim=-1)
    if form == "none":
        return torch.full_like(attention[:, 0], 1 / attention.shape[-1])
    raise ValueError(f"Token weights have no form {form!r}; choose one of {TOKEN_WEIGHTINGS}.")


def teacher_scores(cls: torch.Tensor, teacher_tokens: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Similarity of each teacher to the CLS embedding: mean over the tokens v of cls . v, without scale.

    Args:
        cls (`torch.Tensor` of shape `(batch_size, hidden_size)`): CLS embedding of the CLIP teacher.
        teacher_tokens (`Mapping[str, torch.Tensor]`): Each teacher's `(batch_size, num_tokens, hidden_size)`.

    Returns:
        `dict[str, torch.Tensor]`: Each teacher's score `(batch_size,)`, float32.
    """
    # Not a matrix product, which autocast would run in half precision
    return {
        name: (cls.float() * tokens.mean(dim=1, dtype=torch.float32)).sum(dim=-1)
        for name, tokens in teacher_tokens.items()
    }


def teacher_weights(
    cls: torch.Tensor | None, teacher_tokens: Mapping[str, torch.Tensor], form: str, clip_share: float | None
) -> dict[str, torch.Tensor]:
    """
    Teacher weights of the paper's attention-guided distillation, for each image.

    The teacher named `"clip"` has the weight `clip_share`, and the others share the rest. A single teacher has
    weight 1. The forms differ in the shares of the others:

    - `"cls_similarity"`, as in the paper: softmax over the teachers of mean(cls . v) / sqrt(d), detached.
    - `"released"`, as in the original code: not divided by sqrt(d) and not detached. If the largest share, averaged
      over the batch, is above 0.8, a second softmax flattens the shares.
    - `"equal"`: equal shares. Only this form works without a teacher `"clip"`.

    Args:
        cls (`torch.Tensor` of shape `(batch_size, hidden_size)`, *optional*): CLS embedding of the CLIP teacher;
            unused by `"equal"`.
        teacher_tokens (`Mapping[str, torch.Tensor]`): Each teacher's `(batch_size, num_tokens, hidden_size)` in the
            student's space.
        form (`str`): One of the forms above.
        clip_share (`float`, *optional*): Weight of the teacher `"clip"`, between 0 and 1; `None` for the same share as
            each of n teachers has on average, 1 / n.

    Returns:
        `dict[str, torch.Tensor]`: Each teacher's weight `(batch_size,)`, float32, which sum to 1 for each image.
    """
    if form not in TEACHER_WEIGHTINGS:
        raise ValueError(f"Teacher weights have no form {form!r}; choose one of {TEACHER_WEIGHTINGS}.")
    others = [name for name in teacher_tokens if name != CLIP]
    first = next(iter(teacher_tokens.values()))
    ones = torch.ones(len(first), device=first.device)
    if not others:
        return {CLIP: ones}
    if CLIP not in teacher_tokens:
        clip_share = 0.0
    elif clip_share is None:
        clip_share = 1 / len(teacher_tokens)
    if form == "equal":
        shares = ones[:, None].expand(-1, len(others)) / len(others)
    elif cls is None:
        raise ValueError(
            f"Teacher weights of the form {form!r} need a teacher named {CLIP!r}; there are only "
            f"{list(teacher_tokens)}. Add it, or choose the form 'equal'."
        )
    else:
        scores = torch.stack(
            list(teacher_scores(cls, {name: teacher_tokens[name] for name in others}).values()), dim=1
        )
        if form == "cls_similarity":
            shares = (scores.detach() / cls.shape[-1] ** 0.5).softmax(dim=1)
        else:
            shares = scores.softmax(dim=1)
            is_dominated = shares.mean(dim=0).max() > DOMINANT_SHARE
            shares = torch.where(is_dominated, shares.softmax(dim=1), shares)
    weights = dict(zip(others, ((1 - clip_share) * shares).unbind(dim=1), strict=True))
    return {name: clip_share * ones if name == CLIP else weights[name] for name in teacher_tokens}


def token_losses(
    student_tokens: torch.Tensor, target: torch.Tensor, loss: str = "mse", cosine_share: float = 0.9
) -> torch.Tensor:
    """
    Compare each token of the student with the teacher's; a summary is a single token.

    - `"mse"`: mean over the channels of (s - t)^2, as in the paper.
    - `"cosine"`: 1 - cos(s, t).
    - `"smooth_l1"`: mean over the channels of (s - t)^2 / 2 where |s - t| < 1, and of |s - t| - 1/2 elsewhere.
    - `"cosine_smooth_l1"`: `cosine_share` of the cosine and the rest of smooth L1. The share is 0.9 in AM-RADIO (arXiv
      2312.06709), EUPE (arXiv 2603.22387) and Theia's released code, 0.5 in UNIC's (arXiv 2408.05088).

    Args:
        student_tokens (`torch.Tensor` of shape `(batch_size, num_tokens, num_channels)`): The student's side s.
        target (`torch.Tensor` of shape `(batch_size, num_tokens, num_channels)`): The teacher's side t.
        loss (`str`, *optional*, defaults to `"mse"`): One of the losses above.
        cosine_share (`float`, *optional*, defaults to 0.9): Between 0 and 1; unused by the other losses.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_tokens)`, float32.
    """
    student_tokens, target = student_tokens.float(), target.float()
    if loss == "mse":
        # Autograd keeps one float32 tensor of full size, the difference
        return (student_tokens - target).square().mean(dim=-1)
    if loss == "cosine":
        return 1 - functional.cosine_similarity(student_tokens, target, dim=-1)
    if loss == "smooth_l1":
        return functional.smooth_l1_loss(student_tokens, target, reduction="none").mean(dim=-1)
    if loss == "cosine_smooth_l1":
        cosine, smooth_l1 = (token_losses(student_tokens, target, part) for part in ("cosine", "smooth_l1"))
        return cosine_share * cosine + (1 - cosine_share) * smooth_l1
    raise ValueError(f"There is no distillation loss {loss!r}; choose one of {DISTILLATION_LOSSES}.")


def distillation_loss(
    student_tokens: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor | None,
    form: str,
    loss: str = "mse",
    cosine_share: float = 0.9,
) -> torch.Tensor:
    """
    The paper's distillation loss against one teacher: weighted sum over the tokens of [`token_losses`]. The form
    `"released"` adds the plain mean over the tokens, as the original code does.

    Args:
        student_tokens (`torch.Tensor` of shape `(batch_size, num_tokens, num_channels)`): The student's side.
        target (`torch.Tensor` of shape `(batch_size, num_tokens, num_channels)`): The teacher's side.
        weights (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*): Weights from [`token_weights`];
            `None` for the plain mean.
        form (`str`): The form of the weights.
        loss (`str`, *optional*, defaults to `"mse"`), cosine_share (`float`, *optional*, defaults to 0.9): As for
            [`token_losses`].

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float32.
    """
    errors = token_losses(student_tokens, target, loss, cosine_share)
    if weights is None:
        return errors.mean(dim=-1)
    weighted = (weights * errors).sum(dim=-1)
    return weighted + errors.mean(dim=-1) if form == "released" else weighted


def keep_teachers(losses: torch.Tensor, drop_probability: float) -> torch.Tensor:
    """
    Teacher dropping of UNIC (arXiv 2408.05088): for each image the teacher with the largest loss is kept,
    and each other one is dropped with the given probability. Draws from torch's global random numbers.

    Args:
        losses (`torch.Tensor` of shape `(num_teachers, batch_size)`): Each teacher's loss, without its weight.
        drop_probability (`float`): Between 0 and 1.

    Returns:
        `torch.Tensor` of shape `(num_teachers, batch_size)`, bool: which teachers teach which image.
    """
    is_largest = functional.one_hot(losses.argmax(dim=0), len(losses)).T.bool()
    return is_largest | (torch.rand_like(losses) >= drop_probability)


def balance_loss(
    router_probabilities: Sequence[torch.Tensor] | torch.Tensor,
    expert_indices: Sequence[torch.Tensor] | torch.Tensor,
    form: str,
) -> torch.Tensor:
    """
    Balance loss of the routers (Switch Transformer, arXiv 2101.03961, equation 4): sum over the experts e of p_e f_e,
    where p_e is the mean probability of an expert, which has the gradient, and f_e its share of the tokens.

    - `"per_layer"`: E * sum_e p_e f_e for each layer, averaged over the layers; 1 at perfect balance.
    - `"pooled"`, as in the original code: sum_e p_e f_e with p and f over the tokens of all layers, without E.

    Args:
        router_probabilities (sequence of `torch.Tensor` of shape `(batch_size, num_tokens, num_experts)`): By layer.
        expert_indices (sequence of `torch.Tensor` of shape `(batch_size, num_tokens)`): By layer, long.
        form (`str`): One of the forms above.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float32.
    """
    if form not in BALANCE_FORMS:
        raise ValueError(f"The balance loss has no form {form!r}; choose one of {BALANCE_FORMS}.")
    probabilities = torch.stack(tuple(router_probabilities)).float()
    indices = torch.stack(tuple(expert_indices)).unsqueeze(-1)
    num_experts = probabilities.shape[-1]
    choices = (indices == torch.arange(num_experts, device=indices.device)).float()
    if form == "pooled":
        return (probabilities.mean(dim=(0, 2)) * choices.mean(dim=(0, 2))).sum(dim=-1)
    return num_experts * (probabilities.mean(dim=2) * choices.mean(dim=2)).sum(dim=-1).mean(dim=0)


def check_finite(terms: Mapping[str, torch.Tensor]) -> None:
    """
    Stop if a loss is infinite or NaN. Synchronizes with the device once.

    Args:
        terms (`Mapping[str, torch.Tensor]`): Tensors on one device, by the name they are logged under.

    Raises:
        ValueError: naming each such term.
    """
    if not terms:
        return
    counts = torch.stack([(~value.detach().isfinite()).sum() for value in terms.values()]).tolist()
    bad = [
        f"{name} ({count} of {value.numel()})"
        for (name, value), count in zip(terms.items(), counts, strict=True)
        if count
    ]
    if bad:
        raise ValueError(
            f"Values are not finite in {', '.join(bad)}. If one teacher alone is listed, check its dtype and the "
            "images. Otherwise lower the learning rate, or train in bfloat16 instead of float16."
        )
