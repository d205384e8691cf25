"""The forward of a training step: text, distillation and balance losses of MoVE-KD inside TRL's fused forward."""

import functools
import random
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from trl.trainer.utils import FusedCausalLMOutput

from hub.checkpoint_parts import feature_layer
from modeling_movekd import MoveKDVisionConfig, MoveKDVisionModel
from modeling_movekd.vision_movekd import MoveKDVisionOutput
from train.distillation.distiller import DistillationOutput, Distiller
from train.distillation.losses import balance_loss


@dataclass
class MoveKDTrainingOutput(FusedCausalLMOutput):
    """
    TRL's fused output with the losses of the method. Each is a declared field, since DDP rebuilds outputs from them.

    Args:
        kd (`torch.Tensor` of shape `(num_images,)`): Distillation loss, the weighted sum over the teachers. If all
            tiles are distilled, the shape is `(num_crops,)`, and the crops of an image share its weight.
        teacher_losses (`torch.Tensor` of shape `(num_losses, num_images)`): The losses of `Distiller.loss_names`
            before the teacher weights, without gradient; `(num_losses, num_crops)` if all tiles are distilled.
        balance (`torch.Tensor` of shape `(num_crops,)`): Balance loss of the routers. With `pad` an image is one crop.
        expert_tokens (`torch.Tensor` of shape `(num_layers, num_experts)`): Number of patches routed to each expert.
    """

    kd: torch.Tensor | None = None
    teacher_losses: torch.Tensor | None = None
    balance: torch.Tensor | None = None
    expert_tokens: torch.Tensor | None = None


def add_distilling_forward(
    model: PreTrainedModel, balance_form: str, distill_tiles: str = "base", expert_assignment: str = "router"
) -> None:
    """
    Wrap the forward that TRL installed on a student. The new forward runs the vision tower once, passes its features
    to the projector and to the distiller, and returns a [`MoveKDTrainingOutput`].

    The losses are computed inside this forward, because DDP, ZeRO and FSDP2 only see what the wrapped model's forward
    runs. The tower also runs on blank images, so that all processes make the same calls whatever their batches hold.

    `balance_form`, `distill_tiles` and `expert_assignment` are the options of [`MoveKDSFTConfig`].
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

        image_weights = image_weights.float()  # FSDP2 casts inputs to bfloat16, which rounds the shares of crops
        vision = self.get_image_features(
            pixel_values, image_sizes, output_router_probabilities=True, output_expert_indices=True, return_dict=True
        )
        # Add a zero-weighted term for the blank images, and for the tower's output, which may be used by nothing else,
        # so that every process runs the same backward. ZeRO-3 stops otherwise.
        tied = (vision.last_hidden_state[0], *vision.pooler_output[num_images:])
        zero = 0.0 * torch.stack([part.sum() for part in tied]).sum()
        # Without images, pass an empty slice of the blank image's features on, so that the graph is the same on all
        # processes: FSDP2 and ZeRO-3 gather a frozen language model in the backward only if a gradient passes it.
        vision.pooler_output = list(vision.pooler_output[:num_images]) or [vision.pooler_output[0][:0]]
        with gathered_head(self.get_output_embeddings()):
            outputs = fused_forward(*args, mm_encoder_outputs={"image": vision}, fused_lm_head=True, **kwargs)

        whole_images, crop_weights = split_crops(self, image_weights, image_sizes)
        distilled, weights = (slice(None), crop_weights) if distill_tiles == "all" else (whole_images, image_weights)
        kd, teacher_losses = weights * 0.0 + zero, None
        if teacher_features and pixel_values is not None:  # a training batch has an image, if only a blank one
            distillation, _ = distil(
                self.model.vision_tower,
                self.config.vision_config,
                self.distiller,
                pixel_values if pixel_values.dim() == 4 else pixel_values[:, 0],  # the first tile is the whole image
                teacher_features,
                self.config.vision_feature_layer,
                expert_assignment,
                vision,
                distilled,
            )
            kd = kd + distillation.loss * weights
            teacher_losses = stack_losses(distillation) * weights
        routing = measure_routing(vision, crop_weights, balance_form, self.config.vision_config.num_prefix_tokens)
        return MoveKDTrainingOutput(**outputs, kd=kd, teacher_losses=teacher_losses, **routing)

    model.forward = types.MethodType(forward, model)


def add_encoder_forward(model: MoveKDVisionModel, balance_form: str, expert_assignment: str = "router") -> None:
    """
    Wrap the forward of a vision tower with a distiller, as [`add_distilling_forward`] does for a student. Without
    `image_weights` a call is the tower's own. With `student_image_size` the tower sees the images in that size.
    """
    tower_forward, layer = model.forward, feature_layer(model.config)
    assert isinstance(layer, int)  # the trainer refuses several

    @functools.wraps(type(model).forward)
    def forward(
        self: MoveKDVisionModel,
        pixel_values: torch.Tensor,
        image_weights: torch.Tensor | None = None,
        teacher_features: Mapping[str, Any] | None = None,
        student_image_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        if image_weights is None or teacher_features is None:
            return tower_forward(pixel_values, **kwargs)
        image_weights = image_weights.float()  # FSDP2 casts inputs to bfloat16
        grid = None
        if student_image_size not in (None, self.config.image_size):
            pixel_values = resize_images(pixel_values, student_image_size)
            side = student_image_size // self.config.patch_size
            grid = (side, side)
        distillation, vision = distil(
            tower_forward,
            self.config,
            self.distiller,
            pixel_values,
            teacher_features,
            layer,
            expert_assignment,
            student_grid=grid,
        )
        return MoveKDTrainingOutput(
            # Nothing else may use the output of a tower that is not cut, and ZeRO-3 needs its backward
            kd=distillation.loss * image_weights + 0.0 * vision.last_hidden_state[0].sum(),
            teacher_losses=stack_losses(distillation) * image_weights,
            **measure_routing(vision, image_weights, balance_form, self.config.num_prefix_tokens),
        )

    model.forward = types.MethodType(forward, model)


def step_image_size(sizes: Sequence[int], seed: int, step: int) -> int:
    """The student's image size in a step: drawn anew for each, the same on all processes and in a resumed run."""
    return random.Random(f"{seed} {step}").choice(sizes)


