"""Mixture of LoRA experts (MoLE) for the MLPs of a CLIP vision tower (MoVE-KD, arXiv 2501.01709)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPMLP

from .configuration_movekd import MoveKDVisionConfig


QUICK_GELU_SLOPE = 1.702


class QuickGELUFunction(torch.autograd.Function):
    """
    `x * sigmoid(1.702 x)`, bit for bit as transformers has it, which is `silu(1.702 x) / 1.702` for the gradient: one
    wide tensor made instead of three, nothing kept but the input, and two passes over memory backward instead of five.
    """

    @staticmethod
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        return (hidden_states * QUICK_GELU_SLOPE).sigmoid_().mul_(hidden_states)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (hidden_states,) = ctx.saved_tensors
        # The slope inside and the division outside cancel
        return torch.ops.aten.silu_backward(gradient, hidden_states * QUICK_GELU_SLOPE)


class QuickGELU(nn.Module):
    """CLIP's activation on any shape, see [`QuickGELUFunction`]."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return QuickGELUFunction.apply(hidden_states)


class ExpertRouter(nn.Module):
    """
    Linear router over the experts of one MLP.

    A module of its own, with parameters rather than an `nn.Linear` inside, so that its output can be recorded by a
    forward hook and neither LoRA's `"all-linear"` nor a quantizer takes it for one of the model's projections.
    """

    def __init__(self, config: MoveKDVisionConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`).

        Returns:
            Probabilities, float32, `(batch_size, sequence_length, num_experts)`, and the index of the most probable
            expert, int64, `(batch_size, sequence_length)`.
        """
        logits = nn.functional.linear(hidden_states, self.weight, self.bias)
        probabilities = logits.softmax(dim=-1, dtype=torch.float32)
        return probabilities, probabilities.argmax(dim=-1)


class LoraExperts(nn.Module):
    """
    All LoRA experts around one linear layer, packed: `weight_a` holds the down-projections one below the other,
    `weight_b` the up-projections side by side. Expert `i` owns ranks `i * r` to `(i + 1) * r`.

    The parameters' names avoid `lora_`, by which PEFT would recognise them as its own.
    """

    def __init__(self, config: MoveKDVisionConfig, in_features: int, out_features: int):
        super().__init__()
        ranks = config.num_experts * config.lora_rank
        self.rank = config.lora_rank
        self.scaling = config.lora_alpha / config.lora_rank
        self.dropout = nn.Dropout(config.lora_dropout)
        self.weight_a = nn.Parameter(torch.empty(ranks, in_features))
        self.weight_b = nn.Parameter(torch.empty(out_features, ranks))
        if config.expert_bias:
            self.bias_a = nn.Parameter(torch.empty(ranks))
            self.bias_b = nn.Parameter(torch.empty(config.num_experts, out_features))
        else:
            self.register_parameter("bias_a", None)
            self.register_parameter("bias_b", None)

    def forward(
        self, hidden_states: torch.Tensor, base: torch.Tensor, gates: torch.Tensor, in_place: bool = False
    ) -> torch.Tensor:
        """
        `base + scaling * sum_i gates_i * B_i(A_i(hidden_states))`, as two products over all ranks with the ranks of
        unrouted experts zeroed: no loop over experts and no data-dependent shape.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, in_features)`): Input of the layer.
            base (`torch.Tensor` of shape `(batch_size * sequence_length, out_features)`): The layer's own output.
            gates (`torch.Tensor` of shape `(batch_size, sequence_length, num_experts)`): Weight of each expert.
            in_place: Whether `base` may be overwritten.

        Returns:
            `torch.Tensor` of the shape of `base`.
        """
        return self.add_routed(base, *self.routed_ranks(hidden_states, gates), in_place)

    def routed_ranks(self, hidden_states: torch.Tensor, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The down-projections of `hidden_states` and the gates, as [`LoraExperts.gate`] gives them."""
        ranks = nn.functional.linear(self.dropout(hidden_states), self.weight_a, self.bias_a)
        return self.gate(ranks, gates)

    def gate(self, ranks: torch.Tensor, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The down-projections `(batch_size, sequence_length, num_experts * rank)`, scaled by the gates and so zero for
        the ranks of unrouted experts; and the scaled gates.
        """
        gates = (gates * self.scaling).to(ranks.dtype)
        return (ranks.unflatten(-1, (-1, self.rank)) * gates.unsqueeze(-1)).flatten(-2), gates

    def add_routed(self, base: torch.Tensor, ranks: torch.Tensor, gates: torch.Tensor, in_place: bool) -> torch.Tensor:
        """Adds the up-projections of what [`LoraExperts.gate`] gave, and the experts' biases, to `base`."""
        # One kernel that adds into the base product, instead of a product and a sum over the wide activation
        for weights, weight in ((ranks, self.weight_b.t()), (gates, self.bias_b)):
            if weight is not None:
                factors = weights.flatten(0, -2).to(base.dtype), weight.to(base.dtype)
                base = base.addmm_(*factors) if in_place else base.addmm(*factors)
        return base

    def fold_into(self, linear: nn.Linear) -> torch.Tensor:
        """
        Lay the weights of `linear`, the up-projections and their biases side by side, `[W | B | b]`, so that one
        product of `[x | ranks | gates]` gives what `linear` and the experts give. The parameters become views of the
        result: nothing is held twice, and they keep their values and names.

        Returns:
            `torch.Tensor` of shape `(out_features, in_features + num_experts * rank (+ num_experts))`.
        """
        parts = [linear.weight, self.weight_b] + ([self.bias_b.t()] if self.bias_b is not None else [])
        folded = torch.cat([part.detach() for part in parts], dim=1)
        views = folded.split([part.shape[1] for part in parts], dim=1)
        linear.weight.data, self.weight_b.data = views[0], views[1]
        if self.bias_b is not None:
            self.bias_b.data = views[2].t()
        return folded

    def stack_onto(self, linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Lay the weights of `linear` and the down-projections one below the other, `[W; A]`, and their biases, so that
        one pass over a wide input gives the layer's output and the experts' ranks. Views, as in
        [`LoraExperts.fold_into`].

        Returns:
            `torch.Tensor` of shape `(out_features + num_experts * rank, in_features)`, and the biases of its rows.
        """
        sizes = [len(linear.weight), len(self.weight_a)]
        weight = torch.cat([linear.weight.detach(), self.weight_a.detach()])
        bias_a = self.weight_a.new_zeros(sizes[1]) if self.bias_a is None else self.bias_a.detach()
        bias = torch.cat([linear.bias.detach(), bias_a])
        linear.weight.data, self.weight_a.data = weight.split(sizes)
        linear.bias.data, bias_a = bias.split(sizes)
        if self.bias_a is not None:
            self.bias_a.data = bias_a
        return weight, bias


class MixtureOfLoraExpertsMLP(CLIPMLP):
    """
    A CLIP MLP with a mixture of LoRA experts around both linear layers. One routing per token, taken from the MLP's
    input, serves both. Output of each layer: `fc(x) + alpha / rank * B_i(A_i(x))` with `i` the token's expert, or
    all experts weighed by their probability if `dense_routing`.
    """

    def __init__(self, config: MoveKDVisionConfig):
        super().__init__(config)
        self.dense_routing = config.dense_routing
        self.straight_through = config.router_gradient == "straight_through"
        self.router = ExpertRouter(config)
        self.fc1_experts = LoraExperts(config, config.hidden_size, config.intermediate_size)
        self.fc2_experts = LoraExperts(config, config.intermediate_size, config.hidden_size)
        # Of the first layer the weight; of the second one the weight and the bias
        self.folded: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        if config.hidden_act == "quick_gelu":
            self.activation_fn: nn.Module = QuickGELU()

    def expert_gates(self, probabilities: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """
        Weight of each expert from the router's output, `(batch_size, sequence_length, num_experts)`: the probabilities
        if dense, else one-hot. Straight-through multiplies the one by `1 + p_i - stopgrad(p_i)`: the same value, with
        the gradient of the task for the router.
        """
        if self.dense_routing:
            return probabilities
        gates = torch.zeros_like(probabilities).scatter(-1, indices.unsqueeze(-1), 1.0)
        if self.straight_through:
            # The bracket is exactly zero in value, so the output does not depend on the form of the gradient
            gates = gates * (1 + (probabilities - probabilities.detach()))
        return gates

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Shapes `(batch_size, sequence_length, hidden_size)` in and out."""
        gates = self.expert_gates(*self.router(hidden_states))
        if self.folded is not None and not torch.is_grad_enabled() and not self._is_wrapped():
            return self._folded_forward(*self.folded, hidden_states, gates)
        intermediate = self.activation_fn(self._layer(self.fc1, self.fc1_experts, hidden_states, gates))
        return self._layer(self.fc2, self.fc2_experts, intermediate, gates)

    @staticmethod
    def _layer(
        linear: nn.Module, experts: LoraExperts, hidden_states: torch.Tensor, gates: torch.Tensor
    ) -> torch.Tensor:
        # What adapters, ZeRO-3 or a user's hooks make of the product may not be overwritten
        in_place = type(linear) is nn.Linear and not (linear._forward_hooks or linear._backward_hooks)
        base = linear(hidden_states.flatten(0, -2))
        return experts(hidden_states, base, gates, in_place).unflatten(0, hidden_states.shape[:-1])

    def _folded_forward(
        self,
        first: torch.Tensor,
        second: torch.Tensor,
        second_bias: torch.Tensor,
        hidden_states: torch.Tensor,
        gates: torch.Tensor,
    ) -> torch.Tensor:
        ranks, scaled_gates = self.fc1_experts.routed_ranks(hidden_states, gates)
        parts = [hidden_states, ranks] + ([scaled_gates] if self.fc1_experts.bias_b is not None else [])
        inputs = torch.cat(parts, dim=-1).flatten(0, -2)
        # QuickGELU is silu(1.702 x) / 1.702: both factors come with the products, and silu overwrites its input
        quick = isinstance(self.activation_fn, QuickGELU)
        slope = QUICK_GELU_SLOPE if quick else 1.0
        intermediate = torch.addmm(self.fc1.bias, inputs, first.t(), beta=slope, alpha=slope)
        intermediate = nn.functional.silu(intermediate, inplace=True) if quick else self.activation_fn(intermediate)
        outputs = torch.addmm(second_bias, intermediate, second.t(), alpha=1 / slope)
        base, ranks = outputs.split([self.fc2.out_features, outputs.shape[-1] - self.fc2.out_features], dim=-1)
        routed = self.fc2_experts.gate(ranks.unflatten(0, hidden_states.shape[:-1]), gates)
        return self.fc2_experts.add_routed(base, *routed, in_place=True).unflatten(0, hidden_states.shape[:-1])

    def _is_wrapped(self) -> bool:
        """Adapters and quantized weights put a module of their own in a linear layer's place."""
        return type(self.fc1) is not nn.Linear or type(self.fc2) is not nn.Linear or self._is_hooked()

    def _is_hooked(self) -> bool:
        """What the folded form passes by, accelerate's `_hf_hook` brings offloaded weights among it."""
        layers = (self.fc1, self.fc1_experts, self.activation_fn, self.fc2, self.fc2_experts)
        return any(layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook") for layer in layers)

    def fold(self) -> None:
        """
        Fold the experts into the layers for inference: the first layer's up-projections, whose output is wide, and
        the second one's down-projections, whose input is. Used without gradients only; see [`LoraExperts.fold_into`]
        and [`LoraExperts.stack_onto`].

        Raises:
            ValueError: while training, or where the layers are quantized, carry adapters or hooks, or are offloaded.
        """
        if self.training or self._is_wrapped():
            layers = f"{type(self.fc1).__name__} and {type(self.fc2).__name__}{' with hooks' * self._is_hooked()}"
            raise ValueError(
                f"Experts are folded for inference into plain linear layers without hooks; these are {layers} in "
                f"{'training' if self.training else 'evaluation'} mode. Call `eval()`, fold before adapters are added "
                "or hooks registered, and leave quantized and offloaded weights as they are."
            )
        self.unfold()
        self.folded = (self.fc1_experts.fold_into(self.fc1), *self.fc2_experts.stack_onto(self.fc2))

    def unfold(self) -> None:
        """Give each parameter memory of its own again."""
        if self.folded is not None:
            self.folded = None
            for layer in (self.fc1, self.fc1_experts, self.fc2, self.fc2_experts):
                for parameter in layer.parameters():
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    def train(self, mode: bool = True) -> "MixtureOfLoraExpertsMLP":
        if mode:
            self.unfold()
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        # A change of device or dtype gives each parameter memory of its own, apart from what was folded
        folded = self.folded is not None
        self.unfold()
        module = super()._apply(fn, recurse)
        if folded and not self._is_wrapped():
            self.fold()
        return module

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unfold()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # In a copy or a pickle the parameters are no views of the folded weights any more
        return {**self.__dict__, "folded": None}


__all__ = ["ExpertRouter", "LoraExperts", "MixtureOfLoraExpertsMLP"]
