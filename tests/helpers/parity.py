"""Reads golden numbers and compares with the tolerances they come with."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file


def read_case(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(path, "pt") as file:
        metadata = {}
        for name, value in file.metadata().items():
            try:
                metadata[name] = json.loads(value)
            except json.JSONDecodeError:
                metadata[name] = value
    return load_file(path), metadata


def cases(parity_dir: Path, pattern: str) -> list[Path]:
    paths = sorted(parity_dir.glob(pattern))
    assert paths, f"no {pattern} in {parity_dir}"
    return paths


def with_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def assert_values(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * scale, msg=lambda text: f"{name}: {text}")


def assert_gradients(
    actual: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor], tolerance: float = 1e-4
) -> None:
    for key, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert actual[key] is not None, f"no gradient for {key}"
        difference = (actual[key] - gradient).abs().max().item()
        assert difference <= tolerance * scale, f"{key}: off by {difference:.2e} at a scale of {scale:.2e}"
