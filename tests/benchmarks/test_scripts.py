"""Each benchmark runs at toy size; the form of what it prints and writes is looked at, never a time."""

import importlib
import json
from pathlib import Path

import pytest


TABLES = {
    "losses": ("Losses and heads", 2),
    "loading": ("Loading and import", 2),
    "encoders": ("Encoders side by side", 7),
    "training_step": ("Step of training", 3),
}


@pytest.mark.parametrize("script", TABLES)
def test_a_table_as_markdown_and_json(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    title, number = TABLES[script]
    out = tmp_path / "tables.json"
    importlib.import_module(f"benchmarks.{script}").main(
        ["--toy", "--repeats", "1", "--threads", "1", "--device", "cpu", "--out", str(out)]
    )
    printed = capsys.readouterr().out
    table = json.loads(out.read_text())[title]
    assert f"### {title}" in printed and "threads: 1" in printed
    assert len(table["rows"]) == number
    for row in table["rows"]:
        assert row["ours"] > 0 and row["rival"] > 0 and row["ratio"] > 0
        assert row["what"] in printed
