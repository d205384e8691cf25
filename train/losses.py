"""The losses of MoVE-KD (arXiv 2501.01709) as pure functions, a value for each image."""

from collections.abc import Mapping

import torch


CLIP = "clip"


def token_weights(cls_attention: torch.Tensor, form: str) -> torch.Tensor:
    """
    Weight of each patch from the CLIP teacher's [CLS] attention (section 3.3).

    - `"cls_attention"`, as the paper writes it: softmax over the patches of q_cls . k / sqrt(d), mean over the heads.
    - `"released"`, as the authors' code runs: softmax over the patches of the heads' mean, which is a softmax already.
    - `"none"`: the same weight for all.

    Args:
        cls_attention (`torch.Tensor` of shape `(batch_size, num_heads, num_patches)`): The [CLS] query's row, cut to
            the patches from a softmax over [CLS] and patches.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_patches)`, float32, that sums to 1 for each image.
    """
    cls_attention = cls_attention.float()
    if form == "cls_attention":
        return (cls_attention / cls_attention.sum(dim=-1, keepdim=True)).mean(dim=1)
    if form == "released":
        return cls_attention.mean(dim=1).softmax(dim=-1)
    if form == "none":
        return torch.full_like(cls_attention[:, 0], 1 / cls_attention.shape[-1])
    raise ValueError(f"Token weights have no form {form!r}; choose 'cls_attention', 'released' or 'none'.")


def teacher_weights(
    cls: torch.Tensor | None, teacher_tokens: Mapping[str, torch.Tensor], form: str, clip_share: float
) -> dict[str, torch.Tensor]:
    """
    Share of each teacher in the loss of each image (section 3.3). CLIP's is fixed, the others divide the rest; without
    others it is alone, and without CLIP the others divide all.

    - `"cls_similarity"`, as the paper writes it: softmax over the teachers of mean(cls . v) / sqrt(d), detached.
    - `"released"`, as the authors' code runs: no 1 / sqrt(d) and not detached; where the largest mean share in the
      batch exceeds 0.8, a second softmax flattens all of them.
    - `"equal"`: equal shares.

    Args:
        cls (`torch.Tensor` of shape `(batch_size, hidden_size)`): CLIP's [CLS] embedding, not needed for `"equal"`.
        teacher_tokens: By teacher `(batch_size, num_tokens, hidden_size)`, in the student's space.

    Returns:
        By teacher `(batch_size,)`, float32, that sum to 1 for each image.
    """
    others = [name for name in teacher_tokens if name != CLIP]
    some_tokens = next(iter(teacher_tokens.values()))
    ones = some_tokens.new_ones(len(some_tokens), dtype=torch.float32)
    share = clip_share if CLIP in teacher_tokens else 0.0
    weights = {CLIP: ones * share} if CLIP in teacher_tokens else {}
    if not others:
        return {CLIP: ones}
    if form == "equal":
        return weights | {name: ones * (1 - share) / len(others) for name in others}
    if form not in ("cls_similarity", "released"):
        raise ValueError(f"Teacher weights have no form {form!r}; choose 'cls_similarity', 'released' or 'equal'.")
    if cls is None:
        raise ValueError(f"Teacher weights of the form {form!r} need the [CLS] embedding of a teacher named {CLIP!r}.")
    scores = torch.stack(
        [torch.einsum("bd,bd->b", cls.float(), teacher_tokens[name].float().mean(dim=1)) for name in others], dim=1
    )
    if form == "cls_similarity":
        shares = (scores.detach() / cls.shape[-1] ** 0.5).softmax(dim=1)
    else:
        shares = scores.softmax(dim=1)
        is_dominant = shares.mean(dim=0).max() > 0.8
        shares = torch.where(is_dominant, shares.softmax(dim=1), shares)
    return weights | {name: (1 - share) * shares[:, index] for index, name in enumerate(others)}


def distillation_loss(
    student_tokens: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, form: str
) -> torch.Tensor:
    """
    Squared error of one teacher (equation 6 of the paper): mean over channels, weighted sum over tokens. The form
    `"released"` adds the plain mean over tokens to the weighted sum.

    Args:
        student_tokens, target (`torch.Tensor` of shape `(batch_size, num_tokens, num_channels)`).
        weights (`torch.Tensor` of shape `(batch_size, num_tokens)`): From [`token_weights`].

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float32.
    """
    errors = (student_tokens.float() - target.float()).square().mean(dim=-1)
    loss = (weights * errors).sum(dim=-1)
    return loss + errors.mean(dim=-1) if form == "released" else loss


def balance_loss(
    router_probabilities: tuple[torch.Tensor, ...], expert_indices: tuple[torch.Tensor, ...], form: str
) -> torch.Tensor:
    """
    How unevenly the routers use their experts: the mean probability of each expert times the share of tokens it gets,
    summed over experts. Only the probabilities carry gradient.

    - `"per_layer"`: per image and layer, times the number of experts (1 at perfect balance), mean over layers.
    - `"pooled"`, as the authors' code runs: per image over the tokens of all layers together, without that factor.

    Args:
        router_probabilities: Per layer `(batch_size, num_tokens, num_experts)`.
        expert_indices: Per layer `(batch_size, num_tokens)`.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float32.
    """
    probabilities = torch.stack(router_probabilities).float()
    num_experts = probabilities.shape[-1]
    choices = torch.nn.functional.one_hot(torch.stack(expert_indices), num_experts).float()
    if form == "pooled":
        return (probabilities.mean(dim=(0, 2)) * choices.mean(dim=(0, 2))).sum(dim=-1)
    if form == "per_layer":
        return num_experts * (probabilities.mean(dim=2) * choices.mean(dim=2)).sum(dim=-1).mean(dim=0)
    raise ValueError(f"The balance loss has no form {form!r}; choose 'per_layer' or 'pooled'.")


def check_finite(terms: Mapping[str, torch.Tensor]) -> None:
    """
    Raises:
        ValueError: naming every term that is not finite (`kd/{teacher}` names the teacher), with its value.
    """
    if bad := {name: value.tolist() for name, value in terms.items() if not value.isfinite().all()}:
        raise ValueError(
            f"Loss terms are not finite: {bad}. Look at the images and the teacher named, lower the learning rate, or "
            "train in bfloat16 instead of float16."
        )
