"""
A vision tower without experts as the plain CLIP that other libraries read.

```
DEST/                     transformers 4 and 5: CLIPVisionModel.from_pretrained(DEST)
DEST/timm/                timm: timm.create_model("local-dir:DEST/timm", pretrained=True)
DEST/open_clip/           open_clip: model = open_clip.create_model("local-dir:DEST/open_clip", load_weights=False)
                          model.visual.load_state_dict(load_file("DEST/open_clip/visual.safetensors"))
```

A tower that is cut to the layers in use stays cut: `num_hidden_layers` is smaller, and the features are the last
hidden state (`feature_layer` -1). It has no final layer norm: transformers and open_clip get a neutral one (weight 1,
bias 0), timm gets none. The pooled output of a cut tower was never trained. No tower has CLIP's projection to the
space of the texts: in open_clip it is the identity, and the text model is a small untrained placeholder.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BaseImageProcessor, CLIPVisionConfig, CLIPVisionModel, PreTrainedConfig, SiglipVisionConfig
from transformers import initialization as init

from hub.checkpoint_parts import feature_layer
from modeling_movekd import MoveKDVisionConfig, MoveKDVisionModel
from modeling_movekd.base_encoders_movekd import load_strictly
from modeling_movekd.files import save_json


# Our names, and those of OpenAI's layout, which open_clip uses
OPENAI_NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding.": "conv1.",
    "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "self_attn.q_proj.": "attn.in_proj_",
    "self_attn.out_proj.": "attn.out_proj.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
TIMM_SIZES = {768: "base", 1024: "large", 1280: "huge"}


def refuse_experts(config: MoveKDVisionConfig, form: str) -> None:
    if config.num_experts > 0:
        raise ValueError(
            f"The tower has {config.num_experts} experts per layer, which cannot be merged exactly into plain "
            f"MLPs. Approximate them with `--form merged`, and export the result with `--form {form}`."
        )


def plain_config(tower: MoveKDVisionModel) -> CLIPVisionConfig | SiglipVisionConfig:
    """The configuration of the plain CLIP or SigLIP that the tower is without experts."""
    config_class: type[CLIPVisionConfig | SiglipVisionConfig] = CLIPVisionConfig
    settings = {}
    if not tower.config.class_token:
        config_class, settings = SiglipVisionConfig, {"vision_use_head": False}
    names = set(config_class().to_dict()) - set(PreTrainedConfig().to_dict()) - {"model_type", *settings}
    return config_class(**{name: getattr(tower.config, name) for name in names}, **settings)


def plain_state_dict(tower: MoveKDVisionModel) -> dict[str, torch.Tensor]:
    """The tower's weights, with a neutral final layer norm where it was cut."""
    state_dict = dict(tower.state_dict())
    if tower.post_layernorm is None:
        like = state_dict["encoder.layers.0.layer_norm1.weight"]
        state_dict["post_layernorm.weight"] = torch.ones_like(like)
        state_dict["post_layernorm.bias"] = torch.zeros_like(like)
    return state_dict


def plain_clip(tower: MoveKDVisionModel) -> CLIPVisionModel:
    """The stock model with the tower's weights, which are shared."""
    if not tower.config.class_token:
        raise ValueError(
            "The tower is SigLIP's, without [CLS], which the form `clip` cannot hold. Choose `encoder`, or "
            "`llava` for a whole model."
        )
    refuse_experts(tower.config, "clip")
    with init.no_init_weights():
        clip = CLIPVisionModel._from_config(plain_config(tower), dtype=tower.dtype)
    load_strictly(clip, plain_state_dict(tower), may_lack=lambda key: False, assign=True)
    return clip.eval()


