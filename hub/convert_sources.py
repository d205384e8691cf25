"""The checkpoints that can be converted: their configuration, and where their files are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from hub.convert_layouts import (
    PROJECTOR,
    VISION,
    Rename,
    WeightSource,
    language_rename,
    rename_clip,
    rename_transformers,
)
from hub.convert_original_config import (
    IDENTITY_FIELDS,
    LANGUAGE_TYPES,
    config_from_original,
    dropped_fields,
    experts_from_original,
    text_config_from_original,
)
from hub.convert_original_keys import key_from_original
from hub.files import resolve_source, safe_files, weight_files
from hub.weights import WeightFiles
from modeling_movekd import MoveKDConfig
from modeling_movekd.chat_templates import IMAGE_TOKEN
from modeling_movekd.files import check_config_size, read_json


STAGE_1_FILES = ("mm_projector.bin", "mole_encoder.bin", "encoder_adapter.bin")
ASPECT_RATIOS = ("pad", "square", "anyres")
EXPERT_PARTS = ("_experts.", ".router.")
PROJECTOR_PARTS = (PROJECTOR, "model.image_newline")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
GENERATION_IDENTITY_FIELDS = ("_from_model_config", "transformers_version")


@dataclass
class Source:
    """
    A checkpoint to convert, before its weights are read.

    Args:
        settings: Fields of [`MoveKDConfig`] for a whole tower, without the sub-configurations and the image token.
            `image_aspect_ratio` can also be `"square"`, for center-cropped images.
        text_config: Configuration of the language model.
        clip_config: Configuration of the CLIP vision model, with all its layers.
        weights: Its weight files.
        vision_model: Hub id or folder of the CLIP checkpoint.
        tokenizer: Folder with the tokenizer.
        generation: Folder with the generation configuration.
        image_processor: Folder with the image processor.
        experts: Fields of [`MoveKDVisionConfig`].
        language_model: Hub id or folder of the language model, if that is another checkpoint.
        may_be_new: Parts of keys. A missing weight with one of them in its key is initialized.
        dropped: Fields of its configuration that are not used.
    """

    settings: dict[str, Any]
    text_config: PreTrainedConfig
    clip_config: CLIPVisionConfig
    weights: list[WeightSource]
    vision_model: str
    tokenizer: Path
    generation: Path
    image_processor: Path
    experts: dict[str, Any] = field(default_factory=dict)
    language_model: str | None = None
    may_be_new: tuple[str, ...] = ()
    dropped: dict[str, Any] = field(default_factory=dict)

    @property
    def pads(self) -> bool:
        return self.settings["image_aspect_ratio"] != "square"


def read_source(
    folder: Path,
    vision_model: str | None = None,
    language_model: str | None = None,
    image_aspect_ratio: str | None = None,
    experts: Mapping[str, Any] | None = None,
) -> Source:
    """Read a checkpoint without its weights. The arguments are those of [`hub.convert.convert`]."""
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type in ("movekd", "movekd_vision"):
        raise ValueError(f"{folder} is a MoVE-KD checkpoint already. `--to original` converts it back.")
    if "vision_config" in config and model_type in ("llava", "llava_next"):
        source = _from_transformers(folder, vision_model)
    elif model_type in LANGUAGE_TYPES:
        source = _from_original(folder, config, vision_model, language_model)
    else:
        source = _from_parts(folder, vision_model)
    aspect = image_aspect_ratio or source.settings["image_aspect_ratio"]
    if aspect not in ASPECT_RATIOS:
        raise ValueError(f"`image_aspect_ratio` is {aspect!r}; only {ASPECT_RATIOS} can be converted.")
    source.settings["image_aspect_ratio"] = aspect
    if not source.experts.get("num_experts"):
        source.experts |= dict(experts or {})
        source.may_be_new += EXPERT_PARTS
    elif experts:
        raise ValueError(f"The source has experts of its own, {source.experts}; {dict(experts)} cannot be set.")
    return source


def _from_original(
    folder: Path, config: dict[str, Any], vision_model: str | None, language_model: str | None
) -> Source:
    """LLaVA's own layout, the MoVE-KD authors' checkpoints included: a whole checkpoint, or the files of stage 1."""
    dropped = {name: config[name] for name in dropped_fields(config)}
    language = folder
    if paths := weight_files(folder):
        weights = [WeightSource(WeightFiles(paths), key_from_original)]
        _check_size(folder, config, weights)
        text_config = text_config_from_original(config)
    elif paths := [folder / name for name in STAGE_1_FILES if (folder / name).is_file()]:
        language = _named(folder, language_model, config.get("_name_or_path"), "--language-model", weights=True)
        weights = [
            WeightSource(_weights(language), lambda key: (key, None)),
            WeightSource(WeightFiles(paths), key_from_original),
        ]
        _check_size(folder, config, weights)
        _check_size(language, read_json(language / "config.json"), weights)
        text_config = text_config_from_original(config)
        weights[0].rename = _stage_1_rename(folder, language, text_config)
    else:
        raise ValueError(f"{folder} has neither weights (safetensors or .bin) nor any of {list(STAGE_1_FILES)}.")
    has_tower = any(
        f"{VISION}embeddings." in source.rename(key)[0] for source in weights for key in source.files.tensors
    )
    vision = _named(folder, vision_model, config.get("mm_vision_tower"), "--vision-model", weights=not has_tower)
    if not has_tower:
        weights.append(WeightSource(_weights(vision), rename_clip))
    clip_config = _clip_config(vision, weights)
    own_files = {str(path) for path in safe_files(folder)}
    return Source(
        settings=config_from_original(config, clip_config),
        text_config=text_config,
        clip_config=clip_config,
        # LLaVA's have no field `moe` and get new experts. A MoVE-KD checkpoint without experts stays without.
        experts=experts_from_original(config) if "moe" in config else {},
        weights=weights,
        vision_model=str(vision_model or config.get("mm_vision_tower")),
        tokenizer=folder if own_files & {"tokenizer.model", "tokenizer.json"} else language,
        generation=folder if "generation_config.json" in own_files else language,
        image_processor=vision,
        language_model=None if language == folder else str(language_model or config["_name_or_path"]),
        dropped=dropped,
    )


def _stage_1_rename(folder: Path, language: Path, text_config: PreTrainedConfig) -> Rename:
    """For the language model that stage 1 did not train."""
    config = AutoConfig.from_pretrained(language, trust_remote_code=False)
    if (config.model_type, config.hidden_size) != (text_config.model_type, text_config.hidden_size):
        raise ValueError(
            f"{language} is a {config.model_type} of width {config.hidden_size}, but {folder} was trained with a "
            f"{text_config.model_type} of width {text_config.hidden_size}. Give that as `--language-model`."
        )
    return language_rename(config)


def _from_transformers(folder: Path, vision_model: str | None) -> Source:
    """The layouts of `llava-hf`."""
    weights = [WeightSource(_weights(folder), rename_transformers)]
    _check_size(folder, read_json(folder / "config.json"), weights)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    vision = config.vision_config
    if vision.model_type != "clip_vision_model":
        raise ValueError(f"The vision tower of {folder} is a {vision.model_type}; only CLIP's can be converted.")
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise ValueError(f"The projector of {folder} is not two linear layers with biases and a GELU between them.")
    return Source(
        settings={
            "image_aspect_ratio": "anyres" if config.model_type == "llava_next" else "pad",
            "image_grid_pinpoints": getattr(config, "image_grid_pinpoints", None),
            "vision_feature_layer": config.vision_feature_layer,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "tie_word_embeddings": bool(config.tie_word_embeddings),
        },
        text_config=config.text_config,
        clip_config=vision,
        weights=weights,
        vision_model=vision_model or "openai/clip-vit-large-patch14-336",
        tokenizer=folder,
        generation=folder,
        image_processor=folder,
    )


def _from_parts(folder: Path, vision_model: str | None) -> Source:
    """A causal language model and a CLIP vision model, joined by a new projector."""
    files = _weights(folder)
    _check_size(folder, read_json(folder / "config.json"), [WeightSource(files, rename_clip)])
    try:
        text_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"{folder} holds a model that cannot be converted: {error}") from error
    if vision_model is None:
        raise ValueError(
            f"{folder} is a {text_config.model_type}, not a vision-language model. To join it with a CLIP vision "
            "model, give that as `--vision-model`."
        )
    vision = resolve_source(vision_model)
    weights = [WeightSource(files, language_rename(text_config)), WeightSource(_weights(vision), rename_clip)]
    return Source(
        settings={
            "image_aspect_ratio": "pad",
            "vision_feature_layer": -2,
            "tie_word_embeddings": bool(text_config.tie_word_embeddings),
        },
        text_config=text_config,
        clip_config=_clip_config(vision, weights),
        weights=weights,
        vision_model=vision_model,
        tokenizer=folder,
        generation=folder,
        image_processor=vision,
        may_be_new=PROJECTOR_PARTS,
    )


def _check_size(folder: Path, config: dict[str, Any], weights: list[WeightSource]) -> None:
    shapes = [tensor.shape for source in weights for tensor in source.files.tensors.values()]
    check_config_size(config | {"vocab_size": None}, shapes, folder)  # the rows are compared with the tokenizer too


def _clip_config(folder: Path, weights: list[WeightSource]) -> CLIPVisionConfig:
    content = read_json(folder / "config.json")
    _check_size(folder, content.get("vision_config") or content, weights)
    return CLIPVisionConfig.from_pretrained(folder)


def _weights(folder: Path) -> WeightFiles:
    if paths := weight_files(folder):
        return WeightFiles(paths)
    raise ValueError(f"{folder} has no weights (safetensors or .bin).")


def _named(folder: Path, given: str | None, configured: str | None, flag: str, weights: bool) -> Path:
    """
    The folder of another model that a checkpoint needs.

    A configuration can only name a folder inside the checkpoint's folder, or a Hub id. It may come from a stranger, so
    other folders of this machine are not read.
    """
    if given is not None:
        return resolve_source(given, weights=weights)
    if not configured:
        raise ValueError(f"The configuration of {folder} names no model for `{flag}`. Give the option.")
    if not Path(configured).is_absolute() and ".." not in Path(configured).parts and (folder / configured).is_dir():
        return folder / configured
    if Path(configured).is_absolute() or configured.startswith("."):
        raise ValueError(
            f"{folder} names {configured}, a folder outside of the checkpoint. Give the model as `{flag}`."
        )
    try:
        return resolve_source(configured, weights=weights)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} names {configured}, which cannot be loaded: {error}. Give the model as `{flag}`."
        ) from error


def build_config(source: Source, keep_all_layers: bool, image_token_id: int, pad_vocabulary_to: int) -> MoveKDConfig:
    """The configuration of the converted model. Its tower ends at the layer in use unless `keep_all_layers`."""
    settings, clip = dict(source.settings), source.clip_config
    vision = {name: value for name, value in clip.to_dict().items() if name not in {*IDENTITY_FIELDS, "dtype"}}
    vision |= source.experts
    layer, depth = settings["vision_feature_layer"], clip.num_hidden_layers
    if not isinstance(layer, int):
        raise ValueError(f"The projector reads the layers {layer}; only one layer is supported.")
    kept = layer if layer >= 0 else depth + 1 + layer
    if not 1 <= kept <= depth:
        raise ValueError(f"The projector reads layer {layer}, but the vision tower has {depth} layers.")
    if not keep_all_layers:
        vision |= {"num_hidden_layers": kept, "add_pooling_layer": False}
        settings["vision_feature_layer"] = -1
    original_vocab_size = source.text_config.vocab_size
    rows = max(original_vocab_size, image_token_id + 1)
    rows += -rows % pad_vocabulary_to
    if settings["image_aspect_ratio"] != "anyres" or not settings.get("image_grid_pinpoints"):
        # LLaVA-NeXT's grids, in pixels of this tower
        grids = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
        settings["image_grid_pinpoints"] = [[side * clip.image_size for side in grid] for grid in grids]
    if not source.pads:
        settings["image_aspect_ratio"] = "pad"  # the same model: only its image processor differs
    return MoveKDConfig(
        vision_config=vision,
        text_config=source.text_config.to_dict() | {"vocab_size": rows},
        image_token_index=image_token_id,
        image_seq_length=(clip.image_size // clip.patch_size) ** 2,
        original_vocab_size=original_vocab_size,
        **settings,
    )


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    # transformers may not know the type in the checkpoint's own configuration, so pass the language model's
    try:
        return AutoTokenizer.from_pretrained(source.tokenizer, config=source.text_config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source.tokenizer} has no tokenizer that transformers can load: {error}") from error


def count_tokens(source: Source, tokenizer: PreTrainedTokenizerBase) -> int:
    """The rows that embedding and head must have: all of the configuration's and the tokenizer's but for images'."""
    placeholders = {IMAGE_TOKEN, getattr(tokenizer, "image_token", None)}
    ids = [index for token, index in tokenizer.get_vocab().items() if token not in placeholders]
    return max([source.text_config.vocab_size - 1, *ids]) + 1


