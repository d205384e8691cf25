"""The forms that a checkpoint can be exported in."""

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import (
    AutoProcessor,
    BaseImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers import initialization as init

from hub.card_facts import copy_evaluation
from hub.checkpoint_parts import (
    TOWER_PREFIX,
    feature_layer,
    load_image_processor,
    load_tower,
    read_config,
    read_weights,
)
from hub.export_clip import plain_config, plain_state_dict, refuse_experts, write_clip
from hub.export_gguf import check_gguf, convert_language_model, write_language_model, write_projector
from hub.export_merged import features, merge_experts
from hub.export_onnx import GRAPHS, check_decoder, check_onnx, write_onnx, write_whole_onnx
from hub.export_options import check_options
from hub.files import new_folder, resolve_source
from hub.weights import DTYPES
from modeling_movekd import MoveKDConfig, MoveKDForConditionalGeneration, MoveKDVisionModel
from modeling_movekd.base_encoders_movekd import load_strictly
from modeling_movekd.files import CONVERSION_NAME, TRAINING_FACTS_NAME, read_json, reading, save_json
from modeling_movekd.images import decode_image
from modeling_movekd.processing import check_image_processor, update_processor
from modeling_movekd.vision_movekd import save_weight_index


IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def image_files(images: Sequence[str | Path]) -> list[Path]:
    """Files, and the images in folders, sorted by name."""
    files: list[Path] = []
    for path in map(Path, images):
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_ENDINGS)
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"There is no image or folder {path}. Check `images`.")
    if images and not files:
        raise ValueError(f"There is no image in {[*map(str, images)]}: none ends in {sorted(IMAGE_ENDINGS)}.")
    return files


def read_pixels(files: Sequence[Path], processor: BaseImageProcessor) -> list[torch.Tensor]:
    """
    Pixels of each image, `(3, image_size, image_size)`, float32. Images that cannot be used are counted and left out.

    Raises:
        ValueError: If none of the images can be used.
    """
    pixels, bad = [], []
    for file in files:
        try:
            pixels.append(processor(decode_image(file), return_tensors="pt")["pixel_values"][0])
        except ValueError as error:
            bad.append(str(error))
    if bad:
        skipped = f"{len(bad)} of {len(files)} images cannot be used: {'; '.join(bad[:5])}"
        if not pixels:
            raise ValueError(f"{skipped}. Give other images.")
        print(f"{skipped}{' ...' if len(bad) > 5 else ''}")
    return pixels


@torch.no_grad()
def make_dense(tower: MoveKDVisionModel, pixels: Sequence[torch.Tensor]) -> float | None:
    """
    Turn on `dense_routing` in place.

    Returns:
        The relative change of the features on the images (Frobenius norm), or `None` without images.
    """
    if tower.config.num_experts == 0:
        raise ValueError("The tower has no experts (`num_experts` is 0), so it has no dense form. Use `encoder`.")
    before = [features(tower, image) for image in pixels]
    tower.config.dense_routing, tower.config.balance_bias = True, False
    for layer in tower.encoder.layers:
        layer.mlp.dense_routing = True  # type: ignore[union-attr]
        layer.mlp.router.balance_bias = None  # type: ignore[union-attr]  # which only serves to choose one expert
    if not before:
        return None
    changed = torch.cat([features(tower, image) for image in pixels]).float()
    exact = torch.cat(before).float()
    return float((changed - exact).norm() / exact.norm())


def stock_config(model: MoveKDForConditionalGeneration) -> LlavaConfig | LlavaNextConfig:
    """The configuration of transformers' own LLaVA for `pad`, or LLaVA-NeXT for `anyres`."""
    config = model.config
    config_class = LlavaNextConfig if config.image_aspect_ratio == "anyres" else LlavaConfig
    names = set(config_class().to_dict()) - set(PreTrainedConfig().to_dict())
    names -= {"model_type", "vision_config", "text_config"}
    return config_class(
        **{name: getattr(config, name) for name in names},
        vision_config=plain_config(model.model.vision_tower),
        text_config=config.text_config,
    )


