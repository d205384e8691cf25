"""
Statistics of the replication: the checked lines of `results.jsonl`, and pure functions from them to what it says.

The unit is the seed. Every comparison is paired by seed, over the seeds that both arms have. Accuracies are shares
(0 to 1), and the average of a run weighs its families equally. Lines of the validation split never meet lines of the
test split: a function that is given both raises.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq


SPLITS = ("test", "validation")
RATE, SHARE = "vision_tower_learning_rate", "pretrain_share"  # of what is tuned on validation, the axes of plots
COSTS = ("seconds", "tower_parameters", "trained_parameters")


@dataclass(frozen=True)
class Run:
    """
    One line of the results: one arm with one seed, scored on one split.

    Args:
        line: Its number in the file, from 1.
        settings: What the arm overrides.
        accuracy: Share of exactly right answers for each family of questions, of `questions[family]` each.
        probe, probe_at_start: Accuracy (shares) of a linear probe of the tower's tokens, after training and before.
        cka: Centred kernel alignment of the tower's features to each teacher's.
        experts: `None`, or `share` (layers x experts) and `by_kind` (kind of token: layers x experts).
        drift: Relative squared distance of the tower's features from CLIP's.
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
    cka: dict[str, float]
    experts: dict[str, Any] | None
    drift: float
    losses: dict[str, float]
    cost: dict[str, float]

    @property
    def average(self) -> float:
        return sum(self.accuracy.values()) / len(self.accuracy)


def read_runs(path: str | Path) -> list[Run]:
    """
    The checked lines of a JSON-lines file; empty lines count and say nothing.

    Raises:
        ValueError: If a line is no JSON, lacks a key, holds a number that is none or out of range, or does not fit the
            lines before it (see `check_together`); each message names its lines.
    """
    runs = []
    for line, text in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if text.strip():
            try:
                fields = json.loads(text)
            except json.JSONDecodeError as error:
                advice = "A run that was cut off leaves half a line: remove it and run that seed again."
                raise ValueError(f"Line {line} of {path} is not JSON ({error}). {advice}") from error
            runs.append(parse_run(fields, line))
    check_together(runs)
    return runs


def parse_run(fields: Any, line: int) -> Run:
    """One line's object as a `Run`, without keys that it does not know; raises `ValueError` as `read_runs` does."""
    names = [field.name for field in dataclasses.fields(Run) if field.name != "line"]
    missing = [name for name in names if name not in fields] if isinstance(fields, dict) else names
    if missing:
        raise ValueError(f"Line {line} has no {', '.join(missing)}. Run that arm and seed again, or remove the line.")
    run = Run(line=line, **{name: fields[name] for name in names})
    if isinstance(run.probe_at_start, dict) and isinstance(run.probe, dict):  # what else is known of that CLIP goes
        start = {key: value for key, value in run.probe_at_start.items() if key in run.probe}
        run = dataclasses.replace(run, probe_at_start=start)
    if run.split not in SPLITS:
        raise ValueError(f"Line {line}: split is {run.split!r}, and not one of {', '.join(SPLITS)}.")
    if not isinstance(run.seed, int) or not isinstance(run.settings, dict):
        raise ValueError(f"Line {line}: seed {run.seed!r} must be an integer, settings {run.settings!r} an object.")
    for name in ("accuracy", "questions", "probe", "probe_at_start", "cka", "losses", "cost"):
        values = getattr(run, name)
        if not isinstance(values, dict) or (name in ("accuracy", "probe") and not values):
            raise ValueError(f"Line {line}: {name} is {values!r}, and must be an object of numbers.")
        top = 1.0 if name in ("accuracy", "probe", "probe_at_start") else math.inf
        for key, value in values.items():
            _check_number(value, f"Line {line}: {name}[{key!r}]", -math.inf if name in ("cka", "losses") else 0.0, top)
    _check_number(run.drift, f"Line {line}: drift", 0.0, math.inf)
    for ours, theirs in (("accuracy", "questions"), ("probe", "probe_at_start")):
        if set(getattr(run, ours)) != set(getattr(run, theirs)):
            both = f"{ours} is of {list(getattr(run, ours))}, {theirs} of {list(getattr(run, theirs))}"
            raise ValueError(f"Line {line}: {both}.")
    if lacking := [name for name in COSTS if name not in run.cost]:
        raise ValueError(f"Line {line}: cost has no {', '.join(lacking)}.")
    if run.experts is not None:
        _check_experts(run.experts, line)
    return run


