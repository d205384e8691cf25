"""
Whether a device computes what the CPU computes: `python -m benchmarks.speed.devices`.

- Features and gradients of tower, heads and losses against the CPU's in float32, by dtype and attention. The rival is
  the largest relative error that is allowed.
- Synchronizations of the device with the CPU in forward and backward (CUDA alone): none is allowed.
- `torch.compile` of tower and losses in one graph, and its time over the time without.

CLIP-L/14-336 with four layers and experts, the paper's four teachers, random weights.
"""

import argparse
import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.speed.options import parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    flags = parser(__doc__, repeats=5)
    flags.add_argument("--batch_size", type=int, default=4)
    return flags.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

import torch
from torch import nn
from transformers.utils import is_flash_attn_2_available

from benchmarks.speed import teachers
from benchmarks.speed.measure import Row, paired_row, paired_times, report, start
from benchmarks.speed.models import CLIP_LARGE, TOY_CLIP
from modeling_movekd import MoveKDVisionConfig, MoveKDVisionModel
from train.distillation.losses import balance_loss


# Largest error of the features and of the gradients, as the norm of the difference over the norm
ALLOWED = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 8e-2)}


class Step(nn.Module):
    """Forward of tower, heads and all losses of the method, on given pixels and teachers' features."""

    def __init__(self, sizes: dict[str, int], shapes: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = MoveKDVisionConfig(
            **sizes, num_experts=3, lora_rank=32, lora_alpha=32, expert_init="kaiming", lora_dropout=0.0
        )
        config.add_pooling_layer = False
        self.tower = MoveKDVisionModel._from_config(config)
        self.distiller = teachers.build_distiller(shapes, "cpu", "float32")

    def forward(self, pixels: torch.Tensor, features: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.tower(pixels, output_router_probabilities=True, output_expert_indices=True)
        tokens = outputs.last_hidden_state[:, 1:]
        distillation = self.distiller(tokens, features).loss
        balance = balance_loss(outputs.router_probabilities, outputs.expert_indices, "per_layer")
        return tokens, distillation.mean() + 0.01 * balance.mean()


def build(toy: bool, batch_size: int) -> tuple[Step, torch.Tensor, dict[str, Any]]:
    sizes = dict(TOY_CLIP) if toy else CLIP_LARGE | {"num_hidden_layers": 4}
    shapes = dict(teachers.TOY_SHAPES if toy else teachers.SHAPES)
    side = sizes["image_size"] // sizes["patch_size"]
    shapes |= {"width": sizes["hidden_size"], "grid": side}
    shapes["teachers"] = shapes["teachers"] | {"clip": [sizes["hidden_size"], side]}
    pixels = torch.randn(batch_size, 3, *(sizes["image_size"],) * 2, generator=torch.Generator().manual_seed(1))
    _, features = teachers.distillation_inputs(shapes, batch_size, "cpu", "float32")
    return Step(sizes, shapes).train(), pixels, features


def moved(inputs: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(inputs, torch.Tensor):
        return inputs.detach().to(device, dtype)
    return {
        name: value._replace(
            **{key: moved(part, device, dtype) for key, part in value._asdict().items() if torch.is_tensor(part)}
        )
        for name, value in inputs.items()
    }


def run(step: Step, pixels: torch.Tensor, features: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the tower, and the gradients of all parameters in one vector; both float32."""
    step.zero_grad()
    tokens, loss = step(pixels, features)
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in step.parameters()]
    return tokens.detach().float().cpu(), torch.cat([gradient.flatten().float().cpu() for gradient in gradients])


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def equality_rows(step: Step, pixels: torch.Tensor, features: dict[str, Any], device: str) -> list[Row]:
    expected = run(step, pixels, features)
    rows = []
    for dtype, bars in ALLOWED.items():
        attentions = ["eager", "sdpa"]
        if dtype != "float32" and device != "cpu" and is_flash_attn_2_available():
            attentions.append("flash_attention_2")
        for attention in attentions:
            own = copy.deepcopy(step).to(device, getattr(torch, dtype))
            own.tower.set_attn_implementation(attention)
            found = run(own, *(moved(part, device, getattr(torch, dtype)) for part in (pixels, features)))
            for what, one, other, bar in zip(("features", "gradients"), found, expected, bars, strict=True):
                note = f"{dtype}, {attention}, {device}; rival: allowed"
                differs = error(one, other)
                row = Row(f"relative error of the {what}", differs, bar, "", at_most=1.0, note=note)
                row.ratio = differs / bar  # also where nothing differs
                rows.append(row)
    return rows


def synchronizations(function: Callable[[], Any]) -> int:
    """Waits of the CPU for the GPU in a call, as CUDA's debug mode counts them."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def step_of(step: Any, pixels: torch.Tensor, features: dict[str, Any]) -> Callable[[], None]:
    def once() -> None:
        step(pixels, features)[1].backward()
        step.zero_grad()

    return once


def compile_rows(step: Step, pixels: torch.Tensor, features: dict[str, Any], repeats: int) -> list[Row]:
    """One graph each, or torch raises. On a CPU without a C++ compiler's minute: traced, not compiled."""
    backend = "inductor" if pixels.is_cuda else "aot_eager"
    compiled: Any = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)
    functions = {"compiled": step_of(compiled, pixels, features), "eager": step_of(step, pixels, features)}
    times = paired_times(functions, repeats, warm_up=2)
    note = f"backend {backend}; rival: eager"
    return [paired_row("step of tower, heads and losses in one graph", times["compiled"], times["eager"], note=note)]


def main(arguments: Sequence[str] | None = None) -> str:
    options = parse_arguments(arguments)
    start(options)
    torch.backends.cuda.matmul.allow_tf32 = False  # the default, which another script may have changed
    step, pixels, features = build(options.toy, options.batch_size)
    rows = equality_rows(step, pixels, features, options.device)
    dtype = torch.bfloat16 if options.device != "cpu" else torch.float32
    step.to(options.device, dtype)
    pixels, features = (moved(part, options.device, dtype) for part in (pixels, features))
    if options.device.startswith("cuda"):
        once = step_of(step, pixels, features)
        once()  # the first call may allocate and tune
        waits = synchronizations(once)
        rows.append(Row("synchronizations in a step", waits, None, "", ratio=float(waits), at_most=0.0))
    rows += compile_rows(step, pixels, features, options.repeats)
    context = {"device": options.device, "batch": options.batch_size, "repeats": options.repeats}
    return report("Device against CPU", rows, context, options.out)


if __name__ == "__main__":
    main()
