"""ZeroGPU, where the Space runs on it. Imported before torch, as its package asks."""

import inspect
import os
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any


try:
    import spaces
except ImportError:
    spaces = None

from errors import explained


# Without the package a clone's own folder of this name can be found in its place
ON_ZERO_GPU = hasattr(spaces, "GPU") and os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """
    The function as it is; on ZeroGPU it runs in a process that has a GPU for as long as it takes. Of an error there
    nothing but a sentence comes back, and nothing of what was said goes to the log.
    """
    if not ON_ZERO_GPU:
        return function

    @wraps(function)
    def call(*arguments: Any) -> Any:
        with explained():
            return function(*arguments)

    @wraps(function)
    def iterate(*arguments: Any) -> Iterator[Any]:
        with explained():
            yield from function(*arguments)

    return spaces.GPU(iterate if inspect.isgeneratorfunction(function) else call)
