"""
LLaVA's two conversation formats as chat templates, `vicuna_v1` for conversations and `plain` to train on bare
captions, and a language model's own template, made to take images.

All take the content of a message as a string, where `<image>` stands for an image, or as a list of
`{"type": "image"}` and `{"type": "text", "text": ...}` parts. A single image of a turn comes first, as in LLaVA;
several keep their places. Parts are joined by a new line. `{% generation %}` marks the answers for a trainer's loss.
The template writes the beginning-of-sequence token, where the language model has one, and the tokenizer adds no token:
so there is one however a text is tokenized.
"""

import copy
import json
import os
import re

from transformers import PreTrainedTokenizerBase, ProcessorMixin


IMAGE_TOKEN = "<image>"
DEFAULT_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# Whether the language model has a beginning-of-sequence token. `bos_suffix` goes between the token and a text, see
# `chat_template_for`.
_BOS = "{%- set bos = bos_token -%}"
_NO_BOS = "{%- set bos = '' -%}"
_BOS_SUFFIX = "{%- set bos_suffix = ' ' -%}"
_NO_BOS_SUFFIX = "{%- set bos_suffix = '' -%}"
# LLaVA tokenizes the text after an image separately, so that SentencePiece puts a word-boundary mark in front of it.
# In one string, a space after the placeholder gives that mark.
_IMAGE_SUFFIX = "{%- set image_suffix = ' ' -%}"
_NO_IMAGE_SUFFIX = "{%- set image_suffix = '' -%}"

# The messages with their contents as strings. vLLM looks for the loop over `message.content` to learn that a template
# takes parts. transformers.js has neither `dict`, `map('replace')` nor `select` without a test.
_TO_STRINGS = """
{%- set strings = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set turn = namespace(parts=[], texts=[], text='') -%}
{%- if message.content is string -%}
{%- set turn.parts = [message.content] -%}
{%- elif message.content -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{%- set turn.parts = turn.parts + ['<image>'] -%}
{%- elif part.type == 'text' -%}{%- set turn.parts = turn.parts + [part.text or ''] -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- for part in turn.parts -%}
{%- set text = part | replace('<image>', '') -%}
{%- if text -%}{%- set turn.texts = turn.texts + [text] -%}{%- endif -%}
{%- endfor -%}
{%- set pieces = (turn.parts | join('\\n')).split('<image>') -%}
{%- if pieces | length == 1 -%}
{%- set turn.text = turn.texts | join('\\n') -%}
{%- elif pieces | length == 2 -%}
{%- set text = turn.texts | join('\\n') | trim -%}
{%- set turn.text = '<image>' + (image_suffix + '\\n' + text if text else '') -%}
{%- else -%}
{%- for piece in pieces -%}
{%- set text = piece | trim -%}
{%- if not loop.first -%}
{%- set turn.text = turn.text + '<image>' + (image_suffix + '\\n' if text or not loop.last else '') -%}
{%- endif -%}
{%- set turn.text = turn.text + text + ('\\n' if text and not loop.last else '') -%}
{%- endfor -%}
{%- endif -%}
{%- set strings.messages = strings.messages + [{'role': message.role, 'content': turn.text}] -%}
{%- endfor -%}
{%- set messages = strings.messages -%}
"""

_VICUNA_V1 = """
{%- if messages and messages[0].role == 'system' -%}
{%- set system = messages[0].content -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = SYSTEM_PROMPT -%}
{%- set turns = messages -%}
{%- endif -%}
{{- bos + bos_suffix if bos else '' -}}
{{- system + ' ' if system else '' -}}
{%- for message in turns -%}
{%- set body = message.content -%}
{%- if message.role == 'user' -%}
{%- set body = body + image_suffix if body.endswith('<image>') else body -%}
{{- 'USER: ' + body + ' ' if body else 'USER:' -}}
{%- elif message.role == 'assistant' -%}
{{- 'ASSISTANT:' -}}
{%- generation -%}{{- ' ' + body + (eos_token or '') if body else '' -}}{%- endgeneration -%}
{%- else -%}
{{- raise_exception('Unknown role ' + message.role + ': expected user or assistant, and system only in front.') -}}
{%- endif -%}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt else '' -}}
""".replace("SYSTEM_PROMPT", '"' + DEFAULT_SYSTEM_PROMPT + '"')

