"""
Convert a checkpoint to a MoVE-KD checkpoint, which loads with `AutoModel`, or back to the original layout.

    python hub/convert.py SOURCE DEST                           # of the MoVE-KD authors, LLaVA or llava-hf
    python hub/convert.py STAGE_1 DEST --language-model lmsys/vicuna-7b-v1.5
    python hub/convert.py lmsys/vicuna-7b-v1.5 DEST --vision-model openai/clip-vit-large-patch14-336
    python hub/convert.py MOVEKD DEST --to original             # for the authors' code

SOURCE is a Hub id or a folder. Weights are streamed: one shard is in memory at a time. Every weight of the source is
used or listed as dropped, and every weight of the result is filled; otherwise nothing is written.
"""

import argparse
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def check_arguments(
    to: str,
    keep_all_layers: bool,
    image_aspect_ratio: str | None,
    chat_template: str,
    pad_vocabulary_to: int,
    experts: Mapping[str, Any] | None,
    **_: Any,
) -> None:
    """Refuse arguments of [`convert`] that are wrong or have no effect."""
    if to not in ("movekd", "original", "authors"):
        raise ValueError(f"`to` is {to!r}; it must be 'movekd' or 'original'.")
    if pad_vocabulary_to < 1:
        raise ValueError(f"`pad_vocabulary_to` is {pad_vocabulary_to}; it must be at least 1.")
    given = {"keep_all_layers": keep_all_layers, "image_aspect_ratio": image_aspect_ratio, "experts": experts}
    given |= {"pad_vocabulary_to": pad_vocabulary_to > 1, "chat_template": chat_template != "vicuna_v1"}
    if to != "movekd" and (unused := [name for name, value in given.items() if value]):
        raise ValueError(f"{unused} do nothing in a conversion to 'original'. Leave them out.")


