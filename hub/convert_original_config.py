"""The map between the configuration of checkpoints in LLaVA's own layout, the authors' included, and ours."""

from typing import Any

from transformers import CLIPVisionConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modeling_movekd import MoveKDConfig


# Original model type: the language model's in transformers
LANGUAGE_TYPES = {
    "move_llava_llama": "llama",
    "llava_llama": "llama",
    "llava": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
IDENTITY_FIELDS = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map")
# Fields with one value that can be mapped; any other changes the model
FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
    "mm_patch_merge_type": ("flat", "spatial_unpad"),
    "mm_resampler_type": (None,),
    "use_mm_proj": (True,),
}
# Fields that say how a run was made and change nothing in the model
TRAINING_FIELDS = (
    "freeze_mm_mlp_adapter",
    "freeze_mm_vision_resampler",
    "image_crop_resolution",
    "image_split_resolution",
    "kd",
    "mm_projector_lr",
    "mm_vision_tower_lr",
    "pretrain_mm_mlp_adapter",
    "tune_mm_mlp_adapter",
    "tune_mm_vision_resampler",
    "unfreeze_mm_vision_tower",
)
EXPERT_FIELDS = {
    "moe_encoder_num_experts": "num_experts",
    "moe_encoder_lora_rank": "lora_rank",
    "moe_encoder_lora_alpha": "lora_alpha",
    "moe_encoder_dense": "dense_routing",
}
# What the authors' code does and their configuration does not say
ORIGINAL_EXPERTS = {"expert_bias": True, "router_gradient": "none", "expert_init": "kaiming", "lora_dropout": 0.05}
# Written even where they have their default
LLAMA_FIELDS = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "pretraining_tp",
    "rms_norm_eps",
    "use_cache",
)
SELECT_STRATEGIES = {"patch": "default", "cls_patch": "full"}


