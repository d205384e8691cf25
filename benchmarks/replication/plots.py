"""Pictures of the report, each a matplotlib figure of runs by arm; `None` where there is nothing to draw."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.replication.analysis import RATE, SHARE, Paired, Run, Tuned, interval, varied


Runs = Mapping[str, Sequence[Run]]
MARKERS = "os^Dv<>Pp*hX"
COLOURS = colormaps["tab10"].colors  # type: ignore[attr-defined]
VERDICTS = {"won": "tab:green", "lost": "tab:red", "undecided": "tab:gray"}


def png(figure: Figure) -> bytes:
    """The same bytes for the same picture: no date, no version."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90, metadata={"Software": None})
    return stream.getvalue()


def accuracy_by_family(runs: Runs) -> Figure | None:
    """A panel for each family and the average; a point for each seed, a bar for the mean with its interval."""
    if not runs:
        return None
    families = list(next(iter(runs.values()))[0].accuracy)
    columns = min(4, len(families) + 1)
    rows = math.ceil((len(families) + 1) / columns)
    figure = Figure(figsize=(2 + 2.6 * columns, rows * (1 + 0.24 * len(runs))), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axis, family in zip(axes, ["average", *families], strict=False):
        for height, of_arm in enumerate(runs.values()):
            values = [100 * (run.average if family == "average" else run.accuracy[family]) for run in of_arm]
            axis.plot(values, [height] * len(values), "o", color=COLOURS[0], alpha=0.4, markersize=4)
            _bar(axis, height, *_ends(values), "black")
        axis.set_title(family, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    for axis in axes[len(families) + 1 :]:
        axis.set_axis_off()
    for axis in axes[::columns]:
        _arms_down(axis, list(runs))
    figure.supxlabel("exactly right, %", fontsize=10)
    return figure


def _ends(values: Sequence[float]) -> tuple[float, float, float]:
    found = interval(values)
    return found.mean, found.low, found.high


def _bar(axis, height: float, mean: float, low: float, high: float, colour: str) -> None:
    if math.isfinite(low):
        axis.plot([low, high], [height, height], color=colour, linewidth=1.2)
    axis.plot([mean], [height], "|", color=colour, markersize=9, markeredgewidth=2)


def _arms_down(axis, names: Sequence[str]) -> None:
    """The first arm on top."""
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)


def forest(comparisons: Sequence[tuple[str, Paired]]) -> Figure | None:
    """Paired differences of the averages with their intervals, the planned comparisons from top to bottom."""
    if not comparisons:
        return None
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(comparisons)), layout="constrained")
    axis = figure.subplots()
    for height, (_, found) in enumerate(comparisons):
        gap = found.difference
        _bar(axis, height, 100 * gap.mean, 100 * gap.low, 100 * gap.high, VERDICTS[found.verdict])
    _arms_down(axis, [name for name, _ in comparisons])
    axis.axvline(0, color="black", linewidth=0.8)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("difference of the averages, percentage points (95 %)")
    return figure


