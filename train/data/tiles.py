"""Cutting an image into tiles as LLaVA-NeXT does."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image as PILImage
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension


def cut_tiles(image: PILImage.Image, grids: Sequence[Sequence[int]], tile_size: int) -> list[PILImage.Image]:
    """The tiles that `LlavaNextImageProcessor` cuts an image into, with the pixels they had before its resize.

    The same grid, the same place in it and the same black margins, but no tile has fewer pixels than that part of the
    image has. An image that is smaller than its grid is enlarged as the student's, so that the tiles are the same.

    Args:
        image: RGB image.
        grids: (height, width) in pixels of the grids to choose from, `image_grid_pinpoints`.
        tile_size: side of a tile in those pixels.

    Returns:
        Square tiles, row by row: one less than `image_size_to_num_patches` says, which counts the whole image too.
    """
    height, width = select_best_resolution((image.height, image.width), [list(grid) for grid in grids])
    # Only its shape is looked at
    shape = np.broadcast_to(np.uint8(0), (image.height, image.width, 3))
    new_height, new_width = get_patch_output_size(shape, (height, width), ChannelDimension.LAST)
    shrinking = max(image.height / new_height, image.width / new_width, 1.0)
    side = math.ceil(tile_size * shrinking)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    edges = (left, top, left + new_width, top + new_height)
    left, top, right, bottom = (round(edge * side / tile_size) for edge in edges)
    canvas = PILImage.new("RGB", (width // tile_size * side, height // tile_size * side))
    resized = image.resize((max(right - left, 1), max(bottom - top, 1)), PILImage.Resampling.BICUBIC)
    canvas.paste(resized, (left, top))
    corners = [(x, y) for y in range(0, canvas.height, side) for x in range(0, canvas.width, side)]
    return [canvas.crop((x, y, x + side, y + side)) for x, y in corners]