def stock_llava(model: MoveKDForConditionalGeneration) -> LlavaForConditionalGeneration:
    """transformers' own LLaVA with the weights of ours, which are shared. The two must give the same outputs."""
    config = model.config
    refuse_experts(config.vision_config, "llava")
    if config.tie_word_embeddings and not hasattr(model.model.language_model, "embed_tokens"):
        raise ValueError(
            f"The stock LLaVA ties its head to `embed_tokens`, which {type(model.model.language_model).__name__} has "
            "not. Choose another form than `llava`."
        )
    anyres = config.image_aspect_ratio == "anyres"
    model_class = LlavaNextForConditionalGeneration if anyres else LlavaForConditionalGeneration
    state_dict = {key: value for key, value in model.state_dict().items() if not key.startswith(TOWER_PREFIX)}
    tower = plain_state_dict(model.model.vision_tower)
    state_dict |= {TOWER_PREFIX + key: value for key, value in tower.items()}
    with init.no_init_weights():
        stock = model_class._from_config(stock_config(model), dtype=model.dtype)
    load_strictly(stock, state_dict, may_lack=lambda key: False, assign=True)
    stock.tie_weights()
    model.suppress_image_token()
    stock.generation_config = model.generation_config
    check_equal(model.eval(), stock.eval())
    return stock


