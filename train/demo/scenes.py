"""
Generated scenes of colored shapes and a two-digit number: the data of the demo and of the replication.

A scene is a 128-pixel picture on a grid of 4 x 4 cells: one to five objects, each of one color and one shape and no
two alike, and a two-digit number in two neighboring cells, on a noisy light or dark ground. There are five families of
questions, after the usual benchmarks of vision-language models. Captions name everything except the digits, so that
a student learns to read from a teacher or from the questions.

    scenes("pretrain", 4000)                    # LLaVA rows, one caption per image
    scenes("finetune", 4000)                    # LLaVA rows, five questions per image in one conversation
    scenes("test", 500)                         # one question per image, the families in turn
    chance_levels("test")                       # accuracy of the best constant answer in each family
"""

import io
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont


IMAGE_SIZE = 128
GRID = 4
CELL = IMAGE_SIZE // GRID
COLORS = {
    "red": (214, 44, 44),
    "green": (48, 158, 66),
    "blue": (48, 84, 220),
    "yellow": (232, 204, 44),
    "purple": (146, 54, 178),
    "cyan": (64, 200, 214),
}
SHAPES = ("circle", "square", "triangle", "cross")
COUNTS = ("one", "two", "three", "four", "five")
ROWS = COUNTS[:GRID]
COLUMNS = ("A", "B", "C", "D")
SOLID = "solid"
FAMILIES = ("attribute", "relation", "presence", "count", "read")
FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")
CAPTION_REQUEST = "What is in the image?"

# A hash of the content of a scene, modulo 8, decides its split, so that no scene is in two splits
SPLITS = {"towers": (0, 1, 2, 3), "pretrain": (4,), "finetune": (5,), "validation": (6,), "test": (7,)}

_FEATURES = Features(
    {
        "image": Image(),
        "conversations": [{"from": Value("string"), "value": Value("string")}],
        "family": Value("string"),
        "scene": {
            "objects": [
                {
                    "color": Value("string"),
                    "shape": Value("string"),
                    "row": Value("int32"),
                    "column": Value("int32"),
                    "x": Value("int32"),
                    "y": Value("int32"),
                    "radius": Value("int32"),
                    "pattern": Value("string"),
                }
            ],
            "number": Value("string"),
            "number_row": Value("int32"),
            "number_column": Value("int32"),
            "digit_centers": [[Value("int32")]],
        },
    }
)


@dataclass(frozen=True)
class SceneObject:
    """
    An object. Row and column count from 0 at the top left; x, y (its center) and radius are pixels of the picture.
    Here all objects are solid; the replication also has `striped`, `barred` and `hollow` ones.
    """

    color: str
    shape: str
    row: int
    column: int
    x: int
    y: int
    radius: int
    pattern: str = SOLID

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """The content of a picture. `number_column` is the column of the tens; the units are in the next column."""

    objects: tuple[SceneObject, ...]
    number: str
    number_row: int
    number_column: int
    digit_centers: tuple[tuple[int, int], tuple[int, int]]

    @property
    def content(self) -> str:
        """The content without jitter, equal for scenes that no question tells apart."""
        painted = ((item, "" if item.pattern == SOLID else f" {item.pattern}") for item in self.objects)
        objects = sorted(f"{item.name} {item.row} {item.column}{pattern}" for item, pattern in painted)
        return "; ".join([*objects, f"{self.number} {self.number_row} {self.number_column}"])


@dataclass(frozen=True)
class Question:
    """A question with its answer. `kind` is the wording; a family may have several."""

    family: str
    kind: str
    text: str
    answer: str


def sample_scene(split: str, index: int, seed: int = 0) -> Scene:
    """Scene number `index` of a split, a function of the arguments alone."""
    rng = _generator(split, index, seed, "scene")
    while True:
        scene = draw_scene(rng)
        if zlib.crc32(scene.content.encode()) % 8 in SPLITS[split] and _attributes(scene):
            return scene


