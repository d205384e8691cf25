"""What the timing scripts share: paired times, peak memory of a fresh process, and tables that name their machine."""

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

from modeling_movekd.files import read_json, save_json


ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Row:
    """
    One line of a table.

    Args:
        what (`str`): The claim, in words.
        ours, rival (`float`, *optional*): Medians in `unit`; `None` if there is nothing to measure.
        unit (`str`, *optional*, defaults to `"s"`): Unit of both.
        at_most, at_least (`float`, *optional*): Bar on the ratio.
        times_faster (`bool`, *optional*, defaults to `False`): Show rival over ours instead of ours over rival.
        note (`str`, *optional*): What the rival is.
        ratio (`float`, *optional*): By default the ratio of the medians (see [`paired_row`]).
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
        """`None` without a bar or a ratio. The ratio is rounded as it is printed, to two decimals."""
        if self.ratio is None or not self.bar:
            return None
        if self.at_most is not None:
            return round(self.ratio, 2) <= self.at_most
        return self.at_least is not None and round(self.ratio, 2) >= self.at_least

    @property
    def cells(self) -> list[str]:
        """What a table shows: what, ours, rival, ratio, bar, whether it is reached."""
        what = f"{self.what} ({self.note})" if self.note else self.what
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        reached = {None: "", True: "yes", False: "**no**"}[self.reached]
        return [what, _quantity(self.ours, self.unit), _quantity(self.rival, self.unit), ratio, self.bar, reached]


def paired_times(functions: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """
    Time several functions side by side: each once in every round, in an order that is reversed from round to round, so
    that other load of the machine falls on all alike.

    Args:
        functions (`Mapping`): What to time, by name.
        repeats (`int`): Number of measured rounds.
        warm_up (`int`, *optional*, defaults to 1): Number of rounds before them, which are not measured.

    Returns:
        Seconds by name, one value for each round.
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


def paired_row(what: str, ours: Sequence[float], rival: Sequence[float], **kwargs: Any) -> Row:
    """
    A row of two lists of [`paired_times`]: their medians, and the median of the ratios within a round, which a drift
    of the machine disturbs less than a ratio of medians.
    """
    ratio = statistics.median(a / b for a, b in zip(ours, rival, strict=True))
    return Row(what, statistics.median(ours), statistics.median(rival), ratio=ratio, **kwargs)


def peak_memory(function: str, arguments: Mapping[str, Any], beyond: bool = False, toy: bool = False) -> int:
    """
    Peak memory in bytes of a fresh process: resident memory, or what torch allocated on the GPU if it was used.

    Args:
        function (`str`): `"package.module:name"`, called with `arguments`. If it returns a callable, this is called
            too, and the peak is that of the second call (on Linux or a GPU).
        arguments (`Mapping`): Keyword arguments that can be written as JSON.
        beyond (`bool`, *optional*, defaults to `False`): Subtract the memory in use before the second call.
        toy (`bool`, *optional*, defaults to `False`): Call it in this process, which is faster, and give back this
            process's own peak.

    Raises:
        RuntimeError: if the process fails, with its output.
    """
    if toy:
        module, name = function.split(":")
        measured = getattr(importlib.import_module(module), name)(**arguments)
        _ = measured() if callable(measured) else None
        return resident_memory(peak=True)
    command = [sys.executable, "-m", "benchmarks.speed.measured_process"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        # glibc gives large tensors back to the system as soon as they are freed
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    }
    command += [function, json.dumps(dict(arguments)), str(int(beyond))]
    child = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if child.returncode != 0:
        raise RuntimeError(f"{function} with {dict(arguments)} failed:\n{child.stdout}{child.stderr}")
    return int(json.loads(child.stdout.splitlines()[-1])["peak"])


def report(title: str, rows: Sequence[Row], context: Mapping[str, Any], out: str | Path | None = None) -> str:
    """
    Print a table as Markdown, with the machine, the versions and `context` (shapes, repeats, ...) below it.

    Args:
        title (`str`): Heading of the table.
        rows (`Sequence`): Its lines.
        context (`Mapping`): What else to name below it.
        out (`str`, *optional*): JSON file that takes the table under its title, beside the tables that it holds.

    Returns:
        The Markdown.
    """
    context = {**machine(), **context}
    lines = [f"### {title}", "", "| what | ours | rival | ratio | must reach | reached |", "|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row.cells)} |" for row in rows]
    markdown = "\n".join([*lines, "", in_words(context), ""])
    print(markdown)
    if out is not None:
        tables = read_json(out) if Path(out).exists() else {}
        tables[title] = {"context": context, "rows": [{**asdict(row), "reached": row.reached} for row in rows]}
        write_json(tables, out)
    return markdown


def in_words(context: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in context.items())


def write_json(content: dict[str, Any], path: str | Path) -> None:
    """`save_json`, after making the folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_json(content, path)


def start(options: argparse.Namespace) -> None:
    """Set the device, by default the first GPU or else the CPU, and the threads."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)


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
    except OSError:  # not Linux: only the peak is known (in bytes on macOS)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # `ru_maxrss` would count the parent's memory too, between fork and exec
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
