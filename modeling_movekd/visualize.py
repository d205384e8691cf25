"""
Draw what a student's vision tower does, as PNG files and one HTML page:

    python -m modeling_movekd.visualize CHECKPOINT photo.jpg chart.png --out pictures
    python -m modeling_movekd.visualize CHECKPOINT photo.jpg --out pictures --layer all \
        --clip openai/clip-vit-large-patch14-336 --teacher facebook/dinov2-large

For each image and layer, the page DIR/index.html shows the expert of each patch and the experts' shares, the [CLS]
attention (not of a student that started from SigLIP, which has no [CLS]), and the principal components of the features
as colors. It shows the components of plain CLIP (same layer) and of each teacher (last layer) too, and how differently
they relate the patches to one another.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .options import source


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_movekd.visualize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=source, help="Hub id or folder of a whole model or an encoder alone")
    parser.add_argument("images", nargs="+", type=Path, help="image files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for index.html and pictures")
    parser.add_argument("--layer", nargs="+", default=["-1"], metavar="N", help="layers from 0, -1 the last, or all")
    parser.add_argument(
        "--clip",
        type=source,
        metavar="ID",
        help="plain CLIP, or the student's SigLIP, to compare with: Hub id (ID@REVISION) or folder",
    )
    parser.add_argument(
        "--teacher", type=source, nargs="+", default=[], metavar="ID", help="other vision models, as --clip"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the checkpoint on the Hub")
    parser.add_argument("--device", help="defaults to the first GPU, else the CPU")
    parser.add_argument("--batch-size", type=int, default=8, help="images that are drawn together and share colors")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder with other files")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        parser.error(f"--batch-size is {options.batch_size}; give at least 1.")
    return options


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

import torch
from PIL import Image
from transformers import BaseImageProcessor

from .images import decode_image, shared_crop
from .inference import load_tower
from .vision_encoders import OtherEncoder
from .vision_movekd import MoveKDVisionModel
from .visualization_movekd import MoveKDPictures, draw, pixels_to_image
from .visualize_page import SMALLEST_PICTURE, check_writable, write_page


PLAIN_NAMES = {True: "plain CLIP", False: "plain SigLIP"}  # by `class_token`


def choose_layers(asked: Sequence[str], num_layers: int) -> list[int]:
    """Turn the values of --layer into indices from 0, in the same order and each once."""
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
    Draw several layers with one forward of each encoder. Otherwise as [`MoveKDVisionModel.visualize`], with sides of
    at least `SMALLEST_PICTURE` pixels.
    """
    names, plain = [teacher.name for teacher in teachers], PLAIN_NAMES[tower.config.class_token]
    if len({*names, plain}) <= len(names):
        raise ValueError(f"Two teachers have the same name: {names}. Rename a folder, or draw them in separate runs.")
    pixels = processor(images=list(images), return_tensors="pt")["pixel_values"].to(tower.device)
    if pixels.dim() == 5:  # the first tile of anyres is the whole image
        pixels = pixels[:, 0]
    crops = [shared_crop(image, processor) for image in images]
    image = pixels_to_image(pixels, processor.image_mean, processor.image_std, SMALLEST_PICTURE)
    outputs = tower(pixels, output_hidden_states=True, output_expert_indices=True)
    teacher_tokens = {teacher.name: teacher.patch_tokens(crops)[0] for teacher in teachers}
    clip_tokens = dict(zip(layers, clip.patch_tokens(crops, layers), strict=True)) if clip is not None else {}
    pictures, prefix = {}, tower.config.num_prefix_tokens
    for layer in layers:
        others = ({plain: clip_tokens[layer]} if clip_tokens else {}) | teacher_tokens
        attention = None
        if tower.config.class_token:
            attention = tower.encoder.layers[layer].cls_attention(  # type: ignore[operator]
                outputs.hidden_states[layer]
            )
            attention = attention[:, :, prefix:].float().mean(dim=1)
        pictures[layer] = draw(
            image,
            outputs.hidden_states[layer + 1][:, prefix:],
            attention,
            outputs.expert_indices[layer][:, prefix:] if outputs.expert_indices else None,
            tower.config.num_experts,
            others,
        )
    return pictures


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
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
