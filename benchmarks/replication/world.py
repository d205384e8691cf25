"""
A harder world than the demo's: what its questions ask is never in a caption.

The scenes of `train.demo.scenes`; besides color and shape each object has a pattern (solid, striped, barred, hollow)
and a size (small, big). Captions, from which CLIP and the projector learn, name colours, shapes and places; patterns,
sizes and digits are known to the teachers alone, each to one. All six families of questions need them:

- attribute: the pattern of an object, or the colour of a pattern that occurs once; with size and read the families
  that ask about a single thing;
- size: whether an object is small or big;
- presence: whether a pattern and a shape occur together; half yes, most others share pattern or shape with an object;
- count: how many objects have a pattern, zero to five, each number as often as pictures allow;
- relation: where the one object of a pattern is, seen from the number. As many objects are on one side of it as on the
  other, so that their places alone, which CLIP knows, tell nothing;
- read: the two-digit number.
"""

import dataclasses
import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value

from train.demo.scene_labels import cell_labels
from train.demo.scenes import (
    COLUMNS,
    COUNTS,
    GRID,
    ROWS,
    SOLID,
    SPLITS,
    Question,
    Scene,
    SceneObject,
    ask_presence,
    draw_questions,
    draw_scene,
    llava_row,
    render,
)


PATTERNS = (SOLID, "striped", "barred", "hollow")
# Splits whose scenes are asked about, in this form of the questions
ASKED = ("finetune", "validation", "test")
SIZES = {"small": (8, 9), "big": (12, 14)}  # radius in pixels, from and to
FAMILIES = ("attribute", "size", "presence", "count", "relation", "read")
NUMBERS = ("zero", *COUNTS)
WORDS = " ".join((*PATTERNS, *SIZES, *NUMBERS, "pattern", "or"))

FEATURES = Features(
    {
        "image": Image(),
        "conversations": [{"from": Value("string"), "value": Value("string")}],
        "family": Value("string"),
    }
)


def size_of(item: SceneObject) -> str:
    return "small" if item.radius <= SIZES["small"][1] else "big"


def generator(split: str, index: int, seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, index, zlib.crc32(f"harder/{split}/{purpose}".encode())])


def sample_scene(split: str, index: int, seed: int = 0) -> Scene:
    """Scene number `index` of a split, always the same for the same arguments, and in no other split."""
    rng = generator(split, index, seed, "scene")
    while True:
        scene = draw_scene(rng)
        objects = []
        for item in scene.objects:
            low, high = SIZES[tuple(SIZES)[rng.integers(len(SIZES))]]
            pattern = PATTERNS[rng.integers(len(PATTERNS))]
            objects.append(dataclasses.replace(item, pattern=pattern, radius=int(rng.integers(low, high + 1))))
        scene = dataclasses.replace(scene, objects=tuple(objects))
        # A scene is asked everything, so it must have an answer to everything
        if zlib.crc32(scene.content.encode()) % 8 in SPLITS[split] and relations(scene, split in ASKED):
            return scene


def ask(scene: Scene, family: str, rng: np.random.Generator, balanced: bool = True) -> Question:
    """
    A random question of one family about a scene, with its answer.

    Args:
        balanced: Count and relation are asked so that little or nothing can be guessed. Scenes of splits that are not
            in `ASKED` may have no such relation.

    Raises:
        ValueError: if `family` is not one of `FAMILIES`.
    """
    if family == "attribute":
        return attribute(scene, rng)
    if family == "size":
        item = scene.objects[rng.integers(len(scene.objects))]
        return Question("size", "size", f"Is the {item.name} small or big?", size_of(item))
    if family == "presence":
        return ask_presence({(item.pattern, item.shape) for item in scene.objects}, PATTERNS, rng)
    if family == "count":
        counts = {pattern: sum(item.pattern == pattern for item in scene.objects) for pattern in PATTERNS}
        pattern = some_count(counts, rng) if balanced else some_pattern(scene, rng, 0.75)
        return Question("count", "count", f"How many {pattern} objects are there?", NUMBERS[counts[pattern]])
    if family == "relation":
        questions = relations(scene, balanced)
        return questions[rng.integers(len(questions))]
    if family == "read":
        return Question("read", "read", "Which number is written?", scene.number)
    raise ValueError(f"There are no questions of the family {family!r}; choose one of {FAMILIES}.")


def single_patterns(scene: Scene) -> list[SceneObject]:
    counts = Counter(item.pattern for item in scene.objects)
    return [item for item in scene.objects if counts[item.pattern] == 1]


def attribute(scene: Scene, rng: np.random.Generator) -> Question:
    if rng.integers(2):
        singles = single_patterns(scene)
        item = singles[rng.integers(len(singles))]
        return Question("attribute", "colour", f"What colour is the {item.pattern} object?", item.color)
    item = scene.objects[rng.integers(len(scene.objects))]
    return Question("attribute", "pattern", f"What pattern is the {item.name}?", item.pattern)


