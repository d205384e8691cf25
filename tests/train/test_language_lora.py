"""LoRA of the language model: what trains, what is published, and what a resumed run needs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM
from trl import TrlParser

from modeling_movekd import MoveKDForConditionalGeneration
from modeling_movekd.files import read_json
from tests.helpers.launched import DDP_CPU, ROOT, SCRIPT, launch, run, write_settings
from train import run as stage_run
from train.arguments import DataArguments, ModelArguments
from train.callbacks import STEPS_WATCHED
from train.checkpoints import MANIFEST_NAME, write_manifest
from train.config import MoveKDSFTConfig
from train.language_lora import LANGUAGE_LORA_NAME, language_lora_layers, merged_state_dict
from train.trainer import MoveKDTrainer


LORA = {"language_lora_rank": 4, "language_lora_dropout": 0.1, "learning_rate": 1e-2}
QUANTISED = pytest.param(True, id="4 bits")
ZERO2_CPU = (
    *("--config_file", ROOT / "train" / "accelerate" / "zero2.yaml", "--num_processes", "2"),
    *("--mixed_precision", "no", "--main_process_port", "0"),
)
LINEAR_LAYERS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(params=[pytest.param(False, id="LoRA"), QUANTISED])
def load_in_4bit(request: pytest.FixtureRequest) -> bool:
    if request.param:
        pytest.importorskip("bitsandbytes")
    return request.param


def batch_of(trainer: MoveKDTrainer) -> dict[str, torch.Tensor]:
    batch = next(iter(trainer.get_train_dataloader()))
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


@torch.no_grad()
def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Calls the forward of the class, which training has wrapped."""
    return MoveKDForConditionalGeneration.forward(model.eval(), **batch).logits