_PLAIN = """
{{- bos -}}
{%- set seen = namespace(images=0, suffix=bos_suffix if bos else '') -%}
{%- for message in messages -%}
{%- set images = message.content.split('<image>') | length - 1 -%}
{%- for _ in range(images) -%}{{ '<image>' }}{%- if not loop.last -%}{{ image_suffix }}{%- endif -%}{%- endfor -%}
{%- set seen.images = seen.images + images -%}
{%- set seen.suffix = image_suffix if seen.images else seen.suffix -%}
{%- if message.role == 'assistant' -%}
{%- set caption = message.content.replace('<image>', '') | trim if images else message.content -%}
{%- generation -%}{{- seen.suffix + caption + '\\n' -}}{%- endgeneration -%}
{%- set seen.images = 0 -%}
{%- set seen.suffix = '' -%}
{%- elif message.role not in ('system', 'user') -%}
{{- raise_exception('Unknown role ' + message.role + ': expected system, user or assistant.') -}}
{%- endif -%}
{%- endfor -%}
{{- image_suffix if add_generation_prompt and seen.images else '' -}}
"""

CHAT_TEMPLATES: dict[str, str] = {
    name: _NO_BOS + _NO_BOS_SUFFIX + _IMAGE_SUFFIX + _TO_STRINGS + body
    for name, body in (("vicuna_v1", _VICUNA_V1), ("plain", _PLAIN))
}


def chat_template_for(processor: ProcessorMixin | PreTrainedTokenizerBase, name: str) -> str:
    """
    Return one of `CHAT_TEMPLATES`, adapted to a tokenizer.

    A beginning-of-sequence token is written if the tokenizer adds one, or the processor's present template writes one.
    Some tokenizers mark the beginning of a word after a special token by themselves, or mark no words. Their template
    has no space after `<image>` and the beginning-of-sequence token. In both forms the token ids equal those of LLaVA,
    which tokenizes the text after an image separately.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): A tokenizer that knows `<image>`, or its processor.
        name (`str`): Key of `CHAT_TEMPLATES`.

    Raises:
        ValueError: If the name is unknown, or the tokenizer would split `<image>` into several tokens.
    """
    if name not in CHAT_TEMPLATES:
        raise ValueError(f"Unknown chat template {name!r}: choose from {sorted(CHAT_TEMPLATES)}.")
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.tokenize(IMAGE_TOKEN) != [IMAGE_TOKEN]:
        raise ValueError(
            f"{IMAGE_TOKEN!r} is tokenized as {tokenizer.tokenize(IMAGE_TOKEN)}, not as one token. Add it with "
            "`modeling_movekd.processing.add_image_token(tokenizer)`."
        )
    template = CHAT_TEMPLATES[name]
    if tokenizer.tokenize(IMAGE_TOKEN + "\nA")[1:] == tokenizer.tokenize("\nA"):
        template = template.replace(_IMAGE_SUFFIX, _NO_IMAGE_SUFFIX)
    if adds_bos(tokenizer) or _BOS in (processor.chat_template or ""):
        template = template.replace(_NO_BOS, _BOS)
        if _bos_suffix(tokenizer, "A"):
            template = template.replace(_NO_BOS_SUFFIX, _BOS_SUFFIX)
    return template


def set_chat_template(
    processor: ProcessorMixin | PreTrainedTokenizerBase, name: str
) -> ProcessorMixin | PreTrainedTokenizerBase:
    """
    Set one of `CHAT_TEMPLATES` on a tokenizer, or on a processor and its tokenizer, and return the same object. The
    template writes the beginning-of-sequence token, and the tokenizer adds no token any more.
    """
    return _set(processor, chat_template_for(processor, name))


def _set(
    processor: ProcessorMixin | PreTrainedTokenizerBase, template: str
) -> ProcessorMixin | PreTrainedTokenizerBase:
    tokenizer = getattr(processor, "tokenizer", processor)
    _stop_adding_special_tokens(tokenizer)
    tokenizer.chat_template = template
    if tokenizer is not processor:
        processor.chat_template = template
    return processor


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a beginning-of-sequence token in front of a text."""
    return tokenizer.bos_token_id is not None and tokenizer("A").input_ids[:1] == [tokenizer.bos_token_id]


def _stop_adding_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer add no token to a text, since a chat template writes them all."""
    if not _added_tokens(tokenizer):
        return
    for setting in ("add_bos_token", "add_eos_token"):
        if getattr(tokenizer, setting, False):
            setattr(tokenizer, setting, False)
        tokenizer.init_kwargs[setting] = False
    backend, kind = getattr(tokenizer, "backend_tokenizer", None), type(tokenizer).__name__
    if _added_tokens(tokenizer) and backend is not None:
        # tokenizers has no setter for a part of a template, so edit the form that it is saved in
        processor = copy.deepcopy(backend.post_processor)
        state = json.loads(processor.__getstate__())
        parts = state["processors"] if state["type"] == "Sequence" else [state]
        for part in parts:
            for form in ("single", "pair") if part["type"] == "TemplateProcessing" else ():
                part[form] = [piece for piece in part[form] if "SpecialToken" not in piece]
        processor.__setstate__(json.dumps(state).encode())
        backend.post_processor = processor
        kind = " and ".join(part["type"] for part in parts)
    if added := _added_tokens(tokenizer):
        raise ValueError(
            f"The tokenizer adds {added} to every text, where the chat template writes such tokens, and its {kind} "
            "cannot be told not to. Give a tokenizer whose post-processor is a TemplateProcessing of the tokenizers "
            "library."
        )


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    bare = tokenizer("A", add_special_tokens=False).input_ids
    return tokenizer.convert_ids_to_tokens([token for token in tokenizer("A").input_ids if token not in bare])


