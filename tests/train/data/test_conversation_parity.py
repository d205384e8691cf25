"""Token ids, label masks and sampling order against the authors' numbers, through the templates, rows and collator."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from modeling_movekd.chat_templates import set_chat_template
from train.data.collator import MoveKDCollator
from train.data.datasets import load_conversations
from train.data.sampler import length_grouped_indices, modality_length_grouped_indices


pytestmark = pytest.mark.parity

IMAGE_POSITION = -200  # how the golden numbers write an image
IGNORE_INDEX = -100


def read(parity_dir: Path, name: str) -> Any:
    return json.loads((parity_dir / "conversation" / name).read_text(encoding="utf-8"))


def build_processor(parity_dir: Path, template: str, tokens_per_side: int) -> LlavaProcessor:
    tokenizer = AutoTokenizer.from_pretrained(parity_dir / "conversation" / "tokenizer")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    side = 4 * tokens_per_side
    image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_pad=True
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return set_chat_template(processor, template)


def load_rows(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases as rows, none of them skipped."""
    picture = Image.new("RGB", (12, 8), (200, 30, 90))
    rows = [
        {"conversations": case["conversations"], **({"image": picture} if case["has_image"] else {})} for case in cases
    ]
    dataset = load_conversations(rows, max_bad_row_share=0)
    assert len(dataset) == len(cases)
    return list(dataset)


def short_form(batch: dict[str, torch.Tensor], position: int, image_token_id: int) -> tuple[list[int], list[int]]:
    """Ids and labels of one row without padding, every run of image tokens written as one -200."""
    length = int(batch["attention_mask"][position].sum())
    ids, labels = [], []
    for token, label in zip(
        batch["input_ids"][position, :length].tolist(), batch["labels"][position, :length].tolist(), strict=True
    ):
        if token == image_token_id:
            assert label == IGNORE_INDEX
            if ids and ids[-1] == IMAGE_POSITION:
                continue
            token = IMAGE_POSITION
        ids.append(token)
        labels.append(label)
    return ids, labels


def golden_labels(labels: list[int]) -> list[int]:
    """An image inside an answer is -200 in the reference's labels and -100 once it is expanded."""
    return [IGNORE_INDEX if label == IMAGE_POSITION else label for label in labels]


def test_text_tokenises_the_same_alone_and_after_an_image(parity_dir: Path) -> None:
    tokenizer = build_processor(parity_dir, "vicuna_v1", 1).tokenizer
    chunks = read(parity_dir, "chunk_token_ids.json")
    assert chunks
    for chunk in chunks:
        text, ids = chunk["text"], chunk["ids_with_bos"]
        if not text.startswith(
            " "
        ):  # a leading space merges with the word mark that the slow tokenizer puts before it
            assert [tokenizer.bos_token_id, *tokenizer(text).input_ids] == ids, text
        if text:  # nor does it put a word mark before an end token
            image = "<image>" if text.startswith(tokenizer.eos_token) else "<image> "
            assert tokenizer(image + text).input_ids[1:] == ids[1:], text


def is_regular(case: dict[str, Any]) -> bool:
    """Whether the authors' bookkeeping can count the sample; where it cannot, the default rule keeps the answers."""
    values = [turn["value"] for turn in case["conversations"]]
    odd = ("</s>", "<unk>", " ASSISTANT: ")
    countable = all(value and not any(text in value for text in odd) for value in values)
    return countable and any(label >= 0 for label in case["labels"])


