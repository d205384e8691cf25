"""
Experiments in a small world, with this project's own trainer, model and presets.

    python -m benchmarks.replication                         # the paper's ablation, two runs at a time
    python -m benchmarks.replication --experiment recipes    # published recipes beside each other
    python -m benchmarks.replication --quick                 # a few steps of a few arms, to see that it works

Pictures, networks and features are made once, in `outputs/replication`. The runs of the split `validation`, which have
their own seeds, choose the schedule (learning rates, steps of each stage) of each family of arms, and then the best
control. On the split `test`, each arm runs once for each seed. Each run appends a line to the results and is not run
again, so the command can be stopped at any time (`--minutes` stops it) and continued by the same command.
`python -m benchmarks.replication.report` writes the report, also of another `--experiment`.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.replication.recipes import EXPERIMENTS


OUTPUT = Path("outputs/replication")
QUICK_ARMS = ("frozen", "paper", "heads_unit")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", choices=EXPERIMENTS, default="ablation")
    parser.add_argument("--arms", nargs="+", default=None, help="all by default")
    parser.add_argument("--seeds", type=int, default=5, help="test seeds of each arm")
    parser.add_argument("--more_seeds", type=int, default=0, help="additional test seeds of each headline arm")
    parser.add_argument("--minutes", type=float, default=45, help="start no run after this time")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, with one thread each")
    parser.add_argument("--quick", action="store_true", help="a few steps of a few arms; results go to --output")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument("--part", choices=("prepare", "validation", "test"), default=None, help="all by default")
    chosen = parser.parse_args(arguments)
    experiment = EXPERIMENTS[chosen.experiment]
    chosen.arms = chosen.arms or (QUICK_ARMS if chosen.quick else tuple(experiment.arms))
    if unknown := [arm for arm in chosen.arms if arm not in experiment.arms]:
        parser.error(f"{chosen.experiment} has no arms {unknown}. Choose of {list(experiment.arms)}.")
    return chosen


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

from tqdm import tqdm

from benchmarks.replication.design import Experiment, Schedule
from benchmarks.replication.runs import QUICK, Job, Scale, prepare, run
from benchmarks.replication.towers import build_towers
from modeling_movekd.files import save_json


VALIDATION_SEEDS = (100, 101)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def key(job: Job) -> tuple[Any, ...]:
    # An arm has one test run for each seed, whatever schedule validation chose
    if job.split == "test":
        return job.arm, job.seed, "test"
    return job.arm, job.seed, job.split, job.schedule, ()


def key_of(line: dict[str, Any], experiment: Experiment) -> tuple[Any, ...]:
    """The key of the job that wrote a line. If the arm's settings changed since, it ends in the earlier settings."""
    if line["split"] == "test":
        return line["arm"], line["seed"], "test"
    own = dict(line["settings"])
    schedule = Schedule(**{name: own.pop(name) for name in Schedule._fields if name in own})
    changed = () if own == experiment.arms[line["arm"]].settings else (json.dumps(own, sort_keys=True),)
    return line["arm"], line["seed"], line["split"], schedule, changed


def schedule_jobs(arms: Iterable[str], experiment: Experiment) -> list[Job]:
    """The validation runs that choose the schedules of `arms`."""
    owners = dict.fromkeys(experiment.arms[arm].schedule_of for arm in arms)
    return [
        Job(owner, seed, "validation", tried)
        for owner in owners
        for tried in experiment.schedules[owner]
        for seed in VALIDATION_SEEDS[: 2 if owner in experiment.chosen_twice else 1]
    ]


def chosen_schedule(arm: str, lines: Sequence[dict[str, Any]], experiment: Experiment) -> Schedule:
    """
    The schedule of an arm: the one with the best mean on validation, over all families and seeds.

    Raises:
        ValueError: if no schedule was tried yet.
    """
    owner = experiment.arms[arm].schedule_of
    found = defaultdict[Schedule, list[float]](list)
    for line in lines:
        if line["arm"] == owner and line["split"] == "validation" and not key_of(line, experiment)[-1]:
            found[key_of(line, experiment)[3]].append(fmean(line["accuracy"].values()))
    if not found:
        raise ValueError(
            f"No schedule of {owner} was tried on validation, and {arm} takes the best of them. Run "
            "`--part validation` first."
        )
    return max(found, key=lambda schedule: fmean(found[schedule]))


