"""Callbacks of the trainer: a check that every trainable weight gets a gradient, and pictures of the tower."""

import logging
import shutil
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import IterableDataset
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from hub.checkpoint_parts import feature_layer
from modeling_movekd import MoveKDVisionModel
from modeling_movekd.experts_movekd import ExpertRouter, LoraExperts
from modeling_movekd.visualize_page import SMALLEST_PICTURE, picture_files
from train.config import MoveKDSFTConfig
from train.data.bad_rows import BadRows
from train.distributed import fsdp_is_asked_for
from train.forward import split_crops
from train.teachers.cached import Teacher


logger = logging.getLogger(__name__)

STEPS_WATCHED = 10
FOLDER_NAME = "pictures"
COMPONENTS_NAME = "components.safetensors"
TRACKERS = ("tensorboard", "trackio", "wandb")


def check_pictures(args: MoveKDSFTConfig) -> None:
    """Refuse wrong numbers, and backends under which no process holds the whole tower."""
    if args.visualize_steps < 0 or args.visualize_images < 1:
        raise ValueError(
            f"`visualize_steps` is {args.visualize_steps} and `visualize_images` {args.visualize_images}; give steps "
            "from 1, or 0 for no pictures, and at least one image."
        )
    plugin = args.deepspeed_plugin
    sharded = "FSDP" if fsdp_is_asked_for() else None
    if plugin is not None and plugin.hf_ds_config.is_zero3():
        sharded = "ZeRO-3"
    if args.visualize_steps and sharded:
        raise ValueError(
            f"`visualize_steps` is {args.visualize_steps}, but under {sharded} no process holds the whole tower to "
            "draw. Set it to 0 and draw checkpoints with `python -m modeling_movekd.visualize`, or train with DDP or "
            "ZeRO-2."
        )


