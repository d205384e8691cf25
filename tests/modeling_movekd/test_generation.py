"""`generate` in all its modes, each held against the model's own forward."""

import pytest
import torch
from transformers import DynamicCache, StaticCache


FAMILIES = ["llama", "smollm", "qwen3", "mistral", "gpt2"]
NEW = 6


@pytest.fixture(scope="module")
def model(make_model):
    model = make_model()
    model.generation_config.eos_token_id = None  # always the full length, so that nothing ends by chance
    return model


@pytest.fixture(scope="module")
def inputs(model, make_processor, make_image) -> dict[str, torch.Tensor]:
    """Two rows, padded on the left: one with two images, one with a single image."""
    processor = make_processor(model)
    images = [make_image(24, 16, seed=seed) for seed in range(3)]
    text = ["first <image> then <image> what?", "<image>?"]
    return dict(processor(text=text, images=images, padding=True, return_tensors="pt"))


def first_row(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor[:2] if name == "pixel_values" else tensor[:1] for name, tensor in inputs.items()}


@torch.no_grad()
def greedy_by_hand(model, inputs: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    """The whole sequence anew at each step: no cache, no `generate`."""
    inputs = dict(inputs)
    for _ in range(steps):
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        token = model(**inputs, position_ids=positions, use_cache=False).logits[:, -1:].argmax(-1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
        inputs["attention_mask"] = torch.cat([mask, torch.ones_like(token)], dim=1)
    return inputs["input_ids"]


@pytest.fixture(scope="module")
def greedy(model, inputs) -> torch.Tensor:
    tokens = greedy_by_hand(model, inputs, NEW)
    assert len(tokens[:, -NEW:].unique()) > 2, "one token over and over would hide a fault of the cache"
    return tokens


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy(model, inputs, greedy, use_cache):
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, do_sample=False, use_cache=use_cache), greedy)


def test_prompt_in_chunks(model, inputs, greedy):
    output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=7)
    assert torch.equal(output, greedy)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_with_every_language_model(make_model, inputs, family):
    model = make_model(family)
    model.generation_config.eos_token_id = None
    output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(output, greedy_by_hand(model, inputs, NEW))


def test_greedy_with_tiles(make_model, make_processor, make_image):
    model = make_model(image_aspect_ratio="anyres")
    model.generation_config.eos_token_id = None
    images = [make_image(40, 16), make_image(16, 30, seed=1)]
    inputs = make_processor(model)(text=["<image>?", "a <image>"], images=images, padding=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(output, greedy_by_hand(model, inputs, NEW))


def test_batch_equals_single_row(model, inputs, greedy):
    output = model.generate(**first_row(inputs), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(output, greedy[:1])


def test_text_only(model):
    ids = torch.tensor([[1, 40, 50, 60]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(output, greedy_by_hand(model, inputs, NEW))


def test_from_embeddings(model, inputs, greedy):
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    rest = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    output = model.generate(inputs_embeds=embeddings, **rest, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(output, greedy[:, -NEW:])


def test_sampling_follows_seed_and_distribution(model, inputs):
    settings = {"max_new_tokens": NEW, "do_sample": True, "temperature": 1.5}
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(model.generate(**inputs, **settings))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    several = model.generate(**first_row(inputs), **settings, num_return_sequences=3)
    assert several.shape == (3, inputs["input_ids"].shape[1] + NEW) and not torch.equal(several[0], several[1])
    # With only the best token left to draw from, sampling is greedy
    top = model.generate(**inputs, max_new_tokens=NEW, do_sample=True, top_k=1)
    assert torch.equal(top, model.generate(**inputs, max_new_tokens=NEW, do_sample=False))


def log_likelihood(model, inputs, tokens: torch.Tensor) -> torch.Tensor:
    length = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens[:, length:])], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = {"input_ids": tokens, "attention_mask": mask, "pixel_values": inputs["pixel_values"]}
    with torch.no_grad():
        scores = model(**batch, position_ids=positions).logits.log_softmax(-1)[:, length - 1 : -1]
    return scores.gather(-1, tokens[:, length:, None]).sum((1, 2))


def test_beam_search(model, inputs, greedy):
    output = model.generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        num_beams=4,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    # Its score is the model's likelihood of what it found, with each row's own images, and beats greedy's
    likelihood = log_likelihood(model, inputs, output.sequences)
    torch.testing.assert_close(output.sequences_scores, likelihood, atol=1e-3, rtol=1e-4)
    assert (likelihood >= log_likelihood(model, inputs, greedy) - 1e-3).all()


def test_assisted_generation(model, make_model, inputs, greedy):
    """Another model's proposals change the speed, never the answer."""
    assistant = make_model(seed=0)
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.02 * torch.randn(assistant.lm_head.weight.shape))
    assistant.generation_config.eos_token_id = None
    single = first_row(inputs)
    for helper in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 2}):
        output = model.generate(**single, max_new_tokens=NEW, do_sample=False, **helper)
        assert torch.equal(output, greedy[:1]), helper


