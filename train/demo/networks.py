"""Trains the four small networks the demo starts from, all on scenes of the split `towers`.

    python -m train.demo.networks --output_dir train/demo/weights

- `clip`: the student's starting point, a CLIP vision tower (64 px, 4 x 4 patches) trained against captions, which say
  nothing about the digits;
- `detector`: a teacher that knows objects, a vision transformer (96 px, 8 x 8 tokens) trained on dense labels;
- `reader`: a teacher that knows digits, a convolutional network (128 px, 16 x 16 tokens) trained on dense labels;
- `language_model`: a Llama of four layers that has learnt to answer questions about scenes told in words: in place
  of an image it is given, for each of the 16 cells, the sum of the embeddings of the words that describe it.

Each is an ordinary folder of `save_pretrained`. `scores.json` says how well each one does on scenes it has not seen.
"""

import json
import multiprocessing
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import trange
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    ViTImageProcessor,
    get_cosine_schedule_with_warmup,
)

from train.demo.scene_labels import (
    COLOUR_CLASSES,
    NO_DIGIT,
    SHAPE_CLASSES,
    Labels,
    accuracy_where,
    cell_labels,
    labels_per_token,
    normalized,
    probe_scores,
    resized,
    student_features,
)
from train.demo.scenes import CAPTION_REQUEST, COLUMNS, ROWS, Scene, caption, sample_scene, scene_image
from train.demo.text_scenes import (
    TextScenes,
    build_tokenizer,
    facts,
    language_model_scores,
    lesson,
    with_short_template,
)
from train.teachers.preprocessing import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD


HALF = (0.5, 0.5, 0.5)

# Training steps, the longest training first.
STEPS = {"language_model": 2400, "clip": 700, "detector": 900, "reader": 300}
# The libraries' 0.02 is meant for networks ten times as wide.
INITIALIZER_RANGE = 0.08
# A finished language model's configuration initialises the projector: its tokens should come out as large as the
# embeddings of words, and with 0.08 they are eight times as large here.
PROJECTOR_RANGE = 0.02


@dataclass
class TowersArguments:
    output_dir: str = field(default="train/demo/weights", metadata={"help": "Where the four folders are written."})
    seed: int = field(default=0, metadata={"help": "Seed of the scenes and of the weights."})
    pictures: int = field(default=8000, metadata={"help": "Number of scenes to train on."})
    effort: float = field(default=1.0, metadata={"help": "Scales the number of training steps of every network."})
    workers: int = field(default=2, metadata={"help": "How many networks are trained at a time, on one core each."})


def fit(name: str, modules: Iterable[nn.Module], loss: Callable[[], Tensor], steps: int, learning_rate: float) -> None:
    """Minimises `loss` with AdamW, a linear warm-up over a twentieth of the steps and a cosine decay.

    Raises:
        ValueError: if the loss stops being finite.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    scheduler = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    bar = trange(steps, desc=name)
    for step in bar:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss()
        if not torch.isfinite(value):
            raise ValueError(f"the loss of {name} is {value.item()} at step {step}; lower its learning rate")
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.3f}")


def partial_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that leaves things out: colours and places alone would tell scenes apart, and a tower trained on whole
    captions would not look at shapes."""
    parts = []
    for i in rng.permutation(len(scene.objects)):
        item = scene.objects[i]
        colour, place = rng.random(2) < (0.3, 0.15)
        name = f"a {item.name}" if colour else f"a {item.shape}"
        parts.append(f"{name} at {COLUMNS[item.column]} {ROWS[item.row]}" if place else name)
    return ", ".join(parts)


