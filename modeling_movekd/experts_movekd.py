"""Mixture of LoRA experts (MoLE) for the MLPs of a CLIP vision tower (MoVE-KD, arXiv 2501.01709)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPMLP

from .configuration_movekd import MoveKDVisionConfig


QUICK_GELU_SLOPE = 1.702


class QuickGELUFunction(torch.autograd.Function):
    """
    `x * sigmoid(1.702 * x)`, equal bit for bit to transformers' `QuickGELUActivation`.

    It needs less memory: the forward allocates one tensor instead of three, and saves only its input. The backward is
    that of `silu(1.702 * x) / 1.702`, in one kernel.
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
        # The chain rule multiplies by the slope, which cancels the division.
        scaled = hidden_states * QUICK_GELU_SLOPE
        if torch.is_grad_enabled():
            return torch.ops.aten.silu_backward(gradient, scaled)
        # A new wide tensor costs more than the arithmetic
        return torch.ops.aten.silu_backward(gradient, scaled, grad_input=scaled)


class QuickGELU(nn.Module):
    """CLIP's activation, computed by [`QuickGELUFunction`]."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return QuickGELUFunction.apply(hidden_states)


class ExpertRouter(nn.Module):
    """
    Linear router over the experts of one MLP.

    It holds parameters instead of an `nn.Linear`, so that LoRA's `"all-linear"` and quantizers leave it alone. It is a
    module, so that a forward hook can record its output.

    With `config.balance_bias`, the buffer `balance_bias` of shape `(num_experts,)` is added to the probabilities for
    the choice alone (loss-free balancing, arXiv 2408.15664, equation 3). Training moves it by [`move_balance_bias`].
    """

    balance_bias: torch.Tensor | None

    def __init__(self, config: MoveKDVisionConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.balance_bias else None
        self.register_buffer("balance_bias", bias)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Input of the MLP.

        Returns:
            Probabilities `(batch_size, sequence_length, num_experts)` in float32, and the index of the chosen expert
            `(batch_size, sequence_length)`: the most probable one, after `balance_bias` is added.
        """
        logits = nn.functional.linear(hidden_states, self.weight, self.bias)
        probabilities = logits.softmax(dim=-1, dtype=torch.float32)
        scores = probabilities if self.balance_bias is None else probabilities + self.balance_bias
        return probabilities, scores.argmax(dim=-1)

    @torch.no_grad()
    def move_balance_bias(self, load: torch.Tensor, rate: float) -> None:
        """
        Move `balance_bias` towards an equal load: `b_i += rate * sign(mean(load) - load_i)` (loss-free balancing,
        arXiv 2408.15664, algorithm 1).

        Args:
            load (`torch.Tensor` of shape `(num_experts,)`): Tokens of each expert in an optimizer step, over all
                processes.
            rate (`float`): Size of a move.
        """
        if self.balance_bias is None:
            raise ValueError("This router has no `balance_bias`. Build the tower with `balance_bias=True`.")
        load = load.to(self.balance_bias)
        self.balance_bias += rate * (load.mean() - load).sign()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        bias = self.balance_bias
        module = super()._apply(fn, recurse)
        if bias is not None:
            # bfloat16 would lose small moves. A change of dtype leaves integers alone.
            self.balance_bias = fn(bias.view(torch.int32)).view(torch.float32)
        return module


