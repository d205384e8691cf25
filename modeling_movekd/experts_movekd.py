"""Mixture of LoRA experts (MoLE) for the MLPs of a CLIP vision tower (MoVE-KD, arXiv 2501.01709)."""

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPMLP

from .configuration_movekd import MoveKDVisionConfig


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

    def forward(self, hidden_states: torch.Tensor, base: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """
        `base + scaling * sum_i gates_i * B_i(A_i(hidden_states))`, as two products over all ranks with the ranks of
        unrouted experts zeroed: no loop over experts and no data-dependent shape.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, in_features)`): Input of the layer.
            base (`torch.Tensor` of shape `(batch_size, sequence_length, out_features)`): The layer's own output.
            gates (`torch.Tensor` of shape `(batch_size, sequence_length, num_experts)`): Weight of each expert.

        Returns:
            `torch.Tensor` of shape `(batch_size, sequence_length, out_features)`.
        """
        gates = (gates * self.scaling).to(hidden_states.dtype)
        ranks = nn.functional.linear(self.dropout(hidden_states), self.weight_a, self.bias_a)
        ranks = (ranks.unflatten(-1, (-1, self.rank)) * gates.unsqueeze(-1)).flatten(-2)
        # One kernel that adds into the base product, instead of a product and a sum over the wide activation
        output = torch.addmm(base.flatten(0, -2), ranks.flatten(0, -2), self.weight_b.t()).view_as(base)
        if self.bias_b is not None:
            output = output + gates @ self.bias_b
        return output


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
        intermediate = self.fc1_experts(hidden_states, self.fc1(hidden_states), gates)
        intermediate = self.activation_fn(intermediate)
        return self.fc2_experts(intermediate, self.fc2(intermediate), gates)


__all__ = ["ExpertRouter", "LoraExperts", "MixtureOfLoraExpertsMLP"]
