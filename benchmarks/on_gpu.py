"""
Everything that needs a GPU to be measured, in one command: `python -m benchmarks.on_gpu --minutes 10`.

Each part is a script of `benchmarks/speed` in a process of its own, and ends when its share of the time is over. A
part that fails or is stopped does not keep the others from running. At the end stands one table, and
`outputs/on_gpu.json` has all that was measured. `--toy --device cpu` tries it without a GPU.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


# Script, its flags, and its share of the time
PARTS: dict[str, tuple[str, list[str], float]] = {
    "device against CPU": ("devices", [], 2.0),
    "small recipe, plan, cache, streams": ("small_recipe", [], 3.0),
    "tower, batch 32": ("tower", ["--parts", "times", "--dtype", "bfloat16", "--batch_size", "32"], 1.0),
    "tower, batch 128": ("tower", ["--parts", "times", "--dtype", "bfloat16", "--batch_size", "128"], 1.5),
    "losses": ("losses", ["--dtype", "bfloat16"], 1.0),
    "inference": ("inference", ["--dtype", "bfloat16", "--compile"], 1.5),
}
TOY_FLAGS = ["--toy", "--repeats", "1", "--threads", "1"]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    options.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=str(list(PARTS))
    )
    options.add_argument("--device", default="cuda")
    options.add_argument("--toy", action="store_true", help="tiny shapes, to try the command")
    options.add_argument("--out", type=Path, default=Path("outputs/on_gpu.json"))
    return options.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

import torch

from benchmarks.speed.measure import ROOT, Row, machine, write_json
from modeling_movekd.files import read_json


def run_part(name: str, flags: Sequence[str], seconds: float) -> dict[str, Any]:
    """
    Run one part for at most `seconds`.

    Returns:
        `seconds`, and the script's `tables` or an `error`: the last line of its output, or that it was stopped.
    """
    script, own, _ = PARTS[name]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tables.json"
        # Compiling takes a minute, also of tiny shapes
        own = [flag for flag in own if flag != "--compile" or "--toy" not in flags]
        command = [sys.executable, "-m", f"benchmarks.speed.{script}", *own, *flags, "--out", str(out)]
        result: dict[str, Any] = {}
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=seconds, capture_output=True, text=True)
            if done.returncode:
                result["error"] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                result["output"] = done.stderr[-4000:]
        except subprocess.TimeoutExpired:
            result["error"] = f"stopped after {seconds:.0f} s; give more `--minutes`, or this part alone by `--parts`"
        if out.is_file():
            result["tables"] = read_json(out)
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def lines_of(name: str, result: dict[str, Any]) -> list[str]:
    lines = []
    for table in result.get("tables", {}).values():
        for values in table["rows"]:
            row = Row(**{key: value for key, value in values.items() if key != "reached"})
            lines.append(f"| {' | '.join([name, *row.cells])} |")
    if "error" in result:
        lines.append(f"| {name} | **failed**: {result['error']} | | | | | |")
    return lines


def main(given: Sequence[str] | None = None) -> None:
    chosen = parse_arguments(given)
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        message = "no GPU is visible to torch. Run this on a machine with one, or try it by `--toy --device cpu`."
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    flags = ["--device", chosen.device, *(TOY_FLAGS if chosen.toy else [])]
    deadline, results = time.time() + 60 * chosen.minutes, {}
    context = machine() | {"device": chosen.device, "toy": chosen.toy}
    lines = ["| part | what | ours | rival | ratio | must reach | reached |", "|---|---|---|---|---|---|---|"]
    for number, name in enumerate(chosen.parts):
        left = chosen.parts[number:]
        share = PARTS[name][2] / sum(PARTS[other][2] for other in left)
        results[name] = run_part(name, flags, max(1.0, share * (deadline - time.time())))
        lines += lines_of(name, results[name])
        print(f"{name}: {results[name]['seconds']} s{', failed' if 'error' in results[name] else ''}", flush=True)
        write_json({"context": context, "parts": results}, chosen.out)  # also if a later part takes the machine down
    print("\n".join(["", *lines, "", "; ".join(f"{key}: {value}" for key, value in context.items())]))
    print(f"\nAll that was measured is in {chosen.out}.")
    if any("error" in result for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
