"""
The small recipe's first stage as it runs, with random weights: `python -m benchmarks.speed.small_recipe`.

- Memory of a GPU in training over the planner's estimate (`python -m train.plan`), which must be within 15 %.
- Images a second of a feature cache, written from JPEGs, over the teachers' forwards alone.
- Teachers on a stream of their own beside the student's forward, over one after the other (CUDA alone).

It also prints the steps a second. Checkpoints of the sizes of CLIP-B/16, DINOv2-B, SigLIP 2 B/16 and SmolLM2-360M are
written to a temporary folder of some 3 GB. With `--toy` the demo's networks take their place.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.options import parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    flags = parser(__doc__, repeats=5)
    flags.add_argument("--batch_size", type=int, default=None, help="32, or 2 with --toy")
    flags.add_argument("--steps", type=int, default=None, help="20, or 4 with --toy")
    return flags.parse_args(arguments)


# Before the imports below, which take seconds
if __name__ == "__main__":
    parse_arguments()

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from benchmarks.speed.measure import ROOT, Row, paired_row, paired_times, report, start
from benchmarks.speed.models import BASE, LANGUAGE, TOKENIZER
from train.arguments import DataArguments, ModelArguments
from train.build import teacher_configs
from train.cache_writer import CacheArguments, cache_features
from train.config import MoveKDSFTConfig
from train.plan.memory import sharded_memory
from train.plan.models import build_planned_run
from train.plan.step import input_bytes, measure_activations
from train.run import train
from train.teachers.features import FrozenTeacher
from train.teachers.loaders import load_teacher


DEMO = ROOT / "train" / "demo" / "weights"


def write_networks(folder: Path) -> dict[str, str]:
    """Checkpoints with random weights, by name, with the image processors that CLIP has."""
    torch.manual_seed(0)
    sides = {"image_size": 224, "patch_size": 16}
    dinov2 = {name: value for name, value in BASE.items() if name != "intermediate_size"}
    models = {
        "clip": CLIPVisionModel(CLIPVisionConfig(**BASE, **sides)),
        "dinov2": Dinov2Model(Dinov2Config(**dinov2, image_size=224, patch_size=14)),
        "siglip2": SiglipVisionModel(SiglipVisionConfig(**BASE, **sides)),
        "language_model": LlamaForCausalLM(LlamaConfig(**LANGUAGE, max_position_embeddings=8192)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        if name != "language_model":
            CLIPImageProcessor(size={"shortest_edge": 224}).save_pretrained(folder / name)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "language_model")
    return {name: str(folder / name) for name in models}


def write_rows(folder: Path, numbers: list[int]) -> list[Path]:
    """A LLaVA file for each number of rows, with JPEGs of 640 x 480 pixels and captions of some 30 words."""
    draw = np.random.default_rng(0)
    words = " ".join(["a red circle at the left below a blue square"] * 3)
    turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": words}]
    for index in range(max(numbers)):
        small = draw.integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(small).resize((640, 480)).save(folder / f"{index}.jpg", quality=90)
    paths = [folder / f"{number}.json" for number in numbers]
    for path, number in zip(paths, numbers, strict=True):
        rows = [{"id": str(index), "image": f"{index}.jpg", "conversations": turns} for index in range(number)]
        path.write_text(json.dumps(rows))
    return paths


def arguments(folder: Path, networks: dict[str, str], chosen: Any) -> MoveKDSFTConfig:
    taught = ("detector", "reader") if chosen.toy else ("dinov2", "siglip2")
    dtype = "float32" if chosen.device == "cpu" else "bfloat16"
    teachers: Any = [{"name": name, "model": networks[name], "dtype": dtype} for name in ("clip", *taught)]
    return MoveKDSFTConfig(
        output_dir=str(folder / "student"),
        overwrite_output_dir=True,
        stage="pretrain",
        vision_model=networks["clip"],
        language_model=networks["language_model"],
        teachers=teachers,
        chat_template="own" if chosen.toy else "vicuna_v1",
        per_device_train_batch_size=chosen.batch_size,
        gradient_accumulation_steps=1,
        max_steps=chosen.steps,
        learning_rate=1e-4,
        bf16=chosen.device != "cpu",
        use_cpu=chosen.device == "cpu",
        activation_checkpointing=True,
        dataloader_num_workers=0 if chosen.toy else 8,
        logging_steps=1,
        save_strategy="no",
        report_to=["none"],
    )


def training_rows(data: Path, args: MoveKDSFTConfig) -> list[Row]:
    """Train, and compare the peak with the plan for rows of the same length."""
    on_gpu = torch.cuda.is_available() and not args.use_cpu
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer = train(DataArguments([str(data)]), args, ModelArguments())
    tokens = trainer.data_collator([trainer.train_dataset[0]])["input_ids"].shape[1]
    rates = [entry["images_per_second"] for entry in trainer.state.log_history if "images_per_second" in entry]
    rate, rows = statistics.median(rates[len(rates) // 2 :]), args.per_device_train_batch_size
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
    trainer.end()
    run = build_planned_run(args, ModelArguments())
    planned = sum(sharded_memory("DDP", run.model, args, 1).values()) + rows * input_bytes(run, tokens)
    planned += sum(weight.nbytes for teacher in run.teachers.values() for weight in teacher.parameters())
    planned += measure_activations(run, tokens, autocast=args.bf16)
    print(f"{rate / rows:.2f} steps and {rate:.1f} images a second, in rows of {tokens} tokens.")
    what = "peak memory of the small recipe's first stage"
    return [
        Row(what, peak, planned / 1e9, "GB", at_most=1.15, note="rival: the plan"),
        Row(f"{what}, at least", peak, planned / 1e9, "GB", at_least=0.85, note="rival: the plan"),
    ]


def teacher_pixels(teachers: Sequence[FrozenTeacher], args: MoveKDSFTConfig) -> dict[str, torch.Tensor]:
    sizes = {teacher.name: teacher.preprocessor.image_size for teacher in teachers}
    rows = args.per_device_train_batch_size
    return {name: torch.rand(rows, 3, size, size, device=args.device) for name, size in sizes.items()}


def teachers_forward(teachers: Sequence[FrozenTeacher], pixels: dict[str, torch.Tensor]) -> None:
    for teacher in teachers:
        teacher(pixels[teacher.name])


def cache_row(folder: Path, data: list[Path], args: MoveKDSFTConfig, images: list[int]) -> Row:
    """
    Write a cache of few and one of many images, whose difference leaves out what loading takes. The rival runs each
    teacher as often on pixels that are there.
    """
    seconds = []
    for path in data:
        args.feature_cache = str(folder / f"features of {path.name}")
        start = time.perf_counter()
        cache_features(DataArguments([str(path)]), args, ModelArguments(), CacheArguments())
        seconds.append(time.perf_counter() - start)
    args.feature_cache = None
    teachers = [load_teacher(config).to(args.device) for config in teacher_configs(args)]
    pixels, more = teacher_pixels(teachers, args), images[1] - images[0]
    teachers_forward(teachers, pixels)
    repeats = more // args.per_device_train_batch_size

    def forwards() -> None:
        for _ in range(repeats):
            teachers_forward(teachers, pixels)

    alone = paired_times({"teachers": forwards}, 1, 0)
    what = "images a second while a feature cache is written"
    note = "rival: the teachers' forwards alone; ours with decoding and writing"
    ours = more / max(seconds[1] - seconds[0], 1e-3)
    return Row(what, ours, more / alone["teachers"][0], "images/s", at_least=0.95, note=note)


def stream_row(args: MoveKDSFTConfig, repeats: int) -> Row | None:
    """The teachers' forwards on a stream of their own, while the student's tower runs forward and backward."""
    if args.device.type != "cuda":
        return None
    teachers = [load_teacher(config).to(args.device) for config in teacher_configs(args)]
    student = CLIPVisionModel.from_pretrained(args.vision_model, dtype=torch.bfloat16).to(args.device).train()
    pixels = teacher_pixels(teachers, args)
    own = torch.rand(args.per_device_train_batch_size, 3, 224, 224, device=args.device, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()

    def student_step() -> None:
        student(own).last_hidden_state.float().square().mean().backward()
        student.zero_grad()

    def beside() -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            teachers_forward(teachers, pixels)
        student_step()
        torch.cuda.current_stream().wait_stream(stream)

    def after() -> None:
        teachers_forward(teachers, pixels)
        student_step()

    functions: dict[str, Callable[[], None]] = {"beside": beside, "after": after}
    times = paired_times(functions, repeats, warm_up=2)
    what = "teachers on a stream of their own beside the tower's step"
    return paired_row(what, times["beside"], times["after"], note="rival: one after the other")


def main(given: Sequence[str] | None = None) -> str:
    chosen = parse_arguments(given)
    chosen.batch_size = chosen.batch_size or (2 if chosen.toy else 32)
    chosen.steps = chosen.steps or (4 if chosen.toy else 20)
    start(chosen)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = ("clip", "detector", "reader", "language_model")
        networks = {name: str(DEMO / name) for name in names} if chosen.toy else write_networks(folder)
        images = [chosen.batch_size, chosen.batch_size * (3 if chosen.toy else 128)]
        data = write_rows(folder, images)
        args = arguments(folder, networks, chosen)
        rows = [*training_rows(data[1], args), cache_row(folder, data, args, images)]
        rows += [row for row in (stream_row(args, chosen.repeats),) if row is not None]
    context = {"device": chosen.device, "batch": chosen.batch_size, "steps": chosen.steps, "bf16": args.bf16}
    return report("The small recipe", rows, context, chosen.out)


if __name__ == "__main__":
    main()
