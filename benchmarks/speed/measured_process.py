"""The fresh process of [`~benchmarks.speed.measure.peak_memory`]: calls a function and prints its peak memory."""

import gc
import importlib
import json
import os
import sys
from pathlib import Path

import torch

from benchmarks.speed.measure import resident_memory


def main(function: str, arguments: str, beyond: str) -> None:
    module, name = function.split(":")
    measured = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    before = 0
    if callable(measured):
        gc.collect()
        before = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else resident_memory()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        elif os.path.exists("/proc/self/clear_refs"):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        result = measured()
        del result
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else resident_memory(peak=True)
    print(json.dumps({"peak": peak - before * int(beyond)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
