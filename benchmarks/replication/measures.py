"""What is measured of a trained student besides its answers: probes, alignment to the teachers, drift, expert use."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.replication.side_by_side import SideBySideEncoders
from benchmarks.replication.towers import pictures_of
from benchmarks.replication.world import labels, sample_scene
from modeling_movekd import MoveKDVisionModel
from train.config import save_json
from train.demo.scene_labels import normalized, probe_scores, resized
from train.demo.scenes import GRID, IMAGE_SIZE, SHAPES
from train.distillation.heads import resample_grid
from train.teachers.config import TeacherConfig
from train.teachers.loaders import load_teacher
from train.teachers.preprocessing import CLIP_MEAN, CLIP_STD


SCENES, PROBE = "measures.safetensors", "probe_at_start.json"
USED_LAYERS = 3  # of the four of CLIP here: LLaVA reads the hidden state before the last
FITTED, MEASURED = 700, 300  # scenes that fit a probe, and scenes that measure it
KINDS = ("nothing", "digit", *SHAPES)


def token_kinds(truth: Mapping[str, Tensor]) -> Tensor:
    """What each cell holds, as an index of `KINDS`, [n, 16]."""
    kinds = torch.where(truth["digit"] >= 0, 1, 0)
    return torch.where(truth["shape"] >= 0, truth["shape"] + 2, kinds)


@torch.no_grad()
def prepare_measures(folder: Path, teachers: Mapping[str, str]) -> None:
    """
    Write what every run is measured on, once: scenes of the split `validation` as pixels and labels, the features of
    each teacher on the student's grid, and the probe of the CLIP that students start from.

    Args:
        teachers: Folders by name; `clip` is the student's start.
    """
    if (folder / PROBE).is_file():
        return
    scenes = [sample_scene("validation", index) for index in range(FITTED + MEASURED)]
    truth, pictures = labels(scenes), pictures_of("validation", scenes, 0, IMAGE_SIZE)
    found = {"pictures": pictures, **{f"labels/{kind}": target for kind, target in truth.items()}}
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures[FITTED:]]
    for name, source in teachers.items():
        teacher = load_teacher(TeacherConfig(name=name, model=source))
        features = teacher(teacher.preprocessor(images))
        found[f"teachers/{name}"] = resample_grid(features.tokens.float(), features.grid, (GRID, GRID)).contiguous()
    save_file(found, folder / SCENES)
    start = MoveKDVisionModel.from_clip(teachers["clip"], num_experts=0)
    save_json(probe_scores(tower_tokens(start, student_pixels(pictures)), truth, FITTED), folder / PROBE)


@torch.no_grad()
def encoder_measures(encoder: MoveKDVisionModel | SideBySideEncoders, clip: str, folder: Path) -> dict[str, Any]:
    """
    Measures of the tokens that the projector gets.

    Args:
        encoder: The student's tower, or the encoders that are kept.
        clip: Folder of the CLIP that the student started from.
        folder: Where [`prepare_measures`] wrote.

    Returns:
        `probe` by kind of label, and `probe_at_start`; `cka` by teacher; `drift` from CLIP, the squared distance of
        the tokens over their squared norm, 0 where CLIP is kept; `experts`, or `None` without them: `share` of the
        tokens by layer and expert, and `by_kind` of cell the same.
    """
    found = load_file(folder / SCENES)
    pictures = found.pop("pictures")
    truth = {name.removeprefix("labels/"): value for name, value in found.items() if name.startswith("labels/")}
    drift, experts = 0.0, None
    if isinstance(encoder, SideBySideEncoders):
        pixels = normalized(pictures, CLIP_MEAN, CLIP_STD)
        tokens = torch.cat([encoder(part).last_hidden_state[:, 1:] for part in pixels.split(100)])
    else:
        pixels = student_pixels(pictures)
        outputs = encoder.eval()(pixels, output_hidden_states=True, output_expert_indices=True)
        tokens = outputs.hidden_states[USED_LAYERS][:, 1:]
        start = tower_tokens(MoveKDVisionModel.from_clip(clip, num_experts=0), pixels)
        drift = ((tokens - start).square().sum() / start.square().sum()).item()
        if encoder.config.num_experts:
            indices = torch.stack(outputs.expert_indices)[:USED_LAYERS, :, 1:]
            experts = expert_use(indices, encoder.config.num_experts, token_kinds(truth))
    measured = tokens[FITTED:].flatten(0, 1)
    return {
        "probe": probe_scores(tokens, truth, FITTED),
        "probe_at_start": json.loads((folder / PROBE).read_text()),
        "cka": {
            name.removeprefix("teachers/"): linear_cka(measured, value.flatten(0, 1))
            for name, value in found.items()
            if name.startswith("teachers/")
        },
        "drift": drift,
        "experts": experts,
    }


def student_pixels(pictures: Tensor) -> Tensor:
    """uint8 [n, 3, 128, 128] as the student sees them, float32 [n, 3, 64, 64]."""
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    return normalized(resized(images, 64), CLIP_MEAN, CLIP_STD)


def tower_tokens(tower: MoveKDVisionModel, pixels: Tensor) -> Tensor:
    """The hidden state that the projector gets, without [CLS]: that of the layer before CLIP's last."""
    return tower.eval()(pixels, output_hidden_states=True).hidden_states[USED_LAYERS][:, 1:]


def expert_use(indices: Tensor, num_experts: int, kinds: Tensor) -> dict[str, Any]:
    """
    Share of the tokens that each expert takes, by layer, of all cells and of each kind of cell.

    Args:
        indices: Of the expert that each cell takes, [layers, n, 16].
        kinds: What each cell holds, [n, 16].
    """
    choices = torch.nn.functional.one_hot(indices, num_experts).float()
    return {
        "share": choices.mean(dim=(1, 2)).tolist(),
        "by_kind": {name: choices[:, kinds == index].mean(dim=1).tolist() for index, name in enumerate(KINDS)},
    }


def linear_cka(left: Tensor, right: Tensor) -> float:
    """
    Linear centred kernel alignment (arXiv 1905.00414, section 3): |Y'X|^2 / (|X'X| |Y'Y|) in Frobenius norms of the
    centred matrices, from 0 to 1.

    Args:
        left, right: [n, p] and [n, q], the same n tokens.
    """
    left, right = left - left.mean(0), right - right.mean(0)
    cross = (right.T @ left).square().sum()
    return (cross / ((left.T @ left).norm() * (right.T @ right).norm())).item()
