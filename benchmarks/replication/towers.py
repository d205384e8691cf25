"""
Trains the networks that the replication starts from, all on scenes of the split `towers`.

    python -m benchmarks.replication.towers --output_dir outputs/replication/towers

- `clip`: the student's starting point, a CLIP vision tower (64 px) trained against captions, which name neither
  patterns nor sizes nor digits;
- `detector`: a vision transformer (96 px, 8 x 8 tokens) with dense labels of shape, colour and size;
- `texture`: a convolutional network (128 px, 16 x 16 tokens) with dense labels of pattern;
- `reader`: another one with dense labels of digits;
- `language_model`: the demo's, which goes on to learn this world's words and questions from scenes told in words.

Each is an ordinary folder of `save_pretrained`, `scores.json` says how well it does on scenes it has not seen.
"""

import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPImageProcessor,
    HfArgumentParser,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)

from benchmarks.replication.world import (
    FAMILIES,
    WORDS,
    ask,
    facts,
    generator,
    labels,
    lesson,
    object_words,
    sample_scene,
)
from train.config import save_json
from train.demo.networks import (
    HALF,
    PROJECTOR_RANGE,
    fit,
    image_processor_of,
    save_tower,
    small_llama,
    small_resnet,
    small_vit,
    train_clip,
    train_language_model,
)
from train.demo.scene_labels import (
    labels_per_token,
    normalized,
    probe_scores,
    resized,
    student_features,
)
from train.demo.scenes import Scene, render
from train.demo.text_scenes import TextScenes, build_tokenizer, language_model_scores, with_short_template
from train.teachers.preprocessing import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD


# Training steps, the longest training first
STEPS = {"language_model": 3600, "clip": 2400, "detector": 2400, "texture": 500, "reader": 400}
DEMO_LANGUAGE_MODEL = Path("train/demo/weights/language_model")
# The teachers: pixels, side of the grid of tokens, kinds of labels, mean and standard deviation of the pixels
TEACHERS: dict[str, tuple[int, int, tuple[str, ...], tuple[float, ...], tuple[float, ...]]] = {
    "detector": (96, 8, ("shape", "colour", "size"), IMAGENET_MEAN, IMAGENET_STD),
    "texture": (128, 16, ("pattern",), HALF, HALF),
    "reader": (128, 16, ("digit",), HALF, HALF),
}
NOTHING_WEIGHT = 0.15  # most cells have nothing of a kind, which networks are long content to say


@dataclass
class TowersArguments:
    output_dir: str = field(metadata={"help": "Where the folders are written."})
    seed: int = field(default=0, metadata={"help": "Seed of the scenes and of the weights."})
    pictures: int = field(default=8000, metadata={"help": "Number of scenes to train on."})
    effort: float = field(default=1.0, metadata={"help": "Scales the number of training steps of every network."})


def build_towers(
    output_dir: str | Path, seed: int = 0, pictures: int = 8000, effort: float = 1.0, workers: int = 2
) -> dict[str, Any]:
    """Trains the networks whose folders are not in `output_dir` yet, `workers` at a time, and writes `scores.json` of
    all. A folder is there when its network is finished."""
    started, output_dir = time.time(), Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    missing = [name for name in STEPS if not (output_dir / name / "scores.json").is_file()]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(build_tower, name, output_dir / name, seed, pictures, effort) for name in missing]
        for job in jobs:
            job.result()
    scores = {name: json.loads((output_dir / name / "scores.json").read_text()) for name in STEPS}
    told = {"scores": scores, "seconds": round(time.time() - started), "seed": seed, "pictures": pictures}
    save_json(told, output_dir / "scores.json")
    return told


