"""
ONNX graphs with dynamic batches and lengths, checked by ONNX Runtime against the model they came from.

An encoder is one graph. Input: `pixel_values` `(batch_size, 3, image_size, image_size)`. Outputs, float32 unless said
otherwise: `last_hidden_state` `(batch_size, num_tokens, hidden_size)`, with [CLS] before the patches if the tower has
it; `features`, what feeds the projector; `pooler_output` `(batch_size, hidden_size)` if the tower has it;
`expert_indices` `(num_layers, batch_size, num_tokens)`, int64, if it has experts.

A whole model is three graphs, with the names and inputs of onnx-community's LLaVA repositories:

- `vision_encoder.onnx`: `pixel_values` -> `image_features` `(batch_size, num_tokens, text_hidden_size)`.
- `embed_tokens.onnx`: `input_ids` `(batch_size, sequence_length)` -> `inputs_embeds`.
- `decoder_model_merged.onnx`: `inputs_embeds`, `attention_mask` `(batch_size, past_sequence_length +
  sequence_length)`, `position_ids` `(batch_size, sequence_length)` and, for each layer N, `past_key_values.N.key` and
  `.value` `(batch_size, num_key_value_heads, past_sequence_length, head_dim)` -> `logits`, `present.N.key` and
  `.value`. The past may be empty, so that the same graph reads the prompt and decodes.
"""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hub.checkpoint_parts import feature_layer
from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel


TOLERANCE = 1e-3
GRAPHS = ("vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx")

Past = list[tuple[torch.Tensor, torch.Tensor]]


class EncoderGraph(nn.Module):
    """The tower, and the projector if there is one, with tensors as the output in the order of `output_names`."""

    def __init__(self, tower: MoveKDVisionModel, select_strategy: str, projector: nn.Module | None = None):
        super().__init__()
        self.tower, self.projector = tower, projector
        layer = feature_layer(tower.config)
        self.feature_layers = [layer] if isinstance(layer, int) else list(layer)
        self.first_token = tower.config.num_prefix_tokens if select_strategy == "default" else 0
        self.routed = tower.config.num_experts > 0
        self.output_names = ["last_hidden_state", "features"]
        self.output_names += ["pooler_output"] if tower.post_layernorm is not None else []
        self.output_names += ["expert_indices"] if self.routed else []
        if projector is not None:
            self.output_names = ["image_features"]

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.tower(pixel_values, output_hidden_states=True, output_expert_indices=self.routed)
        features = torch.cat([output.hidden_states[i][:, self.first_token :] for i in self.feature_layers], dim=-1)
        if self.projector is not None:
            return (self.projector(features),)
        outputs = {
            "last_hidden_state": output.last_hidden_state,
            "features": features,
            "pooler_output": output.pooler_output,
            "expert_indices": torch.stack(output.expert_indices) if self.routed else None,
        }
        return tuple(outputs[name] for name in self.output_names)


class DecoderGraph(nn.Module):
    """The language model with its head, where keys and values come in and go out as plain tensors."""

    def __init__(self, model: MoveKDForConditionalGeneration):
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: Past
    ) -> tuple[torch.Tensor, Past]:
        cache = DynamicCache(past)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return self.lm_head(outputs.last_hidden_state), [(layer.keys, layer.values) for layer in cache.layers]

    def example(self, batch_size: int, length: int, past_length: int) -> tuple[Any, ...]:
        """
        Inputs of noise.

        Raises:
            ValueError: If the language model keeps more than keys and values.
        """
        config = self.language_model.config
        random = torch.Generator().manual_seed(0)
        embedding = self.language_model.get_input_embeddings()
        input_ids = torch.randint(config.vocab_size, (batch_size, length), generator=random)
        cache = DynamicCache(config=config)
        if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
            raise ValueError(
                f"{type(self.language_model).__name__} keeps more than the keys and values of earlier tokens, which "
                "the form `onnx` does not support. Export the encoder alone: `--form encoder`, then `--form onnx`."
            )
        self.language_model(inputs_embeds=embedding(input_ids[:1, :1]), past_key_values=cache, use_cache=True)
        past = []
        for layer in cache.layers:
            shapes = [
                (batch_size, tensor.shape[1], past_length, tensor.shape[3]) for tensor in (layer.keys, layer.values)
            ]
            past.append(tuple(torch.randn(shape, generator=random) for shape in shapes))
        mask = torch.ones(batch_size, past_length + length, dtype=torch.int64)
        mask[1:, : past_length // 2] = 0  # all rows but the first are padded on the left
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, past_length:]
        return embedding(input_ids), mask, positions, past

    @staticmethod
    def names(kind: str, past: Past) -> list[str]:
        return [f"{kind}.{index}.{part}" for index in range(len(past)) for part in ("key", "value")]


def check_can_write(dtype: torch.dtype) -> None:
    if dtype != torch.float32:
        raise ValueError(f"ONNX is exported in float32; the tower is {dtype}. Leave `--dtype` out.")
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise ImportError(f"The form `onnx` needs {', '.join(missing)}: `pip install {' '.join(missing)}`.")