def _styles(names: Sequence[str]) -> dict[str, dict]:
    """Colour and marker of each arm: more arms than either has."""
    count = len(COLOURS)
    return {
        name: {"color": COLOURS[at % count], "marker": MARKERS[(at // count + at) % len(MARKERS)], "label": name}
        for at, name in enumerate(names)
    }


def _legend(figure: Figure, *axes) -> None:
    found = [axis.get_legend_handles_labels() for axis in axes]
    by_label = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    figure.legend(by_label.values(), by_label.keys(), loc="outside right upper", fontsize=8)


def probe_against_accuracy(runs: Runs) -> Figure | None:
    """A panel for each probe, a point for each run."""
    if not runs:
        return None
    names = list(next(iter(runs.values()))[0].probe)
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3 + 3 * columns, max(3 * rows, 1 + 0.22 * len(runs))), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axis, name in zip(axes, names, strict=False):
        for arm, style in _styles(list(runs)).items():
            across = [100 * run.probe[name] for run in runs[arm]]
            axis.scatter(across, [100 * run.average for run in runs[arm]], s=22, alpha=0.8, **style)
        axis.set_xlabel(f"probe: {name}, %")
        axis.grid(alpha=0.3)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    axes[0].set_ylabel("average, %")
    _legend(figure, axes[0])
    return figure


def alignment(runs: Runs) -> Figure | None:
    """Centred kernel alignment, arms x teachers, means over seeds; empty where an arm has none."""
    teachers = list(dict.fromkeys(name for of_arm in runs.values() for run in of_arm for name in run.cka))
    if not teachers:
        return None
    values = np.full((len(runs), len(teachers)), math.nan)
    for row, of_arm in enumerate(runs.values()):
        for column, name in enumerate(teachers):
            if found := [run.cka[name] for run in of_arm if name in run.cka]:
                values[row, column] = np.mean(found)
    figure = Figure(figsize=(2.5 + 1.1 * len(teachers), 1.2 + 0.3 * len(runs)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(values, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            colour = "black" if value > 0.6 else "white"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(teachers)), teachers, fontsize=9)
    _arms_down(axis, list(runs))
    figure.colorbar(image, label="CKA")
    return figure


def experts(runs: Runs) -> Figure | None:
    """
    Layers x experts, for all tokens and each kind of token: of the smallest seed of each arm that has several experts.

    One seed alone, since nothing makes the first expert of one seed the first of another.
    """
    first = {
        arm: min((run for run in of_arm if run.experts), key=lambda run: run.seed)
        for arm, of_arm in runs.items()
        if any(run.experts and len(run.experts["share"][0]) > 1 for run in of_arm)
    }
    if not first:
        return None
    kinds = list(dict.fromkeys(kind for run in first.values() for kind in (run.experts or {})["by_kind"]))
    columns = 1 + len(kinds)
    figure = Figure(figsize=(1.5 + 1.7 * columns, 0.6 + 1.7 * len(first)), layout="constrained")
    grid = figure.subplots(len(first), columns, squeeze=False)
    drawn = []
    for row, (arm, run) in zip(grid, first.items(), strict=True):
        use = run.experts or {}
        for axis, name in zip(row, ["all tokens", *kinds], strict=True):
            shares = use["share"] if name == "all tokens" else use["by_kind"].get(name)
            if shares is None:
                axis.set_axis_off()
                continue
            drawn.append(axis.imshow(shares, vmin=0, vmax=1, aspect="auto", cmap="viridis"))
            axis.set_xticks(range(len(shares[0])))
            axis.set_yticks(range(len(shares)))
            axis.tick_params(labelsize=7)
            axis.set_title(name, fontsize=9)
        row[0].set_ylabel(f"{arm}\nseed {run.seed}\nlayer", fontsize=8)
    figure.supxlabel("expert", fontsize=9)
    figure.colorbar(drawn[-1], ax=grid, label="share of the tokens")
    return figure


def cost(runs: Runs) -> Figure | None:
    """Seconds of a run against its average: means over seeds."""
    if not runs:
        return None
    figure = Figure(figsize=(8, max(4, 1 + 0.22 * len(runs))), layout="constrained")
    axis = figure.subplots()
    for arm, style in _styles(list(runs)).items():
        seconds = float(np.median([run.cost["seconds"] for run in runs[arm]]))
        axis.scatter([seconds], [100 * float(np.mean([run.average for run in runs[arm]]))], s=40, **style)
    axis.set_xlabel("seconds a run, median")
    axis.set_ylabel("average, %")
    axis.grid(alpha=0.3)
    _legend(figure, axis)
    return figure


def validation(choices: Sequence[Tuned]) -> Figure | None:
    """Validation average over the tower's learning rate, and over the first stage's share: a line for each arm."""
    tried = varied(choices)
    axes_of = {RATE: "learning rate of the vision tower", SHARE: "share of the steps in the first stage"}
    names = [name for name in axes_of if name in tried]
    if not names:
        return None
    styles = _styles(list(dict.fromkeys(arm for name in names for arm in tried[name])))
    figure = Figure(figsize=(1 + 5 * len(names), max(4, 1 + 0.22 * len(styles))), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for name, axis in zip(names, panels, strict=True):
        for arm in tried[name]:
            # The best of what else was tried with a value
            own = [choice for choice in choices if choice.arm == arm and choice.settings.get(name) is not None]
            best = {choice.settings[name]: choice for choice in sorted(own, key=lambda one: one.average.mean)}
            for value, choice in best.items():
                seeds = [100 * run.average for run in choice.runs]
                marker = {"marker": styles[arm]["marker"], "color": styles[arm]["color"]}
                axis.plot([value] * len(seeds), seeds, linestyle="", alpha=0.3, markersize=4, **marker)
            axis.plot(sorted(best), [100 * best[value].average.mean for value in sorted(best)], **styles[arm])
        axis.set_xlabel(axes_of[name])
        axis.grid(alpha=0.3)
        if name == RATE:
            axis.set_xscale("log")
    panels[0].set_ylabel("average on validation, %")
    _legend(figure, *panels)
    return figure
