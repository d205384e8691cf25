"""
The encoder as an ONNX graph with a dynamic batch, checked by ONNX Runtime against the model it came from.

Input: `pixel_values` `(batch_size, 3, image_size, image_size)`. Outputs, float32 unless said otherwise:
`last_hidden_state` `(batch_size, 1 + num_patches, hidden_size)`; `features`, what feeds the projector;
`pooler_output` `(batch_size, hidden_size)` if the tower has it; `expert_indices` `(num_layers, batch_size,
1 + num_patches)`, int64, if it has experts.
"""

import importlib.util
from pathlib import Path

import torch
from torch import nn

from hub.checkpoint_parts import feature_layer
from modeling_movekd import MoveKDVisionModel


TOLERANCE = 1e-3


class EncoderGraph(nn.Module):
    """The tower with a tuple of tensors as its output, in the order of `output_names`."""

    def __init__(self, tower: MoveKDVisionModel, select_strategy: str):
        super().__init__()
        self.tower = tower
        layer = feature_layer(tower.config)
        self.feature_layers = [layer] if isinstance(layer, int) else list(layer)
        self.first_token = 1 if select_strategy == "default" else 0
        self.routed = tower.config.num_experts > 0
        self.output_names = ["last_hidden_state", "features"]
        self.output_names += ["pooler_output"] if tower.post_layernorm is not None else []
        self.output_names += ["expert_indices"] if self.routed else []

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.tower(pixel_values, output_hidden_states=True, output_expert_indices=self.routed)
        features = torch.cat([output.hidden_states[i][:, self.first_token :] for i in self.feature_layers], dim=-1)
        outputs = {
            "last_hidden_state": output.last_hidden_state,
            "features": features,
            "pooler_output": output.pooler_output,
            "expert_indices": torch.stack(output.expert_indices) if self.routed else None,
        }
        return tuple(outputs[name] for name in self.output_names)


def write_onnx(tower: MoveKDVisionModel, path: Path, select_strategy: str = "default") -> EncoderGraph:
    """
    Write the graph, and its weights beside it in `{name}.data`.

    Args:
        select_strategy: `"default"` drops the features of [CLS], `"full"` keeps them.

    Returns:
        The module that was traced.
    """
    if tower.dtype != torch.float32:
        raise ValueError(f"ONNX is exported in float32; the tower is {tower.dtype}. Leave `--dtype` out.")
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise ImportError(f"The form `onnx` needs {', '.join(missing)}: `pip install {' '.join(missing)}`.")
    graph = EncoderGraph(tower, select_strategy).eval()
    size = tower.config.image_size
    with torch.no_grad():
        torch.onnx.export(
            graph,
            (torch.zeros(2, tower.config.num_channels, size, size),),
            path,
            dynamo=True,
            verbose=False,
            external_data=True,
            input_names=["pixel_values"],
            output_names=graph.output_names,
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch_size")}},
        )
    return graph


@torch.no_grad()
def check_onnx(graph: EncoderGraph, path: Path, pixels: torch.Tensor | None = None) -> dict[str, float]:
    """
    Compare the graph in ONNX Runtime with the module that was traced.

    Rounding can tip a router that is undecided between two experts. Therefore up to 1 % of the tokens may differ by
    more than the tolerance, and up to 0.1 % of the routers' decisions.

    Args:
        pixels (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`, *optional*): Images to compare on,
            by default three of noise.

    Returns:
        `tokens_off`, the share of tokens beyond the tolerance; `difference`, the largest difference of the others
        relative to the largest output; `rerouted`, the share of the routers' decisions that differ.
    """
    import onnxruntime

    config = graph.tower.config
    if pixels is None:
        shape = (3, config.num_channels, config.image_size, config.image_size)
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = dict(zip(graph.output_names, session.run(None, {"pixel_values": pixels.numpy()}), strict=True))
    expected = dict(zip(graph.output_names, graph(pixels), strict=True))
    report = {"difference": 0.0, "tokens_off": 0.0, "rerouted": 0.0}
    for name, tensor in expected.items():
        other = torch.from_numpy(found[name])
        if name == "expert_indices":
            report["rerouted"] = (other != tensor).float().mean().item()
            continue
        difference = (other - tensor).abs().amax(dim=-1) / tensor.abs().max()
        off = ~(difference <= TOLERANCE)  # true for NaN as well
        report["tokens_off"] = max(report["tokens_off"], off.float().mean().item())
        if not off.all():
            report["difference"] = max(report["difference"], difference[~off].max().item())
    if report["tokens_off"] > 0.01 or report["rerouted"] > 0.001:
        raise ValueError(
            f"ONNX Runtime gives other features than torch: {report['tokens_off']:.2%} of the tokens differ by more "
            f"than {TOLERANCE} of the largest value, and {report['rerouted']:.3%} of the routers' decisions differ."
        )
    return report
