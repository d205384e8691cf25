"""
The networks that the replication starts from, trained on scenes of the split `towers`.

- `clip`: the student's starting point, a CLIP vision tower (64 px) trained against captions, which name neither
  patterns nor sizes nor digits;
- `detector`: a vision transformer (96 px, 8 x 8 tokens) trained on dense labels of shape, color and size;
- `texture`: a convolutional network (128 px, 16 x 16 tokens) trained on dense labels of pattern;
- `reader`: a convolutional network (128 px, 16 x 16 tokens) trained on dense labels of digits;
- `language_model`: the demo's, trained further on this world's words and questions, from scenes in words.

Each is an ordinary folder of `save_pretrained`, with its scores on held-out scenes in `scores.json`.
"""

import multiprocessing
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPImageProcessor,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)

from benchmarks.replication import world
from modeling_movekd.files import read_json, save_json, temporary_folder
from train.demo import networks, scene_labels
from train.demo.scenes import Scene, render
from train.demo.text_scenes import TextScenes, build_tokenizer, language_model_scores, with_short_template
from train.teachers.preprocessing import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD


# Training steps, the longest training first
STEPS = {"language_model": 3600, "clip": 2400, "detector": 2400, "texture": 500, "reader": 400}
DEMO_LANGUAGE_MODEL = Path("train/demo/weights/language_model")
# Of each teacher: image size, side of the grid of tokens, kinds of labels, mean and std of the pixels
TEACHERS: dict[str, tuple[int, int, tuple[str, ...], tuple[float, ...], tuple[float, ...]]] = {
    "detector": (96, 8, ("shape", "colour", "size"), IMAGENET_MEAN, IMAGENET_STD),
    "texture": (128, 16, ("pattern",), networks.HALF, networks.HALF),
    "reader": (128, 16, ("digit",), networks.HALF, networks.HALF),
}
NOTHING_WEIGHT = 0.15  # loss weight of the class "nothing", which most cells have


