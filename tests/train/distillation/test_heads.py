"""The targets: their grid, their statistics, and the heads and adapters on them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.distillers import GRID, TEACHERS, WIDTH, images, make_distiller, make_features, make_student
from train.build import DISTILLER_OPTIONS
from train.config import PRESETS
from train.distillation.distiller import Distiller
from train.distillation.heads import resample_grid, unshuffle_factors
from train.distillation.statistics import hadamard_matrix


def test_statistics_stay_float32() -> None:
    distiller = make_distiller("student_heads")
    before = {name: value.clone() for name, value in distiller.named_buffers()}
    distiller.bfloat16().to(torch.float16)
    assert {value.dtype for value in distiller.parameters()} == {torch.float16}
    assert len(before) == 9
    for name, value in distiller.named_buffers():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("normalization", "teacher"), [(form, name) for form in ("standardize", "whiten") for name in TEACHERS]
)
def test_targets_have_the_moments_asked_for(normalization: str, teacher: str) -> None:
    distiller = make_distiller("student_heads", feature_normalization=normalization)
    target = distiller[teacher].target(make_features(16, seed=7)[teacher].tokens)
    assert target.dtype == torch.float32 and target.shape[1] == GRID[0] * GRID[1]
    flat = target.flatten(0, 1).double()
    covariance = flat.T @ flat / len(flat)
    assert flat.mean(dim=0).abs().max() < 1e-4
    if normalization == "whiten":
        torch.testing.assert_close(covariance, torch.eye(8).double(), rtol=0, atol=1e-3)
    elif teacher == "eva":
        # The four cells of a channel share its variance
        torch.testing.assert_close(
            covariance.diagonal().unflatten(0, (4, 12)).mean(dim=0), torch.ones(12).double(), rtol=0, atol=1e-2
        )
    elif teacher == "clip":
        torch.testing.assert_close(covariance.diagonal(), torch.ones(WIDTH).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_whitening_keeps_the_first_principal_components_of_standardised_resampled_features(teacher: str) -> None:
    distiller = make_distiller("student_heads")
    tokens = make_features(16, seed=7)[teacher].tokens.double()
    standardized = (tokens - tokens.mean(dim=(0, 1))) / tokens.std(dim=(0, 1), correction=0)
    flat = resample_grid(standardized, TEACHERS[teacher][1], GRID).flatten(0, 1)
    left, singular, _ = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)
    assert singular[7] > 1.0001 * singular[8], "the first eight components are not defined"
    target = distiller[teacher].target(tokens.float()).flatten(0, 1).double()
    # Whitened scores are the left singular vectors, up to their signs
    overlap = (left[:, :8].T @ target / len(flat) ** 0.5).abs()
    torch.testing.assert_close(overlap, torch.eye(8).double(), rtol=0, atol=1e-2)


def test_statistics_do_not_depend_on_batches_and_signs_are_fixed() -> None:
    features, whole = make_features(16, seed=7), make_distiller("student_heads")
    split = make_distiller("student_heads")
    split.fit_statistics(images(features, part) for part in (slice(0, 3), slice(3, 4), slice(4, 16)))
    for (name, value), other in zip(whole.named_buffers(), split.buffers(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=name)
    for head in whole.values():
        rows = head.components
        assert (rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_a_student_that_contains_its_teacher_has_no_loss() -> None:
    """gelu(x) - gelu(-x) = x, so a head can be any linear map."""
    teachers = {"clip": (WIDTH, GRID)}
    distiller = make_distiller("student_heads", teachers, head_form="mlp")
    features = make_features(teachers=teachers)
    head, tokens = distiller["clip"], features["clip"].tokens
    scaled = head.components * head.variance.rsqrt()
    with torch.no_grad():
        head.head[0].weight.copy_(torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]))
        head.head[0].bias.copy_(torch.cat([-head.mean, head.mean]))
        head.head[2].weight.copy_(torch.cat([scaled, -scaled], dim=1))
        head.head[2].bias.zero_()
    assert distiller(tokens, features).loss.max() < 1e-6
    assert distiller(tokens + 0.1 * make_student(), features).loss.min() > 1e-4


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 64, 72, 384, 768, 1152, 1280, 1408, 1664])
def test_hadamard_matrices_are_orthogonal_with_entries_of_one_magnitude(size: int) -> None:
    matrix = hadamard_matrix(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [3, 6, 10, 100])
def test_a_width_without_a_hadamard_matrix_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} rows"):
        hadamard_matrix(size)
    with pytest.raises(ValueError, match=f"eva has {size} channels.*'phi_s'.*'standardize' or 'whiten'"):
        make_distiller("student_heads", {"eva": (size, GRID)}, feature_normalization="phi_s")


def test_phi_s_gives_all_channels_one_variance_and_keeps_all_distances_up_to_one_scale() -> None:
    teachers = {"clip": (WIDTH, GRID), "sam": (24, (5, 7)), "dino": (12, GRID)}
    features = make_features(16, seed=7, teachers=teachers)
    distiller = make_distiller("student_heads", teachers, feature_normalization="phi_s")
    for name, (width, grid) in teachers.items():
        flat = resample_grid(features[name].tokens.double(), grid, GRID).flatten(0, 1)
        target = distiller[name].target(features[name].tokens).flatten(0, 1).double()
        assert target.shape[1] == width
        assert target.mean(dim=0).abs().max() < 1e-4
        torch.testing.assert_close(target.var(dim=0, correction=0), torch.ones(width).double(), rtol=1e-4, atol=0)
        # The first channel varies ten times as much as the others: standardizing would change the distances
        scale = flat.var(dim=0, correction=0).mean().sqrt()
        torch.testing.assert_close(torch.cdist(target, target), torch.cdist(flat, flat) / scale, rtol=1e-4, atol=1e-3)


def test_upsampling_compares_on_the_larger_grid() -> None:
    teachers = {"clip": (WIDTH, GRID), "eva": (10, (8, 12)), "wide": (6, (2, 9))}
    distiller = make_distiller("student_heads", teachers, feature_normalization="none", grid_matching="upsample")
    features, student = make_features(teachers=teachers), make_student()
    grids = {"clip": GRID, "eva": (8, 12), "wide": (4, 9)}
    output = distiller(student, features)
    for name, (width, grid) in teachers.items():
        assert distiller[name].target_grid == grids[name] and distiller[name].target_width == width

        def maps(tokens: torch.Tensor, grid: tuple[int, int], larger: tuple[int, int] = grids[name]) -> torch.Tensor:
            unflat = tokens.transpose(1, 2).unflatten(2, grid)
            return nn.functional.interpolate(unflat, size=larger, mode="bilinear")

        predicted = maps(distiller[name].head(student), GRID)
        expected = (predicted - maps(features[name].tokens, grid)).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(output.teacher_losses[name], expected, rtol=1e-4, atol=1e-5)


def test_constant_channels_become_zero() -> None:
    features = make_features(16, seed=7)
    # Constant up to the last bit, which must not become a feature
    features["eva"].tokens[..., 3] = 1234.567
    features["eva"].tokens[::2, :, 3] += 1e-4
    distiller = make_distiller("student_heads", feature_normalization="standardize")
    distiller.fit_statistics([features])
    target = distiller["eva"].target(features["eva"].tokens).unflatten(2, (4, 12))
    assert target[..., 3].abs().max() < 1e-3
    assert target[..., 4].abs().max() > 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda tokens: tokens[:, :, :1].expand_as(tokens),
            r"eva has 4 directions.*8 principal components.*4 or less",
        ),
        (lambda tokens: torch.ones_like(tokens), "All 12 channels of teacher eva are constant"),
        (lambda tokens: tokens * torch.tensor(torch.nan), "eva are not finite"),
    ],
)
def test_a_sample_without_the_statistics_is_refused(spoil: Any, message: str) -> None:
    distiller, features = make_distiller("student_heads"), make_features(16)
    features["eva"] = features["eva"]._replace(tokens=spoil(features["eva"].tokens))
    with pytest.raises(ValueError, match=message):
        distiller.fit_statistics([features])
    with pytest.raises(ValueError, match="no features of teacher clip"):
        distiller.fit_statistics([])


def test_statistics_are_needed_first(tmp_path: Path) -> None:
    options = {name: PRESETS["student_heads"][name] for name in DISTILLER_OPTIONS}
    distiller = Distiller(WIDTH, GRID, TEACHERS, whitening_components=8, **options)
    assert distiller.needs_statistics
    with pytest.raises(ValueError, match="statistics of teacher clip are not measured"):
        distiller(make_student(), make_features())
    with pytest.raises(ValueError, match="not measured"):
        distiller.save(tmp_path / "distiller.safetensors")
    assert not list(tmp_path.iterdir())
    fitted = make_distiller("student_heads")
    assert not fitted.needs_statistics and not make_distiller("paper").needs_statistics
    distiller.load_state_dict(fitted.state_dict())
    assert not distiller.needs_statistics
    assert torch.equal(distiller(make_student(), make_features()).loss, fitted(make_student(), make_features()).loss)


def test_resampling_puts_cells_together_where_the_grid_divides() -> None:
    grid, target = (4, 9), (2, 3)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(9), indexing="ij")
    tokens = torch.stack([rows, columns], dim=-1).float().flatten(0, 1)[None]
    cells = resample_grid(tokens, grid, target).unflatten(1, target).unflatten(3, (2, 3, 2))
    for (row, column), cell in zip([(r, c) for r in range(2) for c in range(3)], cells[0].flatten(0, 1), strict=True):
        expected = tokens[0].unflatten(0, grid)[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        assert torch.equal(cell, expected)
    assert unshuffle_factors(2, grid, target) == (2, 3)
    assert unshuffle_factors(2, (5, 9), target) is None
    assert unshuffle_factors(1024, (64, 64), (32, 32)) == (2, 2)
    assert unshuffle_factors(1024, (64, 64), (16, 16)) is None, "16384 channels cannot be whitened"
    assert unshuffle_factors(8192, (16, 16), (16, 16)) == (1, 1)


@pytest.mark.parametrize(("grid", "target"), [((5, 7), (3, 4)), ((3, 4), (5, 7)), ((3, 9), (6, 4)), ((1, 1), (2, 3))])
def test_resampling_between_any_sizes_keeps_places(grid: tuple[int, int], target: tuple[int, int]) -> None:
    """A horizontal and a vertical ramp do not change, except at the borders."""
    positions = [(torch.arange(size) + 0.5) / size for size in grid]
    ramps = torch.stack(torch.meshgrid(*positions, indexing="ij"), dim=-1)
    constant = torch.full((*grid, 1), 2.0)
    out = resample_grid(torch.cat([ramps, constant], dim=-1).flatten(0, 1)[None], grid, target)
    out = out[0].unflatten(0, target)
    torch.testing.assert_close(out[..., 2], torch.full(target, 2.0))
    for axis in range(2):
        expected = (torch.arange(target[axis]) + 0.5) / target[axis]
        found = out[..., axis].mean(dim=1 - axis)
        inside = (expected > 1 / min(grid[axis], target[axis])) & (expected < 1 - 1 / min(grid[axis], target[axis]))
        torch.testing.assert_close(found[inside], expected[inside], rtol=0, atol=1e-2)
        assert (out[..., axis].std(dim=1 - axis, correction=0) < 1e-5).all()


@pytest.mark.parametrize("normalization", ["none", "standardize", "whiten"])
@pytest.mark.parametrize("matching", ["learned", "resample"])
def test_adapters_take_normalized_and_resampled_features_too(normalization: str, matching: str) -> None:
    distiller = make_distiller("paper", feature_normalization=normalization, grid_matching=matching)
    output = distiller(make_student(), make_features())
    output.loss.sum().backward()
    assert all(parameter.grad.any() for parameter in distiller.parameters())
    keys = set(distiller.state_dict())
    assert ("eva.tokens.weight" in keys) is (matching == "learned")
    assert ("eva.mean" in keys) is (normalization != "none")
    assert ("eva.components" in keys) is (normalization == "whiten")
    assert not any(key.startswith("clip.") for key in keys)


@pytest.mark.parametrize("normalization", ["none", "standardize"])
def test_heads_without_whitening_predict_all_channels(normalization: str) -> None:
    distiller = make_distiller("student_heads", feature_normalization=normalization)
    assert {name: distiller[name].head.out_features for name in TEACHERS} == {"clip": 16, "eva": 48, "sam": 24}
    assert distiller(make_student(), make_features()).loss.isfinite().all()


def test_resampling_averages_what_the_smaller_grid_cannot_hold() -> None:
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    checkerboard = ((rows + columns) % 2 * 2.0 - 1).flatten()[None, :, None]
    assert resample_grid(checkerboard, (16, 16), (5, 5)).abs().max() < 0.1
