"""What the questions of the test split give away: answers that need no picture, and relations that need no pattern."""

from collections import Counter

from benchmarks.replication.world import FAMILIES, ask, generator, sample_scene, side_of_number
from train.scenes import GRID, Question, Scene, best_constant, draw_questions


def blind_levels(size: int, seed: int) -> dict[str, dict[str, float]]:
    """
    Share (0 to 1) of the questions of `rows("test", size, seed, 1)` that can be answered without what they ask for.

    Returns:
        By kind of answer and family: the best constant answer to each wording; for relations, the side of the number
        on which most objects are ([`place_vote`]).
    """
    asked = []
    for index in range(size):
        scene = sample_scene("test", index, seed)
        rng = generator("test", index, seed, "questions")
        asked += [(scene, question) for question in draw_questions(scene, FAMILIES, ask, index, 1, rng)]
    votes = [place_vote(scene, one) == one.answer for scene, one in asked if one.family == "relation"]
    return {
        "the best constant answer to each wording": best_constant(question for _, question in asked),
        "the side with most objects": {"relation": sum(votes) / len(votes)},
    }


def place_vote(scene: Scene, question: Question) -> str:
    """Of a relation, the side of the number on which most objects are; of a tie, the one with more cells."""
    objects = Counter(side_of_number(scene, question.kind, item.row, item.column) for item in scene.objects)
    cells = Counter(side_of_number(scene, question.kind, at // GRID, at % GRID) for at in range(GRID * GRID))
    sides = [side for side in cells if side]
    return max(sides, key=lambda side: (objects[side], cells[side]))
