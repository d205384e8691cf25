"""Configurations of the MoVE-KD vision tower and of the vision-language model around it."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, CLIPVisionConfig, LlavaNextConfig
from transformers.configuration_utils import SubConfigSpec


def validate_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(map(repr, choices))}.")


@strict
class MoveKDVisionConfig(CLIPVisionConfig):
    r"""
    A CLIP vision tower whose MLPs carry a mixture of LoRA experts (MoVE-KD, arXiv 2501.01709).

    Every field of [`~transformers.CLIPVisionConfig`] keeps its meaning; these are added:

    Args:
        num_experts (`int`, defaults to 3): LoRA experts per MLP. 0 gives plain CLIP MLPs without a router.
        lora_rank (`int`, defaults to 32): Rank of each expert.
        lora_alpha (`float`, defaults to 1.0): The experts' output is scaled by `lora_alpha / lora_rank`.
        lora_dropout (`float`, defaults to 0.05): Dropout on the input of each expert, in training only.
        expert_bias (`bool`, defaults to `False`): Whether both projections of an expert have a bias.
        dense_routing (`bool`, defaults to `False`): Weigh all experts by their probability instead of using the best.
        router_gradient (`str`, defaults to `"straight_through"`): How the task reaches the router under top-1 routing:
            `"straight_through"` or `"none"` (only a balance loss does).
        expert_init (`str`, defaults to `"zero"`): `"zero"` starts as CLIP exactly (up-projections zero), `"kaiming"`
            draws both projections.
        add_pooling_layer (`bool`, defaults to `True`): Whether the tower has CLIP's final layer norm and pooled
            output. A tower cut to the layers in use has not.

    Raises:
        ValueError: for a value outside the choices, naming the value and the choices. A value of a wrong type is
            refused as every configuration of transformers does, by a `StrictDataclassFieldValidationError`.
    """

    model_type = "movekd_vision"

    num_experts: int = 3
    lora_rank: int = 32
    lora_alpha: int | float = 1.0
    lora_dropout: int | float = 0.05
    expert_bias: bool = False
    dense_routing: bool = False
    router_gradient: str = "straight_through"
    expert_init: str = "zero"
    add_pooling_layer: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # `@strict` validates too, but what it raises is no `ValueError`
        self.validate_experts()

    def validate_experts(self) -> None:
        """Part of `@strict` validation, which saving repeats: ranges of the mixture's fields."""
        if self.num_experts < 0:
            raise ValueError(f"`num_experts` is {self.num_experts}; it must be 0 (plain MLP) or more.")
        if self.lora_rank < 1:
            raise ValueError(
                f"`lora_rank` is {self.lora_rank}; it must be at least 1 (`num_experts=0` turns MoLE off)."
            )
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` is {self.lora_dropout}; it must be in [0, 1).")
        validate_choice("router_gradient", self.router_gradient, ("straight_through", "none"))
        validate_choice("expert_init", self.expert_init, ("zero", "kaiming"))


@strict
class MoveKDConfig(LlavaNextConfig):
    r"""
    A LLaVA-style vision-language model with a [`MoveKDVisionModel`] as its only encoder.

    Every field of [`~transformers.LlavaNextConfig`] keeps its meaning; `text_config` may be the configuration of any
    causal language model of transformers.

    Args:
        image_aspect_ratio (`str`, defaults to `"pad"`): `"pad"`, one crop of the image padded to a square (LLaVA-1.5),
            or `"anyres"`, tiles of the image beside the whole of it (LLaVA-NeXT).
        vision_feature_layer (`int` or `list[int]`, defaults to -1): Hidden state that feeds the projector. The tower
            is cut to the layers in use, so it is the last one; a tower with all its layers uses -2 as LLaVA does.
    """

    model_type = "movekd"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vision_config": SubConfigSpec(
            config_class=MoveKDVisionConfig,
            init_kwargs={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 23,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
                "add_pooling_layer": False,
            },
        ),
    }

    image_aspect_ratio: str = "pad"
    vision_feature_layer: int | list[int] = -1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.validate_image_aspect_ratio()

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without the place that a part was read from, which may be a folder of this machine."""
        output = super().to_dict()
        for name in self.sub_configs_defaults:
            if isinstance(output.get(name), dict):
                output[name].pop("_name_or_path", None)
        return output

    def validate_image_aspect_ratio(self) -> None:
        """Part of `@strict` validation, as in [`MoveKDVisionConfig`]."""
        validate_choice("image_aspect_ratio", self.image_aspect_ratio, ("pad", "anyres"))


MoveKDVisionConfig.register_for_auto_class()
MoveKDConfig.register_for_auto_class()

__all__ = ["MoveKDConfig", "MoveKDVisionConfig"]
