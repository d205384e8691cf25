"""MoVE-KD: the strengths of several vision encoders distilled into one, inside a LLaVA-style model."""

from .configuration_movekd import MoveKDConfig, MoveKDVisionConfig
from .modeling_movekd import MoveKDForConditionalGeneration, MoveKDModel
from .vision_movekd import MoveKDVisionModel


__version__ = "0.1.0"

__all__ = [
    "MoveKDConfig",
    "MoveKDForConditionalGeneration",
    "MoveKDModel",
    "MoveKDVisionConfig",
    "MoveKDVisionModel",
]
