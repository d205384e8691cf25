"""What the report is of: what was planned, and the runs beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.replication import analysis
from benchmarks.replication.analysis import Paired, Run


class Arm(Protocol):
    @property
    def title(self) -> str: ...

    @property
    def group(self) -> str: ...


@dataclass(frozen=True)
class Design:
    """
    What was planned: `arms` in the order of the tables; `comparisons` are (arm, rival, what it asks); `blind` is what
    answers without sight score, by name and family (shares).
    """

    arms: Mapping[str, Arm]
    headline: Sequence[str]
    controls: Sequence[str]
    upper: str
    comparisons: Sequence[tuple[str, str, str]]
    blind: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = [*self.headline, *self.controls, self.upper]
        named += [name for arm, rival, _ in self.comparisons for name in (arm, rival)]
        if unknown := sorted(set(named) - set(self.arms)):
            raise ValueError(f"Arms that are compared but not described: {', '.join(unknown)}. Add them to ARMS.")


@dataclass
class Results:
    """The runs beside the design, sorted by arm, and what several sections need of them."""

    runs: Sequence[Run]
    design: Design
    networks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
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
        self.averages = {arm: analysis.scores(runs) for arm, runs in self.test.items()}
        self.families = list(self.runs[0].accuracy)
        self.tuned = analysis.tuned(self.runs)
        self.control = analysis.best_control(self.tuned, self.design.controls)

    def compare(self, arm: str, rival: str) -> Paired | None:
        return analysis.compare(self.averages.get(arm, {}), self.averages.get(rival, {}))