def test_assistant_that_reads_text_only(model, make_language, inputs, greedy):
    assistant = make_language("llama")
    assistant.resize_token_embeddings(model.config.text_config.vocab_size)
    assistant.generation_config.eos_token_id = None
    output = model.generate(**first_row(inputs), max_new_tokens=NEW, do_sample=False, assistant_model=assistant)
    assert torch.equal(output, greedy[:1])


@pytest.mark.parametrize("implementation", ["static", "dynamic", "offloaded_static", "quantized"])
def test_cache_implementations(model, inputs, greedy, implementation):
    if implementation == "quantized":
        pytest.importorskip("optimum.quanto")
    if implementation.startswith("offloaded") and not torch.cuda.is_available():
        pytest.skip("offloading needs an accelerator")
    output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, cache_implementation=implementation)
    assert torch.equal(output, greedy)


def test_static_cache_of_ones_own(model, inputs, greedy):
    cache = StaticCache(config=model.config.text_config, max_cache_len=inputs["input_ids"].shape[1] + NEW)
    assert torch.equal(model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW, do_sample=False), greedy)


def test_continued_with_an_image_that_is_missing(model, inputs, greedy):
    settings = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**first_row(inputs), max_new_tokens=3, **settings, past_key_values=DynamicCache())
    images = torch.full((1, 16), model.config.image_token_id)
    with pytest.raises(ValueError, match="(?s)tokens: 16, features: 0"):
        ids = torch.cat([first.sequences, images], dim=1)
        model.generate(ids, past_key_values=first.past_key_values, max_new_tokens=2)


def test_continued_from_the_past(model, inputs, greedy):
    """A second turn over the cache of the first: the images are not seen again, and not needed."""
    settings = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**inputs, max_new_tokens=3, **settings, past_key_values=DynamicCache())
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    again = {"input_ids": first.sequences, "attention_mask": mask, "past_key_values": first.past_key_values}
    second = model.generate(**again, max_new_tokens=NEW - 3, **settings)
    assert torch.equal(second.sequences, greedy)


def test_continued_with_another_image(model, inputs, make_processor, make_image):
    """A later turn brings an image of its own: the cache holds the first, the forward sees the second."""
    processor = make_processor(model)
    images = [make_image(16, 16, seed=seed) for seed in (5, 6)]
    turn = processor(text="<image> a?", images=images[:1], return_tensors="pt")
    cache = DynamicCache()
    first = model.generate(**turn, max_new_tokens=3, do_sample=False, past_key_values=cache)
    later = processor(text="<image> b?", images=images[1:], return_tensors="pt")
    ids = torch.cat([first, later["input_ids"]], dim=1)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = greedy_by_hand(
        model, whole | {"pixel_values": torch.cat([turn["pixel_values"], later["pixel_values"]])}, 3
    )
    output = model.generate(
        **whole, pixel_values=later["pixel_values"], past_key_values=cache, max_new_tokens=3, do_sample=False
    )
    assert torch.equal(output, expected)


def test_tower_runs_once(model, inputs):
    """The images are encoded with the prompt only, however long the answer."""
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    finally:
        hook.remove()
    assert len(calls) == 1


def test_ends_at_the_end_token_and_streams(model, inputs, greedy, make_tokenizer, capsys):
    from transformers import TextStreamer

    single, length = first_row(inputs), inputs["input_ids"].shape[1]
    stop = greedy[0, length + 2].item()
    end = greedy[0, length:].tolist().index(stop) + 1
    output = model.generate(**single, max_new_tokens=NEW, do_sample=False, eos_token_id=stop)
    assert torch.equal(output, greedy[:1, : length + end])
    tokenizer = make_tokenizer()
    model.generate(**single, max_new_tokens=NEW, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == tokenizer.decode(greedy[0, length:]).strip()


def test_image_tokens_without_images(model, inputs):
    rest = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
    with pytest.raises(ValueError, match="(?s)tokens: 48, features: 0"):
        model.generate(**rest, max_new_tokens=2)


def test_generated_image_tokens_are_no_error(make_model, inputs):
    """A model may emit any id; only a prompt's image tokens ask for images."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[0] = -1e-3
    force = {"suppress_tokens": list(range(model.config.image_token_id))}
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False, **force)
    assert (output[:, -3:] == model.config.image_token_id).all()
