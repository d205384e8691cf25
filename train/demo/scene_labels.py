"""Scenes as tensors: pixels, labels of each cell, and linear probes of these labels in features."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionModel

from train.demo.scenes import COLORS, GRID, SHAPES, Scene
from train.demo.text_scenes import CELLS
from train.teachers.preprocessing import CLIP_MEAN, CLIP_STD


SHAPE_CLASSES = ("nothing", *SHAPES, "digit")
COLOR_CLASSES = ("none", *COLORS)
NO_DIGIT = 10


@dataclass
class Labels:
    """
    The labels of scenes, cell by cell in row-major order.

    Attributes:
        shape: Classes of `SHAPE_CLASSES`, int64 `(num_scenes, 16)`.
        color: Classes of `COLOR_CLASSES`, int64 `(num_scenes, 16)`.
        digit: 0 to 9, or `NO_DIGIT`, int64 `(num_scenes, 16)`.
        center: x and y in pixels of the picture, float32 `(num_scenes, 16, 2)`.
    """

    shape: Tensor
    color: Tensor
    digit: Tensor
    center: Tensor

    def by_kind(self) -> dict[str, Tensor]:
        """Labels of objects and digits by kind, as in `scores.json`, `(num_scenes, 16)`; -1 in cells without."""
        thing = self.color > 0
        return {
            "shape": self.shape.where(thing, -1),
            "colour": self.color.where(thing, -1),
            "digit": self.digit.where(self.digit < NO_DIGIT, -1),
        }


def cell_labels(scenes: list[Scene]) -> Labels:
    shape, color = np.zeros((len(scenes), CELLS), dtype=np.int64), np.zeros((len(scenes), CELLS), dtype=np.int64)
    digit, center = np.full((len(scenes), CELLS), NO_DIGIT), np.zeros((len(scenes), CELLS, 2), dtype=np.float32)
    for i, scene in enumerate(scenes):
        for item in scene.objects:
            cell = item.row * GRID + item.column
            shape[i, cell], color[i, cell] = SHAPE_CLASSES.index(item.shape), COLOR_CLASSES.index(item.color)
            center[i, cell] = item.x, item.y
        for offset in range(2):
            cell = scene.number_row * GRID + scene.number_column + offset
            shape[i, cell], digit[i, cell] = SHAPE_CLASSES.index("digit"), int(scene.number[offset])
            center[i, cell] = scene.digit_centers[offset]
    return Labels(*(torch.from_numpy(array) for array in (shape, color, digit, center)))


def resized(pictures: list[Image.Image], size: int) -> Tensor:
    """Pictures as uint8 `(num_pictures, 3, size, size)`, resized bicubically like all image processors of the demo."""
    arrays = [np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def normalized(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 pictures to float32 pixel values of the same shape."""
    return (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def labels_per_token(labels: Tensor, side: int) -> Tensor:
    """Repeat labels of cells, `(num_scenes, 16, ...)`, for the tokens of a grid: `(num_scenes, side * side, ...)`."""
    factor = side // GRID
    grid = labels.unflatten(1, (GRID, GRID))
    return grid.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2).flatten(1, 2)


def accuracy_where(logits: Tensor, target: Tensor, keep: Tensor) -> float:
    return (logits.argmax(-1) == target)[keep].float().mean().item()


def linear_probe(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> float:
    """Test accuracy of multinomial logistic regression on standardized features."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    classifier = nn.Linear(x.shape[1], int(y.max()) + 1)
    nn.init.zeros_(classifier.weight)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(classifier(x), y) + 1e-3 * classifier.weight.pow(2).sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    return (classifier(x_test).argmax(-1) == y_test).float().mean().item()


def probe_scores(features: Tensor, truth: Mapping[str, Tensor], trained: int) -> dict[str, float]:
    """
    Accuracy of a linear classifier for each kind of label, on the token of the label's cell.

    Args:
        features (`Tensor`): Tokens of shape `(num_scenes, 16, width)`.
        truth (`Mapping[str, Tensor]`): By kind, labels of shape `(num_scenes, 16)`; -1 in cells without.
        trained (`int`): Number of scenes that train the classifier. The others measure it.
    """
    scores = {}
    for kind, target in truth.items():
        keep = target >= 0
        scores[kind] = linear_probe(
            features[:trained][keep[:trained]],
            target[:trained][keep[:trained]],
            features[trained:][keep[trained:]],
            target[trained:][keep[trained:]],
        )
    return scores


@torch.no_grad()
def student_features(tower: CLIPVisionModel, pixels: Tensor, layer: int = -2) -> Tensor:
    """The tokens that a projector reads of uint8 pictures: a hidden state without CLS, `(num_pictures, 16, width)`."""
    outputs = tower(pixel_values=normalized(pixels, CLIP_MEAN, CLIP_STD), output_hidden_states=True)
    return outputs.hidden_states[layer][:, 1:]
