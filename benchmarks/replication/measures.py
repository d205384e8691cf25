"""Measures of a trained student besides its answers: probes, drift from CLIP, use of the experts."""

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
from modeling_movekd.files import read_json, save_json
from train.demo.scene_labels import normalized, probe_scores, resized
from train.demo.scenes import IMAGE_SIZE
from train.teachers.preprocessing import CLIP_MEAN, CLIP_STD


SCENES, PROBE = "measures.safetensors", "probe_at_start.json"
USED_LAYERS = 3  # of CLIP's four: LLaVA reads the hidden state before the last
FITTED, MEASURED = 700, 300  # scenes that fit a probe, and scenes that it is scored on


@torch.no_grad()
def prepare_measures(folder: Path, clip: str) -> None:
    """
    Write once what every run is measured on: scenes of the split `validation` as pixels and labels, and the scores of
    the probe of `clip`, the folder of the CLIP that students start from.
    """
    if (folder / PROBE).is_file():
        return
    scenes = [sample_scene("validation", index) for index in range(FITTED + MEASURED)]
    truth, pictures = labels(scenes), pictures_of("validation", scenes, 0, IMAGE_SIZE)
    save_file({"pictures": pictures, **{f"labels/{kind}": target for kind, target in truth.items()}}, folder / SCENES)
    start = MoveKDVisionModel.from_clip(clip, num_experts=0)
    save_json(probe_scores(tower_tokens(start, student_pixels(pictures)), truth, FITTED), folder / PROBE)


@torch.no_grad()
def encoder_measures(encoder: MoveKDVisionModel | SideBySideEncoders, clip: str, folder: Path) -> dict[str, Any]:
    """
    Measures of the tokens that the projector gets.

    Args:
        encoder (`MoveKDVisionModel` or `SideBySideEncoders`): The student's tower, or the encoders that are kept.
        clip (`str`): Folder of the CLIP that the student started from.
        folder (`Path`): Where [`prepare_measures`] wrote.

    Returns:
        `probe` and `probe_at_start` by kind of label; `drift`, the squared distance of the tokens from CLIP's over
        their squared norm (0 if CLIP is kept); `experts`, the `share` of the tokens by layer and expert, or `None`.
    """
    found = load_file(folder / SCENES)
    pictures = found["pictures"]
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
            choices = torch.nn.functional.one_hot(indices, encoder.config.num_experts).float()
            experts = {"share": choices.mean(dim=(1, 2)).tolist()}
    return {
        "probe": probe_scores(tokens, truth, FITTED),
        "probe_at_start": read_json(folder / PROBE),
        "drift": drift,
        "experts": experts,
    }


def student_pixels(pictures: Tensor) -> Tensor:
    """From uint8 `(num_pictures, 3, 128, 128)` to what the student sees, float32 `(num_pictures, 3, 64, 64)`."""
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    return normalized(resized(images, 64), CLIP_MEAN, CLIP_STD)


def tower_tokens(tower: MoveKDVisionModel, pixels: Tensor) -> Tensor:
    """The hidden state that the projector gets, without [CLS]."""
    return tower.eval()(pixels, output_hidden_states=True).hidden_states[USED_LAYERS][:, 1:]
