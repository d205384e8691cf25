"""The vision tower of MoVE-KD (arXiv 2501.01709): CLIP or SigLIP with a mixture of LoRA experts in every MLP."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import load_state_dict
from transformers.models.clip.modeling_clip import (
    CLIPAttention,
    CLIPEncoderLayer,
    CLIPPreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .base_encoders_movekd import (
    CLIP,
    POOLING_KEYS,
    SIGLIP,
    BaseEncoder,
    MoveKDPatchEmbeddings,
    base_settings,
    build_embeddings,
    find_base_encoder,
    load_strictly,
    read_base_encoder,
    read_model_type,
)
from .configuration_movekd import MoveKDVisionConfig
from .experts_movekd import ExpertRouter, LoraExperts, MixtureOfLoraExpertsMLP
from .visualization_movekd import MoveKDPictures, draw, pixels_to_image


SHARD_SIZE = "5GB"


def save_weight_index(folder: str | os.PathLike) -> None:
    """
    Write the index of weights that are in one file. vLLM and SGLang load every `*.safetensors` of a folder without an
    index, and `distiller.safetensors` is none of the model's.
    """
    folder = Path(folder)
    if not (folder / SAFE_WEIGHTS_NAME).is_file() or any(folder.glob("model-*-of-*.safetensors")):
        return
    weights = load_state_dict(folder / SAFE_WEIGHTS_NAME, map_location="meta")
    size = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(sorted(weights), SAFE_WEIGHTS_NAME)}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@dataclass
class MoveKDVisionOutput(BaseModelOutputWithPooling):
    """
    Output of [`MoveKDVisionModel`]. The tokens are [CLS], if the tower has it, and the patches.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): Last hidden state.
        pooler_output (`torch.Tensor` of shape `(batch_size, hidden_size)`): `None` for a tower without pooling.
        router_probabilities (`tuple[torch.Tensor]`): Per layer `(batch_size, num_tokens, num_experts)`.
        expert_indices (`tuple[torch.Tensor]`): Per layer `(batch_size, num_tokens)`.
        cls_attention (`torch.Tensor` of shape `(batch_size, num_heads, num_tokens)`): Attention of the [CLS]
            query to all tokens in the chosen layer, after the softmax.
    """

    router_probabilities: tuple[torch.Tensor, ...] | None = None
    expert_indices: tuple[torch.Tensor, ...] | None = None
    cls_attention: torch.Tensor | None = None


class MoveKDCheckpointMixin(PreTrainedModel):
    """Strict loading, and saving together with the code that `trust_remote_code=True` loads."""

    _auto_map: dict[str, str] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """
        As in transformers, but weights missing from the checkpoint are an error instead of a logged table.

        Raises:
            ValueError: If weights are missing.
        """
        return_loading_info = kwargs.pop("output_loading_info", False)
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        if missing := sorted(loading_info["missing_keys"]):
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of {cls.__name__}, which would stay "
                f"random: {missing}. To build from another checkpoint, use `MoveKDVisionModel.from_clip` or "
                "`MoveKDForConditionalGeneration.from_parts`."
            )
        return (model, loading_info) if return_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        As in transformers, with shards of 5 GB, always an index, and the code that `trust_remote_code=True` loads.

        Raises:
            ValueError: If weights are empty in this process, as under ZeRO-3.
        """
        kwargs.setdefault("max_shard_size", SHARD_SIZE)
        self.unfold_experts()
        is_main_process = kwargs.get("is_main_process", True)
        weights = self.state_dict() if kwargs.get("state_dict") is None else kwargs["state_dict"]
        if is_main_process and (empty := sorted(name for name, value in weights.items() if not value.numel())):
            raise ValueError(
                f"{len(empty)} weights are partitioned over processes and empty in this one: {empty}. Save with "
                "`trainer.save_model`, or pass the gathered weights as `state_dict`."
            )
        self.config.auto_map = dict(self._auto_map)
        super().save_pretrained(save_directory, **kwargs)
        if is_main_process:
            self._save_extras(save_directory)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:
        """As in transformers, with shards of 5 GB and the code that `trust_remote_code=True` loads."""
        return super().push_to_hub(*args, **({"max_shard_size": SHARD_SIZE} | kwargs))

    def _save_extras(self, folder: str | os.PathLike) -> None:
        save_weight_index(folder)
        # FSDP2 makes a subclass defined in torch's files, so look up the class that is defined in ours.
        code = next(parent for parent in type(self).__mro__ if "_auto_map" in vars(parent))
        custom_object_save(code, folder)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        # `save_pretrained(push_to_hub=True)` uploads before it returns, so these are saved here too.
        self._save_extras(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def fold_experts(self) -> None:
        """
        Fold the experts into the linear layers for inference, which makes the tower about as fast as CLIP's.

        Outputs stay the same up to rounding. `train()`, saving and loading weights unfold.

        Raises:
            ValueError: If the model is in training mode, or the layers of an MLP are quantized, offloaded, or have
                adapters or hooks.
        """
        for module in self.modules():
            if isinstance(module, MixtureOfLoraExpertsMLP):
                module.fold()

    def unfold_experts(self) -> None:
        """Undo `fold_experts`."""
        for module in self.modules():
            if isinstance(module, MixtureOfLoraExpertsMLP):
                module.unfold()

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        try:
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        except ImportError as error:
            raise ImportError(
                f"{error}\nInstall FlashAttention with `pip install flash-attn --no-build-isolation`, which needs a "
                "CUDA toolkit, or load the model with `attn_implementation='sdpa'`."
            ) from error


class MoveKDVisionEncoderLayer(CLIPEncoderLayer):
    def __init__(self, config: MoveKDVisionConfig):
        super().__init__(config)
        if config.num_experts > 0:
            self.mlp = MixtureOfLoraExpertsMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        experts: torch.Tensor | None = None,
        detach_experts: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As in CLIP. `experts` and `detach_experts` are those of [`MixtureOfLoraExpertsMLP.forward`]."""
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), attention_mask, **kwargs)[0]
        choice = () if experts is None and not detach_experts else (experts, detach_experts)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states), *choice)

    def cls_attention(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Compute the attention of [CLS], `(batch_size, num_heads, sequence_length)`, from the layer's input. The layer
        itself may then run any attention kernel.
        """
        attention = self.self_attn
        hidden_states = self.layer_norm1(hidden_states)
        heads = (attention.num_heads, attention.head_dim)
        query = attention.q_proj(hidden_states[:, :1]).unflatten(-1, heads).transpose(1, 2)
        key = attention.k_proj(hidden_states).unflatten(-1, heads).transpose(1, 2)
        scores = (query @ key.transpose(-1, -2)).squeeze(-2) * attention.scale
        return scores.softmax(dim=-1, dtype=torch.float32).to(hidden_states.dtype)


class MoveKDVisionEncoder(nn.Module):
    def __init__(self, config: MoveKDVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList([MoveKDVisionEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.class_token = config.class_token
        self.gradient_checkpointing = False

    def forward(
        self, hidden_states: torch.Tensor, cls_attention_layer: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cls_attention = None
        if cls_attention_layer is not None:
            if not self.class_token:
                raise ValueError(
                    f"`cls_attention_layer` is {cls_attention_layer}, but this tower has no [CLS] token. Leave it out."
                )
            if not -len(self.layers) <= cls_attention_layer < len(self.layers):
                raise ValueError(
                    f"`cls_attention_layer` is {cls_attention_layer}; the tower has {len(self.layers)} layers."
                )
            cls_attention_layer %= len(self.layers)
        for index, layer in enumerate(self.layers):
            if index == cls_attention_layer:
                cls_attention = layer.cls_attention(hidden_states)  # type: ignore[operator]
            hidden_states = layer(hidden_states, None, **kwargs)
        return hidden_states, cls_attention


class MoveKDVisionModel(MoveKDCheckpointMixin, CLIPPreTrainedModel):
    """
    CLIP's or SigLIP's vision tower with a mixture of LoRA experts in every MLP. `num_experts=0` has plain MLPs.

    Besides transformers' `output_hidden_states` and `output_attentions`, the forward takes
    `output_router_probabilities`, `output_expert_indices` and `cls_attention_layer`.
    """

    config: MoveKDVisionConfig
    config_class = MoveKDVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"
    _no_split_modules = ["CLIPVisionEmbeddings", "MoveKDVisionEncoderLayer"]
    _can_record_outputs = {
        "hidden_states": MoveKDVisionEncoderLayer,
        "attentions": CLIPAttention,
        "router_probabilities": OutputRecorder(ExpertRouter, index=0),
        "expert_indices": OutputRecorder(ExpertRouter, index=1),
    }
    _auto_map = {
        "AutoConfig": "configuration_movekd.MoveKDVisionConfig",
        "AutoModel": "vision_movekd.MoveKDVisionModel",
    }

    def __init__(self, config: MoveKDVisionConfig):
        super().__init__(config)
        self.embeddings = build_embeddings(config)
        self.pre_layrnorm = None
        if config.pre_norm:
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = MoveKDVisionEncoder(config)
        self.post_layernorm = None
        if config.add_pooling_layer:
            self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # FSDP2 stops at a class that the model does not have
        self._no_split_modules = [type(self.embeddings).__name__, "MoveKDVisionEncoderLayer"]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoveKDPatchEmbeddings):
            init.copy_(module.position_ids, torch.arange(module.num_positions).expand((1, -1)))
        elif isinstance(module, ExpertRouter):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
            if module.balance_bias is not None:
                init.zeros_(module.balance_bias)
        elif isinstance(module, LoraExperts):
            # Kaiming-uniform. The fan-in of an up-projection is the rank of one expert, not the width of `weight_b`.
            in_features, rank = module.weight_a.shape[1], module.rank
            if self.config.expert_init == "zero":
                init.uniform_(module.weight_a, -(in_features**-0.5), in_features**-0.5)
                init.zeros_(module.weight_b)
            else:
                init.uniform_(module.weight_a, -((6 / in_features) ** 0.5), (6 / in_features) ** 0.5)
                init.uniform_(module.weight_b, -((6 / rank) ** 0.5), (6 / rank) ** 0.5)
            if module.bias_a is not None:
                init.zeros_(module.bias_a)
                init.zeros_(module.bias_b)

    @classmethod
    def from_encoder(
        cls, encoder: str | os.PathLike | PreTrainedModel, feature_layer: int | None = -2, **kwargs: Any
    ) -> "MoveKDVisionModel":
        """
        Build the tower from the vision model of CLIP, SigLIP or SigLIP 2: by [`MoveKDVisionModel.from_clip`] or
        [`MoveKDVisionModel.from_siglip`], as the configuration's `model_type` says.
        """
        kind = find_base_encoder(read_model_type(encoder))
        return cls._from_base(kind, encoder, feature_layer, **kwargs)

    @classmethod
    def from_clip(
        cls, clip: str | os.PathLike | PreTrainedModel, feature_layer: int | None = -2, **kwargs: Any
    ) -> "MoveKDVisionModel":
        """
        Build the tower from a CLIP vision model. All of CLIP's weights are copied or the call fails.

        Args:
            clip (`str`, `os.PathLike` or `PreTrainedModel`): Hub id or folder of a CLIP checkpoint, or a loaded model
                with a CLIP vision tower. A loaded model stays unchanged.
            feature_layer (`int`, *optional*, defaults to -2): Hidden state that will feed the projector. The tower
                keeps the layers up to this one (23 of 24 for LLaVA), and no pooling. `None` keeps everything.
            kwargs: Fields of [`MoveKDVisionConfig`], such as `num_experts` and `lora_rank`.

        Raises:
            ValueError: If `clip` has no CLIP vision tower, its weights do not fit, or `feature_layer` selects none of
                its layers.
        """
        return cls._from_base(CLIP, clip, feature_layer, **kwargs)

    @classmethod
    def from_siglip(
        cls, siglip: str | os.PathLike | PreTrainedModel, feature_layer: int = -2, **kwargs: Any
    ) -> "MoveKDVisionModel":
        """
        Build the tower from the vision model of SigLIP, or of a SigLIP 2 with a fixed resolution. All weights up to
        `feature_layer` are copied or the call fails. The layers behind it, the final layer norm and the pooling head
        are left out, as in LLaVA-NeXT's SigLIP encoder.

        Args:
            siglip (`str`, `os.PathLike` or `PreTrainedModel`): As `clip` in [`MoveKDVisionModel.from_clip`].
            feature_layer (`int`, *optional*, defaults to -2): Hidden state that will feed the projector.
            kwargs: Fields of [`MoveKDVisionConfig`], such as `num_experts` and `lora_rank`.

        Raises:
            ValueError: As in [`MoveKDVisionModel.from_clip`], and if `feature_layer` is `None`.
        """
        return cls._from_base(SIGLIP, siglip, feature_layer, **kwargs)

    @classmethod
    def _from_base(
        cls, kind: BaseEncoder, source: str | os.PathLike | PreTrainedModel, feature_layer: int | None, **kwargs: Any
    ) -> "MoveKDVisionModel":
        base = read_base_encoder(kind, source)
        depth, settings = base.config.num_hidden_layers, base_settings(kind, base.config, feature_layer)
        config = MoveKDVisionConfig(**settings, **kwargs)
        config._attn_implementation = base.config._attn_implementation
        cut = tuple(f"encoder.layers.{index}." for index in range(config.num_hidden_layers, depth))
        if not config.add_pooling_layer:
            cut += POOLING_KEYS
        kept = {key: value for key, value in base.state_dict().items() if not key.startswith(cut)}
        with init.no_init_weights():
            model = cls._from_config(config, dtype=base.dtype)
        owned = not isinstance(source, PreTrainedModel)
        load_strictly(model, kept, may_lack=lambda key: "expert" in key or "router" in key, assign=owned)
        return model.to(base.device).eval()

    def embed(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """The input of the first layer, `(batch_size, num_tokens, hidden_size)`."""
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return hidden_states if self.pre_layrnorm is None else self.pre_layrnorm(hidden_states)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        cls_attention_layer: int | None = None,
        experts: torch.Tensor | None = None,
        detach_experts: bool = False,
        **kwargs: Any,
    ) -> MoveKDVisionOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, image_size, image_size)`): The images.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`): Whether to accept other image sizes.
            cls_attention_layer (`int`, *optional*): Layer whose [CLS] attention is recorded. A tower without
                `class_token` has none.
            experts, detach_experts (*optional*): As in [`MixtureOfLoraExpertsMLP.forward`], for all layers.
        """
        if (experts is not None or detach_experts) and not self.config.num_experts:
            raise ValueError("`experts` or `detach_experts` is given, but the tower has no experts. Leave it out.")
        if pixel_values.dim() != 4:
            raise ValueError(
                f"`pixel_values` has {pixel_values.dim()} dimensions {tuple(pixel_values.shape)}; 4 are expected: "
                "(batch_size, num_channels, height, width)."
            )
        hidden_states = self.embed(pixel_values, interpolate_pos_encoding)
        hidden_states, cls_attention = self.encoder(
            hidden_states, cls_attention_layer, experts=experts, detach_experts=detach_experts, **kwargs
        )
        pooler_output = None if self.post_layernorm is None else self.post_layernorm(hidden_states[:, 0])
        return MoveKDVisionOutput(hidden_states, pooler_output, cls_attention=cls_attention)

    @torch.no_grad()
    def visualize(
        self,
        pixel_values: torch.Tensor,
        layer: int = -1,
        image_mean: tuple[float, ...] | None = None,
        image_std: tuple[float, ...] | None = None,
        other_tokens: Mapping[str, torch.Tensor] | None = None,
        reference: torch.Tensor | None = None,
        smallest_side: int = 1,
    ) -> MoveKDPictures:
        """
        Draw one layer: the expert of each patch, the [CLS] attention and the principal components of the features.
        With `other_tokens`, also draw other encoders, such as plain CLIP or the teachers, and their distance.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, image_size, image_size)`): The images.
            layer (`int`, *optional*, defaults to -1): Index of the layer.
            image_mean (`tuple[float]`, *optional*): Mean that normalized the pixels. Defaults to CLIP's.
            image_std (`tuple[float]`, *optional*): Standard deviation that normalized the pixels. Defaults to CLIP's.
            other_tokens (`Mapping[str, torch.Tensor]`, *optional*): Patch features `(batch_size, n, width)` of other
                encoders for the same images, by name. Any square grid fits, without [CLS] and registers.
            reference (`torch.Tensor`, *optional*): `values` of earlier pictures of the same images. The new colors
                stay close to theirs.
            smallest_side (`int`, *optional*, defaults to 1): Smallest side of the pictures in pixels. They have the
                size of the tower's input, times a whole factor if that is smaller.

        Raises:
            ValueError: If the tower has no such layer, or `other_tokens` do not fit.
        """
        training, prefix = self.training, self.config.num_prefix_tokens
        self.eval()
        try:
            records = {"cls_attention_layer": layer if prefix else None, "output_expert_indices": True}
            outputs = self(pixel_values, output_hidden_states=True, **records)
        finally:
            self.train(training)
        return draw(
            pixels_to_image(pixel_values, image_mean, image_std, smallest_side),
            outputs.hidden_states[layer + 1 if layer >= 0 else layer][:, prefix:],
            outputs.cls_attention[:, :, prefix:].float().mean(dim=1) if prefix else None,
            outputs.expert_indices[layer][:, prefix:] if outputs.expert_indices else None,
            self.config.num_experts,
            other_tokens,
            reference,
        )


__all__ = ["MoveKDVisionModel", "MoveKDVisionOutput"]
