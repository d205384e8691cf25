"""
A tower without experts that comes as near as it can to one with them.

Which expert serves a token depends on the token, so no single pair of matrices does what the experts do. What is made
here is the best that calibration images allow, layer by layer, with the original tower's activations.

- `fc1`: its experts add `B u(x)`. `B` `(intermediate_size, ranks)` holds the up-projections of all experts side by
  side, and `u` what their ranks give, zero for an expert that does not serve the token. In place of `u(x)` stands an
  affine `K x + c`, the ridge regression of `u` on `x`; `B K` and `B c` are folded into the layer's weight and bias.
- `fc2`: what the MLP with experts gives, less what `fc2` gives after the new `fc1`, is regressed on the latter's
  activations in the same way, so that it makes good what it can of the error of `fc1`.

The ridge pulls towards the mean of the experts, each weighed by its share of the tokens, which is what there is to say
without looking at the inputs. Its strength is chosen per layer on images that the regression has not seen, among
candidates that include the bare mean and no update at all.

An update has the rank of all experts together at most, or less by `rank`: it is limited to the directions of the
output that carry most of it over the calibration tokens (reduced-rank regression).

The errors in the report come from further images that served for nothing else.
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
from modeling_movekd.experts_movekd import LoraExperts, MixtureOfLoraExpertsMLP
from modeling_movekd.vision_movekd import load_strictly


# Of the mean square of an input
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FEWEST_IMAGES = 5


def is_expert_key(key: str) -> bool:
    return ".mlp.router." in key or "_experts." in key


def expert_outputs(experts: LoraExperts, inputs: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """`u(x)`, `(num_tokens, ranks)`; with expert biases the gates follow, which multiply them."""
    ranks, gates = experts.down_project(inputs, gates)
    return ranks if experts.bias_b is None else torch.cat([ranks, gates], dim=-1)


def up_projection(experts: LoraExperts) -> torch.Tensor:
    """`B`, float64, `(out_features, ranks)`, with a column for each expert's bias if they have one."""
    parts = [experts.weight_b] if experts.bias_b is None else [experts.weight_b, experts.bias_b.t()]
    return torch.cat(parts, dim=1).double()


def mean_expert(experts: LoraExperts, shares: torch.Tensor) -> torch.Tensor:
    """The experts' mean weighed by `shares` `(num_experts,)`, as `[K, c]`, float64, `(ranks, in_features + 1)`."""
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
    """Sums of products over tokens, of the inputs (a one at the end), and of the experts' outputs; float64."""

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
        """Sum over tokens of the squared difference between `B u(x)` and `B (K x + c)`."""
        crossed = solution @ self.crossed.t()
        rest = self.outputs - crossed - crossed.t() + solution @ self.inputs @ solution.t()
        return float((up @ rest * up).sum())


def ridge_towards(start: torch.Tensor, moments: Moments, ridges: Sequence[float]) -> list[torch.Tensor]:
    """`[K, c]` of least squares with a penalty on the distance of `K` from its start, for each strength."""
    residual = (moments.crossed - start @ moments.inputs).t()
    diagonal = moments.inputs.diagonal()
    solutions = []
    for ridge in ridges:
        penalty = torch.full_like(diagonal, ridge * float(diagonal[:-1].mean()))
        # The constant goes free, but for what keeps the system solvable
        penalty[-1] = 1e-12 * diagonal[-1]
        factor = torch.linalg.cholesky(moments.inputs + penalty.diag())
        solutions.append(start + torch.cholesky_solve(residual, factor).t())
    return solutions


def limit_rank(solution: torch.Tensor, up: torch.Tensor, moments: Moments, rank: int) -> torch.Tensor:
    """`[W, c]` `(out_features, in_features + 1)`: the update of that rank nearest to `B K` over the tokens."""
    basis, triangle = torch.linalg.qr(up)
    update = triangle @ solution
    count = moments.inputs[-1, -1]
    mean = moments.inputs[:-1, -1] / count
    covariance = moments.inputs[:-1, :-1] / count - mean.outer(mean)
    slope, constant = update[:, :-1], update[:, -1]
    if rank < update.shape[0]:
        directions = torch.linalg.eigh(slope @ covariance @ slope.t()).eigenvectors[:, -rank:]
        limited = directions @ (directions.t() @ slope)
        # What is left out keeps its mean over the tokens
        constant = constant + (slope - limited) @ mean
        slope = limited
    return basis @ torch.cat([slope, constant.unsqueeze(-1)], dim=1)


