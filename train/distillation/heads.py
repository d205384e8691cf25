"""Adapters on the teachers' features, heads on the student's tokens, and the fixed targets below both."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


# The covariance of more channels takes gigabytes, and minutes to decompose
MAX_UNSHUFFLED_CHANNELS = 4096
# Of a channel's mean square, and of the largest principal variance: what lies below is rounding, not a feature
CONSTANT_CHANNEL = 1e-10
EMPTY_DIRECTION = 1e-6


def unshuffle_factors(width: int, grid: tuple[int, int], target_grid: tuple[int, int]) -> tuple[int, int] | None:
    """
    How many rows and columns of cells become one cell with the channels of all: `grid` over `target_grid` where both
    divide and the channels stay within 4096, else `None`.
    """
    (rows, rest_rows), (columns, rest_columns) = (
        divmod(size, target) for size, target in zip(grid, target_grid, strict=True)
    )
    if rest_rows or rest_columns or width * rows * columns > max(MAX_UNSHUFFLED_CHANNELS, width):
        return None
    return rows, columns


def resample_grid(tokens: torch.Tensor, grid: tuple[int, int], target_grid: tuple[int, int]) -> torch.Tensor:
    """
    Bring features to another grid: cells are put together as the channels of one (pixel-unshuffle, nothing is lost)
    where [`unshuffle_factors`] has factors, else interpolated bilinearly with antialiasing, for any sizes.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, h * w, num_channels)`): Row by row.
        grid (`tuple[int, int]`): Their (h, w).
        target_grid (`tuple[int, int]`): The wanted (H, W).

    Returns:
        `torch.Tensor` of shape `(batch_size, H * W, num_channels * rows * columns)`.
    """
    width = tokens.shape[-1]
    if grid == target_grid:
        return tokens
    if factors := unshuffle_factors(width, grid, target_grid):
        cells = tokens.reshape(-1, target_grid[0], factors[0], target_grid[1], factors[1], width)
        return cells.transpose(2, 3).flatten(3).flatten(1, 2)
    maps = tokens.transpose(1, 2).unflatten(2, grid)
    maps = nn.functional.interpolate(maps, size=target_grid, mode="bilinear", align_corners=False, antialias=True)
    return maps.flatten(2).transpose(1, 2)


class Target(nn.Module):
    """
    One teacher's features as a target without parameters: standardised per channel, brought to the student's grid,
    whitened; each where asked for. By itself it is CLIP's place beside adapters, whose features are compared as is.

    The buffers `mean`, `variance` (per channel, after the grid) and `components` (one principal direction a row,
    scaled to unit variance) are not finite until `Distiller.fit_statistics` has measured them. They stay float32.
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
        self.grid, self.target_grid = grid, student_grid if grid_matching == "resample" else grid
        rows, columns = unshuffle_factors(width, grid, self.target_grid) or (1, 1)
        self.target_width = channels = width * rows * columns
        self.buffer_names: tuple[str, ...] = ()
        if feature_normalization != "none":
            self.buffer_names = ("mean", "variance")
            self.register_buffer("mean", torch.full((channels,), torch.nan))
            self.register_buffer("variance", torch.full((channels,), torch.nan))
        if feature_normalization == "whiten":
            self.buffer_names += ("components",)
            self.target_width = min(whitening_components, channels)
            self.register_buffer("components", torch.full((self.target_width, channels), torch.nan))
        self.needs_statistics = bool(self.buffer_names)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Target":
        # Half precision would round the statistics for good, in the file too
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
        `(batch_size, h * w, width)` to `(batch_size, num_target_tokens, target_width)`, without gradient; float32 if
        anything is done to the features.
        """
        tokens = tokens.detach()
        if self.grid == self.target_grid and not self.buffer_names:
            return tokens
        tokens = resample_grid(tokens.float(), self.grid, self.target_grid)
        if self.buffer_names:
            # Taking means and scales does not depend on the order with the linear resampling
            tokens = (tokens - self.mean) * torch.where(self.variance > 0, self.variance, 1.0).rsqrt()
        if "components" in self.buffer_names:
            with torch.autocast(tokens.device.type, enabled=False):
                tokens = nn.functional.linear(tokens, self.components)
        return tokens

    def forward(self, student_tokens: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two sides of the squared error, `(batch_size, num_student_tokens, num_channels)` each."""
        return student_tokens, self.target(tokens)


class TeacherAdapter(Target):
    """
    Teacher's side: `channels` brings the teacher's channels to the student's width, then, after a GELU, `tokens` the
    teacher's tokens to the student's (the paper's encoder adapter). Resampled features need no `tokens`.
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
    """
    A linear layer whose rows have length one whatever the weight's is: it reads directions and amplifies none. What it
    has to give with unit variance, its input must have with at least that.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, nn.functional.normalize(self.weight, dim=-1), self.bias)


class StudentHead(Target):
    """
    Student's side: `head` from the student's tokens to the fixed target. As an `"mlp"` d-2d-k it finds in the tokens
    what is there however faintly; as `"unit_linear"` it asks for it in full size, so that a projector finds it too.
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
        if head_form == "unit_linear":
            self.head: nn.Module = UnitLinear(student_width, self.target_width)
        else:
            wide = nn.Linear(student_width, 2 * student_width)
            self.head = nn.Sequential(wide, nn.GELU(), nn.Linear(wide.out_features, self.target_width))

    def forward(self, student_tokens: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.head(_to_parameters(student_tokens, self.head)), self.target(tokens)


def _to_parameters(tokens: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """In the layer's dtype; autocast chooses by itself, and a copy in float32 would only cost memory."""
    return tokens if torch.is_autocast_enabled(tokens.device.type) else tokens.to(next(layer.parameters()).dtype)


class Moments:
    """Sums in float64 over a sample of one teacher's features, and the statistics they give."""

    def __init__(self, name: str, target: Target) -> None:
        self.name, self.target = name, target
        self.sums: list[torch.Tensor] = []
        self.count = 0

    def add(self, tokens: torch.Tensor) -> None:
        """Count in `(batch_size, h * w, width)`."""
        # Where the features are, since the product of all channels is heavy; Metal has no float64
        tokens = tokens.detach().to("cpu" if tokens.device.type == "mps" else tokens.device).double()
        resampled = resample_grid(tokens, self.target.grid, self.target.target_grid).flatten(0, 1)
        tokens = tokens.flatten(0, 1)
        sums = [tokens.mean(dim=0), tokens.square().mean(dim=0), resampled.mean(dim=0)]
        if "components" in self.target.buffer_names:
            sums.append(resampled.T @ resampled / len(resampled))
        sums = [value * len(tokens) for value in sums]
        self.sums = [old + new for old, new in zip(self.sums, sums, strict=True)] if self.sums else sums
        self.count += len(tokens)

    def set_statistics(self) -> None:
        """
        Raises:
            ValueError: if nothing was counted in, values are not finite, all channels are constant, or the sample has
                fewer directions of any variance than principal components are asked for.
        """
        if not self.count:
            raise ValueError(
                f"There are no features of teacher {self.name} to take statistics from; give some images."
            )
        raw_mean, mean_square, mean, *products = (total.cpu() / self.count for total in self.sums)
        if not mean_square.isfinite().all():
            raise ValueError(f"Features of teacher {self.name} are not finite; look at the images and its dtype.")
        variance = mean_square - raw_mean.square()
        variance = torch.where(variance > CONSTANT_CHANNEL * mean_square, variance, 0.0)
        if not variance.any():
            raise ValueError(
                f"All {len(variance)} channels of teacher {self.name} are constant over {self.count} tokens; give "
                "different images, or correct the teacher's output."
            )
        variance = variance.repeat(len(mean) // len(variance))
        if products:
            scale = torch.where(variance > 0, variance, 1.0).rsqrt()
            covariance = (products[0] - torch.outer(mean, mean)) * torch.outer(scale, scale)
            # Ascending, one eigenvector a column
            values, vectors = torch.linalg.eigh(covariance * torch.outer(variance > 0, variance > 0))
            asked, found = self.target.target_width, int((values > EMPTY_DIRECTION * values[-1]).sum())
            if found < asked:
                raise ValueError(
                    f"Teacher {self.name} has {found} directions of any variance in {self.count} tokens, and {asked} "
                    f"principal components are asked for. Set `whitening_components` to {found} or less, or measure "
                    "more images."
                )
            components = vectors.flip(1)[:, :asked].T / values.flip(0)[:asked, None].sqrt()
            # An eigenvector's sign is arbitrary: its largest entry is made positive
            largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
            self.target.components.copy_(components * largest.sign())
        self.target.mean.copy_(mean)
        self.target.variance.copy_(variance)
        self.target.needs_statistics = False
