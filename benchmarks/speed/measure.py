"""What every benchmark shares: paired times, the peak memory of a fresh process, and tables that say their machine."""

import argparse
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Row:
    """
    One line of a table.

    Args:
        what: The claim, in words.
        ours, rival: In `unit`, medians; `None` where there is nothing to measure.
        unit: `"s"`, `"MB"`, ...
        at_most, at_least: Bar on the ratio.
        times_faster: Show rival over ours instead of ours over rival.
        note: What the rival is; what stands between where the bar is not reached.
        ratio: By default of the medians; give the median of the paired ratios where the runs were paired.
    """

    what: str
    ours: float | None
    rival: float | None
    unit: str = "s"
    at_most: float | None = None
    at_least: float | None = None
    times_faster: bool = False
    note: str = ""
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.ratio is None and self.ours and self.rival:
            self.ratio = self.rival / self.ours if self.times_faster else self.ours / self.rival

    @property
    def bar(self) -> str:
        if self.at_most is not None:
            return f"<= {self.at_most:.2f}"
        return f">= {self.at_least:g}" if self.at_least is not None else ""

    @property
    def reached(self) -> bool | None:
        """`None` without a bar or a ratio. The ratio counts as it is printed, with two decimals."""
        if self.ratio is None or not self.bar:
            return None
        if self.at_most is not None:
            return round(self.ratio, 2) <= self.at_most
        return self.at_least is not None and round(self.ratio, 2) >= self.at_least


def paired_times(functions: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """
    Time several functions side by side: each once in every round, in an order that turns around from round to round,
    so that whatever else the machine does falls on all alike.

    Args:
        repeats: Rounds that are measured, after `warm_up` rounds that are not.

    Returns:
        Seconds by name, one a round; the values of one round belong together (see [`paired_ratio`]).
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    for repeat in range(-warm_up, repeats):
        for name in list(functions) if repeat % 2 == 0 else reversed(list(functions)):
            _synchronize()
            start = time.perf_counter()
            result = functions[name]()
            _synchronize()
            seconds = time.perf_counter() - start
            del result
            if repeat >= 0:
                times[name].append(seconds)
    return times


def paired_ratio(ours: Sequence[float], rival: Sequence[float]) -> float:
    """Median of the ratios within a round: a machine's drift disturbs it less than it does a ratio of medians."""
    return statistics.median(a / b for a, b in zip(ours, rival, strict=True))


def peak_memory(function: str, arguments: Mapping[str, Any], beyond: bool = False, toy: bool = False) -> int:
    """
    Peak memory in bytes of a fresh process: resident memory, or what torch allocated on the GPU if it was used. It is
    the memory in use, without what glibc's heap would keep of the large tensors that were freed. Where `function`
    returns a callable, what it took to build that does not count (on Linux or a GPU).

    Args:
        function: `"package.module:name"`, called with `arguments`. It may return a callable, which is called then.
        arguments: Whatever JSON can say.
        beyond: Count only what the returned callable needs beyond what is there before it is called.
        toy: Run it in this process, which is faster, and measure nothing: the result is this process's memory.

    Raises:
        RuntimeError: if the process fails, with its output.
    """
    if toy:
        module, name = function.split(":")
        measured = getattr(importlib.import_module(module), name)(**arguments)
        _ = measured() if callable(measured) else None
        return resident_memory(peak=True)
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.measure",
        function,
        json.dumps(dict(arguments)),
        str(int(beyond)),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        # Large tensors go back to the system when they are freed, whatever was freed before them (glibc)
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    }
    child = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if child.returncode != 0:
        raise RuntimeError(f"{function} with {dict(arguments)} failed:\n{child.stdout}{child.stderr}")
    return int(json.loads(child.stdout.splitlines()[-1])["peak"])


def report(title: str, rows: Sequence[Row], context: Mapping[str, Any], out: str | os.PathLike | None = None) -> str:
    """
    Print a table as Markdown, with the machine, the versions and `context` (shapes, repeats, ...) below it.

    Args:
        out: JSON file that takes the table under its title, beside those that it already holds.

    Returns:
        The Markdown.
    """
    context = {**machine(), **context}
    lines = [f"### {title}", "", "| what | ours | rival | ratio | must reach | reached |", "|---|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        reached = {None: "", True: "yes", False: "**no**"}[row.reached]
        what = f"{row.what} ({row.note})" if row.note else row.what
        lines.append(
            f"| {what} | {_quantity(row.ours, row.unit)} | {_quantity(row.rival, row.unit)} | {ratio} | {row.bar} | "
            f"{reached} |"
        )
    lines += ["", "; ".join(f"{name}: {value}" for name, value in context.items()), ""]
    markdown = "\n".join(lines)
    print(markdown)
    if out is not None:
        path = Path(out)
        tables = json.loads(path.read_text()) if path.exists() else {}
        tables[title] = {"context": context, "rows": [{**asdict(row), "reached": row.reached} for row in rows]}
        write(path, json.dumps(tables, indent=2) + "\n")
    return markdown


def write(path: Path, text: str) -> None:
    """Under a temporary name first; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def parser(description: str, repeats: int = 7) -> argparse.ArgumentParser:
    """The options of every benchmark: `--device --dtype --threads --repeats --toy --out`."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options.add_argument("--threads", type=int, default=2, help="of the CPU")
    options.add_argument("--repeats", type=int, default=repeats, help="rounds, each running every variant once")
    options.add_argument("--toy", action="store_true", help="tiny shapes, to try the script itself")
    options.add_argument("--out", help="JSON file that takes the table")
    return options


def machine() -> dict[str, Any]:
    """Processor, GPU, load, threads and versions."""
    import transformers

    found = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    if hasattr(os, "getloadavg"):
        found["load"] = f"{os.getloadavg()[0]:.1f}"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {**found, **versions, "date": time.strftime("%Y-%m-%d")}


def resident_memory(peak: bool = False) -> int:
    """Resident memory of this process in bytes, now or at its peak."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux: only the peak can be had, in bytes on macOS
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not `ru_maxrss`, which counts the parent's memory too, between fork and exec
    field = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) * 1024


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _quantity(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.4g} {unit}"


def _child(function: str, arguments: str, beyond: str) -> None:
    module, name = function.split(":")
    measured = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    before = 0
    if callable(measured):
        gc.collect()
        before = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else resident_memory()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        elif os.path.exists("/proc/self/clear_refs"):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        result = measured()
        del result
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else resident_memory(peak=True)
    print(json.dumps({"peak": peak - before * int(beyond)}))


if __name__ == "__main__":
    _child(*sys.argv[1:])
