"""The replication's world, its measures, and its runs at a few steps."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from benchmarks.replication import __main__ as replication
from benchmarks.replication import runs, world
from benchmarks.replication.arms import ABLATION, ARMS, SCHEDULES
from benchmarks.replication.design import Experiment, Schedule
from benchmarks.replication.recipes import RECIPES
from benchmarks.replication.runs import Job, Scale
from benchmarks.replication.side_by_side import SideBySideEncoders
from benchmarks.replication.towers import STEPS, TEACHERS, demo_language_model
from modeling_movekd import MoveKDVisionModel
from modeling_movekd.processing import add_image_token
from train.demo.scene_labels import normalized
from train.demo.scenes import GRID, Scene, caption, render
from train.demo.text_scenes import TextScenes, build_tokenizer, with_short_template
from train.teachers.config import TeacherConfig
from train.teachers.loaders import load_teacher
from train.teachers.preprocessing import CLIP_MEAN, CLIP_STD


SCENES = [world.sample_scene("test", index) for index in range(60)]
TINY = Scale(8, 8, 6, 6, 4, 0.0001, 20)


def questions(family: str) -> list[tuple[Scene, world.Question]]:
    rng = np.random.default_rng(0)
    return [(scene, world.ask(scene, family, rng)) for scene in SCENES for _ in range(4)]


def test_attribute_and_size_tell_about_the_object_that_is_meant() -> None:
    kinds = Counter()
    for scene, question in questions("attribute") + questions("size"):
        words = re.sub(r"[?]", "", question.text).split()
        if question.kind == "colour":
            (item,) = [item for item in scene.objects if item.pattern in words]
            assert question.answer == item.color
        else:
            (item,) = [item for item in scene.objects if item.color in words and item.shape in words]
            assert question.answer == (item.pattern if question.kind == "pattern" else world.size_of(item))
        kinds[question.kind, question.answer] += 1
    assert {"colour", "pattern", "size"} == {kind for kind, _ in kinds}
    assert {answer for kind, answer in kinds if kind == "pattern"} == set(world.PATTERNS)


def test_presence_count_relation_and_read() -> None:
    for scene, question in questions("presence"):
        pattern, shape = re.fullmatch(r"Is there a (\w+) (\w+)\?", question.text).groups()
        is_there = any((item.pattern, item.shape) == (pattern, shape) for item in scene.objects)
        assert question.answer == ("yes" if is_there else "no")
    for scene, question in questions("count"):
        pattern = re.fullmatch(r"How many (\w+) objects are there\?", question.text)[1]
        assert question.answer == world.NUMBERS[sum(item.pattern == pattern for item in scene.objects)]
    for scene, question in questions("relation"):
        pattern, kind = re.fullmatch(r"Is the (\w+) object (\w+ or \w+)( of)? the number\?", question.text).groups()[
            :2
        ]
        (item,) = [item for item in scene.objects if item.pattern == pattern]
        if kind == "above or below":
            assert (item.row < scene.number_row) == (question.answer == "above") and item.row != scene.number_row
        else:
            assert (item.column < scene.number_column) == (question.answer == "left")
            assert item.column not in (scene.number_column, scene.number_column + 1)
    assert all(question.answer == scene.number for scene, question in questions("read"))


def test_captions_say_nothing_that_is_asked_for() -> None:
    for scene in SCENES:
        words = set(caption(scene).replace(",", "").split())
        assert not words & {*world.PATTERNS, *world.SIZES, *scene.number}


def test_splits_share_no_scene() -> None:
    contents = {
        split: {world.sample_scene(split, index).content for index in range(150)}
        for split in ("finetune", "validation")
    }
    assert not contents["finetune"] & contents["validation"]
    assert world.sample_scene("test", 3) == world.sample_scene("test", 3) != world.sample_scene("test", 4)


def test_patterns_are_painted() -> None:
    scene = next(scene for scene in SCENES if any(item.radius > 11 for item in scene.objects))
    item = next(item for item in scene.objects if item.radius > 11)
    painted = {}
    for pattern in world.PATTERNS:
        alone = dataclasses.replace(scene, objects=(dataclasses.replace(item, pattern=pattern),))
        pixels = np.asarray(render(alone, np.random.default_rng(0)), dtype=float)
        painted[pattern] = pixels[item.y - 12 : item.y + 12, item.x - 12 : item.x + 12]
    names = list(painted)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            assert np.abs(painted[name] - painted[other]).mean() > 5


def test_rows_ask_what_they_are_meant_to() -> None:
    assert world.rows("validation", 12, questions=1)["family"] == list(world.FAMILIES) * 2
    several = world.rows("finetune", 2, questions=6)[0]
    assert len(several["conversations"]) == 12 and several["conversations"][0]["value"].startswith("<image>")
    assert several["image"].size == (128, 128)
    told = world.rows("pretrain", 1, questions=0)[0]
    assert told["family"] == "caption" and told["conversations"][1]["value"] == caption(
        world.sample_scene("pretrain", 0)
    )


def test_the_language_model_sees_through_pictures_what_it_learnt_in_words() -> None:
    """The ids of a question behind an image are those of its training, and none is unknown."""
    tokenizer = with_short_template(build_tokenizer(world.WORDS))
    told = TextScenes(SCENES[:1], tokenizer, world.object_words)
    turns = world.lesson(SCENES[0], np.random.default_rng(0))
    before, after, labels = told.chat(turns, system_prompt=False)
    add_image_token(tokenizer)
    messages = []
    for index, (question, answer) in enumerate(turns):
        image = [{"type": "image"}] if index == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids == [*before, tokenizer.convert_tokens_to_ids("<image>"), *after]
    assert tokenizer.unk_token_id not in ids and len(labels) == len(after)
    assert demo_language_model(tokenizer=build_tokenizer(world.WORDS)).config.vocab_size == len(tokenizer) - 1


def test_a_vocabulary_in_another_order_is_refused() -> None:
    tokenizer = build_tokenizer(world.WORDS)
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = settings["model"]["vocab"]
    vocabulary["▁red"], vocabulary["▁green"] = vocabulary["▁green"], vocabulary["▁red"]
    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(settings)))
    with pytest.raises(ValueError, match="another id"):
        demo_language_model(swapped)


@pytest.mark.parametrize("experiment", [ABLATION, RECIPES], ids=["ablation", "recipes"])
def test_arms_and_comparisons_name_each_other(experiment: Experiment) -> None:
    compared = {arm for pair in experiment.comparisons for arm in pair[:2]}
    assert {*experiment.controls, *experiment.headline, experiment.upper, *compared} <= set(experiment.arms)
    assert set(experiment.chosen_twice) <= set(experiment.schedules)
    for arm in experiment.arms.values():
        assert experiment.arms[arm.schedule_of].schedule_of == arm.schedule_of
        for schedule in experiment.schedules[arm.schedule_of]:
            job, steps = Job("", 0, "test", schedule), 0
            assert arm.frozen_after_encoder <= bool(schedule.encoder_share)
            for stage in ("encoder", *runs.STAGES) if schedule.encoder_share else runs.STAGES:
                told = job.settings_in(stage, runs.QUICK.steps)
                args = runs.arguments(Path("nowhere"), arm, stage, 0, Path("nowhere"), **told)
                assert args.distill == bool(arm.teachers) and args.max_steps > 0
                assert {name: getattr(args, name) for name in told} == told
                steps += args.max_steps
            assert steps == runs.QUICK.steps


def test_sets_of_networks_are_paired_with_the_seeds() -> None:
    found = [RECIPES.networks_of(seed) for seed in range(RECIPES.first_seed, RECIPES.first_seed + 6)]
    assert sorted(found) == [1, 1, 2, 2, 3, 3] and ABLATION.networks_of(31) == 0
    folders = {replication.networks_folder(Path("outputs"), networks) for networks in (0, 1, 2)}
    assert folders == {Path("outputs"), Path("outputs/networks-1"), Path("outputs/networks-2")}
    assert runs.pictures_seed("test", 0) == 3 and len({runs.pictures_seed("test", n) for n in range(4)}) == 4


def line(arm: str, split: str, schedule: Schedule, value: float, **settings: Any) -> dict[str, Any]:
    chosen = ARMS[arm].settings | schedule._asdict() | settings
    return {"arm": arm, "seed": 100, "split": split, "settings": chosen, "accuracy": {"read": value}}


def test_schedules_are_chosen_on_validation_alone(monkeypatch) -> None:
    best = Schedule(6e-3, 3e-3, 2e-3, 1e-4, 0.3)
    lines = [
        line("paper", "validation", Schedule(None, 1e-3), 0.4),
        line("paper", "validation", best, 0.5),
        line("paper", "validation", Schedule(None, 1e-2), 0.9, lambda_kd=3.0),
        line("paper", "test", Schedule(None, 1e-3), 0.9),
    ]
    assert replication.chosen_schedule("clip_anchor", lines, ABLATION) == best
    with pytest.raises(ValueError, match="heads_unit"):
        replication.chosen_schedule("heads_raw", lines, ABLATION)
    jobs = [Job("paper", 100, "validation", best), Job("paper", 100, "test", best)]
    assert [replication.key(job) for job in jobs] == [replication.key_of(lines[number], ABLATION) for number in (1, 3)]
    # What was run before an arm got a setting is no run of it
    earlier = line("paper", "validation", best, 0.5)
    monkeypatch.setitem(ARMS, "paper", dataclasses.replace(ARMS["paper"], settings={"lambda_kd": 1.0}))
    assert replication.key_of(earlier, ABLATION) != replication.key(jobs[0])
    monkeypatch.undo()
    tried = replication.schedule_jobs(["frozen", "adapters", "paper"], ABLATION)
    assert [(job.arm, job.seed, job.schedule) for job in tried] == [
        (owner, 100, schedule) for owner in ("frozen", "paper") for schedule in SCHEDULES[owner]
    ]
    # Where one seed says too little, the mean of two decides
    first, second = SCHEDULES["heads_unit"][:2]
    assert [(job.seed, job.schedule) for job in replication.schedule_jobs(["heads_raw"], ABLATION)][:3] == [
        (100, first),
        (101, first),
        (100, second),
    ]
    twice = [line("heads_unit", "validation", first, value) for value in (0.9, 0.2)]
    twice.append(line("heads_unit", "validation", second, 0.6))
    assert replication.chosen_schedule("heads_raw", twice, ABLATION) == second


def test_arms_that_changed_since_test_was_asked_are_refused() -> None:
    chosen, other = Schedule(None, 1e-3), Schedule(None, 5e-3)
    lines = [line("paper", "validation", chosen, 0.5), line("paper", "test", chosen, 0.9)]
    replication.check_asked(["paper"], lines, ABLATION)
    replication.check_asked(["frozen"], [line("paper", "test", other, 0.9)], ABLATION)
    with pytest.raises(ValueError, match="Line 3.*0.005.*paper has.*0.001.*fresh pictures"):
        replication.check_asked(["paper"], [*lines, line("paper", "test", other, 0.9)], ABLATION)
    with pytest.raises(ValueError, match="Line 3.*'lambda_kd': 3.0.*'lambda_kd': None"):
        replication.check_asked(["paper"], [*lines, line("paper", "test", chosen, 0.9, lambda_kd=3.0)], ABLATION)


def test_blind_answers() -> None:
    ((_, constant),) = world.blind_levels(600, 0).items()
    assert set(constant) == set(world.FAMILIES)
    assert constant["size"] == pytest.approx(0.5, abs=0.1) and constant["read"] < 0.1


def test_places_tell_nothing_of_a_relation() -> None:
    """On both sides of the number there are as many objects, and each is as often the one that is asked for."""
    larger = []
    for scene, question in questions("relation"):
        sides = [world.side_of_number(scene, question.kind, item.row, item.column) for item in scene.objects]
        counts = Counter(side for side in sides if side)
        assert len(counts) == 2 and len(set(counts.values())) == 1 and question.answer in counts
        cells = Counter(world.side_of_number(scene, question.kind, at // GRID, at % GRID) for at in range(GRID * GRID))
        if len({cells[side] for side in counts}) == 2:
            larger.append(question.answer == max(counts, key=lambda side: cells[side]))
    assert np.mean(larger) == pytest.approx(0.5, abs=0.12)


def test_a_count_is_drawn_before_its_pattern() -> None:
    answers = Counter(question.answer for _, question in questions("count"))
    assert max(answers.values()) < 0.5 * sum(answers.values()) and answers["two"] > 0.1 * sum(answers.values())


def test_the_language_models_lessons_are_of_any_scene() -> None:
    """Also where only one object is there, of which no balanced relation can be asked."""
    scene = next(s for s in (world.sample_scene("towers", index) for index in range(50)) if len(s.objects) == 1)
    assert not world.relations(scene, balanced=True)
    turns = dict(world.lesson(scene, np.random.default_rng(0)))
    assert any("of the number?" in text or "below the number?" in text for text in turns)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replication")
    replication.build_towers(folder / "towers", 0, TINY.tower_pictures, TINY.tower_effort, workers=1)
    replication.prepare(folder, TINY, 0)
    return folder


@pytest.mark.slow
def test_encoders_side_by_side_are_the_encoders(folder: Path) -> None:
    teachers = {name: load_teacher(TeacherConfig(name=name, model=str(folder / "towers" / name))) for name in TEACHERS}
    clip = MoveKDVisionModel.from_clip(str(folder / "towers" / "clip"), num_experts=0)
    encoders = SideBySideEncoders(clip, teachers)
    picture = render(SCENES[0], np.random.default_rng(0))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    tokens = encoders(normalized(pixels, CLIP_MEAN, CLIP_STD)).last_hidden_state[:, 1:]
    assert tokens.shape == (1, 16, encoders.width)
    # At its own size nothing is resized, so that the last part is the reader's features as training has them
    expected = teachers["reader"](teachers["reader"].preprocessor([picture])).tokens
    cells = expected.reshape(1, 4, 4, 4, 4, 96).transpose(2, 3).reshape(1, 16, -1)
    expected = torch.nn.functional.layer_norm(cells, cells.shape[-1:])
    torch.testing.assert_close(tokens[..., -expected.shape[-1] :], expected, atol=1e-3, rtol=1e-3)
    small = Image.fromarray(np.array(picture)).resize((64, 64), Image.Resampling.BICUBIC)
    own = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
    own = clip(normalized(own, CLIP_MEAN, CLIP_STD)).last_hidden_state[:, 1:]
    assert torch.nn.functional.cosine_similarity(tokens[..., :128], own, dim=-1).min() > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["frozen", "released", "heads_unit_experts", "heads_unit_dense_lora", "encoders"])
def test_a_run_gives_a_whole_line(folder: Path, arm: str) -> None:
    job = Job(arm, 0, "test", SCHEDULES[ARMS[arm].schedule_of][-1])
    found = runs.run(job, ARMS[arm], folder, TINY, "command", "commit")
    assert set(found["accuracy"]) == set(world.FAMILIES) == set(found["questions"])
    assert set(found["probe"]) == set(found["probe_at_start"]) == {"shape", "colour", "pattern", "size", "digit"}
    assert (found["experts"] is None) == ("experts" not in arm and arm not in ("released", "heads_unit_dense_lora"))
    assert (found["drift"] == 0) == (arm in ("frozen", "encoders"))
    assert ("kd" in found["losses"]) == bool(ARMS[arm].teachers)
    assert found["cost"]["trained_parameters"] > 0
    assert json.loads(json.dumps(found)) == found


@pytest.mark.slow
def test_runs_that_are_there_are_not_run_again(folder: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    jobs = [Job("frozen", seed, "test", Schedule()) for seed in range(2)]
    now = replication.time.time()
    assert replication.run_all(jobs, ABLATION, results, folder, TINY, 1, now - 1, "command") == 2
    assert replication.run_all(jobs[:1], ABLATION, results, folder, TINY, 1, now + 600, "command") == 0
    first = results.read_text()
    assert replication.run_all(jobs, ABLATION, results, folder, TINY, 1, now + 600, "command") == 0
    assert results.read_text().startswith(first) and [line["seed"] for line in replication.read(results)] == [0, 1]
    assert set(STEPS) == {path.name for path in (folder / "towers").iterdir() if path.is_dir()}