def render(scene: Scene, rng: np.random.Generator) -> PILImage.Image:
    """Paint a scene as an RGB picture of 128 x 128 pixels; `rng` draws ground, noise, shades and typeface."""
    light = bool(rng.integers(2))
    ground = rng.integers(185, 240) if light else rng.integers(15, 70)
    background = tuple(int(ground + v) for v in rng.integers(-12, 13, 3))
    canvas = PILImage.new("RGB", (2 * IMAGE_SIZE, 2 * IMAGE_SIZE), background)
    draw = ImageDraw.Draw(canvas)
    for item in scene.objects:
        shade = rng.integers(-18, 19, 3)
        color = tuple(int(np.clip(c + s, 0, 255)) for c, s in zip(COLORS[item.color], shade, strict=True))
        _draw_shape(draw, item.shape, 2 * item.x, 2 * item.y, 2 * item.radius, color)
        _draw_pattern(draw, item, background)
    font = _font(FONTS[rng.integers(len(FONTS))], 2 * int(rng.integers(25, 30)))
    ink = int(rng.integers(0, 50) if light else rng.integers(205, 256))
    for digit, (x, y) in zip(scene.number, scene.digit_centers, strict=True):
        draw.text((2 * x, 2 * y), digit, fill=(ink, ink, ink), font=font, anchor="mm")
    # Halved for smooth edges
    pixels = np.asarray(canvas.reduce(2), dtype=np.int16)
    noise = rng.integers(-20, 21, pixels.shape, dtype=np.int16)
    return PILImage.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def scene_image(split: str, index: int, seed: int = 0) -> PILImage.Image:
    """The picture of [`sample_scene`] with the same arguments."""
    return render(sample_scene(split, index, seed), _generator(split, index, seed, "image"))


def caption(scene: Scene) -> str:
    """Everything in a scene except the digits: "a red circle at B two, ... and a number at C one"."""
    objects = sorted(scene.objects, key=lambda item: (item.row, item.column))
    parts = [f"a {item.name} at {COLUMNS[item.column]} {ROWS[item.row]}" for item in objects]
    return f"{', '.join(parts)} and a number at {COLUMNS[scene.number_column]} {ROWS[scene.number_row]}"


def ask(scene: Scene, family: str, rng: np.random.Generator) -> Question:
    """
    A random question of a family about a scene, with its answer.

    - attribute: the color of a shape, or the shape of a color, that occurs once;
    - relation: left or right, above or below, between two objects or an object and the number;
    - presence: whether a color and a shape occur together, see [`ask_presence`];
    - count: the number of objects, one to five;
    - read: the two-digit number.
    """
    if family == "attribute":
        return _pick(_attributes(scene), rng)
    if family == "relation":
        return _pick(_relations(scene), rng)
    if family == "presence":
        return ask_presence({(item.color, item.shape) for item in scene.objects}, COLORS, rng)
    if family == "count":
        return Question("count", "count", "How many objects are there?", COUNTS[len(scene.objects) - 1])
    if family == "read":
        return Question("read", "read", "Which number is written?", scene.number)
    raise ValueError(f"Unknown question family {family!r}. Choose one of {', '.join(FAMILIES)}.")


def scenes(split: str, size: int, seed: int = 0, questions: int | None = None) -> Dataset:
    """
    Pictures of a split as LLaVA rows.

    Args:
        split (`str`): One of `SPLITS`. Splits share no scene, whatever the seeds.
        size (`int`): Number of pictures, one row each.
        seed (`int`, defaults to 0): Another seed gives other pictures.
        questions (`int`, *optional*): Questions of each conversation. 0 is a caption; 1 is one question, of the family
            `FAMILIES[i % 5]` in row `i`; more are different families in random order. By default 0 for `pretrain`, 1
            for `validation` and `test`, else 5.

    Returns:
        A dataset with the columns `image` (RGB, 128 x 128), `conversations` (LLaVA turns), `family` (of a single
        question, else `caption` or `several`) and `scene` (the fields of [`Scene`]).
    """
    if size < 1:
        raise ValueError(f"size is {size}. A data set needs at least 1 picture.")
    if questions is None:
        questions = {"pretrain": 0, "validation": 1, "test": 1}.get(split, len(FAMILIES))
    if not 0 <= questions <= len(FAMILIES):
        raise ValueError(f"questions is {questions}. Choose 0 (captions) to {len(FAMILIES)} (one of each family).")
    rows = [_row(split, index, seed, questions) for index in range(size)]
    return Dataset.from_list(rows, features=_FEATURES)


