"""How the report writes numbers, tables and findings."""

import math
from collections.abc import Sequence

from benchmarks.replication.analysis import Interval, Paired


NONE = "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], nothing: str = "No runs yet.") -> str:
    if not rows:
        return nothing
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def points(value: float, sign: bool = False) -> str:
    """A share in percent; a difference in percentage points."""
    if not math.isfinite(value):
        return NONE if math.isnan(value) else "inf" if value > 0 else "-inf"
    text = f"{100 * value:{'+' if sign else ''}.1f}"
    return text if float(text) else "0.0"


def spanned(found: Interval | None, sign: bool = False) -> str:
    if found is None:
        return NONE
    bounds = f"[{points(found.low, sign)}, {points(found.high, sign)}]"
    return points(found.mean, sign) + (" (one seed)" if math.isnan(found.low) else f" {bounds}")


def probability(value: float) -> str:
    return NONE if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as `1-3, 7`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in spans)


def sentence(arm: str, rival: str, found: Paired | None, corrected: float = math.nan, count: int = 1) -> str:
    """A comparison in words; `corrected` is its p after Holm's correction for `count` comparisons."""
    if found is None:
        return f"`{arm}` and `{rival}` share no seed yet."
    gap, number = found.difference, len(found.seeds)
    if number == 1:
        return f"`{arm}` minus `{rival}` is {points(gap.mean, True)} on their only common seed, which shows nothing."
    tested = f"({number} seeds, p = {probability(found.p)})".replace("= <", "<")
    if found.verdict == "undecided":
        text = f"No difference shown between `{arm}` and `{rival}`: {spanned(gap, True)} {tested}"
        if not found.detectable:
            return f"{text}. The two are equal on every seed."
        return f"{text}. A difference of {points(found.detectable)} or more would have been found 4 times in 5."
    if found.verdict == "lost":
        arm, rival, gap = rival, arm, Interval(-gap.mean, -gap.high, -gap.low, gap.count)
    text = f"`{arm}` beats `{rival}` by {spanned(gap)} {tested}"
    if corrected >= 0.05:
        return f"{text}, but not after correction for {count} comparisons (Holm: p = {probability(corrected)})."
    return f"{text}."
