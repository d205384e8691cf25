"""Chat templates that language models bring, most of them for texts alone, with images and marked answers."""

import copy

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from modeling_movekd.chat_templates import adds_bos, has_answer_markers, set_chat_template, set_own_chat_template
from modeling_movekd.processing import add_image_token
from tests.helpers.own_templates import END_OF_TURN, OWN_TEMPLATES
from tests.helpers.tiny import make_tokenizer


QUESTION = [{"type": "image"}, {"type": "text", "text": "What?"}]
CONVERSATION = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(chat_template=template)
    add_image_token(tokenizer)
    ends = sorted(set(END_OF_TURN.values()) - {tokenizer.eos_token})
    tokenizer.add_special_tokens({"extra_special_tokens": ends}, replace_extra_special_tokens=False)
    return tokenizer


@pytest.fixture(params=sorted(OWN_TEMPLATES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def trained_texts(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> list[str]:
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    texts, before = [], 0
    for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if mask and not before:
            texts.append([])
        if mask:
            texts[-1].append(token)
        before = mask
    return [tokenizer.decode(ids) for ids in texts]


def test_answers_are_marked_to_their_end(name: str) -> None:
    tokenizer = set_own_chat_template(tokenizer_of(OWN_TEMPLATES[name]), OWN_TEMPLATES[name])
    first, second = trained_texts(tokenizer, CONVERSATION)
    assert first.strip().endswith(f"Yes.{END_OF_TURN[name]}") and second.strip().endswith(f"Yes.{END_OF_TURN[name]}")
    # Qwen3 puts an empty thought before the last answer, which the model must learn to write
    assert ("<think>" in second) is (name in ("qwen3", "qwen3_training"))
    assert not any(text in first + second for text in ("What?", "Sure?", "user", "model", "assistant"))
    unanswered = [*CONVERSATION[:1], CONVERSATION[1] | {"content": ""}, *CONVERSATION[2:]]
    assert trained_texts(tokenizer, unanswered) == [second]


def test_thoughts_in_answers_are_trained_where_the_template_keeps_them(name: str) -> None:
    tokenizer = set_own_chat_template(tokenizer_of(OWN_TEMPLATES[name]), OWN_TEMPLATES[name])
    answers = [{"role": "assistant", "content": f"<think>\n{word}\n</think>\n\nYes."} for word in ("Hm.", "Well.")]
    messages = [CONVERSATION[0], answers[0], CONVERSATION[2], answers[1]]
    first, second = trained_texts(tokenizer, messages)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "Yes." in first and ("Hm." in first) is ("Hm." in rendered)
    assert "<think>\nWell.\n</think>\n\nYes." in second and "Well." not in first


def test_the_text_is_the_language_model_s(name: str) -> None:
    """With `<image>` in front of the question, and otherwise unchanged."""
    tokenizer = tokenizer_of(OWN_TEMPLATES[name])
    strings = [CONVERSATION[0] | {"content": "<image>\nWhat?"}, *CONVERSATION[1:]]
    expected = [
        tokenizer.apply_chat_template(strings[:end], tokenize=False, add_generation_prompt=asked)
        for end, asked in ((4, False), (3, True), (1, True))
    ]
    set_own_chat_template(tokenizer, OWN_TEMPLATES[name])
    found = [
        tokenizer.apply_chat_template(CONVERSATION[:end], tokenize=False, add_generation_prompt=asked)
        for end, asked in ((4, False), (3, True), (1, True))
    ]
    assert found == expected


def test_several_images_and_a_system_prompt(name: str) -> None:
    tokenizer = set_own_chat_template(tokenizer_of(OWN_TEMPLATES[name]), OWN_TEMPLATES[name])
    places = [
        {"type": "text", "text": "Left:"},
        {"type": "image"},
        {"type": "text", "text": "Right:"},
        {"type": "image"},
    ]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": places},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "Left:\n<image>\nRight:\n<image>" in rendered and rendered.count("Be brief.") == 1
    assert rendered.index("Be brief.") < rendered.index("Left:")


@pytest.mark.parametrize("adds", [True, False])
def test_one_beginning_token(name: str, adds: bool) -> None:
    """Where the tokenizer adds one or the template writes one, also after the template of the first stage."""
    tokenizer = tokenizer_of(OWN_TEMPLATES[name])
    if adds:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", "<s> $A <s> $B", [("<s>", tokenizer.bos_token_id)]
        )
    has_bos = adds or "bos_token" in OWN_TEMPLATES[name]
    set_own_chat_template(tokenizer, OWN_TEMPLATES[name])
    assert not adds_bos(tokenizer)
    ids = tokenizer.apply_chat_template(CONVERSATION, return_dict=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == has_bos and (ids[0] == tokenizer.bos_token_id) is has_bos
    plain = set_chat_template(copy.deepcopy(tokenizer), "plain")
    ids = plain.apply_chat_template(CONVERSATION[:2], return_dict=True)["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) is adds


def test_a_template_that_is_ready_stays_as_it_is() -> None:
    ready = set_chat_template(tokenizer_of(""), "vicuna_v1").chat_template
    assert set_own_chat_template(tokenizer_of(ready), ready).chat_template == ready
    wrapped = set_own_chat_template(tokenizer_of(""), OWN_TEMPLATES["llama3"]).chat_template
    assert has_answer_markers(wrapped)
    assert set_own_chat_template(tokenizer_of(wrapped), wrapped).chat_template == wrapped


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in messages %}{{ message.text }}{% endfor %}", r"leaves out \['Be brief.', 'What is shown"),
        ("{{ messages | map(attribute='content') | map('upper') | join }}", "leaves out.*It renders.*BE BRIEF"),
        ("{{ raise_exception('no chat') }}", "raises TemplateError: no chat.*Choose 'vicuna_v1'"),
        ("{{ messages", "raises TemplateSyntaxError"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)`chat_template` is 'own', but the tokenizer's template {message}"):
        set_own_chat_template(tokenizer_of(template), template)
