"""One stage of training: load, train, save."""

from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from modeling_movekd.inference import longest_context, read_config
from train.arguments import DataArguments, ModelArguments
from train.build import (
    build_collator,
    build_distiller,
    build_image_collator,
    build_student,
    build_teachers,
    fit_feature_statistics,
)
from train.build_encoder import build_encoder, heads_to_continue, keep_dropout
from train.callbacks import PictureCallback, check_pictures
from train.checkpoints import checkpoint_to_resume, disk_errors_named, prepare_output_folder
from train.config import MoveKDSFTConfig
from train.data.bad_rows import BadRows
from train.data.datasets import load_train_and_validation
from train.distributed import whole_weights
from train.encoder_trainer import MoveKDEncoderTrainer
from train.model_card import run_facts
from train.trainer import MoveKDTrainer


def train(
    data_args: DataArguments, args: MoveKDSFTConfig, model_args: ModelArguments, recipe: str | None = None
) -> MoveKDTrainer | MoveKDEncoderTrainer:
    """
    Load, train and save one stage.

    Args:
        data_args ([`DataArguments`]), args ([`MoveKDSFTConfig`]), model_args ([`ModelArguments`]): Arguments.
        recipe (`str`, *optional*): File that the arguments come from, for the model card.

    Returns:
        [`MoveKDTrainer`] or [`MoveKDEncoderTrainer`]: The trainer. It has not published yet.
    """
    check_pictures(args)
    is_encoder = args.stage == "encoder"
    args.resume_from_checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    prepare_output_folder(args)
    # A sharded checkpoint has no configuration
    if args.resume_from_checkpoint and (Path(args.resume_from_checkpoint) / CONFIG_NAME).is_file():
        keep_dropout(args, read_config(args.resume_from_checkpoint))
    with whole_weights(args):
        model, processor = (build_encoder if is_encoder else build_student)(args, model_args)
        teachers = build_teachers(args)
        distiller = build_distiller(args, model, teachers, *heads_to_continue(args, model_args))
    bad_rows = BadRows(
        args.output_dir,
        data_args.max_bad_row_share,
        data_args.max_bad_rows,
        writes=args.should_save,
        resume=bool(args.resume_from_checkpoint),
    )
    if data_args.streaming:
        _check_streaming(args)
        bad_rows.total = args.rows_of_run
    train_dataset, eval_dataset = load_train_and_validation(
        data_args, bad_rows, args.seed, args.eval_strategy != "no", args.dataset_num_proc, images_only=is_encoder
    )
    collator: Any
    if is_encoder:
        collator = build_image_collator(args, processor, teachers)
    else:
        collator = build_collator(args, processor, teachers, longest_context(model))
    if collator.feature_cache is not None:
        for dataset in (train_dataset, eval_dataset):
            if dataset is not None:
                collator.feature_cache.check_data(dataset)
    fit_feature_statistics(args, distiller, teachers, train_dataset, collator, bad_rows)
    trainer = (MoveKDEncoderTrainer if is_encoder else MoveKDTrainer)(
        model,
        args,
        teachers=teachers,
        distiller=distiller,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        bad_rows=bad_rows,
        run_facts=run_facts(data_args, args, model_args, [t.config for t in teachers.values()], recipe),
        data_collator=collator,
        processing_class=processor,
    )
    if args.visualize_steps:
        trainer.add_callback(PictureCallback(trainer, model, teachers, bad_rows))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    with disk_errors_named(Path(args.output_dir), "*.safetensors"):
        trainer.save_model(args.output_dir, _internal_call=True)  # does not publish
    trainer.accelerator.print(f"Saved the {'encoder' if is_encoder else 'student'} to {args.output_dir}.")
    return trainer


def _check_streaming(args: MoveKDSFTConfig) -> None:
    if args.max_steps < 1 or args.group_by_modality_length:
        raise ValueError(
            f"`streaming` is true with `max_steps` {args.max_steps} and `group_by_modality_length` "
            f"{args.group_by_modality_length}. A stream has no length: set `max_steps`, and do not group."
        )
