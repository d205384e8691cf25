"""What the trainers of all stages share: the distillation losses, their logs, and the files beside the weights."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from hub.checkpoint_parts import feature_layer
from modeling_movekd.files import DISTILLER_NAME, TRAINING_FACTS_NAME, save_json
from train.build import parameter_summary, student_name
from train.callbacks import BalanceBiasCallback, GradientGuard
from train.checkpoints import CheckpointMixin
from train.config import MoveKDSFTConfig
from train.data.bad_rows import BadRows
from train.data.sampler import set_sampler_epoch
from train.distillation.distiller import Distiller
from train.distillation.losses import check_finite
from train.distributed import check_launch, saves_sharded_state, timeouts_named
from train.forward import MoveKDTrainingOutput
from train.model_card import RunFacts, training_facts, update_card
from train.publish import PublishingMixin
from train.teachers.cached import Teacher


# From this number of rows on, a step without a usable row is no chance
MIN_ROWS_OF_STEP = 8


class DistillingMixin(PublishingMixin, CheckpointMixin):
    """
    Mixin before a trainer whose model returns a [`MoveKDTrainingOutput`].

    A subclass calls `_add_distiller` before Trainer's initialization, `_prepare_run` after it, and `_teach` and
    `_add_losses` in `compute_loss`.
    """

    _metrics: dict[str, defaultdict[str, list[float]]]
    # The error at a step in which nothing trains, and the ways out
    _nothing_trains = "No token is trained in step"
    _ways_out = "Repair the data, raise `max_length`, or set another `chat_template`."

    def _add_distiller(
        self,
        model: PreTrainedModel,
        args: MoveKDSFTConfig,
        teachers: Mapping[str, Teacher] | None,
        distiller: Distiller | None,
    ) -> None:
        """Check that model, teachers and launch fit each other, and make the distiller a submodule of the model."""
        self.teachers = dict(teachers or {})
        if args.distill != bool(self.teachers) or bool(self.teachers) != (distiller is not None):
            raise ValueError(
                f"`distill` is {args.distill}, with teachers {list(self.teachers)} and "
                f"{'a' if distiller is not None else 'no'} distiller. Give all of them or none."
            )
        check_launch(args)
        if self.teachers and not isinstance(layer := feature_layer(model.config), int):
            raise ValueError(
                f"`vision_feature_layer` is {layer}, but only a single layer can be distilled into. Give one layer, "
                "or train without distillation."
            )
        if distiller is not None:
            model.distiller = distiller.to(device=model.device, dtype=model.dtype)
            # The distiller is saved to a file of its own, and the published weights are the student's alone
            ignored = {f"distiller.{key}" for key in distiller.state_dict()}
            model._keys_to_ignore_on_save = ignored | set(model._keys_to_ignore_on_save or ())
        self.take_token(args)

    def _prepare_run(self, bad_rows: BadRows | None, run_facts: RunFacts | None) -> None:
        """Place the teachers, and set up guard, counters and facts."""
        for teacher in self.teachers.values():
            teacher.to(self.args.device)
        self.gradient_guard = GradientGuard(self.model, self.accelerator)
        self.add_callback(self.gradient_guard)
        self.balance = BalanceBiasCallback(self.model, self.args.balance_rate)
        self.add_callback(self.balance)
        if bad_rows is None:
            bad_rows = BadRows(self.args.output_dir, writes=self.args.should_save)
            bad_rows.total = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else 0
        self.bad_rows, self.run_facts = bad_rows, run_facts or RunFacts()
        self._evaluated: dict[str, float] = defaultdict(float)
        self._images, self._logged_at = torch.zeros(()), time.perf_counter()
        self._images_since_log = torch.zeros((), device=self.args.device)
        self.accelerator.print(parameter_summary(self.model, self.teachers, self.args))

    def _student(self) -> PreTrainedModel:
        return self.model

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Also count the images of the step over all processes."""
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._images, shown = self._count(batch_samples, device, is_step=True)
        self.gradient_guard.count_images(shown)
        self._images_since_log += self._images
        return batch_samples, num_items_in_batch

    def _count(
        self, batches: list[dict[str, Any]], device: torch.device, is_step: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Count the distilled images and the images of the data, over all processes. Moves the bad rows of the batches to
        `bad_rows`, and stops at a training step in which nothing trains.
        """
        found = [row for batch in batches for row in batch.pop("bad_rows", [])]
        images = sum((batch["image_weights"].sum() for batch in batches), torch.zeros((), device=device))
        trained = sum((self._count_trained(batch) for batch in batches), torch.zeros((), device=device))
        shown = sum(len(batch["image_weights"]) - batch["num_blank_images"] for batch in batches)
        rows = sum(self._num_rows(batch) for batch in batches)
        numbers = torch.tensor([float(shown), float(len(found)), float(rows)], device=device)
        counts = torch.stack([images.float(), trained.float(), *numbers])
        counts = self.accelerator.reduce(counts, reduction="sum")
        _, items, _, bad, rows = counts.tolist()
        if bad:
            self.bad_rows.add_from_all(found)
        # A few rows may all be bad by chance, once the first step has trained
        if is_step and not items and (self.state.global_step == 0 or rows >= MIN_ROWS_OF_STEP):
            reasons = list(dict.fromkeys(self.bad_rows.reasons.values()))
            raise ValueError(
                f"{self._nothing_trains} {self.state.global_step + 1}, which has {int(rows)} rows: "
                f"{'; '.join(reasons[:3])}. {self._ways_out}"
            )
        return counts[0], counts[2]

    def _count_trained(self, batch: dict[str, Any]) -> torch.Tensor:
        """The number of a batch's tokens that train."""
        return (batch["labels"] != -100).sum()

    def _num_rows(self, batch: dict[str, Any]) -> int:
        return len(batch["labels"])

    def _teach(self, inputs: dict[str, Any], is_training: bool) -> dict[str, Any]:
        """The inputs of the model, with the teachers' features. Of an evaluation also count the images."""
        inputs = dict(inputs)
        if not is_training:
            inputs = self._without_repeated_rows(inputs)
            self._count([inputs], self.accelerator.device)
        inputs.pop("image_rows", None)
        teacher_inputs = inputs.pop("teacher_pixel_values", None) or inputs.pop("cached_features", None)
        if self.teachers:
            inputs["teacher_features"] = {
                name: teacher(teacher_inputs[name]) for name, teacher in self.teachers.items()
            }
        return inputs

    def _add_losses(
        self,
        text: torch.Tensor | None,
        outputs: MoveKDTrainingOutput,
        image_weights: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """Log the losses, and add `lambda_kd` * distillation + `lambda_balance` * balance to that of the text."""
        if num_items_in_batch is None:
            share = 1 / image_weights.sum().clamp(min=1)
        else:
            # The mean over all images of the step: Trainer sums over micro-batches and averages over processes
            share = self.accelerator.num_processes / self.get_tp_size() / self._images.clamp(min=1)
        assert outputs.kd is not None
        loss = self.args.lambda_kd * outputs.kd.sum() * share
        if text is not None:
            loss = text + loss
        if outputs.balance is not None:
            loss = loss + self.args.lambda_balance * outputs.balance.sum() * share
        own = {} if text is None else {"text": text.detach()}
        if self.model.training:
            self._log_terms(own, outputs, image_weights, num_items_in_batch is not None)
        else:
            self._log_evaluation(own, outputs, image_weights)
        return loss

    def _sums(self, outputs: MoveKDTrainingOutput, image_weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses summed over the images, and the tokens of each expert. The same names on all processes."""
        sums = {"images": image_weights.sum()}
        if outputs.kd is not None and outputs.teacher_losses is not None:
            losses = outputs.teacher_losses.sum(dim=1)
            names = self._student().distiller.loss_names
            sums |= {"kd": outputs.kd.sum(), **{f"kd/{name}": losses[i] for i, name in enumerate(names)}}
        if outputs.balance is not None:
            sums["balance"] = outputs.balance.sum()
        if outputs.expert_tokens is not None:
            sums |= {f"experts/{i}": value for i, value in enumerate(outputs.expert_tokens.sum(dim=0))}
        return sums

    def _reduce_and_check(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Sum over the processes, with one reduction that has the same length on all of them."""
        stacked = torch.stack([value.detach().float() for value in sums.values()])
        totals = dict(zip(sums, self.accelerator.reduce(stacked, reduction="sum").tolist(), strict=True))
        check_finite({name: torch.tensor(value) for name, value in totals.items()})
        return totals

    def _log_terms(
        self,
        own: dict[str, torch.Tensor],
        outputs: MoveKDTrainingOutput,
        image_weights: torch.Tensor,
        is_scaled: bool,
    ) -> None:
        """Log and check the losses of a training batch: those of the trainer's own, and those of the images."""
        totals = self._reduce_and_check(own | self._sums(outputs, image_weights))
        steps = self.current_gradient_accumulation_steps if is_scaled else 1
        metrics = {name: totals.pop(name) * steps / self.accelerator.num_processes for name in own}
        images = totals.pop("images")
        tokens = sum(value for name, value in totals.items() if name.startswith("experts/"))
        step_images = self._images.item() if is_scaled else images
        if step_images:
            # The log has the mean over the micro-batches, so weigh each by its share of the step's images
            weight = steps * images / step_images
            for name, value in totals.items():
                metrics[name] = weight * value / max(tokens if name.startswith("experts/") else images, 1.0)
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)
        if outputs.expert_tokens is not None:
            tokens = self.accelerator.reduce(outputs.expert_tokens, reduction="sum")
            self.balance.count_tokens(tokens)
            # With an expert for each teacher, all experts get tokens beside the router's
            self.gradient_guard.count_tokens(tokens + (self.args.expert_assignment == "teacher"))

    def _log_evaluation(
        self, own: dict[str, torch.Tensor], outputs: MoveKDTrainingOutput, image_weights: torch.Tensor
    ) -> None:
        """Log the means of an evaluation batch, and sum up for those of the whole evaluation."""
        sums = self._sums(outputs, image_weights)
        if own:
            tokens = outputs.label_mask.sum()
            text = {name: value * tokens for name, value in own.items()}
            text |= {"entropy": outputs.entropy.sum(), "mean_token_accuracy": outputs.is_top1.sum()}
            sums = {"tokens": tokens, **text, **sums}
        totals = self._reduce_and_check(sums)
        for name, value in totals.items():
            self._evaluated[name] += value
        for name, value in evaluation_means(totals).items():
            self._metrics["eval"][name].append(value)

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Leave out the rows that accelerate repeats at the end of an evaluation, to give all processes a batch."""
        state = self.accelerator.gradient_state
        if not (state.end_of_dataloader and state.remainder > 0):
            return inputs
        rows, weights = self._num_rows(inputs), inputs["image_weights"]
        places = self.accelerator.process_index * rows + torch.arange(rows, device=weights.device)
        repeated = places >= state.remainder
        kept = {"image_weights": weights.masked_fill(repeated[inputs["image_rows"]], 0.0)}
        if "labels" in inputs:
            kept["labels"] = inputs["labels"].masked_fill(repeated.unsqueeze(1), -100)
        return inputs | kept

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Replace Trainer's loss, a mean over the batches, by the loss of the means over all tokens and images."""
        self._evaluated = defaultdict(float)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if not self._evaluated:
            raise ValueError("The evaluation data has no rows. Give more, or a larger `validation_share`.")
        means = evaluation_means(self._evaluated)
        self._metrics["eval"].update({name: [value] for name, value in means.items()})
        loss = means.get("text", 0.0) + self.args.lambda_kd * means.get("kd", 0.0)
        output.metrics[f"{metric_key_prefix}_loss"] = loss + self.args.lambda_balance * means.get("balance", 0.0)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._evaluate_more().items()})
        return output

    def _evaluate_more(self) -> dict[str, float]:
        """Further metrics of an evaluation, by name without prefix."""
        return {}

    def _measure_rate(self) -> None:
        """Add the images per second since the last call to the metrics."""
        if self.model.training and self._metrics["train"]:
            now = time.perf_counter()
            rate = self._images_since_log.item() / (now - self._logged_at)
            self._metrics["train"]["images_per_second"].append(rate)
            self._images_since_log.zero_()
            self._logged_at = now

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Put the tower, the language model and LoRA into groups with their own learning rates."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = {
            "vision_tower.": self.args.vision_tower_learning_rate,
            "language_model.": self.args.language_model_learning_rate,
            "lm_head.": self.args.language_model_learning_rate,
            ".lora_": self.args.language_lora_learning_rate,
        }
        # Teachers may be named like parts of the student
        student = {
            student_name(name, self._student()): value
            for name, value in self.model.named_parameters()
            if "distiller." not in name
        }
        for part, rate in rates.items():
            if not is_new or rate is None:
                continue
            parameters = {id(value) for name, value in student.items() if part in name}
            for group in list(optimizer.param_groups):
                own = [value for value in group["params"] if id(value) in parameters]
                group["params"] = [value for value in group["params"] if id(value) not in parameters]
                if own:
                    optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Also give the workers a time limit, for which Trainer has no argument."""
        loader = super()._get_dataloader(*args, **kwargs)
        if loader.num_workers:
            getattr(loader, "base_dataloader", loader).timeout = self.args.dataloader_timeout
        return loader

    def _run_epoch(self, model: nn.Module, epoch: int, train_dataloader: Any, **kwargs: Any) -> None:
        """Set the sampler's epoch, which accelerate does not reach in a resumed epoch on several processes."""
        set_sampler_epoch(train_dataloader, epoch)
        super()._run_epoch(model=model, epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        own = ["row_index", "source", "problem"]
        self._signature_columns += [name for name in own if name not in self._signature_columns]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Replace the card of TRL or Trainer, which does not know the teachers."""
        if self.args.should_save:
            update_card(Path(self.args.output_dir), self.args)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save whole weights also if FSDP's checkpoints are sharded, for which Trainer saves none."""
        if saves_sharded_state(self.accelerator):
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if state_dict is not None:  # gathered: tied weights are separate tensors, and would be saved twice
            tied = self._student().all_tied_weights_keys
            state_dict = {key: value for key, value in state_dict.items() if key not in tied}
        if self.args.should_save and self.teachers:
            weights = state_dict if state_dict is not None else self.model.state_dict()
            weights = {key.split("distiller.", 1)[1]: value for key, value in weights.items() if "distiller." in key}
        super()._save(str(folder), self._published_state(folder, state_dict))
        if self.args.should_save:
            if self.teachers:
                self._student().distiller.save(folder / DISTILLER_NAME, weights)
            facts = training_facts(self, self.run_facts, self.teachers, len(self.bad_rows.reasons))
            save_json(facts, folder / TRAINING_FACTS_NAME)
            update_card(folder, self.args)

    def _published_state(self, folder: Path, state_dict: dict[str, Any] | None) -> dict[str, Any] | None:
        """The weights to publish, from the gathered ones if there are any."""
        return state_dict

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        with timeouts_named(self.args):
            return super().train(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_distiller(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_distiller(self.state.best_model_checkpoint)

    def _has_own_state(self) -> bool:
        """Whether the backend's own checkpoint restores the distiller and LoRA."""
        return self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    def _load_distiller(self, folder: str) -> None:
        if self.teachers and not self._has_own_state():
            self._student().distiller.load(Path(folder) / DISTILLER_NAME)


def evaluation_means(sums: Mapping[str, float]) -> dict[str, float]:
    """Means of sums over `"tokens"` and `"images"`; of each expert, its share of all experts' patches."""
    of_tokens = ("text", "entropy", "mean_token_accuracy")
    patches = sum(value for name, value in sums.items() if name.startswith("experts/"))
    means = {}
    for name, value in sums.items():
        divisor = patches if name.startswith("experts/") else sums["tokens" if name in of_tokens else "images"]
        if name not in ("tokens", "images") and divisor:
            means[name] = value / divisor
    return means
