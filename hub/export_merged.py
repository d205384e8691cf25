"""
Approximates a tower with experts by a tower with plain MLPs.

The expert depends on the token, so no plain MLP computes exactly the same. Each MLP is fitted on calibration images,
with the inputs of the original tower.

- `fc1`: the experts add `B u(x)`. `B` `(intermediate_size, ranks)` holds the up-projections of all experts side by
  side, and `u(x)` the outputs of their down-projections, zero for experts that do not serve the token. A ridge
  regression approximates `u(x)` by `K x + c`; `B K` and `B c` are added to the weight and the bias.
- `fc2`: the target is the output of the MLP with experts minus `fc2` of the new `fc1`'s activations, so that the
  update of `fc2` corrects a part of the error of `fc1`.

The penalty pulls `K` towards the mean of the experts, weighted by their shares of the tokens. Its strength is chosen
for each layer on images that were not used for the regression; the mean alone and no update are candidates too. `rank`
limits an update to the directions of the output with most of its variance over the tokens (reduced-rank regression).
The errors in the report are measured on further images.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import initialization as init

from hub.checkpoint_parts import feature_layer
from modeling_movekd import MoveKDVisionModel
from modeling_movekd.base_encoders_movekd import load_strictly
from modeling_movekd.experts_movekd import LoraExperts, MixtureOfLoraExpertsMLP


# Strengths of the penalty, relative to the mean square of an input
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
MIN_IMAGES = 5


def is_expert_key(key: str) -> bool:
    return ".mlp.router." in key or "_experts." in key


def expert_outputs(experts: LoraExperts, inputs: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """`u(x)`, `(num_tokens, ranks)`. With expert biases, the gates that multiply the biases are further columns."""
    ranks, gates = experts.down_project(inputs, gates)
    return ranks if experts.bias_b is None else torch.cat([ranks, gates], dim=-1)


def up_projection(experts: LoraExperts) -> torch.Tensor:
    """`B`, `(out_features, ranks)`, float64. With expert biases, the biases are further columns."""
    parts = [experts.weight_b] if experts.bias_b is None else [experts.weight_b, experts.bias_b.t()]
    return torch.cat(parts, dim=1).double()


def mean_expert(experts: LoraExperts, shares: torch.Tensor) -> torch.Tensor:
    """The mean of the experts weighted by `shares`, as `[K, c]`, `(ranks, in_features + 1)`, float64."""
    weights = (shares.double() * experts.scaling).repeat_interleave(experts.rank).unsqueeze(-1)
    bias = torch.zeros_like(weights) if experts.bias_a is None else experts.bias_a.double().unsqueeze(-1)
    rows = torch.cat([weights * experts.weight_a.double(), weights * bias], dim=1)
    if experts.bias_b is not None:
        gates = rows.new_zeros(len(shares), rows.shape[1])
        gates[:, -1] = shares.double() * experts.scaling
        rows = torch.cat([rows, gates])
    return rows


@dataclass
class Moments:
    """Second moments, summed over tokens, of the inputs (with a 1 appended) and the experts' outputs, in float64."""

    inputs: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    crossed: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    outputs: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
        self.inputs = self.inputs + (inputs.t() @ inputs).double()
        self.crossed = self.crossed + (outputs.t() @ inputs).double()
        self.outputs = self.outputs + (outputs.t() @ outputs).double()

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.inputs + other.inputs, self.crossed + other.crossed, self.outputs + other.outputs)

    def error(self, solution: torch.Tensor, up: torch.Tensor) -> float:
        """Squared error of `B (K x + c)` against `B u(x)`, summed over tokens."""
        crossed = solution @ self.crossed.t()
        rest = self.outputs - crossed - crossed.t() + solution @ self.inputs @ solution.t()
        return float((up @ rest * up).sum())


def ridge_towards(start: torch.Tensor, moments: Moments, ridges: Sequence[float]) -> list[torch.Tensor]:
    """`[K, c]` of a ridge regression that pulls `K` towards `start`, for each strength."""
    residual = (moments.crossed - start @ moments.inputs).t()
    diagonal = moments.inputs.diagonal()
    solutions = []
    for ridge in ridges:
        penalty = torch.full_like(diagonal, ridge * float(diagonal[:-1].mean()))
        penalty[-1] = 1e-12 * diagonal[-1]  # no penalty on `c`, only what keeps the system solvable
        factor = torch.linalg.cholesky(moments.inputs + penalty.diag())
        solutions.append(start + torch.cholesky_solve(residual, factor).t())
    return solutions


