"""
Accuracy and size with int8 and 4-bit weights: `python -m benchmarks.speed.quantization outputs/demo`.

The checkpoint answers the demo's questions as it is, and with its linear layers in 8 and 4 bits.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.speed.options import parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("checkpoint", help="the demo's, or another that answers questions about its scenes")
    options.add_argument("--questions", type=int, default=500)
    return options.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

import torch
from transformers import BitsAndBytesConfig

from benchmarks.speed.measure import Row, report, start
from modeling_movekd import MoveKDForConditionalGeneration
from modeling_movekd.processing import load_processor
from train.demo.run import accuracy_by_family, answer_questions
from train.demo.scenes import scenes


# The projector keeps its precision: its outputs must match the embeddings of words
KEPT = ["multi_modal_projector", "lm_head"]
PRECISIONS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "4-bit (nf4)": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}


def main(arguments: Sequence[str] | None = None) -> str:
    chosen = parse_arguments(arguments)
    start(chosen)
    rows = scenes("test", 10 if chosen.toy else chosen.questions)
    processor = load_processor(chosen.checkpoint)
    found: dict[str, tuple[float, float]] = {}
    every: dict[str, dict[str, Any]] = {"as it is": {}} | PRECISIONS
    for name, settings in every.items():
        model = MoveKDForConditionalGeneration.from_pretrained(
            chosen.checkpoint,
            dtype=getattr(torch, chosen.dtype),
            device_map={"": chosen.device},
            quantization_config=BitsAndBytesConfig(**settings, llm_int8_skip_modules=KEPT) if settings else None,
        )
        accuracies = accuracy_by_family(answer_questions(model, processor, rows), rows)
        found[name] = 100 * statistics.fmean(accuracies.values()), model.get_memory_footprint() / 1e6
    whole_accuracy, whole_size = found["as it is"]
    table = []
    for name in PRECISIONS:
        accuracy, size = found[name]
        table.append(Row(f"{name}: right answers, mean of the families", accuracy, whole_accuracy, "%"))
        table.append(Row(f"{name}: weights", size, whole_size, "MB"))
    context = {"checkpoint": chosen.checkpoint, "questions": len(rows), "dtype": chosen.dtype}
    return report("Quantized weights over whole ones", table, context, chosen.out)


if __name__ == "__main__":
    main()
