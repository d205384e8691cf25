"""The statistics against answers by hand, the lines that are refused, and a report whose numbers are known."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.replication import analysis
from benchmarks.replication.analysis import Results
from benchmarks.replication.design import Arm, Experiment
from benchmarks.replication.report import routers, schedules, write_report
from benchmarks.replication.wording import points, probability, ranges, sentence, spanned, table


def fields(arm: str = "ours", seed: Any = 1, split: str = "test", **changes: Any) -> dict[str, Any]:
    """The object of one line."""
    command = f"python -m benchmarks.replication --arms {arm} --seeds {seed}"
    whole = {"arm": arm, "seed": seed, "split": split, "command": command, "commit": "abc1234", "date": "2026-11-22"}
    whole |= {"settings": {}, "accuracy": {"read": 0.25, "count": 0.75}, "questions": {"read": 400, "count": 500}}
    whole |= {"probe": {"shape": 0.9, "digit": 0.7}, "probe_at_start": {"shape": 0.8, "digit": 0.75}}
    whole |= {"cka": {"clip": 0.9, "detector": 0.6}, "experts": None, "drift": 0.125}
    whole |= {"cost": {"seconds": 55.0, "tower_parameters": 672000, "trained_parameters": 1700000}}
    return whole | changes


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def runs_of(*lines: dict[str, Any]) -> list[analysis.Run]:
    return [analysis.parse_run(line, number) for number, line in enumerate(lines, 1)]


def test_interval_of_the_mean() -> None:
    found = analysis.interval([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)  # t(0.975, 2) from the table; the standard deviation is 1
    assert (found.mean, found.count) == (2.0, 3)
    assert (found.low, found.high) == (pytest.approx(2 - half, abs=1e-6), pytest.approx(2 + half, abs=1e-6))
    assert math.isnan(analysis.interval([0.5]).low) and math.isnan(analysis.interval([0.5]).high)


@pytest.mark.parametrize("count", [3, 8])
def test_a_detectable_difference_is_found_four_times_in_five(count: int) -> None:
    smallest = analysis.detectable_difference(2.0, count)
    drawn = np.random.default_rng(0).normal(smallest, 2.0, size=(40_000, count))
    assert (stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)


def test_a_detectable_difference_shrinks_with_seeds_and_grows_with_spread() -> None:
    by_count = [analysis.detectable_difference(1.0, count) for count in range(2, 21)]
    assert by_count == sorted(by_count, reverse=True) and all(math.isfinite(value) for value in by_count)
    assert analysis.detectable_difference(3.0, 5) == pytest.approx(3 * analysis.detectable_difference(1.0, 5))


def test_holm_by_hand() -> None:
    assert analysis.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert analysis.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    untested = analysis.holm([math.nan, 0.02])
    assert math.isnan(untested[0]) and untested[1] == pytest.approx(0.02)


def test_pairs_are_of_the_seeds_of_both() -> None:
    found = analysis.compare({1: 0.5, 2: 0.6, 3: 0.4, 9: 0.0}, {1: 0.4, 2: 0.4, 3: 0.4, 7: 1.0})
    assert found is not None and found.seeds == [1, 2, 3]
    assert found.difference.mean == pytest.approx(0.1) and found.verdict == "undecided"
    assert analysis.compare({1: 0.5}, {2: 0.5}) is None
    alone = analysis.compare({1: 0.5}, {1: 0.25})
    assert alone is not None and alone.difference.mean == 0.25 and alone.verdict == "undecided"
    assert math.isnan(alone.p) and math.isnan(alone.detectable)


def test_equal_differences_are_equal_in_the_last_bit_too() -> None:
    found = analysis.compare({1: 0.1 + 0.2, 2: 0.3}, {1: 0.3, 2: 0.1 + 0.2})
    assert found is not None and found.p == 1.0 and found.verdict == "undecided" and found.detectable == 0.0


def test_the_interval_and_the_t_test_agree() -> None:
    generator, verdicts = np.random.default_rng(1), set()
    for _ in range(60):
        ours, rival = (dict(enumerate(generator.uniform(0, 1, 4))) for _ in range(2))
        found = analysis.compare(ours, {seed: value - 0.3 for seed, value in rival.items()})
        assert found is not None and (found.p < 0.05) == (found.verdict != "undecided")
        verdicts.add(found.verdict)
    assert verdicts == {"won", "undecided"}


def test_families_won_and_lost() -> None:
    ours, rival, asked = [], [], {"read": 400, "count": 500, "size": 500}
    for seed, noise in enumerate((-0.01, 0.0, 0.01)):
        ours.append(fields("ours", seed, accuracy=dict.fromkeys(asked, 0.5 + noise), questions=asked))
        rival.append(fields("rival", seed, accuracy={"read": 0.3, "count": 0.7, "size": 0.5}, questions=asked))
    arms = {name: Arm(name, "", name) for name in ("ours", "rival")}
    results = Results(runs_of(*ours, *rival), Experiment(arms, [], [], "ours", []))
    found = [pair for family in asked if (pair := results.compare("ours", "rival", family))]
    assert [pair.verdict for pair in found] == ["won", "lost", "undecided"]
    assert [pair.difference.mean for pair in found] == pytest.approx([0.2, -0.2, 0.0])


def test_share_closed_over_a_distance_without_spread_is_the_t_interval_over_it() -> None:
    control = {1: 0.1, 2: 0.2, 3: 0.3, 5: 0.9}
    upper = {seed: value + 0.5 for seed, value in control.items()}
    ours = {1: 0.1 + 0.1, 2: 0.2 + 0.2, 3: 0.3 + 0.3, 4: 1.0}
    found, gain = analysis.share_closed(ours, control, upper), analysis.interval([0.1, 0.2, 0.3])
    assert found is not None and found.count == 3
    assert (found.mean, found.low, found.high) == pytest.approx((0.4, gain.low / 0.5, gain.high / 0.5))


def test_share_closed_in_the_same_proportion_on_every_seed_is_certain() -> None:
    control, upper = {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.2}, {1: 0.8, 2: 0.9, 3: 0.7, 4: 1.0}
    found = analysis.share_closed({s: control[s] + 0.75 * (upper[s] - control[s]) for s in control}, control, upper)
    assert found is not None and (found.mean, found.low, found.high) == pytest.approx((0.75, 0.75, 0.75), abs=1e-6)


def test_the_bounds_of_the_share_are_where_a_t_test_turns() -> None:
    generator = np.random.default_rng(2)
    gains, distances = generator.normal(0.3, 0.05, 6), generator.normal(0.6, 0.1, 6)
    zero = dict.fromkeys(range(6), 0.0)
    found = analysis.share_closed(dict(enumerate(gains)), zero, dict(enumerate(distances)))
    assert found is not None and found.low < found.mean < found.high
    for bound in (found.low, found.high):
        assert stats.ttest_1samp(gains - bound * distances, 0).pvalue == pytest.approx(0.05)


def test_no_share_of_a_distance_that_is_not_there() -> None:
    zero = {1: 0.0, 2: 0.0, 3: 0.0}
    assert analysis.share_closed({1: 0.1, 2: 0.1, 3: 0.1}, zero, {1: -0.1, 2: -0.1, 3: 0.1}) is None
    assert analysis.share_closed({1: 0.1}, zero, {2: 0.5}) is None
    unsure = analysis.share_closed({1: 0.1, 2: 0.2, 3: 0.1}, zero, {1: -0.4, 2: 0.1, 3: 0.9})
    assert unsure is not None and (unsure.low, unsure.high) == (-math.inf, math.inf)
    alone = analysis.share_closed({1: 0.1}, zero, {1: 0.4})
    assert alone and alone.mean == pytest.approx(0.25) and math.isnan(alone.low)


def test_the_best_control_is_the_best_on_validation() -> None:
    def line(arm: str, split: str, level: float, **settings: float) -> dict[str, Any]:
        return fields(arm, split=split, accuracy={"read": level, "count": level}, settings=settings)

    rate = analysis.RATE
    runs = runs_of(
        line("frozen", "test", 0.9),
        line("tuned", "test", 0.1, **{rate: 1e-3}),
        line("tuned", "validation", 0.6, **{rate: 1e-3}),
        line("tuned", "validation", 0.4, **{rate: 1e-4}),
        line("frozen", "validation", 0.5),
        line("ours", "validation", 0.8),
    )
    analysis.check_together(runs)
    choices = analysis.tuned(runs)
    told = [(choice.arm, choice.settings.get(rate), choice.average, choice.best) for choice in choices]
    at_rates = [("tuned", 1e-4, 0.4, False), ("tuned", 1e-3, 0.6, True)]
    assert told == [*at_rates, ("frozen", None, 0.5, True), ("ours", None, 0.8, True)]
    assert analysis.best_control(choices, ["frozen", "tuned"]) == "tuned"
    assert analysis.best_control(analysis.tuned(runs[:2]), ["frozen", "tuned"]) is None
    assert analysis.varied(choices) == {rate: {"tuned": [1e-4, 1e-3]}}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in fields(seed=2).items() if name != key}


REFUSED: list[tuple[dict[str, Any], str]] = [
    (fields(), "Lines 1 and 3 are both arm ours, seed 1, split test"),
    (without("probe"), "Line 3 has no probe"),
    (without("experts"), "Line 3 has no experts"),
    (fields(seed=2, settings={"lora_rank": 8}), "Lines 1 and 3 are both arm ours on test, with different settings"),
    (fields("rival", questions={"read": 40, "count": 50}), "Lines 1 and 3 were measured on different questions"),
    (
        fields(seed=2, probe={"shape": 1.0}, probe_at_start={"shape": 1.0}),
        "Lines 1 and 3 were measured on different .* or probes",
    ),
    (
        fields(seed=2, accuracy={"read": 0.5, "size": 0.5}, questions={"read": 400, "size": 500}),
        "Lines 1 and 3 were measured on .*two worlds",
    ),
]


@pytest.mark.parametrize(("line", "what"), REFUSED, ids=[what[:40] for _, what in REFUSED])
def test_a_line_that_does_not_belong_is_refused_by_its_number(line: dict[str, Any], what: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "results.jsonl", [fields()])
    path.write_text(path.read_text() + "\n" + json.dumps(line) + "\n")  # an empty line between: numbers are the file's
    with pytest.raises(ValueError, match=what):
        analysis.read_runs(path)


def test_half_a_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(fields()) + "\n" + json.dumps(fields(seed=2))[:-20])
    with pytest.raises(ValueError, match="Line 2 of .* is not JSON"):
        analysis.read_runs(path)


def test_validation_lines_are_one_arm_at_several_settings(tmp_path: Path) -> None:
    lines = [fields(), *(fields(split="validation", settings={analysis.RATE: rate}) for rate in (1e-4, 1e-3))]
    path = write_lines(tmp_path / "results.jsonl", lines)
    assert [run.split for run in analysis.read_runs(path)] == ["test", "validation", "validation"]
    write_lines(path, [*lines, lines[1]])
    with pytest.raises(ValueError, match="Lines 2 and 4 are both arm ours, seed 1, split validation"):
        analysis.read_runs(path)


def test_numbers_in_words() -> None:
    assert [points(0.1234), points(0.1234, True), points(-0.0001, True)] == ["12.3", "+12.3", "0.0"]
    assert spanned(analysis.Interval(0.5, 0.4, 0.6, 3)) == "50.0 [40.0, 60.0]"
    assert spanned(analysis.interval([0.5])) == "50.0 (one seed)" and spanned(None) == "–"
    assert (probability(0.0001), probability(0.0625), probability(math.nan)) == ("< 0.001", "0.062", "–")
    assert ranges([7, 1, 2, 3]) == "1-3, 7"
    assert table(["a"], [["x|y"]]) == "| a |\n| --- |\n| x\\|y |" and table(["a"], []) == "No runs yet."


def test_a_finding_in_words() -> None:
    level = {1: 0.50, 2: 0.50, 3: 0.50}
    clear = analysis.compare({1: 0.60, 2: 0.61, 3: 0.62}, level)
    won = "`a` beats `b` by 11.0 [8.5, 13.5] (3 seeds, p = 0.003)"
    assert sentence("a", "b", clear, 0.01, 9) == f"{won}."
    corrected = "but not after correction for 9 comparisons (Holm: p = 0.090)."
    assert sentence("a", "b", clear, 0.09, 9) == f"{won}, {corrected}"
    lost = analysis.compare(level, {1: 0.60, 2: 0.61, 3: 0.62})
    assert sentence("b", "a", lost, 0.01, 9) == f"{won}."
    unclear = analysis.compare({1: 0.60, 2: 0.50, 3: 0.43}, level)
    told = sentence("a", "b", unclear)
    assert told.startswith("No difference shown between `a` and `b`: +1.0 [-20.2, +22.2] (3 seeds, p = 0.858). ")
    assert told.endswith("A difference of 27.9 or more would have been found 4 times in 5.")
    assert sentence("a", "b", analysis.compare(level, level)).endswith("The two are equal on every seed.")
    assert "share no seed" in sentence("a", "b", None)
    assert "shows nothing" in sentence("a", "b", analysis.compare({1: 0.6}, level))


ARMS = {
    "frozen": Arm("no KD, frozen", "controls", "frozen"),
    "tuned": Arm("no KD, own rate", "controls", "tuned"),
    "ours": Arm("KD | heads", "student-side ladder", "ours"),
    "later": Arm("not run yet", "student-side ladder", "later"),
    "encoders": Arm("all encoders", "upper reference", "encoders"),
}
ASKED = [("ours", "tuned", "Does KD help?"), ("tuned", "frozen", "Does training help?"), ("later", "ours", "More?")]
BLIND = {"a constant": {"read": 0.125, "count": 0.25}}
DESIGN = Experiment(ARMS, ["tuned", "ours"], ["frozen", "tuned"], upper="encoders", comparisons=ASKED)
NETWORKS = {"clip": {"shape": 0.984, "seconds": 812.9}}


def lines_of_a_report() -> list[dict[str, Any]]:
    """Of four seeds, `ours` is better than `tuned` at reading by 10, 12, 14, 16 points and worse at counting by 2."""
    rate = {analysis.RATE: 1e-3}
    lines = [
        fields("tuned", 7, "validation", accuracy={"read": 0.2, "count": level}, settings={analysis.RATE: other})
        for other, level in ((1e-4, 0.1), (3e-4, 0.3), (1e-3, 0.5))
    ]
    unset: dict[str, Any] = {"settings": {analysis.RATE: None}}
    lines.append(fields("frozen", 7, "validation", accuracy={"read": 0.1, "count": 0.4}, **unset))
    for seed, gain in enumerate((0.10, 0.12, 0.14, 0.16), 1):
        read = 0.201 + 0.01 * seed
        experts = {"share": [[0.75, 0.25]]}
        lines += [
            fields("frozen", seed, accuracy={"read": read + 0.01 * (-1) ** seed, "count": 0.50}),
            fields("tuned", seed, accuracy={"read": read, "count": 0.50}, settings=rate),
            fields("ours", seed, accuracy={"read": read + gain, "count": 0.48}, settings=rate, experts=experts),
            fields("encoders", seed, accuracy={"read": read + 0.11, "count": 0.61}, cka={}),
        ]
    return lines


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    results = write_lines(folder / "results.jsonl", lines_of_a_report())
    write_report(
        Results(analysis.read_runs(results), DESIGN, NETWORKS, BLIND), folder, folder / "outputs" / "report.html"
    )
    return folder


def sections(folder: Path) -> dict[str, str]:
    return dict(part.split("\n", 1) for part in (folder / "report.md").read_text().split("\n## "))


def test_the_tables_hold_the_known_numbers(written: Path) -> None:
    accuracy = (found := sections(written))["Accuracy"]
    # Of 0.3955, 0.4105, 0.4255, 0.4405: 3.182446 * 0.0193649 / 2 = 0.0308. An unescaped | would end the title's cell
    assert "| `ours` | KD \\| heads | 4 | 35.6 | 48.0 | 41.8 [38.7, 44.9] | 7, 11, 15, 19 |" in accuracy
    assert "|  | a constant |  | 12.5 | 25.0 | 18.8 |  |" in accuracy
    assert "| `clip` | shape 98.4 | 813 |" in found["Networks"]
    assert "Not run on test: `later`." in accuracy and "| **controls** |" in accuracy
    compared = found["Comparisons"]
    # Half of read and count: 4, 5, 6, 7 points; 3.182446 * 1.290994 / 2 = 2.054
    assert "Does KD help? `ours` beats `tuned` by 5.5 [3.4, 7.6] (4 seeds, p = 0.003)." in compared
    assert "| `ours` - `tuned` | +5.5 [+3.4, +7.6] | 4 | 0.003 | 0.007 | 2.7 |" in compared
    assert "Does training help? No difference shown between `tuned` and `frozen`: 0.0 [" in compared
    assert "More? `later` and `ours` share no seed yet." in compared
    families = found["Families won and lost"]
    # Reading: 10, 12, 14, 16 points, 3.182446 * 2.581989 / 2 = 4.1
    won, lost = "+13.0 [+8.9, +17.1] won", "-2.0 [-2.0, -2.0] lost"
    assert f"| `ours` - `tuned` | {won} | {lost} | +5.5 [+3.4, +7.6] won |" in families
    assert "`tuned` - `frozen`" not in families  # the others are compared with the controls
    closed = found["Share of the distance closed"]
    assert "The best control by its average on validation, never on test, is `tuned`." in closed
    assert "| `ours` | 50.0 [31.3, 68.7] | 4 |" in closed and "| `encoders` |" not in closed
    assert "| `ours` | 4 | 90.0 (+10.0) | 70.0 (-5.0) | 0.125 |" in found["Linear probes and drift"]
    assert "| `ours` | 4 | 0 of 4 |" in found["Routers with a single expert"]
    assert "| `tuned` | 55 | 0.67 | 1.70 |" in found["Cost"]
    tuned = found["Schedules tried on validation"]
    assert "| arm | `vision_tower_learning_rate` | average |" in tuned
    assert "| `tuned` | 0.0003 | 25.0 | 25.0 |  |  | 2 |\n" in tuned
    assert "| `frozen` | – | 25.0 | 25.0 | yes |  | 4 |" in tuned
    edge = "yes, at the edge of `vision_tower_learning_rate`"
    assert f"| `tuned` | 0.001 | 35.0 | 35.0 | {edge} | yes | 3 |" in tuned
    sources = found["Where the numbers come from"]
    commands: dict[str, list[int]] = {}
    for number, line in enumerate(lines_of_a_report(), 1):
        commands.setdefault(line["command"], []).append(number)
    assert commands["python -m benchmarks.replication --arms tuned --seeds 7"] == [1, 2, 3]
    for command, numbers in commands.items():
        assert f"| {ranges(numbers)} | `{command}` | abc1234 | 2026-11-22 |" in sources


def test_a_choice_of_words_has_no_edge() -> None:
    forms = [{"head_form": form, "lambda_kd": weight} for form, weight in (("mlp", 1.0), ("linear", 4.0), (None, 2.0))]
    lines = [fields(seed=seed, split="validation", settings=form) for seed, form in enumerate(forms)]
    lines[0]["accuracy"] = {"read": 0.5, "count": 0.8}
    rows = schedules(Results(runs_of(*lines), DESIGN)).splitlines()[-3:]
    assert rows[0].startswith("| `ours` | mlp | 1.0 |") and "| yes, at the edge of `lambda_kd` |" in rows[0]
    assert rows[2].startswith("| `ours` | – | 2.0 |")


def test_a_router_that_gives_one_expert_all_is_counted() -> None:
    shares = ([[0.999, 0.001], [0.5, 0.5]], [[0.6, 0.4], [0.3, 0.7]])
    lines = [fields(seed=seed, experts={"share": share}) for seed, share in enumerate(shares)]
    text = routers(Results(runs_of(*lines), DESIGN))
    assert text.splitlines()[-1].endswith("| 1 of 4 |")


def test_the_page_needs_no_other_file(written: Path) -> None:
    page = (written / "outputs" / "report.html").read_text()
    pictures = sorted((written / "plots").glob("*.png"))
    assert [picture.stem for picture in pictures] == ["accuracy", "comparisons", "validation"]
    assert "http" not in page and "plots/" not in page and "viewport" in page
    assert page.count('src="data:image/png;base64,iVBOR') == len(pictures) == page.count("<img")
    assert page.count("<table>") == 10 and "5.5 [3.4, 7.6] (4 seeds" in page
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert not list(written.rglob(".tmp-*"))


def test_a_report_of_validation_alone_and_pictures_that_go(written: Path, tmp_path: Path) -> None:
    results = write_lines(tmp_path / "results.jsonl", lines_of_a_report()[:3])
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "accuracy.png").write_bytes((written / "plots" / "accuracy.png").read_bytes())
    write_report(Results(analysis.read_runs(results), DESIGN), tmp_path, tmp_path / "report.html")
    found = sections(tmp_path)
    assert "No test lines yet." in found["Accuracy"] and "![" not in found["Accuracy"]
    closed = found["Share of the distance closed"]
    assert "**Not candidates, for lack of validation lines:** `frozen`." in closed
    assert [picture.stem for picture in (tmp_path / "plots").iterdir()] == ["validation"]


def test_what_has_no_description_is_not_reported() -> None:
    with pytest.raises(ValueError, match="Line 2: arm 'stranger'"):
        Results(runs_of(fields("ours"), fields("stranger")), DESIGN)
    with pytest.raises(ValueError, match="no runs to report"):
        Results([], DESIGN)
