"""
Convert a checkpoint to a MoVE-KD checkpoint that loads with `AutoModel`, or back to the authors' layout.

    python hub/convert.py SOURCE DEST                           # the authors', LLaVA's or llava-hf's
    python hub/convert.py STAGE_1 DEST --language-model lmsys/vicuna-7b-v1.5
    python hub/convert.py lmsys/vicuna-7b-v1.5 DEST --vision-model openai/clip-vit-large-patch14-336
    python hub/convert.py OURS DEST --to authors

SOURCE is a Hub id or a folder. Weights are streamed: one shard is in memory at a time. Every weight of the source is
used or listed as dropped, and every weight of the result is filled, or nothing is written.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


# Run as a script, Python puts hub/ first on the path, where its file names would shadow other packages
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from safetensors.torch import save_file
from transformers import BaseImageProcessor, ProcessorMixin, set_seed
from transformers.dynamic_module_utils import custom_object_save

from hub.convert_layouts import DISTILLER, collect, embedding_dtype, empty_model, make_pieces
from hub.convert_sources import (
    STAGE_1_FILES,
    Source,
    build_config,
    load_generation_config,
    load_image_processor,
    load_tokenizer,
    read_source,
)
from hub.convert_to_original import TOKENIZER_FILES, convert_to_original
from hub.files import new_folder, resolve_source
from hub.weights import MAX_SHARD_SIZE, write_weights
from modeling_movekd.files import CONVERSION_NAME, DISTILLER_NAME, read_json, save_json
from modeling_movekd.processing import add_image_token, build_processor


def convert(
    source: str | Path,
    dest: str | Path,
    to: str = "movekd",
    *,
    revision: str | None = None,
    vision_model: str | None = None,
    language_model: str | None = None,
    keep_all_layers: bool = False,
    image_aspect_ratio: str | None = None,
    chat_template: str = "vicuna_v1",
    pad_vocabulary_to: int = 1,
    experts: Mapping[str, Any] | None = None,
    seed: int = 0,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> Path:
    """
    Convert a checkpoint.

    Args:
        source: Hub id or folder.
        dest: A new folder.
        to: `"movekd"`, or `"authors"` for the way back.
        revision: Of `source` on the Hub.
        vision_model: CLIP checkpoint of the tower (Hub id or folder); by default what the configuration names. Its
            weights are read only where `source` has none of its own.
        language_model: Language model of a stage-1 folder; by default what the configuration names.
        keep_all_layers: Keep the layers behind the one that feeds the projector, which the model does not use.
        image_aspect_ratio: `"pad"`, `"square"` (no padding) or `"anyres"`; by default what the configuration says.
        chat_template: `"vicuna_v1"`, `"plain"`, or `"own"` for the tokenizer's.
        pad_vocabulary_to: Rows of the embeddings are made a multiple of it.
        experts: Fields of [`MoveKDVisionConfig`] for a source without experts.
        seed: Of new weights: experts, routers, and a projector where there is none.
        max_shard_size: In bytes.

    Raises:
        ValueError: if the source is not whole, not safe to read, or holds what has no place; `dest` is then not made.
    """
    if to not in ("movekd", "authors"):
        raise ValueError(f"`to` is {to!r}; it must be 'movekd' or 'authors'.")
    if pad_vocabulary_to < 1:
        raise ValueError(f"`pad_vocabulary_to` is {pad_vocabulary_to}; give a positive number of rows.")
    given = {"keep_all_layers": keep_all_layers, "image_aspect_ratio": image_aspect_ratio, "experts": experts}
    given |= {"pad_vocabulary_to": pad_vocabulary_to > 1, "chat_template": chat_template != "vicuna_v1"}
    if to == "authors" and (ignored := [name for name, value in given.items() if value]):
        raise ValueError(f"{ignored} say how a checkpoint of ours is made; leave them out to convert to 'authors'.")
    folder = resolve_source(source, revision, extra_patterns=(*STAGE_1_FILES, DISTILLER_NAME))
    if to == "authors":
        return convert_to_original(folder, dest, vision_model, language_model, max_shard_size)

    read = read_source(folder, vision_model, language_model, image_aspect_ratio, experts)
    tokenizer = load_tokenizer(read)
    template = tokenizer.chat_template if chat_template == "own" else chat_template
    if template is None:
        raise ValueError(f"`chat_template` is 'own', but {read.tokenizer} has none; choose 'vicuna_v1'.")
    config = build_config(read, keep_all_layers, add_image_token(tokenizer), pad_vocabulary_to)
    set_seed(seed)
    model = empty_model(config)
    found = collect(read.origins, model)
    pieces, distiller, new = make_pieces(found, model, read.may_be_new)
    dtype = embedding_dtype(found, model)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    config.architectures = [type(model).__name__]
    config.auto_map = dict(type(model)._auto_map)
    processor = build_processor(config, load_image_processor(read), tokenizer, template)
    set_image_processor(processor, load_image_processor(read), read)
    generation_config, dropped_generation = load_generation_config(read, config)
    facts = {
        "source": str(source),
        "revision": folder.name if folder.parent.name == "snapshots" else revision,
        "vision_model": read.vision_model,
        "language_model": read.language_model,
        "pads_images": read.pads,
        "dropped_weights": found.dropped,
        "dropped_config": read.dropped,
        "dropped_generation_config": dropped_generation,
        "new_weights": new,
        # For the way back
        "tokenizer": {name: read_json(path) for name in TOKENIZER_FILES if (path := read.tokenizer / name).is_file()},
    }
    with new_folder(dest) as temporary:
        write_weights(pieces, temporary, max_shard_size)
        if distiller:
            tensors = {
                key.removeprefix(DISTILLER): value for piece in distiller for key, value in piece.read().items()
            }
            save_file(tensors, temporary / DISTILLER_NAME, metadata={"format": "pt"})
        generation_config.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        if (vocabulary := read.tokenizer / "tokenizer.model").is_file():
            shutil.copyfile(vocabulary, temporary / vocabulary.name)
        save_json(facts, temporary / CONVERSION_NAME)
        custom_object_save(model, temporary)
        config.save_pretrained(temporary)  # last: without it nothing loads the folder
    print(summary(dest, facts))
    return Path(dest)


def set_image_processor(processor: ProcessorMixin, clip: BaseImageProcessor, source: Source) -> None:
    """Take over what the CLIP tower's image processor says beside sizes, mean and standard deviation."""
    images = processor.image_processor
    for name in ("resample", "do_resize", "do_rescale", "rescale_factor", "do_normalize", "do_convert_rgb"):
        setattr(images, name, getattr(clip, name))
    if not source.pads:
        images.do_pad, images.do_center_crop = False, True