def experts_from_original(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of [`MoveKDVisionConfig`] from the authors' field `moe`; `num_experts` is 0 where it is off."""
    moe = dict(config.get("moe") or {})
    if not moe.pop("moe_encoder", False):
        return {"num_experts": 0}
    missing, unknown = sorted(EXPERT_FIELDS.keys() - moe.keys()), sorted(moe.keys() - EXPERT_FIELDS.keys())
    if missing or unknown:
        raise ValueError(f"The field `moe` lacks {missing} and has {unknown}, which cannot be mapped.")
    return ORIGINAL_EXPERTS | {ours: moe[theirs] for theirs, ours in EXPERT_FIELDS.items()}


def text_config_from_original(config: dict[str, Any]) -> PreTrainedConfig:
    """The language model's configuration out of a flat one."""
    config_class = CONFIG_MAPPING[LANGUAGE_TYPES[config["model_type"]]]
    return config_class(**{name: config[name] for name in _text_fields(config)})


def _text_fields(config: dict[str, Any]) -> list[str]:
    known = set(CONFIG_MAPPING[LANGUAGE_TYPES[config["model_type"]]]().to_dict())
    known |= {"rope_theta", "rope_scaling", "torch_dtype"}
    return [name for name in config if name in known and name not in IDENTITY_FIELDS]


def dropped_fields(config: dict[str, Any]) -> list[str]:
    """
    The fields of an original configuration that nothing of ours takes up.

    Raises:
        ValueError: for a field that changes the model in a way that cannot be mapped, with its value.
    """
    if config["model_type"] not in LANGUAGE_TYPES:
        raise ValueError(f"`model_type` is {config['model_type']!r}; these are known: {sorted(LANGUAGE_TYPES)}.")
    for name, values in FIXED_FIELDS.items():
        if name in config and config[name] not in values:
            raise ValueError(f"`{name}` is {config[name]!r}; only {values} can be converted.")
    used = {
        *_text_fields(config),
        *FIXED_FIELDS,
        "model_type",
        "mm_vision_tower",
        "mm_hidden_size",
        "mm_vision_select_layer",
        "mm_vision_select_feature",
        "moe",
        "image_aspect_ratio",
        "image_grid_pinpoints",
        "tokenizer_model_max_length",
        "tokenizer_padding_side",
    }
    dropped = sorted(config.keys() - used)
    if unknown := [name for name in dropped if name.startswith("mm_") and name not in TRAINING_FIELDS]:
        raise ValueError(
            f"The configuration has {unknown}, which may change the model and are "
            "not known. Remove them if they do not."
        )
    return dropped


def config_from_original(
    config: dict[str, Any], clip_config: CLIPVisionConfig, image_aspect_ratio: str | None = None
) -> dict[str, Any]:
    """
    The fields of [`MoveKDConfig`] beside its two sub-configurations and the image token, for a whole tower.

    Raises:
        ValueError: for a value that has no counterpart; if the vision tower is not the one the projector was made for.
    """
    if config.get("mm_hidden_size", clip_config.hidden_size) != clip_config.hidden_size:
        raise ValueError(
            f"`mm_hidden_size` is {config['mm_hidden_size']}, but the vision model is {clip_config.hidden_size} wide. "
            "Name the right one by `--vision-model`."
        )
    aspect = image_aspect_ratio or config.get("image_aspect_ratio") or "square"
    feature = config.get("mm_vision_select_feature", "patch")
    choices: dict[str, tuple[Any, tuple[str, ...]]] = {
        "image_aspect_ratio": (aspect, ("pad", "square", "anyres")),
        "mm_vision_select_feature": (feature, tuple(SELECT_STRATEGIES)),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"`{name}` is {value!r}; only {allowed} can be converted.")
    settings: dict[str, Any] = {
        # `square` differs by its image processor alone, which does not pad
        "image_aspect_ratio": "anyres" if aspect == "anyres" else "pad",
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": SELECT_STRATEGIES[feature],
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    if aspect == "anyres" and config.get("image_grid_pinpoints"):
        settings["image_grid_pinpoints"] = config["image_grid_pinpoints"]
    return settings


def config_to_original(
    config: MoveKDConfig, vision_model: str, distilled: bool, vocab_size: int, pads: bool
) -> dict[str, Any]:
    """
    The authors' configuration of a model with all layers of its tower.

    Args:
        vision_model: What their `mm_vision_tower` names, the CLIP checkpoint that the tower was made from.
        distilled: Whether the checkpoint holds adapters.
        vocab_size: Rows of the embeddings without `<image>`.
        pads: Whether images are padded to squares; else they are cut to them.

    Raises:
        ValueError: for a model that their code cannot run.
    """
    vision, text = config.vision_config, config.text_config
    layer = config.vision_feature_layer
    if not vision.add_pooling_layer or layer == -1:
        raise ValueError(
            f"The vision tower has {vision.num_hidden_layers} layers and `vision_feature_layer` is {layer}: it is cut "
            "to the layers in use, and the authors' layout needs them all. Convert with `--keep-all-layers`, or train "
            "with `cut_tower: false`."
        )
    if text.model_type != "llama":
        raise ValueError(f"The language model is of type {text.model_type!r}; the authors' code runs 'llama' alone.")
    if vision.num_experts and not vision.expert_bias:
        raise ValueError("The experts have no biases; the authors' have. Train with `expert_bias: true`.")
    if config.image_aspect_ratio != "pad":
        raise ValueError(f"`image_aspect_ratio` is {config.image_aspect_ratio!r}; theirs are 'pad' or 'square'.")
    rope = dict(text.rope_parameters or {})
    theta, rope_type = rope.pop("rope_theta", 10000.0), rope.pop("rope_type", "default")
    dropped = {*IDENTITY_FIELDS, "rope_parameters", "dtype", "vocab_size", "tie_word_embeddings"}
    fields = {name: value for name, value in text.to_diff_dict().items() if name not in dropped}
    fields |= {name: getattr(text, name) for name in LLAMA_FIELDS if hasattr(text, name)}
    back = {ours: theirs for theirs, ours in SELECT_STRATEGIES.items()}
    fields |= {
        "architectures": ["MoVELlavaLlamaForCausalLM"],
        "model_type": "move_llava_llama",
        "vocab_size": vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": theta,
        "rope_scaling": None if rope_type == "default" else {"type": rope_type, **rope},
        "torch_dtype": str(config.dtype or text.dtype or "float32").removeprefix("torch."),
        "image_aspect_ratio": "pad" if pads else "square",
        "kd": {"kd_mode": distilled},
        "mm_hidden_size": vision.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": back[config.vision_feature_select_strategy],
        "mm_vision_select_layer": layer,
        "mm_vision_tower": vision_model,
        "moe": {"moe_encoder": vision.num_experts > 0}
        | {theirs: getattr(vision, ours) for theirs, ours in EXPERT_FIELDS.items()},
        "use_mm_proj": True,
    }
    return dict(sorted(fields.items()))