def load_image_processor(source: Source) -> CLIPImageProcessor:
    if not (source.image_processor / "preprocessor_config.json").is_file():
        raise ValueError(
            f"{source.image_processor} has no preprocessor_config.json. Give the CLIP model as `--vision-model`."
        )
    return CLIPImageProcessor.from_pretrained(source.image_processor)


def load_generation_config(source: Source, config: MoveKDConfig) -> tuple[GenerationConfig, dict[str, Any]]:
    """
    The generation options, and those that are dropped.

    `<image>` and padding rows are suppressed. Sampling options are dropped where sampling is off, because transformers
    refuses to save them.
    """
    path, fields = source.generation / "generation_config.json", {}
    if path.is_file():
        fields = {name: value for name, value in read_json(path).items() if name not in GENERATION_IDENTITY_FIELDS}
    else:
        fields = {name: getattr(source.text_config, name, None) for name in SPECIAL_TOKENS}
    dropped = {}
    if not fields.get("do_sample"):
        dropped = {name: fields.pop(name) for name in SAMPLING_FIELDS if name in fields}
    added = range(config.original_vocab_size, config.text_config.vocab_size)
    fields["suppress_tokens"] = sorted({*(fields.get("suppress_tokens") or []), config.image_token_index, *added})
    return GenerationConfig(**fields), dropped
