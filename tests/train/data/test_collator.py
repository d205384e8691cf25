import io
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import LlavaNextProcessor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_llava import LlavaImageProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from modeling_movekd.chat_templates import set_chat_template, set_own_chat_template
from modeling_movekd.images import center_square, pad_to_square
from tests.helpers.own_templates import OPEN_ENDED_TEMPLATES, OWN_TEMPLATES
from train.data.collator import MoveKDCollator
from train.data.datasets import load_conversations
from train.teachers.preprocessing import TeacherPreprocessor


TOKENIZER = Path(__file__).parents[2] / "fixtures" / "parity" / "conversation" / "tokenizer"
SIZE, PATCH = 16, 4
IMAGE_TOKENS = (SIZE // PATCH) ** 2
TEACHERS = {
    "first": TeacherPreprocessor(20, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "second": TeacherPreprocessor(12, (0.1, 0.2, 0.3), (0.2, 0.3, 0.4), "bilinear"),
}


def build_processor(aspect: str = "pad", template: str = "vicuna_v1", torchvision: bool = False) -> LlavaProcessor:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    settings = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    if aspect == "anyres":
        grid = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
        processor_class = LlavaNextProcessor
        image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=grid, **settings)
    else:
        processor_class = LlavaProcessor
        image_class = LlavaImageProcessor if torchvision else LlavaImageProcessorPil
        image_processor = image_class(do_pad=aspect == "pad", **settings)
    processor = processor_class(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return set_chat_template(processor, template)


def picture(width: int = 30, height: int = 20, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def row(*images: object, question: str = "What is this?", answer: str = "A cat.") -> dict:
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return {"messages": [{"role": "user", "content": content}, reply], "images": list(images)}


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("template", ["vicuna_v1", "plain"])
def test_shapes_labels_and_right_padding(template: str) -> None:
    processor = build_processor(template=template)
    rows = [row(picture(), answer="A cat on the roof, asleep."), row(), row(picture(9, 9), picture(8, 30))]
    batch = MoveKDCollator(processor, TEACHERS)(rows)
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [IMAGE_TOKENS, 0, 2 * IMAGE_TOKENS]
    assert batch["pixel_values"].shape == (3, 3, SIZE, SIZE)
    assert {name: tuple(pixels.shape) for name, pixels in batch["teacher_pixel_values"].items()} == {
        "first": (3, 3, 20, 20),
        "second": (3, 3, 12, 12),
    }
    assert batch["image_rows"].tolist() == [0, 2, 2]
    assert batch["image_weights"].tolist() == [1, 1, 1] and batch["num_blank_images"] == 0
    answers = [processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    end = "</s>" if template == "vicuna_v1" else "\n"
    assert [answer.strip(" ") for answer in answers] == [
        f"A cat on the roof, asleep.{end}",
        f"A cat.{end}",
        f"A cat.{end}",
    ]
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        assert (ids[length:] == processor.tokenizer.pad_token_id).all() and (labels[length:] == -100).all()
        assert ids[0] == processor.tokenizer.bos_token_id


@pytest.mark.parametrize("name", [*OPEN_ENDED_TEMPLATES, "llama3"])
def test_every_byte_of_an_answer_is_trained_with_the_language_model_s_template(name: str) -> None:
    processor = build_processor()
    # No token but `<image>` holds these characters, so that each is several tokens of one byte
    marks = "\ue0a5\ue0a6"
    set_own_chat_template(processor, (OPEN_ENDED_TEMPLATES | OWN_TEMPLATES)[name])
    answers = ["Oui \N{GRINNING FACE}", "\u4e2d\u6587", "caf\xe9", f"a{marks}", f"<think>{marks}</think>a", marks[0]]
    rows = [row(picture(), question=f"What is {marks}?", answer=answer) for answer in answers]
    batch = MoveKDCollator(processor)(rows)
    assert not batch["bad_rows"]
    for labels, answer in zip(batch["labels"], answers, strict=True):
        trained = processor.tokenizer.decode(labels[labels != -100])
        assert answer.rpartition("</think>")[2] in trained and "What" not in trained and "\ufffd" not in trained


def test_a_row_does_not_depend_on_its_batch() -> None:
    collator = MoveKDCollator(build_processor(), TEACHERS)
    rows = [row(picture(seed=1)), row(question="Hi"), row(picture(seed=2), picture(seed=3), answer="Two.")]
    together = collator(rows)
    for position, single in enumerate(rows):
        alone = collator([single])
        length = alone["input_ids"].shape[1]
        for name in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(together[name][position, :length], alone[name][0])
        if single["images"]:
            assert torch.equal(together["pixel_values"][together["image_rows"] == position], alone["pixel_values"])


@pytest.mark.parametrize("size", [(30, 20), (20, 33), (25, 25), (40, 7)])
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_teachers_see_the_crop_the_student_sees(size: tuple[int, int], aspect: str) -> None:
    """A teacher with the student's own preprocessing gets the student's pixels."""
    processor = build_processor(aspect)
    # Smooth, since cutting before a resize instead of after it moves the sampling points by a fraction of a pixel.
    image = picture(3, 3).resize(size, Image.Resampling.BICUBIC)
    images = processor.image_processor
    same = TeacherPreprocessor(SIZE, tuple(images.image_mean), tuple(images.image_std))
    batch = MoveKDCollator(processor, {"same": same})([row(image)])
    difference = (same.normalize(batch["teacher_pixel_values"]["same"]) - batch["pixel_values"]).abs()
    if aspect == "pad":
        assert difference.max() < 1e-6
    else:
        assert difference.mean() < 0.1 < batch["pixel_values"].std() / 4


def test_padding_is_centred_on_the_mean_colour() -> None:
    wide = pad_to_square(Image.new("RGB", (7, 4), (255, 0, 0)), (122, 116, 104))
    assert wide.size == (7, 7)
    column = [wide.getpixel((3, y)) for y in range(7)]
    assert column == [(122, 116, 104)] + [(255, 0, 0)] * 4 + [(122, 116, 104)] * 2
    assert center_square(picture(10, 4)).tobytes() == picture(10, 4).crop((3, 0, 7, 4)).tobytes()


def test_per_teacher_geometry() -> None:
    image = picture(40, 10)
    shared = MoveKDCollator(build_processor(), TEACHERS)([row(image)])
    own = MoveKDCollator(build_processor(), TEACHERS, geometry="per_teacher")([row(image)])
    whole = MoveKDCollator(build_processor("square"), TEACHERS, geometry="per_teacher")([row(image)])
    tiles = MoveKDCollator(build_processor("anyres"), TEACHERS, geometry="per_teacher")([row(image)])
    assert torch.equal(shared["pixel_values"], own["pixel_values"])
    colours = {"first": (127, 127, 127), "second": (25, 51, 76)}
    for name, preprocessor in TEACHERS.items():
        padded = preprocessor.resize([pad_to_square(image, (122, 116, 104))])
        assert torch.equal(shared["teacher_pixel_values"][name], padded)
        padded = preprocessor.resize([pad_to_square(image, colours[name])])
        assert torch.equal(own["teacher_pixel_values"][name], padded)
        cut = preprocessor.resize([image], stretch=False)
        assert torch.equal(whole["teacher_pixel_values"][name], cut)
        assert torch.equal(tiles["teacher_pixel_values"][name], cut)
        assert not torch.equal(cut, preprocessor.resize([image]))


def test_anyres() -> None:
    processor = build_processor("anyres")
    images = [picture(40, 20), picture(16, 16, seed=1), picture(20, 60, seed=2)]
    batch = MoveKDCollator(processor, TEACHERS)([row(images[0]), row(), row(*images[1:])])
    assert batch["image_sizes"].tolist() == [[20, 40], [16, 16], [60, 20]]
    assert batch["pixel_values"].shape[0] == 3 and batch["pixel_values"].dim() == 5
    counts = (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist()
    assert counts[1] == 0 and counts[0] > IMAGE_TOKENS and counts[2] > 2 * IMAGE_TOKENS
    assert torch.equal(batch["teacher_pixel_values"]["first"], TEACHERS["first"].resize(images))


@pytest.mark.parametrize("aspect", ["pad", "anyres"])
@pytest.mark.parametrize("distill", [False, True])
def test_text_only_batch_gets_a_black_image(aspect: str, distill: bool) -> None:
    processor = build_processor(aspect)
    batch = MoveKDCollator(processor, TEACHERS, distill_text_only_rows=distill)([row(), row(question="Hi")])
    assert (batch["input_ids"] != processor.image_token_id).all()
    blanks = 2 if distill else 1
    assert batch["num_blank_images"] == len(batch["pixel_values"]) == blanks
    assert batch["image_weights"].tolist() == [float(distill)] * blanks
    assert batch["image_rows"].tolist() == list(range(blanks))
    image_processor = processor.image_processor
    black = -torch.tensor(image_processor.image_mean) / torch.tensor(image_processor.image_std)
    torch.testing.assert_close(batch["pixel_values"].flatten(0, -4)[0, :, 3, 3], black)
    assert torch.equal(
        batch["teacher_pixel_values"]["first"], TEACHERS["first"].resize([Image.new("RGB", (4, 4))] * blanks)
    )


def test_black_images_come_after_those_of_the_text() -> None:
    rows = [row(), row(picture()), row()]
    plain = MoveKDCollator(build_processor(), TEACHERS)(rows)
    batch = MoveKDCollator(build_processor(), TEACHERS, distill_text_only_rows=True)(rows)
    assert plain["num_blank_images"] == 0 and plain["image_rows"].tolist() == [1]
    assert batch["num_blank_images"] == 2 and batch["image_rows"].tolist() == [1, 0, 2]
    assert batch["image_weights"].tolist() == [1, 1, 1]
    assert torch.equal(batch["pixel_values"][:1], plain["pixel_values"])
    assert torch.equal(batch["teacher_pixel_values"]["second"][:1], plain["teacher_pixel_values"]["second"])


def test_truncation_cuts_text_on_the_right() -> None:
    processor = build_processor()
    rows = [row(picture(), answer="A cat " * 20), row(answer="Yes")]
    whole = MoveKDCollator(processor)(rows)
    length = whole["input_ids"].shape[1] - 15
    cut = MoveKDCollator(processor, max_length=length)(rows)
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(cut[name], whole[name][:, :length])
    assert (cut["labels"][0] != -100).any()
    assert torch.equal(MoveKDCollator(processor, max_length=5000)(rows)["input_ids"], whole["input_ids"])


def test_a_row_cut_into_its_image_is_bad() -> None:
    processor = build_processor()
    example = row(picture()) | {"row_index": 41}
    ids = MoveKDCollator(processor)([example])["input_ids"][0]
    end = int((ids == processor.image_token_id).nonzero().max()) + 1
    cut_off = ("row 41", f"max_length {end} cuts off its answers")
    assert MoveKDCollator(processor, max_length=end)([example])["bad_rows"] == [cut_off]
    batch = MoveKDCollator(processor, max_length=end - 1)([row(question="?"), example])
    assert batch["bad_rows"] == [("row 41", f"its image tokens end at token {end}, above max_length {end - 1}")]
    assert batch["num_blank_images"] == 1 and (batch["input_ids"] != processor.image_token_id).all()
    assert (batch["labels"] != -100).any(dim=1).tolist() == [True, False]


def test_a_row_whose_answers_are_cut_off_is_bad() -> None:
    processor = build_processor()
    example = row(picture()) | {"row_index": 41}
    labels = MoveKDCollator(processor)([example])["labels"][0]
    first = int((labels != -100).nonzero().min())
    assert MoveKDCollator(processor, max_length=first + 1)([example])["bad_rows"] == []
    batch = MoveKDCollator(processor, TEACHERS, max_length=first)([example, row(question="?", answer="No.")])
    assert batch["bad_rows"] == [("row 41", f"max_length {first} cuts off its answers")]
    assert batch["num_blank_images"] == 1 and (batch["labels"] != -100).any(dim=1).tolist() == [False, True]
    # The original code trains on nothing of such a row, but on its image
    batch = MoveKDCollator(processor, TEACHERS, max_length=first, labels="released")([example])
    assert batch["bad_rows"] == [("row 41", f"max_length {first} cuts off its answers")]
    assert batch["num_blank_images"] == 0 and (batch["labels"] == -100).all()


def test_a_row_with_empty_answers_is_bad() -> None:
    assert MoveKDCollator(build_processor())([row(answer="")])["bad_rows"] == [("row 0", "its answers have no token")]


@pytest.mark.parametrize("max_length", [None, 2048])
def test_a_row_longer_than_the_language_model_takes_is_bad(max_length: int | None) -> None:
    processor = build_processor()
    example = row(picture(), answer="A cat " * 20)
    length = MoveKDCollator(processor)([example])["input_ids"].shape[1]
    assert MoveKDCollator(processor, max_length=max_length, max_positions=length)([example])["bad_rows"] == []
    batch = MoveKDCollator(processor, max_length=max_length, max_positions=length - 1)([example, row()])
    reason = f"it has {length} tokens, but the language model takes {length - 1}"
    assert batch["bad_rows"] == [("row 0", reason)] and batch["input_ids"].shape[1] < length
    cut = MoveKDCollator(processor, max_length=length - 1, max_positions=length - 1)([example])
    assert cut["bad_rows"] == [] and cut["input_ids"].shape[1] == length - 1


def test_labels_of_an_empty_turn() -> None:
    """The authors drop a sample they cannot count, with a warning; the default trains on its other answers."""
    processor = build_processor()
    messages = [*row(picture(), answer="A dog.")["messages"], *row(answer="")["messages"]]
    example = {"messages": messages, "images": [picture()]}
    labels = MoveKDCollator(processor)([example])["labels"]
    assert processor.tokenizer.decode(labels[labels != -100]).strip() == "A dog.</s>"
    batch = MoveKDCollator(processor, labels="released")([example])
    assert (batch["labels"] == -100).all() and "original code trains on no token" in batch["bad_rows"][0][1]


def test_images_may_be_paths_bytes_or_pictures(tmp_path: Path) -> None:
    image = picture()
    path = tmp_path / "picture.png"
    image.save(path)
    forms = [image, str(path), {"bytes": png(image), "path": None}, {"bytes": None, "path": str(path)}]
    batch = MoveKDCollator(build_processor())([row(form) for form in forms])
    assert (batch["pixel_values"] == batch["pixel_values"][0]).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_colour_modes(mode: str) -> None:
    assert MoveKDCollator(build_processor())([row(picture().convert(mode))])["pixel_values"].isfinite().all()


def test_a_batch_names_its_bad_rows_and_keeps_their_places() -> None:
    processor = build_processor()
    broken = row(picture(), {"bytes": png(picture())[:200], "path": None}) | {"source": "data.json row 17"}
    problem = {"messages": [], "images": [], "row_index": 4, "problem": "no turns"}
    rows = [row(picture(seed=1)), broken, row(question="Hi"), problem, row(picture(seed=2))]
    batch = MoveKDCollator(processor, TEACHERS)(rows)
    assert [name for name, _ in batch["bad_rows"]] == ["data.json row 17", "row 4"]
    assert "cannot be decoded" in batch["bad_rows"][0][1] and batch["bad_rows"][1][1] == "no turns"
    assert len(batch["input_ids"]) == 5 and batch["image_rows"].tolist() == [0, 4]
    assert (batch["labels"] != -100).any(dim=1).tolist() == [True, False, True, False, True]
    good = MoveKDCollator(processor, TEACHERS)([rows[0], rows[2], rows[4]])
    assert good["bad_rows"] == []
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(batch[name][[0, 2, 4]], good[name])
    assert torch.equal(batch["pixel_values"], good["pixel_values"])
    assert torch.equal(batch["teacher_pixel_values"]["second"], good["teacher_pixel_values"]["second"])


@pytest.mark.parametrize("aspect", ["pad", "anyres"])
@pytest.mark.parametrize("labels", ["answers", "released"])
def test_a_batch_of_bad_rows_trains_nothing(aspect: str, labels: str) -> None:
    collator = MoveKDCollator(build_processor(aspect), TEACHERS, labels=labels, distill_text_only_rows=True)
    batch = collator([row("no/such/file.png"), row({"bytes": b"", "path": None})])
    assert [reason for _, reason in batch["bad_rows"]] == ["no/such/file.png: no such file", "an image of 0 bytes"]
    assert (batch["labels"] == -100).all() and len(batch["labels"]) == 2
    assert batch["image_weights"].tolist() == [0] and batch["num_blank_images"] == len(batch["pixel_values"]) == 1
    mixed = collator([row("no/such/file.png"), row()])
    assert mixed["image_rows"].tolist() == [1] and mixed["image_weights"].tolist() == [1]


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 50), (50, 3), (3, 3)])
@pytest.mark.parametrize(("aspect", "torchvision"), [("pad", True), ("pad", False), ("anyres", False)])
def test_tiny_images(size: tuple[int, int], aspect: str, torchvision: bool) -> None:
    """Sides of 1 and 3 pixels could be taken for channels."""
    processor = build_processor(aspect, torchvision=torchvision)
    image = Image.new("RGB", size, (255, 0, 0))
    pixels = MoveKDCollator(processor, TEACHERS)([row(image)])["pixel_values"]
    red, green, blue = pixels.flatten(0, -4)[0, :, SIZE // 2, SIZE // 2]
    assert red > 0.1 and red > 2 * green and red > 2 * blue
    if aspect == "pad":
        padded = pad_to_square(image, (122, 116, 104))
        assert torch.equal(pixels, MoveKDCollator(processor)([row(padded)])["pixel_values"])


def test_orientation() -> None:
    image, exif = picture(30, 20), Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    turned = image.transpose(Image.Transpose.ROTATE_270)
    stored = row({"bytes": buffer.getvalue(), "path": None})
    for apply, expected in ((True, turned), (False, image)):
        batch = MoveKDCollator(build_processor(), apply_orientation=apply)([stored])
        assert torch.equal(batch["pixel_values"], MoveKDCollator(build_processor())([row(expected)])["pixel_values"])


@pytest.mark.parametrize(("shown", "given"), [(2, 1), (1, 2), (0, 1), (1, 0)])
def test_placeholders_and_images_must_agree(shown: int, given: int) -> None:
    example = row(*[picture()] * shown) | {"images": [picture()] * given, "row_index": 5}
    with pytest.raises(ValueError, match=f"Row 5 has {shown} image placeholders and {given} images"):
        MoveKDCollator(build_processor())([row(picture()), example])


@pytest.mark.parametrize("rule", ["loop.index < 2", "loop.index > 3"])
def test_a_template_that_drops_images_is_refused(rule: str) -> None:
    """The library compares the sums over the batch."""
    processor = build_processor()
    processor.chat_template = (
        "{% for message in messages %}{% generation %}{% for part in message.content %}"
        "{{ part.text if part.type == 'text' else '<image>' if " + rule + " else '' }}"
        "{% endfor %}{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="number of images passed"):
        MoveKDCollator(processor)([row(picture(), picture())])


@pytest.mark.parametrize("aspect", ["pad", "anyres"])
def test_a_template_that_moves_images_to_another_row_is_refused(aspect: str) -> None:
    """Each row's own number is checked, where the sums agree and the library is content."""
    processor = build_processor(aspect)
    processor.chat_template = (
        "{% for message in messages %}{% generation %}{% for part in message.content %}"
        "{{ part.text | replace('IMAGE', '<image>') if part.type == 'text' }}"
        "{% endfor %}{% endgeneration %}{% endfor %}"
    )
    rows = [row(question="IMAGE"), row(picture()) | {"row_index": 8}]
    with pytest.raises(ValueError, match="Row 0 has [1-9][0-9]* image tokens instead of 0"):
        MoveKDCollator(processor)(rows)
    with pytest.raises(ValueError, match="Row 8 has 0 image tokens instead of [1-9][0-9]"):
        MoveKDCollator(processor)(rows[::-1])


def test_a_placeholder_inside_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="Row 3 has 2 image placeholders and 1 images"):
        MoveKDCollator(build_processor())([row(picture(), answer="an <image> token") | {"row_index": 3}])


def test_messages_may_be_plain_strings() -> None:
    messages = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A cat."}]
    collator = MoveKDCollator(build_processor())
    assert torch.equal(collator([{"messages": messages}])["labels"], collator([row()])["labels"])


def test_bad_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="'square'.*'shared', 'per_teacher'"):
        MoveKDCollator(build_processor(), geometry="square")
    with pytest.raises(ValueError, match="'all'.*'answers', 'released'"):
        MoveKDCollator(build_processor(), labels="all")
    processor = build_processor()
    processor.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="generation"):
        MoveKDCollator(processor)


def test_works_in_loader_workers() -> None:
    dataset = load_conversations([{"image": picture(seed=seed), **conversation(seed)} for seed in range(5)])
    collator = MoveKDCollator(build_processor(torchvision=True), TEACHERS)
    pickle.loads(pickle.dumps(collator))
    here = [collator([dataset[index] for index in range(start, min(start + 2, 5))]) for start in (0, 2, 4)]
    loader = DataLoader(dataset, batch_size=2, collate_fn=collator, num_workers=2, multiprocessing_context="spawn")
    for expected, batch in zip(here, loader, strict=True):
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert torch.equal(batch["teacher_pixel_values"]["second"], expected["teacher_pixel_values"]["second"])


def test_teachers_share_what_is_resized_alike_and_get_bytes() -> None:
    pixels = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    other = {"mean": (0.1, 0.2, 0.3), "std": (0.2,) * 3}
    teachers = {
        "first": TeacherPreprocessor(20, **pixels),
        "other_mean": TeacherPreprocessor(20, **other),
        "bilinear": TeacherPreprocessor(20, **pixels, interpolation="bilinear"),
        "zero_pad": TeacherPreprocessor(20, **other, fit="zero_pad"),
    }
    dataset = load_conversations([{"image": picture(seed=seed), **conversation(seed)} for seed in range(3)])
    shared = MoveKDCollator(build_processor(), teachers)
    (batch,) = DataLoader(dataset, batch_size=3, collate_fn=shared, num_workers=1)
    handed = batch["teacher_pixel_values"]
    places = {name: pixels.data_ptr() for name, pixels in handed.items()}
    assert places["first"] == places["other_mean"] == places["zero_pad"] != places["bilinear"]
    assert {name: pixels.nbytes for name, pixels in handed.items()} == dict.fromkeys(teachers, 3 * 3 * 20 * 20)

    rows = [row(picture(40, 10)), row(picture(20, 30))]
    own = MoveKDCollator(build_processor(), teachers, geometry="per_teacher")(rows)["teacher_pixel_values"]
    assert own["other_mean"] is own["zero_pad"] and not torch.equal(own["first"], own["other_mean"])
    whole = MoveKDCollator(build_processor("square"), teachers, geometry="per_teacher")(rows)["teacher_pixel_values"]
    assert whole["first"] is whole["other_mean"] and not torch.equal(whole["first"], whole["bilinear"])
    assert whole["zero_pad"]["sizes"].tolist() == [[5, 20], [20, 13]]
    zero_padded = teachers["zero_pad"].normalize(whole["zero_pad"])
    assert not zero_padded[0, :, 5:].any() and not zero_padded[1, :, :, 13:].any()


def conversation(number: int) -> dict:
    turns = [("human", f"<image>\nWhich number is {number}?"), ("gpt", f"It is {number}.")]
    return {"conversations": [{"from": source, "value": value} for source, value in turns]}
