"""Support for ZeroGPU, whose package `spaces` must be imported before torch."""

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


# In a clone without the package, this folder can be imported under its name.
ON_ZERO_GPU = hasattr(spaces, "GPU") and os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """
    On ZeroGPU, run the function in a process with a GPU. Its errors come back as one sentence, so that no text of a
    visitor goes to the log. Elsewhere, return the function unchanged.
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
