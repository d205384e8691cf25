"""`MoveKDForConditionalGeneration`: joined from parts, its forward, its errors, and training it."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, GraniteConfig, GraniteForCausalLM

from modeling_movekd import MoveKDConfig, MoveKDForConditionalGeneration, MoveKDModel
from modeling_movekd.modeling_movekd import refuse_scaled_logits


FAMILIES = ["llama", "smollm", "qwen3", "mistral", "gpt2"]
PATCHES = 16


@pytest.fixture(scope="module")
def model(make_model) -> MoveKDForConditionalGeneration:
    return make_model()


def row(model, *parts: str | int) -> torch.Tensor:
    """Ids of one row: a text's bytes, or that many images."""
    ids = [1]
    for part in parts:
        ids += [model.config.image_token_id] * PATCHES * part if isinstance(part, int) else list(part.encode())
    return torch.tensor([ids])


def pad(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    length = max(ids.shape[1] for ids in rows)
    batch = {"input_ids": [], "attention_mask": []}
    for ids in rows:
        width = (length - ids.shape[1], 0) if side == "left" else (0, length - ids.shape[1])
        batch["input_ids"].append(nn.functional.pad(ids, width, value=0))
        batch["attention_mask"].append(nn.functional.pad(torch.ones_like(ids), width))
    return {name: torch.cat(tensors) for name, tensors in batch.items()}


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# --- Joined from parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_text_only_logits_are_the_language_model_s(make_language, make_tower, family):
    language = make_language(family)
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    expected, vocabulary = language(ids).logits, language.config.vocab_size
    model = MoveKDForConditionalGeneration.from_parts(make_tower(), language)
    logits = model(ids).logits
    # <image> is a row of its own after the vocabulary
    assert model.config.image_token_id == vocabulary and logits.shape[-1] == vocabulary + 1
    assert torch.equal(logits[..., :vocabulary], expected)
    tied = family in ("smollm", "gpt2")
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.text_config.vocab_size == vocabulary + 1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_take_the_image_tokens_places(make_model, pixels, family):
    """The whole forward, put together by hand from its parts."""
    model = make_model(family)
    ids = row(model, "a", 1, "b", 2, "c")
    tower = model.model.vision_tower
    features = model.model.multi_modal_projector(tower(pixels).last_hidden_state[:, 1:])
    embeddings = model.get_input_embeddings()(ids)
    embeddings[ids == model.config.image_token_id] = features.flatten(0, 1)
    hidden = model.model.language_model(inputs_embeds=embeddings).last_hidden_state
    output = model(ids, pixel_values=pixels)
    assert torch.equal(output.logits, model.lm_head(hidden))
    assert torch.equal(output.image_hidden_states, features.flatten(0, 1))


@pytest.mark.parametrize("image_token_id", [None, 5])
def test_tied_weights_and_generation_settings_are_kept(make_language, make_tower, image_token_id):
    """With a row added to the vocabulary and without."""
    language = make_language("smollm")
    language.generation_config.max_new_tokens = 11
    model = MoveKDForConditionalGeneration.from_parts(make_tower(), language, image_token_id)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.generation_config.max_new_tokens == 11


def test_parts_are_shared_and_both_dtypes_become_one(make_language, make_tower):
    language = make_language().bfloat16()
    tower = make_tower()
    model = MoveKDForConditionalGeneration.from_parts(tower, language, image_token_id=5)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight.data_ptr() == language.lm_head.weight.data_ptr()
    assert model.config.image_token_id == 5 and model.config.text_config.vocab_size == language.config.vocab_size
    assert not model.training and model.generation_config.eos_token_id == 2


def test_whole_tower_feeds_the_layer_before_the_last(make_model, pixels):
    model = make_model(tower={"feature_layer": None})
    assert model.config.vision_feature_layer == -2 and model.config.vision_config.num_hidden_layers == 4
    cut = make_model()
    ids = row(model, 3)
    torch.testing.assert_close(model.model.vision_tower.state_dict()["post_layernorm.weight"].shape, torch.Size([32]))
    layers = {key: value for key, value in model.state_dict().items() if key in cut.state_dict()}
    cut.load_state_dict(layers)
    assert torch.equal(model(ids, pixel_values=pixels).logits, cut(ids, pixel_values=pixels).logits)


def test_several_feature_layers_are_concatenated(make_model, pixels):
    model = make_model(vision_feature_layer=[-2, -1])
    assert model.model.multi_modal_projector.linear_1.in_features == 64
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    expected = model.model.multi_modal_projector(torch.cat(states[-2:], dim=-1)[:, 1:])
    torch.testing.assert_close(torch.stack(model.get_image_features(pixels).pooler_output), expected)


def test_language_weights_missing_or_left_over(make_language, make_tower):
    language = make_language()
    del language.model.layers[1].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"missing.*model.language_model.layers.1.mlp.up_proj.weight"):
        MoveKDForConditionalGeneration.from_parts(make_tower(), language)
    language = make_language()
    language.lm_head.bias = nn.Parameter(torch.zeros(language.config.vocab_size))
    with pytest.raises(ValueError, match=r"left over.*lm_head.bias"):
        MoveKDForConditionalGeneration.from_parts(make_tower(), language)


