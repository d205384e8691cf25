"""The upper reference: a vision-language model that keeps CLIP and all teachers at inference."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import layer_norm
from torchvision.transforms.v2.functional import InterpolationMode, normalize, resize
from transformers import ProcessorMixin
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel
from modeling_movekd.vision_movekd import MoveKDVisionOutput
from train.demo.scenes import IMAGE_SIZE
from train.distillation.heads import resample_grid
from train.teachers.features import FrozenTeacher
from train.teachers.preprocessing import CLIP_MEAN, CLIP_STD


class SideBySideEncoders(nn.Module):
    """
    Frozen encoders on one image, each at its own size: their features, normalised and put side by side on the
    student's grid, in the place of a tower's hidden state.
    """

    def __init__(self, clip: MoveKDVisionModel, teachers: Mapping[str, FrozenTeacher]) -> None:
        super().__init__()
        self.clip, self.teachers = clip, nn.ModuleDict(teachers)
        self.image_size = clip.config.image_size
        side = self.image_size // clip.config.patch_size
        self.grid = (side, side)
        cells = [teacher.grid[0] * teacher.grid[1] // side**2 for teacher in teachers.values()]
        widths = [teacher.width for teacher in teachers.values()]
        self.width = clip.config.hidden_size + sum(n * width for n, width in zip(cells, widths, strict=True))

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> MoveKDVisionOutput:
        """`pixel_values` `(batch_size, 3, height, width)` of the whole picture, normalised as CLIP's."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        image = pixel_values * std + mean
        tokens = [self.clip(self.pixels(image, self.image_size, CLIP_MEAN, CLIP_STD)).last_hidden_state[:, 1:]]
        for teacher in self.teachers.values():
            size = cast(FrozenTeacher, teacher).preprocessor
            features = teacher(self.pixels(image, size.image_size, size.mean, size.std))
            tokens.append(resample_grid(features.tokens, features.grid, self.grid))
        # The classification token, which LLaVA cuts off, has no counterpart
        hidden = torch.cat([layer_norm(part, part.shape[-1:]) for part in tokens], dim=-1)
        hidden = torch.cat([hidden[:, :1], hidden], dim=1)
        return MoveKDVisionOutput(last_hidden_state=hidden, hidden_states=(hidden,) * 3)

    @staticmethod
    def pixels(image: torch.Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
        image = resize(image, [size, size], InterpolationMode.BICUBIC, antialias=True)
        return normalize(image.clamp(0, 1), list(mean), list(std))


def keep_encoders(
    model: MoveKDForConditionalGeneration, processor: ProcessorMixin, teachers: Mapping[str, FrozenTeacher]
) -> None:
    """Put [`SideBySideEncoders`] in the place of the student's tower, and a projector of its width behind it."""
    encoders = SideBySideEncoders(model.model.vision_tower, teachers)
    vision_config = model.config.vision_config
    grid = vision_config.image_size // vision_config.patch_size
    model.model.vision_tower = encoders
    vision_config.hidden_size = encoders.width
    vision_config.image_size, vision_config.patch_size = IMAGE_SIZE, IMAGE_SIZE // grid
    model.model.multi_modal_projector = LlavaNextMultiModalProjector(model.config)
    processor.image_processor.size = {"shortest_edge": IMAGE_SIZE}
    processor.image_processor.crop_size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor.patch_size = vision_config.patch_size
