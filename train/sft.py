"""
Train a MoVE-KD student.

    accelerate launch train/sft.py                                    # the demo: both stages in a generated world
    accelerate launch train/sft.py --config train/recipes/X.yaml      # a recipe; flags override it
    accelerate launch train/sft.py --stage pretrain --teachers clip convnext --learning_rate 1e-3 \
        --vision_model openai/clip-vit-large-patch14-336 --language_model lmsys/vicuna-7b-v1.5 \
        --dataset_name blip_laion_cc_sbu_558k.json --image_folder images --output_dir outputs/pretrain
"""

import copy
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path


# Run as a script, Python puts train/ first on the path, where its file names would shadow other packages
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import ProcessorMixin
from trl import TrlParser

from modeling_movekd.chat_templates import set_chat_template
from train.bad_rows import BadRows
from train.build import build_distiller, build_student, build_teachers, fit_feature_statistics
from train.cached_features import CachedTeacher, Teacher
from train.collator import MoveKDCollator
from train.config import DataArguments, ModelArguments, MoveKDSFTConfig
from train.data import load_train_and_validation
from train.facts import run_facts
from train.pictures import PictureCallback, check_pictures
from train.processes import whole_weights
from train.teachers import FrozenTeacher
from train.trainer import MoveKDTrainer


def build_collator(
    args: MoveKDSFTConfig, processor: ProcessorMixin, teachers: Mapping[str, Teacher]
) -> MoveKDCollator:
    """The collator of a stage. Stage `pretrain` trains on bare captions, whatever template is published."""
    if args.stage == "pretrain":
        processor = set_chat_template(copy.deepcopy(processor), "plain")
    return MoveKDCollator(
        processor,
        teacher_preprocessors={
            name: teacher.preprocessor for name, teacher in teachers.items() if isinstance(teacher, FrozenTeacher)
        },
        max_length=args.max_length,
        geometry=args.knobs()["geometry"],
        labels="released" if args.distillation_preset == "released" else "answers",
        distill_text_only_rows=args.distill and bool(args.distill_text_only_rows),
        apply_orientation=args.distillation_preset != "released",
        distill_tiles=args.distill_tiles,
        feature_cache=next((t.cache for t in teachers.values() if isinstance(t, CachedTeacher)), None),
    )


def train(
    data_args: DataArguments, args: MoveKDSFTConfig, model_args: ModelArguments, recipe: str | None = None
) -> MoveKDTrainer:
    """Load, train and save one stage; gives back the trainer. `recipe` is the file that the arguments come from."""
    check_pictures(args)
    with whole_weights(args):
        model, processor = build_student(args, model_args)
        teachers = build_teachers(args)
        distiller = build_distiller(args, model, teachers, model_args.model_name_or_path, model_args.model_revision)
    bad_rows = BadRows(
        args.output_dir,
        data_args.max_bad_row_share,
        data_args.max_bad_rows,
        writes=args.should_save,
        resume=bool(args.resume_from_checkpoint),
    )
    if data_args.streaming:
        if args.max_steps < 1 or args.group_by_modality_length:
            raise ValueError(
                f"`streaming` with `max_steps` {args.max_steps} and `group_by_modality_length` "
                f"{args.group_by_modality_length}: a stream has no end, so give a number of steps, and no lengths."
            )
        bad_rows.total = args.rows_of_run
    train_dataset, eval_dataset = load_train_and_validation(
        data_args, bad_rows, args.seed, args.eval_strategy != "no", args.dataset_num_proc
    )
    collator = build_collator(args, processor, teachers)
    if collator.feature_cache is not None:
        for dataset in (train_dataset, eval_dataset):
            if dataset is not None:
                collator.feature_cache.check_data(dataset)
    fit_feature_statistics(args, distiller, teachers, train_dataset, collator, bad_rows)
    trainer = MoveKDTrainer(
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
        trainer.add_callback(PictureCallback(trainer, model))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir, _internal_call=True)  # `main` publishes it
    trainer.accelerator.print(f"Saved the student to {args.output_dir}.")
    return trainer


def main(arguments: list[str]) -> None:
    if not arguments or arguments == ["--rebuild_towers"]:
        from train.demo import run_demo

        run_demo(rebuild_towers=bool(arguments))
        return
    parser = TrlParser((DataArguments, MoveKDSFTConfig, ModelArguments))
    recipe = dict(pairwise(arguments)).get("--config")
    data_args, args, model_args = parser.parse_args_and_config(arguments)
    trainer = train(data_args, args, model_args, recipe)
    trainer.end()
    if trainer.args.push_to_hub:
        trainer.publish()  # after the processes have parted, as none should wait for an upload


if __name__ == "__main__":
    main(sys.argv[1:])
