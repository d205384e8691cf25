"""What stands between the student's tokens and the teachers' features while training (MoVE-KD, section 3.3)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from train.losses import CLIP, distillation_loss, teacher_weights, token_weights


if TYPE_CHECKING:
    from train.teachers import TeacherFeatures


@dataclass
class DistillationOutput:
    """
    Args:
        loss (`torch.Tensor` of shape `(batch_size,)`): Sum over the weighted teachers.
        teacher_losses (`dict[str, torch.Tensor]`): By teacher `(batch_size,)`, unweighted.
        teacher_weights (`dict[str, torch.Tensor]`): By teacher `(batch_size,)`.
    """

    loss: torch.Tensor
    teacher_losses: dict[str, torch.Tensor]
    teacher_weights: dict[str, torch.Tensor]


def resample_grid(tokens: torch.Tensor, grid: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    """
    Bring features to another grid: several cells become one cell with all their channels where the grid divides by
    the same factor in both directions (nothing is lost), else antialiased bilinear interpolation.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, h * w, num_channels)`), `grid` its (h, w).

    Returns:
        `torch.Tensor` of shape `(batch_size, H * W, num_channels * factor**2)` for the target (H, W).
    """
    features = tokens.transpose(1, 2).unflatten(2, grid)
    if factor := unshuffle_factor(grid, target):
        features = nn.functional.pixel_unshuffle(features, factor)
    else:
        features = nn.functional.interpolate(features, size=target, mode="bilinear", antialias=True)
    return features.flatten(2).transpose(1, 2)


def unshuffle_factor(grid: tuple[int, int], target: tuple[int, int]) -> int | None:
    """How many cells in a row become one, if it is the same whole number for rows and columns, else `None`."""
    factor, rest = divmod(grid[0], target[0])
    return factor if rest == 0 and grid == (target[0] * factor, target[1] * factor) else None


class TeacherAdapter(nn.Module):
    """
    Teacher's side: the teacher's channels to the student's width, GELU, its tokens to the student's (a learned mixing,
    or a resampling before the channels). Trained with the student.
    """

    def __init__(
        self, width: int, grid: tuple[int, int], student_width: int, student_grid: tuple[int, int], grid_matching: str
    ) -> None:
        super().__init__()
        self.grid, self.student_grid = grid, student_grid
        self.tokens: nn.Linear | None = None
        if grid_matching == "learned":
            self.tokens = nn.Linear(grid[0] * grid[1], student_grid[0] * student_grid[1])
        else:
            width *= (unshuffle_factor(grid, student_grid) or 1) ** 2
        self.channels = nn.Linear(width, student_width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch_size, h * w, width)` to `(batch_size, num_student_tokens, student_width)`."""
        if self.tokens is None:
            return self.channels(resample_grid(tokens, self.grid, self.student_grid))
        adapted = nn.functional.gelu(self.channels(tokens).transpose(1, 2))
        return self.tokens(adapted).transpose(1, 2)


class StudentHead(nn.Module):
    """
    Student's side: an MLP d-2d-k from the student's tokens to one teacher's features, which are a fixed target.

    The target is normalised per channel to zero mean and unit variance, brought to the student's grid, and, to whiten,
    projected to its first principal components at unit variance. The statistics are measured by
    [`Distiller.fit_statistics`] and saved with the head.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    components: torch.Tensor | None

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        student_width: int,
        student_grid: tuple[int, int],
        normalization: str,
        num_components: int,
    ) -> None:
        super().__init__()
        self.grid, self.student_grid, self.normalization = grid, student_grid, normalization
        self.num_channels = width * (unshuffle_factor(grid, student_grid) or 1) ** 2
        num_targets = min(num_components, self.num_channels) if normalization == "whiten" else self.num_channels
        self.head = nn.Sequential(
            nn.Linear(student_width, 2 * student_width), nn.GELU(), nn.Linear(2 * student_width, num_targets)
        )
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("components", None)
        if normalization == "whiten":
            self.components = torch.zeros(num_targets, self.num_channels)
        self.is_fitted = normalization == "none"
        self.sums: list[torch.Tensor] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_tokens, student_width)` to `(batch_size, num_tokens, num_targets)`."""
        return self.head(tokens)

    def target(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch_size, h * w, width)` to `(batch_size, num_student_tokens, num_targets)`, without gradient."""
        if not self.is_fitted:
            raise ValueError("The teacher's statistics are not measured yet; call `Distiller.fit_statistics` first.")
        with torch.no_grad():
            scaled = (tokens.to(self.mean.dtype) - self.mean) / self.variance.sqrt().clamp(min=1e-6)
            scaled = resample_grid(scaled, self.grid, self.student_grid)
            return scaled if self.components is None else scaled @ self.components.t()

    @torch.no_grad()
    def observe(self, tokens: torch.Tensor) -> None:
        """Add features `(batch_size, h * w, width)` to the sums, kept in float64, that [`StudentHead.finish`] uses."""
        tokens = tokens.to(self.mean.device).double()
        flat = tokens.flatten(0, 1)
        sums = [torch.tensor(float(len(flat))), flat.sum(0), flat.square().sum(0)]
        if self.components is not None:
            resampled = resample_grid(tokens, self.grid, self.student_grid).flatten(0, 1)
            sums += [torch.tensor(float(len(resampled))), resampled.sum(0), resampled.t() @ resampled]
        self.sums = [old + new for old, new in zip(self.sums, sums, strict=True)] if self.sums else sums

    @torch.no_grad()
    def finish(self) -> None:
        """
        Set the statistics from what was observed.

        Raises:
            ValueError: if nothing was, or the sample has fewer independent directions than components are asked for.
        """
        if not self.sums:
            raise ValueError("No features were given to measure the teacher's statistics from.")
        count, total, squares, *resampled = self.sums
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        if self.components is not None:
            # Standardising and resampling commute, so the moments of the raw features are enough
            repeats = self.num_channels // len(mean)
            centre, scale = (value.repeat_interleave(repeats) for value in (mean, variance.sqrt().clamp(min=1e-6)))
            moment, first = resampled[2] / resampled[0], resampled[1] / resampled[0]
            covariance = moment - torch.outer(first, centre) - torch.outer(centre, first) + torch.outer(centre, centre)
            values, vectors = torch.linalg.eigh(covariance / torch.outer(scale, scale))
            asked = len(self.components)
            values, vectors = values.flip(0)[:asked], vectors.flip(1)[:, :asked].t()
            found = min(int((values > 1e-8 * values[0]).sum()), int(resampled[0]))
            if found < asked:
                raise ValueError(
                    f"The features have {found} independent directions, {asked} principal components are asked for. "
                    "Set `whitening_components` lower, or measure more images."
                )
            # An eigenvector's sign is arbitrary: its largest entry is made positive
            largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
            self.components.copy_(vectors * largest.sign() / values.sqrt().unsqueeze(1))
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        self.sums, self.is_fitted = [], True


class Distiller(nn.ModuleDict):
    """
    Adapters or heads of all teachers, by name, and the distillation loss they give. CLIP, the teacher that the student
    started from, has no adapter on the teacher's side.

    Args:
        student_width, student_grid: Width and grid (h, w) of the student's tokens.
        teachers: By name the width and the grid of each teacher's features.
        head_side: `"teacher"` (adapters) or `"student"` (heads against fixed targets).
        feature_normalization: `"none"`, `"standardize"` or `"whiten"`; only fixed targets are normalised.
        whitening_components: Principal components kept of each teacher.
        grid_matching: `"learned"` mixing of tokens (adapters only) or `"resample"`.
        token_weighting, teacher_weighting, clip_share: See `train/losses.py`.

    Raises:
        ValueError: for forms that do not go together, naming what to change.
    """

    def __init__(
        self,
        student_width: int,
        student_grid: tuple[int, int],
        teachers: Mapping[str, tuple[int, tuple[int, int]]],
        head_side: str = "teacher",
        feature_normalization: str = "none",
        whitening_components: int = 64,
        grid_matching: str = "learned",
        token_weighting: str = "cls_attention",
        teacher_weighting: str = "cls_similarity",
        clip_share: float = 0.8,
    ) -> None:
        super().__init__()
        for value, choices in (
            (head_side, ("teacher", "student")),
            (feature_normalization, ("none", "standardize", "whiten")),
            (grid_matching, ("learned", "resample")),
        ):
            if value not in choices:
                raise ValueError(f"{value!r} is none of {choices}.")
        if not 0 <= clip_share <= 1:
            raise ValueError(f"`clip_share` is {clip_share}; a share lies between 0 and 1.")
        if head_side == "teacher" and feature_normalization != "none":
            raise ValueError(
                f"`feature_normalization` is {feature_normalization!r}, which is for fixed targets: adapters on the "
                "teacher's side learn their own scale. Set `head_side` to 'student', or the normalisation to 'none'."
            )
        if head_side == "student" and (grid_matching == "learned" or teacher_weighting != "equal"):
            raise ValueError(
                f"Heads on the student's side need `grid_matching` 'resample' and `teacher_weighting` 'equal', got "
                f"{grid_matching!r} and {teacher_weighting!r}: fixed targets are not in the student's space."
            )
        if CLIP not in teachers and (token_weighting != "none" or teacher_weighting != "equal"):
            raise ValueError(
                f"`token_weighting` {token_weighting!r} and `teacher_weighting` {teacher_weighting!r} take their "
                f"weights from a teacher named {CLIP!r}; there are {sorted(teachers)}. Add it, or choose 'none' and "
                "'equal'."
            )
        self.student_grid, self.head_side = student_grid, head_side
        self.token_weighting, self.teacher_weighting = token_weighting, teacher_weighting
        self.clip_share, self.teachers = clip_share, dict(teachers)
        for name, (width, grid) in teachers.items():
            if head_side == "student":
                self[name] = StudentHead(
                    width, grid, student_width, student_grid, feature_normalization, whitening_components
                )
            elif name != CLIP:
                self[name] = TeacherAdapter(width, grid, student_width, student_grid, grid_matching)
            elif (width, grid) != (student_width, student_grid):
                raise ValueError(
                    f"The teacher {CLIP!r} has width {width} and grid {grid}, the student {student_width} and "
                    f"{student_grid}: it must be the model the student started from. Give it another name otherwise."
                )

    def _check_features(self, student_tokens: torch.Tensor, features: "Mapping[str, TeacherFeatures]") -> None:
        if sorted(features) != sorted(self.teachers):
            raise ValueError(
                f"Features of {sorted(features)} were given, those of {sorted(self.teachers)} are needed."
            )
        expected = self.student_grid[0] * self.student_grid[1]
        if student_tokens.shape[1] != expected:
            raise ValueError(f"The student gave {student_tokens.shape[1]} tokens, its grid is {self.student_grid}.")
        for name, (width, grid) in self.teachers.items():
            found = (features[name].tokens.shape[2], tuple(features[name].grid), features[name].tokens.shape[1])
            if found != (width, tuple(grid), grid[0] * grid[1]):
                raise ValueError(
                    f"Teacher {name} gave {found[2]} tokens of width {found[0]} on a grid of {found[1]}; its head was "
                    f"built for {grid[0] * grid[1]} tokens of width {width} on {grid}. Keep the teacher and its image "
                    "size, or start a new distiller."
                )

    def forward(self, student_tokens: torch.Tensor, features: "Mapping[str, TeacherFeatures]") -> DistillationOutput:
        """
        The distillation loss of each image (equations 5 to 7 of the paper).

        Args:
            student_tokens (`torch.Tensor` of shape `(batch_size, num_tokens, student_width)`): Patches, without [CLS].
            features: By teacher, for the same images.

        Raises:
            ValueError: if the features are not those the heads were built for, with both shapes.
        """
        self._check_features(student_tokens, features)
        dtype = student_tokens.dtype
        if self.head_side == "student":
            pairs = {name: (self[name](student_tokens), self[name].target(features[name].tokens)) for name in features}
        else:
            # CLIP is compared as it is
            pairs = {
                name: (student_tokens, self[name](value.tokens.to(dtype)) if name in self else value.tokens)
                for name, value in features.items()
            }
        clip = features.get(CLIP)
        if self.token_weighting == "none" or clip is None or clip.cls_attention is None:
            tokens = student_tokens.new_full(
                student_tokens.shape[:2], 1 / student_tokens.shape[1], dtype=torch.float32
            )
        else:
            tokens = token_weights(clip.cls_attention, self.token_weighting)
        shares = teacher_weights(
            None if clip is None else clip.cls,
            {name: target for name, (_, target) in pairs.items()},
            self.teacher_weighting,
            self.clip_share,
        )
        losses = {name: distillation_loss(*pair, tokens, self.token_weighting) for name, pair in pairs.items()}
        loss = torch.stack([shares[name] * losses[name] for name in losses]).sum(dim=0)
        return DistillationOutput(loss, losses, shares)

    @property
    def needs_statistics(self) -> bool:
        """Whether [`Distiller.fit_statistics`] has to be called before the first forward."""
        return any(isinstance(head, StudentHead) and not head.is_fitted for head in self.values())

    def fit_statistics(self, batches: "Iterable[Mapping[str, TeacherFeatures]]") -> None:
        """Measure each teacher's statistics over a sample of batches of features."""
        heads = {name: head for name, head in self.items() if isinstance(head, StudentHead) and not head.is_fitted}
        for batch in batches:
            for name, head in heads.items():
                head.observe(batch[name].tokens)
        for head in heads.values():
            head.finish()

    def save(self, path: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the weights and statistics as safetensors, under a temporary name first."""
        path = Path(path)
        state_dict = self.state_dict() if state_dict is None else state_dict
        temporary = path.with_name(f"{path.name}.tmp")
        save_file({key: value.detach().cpu().contiguous() for key, value in state_dict.items()}, temporary)
        temporary.replace(path)

    def load(self, path: str | Path) -> None:
        """
        Read what [`Distiller.save`] wrote.

        Raises:
            ValueError: if the file is missing, lacks keys, has others, or other shapes; listing them.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path} is missing: without it, adapters and heads would start anew. Restore it.")
        loaded, own = load_file(path), self.state_dict()
        shapes = {
            key: (tuple(loaded[key].shape), tuple(own[key].shape))
            for key in sorted(loaded.keys() & own.keys())
            if loaded[key].shape != own[key].shape
        }
        missing, unexpected = sorted(own.keys() - loaded.keys()), sorted(loaded.keys() - own.keys())
        if missing or unexpected or shapes:
            raise ValueError(
                f"{path} does not fit the distiller: missing {missing}, left over {unexpected}, other shapes (in the "
                f"file, needed) {shapes}. Use the teachers and the preset it was trained with."
            )
        self.load_state_dict(loaded)
        for head in self.values():
            if isinstance(head, StudentHead):
                head.is_fitted = True
