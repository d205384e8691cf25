"""Scenes as tensors: pixels, labels of every cell, and how well a linear classifier finds the labels in features."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionModel

from train.demo.scenes import COLOURS, GRID, SHAPES, Scene
from train.demo.text_scenes import CELLS
from train.teachers.preprocessing import CLIP_MEAN, CLIP_STD


SHAPE_CLASSES = ("nothing", *SHAPES, "digit")
COLOUR_CLASSES = ("none", *COLOURS)
NO_DIGIT = 10


@dataclass
class Labels:
    """The truth of `n` scenes, cell by cell, row-major: `shape`, `colour`, `digit` are [n, 16] long (classes of
    `SHAPE_CLASSES`, `COLOUR_CLASSES`, and 0-9 or `NO_DIGIT`), `centre` is [n, 16, 2] float, x and y in pixels of the
    128-pixel picture."""

    shape: Tensor
    colour: Tensor
    digit: Tensor
    centre: Tensor

    def by_kind(self) -> dict[str, Tensor]:
        """Shape and colour of objects and the digits, each [n, 16], -1 in cells that have none."""
        thing = self.colour > 0
        return {
            "shape": self.shape.where(thing, -1),
            "colour": self.colour.where(thing, -1),
            "digit": self.digit.where(self.digit < NO_DIGIT, -1),
        }


def cell_labels(scenes: list[Scene]) -> Labels:
    """Dense labels of a list of scenes."""
    shape, colour = np.zeros((len(scenes), CELLS), dtype=np.int64), np.zeros((len(scenes), CELLS), dtype=np.int64)
    digit, centre = np.full((len(scenes), CELLS), NO_DIGIT), np.zeros((len(scenes), CELLS, 2), dtype=np.float32)
    for i, scene in enumerate(scenes):
        for item in scene.objects:
            cell = item.row * GRID + item.column
            shape[i, cell], colour[i, cell] = SHAPE_CLASSES.index(item.shape), COLOUR_CLASSES.index(item.colour)
            centre[i, cell] = item.x, item.y
        for offset in range(2):
            cell = scene.number_row * GRID + scene.number_column + offset
            shape[i, cell], digit[i, cell] = SHAPE_CLASSES.index("digit"), int(scene.number[offset])
            centre[i, cell] = scene.digit_centres[offset]
    return Labels(*(torch.from_numpy(array) for array in (shape, colour, digit, centre)))


def resized(pictures: list[Image.Image], size: int) -> Tensor:
    """Pictures as one uint8 tensor [n, 3, size, size], resized bicubically as every processor here does."""
    arrays = [np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def normalized(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [n, 3, S, S] to float32 pixel values of the same shape."""
    return (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def labels_per_token(labels: Tensor, side: int) -> Tensor:
    """Labels per cell [n, 16, ...] repeated for every token of a side x side grid: [n, side * side, ...]."""
    factor = side // GRID
    grid = labels.unflatten(1, (GRID, GRID))
    return grid.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2).flatten(1, 2)


def accuracy_where(logits: Tensor, target: Tensor, keep: Tensor) -> float:
    return (logits.argmax(-1) == target)[keep].float().mean().item()


def linear_probe(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> float:
    """Accuracy of multinomial logistic regression (L-BFGS, a light penalty) on standardised features."""
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
    """How well a linear classifier finds each kind of label of a cell in the student's token of that cell.

    Args:
        features: [n, 16, d] tokens of `n` scenes.
        truth: by kind [n, 16], as [`Labels.by_kind`] gives it; -1 where there is nothing.
        trained: the first `trained` scenes fit the classifier, the others measure it.
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
    """Tokens [n, 16, d] of uint8 pictures [n, 3, 64, 64] as a projector gets them: `hidden_states[-2]`, no CLS."""
    outputs = tower(pixel_values=normalized(pixels, CLIP_MEAN, CLIP_STD), output_hidden_states=True)
    return outputs.hidden_states[layer][:, 1:]
