"""
Statistics of the replication, computed from the lines of `results.jsonl`.

The unit is the seed: every comparison is paired by seed, over the seeds that both arms have. Accuracies are shares
from 0 to 1, and the average of a run weighs its families of questions equally.
"""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from benchmarks.replication.design import Experiment


RATE, SHARE = "vision_tower_learning_rate", "pretrain_share"  # the settings that the validation plot is drawn over


@dataclass(frozen=True)
class Run:
    """
    One line of the results: one arm with one seed, scored on one split.

    Args:
        line (`int`): Number of the line in the file, from 1.
        settings (`dict`): The options that the arm and its schedule set.
        accuracy (`dict`): Share of exactly right answers, by family of questions.
        questions (`dict`): Number of questions, by family.
        probe (`dict`): Accuracy of a linear probe of the tower's tokens after training, by kind of label.
        probe_at_start (`dict`): The same probe of the CLIP that the tower started from.
        experts (`dict`, *optional*): `share`, the share of the tokens by layer and expert; `None` without experts.
        drift (`float`): Squared distance of the tower's features from CLIP's, relative to CLIP's squared norm.
        cost (`dict`): `seconds`, `tower_parameters` and `trained_parameters`.
    """

    line: int
    arm: str
    seed: int
    split: str
    command: str
    commit: str
    date: str
    settings: dict[str, Any]
    accuracy: dict[str, float]
    questions: dict[str, int]
    probe: dict[str, float]
    probe_at_start: dict[str, float]
    experts: dict[str, Any] | None
    drift: float
    cost: dict[str, float]

    @property
    def average(self) -> float:
        return sum(self.accuracy.values()) / len(self.accuracy)


def read_runs(path: str | Path) -> list[Run]:
    """
    Read a results file; empty lines are skipped, but count for the numbers of the lines.

    Raises:
        ValueError: if a line is not JSON, lacks a key, or contradicts an earlier line (see `check_together`).
    """
    runs = []
    for line, text in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if text.strip():
            try:
                runs.append(parse_run(json.loads(text), line))
            except json.JSONDecodeError as error:  # an interrupted run leaves half a line
                raise ValueError(
                    f"Line {line} of {path} is not JSON ({error}). Remove the line and run that seed again."
                ) from error
    check_together(runs)
    return runs


def parse_run(fields: dict[str, Any], line: int) -> Run:
    """The object of one line as a `Run`; keys that `Run` does not have are ignored."""
    names = [each.name for each in dataclasses.fields(Run) if each.name != "line"]
    if missing := [name for name in names if name not in fields]:
        raise ValueError(f"Line {line} has no {', '.join(missing)}. Run that arm and seed again, or remove the line.")
    return Run(line=line, **{name: fields[name] for name in names})


def check_together(runs: Sequence[Run]) -> None:
    """
    Check that the lines belong to one experiment.

    Raises:
        ValueError: if two lines are the same run, an arm's test lines differ in their settings, or lines were measured
            on different questions or probes.
    """
    seen, tested, asked = dict[tuple, Run](), dict[str, Run](), dict[str, Run]()
    for run in runs:
        name = f"arm {run.arm}, seed {run.seed}, split {run.split}"
        key = (name, _canonical(run.settings) if run.split == "validation" else "")
        if (other := seen.setdefault(key, run)) is not run:
            raise ValueError(f"Lines {other.line} and {run.line} are both {name}. Remove one of them.")
        if run.split == "test" and (other := tested.setdefault(run.arm, run)).settings != run.settings:
            raise ValueError(
                f"Lines {other.line} and {run.line} are both arm {run.arm} on test, with different settings: "
                f"{other.settings} and {run.settings}. Give one of them another name."
            )
        other = asked.setdefault(run.split, run)
        if (run.questions, set(run.probe)) != (other.questions, set(other.probe)):
            raise ValueError(
                f"Lines {other.line} and {run.line} were measured on different questions or probes: "
                f"{other.questions}, {list(other.probe)} and {run.questions}, {list(run.probe)}. Keep results of two "
                "worlds in two files."
            )


