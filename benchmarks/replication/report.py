"""
The report of the replication: `python -m benchmarks.replication.report`.

Writes `report.md` with its plots, and the same as one HTML page. Every number comes from `results.jsonl`: the tables
name the lines behind each row, the last section the commands that wrote the lines.
"""

import argparse
import base64
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from benchmarks.replication.recipes import EXPERIMENTS


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--experiment", choices=EXPERIMENTS, default="ablation")
    options.add_argument("--results", type=Path, default=None, help="JSON lines, one for each run")
    options.add_argument("--out", type=Path, default=None, help="folder that takes report.md and plots/")
    options.add_argument("--page", type=Path, default=None, help="HTML file to write")
    return options.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

import numpy as np

from benchmarks.replication import analysis, plots
from benchmarks.replication.analysis import Results, Run
from benchmarks.replication.wording import NONE, points, probability, ranges, sentence, spanned, table
from modeling_movekd.files import new_file


PAGES = Path("outputs/replication")
TITLE = "Replication in a small world"
ALONE = 0.99  # share of the tokens above which an expert counts as the only one
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:0 auto;padding:1rem;color:#222;
background:#fff}
table{display:block;overflow-x:auto;border-collapse:collapse;font-size:.85rem}
th,td{border-bottom:1px solid #ddd;padding:.25rem .6rem;text-align:left;white-space:nowrap}
img{max-width:100%;height:auto}code{background:#f3f3f3;padding:0 .2em}
h2{margin-top:2.5rem;border-bottom:2px solid #ddd}"""


def mean_of(runs: Sequence[Run], name: str, key: str) -> float:
    return float(np.mean([getattr(run, name)[key] for run in runs]))


def accuracy(results: Results) -> str:
    rows, group = [], None
    for name, levels in results.blind.items() if results.test else ():
        shares = [points(levels[family]) for family in results.families]
        rows.append(["", name, "", *shares, points(float(np.mean(list(levels.values())))), ""])
    for arm, runs in results.test.items():
        described = results.design.arms[arm]
        if described.group != group:
            group = described.group
            rows.append([f"**{group}**", *[""] * (len(results.families) + 4)])
        shares = [points(mean_of(runs, "accuracy", name)) for name in results.families]
        average = spanned(analysis.interval(list(results.averages[arm].values())))
        lines = ranges([run.line for run in runs])
        rows.append([f"`{arm}`", described.title, str(len(runs)), *shares, average, lines])
    text = table(["arm", "what it is", "seeds", *results.families, "average", "lines"], rows, "No test lines yet.")
    text += "\n\nNot all arms have the same seeds. The comparisons below are paired by seed." if rows else ""
    if absent := [f"`{arm}`" for arm in results.design.arms if arm not in results.test]:
        text += f"\n\nNot run on test: {', '.join(absent)}."
    return text


def comparisons(results: Results) -> str:
    planned = results.design.comparisons
    found = [results.compare(arm, rival) for arm, rival, _ in planned]
    corrected = analysis.holm([pair.p if pair else math.nan for pair in found])
    count = sum(not math.isnan(p) for p in corrected)
    rows, sentences = [], []
    for (arm, rival, question), pair, p in zip(planned, found, corrected, strict=True):
        sentences.append(f"- {question} {sentence(arm, rival, pair, p, count)}")
        if pair:
            tests = [probability(pair.p), probability(p), points(pair.detectable)]
            rows.append([f"`{arm}` - `{rival}`", spanned(pair.difference, True), str(len(pair.seeds)), *tests])
    note = (
        "Differences of the average over families, in percentage points, paired by seed. p is that of the paired t "
        f"test; Holm corrects it for the {count} comparisons that have two seeds or more. The last column is the "
        "difference that a test of as many seeds finds four times in five."
    )
    head = ["comparison", "difference", "seeds", "p", "Holm", "detectable"]
    return "\n\n".join(["\n".join(sentences), table(head, rows), note])


def families(results: Results) -> str:
    rows = []
    for arm in results.design.headline:
        for rival in results.design.controls:
            if arm in (*results.design.controls, results.design.upper) or not results.compare(arm, rival):
                continue
            cells = []
            for family in [*results.families, None]:
                if pair := results.compare(arm, rival, family):
                    verdict = "" if pair.verdict == "undecided" else f" {pair.verdict}"
                    cells.append(f"{spanned(pair.difference, True)}{verdict}")
            rows.append([f"`{arm}` - `{rival}`", *cells])
    note = (
        "Won or lost means that the interval lies above or below 0. Each cell is tested by itself, without correction "
        "for their number."
    )
    return "\n\n".join([note, table(["comparison", *results.families, "average"], rows)])


def closed(results: Results) -> str:
    upper, control = results.design.upper, results.control
    seen = {choice.arm for choice in results.tuned}
    unseen = ", ".join(f"`{name}`" for name in results.design.controls if name not in seen)
    if control is None:
        return "No control has validation lines, so none can be chosen as the best."
    rows = []
    for arm, scored in results.averages.items():
        if arm not in (upper, control):
            shares = [results.averages.get(other, {}) for other in (control, upper)]
            found = analysis.share_closed(scored, *shares)
            rows.append([f"`{arm}`", spanned(found), str(found.count) if found else NONE])
    note = (
        f"The best control by its average on validation, never on test, is `{control}`. The table shows how much (%) "
        f"of the distance from `{control}` to `{upper}` an arm closes, on the average over families, with Fieller's "
        "interval, over the seeds that all three have."
    )
    note += f" **Not candidates, for lack of validation lines:** {unseen}." if unseen else ""
    return "\n\n".join([note, table(["arm", "share closed, %", "seeds"], rows)])


def probes(results: Results) -> str:
    rows = []
    for arm, runs in results.test.items():
        cells = []
        for name in runs[0].probe:
            after, start = mean_of(runs, "probe", name), mean_of(runs, "probe_at_start", name)
            cells.append(f"{points(after)} ({points(after - start, True)})")
        rows.append([f"`{arm}`", str(len(runs)), *cells, f"{np.mean([run.drift for run in runs]):.3f}"])
    note = (
        "A linear probe reads each kind of label from the tower's tokens: percent right, and in brackets the gain "
        "over the CLIP that the tower started from. Drift is the squared distance of the tokens from that CLIP's, "
        "relative to their squared norm."
    )
    return "\n\n".join([note, table(["arm", "seeds", *results.runs[0].probe, "drift"], rows)])


def routers(results: Results) -> str:
    rows = []
    for arm, runs in results.test.items():
        shares = [share for run in runs if run.experts for share in run.experts["share"] if len(share) > 1]
        if shares:
            alone = sum(max(share) > ALONE for share in shares)
            rows.append([f"`{arm}`", str(len(runs)), f"{alone} of {len(shares)}"])
    note = f"Each layer of each seed has a router. One expert is alone if it gets more than {ALONE:.0%} of all tokens."
    return "\n\n".join([note, table(["arm", "seeds", "one expert alone"], rows, "No arm with experts was run.")])


def networks(results: Results) -> str:
    rows = []
    for name, scores in results.networks.items():
        cells = ", ".join(f"{kind} {points(value)}" for kind, value in scores.items() if kind != "seconds")
        rows.append([f"`{name}`", cells, f"{scores['seconds']:.0f}"])
    note = (
        "Runs start from these networks, trained once; with several sets, each seed has its set. The scores are "
        "percent right on scenes that were held out: the language model's answers to scenes in words, probes of "
        "CLIP's tokens, the teachers' own labels."
    )
    return "\n\n".join([note, table(["network", "scores", "seconds"], rows, "There are no scores of networks.")])


def costs(results: Results) -> str:
    rows = []
    for arm, runs in results.test.items():
        # A run beside other work takes longer, which a median disregards
        seconds = np.median([run.cost["seconds"] for run in runs])
        sizes = [f"{runs[0].cost[name] / 1e6:.2f}" for name in ("tower_parameters", "trained_parameters")]
        rows.append([f"`{arm}`", f"{seconds:.0f}", *sizes])
    return table(["arm", "seconds a run, median", "tower, M parameters", "trained, M parameters"], rows)


def schedules(results: Results) -> str:
    varied = analysis.varied(results.tuned)
    rows = []
    for choice in results.tuned:
        own = {name: choice.settings.get(name) for name in varied}
        edges = []
        for name, value in own.items():
            numbers = [tried for tried in varied[name].get(choice.arm, ()) if isinstance(tried, int | float)]
            if len(numbers) > 1 and value in (numbers[0], numbers[-1]):
                edges.append(f"`{name}`")
        best = ("yes, at the edge of " + ", ".join(edges) if edges else "yes") if choice.best else ""
        tested = choice.arm in results.test and results.test[choice.arm][0].settings == choice.settings
        cells = [NONE if value is None else str(value) for value in own.values()]
        seeds = ", ".join(points(run.average) for run in choice.runs)
        lines = ranges([run.line for run in choice.runs])
        rows.append([f"`{choice.arm}`", *cells, points(choice.average), seeds, best, "yes" if tested else "", lines])
    note = (
        "Each arm's schedule was chosen on these lines; none of them is a test line. At the edge: the best value is "
        "the smallest or the largest that was tried, so a better one may lie beyond. On test: the test lines have "
        "these settings. A learning rate that is not set is that of projector and heads."
    )
    head = ["arm", *(f"`{name}`" for name in varied), "average", "by seed", "best", "on test", "lines"]
    return "\n\n".join([note, table(head, rows, "No validation lines.")])


def sources(results: Results) -> str:
    lines: dict[tuple[str, str, str], list[int]] = {}
    for run in results.runs:
        lines.setdefault((run.command, run.commit, run.date), []).append(run.line)
    rows = [[ranges(numbers), f"`{command}`", commit, date] for (command, commit, date), numbers in lines.items()]
    note = "Each line of `results.jsonl` is one run and holds its arm, seed, settings and all that was measured."
    return "\n\n".join([note, table(["lines", "command", "commit", "date"], rows)])


def draw(results: Results) -> dict[str, bytes]:
    """PNGs by name, of all plots for which there are runs."""
    pairs = [(f"{arm} - {rival}", results.compare(arm, rival)) for arm, rival, _ in results.design.comparisons]
    figures = {
        "accuracy": plots.accuracy_by_family(results.test),
        "comparisons": plots.forest([(name, pair) for name, pair in pairs if pair]),
        "validation": plots.validation(results.tuned),
    }
    return {name: plots.png(figure) for name, figure in figures.items() if figure}


# Title, name of its plot, what writes it
SECTIONS: list[tuple[str, str, Callable[[Results], str]]] = [
    ("Accuracy", "accuracy", accuracy),
    ("Comparisons", "comparisons", comparisons),
    ("Families won and lost", "", families),
    ("Share of the distance closed", "", closed),
    ("Linear probes and drift", "", probes),
    ("Routers with a single expert", "", routers),
    ("Networks", "", networks),
    ("Cost", "", costs),
    ("Schedules tried on validation", "validation", schedules),
    ("Where the numbers come from", "", sources),
]


def markdown(results: Results, drawn: Collection[str]) -> str:
    """The report; its plots are in `plots/` beside it."""
    dates = sorted(run.date for run in results.runs)
    commits = sorted({run.commit for run in results.runs})
    tested = [seed for averages in results.averages.values() for seed in averages]
    asked = next((run.questions for run in results.runs if run.split == "test"), {})
    parts = [
        f"# {TITLE}",
        f"{len(results.runs)} runs, {len(tested)} of them scored on test ({len(set(tested))} seeds), {dates[0]} to "
        f"{dates[-1]}, commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}. Accuracies are percent of "
        "exactly right answers, as means over seeds with 95 % t intervals in square brackets. All numbers are "
        "computed from `results.jsonl`; the column `lines` names its lines. Questions of a test run: "
        + (", ".join(f"{name} {number}" for name, number in asked.items()) or "none yet")
        + ".",
    ]
    for title, plot, write_section in SECTIONS:
        parts += [f"## {title}", write_section(results)]
        if plot in drawn:
            parts.append(f"![{title}](plots/{plot}.png)")
    return "\n\n".join(parts) + "\n"


def html(text: str, drawn: Mapping[str, bytes]) -> str:
    """The Markdown as one HTML file that holds its plots."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for name, plot in drawn.items():
        inside = f"data:image/png;base64,{base64.b64encode(plot).decode()}"
        body = body.replace(f'src="plots/{name}.png"', f'src="{inside}"')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head += f"<title>{TITLE}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def write_report(results: Results, folder: Path, page: Path) -> None:
    """`report.md` and `plots/*.png` in `folder`, and the HTML page; plots for which no runs are left are removed."""
    drawn = draw(results)
    text = markdown(results, drawn)
    files = {folder / "plots" / f"{name}.png": plot for name, plot in drawn.items()}
    files |= {folder / "report.md": text.encode(), page: html(text, drawn).encode()}
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as temporary:
            temporary.write_bytes(content)
    for name in {plot for _, plot, _ in SECTIONS if plot} - set(drawn):
        (folder / "plots" / f"{name}.png").unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    from benchmarks.replication.runs import Scale, pictures_seed
    from benchmarks.replication.world import blind_levels

    chosen = parse_arguments(arguments)
    design = EXPERIMENTS[chosen.experiment]
    lines, out = chosen.results or design.folder / "results.jsonl", chosen.out or design.folder
    page = chosen.page or PAGES / f"{chosen.experiment}.html"
    try:
        blind = blind_levels(Scale().test, pictures_seed("test", design.networks[0]))
        networks = json.loads(lines.with_name("networks.json").read_text())
        write_report(Results(analysis.read_runs(lines), design, networks, blind), out, page)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
    print(out / "report.md", page, sep="\n")


if __name__ == "__main__":
    main()
