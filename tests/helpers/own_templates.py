"""Chat templates of language models for texts alone: those that TRL keeps, and two more that it does not have."""

from pathlib import Path

import trl


MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}"
)
# The system prompt goes to the last question
MISTRAL_V3 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for message in rest %}"
    "{% if message['role'] == 'user' %}{% if loop.revindex0 <= 1 and system is defined %}"
    "{{ '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Nothing follows the last answer
ALPACA = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ '### Response:\n' + message.content + ('' if loop.last else '\n\n') }}"
    "{% elif message.role == 'user' %}{{ '### Instruction:\n' + message.content + '\n\n' }}"
    "{% else %}{{ message.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
_FILES = "gemma gemma3 llama3 llama3_1 llama3_2 phi3 phi3_5 qwen2_5 qwen3 qwen3_instruct_2507 qwen3_training".split()
_FOLDER = Path(trl.__file__).parent / "chat_templates"
OWN_TEMPLATES = {name: (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8") for name in _FILES}
OWN_TEMPLATES |= {"mistral": MISTRAL, "mistral_v3": MISTRAL_V3, "smollm": SMOLLM}
OPEN_ENDED_TEMPLATES = {"alpaca": ALPACA} | {
    name: (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8") for name in ("glm4moe", "gptoss")
}

# What follows an answer
END_OF_TURN = {
    name: end
    for names, end in (
        ("gemma gemma3", "<end_of_turn>"),
        ("llama3 llama3_1 llama3_2", "<|eot_id|>"),
        ("phi3 phi3_5", "<|end|>"),
        ("qwen2_5 qwen3 qwen3_instruct_2507 qwen3_training smollm", "<|im_end|>"),
        ("mistral mistral_v3", "</s>"),
    )
    for name in names.split()
}