def resize_images(pixel_values: torch.Tensor, size: int) -> torch.Tensor:
    """Resize pixels `(num_images, 3, height, width)` to squares, as an image processor does: bicubic, antialiased."""
    square = (size, size)
    resized = nn.functional.interpolate(pixel_values.float(), square, mode="bicubic", antialias=True)
    return resized.to(pixel_values.dtype)


def split_summary(hidden_state: torch.Tensor, num_prefix_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The student's patches, and its summary: the [CLS] token, or the mean of the patches where there is none.

    Args:
        hidden_state (`torch.Tensor` of shape `(batch_size, num_prefix_tokens + num_patches, width)`): The tower's
            hidden state that is distilled.
        num_prefix_tokens (`int`): 1 with a [CLS] token, 0 without.

    Returns:
        `(batch_size, num_patches, width)` and `(batch_size, width)`.
    """
    tokens = hidden_state[:, num_prefix_tokens:]
    return tokens, hidden_state[:, 0] if num_prefix_tokens else tokens.mean(dim=1)


def stack_losses(distillation: DistillationOutput) -> torch.Tensor:
    """The losses of `Distiller.loss_names`, `(num_losses, num_images)`."""
    return torch.stack([*distillation.teacher_losses.values(), *distillation.summary_losses.values()])


def distil(
    tower: Callable[..., MoveKDVisionOutput],
    config: MoveKDVisionConfig,
    distiller: Distiller,
    pixel_values: torch.Tensor,
    teacher_features: Mapping[str, Any],
    layer: int = -1,
    expert_assignment: str = "router",
    vision: MoveKDVisionOutput | None = None,
    images: slice | torch.Tensor = slice(None),
    student_grid: tuple[int, int] | None = None,
) -> tuple[DistillationOutput, MoveKDVisionOutput]:
    """
    Compare the tower's features with the teachers'.

    With `expert_assignment` "teacher", teacher k is compared with features for which expert k serves all tokens
    (HAWAII, arXiv 2506.19072, section 2.3.2). The routers learn from the text loss then. Where there is none, the
    features of the routed tower are also compared with all teachers, which trains all but the experts.

    Args:
        tower (`Callable`): The forward of the student's vision tower.
        config (`MoveKDVisionConfig`): The tower's.
        distiller (`Distiller`): Adapters or heads of the teachers.
        pixel_values (`torch.Tensor` of shape `(num_images, num_channels, image_size, image_size)`): The images.
        teacher_features (`Mapping[str, TeacherFeatures]`): Each teacher's features of the images.
        layer (`int`, *optional*, defaults to -1): Index of the hidden state to distill into.
        expert_assignment (`str`, *optional*, defaults to `"router"`): The option of [`MoveKDSFTConfig`].
        vision (`MoveKDVisionOutput`, *optional*): The routed tower's output, which a text loss trains. By default the
            tower runs here.
        images (`slice` or `torch.Tensor`, *optional*): Index of the images among the crops of `vision`.
        student_grid (`tuple[int, int]`, *optional*): Grid of the images' patches, if it is not the tower's own.

    Returns:
        The losses, and the routed tower's output with its hidden states and routing.
    """
    by_teacher, has_text, prefix = expert_assignment == "teacher", vision is not None, config.num_prefix_tokens
    recorded = {"return_dict": True, "output_hidden_states": True}
    if student_grid is not None:
        recorded["interpolate_pos_encoding"] = True
    if vision is None:
        routing = {"output_router_probabilities": True, "output_expert_indices": True}
        vision = tower(pixel_values, detach_experts=by_teacher, **recorded, **routing)
    loss: Any = 0.0
    if not (by_teacher and has_text):
        tokens, summary = split_summary(vision.hidden_states[layer][images], prefix)
        distillation = distiller(tokens, teacher_features, student_summary=summary, student_grid=student_grid)
        loss = distillation.loss
    if by_teacher:
        # One forward with as many copies of the images as experts
        experts = torch.arange(config.num_experts, device=pixel_values.device).repeat_interleave(len(pixel_values))
        copies = tower(pixel_values.repeat(config.num_experts, 1, 1, 1), experts=experts, **recorded)
        own = split_summary(copies.hidden_states[layer], prefix)
        tokens, summary = (value.unflatten(0, (config.num_experts, len(pixel_values))) for value in own)
        distillation = distiller(tokens, teacher_features, student_summary=summary, student_grid=student_grid)
        distillation = distillation._replace(loss=loss + distillation.loss)
    return distillation, vision


@contextmanager
def gathered_head(head: nn.Module) -> Iterator[None]:
    """
    Gather the language model's head for TRL's forward, which reads the weight without calling the head, so that FSDP2
    does not gather it. TRL's own way to gather it loses the gradient's sum over the processes.
    """
    if isinstance(head, FSDPModule):
        head.unshard()  # before the embedding on all processes: they must gather in the same order
    yield
    if isinstance(head, FSDPModule) and not torch.is_grad_enabled():
        head.reshard()  # FSDP2 does this itself after a backward


def measure_routing(
    vision: Any, crop_weights: torch.Tensor, balance_form: str, prefix: int
) -> dict[str, torch.Tensor]:
    """
    The `balance` and `expert_tokens` of a [`MoveKDTrainingOutput`]; nothing for a tower without experts, and no
    `balance` with the form "bias".
    """
    if not vision.router_probabilities:
        return {}
    num_experts, indices = vision.router_probabilities[0].shape[-1], torch.stack(vision.expert_indices)[..., prefix:]
    tokens = count_expert_tokens(indices, num_experts, crop_weights > 0)
    if balance_form == "bias":
        return {"expert_tokens": tokens}
    balance = balance_loss(vision.router_probabilities, vision.expert_indices, balance_form)
    return {"balance": balance * crop_weights, "expert_tokens": tokens}


def count_expert_tokens(expert_indices: torch.Tensor, num_experts: int, is_counted: torch.Tensor) -> torch.Tensor:
    """
    Count the patches that each expert got, `(num_layers, num_experts)`, over the crops where `is_counted` is true.

    [CLS] is no patch: without heads for summaries nothing reads it in the last layer, so that it does not train the
    expert that it is routed to.
    """
    one_hot = nn.functional.one_hot(expert_indices, num_experts)
    return (one_hot.sum(dim=2) * is_counted.unsqueeze(-1)).sum(dim=1)


def split_crops(
    model: PreTrainedModel, image_weights: torch.Tensor, image_sizes: torch.Tensor | None
) -> tuple[slice | torch.Tensor, torch.Tensor]:
    """
    Find the whole images among the crops that the tower sees, and share each image's weight among its crops.

    Returns:
        The index of the whole images: all crops with `pad`, the first crop of each image with `anyres`. Then the
        weights of all crops, `(num_crops,)`.
    """
    if model.config.image_aspect_ratio == "pad" or image_sizes is None:
        return slice(None), image_weights
    size, grids = model.config.vision_config.image_size, model.config.image_grid_pinpoints
    num_crops = [image_size_to_num_patches(image_size, grids, size) for image_size in image_sizes]
    counts = torch.tensor(num_crops, device=image_weights.device)
    return counts.cumsum(0) - counts, (image_weights / counts).repeat_interleave(counts, output_size=sum(num_crops))
