"""
The losses of MoVE-KD (arXiv 2501.01709) as pure functions, with one value for each image.

Nothing here depends on how a batch is split over processes, but for the `"released"` teacher weights, which look at
the batch's mean by definition. Sums run in float32 whatever the dtype of the inputs, and no loss waits for the device.
"""

from collections.abc import Mapping, Sequence

import torch


CLIP = "clip"
TOKEN_WEIGHTINGS = ("cls_attention", "released", "none")
TEACHER_WEIGHTINGS = ("cls_similarity", "released", "equal")
BALANCE_FORMS = ("per_layer", "pooled")
DOMINANT_SHARE = 0.8


def token_weights(cls_attention: torch.Tensor, form: str) -> torch.Tensor:
    """
    Weight of each patch from the CLS attention of the CLIP teacher (token weights of the paper's attention-guided
    distillation).

    - `"cls_attention"`, as the paper writes it: softmax over the patches of q_cls . k / sqrt(d), mean over the heads.
      Dividing the attention row by its sum over the patches is that softmax.
    - `"released"`, as the authors' code runs: softmax over the patches of the heads' mean, which is a softmax already;
      the weights are nearly equal.
    - `"none"`: equal weights.

    Args:
        cls_attention (`torch.Tensor` of shape `(batch_size, num_heads, num_patches)`): The CLS query's row after the
            softmax over CLS and patches, cut to the patches (each row's sum is below 1).
        form (`str`): One of the above.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_patches)`, float32: sums to 1 for each image.

    Raises:
        ValueError: for an unknown form.
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
    How much each teacher's features look like the CLS embedding: mean over the tokens v of cls . v, unscaled.

    Args:
        cls (`torch.Tensor` of shape `(batch_size, hidden_size)`): The CLIP teacher's CLS embedding.
        teacher_tokens: By teacher `(batch_size, num_tokens, hidden_size)`, in the student's space.

    Returns:
        By teacher `(batch_size,)`, float32.
    """
    # A product of elements and a sum, because autocast would run a matrix product in half precision
    return {
        name: (cls.float() * tokens.mean(dim=1, dtype=torch.float32)).sum(dim=-1)
        for name, tokens in teacher_tokens.items()
    }


def teacher_weights(
    cls: torch.Tensor | None, teacher_tokens: Mapping[str, torch.Tensor], form: str, clip_share: float
) -> dict[str, torch.Tensor]:
    """
    Share of each teacher in the loss of each image (teacher weights of the paper's attention-guided distillation).

    The teacher named `"clip"` has the fixed share `clip_share` and the others divide the rest. Alone, it has weight 1;
    where it is missing, which only `"equal"` can do without, the others divide all. The others' parts are

    - `"cls_similarity"`, as the paper writes it: softmax over the teachers of mean(cls . v) / sqrt(d), detached.
    - `"released"`, as the authors' code runs: the same without 1 / sqrt(d) and not detached; where the largest of the
      batch's mean shares exceeds 0.8, a second softmax flattens them all.
    - `"equal"`: equal.

    Args:
        cls (`torch.Tensor` of shape `(batch_size, hidden_size)`, *optional*): The CLIP teacher's CLS embedding; not
            used by `"equal"`.
        teacher_tokens: By teacher `(batch_size, num_tokens, hidden_size)`, in the student's space; of `"equal"`'s only
            the batch size is used.
        form (`str`): One of the above.
        clip_share (`float`): Between 0 and 1.

    Returns:
        By teacher, in the order given, `(batch_size,)`, float32: they sum to 1 for each image.

    Raises:
        ValueError: for an unknown form, or one that needs the CLS embedding without it.
    """
    if form not in TEACHER_WEIGHTINGS:
        raise ValueError(f"Teacher weights have no form {form!r}; choose one of {TEACHER_WEIGHTINGS}.")
    others = [name for name in teacher_tokens if name != CLIP]
    first = next(iter(teacher_tokens.values()))
    ones = torch.ones(len(first), device=first.device)
    if not others:
        return {CLIP: ones}
    clip_share = clip_share if CLIP in teacher_tokens else 0.0
    if form == "equal":
        shares = ones[:, None].expand(-1, len(others)) / len(others)
    elif cls is None:
        raise ValueError(
            f"Teacher weights of the form {form!r} need the CLS embedding of a teacher named {CLIP!r}, and there is "
            f"none; the teachers are {list(teacher_tokens)}. Add it, or choose the form 'equal'."
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


def distillation_loss(
    student_tokens: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None, form: str
) -> torch.Tensor:
    """
    Squared error against one teacher: mean over channels, weighted sum over tokens (the paper's distillation loss).
    The form `"released"` adds the plain mean over tokens to the weighted sum, as the authors' code does.

    Args:
        student_tokens (`torch.Tensor` of shape `(batch_size, num_tokens, num_channels)`): Student.
        target (`torch.Tensor` of the same shape): Teacher.
        weights (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*): From [`token_weights`]; `None` is the
            plain mean over tokens.
        form (`str`): The form the weights have.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float32.
    """
    # One float32 tensor of full size is kept for the backward pass: the difference
    errors = (student_tokens.float() - target.float()).square().mean(dim=-1)
    if weights is None:
        return errors.mean(dim=-1)
    loss = (weights * errors).sum(dim=-1)
    return loss + errors.mean(dim=-1) if form == "released" else loss


def balance_loss(
    router_probabilities: Sequence[torch.Tensor] | torch.Tensor,
    expert_indices: Sequence[torch.Tensor] | torch.Tensor,
    form: str,
) -> torch.Tensor:
    """
    How unevenly the routers use their experts: the mean probability p_e of an expert times the share f_e of the tokens
    it gets, summed over the experts (Switch Transformer, arXiv 2101.03961, equation 4). Only p_e carries gradient.

    - `"per_layer"`: per image and layer E * sum_e p_e f_e over the tokens, 1 at perfect balance, mean over the layers.
    - `"pooled"`, as the authors' code runs: per image sum_e p_e f_e over the tokens of all layers together, without
      the factor E.

    Args:
        router_probabilities: Per layer `(batch_size, num_tokens, num_experts)`, as a sequence or one tensor.
        expert_indices: Per layer `(batch_size, num_tokens)`, long.
        form (`str`): One of the above.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float32.

    Raises:
        ValueError: for an unknown form.
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
    Stop at a value that is infinite or not a number. Waits for the device once, however many terms there are.

    Args:
        terms: Tensors of any shape on one device, by the name they are logged under (`"text"`, `"kd/{teacher}"`).

    Raises:
        ValueError: naming every such term, with the number of such values in it.
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
            f"Values that are not finite in {', '.join(bad)}. A single teacher points at its features, all of them at "
            "the student's. Look at the images and that teacher's dtype, lower the learning rate, or train in "
            "bfloat16 instead of float16."
        )