def test_language_without_a_head(make_language, make_tower):
    with pytest.raises(ValueError, match="LlamaModel.*causal language model"):
        MoveKDForConditionalGeneration.from_parts(make_tower(), make_language().model)


def test_language_whose_head_does_more_than_multiply(make_tower, make_language):
    """Granite divides its logits, which a plain head would leave out without a word."""
    sizes = {name: getattr(make_language().config, name) for name in ("vocab_size", "hidden_size")}
    config = GraniteConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, logits_scaling=3)
    with pytest.raises(ValueError, match=r"scales or caps its logits \({'logits_scaling': 3}\)"):
        MoveKDForConditionalGeneration.from_parts(make_tower(), GraniteForCausalLM(config))


@pytest.mark.parametrize("field", ["final_logit_softcapping", "logit_scale", "logits_soft_cap", "lm_head_multiplier"])
def test_language_that_scales_its_logits_is_refused_by_the_name_of_the_setting(make_tower, make_language, field):
    language = make_language()
    for neutral in (None, 1.0):
        setattr(language.config, field, neutral)
        refuse_scaled_logits(language.config)
    setattr(language.config, field, 30.0)  # a cap far above these logits changes none of them by much
    with pytest.raises(ValueError, match=f"{field}.*30.0"):
        MoveKDForConditionalGeneration.from_parts(make_tower(), language)


# --- Batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(make_model, pixels, family, side):
    model = make_model(family)
    rows = [row(model, "two ", 2, "images"), row(model, "text only"), row(model, 1, " one")]
    images = [pixels[:2], None, pixels[2:]]
    batch = pad(rows, side)
    # As generate does; the default of absolute positions in GPT-2 ignores the mask
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model(**batch, position_ids=positions, pixel_values=pixels).logits
    for index, (ids, image) in enumerate(zip(rows, images, strict=True)):
        expected = model(ids, pixel_values=image).logits[0]
        torch.testing.assert_close(
            logits[index][batch["attention_mask"][index].bool()], expected, atol=1e-4, rtol=1e-4
        )


