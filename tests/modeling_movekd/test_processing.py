"""The stock LLaVA processors in front of the model: one padded crop, or tiles of any resolution."""

import copy

import pytest
import torch
from transformers import AutoProcessor, CLIPImageProcessor, LlavaNextProcessor, LlavaProcessor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from modeling_movekd import MoveKDConfig, MoveKDForConditionalGeneration
from modeling_movekd.inference import load_checkpoint, load_tower
from modeling_movekd.processing import add_image_token, build_processor
from tests.helpers import tiny


SIZES = [(16, 16), (40, 16), (12, 50), (33, 30)]


@pytest.fixture(scope="module", params=["pad", "anyres"])
def pair(request, make_model, make_processor):
    model = make_model(image_aspect_ratio=request.param)
    return model, make_processor(model)


@pytest.fixture(scope="module")
def anyres(make_model, make_processor):
    model = make_model(image_aspect_ratio="anyres")
    return model, make_processor(model)


def test_the_stock_processor_of_each_kind(pair, tmp_path):
    model, processor = pair
    kind = LlavaProcessor if model.config.image_aspect_ratio == "pad" else LlavaNextProcessor
    assert type(processor) is kind
    assert processor.image_token_id == model.config.image_token_id
    assert processor.image_processor.image_mean == pytest.approx(CLIPImageProcessor().image_mean)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is kind and loaded.chat_template == processor.chat_template
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()


def test_pixels_of_the_saved_processor(pair, make_image, tmp_path):
    """transformers keeps no backend in the file: resizing by PIL, as in training, is asked for when loading."""
    _, processor = pair
    processor.save_pretrained(tmp_path)
    image = make_image(50, 37)
    expected = processor(text="<image>", images=image, return_tensors="pt")
    same = AutoProcessor.from_pretrained(tmp_path, backend="pil")(text="<image>", images=image, return_tensors="pt")
    assert torch.equal(same["pixel_values"], expected["pixel_values"])
    assert torch.equal(same["input_ids"], expected["input_ids"])
    near = AutoProcessor.from_pretrained(tmp_path)(text="<image>", images=image, return_tensors="pt")
    torch.testing.assert_close(near["pixel_values"], expected["pixel_values"], atol=0.02, rtol=0)


@torch.no_grad()
def test_a_saved_processor_pads_for_generation(make_model, make_image, tmp_path):
    """A plain batched `generate` gives the answers of single questions, whatever side the language model padded on."""
    model = make_model()
    build_processor(model.config, CLIPImageProcessor(), tiny.make_tokenizer(padding_side="right")).save_pretrained(
        tmp_path
    )
    processor = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    rows = [("<image>?", make_image(40, 16)), ("<image> a longer question", make_image(12, 50))]
    settings = {"max_new_tokens": 4, "do_sample": False}
    batch = processor(
        text=[text for text, _ in rows], images=[[image] for _, image in rows], padding=True, return_tensors="pt"
    )
    together = model.generate(**batch, **settings)[:, -4:]
    for answer, (text, image) in zip(together, rows, strict=True):
        inputs = processor(text=text, images=image, return_tensors="pt")
        assert torch.equal(answer, model.generate(**inputs, **settings)[0, -4:])


def test_image_tokens_are_not_generated(make_tower, make_language):
    language = make_language()
    language.generation_config.suppress_tokens = [3]
    vocab_size = language.config.vocab_size
    model = MoveKDForConditionalGeneration.from_parts(make_tower(), language, image_token_id=vocab_size + 2)
    assert model.generation_config.suppress_tokens == [3, vocab_size, vocab_size + 1, vocab_size + 2]
    assert language.generation_config.suppress_tokens == [3]


def test_token_that_is_not_the_model_s(make_model, make_tokenizer):
    model, tokenizer = make_model(image_token_id=5), make_tokenizer()
    token = add_image_token(tokenizer)
    with pytest.raises(ValueError, match=f"token {token}, the model's is 5"):
        build_processor(model.config, CLIPImageProcessor(), tokenizer)
    assert add_image_token(tokenizer) == token, "adding it again changes nothing"


@torch.no_grad()
def test_mixed_batch_equals_its_rows(pair, make_image):
    """Several images in a row, one image, and none, of different shapes, padded together."""
    model, processor = pair
    images = [make_image(*size, seed=index) for index, size in enumerate(SIZES)]
    rows = [
        ("a <image> b <image> c", images[:2]),
        ("no image", []),
        ("<image>?", images[2:3]),
        ("<image>", images[3:]),
    ]
    batch = processor(text=[text for text, _ in rows], images=images, padding=True, return_tensors="pt")
    assert len(batch["pixel_values"]) == 4
    logits = model(**batch).logits
    for index, (text, own) in enumerate(rows):
        single = processor(text=text, images=own or None, return_tensors="pt")
        expected = model(**single).logits[0]
        real = batch["attention_mask"][index].bool()
        torch.testing.assert_close(logits[index][real], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_pad_gives_one_crop_of_the_padded_square(make_model, make_processor, make_image):
    model = make_model()
    processor = make_processor(model)
    inputs = processor(text="<image>", images=make_image(40, 16), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16
    # The mean is what is padded with, so the upper and the lower border are next to zero
    assert inputs["pixel_values"][0, :, :3].abs().max() < 0.02 < inputs["pixel_values"][0, :, 7:9].abs().mean()


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_anyres_takes_tiles_and_their_newlines(anyres, make_image, size):
    model, processor = anyres
    inputs = processor(text="<image>", images=make_image(*size), return_tensors="pt")
    tiles = image_size_to_num_patches(size[::-1], model.config.image_grid_pinpoints, 16)
    assert inputs["pixel_values"].shape == (1, tiles, 3, 16, 16) and inputs["image_sizes"].tolist() == [[*size[::-1]]]
    output = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], output_router_probabilities=True)
    assert output.last_hidden_state.shape == (tiles, 17, 32)
    assert output.router_probabilities[0].shape == (tiles, 17, 3)
    features = output.pooler_output[0]
    assert len(features) == (inputs["input_ids"] == model.config.image_token_id).sum()
    # The whole image first, then rows of tiles, each row closed by the newline
    whole = model.model.multi_modal_projector(output.last_hidden_state[0, 1:])
    torch.testing.assert_close(features[:16], whole)
    assert torch.equal(features[-1], model.model.image_newline)


