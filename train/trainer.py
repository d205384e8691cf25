"""TRL's `SFTTrainer` with the teachers, losses and checkpoint files of MoVE-KD."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available
from trl import SFTTrainer

from train.answers import check_eval_generate, exact_match
from train.build import set_trainable
from train.config import MoveKDSFTConfig, refuse_reentrant_checkpointing
from train.data.bad_rows import BadRows
from train.data.sampler import ModalityLengthGroupedSampler
from train.distillation.distiller import Distiller
from train.distilling import DistillingMixin
from train.distributed import prepare_fsdp
from train.forward import add_distilling_forward
from train.language_lora import (
    LANGUAGE_LORA_NAME,
    add_language_lora,
    load_language_lora,
    merged_state_dict,
    refuse_language_lora,
    save_language_lora,
)
from train.model_card import RunFacts
from train.teachers.cached import Teacher


class MoveKDTrainer(DistillingMixin, SFTTrainer):
    """
    Trains a MoVE-KD student with the loss text + `lambda_kd` * distillation + `lambda_balance` * balance.

    Logs, besides TRL's metrics: `text`, `kd`, `kd/{teacher}` (before the teacher weights), `kd/{teacher}/summary` (its
    part of the summary), `balance`, `experts/{i}` (share of the tokens) and `images_per_second`.

    Args:
        model (`PreTrainedModel`): The student, from [`train.build.build_student`].
        args ([`MoveKDSFTConfig`]): Arguments.
        teachers (`Mapping[str, Teacher]`, *optional*): Frozen teachers by name; none without distillation.
        distiller ([`Distiller`], *optional*): Adapters or heads of the teachers. It becomes a submodule of the model.
        bad_rows ([`BadRows`], *optional*): Counter of unusable rows. By default the run stops above 1% of the rows.
        run_facts ([`RunFacts`], *optional*): What the model card says of data, base models and earlier stages.
        kwargs: Passed to [`~trl.SFTTrainer`].
    """

    _tag_names = ["movekd", "knowledge-distillation", "mixture-of-experts"]
    _name = "MoVE-KD"

    def __init__(
        self,
        model: PreTrainedModel,
        args: MoveKDSFTConfig,
        teachers: Mapping[str, Teacher] | None = None,
        distiller: Distiller | None = None,
        bad_rows: BadRows | None = None,
        run_facts: RunFacts | None = None,
        **kwargs: Any,
    ) -> None:
        check_eval_generate(args)
        self._add_distiller(model, args, teachers, distiller)
        if args.language_lora_rank:
            add_language_lora(model, args)
        set_trainable(model, args)
        super().__init__(model=model, args=args, **kwargs)
        self._check_trl()
        prepare_fsdp(self.accelerator)
        add_distilling_forward(
            self._student(), args.preset_options()["balance_form"], args.distill_tiles, args.expert_assignment
        )
        self._prepare_run(bad_rows, run_facts)

    def _check_trl(self) -> None:
        """Refuse settings of TRL that do not work with the losses."""
        refuse_reentrant_checkpointing(self.args)
        if self.compute_loss_func is not None:
            raise ValueError("`compute_loss_func` would replace the losses of the method. Override `compute_loss`.")
        if self.aux_loss_enabled:
            raise ValueError(
                f"`router_aux_loss_coef` is {self.router_aux_loss_coef}, but LLaVA-NeXT's forward does not return the "
                "router logits of a language model with experts, which this loss needs. Set it to 0."
            )

    def _student(self) -> PreTrainedModel:
        if is_peft_available():
            from peft import PeftModel

            if isinstance(self.model, PeftModel):
                return self.model.get_base_model()
        return self.model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        inputs = self._teach(inputs, model.training)
        # TRL does not return the model's output, so keep it when TRL calls the model
        kept: list[Any] = []

        def keeping_model(*args: Any, **kwargs: Any) -> Any:
            kept.append(model(*args, **kwargs))
            return kept[-1]

        text = super().compute_loss(
            keeping_model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        text, logits_outputs = text if return_outputs else (text, None)
        outputs = kept[0]
        if getattr(outputs, "kd", None) is None:
            raise ValueError(
                "The forward returned no distillation loss, since something replaced `model.forward`. Replace it "
                "before the trainer is built."
            )
        loss = self._add_losses(text, outputs, inputs["image_weights"], num_items_in_batch)
        return (loss, logits_outputs) if return_outputs else loss

    def _evaluate_more(self) -> dict[str, float]:
        """Let the student answer rows."""
        if not self.args.eval_generate or self.eval_dataset is None:
            return {}
        show, count = self.accelerator.print, self.args.eval_generate
        with self.compute_loss_context_manager():
            return {
                "exact_match": exact_match(
                    self._student(), self.data_collator, self.eval_dataset, count, self.accelerator, show
                )
            }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._measure_rate()
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)
        world_size = self.args.world_size * self.args.gradient_accumulation_steps
        # Not `train_dataset`, since Trainer has dropped its columns
        return ModalityLengthGroupedSampler(
            self.train_dataset["modality_length"], self.args.train_batch_size, world_size, seed=self.args.seed
        )

    def _published_state(self, folder: Path, state_dict: dict[str, Any] | None) -> dict[str, Any] | None:
        if self.args.should_save and self.args.language_lora_rank:
            save_language_lora(self._student(), folder / LANGUAGE_LORA_NAME, state_dict)
            state_dict = merged_state_dict(self._student(), state_dict)
        return state_dict

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._loads_language_lora():
            load_language_lora(self._student(), resume_from_checkpoint)
            self._load_distiller(resume_from_checkpoint)
            return
        if not self.args.language_lora_rank:
            refuse_language_lora(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._loads_language_lora():
            load_language_lora(self._student(), self.state.best_model_checkpoint)
            self._load_distiller(self.state.best_model_checkpoint)
            return
        super()._load_best_model()

    def _loads_language_lora(self) -> bool:
        # The saved weights are merged. Trainer would find no parameters of these names, and skip them
        return bool(self.args.language_lora_rank) and not self._has_own_state()
