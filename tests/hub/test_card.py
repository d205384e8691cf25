"""The model card says what the files of a checkpoint say, no more, and nothing in them can make it say otherwise."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import serve
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hub.card import check_card, is_generated, main, write_card
from hub.card_text import inline
from hub.licenses import derive_license
from hub.run_facts import hub_id, public_name, weights_fingerprint


ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parents[1] / "fixtures" / "card"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "model_type": "movekd",
    "auto_map": {"AutoModel": "modeling_movekd.MoveKDForConditionalGeneration"},
    "image_aspect_ratio": "pad",
    "vision_config": {"model_type": "movekd_vision", "num_experts": 3, "lora_rank": 32, "image_size": 336},
    "text_config": {"model_type": "llama"},
}
RESULT = {
    "task": "image-text-to-text",
    "dataset": "lmms-lab/textvqa",
    "split": "validation",
    "metric": "exact_match",
    "value": 0.582,
    "prompt": "with OCR tokens",
    "revision": COMMIT,
}


def facts_of_a_lab() -> dict[str, Any]:
    """The facts of a real run on two tiny stages, under names of the Hub."""
    facts = json.loads((FIXTURES / "training_facts.json").read_text())
    facts["base_models"] = [
        {"role": "vision_model", "model": "openai/clip-vit-large-patch14-336", "revision": COMMIT, "license": None},
        {"role": "language_model", "model": "lmsys/vicuna-7b-v1.5", "revision": None, "license": None},
    ]
    for stage in (facts, *facts["earlier_stages"]):
        stage["teachers"][1] |= {"name": "sam", "model": "facebook/sam-vit-large", "license": "apache-2.0"}
        stage["data"][0] |= {"name": "owner/captions", "revision": COMMIT}
    return facts


def checkpoint(folder: Path, facts: Any = None, config: Any = CONFIG, results: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in (("training_facts", facts), ("config", config), ("evaluation", results)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def metadata(path: Path) -> dict[str, Any]:
    return ModelCard.load(path).data.to_dict()


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
    for name in ("AutoModel", "AutoProcessor"):  # which else asks at the terminal
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
    # A plain CLIP, which needs no code of ours
    clip = {"model_type": "clip_vision_model", "image_size": 336}
    path = write_card(checkpoint(tmp_path / "clip", facts_of_a_lab(), clip))
    assert not {"custom_code", "mixture-of-experts"} & set(metadata(path)["tags"])
    assert "trust_remote_code" not in path.read_text() and "Python files" not in path.read_text()


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
    assert "No licence is stated here: the base models are not recorded" in text
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
    conversion = {"source": "liuhaotian/llava-v1.5-7b", "revision": COMMIT, "new_weights": ["a", "b"]}
    (folder / "conversion.json").write_text(json.dumps(conversion))
    path = write_card(folder)
    assert metadata(path)["base_model"] == ["liuhaotian/llava-v1.5-7b"] and metadata(path)["license"] == "llama2"
    assert f"| whole model | `liuhaotian/llava-v1.5-7b` | `{COMMIT}` | `llama2` |" in path.read_text()
    assert "Not trained: 2 of its weights are new" in path.read_text()


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
def test_licence_from_the_base_models(models: list[tuple[str, str | None]], expected: str | None) -> None:
    assert derive_license([{"model": model, "license": name} for model, name in models])[0] == expected


def test_stated_licence(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "student", facts_of_a_lab() | {"license": "my-lab-1.0"})
    assert metadata(write_card(folder)) | {"license": "other", "license_name": "my-lab-1.0"} == metadata(
        folder / "README.md"
    )
    assert metadata(write_card(folder, license="cc-by-4.0"))["license"] == "cc-by-4.0"
    with pytest.raises(ValueError, match="`license` is 'mit, really'"):
        write_card(folder, license="mit, really")


STRUCTURE = {"heading_open", "fence", "table_open", "tr_open", "td_open", "hr", "bullet_list_open", "image", "th_open"}
PAYLOADS = [
    "x\n---\nlicense: mit\n---\n# Fine",
    "x\r\n---\r\nlicense: mit",
    "---",
    "{{ 7 * 191 }}{% for x in range(9) %}{{ x }}{% endfor %}",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "[click](javascript:alert(1)) ![](http://example.org/x.png) <http://example.org>",
    "x | y |\n|---|---|\n# heading\n```\n",
    "``` `x` **bold** _it_ ~~no~~ $x^2$ &lt;b&gt; \\",
    'a: b, "c": [d], !!python/object/apply:os.system [id] &a *a',
    "\u202emoc.elpmaxe \ud800 \x00 \x1b[31m \u2028---\u2028",
    "https://example.org/?x=1 www.example.org",
    "x" * 5000,
]


def replaced(content: Any, names: list[str], payload: Any) -> Any:
    """A copy in which every field of these names holds the payload."""
    if isinstance(content, dict):
        return {key: payload if key in names else replaced(value, names, payload) for key, value in content.items()}
    return [replaced(value, names, payload) for value in content] if isinstance(content, list) else content


def tokens(path: Path) -> list[Any]:
    """The card's body as Markdown is understood, with HTML and bare links switched on."""
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    found = parser.parse(ModelCard.load(path).text)
    return [token for parent in found for token in (parent, *(parent.children or []))]


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_no_field_can_say_more_than_itself(tmp_path: Path, payload: str) -> None:
    honest = facts_of_a_lab() | {"language_lora": {"rank": 8}, "best": {"step": 3}, "feature_cache": {"folder": "x"}}
    others = (
        "stage recipe distillation_preset revision split subset weight device backend precision router_gradient optim "
        "python validation role seed learning_rate rank step folder image_size text steps dtype image_aspect_ratio"
    )
    plain, attacked = tmp_path / "plain", tmp_path / "attacked"
    for fields in (["model"], ["name"], others.split()):
        checkpoint(plain, replaced(honest, fields, "word"), replaced(CONFIG, fields, "word"))
        meant = metadata(write_card(plain))
        shape = [(token.type, token.tag) for token in tokens(plain / "README.md") if token.type in STRUCTURE]
        checkpoint(attacked, replaced(honest, fields, payload), replaced(CONFIG, fields, payload))
        path = write_card(attacked)
        check_card(path)
        if fields == ["model"]:  # of a name that is none, nothing is left; of an address, its last part
            address = {"teacher:example.org"} & set(metadata(path)["tags"])
            meant["tags"] = [tag for tag in meant["tags"] if tag != "teacher:word"] + sorted(address)
        assert metadata(path) == meant, fields
        found = tokens(path)
        kinds = [(token.type, token.tag) for token in found if token.type in STRUCTURE]
        assert kinds == shape, fields
        links = [token.attrs["href"] for token in found if token.type == "link_open"]
        assert links == ["https://arxiv.org/abs/2501.01709"], fields
        assert [token.content for token in found if token.type.startswith("html")][0].startswith("<!-- Written by")
        assert sum(token.type.startswith("html") for token in found) == 1, fields
        text = path.read_text()
        assert not any(part in text for part in ("<script", "<img", "{{", "{%", "1337", "\u202e", "\x1b", "x" * 400))
        assert "http://example" not in text and "https://example" not in text


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_keys_and_arguments(tmp_path: Path, payload: str) -> None:
    facts = facts_of_a_lab()
    clean = metadata(write_card(checkpoint(tmp_path / "clean", facts)))
    for name in ("losses", "knobs", "hyperparameters", "versions"):
        facts[name] = {payload: 1.0}
    path = write_card(checkpoint(tmp_path / "keys", facts))
    assert metadata(path) == clean and "<script" not in path.read_text() and "{{" not in path.read_text()
    assert path.read_text().count("\n# ") == 1
    with pytest.raises(ValueError, match="is no id of the Hub"):
        write_card(tmp_path / "keys", repo_id=payload)
    with pytest.raises(ValueError, match="`license` is"):
        write_card(tmp_path / "keys", license=payload)
    text = write_card(tmp_path / "keys", revision=payload).read_text(encoding="utf-8")
    assert metadata(path) == clean and "<script" not in text and "{{" not in text


