"""Names and batches of the authors' code as ours takes them."""

from typing import Any

import torch
from torch import nn

from modeling_movekd import MoveKDConfig


IMAGE_POSITION = -200
NAMES = {"CLIP": "clip", "SAM": "sam", "EVA": "eva02", "Pix2Struct": "pix2struct", "ConvNeXt": "convnext"}


def expand(input_ids: torch.Tensor, config: MoveKDConfig) -> torch.Tensor:
    """One row of the authors' ids with as many image tokens as there are features in place of each image."""
    parts = [
        torch.full((config.image_seq_length,), config.image_token_index) if token == IMAGE_POSITION else token[None]
        for token in input_ids.flatten()
    ]
    return torch.cat(parts)[None]


def model_inputs(
    batch: dict[str, torch.Tensor], config: MoveKDConfig, mask: torch.Tensor, labels: torch.Tensor
) -> tuple[dict[str, Any], list[int]]:
    """A batch of the authors' as our collator would give it, images of text-only rows last, and the images' order."""
    rows = []
    for ids, given in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        rows.append(expand(ids[given], config)[0])
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=config.text_config.pad_token_id)
    assert torch.equal(torch.tensor([len(row) for row in rows]), mask.sum(dim=1))
    has_image = (batch["input_ids"] == IMAGE_POSITION).any(dim=1)
    order = sorted(range(len(rows)), key=lambda row: not has_image[row])
    return {
        "input_ids": input_ids,
        "attention_mask": mask.long(),
        "labels": labels,
        "pixel_values": batch["pixel_values"][order],
        "num_blank_images": int((~has_image).sum()),
    }, order
