"""The LLaVA-style vision-language model of MoVE-KD (arXiv 2501.01709), around the distilled vision tower."""

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, LlavaModel, LlavaNextModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextMultiModalProjector,
    LlavaNextPreTrainedModel,
    image_size_to_num_patches,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .base_encoders_movekd import load_strictly
from .configuration_movekd import MoveKDConfig
from .vision_movekd import MoveKDCheckpointMixin, MoveKDVisionModel, MoveKDVisionOutput
from .visualization_movekd import MoveKDPictures


# Options of language models that scale or cap the logits. This model applies the head alone.
_LOGIT_FIELDS = re.compile(
    r"((final|output)_)?logits?_(softcapping|soft_cap|scale|scaling|mup_width_multiplier)|lm_head_multiplier"
)


# Attention implementations by which vLLM and SGLang replace the language model's
ENGINES = ("vllm", "sglang")


def refuse_scaled_logits(config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: If the configuration of a language model scales or caps the logits after the head.
    """
    if scaled := {
        name: value
        for name, value in config.to_dict().items()
        if _LOGIT_FIELDS.fullmatch(name) and value not in (None, False, 1)
    }:
        raise ValueError(
            f"The language model scales or caps its logits ({scaled}), which is not supported. Choose another one."
        )


@dataclass
class MoveKDModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of a language model, with the projected image features `(num_tokens, text_hidden_size)` and the optional
    records of [`MoveKDVisionOutput`] for the images in their order.
    """

    image_hidden_states: torch.Tensor | None = None
    router_probabilities: tuple[torch.Tensor, ...] | None = None
    expert_indices: tuple[torch.Tensor, ...] | None = None
    cls_attention: torch.Tensor | None = None


@dataclass
class MoveKDCausalLMOutputWithPast(CausalLMOutputWithPast):
    """As [`MoveKDModelOutputWithPast`], with logits and loss."""

    image_hidden_states: torch.Tensor | None = None
    router_probabilities: tuple[torch.Tensor, ...] | None = None
    expert_indices: tuple[torch.Tensor, ...] | None = None
    cls_attention: torch.Tensor | None = None


class MoveKDPreTrainedModel(MoveKDCheckpointMixin, LlavaNextPreTrainedModel):
    config: MoveKDConfig
    config_class = MoveKDConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        PreTrainedModel._init_weights(self, module)
        if isinstance(module, MoveKDModel) and module.image_newline is not None:
            init.normal_(module.image_newline, std=self.config.text_config.hidden_size**-0.5)


class MoveKDModel(MoveKDPreTrainedModel, LlavaNextModel):
    """The vision tower, the projector and the language model without its head."""

    def __init__(self, config: MoveKDConfig):
        # Skip LlavaNextModel's own, which builds the tower with `AutoModel`.
        super(LlavaNextModel, self).__init__(config)
        self.vision_tower = MoveKDVisionModel._from_config(config.vision_config)
        self.multi_modal_projector = LlavaNextMultiModalProjector(config)
        self.image_newline = None
        if config.image_aspect_ratio == "anyres":
            self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))
        self.vocab_size = config.text_config.vocab_size
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **kwargs: Any
    ) -> MoveKDVisionOutput:
        """
        Encode and project images.

        Args:
            pixel_values (`torch.Tensor`): The images `(num_images, channels, height, width)` for `pad`, or their tiles
                `(num_images, num_tiles, channels, height, width)` for `anyres`.
            image_sizes (`torch.Tensor` of shape `(num_images, 2)`, *optional*): Height and width of each image.
                Needed for `anyres`.

        Returns:
            The tower's output, where `pooler_output` lists the projected features `(num_tokens, text_hidden_size)` of
            each image.
        """
        if self.config.image_aspect_ratio == "pad":
            return LlavaModel.get_image_features(self, pixel_values, **kwargs)
        if image_sizes is None or len(image_sizes) != len(pixel_values):
            raise ValueError(
                "`image_sizes` must hold (height, width) of each image for `image_aspect_ratio='anyres'`: got "
                f"{'none' if image_sizes is None else len(image_sizes)} for {len(pixel_values)} images. Pass the "
                "`image_sizes` that LlavaNextProcessor returns."
            )
        tiles = [
            image_size_to_num_patches(size, self.config.image_grid_pinpoints, self.config.vision_config.image_size)
            for size in image_sizes
        ]
        if pixel_values.dim() != 5 or max(tiles) > pixel_values.shape[1]:
            raise ValueError(
                f"`pixel_values` of shape {tuple(pixel_values.shape)} do not hold the {max(tiles)} tiles that "
                "`image_sizes` ask for; expected (num_images, num_tiles, channels, height, width)."
            )
        return super().get_image_features(pixel_values, image_sizes, **kwargs)

    def _check_no_image_tokens(self, input_ids: torch.LongTensor) -> None:
        """Refuse image tokens without images, which the language model would take for words."""
        if torch.compiler.is_compiling():
            return
        if image_tokens := int((input_ids == self.config.image_token_id).sum()):
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {image_tokens}, features: 0. Pass "
                "`pixel_values` with `input_ids`."
            )

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, MoveKDVisionOutput] | None = None,
        output_router_probabilities: bool = False,
        output_expert_indices: bool = False,
        cls_attention_layer: int | None = None,
        **kwargs: Any,
    ) -> MoveKDModelOutputWithPast:
        """As in LLaVA-NeXT, with the options of [`MoveKDVisionModel`]'s forward that record the tower's outputs."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        if pixel_values is not None and len(pixel_values) == 0:
            pixel_values = None
        # `generate` passes a dict of encoder outputs, which may be empty, to its first forward only.
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # the latter before transformers 5.24
        is_prompt = cache is None or mm_encoder_outputs is not None
        if is_prompt and pixel_values is None and not mm_encoder_outputs and input_ids is not None:
            self._check_no_image_tokens(input_ids)
        if pixel_values is not None and not mm_encoder_outputs:
            vision_outputs = self.get_image_features(
                pixel_values,
                image_sizes,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                output_router_probabilities=output_router_probabilities,
                output_expert_indices=output_expert_indices,
                cls_attention_layer=cls_attention_layer,
                return_dict=True,
            )
            mm_encoder_outputs = {"image": vision_outputs}
        images = (mm_encoder_outputs or {}).get("image")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        # Not by LlavaNextModel's forward, whose arguments and outputs differ between versions of transformers
        if images is not None:
            features = torch.cat(images.pooler_output).to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, features)
        outputs = self.language_model(inputs_embeds=inputs_embeds, return_dict=True, **kwargs)
        return MoveKDModelOutputWithPast(
            **outputs,
            image_hidden_states=None if images is None else features,
            router_probabilities=getattr(images, "router_probabilities", None),
            expert_indices=getattr(images, "expert_indices", None),
            cls_attention=getattr(images, "cls_attention", None),
        )


def _kept_positions(hidden_states: torch.Tensor, kept: int | torch.Tensor) -> torch.Tensor:
    """transformers' `slice_logits_to_keep`, which it has from 5.21 on: the last positions, or those that are named."""
    if isinstance(kept, int):
        return hidden_states[:, slice(-kept, None)]
    if kept.ndim == 1:
        return hidden_states[:, kept]
    return hidden_states[kept] if kept.dtype == torch.bool else hidden_states.take_along_dim(kept[..., None], dim=1)


