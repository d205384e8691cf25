"""Adapters on the teachers' features, heads on the student's features, and the targets that both are compared with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


# More channels have a covariance of gigabytes, which takes minutes to decompose
MAX_UNSHUFFLED_CHANNELS = 4096


def unshuffle_factors(width: int, grid: tuple[int, int], target_grid: tuple[int, int]) -> tuple[int, int] | None:
    """
    The rows and columns of `grid` that make one cell of `target_grid`. `None` if the grids do not divide, or if the
    cells together have more than 4096 channels.
    """
    (rows, rest_rows), (columns, rest_columns) = (
        divmod(size, target) for size, target in zip(grid, target_grid, strict=True)
    )
    if rest_rows or rest_columns or width * rows * columns > max(MAX_UNSHUFFLED_CHANNELS, width):
        return None
    return rows, columns


def resample_grid(tokens: torch.Tensor, grid: tuple[int, int], target_grid: tuple[int, int]) -> torch.Tensor:
    """
    Resample features to another grid: by pixel-unshuffle, which loses nothing, if [`unshuffle_factors`] gives factors,
    and by bilinear interpolation with antialiasing otherwise.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, h * w, num_channels)`): Features, row by row.
        grid (`tuple[int, int]`): Their height and width in cells.
        target_grid (`tuple[int, int]`): The height H and width W to resample to.

    Returns:
        `torch.Tensor` of shape `(batch_size, H * W, num_channels * rows * columns)`.
    """
    width = tokens.shape[-1]
    if grid == target_grid:
        return tokens
    if factors := unshuffle_factors(width, grid, target_grid):
        cells = tokens.reshape(-1, target_grid[0], factors[0], target_grid[1], factors[1], width)
        return cells.transpose(2, 3).flatten(3).flatten(1, 2)
    return interpolate_grid(tokens, grid, target_grid)


def interpolate_grid(tokens: torch.Tensor, grid: tuple[int, int], target_grid: tuple[int, int]) -> torch.Tensor:
    """As [`resample_grid`], but always by interpolation, so that the channels stay."""
    if grid == target_grid:
        return tokens
    tokens = tokens.float() if tokens.dtype == torch.bfloat16 else tokens  # which a CPU does not interpolate
    maps = tokens.transpose(1, 2).unflatten(2, grid)
    maps = nn.functional.interpolate(maps, size=target_grid, mode="bilinear", align_corners=False, antialias=True)
    return maps.flatten(2).transpose(1, 2)


def target_grid(grid: tuple[int, int], student_grid: tuple[int, int], grid_matching: str) -> tuple[int, int]:
    """The grid on which a teacher's features of `grid` are compared with a student's of `student_grid`."""
    if grid_matching == "resample":
        return student_grid
    if grid_matching == "upsample":
        return max(grid[0], student_grid[0]), max(grid[1], student_grid[1])
    return grid


class Target(nn.Module):
    """
    The target that one teacher's features give: normalized, resampled and whitened as the options say. It has no
    parameters. Used alone for the CLIP teacher, whose features need no adapter.

    The buffers `mean`, `variance` (per channel after resampling) and `components` (one output a row: with `"whiten"` a
    principal component scaled to unit variance, with `"phi_s"` a row of the rotation) are NaN until
    [`Distiller.fit_statistics`] measures them. They stay float32.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    components: torch.Tensor

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        student_grid: tuple[int, int],
        feature_normalization: str = "none",
        whitening_components: int = 64,
        grid_matching: str = "learned",
    ) -> None:
        super().__init__()
        self.feature_normalization = feature_normalization
        self.grid, self.target_grid = grid, target_grid(grid, student_grid, grid_matching)
        rows, columns = unshuffle_factors(width, grid, self.target_grid) or (1, 1)
        self.target_width = channels = width * rows * columns
        self.buffer_names: tuple[str, ...] = ()
        if feature_normalization != "none":
            self.buffer_names = ("mean", "variance")
            self.register_buffer("mean", torch.full((channels,), torch.nan))
            self.register_buffer("variance", torch.full((channels,), torch.nan))
        if feature_normalization in ("whiten", "phi_s"):
            self.buffer_names += ("components",)
            if feature_normalization == "whiten":
                self.target_width = min(whitening_components, channels)
            self.register_buffer("components", torch.full((self.target_width, channels), torch.nan))
        self.needs_statistics = bool(self.buffer_names)
        # The head of the teacher's summary, if the distiller has heads for summaries
        self.summary: StudentHead | None = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Target":
        """Move the statistics with the module, but keep them float32: half precision would round them for good."""
        statistics = {name: getattr(self, name) for name in self.buffer_names}
        super()._apply(fn, recurse)
        for name, value in statistics.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.needs_statistics = not all(getattr(self, name).isfinite().all() for name in self.buffer_names)

    def target(self, tokens: torch.Tensor) -> torch.Tensor:
        """
        Compute the target of features `(batch_size, h * w, width)`, without gradient. Changed features are float32.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_target_tokens, target_width)`.
        """
        tokens = tokens.detach()
        if self.grid == self.target_grid and not self.buffer_names:
            return tokens
        tokens = resample_grid(tokens.float(), self.grid, self.target_grid)
        if self.buffer_names:
            # The same as normalizing before the resampling, which is linear
            tokens = (tokens - self.mean) * torch.where(self.variance > 0, self.variance, 1.0).rsqrt()
        if "components" in self.buffer_names:
            with torch.autocast(tokens.device.type, enabled=False):
                tokens = nn.functional.linear(tokens, self.components)
        return tokens

    def forward(self, student_tokens: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's and the teacher's side of the squared error, `(batch_size, num_tokens, num_channels)` each."""
        return student_tokens, self.target(tokens)