@torch.no_grad()
def test_images_matter_and_belong_to_their_row(model, pixels):
    ids = row(model, 1, "?").repeat(2, 1)
    one, other = (model(ids, pixel_values=pixels[order]).logits for order in ([0, 1], [1, 0]))
    assert not torch.allclose(one, other, atol=1e-2)
    torch.testing.assert_close(one, other.flip(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@torch.no_grad()
def test_attention_implementations_agree(make_model, pixels, implementation):
    model = make_model()
    batch = pad([row(model, "two ", 2, "images"), row(model, 1, " one")], "left")
    model.set_attn_implementation("eager")
    assert model.model.vision_tower.config._attn_implementation == "eager"
    expected = model(**batch, pixel_values=pixels).logits
    model.set_attn_implementation(implementation)
    torch.compiler.reset()
    with torch.compiler.set_stance("force_eager"):
        logits = model(**batch, pixel_values=pixels).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_with_and_without_cache(model, pixels):
    ids = row(model, "a", 3, "question")
    expected = model(ids, pixel_values=pixels, use_cache=False)
    assert expected.past_key_values is None
    first = model(ids[:, :-4], pixel_values=pixels, use_cache=True)
    logits, cache = [first.logits], first.past_key_values
    for index in range(-4, 0):
        output = model(ids[:, index:][:, :1], past_key_values=cache, use_cache=True)
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_from_embeddings(model, pixels):
    ids = row(model, "a", 3, "question")
    embeddings = model.get_input_embeddings()(ids)
    expected = model(ids, pixel_values=pixels)
    assert torch.equal(model(inputs_embeds=embeddings, pixel_values=pixels).logits, expected.logits)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(ids, inputs_embeds=embeddings, pixel_values=pixels)


@torch.no_grad()
def test_records_on_request(make_model, pixels):
    model = make_model()
    ids = row(model, 3, "?")
    plain = model(ids, pixel_values=pixels, use_cache=False)
    assert set(plain.keys()) == {"logits", "image_hidden_states"}
    asked = {"output_router_probabilities": True, "output_expert_indices": True, "cls_attention_layer": -1}
    output = model(ids, pixel_values=pixels, **asked)
    expected = model.model.vision_tower(pixels, **asked)
    assert all(map(torch.equal, output.router_probabilities, expected.router_probabilities))
    assert all(map(torch.equal, output.expert_indices, expected.expert_indices))
    assert torch.equal(output.cls_attention, expected.cls_attention)
    assert torch.equal(output.logits, plain.logits)
    text = model(row(model, "text"), **asked)
    assert text.router_probabilities is None and text.cls_attention is None
    model.set_attn_implementation("eager")
    output = model(ids, pixel_values=pixels, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(1, ids.shape[1], 32)] * 3
    assert [attention.shape for attention in output.attentions] == [(1, 2, ids.shape[1], ids.shape[1])] * 2


@torch.no_grad()
def test_outputs_as_a_tuple_and_last_logits_only(model, pixels):
    ids = row(model, 3, "?")
    output = model(ids, pixel_values=pixels)
    assert torch.equal(model(ids, pixel_values=pixels, return_dict=False)[0], output.logits)
    torch.testing.assert_close(model(ids, pixel_values=pixels, logits_to_keep=1).logits, output.logits[:, -1:])


def test_loss_is_the_next_token_cross_entropy(model, pixels):
    ids = row(model, 3, "answer")
    labels = torch.where(ids == model.config.image_token_id, -100, ids)
    output = model(ids, pixel_values=pixels, labels=labels)
    expected = nn.functional.cross_entropy(output.logits[0, :-1], labels[0, 1:])
    torch.testing.assert_close(output.loss, expected)


# --- Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 3])
def test_image_tokens_and_features_that_disagree(model, pixels, images):
    with pytest.raises(ValueError, match=f"(?s)tokens: {2 * PATCHES}, features: {images * PATCHES}"):
        model(row(model, 2, "?"), pixel_values=pixels[:images])
    embeddings = model.get_input_embeddings()(row(model, 2, "?"))
    with pytest.raises(ValueError, match=f"(?s)tokens: {2 * PATCHES}, features: {images * PATCHES}"):
        model(inputs_embeds=embeddings, pixel_values=pixels[:images])


def test_image_tokens_without_pixels(model):
    with pytest.raises(ValueError, match=f"(?s)tokens: {PATCHES}, features: 0"):
        model(row(model, 1, "?"))
    with pytest.raises(ValueError, match=f"(?s)tokens: {PATCHES}, features: 0"):
        model(row(model, 1, "?"), pixel_values=torch.zeros(0, 3, 16, 16))
    text = row(model, "text")
    assert torch.equal(model(text, pixel_values=torch.zeros(0, 3, 16, 16)).logits, model(text).logits)


def test_pixels_of_a_wrong_size_or_rank(model, pixels):
    with pytest.raises(ValueError, match="(?s)20.*16"):
        model(row(model, 1, "?"), pixel_values=torch.randn(1, 3, 20, 20))
    with pytest.raises(ValueError, match=r"(?s)5 dimensions \(1, 3, 3, 16, 16\)"):
        model(row(model, 3, "?"), pixel_values=pixels[None])


# --- Training ------------------------------------------------------------------------------------------------------


def train_step(model, pixels) -> torch.Tensor:
    rows = pad([row(model, 2, "question"), row(model, "text alone"), row(model, 1, "a")], "right")
    skip = (rows["attention_mask"] == 0) | (rows["input_ids"] == model.config.image_token_id)
    loss = model(**rows, pixel_values=pixels, labels=rows["input_ids"].masked_fill(skip, -100)).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_gets_a_gradient(make_model, pixels, family):
    model = make_model(family).train()
    train_step(model, pixels)
    silent = {name for name, gradient in gradients(model).items() if gradient is None or not gradient.any()}
    assert not {name for name in silent if not name.endswith("k_proj.bias")}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(make_model, pixels, use_reentrant):
    model = make_model(tower={"lora_dropout": 0.0}).train()
    loss = train_step(model, pixels)
    expected = gradients(model)
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.model.vision_tower.encoder.layers[0].gradient_checkpointing
    assert model.is_activation_checkpointing
    torch.testing.assert_close(train_step(model, pixels), loss)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")
    routers = [gradient for name, gradient in gradients(model).items() if "router" in name]
    assert len(routers) == 6 and all(gradient.any() for gradient in routers)


def test_gradient_checkpointing_with_records(make_model, pixels):
    """The routing probabilities are part of a loss, so they must stay in the graph that is computed again."""
    model = make_model(tower={"lora_dropout": 0.0, "router_gradient": "none"}).train()
    ids = row(model, 3, "?")
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        output = model(ids, pixel_values=pixels, output_router_probabilities=True)
        assert len(output.router_probabilities) == 3, "recorded once, not again while computing backward"
        sum(probabilities[..., 0].mean() for probabilities in output.router_probabilities).backward()
        assert len(output.router_probabilities) == 3
        found.append({name: grad for name, grad in gradients(model).items() if "router" in name})
        model.zero_grad()
    for name, gradient in found[0].items():
        assert gradient.any()
        torch.testing.assert_close(found[1][name], gradient)


def test_dropout_is_active_in_training_only(make_model, pixels):
    model = make_model(tower={"lora_dropout": 0.5})
    ids = row(model, 3, "?")
    assert torch.equal(model(ids, pixel_values=pixels).logits, model(ids, pixel_values=pixels).logits)
    model.train()
    assert not torch.equal(model(ids, pixel_values=pixels).logits, model(ids, pixel_values=pixels).logits)


# --- Vocabulary, copies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "smollm"])
@torch.no_grad()
def test_resized_vocabulary(make_model, pixels, family, tmp_path):
    model = make_model(family)
    ids, size = row(model, 3, "?"), model.config.text_config.vocab_size
    expected = model(ids, pixel_values=pixels).logits
    model.resize_token_embeddings(size + 7)
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == size + 7
    assert model.config.text_config.vocab_size == size + 7
    torch.testing.assert_close(model(ids, pixel_values=pixels).logits[..., :size], expected)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (family == "smollm")
    loss = model(ids, pixel_values=pixels, labels=ids).loss
    assert loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = MoveKDForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids, pixel_values=pixels).logits, model(ids, pixel_values=pixels).logits)


