"""Checks that turn a silent failure of training into an error."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_movekd.experts_movekd import LoraExperts


STEPS_WATCHED = 10


class GradientGuard(TrainerCallback):
    """
    Raises if a trainable parameter has no gradient after the first step, or a gradient of exactly zero throughout the
    first ten that have an image (text alone does not reach tower and projector). Each expert of a packed tensor counts
    by itself, and is excused where it got no token. (Under `zero` initialisation the first step's gradient of every
    down-projection is exactly zero, hence ten.)

    Gradients are seen by hooks on the parameters, since DeepSpeed leaves no `.grad` behind; FSDP2 leaves nothing else.

    Args:
        model: The model in training, before it is wrapped.
        accelerator: Reduces what the processes saw.

    Raises:
        ValueError: naming the parameters.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.num_experts = {
            f"{prefix}.{name}": module.weight_a.shape[0] // module.rank
            for prefix, module in model.named_modules()
            if isinstance(module, LoraExperts)
            for name, _ in module.named_parameters()
        }
        self.reached: set[str] = set()
        self.nonzero: dict[str, torch.Tensor] = {}
        self.expert_tokens: torch.Tensor | None = None
        self.has_images = True
        self.steps, self.steps_with_images = 0, 0
        self.handles = [
            parameter.register_hook(lambda gradient, name=name: self._see(name, gradient))
            for name, parameter in self.parameters.items()
        ]

    def _see(self, name: str, gradient: torch.Tensor) -> None:
        self.reached.add(name)
        experts = self.num_experts.get(name)
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor() if experts else gradient.to_local()
        if experts:
            # The up-projection holds its experts along the second dimension
            gradient = gradient.transpose(0, -1) if name.endswith("weight_b") else gradient
            nonzero = (gradient.reshape(experts, -1) != 0).any(dim=1)
        else:
            nonzero = (gradient != 0).any().reshape(1)
        seen = self.nonzero.get(name)
        self.nonzero[name] = nonzero if seen is None else seen | nonzero

    def count_tokens(self, expert_tokens: torch.Tensor) -> None:
        """Add the tokens each expert got, `(num_layers, num_experts)`, summed over all processes."""
        if self.handles:
            self.expert_tokens = expert_tokens if self.expert_tokens is None else self.expert_tokens + expert_tokens

    def count_images(self, images: torch.Tensor) -> None:
        """Take the number of images in the text of the coming step, summed over all processes."""
        if self.handles:
            self.has_images = bool(images)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        if not self.handles:
            return
        # Looked up again, because FSDP2 puts other parameters in the place of those the hooks are on
        for name, parameter in kwargs["model"].named_parameters():
            if name in self.parameters and name not in self.reached and parameter.grad is not None:
                self._see(name, parameter.grad)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not self.handles:
            return
        self.steps += 1
        if self.steps == 1:
            names = list(self.parameters)
            reached = self._reduce([torch.tensor([float(name in self.reached)]) for name in names])
            if missing := [name for name, (seen,) in zip(names, reached, strict=True) if not seen]:
                raise ValueError(
                    f"{len(missing)} trainable parameters got no gradient in the first step: {missing}. The loss does "
                    "not depend on them: freeze them, or correct the recipe (see `lambda_kd`, `lambda_balance`, "
                    "`router_gradient`)."
                )
        self.steps_with_images += self.has_images
        if self.steps_with_images == STEPS_WATCHED:
            for handle in self.handles:
                handle.remove()
            self.handles = []
            if zero := self._zero_parameters():
                raise ValueError(
                    f"{len(zero)} trainable parameters had a gradient of exactly zero in each of the first "
                    f"{STEPS_WATCHED} steps with images: {zero}. Freeze them, or correct what cuts them off."
                )

    def _zero_parameters(self) -> list[str]:
        names = list(self.parameters)
        unseen = {name: torch.zeros(self.num_experts.get(name, 1)) for name in names}
        seen = self._reduce([self.nonzero.get(name, unseen[name]).float() for name in names])
        zero = []
        for name, nonzero in zip(names, seen, strict=True):
            if name not in self.num_experts:
                zero += [] if nonzero[0] else [name]
                continue
            layer = int(name.split("encoder.layers.")[1].split(".")[0])
            for expert, value in enumerate(nonzero):
                if not value and (self.expert_tokens is None or self.expert_tokens[layer, expert] > 0):
                    zero.append(f"{name}[expert {expert}]")
        return zero

    def _reduce(self, flags: list[torch.Tensor]) -> list[list[float]]:
        """Sum over the processes, in one call and one synchronisation."""
        flat = torch.cat([flag.to(self.accelerator.device) for flag in flags])
        flat = self.accelerator.reduce(flat, reduction="sum")
        return [part.tolist() for part in flat.split([flag.numel() for flag in flags])]
