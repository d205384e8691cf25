"""transformers' `Trainer` for stage `encoder`: distillation into a vision tower without a language model."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from modeling_movekd import MoveKDVisionModel
from train.build import set_trainable
from train.config import MoveKDSFTConfig, refuse_reentrant_checkpointing
from train.data.bad_rows import BadRows
from train.distillation.distiller import Distiller
from train.distilling import DistillingMixin
from train.distributed import prepare_fsdp
from train.forward import add_encoder_forward, step_image_size
from train.model_card import RunFacts
from train.teachers.cached import Teacher


class MoveKDEncoderTrainer(DistillingMixin, Trainer):
    """
    Trains a vision tower with the loss `lambda_kd` * distillation + `lambda_balance` * balance, each the mean over the
    images of a step.

    Logs `kd`, `kd/{teacher}` (before the teacher weights), `kd/{teacher}/summary` (its part of the summary),
    `balance`, `experts/{i}` (share of the patches) and `images_per_second`.

    Args:
        model ([`MoveKDVisionModel`]): The tower, from [`train.build_encoder.build_encoder`].
        args ([`MoveKDSFTConfig`]): Arguments.
        teachers (`Mapping[str, Teacher]`): Frozen teachers by name.
        distiller ([`Distiller`]): Adapters or heads of the teachers. It becomes a submodule of the model.
        bad_rows ([`BadRows`], *optional*): Counter of unusable rows. By default the run stops above 1% of the rows.
        run_facts ([`RunFacts`], *optional*): What the model card says of data, base models and earlier stages.
        kwargs: Passed to [`~transformers.Trainer`].
    """

    _nothing_trains, _ways_out = "No image can be used in step", "Repair the data."

    def __init__(
        self,
        model: MoveKDVisionModel,
        args: MoveKDSFTConfig,
        teachers: Mapping[str, Teacher],
        distiller: Distiller | None,
        bad_rows: BadRows | None = None,
        run_facts: RunFacts | None = None,
        **kwargs: Any,
    ) -> None:
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._add_distiller(model, args, teachers, distiller)
        set_trainable(model, args)
        refuse_reentrant_checkpointing(args)
        super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = True  # `compute_loss` takes the mean over the step, not over the micro-batch
        prepare_fsdp(self.accelerator)
        add_encoder_forward(model, args.preset_options()["balance_form"], args.expert_assignment)
        self._prepare_run(bad_rows, run_facts)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, torch.Tensor]:
        """Also return the number of images of the step over all processes, which Trainer cannot count."""
        batch_samples, _ = super().get_batch_samples(*args, **kwargs)
        return batch_samples, self._images

    def _count_trained(self, batch: dict[str, Any]) -> torch.Tensor:
        return batch["image_weights"].sum()

    def _num_rows(self, batch: dict[str, Any]) -> int:
        return len(batch["image_weights"])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        inputs = self._teach(inputs, model.training)
        inputs.pop("num_blank_images")
        if model.training and self.args.student_image_sizes is not None:
            sizes, step = self.args.student_image_sizes, self.state.global_step
            inputs["student_image_size"] = step_image_size(sizes, self.args.seed, step)
        outputs = model(**inputs)
        loss = self._add_losses(None, outputs, inputs["image_weights"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None, None]:
        """Compute the loss, which Trainer does for models with labels only."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the losses since the last log, as TRL does."""
        self._measure_rate()
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        # In place, so that `metric_for_best_model` may be one of them
        logs.update({prefix + name: sum(values) / len(values) for name, values in self._metrics[mode].items()})
        super().log(logs, start_time)
        self._metrics[mode].clear()

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["images"]
        super()._set_signature_columns_if_needed()
