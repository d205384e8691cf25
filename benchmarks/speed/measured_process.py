"""The fresh process of [`~benchmarks.speed.measure.peak_memory`]: calls a function and prints its peak memory."""

import argparse
import gc
import importlib
import json
import os
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("function", help="package.module:name")
    parser.add_argument("arguments", help="its keyword arguments as JSON")
    parser.add_argument("beyond", choices=("0", "1"), help="whether to subtract the memory in use before")
    return parser.parse_args()


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

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
    main(**vars(parse_arguments()))
