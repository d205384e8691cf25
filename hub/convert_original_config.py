"""How configurations in LLaVA's own layout, the MoVE-KD authors' among them (the original layout), map to ours."""

from typing import Any

from transformers import CLIPVisionConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modeling_movekd import MoveKDConfig


# Original model type: the language model's type in transformers
LANGUAGE_TYPES = {
    "move_llava_llama": "llama",
    "llava_llama": "llama",
    "llava": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
IDENTITY_FIELDS = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map")
# Fields that change the model, and the values that our model supports
FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
    "mm_patch_merge_type": ("flat", "spatial_unpad"),
    "mm_resampler_type": (None,),
    "use_mm_proj": (True,),
}
# Fields that are mapped, beside the language model's
USED_FIELDS = {"model_type", "moe", "image_aspect_ratio", "image_grid_pinpoints", *FIXED_FIELDS}
USED_FIELDS |= {"mm_vision_tower", "mm_hidden_size", "mm_vision_select_layer", "mm_vision_select_feature"}
USED_FIELDS |= {"tokenizer_model_max_length", "tokenizer_padding_side"}
# Fields of the training run, which change nothing in the model
TRAINING_FIELDS = {"mm_projector_lr", "mm_vision_tower_lr"}
EXPERT_FIELDS = {
    "moe_encoder_num_experts": "num_experts",
    "moe_encoder_lora_rank": "lora_rank",
    "moe_encoder_lora_alpha": "lora_alpha",
    "moe_encoder_dense": "dense_routing",
}
# Fixed in the original code, and not in its configuration
ORIGINAL_EXPERTS = {"expert_bias": True, "router_gradient": "none", "expert_init": "kaiming", "lora_dropout": 0.05}
# Written even where they have transformers' default
LLAMA_FIELDS = (
    *("attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size"),
    *("initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads", "pad_token_id", "pretraining_tp", "rms_norm_eps", "use_cache"),
)
SELECT_STRATEGIES = {"patch": "default", "cls_patch": "full"}


def experts_from_original(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of [`MoveKDVisionConfig`] from the original field `moe`; `num_experts` is 0 where it is off."""
    moe = dict(config.get("moe") or {})
    if not moe.pop("moe_encoder", False):
        return {"num_experts": 0}
    if differing := sorted(EXPERT_FIELDS.keys() ^ moe.keys()):
        raise ValueError(f"The field `moe` must have {sorted(EXPERT_FIELDS)}; missing or unknown: {differing}.")
    return ORIGINAL_EXPERTS | {ours: moe[original] for original, ours in EXPERT_FIELDS.items()}


def text_config_from_original(config: dict[str, Any]) -> PreTrainedConfig:
    """The language model's configuration, from a configuration that holds all fields side by side."""
    config_class = CONFIG_MAPPING[LANGUAGE_TYPES[config["model_type"]]]
    return config_class(**{name: config[name] for name in _text_fields(config)})


def _text_fields(config: dict[str, Any]) -> list[str]:
    known = set(CONFIG_MAPPING[LANGUAGE_TYPES[config["model_type"]]]().to_dict())
    known |= {"rope_theta", "rope_scaling", "torch_dtype"}
    return [name for name in config if name in known and name not in IDENTITY_FIELDS]


def dropped_fields(config: dict[str, Any]) -> list[str]:
    """The fields that are not mapped. A field that may change the model is refused."""
    for name, values in FIXED_FIELDS.items():
        if name in config and config[name] not in values:
            raise ValueError(f"`{name}` is {config[name]!r}; only {values} can be converted.")
    dropped = sorted(config.keys() - USED_FIELDS - set(_text_fields(config)))
    if unknown := [name for name in dropped if name.startswith("mm_") and name not in TRAINING_FIELDS]:
        raise ValueError(
            f"The configuration has the unknown fields {unknown}, which may change the model. Remove them if they do "
            "not."
        )
    return dropped


def config_from_original(config: dict[str, Any], clip_config: CLIPVisionConfig) -> dict[str, Any]:
    """The fields of [`MoveKDConfig`] for a whole tower, without the sub-configurations and the image token."""
    if config.get("mm_hidden_size", clip_config.hidden_size) != clip_config.hidden_size:
        raise ValueError(
            f"`mm_hidden_size` is {config['mm_hidden_size']}, but the vision model's width is "
            f"{clip_config.hidden_size}. Give the right one as `--vision-model`."
        )
    feature = config.get("mm_vision_select_feature", "patch")
    if feature not in SELECT_STRATEGIES:
        raise ValueError(f"`mm_vision_select_feature` is {feature!r}; only {[*SELECT_STRATEGIES]} can be converted.")
    return {
        "image_aspect_ratio": config.get("image_aspect_ratio") or "square",
        "image_grid_pinpoints": config.get("image_grid_pinpoints"),
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": SELECT_STRATEGIES[feature],
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def config_to_original(
    config: MoveKDConfig, vision_model: str, distilled: bool, vocab_size: int, pads: bool
) -> dict[str, Any]:
    """
    The original configuration of a model with all layers of its tower.

    Args:
        vision_model: The CLIP checkpoint that the tower was made from, for `mm_vision_tower`.
        distilled: Whether the checkpoint holds adapters.
        vocab_size: Rows of the embeddings without `<image>`.
        pads: Whether images are padded to squares, or cropped.
    """
    vision, text = config.vision_config, config.text_config
    layer = config.vision_feature_layer
    if not vision.class_token:
        raise ValueError("The vision tower is SigLIP's, without [CLS]; the original code runs CLIP's alone.")
    if not vision.add_pooling_layer or layer == -1:
        raise ValueError(
            f"The vision tower is cut to {vision.num_hidden_layers} layers (`vision_feature_layer` is {layer}), but "
            "the original layout needs all. Convert with `--keep-all-layers`, or train with `cut_tower: false`."
        )
    if text.model_type != "llama":
        raise ValueError(f"The language model is of type {text.model_type!r}; the original code runs 'llama' alone.")
    if vision.num_experts and not vision.expert_bias:
        raise ValueError("The experts have no biases, which the original code needs. Train with `expert_bias: true`.")
    if vision.num_experts and vision.balance_bias:
        raise ValueError(
            "The routers have a `balance_bias`, which the original code lacks. Train with a balance loss."
        )
    if config.image_aspect_ratio != "pad":
        raise ValueError(f"`image_aspect_ratio` is {config.image_aspect_ratio!r}; the original code needs 'pad'.")
    rope = dict(text.rope_parameters or {})
    theta, rope_type = rope.pop("rope_theta", 10000.0), rope.pop("rope_type", "default")
    dropped = {*IDENTITY_FIELDS, "rope_parameters", "dtype", "vocab_size", "tie_word_embeddings"}
    fields = {name: value for name, value in text.to_diff_dict().items() if name not in dropped}
    fields |= {name: getattr(text, name) for name in LLAMA_FIELDS if hasattr(text, name)}
    features = {ours: original for original, ours in SELECT_STRATEGIES.items()}
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
        "mm_vision_select_feature": features[config.vision_feature_select_strategy],
        "mm_vision_select_layer": layer,
        "mm_vision_tower": vision_model,
        "moe": {"moe_encoder": vision.num_experts > 0}
        | {original: getattr(vision, ours) for original, ours in EXPERT_FIELDS.items()},
        "use_mm_proj": True,
    }
    return dict(sorted(fields.items()))
