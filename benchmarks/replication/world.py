"""
A harder world than the demo's: no caption answers its questions.

The scenes of `train.demo.scenes`, in which each object also has a pattern (solid, striped, barred, hollow) and a size
(small, big). CLIP and the projector learn from captions, which name colors, shapes and places. Patterns, sizes and
digits are known to one teacher each. All six families of questions ask for these:

- attribute: the pattern of an object, or the color of the only object with a pattern;
- size: whether an object is small or big;
- presence: whether a pattern and a shape occur together; half of the answers are yes, and most of the others share
  pattern or shape with an object;
- count: how many objects have a pattern, zero to five, each number as often as pictures allow;
- relation: where the only object with a pattern is, seen from the number. Both sides of the number have as many
  objects, so that places alone, which CLIP knows, do not help;
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
    best_constant,
    draw_questions,
    draw_scene,
    llava_row,
    render,
)


PATTERNS = (SOLID, "striped", "barred", "hollow")
# Splits whose scenes are used for balanced questions
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
    """Scene number `index` of a split: always the same for the same arguments, and in no other split."""
    rng = generator(split, index, seed, "scene")
    while True:
        scene = draw_scene(rng)
        objects = []
        for item in scene.objects:
            low, high = SIZES[tuple(SIZES)[rng.integers(len(SIZES))]]
            pattern = PATTERNS[rng.integers(len(PATTERNS))]
            objects.append(dataclasses.replace(item, pattern=pattern, radius=int(rng.integers(low, high + 1))))
        scene = dataclasses.replace(scene, objects=tuple(objects))
        # Every family is asked about every scene: it must have a relation
        if zlib.crc32(scene.content.encode()) % 8 in SPLITS[split] and relations(scene, split in ASKED):
            return scene


def ask(scene: Scene, family: str, rng: np.random.Generator, balanced: bool = True) -> Question:
    """
    A random question of one family about a scene, with its answer.

    Args:
        balanced (`bool`, *optional*, defaults to `True`): Ask for counts and relations such that guessing does not
            help. Scenes of splits outside `ASKED` may have no such relation.

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
        balanced (`bool`): Only if both sides have as many objects, so that knowing their places gives half right.
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
    """Where a cell is, seen from the number, which is two cells wide; `None` if it is on neither side."""
    if kind == "vertical":
        return None if row == scene.number_row else "above" if row < scene.number_row else "below"
    if scene.number_column <= column <= scene.number_column + 1:
        return None
    return "left" if column < scene.number_column else "right"


def some_count(counts: Mapping[str, int], rng: np.random.Generator) -> str:
    """A random pattern, drawn by how often it occurs: first the number, then a pattern that occurs as often."""
    numbers = sorted(set(counts.values()))
    number = numbers[rng.integers(len(numbers))]
    patterns = [pattern for pattern in PATTERNS if counts[pattern] == number]
    return patterns[rng.integers(len(patterns))]


def some_pattern(scene: Scene, rng: np.random.Generator, present: float) -> str:
    """With probability `present` a pattern that occurs, else one that does not, if there is one."""
    seen = sorted({item.pattern for item in scene.objects})
    unseen = [pattern for pattern in PATTERNS if pattern not in seen]
    choices = seen if rng.random() < present or not unseen else unseen
    return choices[rng.integers(len(choices))]


def lesson(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """
    Questions and answers that the language model learns from, in random order: one of each family, more of the hard
    families, and three easier questions that no test asks. They are not balanced, so that any scene has them.
    """
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
    """The contents of random cells in words, in random order, so that any word must be predicted from the others."""
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
    """The words that describe an object in a scene in words."""
    return item.color, item.shape, item.pattern, size_of(item)


def labels(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """True classes by kind and cell, int64 `(num_scenes, 16)`, from 0; -1 if the cell has nothing of the kind."""
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
        questions (`int`, *optional*, defaults to 6): Turns of each conversation. 0 asks for a caption, 1 asks the
            families in turn, more ask as many different families in random order.
    """
    return Dataset.from_list([row(split, index, seed, questions) for index in range(size)], features=FEATURES)


def row(split: str, index: int, seed: int, questions: int) -> dict[str, Any]:
    scene = sample_scene(split, index, seed)
    asked = draw_questions(scene, FAMILIES, ask, index, questions, generator(split, index, seed, "questions"))
    return llava_row(scene, render(scene, generator(split, index, seed, "image")), asked)


def blind_levels(size: int, seed: int) -> dict[str, dict[str, float]]:
    """By name and family, the share of the questions of `rows("test", size, seed, 1)` that need no picture."""
    asked = []
    for index in range(size):
        rng = generator("test", index, seed, "questions")
        asked += draw_questions(sample_scene("test", index, seed), FAMILIES, ask, index, 1, rng)
    return {"the best constant answer to each wording": best_constant(asked)}
