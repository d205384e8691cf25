"""The statistics that a teacher's features are normalized by, measured on a sample."""

from math import isqrt

import torch

from train.distillation.heads import Target, resample_grid


# A channel with less variance than this share of its mean square is constant up to rounding
CONSTANT_CHANNEL = 1e-10
# A principal component with less variance than this share of the first is rounding
EMPTY_DIRECTION = 1e-6


def paley_prime(size: int) -> int | None:
    """
    The prime p whose Paley matrix of p + 1 rows, doubled by Sylvester's rule, gives a Hadamard matrix of `size`; 1 if
    doubling alone does. `None` if neither does, as for sizes that 4 does not divide.
    """
    while size % 2 == 0 and size > 2:
        if is_prime(size - 1) and (size - 1) % 4 == 3 and size & (size - 1):
            return size - 1
        size //= 2
    return 1 if size in (1, 2) else None


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))


def hadamard_matrix(size: int) -> torch.Tensor:
    """
    An orthogonal matrix whose entries all have the same magnitude, by Paley's first and Sylvester's constructions.

    Returns:
        `torch.Tensor` of shape `(size, size)`, float64.

    Raises:
        ValueError: if these constructions have no matrix of the size.
    """
    if (prime := paley_prime(size)) is None:
        raise ValueError(f"There is no Hadamard matrix of {size} rows by Paley's and Sylvester's constructions.")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    if prime > 1:
        symbols = -torch.ones(prime, dtype=torch.float64)
        symbols[[number * number % prime for number in range(1, prime)]] = 1
        symbols[0] = 0
        places = torch.arange(prime)
        matrix = torch.eye(prime + 1, dtype=torch.float64)
        matrix[1:, 1:] += symbols[(places[:, None] - places) % prime]
        matrix[0, 1:], matrix[1:, 0] = 1, -1
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), matrix)
    return matrix / size**0.5


def phi_s_rotation(covariance: torch.Tensor) -> torch.Tensor:
    """
    The matrix of PHI-S (arXiv 2410.01680): rotate to the principal components, then by a Hadamard matrix, which gives
    all channels the same variance, then scale all of them by one number to the variance one.

    Args:
        covariance (`torch.Tensor` of shape `(num_channels, num_channels)`): Of a teacher's features, float64.

    Returns:
        `torch.Tensor` of shape `(num_channels, num_channels)`: one output a row.
    """
    vectors = torch.linalg.eigh(covariance).eigenvectors
    rotation = hadamard_matrix(len(covariance)) @ with_fixed_signs(vectors.flip(1).T)
    return rotation / covariance.trace().div(len(covariance)).sqrt()


def with_fixed_signs(components: torch.Tensor) -> torch.Tensor:
    """Make the largest entry of each row positive: the sign of an eigenvector is arbitrary."""
    return components * components.gather(1, components.abs().argmax(dim=1, keepdim=True)).sign()


class Moments:
    """Sums over a sample of one teacher's features, in float64, and the statistics of a [`Target`] from them."""

    def __init__(self, name: str, target: Target) -> None:
        self.name, self.target = name, target
        self.sums: list[torch.Tensor] = []
        self.count = 0

    def add(self, tokens: torch.Tensor) -> None:
        """Add features `(batch_size, h * w, width)`."""
        # On the features' device, since the product of all channels is heavy; but Metal has no float64
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
        Compute the target's statistics.

        Raises:
            ValueError: if the sample is empty, not finite, constant, or has too few principal components.
        """
        if not self.count:
            raise ValueError(f"There are no features of teacher {self.name} to measure. Give data with images.")
        raw_mean, mean_square, mean, *products = (total.cpu() / self.count for total in self.sums)
        if not mean_square.isfinite().all():
            raise ValueError(f"Features of teacher {self.name} are not finite. Check the images and its dtype.")
        variance = mean_square - raw_mean.square()
        variance = torch.where(variance > CONSTANT_CHANNEL * mean_square, variance, 0.0)
        if not variance.any():
            raise ValueError(
                f"All {len(variance)} channels of teacher {self.name} are constant over {self.count} tokens. Give "
                "different images, or correct the teacher's output."
            )
        variance = variance.repeat(len(mean) // len(variance))
        if products:
            covariance = products[0] - torch.outer(mean, mean)
            if self.target.feature_normalization == "phi_s":
                variance = torch.ones_like(variance)
                self.target.components.copy_(phi_s_rotation(covariance))
            else:
                self.target.components.copy_(self._components(covariance, variance))
        self.target.mean.copy_(mean)
        self.target.variance.copy_(variance)
        self.target.needs_statistics = False

    def _components(self, covariance: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """The first principal components of the standardized features, scaled to unit variance, one a row."""
        scale = torch.where(variance > 0, variance, 1.0).rsqrt()
        covariance = covariance * torch.outer(scale, scale)
        # Ascending, one eigenvector a column
        values, vectors = torch.linalg.eigh(covariance * torch.outer(variance > 0, variance > 0))
        asked, found = self.target.target_width, int((values > EMPTY_DIRECTION * values[-1]).sum())
        if found < asked:
            raise ValueError(
                f"Teacher {self.name} has {found} directions with variance in {self.count} tokens, fewer than the "
                f"{asked} principal components asked for. Set `whitening_components` to {found} or less, or measure "
                "more images."
            )
        return with_fixed_signs(vectors.flip(1)[:, :asked].T / values.flip(0)[:asked, None].sqrt())