def _bos_suffix(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """What to write between the beginning-of-sequence token and a text, so that the text's ids stay as they are."""
    expected = tokenizer(text, add_special_tokens=False).input_ids
    spaced = tokenizer(f"{tokenizer.bos_token} {text}", add_special_tokens=False).input_ids
    joined = tokenizer(f"{tokenizer.bos_token}{text}", add_special_tokens=False).input_ids
    return " " if joined[1:] != expected and spaced[1:] == expected else ""


# A conversation that shows whether a template takes images and marks answers
_PROBE = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A red bus."}]},
    {"role": "user", "content": [{"type": "text", "text": "And when?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "At night."}]},
]
_ASKED, _ANSWERED = ("Be brief.", "What is shown?", "And when?"), ("A red bus.", "At night.")
# Characters for private use, which no template changes. The first that a conversation does not have marks its answers
_MARKS = "\ue0a5\ue0a6\ue0a7\ue0a8"

_FOLD_SYSTEM = """
{%- if messages | length > 1 and messages[0].role == 'system' -%}
{%- set asked = messages[0].content + '\\n\\n' + messages[1].content -%}
{%- set messages = [dict(messages[1], content=asked)] + messages[2:] -%}
{%- endif -%}
"""
# Renders a language model's template twice: as it is, and with a mark in place of each answer. The texts around the
# marks are looked for in the first rendering, and what they enclose are the answers. If they are not found, no answer
# is marked.
_OWN = """
{%- macro own(messages, add_generation_prompt) %}
OWN_TEMPLATE{% endmacro -%}
{%- set rendered = own(messages, add_generation_prompt) -%}
{%- set marked = namespace(messages=[], answers=0, mark='MARKS'[0]) -%}
{%- for mark in 'MARKS' | reverse if mark not in messages | map(attribute='content') | join -%}
{%- set marked.mark = mark -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- set marked.answers = marked.answers + 1 -%}
{#- A template may take out a thought, or write an empty one where there is none, so the thought stays -#}
{%- set thought = message.content.rpartition('</think>') -%}
{%- set marked.messages = marked.messages + [dict(message, content=thought[0] + thought[1] + marked.mark)] -%}
{%- else -%}
{%- set marked.messages = marked.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set frames = own(marked.messages, add_generation_prompt).split(marked.mark) -%}
{%- set cut = namespace(answer=0, at=0, spans=[], fits=rendered.startswith(frames[0])) -%}
{%- set cut.fits = cut.fits and frames | length == marked.answers + 1 -%}
{%- for message in messages -%}
{%- if cut.fits and message.role == 'assistant' -%}
{%- set cut.answer = cut.answer + 1 -%}
{%- set after = frames[cut.answer] -%}
{%- set start = cut.at + frames[cut.answer - 1] | length -%}
{%- set is_last = cut.answer == marked.answers -%}
{%- set end = rendered | length - after | length if is_last else rendered.find(after, start) -%}
{%- set cut.fits = end >= start and rendered[end:].startswith(after) -%}
{#- What the template puts between the heading of an answer and the answer is generated, too -#}
{%- set prompt = own(messages[:loop.index0], true) -%}
{%- if rendered.startswith(prompt) and prompt | length >= cut.at and prompt | length < start -%}
{%- set start = prompt | length -%}
{%- endif -%}
{%- set closing = CLOSING if after.startswith(CLOSING) else '' -%}
{%- set closing = after.rstrip() if is_last and loop.last and not closing else closing -%}
{%- set cut.spans = cut.spans + ([[start, end + closing | length]] if message.content else []) -%}
{%- set cut.at = end -%}
{%- endif -%}
{%- endfor -%}
{%- set done = namespace(at=0) -%}
{%- for span in cut.spans if cut.fits -%}
{{- rendered[done.at:span[0]] -}}
{%- generation -%}{{- rendered[span[0]:span[1]] -}}{%- endgeneration -%}
{%- set done.at = span[1] -%}
{%- endfor -%}
{{- rendered[done.at:] -}}
""".replace("MARKS", _MARKS)


def has_answer_markers(template: str | None) -> bool:
    """Whether a chat template has `{% generation %}` around answers."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template or "") is not None


def chat_template_name(processor: ProcessorMixin | PreTrainedTokenizerBase) -> str | None:
    """Return the name of the processor's template in `CHAT_TEMPLATES`, also if an earlier release wrote it."""
    tokenizer = getattr(processor, "tokenizer", processor)

    def rendered(template: str | None) -> str | None:
        try:
            text = tokenizer.apply_chat_template(_PROBE[1:], chat_template=template, tokenize=False)
        except Exception:  # a stranger's template raises what it likes
            return None
        return text.removeprefix(tokenizer.bos_token or "").lstrip(" ")

    present = rendered(processor.chat_template)
    names = [name for name in CHAT_TEMPLATES if rendered(chat_template_for(processor, name)) == present]
    return names[0] if names and present is not None else None


def set_own_chat_template(
    processor: ProcessorMixin | PreTrainedTokenizerBase, template: str
) -> ProcessorMixin | PreTrainedTokenizerBase:
    """
    Set a language model's own template on a tokenizer, or on a processor and its tokenizer, and return that object.

    A template that is made for texts alone gets the contents as strings, with `<image>` in them, and its answers are
    marked. If it takes no system message, the system prompt goes in front of the first question. All is checked on a
    conversation.

    Raises:
        ValueError: If the template cannot be used.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    has_bos = adds_bos(tokenizer) or _BOS in (processor.chat_template or "")
    used, (flaw, rendered) = template, _flaw(tokenizer, template)
    for folds_system in (False, True):
        if flaw:
            used = _with_strings(tokenizer, template, folds_system)
            flaw, rendered = _flaw(tokenizer, used)
    if flaw:
        raise ValueError(
            f"`chat_template` is 'own', but the tokenizer's template {flaw}. "
            + (f"It renders a conversation as {rendered!r}. " if rendered else "")
            + "Choose 'vicuna_v1'."
        )
    if has_bos and not rendered.startswith(tokenizer.bos_token):
        suffix = _bos_suffix(tokenizer, rendered)
        used = "{{- bos_token + ' ' -}}" + used if suffix else "{{- bos_token -}}" + used
    if has_bos and _BOS not in used:
        used = _BOS + used
    return _set(processor, used)


def _with_strings(tokenizer: PreTrainedTokenizerBase, template: str, folds_system: bool) -> str:
    """Wrap a template that takes texts alone, and mark its answers."""
    # Markers may also stand in a comment, so put a statement without effect in their place
    for word, instead in (("generation", "if true"), ("endgeneration", "endif")):
        template = re.sub(rf"(\{{%-?)\s*{word}\s*(-?%\}})", rf"\1 {instead} \2", template)
    template = template.removesuffix("\n")
    asked = {"role": "user", "content": "?"}
    answered = {"role": "assistant", "content": _MARKS[0]}
    try:
        text = tokenizer.apply_chat_template([asked, answered] * 2, chat_template=template, tokenize=False)
    except Exception:  # a stranger's template raises what it likes; `_flaw` says so
        text = ""
    # The whole tokens that end every answer
    ends = text.split(_MARKS[0])[1:] or [""]
    shared = os.path.commonprefix([tokenizer(end, add_special_tokens=False).input_ids for end in ends])
    offsets = tokenizer(ends[0], add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    closing = ends[0][: offsets[len(shared) - 1][1]].rstrip() if shared else ""
    head = _NO_IMAGE_SUFFIX + _TO_STRINGS + (_FOLD_SYSTEM if folds_system else "")
    return head + _OWN.replace("CLOSING", json.dumps(closing)).replace("OWN_TEMPLATE", template)


def _flaw(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, str]:
    """What is wrong with a template, as the end of a sentence, or an empty text; and how it renders a conversation."""
    try:
        text = tokenizer.apply_chat_template(_PROBE, chat_template=template, tokenize=False)
        if not has_answer_markers(template):
            return "marks no answer", text
        encoded = tokenizer.apply_chat_template(
            _PROBE, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    except Exception as error:  # a stranger's template raises what it likes
        return f"raises {type(error).__name__}: {error}", ""
    if missing := [said for said in (*_ASKED, *_ANSWERED) if said not in text]:
        return f"leaves out {missing}", text
    if (images := encoded["input_ids"].count(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))) != 1:
        return f"has {images} image tokens for one image", text
    trained = {
        place
        for (start, end), mask in zip(offsets, encoded["assistant_masks"], strict=True)
        for place in range(start, end)
        if mask
    }
    places = {said: set(range(text.find(said), text.find(said) + len(said))) for said in (*_ASKED, *_ANSWERED)}
    if unmarked := [said for said in _ANSWERED if not places[said] <= trained]:
        return f"does not mark the answers {unmarked}", text
    if marked := [said for said in _ASKED if places[said] & trained]:
        return f"marks the questions {marked} as answers", text
    return "", text
