"""
How long every command takes for `--help` and for a wrong argument: `python -m benchmarks.speed.commands`.

Seconds are of the processor, since a start reads files and waits for the disk; a row is the median of its rounds. The
rival is the bar, one second. Below the table stands what Python takes alone with argparse.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.speed.options import parser


ROOMS = ("modeling_movekd", "hub", "train", "benchmarks", "spaces")
# What a wrong argument is, for the commands that read recipes
WRONG = {
    "train/sft.py": ["--config", "absent.yaml"],
    "train/feature_cache.py": ["--lerning_rate", "1"],
    "train/plan/__main__.py": ["--gpus", "8", "--gpu-memory", "80GB", "--seed", "one"],
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return parser(__doc__, repeats=3).parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

from benchmarks.speed.measure import ROOT, Row, report, start


def commands() -> list[str]:
    """The files of all commands, relative to the repository."""
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return [
        str(path.relative_to(ROOT))
        for path in files
        if path.name == "__main__.py" or '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8")
    ]


def command_line(command: str) -> list[str]:
    """How a command is started; the Space is no package."""
    module = command.removesuffix(".py").removesuffix("/__main__").replace("/", ".")
    return [command] if command.startswith("spaces") else ["-m", module]


def processor_seconds(*arguments: str) -> float:
    """User and system seconds of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: Sequence[str] | None = None) -> str:
    options = parse_arguments(arguments)
    start(options)
    asked = {f"{command} --help": [*command_line(command), "--help"] for command in commands()}
    asked |= {" ".join([command, *wrong]): [*command_line(command), *wrong] for command, wrong in WRONG.items()}
    if options.toy:
        asked = dict(list(asked.items())[:2])
    alone = "python alone"
    cases = asked | {alone: ["-c", "import argparse"]}
    rounds = [{name: processor_seconds(*given) for name, given in cases.items()} for _ in range(options.repeats + 1)]
    seconds = {name: statistics.median(measured[name] for measured in rounds[1:]) for name in cases}
    slowest_first = sorted(asked, key=seconds.__getitem__, reverse=True)
    rows = [Row(name, seconds[name], 1.0, at_most=1.0) for name in slowest_first]
    context = {alone: f"{seconds[alone]:.3f} s", "repeats": options.repeats}
    return report("Answers of the commands", rows, context, options.out)


if __name__ == "__main__":
    main()