def build_towers(output_dir: Path, seed: int, pictures: int, effort: float, workers: int) -> dict[str, Any]:
    """
    Train the networks that `output_dir` does not hold yet.

    Args:
        output_dir (`Path`): Takes a folder for each network, once it is finished.
        seed (`int`): Seed of the scenes and of the weights.
        pictures (`int`): Number of scenes to train on.
        effort (`float`): Factor on the number of training steps.
        workers (`int`): Networks that train at a time.

    Returns:
        The scores of each network, by its name.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    missing = [name for name in STEPS if not (output_dir / name / "scores.json").is_file()]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(build_tower, name, output_dir / name, seed, pictures, effort) for name in missing]
        for job in jobs:
            job.result()
    return {name: read_json(output_dir / name / "scores.json") for name in STEPS}


def build_tower(name: str, folder: Path, seed: int, pictures: int, effort: float) -> None:
    """Train one network and save it with its scores; runs in a process of its own."""
    torch.set_num_threads(1)
    transformers.set_seed(seed)
    started = time.time()
    tokenizer = build_tokenizer(world.WORDS)
    scenes = [world.sample_scene("towers", index, seed) for index in range(pictures)]
    held_out = [world.sample_scene("validation", index, seed) for index in range(1000)]
    steps = max(2, round(STEPS[name] * effort))
    with temporary_folder(folder) as temporary:
        unfinished = temporary / name
        if name == "language_model":
            model = demo_language_model(tokenizer)
            texts = TextScenes(scenes, tokenizer, world.object_words)
            networks.train_language_model(model, texts, world.lesson, world.facts, steps, seed, facts_first=0.15)
            networks.save_tower(model, with_short_template(tokenizer), unfinished)
            scores = language_model_scores(
                model, TextScenes(held_out, tokenizer, world.object_words), world.FAMILIES, world.ask
            )
        elif name == "clip":
            pixels = pictures_of("towers", scenes, seed, 64)
            clip = networks.train_clip(pixels, scenes, tokenizer, steps, seed)
            clip = networks.train_clip(
                pixels, scenes, tokenizer, max(2, steps // 3), seed, tower=clip, keep_places=True
            )
            networks.save_tower(
                clip,
                networks.image_processor_of(CLIPImageProcessor, 64, CLIP_MEAN, CLIP_STD),
                unfinished,
            )
            features = scene_labels.student_features(clip, pictures_of("validation", held_out, seed, 64))
            scores = scene_labels.probe_scores(features, world.labels(held_out), trained=700)
        else:
            size, _, _, mean, std = TEACHERS[name]
            model, scores = train_teacher(name, pictures_of("towers", scenes, seed, size), world.labels(scenes), steps)
            networks.save_tower(model, networks.image_processor_of(ViTImageProcessor, size, mean, std), unfinished)
        rounded = {kind: round(value, 4) for kind, value in scores.items()}
        save_json(rounded | {"seconds": time.time() - started}, unfinished / "scores.json")
        shutil.move(unfinished, folder)


def demo_language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """
    The demo's language model, with this world's words appended to its vocabulary.

    Raises:
        ValueError: if a word of the demo has another id in `tokenizer`.
    """
    demo = LlamaForCausalLM.from_pretrained(DEMO_LANGUAGE_MODEL)
    known = PreTrainedTokenizerFast.from_pretrained(DEMO_LANGUAGE_MODEL).get_vocab()
    if moved := [word for word, index in known.items() if tokenizer.get_vocab().get(word) != index]:
        raise ValueError(
            f"The words {moved} of {DEMO_LANGUAGE_MODEL} have another id in the new tokenizer. Build it with the "
            "demo's words first, in the same order."
        )
    model = networks.small_llama(tokenizer)
    weights = model.state_dict()
    for name, value in demo.state_dict().items():
        weights[name][: len(value)] = value
    model.load_state_dict(weights)
    model.config.initializer_range = networks.PROJECTOR_RANGE
    return model


def pictures_of(split: str, scenes: list[Scene], seed: int, size: int) -> Tensor:
    """Pictures of the scenes of a split, uint8 `(num_scenes, 3, size, size)`."""
    drawn = (render(scene, world.generator(split, index, seed, "image")) for index, scene in enumerate(scenes))
    return scene_labels.resized(list(drawn), size)


def train_teacher(
    name: str, pixels: Tensor, truth: Mapping[str, Tensor], steps: int, batch_size: int = 32
) -> tuple[nn.Module, dict[str, float]]:
    """
    Dense training on uint8 pixels: each token predicts what its cell holds.

    Returns:
        The network without its heads, and its accuracies on the last tenth of the pictures.
    """
    _, side, kinds, mean, std = TEACHERS[name]
    model = networks.small_vit() if name == "detector" else networks.small_resnet()
    # Class 0 is nothing
    targets = {kind: scene_labels.labels_per_token(truth[kind] + 1, side) for kind in kinds}
    heads = nn.ModuleDict({kind: nn.Linear(96, int(targets[kind].max()) + 1) for kind in kinds})
    count = len(pixels) * 9 // 10

    def predict(rows: Tensor | slice) -> dict[str, Tensor]:
        tokens = model(scene_labels.normalized(pixels[rows], mean, std)).last_hidden_state
        tokens = tokens[:, 1:] if tokens.dim() == 3 else tokens.flatten(2).transpose(1, 2)
        return {kind: head(tokens).float() for kind, head in heads.items()}

    def loss() -> Tensor:
        rows = torch.randint(count, (batch_size,))
        losses = []
        for kind, logits in predict(rows).items():
            weight = torch.ones(logits.shape[-1])
            weight[0] = NOTHING_WEIGHT
            losses.append(cross_entropy(logits.flatten(0, 1), targets[kind][rows].flatten(), weight=weight))
        return torch.stack(losses).sum()

    networks.fit(name, [model, heads], loss, steps, 1e-3 if name == "detector" else 2e-3)
    model.eval()
    with torch.no_grad():
        logits = predict(slice(count, None))
    right = {kind: logits[kind].argmax(-1) == targets[kind][count:] for kind in kinds}
    return model, {kind: right[kind][targets[kind][count:] > 0].float().mean().item() for kind in kinds}
