"""
Turn conversations into a model's inputs, where what a person writes stays text.

`spaces/prompts.py` is a copy of this file, since the Space imports nothing of this package.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AddedToken, PreTrainedTokenizerBase, ProcessorMixin


# A Unicode noncharacter, which breaks up special tokens in texts
BREAK = "\ufdd0"


def prepare(
    processor: ProcessorMixin, conversations: Sequence[Sequence[Mapping[str, Any]]], device: torch.device
) -> dict[str, torch.Tensor]:
    """
    Turn conversations into one batch of model inputs, padded on the left and ready for an answer.

    Special tokens in the texts of the conversations stay text: only the chat template can end a turn.
    """
    broken = [_break_special_tokens(processor.tokenizer, conversation) for conversation in conversations]
    has_special = broken != [list(conversation) for conversation in conversations]
    if has_special:
        processor = copy.deepcopy(processor)
        processor.tokenizer.add_tokens(AddedToken(BREAK, normalized=False), special_tokens=True)
    inputs = processor.apply_chat_template(
        broken,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    if has_special:
        inputs.update(_without_breaks(inputs, processor.tokenizer))
    return dict(inputs.to(device))


def _break_special_tokens(
    tokenizer: PreTrainedTokenizerBase, conversation: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Put `BREAK` behind the first character of each special token in the texts of a conversation."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = sorted((token for token in added | {*tokenizer.all_special_tokens} if len(token) > 1), key=len)
    if not special:
        return list(conversation)
    pattern = re.compile("|".join(map(re.escape, reversed(special))))

    def with_breaks(text: str) -> str:
        return pattern.sub(lambda match: f"{match[0][0]}{BREAK}{match[0][1:]}", text)

    messages: list[Mapping[str, Any]] = []
    for message in conversation:
        content = message["content"]
        if isinstance(content, str):
            content = with_breaks(content)
        else:
            content = [{**part, "text": with_breaks(part["text"])} if "text" in part else part for part in content]
        messages.append({**message, "content": content})
    return messages


def _without_breaks(inputs: Mapping[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Remove `BREAK` from the tokens of a batch, and pad on the left again."""
    is_break = inputs["input_ids"] == tokenizer.convert_tokens_to_ids(BREAK)
    order = torch.argsort((~is_break).int(), dim=1, stable=True)  # the breaks first, where they become padding
    count = is_break.sum(1, keepdim=True)
    is_padding = torch.arange(is_break.shape[1])[None] < count
    changed = {
        key: value.gather(1, order).masked_fill(is_padding, (tokenizer.pad_token_id or 0) * (key == "input_ids"))
        for key, value in inputs.items()
        if value.shape == is_break.shape
    }
    begin = int(changed["attention_mask"].any(0).int().argmax())
    return {key: value[:, begin:] for key, value in changed.items()}
