"""Pictures of what the tower does, from tensors alone: experts, [CLS] attention, principal components, distances."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


# Okabe and Ito's colours, which readers with any colour vision can tell apart
EXPERT_COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (153, 153, 153),
)
# From dark to light, even in lightness
HEAT_COLOURS = ((10, 7, 34), (84, 15, 109), (159, 42, 99), (221, 81, 58), (252, 165, 10), (252, 255, 164))


class OtherPictures(NamedTuple):
    """
    Another encoder beside the student.

    Args:
        components: Its features' principal components, coloured as the student's where the two agree; a picture.
        distance: [`relational_distance`] of the student's patches over the image, dark for 0 to light for 1 (no
            relation) and above, the same for all images and encoders; a picture.
        distances: The same in numbers, float32 `(batch_size, num_patches)`.
    """

    components: torch.Tensor
    distance: torch.Tensor
    distances: torch.Tensor


@dataclass
class MoveKDPictures:
    """
    Pictures are uint8 `(batch_size, height, width, 3)` on the CPU, all of one size.

    Args:
        image: What the tower saw.
        experts: The expert of each patch as a colour over the image; `None` for a tower without experts.
        expert_shares: Share of the patches that each expert got, float32 `(batch_size, num_experts)`.
        expert_colours: RGB of each expert, uint8 `(num_experts, 3)`.
        cls_attention: [CLS] attention, mean over heads, over the image; dark is none, light the most in this image.
        components: The features' first three principal components as red, green and blue.
        tokens: The features behind `components`, float32 `(batch_size, num_patches, hidden_size)`.
        values: What `components` shows, float32 `(batch_size, num_patches, 3)`, see [`principal_components`].
        others: By name, the pictures of the other encoders that were given.
    """

    image: torch.Tensor
    experts: torch.Tensor | None
    expert_shares: torch.Tensor | None
    expert_colours: torch.Tensor | None
    cls_attention: torch.Tensor
    components: torch.Tensor
    tokens: torch.Tensor
    values: torch.Tensor
    others: dict[str, OtherPictures] = field(default_factory=dict)


def to_grid(values: torch.Tensor) -> torch.Tensor:
    """
    Patches `(batch_size, num_patches, ...)`, row by row, as `(batch_size, side, side, ...)`.

    Raises:
        ValueError: if they are no square.
    """
    side = round(values.shape[1] ** 0.5)
    if side * side != values.shape[1]:
        raise ValueError(f"{values.shape[1]} patches are no square grid; give the patches alone, without [CLS].")
    return values.unflatten(1, (side, side))


def enlarge(grid: torch.Tensor, size: Sequence[int], smooth: bool) -> torch.Tensor:
    """`(batch_size, rows, columns, channels)` to `(batch_size, *size, channels)`, in whole cells or smoothly."""
    mode = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest-exact"}
    return nn.functional.interpolate(grid.permute(0, 3, 1, 2).float(), size=tuple(size), **mode).permute(0, 2, 3, 1)


def overlay(colours: torch.Tensor, image: torch.Tensor, opacity: float) -> torch.Tensor:
    """Colours over an image, both `(batch_size, height, width, 3)` between 0 and 255; uint8."""
    return (opacity * colours.float() + (1 - opacity) * image.float()).round().clamp(0, 255).byte()


def pixels_to_image(
    pixel_values: torch.Tensor,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    smallest_side: int = 1,
) -> torch.Tensor:
    """
    Undo a normalisation, by default CLIP's: `(batch_size, 3, height, width)` to uint8 `(..., height, width, 3)`,
    enlarged by a whole factor, pixel by pixel, until no side is shorter than `smallest_side`.
    """
    scale = torch.tensor(std or OPENAI_CLIP_STD, device=pixel_values.device).view(3, 1, 1)
    shift = torch.tensor(mean or OPENAI_CLIP_MEAN, device=pixel_values.device).view(3, 1, 1)
    image = ((pixel_values.float() * scale + shift) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    factor = -(-smallest_side // min(image.shape[1:3]))
    return image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def expert_colours(num_experts: int) -> torch.Tensor:
    """uint8 `(num_experts, 3)`; after the eighth, evenly spaced hues."""
    hues = torch.arange(num_experts)[:, None] / num_experts + torch.tensor([0, 1 / 3, 2 / 3])
    colours = (127.5 + 127.5 * (2 * torch.pi * hues).cos()).byte()
    known = torch.tensor(EXPERT_COLOURS, dtype=torch.uint8)[:num_experts]
    colours[: len(known)] = known
    return colours


def expert_map(
    indices: torch.Tensor, num_experts: int, image: torch.Tensor, opacity: float = 0.55
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The expert of each patch as a colour over the image.

    Args:
        indices (`torch.Tensor` of shape `(batch_size, num_patches)`, int64).
        image (`torch.Tensor` of shape `(batch_size, height, width, 3)`, uint8).

    Returns:
        The picture, uint8 as `image`, and each expert's share of the patches, float32 `(batch_size, num_experts)`.
    """
    colours = expert_colours(num_experts).to(indices.device)[indices]
    shares = nn.functional.one_hot(indices, num_experts).float().mean(dim=1)
    return overlay(enlarge(to_grid(colours), image.shape[1:3], smooth=False), image, opacity), shares


