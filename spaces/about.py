"""The texts about the model and the machine."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from student import Student, read_text
from uploads import KEPT_SECONDS, KEPT_SIDE, MAX_FILE_MB, MAX_IMAGES, MAX_SIDE
from zero_gpu import ON_ZERO_GPU


def machine(student: Student) -> str:
    """Name the device and the dtype of the model."""
    if ON_ZERO_GPU:
        name = "ZeroGPU"
    elif student.model.device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"CPU with {torch.get_num_threads()} thread(s)"
    return f"{name}, {str(student.model.dtype).removeprefix('torch.')}"


def speed_sentence(student: Student, messages: Sequence[dict[str, Any]]) -> str:
    """Measure the speed now, with one question about one image."""
    first, rate, count = student.speed(messages)
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"**Speed, measured here at {when}:** {first:.3f} s to the first token (with the encoding of the image), then "
        f"{rate:.1f} tokens per second over {count} tokens, for one question about one image on {machine(student)}."
    )


def about(student: Student) -> str:
    """Return the text of the About tab in Markdown."""
    model, vision = student.model, student.model.config.vision_config
    text = model.config.text_config
    counted = {"all": 0, "tower": 0, "experts": 0}
    for name, parameter in model.named_parameters():
        counted["all"] += parameter.numel()
        counted["tower"] += parameter.numel() * ("vision_tower" in name)
        counted["experts"] += parameter.numel() * ("expert" in name or "router" in name)
    on_hub = not Path(student.model_id).is_dir()
    page = f"https://huggingface.co/{student.model_id}"
    card = read_text(student.model_id, student.revision, "README.md")
    license_name = (
        ModelCard(card, ignore_metadata_errors=True).data.get("license") if card else None
    ) or student.metadata.get("license")
    rows = {
        "Checkpoint": f"[{student.model_id}]({page}) at `{student.revision}`"
        if on_hub
        else f"the folder {Path(student.model_id).name}",
        "Card": f"[{page}]({page}/blob/{student.revision}/README.md)" if on_hub and card else "none",
        "License": license_name or "not stated by the checkpoint",
        "Parameters": f"{counted['all']:,}, of them {counted['tower']:,} in the vision encoder",
        "Experts": f"{vision.num_experts} in each layer, with their routers {counted['experts']:,} parameters",
        "Vision encoder": f"{vision.num_hidden_layers} layers, {vision.image_size} pixels a side, patches of "
        f"{vision.patch_size}",
        "Language model": f"{text.model_type}, {text.num_hidden_layers} layers, {student.context_length} positions",
        "Compared with": ", ".join(encoder.name for encoder in student.encoders) or "no other encoder",
        "Runs on": machine(student),
    }
    table = "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"{table}\n\n**Your data.** Images go to this server's temporary folder. They are deleted after "
        f"{KEPT_SECONDS // 60} minutes and when the app ends, and are read only for your own questions. Images and "
        "texts are not logged, shared or trained on; a conversation lives in your page. It may have "
        f"{MAX_IMAGES} images of up to {MAX_FILE_MB} MB and {MAX_SIDE} pixels a side. Sides above {KEPT_SIDE} "
        "pixels are reduced.\n\n"
        "**The method.** [MoVE-KD: Knowledge Distillation for VLMs with Mixture of Visual Encoders]"
        "(https://arxiv.org/abs/2501.01709), CVPR 2025; this is an independent implementation."
    )