class TeacherAdapter(Target):
    """
    The paper's encoder adapter on a teacher's features: a linear layer `channels` to the student's width, GELU, and a
    linear layer `tokens` over the tokens to the student's grid. Resampled features need no `tokens`.
    """

    def __init__(
        self, width: int, grid: tuple[int, int], student_width: int, student_grid: tuple[int, int], **target: Any
    ) -> None:
        super().__init__(width, grid, student_grid, **target)
        self.channels = nn.Linear(self.target_width, student_width)
        self.tokens: nn.Linear | None = None
        if target["grid_matching"] == "learned":
            self.tokens = nn.Linear(grid[0] * grid[1], student_grid[0] * student_grid[1])

    def forward(self, student_tokens: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        adapted = self.channels(_to_parameters(self.target(tokens), self.channels))
        if self.tokens is not None:
            adapted = self.tokens(nn.functional.gelu(adapted).transpose(1, 2)).transpose(1, 2)
        return student_tokens, adapted


class UnitLinear(nn.Linear):
    """A linear layer with weight rows scaled to length one, so that an output varies no more than the input."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, nn.functional.normalize(self.weight, dim=-1), self.bias)


class StudentHead(Target):
    """
    A head on the student's features that predicts a teacher's target, and is interpolated to its grid. The head of a
    summary is one on a grid of a single cell.

    An `"mlp"` (d-2d-k) can amplify features that are faint in the student. `"unit_linear"` cannot, so that training
    makes them as large as the projector needs to find them.
    """

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        student_width: int,
        student_grid: tuple[int, int],
        head_form: str = "mlp",
        **target: Any,
    ) -> None:
        super().__init__(width, grid, student_grid, **target)
        self.student_grid = student_grid
        if head_form == "unit_linear":
            self.head: nn.Module = UnitLinear(student_width, self.target_width)
        else:
            wide = nn.Linear(student_width, 2 * student_width)
            self.head = nn.Sequential(wide, nn.GELU(), nn.Linear(wide.out_features, self.target_width))

    def forward(
        self, student_tokens: torch.Tensor, tokens: torch.Tensor, student_grid: tuple[int, int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`Target.forward`]; `student_grid` is that of the student's tokens, if it differs in this step."""
        predicted = self.head(_to_parameters(student_tokens, self.head))
        return interpolate_grid(predicted, student_grid or self.student_grid, self.target_grid), self.target(tokens)


def _to_parameters(tokens: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Cast to the layer's dtype, except under autocast, which casts by itself and saves the copy."""
    return tokens if torch.is_autocast_enabled(tokens.device.type) else tokens.to(next(layer.parameters()).dtype)