class LoraExperts(nn.Module):
    """
    All LoRA experts of one linear layer, in two packed matrices.

    Expert `i` owns rows `i * rank` to `(i + 1) * rank` of `weight_a` (down-projection A) and the same columns of
    `weight_b` (up-projection B). The parameters' names avoid `lora_`, by which PEFT recognizes its own parameters.
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
        self,
        hidden_states: torch.Tensor,
        base: torch.Tensor,
        gates: torch.Tensor,
        in_place: bool = False,
        detach: bool = False,
    ) -> torch.Tensor:
        """
        Compute `base + scaling * sum_i gates_i * B_i(A_i(hidden_states))`.

        Two products cover the ranks of all experts, with those of unrouted experts set to zero. So there is no loop
        over experts and no shape depends on the data.

        Args:
            hidden_states (`torch.Tensor` of shape `(num_tokens, in_features)`): Input of the layer.
            base (`torch.Tensor` of shape `(num_tokens, out_features)`): Output of the linear layer.
            gates (`torch.Tensor` of shape `(num_tokens, num_experts)`): Weight of each expert.
            in_place (`bool`, *optional*, defaults to `False`): Whether to overwrite `base`.
            detach (`bool`, *optional*, defaults to `False`): Whether to keep the gradient from the experts' weights.

        Returns:
            `torch.Tensor` of the shape of `base`.
        """
        return self.add_up_projection(base, *self.down_project(hidden_states, gates, detach), in_place, detach)

    def down_project(
        self, hidden_states: torch.Tensor, gates: torch.Tensor, detach: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute `A(hidden_states)` for all experts and apply the gates, see [`LoraExperts.apply_gates`]."""
        weight: torch.Tensor = self.weight_a
        bias: torch.Tensor | None = self.bias_a
        if detach:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return self.apply_gates(nn.functional.linear(self.dropout(hidden_states), weight, bias), gates)

    def apply_gates(self, ranks: torch.Tensor, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Multiply the ranks `(batch_size, sequence_length, num_experts * rank)` of each expert by its gate and by
        `scaling`. Return the gated ranks, and the gates multiplied by `scaling`.
        """
        gates = (gates * self.scaling).to(ranks.dtype)
        return (ranks.unflatten(-1, (-1, self.rank)) * gates.unsqueeze(-1)).flatten(-2), gates

    def add_up_projection(
        self, base: torch.Tensor, ranks: torch.Tensor, gates: torch.Tensor, in_place: bool, detach: bool = False
    ) -> torch.Tensor:
        """Add `B(ranks)` and the gated biases of B to `base`. `ranks` and `gates` are those of `apply_gates`."""
        for factors, weight in ((ranks, self.weight_b.t()), (gates, self.bias_b)):
            if weight is not None:
                # addmm adds the product into the wide activation in one kernel.
                weight = weight.detach() if detach else weight
                product = factors.flatten(0, -2).to(base.dtype), weight.to(base.dtype)
                base = base.addmm_(*product) if in_place else base.addmm(*product)
        return base

    def fold_up_projection(self, linear: nn.Linear) -> torch.Tensor:
        """
        Concatenate `[W | B | b]`: the weight of `linear`, the up-projections and their biases.

        One product with `[x | ranks | gates]` then gives the output of the layer and its experts. The parameters
        become views of the result, so that no weight is stored twice.
        """
        parts = [linear.weight, self.weight_b] + ([self.bias_b.t()] if self.bias_b is not None else [])
        folded = torch.cat([part.detach() for part in parts], dim=1)
        views = folded.split([part.shape[1] for part in parts], dim=1)
        linear.weight.data, self.weight_b.data = views[0], views[1]
        if self.bias_b is not None:
            self.bias_b.data = views[2].t()
        return folded

    def fold_down_projection(self, linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Concatenate `[W; A]`, the weight of `linear` and the down-projections, and concatenate their biases.

        One product with a wide input then gives the layer's output and the experts' ranks. The parameters become views
        of the results.
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


class FoldedWeights(NamedTuple):
    """Weights of an MLP with its experts, see [`MixtureOfLoraExpertsMLP.fold`]."""

    fc1_weight: torch.Tensor
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor


class MixtureOfLoraExpertsMLP(CLIPMLP):
    """
    A CLIP MLP with a mixture of LoRA experts around both linear layers.

    Each layer computes `y = fc(x) + alpha / rank * B_i(A_i(x))`, where `i = argmax(softmax(router))`. The router sees
    the input of the MLP once, and its choice holds for both layers. With `dense_routing`, all experts are summed,
    weighted by their probability. Training may choose the experts in place of the router, see
    [`MixtureOfLoraExpertsMLP.forward`].
    """

    def __init__(self, config: MoveKDVisionConfig):
        super().__init__(config)
        self.num_experts, self.dense_routing = config.num_experts, config.dense_routing
        self.straight_through = config.router_gradient == "straight_through"
        self.router = ExpertRouter(config)
        self.fc1_experts = LoraExperts(config, config.hidden_size, config.intermediate_size)
        self.fc2_experts = LoraExperts(config, config.intermediate_size, config.hidden_size)
        self.folded: FoldedWeights | None = None
        if config.hidden_act == "quick_gelu":
            self.activation_fn: nn.Module = QuickGELU()

    def expert_gates(self, probabilities: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """
        Turn the router's output into the weight of each expert: its probability under dense routing, else one-hot.

        The straight-through form multiplies the one by `1 + p_i - stop_gradient(p_i)`. The value stays 1, and the
        gradient of the task reaches the router.
        """
        if self.dense_routing:
            return probabilities
        gates = torch.zeros_like(probabilities).scatter(-1, indices.unsqueeze(-1), 1.0)
        if self.straight_through:
            # Subtract first: the difference is exactly zero, so the output is the same with and without a gradient.
            gates = gates * (1 + (probabilities - probabilities.detach()))
        return gates

    def forward(
        self, hidden_states: torch.Tensor, experts: torch.Tensor | None = None, detach_experts: bool = False
    ) -> torch.Tensor:
        """
        Map `(batch_size, sequence_length, hidden_size)` to the same shape.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Input.
            experts (`torch.Tensor` of shape `(batch_size,)`, *optional*): Expert of all tokens of an image, long. The
                router is then not called.
            detach_experts (`bool`, *optional*, defaults to `False`): Whether to keep the gradient from the experts'
                weights. It still reaches the router and the input.
        """
        if experts is None:
            gates = self.expert_gates(*self.router(hidden_states))
        else:
            one_hot = nn.functional.one_hot(experts, self.num_experts).float()
            gates = one_hot.unsqueeze(1).expand(-1, hidden_states.shape[1], -1)
        if self.folded is not None and not torch.is_grad_enabled() and self._has_plain_layers():
            return self._folded_forward(self.folded, hidden_states, gates)
        layer = self._layer(self.fc1, self.fc1_experts, hidden_states, gates, detach_experts)
        return self._layer(self.fc2, self.fc2_experts, self.activation_fn(layer), gates, detach_experts)

    @staticmethod
    def _layer(
        linear: nn.Module, experts: LoraExperts, hidden_states: torch.Tensor, gates: torch.Tensor, detach: bool
    ) -> torch.Tensor:
        # Adapters, ZeRO-3 and hooks may keep the output of `linear`, so it is not overwritten then.
        in_place = type(linear) is nn.Linear and not (linear._forward_hooks or linear._backward_hooks)
        # Both products take the same flat tensor: autograd sums their wide gradients in place, which it does not for
        # views of them.
        tokens = hidden_states.flatten(0, -2)
        output = experts(tokens, linear(tokens), gates.flatten(0, -2), in_place, detach)
        return output.unflatten(0, hidden_states.shape[:-1])

    def _folded_forward(self, folded: FoldedWeights, hidden_states: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        ranks, scaled_gates = self.fc1_experts.down_project(hidden_states, gates)
        parts = [hidden_states, ranks] + ([scaled_gates] if self.fc1_experts.bias_b is not None else [])
        inputs = torch.cat(parts, dim=-1).flatten(0, -2)
        # QuickGELU is silu(slope * x) / slope. The first product multiplies by the slope, the second one divides.
        quick = isinstance(self.activation_fn, QuickGELU)
        slope = QUICK_GELU_SLOPE if quick else 1.0
        intermediate = torch.addmm(self.fc1.bias, inputs, folded.fc1_weight.t(), beta=slope, alpha=slope)
        intermediate = nn.functional.silu(intermediate, inplace=True) if quick else self.activation_fn(intermediate)
        outputs = torch.addmm(folded.fc2_bias, intermediate, folded.fc2_weight.t(), alpha=1 / slope)
        base, ranks = outputs.split([self.fc2.out_features, outputs.shape[-1] - self.fc2.out_features], dim=-1)
        gated = self.fc2_experts.apply_gates(ranks.unflatten(0, hidden_states.shape[:-1]), gates)
        return self.fc2_experts.add_up_projection(base, *gated, in_place=True).unflatten(0, hidden_states.shape[:-1])

    def _has_plain_layers(self) -> bool:
        """Whether no adapter or quantizer has replaced a linear layer and no hook would be skipped."""
        return type(self.fc1) is nn.Linear and type(self.fc2) is nn.Linear and not self._has_hooks()

    def _has_hooks(self) -> bool:
        # `_hf_hook` is accelerate's, which loads offloaded weights.
        layers = (self.fc1, self.fc1_experts, self.activation_fn, self.fc2, self.fc2_experts)
        return any(layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook") for layer in layers)

    def fold(self) -> None:
        """
        Fold the experts into the linear layers for inference: the up-projections into fc1, whose output is wide, and
        the down-projections into fc2, whose input is wide. Calls with gradients enabled still use the unfolded form.

        Raises:
            ValueError: If the MLP is in training mode, or its layers are quantized, offloaded, or have adapters or
                hooks.
        """
        if self.training or not self._has_plain_layers():
            layers = f"{type(self.fc1).__name__} and {type(self.fc2).__name__}{' with hooks' * self._has_hooks()}"
            raise ValueError(
                f"Experts fold into plain linear layers in evaluation mode, but these are {layers} in "
                f"{'training' if self.training else 'evaluation'} mode. Call `eval()`, fold before adapters are added "
                "or hooks registered, and leave quantized and offloaded weights as they are."
            )
        self.unfold()
        fc1_weight = self.fc1_experts.fold_up_projection(self.fc1)
        self.folded = FoldedWeights(fc1_weight, *self.fc2_experts.fold_down_projection(self.fc2))

    def unfold(self) -> None:
        """Give every parameter its own memory again."""
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
        # A change of device or dtype replaces the parameters, which would no longer be views of the folded weights.
        folded = self.folded is not None
        self.unfold()
        module = super()._apply(fn, recurse)
        if folded and self._has_plain_layers():
            self.fold()
        return module

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unfold()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # The parameters of a copy or a pickle are not views of the folded weights.
        return {**self.__dict__, "folded": None}


__all__ = ["ExpertRouter", "LoraExperts", "MixtureOfLoraExpertsMLP"]
