"""
Whether a recipe fits and how long it takes, before a weight is loaded.

    python -m train.plan --config train/recipes/v1.0-7b-pretrain.yaml --gpus 8 --gpu-memory 80GB

Any key of the recipe can follow as a flag. A recipe that continues a student which does not exist yet needs the
`--vision_model` and `--language_model` of the stage before. Only configurations are read.
"""

import argparse
import re
import sys
from typing import Any

from train.arguments import TrainingParser, check_arguments


PROG = "python -m train.plan"


def parse_memory(text: str) -> int:
    """Bytes of `"80GB"` (10^9 each) or `"80GiB"` (2^30 each)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"The memory is {text!r}; write it as 80GB or 80GiB.")
    return int(float(match[1]) * (10**9 if match[2] == "GB" else 2**30))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__.split("\n\n")[0])
    parser.add_argument("--gpus", type=int, required=True, help="Number of GPUs, with one process each.")
    parser.add_argument("--gpu-memory", type=parse_memory, required=True, help="Of one GPU, as 80GB or 80GiB.")
    parser.add_argument("--gpu-peak", type=float, default=312.0, help="TFLOP/s in bf16, dense; an A100 has 312.")
    parser.add_argument("--utilization", type=float, default=0.4, help="Share of the peak that is reached.")
    parser.add_argument("--tokens", type=int, help="Length of a row with its image; max_length by default.")
    parser.add_argument("--rows", type=int, help="Rows of the data set, for the days.")
    options, recipe = parser.parse_known_args(arguments)
    bounds = {"gpus": (1, 10**6), "gpu_peak": (0.1, 1e6), "utilization": (0.01, 1)}
    for name, (low, high) in bounds.items():
        if not low <= (value := getattr(options, name)) <= high:
            parser.error(f"--{name.replace('_', '-')} is {value}; it goes from {low:g} to {high:g}.")
    recipe += ["--use_cpu", "true"]
    check_arguments(PROG, recipe, loads=False)
    from train.plan.report import accumulated, format_plan, measure_step  # imports torch, which takes seconds

    parsed: tuple[Any, ...] = TrainingParser(PROG).parse_args_and_config(recipe)
    _, args, model_args = parsed
    accumulated(args, options.gpus)  # refuse before measuring, which takes a minute
    step = measure_step(args, model_args, options.tokens)
    print(format_plan(step, options.gpus, options.gpu_memory, options.rows, options.gpu_peak, options.utilization))


if __name__ == "__main__":
    main(sys.argv[1:])
