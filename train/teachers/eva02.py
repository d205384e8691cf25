"""
EVA-02's detection backbone, which neither transformers nor timm has: a vision transformer with windowed and global
attention, two-dimensional rotary embedding and SwiGLU (Fang et al., EVA-02, arXiv 2303.11331).
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


# Keys under which training frameworks nest the tensors; the averaged weights come first
_NESTINGS = ("ema_state", "module", "model")
_BACKBONE = "backbone.net."


@strict
class Eva02DetectionConfig(PreTrainedConfig):
    r"""
    EVA-02's detection backbone; the defaults are those of EVA-02-L.

    Args:
        hidden_size (`int`, *optional*, defaults to 1024): Channels.
        intermediate_size (`int`, *optional*, defaults to 2730): Channels inside the MLP, 2/3 of `4 * hidden_size`.
        num_hidden_layers (`int`, *optional*, defaults to 24): Blocks.
        num_attention_heads (`int`, *optional*, defaults to 16): Heads; `hidden_size / num_attention_heads` must be a
            multiple of 4.
        image_size (`int`, *optional*, defaults to 1024): Side in pixels of the images that the model was trained for;
            any other multiple of `patch_size` works.
        patch_size (`int`, *optional*, defaults to 16): Side of a patch in pixels.
        num_channels (`int`, *optional*, defaults to 3): Channels of an image.
        pretrain_image_size (`int`, *optional*, defaults to 224): Side in pixels of the images that the absolute
            position embedding was trained for.
        window_size (`int`, *optional*, defaults to 16): Side in patches of an attention window.
        window_block_indexes (`list[int]`, *optional*, defaults to all but every third): Blocks that attend inside
            windows; the others attend globally.
        rotary_grid_size (`int`, *optional*, defaults to 16): Side in patches over which rotary positions run, whatever
            the side of the window or grid.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6): Epsilon of the layer norms.
    """

    model_type = "eva02_detection"

    hidden_size: int = 1024
    intermediate_size: int = 2730
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 1024
    patch_size: int = 16
    num_channels: int = 3
    pretrain_image_size: int = 224
    window_size: int = 16
    window_block_indexes: list[int] | None = None
    rotary_grid_size: int = 16
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.window_block_indexes is None:
            self.window_block_indexes = [index for index in range(self.num_hidden_layers) if index % 3 != 2]
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` {self.hidden_size} over {self.num_attention_heads} heads is no multiple of 4. Choose "
                "another number of heads: the rotary embedding rotates pairs of channels by row and by column."
            )


def rotary_tables(
    side: int, head_dim: int, rotary_grid_size: int = 16, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cosines and sines of the positions in a square grid, whose `side` patches are stretched over `rotary_grid_size`.

    Returns:
        Two float32 tensors `(side * side, head_dim)`, row by row. The first half of the channels rotates with the row,
        the second with the column, in pairs of neighboring channels.
    """
    positions = torch.arange(side, device=device, dtype=torch.float32) / side * rotary_grid_size
    exponents = torch.arange(0, head_dim // 2, 2, device=device, dtype=torch.float32) / (head_dim // 2)
    angles = (positions[:, None] * 10000.0**-exponents).repeat_interleave(2, dim=-1)
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return grid.cos(), grid.sin()


def _rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cosine, sine = (table.to(x.dtype) for table in tables)
    first, second = x[..., 0::2], x[..., 1::2]
    return x * cosine + torch.stack([-second, first], dim=-1).flatten(-2) * sine


class Eva02PatchEmbedding(nn.Module):
    def __init__(self, config: Eva02DetectionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.proj(pixel_values).permute(0, 2, 3, 1)


class Eva02Attention(nn.Module):
    """Keys have no bias."""

    def __init__(self, config: Eva02DetectionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.rotary_grid_size = config.rotary_grid_size
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """All positions of `hidden_states` `(batch_size, side, side, channels)` attend to each other."""
        batch_size, side, _, width = hidden_states.shape
        tables = rotary_tables(side, self.head_dim, self.rotary_grid_size, hidden_states.device)
        query, key, value = (
            F.linear(hidden_states, projection.weight, bias)
            .view(batch_size, side * side, -1, self.head_dim)
            .transpose(1, 2)
            for projection, bias in ((self.q_proj, self.q_bias), (self.k_proj, None), (self.v_proj, self.v_bias))
        )
        mixed = F.scaled_dot_product_attention(_rotate(query, tables), _rotate(key, tables), value)
        return self.proj(mixed.transpose(1, 2).reshape(batch_size, side, side, width))


class Eva02MLP(nn.Module):
    """SwiGLU with a layer norm before its last projection."""

    def __init__(self, config: Eva02DetectionConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w2 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_ln = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        self.w3 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(hidden_states)) * self.w2(hidden_states)))


class Eva02Block(nn.Module):
    def __init__(self, config: Eva02DetectionConfig, window_size: int | None) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Eva02Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Eva02MLP(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(hidden_states)
        attended = self.attn(normed) if self.window_size is None else self._in_windows(normed, self.window_size)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.norm2(hidden_states))

    def _in_windows(self, hidden_states: torch.Tensor, window: int) -> torch.Tensor:
        batch_size, side, _, width = hidden_states.shape
        count = -(-side // window)
        # The zeros right and below take part in the attention, as in the original code
        padding = count * window - side
        padded = F.pad(hidden_states, (0, 0, 0, padding, 0, padding))
        windows = padded.view(batch_size, count, window, count, window, width).transpose(2, 3)
        attended = self.attn(windows.reshape(-1, window, window, width))
        whole = attended.view(batch_size, count, count, window, window, width).transpose(2, 3)
        return whole.reshape(batch_size, count * window, count * window, width)[:, :side, :side]


class Eva02DetectionBackbone(PreTrainedModel):
    """
    The backbone without the detector's pyramid and heads, and without a final norm. Parameters are named as in the
    published checkpoint, without `backbone.net.`.
    """

    config_class = Eva02DetectionConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: Eva02DetectionConfig) -> None:
        super().__init__(config)
        positions = (config.pretrain_image_size // config.patch_size) ** 2
        windowed = set(config.window_block_indexes or [])
        self.patch_embed = Eva02PatchEmbedding(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + positions, config.hidden_size))
        self.blocks = nn.ModuleList(
            Eva02Block(config, config.window_size if index in windowed else None)
            for index in range(config.num_hidden_layers)
        )
        self.post_init()

    def position_embedding(self, side: int) -> torch.Tensor:
        """The absolute position embedding without its [CLS] slot, `(1, side, side, channels)`, resized bicubically."""
        patches = self.pos_embed[:, 1:]
        pretrained = self.config.pretrain_image_size // self.config.patch_size
        grid = patches.view(1, pretrained, pretrained, -1)
        if side == pretrained:
            return grid
        resized = F.interpolate(grid.permute(0, 3, 1, 2), (side, side), mode="bicubic", align_corners=False)
        return resized.permute(0, 2, 3, 1)

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> BaseModelOutput:
        """
        Args:
            pixel_values: `(batch_size, num_channels, size, size)`, `size` a multiple of `patch_size`.
            output_hidden_states (*optional*, defaults to `False`): Also return the input of the first block and the
                output of every block.

        Returns:
            `last_hidden_state` and each of `hidden_states`: `(batch_size, h * w, channels)`, row by row.

        Raises:
            ValueError: for pixels of another shape.
        """
        height, width = pixel_values.shape[-2:]
        if height != width or height % self.config.patch_size:
            raise ValueError(
                f"Pixels are {height} x {width}; a square whose side is a multiple of {self.config.patch_size} is "
                "expected."
            )
        patches = self.patch_embed(pixel_values)
        states = [patches + self.position_embedding(patches.shape[1])]
        for block in self.blocks:
            output = block(states[-1])
            states = [*states, output] if output_hidden_states else [output]
        tokens = tuple(state.flatten(1, 2) for state in states)
        return BaseModelOutput(tokens[-1], hidden_states=tokens if output_hidden_states else None)


def backbone_state_dict(file: str | Path) -> dict[str, torch.Tensor]:
    """
    Read the backbone's tensors from a detector's checkpoint.

    Args:
        file: Safetensors, or a pickle of tensors in any nesting of `ema_state`, `module` and `model`. `ema_state`, the
            averaged weights, is preferred. No code in the file is run.

    Returns:
        Tensors by the backbone's own names, without the tables of the rotary embedding, which are computed.

    Raises:
        ValueError: if the file holds Python objects, no backbone, or two of them.
    """
    checkpoint: Any
    if Path(file).suffix == ".safetensors":
        checkpoint = load_file(file)
    else:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(
                f"{file} cannot be read: {error} Code in a checkpoint is never run. If the file holds more than "
                "tensors, save the tensors as safetensors on a machine where that is safe."
            ) from error
    while isinstance(checkpoint, Mapping) and (
        inner := next((name for name in _NESTINGS if isinstance(checkpoint.get(name), Mapping)), None)
    ):
        checkpoint = checkpoint[inner]
    keys = [str(key) for key in checkpoint] if isinstance(checkpoint, Mapping) else []
    state_dict: dict[str, torch.Tensor] = {}
    for key in keys:
        name = key.partition(_BACKBONE)[2]
        if not name or "rope" in name:
            continue
        if name in state_dict:
            raise ValueError(f"{file} holds two backbones: a second {name} is at {key}.")
        state_dict[name] = checkpoint[key]
    if not state_dict:
        raise ValueError(f"{file} has no tensor below {_BACKBONE!r}; it holds {keys[:10] or type(checkpoint)} ...")
    return state_dict


def load_backbone(config: Eva02DetectionConfig, file: str | Path) -> Eva02DetectionBackbone:
    """
    The backbone with the weights of a detector's checkpoint.

    Raises:
        ValueError: as [`backbone_state_dict`], or if a weight is missing, left over or of another size, naming it.
    """
    model = Eva02DetectionBackbone(config)
    try:
        model.load_state_dict(backbone_state_dict(file), strict=True)
    except RuntimeError as error:  # lists the keys
        raise ValueError(f"{file} is no backbone of this configuration: {error}") from error
    return model.eval()