def chance_levels(split: str = "test", size: int = 4000, seed: int = 0) -> dict[str, float]:
    """By family, the accuracy (0 to 1) of the best constant answer over `size` scenes of a split."""
    asked = []
    for index in range(size):
        scene, rng = sample_scene(split, index, seed), _generator(split, index, seed, "questions")
        asked += [ask(scene, family, rng) for family in FAMILIES]
    return best_constant(asked)


def best_constant(questions: Iterable[Question]) -> dict[str, float]:
    """
    By family, the share (0 to 1) of the questions that the best constant answer gets right.

    Each wording has its own best answer, so that "what shape" is not answered with a color. This makes the bar higher.
    """
    answers: dict[str, dict[str, Counter[str]]] = {}
    for question in questions:
        kinds = answers.setdefault(question.family, {})
        kinds.setdefault(question.kind, Counter())[question.answer] += 1
    return {
        family: sum(max(c.values()) for c in kinds.values()) / sum(c.total() for c in kinds.values())
        for family, kinds in answers.items()
    }


def _row(split: str, index: int, seed: int, questions: int) -> dict[str, Any]:
    scene = sample_scene(split, index, seed)
    asked = draw_questions(scene, FAMILIES, ask, index, questions, _generator(split, index, seed, "questions"))
    return llava_row(scene, render(scene, _generator(split, index, seed, "image")), asked) | {"scene": asdict(scene)}


def draw_questions(
    scene: Scene,
    families: Sequence[str],
    ask: Callable[[Scene, str, np.random.Generator], Question],
    index: int,
    questions: int,
    rng: np.random.Generator,
) -> list[Question]:
    """No question, one of the family number `index` in turn, or `questions` of different families in random order."""
    chosen = rng.permutation(len(families))[:questions] if questions > 1 else [index % len(families)]
    return [ask(scene, families[i], rng) for i in chosen] if questions else []


def llava_row(scene: Scene, picture: PILImage.Image, asked: Sequence[Question]) -> dict[str, Any]:
    """A LLaVA row about a picture: its questions, or a caption without questions."""
    buffer = io.BytesIO()
    picture.save(buffer, format="BMP")  # noise does not compress
    turns = [(question.text, question.answer) for question in asked] or [(CAPTION_REQUEST, caption(scene))]
    family = "several" if len(asked) > 1 else asked[0].family if asked else "caption"
    conversation: list[dict[str, str]] = []
    for text, answer in turns:
        prefix = "" if conversation else "<image>\n"
        conversation += [{"from": "human", "value": prefix + text}, {"from": "gpt", "value": answer}]
    return {
        "image": {"bytes": buffer.getvalue(), "path": None},
        "conversations": conversation,
        "family": family,
    }


def _generator(split: str, index: int, seed: int, purpose: str) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}. Choose one of {', '.join(SPLITS)}.")
    return np.random.default_rng([seed, index, zlib.crc32(f"{split}/{purpose}".encode())])


def draw_scene(rng: np.random.Generator) -> Scene:
    number_row, number_column = int(rng.integers(GRID)), int(rng.integers(GRID - 1))
    number = str(rng.integers(10, 100))
    taken = (number_row * GRID + number_column, number_row * GRID + number_column + 1)
    free = [cell for cell in range(GRID * GRID) if cell not in taken]
    count = int(rng.integers(1, len(COUNTS) + 1))
    names = rng.permutation(len(COLORS) * len(SHAPES))[:count]
    cells = rng.permutation(len(free))[:count]
    radii, jitter = rng.integers(9, 14, count), rng.integers(-2, 3, (count + 2, 2))
    objects = []
    for i in range(count):
        row, column = divmod(free[cells[i]], GRID)
        x, y = _center(row, column, jitter[i])
        color, shape = tuple(COLORS)[names[i] // len(SHAPES)], SHAPES[names[i] % len(SHAPES)]
        objects.append(SceneObject(color, shape, row, column, x, y, int(radii[i])))
    tens = _center(number_row, number_column, jitter[count])
    units = _center(number_row, number_column + 1, jitter[count + 1])
    return Scene(tuple(objects), number, number_row, number_column, (tens, units))


def _center(row: int, column: int, jitter: np.ndarray) -> tuple[int, int]:
    return CELL * column + CELL // 2 + int(jitter[0]), CELL * row + CELL // 2 + int(jitter[1])


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: int, y: int, radius: int, color: tuple[int, ...]) -> None:
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    elif shape == "square":
        half = round(0.86 * radius)
        draw.rectangle((x - half, y - half, x + half, y + half), fill=color)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=color)
    else:
        arm = round(0.34 * radius)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=color)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=color)