@torch.no_grad()
def check_equal(model: MoveKDForConditionalGeneration, stock: LlavaForConditionalGeneration) -> None:
    size, channels = model.config.vision_config.image_size, model.config.vision_config.num_channels
    pixels = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    sizes = {}
    if model.config.image_aspect_ratio == "anyres":
        # The whole image, and the tiles of the first grid
        height, width = model.config.image_grid_pinpoints[0]
        pixels = pixels.repeat(height * width // size**2 + 1, 1, 1, 1)[None]
        sizes["image_sizes"] = torch.tensor([[height, width]])
    input_ids = torch.arange(min(4, model.config.text_config.vocab_size))[None]
    pairs = {
        "image features": [
            torch.cat(list(one.get_image_features(pixels, **sizes).pooler_output)) for one in (model, stock)
        ],
        "logits": [one(input_ids=input_ids, use_cache=False).logits for one in (model, stock)],
    }
    for name, (expected, found) in pairs.items():
        difference = (found - expected).abs().max()
        if not difference <= 16 * torch.finfo(expected.dtype).eps * expected.abs().max():
            raise ValueError(
                f"The stock {type(stock).__name__} gives other {name} than the model (they differ by up to "
                f"{float(difference):.3g}), as it builds this language model otherwise. Choose another form than "
                "`llava`."
            )


def load_whole(folder: Path, form: str, dtype: torch.dtype | None) -> MoveKDForConditionalGeneration:
    if not isinstance(read_config(folder), MoveKDConfig):
        raise ValueError(f"{folder} holds an encoder alone; the form `{form}` needs a whole model.")
    read_weights(folder).check()
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")  # transformers goes on without a file that it cannot read
    with reading(folder):
        return MoveKDForConditionalGeneration.from_pretrained(folder, dtype=dtype or "auto")


def add_older_names(dest: Path) -> None:
    """
    Write the fields of an exported model under the names that transformers 4 and what builds on it read as well.

    Without them the rotary embedding has the default base, a bfloat16 model is taken for float32, and the tokenizer
    and the processor do not load.
    """
    config = read_json(dest / "config.json")
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        if "dtype" in part:
            part["torch_dtype"] = part["dtype"]
        if rope := dict(part.get("rope_parameters") or {}):
            if local := rope.get("sliding_attention"):  # one base for each kind of layer
                part["rope_local_base_freq"] = local["rope_theta"]
                rope = dict(rope["full_attention"])
            part |= {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
            part["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    save_json(config, dest / "config.json")
    if (dest / "tokenizer.json").is_file():
        settings = read_json(dest / "tokenizer_config.json") | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],  # else transformers 4 adds BERT's token types
        }
        if isinstance(settings.get("extra_special_tokens"), list):
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        save_json(settings, dest / "tokenizer_config.json")


def load_processor(folder: Path, config: MoveKDConfig) -> ProcessorMixin:
    # Without `trust_remote_code`, transformers asks at the terminal whether to run the model's code
    with reading(folder):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    check_image_processor(processor.image_processor, config)
    return update_processor(processor)


def export_encoder(folder: Path, dest: Path, dtype: torch.dtype | None, **_: object) -> list[str]:
    tower = load_tower(folder, dtype)
    tower.save_pretrained(dest)
    return describe(tower)


def export_dense(folder: Path, dest: Path, dtype: torch.dtype | None, images: list[Path], **_: object) -> list[str]:
    tower = load_tower(folder, dtype)
    dense = tower.config.dense_routing
    pixels = read_pixels(images, load_image_processor(folder, read_config(folder)))
    difference = make_dense(tower, pixels)
    tower.save_pretrained(dest)
    if dense:
        return [*describe(tower), "The model uses dense routing already: nothing changes."]
    measured = "Give `--images` to measure the change."
    if difference is not None:
        measured = f"On {len(pixels)} images the features change by {difference:.2%}."
    return [*describe(tower), f"The model was trained with one expert per token, so its outputs change. {measured}"]


def export_clip(folder: Path, dest: Path, dtype: torch.dtype | None, **_: object) -> list[str]:
    tower = load_tower(folder, dtype)
    write_clip(tower, load_image_processor(folder, read_config(folder)), dest)
    add_older_names(dest)
    lines = describe(tower)
    if tower.post_layernorm is None:
        lines.append("The tower is cut: its final layer norm is neutral, and its pooled output has no meaning.")
    return lines


def export_llava(folder: Path, dest: Path, dtype: torch.dtype | None, **_: object) -> list[str]:
    config = read_config(folder)
    # Before any weights are read
    refuse_experts(config.vision_config if isinstance(config, MoveKDConfig) else config, "llava")
    model = load_whole(folder, "llava", dtype)
    processor = load_processor(folder, model.config)
    stock = stock_llava(model)
    # The keys of transformers 4, which transformers 5 reads too
    state_dict = {
        re.sub(rf"^{re.escape(TOWER_PREFIX)}", f"{TOWER_PREFIX}vision_model.", key): value
        for key, value in stock.state_dict().items()
    }
    stock.save_pretrained(dest, state_dict=state_dict, max_shard_size="5GB")
    save_weight_index(dest)
    processor.save_pretrained(dest)
    processor.image_processor.save_pretrained(dest)  # transformers 5 keeps it in `processor_config.json`
    add_older_names(dest)
    return [f"{type(stock).__name__}, {stock.dtype}, vision_feature_layer {stock.config.vision_feature_layer}."]


def export_gguf(folder: Path, dest: Path, dtype: torch.dtype | None, cls_last: bool, **_: object) -> list[str]:
    check_gguf(read_config(folder))
    model = load_whole(folder, "gguf", dtype)
    processor = load_processor(folder, model.config)
    write_projector(model, processor.image_processor, dest / "mmproj.gguf", cls_last)
    model.suppress_image_token()
    write_language_model(model, processor.tokenizer, dest / "language_model")
    add_older_names(dest / "language_model")
    return [
        *describe(model.model.vision_tower),
        "mmproj.gguf is for releases of llama.cpp with issue 25814: the position of [CLS] is the last one."
        if cls_last
        else "Releases of llama.cpp with issue 25814, which b11739 still has, need `--cls-last`: see docs/serving.md.",
        *convert_language_model(dest / "language_model", dest / "model.gguf", model.dtype),
    ]


def export_onnx(folder: Path, dest: Path, dtype: torch.dtype | None, images: list[Path], **_: object) -> list[str]:
    config = read_config(folder)
    whole = isinstance(config, MoveKDConfig)
    if whole and config.image_aspect_ratio == "anyres":
        raise ValueError(
            "A whole model with `anyres`, whose images have different numbers of tiles, is not exported to ONNX. "
            "Export its encoder: `--form encoder`, then `--form onnx`."
        )
    pixels = read_pixels(images, load_image_processor(folder, config))
    lines = []
    if whole:
        model = load_whole(folder, "onnx", dtype or torch.float32)
        (dest / "onnx").mkdir()
        graph, decoder = write_whole_onnx(model, dest / "onnx")
        path = dest / "onnx" / GRAPHS[0]
        difference = check_decoder(decoder, dest / "onnx")
        lines.append(f"ONNX Runtime against torch: largest relative difference of the decoder {difference:.1e}.")
        write_onnx_settings(model, load_processor(folder, config), dest)
    else:
        path = dest / "model.onnx"
        graph = write_onnx(load_tower(folder, dtype or torch.float32), path)
    report = check_onnx(graph, path, torch.stack(pixels) if pixels else None)
    rerouted = "" if whole else f"; {report['rerouted']:.3%} of the routers' decisions differ"
    return [
        *describe(graph.tower),
        *lines,
        f"ONNX Runtime against torch on {len(pixels) or 3} {'images' if pixels else 'noise images'}: largest relative "
        f"difference {report['difference']:.1e}; {report['tokens_off']:.2%} of the tokens beyond 1e-3{rerouted}.",
    ]


def write_onnx_settings(model: MoveKDForConditionalGeneration, processor: ProcessorMixin, dest: Path) -> None:
    """Write what transformers.js, and transformers' processor, read beside the graphs of a whole model."""
    config = stock_config(model)
    config.architectures, config.dtype = ["LlavaForConditionalGeneration"], model.dtype
    config.save_pretrained(dest)
    content = read_json(dest / "config.json")
    content["transformers.js_config"] = {"dtype": "fp32", "use_external_data_format": dict.fromkeys(GRAPHS, True)}
    save_json(content, dest / "config.json")
    model.suppress_image_token()
    model.generation_config.save_pretrained(dest)
    # transformers.js adds the additional tokens whatever the strategy is
    if processor.vision_feature_select_strategy == "default":
        processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    processor.save_pretrained(dest)
    # transformers pads without the crop. With it, transformers.js would crop the image and not pad it
    side = model.config.vision_config.image_size
    settings = processor.image_processor.to_dict() | {
        "do_center_crop": False,
        "size": {"shortest_edge": side, "longest_edge": side},
        "pad_size": {"height": side, "width": side},
        "processor_class": "LlavaProcessor",
    }
    save_json(settings, dest / "preprocessor_config.json")
    add_older_names(dest)
    settings = read_json(dest / "tokenizer_config.json")
    save_json(settings | {"chat_template": processor.chat_template}, dest / "tokenizer_config.json")


def export_merged(
    folder: Path, dest: Path, dtype: torch.dtype | None, images: list[Path], rank: int | None, **_: object
) -> list[str]:
    config = read_config(folder)
    if not images:
        raise ValueError("`--form merged` needs `--images`: the MLPs are fitted and measured on images.")
    pixels = read_pixels(images, load_image_processor(folder, config))
    merged, report = merge_experts(load_tower(folder), pixels, rank)
    if skipped := len(images) - len(pixels):
        report["images"]["skipped"] = skipped
    if isinstance(config, MoveKDConfig):
        model = load_whole(folder, "merged", dtype)
        model.model.vision_tower = merged.to(model.dtype)
        model.config.vision_config = merged.config
        model.save_pretrained(dest)
        load_processor(folder, config).save_pretrained(dest)
    else:
        merged.to(dtype or merged.dtype).save_pretrained(dest)
    save_json(report, dest / "merge_report.json")
    lines = ["Relative error on images that were not used for fitting:", f"{'':>10}{'merged':>10}{'dropped':>10}"]
    lines += [f"layer {row['layer']:>4}{row['merged']:>10.4f}{row['dropped']:>10.4f}" for row in report["layers"]]
    lines.append(f"{'features':>10}{report['features']['merged']:>10.4f}{report['features']['dropped']:>10.4f}")
    lines.append("Top-1 experts cannot be merged exactly. Evaluate this approximation before use.")
    return lines


def describe(tower: MoveKDVisionModel) -> list[str]:
    config = tower.config
    return [
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.num_experts} experts per "
        f"layer, {tower.dtype}; the features are hidden state {feature_layer(config)}."
    ]


