"""Plots of the report, each a matplotlib figure; `None` if there is nothing to draw."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.replication.analysis import RATE, SHARE, Paired, Run, Tuned, interval, varied


MARKERS = "os^Dv<>Pp*hX"
COLORS = colormaps["tab10"].colors  # type: ignore[attr-defined]
VERDICTS = {"won": "tab:green", "lost": "tab:red", "undecided": "tab:gray"}


def png(figure: Figure) -> bytes:
    """Without date and version, so that the same figure gives the same bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90, metadata={"Software": None})
    return stream.getvalue()


def accuracy_by_family(runs: Mapping[str, Sequence[Run]]) -> Figure | None:
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
            axis.plot(values, [height] * len(values), "o", color=COLORS[0], alpha=0.4, markersize=4)
            found = interval(values)
            _bar(axis, height, found.mean, found.low, found.high, "black")
        axis.set_title(family, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    for axis in axes[len(families) + 1 :]:
        axis.set_axis_off()
    for axis in axes[::columns]:
        _arms_down(axis, list(runs))
    figure.supxlabel("exactly right, %", fontsize=10)
    return figure


def _bar(axis, height: float, mean: float, low: float, high: float, color: str) -> None:
    if math.isfinite(low):
        axis.plot([low, high], [height, height], color=color, linewidth=1.2)
    axis.plot([mean], [height], "|", color=color, markersize=9, markeredgewidth=2)


def _arms_down(axis, names: Sequence[str]) -> None:
    """The first arm on top."""
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)


def forest(comparisons: Sequence[tuple[str, Paired]]) -> Figure | None:
    """Paired differences of the averages with their intervals, in the order of the plan."""
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


def validation(choices: Sequence[Tuned]) -> Figure | None:
    """Validation average over the tower's learning rate, and over the first stage's share: a line for each arm."""
    tried = varied(choices)
    labels = {RATE: "learning rate of the vision tower", SHARE: "share of the steps in the first stage"}
    names = [name for name in labels if name in tried]
    if not names:
        return None
    arms = list(dict.fromkeys(arm for name in names for arm in tried[name]))
    figure = Figure(figsize=(1 + 5 * len(names), max(4, 1 + 0.22 * len(arms))), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for name, axis in zip(names, panels, strict=True):
        for arm in tried[name]:
            at = arms.index(arm)
            # More arms than there are colors or markers
            style = {
                "color": COLORS[at % len(COLORS)],
                "marker": MARKERS[(at // len(COLORS) + at) % len(MARKERS)],
            }
            # For each value, the best of the choices that have it
            own = [choice for choice in choices if choice.arm == arm and choice.settings.get(name) is not None]
            best = {choice.settings[name]: choice for choice in sorted(own, key=lambda one: one.average)}
            for value, choice in best.items():
                seeds = [100 * run.average for run in choice.runs]
                axis.plot([value] * len(seeds), seeds, linestyle="", alpha=0.3, markersize=4, **style)
            axis.plot(sorted(best), [100 * best[value].average for value in sorted(best)], label=arm, **style)
        axis.set_xlabel(labels[name])
        axis.grid(alpha=0.3)
        if name == RATE:
            axis.set_xscale("log")
    panels[0].set_ylabel("average on validation, %")
    handles: dict[str, Any] = {}
    for axis in panels:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=8)
    return figure