class MoveKDForConditionalGeneration(MoveKDPreTrainedModel, GenerationMixin):
    """
    The published student: a vision tower, a projector and a causal language model.

    `AutoModel` and `AutoModelForImageTextToText` both load it from a checkpoint with `trust_remote_code=True`.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _auto_map = {
        "AutoConfig": "configuration_movekd.MoveKDConfig",
        "AutoModel": "modeling_movekd.MoveKDForConditionalGeneration",
        "AutoModelForImageTextToText": "modeling_movekd.MoveKDForConditionalGeneration",
    }

    def __init__(self, config: MoveKDConfig):
        super().__init__(config)
        self.model = MoveKDModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # The name of the embedding differs between architectures.
        embedding = self.model.language_model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    @classmethod
    def _from_config(cls, config: MoveKDConfig, **kwargs: Any) -> PreTrainedModel:
        # Serving engines put their own head on what `AutoModel.from_config` builds. `_auto_map` cannot name the model
        # without head for them, as everybody else loads the whole model by `AutoModel`.
        if str(config.text_config._attn_implementation).startswith(ENGINES):
            return MoveKDModel._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, *args: Any, **kwargs: Any) -> MoveKDVisionOutput:
        """See [`MoveKDModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    def suppress_image_token(self) -> None:
        """Keep `<image>` from being generated."""
        suppressed = self.generation_config.suppress_tokens or []
        self.generation_config.suppress_tokens = sorted({*suppressed, self.config.image_token_id})

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with a generation config that suppresses `<image>`."""
        self.suppress_image_token()
        super().save_pretrained(*args, **kwargs)

    def visualize(self, pixel_values: torch.Tensor, layer: int = -1, **kwargs: Any) -> MoveKDPictures:
        """See [`MoveKDVisionModel.visualize`]."""
        if pixel_values.dim() == 5:  # the first tile of `anyres` is the whole image
            pixel_values = pixel_values[:, 0]
        return self.model.vision_tower.visualize(pixel_values, layer, **kwargs)

    @classmethod
    def from_parts(
        cls,
        vision: MoveKDVisionModel,
        language: PreTrainedModel,
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> "MoveKDForConditionalGeneration":
        """
        Join a vision tower and a causal language model by a new projector.

        The model shares the weights of both parts, except where the data type or the vocabulary changes.

        Args:
            vision (`MoveKDVisionModel`): The tower. It is unfolded and cast to the dtype of the language model.
            language (`PreTrainedModel`): Any causal language model of transformers.
            image_token_id (`int`, *optional*): Id of `<image>`. Defaults to the first id after the vocabulary. An id
                outside the vocabulary enlarges the embeddings.
            kwargs: Fields of [`MoveKDConfig`], such as `image_aspect_ratio`.

        Raises:
            ValueError: If a weight has no counterpart in the model, or `language` has no head or one that scales or
                caps its logits.
        """
        if language.get_output_embeddings() is None:
            raise ValueError(f"`language` is a {type(language).__name__}; expected a causal language model.")
        refuse_scaled_logits(language.config)
        vocab_size = language.config.vocab_size
        image_token_id = vocab_size if image_token_id is None else image_token_id
        config = cls._config_from_parts(vision, language, image_token_id, **kwargs)
        with init.no_init_weights():
            model = cls._from_config(config, dtype=language.dtype)
        vision.unfold_experts()  # folded weights are views of one memory
        state_dict = {
            f"model.vision_tower.{key}": value for key, value in vision.to(language.dtype).state_dict().items()
        }
        head = next(name for name, module in language.named_modules() if module is language.get_output_embeddings())
        mapping = {f"{language.base_model_prefix}.": "model.language_model.", f"{head}.": "lm_head."}
        for key, value in language.state_dict().items():
            prefix = next((prefix for prefix in mapping if key.startswith(prefix)), "")
            state_dict[mapping.get(prefix, "") + key.removeprefix(prefix)] = value
        new = ("model.multi_modal_projector.", "model.image_newline")
        load_strictly(model, state_dict, may_lack=lambda key: key.startswith(new), assign=True)
        model.to(language.device)
        model.tie_weights()
        model.generation_config = copy.deepcopy(language.generation_config)
        # Nor may it generate rows that fill the embedding up to `<image>`
        fillers = range(vocab_size, image_token_id)
        model.generation_config.suppress_tokens = [*(language.generation_config.suppress_tokens or []), *fillers]
        model.suppress_image_token()
        if language.device.type != "meta":
            model._check_against(language)
        if image_token_id >= vocab_size:
            model.resize_token_embeddings(image_token_id + 1)
        return model.eval()

    @staticmethod
    def _config_from_parts(
        vision: MoveKDVisionModel, language: PreTrainedModel, image_token_id: int, **kwargs: Any
    ) -> MoveKDConfig:
        # The grid shapes of LLaVA-NeXT, in units of the tower's image size
        size, grids = vision.config.image_size, ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
        settings = {
            "vision_feature_layer": -2 if vision.config.add_pooling_layer else -1,
            "image_seq_length": (size // vision.config.patch_size) ** 2,
            "image_grid_pinpoints": [[rows * size, columns * size] for rows, columns in grids],
            "tie_word_embeddings": bool(language.config.tie_word_embeddings),
            **kwargs,
        }
        config = MoveKDConfig(
            vision_config=vision.config.to_dict(),
            text_config=language.config.to_dict(),
            image_token_index=image_token_id,
            **settings,
        )
        config._attn_implementation = {
            "vision_config": vision.config._attn_implementation,
            "text_config": language.config._attn_implementation,
        }
        return config

    @torch.no_grad()
    def _check_against(self, language: PreTrainedModel) -> None:
        """Refuse architectures that scale or cap their logits after the head, which this model does not do."""
        input_ids = torch.arange(min(4, language.config.vocab_size), device=language.device)[None]
        training = language.training
        expected = language.eval()(input_ids, use_cache=False).logits
        language.train(training)
        difference = (self.eval()(input_ids, use_cache=False).logits - expected).abs().max()
        # The tolerance is for rotary frequencies, which a cast of the whole language model has rounded.
        if difference > 16 * torch.finfo(expected.dtype).eps * expected.abs().max():
            raise ValueError(
                f"{type(language).__name__} scales or caps the logits of its head (they differ by up to "
                f"{difference:.3g}). Choose a language model whose logits are its head's output."
            )

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, MoveKDVisionOutput] | None = None,
        **kwargs: Any,
    ) -> MoveKDCausalLMOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): One image token per image feature.
            pixel_values (`torch.Tensor`, *optional*): See [`MoveKDModel.get_image_features`].
            image_sizes (`torch.Tensor` of shape `(num_images, 2)`, *optional*): Height and width of each image.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Token ids, or -100 to
                leave a position out of the loss.
        """
        outputs = self.model(
            input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(_kept_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return MoveKDCausalLMOutputWithPast(
            loss=loss, logits=logits, **{key: value for key, value in outputs.items() if key != "last_hidden_state"}
        )


__all__ = ["MoveKDForConditionalGeneration", "MoveKDModel", "MoveKDPreTrainedModel"]