@torch.no_grad()
def test_copies_and_state_dicts(make_model, pixels):
    model = make_model("smollm")
    ids = row(model, 3, "?")
    expected = model(ids, pixel_values=pixels).logits
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.get_input_embeddings().weight
    fresh = MoveKDForConditionalGeneration(model.config)
    fresh.load_state_dict(model.state_dict(), strict=True)
    for parameter in model.parameters():
        parameter.zero_()
    for other in (twin, fresh.eval()):
        torch.testing.assert_close(other(ids, pixel_values=pixels).logits, expected, atol=1e-6, rtol=1e-6)


def test_newline_embedding_only_for_anyres(make_model):
    assert make_model().model.image_newline is None
    assert "model.image_newline" not in make_model().state_dict()
    config = make_model(image_aspect_ratio="anyres").config
    for build in (lambda: make_model(image_aspect_ratio="anyres").model, lambda: MoveKDModel(config)):
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            drawn.append(build().image_newline.detach())
        assert 0.1 < drawn[0].std() < 0.3, "drawn with the reciprocal root of the width, 32 here"
        assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_any_text_config_resolves(make_model):
    config = make_model("qwen3").config
    again = MoveKDConfig.from_dict(config.to_dict())
    assert type(AutoModel.from_config(again.text_config)).__name__ == "Qwen3Model"
