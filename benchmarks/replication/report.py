"""
The report of the replication, Markdown and HTML, from its JSON lines: `python -m benchmarks.replication.report`.

Every number comes from `results.jsonl`: the main table names the lines behind each row, the last section what made
them.
"""

import argparse
import base64
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.replication import analysis, plots
from benchmarks.replication.analysis import Run
from benchmarks.replication.design import Design, Results
from benchmarks.replication.wording import NONE, points, probability, ranges, sentence, spanned, table


FOLDER = Path(__file__).resolve().parent
TITLE = "Replication in a small world"
ALONE = 0.99  # share of the tokens above which an expert is alone
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:0 auto;padding:1rem;color:#222;
background:#fff}
table{display:block;overflow-x:auto;border-collapse:collapse;font-size:.85rem}
th,td{border-bottom:1px solid #ddd;padding:.25rem .6rem;text-align:left;white-space:nowrap}
img{max-width:100%;height:auto}code{background:#f3f3f3;padding:0 .2em}
h2{margin-top:2.5rem;border-bottom:2px solid #ddd}"""


def mean_of(runs: Sequence[Run], name: str, key: str) -> float:
    """Over the runs that have the key; NaN where none has."""
    values = [getattr(run, name)[key] for run in runs if key in getattr(run, name)]
    return float(np.mean(values)) if values else math.nan


def main_table(results: Results) -> str:
    rows, group = [], None
    for name, levels in results.design.blind.items() if results.test else ():
        shares = [points(levels.get(family, math.nan)) for family in results.families]
        whole = set(levels) == set(results.families)
        average = points(float(np.mean(list(levels.values())))) if whole else NONE
        rows.append(["", name, "", *shares, average, ""])
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
    text += "\n\nRows may be of different seeds; what follows is paired by seed." if rows else ""
    if absent := [f"`{arm}`" for arm in results.design.arms if arm not in results.test]:
        text += f"\n\nNot run on test: {', '.join(absent)}."
    return text


def comparisons(results: Results) -> str:
    planned = results.design.comparisons
    found = [results.compare(arm, rival) for arm, rival, _ in planned]
    exact = analysis.holm([pair.exact_p if pair else math.nan for pair in found])
    t_test = analysis.holm([pair.t_p if pair else math.nan for pair in found])
    count = sum(not math.isnan(p) for p in t_test)
    rows, told = [], []
    for (arm, rival, asks), pair, exact_p, t_p in zip(planned, found, exact, t_test, strict=True):
        told.append(f"- {asks.rstrip('.?')}? {sentence(arm, rival, pair, t_p, count)}")
        if pair:
            seeds = [str(len(pair.seeds)), f"{pair.ahead} / {pair.behind}"]
            tests = [probability(p) for p in (pair.t_p, t_p, pair.exact_p, exact_p)]
            smallest = points(pair.detectable)
            rows.append([f"`{arm}` - `{rival}`", spanned(pair.difference, True), *seeds, *tests, smallest])
    head = ["comparison", "difference", "seeds", "ahead / behind", "t test p", "Holm", "sign flips p", "Holm"]
    note = (
        f"Average over families, percentage points, paired by seed. Holm corrects for the {count} comparisons that "
        "have two seeds or more. n seeds have 2^n signs, so that the exact p of sign flips cannot be below 2 / 2^n "
        "(5 seeds: 0.0625, 8: 0.0078): words and p above are of the t test, as the interval is, and say where the "
        "correction takes them back. The last column is the difference found with power 0.8."
    )
    return "\n\n".join(["\n".join(told), table([*head, "detectable"], rows), note])


def families(results: Results) -> str:
    rows, told = [], []
    headline = [arm for arm in results.design.headline if arm not in results.design.controls]
    for arm in dict.fromkeys([*headline, results.design.upper]):
        for rival in results.design.controls:
            if not results.compare(arm, rival):
                continue
            found = analysis.compare_families(results.test[arm], results.test[rival])
            cells = {
                name: f"{spanned(pair.difference, True)}{'' if pair.verdict == 'undecided' else ' ' + pair.verdict}"
                for name, pair in found.items()
                if pair
            }
            rows.append([f"`{arm}` - `{rival}`", *(cells.get(name, NONE) for name in results.families)])
            by_verdict = {
                verdict: ", ".join(name for name, pair in found.items() if pair and pair.verdict == verdict) or "none"
                for verdict in ("won", "undecided", "lost")
            }
            worst, least = min(((pair.difference.low, name) for name, pair in found.items() if pair))[::-1]
            allowed = (
                "" if math.isnan(least) else f" The intervals allow {points(least, True)} at the worst ({worst})."
            )
            parts = "; ".join(f"{verdict}: {names}" for verdict, names in by_verdict.items())
            told.append(f"- `{arm}` against `{rival}`: {parts}.{allowed}")
    note = (
        "Won or lost where the interval lies above or below 0; each family by itself, not corrected for their number."
    )
    return "\n\n".join([note, "\n".join(told), table(["comparison", *results.families], rows)])


def closed(results: Results) -> str:
    upper, control = results.design.upper, results.control
    if control:
        chosen = f"The best control by its average on validation, never on test, is `{control}`."
    else:
        chosen = "No control has validation lines, so that none is called the best: test may not choose it."
    seen = {choice.arm for choice in results.tuned}
    unseen = ", ".join(f"`{name}`" for name in results.design.controls if name not in seen)
    if control and unseen:
        chosen += f" **Controls without validation lines, which could not be chosen:** {unseen}."
    order = sorted(results.design.controls, key=lambda name: name != control)
    rows, told = [], []
    for arm, scored in results.averages.items():
        cells = []
        for name in order:
            shares = [results.averages.get(other, {}) for other in (name, upper)]
            found = analysis.share_closed(scored, *shares) if arm not in (name, upper) else None
            cells.append(f"{spanned(found)} ({found.count})" if found and found.count > 1 else spanned(found))
            if found and found.count > 1 and name == control and arm in results.design.headline:
                share = f"{spanned(found)} % of the distance from `{name}` to `{upper}` ({found.count} seeds)"
                told.append(f"- `{arm}` closes {share}.")
        if arm != upper:
            rows.append([f"`{arm}`", *cells])
    note = (
        f"Share (%) of the distance from each control to `{upper}` that an arm closes, on the average over families, "
        "with Fieller's interval; in brackets the seeds that all three have. Infinite bounds: the distance itself is "
        f"not shown to differ from 0. {chosen}"
    )
    return "\n\n".join(
        [note, *filter(None, ["\n".join(told)]), table(["arm", *(f"from `{name}`" for name in order)], rows)]
    )


def probes(results: Results) -> str:
    rows = []
    for arm, runs in results.test.items():
        cells = []
        for name in runs[0].probe:
            after = mean_of(runs, "probe", name)
            start = mean_of(runs, "probe_at_start", name)
            cells.append(f"{points(after)} ({points(after - start, True)})")
        rows.append([f"`{arm}`", str(len(runs)), *cells])
    note = "Linear probe of the tower's tokens (%), and how far that is from the CLIP it started as."
    return "\n\n".join([note, table(["arm", "seeds", *results.runs[0].probe], rows)])


def union(results: Results, name: str) -> list[str]:
    return list(dict.fromkeys(key for runs in results.test.values() for run in runs for key in getattr(run, name)))


def alignment(results: Results) -> str:
    columns = [(name, key) for name in ("cka", "losses") for key in union(results, name)]
    rows = []
    for arm, runs in results.test.items():
        values = [mean_of(runs, name, key) for name, key in columns]
        cells = [NONE if math.isnan(value) else f"{value:.3f}" for value in values]
        rows.append([f"`{arm}`", f"{np.mean([run.drift for run in runs]):.3f}", *cells])
    note = (
        "Means over seeds: drift from CLIP's features, kernel alignment to each teacher, the losses at the end, and "
        "that of text at the end of stage 1 (`pretrain/text`)."
    )
    head = ["CKA: " + key if name == "cka" else "loss: " + key for name, key in columns]
    return "\n\n".join([note, table(["arm", "drift", *head], rows)])


def with_experts(results: Results) -> dict[str, list[Run]]:
    found = {arm: [run for run in runs if run.experts] for arm, runs in results.test.items()}
    return {arm: runs for arm, runs in found.items() if runs}


def expert_use(results: Results) -> str:
    rows = []
    for arm, runs in with_experts(results).items():
        entropies, shared, bounds, routers = [], [], [], []
        for experts in (run.experts or {} for run in runs):
            entropies.append([analysis.normalised_entropy(shares) for shares in experts["share"]])
            routers += [shares for shares in experts["share"] if len(shares) > 1]
            layers = zip(*experts["by_kind"].values(), strict=True)
            shared.append([analysis.mutual_information(layer) for layer in layers] or [math.nan])
            bounds.append(math.log2(max(1, min(len(experts["by_kind"]), np.shape(experts["share"])[1]))))
        values = [np.mean(entropies), np.min(entropies), np.mean(shared), np.max(shared), max(bounds)]
        cells = [NONE if math.isnan(value) else f"{value:.3f}" for value in values]
        alone = sum(max(shares) > ALONE for shares in routers)
        rows.append([f"`{arm}`", str(len(runs)), *cells, f"{alone} of {len(routers)}" if routers else NONE])
    note = (
        "Entropy over its maximum: 1 where the experts of a layer get equally many tokens, 0 where one gets all. "
        "Mutual information, in bits, between the kind of token and the expert, kinds weighing equally: 0 where "
        "routing does not look at the kind. Both of each seed and layer by itself, then averaged, since nothing makes "
        "the first expert of one seed the first of another; the picture is of each arm's smallest seed. Alone: "
        f"routers (of a seed and layer) that give one expert more than {ALONE:.0%} of all tokens."
    )
    head = ["arm", "seeds", "entropy, mean", "least", "information, mean", "most", "possible", "alone"]
    return "\n\n".join([note, table(head, rows, "No arm with experts was run.")])


def networks(results: Results) -> str:
    rows = []
    for name, scores in results.networks.items():
        told = ", ".join(f"{kind} {points(value)}" for kind, value in scores.items() if kind != "seconds")
        rows.append([f"`{name}`", told, f"{scores['seconds']:.0f}"])
    note = (
        "All runs start from the same networks, trained once. Percent right on scenes that they were not trained on: "
        "the language model's answers to scenes told in words, probes of CLIP's tokens, the teachers' own labels."
    )
    return "\n\n".join([note, table(["network", "scores", "seconds"], rows, "No networks are told of.")])


def costs(results: Results) -> str:
    rows = []
    for arm, runs in results.test.items():
        # Not the means: a run beside other work takes longer
        seconds, tower, trained = (float(np.median([run.cost[name] for run in runs])) for name in analysis.COSTS)
        average = points(float(np.mean(list(results.averages[arm].values()))))
        rows.append([f"`{arm}`", f"{seconds:.0f}", f"{tower / 1e6:.2f}", f"{trained / 1e6:.2f}", average])
    return table(["arm", "seconds a run, median", "tower, M parameters", "trained, M parameters", "average"], rows)


def tuning(results: Results) -> str:
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
        average = [spanned(choice.average), str(choice.average.count)]
        lines = ranges([run.line for run in choice.runs])
        rows.append([f"`{choice.arm}`", *cells, *average, best, "yes" if tested else "", lines])
    note = (
        "Each arm's schedule was chosen here; no line of test is in this table. At the edge: the best is the smallest "
        "or the largest value that was tried (of two, either is), and a better one may lie beyond. On test: test was "
        "run with these settings. Where a learning rate is not set, it is the one of projector and heads."
    )
    head = ["arm", *(f"`{name}`" for name in varied), "average", "seeds", "best", "on test", "lines"]
    return "\n\n".join([note, table(head, rows, "No validation lines.")])


def sources(results: Results) -> str:
    rows = []
    for run in results.runs:
        rows.append(
            [str(run.line), f"`{run.arm}`", str(run.seed), run.split, f"`{run.command}`", run.commit, run.date]
        )
    return table(["line", "arm", "seed", "split", "command", "commit", "date"], rows)


def draw(results: Results) -> dict[str, bytes]:
    """PNGs by name, of all pictures for which there are runs."""
    pairs = [(f"{arm} - {rival}", results.compare(arm, rival)) for arm, rival, _ in results.design.comparisons]
    figures = {
        "accuracy": plots.accuracy_by_family(results.test),
        "comparisons": plots.forest([(name, pair) for name, pair in pairs if pair]),
        "probes": plots.probe_against_accuracy(results.test),
        "alignment": plots.alignment(results.test),
        "experts": plots.experts(results.test),
        "cost": plots.cost(results.test),
        "validation": plots.validation(results.tuned),
    }
    return {name: plots.png(figure) for name, figure in figures.items() if figure}


# Title, name of its picture, what writes it
SECTIONS: list[tuple[str, str, Callable[[Results], str]]] = [
    ("Accuracy", "accuracy", main_table),
    ("Comparisons", "comparisons", comparisons),
    ("Families won and lost", "", families),
    ("Share of the distance closed", "", closed),
    ("Linear probes", "probes", probes),
    ("Alignment, drift and losses", "alignment", alignment),
    ("Use of the experts", "experts", expert_use),
    ("Networks", "", networks),
    ("Cost", "cost", costs),
    ("Tuned on validation", "validation", tuning),
    ("Where the numbers come from", "", sources),
]
FIGURES = [name for _, name, _ in SECTIONS if name]


def markdown(results: Results, drawn: Collection[str]) -> str:
    """The report; pictures in `plots/` beside it."""
    dates = sorted(run.date for run in results.runs)
    commits = sorted({run.commit for run in results.runs})
    tested = [seed for averages in results.averages.values() for seed in averages]
    asked = next((run.questions for run in results.runs if run.split == "test"), {})
    parts = [
        f"# {TITLE}",
        f"{len(results.runs)} runs, {len(tested)} of them scored on test ({len(set(tested))} seeds), {dates[0]} to "
        f"{dates[-1]}, commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}. Numbers are percent of exactly "
        "right answers, means over seeds with 95 % t intervals in square brackets; all of them are made from "
        "`results.jsonl`, whose lines are named. Questions of a test run: "
        + (", ".join(f"{name} {number}" for name, number in asked.items()) or "none yet")
        + ".",
    ]
    for title, picture, write_section in SECTIONS:
        parts += [f"## {title}", write_section(results)]
        if picture in drawn:
            parts.append(f"![{title}](plots/{picture}.png)")
    return "\n\n".join(parts) + "\n"


def page(text: str, drawn: Mapping[str, bytes]) -> str:
    """The Markdown as one HTML file that needs no other: pictures are inside."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for name, picture in drawn.items():
        inside = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        body = body.replace(f'src="plots/{name}.png"', f'src="{inside}"')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head += f"<title>{TITLE}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def write(path: Path, content: bytes) -> None:
    """Under a temporary name first; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def write_report(results: Results, folder: Path) -> None:
    """`report.md`, `report.html` and `plots/*.png`; pictures of an earlier report for which no runs are left go."""
    drawn = draw(results)
    text = markdown(results, drawn)
    files = {"report.md": text.encode(), "report.html": page(text, drawn).encode()}
    for name, content in [*((f"plots/{name}.png", picture) for name, picture in drawn.items()), *files.items()]:
        write(folder / name, content)
    for name in set(FIGURES) - set(drawn):
        (folder / "plots" / f"{name}.png").unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    from benchmarks.replication import arms
    from benchmarks.replication.blind import blind_levels
    from benchmarks.replication.runs import PICTURES_SEED, Scale

    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--results", type=Path, default=FOLDER / "results.jsonl", help="JSON lines, one for each run")
    options.add_argument("--out", type=Path, default=FOLDER, help="folder that takes report.md, report.html, plots/")
    chosen = options.parse_args(arguments)
    try:
        blind = blind_levels(Scale().test, PICTURES_SEED["test"])
        design = Design(arms.ARMS, arms.HEADLINE, arms.CONTROLS, arms.UPPER, arms.COMPARISONS, blind)
        networks = json.loads(chosen.results.with_name("networks.json").read_text())
        write_report(Results(analysis.read_runs(chosen.results), design, networks), chosen.out)
    except (ValueError, FileNotFoundError) as error:
        options.exit(1, f"{error}\n")
    print(chosen.out / "report.md", chosen.out / "report.html", sep="\n")


if __name__ == "__main__":
    main()
