"""Configurations of the MoVE-KD vision tower and of the vision-language model around it."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, CLIPVisionConfig, LlavaNextConfig, PreTrainedConfig


MAX_TILES = 32  # in each direction; an image becomes up to this number squared


# What tells SigLIP's tower from CLIP's. A tower of CLIP keeps a `config.json` without these fields.
BASE_SWITCHES = {"class_token": True, "pre_norm": True, "patch_bias": False}


def validate_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(map(repr, choices))}.")


@strict
class MoveKDVisionConfig(CLIPVisionConfig):
    r"""
    Configuration of CLIP's or SigLIP's vision tower with a mixture of LoRA experts in every MLP (MoVE-KD, arXiv
    2501.01709).

    Every field of [`~transformers.CLIPVisionConfig`] keeps its meaning.

    Args:
        num_experts (`int`, *optional*, defaults to 3): Number of LoRA experts per MLP. 0 gives CLIP's plain MLPs.
        lora_rank (`int`, *optional*, defaults to 32): Rank of each expert.
        lora_alpha (`float`, *optional*, defaults to 1.0): The experts' output is scaled by `lora_alpha / lora_rank`.
        lora_dropout (`float`, *optional*, defaults to 0.05): Dropout on the input of the experts during training.
        expert_bias (`bool`, *optional*, defaults to `False`): Whether both projections of an expert have a bias.
        dense_routing (`bool`, *optional*, defaults to `False`): Whether to sum all experts weighted by their
            probability, instead of using the most probable expert alone.
        router_gradient (`str`, *optional*, defaults to `"straight_through"`): Gradient of the router under top-1
            routing. With `"straight_through"` the router learns from the task, with `"none"` only from a balance loss.
        balance_bias (`bool`, *optional*, defaults to `False`): Whether each router has a bias that is added for the
            choice of the expert alone, and that training moves to balance the load (arXiv 2408.15664).
        expert_teachers (`list[str]`, *optional*): The teacher that each expert was trained by, if each had its own.
        expert_init (`str`, *optional*, defaults to `"zero"`): `"zero"` initializes the up-projections to zero, so that
            the tower starts as CLIP. `"kaiming"` draws both projections at random.
        add_pooling_layer (`bool`, *optional*, defaults to `True`): Whether the tower has CLIP's final layer norm and a
            pooled output. A tower cut to the layers in use has neither.
        class_token (`bool`, *optional*, defaults to `True`): Whether a [CLS] token precedes the patches. SigLIP has
            none, and then no pooling layer here either.
        pre_norm (`bool`, *optional*, defaults to `True`): Whether a layer norm precedes the first layer, as in CLIP.
        patch_bias (`bool`, *optional*, defaults to `False`): Whether the patch embedding has a bias, as in SigLIP.
    """

    model_type = "movekd_vision"

    num_experts: int = 3
    lora_rank: int = 32
    lora_alpha: int | float = 1.0
    lora_dropout: int | float = 0.05
    expert_bias: bool = False
    dense_routing: bool = False
    router_gradient: str = "straight_through"
    balance_bias: bool = False
    expert_teachers: list[str] | None = None
    expert_init: str = "zero"
    add_pooling_layer: bool = True
    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False

    @property
    def num_prefix_tokens(self) -> int:
        """The number of tokens before the patches: 1 with [CLS], else 0."""
        return int(self.class_token)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without the switches that have CLIP's values."""
        output = super().to_dict()
        return {
            name: value for name, value in output.items() if name not in BASE_SWITCHES or value != BASE_SWITCHES[name]
        }

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # `@strict` calls the validators too, but raises an error that is not a `ValueError`.
        self.validate_experts()

    def validate_experts(self) -> None:
        if self.num_experts < 0:
            raise ValueError(f"`num_experts` is {self.num_experts}; it must be 0 (plain MLP) or more.")
        if self.lora_rank < 1:
            raise ValueError(f"`lora_rank` is {self.lora_rank}; it must be at least 1. Set `num_experts=0` for none.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` is {self.lora_dropout}; it must be in [0, 1).")
        if self.add_pooling_layer and not self.class_token:
            raise ValueError(
                "`add_pooling_layer` is True, but without `class_token` there is no [CLS] to pool. Set it to False."
            )
        if self.balance_bias and self.dense_routing:
            raise ValueError(
                "`balance_bias` is true, but `dense_routing` chooses no expert. Set one of them to false."
            )
        validate_choice("router_gradient", self.router_gradient, ("straight_through", "none"))
        validate_choice("expert_init", self.expert_init, ("zero", "kaiming"))


# CLIP-L/14 at 336 pixels, cut to the layers in use
DEFAULT_VISION_CONFIG = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "add_pooling_layer": False,
}

# LLaVA-NeXT's grids, in tiles
DEFAULT_TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