class PictureCallback(TrainerCallback):
    """
    Draws the tower's features of the same images before the first step and after every `visualize_steps` steps, into
    `pictures/step-N/` of the output folder and to TensorBoard, Trackio and Weights & Biases if they are in
    `report_to`.

    The main process draws alone, with the unwrapped modules, and training does not change. The teachers run once. The
    colors of the components stay the same over the run, also if it is resumed.

    Args:
        trainer (`Trainer`): Its data, collator and trackers are used.
        student (`PreTrainedModel`): The unwrapped model.
        teachers (`Mapping[str, Teacher]`): Teachers by name.
        bad_rows (`BadRows`): Counter of unusable rows.
    """

    def __init__(
        self, trainer: Trainer, student: PreTrainedModel, teachers: Mapping[str, Teacher], bad_rows: BadRows
    ) -> None:
        check_pictures(trainer.args)
        self.trainer, self.student = trainer, student
        self.teachers, self.bad_rows = teachers, bad_rows
        self.reference: torch.Tensor | None = None
        self.pixels = torch.empty(0)  # read by the main process alone
        self.teacher_tokens: dict[str, torch.Tensor] = {}
        if left_out := sorted(set(trainer.args.report_to) - set(TRACKERS)):
            logger.warning(f"Pictures are not logged to {left_out}. Find them in {FOLDER_NAME}/ of the output folder.")

    def on_train_begin(
        self, args: MoveKDSFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._read_images(args)
            if state.global_step == 0:
                self._draw(args, state.global_step)
            else:
                self._keep_colors(Path(args.output_dir) / FOLDER_NAME, state.global_step)

    def on_step_end(self, args: MoveKDSFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and args.visualize_steps and state.global_step % args.visualize_steps == 0:
            self._draw(args, state.global_step)

    @torch.no_grad()
    def _read_images(self, args: MoveKDSFTConfig) -> None:
        """Read the first images of the data as the student sees them, and the teachers' features of them."""
        trainer = self.trainer
        dataset = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
        last = None
        if dataset is trainer.train_dataset and isinstance(dataset, IterableDataset):
            last = args.rows_of_run  # a stream may have no end
        pixels: list[torch.Tensor] = []
        tokens: dict[str, list[torch.Tensor]] = {name: [] for name in self.teachers}
        for row in islice(dataset, last):
            if len(pixels) >= args.visualize_images:
                break
            if row.get("problem") is not None:
                self.bad_rows.add([(row["source"], row["problem"])])
            if not row.get("images"):
                continue
            batch = trainer.data_collator([row])
            self.bad_rows.add(batch["bad_rows"])
            images = len(batch["pixel_values"]) - batch["num_blank_images"]
            # The first tile of anyres is the whole image
            of_row = batch["pixel_values"] if batch["pixel_values"].dim() == 4 else batch["pixel_values"][:, 0]
            pixels += of_row[:images]
            inputs = batch.get("teacher_pixel_values") or batch.get("cached_features") or {}
            whole: slice | torch.Tensor = slice(None)
            if args.distill_tiles == "all":
                whole, _ = split_crops(self.student, batch["image_weights"], batch["image_sizes"])
            for name, teacher in self.teachers.items():
                of_teacher = inputs[name]
                if isinstance(of_teacher, torch.Tensor):
                    of_teacher = of_teacher[whole]
                tokens[name] += teacher(of_teacher).tokens[:images].cpu()
        if not pixels:
            raise ValueError(
                f"`visualize_steps` is {args.visualize_steps}, but the data has no image to draw. Set it to 0."
            )
        self.pixels = torch.stack(pixels[: args.visualize_images])
        self.teacher_tokens = {
            name: torch.stack(of_teacher[: args.visualize_images]) for name, of_teacher in tokens.items()
        }

    def _keep_colors(self, folder: Path, step: int) -> None:
        """Read the colors of the last pictures that the interrupted run drew."""
        files = {int(file.parent.name.split("-")[1]): file for file in folder.glob(f"step-*/{COMPONENTS_NAME}")}
        if earlier := [drawn for drawn in files if drawn <= step]:
            values = load_file(files[max(earlier)])["values"]
            self.reference = values if len(values) == len(self.pixels) else None

    def _draw(self, args: MoveKDSFTConfig, step: int) -> None:
        student, processor = self.student, self.trainer.processing_class
        tower = student if isinstance(student, MoveKDVisionModel) else student.model.vision_tower
        processor = getattr(processor, "image_processor", processor)
        index = feature_layer(student.config)
        index = index if isinstance(index, int) else index[-1]
        pictures = tower.visualize(
            self.pixels.to(student.device),
            index if index < 0 else index - 1,  # the first hidden state is the embedding
            image_mean=processor.image_mean,
            image_std=processor.image_std,
            other_tokens=self.teacher_tokens,
            reference=self.reference,
            smallest_side=SMALLEST_PICTURE,
        )
        self.reference = pictures.values
        folder = Path(args.output_dir) / FOLDER_NAME / f"step-{step}"
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({"values": pictures.values.contiguous()}, temporary / COMPONENTS_NAME)
        numbered = [(index + 1, picture_files(pictures, index)) for index in range(len(pictures.image))]
        for number, files in numbered:
            Image.fromarray(pictures.image[number - 1].numpy()).save(temporary / f"{number:02d}-image.png")
            for stem, (picture, _) in files.items():
                picture.save(temporary / f"{number:02d}-{stem}.png")
        shutil.rmtree(folder, ignore_errors=True)  # drawn by the run that this one resumes
        temporary.rename(folder)
        self._log({f"{FOLDER_NAME}/{stem}/{n}": file for n, files in numbered for stem, file in files.items()}, step)

    def _log(self, pictures: dict[str, tuple[Image.Image, str]], step: int) -> None:
        """Log pictures with captions, by name, to the trackers that Trainer's callbacks have opened."""
        report_to = self.trainer.args.report_to
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for name, (picture, _) in pictures.items():
                    callback.tb_writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        if "trackio" in report_to:
            import trackio

            images = {name: trackio.Image(picture, caption) for name, (picture, caption) in pictures.items()}
            trackio.log({**images, "train/global_step": step})
        if "wandb" in report_to:
            import wandb

            if wandb.run is not None:
                panels = {name: wandb.Image(picture, caption=text) for name, (picture, text) in pictures.items()}
                wandb.log({**panels, "train/global_step": step})


class GradientGuard(TrainerCallback):
    """
    Stops the run if a trainable parameter gets no gradient in the first step, or only gradients of exactly zero in the
    first ten steps with images (with `expert_init: zero` they are zero in the first step).

    Each expert counts by itself, and is excused if it got no token. Gradients are seen by hooks on the parameters,
    since DeepSpeed leaves no `.grad`. FSDP2 replaces the parameters, so there `.grad` is read instead.

    Args:
        model (`nn.Module`): The model in training, before it is wrapped.
        accelerator (`Accelerator`): Sums the flags of the processes.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.num_experts = {
            f"{prefix}.{name}": module.weight_a.shape[0] // module.rank
            for prefix, module in model.named_modules()
            if isinstance(module, LoraExperts)
            for name, _ in module.named_parameters()
        }
        self.reached: set[str] = set()
        self.nonzero: dict[str, torch.Tensor] = {}
        self.expert_tokens: torch.Tensor | None = None
        self.has_images = True
        self.steps, self.steps_with_images = 0, 0
        self.handles = [
            parameter.register_hook(lambda gradient, name=name: self._see(name, gradient))
            for name, parameter in self.parameters.items()
        ]

    def _see(self, name: str, gradient: torch.Tensor) -> None:
        self.reached.add(name)
        experts = self.num_experts.get(name)
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor() if experts else gradient.to_local()
        if experts:
            # The up-projections of the experts are stacked along the second dimension
            gradient = gradient.transpose(0, -1) if name.endswith("weight_b") else gradient
            nonzero = (gradient.reshape(experts, -1) != 0).any(dim=1)
        else:
            nonzero = (gradient != 0).any().reshape(1)
        seen = self.nonzero.get(name)
        self.nonzero[name] = nonzero if seen is None else seen | nonzero

    def count_tokens(self, expert_tokens: torch.Tensor) -> None:
        """Add the tokens that each expert got, `(num_layers, num_experts)`, summed over all processes."""
        if self.handles:
            self.expert_tokens = expert_tokens if self.expert_tokens is None else self.expert_tokens + expert_tokens

    def count_images(self, images: torch.Tensor) -> None:
        """Set the number of images in the text of the next step, summed over all processes."""
        if self.handles:
            self.has_images = bool(images)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        if not self.handles:
            return
        # FSDP2 has replaced the parameters that the hooks are on
        for name, parameter in kwargs["model"].named_parameters():
            if name in self.parameters and name not in self.reached and parameter.grad is not None:
                self._see(name, parameter.grad)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not self.handles:
            return
        self.steps += 1
        if self.steps == 1:
            names = list(self.parameters)
            reached = self._reduce([torch.tensor([float(name in self.reached)]) for name in names])
            if missing := [name for name, (seen,) in zip(names, reached, strict=True) if not seen]:
                raise ValueError(
                    f"{len(missing)} trainable parameters got no gradient in the first step: {missing}. Freeze them, "
                    "or check `lambda_kd`, `lambda_balance` and `router_gradient`."
                )
        self.steps_with_images += self.has_images
        if self.steps_with_images == STEPS_WATCHED:
            for handle in self.handles:
                handle.remove()
            self.handles = []
            if zero := self._zero_parameters():
                raise ValueError(
                    f"{len(zero)} trainable parameters had a gradient of exactly zero in each of the first "
                    f"{STEPS_WATCHED} steps with images: {zero}. Freeze them, or find what cuts their gradient off."
                )

    def _zero_parameters(self) -> list[str]:
        names = list(self.parameters)
        unseen = {name: torch.zeros(self.num_experts.get(name, 1)) for name in names}
        seen = self._reduce([self.nonzero.get(name, unseen[name]).float() for name in names])
        zero = []
        for name, nonzero in zip(names, seen, strict=True):
            if name not in self.num_experts:
                zero += [] if nonzero[0] else [name]
                continue
            layer = int(name.split("encoder.layers.")[1].split(".")[0])
            for expert, value in enumerate(nonzero):
                if not value and (self.expert_tokens is None or self.expert_tokens[layer, expert] > 0):
                    zero.append(f"{name}[expert {expert}]")
        return zero

    def _reduce(self, flags: list[torch.Tensor]) -> list[list[float]]:
        """Sum over the processes, with one synchronization."""
        flat = torch.cat([flag.to(self.accelerator.device) for flag in flags])
        flat = self.accelerator.reduce(flat, reduction="sum")
        return [part.tolist() for part in flat.split([flag.numel() for flag in flags])]


class BalanceBiasCallback(TrainerCallback):
    """
    Moves the routers' `balance_bias` after each optimizer step (loss-free balancing, arXiv 2408.15664). Does nothing
    if the routers have none.

    Args:
        model (`nn.Module`): The model in training.
        rate (`float`, *optional*): Size of a move.
    """

    def __init__(self, model: nn.Module, rate: float | None) -> None:
        routers = [module for module in model.modules() if isinstance(module, ExpertRouter)]
        self.routers = [router for router in routers if router.balance_bias is not None]
        self.rate = rate
        self.load: torch.Tensor | None = None

    def count_tokens(self, expert_tokens: torch.Tensor) -> None:
        """Add the tokens of each expert in a micro-batch, `(num_layers, num_experts)`, summed over all processes."""
        if self.routers:
            self.load = expert_tokens if self.load is None else self.load + expert_tokens

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.load is not None and self.rate is not None:
            for router, load in zip(self.routers, self.load, strict=True):
                router.move_balance_bias(load, self.rate)
        self.load = None
