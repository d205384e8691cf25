"""Pictures of a vision tower, drawn from tensors: experts, [CLS] attention, principal components and distances."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


# The colors of Okabe and Ito, which people with any color vision can tell apart
EXPERT_COLORS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (153, 153, 153),
)
# From dark to light in even steps of lightness
HEAT_COLORS = ((10, 7, 34), (84, 15, 109), (159, 42, 99), (221, 81, 58), (252, 165, 10), (252, 255, 164))


class OtherPictures(NamedTuple):
    """
    Pictures of another encoder, compared with the student.

    Args:
        components (`torch.Tensor`): Picture of its principal components. Equal colors mean the same as in the
            student's picture, as far as the two encoders agree.
        distance (`torch.Tensor`): Picture of `distances` over the image, from dark for 0 to light for 1 or more.
        distances (`torch.Tensor` of shape `(batch_size, num_patches)`): The [`relational_distance`] to the student.
    """

    components: torch.Tensor
    distance: torch.Tensor
    distances: torch.Tensor


@dataclass
class MoveKDPictures:
    """
    Pictures of one layer. Each is a uint8 tensor `(batch_size, height, width, 3)` on the CPU, and all have one size.

    Args:
        image (`torch.Tensor`): The image that the tower saw.
        experts (`torch.Tensor`): The expert of each patch as a color over the image. `None` without experts.
        expert_shares (`torch.Tensor` of shape `(batch_size, num_experts)`): Share of the patches of each expert.
        expert_colors (`torch.Tensor` of shape `(num_experts, 3)`): RGB color of each expert in uint8.
        cls_attention (`torch.Tensor`): [CLS] attention, averaged over the heads, over the image. Light is the largest
            value of each image. `None` for a tower without [CLS].
        components (`torch.Tensor`): The first three principal components of the features as red, green and blue.
        tokens (`torch.Tensor` of shape `(batch_size, num_patches, hidden_size)`): The features.
        values (`torch.Tensor` of shape `(batch_size, num_patches, 3)`): The [`principal_components`].
        others (`dict[str, OtherPictures]`): Pictures of the other encoders by name.
    """

    image: torch.Tensor
    experts: torch.Tensor | None
    expert_shares: torch.Tensor | None
    expert_colors: torch.Tensor | None
    cls_attention: torch.Tensor | None
    components: torch.Tensor
    tokens: torch.Tensor
    values: torch.Tensor
    others: dict[str, OtherPictures] = field(default_factory=dict)

    @property
    def expert_colours(self) -> torch.Tensor | None:
        """Former name of `expert_colors`."""
        warnings.warn("`expert_colours` is now `expert_colors`.", FutureWarning, stacklevel=2)
        return self.expert_colors


def is_square(num_patches: int) -> bool:
    return round(num_patches**0.5) ** 2 == num_patches


def to_grid(values: torch.Tensor) -> torch.Tensor:
    """Reshape `(batch_size, num_patches, ...)` to `(batch_size, side, side, ...)`, row by row."""
    side = round(values.shape[1] ** 0.5)
    if not is_square(values.shape[1]):
        raise ValueError(f"{values.shape[1]} patches are no square grid; give the patches alone, without [CLS].")
    return values.unflatten(1, (side, side))


def enlarge(grid: torch.Tensor, size: Sequence[int], smooth: bool) -> torch.Tensor:
    """Resize `(batch_size, rows, columns, channels)` to `(batch_size, *size, channels)`, smoothly or in cells."""
    mode = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest-exact"}
    return nn.functional.interpolate(grid.permute(0, 3, 1, 2).float(), size=tuple(size), **mode).permute(0, 2, 3, 1)


def overlay(colors: torch.Tensor, image: torch.Tensor, opacity: float) -> torch.Tensor:
    """Blend colors over an image, both `(batch_size, height, width, 3)` from 0 to 255, and return uint8."""
    return (opacity * colors.float() + (1 - opacity) * image.float()).round().clamp(0, 255).byte()


def pixels_to_image(
    pixel_values: torch.Tensor,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    smallest_side: int = 1,
) -> torch.Tensor:
    """
    Undo the normalization of pixels `(batch_size, 3, height, width)`, which defaults to CLIP's, and return uint8
    `(batch_size, height, width, 3)`. Images with a shorter side than `smallest_side` are enlarged by a whole factor.
    """
    scale = torch.tensor(std or OPENAI_CLIP_STD, device=pixel_values.device).view(3, 1, 1)
    shift = torch.tensor(mean or OPENAI_CLIP_MEAN, device=pixel_values.device).view(3, 1, 1)
    image = ((pixel_values.float() * scale + shift) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    factor = -(-smallest_side // min(image.shape[1:3]))
    return image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def expert_colors(num_experts: int) -> torch.Tensor:
    """Return one RGB color per expert, uint8 `(num_experts, 3)`. After the eighth, the hues are evenly spaced."""
    hues = torch.arange(num_experts)[:, None] / num_experts + torch.tensor([0, 1 / 3, 2 / 3])
    colors = (127.5 + 127.5 * (2 * torch.pi * hues).cos()).byte()
    known = torch.tensor(EXPERT_COLORS, dtype=torch.uint8)[:num_experts]
    colors[: len(known)] = known
    return colors


def expert_map(
    indices: torch.Tensor, num_experts: int, image: torch.Tensor, opacity: float = 0.55
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draw the expert of each patch, `indices` of shape `(batch_size, num_patches)`, as a color over the image.

    Returns:
        The picture, and each expert's share of the patches `(batch_size, num_experts)`.
    """
    colors = expert_colors(num_experts).to(indices.device)[indices]
    shares = nn.functional.one_hot(indices, num_experts).float().mean(dim=1)
    return overlay(enlarge(to_grid(colors), image.shape[1:3], smooth=False), image, opacity), shares