def parse_arguments(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The arguments of [`convert`] from those of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Hub id or folder")
    parser.add_argument("dest", help="a new folder")
    parser.add_argument("--to", metavar="{movekd,original}", default="movekd", help="layout of the result")
    parser.add_argument("--revision", help="branch, tag or commit of SOURCE on the Hub")
    parser.add_argument("--vision-model", help="CLIP checkpoint of the tower, if the source does not name it")
    parser.add_argument("--language-model", help="language model of a stage-1 folder, if it does not name it")
    parser.add_argument(
        "--keep-all-layers", action="store_true", help="keep the layers of the tower that are not used"
    )
    parser.add_argument(
        "--image-aspect-ratio", choices=("pad", "square", "anyres"), help="by default as in the source"
    )
    parser.add_argument("--chat-template", default="vicuna_v1", help="vicuna_v1, plain, or own (the tokenizer's)")
    parser.add_argument("--pad-vocabulary-to", type=int, default=1, help="make the vocabulary a multiple of this")
    parser.add_argument("--seed", type=int, default=0, help="seed of new weights")
    experts = parser.add_argument_group("experts", "for a source without experts")
    experts.add_argument("--num-experts", type=int, help="per MLP; 0 for none")
    experts.add_argument("--lora-rank", type=int)
    experts.add_argument("--lora-alpha", type=float)
    experts.add_argument("--lora-dropout", type=float)
    experts.add_argument("--expert-bias", action=argparse.BooleanOptionalAction)
    experts.add_argument("--router-gradient", choices=("straight_through", "none"))
    experts.add_argument("--expert-init", choices=("zero", "kaiming"))
    options = vars(parser.parse_args(arguments))
    names = [action.dest for action in experts._group_actions]
    options["experts"] = {name: value for name in names if (value := options.pop(name)) is not None}
    try:
        check_arguments(**options)
    except ValueError as error:
        raise SystemExit(f"convert.py: {error}") from None
    return options


# Run as a script, Python puts hub/ first on the path, where its file names would shadow other packages. The arguments
# are parsed before the imports below, which take seconds.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    parse_arguments()

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase, ProcessorMixin, set_seed
from transformers.dynamic_module_utils import custom_object_save

from hub.convert_layouts import DISTILLER, embedding_dtype, empty_model, make_conversions, map_keys
from hub.convert_sources import (
    STAGE_1_FILES,
    Source,
    build_config,
    count_tokens,
    load_generation_config,
    load_image_processor,
    load_tokenizer,
    read_source,
)
from hub.convert_to_original import TOKENIZER_FILES, convert_to_original
from hub.files import new_folder, resolve_source
from hub.weights import MAX_SHARD_SIZE, write_weights
from modeling_movekd import MoveKDConfig
from modeling_movekd.files import CONVERSION_NAME, DISTILLER_NAME, read_json, reading, save_json
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
    Convert a checkpoint. `dest` appears when all of it is written.

    Args:
        source (`str` or `Path`): Hub id or folder.
        dest (`str` or `Path`): A new folder.
        to (`str`, *optional*, defaults to `"movekd"`): `"movekd"`, or `"original"` for the authors' code.
        revision (`str`, *optional*): Branch, tag or commit of `source` on the Hub.
        vision_model (`str`, *optional*): CLIP checkpoint of the tower (Hub id or folder), by default the one that the
            configuration names. Its weights are read only if `source` has none of its own.
        language_model (`str`, *optional*): Language model of a stage-1 folder, by default the one that the
            configuration names.
        keep_all_layers (`bool`, *optional*, defaults to `False`): Keep the layers behind the layer that feeds the
            projector. The model does not use them.
        image_aspect_ratio (`str`, *optional*): `"pad"`, `"square"` (center crop) or `"anyres"`, by default as in the
            configuration.
        chat_template (`str`, *optional*, defaults to `"vicuna_v1"`): `"vicuna_v1"`, `"plain"`, or `"own"` for the
            tokenizer's.
        pad_vocabulary_to (`int`, *optional*, defaults to 1): Make the rows of the embeddings a multiple of this.
        experts (`dict`, *optional*): Fields of [`MoveKDVisionConfig`] for a source without experts.
        seed (`int`, *optional*, defaults to 0): Seed of new weights: experts, routers, a missing projector.
        max_shard_size (`int`, *optional*, defaults to 5 GB): Bytes of a weight file at most.
    """
    if to == "authors":
        warnings.warn("`to='authors'` is deprecated, use `to='original'`.", FutureWarning, stacklevel=2)
        to = "original"
    check_arguments(to, keep_all_layers, image_aspect_ratio, chat_template, pad_vocabulary_to, experts)
    folder = resolve_source(source, revision, extra_patterns=(*STAGE_1_FILES, DISTILLER_NAME))
    if to == "original":
        return convert_to_original(folder, dest, vision_model, language_model, max_shard_size)
    with reading(folder):
        read = read_source(folder, vision_model, language_model, image_aspect_ratio, experts)
        tokenizer = load_tokenizer(read)
        num_tokens = count_tokens(read, tokenizer)
        config = build_config(read, keep_all_layers, add_image_token(tokenizer), pad_vocabulary_to)
        processor = make_processor(read, config, tokenizer, chat_template)
    origin = {
        "source": str(source),
        "revision": folder.name if folder.parent.name == "snapshots" else revision,
    }
    set_seed(seed)
    record = write_checkpoint(read, config, processor, num_tokens, origin, Path(dest), max_shard_size)
    print(summary(dest, record))
    return Path(dest)


def make_processor(
    source: Source, config: MoveKDConfig, tokenizer: PreTrainedTokenizerBase, chat_template: str
) -> ProcessorMixin:
    """The processor of the converted model, with the options of the source's image processor."""
    own_template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    template = own_template if chat_template == "own" else chat_template
    if template is None:
        raise ValueError(f"`chat_template` is 'own', but {source.tokenizer} has none. Choose 'vicuna_v1'.")
    clip = load_image_processor(source)
    processor = build_processor(config, clip, tokenizer, template)
    images = processor.image_processor
    for name in ("resample", "do_resize", "do_rescale", "rescale_factor", "do_normalize", "do_convert_rgb"):
        setattr(images, name, getattr(clip, name))
    if not source.pads:
        images.do_pad, images.do_center_crop = False, True
    return processor


def write_checkpoint(
    source: Source,
    config: MoveKDConfig,
    processor: ProcessorMixin,
    num_tokens: int,
    origin: dict[str, Any],
    dest: Path,
    max_shard_size: int,
) -> dict[str, Any]:
    """Write the converted checkpoint. Returns the content of its `conversion.json`, which begins with `origin`."""
    with reading(origin["source"]):
        model = empty_model(config)
    mapping = map_keys(source.weights, model)
    conversions, distiller, new = make_conversions(mapping, model, source.may_be_new, min_rows=num_tokens)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = embedding_dtype(mapping, model)
    config.architectures = [type(model).__name__]
    config.auto_map = dict(type(model)._auto_map)
    generation_config, dropped_generation = load_generation_config(source, config)
    record = origin | {
        "vision_model": source.vision_model,
        "language_model": source.language_model,
        "pads_images": source.pads,
        "dropped_weights": mapping.dropped,
        "dropped_config": source.dropped,
        "dropped_generation_config": dropped_generation,
        "new_weights": new,
        # For the conversion back to the original layout
        "tokenizer": {
            name: read_json(path) for name in TOKENIZER_FILES if (path := source.tokenizer / name).is_file()
        },
    }
    with new_folder(dest) as temporary:
        write_weights(conversions, temporary, max_shard_size)
        if distiller:
            tensors = {key: value for conversion in distiller for key, value in conversion.run().items()}
            tensors = {key.removeprefix(DISTILLER): value for key, value in tensors.items()}
            save_file(tensors, temporary / DISTILLER_NAME, metadata={"format": "pt"})
        generation_config.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        if (vocabulary := source.tokenizer / "tokenizer.model").is_file():
            shutil.copyfile(vocabulary, temporary / vocabulary.name)
        save_json(record, temporary / CONVERSION_NAME)
        custom_object_save(model, temporary)
        config.save_pretrained(temporary)  # last: without it nothing loads the folder
    return record


def summary(dest: str | Path, record: Mapping[str, Any]) -> str:
    """What was converted, dropped and initialized."""
    lines = [f"Wrote {dest}. Its {CONVERSION_NAME} repeats what follows."]
    reasons: dict[str, list[str]] = {}
    for key, reason in record["dropped_weights"].items():
        reasons.setdefault(reason, []).append(key)
    for reason, keys in reasons.items():
        lines.append(f"Dropped {len(keys)} weights, {reason}: {keys[0]} ...")
    if not record["pads_images"]:
        lines.append("Images are center-cropped, as in training. `--image-aspect-ratio pad` pads them instead.")
    if record["new_weights"]:
        lines.append(f"Initialized {len(record['new_weights'])} new weights: {record['new_weights'][0]} ...")
    for name in ("dropped_config", "dropped_generation_config"):
        if record[name]:
            lines.append(f"Fields of the configuration that are not used: {record[name]}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    try:
        convert(**options)
    except (ValueError, ImportError, OSError) as error:  # OSError: the Hub's errors among them
        raise SystemExit(f"convert.py: {error}") from error


if __name__ == "__main__":
    main()
