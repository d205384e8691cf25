"""What the questions of the test split give away: the answers that need no picture."""

from benchmarks.replication.world import FAMILIES, ask, generator, sample_scene
from train.demo.scenes import best_constant, draw_questions


def blind_levels(size: int, seed: int) -> dict[str, dict[str, float]]:
    """
    Share (0 to 1) of the questions of `rows("test", size, seed, 1)` that can be answered without a picture.

    Returns:
        By kind of answer (here one: the best constant answer to each wording) and family.
    """
    asked = []
    for index in range(size):
        scene = sample_scene("test", index, seed)
        rng = generator("test", index, seed, "questions")
        asked += draw_questions(scene, FAMILIES, ask, index, 1, rng)
    return {"the best constant answer to each wording": best_constant(asked)}