def _draw_pattern(draw: ImageDraw.ImageDraw, item: SceneObject, background: tuple[int, ...]) -> None:
    """Paint over the gaps of the pattern: bands of 4 pixels, 4 apart, or the middle."""
    x, y, radius = 2 * item.x, 2 * item.y, 2 * item.radius
    if item.pattern == "hollow":
        _draw_shape(draw, item.shape, x, y, radius // 2, background)
    elif item.pattern != SOLID:
        for start in range(-radius + 4, radius, 16):
            left, top, right, bottom = -radius, start, radius, start + 7
            if item.pattern == "barred":
                left, top, right, bottom = top, left, bottom, right
            draw.rectangle((x + left, y + top, x + right, y + bottom), fill=background)


@lru_cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    # matplotlib ships these fonts; a bare system may have none
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _pick(questions: list[Question], rng: np.random.Generator) -> Question:
    """A random question. The kind is drawn first, so that each wording is equally likely."""
    kinds = sorted({question.kind for question in questions})
    kind = kinds[rng.integers(len(kinds))]
    choices = [question for question in questions if question.kind == kind]
    return choices[rng.integers(len(choices))]


def _attributes(scene: Scene) -> list[Question]:
    colors = Counter(item.color for item in scene.objects)
    shapes = Counter(item.shape for item in scene.objects)
    questions = []
    for item in scene.objects:
        if shapes[item.shape] == 1:
            questions.append(Question("attribute", "color", f"What colour is the {item.shape}?", item.color))
        if colors[item.color] == 1:
            questions.append(Question("attribute", "shape", f"What shape is the {item.color} object?", item.shape))
    return questions


def _relations(scene: Scene) -> list[Question]:
    # There is always a question: the number covers two cells of a row, so an object is beside it or in another row
    places = [(item.name, item.row, item.column, item.column) for item in scene.objects]
    places.append(("number", scene.number_row, scene.number_column, scene.number_column + 1))
    questions = []
    for name, row, first, last in places:
        for other, other_row, other_first, other_last in places:
            if last < other_first or other_last < first:
                text = f"Is the {name} left or right of the {other}?"
                questions.append(
                    Question("relation", "left or right", text, "left" if last < other_first else "right")
                )
            if row != other_row:
                text = f"Is the {name} above or below the {other}?"
                questions.append(Question("relation", "above or below", text, "above" if row < other_row else "below"))
    return questions


def ask_presence(present: set[tuple[str, str]], adjectives: Iterable[str], rng: np.random.Generator) -> Question:
    """
    Whether an adjective and a shape occur together. Half of the answers are yes; most absent pairs share the adjective
    or the shape with a present one.

    Args:
        present (`set`): The pairs that occur.
        adjectives (`Iterable[str]`): All adjectives; each goes with each shape.
    """
    if rng.integers(2):
        adjective, shape = sorted(present)[rng.integers(len(present))]
        answer = "yes"
    else:
        absent = [pair for pair in product(adjectives, SHAPES) if pair not in present]
        if rng.random() < 0.8:
            seen = {adjective for adjective, _ in present}, {shape for _, shape in present}
            absent = [pair for pair in absent if pair[0] in seen[0] or pair[1] in seen[1]]
        adjective, shape = absent[rng.integers(len(absent))]
        answer = "no"
    return Question("presence", "presence", f"Is there a {adjective} {shape}?", answer)
