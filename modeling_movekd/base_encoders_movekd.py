"""The vision models that a student can start from: CLIP, SigLIP and SigLIP 2."""

import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from .configuration_movekd import MoveKDVisionConfig


# Weights of a whole CLIP checkpoint outside its vision tower
CLIP_TEXT_KEYS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
# Weights of a vision model behind its last layer
POOLING_KEYS = ("post_layernorm.", "head.")


class BaseEncoder(NamedTuple):
    """
    A kind of vision model that a student can start from.

    Args:
        name (`str`): Name for messages.
        model_class (`type[PreTrainedModel]`): transformers' vision model.
        config_class (`type[PreTrainedConfig]`): Its configuration.
        text_keys (`tuple[str, ...]`): Weights of a whole checkpoint outside its vision model, by their beginnings.
        settings (`dict[str, Any]`): Fields of [`MoveKDVisionConfig`] that differ from their defaults.
    """

    name: str
    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    text_keys: tuple[str, ...]
    settings: dict[str, Any]


CLIP = BaseEncoder("CLIP", CLIPVisionModel, CLIPVisionConfig, CLIP_TEXT_KEYS, {})
SIGLIP = BaseEncoder(
    "SigLIP",
    SiglipVisionModel,
    SiglipVisionConfig,
    ("text_model.", "logit_scale", "logit_bias"),
    {"class_token": False, "pre_norm": False, "patch_bias": True},
)


class MoveKDPatchEmbeddings(SiglipVisionEmbeddings):
    """Embeddings of the patches alone, without [CLS]."""

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        height, width = pixel_values.shape[-2:]
        if not interpolate_pos_encoding and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"Input image size ({height}*{width}) doesn't match model ({self.image_size}*{self.image_size})."
            )
        # The convolution's channels come first in memory, and every layer behind it would keep that order
        return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding).contiguous()


def build_embeddings(config: MoveKDVisionConfig) -> CLIPVisionEmbeddings | MoveKDPatchEmbeddings:
    """The embeddings that the configuration's switches ask for."""
    embeddings = (CLIPVisionEmbeddings if config.class_token else MoveKDPatchEmbeddings)(config)
    convolution = embeddings.patch_embedding
    if config.patch_bias != (convolution.bias is not None):
        convolution.bias = nn.Parameter(torch.empty(config.hidden_size)) if config.patch_bias else None
    return embeddings


def read_model_type(source: str | os.PathLike | PreTrainedModel) -> str | None:
    """The `model_type` of a loaded model, a Hub id or a folder."""
    if isinstance(source, PreTrainedModel):
        return source.config.model_type
    return PreTrainedConfig.get_config_dict(source)[0].get("model_type")


def find_base_encoder(model_type: str | None) -> BaseEncoder:
    """
    The kind of a model. Other types than SigLIP's are read as CLIP, which fails if their weights are not CLIP's.

    Raises:
        ValueError: If it is a SigLIP 2 without a fixed resolution.
    """
    if model_type in ("siglip2", "siglip2_vision_model"):
        raise ValueError(
            f"The vision model has the type {model_type!r}, a NaFlex SigLIP 2 whose images have no fixed size. Choose "
            "a SigLIP 2 of a fixed resolution, such as google/siglip2-so400m-patch14-384."
        )
    return SIGLIP if model_type in ("siglip", "siglip_vision_model") else CLIP


def read_base_encoder(kind: BaseEncoder, source: str | os.PathLike | PreTrainedModel) -> PreTrainedModel:
    """
    Load a vision model from a Hub id or folder, or take it out of a loaded model.

    Raises:
        ValueError: If there is no such vision model, or weights are missing or left over.
    """
    if isinstance(source, PreTrainedModel):
        model = getattr(source, "vision_model", source)
        if not isinstance(model, kind.model_class):
            raise ValueError(
                f"`{kind.name.lower()}` is a {type(model).__name__}; expected a model with a {kind.name} vision tower."
            )
        return model
    model, loading_info = kind.model_class.from_pretrained(source, output_loading_info=True)
    missing = sorted(loading_info["missing_keys"])
    left_over = sorted(key for key in loading_info["unexpected_keys"] if not key.startswith(kind.text_keys))
    if missing or left_over:
        raise ValueError(f"{source} is not a {kind.name} vision tower: missing {missing}, left over {left_over}.")
    return model


def base_settings(kind: BaseEncoder, config: PreTrainedConfig, feature_layer: int | None) -> dict[str, Any]:
    """
    The fields of [`MoveKDVisionConfig`] for a tower that is cut behind the hidden state `feature_layer`.

    Raises:
        ValueError: If `feature_layer` selects none of the layers, or is `None` for a kind without [CLS].
    """
    own = {field.name for field in fields(kind.config_class)} - {field.name for field in fields(PreTrainedConfig)}
    settings = {name: getattr(config, name) for name in own - {"vision_use_head"}} | kind.settings
    if feature_layer is None:
        if not settings.get("class_token", True):
            raise ValueError(
                f"`feature_layer` is None, which keeps the pooling, but the tower has no place for {kind.name}'s "
                "pooling head. Set it to the layer in use, such as -2 (`cut_tower: true`)."
            )
        return settings
    depth = config.num_hidden_layers
    layers = feature_layer if feature_layer >= 0 else depth + 1 + feature_layer
    if not 1 <= layers <= depth:
        raise ValueError(
            f"`feature_layer` is {feature_layer}, which selects no layer of the {depth} in `{kind.name.lower()}`."
        )
    return settings | {"num_hidden_layers": layers, "add_pooling_layer": False}


def load_strictly(
    model: PreTrainedModel, state_dict: dict[str, torch.Tensor], may_lack: Callable[[str], bool], assign: bool
) -> None:
    """
    Load weights into a model that was built without initialization, and initialize only the weights that are missing.

    Args:
        model (`PreTrainedModel`): The model to fill.
        state_dict (`dict[str, torch.Tensor]`): The weights.
        may_lack (`Callable`): Says for a key of the model whether `state_dict` may lack it.
        assign (`bool`): Whether to share the tensors instead of copying them.

    Raises:
        ValueError: If other keys are missing, or keys are left over.
    """
    expected = set(model.state_dict())
    missing = sorted(key for key in expected - set(state_dict) if not may_lack(key))
    unexpected = sorted(set(state_dict) - expected)
    if missing or unexpected:
        raise ValueError(f"The weights do not fit {type(model).__name__}: missing {missing}, left over {unexpected}.")
    model.load_state_dict(state_dict, strict=False, assign=assign)
    for key, tensor in model.state_dict(keep_vars=True).items():
        if key in state_dict:
            tensor._is_hf_initialized = True
    model.initialize_weights()