def relations(scene: Scene, balanced: bool) -> list[Question]:
    """
    All questions for the side of the number on which the only object of a pattern is.

    Args:
        balanced: Only where there are as many objects on one side as on the other: any of them is as likely to have
            the pattern, so that who knows the places alone is right half of the time.
    """
    questions = []
    for item in single_patterns(scene):
        for kind, asked in (
            ("vertical", "above or below the number?"),
            ("horizontal", "left or right of the number?"),
        ):
            answer = side_of_number(scene, kind, item.row, item.column)
            sides = Counter(side_of_number(scene, kind, other.row, other.column) for other in scene.objects)
            if answer and (not balanced or 2 * sides[answer] == len(scene.objects) - sides[None]):
                text = f"Is the {item.pattern} object {asked}"
                questions.append(Question("relation", kind, text, answer))
    return questions


def side_of_number(scene: Scene, kind: str, row: int, column: int) -> str | None:
    """Where a cell is, seen from the number; `None` where it is neither, the number being two cells wide."""
    if kind == "vertical":
        return None if row == scene.number_row else "above" if row < scene.number_row else "below"
    if scene.number_column <= column <= scene.number_column + 1:
        return None
    return "left" if column < scene.number_column else "right"


def some_count(counts: Mapping[str, int], rng: np.random.Generator) -> str:
    """A pattern of those that occur a number of times, which is drawn first, so that few numbers are the rule."""
    numbers = sorted(set(counts.values()))
    number = numbers[rng.integers(len(numbers))]
    patterns = [pattern for pattern in PATTERNS if counts[pattern] == number]
    return patterns[rng.integers(len(patterns))]


def some_pattern(scene: Scene, rng: np.random.Generator, present: float) -> str:
    """A pattern that occurs with probability `present`, else one that does not, if there is one."""
    seen = sorted({item.pattern for item in scene.objects})
    unseen = [pattern for pattern in PATTERNS if pattern not in seen]
    choices = seen if rng.random() < present or not unseen else unseen
    return choices[rng.integers(len(choices))]


def lesson(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """What the language model learns from: a question of each family, a second one of the hard ones, and three easier
    ones that no test asks, as steps towards them, in random order. Relations of all objects, and counts of patterns as
    they come, which any scene has."""
    families = (*FAMILIES, "relation", "presence", "count", "relation")
    questions = [ask(scene, family, rng, balanced=False) for family in families]
    turns = [(question.text, question.answer) for question in questions]
    item = scene.objects[rng.integers(len(scene.objects))]
    turns.append((f"Where is the {item.name}?", f"{COLUMNS[item.column]} {ROWS[item.row]}"))
    turns.append(("Where is the number?", f"{COLUMNS[scene.number_column]} {ROWS[scene.number_row]}"))
    pattern = some_pattern(scene, rng, 0.5)
    present = any(item.pattern == pattern for item in scene.objects)
    turns.append((f"Is there a {pattern} object?", "yes" if present else "no"))
    return [turns[i] for i in rng.permutation(len(turns))]


def facts(scene: Scene, rng: np.random.Generator, count: int = 9) -> str:
    """What is in cells picked at random, in random order: any word may have to be completed from the others."""
    told = []
    for i in rng.integers(len(scene.objects) + 1, size=count):
        if i == len(scene.objects):
            parts = ["number", scene.number, f"{COLUMNS[scene.number_column]} {ROWS[scene.number_row]}"]
        else:
            item = scene.objects[i]
            place = f"{COLUMNS[item.column]} {ROWS[item.row]}"
            parts = [item.color, item.shape, item.pattern, size_of(item), place]
        told.append(" ".join(parts[j] for j in rng.permutation(len(parts))))
    return ", ".join(told)


def object_words(item: SceneObject) -> tuple[str, ...]:
    """What a scene told in words says of an object."""
    return item.color, item.shape, item.pattern, size_of(item)


def labels(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """The truth by cell, [n, 16] long, as classes from 0; -1 where there is nothing of the kind."""
    found = cell_labels(scenes)
    pattern = torch.full((len(scenes), GRID * GRID), -1)
    size = torch.full((len(scenes), GRID * GRID), -1)
    for i, scene in enumerate(scenes):
        for item in scene.objects:
            pattern[i, item.row * GRID + item.column] = PATTERNS.index(item.pattern)
            size[i, item.row * GRID + item.column] = tuple(SIZES).index(size_of(item))
    is_object = found.color > 0
    return {
        "shape": torch.where(is_object, found.shape - 1, -1),
        "colour": torch.where(is_object, found.color - 1, -1),
        "pattern": pattern,
        "size": size,
        "digit": torch.where(found.digit < 10, found.digit, -1),
    }


def rows(split: str, size: int, seed: int = 0, questions: int = len(FAMILIES)) -> Dataset:
    """
    `size` pictures of a split as LLaVA rows (`image`, `conversations`, `family`).

    Args:
        questions: Turns of each conversation: 0 asks for a caption; 1 asks one question, the families in turn; more
            asks that many different families in random order.
    """
    return Dataset.from_list([row(split, index, seed, questions) for index in range(size)], features=FEATURES)


def row(split: str, index: int, seed: int, questions: int) -> dict[str, Any]:
    scene = sample_scene(split, index, seed)
    asked = draw_questions(scene, FAMILIES, ask, index, questions, generator(split, index, seed, "questions"))
    return llava_row(scene, render(scene, generator(split, index, seed, "image")), asked)
