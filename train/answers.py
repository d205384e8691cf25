"""Evaluation by generation while training: answers to a few rows, compared with the data's."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from modeling_movekd.images import decode_image
from train.config import MoveKDSFTConfig
from train.data.collator import MoveKDCollator
from train.distributed import fsdp_is_asked_for


SHOWN = 3
# An answer may be this much longer than the data's before it is cut
MORE_TOKENS = 8


def check_eval_generate(args: MoveKDSFTConfig) -> None:
    """Refuse evaluation by generation without evaluation, and under backends that cut the weights apart."""
    if not args.eval_generate:
        return
    if args.eval_generate < 0 or args.eval_strategy == "no":
        raise ValueError(
            f"`eval_generate` is {args.eval_generate} with `eval_strategy` {args.eval_strategy}. Give a number of "
            "rows and an `eval_strategy`, or 0."
        )
    plugin = args.deepspeed_plugin
    if fsdp_is_asked_for() or (plugin is not None and plugin.hf_ds_config.is_zero3()):
        raise ValueError(
            f"`eval_generate` is {args.eval_generate}, but under FSDP and ZeRO-3 no process holds the whole model to "
            "generate with. Set it to 0, or train with DDP or ZeRO-2."
        )


@torch.no_grad()
def exact_match(
    model: PreTrainedModel,
    collator: MoveKDCollator,
    rows: Iterable[Mapping[str, Any]],
    count: int,
    accelerator: Accelerator,
    show: Callable[[str], None],
) -> float:
    """
    Answer the last question of the first `count` rows greedily, each process a part of them.

    Args:
        model (`PreTrainedModel`): The unwrapped student, in evaluation mode.
        collator (`MoveKDCollator`): Gives the processor, with the template that the stage trains with.
        rows (`Iterable`): The evaluation data. Rows that cannot be used are left out.
        count (`int`): Number of rows.
        accelerator (`Accelerator`): Adds up the processes' numbers.
        show (`Callable`): Prints the first answers.

    Returns:
        The share of the answers that equal the data's.
    """
    start, step = accelerator.process_index, accelerator.num_processes
    same = asked = 0
    for row in islice(rows, start, count, step):
        try:
            if row.get("problem") is not None:
                continue
            images = [decode_image(image, collator.apply_orientation) for image in row["images"] or []]
        except ValueError:
            continue
        *question, last = row["messages"]
        truth = _text(last).strip()
        answer = _answer(model, collator, question, images, truth)
        asked, same = asked + 1, same + (answer == truth)
        if asked <= SHOWN:
            show(f"{_text(question[-1]).strip()}\n  answer: {answer}\n  data:   {truth}")
    totals = accelerator.reduce(torch.tensor([same, asked], device=accelerator.device), reduction="sum")
    same, asked = totals.tolist()
    return same / max(asked, 1)


def _answer(
    model: PreTrainedModel,
    collator: MoveKDCollator,
    question: list[Mapping[str, Any]],
    images: list[Any],
    truth: str,
) -> str:
    processor = collator.processor
    inputs = processor.apply_chat_template(
        collator.with_images(question, images, 0),
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    longest = len(processor.tokenizer(truth).input_ids) + MORE_TOKENS
    generated = model.generate(**inputs, max_new_tokens=longest, do_sample=False, use_cache=True)
    return processor.tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
