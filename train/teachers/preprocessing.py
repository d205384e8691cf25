"""From images to a teacher's pixels, apart from the models, so that loader workers import nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor, gcd

import numpy as np
import torch
from PIL import Image
from transformers import image_utils

from modeling_movekd.images import pad_to_square


# Per-channel mean and standard deviation of pixels in [0, 1]
CLIP_MEAN, CLIP_STD = tuple(image_utils.OPENAI_CLIP_MEAN), tuple(image_utils.OPENAI_CLIP_STD)
IMAGENET_MEAN, IMAGENET_STD = tuple(image_utils.IMAGENET_DEFAULT_MEAN), tuple(image_utils.IMAGENET_DEFAULT_STD)
FITS = ("center_crop", "zero_pad")
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# Pixels that each filter reads on either side when it enlarges
FILTER_REACH = {Image.Resampling.BILINEAR: 1, Image.Resampling.BICUBIC: 2}

# Bytes of images, or for `zero_pad` a mapping with `pixels` (bytes) and `sizes` (height and width of each image)
ResizedImages = torch.Tensor | Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class TeacherPreprocessor:
    """
    PIL images to a teacher's pixels: resized on uint8 with PIL, then scaled to [0, 1] and normalized on any device.

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
        return self.normalize(self.resize(images, stretch))

    def resize(
        self, images: list[Image.Image], stretch: bool = True, background: tuple[int, int, int] | None = None
    ) -> ResizedImages:
        """
        The first half of a call, for loader workers. Teachers that differ in mean and standard deviation alone can
        share its result.

        Args:
            images: As of a call.
            stretch (*optional*, defaults to `True`): As of a call.
            background (*optional*): Pad images to squares of this color first.

        Returns:
            Uint8 pixels of shape `(len(images), 3, image_size, image_size)`. If images are padded with zeros, which
            are no color, a mapping with these `pixels` and `sizes`, int64 of shape `(len(images), 2)`.
        """
        size, resample = self.image_size, INTERPOLATIONS[self.interpolation]
        stack = np.zeros((len(images), 3, size, size), dtype=np.uint8)
        sizes = np.full((len(images), 2), size)
        for number, (pixels, image) in enumerate(zip(stack, images, strict=True)):
            image = image if image.mode == "RGB" else image.convert("RGB")
            if background is not None:
                resize_padded(image, background, resample, pixels)
                continue
            width, height = (size, size) if stretch else self._resized(*image.size)
            resized = np.asarray(image.resize((width, height), resample))
            top, left = max(height - size, 0) // 2, max(width - size, 0) // 2
            resized = resized[top : top + size, left : left + size]
            sizes[number] = resized.shape[:2]
            pixels[:, : len(resized), : resized.shape[1]] = resized.transpose(2, 0, 1)
        if stretch or background is not None or self.fit == "center_crop":
            return torch.from_numpy(stack)
        return {"pixels": torch.from_numpy(stack), "sizes": torch.from_numpy(sizes)}

    @torch.no_grad()
    def normalize(self, resized: ResizedImages) -> torch.Tensor:
        """
        The second half of a call, on the device of the bytes.

        Returns:
            Float32 pixels of shape `(num_images, 3, image_size, image_size)`.
        """
        pixels = resized["pixels"] if isinstance(resized, Mapping) else resized
        normalized = pixels.float().div_(255)
        for channel, mean, std in zip(normalized.unbind(1), self.mean, self.std, strict=True):
            channel.sub_(mean).div_(std)  # numbers: a tensor of them would have to wait for the device
        if isinstance(resized, Mapping):
            sides = torch.arange(self.image_size, device=pixels.device)
            heights, widths = resized["sizes"].view(-1, 1, 2, 1).unbind(2)
            outside = (sides >= heights)[..., None] | (sides >= widths)[..., None, :]
            normalized.masked_fill_(outside, 0.0)
        return normalized

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        shorter, longer, size = min(width, height), max(width, height), self.image_size
        if self.fit == "center_crop":
            other = size * longer // shorter
            return (size, other) if width <= height else (other, size)
        scale = size / longer
        return max(int(width * scale + 0.5), 1), max(int(height * scale + 0.5), 1)


def resize_padded(
    image: Image.Image, background: tuple[int, int, int], resample: Image.Resampling, pixels: np.ndarray
) -> None:
    """
    Write `pad_to_square(image, background)`, resized, without computing what has the color of the background.

    Args:
        image: RGB image.
        background: Color of the padding.
        resample: Filter of the resize.
        pixels: Uint8 `(3, size, size)`, which are overwritten.
    """
    square = pad_to_square(image, background)
    side, size, content = square.width, pixels.shape[-1], min(image.size)
    # Blocks of so many rows begin at an exact float32 of the square, so that `box` keeps the filter's weights
    block = size // gcd(side, size)
    block //= block & -block
    reach = FILTER_REACH[resample] * max(side / size, 1) + 1
    start = (side - content) // 2
    first = max(floor((start - reach) * size / side / block) * block, 0)
    last = min(ceil((start + content + reach) * size / side / block) * block, size)
    if side == size or first == 0 or last == size:
        pixels[:] = np.asarray(square.resize((size, size), resample)).transpose(2, 0, 1)
        return
    edges = (first * side / size, last * side / size)
    pixels[:] = np.array(background, dtype=np.uint8)[:, None, None]
    if image.width > image.height:
        part = square.resize((size, last - first), resample, (0, edges[0], side, edges[1]))
        pixels[:, first:last] = np.asarray(part).transpose(2, 0, 1)
    else:
        part = square.resize((last - first, size), resample, (edges[0], 0, edges[1], side))
        pixels[:, :, first:last] = np.asarray(part).transpose(2, 0, 1)
