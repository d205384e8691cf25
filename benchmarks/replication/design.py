"""What an experiment of the replication is made of: its arms, their schedules, the networks and the comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


ALL_TEACHERS = ("clip", "detector", "texture", "reader")
HERE = Path(__file__).resolve().parent


class Schedule(NamedTuple):
    """
    The options of a run that are chosen on validation.

    Args:
        pretrain_vision_tower_learning_rate (`float`, *optional*): The tower's rate in the first stage; `None` takes
            that of projector and heads. Without distillation, only experts train in the first stage.
        vision_tower_learning_rate (`float`, *optional*): The tower's rate in the second stage; `None` as above.
        learning_rate (`float`, *optional*, defaults to 5e-4): Rate of projector and heads in the second stage.
        language_model_learning_rate (`float`, *optional*): The language model's rate in the second stage; `None` as
            above.
        pretrain_share (`float`, *optional*, defaults to 0.5): The first stage's share of the steps. All runs have the
            same number of steps in all stages together.
        encoder_share (`float`, *optional*): Share of the steps of a stage `encoder` before both; the first stage's
            share is then one of the steps that are left.
        kd_weight (`float`, *optional*): `lambda_kd` in place of the arm's.
    """

    pretrain_vision_tower_learning_rate: float | None = None
    vision_tower_learning_rate: float | None = None
    learning_rate: float = 5e-4
    language_model_learning_rate: float | None = None
    pretrain_share: float = 0.5
    encoder_share: float | None = None
    kd_weight: float | None = None


@dataclass(frozen=True)
class Arm:
    """
    Args:
        title (`str`): What the tables call it.
        group (`str`): Its heading in the tables.
        schedule_of (`str`): Name of the arm whose validation runs choose the schedule.
        teachers (`tuple`, *optional*): Names of the teachers; without any, nothing is distilled.
        settings (`dict`, *optional*): Fields of [`~train.config.MoveKDSFTConfig`] for all stages.
        side_by_side (`bool`, *optional*, defaults to `False`): Keep all encoders at inference and distill nothing.
        frozen_after_encoder (`bool`, *optional*, defaults to `False`): Distill in the stage `encoder` alone, and
            freeze the tower afterwards.
    """

    title: str
    group: str
    schedule_of: str
    teachers: tuple[str, ...] = ALL_TEACHERS
    settings: dict[str, Any] = field(default_factory=dict)
    side_by_side: bool = False
    frozen_after_encoder: bool = False


@dataclass(frozen=True)
class Experiment:
    """
    What was planned.

    Args:
        arms (`Mapping`): The arms by name, in the order of the tables.
        headline (`Sequence`): Arms that the conclusions rest on.
        controls (`Sequence`): Arms without distillation of other teachers.
        upper (`str`): The upper reference.
        comparisons (`Sequence`): Arm, rival, and the question that the comparison answers.
        schedules (`Mapping`, *optional*): The schedules that are tried on validation, by arm.
        chosen_twice (`Sequence`, *optional*): Arms whose schedules are tried with two seeds.
        folder (`Path`, *optional*): Takes `results.jsonl`, `networks.json` and the report.
        first_seed (`int`, *optional*, defaults to 30): First seed of the test runs.
        networks (`tuple[int, ...]`, *optional*, defaults to `(0,)`): Seeds of the sets of networks. A run takes the
            set and the pictures of its seed, modulo their number.
    """

    arms: Mapping[str, Arm]
    headline: Sequence[str]
    controls: Sequence[str]
    upper: str
    comparisons: Sequence[tuple[str, str, str]]
    schedules: Mapping[str, Sequence[Schedule]] = field(default_factory=dict)
    chosen_twice: Sequence[str] = ()
    folder: Path = HERE
    first_seed: int = 30
    networks: tuple[int, ...] = (0,)

    def networks_of(self, seed: int) -> int:
        """The set of networks that a run with this seed starts from."""
        return self.networks[seed % len(self.networks)]
