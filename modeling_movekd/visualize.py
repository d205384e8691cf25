"""
Pictures of what a student's vision tower does, as PNG files and one HTML page:

    python -m modeling_movekd.visualize CHECKPOINT photo.jpg chart.png --out pictures
    python -m modeling_movekd.visualize CHECKPOINT photo.jpg --out pictures --layer all \
        --clip openai/clip-vit-large-patch14-336 --teacher facebook/dinov2-large

For each image and layer: which expert took each patch, with shares; where [CLS] looks; the features' principal
components as colours, for the student, plain CLIP (at the same layer) and each teacher (its last layer); and how
differently each of them relates the patches to one another. Open DIR/index.html.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor

from .configuration_movekd import MoveKDConfig, MoveKDVisionConfig
from .images import decode_image, shared_crop
from .vision_encoders import OtherEncoder
from .vision_movekd import MoveKDVisionModel
from .visualization_movekd import MoveKDPictures, draw, pixels_to_image
from .visualize_page import SMALLEST_PICTURE, check_writable, write_page


CLIP_NAME = "plain CLIP"


class _TowerOfModel(MoveKDVisionModel):
    """Reads the tower alone out of a whole model's files."""

    _keys_to_ignore_on_load_unexpected = [r"^(model|lm_head)\."]


