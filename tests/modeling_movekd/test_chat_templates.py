from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_movekd.chat_templates import CHAT_TEMPLATES, DEFAULT_SYSTEM_PROMPT, set_chat_template


def byte_level_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """A GPT-like tokenizer: one token per byte, no word marks, whatever special tokens it is given."""
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    return tokenizer


def sentencepiece_tokenizer(pre_tokenizer: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    """A Llama-like tokenizer whose words begin with a mark."""
    characters = sorted(set("▁\n" + DEFAULT_SYSTEM_PROMPT.replace(" ", "") + "USERASSISTANT:Whatisthis?Acat"))
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    return tokenizer


def user(*parts: str) -> dict:
    """A question of text parts, where `<image>` stands for an image part."""
    content = [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def render(name: str, messages: list[dict], **kwargs: object) -> str:
    tokenizer = byte_level_tokenizer(eos_token="</s>")
    return tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATES[name], tokenize=False, **kwargs)


def test_vicuna_renders_a_conversation() -> None:
    messages = [user("<image>", "What?"), assistant("A cat."), user("Sure?"), assistant("Yes.")]
    expected = "USER: <image> \nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes.</s>"
    assert render("vicuna_v1", messages) == f"{DEFAULT_SYSTEM_PROMPT} {expected}"


def test_vicuna_asks_for_an_answer() -> None:
    rendered = render("vicuna_v1", [user("Hi  there ")], add_generation_prompt=True)
    assert rendered == f"{DEFAULT_SYSTEM_PROMPT} USER: Hi  there  ASSISTANT:"


@pytest.mark.parametrize("content", ["Be brief.", [{"type": "text", "text": "Be brief."}]])
def test_vicuna_takes_a_system_message(content: str | list) -> None:
    messages = [{"role": "system", "content": content}, user("Hi"), assistant("Yes")]
    assert render("vicuna_v1", messages) == "Be brief. USER: Hi ASSISTANT: Yes</s>"


def test_vicuna_without_a_system_prompt() -> None:
    messages = [{"role": "system", "content": ""}, user("Hi"), assistant("Yes")]
    assert render("vicuna_v1", messages) == "USER: Hi ASSISTANT: Yes</s>"


@pytest.mark.parametrize(
    "message",
    [
        user("<image>", "Look at  here."),
        {"role": "user", "content": "<image>\nLook at  here."},
        {"role": "user", "content": "Look at <image> here."},
    ],
)
def test_the_image_comes_first_in_its_turn(message: dict) -> None:
    assert "USER: <image> \nLook at  here. ASSISTANT" in render("vicuna_v1", [message, assistant("Yes")])


def test_several_images_in_a_turn_and_in_later_turns() -> None:
    messages = [user("<image>", "<image>", "Compare."), assistant("Ok"), user("<image>", "And?"), assistant("Ok")]
    rendered = render("vicuna_v1", messages)
    assert "USER: <image> \n<image> \nCompare. ASSISTANT: Ok</s>USER: <image> \nAnd? ASSISTANT: Ok</s>" in rendered


def test_an_image_alone_and_empty_turns() -> None:
    # As LLaVA renders them: nothing but the heading for an empty turn.
    assert "USER: <image>  ASSISTANT: Yes</s>" in render("vicuna_v1", [user("<image>"), assistant("Yes")])
    assert render("vicuna_v1", [user("Hi"), assistant("")]).endswith("USER: Hi ASSISTANT:")
    assert render("vicuna_v1", [user(""), assistant("Yes")]).endswith(" USER:ASSISTANT: Yes</s>")


def test_plain_discards_questions() -> None:
    messages = [{"role": "system", "content": "x"}, user("<image>", "Describe it."), assistant("a boat")]
    assert render("plain", messages) == "<image> a boat\n"
    assert render("plain", messages[:-1], add_generation_prompt=True) == "<image> "
    assert render("plain", [user("Say something."), assistant("a boat")]) == "a boat\n"


@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES))
def test_unknown_role(name: str) -> None:
    with pytest.raises(jinja2.TemplateError, match="Unknown role tool"):
        render(name, [user("Hi"), {"role": "tool", "content": "x"}])


@pytest.mark.parametrize("special_tokens", [{"eos_token": "<|im_end|>"}, {}])
def test_other_special_tokens(special_tokens: dict[str, str]) -> None:
    """The end token is the tokenizer's own, there may be none, and no beginning token is written."""
    tokenizer = set_chat_template(byte_level_tokenizer(**special_tokens), "vicuna_v1")
    rendered = tokenizer.apply_chat_template([user("Hi"), assistant("Yes")], tokenize=False)
    assert rendered == f"{DEFAULT_SYSTEM_PROMPT} USER: Hi ASSISTANT: Yes{special_tokens.get('eos_token', '')}"


def test_answers_are_marked() -> None:
    tokenizer = set_chat_template(byte_level_tokenizer(eos_token="</s>"), "vicuna_v1")
    encoded = tokenizer.apply_chat_template(
        [user("Hi"), assistant("Yes"), user("ASSISTANT: no"), assistant("")],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    marked = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == " Yes</s>"


@pytest.mark.parametrize(
    ("tokenizer", "space"),
    [
        (byte_level_tokenizer(eos_token="</s>"), ""),
        (sentencepiece_tokenizer(pre_tokenizers.Metaspace(prepend_scheme="first")), " "),
        (sentencepiece_tokenizer(pre_tokenizers.Metaspace(prepend_scheme="always")), ""),
    ],
)
@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES))
def test_text_after_an_image_is_tokenized_as_if_alone(
    tokenizer: PreTrainedTokenizerFast, space: str, name: str
) -> None:
    set_chat_template(tokenizer, name)
    rendered = tokenizer.apply_chat_template([user("<image>", "What is this?"), assistant("A cat")], tokenize=False)
    after = rendered.split("<image>")[1]
    assert after.startswith(space + ("\n" if name == "vicuna_v1" else "A cat"))
    pieces = tokenizer.tokenize(rendered)
    assert pieces[pieces.index("<image>") + 1 :] == tokenizer.tokenize(after.removeprefix(space))


