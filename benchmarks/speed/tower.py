"""
Speed and memory of the tower over those of the CLIP that it replaces: `python -m benchmarks.speed.tower`.

The rivals are transformers' CLIP (all layers, sdpa), and a tower as the original code has it: every expert on all
tokens in a loop, all layers, and the attention maps and hidden states of every layer kept.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.speed.options import parser


PARTS = ["times", "loop", "memory", "building"]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__, repeats=5)
    options.add_argument("--batch_size", type=int, default=2)
    options.add_argument("--num_experts", type=int, default=3)
    options.add_argument("--lora_rank", type=int, default=32)
    options.add_argument("--lora_dropout", type=float, default=0.05, help="dropout on the experts' input")
    options.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="parts of the table")
    return options.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

import torch
from torch import nn
from transformers import CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import CLIPMLP

from benchmarks.speed.measure import Row, paired_row, paired_times, peak_memory, report, start
from benchmarks.speed.models import CLIP_LARGE, TOY_CLIP, TowerCase, features, forward, training_step
from modeling_movekd import MoveKDVisionModel


class LoopOfExpertsMLP(nn.Module):
    """The mixture as the paper writes it: every expert computes every token, and the router selects one output."""

    def __init__(self, mlp: CLIPMLP, num_experts: int, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.fc1, self.fc2, self.activation_fn = mlp.fc1, mlp.fc2, mlp.activation_fn
        width, intermediate = self.fc1.in_features, self.fc1.out_features
        self.router = nn.Linear(width, num_experts)
        self.fc1_experts = nn.ModuleList([_lora(width, intermediate, rank, dropout) for _ in range(num_experts)])
        self.fc2_experts = nn.ModuleList([_lora(intermediate, width, rank, dropout) for _ in range(num_experts)])
        self.scaling = alpha / rank

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        chosen = self.router(hidden_states).softmax(dim=-1).argmax(dim=-1, keepdim=True)
        hidden_states = self.activation_fn(self._layer(self.fc1, self.fc1_experts, hidden_states, chosen))
        return self._layer(self.fc2, self.fc2_experts, hidden_states, chosen)

    def _layer(
        self, linear: nn.Module, experts: nn.ModuleList, hidden_states: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        update = None
        for index, expert in enumerate(experts):
            output = expert(hidden_states) * self.scaling
            update = torch.where(chosen == index, output, torch.zeros_like(output) if update is None else update)
        return linear(hidden_states) + update


def _lora(in_features: int, out_features: int, rank: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(in_features, rank), nn.Linear(rank, out_features))


class LoopOfExpertsTower(nn.Module):
    """CLIP with [`LoopOfExpertsMLP`] in every layer, all of whose attention maps and hidden states are kept."""

    def __init__(self, case: TowerCase):
        super().__init__()
        self.clip: CLIPVisionModel = case.clip()
        self.clip.set_attn_implementation("eager")
        for layer in self.clip.encoder.layers:
            layer.mlp = LoopOfExpertsMLP(layer.mlp, case.num_experts, case.lora_rank, alpha=1.0, dropout=0.05)
            for part in (layer.mlp.router, layer.mlp.fc1_experts, layer.mlp.fc2_experts):
                part.to(case.device, getattr(torch, case.dtype))

    def forward(self, pixels: torch.Tensor) -> BaseModelOutput:
        """LLaVA's features: the hidden state before the last layer."""
        outputs = self.clip(pixels, output_attentions=True, output_hidden_states=True)
        return BaseModelOutput(outputs.hidden_states[-2], outputs.hidden_states, outputs.attentions)


def training_forward(model: nn.Module, pixels: torch.Tensor) -> Callable[[], Any]:
    return lambda: features(model.train(), pixels)


def input_gradients(model: nn.Module, pixels: torch.Tensor) -> Callable[[], Any]:
    """The floor of a step: forward, and the gradients of the activations alone."""

    def run() -> None:
        features(model.eval(), pixels.clone().requires_grad_()).float().square().mean().backward()

    return run


def measured(what: str, case: dict[str, Any]) -> Callable[[], Any]:
    """For a fresh process: build a model, and return its forward or step."""
    shapes = TowerCase(**case)
    pixels = shapes.pixels()
    if what == "clip forward":
        return forward(shapes.clip(), pixels)
    if what == "folded forward":
        tower = shapes.tower()
        tower.fold_experts()
        return forward(tower, pixels)
    if what == "loop forward":
        return forward(LoopOfExpertsTower(shapes), pixels)
    if what == "loop step":
        return training_step(LoopOfExpertsTower(shapes), pixels)
    return training_step(shapes.tower(checkpointing=what == "checkpointed step"), pixels)


MEMORY = ("clip forward", "folded forward", "step", "checkpointed step", "loop forward", "loop step")


