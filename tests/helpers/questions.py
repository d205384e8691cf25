"""Rows of LLaVA in files, and what was asked in them."""

import json
from pathlib import Path
from typing import Any


def question(text: str, image: str | None = None, **fields: Any) -> dict[str, Any]:
    value = text if image is None else f"<image>\n{text}"
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "Yes."}]
    return {"conversations": turns} | ({} if image is None else {"image": image}) | fields


def write_json(path: Path, name: str, count: int) -> str:
    path.write_text(json.dumps([question(f"{name} {index}") for index in range(count)]))
    return str(path)


def asked(row: dict[str, Any]) -> str:
    return row["messages"][0]["content"][-1]["text"]
