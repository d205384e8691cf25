"""The eight benchmarks on small local data, through lmms-eval's own tasks and metrics."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


pytest.importorskip("datasets")

from benchmarks.evaluate import check_results, comparison, evaluate, evaluation_results, main, task_manager
from benchmarks.tasks import BENCHMARKS, mmbench_prompt
from hub.card_facts import read_evaluation
from hub.card_write import render_card
from modeling_movekd.inference import load_checkpoint, user_message
from modeling_movekd.prompts import prepare
from tests.helpers.evaluation_data import DATA, save_checkpoint, write_data


ROOT = Path(__file__).resolve().parents[2]

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
PROMPTS = {
    "vqav2_val": f"Is the dog red?{WORD}",
    "gqa": f"Is it open?{WORD}",
    "textvqa_val_ocr": f"What does it say?\nReference OCR token: STOP, yes{WORD}",
    "textvqa_val": f"What does it say?{WORD}",
    "vizwiz_vqa_val": "What is this\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    + WORD,
    "pope": f"Is there a cat in the image?{WORD}",
    "scienceqa_img": f"Context: Animals differ.\nWhich is larger?\nA. mouse\nB. whale{LETTER}",
    "mme": f"Is there a cat?{WORD}",
    "mmbench_en_dev_llava": f"What is seen?\nA. one\nB. two{LETTER}",
}
# What a model that always says the same scores on `DATA`, reckoned by hand from the benchmarks' rules
SCORES = {
    "yes": {
        # 1 where all ten say so; else (2 people x 1/3 + 8 people x 2/3) / 10
        ("vqav2_val", "exact_match"): (1 + (2 / 3 + 16 / 3) / 10) / 2,
        ("gqa", "exact_match"): 1 / 3,
        # Three of ten: (3 people x 2/3 + 7 people x 1) / 10
        ("textvqa_val", "exact_match"): 0.45,
        ("textvqa_val_ocr", "exact_match"): 0.45,
        ("vizwiz_vqa_val", "exact_match"): 0.5,
        ("pope", "pope_accuracy"): 0.5,
        ("pope", "pope_precision"): 0.5,
        ("pope", "pope_recall"): 1,
        ("pope", "pope_f1_score"): 2 / 3,
        ("scienceqa_img", "exact_match"): 0,
        # One of each pair right: 50 a category, of which two are perception
        ("mme", "mme_perception_score"): 100,
        ("mme", "mme_cognition_score"): 50,
        ("mmbench_en_dev_llava", "gpt_eval_score"): 0,
    },
    "B": {
        ("vqav2_val", "exact_match"): 0,
        ("pope", "pope_f1_score"): 0,
        ("scienceqa_img", "exact_match"): 2 / 3,
        ("mme", "mme_perception_score"): 0,
        ("mmbench_en_dev_llava", "gpt_eval_score"): 50,
    },
}

slow = pytest.mark.slow


@pytest.fixture(scope="session")
def local_data(tmp_path_factory) -> Path:
    pytest.importorskip("lmms_eval", reason="needs the extra `eval`")
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def in_data(local_data, monkeypatch) -> Path:
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(local_data / "cache"))
    monkeypatch.chdir(local_data)
    return local_data


def answers(folder: Path) -> dict[str, list[str]]:
    lines = {path.stem: path.read_text().splitlines() for path in (folder / "predictions").glob("*.jsonl")}
    return {task: [json.loads(line)["filtered_resps"][0] for line in rows] for task, rows in lines.items()}


@slow
@pytest.mark.parametrize("says", ["yes", "B"])
def test_known_answers_give_the_known_score(says, in_data, tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "student", says=says)
    output = tmp_path / "out"
    assert main([str(checkpoint), "--output", str(output), "--batch-size", "3"]) == 0
    results = json.loads((output / "results.json").read_text())["results"]
    found = {(task, metric): results[task][f"{metric},none"] for task, metric in SCORES[says]}
    assert found == pytest.approx(SCORES[says])
    rows = {task: len(DATA[name][0][2]) for task, name in zip(BENCHMARKS, repositories(), strict=True)}
    assert answers(output) == {task: [says] * count for task, count in rows.items()}
    shown = capsys.readouterr().out
    assert "| TextVQA | validation | 2 | 0 |" in shown
    assert "58.2 / 61.3 | 58.3 / 59.7 | 59.6 / 61.1" in shown and "the paper's numbers" in shown
    # The card shows them
    measured = {result.dataset_name: result for result in read_evaluation(checkpoint)}
    assert len(measured) == len(BENCHMARKS)
    assert measured["POPE (test)"].value == pytest.approx(SCORES[says]["pope", "pope_f1_score"])
    assert measured["POPE (test)"].rows == 4
    assert re.fullmatch(r"movekd [\d.]+(@\w+(-dirty)?)?, lmms-eval [\d.]+", measured["POPE (test)"].code)
    card = str(render_card(checkpoint))
    assert "question, OCR tokens of the data set" in card and "mme_perception_score" in card


def repositories() -> list[str]:
    return ["VQAv2", "GQA", "textvqa", "textvqa", "VizWiz-VQA", "POPE", "ScienceQA", "MME", "MMBench"]


@slow
def test_questions_are_asked_in_llavas_words(in_data, tmp_path):
    manager = task_manager(list(BENCHMARKS), tmp_path)
    for name, expected in PROMPTS.items():
        task = manager.load_task_or_group(name, task_type="chat")[name]
        (message,) = task.doc_to_messages(task.test_docs()[0])
        assert [part["type"] for part in message["content"]] == ["image", "text"]
        assert message["content"][1]["text"] == expected, name
        assert task.config.test_split in [split for _, split, _ in sum(DATA.values(), [])], "a public split"


@slow
@pytest.mark.parametrize(("image_aspect_ratio", "images"), [("pad", 1), ("anyres", 1), ("anyres", 2)])
def test_answers_are_those_of_generate(image_aspect_ratio, images, in_data, tmp_path, monkeypatch):
    monkeypatch.setenv("NUM_IMAGE", str(images))  # lmms-eval's MMBench: each image so many times
    checkpoint = save_checkpoint(tmp_path / "student", image_aspect_ratio=image_aspect_ratio, seed=3)
    tasks = ["mmbench_en_dev_llava", "scienceqa_img"]
    evaluate(str(checkpoint), tasks, tmp_path / "out", batch_size=3)
    model, processor = load_checkpoint(checkpoint, fold=False)
    manager = task_manager(tasks, tmp_path)
    given = answers(tmp_path / "out")
    for name in tasks:
        task = manager.load_task_or_group(name, task_type="chat")[name]
        expected = []
        for row in task.test_docs():
            (message,) = task.doc_to_messages(row)
            pictures = [part["url"] for part in message["content"] if part["type"] == "image"]
            assert len(pictures) == (images if name.startswith("mmbench") else 1)
            inputs = prepare(processor, [[user_message(message["content"][-1]["text"], pictures)]], model.device)
            settings = {"max_new_tokens": task.config.generation_kwargs["max_new_tokens"], "do_sample": False}
            output = model.generate(**inputs, **settings)
            text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            expected.append(text.strip().split("\n\n")[0].strip())
        assert given[name] == expected
        assert len(set(expected)) > 1 and all(expected), "a model that looks at nothing would pass"


@slow
def test_an_interrupted_run_goes_on(in_data, tmp_path, monkeypatch):
    from modeling_movekd.lmms_eval import MoveKDEvaluation

    checkpoint = save_checkpoint(tmp_path / "student", seed=1)
    tasks = ["pope", "mmbench_en_dev_llava"]
    evaluate(str(checkpoint), tasks, tmp_path / "straight", batch_size=2)
    asked: list[int] = []
    answer = MoveKDEvaluation.answer

    def interrupted(self, conversations, settings):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(conversations))
        return answer(self, conversations, settings)

    output = tmp_path / "resumed"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MoveKDEvaluation, "answer", interrupted)
        evaluate(str(checkpoint), tasks, output, batch_size=2)
    assert not (output / "results.json").exists() and not list(checkpoint.glob(".tmp-*"))
    noted = output / "answers.0.jsonl"
    assert len(noted.read_text().splitlines()) == 4
    with noted.open("a") as file:
        file.write('{"identity": "')  # a line cut short

    def counted(self, conversations, settings):
        asked.append(len(conversations))
        return answer(self, conversations, settings)

    monkeypatch.setattr(MoveKDEvaluation, "answer", counted)
    evaluate(str(checkpoint), tasks, output, batch_size=2)
    assert sum(asked) == 8, "each question once"
    assert answers(output) == answers(tmp_path / "straight")
    assert [json.loads(line)["answer"] for line in noted.read_text().splitlines()]
    # Another model's answers are not taken for this one's
    other = save_checkpoint(tmp_path / "other", seed=2)
    with pytest.raises(ValueError, match="Remove the file to begin anew"):
        evaluate(str(other), tasks, output, batch_size=2)


@slow
def test_part_of_the_rows_is_no_result_for_the_card(in_data, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "student", says="yes")
    evaluate(str(checkpoint), ["pope"], tmp_path / "out", limit=3, batch_size=2)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"][0]["rows"] == 3
    assert not (checkpoint / "evaluation.json").exists()
    assert "Only the first 3 rows" in (tmp_path / "out" / "comparison.md").read_text()
    # All rows are; what was measured before stays
    evaluate(str(checkpoint), ["pope"], tmp_path / "out")
    evaluate(str(checkpoint), ["gqa"], tmp_path / "out")
    assert [result.dataset for result in read_evaluation(checkpoint)] == ["pope", "gqa"]


@slow
def test_a_task_that_crashes_is_an_error(in_data, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "student", says="yes")
    command = [sys.executable, "-m", "benchmarks.evaluate", str(checkpoint), "--output", str(tmp_path / "out")]
    # MME's metric wants both questions of an image
    done = subprocess.run(
        [*command, "--tasks", "mme", "--limit", "3"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "MME only supports pairwise evaluation" in done.stderr
    assert not (tmp_path / "out" / "results.json").exists() and not (checkpoint / "evaluation.json").exists()


@slow
def test_two_processes_share_the_questions(in_data, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "student", seed=1)
    tasks = ["pope", "scienceqa_img"]  # four questions and three
    evaluate(str(checkpoint), tasks, tmp_path / "one", batch_size=2)
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(ROOT / "train" / "accelerate" / "ddp_cpu.yaml"), "-m", "benchmarks.evaluate"]
    done = subprocess.run(
        [*launch, str(checkpoint), "--output", str(tmp_path / "two"), "--batch-size", "2", "--tasks", *tasks],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shares = [len((tmp_path / "two" / f"answers.{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert shares == [4, 3]
    one, two = answers(tmp_path / "one"), answers(tmp_path / "two")
    assert {task: sorted(texts) for task, texts in one.items()} == {task: sorted(texts) for task, texts in two.items()}
    assert done.stdout.count("| POPE | test | 4 |") == 1, "one process reports"


@slow
@pytest.mark.parametrize("mode", ["I;16", "I;16B", "LA", "P", "CMYK", "RGB"])
def test_images_of_tasks_are_decoded_as_in_training(in_data, mode):
    """Tasks hand over decoded images, which hold more than 8 bits a channel and an orientation as files do."""
    from modeling_movekd.images import decode_image
    from modeling_movekd.lmms_eval import to_conversation

    values = np.arange(48 * 32, dtype=np.uint16).reshape(48, 32) * 40
    if mode.startswith("I;16"):
        image = Image.frombytes(mode, (32, 48), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    else:
        image = Image.fromarray((values >> 8).astype(np.uint8)).convert(mode)
    image.getexif()[0x0112] = 6
    conversation = to_conversation([{"role": "user", "content": [{"type": "image", "url": image}]}])
    seen = conversation[0]["content"][0]["image"]
    assert seen.tobytes() == decode_image(image).tobytes() and seen.size == (48, 32)
    if mode.startswith("I;16"):
        assert (np.asarray(seen)[..., 0] == np.rot90(values >> 8, -1)).all()


@slow
def test_what_cannot_be_asked_is_refused(in_data, tmp_path, monkeypatch):
    from modeling_movekd.lmms_eval import MoveKDEvaluation, to_conversation

    checkpoint = save_checkpoint(tmp_path / "student")
    for batch_size in ("auto", 0):
        with pytest.raises(ValueError, match="expected a positive number"):
            MoveKDEvaluation(str(checkpoint), batch_size=batch_size)
    model = MoveKDEvaluation(str(checkpoint))
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError):
            method([])
    for part, message in [
        ({"type": "video", "url": "film.mp4"}, "The task contains 'video'"),
        ({"type": "text", "text": "What is <image>?"}, "A text of the task contains <image>"),
        ({"type": "image", "url": str(checkpoint / "config.json")}, "config.json"),
    ]:
        with pytest.raises(ValueError, match=message):
            to_conversation([{"role": "user", "content": [part]}])
    with pytest.raises(ValueError, match="the language model takes 1200"):
        model.answer([[user_message("word " * 300)]], {"max_new_tokens": 8})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but this one knows of 1"):
        MoveKDEvaluation(str(checkpoint))


@slow
def test_settings_of_tasks_for_other_models_are_answered(in_data, tmp_path):
    """What SEED-Bench asks of LLaVA's images, and LLaVA-in-the-Wild's room for an answer."""
    from modeling_movekd.lmms_eval import MoveKDEvaluation

    model = MoveKDEvaluation(str(save_checkpoint(tmp_path / "student", seed=3)))
    model.model.generation_config.eos_token_id = None
    question = [user_message("word " * 200)]
    (expected,) = model.answer([question], {"max_new_tokens": 16})
    assert model.answer([question], {"max_new_tokens": 16, "image_aspect_ratio": "original"}) == [expected]
    (longest,) = model.answer([question], {"max_new_tokens": 4096})
    assert longest.startswith(expected) and len(longest) > len(expected)


@slow
def test_a_checkpoint_on_the_hub(in_data, tmp_path):
    pytest.importorskip("fastapi")
    from tests.helpers.hub_client import client
    from tests.helpers.hub_server import OWNER_TOKEN, serve

    checkpoint = save_checkpoint(tmp_path / "student", says="yes")
    with serve() as hub, client(hub, tmp_path / "home", OWNER_TOKEN) as process:
        process.run(
            "from huggingface_hub import HfApi; HfApi().create_repo(name)\n"
            "result = HfApi().upload_folder(repo_id=name, folder_path=folder).oid",
            name="owner/student",
            folder=str(checkpoint),
        )
        score = process.run(
            "import os; from pathlib import Path; from benchmarks.evaluate import evaluate; os.chdir(data)\n"
            "result = evaluate(name, ['pope'], Path(output))['results']['pope']['pope_f1_score,none']",
            name="owner/student",
            data=str(in_data),
            output=str(tmp_path / "out"),
        )
    assert score == pytest.approx(2 / 3)
    (result,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]
    assert result["rows"] == 4
    assert not list((tmp_path / "home").rglob("evaluation.json")), "the cache is the Hub client's"


@slow
def test_tasks_of_ones_own(in_data, tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "student", says="yes")
    own = tmp_path / "own"
    own.mkdir()
    (own / "door.yaml").write_text(
        "task: door\ndataset_path: parquet\ndataset_kwargs:\n  data_files:\n"
        f"    test: {in_data}/lmms-lab-encoder/GQA/testdev_balanced_instructions/testdev.parquet\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: answer\n"
        "generation_kwargs:\n  max_new_tokens: 8\n"
        "metric_list:\n- metric: exact_match\n  aggregation: mean\n  higher_is_better: true\n"
    )
    results = evaluate(str(checkpoint), ["door"], tmp_path / "out", include_path=own)
    assert results["results"]["door"]["exact_match,none"] == pytest.approx(1 / 3)
    assert main([str(checkpoint), "--tasks", "doors", "--output", str(tmp_path / "out")]) == 1
    assert "lmms-eval knows no task 'doors'. The paper's are vqav2_val" in capsys.readouterr().err
    (own / "door.yaml").write_text((own / "door.yaml").read_text().replace("task: door", "task: pope"))
    with pytest.raises(ValueError, match="lmms-eval has a task of that name"):
        task_manager(["pope"], tmp_path / "tasks", own)


@slow
def test_lmms_eval_finds_the_model_by_its_entry_point(in_data, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "student", says="yes")
    installed = tmp_path / "site" / "movekd-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: movekd\nVersion: 0\n")
    (installed / "entry_points.txt").write_text("[lmms_eval.models]\nmovekd = modeling_movekd.lmms_eval:manifest\n")
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", "--model", "movekd", "--tasks", "pope", "--batch_size", "3"]
        + ["--model_args", f"pretrained={checkpoint}", "--output_path", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": f"{installed.parent}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    found = list((tmp_path / "out").rglob("*results.json"))
    assert found, done.stdout + done.stderr
    assert json.loads(found[0].read_text())["results"]["pope"]["pope_f1_score,none"] == pytest.approx(2 / 3)


def results_of(value: float | str, rows: int = 2) -> tuple[dict, dict]:
    config = {"dataset_path": "lmms-lab-encoder/GQA", "dataset_name": "testdev_balanced_instructions"}
    results = {
        "n-samples": {"gqa": {"original": rows, "effective": rows}},
        "results": {"gqa": {"alias": "gqa", "exact_match,none": value, "exact_match_stderr,none": "N/A"}},
        "configs": {"gqa": config | {"test_split": "testdev"}},
    }
    return results, {"gqa": [{"doc_id": row, "filtered_resps": ["yes" if row else " "]} for row in range(rows)]}


def test_an_empty_success_is_an_error():
    check_results(*results_of(0.5), limit=None)
    with pytest.raises(RuntimeError, match="without a result"):
        check_results({}, {}, None)
    results, samples = results_of(0.5)
    with pytest.raises(RuntimeError, match="gqa was scored on 1 rows, expected 2"):
        check_results(results, {"gqa": samples["gqa"][:1]}, None)
    with pytest.raises(RuntimeError, match="gqa was scored on 0 rows, expected 2"):
        check_results(results, {}, 5)
    with pytest.raises(RuntimeError, match="gqa was scored on 2 rows, expected 1"):
        check_results(results, samples, 1)
    for value in (float("nan"), "N/A"):
        with pytest.raises(RuntimeError, match="expected finite numbers"):
            check_results(*results_of(value), limit=None)


def test_numbers_are_on_the_papers_scale_in_the_table_and_lmms_evals_in_the_card():
    results, samples = results_of(0.625)
    assert "| GQA | test-dev balanced | 2 | 1 | **62.5** | 62 / 63.3 |" in comparison(results, samples)
    (result,) = evaluation_results(results, samples)
    assert (result.dataset, result.split, result.value, result.rows) == ("lmms-lab-encoder/GQA", "testdev", 0.625, 2)
    assert result.revision is None and result.task_id is None


def test_a_result_names_the_commit_of_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--lmms-lab-encoder--GQA" / "refs").mkdir(parents=True)
    (tmp_path / "datasets--lmms-lab-encoder--GQA" / "refs" / "main").write_text("0" * 40)
    (result,) = evaluation_results(*results_of(0.625), code="movekd 0.1.0, lmms-eval 0.7.3")
    assert (result.revision, result.code) == ("0" * 40, "movekd 0.1.0, lmms-eval 0.7.3")


def test_mmbench_asks_in_llavas_words():
    row = {"hint": "Look.", "question": "What?", "A": "x", "B": "y", "C": "nan", "D": None}
    assert mmbench_prompt(row, {"post_prompt": "\nLetter."}) == "Look.\nWhat?\nA. x\nB. y\nLetter."
    assert mmbench_prompt(row | {"hint": float("nan"), "C": "z"}) == "What?\nA. x\nB. y\nC. z"