def heat_map(
    values: torch.Tensor, image: torch.Tensor, top: float | None = None, opacity: float = 0.6
) -> torch.Tensor:
    """
    One number a patch as a colour over the image, from dark for 0 to light for `top`.

    Args:
        values (`torch.Tensor` of shape `(batch_size, num_patches)`): At least 0.
        image (`torch.Tensor` of shape `(batch_size, height, width, 3)`, uint8).
        top (`float`, *optional*): By default the largest value of each image.

    Returns:
        The picture, uint8 as `image`.
    """
    values = values.float()
    largest = values.amax(dim=1, keepdim=True) if top is None else torch.full_like(values[:, :1], top)
    grid = enlarge(to_grid(values / largest.clamp(min=1e-12)).unsqueeze(-1), image.shape[1:3], smooth=True)
    stops = torch.tensor(HEAT_COLOURS, dtype=torch.float32, device=values.device)
    place = grid.squeeze(-1).clamp(0, 1) * (len(stops) - 1)
    low = place.long().clamp(max=len(stops) - 2)
    colours = torch.lerp(stops[low], stops[low + 1], (place - low).unsqueeze(-1))
    return overlay(colours, image, opacity)


def leading_eigenvectors(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a symmetric matrix, the three largest eigenvalues at most, largest first, and their vectors in columns."""
    if len(matrix) <= 256:
        values, vectors = torch.linalg.eigh(matrix)
        return values[-3:].flip(0), vectors[:, -3:].flip(1)
    # All of them would take half a minute for a teacher of 3072 channels. The start is fixed, so that equal features
    # give equal pictures and no random number is taken from a training run
    start = torch.randn(len(matrix), 3, generator=torch.Generator().manual_seed(0))
    largest = matrix.abs().max().clamp(min=1e-12)
    values, vectors = torch.lobpcg(matrix / largest, X=start.to(matrix), niter=200)
    return values * largest, vectors


def principal_components(tokens: torch.Tensor, reference: torch.Tensor | None = None) -> torch.Tensor:
    """
    The first three principal components of these images' features, one basis for all of them, with unit variance.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_patches, width)`).
        reference (`torch.Tensor` of shape `(batch_size, n, 3)`, *optional*): Components of another encoder for the
            same images, resampled if the grid is another. The basis is turned (orthogonal Procrustes) so that equal
            colours mean the same in both pictures as far as they agree at all.

    Returns:
        float32 `(batch_size, num_patches, 3)`; zeros where there are fewer than three.
    """
    flat = tokens.float().flatten(0, 1)
    flat = flat - flat.mean(dim=0)
    by_channel = len(flat) > flat.shape[1]
    variances, components = leading_eigenvectors(flat.T @ flat if by_channel else flat @ flat.T)
    if by_channel:
        components = nn.functional.normalize(flat @ components, dim=0)
    components = components * len(flat) ** 0.5 * (variances > 1e-6 * variances[:1].clamp(min=1e-12))
    components = nn.functional.pad(components, (0, 3 - components.shape[1]))
    if reference is not None:
        aligned = resample(reference.to(tokens.device), tokens.shape[1]).float().flatten(0, 1)
        turn, _, back = torch.linalg.svd(components.T @ aligned)
        components = components @ turn @ back
    return components.view(*tokens.shape[:2], 3)


def component_picture(components: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Components `(batch_size, num_patches, 3)` as red, green and blue, uint8 `(batch_size, *size, 3)`."""
    # Two standard deviations to either side of grey
    return enlarge(to_grid(127.5 + 127.5 * components / 2), size, smooth=False).round().clamp(0, 255).byte()


def resample(tokens: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Features `(batch_size, n, width)` of one square grid brought to another, `(batch_size, num_patches, width)`."""
    if tokens.shape[1] == num_patches:
        return tokens
    side = round(num_patches**0.5)
    grid = to_grid(tokens.float()).permute(0, 3, 1, 2)
    shrinks = side < grid.shape[-1]
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bilinear", antialias=shrinks)
    return grid.flatten(2).transpose(1, 2)


def relational_distance(tokens: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """
    How differently two encoders relate a patch to the rest of its image: 1 minus the correlation of its cosine
    similarities to all other patches in one encoder with those in the other. It compares encoders of any width, and
    needs nothing that was trained.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_patches, width)`).
        others (`torch.Tensor` of shape `(batch_size, n, other_width)`): Resampled if the grid is another.

    Returns:
        float32 `(batch_size, num_patches)`, from 0 (the same) to 2.
    """
    profiles = []
    elsewhere = ~torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    for features in (tokens.float(), resample(others, tokens.shape[1]).float()):
        # The mean over the image is most of every token, and says nothing of this patch
        features = nn.functional.normalize(features - features.mean(dim=1, keepdim=True), dim=-1)
        similarity = (features @ features.transpose(1, 2)) * elsewhere  # each is like itself in any encoder
        mean = similarity.sum(dim=-1, keepdim=True) / (tokens.shape[1] - 1)
        profiles.append((similarity - mean) * elsewhere)
    return 1 - nn.functional.cosine_similarity(profiles[0], profiles[1], dim=-1)


def draw(
    image: torch.Tensor,
    tokens: torch.Tensor,
    cls_attention: torch.Tensor,
    expert_indices: torch.Tensor | None,
    num_experts: int,
    other_tokens: Mapping[str, torch.Tensor] | None = None,
    reference: torch.Tensor | None = None,
) -> MoveKDPictures:
    """
    All pictures of one layer, on the CPU.

    Args:
        image (`torch.Tensor` of shape `(batch_size, height, width, 3)`, uint8).
        tokens (`torch.Tensor` of shape `(batch_size, num_patches, hidden_size)`).
        cls_attention (`torch.Tensor` of shape `(batch_size, num_patches)`).
        expert_indices (`torch.Tensor` of shape `(batch_size, num_patches)`, int64, *optional*).
        other_tokens: By name, patch features `(batch_size, n, width)` of other encoders for the same images, of any
            square grid and width, without [CLS] and registers.
        reference: See [`principal_components`].

    Raises:
        ValueError: naming the encoder, if its features are not finite, of another number of images, or on no square
            grid.
    """
    tokens, size = tokens.float(), image.shape[1:3]
    for name, features in {"the student": tokens, **(other_tokens or {})}.items():
        if not torch.isfinite(features).all():
            raise ValueError(f"The features of {name!r} are not finite; run it in float32, or look at an earlier one.")
    values = principal_components(tokens, reference)
    others = {}
    for name, features in (other_tokens or {}).items():
        features = features.to(tokens.device).float()
        is_square = features.dim() == 3 and round(features.shape[1] ** 0.5) ** 2 == features.shape[1]
        if not is_square or len(features) != len(tokens):
            raise ValueError(
                f"The features of {name!r} have the shape {tuple(features.shape)}; (batch_size, num_patches, width)"
                f" of {len(tokens)} images is expected, the patches of a square grid alone: no [CLS], no registers."
            )
        distances = relational_distance(tokens, features)
        components = component_picture(principal_components(features, values), size)
        distance = heat_map(distances.clamp(min=0), image, top=1.0)
        others[name] = OtherPictures(components.cpu(), distance.cpu(), distances.cpu())
    experts = shares = colours = None
    if expert_indices is not None:
        experts, shares = expert_map(expert_indices, num_experts, image)
        experts, shares, colours = experts.cpu(), shares.cpu(), expert_colours(num_experts)
    return MoveKDPictures(
        image=image.cpu(),
        experts=experts,
        expert_shares=shares,
        expert_colours=colours,
        cls_attention=heat_map(cls_attention, image).cpu(),
        components=component_picture(values, size).cpu(),
        tokens=tokens.cpu(),
        values=values.cpu(),
        others=others,
    )


__all__ = ["MoveKDPictures", "OtherPictures"]
