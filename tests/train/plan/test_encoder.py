"""The plan of stage `encoder` against a real run of it."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.colored_rows import llava_rows
from train.build import build_distiller, build_image_collator, build_teachers, parameter_groups
from train.build_encoder import build_encoder
from train.encoder_trainer import MoveKDEncoderTrainer
from train.plan.report import measure_step
from train.plan.step import FLOP_FORMULAS, LiveBytes, input_bytes


def test_plan_is_that_of_a_run(arguments: Any) -> None:
    settings = {"stage": "encoder", "language_model": None, "chat_template": "vicuna_v1", "max_length": 2048}
    settings |= {"distillation_preset": "student_heads", "feature_statistics_images": 2}
    _, args, model_args = arguments(**settings)
    planned = measure_step(args, model_args)

    model, processor = build_encoder(args, model_args)
    teachers = build_teachers(args)
    collator = build_image_collator(args, processor, teachers)
    images = [{"images": [row["image"]]} for row in llava_rows(args.per_device_train_batch_size)]
    batch = collator(images)
    distiller = build_distiller(args, model, teachers)
    features = {name: teacher(batch["teacher_pixel_values"][name]) for name, teacher in teachers.items()}
    distiller.fit_statistics([features])
    trainer = MoveKDEncoderTrainer(
        model, args, teachers=teachers, distiller=distiller, train_dataset=images, data_collator=collator
    )
    assert parameter_groups(planned.run.model) == parameter_groups(model)
    sizes = [batch["pixel_values"].nbytes, *(pixels.nbytes for pixels in batch["teacher_pixel_values"].values())]
    assert input_bytes(planned.run, 0) * len(images) == sum(sizes)

    counter, memory = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS), LiveBytes()
    for module in (model, *teachers.values()):
        memory.ignore(*module.parameters(), *module.buffers())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            memory.ignore(parameter.grad)
    model.train()
    trainer._images, trainer.current_gradient_accumulation_steps = torch.tensor(float(len(images))), 1
    batch.pop("bad_rows")
    with counter:
        trainer.compute_loss(model, dict(batch), num_items_in_batch=trainer._images).backward()
    assert counter.get_total_flops() == sum(planned.row_flops.values()) * len(images)
    with memory:
        trainer.compute_loss(model, dict(batch), num_items_in_batch=trainer._images).backward()
    assert abs(memory.peak / planned.activations["DDP"] - 1) < 0.1
