"""The generated world and the networks trained on it, as they lie in `train/demo/weights`."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from train.demo import scenes as world
from train.demo.scene_labels import cell_labels, probe_scores, resized, student_features
from train.demo.scenes import COLUMNS, COUNTS, FAMILIES, ROWS, SPLITS, caption, chance_levels, sample_scene, scenes
from train.demo.text_scenes import SYSTEM_PROMPT, TextScenes, build_tokenizer, language_model_scores, lesson


TOWERS = Path(__file__).parents[3] / "train" / "demo" / "weights"
VISION_TOWERS = {"clip": (64, (17, 128)), "detector": (96, (65, 96)), "reader": (128, (96, 16, 16))}


def answer(scene: dict, question: str) -> str:
    """The answer to a question, worked out from the truth columns alone."""
    objects = scene["objects"]

    def place(name: str) -> tuple[int, int, int]:
        if name == "number":
            return scene["number_row"], scene["number_column"], scene["number_column"] + 1
        (item,) = [item for item in objects if name == f"{item['color']} {item['shape']}"]
        return item["row"], item["column"], item["column"]

    if match := re.fullmatch(r"What colour is the (\w+)\?", question):
        (color,) = [item["color"] for item in objects if item["shape"] == match[1]]
        return color
    if match := re.fullmatch(r"What shape is the (\w+) object\?", question):
        (shape,) = [item["shape"] for item in objects if item["color"] == match[1]]
        return shape
    if match := re.fullmatch(r"Is the ([\w ]+) left or right of the ([\w ]+)\?", question):
        (_, first, last), (_, other_first, other_last) = place(match[1]), place(match[2])
        assert last < other_first or other_last < first
        return "left" if last < other_first else "right"
    if match := re.fullmatch(r"Is the ([\w ]+) above or below the ([\w ]+)\?", question):
        row, other_row = place(match[1])[0], place(match[2])[0]
        assert row != other_row
        return "above" if row < other_row else "below"
    if match := re.fullmatch(r"Is there a (\w+) (\w+)\?", question):
        return "yes" if match.groups() in {(item["color"], item["shape"]) for item in objects} else "no"
    if question == "How many objects are there?":
        return COUNTS[len(objects) - 1]
    assert question == "Which number is written?"
    return scene["number"]


def turns(conversation: list[dict]) -> list[tuple[str, str]]:
    assert [turn["from"] for turn in conversation] == ["human", "gpt"] * (len(conversation) // 2)
    values = [turn["value"] for turn in conversation]
    assert values[0].startswith("<image>\n") and sum("<image>" in value for value in values) == 1
    return list(zip(values[::2], values[1::2], strict=True))


@pytest.fixture(scope="module")
def finetune():
    return scenes("finetune", 150)


def test_the_same_arguments_give_the_same_rows_and_others_do_not():
    first, again, other = scenes("test", 6, seed=3), scenes("test", 6, seed=3), scenes("test", 6, seed=4)
    longer = scenes("test", 12, seed=3).select(range(6))
    for row, same, prefix, different in zip(first, again, longer, other, strict=True):
        for match in (same, prefix):
            assert {**row, "image": None} == {**match, "image": None}
            assert np.array_equal(np.asarray(row["image"]), np.asarray(match["image"]))
        assert not np.array_equal(np.asarray(row["image"]), np.asarray(different["image"]))
        assert row["image"].size == (128, 128) and row["image"].mode == "RGB"


def test_no_scene_is_in_two_splits():
    contents = {split: {sample_scene(split, i).content for i in range(1500)} for split in SPLITS}
    for split, content in contents.items():
        for other in SPLITS:
            if other != split:
                assert not content & contents[other], f"{split} and {other} share scenes"
    # Scenes do come twice, within a split: without the rule they would between splits, too.
    assert len({content for group in contents.values() for content in group}) < 1500 * len(SPLITS)


def test_every_answer_follows_from_the_truth(finetune):
    asked = set()
    for scene, conversation, family in zip(
        finetune["scene"], finetune["conversations"], finetune["family"], strict=True
    ):
        assert family == "several" and len(conversation) == 2 * len(FAMILIES)
        for question, reply in turns(conversation):
            question = question.removeprefix("<image>\n")
            assert reply == answer(scene, question)
            asked.add(question.split()[1] + question.split()[-1])
    assert len(asked) > 10


def test_single_questions_take_the_families_in_turn():
    rows = scenes("test", 25)
    assert rows["family"] == [*FAMILIES] * 5
    for scene, conversation in zip(rows["scene"], rows["conversations"], strict=True):
        ((question, reply),) = turns(conversation)
        assert reply == answer(scene, question.removeprefix("<image>\n"))


def test_presence_is_half_yes_and_its_negatives_are_near_misses():
    rng, yes, near, no = np.random.default_rng(0), 0, 0, 0
    for index in range(1000):
        scene = sample_scene("finetune", index)
        question = world.ask(scene, "presence", rng)
        color, shape = re.fullmatch(r"Is there a (\w+) (\w+)\?", question.text).groups()
        yes += question.answer == "yes"
        if question.answer == "no":
            no += 1
            near += any(color == item.color or shape == item.shape for item in scene.objects)
    assert 450 < yes < 550 and near > 0.8 * no


def test_captions_place_the_number_and_never_name_it():
    rows = scenes("pretrain", 150)
    for scene, conversation, family in zip(rows["scene"], rows["conversations"], rows["family"], strict=True):
        ((request, text),) = turns(conversation)
        assert family == "caption" and request == f"<image>\n{world.CAPTION_REQUEST}"
        assert not re.search(r"\d", text) and scene["number"] not in text
        assert text.endswith(f"and a number at {COLUMNS[scene['number_column']]} {ROWS[scene['number_row']]}")
        for item in scene["objects"]:
            place = f"{COLUMNS[item['column']]} {ROWS[item['row']]}"
            assert f"a {item['color']} {item['shape']} at {place}" in text
    # The number changes nothing else in a caption: with any other digits it is word for word the same.
    scene = sample_scene("pretrain", 0)
    changed = world.Scene(scene.objects, "99", scene.number_row, scene.number_column, scene.digit_centers)
    assert caption(changed) == caption(scene)


def test_objects_and_digits_are_painted_where_the_truth_says():
    rows = scenes("towers", 40)
    for image, scene in zip(rows["image"], rows["scene"], strict=True):
        pixels = np.asarray(image).astype(float)
        taken = {(item["row"], item["column"]) for item in scene["objects"]}
        assert len(taken) == len(scene["objects"])
        for item in scene["objects"]:
            middle = pixels[item["y"] - 2 : item["y"] + 3, item["x"] - 2 : item["x"] + 3].mean((0, 1))
            distances = {name: np.abs(middle - color).sum() for name, color in world.COLORS.items()}
            assert min(distances, key=distances.get) == item["color"]
            assert (item["x"] // world.CELL, item["y"] // world.CELL) == (item["column"], item["row"])
        for offset, (x, y) in enumerate(scene["digit_centers"]):
            assert (scene["number_row"], scene["number_column"] + offset) not in taken
            assert np.ptp(pixels[y - 12 : y + 12, x - 9 : x + 9].mean(-1)) > 100


def test_chance_levels_are_what_the_best_constant_answer_reaches():
    levels = chance_levels("test", size=1500)
    assert list(levels) == list(FAMILIES)
    bounds = {"attribute": (0.19, 0.27), "relation": (0.5, 0.56), "presence": (0.5, 0.56), "count": (0.19, 0.25)}
    for family, (low, high) in bounds.items():
        assert low <= levels[family] <= high, f"{family}: {levels[family]}"
    assert 1 / 90 <= levels["read"] < 0.03


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "train", "size": 1}, "Unknown split 'train'. Choose one of towers, pretrain"),
        ({"split": "test", "size": 0}, "size is 0"),
        ({"split": "test", "size": 1, "questions": 6}, "questions is 6"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        scenes(**arguments)


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match="Unknown question family 'color'"):
        world.ask(sample_scene("test", 0), "color", np.random.default_rng(0))


# The language model's words


def test_the_tokenizer_knows_every_word_and_gives_text_back(finetune):
    tokenizer = AutoTokenizer.from_pretrained(TOWERS / "language_model")
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    rng = np.random.default_rng(0)
    texts = [f"{SYSTEM_PROMPT} USER: {world.CAPTION_REQUEST} ASSISTANT:"]
    texts += [caption(sample_scene("pretrain", i)) for i in range(50)]
    texts += [text for c in finetune["conversations"] for pair in turns(c) for text in pair]
    texts += [text for i in range(50) for pair in lesson(sample_scene("towers", i), rng) for text in pair]
    for text in texts:
        text = text.removeprefix("<image>\n")
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_text_scenes_are_cut_as_the_whole_prompt_would_be():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    scene = sample_scene("towers", 0)
    told = TextScenes([scene], tokenizer)
    pairs = [("Which number is written?", "47"), ("How many objects are there?", "two")]
    before, after, labels = told.chat(pairs)
    whole = f"{SYSTEM_PROMPT} USER: <image> {pairs[0][0]} ASSISTANT: 47</s>USER: {pairs[1][0]} ASSISTANT: two</s>"
    assert [*before, tokenizer.convert_tokens_to_ids("<image>"), *after] == tokenizer(whole)["input_ids"]
    learnt = [token for token, label in zip(after, labels, strict=True) if label != -100]
    assert tokenizer.decode(learnt) == "47</s> two</s>"


# The folders of the four networks


@pytest.mark.parametrize("name", VISION_TOWERS)
def test_a_vision_tower_is_whole_in_its_folder(name, tmp_path):
    size, shape = VISION_TOWERS[name]
    model, info = AutoModel.from_pretrained(TOWERS / name, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    processor = AutoImageProcessor.from_pretrained(TOWERS / name)
    pixel_values = processor(list(scenes("test", 2)["image"]), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (2, 3, size, size)
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        output = model(pixel_values).last_hidden_state
        again = AutoModel.from_pretrained(tmp_path).eval()(pixel_values).last_hidden_state
    assert output.shape == (2, *shape) and output.dtype == torch.float32
    assert torch.equal(output, again)


def test_the_language_model_is_whole_in_its_folder():
    _, info = AutoModelForCausalLM.from_pretrained(TOWERS / "language_model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_the_folders_are_small_and_say_nothing_of_the_machine():
    files = [file for file in TOWERS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 8e6
    assert {file.suffix for file in files} <= {".jinja", ".json", ".safetensors"}
    for file in files:
        if file.suffix == ".json":
            assert not re.search(r"/(tmp|home|root|work|Users)/", file.read_text()), file


def test_the_clip_probe_is_as_good_as_the_scores_say():
    floor = {"shape": 0.9, "colour": 0.97, "digit": 0.3}
    claimed = json.loads((TOWERS / "scores.json").read_text())["scores"]["clip"]
    rows = [sample_scene("test", i) for i in range(500)]
    pictures = [world.scene_image("test", i) for i in range(500)]
    measured = probe_scores(
        student_features(AutoModel.from_pretrained(TOWERS / "clip").eval(), resized(pictures, 64)),
        cell_labels(rows).by_kind(),
        trained=350,
    )
    for name, least in floor.items():
        assert claimed[name] >= least
        # Fewer scenes to fit and to measure than in the build, hence the margin.
        assert measured[name] >= claimed[name] - 0.15, f"{name}: {measured[name]} against {claimed[name]}"


@pytest.mark.parametrize(("name", "keys"), [("detector", ["shape", "colour"]), ("reader", ["digit"])])
def test_a_teacher_knows_what_it_is_there_to_teach(name, keys):
    claimed = json.loads((TOWERS / "scores.json").read_text())["scores"][name]
    assert all(claimed[key] >= 0.95 for key in keys)
    model = AutoModel.from_pretrained(TOWERS / name).eval()
    processor = AutoImageProcessor.from_pretrained(TOWERS / name)
    pictures = [world.scene_image("test", i) for i in range(240)]
    with torch.no_grad():
        features = model(**processor(pictures, return_tensors="pt")).last_hidden_state
    if features.dim() == 3:
        features = features[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
    # The mean over each of the 4 x 4 cells is enough for a linear probe to find what the scores promise.
    cells = torch.nn.functional.adaptive_avg_pool2d(features, 4).flatten(2).transpose(1, 2)
    measured = probe_scores(cells, cell_labels([sample_scene("test", i) for i in range(240)]).by_kind(), trained=180)
    assert all(measured[key] >= 0.85 for key in keys), measured


def test_the_language_model_answers_questions_about_scenes_told_in_words():
    claimed = json.loads((TOWERS / "scores.json").read_text())["scores"]["language_model"]
    folder = TOWERS / "language_model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    measured = language_model_scores(model, TextScenes([sample_scene("test", i) for i in range(60)], tokenizer))
    chance = chance_levels("test", size=300)
    for family in FAMILIES:
        assert measured[family] >= claimed[family] - 0.15, f"{family}: {measured[family]} against {claimed[family]}"
        assert claimed[family] > chance[family], f"{family}: {claimed[family]} is no better than chance"
