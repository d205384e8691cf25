"""ZeroGPU, where the Space runs on it. Imported before torch, as its package asks."""

import os
from collections.abc import Callable
from typing import Any


try:
    import spaces
except ImportError:
    spaces = None

# Without the package a clone's own folder of this name can be found in its place
ON_ZERO_GPU = hasattr(spaces, "GPU") and bool(os.environ.get("SPACES_ZERO_GPU"))


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is; on ZeroGPU it runs in a process that has a GPU for as long as it takes."""
    return spaces.GPU(function) if ON_ZERO_GPU else function
