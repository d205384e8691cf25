"""MoVE-KD: the strengths of several vision encoders distilled into one, inside a LLaVA-style model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
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

_MODULES = {
    "MoveKDConfig": "configuration_movekd",
    "MoveKDVisionConfig": "configuration_movekd",
    "MoveKDForConditionalGeneration": "modeling_movekd",
    "MoveKDModel": "modeling_movekd",
    "MoveKDVisionModel": "vision_movekd",
}


def __getattr__(name: str) -> Any:
    """Import a class when it is first asked for, since a command's `--help` needs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