def limit_rank(solution: torch.Tensor, up: torch.Tensor, moments: Moments, rank: int) -> torch.Tensor:
    """The update `[W, c]` of this rank nearest to `B [K, c]` over the tokens, `(out_features, in_features + 1)`."""
    basis, triangle = torch.linalg.qr(up)
    update = triangle @ solution
    count = moments.inputs[-1, -1]
    mean = moments.inputs[:-1, -1] / count
    covariance = moments.inputs[:-1, :-1] / count - mean.outer(mean)
    slope, constant = update[:, :-1], update[:, -1]
    if rank < update.shape[0]:
        directions = torch.linalg.eigh(slope @ covariance @ slope.t()).eigenvectors[:, -rank:]
        limited = directions @ (directions.t() @ slope)
        constant = constant + (slope - limited) @ mean  # keeps the mean over the tokens
        slope = limited
    return basis @ torch.cat([slope, constant.unsqueeze(-1)], dim=1)


def fit(up: torch.Tensor, start: torch.Tensor, seen: Moments, unseen: Moments, rank: int) -> tuple[torch.Tensor, str]:
    """The update `[W, c]` of a linear layer, fitted to `seen` and chosen on `unseen`, and the candidate's name."""
    candidates = {"none": torch.zeros_like(start), "mean": start}
    names = {f"ridge {ridge:g}": ridge for ridge in RIDGES}
    candidates |= dict(zip(names, ridge_towards(start, seen, RIDGES), strict=True))
    chosen = min(candidates, key=lambda name: unseen.error(candidates[name], up))
    both, solution = seen + unseen, candidates[chosen]
    if chosen in names:
        (solution,) = ridge_towards(start, both, [names[chosen]])
    return limit_rank(solution, up, both, rank), chosen


def merge_layer(mlp: MixtureOfLoraExpertsMLP, inputs: list[torch.Tensor], rank: int | None) -> tuple[nn.Module, dict]:
    """
    A plain MLP in place of an MLP with experts, and the layer's part of the report.

    Args:
        inputs: Its inputs for each image, `(num_tokens, hidden_size)`. Of five images, three are used for the
            regression, one chooses the strength of the penalty, and one measures the error.
    """
    plain: dict[str, nn.Linear] = {name: copy.deepcopy(getattr(mlp, name)) for name in ("fc1", "fc2")}
    measured = [image for index, image in enumerate(inputs) if index % 5 == 4]
    fitted = [(index % 5 == 3, image) for index, image in enumerate(inputs) if index % 5 != 4]
    gates = [mlp.expert_gates(*mlp.router(image)) for _, image in fitted]
    shares = torch.cat(gates).mean(dim=0)
    report: dict = {"expert_shares": [round(share, 4) for share in shares.tolist()]}
    for name in ("fc1", "fc2"):
        experts = getattr(mlp, f"{name}_experts")
        up, start = up_projection(experts), mean_expert(experts, shares)
        limit = up.shape[1] if rank is None else rank
        if name == "fc2":
            # The target includes the error of fc1, which the up-projections do not span
            up, start = torch.eye(len(up), dtype=up.dtype, device=up.device), up @ start
        seen, unseen = Moments(), Moments()
        for (apart, image), gate in zip(fitted, gates, strict=True):
            if name == "fc1":
                pair = image, expert_outputs(experts, image, gate)
            else:
                intermediate = mlp.activation_fn(plain["fc1"](image))
                pair = intermediate, mlp(image) - mlp.fc2(intermediate)
            (unseen if apart else seen).add(*pair)
        update, report[name] = fit(up, start, seen, unseen, limit)
        plain[name].weight.add_(update[:, :-1].to(plain[name].weight.dtype))
        plain[name].bias.add_(update[:, -1].to(plain[name].bias.dtype))

    def relative_error(first: nn.Module, second: nn.Module) -> float:
        exact = torch.cat([mlp(image) for image in measured])
        other = torch.cat([second(mlp.activation_fn(first(image))) for image in measured])
        return float((other - exact).norm() / exact.norm())

    report["merged"] = relative_error(plain["fc1"], plain["fc2"])
    report["dropped"] = relative_error(mlp.fc1, mlp.fc2)
    return nn.ModuleDict(plain), report