def build_tower(name: str, folder: Path, seed: int, pictures: int, effort: float) -> dict[str, float]:
    """Trains and saves one network, in a process of its own and from a seed of its own; returns its scores."""
    torch.set_num_threads(1)
    transformers.set_seed(seed)
    started = time.time()
    tokenizer = build_tokenizer(WORDS)
    scenes = [sample_scene("towers", index, seed) for index in range(pictures)]
    held_out = [sample_scene("validation", index, seed) for index in range(1000)]
    steps = max(2, round(STEPS[name] * effort))
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unfinished = Path(temporary) / name
        if name == "language_model":
            model = demo_language_model(tokenizer)
            told = TextScenes(scenes, tokenizer, object_words)
            train_language_model(model, told, lesson, facts, steps, seed, facts_first=0.15)
            save_tower(model, with_short_template(tokenizer), unfinished)
            scores = language_model_scores(model, TextScenes(held_out, tokenizer, object_words), FAMILIES, ask)
        elif name == "clip":
            pixels = pictures_of("towers", scenes, seed, 64)
            clip = train_clip(pixels, scenes, tokenizer, steps, seed)
            clip = train_clip(pixels, scenes, tokenizer, max(2, steps // 3), seed, tower=clip, keep_places=True)
            save_tower(clip, image_processor_of(CLIPImageProcessor, 64, CLIP_MEAN, CLIP_STD), unfinished)
            features = student_features(clip, pictures_of("validation", held_out, seed, 64))
            scores = probe_scores(features, labels(held_out), trained=700)
        else:
            size, _, _, mean, std = TEACHERS[name]
            model, scores = train_teacher(name, pictures_of("towers", scenes, seed, size), labels(scenes), steps)
            save_tower(model, image_processor_of(ViTImageProcessor, size, mean, std), unfinished)
        told_scores = {kind: round(value, 4) for kind, value in scores.items()} | {"seconds": time.time() - started}
        (unfinished / "scores.json").write_text(json.dumps(told_scores))
        shutil.move(unfinished, folder)
    return scores


def demo_language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The demo's language model with this world's words behind its own.

    Raises:
        ValueError: if the words they share do not come first, in the same order.
    """
    demo = LlamaForCausalLM.from_pretrained(DEMO_LANGUAGE_MODEL)
    known = PreTrainedTokenizerFast.from_pretrained(DEMO_LANGUAGE_MODEL).get_vocab()
    if moved := [word for word, index in known.items() if tokenizer.get_vocab().get(word) != index]:
        raise ValueError(f"The words {moved} of {DEMO_LANGUAGE_MODEL} have another place in the new tokenizer.")
    model = small_llama(tokenizer)
    weights = model.state_dict()
    for name, value in demo.state_dict().items():
        weights[name][: len(value)] = value
    model.load_state_dict(weights)
    model.config.initializer_range = PROJECTOR_RANGE
    return model


def pictures_of(split: str, scenes: list[Scene], seed: int, size: int) -> Tensor:
    """Pictures of the scenes of a split, uint8 [n, 3, size, size]."""
    drawn = (render(scene, generator(split, index, seed, "image")) for index, scene in enumerate(scenes))
    return resized(list(drawn), size)


def train_teacher(
    name: str, pixels: Tensor, truth: Mapping[str, Tensor], steps: int, batch_size: int = 32
) -> tuple[nn.Module, dict[str, float]]:
    """Dense training on uint8 pixels: each token predicts what its cell holds. Returns the network without its heads,
    and its accuracies on the last tenth of the pictures."""
    _, side, kinds, mean, std = TEACHERS[name]
    model = small_vit() if name == "detector" else small_resnet()
    # Class 0 is nothing
    targets = {kind: labels_per_token(truth[kind] + 1, side) for kind in kinds}
    heads = nn.ModuleDict({kind: nn.Linear(96, int(targets[kind].max()) + 1) for kind in kinds})
    count = len(pixels) * 9 // 10

    def predict(rows: Tensor | slice) -> dict[str, Tensor]:
        tokens = model(normalized(pixels[rows], mean, std)).last_hidden_state
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

    fit(name, [model, heads], loss, steps, 1e-3 if name == "detector" else 2e-3)
    model.eval()
    with torch.no_grad():
        logits = predict(slice(count, None))
    right = {kind: logits[kind].argmax(-1) == targets[kind][count:] for kind in kinds}
    return model, {kind: right[kind][targets[kind][count:] > 0].float().mean().item() for kind in kinds}


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(TowersArguments).parse_args_into_dataclasses()
    print(json.dumps(build_towers(**vars(arguments)), indent=2))