def heat_map(
    values: torch.Tensor, image: torch.Tensor, top: float | None = None, opacity: float = 0.6
) -> torch.Tensor:
    """
    Draw one number per patch, `values` of shape `(batch_size, num_patches)`, as a color over the image. Dark is 0 and
    light is `top`, which defaults to the largest value of each image.
    """
    values = values.float()
    largest = values.amax(dim=1, keepdim=True) if top is None else torch.full_like(values[:, :1], top)
    grid = enlarge(to_grid(values / largest.clamp(min=1e-12)).unsqueeze(-1), image.shape[1:3], smooth=True)
    stops = torch.tensor(HEAT_COLORS, dtype=torch.float32, device=values.device)
    position = grid.squeeze(-1).clamp(0, 1) * (len(stops) - 1)
    low = position.long().clamp(max=len(stops) - 2)
    colors = torch.lerp(stops[low], stops[low + 1], (position - low).unsqueeze(-1))
    return overlay(colors, image, opacity)


def leading_eigenvectors(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (up to) three largest eigenvalues of a symmetric matrix, largest first, and their column vectors."""
    if len(matrix) <= 256:
        values, vectors = torch.linalg.eigh(matrix)
        return values[-3:].flip(0), vectors[:, -3:].flip(1)
    # A full decomposition takes half a minute for 3072 channels. The start vectors have a generator of their own, so
    # that equal features give equal pictures and the random state of a training run stays as it is.
    start = torch.randn(len(matrix), 3, generator=torch.Generator().manual_seed(0))
    largest = matrix.abs().max().clamp(min=1e-12)
    values, vectors = torch.lobpcg(matrix / largest, X=start.to(matrix), niter=200)
    return values * largest, vectors


def principal_components(tokens: torch.Tensor, reference: torch.Tensor | None = None) -> torch.Tensor:
    """
    Compute the first three principal components of the features, with unit variance. All images share one basis.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_patches, width)`): The features.
        reference (`torch.Tensor` of shape `(batch_size, n, 3)`, *optional*): Components of another encoder for the
            same images, resampled if its grid differs. The basis is rotated towards them (orthogonal Procrustes), so
            that equal colors mean the same as far as the encoders agree.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_patches, 3)`. Components that do not exist are zero.
    """
    flat = tokens.float().flatten(0, 1)
    flat = flat - flat.mean(dim=0)
    # Decompose the smaller of the two Gram matrices.
    by_channel = len(flat) > flat.shape[1]
    variances, components = leading_eigenvectors(flat.T @ flat if by_channel else flat @ flat.T)
    if by_channel:
        components = nn.functional.normalize(flat @ components, dim=0)
    components = components * len(flat) ** 0.5 * (variances > 1e-6 * variances[:1].clamp(min=1e-12))
    components = nn.functional.pad(components, (0, 3 - components.shape[1]))
    if reference is not None:
        target = resample(reference.to(tokens.device), tokens.shape[1]).float().flatten(0, 1)
        left, _, right = torch.linalg.svd(components.T @ target)
        components = components @ left @ right
    return components.view(*tokens.shape[:2], 3)


def component_picture(components: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Draw components `(batch_size, num_patches, 3)` as red, green and blue, uint8 `(batch_size, *size, 3)`."""
    # Gray is 0, and the range ends at two standard deviations.
    return enlarge(to_grid(127.5 + 127.5 * components / 2), size, smooth=False).round().clamp(0, 255).byte()