def _canonical(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


@dataclass(frozen=True)
class Interval:
    """A mean (or a ratio) over `count` seeds with its 95 % interval; the bounds are NaN for one seed."""

    mean: float
    low: float
    high: float
    count: int


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """mean -+ t(0.975, n - 1) * s / sqrt(n), with s the standard deviation over n - 1."""
    mean, count = float(np.mean(values)), len(values)
    spread = float(np.std(values, ddof=1)) if count > 1 else math.nan
    half = float(stats.t.ppf(0.975, count - 1)) * spread / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def by_seed(runs: Sequence[Run], family: str | None = None) -> dict[int, float]:
    """Accuracy of an arm's runs by seed, in one family or, by default, the average over families."""
    return {run.seed: run.accuracy[family] if family else run.average for run in runs}


@dataclass(frozen=True)
class Paired:
    """
    The difference between an arm and its rival, over the seeds of both.

    Args:
        difference (`Interval`): Mean with its 95 % t interval.
        p (`float`): Two-sided p of the paired t test: below 0.05 exactly where the interval leaves out 0.
        detectable (`float`): Difference that a test of this many seeds finds with power 0.8.
    """

    seeds: list[int]
    difference: Interval
    p: float
    detectable: float

    @property
    def verdict(self) -> str:
        """`"won"` if the interval lies above 0, `"lost"` if it lies below, else `"undecided"`."""
        return "won" if self.difference.low > 0 else "lost" if self.difference.high < 0 else "undecided"


def compare(ours: Mapping[int, float], rival: Mapping[int, float]) -> Paired | None:
    """Paired by seed; `None` if no seed is in both. From one seed only the difference is known; the rest is NaN."""
    seeds = sorted(set(ours) & set(rival))
    if not seeds:
        return None
    # Rounded, so that equal shares differ by exactly 0
    differences = np.round([ours[seed] - rival[seed] for seed in seeds], 12)
    found = interval(differences)
    if len(seeds) == 1:
        return Paired(seeds, found, math.nan, math.nan)
    spread = float(np.std(differences, ddof=1))
    # The same difference on every seed has no t
    p = float(stats.ttest_1samp(differences, 0).pvalue) if spread else float(not differences[0])
    return Paired(seeds, found, p, detectable_difference(spread, len(seeds)))


def detectable_difference(spread: float, count: int, power: float = 0.8, level: float = 0.05) -> float:
    """
    Smallest true difference that a two-sided paired t test finds with the given power.

    With c = t(1 - level / 2, n - 1) and T noncentral t of n - 1 degrees of freedom and noncentrality
    d * sqrt(n) / spread, it is the d at which P(T > c) = power. A few seeds give only a rough `spread`, the standard
    deviation of the differences: read the result as an order of magnitude.
    """
    critical = float(stats.t.ppf(1 - level / 2, count - 1))

    def shortfall(noncentrality: float) -> float:
        return float(stats.nct.sf(critical, count - 1, noncentrality)) - power

    return brentq(shortfall, 0.0, 3 * critical + 10) * spread / math.sqrt(count)


def holm(values: Sequence[float]) -> list[float]:
    """
    p values corrected by Holm's method for their number m: the k-th smallest times m - k + 1, never below a smaller
    one's, at most 1. NaN (nothing was tested) stays and does not count.
    """
    corrected = [math.nan] * len(values)
    order = sorted((index for index, value in enumerate(values) if not math.isnan(value)), key=lambda at: values[at])
    reached = 0.0
    for rank, index in enumerate(order):
        reached = max(reached, min(1.0, values[index] * (len(order) - rank)))
        corrected[index] = reached
    return corrected


def share_closed(
    ours: Mapping[int, float], control: Mapping[int, float], upper: Mapping[int, float]
) -> Interval | None:
    """
    Share of the distance from a control to an upper reference that an arm closes, with Fieller's interval.

    Over the n seeds of all three, with N the arm less the control and D the upper reference less the control, the
    share is mean(N) / mean(D). The interval holds every r for which a t test of N - r D does not reject 0:
    (mean(N) - r mean(D))^2 <= t^2 (var(N) - 2 r cov(N, D) + r^2 var(D)) / n with t = t(0.975, n - 1).

    Returns:
        `None` if the three share no seed, or if the upper reference is not above the control. The bounds are NaN for
        one seed, and infinite if mean(D) itself is not shown to differ from 0.
    """
    seeds = sorted(set(ours) & set(control) & set(upper))
    gains = np.array([ours[seed] - control[seed] for seed in seeds])
    distances = np.array([upper[seed] - control[seed] for seed in seeds])
    if not seeds or distances.mean() <= 0:
        return None
    gain, distance = float(gains.mean()), float(distances.mean())
    if len(seeds) == 1:
        return Interval(gain / distance, math.nan, math.nan, 1)
    covariance = stats.t.ppf(0.975, len(seeds) - 1) ** 2 * np.cov(gains, distances) / len(seeds)
    quadratic = distance**2 - covariance[1, 1]
    linear, constant = gain * distance - covariance[0, 1], gain**2 - covariance[0, 0]
    if quadratic <= 0:
        return Interval(gain / distance, -math.inf, math.inf, len(seeds))
    root = math.sqrt(max(linear**2 - quadratic * constant, 0.0))
    return Interval(gain / distance, (linear - root) / quadratic, (linear + root) / quadratic, len(seeds))


@dataclass(frozen=True)
class Tuned:
    """An arm with one choice of settings on the validation split; `best` has the arm's highest average."""

    arm: str
    settings: dict[str, Any]
    average: float
    runs: list[Run]
    best: bool


def tuned(runs: Sequence[Run]) -> list[Tuned]:
    """The validation lines by arm, in the order of the first lines, and by settings, in the order of the rates."""
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        if run.split == "validation":
            groups.setdefault(run.arm, {}).setdefault(_canonical(run.settings), []).append(run)
    found = []
    for arm, choices in groups.items():
        averages = {choice: float(np.mean([run.average for run in own])) for choice, own in choices.items()}
        best = max(averages, key=lambda choice: averages[choice])
        for choice, own in sorted(choices.items(), key=lambda item: item[1][0].settings.get(RATE) or 0.0):
            found.append(Tuned(arm, own[0].settings, averages[choice], own, choice == best))
    return found


def varied(choices: Sequence[Tuned]) -> dict[str, dict[str, list[Any]]]:
    """By setting, and by arm that tried several values of it: these values, numbers first and rising."""
    found: dict[str, dict[str, list[Any]]] = {}
    for arm in dict.fromkeys(choice.arm for choice in choices):
        tried = [choice.settings for choice in choices if choice.arm == arm]
        for name in dict.fromkeys(name for settings in tried for name in settings):
            values = {settings.get(name) for settings in tried}
            if len(values) > 1:
                found.setdefault(name, {})[arm] = sorted(values, key=lambda value: (value is None, value))
    return found


def best_control(choices: Sequence[Tuned], controls: Collection[str]) -> str | None:
    """The control whose best settings score highest on validation; `None` if no control has validation lines."""
    found = [choice for choice in choices if choice.best and choice.arm in controls]
    return max(found, key=lambda choice: choice.average).arm if found else None


@dataclass
class Results:
    """
    The runs beside the design, sorted by arm, with what several sections of the report need.

    Args:
        networks (`Mapping`): Scores of the networks, by name.
        blind (`Mapping`): Accuracies of answers given without the picture, by name and family.
    """

    runs: Sequence[Run]
    design: Experiment
    networks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    blind: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    test: dict[str, list[Run]] = field(init=False)
    averages: dict[str, dict[int, float]] = field(init=False)

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("There are no runs to report: the results file is empty.")
        for run in self.runs:
            if run.arm not in self.design.arms:
                raise ValueError(f"Line {run.line}: arm {run.arm!r} is not described. Add it to ARMS, or remove it.")
        tested = [run for run in self.runs if run.split == "test"]
        self.test = {arm: [run for run in tested if run.arm == arm] for arm in self.design.arms}
        self.test = {arm: runs for arm, runs in self.test.items() if runs}
        self.averages = {arm: by_seed(runs) for arm, runs in self.test.items()}
        self.families = list(self.runs[0].accuracy)
        self.tuned = tuned(self.runs)
        self.control = best_control(self.tuned, self.design.controls)

    def compare(self, arm: str, rival: str, family: str | None = None) -> Paired | None:
        """Paired by seed on test, in one family or, by default, on the average."""
        return compare(by_seed(self.test.get(arm, []), family), by_seed(self.test.get(rival, []), family))