def openai_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A plain CLIP tower's weights in OpenAI's layout, with query, key and value in one tensor."""
    width = state_dict["embeddings.class_embedding"].shape[0]
    converted = {"proj": torch.eye(width, dtype=state_dict["pre_layrnorm.weight"].dtype)}
    for key, tensor in state_dict.items():
        if ".k_proj." in key or ".v_proj." in key:
            continue
        if ".q_proj." in key:
            tensor = torch.cat([state_dict[key.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        for ours, openai in OPENAI_NAMES.items():
            key = key.replace(ours, openai)
        converted[key] = tensor
    return converted


def write_clip(tower: MoveKDVisionModel, processor: BaseImageProcessor, folder: Path) -> None:
    """Write the folder that this file's docstring describes."""
    clip = plain_clip(tower)
    if clip.config.hidden_act not in ("quick_gelu", "gelu") or clip.config.layer_norm_eps != 1e-5:
        raise ValueError(
            f"The tower has the activation {clip.config.hidden_act!r} and layer norms with eps "
            f"{clip.config.layer_norm_eps}; timm and open_clip support 'quick_gelu' or 'gelu', and 1e-05."
        )
    state_dict = clip.state_dict()
    clip.config.architectures = ["CLIPVisionModel"]
    clip.config.feature_layer = feature_layer(tower.config)
    clip.config.dtype = tower.dtype
    clip.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    # The keys of transformers 4, which transformers 5 reads too
    save_weights({f"vision_model.{key}": value for key, value in state_dict.items()}, folder / "model.safetensors")
    layout = openai_state_dict(state_dict)
    write_open_clip(clip.config, layout, processor, folder / "open_clip")
    write_timm(clip.config, layout, processor, folder / "timm", cut=tower.post_layernorm is None)


def save_weights(state_dict: dict[str, torch.Tensor], path: Path) -> None:
    save_file({key: value.contiguous() for key, value in state_dict.items()}, path, metadata={"format": "pt"})


def write_open_clip(
    config: CLIPVisionConfig, layout: dict[str, torch.Tensor], processor: BaseImageProcessor, folder: Path
) -> None:
    """Write open_clip's configuration, and the weights of its `visual`."""
    folder.mkdir()
    width = config.hidden_size
    ratio = config.intermediate_size / width
    if int(width * ratio) != config.intermediate_size:  # open_clip rounds the product down
        ratio = (config.intermediate_size + 0.5) / width
    settings = {
        "model_cfg": {
            "embed_dim": width,
            "quick_gelu": config.hidden_act == "quick_gelu",
            "vision_cfg": {
                "image_size": config.image_size,
                "layers": config.num_hidden_layers,
                "width": width,
                "head_width": width // config.num_attention_heads,
                "mlp_ratio": ratio,
                "patch_size": config.patch_size,
            },
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
        },
        "preprocess_cfg": {
            "mean": list(processor.image_mean),
            "std": list(processor.image_std),
            "interpolation": "bicubic",
        },
    }
    save_json(settings, folder / "open_clip_config.json")
    save_weights(layout, folder / "visual.safetensors")


def write_timm(
    config: CLIPVisionConfig, layout: dict[str, torch.Tensor], processor: BaseImageProcessor, folder: Path, cut: bool
) -> None:
    """Write timm's model: timm builds it, converts the weights with its reader of CLIP checkpoints, and saves it."""
    try:
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn
    except ImportError as error:
        raise ImportError(f"{error}\nThe form `clip` writes timm's layout too: `pip install timm`.") from error
    ending = f"clip_{'quickgelu_' if config.hidden_act == 'quick_gelu' else ''}"
    name = f"vit_{TIMM_SIZES.get(config.hidden_size)}_patch{config.patch_size}_{ending}{config.image_size}"
    if not timm.is_model(name):
        name = f"vit_base_patch16_{ending}224"
    # The name chooses the class and the activation; everything else is set here
    arguments = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "num_classes": 0,
        "final_norm": not cut,
    }
    pixels = {
        "input_size": (config.num_channels, config.image_size, config.image_size),
        "mean": tuple(processor.image_mean),
        "std": tuple(processor.image_std),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    # Replaces timm's metadata of OpenAI's weights with this name, their license among it
    metadata = pixels | {"first_conv": "patch_embed.proj", "classifier": "head"}
    model = timm.create_model(name, pretrained=False, pretrained_cfg=metadata, **arguments)
    model.to(layout["conv1.weight"].dtype)
    lacks = ("proj",) + (("ln_post.weight", "ln_post.bias") if cut else ())
    weights = {f"visual.{key}": value for key, value in layout.items() if key not in lacks}
    model.load_state_dict(checkpoint_filter_fn(weights, model), strict=True)
    arguments.pop("num_classes")
    timm.models.save_for_hf(model, str(folder), None, arguments, safe_serialization=True, data_config=pixels)