def is_lora(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def is_language(name: str) -> bool:
    return "language_model." in name or "lm_head." in name


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch):
    """Runs `stage_run.train`, and keeps the weights before the first step in `trainer.before`."""

    class Remembering(MoveKDTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.before = {name: value.detach().clone() for name, value in self.model.named_parameters()}

    monkeypatch.setattr(stage_run, "MoveKDTrainer", Remembering)
    return stage_run.train


def test_lora_and_all_but_the_language_model_train(train, arguments, load_in_4bit: bool, capsys) -> None:
    # Long enough for the guard to check every gradient
    trainer = train(*arguments(**LORA, max_steps=STEPS_WATCHED, load_in_4bit=load_in_4bit))
    after = dict(trainer.model.named_parameters())
    changed = {name for name, value in after.items() if not torch.equal(value, trainer.before[name])}
    assert changed == {name for name in after if is_lora(name) or not is_language(name)}
    for part in ("experts", "router", "projector", "distiller.", "vision_tower.embeddings", "lora_A", "lora_B"):
        assert any(part in name for name in changed), part
    assert {value.dtype for name, value in after.items() if name in changed} == {torch.float32}
    frozen = {name: value for name, value in after.items() if name not in changed}
    packed = {name for name, value in frozen.items() if value.dtype == torch.uint8}
    assert packed == ({name for name in frozen if "base_layer" in name} if load_in_4bit else set())

    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Stage"))
    trained, frozen_part = said.split("Frozen:")
    # Seven layers in each of two blocks: rank 4 times the sum of width and height
    assert (
        "LoRA of the language model 4,352" in trained
        and "language model" not in trained.replace("LoRA of the ", "", 1).split("4,352")[1]
    )
    dense = sum(value.numel() for value in LlamaForCausalLM.from_pretrained(trainer.args.language_model).parameters())
    image_row = 2 * 32  # of the embedding and of the head
    assert f"language model {dense + image_row:,}" in frozen_part
    facts = json.loads((Path(trainer.args.output_dir) / "training_facts.json").read_text())["language_lora"]
    assert facts == {
        "rank": 4,
        "alpha": 8,
        "dropout": 0.1,
        "learning_rate": 1e-2,
        "target_modules": LINEAR_LAYERS,
        "load_in_4bit": load_in_4bit,
    }


def test_published_model_is_the_live_one(arguments, load_in_4bit: bool) -> None:
    trainer = stage_run.train(*arguments(**LORA, load_in_4bit=load_in_4bit))
    folder, batch = Path(trainer.args.output_dir), batch_of(trainer)
    live = logits(trainer.model, batch)
    model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    torch.testing.assert_close(logits(model, batch), live, rtol=0, atol=1e-5)
    # LoRA has an effect, and saving does not change the live model
    with torch.no_grad():
        for layer in language_lora_layers(trainer.model).values():
            layer.set_scale("default", 0.0)
    assert (logits(trainer.model, batch) - live).abs().max() > 1e-2


def test_merging_other_weights_than_the_live_ones(arguments) -> None:
    """If the weights are sharded, gathered weights are merged."""
    trainer = stage_run.train(*arguments(**LORA, max_steps=1))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    gathered = {name: 2 * value if is_lora(name) else value for name, value in before.items()}
    once, twice = merged_state_dict(trainer.model), merged_state_dict(trainer.model, gathered)
    name = "model.language_model.layers.1.mlp.down_proj"
    base = before[f"{name}.base_layer.weight"]
    torch.testing.assert_close(twice[f"{name}.weight"] - base, 4 * (once[f"{name}.weight"] - base))
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_without_lora_nothing_is_different(arguments) -> None:
    plain = stage_run.train(*arguments(max_steps=1))
    assert not language_lora_layers(plain.model)
    assert not (Path(plain.args.output_dir) / LANGUAGE_LORA_NAME).exists()
    facts = json.loads((Path(plain.args.output_dir) / "training_facts.json").read_text())
    assert facts["language_lora"] is None
    assert all(value.requires_grad for name, value in plain.model.named_parameters())


def test_learning_rates(arguments) -> None:
    rates = {"language_lora_learning_rate": 2e-4, "vision_tower_learning_rate": 3e-5, "learning_rate": 1e-3}
    trainer = stage_run.train(*arguments(**LORA | rates, max_steps=1, lr_scheduler_type="constant"))
    names = {id(value): name for name, value in trainer.model.named_parameters()}
    found = {names[id(value)]: group["lr"] for group in trainer.optimizer.param_groups for value in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    for name, rate in found.items():
        assert rate == (2e-4 if is_lora(name) else 3e-5 if "vision_tower." in name else 1e-3), name
    assert found.keys() == {name for name, value in trainer.model.named_parameters() if value.requires_grad}


def test_target_modules(arguments) -> None:
    trainer = stage_run.train(*arguments(**LORA, max_steps=1, language_lora_target_modules=["q_proj", "mlp.up_proj"]))
    layers = language_lora_layers(trainer.model)
    assert len(layers) == 4 and {name.rsplit(".", 1)[-1] for name in layers} == {"q_proj", "up_proj"}
    for names, message in (
        (["q_proj", "query"], r"\['query'\].*LlamaModel does not have.*'q_proj'"),
        (["q_proj", "embed_tokens"], r"linear layers.*embed_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            stage_run.train(*arguments(**LORA, language_lora_target_modules=names, overwrite_output_dir=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"language_lora_rank": 4, "stage": "pretrain"}, "language_lora_rank` is 4, but stage 'pretrain'"),
        ({"load_in_4bit": True}, "`load_in_4bit` is true, but `language_lora_rank` is 0"),
        ({"language_lora_learning_rate": 2e-4, "language_lora_alpha": 64}, "rank` is 0, where .*alpha': 64, .*0.0002"),
        ({"language_lora_target_modules": ["q_proj"]}, r"rank` is 0, where .*\['q_proj'\]"),
        ({"language_lora_dropout": 0.1}, "rank` is 0, where .*'language_lora_dropout': 0.1"),
        ({"language_lora_rank": -1}, "`language_lora_rank` is -1"),
        ({"language_lora_rank": 4, "language_lora_alpha": 0}, "`language_lora_alpha` 0"),
        ({"language_lora_rank": 4, "language_lora_dropout": 1.0}, "`language_lora_dropout` is 1.0"),
    ],
)
def test_settings_that_do_not_go_together(arguments, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(**settings)


def test_4_bits_without_the_package(arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="needs the package bitsandbytes"):
        stage_run.train(*arguments(**LORA, load_in_4bit=True))


@pytest.mark.slow
def test_4_bits_under_deepspeed(runs, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("deepspeed")
    result = launch(SCRIPT, runs[0](tmp_path / "output", load_in_4bit=True), launcher=ZERO2_CPU)
    assert result.returncode != 0 and "DeepSpeed and FSDP cannot handle" in result.stdout, result.stdout[-6000:]


def test_4_bits_under_fsdp(arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    settings = arguments(**LORA, load_in_4bit=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="DeepSpeed and FSDP cannot handle"):
        stage_run.train(*settings)


SETTINGS = LORA | {"lora_dropout": 0.05, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
FILES = ("model.safetensors", "distiller.safetensors", LANGUAGE_LORA_NAME)


@pytest.fixture(scope="module")
def runs(parts: dict[str, str], dataset_folder: str, tmp_path_factory: pytest.TempPathFactory):
    """The settings of a run, and the output of four steps without interruption, once for each precision."""
    root, made = tmp_path_factory.mktemp("lora"), {}

    def write(folder: Path, load_in_4bit: bool = False, **overrides: Any) -> Path:
        settings = SETTINGS | {"load_in_4bit": load_in_4bit} | overrides
        return write_settings(folder, parts, dataset_folder, **settings)

    def straight(load_in_4bit: bool = False) -> Path:
        if load_in_4bit not in made:
            made[load_in_4bit] = root / f"straight-{load_in_4bit}"
            run(write(made[load_in_4bit], load_in_4bit))
        return made[load_in_4bit]

    return write, straight


@pytest.fixture
def resume(runs, tmp_path: Path):
    """Changes a copy of the second step's checkpoint, resumes from it, and returns the output."""
    write, straight = runs

    def resume(change=lambda checkpoint: None, load_in_4bit: bool = False, **overrides: Any) -> Path:
        output = tmp_path / "resumed"
        checkpoint = output / "checkpoint-2"
        shutil.copytree(straight(load_in_4bit) / "checkpoint-2", checkpoint)
        change(checkpoint)
        manifest = read_json(checkpoint / MANIFEST_NAME)
        write_manifest(checkpoint, manifest["step"], manifest["run"])  # else the change itself would be refused
        run(write(output, load_in_4bit, resume_from_checkpoint=str(checkpoint), **overrides))
        return output

    return resume


def assert_same(folder: Path, other: Path) -> None:
    for name in FILES:
        one, two = (load_file(part / "checkpoint-4" / name) for part in (folder, other))
        assert one.keys() == two.keys()
        assert [key for key, value in one.items() if not torch.equal(value, two[key])] == []
    states = [torch.load(part / "checkpoint-4" / "optimizer.pt")["state"] for part in (folder, other)]
    assert states[0].keys() == states[1].keys()
    for one, two in zip(states[0].values(), states[1].values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_resumed_is_the_same_run(runs, resume, load_in_4bit: bool) -> None:
    straight = runs[1](load_in_4bit)
    adapters = load_file(straight / "checkpoint-2" / LANGUAGE_LORA_NAME)
    assert len(adapters) == 2 * 2 * len(LINEAR_LAYERS)
    assert adapters["model.language_model.layers.0.mlp.down_proj.lora_B.weight"].abs().max() > 0
    assert_same(resume(load_in_4bit=load_in_4bit), straight)


def test_tied_head_biases_and_mixed_precision(runs, parts: dict[str, str], tmp_path: Path, load_in_4bit: bool) -> None:
    """Tied embeddings, as in many small language models, in bfloat16 with adapters in float32."""
    config = LlamaConfig.from_pretrained(parts["language"], tie_word_embeddings=True, attention_bias=True)
    language = shutil.copytree(parts["language"], tmp_path / "language")
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.add_(0.1 if name.endswith("bias") else 0)
    model.save_pretrained(language)
    settings = {"language_model": str(language), "dtype": "bfloat16", "bf16": True, "load_in_4bit": load_in_4bit}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    parser = TrlParser((DataArguments, MoveKDSFTConfig, ModelArguments))

    def train(folder: Path, **more: Any) -> MoveKDTrainer:
        config = runs[0](folder, **settings, **more)
        return stage_run.train(*parser.parse_args_and_config(["--config", str(config)]))

    trainer = train(straight)
    dtypes = {value.dtype for name, value in trainer.model.named_parameters() if is_lora(name)}
    assert dtypes == {torch.float32} and trainer.model.lm_head.weight.dtype == torch.bfloat16
    train(resumed, resume_from_checkpoint=str(straight / "checkpoint-2"))
    assert_same(resumed, straight)
    published = load_file(straight / "model.safetensors")
    assert {value.dtype for value in published.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in published
    bias = published["model.language_model.layers.1.self_attn.q_proj.bias"]
    torch.testing.assert_close(bias, torch.full_like(bias, 0.1))


def test_resuming_without_lora_raises(resume) -> None:
    with pytest.raises(ValueError, match="with LoRA of the language model, but `language_lora_rank` is 0"):
        resume(language_lora_rank=0, language_lora_dropout=0.0)


def test_shards_are_one_model(runs, resume) -> None:
    def change(checkpoint: Path) -> None:
        MoveKDForConditionalGeneration.from_pretrained(checkpoint).save_pretrained(checkpoint, max_shard_size="100KB")
        (checkpoint / "model.safetensors").unlink()
        assert len(list(checkpoint.glob("model-*-of-*.safetensors"))) > 1

    assert_same(resume(change), runs[1]())


def test_without_the_adapters_resuming_raises(resume) -> None:
    with pytest.raises(ValueError, match=f"{LANGUAGE_LORA_NAME} is missing"):
        resume(lambda checkpoint: (checkpoint / LANGUAGE_LORA_NAME).unlink())


def test_adapters_of_zero_are_noticed(resume) -> None:
    def change(checkpoint: Path) -> None:
        path = checkpoint / LANGUAGE_LORA_NAME
        save_file({name: torch.zeros_like(value) for name, value in load_file(path).items()}, path)

    with pytest.raises(ValueError, match="frozen weights under LoRA are not those"):
        resume(change)


def test_another_rank_is_another_run(resume) -> None:
    with pytest.raises(ValueError, match=r"other adapters.*lora_A.weight.*\(4, 32\), \(8, 32\)"):
        resume(language_lora_rank=8)


def test_another_scale_is_another_run(resume) -> None:
    with pytest.raises(ValueError, match="language_lora_alpha"):
        resume(language_lora_alpha=9)


def test_another_language_model_is_another_run(resume, parts: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(parts["language"], tmp_path / "language")
    path = tmp_path / "language" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.self_attn.v_proj.weight"] *= 1.001
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 differ: \['model.language_model.layers.1.self_attn.v_proj'\]"):
        resume(language_model=str(tmp_path / "language"))


@pytest.mark.parametrize("key", ["model.language_model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
def test_a_missing_weight_is_noticed(resume, key: str) -> None:
    def change(checkpoint: Path) -> None:
        path = checkpoint / "model.safetensors"
        weights = load_file(path)
        weights[f"{key}s"] = weights.pop(key)
        save_file(weights, path, metadata={"format": "pt"})

    with pytest.raises(ValueError, match=rf"missing: \['{key}'\], left over: \['{key}s'\]"):
        resume(change)


def test_best_model_is_loaded_with_its_adapters(runs, tmp_path: Path) -> None:
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "dataset_test_split": "train", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = run(runs[0](tmp_path / "output", **evaluation, **best, max_steps=3))
    folder = Path(trainer.state.best_model_checkpoint)
    assert folder.name != "checkpoint-3", "the greatest loss is an early one"
    adapters, model = load_file(folder / LANGUAGE_LORA_NAME), trainer.model.state_dict()
    for key, value in adapters.items():
        assert torch.equal(value, model[key.replace(".weight", ".default.weight")]), key
    published = load_file(tmp_path / "output" / "model.safetensors")
    for key, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(published[key], value), key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LoRA, DDP", "4 bits, DDP", "LoRA, ZeRO-2"])
def test_two_processes(runs, tmp_path: Path, kind: str) -> None:
    """Two processes train like one with twice the batch, and resume."""
    load_in_4bit, launcher, called = "4 bits" in kind, DDP_CPU, "DistributedDataParallel"
    if load_in_4bit:
        pytest.importorskip("bitsandbytes")
    if "ZeRO-2" in kind:
        pytest.importorskip("deepspeed")
        launcher, called = ZERO2_CPU, "DeepSpeedEngine"
    write, _ = runs
    dropout = {"language_lora_dropout": 0.0, "lora_dropout": 0.0}
    descent = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    settings = {"load_in_4bit": load_in_4bit} | dropout | descent
    two, resumed = tmp_path / "two", tmp_path / "resumed"
    checkpoint = str(two / "checkpoint-2")
    configs = [write(two, **settings), write(resumed, **settings, resume_from_checkpoint=checkpoint)]
    result = launch(SCRIPT, *configs, launcher=launcher)
    assert result.returncode == 0, result.stdout[-6000:]
    facts = [json.loads((two / f"facts-{rank}.json").read_text()) for rank in range(2)]
    assert [part["called"] for part in facts] == [[called]] * 2
    assert facts[0]["weights"] == facts[1]["weights"]
    one = tmp_path / "one"
    run(write(one, **settings, per_device_train_batch_size=8))
    for name in FILES:
        weights, again = load_file(one / name), load_file(resumed / name)
        for key, value in load_file(two / name).items():
            assert torch.equal(value, again[key]), key
            torch.testing.assert_close(value, weights[key], rtol=1e-5, atol=1e-6, msg=key)
