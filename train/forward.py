"""The one forward of a training step: text, distillation and balance losses of MoVE-KD inside TRL's fused forward."""

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from trl.trainer.utils import FusedCausalLMOutput

from train.distillation.losses import balance_loss


@dataclass
class MoveKDTrainingOutput(FusedCausalLMOutput):
    """
    TRL's fused output with the terms of the method, per image, in declared fields: DDP rebuilds an output from those.

    Args:
        kd (`torch.Tensor` of shape `(num_images,)`): Distillation loss, summed over the weighted teachers; of shape
            `(num_crops,)` where all tiles are distilled, which share the image's weight.
        teacher_losses (`torch.Tensor` of shape `(num_teachers, num_images)`): Unweighted, without gradient; or
            `(num_teachers, num_crops)`.
        balance (`torch.Tensor` of shape `(num_crops,)`): Router balance loss; for `pad` an image is one crop.
        expert_tokens (`torch.Tensor` of shape `(num_layers, num_experts)`): Patches each expert got.
    """

    kd: torch.Tensor | None = None
    teacher_losses: torch.Tensor | None = None
    balance: torch.Tensor | None = None
    expert_tokens: torch.Tensor | None = None


def add_distilling_forward(model: PreTrainedModel, balance_form: str, distill_tiles: str = "base") -> None:
    """
    Wrap the forward that TRL installed on this model, so that one call runs the student's tower once, feeds the
    projector and the distiller with its features, and returns a [`MoveKDTrainingOutput`].

    The losses are computed in here and nowhere else: only what happens inside the forward of the wrapped model is seen
    by DDP, ZeRO and FSDP2. The tower is run first and handed on through `mm_encoder_outputs`, also for blank images,
    so that every process makes the same calls whatever its batch holds.

    Args:
        model: The student, after TRL has put its forward in.
        balance_form: See [`~train.distillation.losses.balance_loss`].
        distill_tiles: `"base"`, whole images alone are distilled, or `"all"`, every tile of `anyres` too.
    """
    fused_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_weights: torch.Tensor | None = None,
        num_blank_images: int = 0,
        teacher_features: Mapping[str, Any] | None = None,
        fused_lm_head: bool = False,
        **kwargs: Any,
    ) -> Any:
        num_images = 0 if pixel_values is None else len(pixel_values) - num_blank_images
        if image_weights is None or not fused_lm_head:
            pixel_values = pixel_values[:num_images] if pixel_values is not None and num_images else None
            image_sizes = None if image_sizes is None else image_sizes[:num_images]
            images = {"pixel_values": pixel_values, "image_sizes": image_sizes}
            return fused_forward(*args, **images, fused_lm_head=fused_lm_head, **kwargs)

        image_weights = image_weights.float()  # FSDP2 casts all inputs; the shares of crops would be rounded
        vision = self.get_image_features(
            pixel_values, image_sizes, output_router_probabilities=True, output_expert_indices=True, return_dict=True
        )
        # Blank images have no place in the text; a zero ties what they passed through to the loss. The tower's own
        # output, which nothing else may use, is tied in any case: ZeRO-3 stops if the backward of two processes passes
        # through different modules
        tied = (vision.last_hidden_state[0], *vision.pooler_output[num_images:])
        zero = 0.0 * torch.stack([part.sum() for part in tied]).sum()
        # Without images an empty part of a blank one goes their way. Else no gradient would pass through a frozen
        # language model here, while FSDP2 and ZeRO-3 gather its layers in the backward of the processes that have
        # images, and wait for this one; and ZeRO-3 stops where the forwards of two processes differ
        vision.pooler_output = list(vision.pooler_output[:num_images]) or [vision.pooler_output[0][:0]]
        head = self.get_output_embeddings()
        if isinstance(head, FSDPModule):
            # TRL reads the head's weight without calling the head, so that FSDP2 would not gather it; TRL's own way
            # to gather it loses the gradient's sum over the processes
            head.unshard()  # before the embedding in any case: the processes have to gather in the same order
        outputs = fused_forward(*args, mm_encoder_outputs={"image": vision}, fused_lm_head=True, **kwargs)
        if isinstance(head, FSDPModule) and not torch.is_grad_enabled():
            head.reshard()  # after a backward FSDP2 does it itself

        distilled_crops, crop_weights = split_crops(self, image_weights, image_sizes)
        distilled_weights = image_weights
        if distill_tiles == "all":
            distilled_crops, distilled_weights = slice(None), crop_weights
        kd, teacher_losses = distilled_weights * 0.0 + zero, None
        if teacher_features:
            tokens = vision.hidden_states[self.config.vision_feature_layer][:, 1:]
            distilled = self.distiller(tokens[distilled_crops], teacher_features)
            kd = kd + distilled.loss * distilled_weights
            teacher_losses = torch.stack([distilled.teacher_losses[name] for name in teacher_features])
            teacher_losses = teacher_losses.detach() * distilled_weights
        balance = expert_tokens = None
        if vision.router_probabilities:
            balance = balance_loss(vision.router_probabilities, vision.expert_indices, balance_form)
            balance = balance * crop_weights
            num_experts = vision.router_probabilities[0].shape[-1]
            # Patches alone: nothing reads the last layer's [CLS], so that an expert which got no more is not trained
            one_hot = nn.functional.one_hot(torch.stack(vision.expert_indices)[..., 1:], num_experts)
            expert_tokens = (one_hot.sum(dim=2) * (crop_weights > 0).unsqueeze(-1)).sum(dim=1)
        return MoveKDTrainingOutput(
            **outputs, kd=kd, teacher_losses=teacher_losses, balance=balance, expert_tokens=expert_tokens
        )

    model.forward = types.MethodType(forward, model)


def split_crops(
    model: PreTrainedModel, image_weights: torch.Tensor, image_sizes: torch.Tensor | None
) -> tuple[slice | torch.Tensor, torch.Tensor]:
    """
    Which of the tower's inputs is each whole image, and the weight of every input: for `pad` the image and its weight,
    for `anyres` the first of the image's crops, and its weight shared by all of them.
    """
    if model.config.image_aspect_ratio == "pad" or image_sizes is None:
        return slice(None), image_weights
    size, grids = model.config.vision_config.image_size, model.config.image_grid_pinpoints
    num_crops = [image_size_to_num_patches(image_size, grids, size) for image_size in image_sizes]
    counts = torch.tensor(num_crops, device=image_weights.device)
    return counts.cumsum(0) - counts, (image_weights / counts).repeat_interleave(counts, output_size=sum(num_crops))