def load_tower(
    checkpoint: str | os.PathLike, revision: str | None = None, device: str | torch.device | None = None
) -> tuple[MoveKDVisionModel, BaseImageProcessor]:
    """
    The vision tower of a whole model or an encoder, in float32, and its image processor. Of a whole model's files only
    the tower's weights are read.

    Args:
        checkpoint: Hub id or folder.
        device: By default the first GPU, else the CPU.

    Raises:
        ValueError: if the checkpoint is of another kind of model, or has no image processor.
    """
    # This package's own code is used, whatever code lies in the folder
    for config_class in (MoveKDConfig, MoveKDVisionConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    source = {"revision": revision or "main", "trust_remote_code": False}
    config = AutoConfig.from_pretrained(checkpoint, **source)
    if not isinstance(config, MoveKDConfig | MoveKDVisionConfig):
        raise ValueError(
            f"{checkpoint} is a {config.model_type!r} checkpoint; 'movekd' or 'movekd_vision' is needed. To look at "
            "another encoder, give it as --teacher beside a student."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    weights = {"revision": revision or "main", "dtype": torch.float32}
    if isinstance(config, MoveKDConfig):
        tower = _TowerOfModel.from_pretrained(
            checkpoint, config=config.vision_config, key_mapping={r"^model\.vision_tower\.": ""}, **weights
        )
    else:
        tower = MoveKDVisionModel.from_pretrained(checkpoint, config=config, **weights)
    try:
        # Training resizes with PIL
        processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil", **source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint} has no image processor. Save that of the CLIP model which the student was made from into "
            f"its folder. ({error})"
        ) from error
    return tower.to(device).eval(), processor


def choose_layers(asked: Sequence[str], num_layers: int) -> list[int]:
    """
    Layers counted from 0, in the order asked for, each once.

    Args:
        asked: Numbers, from the end if negative, or `all`.

    Raises:
        ValueError: for what is no layer of the tower.
    """
    layers: list[int] = []
    for name in asked:
        if name == "all":
            layers += range(num_layers)
            continue
        try:
            layers.append(range(num_layers)[int(name)])
        except (ValueError, IndexError):
            raise ValueError(
                f"--layer {name}: the tower has {num_layers} layers; give 0 to {num_layers - 1}, -1 to {-num_layers} "
                "from the end, or all."
            ) from None
    return list(dict.fromkeys(layers))


@torch.inference_mode()
def draw_layers(
    tower: MoveKDVisionModel,
    processor: BaseImageProcessor,
    images: Sequence[Image.Image],
    layers: Sequence[int],
    clip: OtherEncoder | None = None,
    teachers: Sequence[OtherEncoder] = (),
) -> dict[int, MoveKDPictures]:
    """
    Pictures of several layers from one pass of each encoder; as `tower.visualize` draws them, but at least
    `SMALLEST_PICTURE` pixels large.

    Args:
        images: RGB; they share one basis of principal components in each layer.
        layers: Counted from 0.
        clip: Looked at in the same layer as the student.
        teachers: Looked at in their last layer.

    Raises:
        ValueError: if two encoders have the same name, or one gives no features on a square grid.
    """
    names = [teacher.name for teacher in teachers]
    if len({*names, CLIP_NAME}) <= len(names):
        raise ValueError(f"Two teachers have the same name: {names}. Rename a folder, or look at them in turn.")
    pixels = processor(images=list(images), return_tensors="pt")["pixel_values"].to(tower.device)
    if pixels.dim() == 5:  # of the tiles of anyres the first, which is the whole image
        pixels = pixels[:, 0]
    crops = [shared_crop(image, processor) for image in images]
    image = pixels_to_image(pixels, processor.image_mean, processor.image_std, SMALLEST_PICTURE)
    outputs = tower(pixels, output_hidden_states=True, output_expert_indices=True)
    of_teachers = {teacher.name: teacher.patch_tokens(crops)[0] for teacher in teachers}
    of_clip = dict(zip(layers, clip.patch_tokens(crops, layers), strict=True)) if clip is not None else {}
    pictures = {}
    for layer in layers:
        others = ({CLIP_NAME: of_clip[layer]} if of_clip else {}) | of_teachers
        attention = tower.encoder.layers[layer].cls_attention(outputs.hidden_states[layer])  # type: ignore[operator]
        pictures[layer] = draw(
            image,
            outputs.hidden_states[layer + 1][:, 1:],
            attention[:, :, 1:].float().mean(dim=1),
            outputs.expert_indices[layer][:, 1:] if outputs.expert_indices else None,
            tower.config.num_experts,
            others,
        )
    return pictures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_movekd.visualize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="Hub id or folder of a whole model or an encoder alone")
    parser.add_argument("images", nargs="+", type=Path, help="image files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for index.html and pictures")
    parser.add_argument("--layer", nargs="+", default=["-1"], metavar="N", help="layers from 0, -1 the last, or all")
    parser.add_argument("--clip", metavar="ID", help="plain CLIP beside the student: Hub id (ID@REVISION) or folder")
    parser.add_argument("--teacher", nargs="+", default=[], metavar="ID", help="other vision models, as --clip")
    parser.add_argument("--revision", help="branch, tag or commit of the checkpoint on the Hub")
    parser.add_argument("--device", help="by default the first GPU, else the CPU")
    parser.add_argument("--batch-size", type=int, default=8, help="images drawn together, which share their colours")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds something else")
    options = parser.parse_args(arguments)

    try:
        if options.batch_size < 1:
            raise ValueError(f"--batch-size is {options.batch_size}; give at least 1.")
        check_writable(options.out, options.overwrite)
        images = [decode_image(path) for path in options.images]
        tower, processor = load_tower(options.checkpoint, options.revision, options.device)
        layers = choose_layers(options.layer, tower.config.num_hidden_layers)
        clip = OtherEncoder(options.clip, tower.device) if options.clip else None
        teachers = [OtherEncoder(source, tower.device) for source in options.teacher]
        starts = range(0, len(images), options.batch_size)
        batches = (
            draw_layers(tower, processor, images[start : start + options.batch_size], layers, clip, teachers)
            for start in starts
        )
        title = Path(options.checkpoint).resolve().name if Path(options.checkpoint).is_dir() else options.checkpoint
        names = [path.name for path in options.images]
        pages = write_page(options.out, title, names, batches, options.overwrite)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(images)} images, {len(layers)} layers: open {pages}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