def test_a_vocabulary_without_the_image_token_is_refused() -> None:
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate("<image>")}, merges=[]))
    with pytest.raises(ValueError, match="not as one token"):
        set_chat_template(PreTrainedTokenizerFast(tokenizer_object=backend), "plain")


def test_an_unknown_template_is_refused() -> None:
    with pytest.raises(ValueError, match="'llama_3'.*plain.*vicuna_v1"):
        set_chat_template(byte_level_tokenizer(), "llama_3")


@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES))
@pytest.mark.parametrize("kind", ["sentencepiece", "byte level", "without"])
def test_one_beginning_token_however_a_text_is_tokenized(kind: str, name: str, tmp_path: Path) -> None:
    if kind == "sentencepiece":
        tokenizer = sentencepiece_tokenizer(pre_tokenizers.Metaspace(prepend_scheme="first"))
        tokenizer.backend_tokenizer.post_processor = adding("<s>", 1)
    else:
        tokenizer = byte_level_tokenizer(bos_token="<|begin|>", eos_token="<|end|>")
        if kind == "byte level":  # as in Llama-3's file
            steps = [processors.ByteLevel(trim_offsets=False), adding("<|begin|>", tokenizer.bos_token_id)]
            tokenizer.backend_tokenizer.post_processor = processors.Sequence(steps)
    has_bos = kind != "without"
    before = tokenizer("What is this?").input_ids
    assert (before[0] == tokenizer.bos_token_id) is has_bos
    set_chat_template(tokenizer, name).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for messages in ([user("<image>", "What is this?"), assistant("A cat")], [user("Hi"), assistant("A cat")]):
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == has_bos and (ids[0] == tokenizer.bos_token_id) is has_bos
        assert tokenizer(rendered).input_ids == tokenizer(rendered, add_special_tokens=False).input_ids == ids
    # The text behind the token keeps its ids
    system = tokenizer.apply_chat_template([{"role": "system", "content": "What is this?"}], tokenize=False)
    if name == "vicuna_v1":
        assert tokenizer(system.removesuffix(" ")).input_ids == before


def adding(token: str, index: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(f"{token} $A", f"{token} $A {token} $B", [(token, index)])


@pytest.mark.parametrize("form", ["<s> $A </s>", "$A </s>"])
def test_an_end_token_that_the_tokenizer_adds_is_not_in_prompts(form: str, tmp_path: Path) -> None:
    """It would follow `ASSISTANT:`, so that the model is asked after its end."""
    tokenizer = sentencepiece_tokenizer(pre_tokenizers.Metaspace(prepend_scheme="first"))
    ends = processors.TemplateProcessing(form, f"{form} $B", [("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = ends
    set_chat_template(tokenizer, "vicuna_v1").save_pretrained(tmp_path)
    for present in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        rendered = present.apply_chat_template([user("Hi")], tokenize=False, add_generation_prompt=True)
        ids = present(rendered).input_ids
        assert 2 not in ids and ids.count(1) == form.startswith("<s>")


@pytest.mark.parametrize("kind", [processors.BertProcessing, processors.RobertaProcessing])
def test_a_post_processor_that_adds_tokens_and_cannot_be_changed_is_named(kind: type) -> None:
    tokenizer = sentencepiece_tokenizer(pre_tokenizers.Metaspace(prepend_scheme="first"))
    tokenizer.backend_tokenizer.post_processor = kind(("</s>", 2), ("<s>", 1))
    with pytest.raises(ValueError, match=rf"adds \['<s>', '</s>'\] to every text.*its {kind.__name__} cannot be told"):
        set_chat_template(tokenizer, "vicuna_v1")


def test_a_second_template_keeps_the_beginning_token() -> None:
    """The first stage trains a copy of the processor with `plain`."""
    tokenizer = sentencepiece_tokenizer(pre_tokenizers.Metaspace(prepend_scheme="first"))
    tokenizer.backend_tokenizer.post_processor = adding("<s>", 1)
    for name in ("vicuna_v1", "plain", "vicuna_v1"):
        set_chat_template(tokenizer, name)
        assert tokenizer.apply_chat_template([user("Hi"), assistant("A")], return_dict=True)["input_ids"][0] == 1


def test_several_images_keep_their_places_and_parts_get_lines() -> None:
    expected = "USER: Image 1:\n<image> \nImage 2:\n<image> \nWhat differs? ASSISTANT: Yes</s>"
    for message in (
        user("Image 1:", "<image>", "Image 2:", "<image>", "What differs?"),
        {"role": "user", "content": "Image 1: <image> Image 2: <image>\nWhat differs?"},
    ):
        assert render("vicuna_v1", [message, assistant("Yes")]).endswith(expected)
    rendered = render("vicuna_v1", [user("First.", "<image>", "Second."), assistant("Yes")])
    assert "USER: <image> \nFirst.\nSecond. ASSISTANT" in rendered
    assert "USER: First.\nSecond. ASSISTANT" in render("vicuna_v1", [user("First.", "Second."), assistant("Yes")])