EXPORTS: dict[str, Callable[..., list[str]]] = {
    "encoder": export_encoder,
    "dense": export_dense,
    "clip": export_clip,
    "llava": export_llava,
    "gguf": export_gguf,
    "onnx": export_onnx,
    "merged": export_merged,
}


def export(
    checkpoint: str | Path,
    dest: str | Path,
    form: str,
    *,
    dtype: str | None = None,
    images: Sequence[str | Path] = (),
    rank: int | None = None,
    cls_last: bool = False,
    revision: str | None = None,
) -> Path:
    """
    Write a checkpoint in another form. `hub/export.py` describes the forms. `dest` appears when all of it is written.

    Args:
        checkpoint (`str` or `Path`): Folder or Hub id of a MoVE-KD model or encoder.
        dest (`str` or `Path`): Folder that is new or empty.
        form (`str`): One of `FORMS`.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`, by default as stored (float32 for `onnx`).
        images (sequence of `str` or `Path`, *optional*): Files or folders of images. `merged` needs them; `dense` and
            `onnx` measure on them.
        rank (`int`, *optional*): For `merged`, the rank of a layer's update at most.
        cls_last (`bool`, *optional*, defaults to `False`): For `gguf`, write the positions for releases of llama.cpp
            that put [CLS] behind the patches (see `hub/export_gguf.py`).
        revision (`str`, *optional*): Branch, tag or commit of the Hub id.

    Returns:
        `dest`.
    """
    check_options(form, dtype, images, rank, cls_last)
    folder = resolve_source(checkpoint, revision)
    config = read_config(folder)
    torch_dtype = DTYPES[dtype] if dtype else None
    with new_folder(dest) as temporary:
        settings = {"images": image_files(images), "rank": rank, "cls_last": cls_last}
        lines = EXPORTS[form](folder, temporary, dtype=torch_dtype, **settings)
        whole_model = form in ("llava", "merged", "onnx", "gguf") and isinstance(config, MoveKDConfig)
        if not whole_model:
            load_image_processor(folder, config).save_pretrained(temporary)
        for name in (TRAINING_FACTS_NAME, CONVERSION_NAME):  # for the card
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        if form == "llava" and torch_dtype in (None, config.dtype):
            copy_evaluation(folder, temporary)
    print(*lines, sep="\n")
    return Path(dest)
