"""No fact of a run, whatever it holds, can be more than text in a card."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hub.card_text import inline
from hub.card_write import check_card, write_card
from tests.helpers.cards import CONFIG, checkpoint, facts_of_a_lab, metadata


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
        assert links == ["https://docs.vllm.ai", "https://arxiv.org/abs/2501.01709"], fields
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
