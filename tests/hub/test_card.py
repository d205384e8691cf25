"""The model card says what the files of a checkpoint say, no more, and nothing in them can make it say otherwise."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from hub import push_checkpoint
from hub.card import main
from hub.card_facts import code_revision, hub_id, public_name, weights_fingerprint
from hub.card_licenses import derive_license
from hub.card_write import check_card, is_generated, write_card
from modeling_movekd import __version__
from tests.helpers.cards import COMMIT, CONFIG, FIXTURES, RESULT, checkpoint, facts_of_a_lab, metadata
from tests.helpers.hub_server import serve


ROOT = Path(__file__).parents[2]


def test_metadata(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "student", facts_of_a_lab())
    path = write_card(folder, repo_id="somebody/student", revision="v1.0")
    expected = {
        "license": "llama2",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": ["openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5"],
        "base_model_relation": "finetune",
        "datasets": ["owner/captions"],
        "tags": [
            *("movekd", "knowledge-distillation", "mixture-of-experts", "custom_code"),
            *("teacher:clip", "teacher:facebook/sam-vit-large"),
        ],
    }
    assert metadata(path) == yaml.safe_load(path.read_text().split("---\n")[1]) == expected
    text = path.read_text()
    for name in ("AutoModelForImageTextToText", "AutoProcessor"):  # which else asks at the terminal
        assert f'{name}.from_pretrained("somebody/student", revision="v1.0", trust_remote_code=True)' in text
    assert "`facebook/sam-vit-large`" in text and COMMIT in text and "arxiv.org/abs/2501.01709" in text
    assert "No benchmark result is recorded for this checkpoint" in text and "model-index" not in text
    assert not list(folder.glob("*.tmp"))


def test_encoder_alone(tmp_path: Path) -> None:
    for config in (CONFIG, CONFIG["vision_config"] | {"auto_map": CONFIG["auto_map"]}):
        folder = checkpoint(tmp_path / "student", facts_of_a_lab(), config, {"results": []})
        path = write_card(folder, encoder_only=config is CONFIG)
        found = metadata(path)
        assert found["pipeline_tag"] == "image-feature-extraction" and found["license"] == "mit"
        assert found["base_model"] == ["openai/clip-vit-large-patch14-336"]
        assert "processor = AutoImageProcessor.from_pretrained" in path.read_text()
        assert "vllm" not in path.read_text()
    # A plain CLIP, which needs no code of ours
    clip = {"model_type": "clip_vision_model", "image_size": 336}
    path = write_card(checkpoint(tmp_path / "clip", facts_of_a_lab(), clip))
    assert not {"custom_code", "mixture-of-experts"} & set(metadata(path)["tags"])
    assert "trust_remote_code" not in path.read_text() and "Python files" not in path.read_text()


def test_a_name_cannot_leave_the_command_of_an_engine(tmp_path: Path) -> None:
    text = write_card(checkpoint(tmp_path / "a`b $(touch c)'", facts_of_a_lab())).read_text()
    (command,) = re.findall(r"```bash\n([^`\n]*)\n```\n", text)
    assert shlex.split(command)[4:6] == [r"a\u0060b $(touch c)'", "--revision"]


def test_results_of_the_whole_model_are_not_of_its_encoder(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "student", facts_of_a_lab(), results={"results": [RESULT]})
    assert "model-index" in write_card(folder).read_text()
    assert "model-index" not in write_card(folder, encoder_only=True).read_text()


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    path = write_card(checkpoint(tmp_path / "bare", config={"model_type": "movekd", "auto_map": {}}))
    assert metadata(path) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["movekd", "custom_code"],
    }
    text = path.read_text()
    assert "How this checkpoint was trained is not recorded" in text and "no distillation is recorded" in text
    assert "No license is stated: the base models are not recorded" in text
    assert "None" not in text and "## Base models" not in text and "### Stage" not in text

    facts = {"stage": "finetune", "distillation_preset": None, "teachers": [], "knobs": {"lambda_kd": None}}
    text = write_card(checkpoint(tmp_path / "few", facts)).read_text()
    assert "### Stage 1: `finetune`" in text and "Frozen teachers" not in text and "lambda_kd" not in text
    with pytest.raises(ValueError, match="is no checkpoint"):
        write_card(checkpoint(tmp_path / "empty", config=None))


def test_facts_of_before(tmp_path: Path) -> None:
    """A file from before commits, data and earlier stages were noted, with paths in it."""
    facts = json.loads((FIXTURES / "old_training_facts.json").read_text())
    assert "base_models" not in facts and "data" not in facts
    facts |= {"vision_model": "/home/jane/models/clip", "language_model": "lmsys/vicuna-13b-v1.5"}
    path = write_card(checkpoint(tmp_path / "old", facts))
    text = path.read_text()
    assert metadata(path)["base_model"] == ["lmsys/vicuna-13b-v1.5"] and "license" not in metadata(path)
    assert "jane" not in text and "demo_towers" not in text and "| vision tower | `clip` |" in text
    assert "`kd/detector` 1.384" in text and "teacher:reader" in metadata(path)["tags"]


def test_converted_and_not_trained(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "converted")
    new_weights = ["model.vision_tower.router", "model.multi_modal_projector.linear_1.weight"]
    conversion = {"source": "liuhaotian/llava-v1.5-7b", "revision": COMMIT, "new_weights": new_weights}
    (folder / "conversion.json").write_text(json.dumps(conversion))
    path = write_card(folder)
    assert metadata(path)["base_model"] == ["liuhaotian/llava-v1.5-7b"] and metadata(path)["license"] == "llama2"
    assert f"| whole model | `liuhaotian/llava-v1.5-7b` | `{COMMIT}` | `llama2` |" in path.read_text()
    assert "Not trained: 2 of its weights are new" in path.read_text()
    assert "Not trained: 1 of its weights are new" in write_card(folder, encoder_only=True).read_text()
    assert "| images | `pad` |" in write_card(folder).read_text()
    (folder / "conversion.json").write_text(json.dumps(conversion | {"pads_images": False}))
    assert "| images | `square` |" in write_card(folder).read_text()


def test_results(tmp_path: Path) -> None:
    other = RESULT | {"prompt": "without OCR tokens", "value": 0.46, "rows": 5000}
    folder = checkpoint(tmp_path / "student", facts_of_a_lab(), results={"results": [RESULT, other]})
    path = write_card(folder, repo_id="somebody/student")
    check_card(path)
    assert metadata(path)["model-index"] == [
        {
            "name": "student",
            "results": [
                {
                    "task": {"type": "image-text-to-text"},
                    "dataset": {
                        "name": "lmms-lab/textvqa",
                        "type": "lmms-lab/textvqa",
                        "split": "validation",
                        "revision": COMMIT,
                    },
                    "metrics": [
                        {"type": "exact_match", "value": 0.582, "args": {"prompt": "with OCR tokens"}},
                        {"type": "exact_match", "value": 0.46, "args": {"prompt": "without OCR tokens"}},
                    ],
                }
            ],
        }
    ]
    text = path.read_text()
    assert "| 0.46 | 5000 | without OCR tokens |" in text and "No benchmark" not in text
    assert not (folder / ".eval_results").exists(), "no result is of a registered benchmark"


def test_the_space_of_the_runs(tmp_path: Path) -> None:
    facts = facts_of_a_lab() | {"dashboard": "me/second"}
    facts["earlier_stages"][0]["dashboard"] = "me/first"
    path = write_card(checkpoint(tmp_path / "student", facts))
    assert metadata(path)["tags"][-2:] == ["trackio", "trackio:https://huggingface.co/spaces/me/second"]
    assert "| dashboard (Trackio's Space) | `me/first` |" in path.read_text()
    facts["dashboard"] = facts["earlier_stages"][0]["dashboard"] = "runs"
    assert "trackio" not in str(metadata(write_card(checkpoint(tmp_path / "student", facts)))["tags"])


def opening(path: Path) -> str:
    return path.read_text().split("\nThe code is an independent implementation")[0].split("\n# ")[1]


def test_it_opens_with_loading_serving_and_the_picture(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "student", facts_of_a_lab())
    (folder / "assets").mkdir()
    for name in ("answers.png", "a b.png", "notes.txt"):
        (folder / "assets" / name).write_bytes(b"")
    first, *rest = opening(write_card(folder, repo_id="me/student", revision="v1.0")).split("```")
    loading = rest[0].strip().splitlines()[1:5]
    assert len(first.splitlines()) == 4 and [line.split()[0] for line in loading if line] == [
        "from",
        "model",
        "processor",
    ]
    vllm = "python -m vllm.entrypoints.openai.api_server --model me/student --revision v1.0 --trust-remote-code"
    assert rest[2] == f"bash\n{vllm}\n"
    assert re.findall(r"!\[.*\]\((.*)\)", rest[3]) == ["assets/answers.png"]
    assert "vllm" not in opening(write_card(folder, encoder_only=True))


def test_each_result_names_its_data_its_code_and_its_leaderboard(tmp_path: Path) -> None:
    code = f"movekd 0.1.0@{COMMIT}, lmms-eval 0.7.3"
    results = {"results": [RESULT | {"code": code, "task_id": "textvqa_val"}, RESULT | {"split": "test"}]}
    folder = checkpoint(tmp_path / "student", facts_of_a_lab(), results=results)
    path = write_card(folder)
    assert f"| revision of the data | code |\n|{' --- |' * 8}\n" in path.read_text()
    assert f"| `{COMMIT}` | movekd 0.1.0@{COMMIT}, lmms-eval 0.7.3 |" in path.read_text()
    (first, second) = (result["metrics"][0] for result in metadata(path)["model-index"][0]["results"])
    assert first["args"] == {"prompt": "with OCR tokens", "code": code} and "code" not in second["args"]
    entries = yaml.safe_load((folder / ".eval_results" / "evaluation.yaml").read_text())
    dataset = {"id": "lmms-lab/textvqa", "task_id": "textvqa_val", "revision": COMMIT}
    assert entries == [{"dataset": dataset, "value": 0.582, "notes": f"exact_match; with OCR tokens; {code}"}]
    write_card(folder, evaluated=False)
    assert not list((folder / ".eval_results").iterdir()), "the weights have changed"


def test_the_code_is_named_by_its_commit() -> None:
    assert re.fullmatch(rf"movekd {re.escape(__version__)}@[0-9a-f]{{40}}(-dirty)?", code_revision())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "58.2"}, "`value` is '58.2', expected a finite number"),
        ({"value": float("nan")}, "`value` is nan"),
        ({"value": True}, "`value` is True"),
        ({"prompt": "a\nlicense: mit"}, "`prompt` is .* expected one line"),
        ({"prompt": ""}, "`prompt` is ''"),
        ({"split": "test: [x]"}, r"`split` is 'test: \[x\]', expected an identifier"),
        ({"dataset": "<script>"}, "`dataset` is '<script>'"),
        ({"verified": True}, "result 0: .* needs"),
        ({"metric": None}, "`metric` is None"),
        (
            {"task_id": "ocr", "dataset": "scenes"},
            "`task_id` is 'ocr', a task of a benchmark on the Hub, but `dataset`",
        ),
    ],
)
def test_unfit_results_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = checkpoint(tmp_path / "student", {}, results={"results": [RESULT | change]})
    (folder / "README.md").write_text("<!-- Written by hub/card.py -->")
    with pytest.raises(ValueError, match=message):
        write_card(folder)
    assert (folder / "README.md").read_text() == "<!-- Written by hub/card.py -->"
    assert not list(folder.glob("*.tmp"))


def test_results_of_other_weights_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "student", {})
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(3_000_000))
    results = {"weights": weights_fingerprint(folder), "results": [RESULT]}
    write_card(checkpoint(folder, results=results))
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"1")
    with pytest.raises(ValueError, match="is of the weights .* but the folder holds"):
        write_card(folder)
    with pytest.raises(ValueError, match="a list `results` must"):
        write_card(checkpoint(folder, results=[RESULT] and {"result": [RESULT]}))
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        write_card(folder)


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ([("openai/clip-vit-large-patch14-336", None), ("meta-llama/Llama-2-7b-hf", None)], "llama2"),
        ([("openai/clip-vit-base-patch32", None), ("HuggingFaceTB/SmolLM2-135M-Instruct", None)], "apache-2.0"),
        ([("a/b", "mit"), ("c/d", "mit")], "mit"),
        ([("lmsys/vicuna-7b-v1.5", "apache-2.0")], "apache-2.0"),  # what the model's own card says counts
        ([("a/b", "mit"), ("unknown/model", None)], None),
        ([("a/b", "llama2"), ("c/d", "llama3")], None),
        ([("a/b", "cc-by-nc-4.0"), ("c/d", "mit")], "cc-by-nc-4.0"),
        ([("a/b", "mit\n---"), ("c/d", "mit")], None),
        ([], None),
    ],
)
def test_license_from_the_base_models(models: list[tuple[str, str | None]], expected: str | None) -> None:
    assert derive_license([{"model": model, "license": name} for model, name in models])[0] == expected


def test_stated_license(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "student", facts_of_a_lab() | {"license": "my-lab-1.0"})
    assert metadata(write_card(folder)) | {"license": "other", "license_name": "my-lab-1.0"} == metadata(
        folder / "README.md"
    )
    assert metadata(write_card(folder, license="cc-by-4.0"))["license"] == "cc-by-4.0"
    with pytest.raises(ValueError, match="`license` is 'mit, really'"):
        write_card(folder, license="mit, really")


@pytest.mark.parametrize("facts", ["training_facts", "conversion", None])
def test_a_license_that_was_stated_once_stays(tmp_path: Path, facts: str | None) -> None:
    """In the card that a push writes anew too; whatever else the facts say stays as well."""
    folder = checkpoint(tmp_path / "student")
    known = {"training_facts": facts_of_a_lab(), "conversion": {"source": "openai/clip-vit-base-patch32"}}
    if facts is not None:
        (folder / f"{facts}.json").write_text(json.dumps(known[facts]))
    assert main([str(folder), "--license", "cc-by-nc-4.0"]) == 0
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "README.md").symlink_to(folder / "README.md")
    push_checkpoint._write_card(folder, stage, False, "me/student", None)
    assert metadata(stage / "README.md")["license"] == "cc-by-nc-4.0"
    assert "`cc-by-nc-4.0`, as its owner states" in (stage / "README.md").read_text()
    if facts is not None:
        assert json.loads((folder / f"{facts}.json").read_text()) == known[facts] | {"license": "cc-by-nc-4.0"}
    assert not list(folder.glob("*.tmp"))


def test_a_card_elsewhere(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "student", facts_of_a_lab())
    (tmp_path / "published").mkdir()
    path = write_card(folder, dest=tmp_path / "published")
    assert path == tmp_path / "published" / "README.md" and "license" in metadata(path)
    assert not (folder / "README.md").exists()


def test_cards_that_are_not_ours_stay(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "student", facts_of_a_lab())
    path = write_card(folder)
    assert is_generated(path) and write_card(folder) == path
    path.write_text(path.read_text().replace("<!-- Written by hub/card.py", "<!-- "))
    with pytest.raises(ValueError, match="was not written here"):
        write_card(folder)
    assert is_generated(write_card(folder, overwrite=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("# No metadata", "does not begin with metadata"),
        ("---\na: [b\n---\n", "cannot be read"),
        ("---\n- a\n---\n", "cannot be read"),
        ("---\nlibrary_name: transformers\n---\n", "`pipeline_tag` is missing"),
        ("---\n{}license: mine\n---\n", "`license` is 'mine'"),
        ("---\n{}datasets: [a b]\n---\n", "`datasets` has 'a b'"),
        ("---\n{}base_model: [a/b]\n---\n", "without `base_model_relation`"),
        ("---\n{}model-index: [{{name: a, results: [{{task: 1}}]}}]\n---\n", "cannot be read"),
    ],
)
def test_checks_of_a_card(tmp_path: Path, content: str, message: str) -> None:
    good = "library_name: transformers\npipeline_tag: image-text-to-text\ntags: [movekd]\n"
    (tmp_path / "README.md").write_text(content.format(good) if "{}" in content else content)
    with pytest.raises(ValueError, match=message):
        check_card(tmp_path / "README.md")


def test_the_hubs_own_validator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {"results": [RESULT]}
    path = write_card(checkpoint(tmp_path / "student", facts_of_a_lab(), results=results), repo_id="a/b")
    with serve() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        ModelCard.load(path).validate()
        path.write_text(path.read_text().replace("base_model_relation: finetune", "base_model_relation: grown"))
        check_card(path)
        with pytest.raises(ValueError, match="base_model_relation"):
            ModelCard.load(path).validate()


def test_public_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = {
        "openai/clip-vit-large-patch14-336": "openai/clip-vit-large-patch14-336",
        "hf-hub:owner/model": "owner/model",
        "convnext_xxlarge.clip_laion2b_soup": "convnext_xxlarge.clip_laion2b_soup",
        "outputs/run": "run",
        "/home/jane/models/clip/": "clip",
        "local-dir:/home/jane/eva": "eva",
        "~/clip": "clip",
        "../data/mix.json": "mix.json",
        "users/jane/clip": "clip",
        "C:\\Users\\jane\\clip": "clip",
        "https://jane:secret@example.org/mix.json?token=secret": "mix.json",
    }
    assert {name: public_name(name) for name in names} == names
    assert hub_id("owner/model") == "owner/model"
    assert [hub_id(name) for name in ("outputs/run", "gpt2", "a/b/c", "a/b c", "a/..", None, 3)] == [None] * 7


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "student", facts_of_a_lab())
    command = [sys.executable, str(ROOT / "hub" / "card.py"), "student", "--encoder-only", "--repo-id", "a/b"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "README.md" in done.stdout, done.stderr
    assert metadata(folder / "README.md")["pipeline_tag"] == "image-feature-extraction"
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "error: " in (message := capsys.readouterr().err) and "is no checkpoint" in message