def check_asked(arms: Collection[str], lines: Sequence[dict[str, Any]], experiment: Experiment) -> None:
    """
    Raises:
        ValueError: if an arm of `arms` was tested with settings other than its present ones.
    """
    for number, line in enumerate(lines, 1):
        if line["split"] != "test" or line["arm"] not in arms:
            continue
        schedule = chosen_schedule(line["arm"], lines, experiment)
        own = experiment.arms[line["arm"]].settings | schedule._asdict()
        names = [name for name in own | line["settings"] if own.get(name) != line["settings"].get(name)]
        if names:
            asked, now = ({name: settings.get(name) for name in names} for settings in (line["settings"], own))
            raise ValueError(
                f"Line {number}: test was asked with {asked}, but {line['arm']} has {now} now. Take the change back, "
                "or begin a new round: fresh pictures (PICTURES_SEED), new seeds, and no test lines."
            )


def run_all(
    jobs: Sequence[Job],
    experiment: Experiment,
    results: Path,
    folder: Path,
    scale: Scale,
    workers: int,
    deadline: float,
    command: str,
) -> int:
    """Run the jobs without a line, `workers` at a time, and append each line. Returns how many are left."""
    done = {key_of(line, experiment) for line in read(results)}
    missing = [job for job in jobs if key(job) not in done]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    waiting, running, left = iter(missing), set[Future](), len(missing)
    bar = tqdm(total=len(missing), desc=f"{missing[0].split} runs" if missing else "runs")
    # Imports take some ten seconds: a process does several runs
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=8) as pool:
        while True:
            while len(running) < workers and time.time() < deadline and (job := next(waiting, None)) is not None:
                own = networks_folder(folder, experiment.networks_of(job.seed))
                running.add(pool.submit(run, job, experiment.arms[job.arm], own, scale, command, commit))
            if not running:
                break
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                line = future.result()
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                left -= 1
                bar.update()
                average = 100 * fmean(line["accuracy"].values())
                bar.set_postfix_str(f"{line['arm']} seed {line['seed']}: {average:.1f}")
    bar.close()
    return left


def networks_folder(folder: Path, networks: int) -> Path:
    """Where the set of networks with this seed is, with its pictures and features."""
    return folder if networks == 0 else folder / f"networks-{networks}"


def prepare_networks(experiment: Experiment, folder: Path, scale: Scale, workers: int) -> dict[str, dict[str, float]]:
    """Train and prepare what is missing of every set of networks, and return their scores by name."""
    scores = {}
    for networks in experiment.networks:
        own = networks_folder(folder, networks)
        own.mkdir(parents=True, exist_ok=True)
        found = build_towers(own / "towers", networks, scale.tower_pictures, scale.tower_effort, workers)
        suffix = f" (set {networks})" if len(experiment.networks) > 1 else ""
        scores.update({f"{name}{suffix}": values for name, values in found.items()})
        prepare(own, scale, networks)
    return scores


def main(given: Sequence[str] | None = None) -> None:
    chosen = parse_arguments(given)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    deadline = time.time() + 60 * chosen.minutes
    scale = QUICK if chosen.quick else Scale()
    folder = chosen.output / "quick" if chosen.quick else chosen.output
    experiment = EXPERIMENTS[chosen.experiment]
    results = chosen.results or (folder if chosen.quick else experiment.folder) / "results.jsonl"
    arms = chosen.arms
    seeds = {arm: chosen.seeds + (chosen.more_seeds if arm in experiment.headline else 0) for arm in arms}
    if chosen.quick:
        seeds = dict.fromkeys(arms, 2)
    folder.mkdir(parents=True, exist_ok=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    networks = prepare_networks(experiment, folder, scale, chosen.workers)
    save_json(networks, results.with_name("networks.json"))
    command = "python -m benchmarks.replication " + " ".join(given if given is not None else sys.argv[1:])
    common = (experiment, results, folder, scale, chosen.workers, deadline, command.strip())
    left = 0
    if chosen.part in (None, "validation"):
        left += run_all(schedule_jobs(arms, experiment), *common)
        if not left:
            lines = read(results)
            jobs = [
                Job(arm, VALIDATION_SEEDS[0], "validation", chosen_schedule(arm, lines, experiment))
                for arm in experiment.controls
                if arm in arms
            ]
            left += run_all(jobs, *common)
    if chosen.part in (None, "test") and not left:
        lines = read(results)
        check_asked(arms, lines, experiment)
        # Seed by seed, so that all arms have the same seeds if the command is stopped
        jobs = [
            Job(arm, experiment.first_seed + number, "test", chosen_schedule(arm, lines, experiment))
            for number in range(max(seeds.values()))
            for arm in arms
            if number < seeds[arm]
        ]
        left += run_all(jobs, *common)
    print(f"{left} runs are left; the same command continues." if left else f"All runs are in {results}.")


if __name__ == "__main__":
    main()