def without_experts(tower: MoveKDVisionModel, updates: dict[str, torch.Tensor]) -> MoveKDVisionModel:
    """The tower with plain MLPs. `updates` replace its own weights."""
    config = copy.deepcopy(tower.config)
    config.num_experts, config.expert_teachers = 0, None
    state_dict = {key: value for key, value in tower.state_dict().items() if not is_expert_key(key)} | updates
    with init.no_init_weights():
        plain = MoveKDVisionModel._from_config(config, dtype=tower.dtype)
    load_strictly(plain, state_dict, may_lack=lambda key: False, assign=True)
    return plain.eval()


@torch.no_grad()
def merge_experts(
    tower: MoveKDVisionModel, pixels: list[torch.Tensor], rank: int | None = None
) -> tuple[MoveKDVisionModel, dict]:
    """
    Approximate a tower by one without experts. The computation is in float32, the result in the tower's dtype.

    Args:
        tower (`MoveKDVisionModel`): A tower with experts.
        pixels (`list[torch.Tensor]`): Pixels of at least five images, `(3, image_size, image_size)`.
        rank (`int`, *optional*): Rank of an update at most, by default that of all experts together.

    Returns:
        The tower, and a report. `layers` has the relative error of each MLP's output (Frobenius norm) for the original
        inputs, `features` that of the features that feed the projector, both for the `merged` tower and for a tower
        with the experts `dropped`. `images` counts the images that were `fitted`, have `chosen` the penalty, and were
        `measured`.
    """
    if tower.config.num_experts == 0:
        raise ValueError("The tower has no experts (`num_experts` is 0), so there is nothing to merge.")
    if len(pixels) < MIN_IMAGES:
        raise ValueError(f"There are {len(pixels)} images; give at least {MIN_IMAGES} to merge experts.")
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` is {rank}; it must be at least 1.")
    dtype, tower = tower.dtype, copy.deepcopy(tower).float().eval()
    hidden_states = [tower.embed(image[None].float()) for image in pixels]
    updates: dict[str, torch.Tensor] = {}
    layers = []
    for index, layer in enumerate(tqdm(tower.encoder.layers, desc="Merging experts", unit="layer")):
        mlp = cast(MixtureOfLoraExpertsMLP, layer.mlp)
        inputs: list[torch.Tensor] = []
        handle = mlp.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, 1)))
        hidden_states = [layer(image, None) for image in hidden_states]
        handle.remove()
        if not all(image.isfinite().all() for image in hidden_states):
            raise ValueError(f"Layer {index} gives values that are not finite. Check the weights and the images.")
        plain, layer_report = merge_layer(mlp, inputs, rank)
        updates |= {f"encoder.layers.{index}.mlp.{key}": value for key, value in plain.state_dict().items()}
        layers.append({"layer": index} | layer_report)
    # Measured after rounding to the dtype of the result
    merged, dropped = without_experts(tower, updates).to(dtype).float(), without_experts(tower, {})
    errors = {"merged": 0.0, "dropped": 0.0}
    norm = 0.0
    for image in pixels[4::5]:
        exact = features(tower, image)
        norm += float(exact.square().sum())
        for name, other in (("merged", merged), ("dropped", dropped)):
            errors[name] += float((features(other, image) - exact).square().sum())
    report: dict[str, Any] = {
        "rank": rank,
        "images": {"chosen": len(pixels[3::5]), "measured": len(pixels[4::5])},
        "layers": layers,
        "features": {name: (error / norm) ** 0.5 for name, error in errors.items()},
    }
    report["images"]["fitted"] = len(pixels) - sum(report["images"].values())
    return merged.to(dtype), report


def features(tower: MoveKDVisionModel, image: torch.Tensor) -> torch.Tensor:
    """The features that feed the projector, with [CLS], `(1, num_tokens, width)`."""
    layer = feature_layer(tower.config)
    hidden_states = tower(image[None].to(tower.dtype), output_hidden_states=True).hidden_states
    return torch.cat([hidden_states[i] for i in ([layer] if isinstance(layer, int) else layer)], dim=-1)
