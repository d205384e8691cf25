"""Rows of generated pictures to train on: what colour is it?"""

from typing import Any

import numpy as np
from PIL import Image


def llava_rows(count: int, text_only: tuple[int, ...] = (), seed: int = 0) -> list[dict[str, Any]]:
    """LLaVA rows whose answer is the picture's color; those of `text_only` have no picture."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        color = ("red", "green", "blue")[index % 3]
        pixels = random.integers(0, 60, (24, 20, 3)).astype(np.uint8)
        pixels[..., index % 3] += 180
        image = None if index in text_only else Image.fromarray(pixels)
        prefix = "" if image is None else "<image>\n"
        turns = [("human", f"{prefix}What colour is it?"), ("gpt", f"It is {color}.")]
        rows.append({"image": image, "conversations": [{"from": who, "value": text} for who, text in turns]})
    return rows
