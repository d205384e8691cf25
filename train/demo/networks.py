"""
Trains the four small networks that the demo starts from, on scenes of the split `towers`.

    accelerate launch train/sft.py --rebuild_towers

- `clip`: the student's CLIP vision tower (64 px, 4 x 4 patches), trained on captions that never name the digits;
- `detector`: a teacher for objects, a vision transformer (96 px, 8 x 8 tokens) trained on dense labels;
- `reader`: a teacher for digits, a convolutional network (128 px, 16 x 16 tokens) trained on dense labels;
- `language_model`: a Llama of four layers that answers questions about scenes described in words. In place of an
  image it gets, for each of the 16 cells, the sum of the embeddings of the words that describe the cell.

Each is a folder written by `save_pretrained`. `scores.json` has the scores of each network on unseen scenes.
"""

import multiprocessing
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
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
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    ViTImageProcessor,
    get_cosine_schedule_with_warmup,
)

from modeling_movekd.files import save_json, temporary_folder
from train.demo.scene_labels import (
    COLOR_CLASSES,
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

# Training steps, longest training first
SEED = 0
STEPS = {"language_model": 2400, "clip": 700, "detector": 900, "reader": 300}
# The usual 0.02 is for networks ten times as wide
INITIALIZER_RANGE = 0.08
# Saved in the language model's configuration, which initializes the projector. With 0.08 the projected tokens would be
# eight times as large as the embeddings of words
PROJECTOR_RANGE = 0.02


def fit(name: str, modules: Iterable[nn.Module], loss: Callable[[], Tensor], steps: int, learning_rate: float) -> None:
    """Minimize `loss` with AdamW, a warm-up over a twentieth of the steps and a cosine decay."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    scheduler = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    # Elsewhere bfloat16 is emulated: on a processor with AVX2, CLIP's step took seven times as long
    fast_bfloat16 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    bar = trange(steps, desc=name)
    for step in bar:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_bfloat16):
            value = loss()
        if not torch.isfinite(value):
            raise ValueError(f"The loss of {name} is {value.item()} at step {step}. Lower its learning rate.")
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.3f}")


def partial_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption with omissions: whole captions tell scenes apart without shapes, so the tower would ignore them."""
    parts = []
    for i in rng.permutation(len(scene.objects)):
        item = scene.objects[i]
        color, place = rng.random(2) < (0.3, 0.15)
        name = f"a {item.name}" if color else f"a {item.shape}"
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
    Train a small CLIP by contrast, and return its vision tower.

    Args:
        pixels (`Tensor`): uint8 pictures of shape `(num_scenes, 3, 64, 64)`.
        scenes (`list[Scene]`): The scenes, which captions are made of.
        tower (`CLIPVisionModel`, *optional*): Initial vision tower.
        keep_places (`bool`, defaults to `False`): Also train the tokens that a projector reads to tell their own cell.
            Contrast alone makes networks this small forget the cell; large ones keep it.
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
    """
    Train on pictures, uint8 `(num_scenes, 3, 96, 96)`, to tell for each of the 8 x 8 tokens its shape, its color and
    the offset to the center of its object.

    Returns:
        The network without its heads, and its scores on the last tenth of the pictures.
    """
    side = 8
    model = small_vit()
    heads = nn.Linear(96, len(SHAPE_CLASSES) + len(COLOR_CLASSES) + 2)
    shape, color = labels_per_token(labels.shape, side), labels_per_token(labels.color, side)
    middle = (torch.arange(side) + 0.5) * 16
    middle = torch.stack(torch.meshgrid(middle, middle, indexing="xy"), dim=-1).view(side * side, 2)
    offset = (labels_per_token(labels.center, side) - middle) / 16
    count = len(pixels) * 9 // 10

    def predict(rows: Tensor | slice) -> tuple[Tensor, ...]:
        tokens = model(normalized(pixels[rows], IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state[:, 1:]
        return heads(tokens).float().split([len(SHAPE_CLASSES), len(COLOR_CLASSES), 2], dim=-1)

    def loss() -> Tensor:
        rows = torch.randint(count, (batch_size,))
        shapes, colors, offsets = predict(rows)
        something = shape[rows] > 0
        distance = (offsets - offset[rows])[something].abs().mean()
        return (
            cross_entropy(shapes.flatten(0, 1), shape[rows].flatten())
            + cross_entropy(colors.flatten(0, 1), color[rows].flatten())
            + distance
        )

    fit("detector", [model, heads], loss, steps, 1e-3)
    model.eval()
    with torch.no_grad():
        shapes, colors, offsets = predict(slice(count, None))
    thing = (shape[count:] > 0) & (shape[count:] < SHAPE_CLASSES.index("digit"))
    return model, {
        "shape": accuracy_where(shapes, shape[count:], thing),
        "colour": accuracy_where(colors, color[count:], thing),
        "offset_error_pixels": 16 * (offsets - offset[count:])[thing].abs().mean().item(),
    }


def train_reader(
    pixels: Tensor, labels: Labels, steps: int, batch_size: int = 32
) -> tuple[ResNetModel, dict[str, float]]:
    """
    Train on pictures, uint8 `(num_scenes, 3, 128, 128)`, to tell for each of the 16 x 16 tokens its digit, if any.

    Returns:
        The network without its head, and its score on the last tenth of the pictures.
    """
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
        # Two of sixteen cells hold a digit. Without weights the network answers "none" for long
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
        # Slow rotations, so that most of the 32 dimensions of a head match words at any distance
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
    Train a language model on scenes described in words: first to complete facts, then to answer and to describe.

    Args:
        lesson (`Callable`): Questions and answers about a scene.
        facts (`Callable`): Facts about a scene.
        facts_first (`float`, defaults to 0.25): Share of the steps at the beginning that are mostly facts.
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
            # The system prompt never changes and is half of the text, so a quarter of the steps is enough
            texts = [told.chat(lesson(scenes[row], rng), system_prompt=step % 4 == 0) for row in rows]
        elif kind < 0.95:
            texts = [told.plain(caption(scenes[row])) for row in rows]
        else:
            texts = [told.chat([(CAPTION_REQUEST, caption(scenes[row]))]) for row in rows]
        return model(**told.batch(model.get_input_embeddings(), rows, texts, noise=0.2)).loss

    fit("language_model", [model], loss, steps, 1e-3)
    return model.eval()


def build_towers(output_dir: str | Path) -> dict[str, Any]:
    """
    Train all four networks, and replace the folder `output_dir` when all are finished.

    Returns:
        The content of `scores.json`.
    """
    start = time.time()
    output_dir = Path(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(output_dir) as folder:
        finished = folder / "towers"
        # Networks this small gain nothing from a second thread, but two can be trained at a time
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = {name: pool.submit(build_tower, name, finished / name, steps) for name, steps in STEPS.items()}
            scores = {name: job.result() for name, job in jobs.items()}
        content = {
            "scores": {name: {key: round(value, 4) for key, value in scores[name].items()} for name in sorted(scores)},
            "seconds": round(time.time() - start),
            "seed": SEED,
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }
        save_json(content, finished / "scores.json")
        if output_dir.exists():
            shutil.move(output_dir, Path(folder) / "old")
        shutil.move(finished, output_dir)
    return content


def build_tower(name: str, folder: Path, steps: int, pictures: int = 8000) -> dict[str, float]:
    """Train and save one network, in a process of its own; returns its scores."""
    torch.set_num_threads(1)
    transformers.set_seed(SEED)
    tokenizer = build_tokenizer()
    scenes, held_out = _scenes("towers", pictures), _scenes("validation", 1000)
    if name == "language_model":
        language_model = small_llama(tokenizer)
        train_language_model(language_model, TextScenes(scenes, tokenizer), lesson, facts, steps, SEED)
        language_model.config.initializer_range = PROJECTOR_RANGE
        save_tower(language_model, with_short_template(tokenizer), folder)
        return language_model_scores(language_model, TextScenes(held_out, tokenizer))
    size = {"clip": 64, "detector": 96, "reader": 128}[name]
    pixels = _pixels("towers", pictures, size)
    if name == "clip":
        clip = train_clip(pixels, scenes, tokenizer, steps, SEED)
        clip = train_clip(pixels, scenes, tokenizer, max(2, steps // 3), SEED, tower=clip, keep_places=True)
        save_tower(clip, image_processor_of(CLIPImageProcessor, size, CLIP_MEAN, CLIP_STD), folder)
        features = student_features(clip, _pixels("validation", len(held_out), size))
        return probe_scores(features, cell_labels(held_out).by_kind(), trained=700)
    if name == "detector":
        model, scores = train_detector(pixels, cell_labels(scenes), steps)
        save_tower(model, image_processor_of(ViTImageProcessor, size, IMAGENET_MEAN, IMAGENET_STD), folder)
        return scores
    model, scores = train_reader(pixels, cell_labels(scenes), steps)
    save_tower(model, image_processor_of(ViTImageProcessor, size, HALF, HALF), folder)
    return scores


def _scenes(split: str, size: int) -> list[Scene]:
    return [sample_scene(split, i, SEED) for i in range(size)]


def _pixels(split: str, count: int, size: int) -> Tensor:
    return resized([scene_image(split, i, SEED) for i in range(count)], size)


def save_tower(
    model: PreTrainedModel, processor: CLIPImageProcessor | ViTImageProcessor | PreTrainedTokenizerFast, folder: Path
):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def image_processor_of(kind: type, size: int, mean: tuple[float, ...], std: tuple[float, ...]):
    # Bicubic (3), as in training
    square = {"height": size, "width": size}
    options = (
        {"size": {"shortest_edge": size}, "crop_size": square} if kind is CLIPImageProcessor else {"size": square}
    )
    return kind(**options, resample=3, image_mean=list(mean), image_std=list(std))
