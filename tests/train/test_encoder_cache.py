"""The feature cache of stage `encoder`: training reads what the teachers would have given."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.helpers.cached_rows import write
from train.build import build_image_collator, build_teachers
from train.cache_writer import collator_of_recipe
from train.data.bad_rows import BadRows
from train.data.datasets import load_train_and_validation


def test_cached_features_of_images_are_the_teachers(arguments: Any, tmp_path: Path) -> None:
    """No tokenizer is needed; the black image of a broken one has the features of a black image, in its place."""
    for number in range(7):
        Image.new("RGB", (20, 24), (30 * number, 200 - 20 * number, 90)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    settings = {"stage": "encoder", "language_model": None, "chat_template": "vicuna_v1", "max_length": 2048}
    settings |= {"dataset_name": [str(tmp_path)], "distillation_preset": "student_heads"}
    data_args, args, model_args = arguments(**settings, feature_cache=str(tmp_path.parent / "image_cache"))
    data_args.max_bad_row_share = 0.5
    write((data_args, args, model_args), "float16", 3)

    rows, _ = load_train_and_validation(data_args, BadRows(max_share=0.5), images_only=True)
    cached = build_teachers(args)
    read = build_image_collator(args, collator_of_recipe(args, model_args, {}).image_processor, cached)
    args.feature_cache = None
    live = build_teachers(args)
    batch = [rows[index] for index in (5, 3, 0)]
    of_cache, of_teachers = read(batch), collator_of_recipe(args, model_args, live)(batch)
    assert torch.equal(of_cache["pixel_values"], of_teachers["pixel_values"])
    for name, teacher in live.items():
        expected = teacher(of_teachers["teacher_pixel_values"][name]).tokens
        got = cached[name](of_cache["cached_features"][name]).tokens
        torch.testing.assert_close(got, expected.half().float(), atol=1e-3, rtol=2e-3)
