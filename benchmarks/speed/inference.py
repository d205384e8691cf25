"""
Time until an answer: `python -m benchmarks.speed.inference`.

- The second turn of a chat up to its first token, with the image's features kept from the first turn. The rival passes
  the image through the tower again.
- An answer with a static cache, eager and (`--compile`) compiled, over the growing cache that `generate` uses by
  default.

CLIP-L/14-336 and a language model of SmolLM2-135M's size, with random weights, and one picture.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.speed.options import parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    flags = parser(__doc__, repeats=3)
    flags.add_argument("--new_tokens", type=int, default=32)
    flags.add_argument("--compile", action="store_true", help="also compile; takes a minute and a C++ compiler")
    return flags.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

import torch
from PIL import Image
from transformers import CompileConfig

from benchmarks.speed.measure import paired_row, paired_times, report, start
from benchmarks.speed.models import CLIP_LARGE, TOY_CLIP, vision_language_model
from modeling_movekd import MoveKDForConditionalGeneration
from modeling_movekd.inference import Conversation, user_message
from modeling_movekd.prompts import prepare


SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
SMOLLM2 |= {"num_key_value_heads": 3, "vocab_size": 49152}
TOY_LANGUAGE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOY_LANGUAGE |= {"vocab_size": 2000}


def build(toy: bool, device: str, dtype: str) -> tuple[MoveKDForConditionalGeneration, Any]:
    language = TOY_LANGUAGE if toy else SMOLLM2
    model, processor = vision_language_model(TOY_CLIP if toy else CLIP_LARGE, language | {"eos_token_id": None})
    model = model.to(device, getattr(torch, dtype)).eval()
    model.fold_experts()
    model.generation_config.eos_token_id = None  # random weights could end early
    return model, processor


def second_turn(model: MoveKDForConditionalGeneration, processor: Any) -> dict[str, Callable[[], Any]]:
    conversation = Conversation(model, processor, max_new_tokens=1, do_sample=False)
    conversation.ask("what is there", [Image.new("RGB", (640, 480), "red")])
    messages = [*conversation.messages, user_message("and where is it")]

    def kept() -> str:
        return copy.copy(conversation).ask("and where is it")

    @torch.inference_mode()
    def again() -> Any:
        return model.generate(**prepare(processor, [messages], model.device), max_new_tokens=1, do_sample=False)

    return {"kept": kept, "again": again}


def generation(
    model: MoveKDForConditionalGeneration, processor: Any, new_tokens: int, compiled: bool
) -> dict[str, Callable[[], Any]]:
    prompt = [user_message("what is there", [Image.new("RGB", (640, 480), "red")])]
    inputs = prepare(processor, [prompt], model.device)
    common = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    static = {"cache_implementation": "static", "disable_compile": True}
    variants: dict[str, dict[str, Any]] = {"dynamic": {}, "static": static}
    if compiled:
        config = CompileConfig(mode="default", fullgraph=False)
        config._compile_all_devices = True  # by default, generate compiles on GPUs alone
        variants["compiled"] = {"cache_implementation": "static", "compile_config": config}

    def runner(settings: dict[str, Any]) -> Callable[[], Any]:
        return torch.inference_mode()(lambda: model.generate(**inputs, **common, **settings))

    return {name: runner(settings) for name, settings in variants.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    start(options)
    model, processor = build(options.toy, options.device, options.dtype)
    turns = paired_times(second_turn(model, processor), options.repeats)
    new_tokens = 4 if options.toy else options.new_tokens
    runs = generation(model, processor, new_tokens, options.compile)
    outputs = {name: run() for name, run in runs.items()}
    agreed = all(torch.equal(output, outputs["dynamic"]) for output in outputs.values())
    times = paired_times(runs, options.repeats)
    rows = [
        paired_row(
            "second turn up to the first token, features of the image kept",
            turns["kept"],
            turns["again"],
            note="rival: the image passes the tower again",
        )
    ]
    for name in list(runs)[1:]:
        what = f"answer of {new_tokens} tokens, static cache{', compiled' if name == 'compiled' else ''}"
        rows.append(paired_row(what, times[name], times["dynamic"], note="rival: growing cache"))
    context = {"batch": 1, "dtype": options.dtype, "repeats": options.repeats, "same tokens": agreed}
    report("Inference", rows, context, options.out)


if __name__ == "__main__":
    main()