@strict
class MoveKDConfig(LlavaNextConfig):
    r"""
    Configuration of a LLaVA-style vision-language model whose only encoder is a [`MoveKDVisionModel`].

    Every field of [`~transformers.LlavaNextConfig`] keeps its meaning. `text_config` may be the configuration of any
    causal language model of transformers.

    Args:
        image_aspect_ratio (`str`, *optional*, defaults to `"pad"`): `"pad"` encodes the image padded to a square
            (LLaVA-1.5). `"anyres"` encodes the whole image and tiles of it (LLaVA-NeXT).
        image_grid_pinpoints (`list`, *optional*): Grids of tiles as (height, width) in pixels, multiples of the
            tower's image size; those of LLaVA-NeXT by default.
        vision_feature_layer (`int` or `list[int]`, *optional*, defaults to -1): Hidden state that feeds the projector.
            -1 suits a tower that is cut to the layers in use. A tower with all layers uses -2, as LLaVA does.
        vision_feature_select_strategy (`str`, *optional*): `"default"` drops the features of [CLS], `"full"` keeps
            all. A tower without [CLS] needs `"full"`, and has it by default.
    """

    model_type = "movekd"
    # Both parts are built below: transformers does so from 5.20 on only, by `sub_configs_defaults`
    sub_configs = {"text_config": AutoConfig, "vision_config": MoveKDVisionConfig}

    image_aspect_ratio: str = "pad"
    image_grid_pinpoints: Any = None
    vision_feature_layer: int | list[int] = -1
    vision_feature_select_strategy: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        parts: dict[str, Any] = {name: getattr(self, name) for name in self.sub_configs}
        if not isinstance(parts["vision_config"], PreTrainedConfig):
            parts["vision_config"] = MoveKDVisionConfig(**(parts["vision_config"] or DEFAULT_VISION_CONFIG))
        if not isinstance(parts["text_config"], PreTrainedConfig):
            parts["text_config"] = AutoConfig.for_model(**{"model_type": "llama"} | (parts["text_config"] or {}))
        self.vision_config, self.text_config = parts["vision_config"], parts["text_config"]
        if self.vision_feature_select_strategy is None:
            self.vision_feature_select_strategy = "default" if self.vision_config.class_token else "full"
        if self.image_grid_pinpoints is None:
            side = self.vision_config.image_size
            self.image_grid_pinpoints = [[rows * side, columns * side] for rows, columns in DEFAULT_TILES]
        super().__post_init__(**kwargs)
        self.validate_image_aspect_ratio()
        self.validate_image_grid()
        self.validate_feature_layer()
        self.validate_select_strategy()

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without the parts' `_name_or_path`, which may name a folder of this machine."""
        output = super().to_dict()
        for name in self.sub_configs:
            if isinstance(output.get(name), dict):
                output[name].pop("_name_or_path", None)
        return output

    def validate_image_aspect_ratio(self) -> None:
        validate_choice("image_aspect_ratio", self.image_aspect_ratio, ("pad", "anyres"))

    def validate_select_strategy(self) -> None:
        validate_choice("vision_feature_select_strategy", self.vision_feature_select_strategy, ("default", "full"))
        if self.vision_feature_select_strategy == "default" and not self.vision_config.class_token:
            raise ValueError(
                "`vision_feature_select_strategy` is 'default', which drops [CLS], but this tower has none, so that "
                "the first patch would be lost. Set it to 'full'."
            )

    def validate_feature_layer(self) -> None:
        layer, layers = self.vision_feature_layer, self.vision_config.num_hidden_layers
        if any(not -layers - 1 <= index <= layers for index in (layer if isinstance(layer, list) else [layer])):
            raise ValueError(f"`vision_feature_layer` is {layer}, but the tower has {layers} layers.")

    def validate_image_grid(self) -> None:
        """Tiles are cut at multiples of the image size: check that each grid of `anyres` is one."""
        if self.image_aspect_ratio != "anyres":
            return
        size, grids = self.vision_config.image_size, self.image_grid_pinpoints
        if not grids or not isinstance(grids, list | tuple):
            raise ValueError(f"`image_grid_pinpoints` is {grids!r}; 'anyres' needs at least one (height, width).")
        for grid in grids:
            is_pair = isinstance(grid, list | tuple) and len(grid) == 2 and all(type(side) is int for side in grid)
            if not is_pair or any(side % size or not 1 <= side // size <= MAX_TILES for side in grid):
                raise ValueError(
                    f"`image_grid_pinpoints` holds {grid!r}; it must hold pairs of (height, width) that are multiples "
                    f"of the tower's image size {size}, up to {MAX_TILES} times."
                )


MoveKDVisionConfig.register_for_auto_class()
MoveKDConfig.register_for_auto_class()

__all__ = ["MoveKDConfig", "MoveKDVisionConfig"]
