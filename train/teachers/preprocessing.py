"""From images to a teacher's pixels, apart from the models, so that loader workers import nothing else."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import image_utils


# Per-channel mean and standard deviation of pixels in [0, 1]
CLIP_MEAN, CLIP_STD = tuple(image_utils.OPENAI_CLIP_MEAN), tuple(image_utils.OPENAI_CLIP_STD)
IMAGENET_MEAN, IMAGENET_STD = tuple(image_utils.IMAGENET_DEFAULT_MEAN), tuple(image_utils.IMAGENET_DEFAULT_STD)
FITS = ("center_crop", "zero_pad")
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class TeacherPreprocessor:
    """
    PIL images to a teacher's pixels: resized on uint8 with PIL, scaled to [0, 1], normalized.

    Args:
        image_size: Side of the square result in pixels.
        mean: Per-channel mean of pixels in [0, 1].
        std: Per-channel standard deviation of pixels in [0, 1].
        interpolation (*optional*, defaults to `"bicubic"`): `"bicubic"` or `"bilinear"`.
        fit (*optional*, defaults to `"center_crop"`): How the teacher's own geometry makes a square: `"center_crop"`
            after resizing the shorter edge to `image_size`, or `"zero_pad"` right and below, after resizing the longer
            edge and normalizing.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    fit: str = "center_crop"

    def __call__(self, images: list[Image.Image], stretch: bool = True) -> torch.Tensor:
        """
        Args:
            images: Square crops that all towers share, or images of any shape.
            stretch (*optional*, defaults to `True`): Stretch images to squares; otherwise `fit` applies.

        Returns:
            Float32 pixels of shape `(len(images), 3, image_size, image_size)`.
        """
        size, resample = self.image_size, INTERPOLATIONS[self.interpolation]
        mean, std = (np.array(channels, dtype=np.float32) for channels in (self.mean, self.std))
        stack = np.zeros((len(images), size, size, 3), dtype=np.float32)
        for pixels, image in zip(stack, images, strict=True):
            width, height = (size, size) if stretch else self._resized(*image.size)
            resized = np.asarray(image.convert("RGB").resize((width, height), resample))
            top, left = max(height - size, 0) // 2, max(width - size, 0) // 2
            resized = resized[top : top + size, left : left + size]
            pixels[: len(resized), : resized.shape[1]] = ((resized * (1 / 255)).astype(np.float32) - mean) / std
        return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        shorter, longer, size = min(width, height), max(width, height), self.image_size
        if self.fit == "center_crop":
            other = size * longer // shorter
            return (size, other) if width <= height else (other, size)
        scale = size / longer
        return max(int(width * scale + 0.5), 1), max(int(height * scale + 0.5), 1)
