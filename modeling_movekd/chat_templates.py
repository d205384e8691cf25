"""
LLaVA's two conversation formats as chat templates: `vicuna_v1` for conversations, `plain` to train on bare captions.

Both take the content of a message as a string, where `<image>` stands for an image, or as a list of
`{"type": "image"}` and `{"type": "text", "text": ...}` parts. They move the images of a turn in front of its text, as
LLaVA does. `{% generation %}` marks the answers for a trainer's loss. The tokenizer adds the beginning-of-sequence
token.
"""

from transformers import PreTrainedTokenizerBase, ProcessorMixin


IMAGE_TOKEN = "<image>"
DEFAULT_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# LLaVA tokenizes the text after an image separately, so that SentencePiece puts a word-boundary mark in front of it.
# In one string, a space after the placeholder gives that mark.
_IMAGE_SUFFIX = "{%- set image_suffix = ' ' -%}"
_NO_IMAGE_SUFFIX = "{%- set image_suffix = '' -%}"

_MACROS = """
{%- macro number_of_images(content) -%}
{%- if content is string -%}{{ content.split('<image>') | length - 1 }}
{%- else -%}{{ (content or []) | selectattr('type', 'equalto', 'image') | list | length }}{%- endif -%}
{%- endmacro -%}
{%- macro text_of(content) -%}
{%- if content is string -%}{{ (content.replace('<image>', '') | trim) if '<image>' in content else content }}
{%- else -%}{%- for part in content or [] if part.type == 'text' -%}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
"""

_VICUNA_V1 = """
{%- macro turn(content, suffix_of_lone_image) -%}
{%- set images = number_of_images(content) | int -%}
{%- set text = text_of(content) -%}
{%- for _ in range(images) -%}{{ '<image>' }}
{%- if text or not loop.last -%}{{ image_suffix + '\\n' }}{%- else -%}{{ suffix_of_lone_image }}{%- endif -%}
{%- endfor -%}
{{- text -}}
{%- endmacro -%}
{%- if messages and messages[0].role == 'system' -%}
{%- set system = text_of(messages[0].content) -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = SYSTEM_PROMPT -%}
{%- set turns = messages -%}
{%- endif -%}
{{- system + ' ' if system else '' -}}
{%- for message in turns -%}
{%- set body = turn(message.content, image_suffix if message.role == 'user' else '') -%}
{%- if message.role == 'user' -%}
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
{%- set seen = namespace(images=0) -%}
{%- for message in messages -%}
{%- set images = number_of_images(message.content) | int -%}
{%- for _ in range(images) -%}{{ '<image>' }}{%- if not loop.last -%}{{ image_suffix }}{%- endif -%}{%- endfor -%}
{%- set seen.images = seen.images + images -%}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- (image_suffix if seen.images else '') + text_of(message.content) + '\\n' -}}{%- endgeneration -%}
{%- set seen.images = 0 -%}
{%- elif message.role not in ('system', 'user') -%}
{{- raise_exception('Unknown role ' + message.role + ': expected system, user or assistant.') -}}
{%- endif -%}
{%- endfor -%}
{{- image_suffix if add_generation_prompt and seen.images else '' -}}
"""

CHAT_TEMPLATES: dict[str, str] = {
    "vicuna_v1": _IMAGE_SUFFIX + _MACROS + _VICUNA_V1,
    "plain": _IMAGE_SUFFIX + _MACROS + _PLAIN,
}


def chat_template_for(processor: ProcessorMixin | PreTrainedTokenizerBase, name: str) -> str:
    """
    Return one of `CHAT_TEMPLATES`, adapted to a tokenizer.

    Some tokenizers mark the beginning of a word after a special token by themselves, or mark no words. Their template
    has no space after `<image>`. In both forms the token ids equal those of LLaVA, which tokenizes the text after an
    image separately.

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
    return template


def set_chat_template(
    processor: ProcessorMixin | PreTrainedTokenizerBase, name: str
) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Set one of `CHAT_TEMPLATES` on a tokenizer, or on a processor and its tokenizer, and return the same object."""
    template = chat_template_for(processor, name)
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.chat_template = template
    if tokenizer is not processor:
        processor.chat_template = template
    return processor
