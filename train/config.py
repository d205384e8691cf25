"""Configuration of a MoVE-KD training run: TRL's `SFTConfig` with the method's options and presets."""

from dataclasses import dataclass
from typing import Any

from trl import SFTConfig

from train.distributed import join_cpu_processes
from train.options import MethodOptions
from train.presets import PRESETS


@dataclass
class MoveKDSFTConfig(MethodOptions, SFTConfig):
    """
    Arguments of [`MoveKDTrainer`]: TRL's and the method's.

    Raises:
        ValueError: if an option would have no effect, or would make training go wrong without a sign.
    """

    def __post_init__(self) -> None:
        self.prepare_options()
        join_cpu_processes(self)
        super().__post_init__()
        self.batch_summary()
        self._check_order()
        self.check_options()
        refuse_reentrant_checkpointing(self)

    def _check_order(self) -> None:
        """Refuse orders of the rows that a resumed run could not continue, and batches that accelerate would cut."""
        if (strategy := str(self.train_sampling_strategy)) not in ("random", "sequential"):
            raise ValueError(
                f"`train_sampling_strategy` is {strategy!r}, which needs tokenized rows. Set "
                "`group_by_modality_length: true`, or choose 'random' or 'sequential'."
            )
        if not self.accelerator_config.use_seedable_sampler:
            raise ValueError(
                "`use_seedable_sampler` of `accelerator_config` is false: a resumed run would see the rows in another "
                "order. Leave it true."
            )
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "`dispatch_batches` of `accelerator_config` is true, but batches with images cannot be cut into the "
                "processes' parts. Leave it out."
            )

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def rows_of_run(self) -> int:
        """Rows that `max_steps` steps read over all processes."""
        return self.max_steps * self.rows_per_step

    def batch_summary(self) -> str:
        """
        The global batch and its factors, as a sentence for the log.

        Raises:
            ValueError: if a step takes other than `global_batch_size` rows.
        """
        rows = self.rows_per_step
        factors = (
            f"{self.train_batch_size} per process, {self.gradient_accumulation_steps} accumulated, on "
            f"{self.world_size} processes."
        )
        if self.global_batch_size not in (None, rows):
            raise ValueError(
                f"`global_batch_size` is {self.global_batch_size}, but a step takes {rows} rows: {factors} Start one "
                "process per device with `accelerate launch`."
            )
        return f"Global batch {rows}: {factors}"

    def preset_options(self) -> dict[str, Any]:
        """The options that a preset sets, with their values in this run."""
        return {name: getattr(self, name) for name in PRESETS["paper"]}


def refuse_reentrant_checkpointing(args: SFTConfig) -> None:
    """Refuse reentrant activation checkpointing, which gives the routers no gradient."""
    kwargs = args.activation_checkpointing_kwargs or args.gradient_checkpointing_kwargs or {}
    if (args.activation_checkpointing or args.gradient_checkpointing) and kwargs.get("use_reentrant"):
        raise ValueError(
            "Activation checkpointing with `use_reentrant: true` gives the routers no gradient. Set it to false."
        )