def summary(dest: str | Path, facts: Mapping[str, Any]) -> str:
    """What was converted, dropped and newly drawn."""
    lines = [f"Wrote {dest}. What follows is in its {CONVERSION_NAME} too."]
    reasons: dict[str, list[str]] = {}
    for key, reason in facts["dropped_weights"].items():
        reasons.setdefault(reason, []).append(key)
    for reason, keys in reasons.items():
        lines.append(f"Dropped {len(keys)} weights, {reason}: {keys[0]} ...")
    if not facts["pads_images"]:
        lines.append(
            "Images are cut to their centre, as it was trained; `--image-aspect-ratio pad` pads them instead."
        )
    if facts["new_weights"]:
        lines.append(f"New, drawn at random: {len(facts['new_weights'])} weights: {facts['new_weights'][0]} ...")
    for name in ("dropped_config", "dropped_generation_config"):
        if facts[name]:
            lines.append(f"Not used of the configuration: {facts[name]}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Hub id or folder")
    parser.add_argument("dest", help="a new folder")
    parser.add_argument("--to", choices=("movekd", "authors"), default="movekd", help="layout of the result")
    parser.add_argument("--revision", help="branch, tag or commit of SOURCE on the Hub")
    parser.add_argument("--vision-model", help="CLIP checkpoint of the tower, if not the one the source names")
    parser.add_argument("--language-model", help="language model of a stage-1 folder, if not the one it names")
    parser.add_argument("--keep-all-layers", action="store_true", help="keep the tower's layers that are not used")
    parser.add_argument("--image-aspect-ratio", choices=("pad", "square", "anyres"), help="if not as in the source")
    parser.add_argument("--chat-template", default="vicuna_v1", help="vicuna_v1, plain, or own (the tokenizer's)")
    parser.add_argument("--pad-vocabulary-to", type=int, default=1, help="make the vocabulary a multiple of this")
    parser.add_argument("--seed", type=int, default=0, help="of new weights")
    experts = parser.add_argument_group("experts", "where the source has none")
    experts.add_argument("--num-experts", type=int, help="per MLP; 0 for none")
    experts.add_argument("--lora-rank", type=int)
    experts.add_argument("--lora-alpha", type=float)
    experts.add_argument("--lora-dropout", type=float)
    experts.add_argument("--expert-bias", action=argparse.BooleanOptionalAction)
    experts.add_argument("--router-gradient", choices=("straight_through", "none"))
    experts.add_argument("--expert-init", choices=("zero", "kaiming"))
    options = vars(parser.parse_args(arguments))
    names = [action.dest for action in experts._group_actions]
    given = {name: value for name in names if (value := options.pop(name)) is not None}
    try:
        convert(**options, experts=given)
    except (ValueError, OSError) as error:  # the Hub's errors are among the latter
        raise SystemExit(f"convert.py: {error}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