@torch.no_grad()
def write_graph(
    graph: nn.Module,
    inputs: tuple[Any, ...],
    path: Path,
    input_names: list[str],
    output_names: list[str],
    dynamic_shapes: tuple[Any, ...],
    data_ending: str = "_data",
) -> None:
    """Write a module as an ONNX graph at `path`, and its weights in a file beside it, which has `data_ending` more."""
    import onnx_ir  # comes with onnxscript

    with warnings.catch_warnings():
        # An axis that several inputs share is named once
        warnings.filterwarnings("ignore", "# The axis name")
        try:
            program = torch.onnx.export(
                graph,
                inputs,
                dynamo=True,
                verbose=False,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=dynamic_shapes,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ValueError(f"torch cannot export this model to {path.name}. Choose another form. {error}") from error
    assert program is not None  # it is without `dynamo` only
    onnx_ir.save(program.model, path, external_data=f"{path.name}{data_ending}")


def write_onnx(
    tower: MoveKDVisionModel,
    path: Path,
    select_strategy: str = "default",
    projector: nn.Module | None = None,
    data_ending: str = ".data",
) -> EncoderGraph:
    """
    Write the graph of an encoder, and its weights beside it.

    Args:
        select_strategy: `"default"` drops the features of [CLS], `"full"` keeps them.
        projector (`nn.Module`, *optional*): Gives the graph the output `image_features` alone.

    Returns:
        The module that was traced.
    """
    check_can_write(tower.dtype)
    graph = EncoderGraph(tower, select_strategy, projector).eval()
    size = tower.config.image_size
    pixels = torch.zeros(2, tower.config.num_channels, size, size)
    shapes = ({0: Dim("batch_size")},)
    write_graph(graph, (pixels,), path, ["pixel_values"], graph.output_names, shapes, data_ending)
    return graph


@torch.no_grad()
def write_whole_onnx(model: MoveKDForConditionalGeneration, folder: Path) -> tuple[EncoderGraph, DecoderGraph]:
    """
    Write the three graphs of a whole model.

    Returns:
        The modules of encoder and decoder that were traced.
    """
    check_can_write(model.dtype)
    decoder = DecoderGraph(model).eval()
    inputs = decoder.example(2, 5, 3)
    past = inputs[-1]
    encoder, embedding, language = (folder / name for name in GRAPHS)
    batch, length, past_length = Dim("batch_size"), Dim("sequence_length"), Dim("past_sequence_length")
    tokens = {0: batch, 1: length}
    keys = {0: batch, 2: past_length}
    write_graph(
        decoder,
        inputs,
        language,
        ["inputs_embeds", "attention_mask", "position_ids", *decoder.names("past_key_values", past)],
        ["logits", *decoder.names("present", past)],
        (tokens, {0: batch, 1: Dim("total_sequence_length")}, tokens, [(keys, keys)] * len(past)),
    )
    input_ids = torch.zeros(2, 5, dtype=torch.int64)
    write_graph(model.get_input_embeddings(), (input_ids,), embedding, ["input_ids"], ["inputs_embeds"], (tokens,))
    projector, strategy = model.model.multi_modal_projector, model.config.vision_feature_select_strategy
    return write_onnx(model.model.vision_tower, encoder, strategy, projector, "_data"), decoder


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


@torch.no_grad()
def check_decoder(graph: DecoderGraph, folder: Path) -> float:
    """
    Compare embedding and decoder in ONNX Runtime with the model: a prompt without a past, and tokens after a past, one
    and several, in a batch of which a part is padded.

    Returns:
        The largest difference of any output, relative to the largest value of that output.
    """
    import onnxruntime

    embedding, decoder = (
        onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"]) for name in GRAPHS[1:]
    )
    input_ids = torch.arange(min(8, graph.language_model.config.vocab_size))[None]
    pairs = [
        (
            embedding.run(None, {"input_ids": input_ids.numpy()})[0],
            graph.language_model.get_input_embeddings()(input_ids),
        )
    ]
    for batch_size, length, past_length in ((1, 7, 0), (1, 1, 7), (3, 2, 4)):
        *inputs, past = graph.example(batch_size, length, past_length)
        tensors = [*inputs, *(tensor for layer in past for tensor in layer)]
        feeds = {node.name: tensor.numpy() for node, tensor in zip(decoder.get_inputs(), tensors, strict=True)}
        logits, present = graph(*inputs, past)
        expected = [logits, *(tensor for layer in present for tensor in layer)]
        pairs += zip(decoder.run(None, feeds), expected, strict=True)
    # Not Python's `max`, which passes over NaN
    difference = torch.stack([(torch.from_numpy(a) - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()
    if not difference <= TOLERANCE:  # true for NaN as well
        raise ValueError(
            f"ONNX Runtime gives other logits than torch: they differ by up to {difference:.1e} of the largest value."
        )
    return difference