def train_clip(
    pixels: Tensor,
    scenes: list[Scene],
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    seed: int,
    batch_size: int = 192,
    tower: CLIPVisionModel | None = None,
    keep_places: bool = False,
) -> CLIPVisionModel:
    """
    Trains a small CLIP on pictures (uint8 [n, 3, 64, 64]) and captions, by contrast; returns its vision tower.

    Args:
        tower: To start from.
        keep_places: Have each token that a projector would get tell, besides, which of the 16 cells it stands for.
            Contrast alone makes networks this small forget it, which large ones do not.
    """
    width = {"hidden_size": 128, "num_attention_heads": 4, "hidden_act": "quick_gelu"}
    config = CLIPConfig(
        vision_config={**width, "intermediate_size": 384, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16},
        text_config={
            **width,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=128,
    )
    model = CLIPModel._from_config(config, attn_implementation="eager")
    if tower is not None:
        model.vision_model.load_state_dict(tower.state_dict())
    rng = np.random.default_rng([seed, 0])
    side = config.vision_config.image_size // config.vision_config.patch_size
    place = nn.Linear(config.vision_config.hidden_size, side**2)

    def loss() -> Tensor:
        rows = rng.integers(len(scenes), size=batch_size)
        text = tokenizer(
            [partial_caption(scenes[row], rng) + "</s>" for row in rows], padding=True, return_tensors="pt"
        )
        pixel_values = normalized(pixels[rows], CLIP_MEAN, CLIP_STD)
        outputs = model(pixel_values=pixel_values, **text, return_loss=True, output_hidden_states=keep_places)
        if not keep_places:
            return outputs.loss
        logits = place(outputs.vision_model_output.hidden_states[-2][:, 1:]).float()
        return outputs.loss + cross_entropy(logits.flatten(0, 1), torch.arange(side**2).repeat(batch_size))

    fit("clip", [model, place] if keep_places else [model], loss, steps, 1e-3)
    # Through a state dict, so that the folder is one of CLIPVisionModel and nothing else.
    tower = CLIPVisionModel(config.vision_config)
    tower.load_state_dict(model.vision_model.state_dict())
    return tower.eval()


def small_vit() -> Dinov2Model:
    """An untrained vision transformer of three layers: 96 px, 8 x 8 tokens of width 96."""
    config = Dinov2Config(
        hidden_size=96,
        mlp_ratio=4,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=96,
        patch_size=12,
        initializer_range=INITIALIZER_RANGE,
    )
    return Dinov2Model._from_config(config, attn_implementation="eager")


def small_resnet() -> ResNetModel:
    """An untrained convolutional network: 128 px, 16 x 16 tokens of width 96."""
    return ResNetModel(ResNetConfig(embedding_size=32, hidden_sizes=[32, 96], depths=[1, 1], layer_type="basic"))


def train_detector(
    pixels: Tensor, labels: Labels, steps: int, batch_size: int = 48
) -> tuple[Dinov2Model, dict[str, float]]:
    """Dense training on pictures (uint8 [n, 3, 96, 96]): what each of the 8 x 8 tokens belongs to, its colour, and
    where its centre lies. Returns the network without its heads, and its scores on the last tenth of the pictures."""
    side = 8
    model = small_vit()
    heads = nn.Linear(96, len(SHAPE_CLASSES) + len(COLOUR_CLASSES) + 2)
    shape, colour = labels_per_token(labels.shape, side), labels_per_token(labels.colour, side)
    middle = (torch.arange(side) + 0.5) * 16
    middle = torch.stack(torch.meshgrid(middle, middle, indexing="xy"), dim=-1).view(side * side, 2)
    offset = (labels_per_token(labels.centre, side) - middle) / 16
    count = len(pixels) * 9 // 10

    def predict(rows: Tensor | slice) -> tuple[Tensor, ...]:
        tokens = model(normalized(pixels[rows], IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state[:, 1:]
        return heads(tokens).float().split([len(SHAPE_CLASSES), len(COLOUR_CLASSES), 2], dim=-1)

    def loss() -> Tensor:
        rows = torch.randint(count, (batch_size,))
        shapes, colours, offsets = predict(rows)
        something = shape[rows] > 0
        distance = (offsets - offset[rows])[something].abs().mean()
        return (
            cross_entropy(shapes.flatten(0, 1), shape[rows].flatten())
            + cross_entropy(colours.flatten(0, 1), colour[rows].flatten())
            + distance
        )

    fit("detector", [model, heads], loss, steps, 1e-3)
    model.eval()
    with torch.no_grad():
        shapes, colours, offsets = predict(slice(count, None))
    thing = (shape[count:] > 0) & (shape[count:] < SHAPE_CLASSES.index("digit"))
    return model, {
        "shape": accuracy_where(shapes, shape[count:], thing),
        "colour": accuracy_where(colours, colour[count:], thing),
        "offset_error_pixels": 16 * (offsets - offset[count:])[thing].abs().mean().item(),
    }


def train_reader(
    pixels: Tensor, labels: Labels, steps: int, batch_size: int = 32
) -> tuple[ResNetModel, dict[str, float]]:
    """Dense training on pictures (uint8 [n, 3, 128, 128]): which digit, if any, each of the 16 x 16 tokens belongs to.
    Returns the network without its head, and its scores on the last tenth of the pictures."""
    model = small_resnet()
    head = nn.Linear(96, NO_DIGIT + 1)
    digit = labels_per_token(labels.digit, 16)
    weight = torch.tensor([1.0] * NO_DIGIT + [0.15])
    count = len(pixels) * 9 // 10

    def predict(rows: Tensor | slice) -> Tensor:
        features = model(normalized(pixels[rows], HALF, HALF)).last_hidden_state
        return head(features.flatten(2).transpose(1, 2)).float()

    def loss() -> Tensor:
        rows = torch.randint(count, (batch_size,))
        # Two cells of sixteen hold a digit: weighed up, or the network is long content with "none".
        return cross_entropy(predict(rows).flatten(0, 1), digit[rows].flatten(), weight=weight)

    fit("reader", [model, head], loss, steps, 2e-3)
    model.eval()
    with torch.no_grad():
        logits = predict(slice(count, None))
    return model, {"digit": accuracy_where(logits, digit[count:], digit[count:] < NO_DIGIT)}


def small_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of four layers."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        # Slow rotations: most of a head of 32 dimensions must match words whatever lies between them.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def train_language_model(
    model: LlamaForCausalLM,
    told: TextScenes,
    lesson: Callable[[Scene, np.random.Generator], list[tuple[str, str]]],
    facts: Callable[[Scene, np.random.Generator], str],
    steps: int,
    seed: int,
    batch_size: int = 16,
    facts_first: float = 0.25,
) -> LlamaForCausalLM:
    """
    Teaches a language model to complete facts about scenes told in words, then to answer questions and to describe.

    Args:
        lesson, facts: The questions with answers, and the facts, about a scene.
        facts_first: Share of the steps at the beginning that are mostly facts.
    """
    scenes, rng = told.scenes, np.random.default_rng([seed, 1])
    step = 0

    def loss() -> Tensor:
        nonlocal step
        step += 1
        rows = rng.integers(len(scenes), size=batch_size).tolist()
        kind = rng.random()
        if kind < (0.8 if step < steps * facts_first else 0.1):
            texts = [told.plain(facts(scenes[row], rng)) for row in rows]
        elif kind < 0.85:
            # The system prompt is always the same and half of a text's length: seen often enough in a quarter.
            texts = [told.chat(lesson(scenes[row], rng), system_prompt=step % 4 == 0) for row in rows]
        elif kind < 0.95:
            texts = [told.plain(caption(scenes[row])) for row in rows]
        else:
            texts = [told.chat([(CAPTION_REQUEST, caption(scenes[row]))]) for row in rows]
        return model(**told.batch(model.get_input_embeddings(), rows, texts, noise=0.2)).loss

    fit("language_model", [model], loss, steps, 1e-3)
    return model.eval()


def build_towers(
    output_dir: str | Path, seed: int = 0, pictures: int = 8000, effort: float = 1.0, workers: int = 2
) -> dict[str, Any]:
    """Trains all four networks and writes their folders and `scores.json` to `output_dir`, all or nothing.

    Returns:
        What `scores.json` holds: the scores of each network, seconds of training, seed, versions of the libraries.
    """
    start = time.time()
    output_dir = Path(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent) as folder:
        finished = Path(folder) / "towers"
        # Networks this small gain nothing from a second thread each, but two of them can be trained at a time.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = {name: pool.submit(_build_tower, name, finished / name, seed, pictures, effort) for name in STEPS}
            scores = {name: job.result() for name, job in jobs.items()}
        facts = {
            "scores": {name: {key: round(value, 4) for key, value in scores[name].items()} for name in sorted(scores)},
            "seconds": round(time.time() - start),
            "seed": seed,
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }
        (finished / "scores.json").write_text(json.dumps(facts, indent=2) + "\n")
        if output_dir.exists():
            shutil.move(output_dir, Path(folder) / "old")
        shutil.move(finished, output_dir)
    return facts


def _build_tower(name: str, folder: Path, seed: int, pictures: int, effort: float) -> dict[str, float]:
    """Trains and saves one network, in a process of its own and from a seed of its own; returns its scores."""
    torch.set_num_threads(1)
    transformers.set_seed(seed)
    tokenizer = build_tokenizer()
    scenes, held_out = _scenes("towers", pictures, seed), _scenes("validation", 1000, seed)
    steps = round(STEPS[name] * effort)
    if name == "language_model":
        language_model = small_llama(tokenizer)
        train_language_model(language_model, TextScenes(scenes, tokenizer), lesson, facts, steps, seed)
        language_model.config.initializer_range = PROJECTOR_RANGE
        save_tower(language_model, with_short_template(tokenizer), folder)
        return language_model_scores(language_model, TextScenes(held_out, tokenizer))
    size = {"clip": 64, "detector": 96, "reader": 128}[name]
    pixels = _pixels("towers", pictures, seed, size)
    if name == "clip":
        clip = train_clip(pixels, scenes, tokenizer, steps, seed)
        clip = train_clip(pixels, scenes, tokenizer, max(2, steps // 3), seed, tower=clip, keep_places=True)
        save_tower(clip, image_processor_of(CLIPImageProcessor, size, CLIP_MEAN, CLIP_STD), folder)
        features = student_features(clip, _pixels("validation", len(held_out), seed, size))
        return probe_scores(features, cell_labels(held_out).by_kind(), trained=700)
    if name == "detector":
        model, scores = train_detector(pixels, cell_labels(scenes), steps)
        save_tower(model, image_processor_of(ViTImageProcessor, size, IMAGENET_MEAN, IMAGENET_STD), folder)
        return scores
    model, scores = train_reader(pixels, cell_labels(scenes), steps)
    save_tower(model, image_processor_of(ViTImageProcessor, size, HALF, HALF), folder)
    return scores


def _scenes(split: str, size: int, seed: int) -> list[Scene]:
    return [sample_scene(split, i, seed) for i in range(size)]


def _pixels(split: str, count: int, seed: int, size: int) -> Tensor:
    return resized([scene_image(split, i, seed) for i in range(count)], size)


def save_tower(
    model: PreTrainedModel, processor: CLIPImageProcessor | ViTImageProcessor | PreTrainedTokenizerFast, folder: Path
):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def image_processor_of(kind: type, size: int, mean: tuple[float, ...], std: tuple[float, ...]):
    # Bicubic (3), as the pictures were resized in training.
    square = {"height": size, "width": size}
    options = (
        {"size": {"shortest_edge": size}, "crop_size": square} if kind is CLIPImageProcessor else {"size": square}
    )
    return kind(**options, resample=3, image_mean=list(mean), image_std=list(std))


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(TowersArguments).parse_args_into_dataclasses()
    print(json.dumps(build_towers(**vars(arguments)), indent=2))
