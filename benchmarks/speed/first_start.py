"""
How long training waits for the rows of a large LLaVA-like JSON file: `python -m benchmarks.speed.first_start`.

The first start converts the file to Arrow, every later one maps the result. The rival is `json.load` of the same
file. Each measurement is of a fresh process, beyond its imports. With `--rows 665298`, the file has about the size of
LLaVA's mixture. Images are not opened.
"""

import argparse
import json
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.options import parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__, repeats=3)
    options.add_argument("--rows", type=int, default=66_530, help="rows of the file; LLaVA's mixture has 665,298")
    return options.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

from benchmarks.speed.measure import ROOT, Row, report, start


MEASURE = """
import gc, json, resource, sys, time
from pathlib import Path
from train.data.datasets import load_conversations

def resident(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

def seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
memory, before, started = resident("VmRSS"), seconds(), time.perf_counter()
if sys.argv[1] == "json":
    rows = json.loads(Path(sys.argv[2]).read_bytes())
else:
    rows = load_conversations(sys.argv[2])
found = {"cpu": seconds() - before, "wall": time.perf_counter() - started}
print(json.dumps(found | {"peak": resident("VmHWM") - memory, "rows": len(rows)}))
"""


def write_rows(path: Path, count: int) -> None:
    """Rows like those of LLaVA's mixture: 94 % with an image, two to twenty turns, some 1.6 KB, indented."""
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(5000)]

    def text(number: int) -> str:
        return " ".join(rng.choices(words, k=number)).capitalize() + "."

    with path.open("w") as file:
        for index in range(count):
            shown, pairs = rng.random() < 0.94, 1 if rng.random() < 0.4 else rng.randint(2, 10)
            turns = []
            for number in range(pairs):
                question = text(rng.randint(5, 18))
                answer = text(rng.choice((1, 3, 12, 60) if pairs > 1 else (20, 100, 200)))
                turns.append({"from": "human", "value": f"<image>\n{question}" if shown and not number else question})
                turns.append({"from": "gpt", "value": answer})
            row: dict[str, Any] = {"id": f"{index:012}"}
            row |= {"image": f"coco/train2017/{index:012}.jpg"} if shown else {}
            row["conversations"] = turns
            indented = json.dumps(row, indent=2).replace("\n", "\n  ")
            file.write(f"{',' if index else '['}\n  {indented}")
        file.write("\n]")


def measured(kind: str, path: Path, cache: Path) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(cache)}
    command = [sys.executable, "-c", MEASURE, kind, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    start(options)
    count = 500 if options.toy else options.rows
    found: dict[str, list[dict[str, float]]] = {"json": [], "first": [], "later": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "rows.json"
        write_rows(path, count)
        size = path.stat().st_size
        for repeat in range(options.repeats):
            cache = folder / f"cache{repeat}"
            for kind in found:
                found[kind].append(measured(kind, path, cache))
                assert found[kind][-1]["rows"] == count, found
        cached = sum(file.stat().st_size for file in cache.rglob("*.arrow"))

    def median(kind: str, quantity: str) -> float:
        return statistics.median(each[quantity] for each in found[kind])

    rows = [
        Row(
            "first start, CPU time",
            median("first", "cpu"),
            median("json", "cpu"),
            at_most=3.0,
            note="rival: json.load",
        ),
        Row("first start, peak memory", median("first", "peak") / 2**20, median("json", "peak") / 2**20, "MB"),
        Row("later start", median("later", "wall"), 3.0, at_most=1.0, note="rival: 3 s"),
        Row(
            "later start, peak memory", median("later", "peak") / 2**20, 512.0, "MB", at_most=1.0, note="rival: 0.5 GB"
        ),
        Row("Arrow files", cached / 2**20, size / 2**20, "MB", note="rival: the JSON file"),
    ]
    settings = {"rows": count, "repeats": options.repeats}
    report("Start on a large JSON file", rows, settings, options.out)


if __name__ == "__main__":
    main()