def measured_building(source: str, case: dict[str, Any]) -> Callable[[], Any]:
    """For a fresh process: build the tower from a folder, or from CLIP in memory if `source` is empty."""
    shapes = TowerCase(**case)
    clip = source or shapes.clip()

    def run() -> MoveKDVisionModel:
        tower = MoveKDVisionModel.from_clip(clip, num_experts=shapes.num_experts, lora_rank=shapes.lora_rank)
        # The memory of mapped weights counts once they are read
        for parameter in tower.parameters():
            parameter.sum()
        return tower

    return run


def time_rows(case: TowerCase, repeats: int) -> list[Row]:
    pixels = case.pixels()
    clip, tower, folded = case.clip(), case.tower(), case.tower()
    folded.fold_experts()
    times = paired_times(
        {
            "clip": forward(clip, pixels),
            "folded": forward(folded, pixels),
            "unfolded": forward(tower, pixels),
            "training": training_forward(tower, pixels),
            "step": training_step(tower, pixels),
            "floor": input_gradients(clip, pixels),
        },
        repeats,
    )
    return [
        time_row(times, "inference forward", "folded", 1.00, "experts folded"),
        time_row(times, "inference forward", "unfolded", note="not folded"),
        time_row(times, "forward in training mode", "training", 1.08),
        time_row(times, "training step", "step", 2.25, "experts and routers train"),
        time_row(times, "floor of a step", "floor", note="CLIP, gradients of the activations alone"),
    ]


def loop_rows(case: TowerCase, repeats: int) -> list[Row]:
    """Timed apart from the others: a step of the loop takes about 8 GB."""
    pixels, clip, loop = case.pixels(), case.clip(), LoopOfExpertsTower(case)
    times = paired_times(
        {
            "clip": forward(clip, pixels),
            "loop": forward(loop, pixels),
            "loop training": training_forward(loop, pixels),
            "loop step": training_step(loop, pixels),
        },
        repeats,
    )
    note = "rival tower over CLIP"
    return [
        time_row(times, "loop over experts, inference forward", "loop", note=note),
        time_row(times, "loop over experts, forward in training mode", "loop training", note=note),
        time_row(times, "loop over experts, training step", "loop step", note=note),
    ]


def time_row(times: dict[str, list[float]], what: str, name: str, at_most: float | None = None, note: str = "") -> Row:
    return paired_row(what, times[name], times["clip"], at_most=at_most, note=note)


def memory_rows(case: TowerCase) -> list[Row]:
    peaks = {
        what: peak_memory("benchmarks.speed.tower:measured", {"what": what, "case": asdict(case)}) / 1e6
        for what in MEMORY
    }

    def row(what: str, name: str, at_most: float | None = None, note: str = "") -> Row:
        return Row(what, peaks[name], peaks["clip forward"], "MB", at_most=at_most, note=note)

    return [
        row("peak memory of the training step", "step", 2.3),
        row("peak memory of the training step", "checkpointed step", 1.3, "activation checkpointing"),
        row("peak memory of the inference forward", "folded forward", 1.05, "experts folded"),
        row("loop over experts, peak memory of the forward", "loop forward", note="rival tower over CLIP"),
        row("loop over experts, peak memory of the step", "loop step", note="rival tower over CLIP"),
    ]


def building_rows(case: TowerCase) -> list[Row]:
    tower = case.tower()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in tower.parameters()) / 1e6
    del tower
    with tempfile.TemporaryDirectory() as folder:
        case.clip().save_pretrained(folder)
        peaks = {
            note: peak_memory(
                "benchmarks.speed.tower:measured_building", {"source": source, "case": asdict(case)}, True
            )
            for note, source in (("CLIP in a folder", folder), ("CLIP in memory, not counted", ""))
        }
    what = "peak memory while the tower is built, over its weights"
    return [Row(what, peak / 1e6, weights, "MB", at_most=1.2, note=note) for note, peak in peaks.items()]


def main(arguments: Sequence[str] | None = None) -> str:
    chosen = parse_arguments(arguments)
    start(chosen)
    names = ("batch_size", "num_experts", "lora_rank", "lora_dropout", "device", "dtype")
    shapes = {name: getattr(chosen, name) for name in names}
    case = TowerCase(TOY_CLIP if chosen.toy else CLIP_LARGE, **shapes)
    rows = []
    if "times" in chosen.parts:
        rows += time_rows(case, chosen.repeats)
    if "loop" in chosen.parts:
        rows += loop_rows(case, chosen.repeats)
    if "memory" in chosen.parts:
        rows += memory_rows(case)
    if "building" in chosen.parts:
        rows += building_rows(case)
    context = {**{f"CLIP's {name}": value for name, value in case.sizes.items()}, **shapes, "repeats": chosen.repeats}
    return report("The tower over plain CLIP's forward", rows, context, chosen.out)


if __name__ == "__main__":
    main()