def _check_number(value: Any, what: str, bottom: float, top: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not bottom <= value <= top:
        bounds = f" from {bottom:g} to {top:g}" if math.isfinite(bottom) else ""
        raise ValueError(f"{what} is {value!r}, and must be a finite number{bounds}.")


def _check_experts(experts: Mapping[str, Any], line: int) -> None:
    if missing := [name for name in ("share", "by_kind") if name not in experts]:
        raise ValueError(f"Line {line}: experts has no {', '.join(missing)}.")
    sizes = [len(row) for row in experts["share"]]
    for kind, shares in {"share": experts["share"], **experts["by_kind"]}.items():
        same = len(set(sizes)) == 1 and [len(row) for row in shares] == sizes
        if not same or not np.allclose([sum(row) for row in shares], 1, atol=0.02):
            rule = "in each layer the shares of the experts must sum to 1, as many experts and layers as in share"
            raise ValueError(f"Line {line}: experts, {kind}: {rule}; got {shares!r}.")


def check_together(runs: Sequence[Run]) -> None:
    """
    What one line cannot show.

    Raises:
        ValueError: If an arm was scored twice with one seed on one split (on validation: with the same settings), an
            arm's test lines differ in their settings, lines ask other families or probes than the first, or lines of
            one split and seed were scored on different numbers of questions.
    """
    seen: dict[tuple, Run] = {}
    tested, asked = dict[str, Run](), dict[tuple, Run]()
    for run in runs:
        told = f"arm {run.arm}, seed {run.seed}, split {run.split}"
        key = (told, _canonical(run.settings) if run.split == "validation" else "")
        if (other := seen.setdefault(key, run)) is not run:
            raise ValueError(f"Lines {other.line} and {run.line} are both {told}. Remove one of them.")
        if run.split == "test" and (other := tested.setdefault(run.arm, run)).settings != run.settings:
            raise ValueError(
                f"Lines {other.line} and {run.line} are both arm {run.arm} on test, with different settings: "
                f"{other.settings} and {run.settings}. Give one of them another name."
            )
        for name in ("accuracy", "probe"):
            first, ours = list(getattr(runs[0], name)), list(getattr(run, name))
            if set(first) != set(ours):
                both = f"Lines {runs[0].line} and {run.line} differ in {name}: {first} and {ours}."
                raise ValueError(f"{both} Lines of two worlds cannot be compared; keep them in two files.")
        if (other := asked.setdefault((run.split, run.seed), run)).questions != run.questions:
            raise ValueError(
                f"Lines {other.line} and {run.line} (split {run.split}, seed {run.seed}) were asked different numbers "
                f"of questions, {other.questions} and {run.questions}, and cannot be paired."
            )


def _canonical(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


@dataclass(frozen=True)
class Interval:
    """A mean (or ratio) of `count` seeds with its 95 % interval; the bounds are NaN where one seed gives none."""

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


def scores(runs: Sequence[Run], value: Callable[[Run], float] = lambda run: run.average) -> dict[int, float]:
    """
    A value of each of an arm's runs, by seed.

    Raises:
        ValueError: If the runs are of several arms or splits, or of one seed twice.
    """
    for name in ("arm", "split"):
        if len(found := sorted({getattr(run, name) for run in runs})) > 1:
            raise ValueError(f"Runs of more than one {name} cannot be averaged: {', '.join(found)}.")
    by_seed: dict[int, Run] = {}
    for run in runs:
        if (other := by_seed.setdefault(run.seed, run)) is not run:
            raise ValueError(f"Lines {other.line} and {run.line} are both arm {run.arm}, seed {run.seed}.")
    return {seed: value(by_seed[seed]) for seed in sorted(by_seed)}


@dataclass(frozen=True)
class Paired:
    """
    An arm less its rival, over the seeds of both.

    Args:
        difference: Mean with its 95 % t interval.
        ahead, behind: On how many seeds the arm is better, and worse.
        exact_p: Two-sided, of the sign-flip permutation test; cannot be below 2 / 2^n.
        t_p: Two-sided, of the paired t test: below 0.05 exactly where the interval leaves out 0.
        detectable: Difference that a test of this many seeds finds with power 0.8 (see `detectable_difference`).
    """

    seeds: list[int]
    difference: Interval
    ahead: int
    behind: int
    exact_p: float
    t_p: float
    detectable: float

    @property
    def verdict(self) -> str:
        """`"won"` where the interval lies above 0, `"lost"` where below, else `"undecided"`."""
        return "won" if self.difference.low > 0 else "lost" if self.difference.high < 0 else "undecided"


def compare(ours: Mapping[int, float], rival: Mapping[int, float]) -> Paired | None:
    """Paired by seed; `None` where no seed is in both. Of one pair only the difference is known, the rest is NaN."""
    seeds = sorted(set(ours) & set(rival))
    if not seeds:
        return None
    # Differences of equal shares must be 0, and equal differences equal, also in the last bit
    differences = np.round([ours[seed] - rival[seed] for seed in seeds], 12)
    found = interval(differences)
    ahead, behind = int((differences > 0).sum()), int((differences < 0).sum())
    if len(seeds) == 1:
        return Paired(seeds, found, ahead, behind, math.nan, math.nan, math.nan)
    spread = float(np.std(differences, ddof=1))
    # The same difference on every seed has no t
    t_p = float(stats.ttest_1samp(differences, 0).pvalue) if spread else float(not differences[0])
    detectable = detectable_difference(spread, len(seeds))
    return Paired(seeds, found, ahead, behind, sign_flip_p(differences), t_p, detectable)


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """
    Exact two-sided p of the mean under random signs: the share of all 2^n signs whose |mean| is at least that seen.

    Raises:
        ValueError: If there are more than 20 differences: a million signs are still counted, more are not.
    """
    if len(differences) > 20:
        raise ValueError(f"The exact test counts all 2^n signs, of at most 20 seeds; got {len(differences)}.")
    if not np.any(differences):
        return 1.0
    result = stats.permutation_test(
        (np.asarray(differences, dtype=float),),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
        batch=4096,
    )
    return float(result.pvalue)


def detectable_difference(spread: float, count: int, power: float = 0.8, level: float = 0.05) -> float:
    """
    Smallest true difference that a two-sided paired t test finds with the given power.

    With c = t(1 - level / 2, n - 1) and T noncentral t of n - 1 degrees of freedom and noncentrality
    d * sqrt(n) / spread, it is the d at which P(T > c) = power: finding the wrong sign, of a chance below 1e-4 there,
    does not count. `spread` is the standard deviation of the differences, which few seeds know badly: read the result
    as an order of magnitude.
    """
    critical = float(stats.t.ppf(1 - level / 2, count - 1))

    def shortfall(noncentrality: float) -> float:
        return float(stats.nct.sf(critical, count - 1, noncentrality)) - power

    return brentq(shortfall, 0.0, 3 * critical + 10) * spread / math.sqrt(count)


def holm(values: Sequence[float]) -> list[float]:
    """
    p values corrected for their number m: the k-th smallest times m - k + 1, never below a smaller one's, at most 1.

    NaN (nothing was tested) stays, and does not count.
    """
    corrected = [math.nan] * len(values)
    order = sorted((index for index, value in enumerate(values) if not math.isnan(value)), key=lambda at: values[at])
    reached = 0.0
    for rank, index in enumerate(order):
        reached = max(reached, min(1.0, values[index] * (len(order) - rank)))
        corrected[index] = reached
    return corrected


def compare_families(ours: Sequence[Run], rival: Sequence[Run]) -> dict[str, Paired | None]:
    """The paired difference in each family of questions; its `verdict` says whether the family is won or lost."""
    if len(splits := {run.split for run in (*ours, *rival)}) > 1:
        raise ValueError(f"Runs of more than one split cannot be compared: {', '.join(sorted(splits))}.")
    found = {}
    for family in ours[0].accuracy if ours else ():
        value = functools.partial(_accuracy, family)
        found[family] = compare(scores(ours, value), scores(rival, value))
    return found


def _accuracy(family: str, run: Run) -> float:
    return run.accuracy[family]


def share_closed(
    ours: Mapping[int, float], control: Mapping[int, float], upper: Mapping[int, float]
) -> Interval | None:
    """
    Share of the distance from a control to an upper reference that an arm closes, with its interval after Fieller.

    Over the n seeds of all three, with N the arm less the control, D the upper reference less the control, both paired
    by seed: mean(N) / mean(D). The interval holds every r for which a t test of N - r D does not reject 0, that is
    (mean(N) - r mean(D))^2 <= t^2 (var(N) - 2 r cov(N, D) + r^2 var(D)) / n with t = t(0.975, n - 1): the two roots,
    where mean(D) itself differs from 0; without bounds (infinite) where it does not. One seed: no bounds (NaN).

    `None` where the three share no seed, or the upper reference is not above the control: no distance to close.
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
    # quadratic * r^2 - 2 * linear * r + constant <= 0
    quadratic = distance**2 - covariance[1, 1]
    linear, constant = gain * distance - covariance[0, 1], gain**2 - covariance[0, 0]
    if quadratic <= 0:
        return Interval(gain / distance, -math.inf, math.inf, len(seeds))
    root = math.sqrt(max(linear**2 - quadratic * constant, 0.0))
    return Interval(gain / distance, (linear - root) / quadratic, (linear + root) / quadratic, len(seeds))


@dataclass(frozen=True)
class Tuned:
    """An arm with one choice of settings on the validation split; `best` of its arm by the mean of the averages."""

    arm: str
    settings: dict[str, Any]
    average: Interval
    runs: list[Run]
    best: bool


def tuned(runs: Sequence[Run]) -> list[Tuned]:
    """The validation lines by arm (in the order of their first lines) and settings (rates rising)."""
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        if run.split == "validation":
            groups.setdefault(run.arm, {}).setdefault(_canonical(run.settings), []).append(run)
    found = []
    for arm, choices in groups.items():
        averages = {choice: interval(list(scores(of_choice).values())) for choice, of_choice in choices.items()}
        best = max(averages, key=lambda choice: averages[choice].mean)
        for choice, of_choice in sorted(choices.items(), key=lambda item: item[1][0].settings.get(RATE) or 0.0):
            found.append(Tuned(arm, of_choice[0].settings, averages[choice], of_choice, choice == best))
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
    """The control whose best settings score highest on validation; `None` where none has validation lines."""
    found = [choice for choice in choices if choice.best and choice.arm in controls]
    return max(found, key=lambda choice: choice.average.mean).arm if found else None


def normalised_entropy(shares: Sequence[float]) -> float:
    """-sum p log p / log(experts): 1 where all experts get the same, 0 where one gets all; NaN of one expert."""
    return float(stats.entropy(shares) / math.log(len(shares))) if len(shares) > 1 else math.nan


def mutual_information(by_kind: Sequence[Sequence[float]]) -> float:
    """
    Between the kind of token and the expert, in bits; kinds (rows, shares of the experts) weigh equally.

    H(mean over kinds of p(expert | kind)) - mean over kinds of H(p(expert | kind)): 0 where every kind is sent alike,
    at most log2 of the fewer of kinds and experts.
    """
    rows = np.asarray(by_kind, dtype=float)
    return max(0.0, float(stats.entropy(rows.mean(axis=0), base=2) - stats.entropy(rows, base=2, axis=1).mean()))