@pytest.mark.parametrize("rule", ["released", "answers"])
@pytest.mark.parametrize(
    ("template", "file"), [("vicuna_v1", "preprocess_v1.json"), ("plain", "preprocess_plain.json")]
)
def test_ids_and_labels(parity_dir: Path, template: str, file: str, rule: str) -> None:
    processor = build_processor(parity_dir, template, tokens_per_side=2)
    cases = read(parity_dir, file)
    assert cases
    collator = MoveKDCollator(processor, labels=rule)
    for case, row in zip(cases, load_rows(cases), strict=True):
        rendered = processor.apply_chat_template(row["messages"], tokenize=False)
        # The space after the token is the word mark that the slow tokenizer puts before a text
        rendered = rendered.removeprefix("<s>").removeprefix(" ").replace("<image> ", "<image>")
        assert rendered == case["prompt"], case["name"]
        ids, labels = short_form(collator([row]), 0, processor.image_token_id)
        assert ids == case["input_ids"], case["name"]
        if rule == "released" or is_regular(case):
            assert labels == golden_labels(case["labels"]), case["name"]


def test_multimodal_step(parity_dir: Path) -> None:
    cases = read(parity_dir, "preprocess_v1.json") + read(parity_dir, "preprocess_plain.json")
    for case, row in zip(cases, load_rows(cases), strict=True):
        turns = case["after_preprocess_multimodal"]
        turns = turns[1:] if turns[0]["from"] == "gpt" else turns
        values = []
        for message in row["messages"]:
            images = sum(part["type"] == "image" for part in message["content"])
            text = "".join(part["text"] for part in message["content"] if part["type"] == "text")
            values.append(("<image>\n" + text).strip() if images else text)
        assert values == [turn["value"] for turn in turns], case["name"]


def test_truncation(parity_dir: Path) -> None:
    # One token per image, as the limit of the golden numbers counts.
    processor = build_processor(parity_dir, "vicuna_v1", tokens_per_side=1)
    by_name = {case["name"]: case for case in read(parity_dir, "preprocess_v1.json")}
    cases = read(parity_dir, "truncation_v1.json")
    assert cases
    for case in cases:
        (row,) = load_rows([by_name[case["name"]]])
        batch = MoveKDCollator(processor, max_length=case["model_max_length"], labels="released")([row])
        ids, labels = short_form(batch, 0, processor.image_token_id)
        assert ids == case["collated"]["input_ids"][0], case["name"]
        assert labels == golden_labels(case["collated"]["labels"][0]), case["name"]
        assert batch["attention_mask"].bool().tolist() == case["collated"]["attention_mask"], case["name"]


def test_collation(parity_dir: Path) -> None:
    processor = build_processor(parity_dir, "vicuna_v1", tokens_per_side=1)
    by_name = {case["name"]: case for case in read(parity_dir, "preprocess_v1.json")}
    golden = read(parity_dir, "collate_v1.json")
    assert processor.tokenizer.pad_token_id == golden["pad_token_id"]
    rows = load_rows([by_name[name] for name in golden["sample_names"]])
    batch = MoveKDCollator(processor, labels="released")(rows)
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == processor.image_token_id, IMAGE_POSITION)
    assert ids.tolist() == golden["input_ids"]
    assert batch["labels"].tolist() == [golden_labels(labels) for labels in golden["labels"]]
    assert batch["attention_mask"].bool().tolist() == golden["attention_mask"]


def test_sampling_order(parity_dir: Path) -> None:
    golden = read(parity_dir, "group_by_modality_length.json")
    assert golden["cases"]

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    for case in golden["cases"]:
        lengths, layout = case["lengths"], (case["batch_size"], case["world_size"])
        order = modality_length_grouped_indices(lengths, *layout, seeded(case["indices_global_seed"]))
        assert order == case["indices"]
        given = case["with_generator"]
        order = modality_length_grouped_indices(
            lengths, *layout, seeded(given["generator_seed"]), shuffle_generator=seeded(given["global_seed"])
        )
        assert order == given["indices"]
        given = case["length_only"]
        order = length_grouped_indices([abs(length) for length in lengths], *layout, seeded(given["global_seed"]))
        assert order == given["indices"]


def test_modality_lengths(parity_dir: Path) -> None:
    rows = load_rows(read(parity_dir, "preprocess_v1.json"))
    golden = read(parity_dir, "group_by_modality_length.json")
    assert [row["modality_length"] for row in rows] == golden["modality_lengths_of_preprocess_v1_samples"]