def test_newline_trains(anyres, make_image):
    model, processor = anyres
    inputs = processor(text="<image> what", images=make_image(40, 16), return_tensors="pt")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.image_newline.grad.any()
    model.zero_grad()


def test_anyres_without_image_sizes(anyres, make_image):
    model, processor = anyres
    inputs = processor(text=["<image>", "<image>"], images=[make_image(), make_image()], return_tensors="pt")
    sizes = inputs.pop("image_sizes")
    with pytest.raises(ValueError, match="(?s)image_sizes.*got none for 2 images"):
        model(**inputs)
    with pytest.raises(ValueError, match="(?s)image_sizes.*got 1 for 2 images"):
        model(**inputs, image_sizes=sizes[:1])
    with pytest.raises(ValueError, match="(?s)image_sizes.*got none for 2 images"):
        model.generate(**inputs, max_new_tokens=2)


def test_anyres_with_sizes_of_other_images(anyres, make_image):
    model, processor = anyres
    inputs = processor(text="<image>", images=make_image(40, 16), return_tensors="pt")
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    with pytest.raises(ValueError, match=r"\(1, 4, 3, 16, 16\) do not hold the 5 tiles"):
        model(**(inputs | {"image_sizes": torch.tensor([[33, 30]])}))
    with pytest.raises(ValueError, match=rf"(?s)tokens: {tokens}, features: "):
        model(**(inputs | {"image_sizes": torch.tensor([[16, 16]])}))
    with pytest.raises(ValueError, match=r"\(1, 3, 16, 16\) do not hold the 4 tiles"):
        model(**(inputs | {"pixel_values": inputs["pixel_values"][:, 0]}))


def test_tiles_for_a_model_that_pads(anyres, make_model, make_image):
    _, processor = anyres
    inputs = processor(text="<image>", images=make_image(), return_tensors="pt")
    model = make_model()
    with pytest.raises(ValueError, match="(?s)`pixel_values` has 5 dimensions.*4 are expected"):
        model(**inputs)


def test_wrong_number_of_image_tokens(pair, make_image):
    model, processor = pair
    inputs = processor(text="<image>", images=make_image(), return_tensors="pt")
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    inputs["input_ids"][0, -1] = 7
    with pytest.raises(ValueError, match=rf"(?s)tokens: {tokens - 1}, features: {tokens}"):
        model(**inputs)


def test_processor_of_another_image_size(make_model, make_processor, make_tower, make_image):
    model = make_model()
    model.config.vision_config.image_size = 20
    processor = make_processor(model)
    inputs = processor(text="<image>", images=make_image(), return_tensors="pt")
    with pytest.raises(ValueError, match="(?s)20.*16"):
        make_model()(**inputs)


@torch.no_grad()
def test_generates_from_a_conversation(pair, make_image):
    model, processor = pair
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": make_image(40, 16)}, {"type": "text", "text": "What?"}],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert isinstance(processor.decode(output[0, inputs["input_ids"].shape[1] :]), str)


@pytest.mark.parametrize(
    "grids", [[[32, 40]], [[32, 16], [8, 16]], [[0, 16]], [[-16, 16]], [[32]], [32, 16], [[16.0, 16]], []], ids=str
)
def test_grids_that_the_model_cannot_cut(make_model, make_processor, grids):
    """Refused when the configuration is built or read, and when it was changed afterwards."""
    with pytest.raises(ValueError, match="`image_grid_pinpoints`"):
        make_model(image_aspect_ratio="anyres", image_grid_pinpoints=grids)
    model = make_model(image_aspect_ratio="anyres")
    fields = model.config.to_dict() | {"image_grid_pinpoints": grids}
    with pytest.raises(ValueError, match="`image_grid_pinpoints`"):
        MoveKDConfig(**fields)
    MoveKDConfig(**fields | {"image_aspect_ratio": "pad"})  # makes no tiles
    model.config.image_grid_pinpoints = grids
    with pytest.raises(ValueError, match="`image_grid_pinpoints`"):
        make_processor(model)


def test_a_processor_that_cuts_images_otherwise_than_the_model(pair, make_model, make_processor, tmp_path):
    model, processor = pair
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    load_checkpoint(tmp_path, device="cpu")
    other = copy.deepcopy(processor)
    other.image_processor.crop_size = {"height": 10**7, "width": 10**7}
    other.save_pretrained(tmp_path)
    for load in (load_checkpoint, load_tower):
        with pytest.raises(ValueError, match="cuts images to .*10000000.*the model takes 16 pixels a side"):
            load(tmp_path, device="cpu")
    if model.config.image_aspect_ratio == "anyres":
        other = copy.deepcopy(processor)
        other.image_processor.image_grid_pinpoints = [[16, 32]]
    else:
        other = make_processor(make_model(image_aspect_ratio="anyres"))
    other.save_pretrained(tmp_path)
    for load in (load_checkpoint, load_tower):
        with pytest.raises(ValueError, match=r"cuts tiles by the grids \[\[\d+, .*`image_grid_pinpoints`"):
            load(tmp_path, device="cpu")