def resample(tokens: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Resize features `(batch_size, n, width)` from one square grid to another of `num_patches`."""
    if tokens.shape[1] == num_patches:
        return tokens
    side = round(num_patches**0.5)
    grid = to_grid(tokens.float()).permute(0, 3, 1, 2)
    shrinks = side < grid.shape[-1]
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bilinear", antialias=shrinks)
    return grid.flatten(2).transpose(1, 2)


def relational_distance(tokens: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """
    Measure how differently two encoders relate each patch to the other patches of its image.

    The distance is 1 minus the correlation between the patch's cosine similarities in one encoder and in the other.
    It compares encoders of any width without trained parameters.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_patches, width)`): Features of one encoder.
        others (`torch.Tensor` of shape `(batch_size, n, other_width)`): Features of the other, on any square grid.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_patches)`, from 0 (same relations) to 2.
    """
    profiles = []
    off_diagonal = ~torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    for features in (tokens.float(), resample(others, tokens.shape[1]).float()):
        # Without this, the mean over the image would dominate every similarity.
        features = nn.functional.normalize(features - features.mean(dim=1, keepdim=True), dim=-1)
        similarity = (features @ features.transpose(1, 2)) * off_diagonal
        mean = similarity.sum(dim=-1, keepdim=True) / (tokens.shape[1] - 1)
        profiles.append((similarity - mean) * off_diagonal)
    return 1 - nn.functional.cosine_similarity(profiles[0], profiles[1], dim=-1)


def draw(
    image: torch.Tensor,
    tokens: torch.Tensor,
    cls_attention: torch.Tensor | None,
    expert_indices: torch.Tensor | None,
    num_experts: int,
    other_tokens: Mapping[str, torch.Tensor] | None = None,
    reference: torch.Tensor | None = None,
) -> MoveKDPictures:
    """
    Draw all pictures of one layer.

    Args:
        image (`torch.Tensor` of shape `(batch_size, height, width, 3)`): The images in uint8.
        tokens (`torch.Tensor` of shape `(batch_size, num_patches, hidden_size)`): The student's features.
        cls_attention (`torch.Tensor` of shape `(batch_size, num_patches)`, *optional*): Attention of [CLS] to the
            patches.
        expert_indices (`torch.Tensor` of shape `(batch_size, num_patches)`, *optional*): Index of each patch's expert.
        num_experts (`int`): Number of experts.
        other_tokens, reference (*optional*): See [`MoveKDVisionModel.visualize`].
    """
    tokens, size = tokens.float(), image.shape[1:3]
    for name, features in {"the student": tokens, **(other_tokens or {})}.items():
        if not torch.isfinite(features).all():
            raise ValueError(
                f"The features of {name!r} are not finite. Run the encoder in float32, or draw an earlier layer."
            )
    values = principal_components(tokens, reference)
    others = {}
    for name, features in (other_tokens or {}).items():
        features = features.to(tokens.device).float()
        if features.dim() != 3 or len(features) != len(tokens) or not is_square(features.shape[1]):
            raise ValueError(
                f"The features of {name!r} have the shape {tuple(features.shape)}. Expected the patches of a square "
                f"grid, without [CLS] and registers: ({len(tokens)}, num_patches, width)."
            )
        distances = relational_distance(tokens, features)
        components = component_picture(principal_components(features, values), size)
        distance = heat_map(distances.clamp(min=0), image, top=1.0)
        others[name] = OtherPictures(components.cpu(), distance.cpu(), distances.cpu())
    experts = shares = colors = None
    if expert_indices is not None:
        experts, shares = expert_map(expert_indices, num_experts, image)
        experts, shares, colors = experts.cpu(), shares.cpu(), expert_colors(num_experts)
    return MoveKDPictures(
        image=image.cpu(),
        experts=experts,
        expert_shares=shares,
        expert_colors=colors,
        cls_attention=None if cls_attention is None else heat_map(cls_attention, image).cpu(),
        components=component_picture(values, size).cpu(),
        tokens=tokens.cpu(),
        values=values.cpu(),
        others=others,
    )


__all__ = ["MoveKDPictures", "OtherPictures"]