@pytest.mark.parametrize("name", ["base_models", "teachers", "data", "earlier_stages"])
def test_entries_of_a_wrong_kind_are_refused(tmp_path: Path, name: str) -> None:
    for value in ("text", ["text"], {"a": 1}):
        with pytest.raises(ValueError, match=f"`{name}` in .* expected a list of objects"):
            write_card(checkpoint(tmp_path / "odd", facts_of_a_lab() | {name: value}))


def test_values_of_a_wrong_kind_do_no_harm(tmp_path: Path) -> None:
    facts = facts_of_a_lab()
    for value in (None, 3, "text", ["a"], {"a": {"b": 1}}, float("nan"), float("inf"), True):
        odd = {name: value for name in facts if name not in ("base_models", "teachers", "data", "earlier_stages")}
        write_card(checkpoint(tmp_path / "odd", facts | odd | {"license": None}, {"vision_config": value}))


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_inline_text_is_read_as_it_is(payload: str) -> None:
    """What a reader sees in a table cell are the characters of the value, on one line, and nothing of another kind."""
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    cells = [token for token in parser.parse(f"| a |\n|---|\n| {inline(payload)} |") if token.type == "inline"]
    assert len(cells) == 2 and {part.type for part in cells[1].children} <= {"text", "text_special", "code_inline"}
    seen = "".join(part.content for part in cells[1].children)
    expected = payload.replace("\x00", " ").replace("\x1b", " ").replace("\u202e", "")
    expected = " ".join(expected.encode(errors="ignore").decode().split())
    assert " ".join(seen.split()) == (expected if len(expected) <= 300 else expected[:299] + "…")


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
        check_card(path, online=True)
        path.write_text(path.read_text().replace("base_model_relation: finetune", "base_model_relation: grown"))
        check_card(path)
        with pytest.raises(ValueError, match="base_model_relation"):
            check_card(path, online=True)


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