def fit(up: torch.Tensor, start: torch.Tensor, seen: Moments, unseen: Moments, rank: int) -> tuple[torch.Tensor, str]:
    """
    The update `[W, c]` of a linear layer, float64, and by what it was found.

    Args:
        up: `B`, `(out_features, ranks)`.
        start: The experts' mean, `[K, c]`, `(ranks, in_features + 1)`.
    """
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
    A plain MLP for one with experts, from its inputs in each image, and what the report says of the layer.

    Args:
        inputs: Per image `(num_tokens, hidden_size)`. Of five images three are fitted, one chooses the ridge and one
            measures.
    """
    plain: dict[str, nn.Linear] = {name: copy.deepcopy(getattr(mlp, name)) for name in ("fc1", "fc2")}
    measured = [image for index, image in enumerate(inputs) if index % 5 == 4]
    fitted = [(index % 5 == 3, image) for index, image in enumerate(inputs) if index % 5 != 4]
    gates = [mlp.expert_gates(*mlp.router(image)) for _, image in fitted]
    shares = torch.cat(gates).mean(dim=0)
    facts: dict = {"expert_shares": [round(share, 4) for share in shares.tolist()]}
    for name in ("fc1", "fc2"):
        experts = getattr(mlp, f"{name}_experts")
        up, start = up_projection(experts), mean_expert(experts, shares)
        limit = up.shape[1] if rank is None else rank
        if name == "fc2":
            # Its target holds the error of fc1 too, which lies outside of what the up-projections span
            up, start = torch.eye(len(up), dtype=up.dtype, device=up.device), up @ start
        seen, unseen = Moments(), Moments()
        for (apart, image), gate in zip(fitted, gates, strict=True):
            if name == "fc1":
                pair = image, expert_outputs(experts, image, gate)
            else:
                intermediate = mlp.activation_fn(plain["fc1"](image))
                pair = intermediate, mlp(image) - mlp.fc2(intermediate)
            (unseen if apart else seen).add(*pair)
        update, facts[name] = fit(up, start, seen, unseen, limit)
        plain[name].weight.add_(update[:, :-1].to(plain[name].weight.dtype))
        plain[name].bias.add_(update[:, -1].to(plain[name].bias.dtype))

    def relative_error(first: nn.Module, second: nn.Module) -> float:
        exact = torch.cat([mlp(image) for image in measured])
        other = torch.cat([second(mlp.activation_fn(first(image))) for image in measured])
        return float((other - exact).norm() / exact.norm())

    facts["merged"] = relative_error(plain["fc1"], plain["fc2"])
    facts["dropped"] = relative_error(mlp.fc1, mlp.fc2)
    return nn.ModuleDict(plain), facts


def without_experts(tower: MoveKDVisionModel, updates: dict[str, torch.Tensor]) -> MoveKDVisionModel:
    """The tower with plain MLPs, `updates` in place of its own weights."""
    config = copy.deepcopy(tower.config)
    config.num_experts = 0
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
    A copy of the tower without experts, and its errors.

    Args:
        tower: With experts; computed in float32, given back in its own dtype.
        pixels: Per image `(3, image_size, image_size)`, at least five. Every fifth measures and nothing else.
        rank (`int`, *optional*): The most rank an update may have; by default that of all experts together.

    Returns:
        The tower, `num_experts` 0, and a report: `layers`, with the relative error of each MLP's output (Frobenius
        norm) `merged` and with the experts `dropped`, both on the original's inputs; `features`, the relative error of
        the features that feed the projector, where the errors of the layers have added up, `merged` and `dropped`; and
        `images`, how many were `fitted`, chose the ridge (`chosen`), and `measured`.

    Raises:
        ValueError: if the tower has no experts or gives values that are not finite, for fewer than five images, or a
            rank below 1.
    """
    if tower.config.num_experts == 0:
        raise ValueError("The tower has no experts (`num_experts` is 0), so there is nothing to merge.")
    if len(pixels) < FEWEST_IMAGES:
        raise ValueError(f"{len(pixels)} images were given to merge with; at least {FEWEST_IMAGES} are needed.")
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` is {rank}; it must be at least 1. Leave it out for that of all experts together.")
    dtype, tower = tower.dtype, copy.deepcopy(tower).float().eval()
    hidden_states = [tower.pre_layrnorm(tower.embeddings(image[None].float())) for image in pixels]
    updates: dict[str, torch.Tensor] = {}
    layers = []
    for index, layer in enumerate(tqdm(tower.encoder.layers, desc="Merging experts", unit="layer")):
        mlp = cast(MixtureOfLoraExpertsMLP, layer.mlp)
        inputs: list[torch.Tensor] = []
        handle = mlp.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, 1)))
        hidden_states = [layer(image, None) for image in hidden_states]
        handle.remove()
        if not all(image.isfinite().all() for image in hidden_states):
            raise ValueError(f"Layer {index} gives values that are not finite on the images; nothing can be fitted.")
        plain, facts = merge_layer(mlp, inputs, rank)
        updates |= {f"encoder.layers.{index}.mlp.{key}": value for key, value in plain.state_dict().items()}
        layers.append({"layer": index} | facts)
    # Rounded as it will be kept, and measured so
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
    """What feeds the projector, [CLS] included, `(1, 1 + num_patches, hidden_size * number of layers)`."""
    layer = feature_layer(tower.config)
    hidden_states = tower(image[None].to(tower.dtype), output_hidden_states=True).hidden_states
    return torch.cat([hidden_states[i] for i in ([layer] if isinstance(layer, int) else layer)], dim=-1)
