"""The authors' checkpoint, converted, against what their code computes with it: inputs, logits, tokens, a step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from colours import llava_rows
from parity import assert_gradients, assert_values, read_case, with_prefix
from safetensors.torch import load_file
from torch import nn
from transformers import AutoProcessor, LlamaConfig

from hub.authors import key_from_authors, state_dict_from_authors, state_dict_to_authors
from hub.convert import convert
from hub.layouts import Origin, collect, empty_model, expected_weights, make_pieces
from hub.weights import WeightFiles
from modeling_movekd import MoveKDConfig, MoveKDForConditionalGeneration
from train.build import build_distiller
from train.config import MoveKDSFTConfig
from train.data import load_conversations
from train.sft import build_collator
from train.teachers import TeacherConfig, TeacherFeatures, load_teacher
from train.trainer import MoveKDTrainer


pytestmark = pytest.mark.parity

Golden = tuple[dict[str, torch.Tensor], dict[str, Any]]
IMAGE_POSITION = -200
NAMES = {"CLIP": "clip", "SAM": "sam", "EVA": "eva02", "Pix2Struct": "pix2struct", "ConvNeXt": "convnext"}
ADAPTER_TOLERANCE = 3e-4


@pytest.fixture(scope="module")
def expected(authors: Path) -> Golden:
    return read_case(authors / "expected.safetensors")


@pytest.fixture(scope="module", params=["converted", "converted_whole"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> MoveKDForConditionalGeneration:
    return MoveKDForConditionalGeneration.from_pretrained(folder).eval()


def expand(input_ids: torch.Tensor, config: MoveKDConfig) -> torch.Tensor:
    """One row of the authors' ids with as many image tokens as there are features in place of each image."""
    parts = [
        torch.full((config.image_seq_length,), config.image_token_index) if token == IMAGE_POSITION else token[None]
        for token in input_ids.flatten()
    ]
    return torch.cat(parts)[None]


def test_configuration(authors: Path, folder: Path) -> None:
    theirs = json.loads((authors / "config.json").read_text())
    clip = json.loads((authors / theirs["mm_vision_tower"] / "config.json").read_text())
    config = MoveKDConfig.from_pretrained(folder)
    text, vision, moe = config.text_config, config.vision_config, theirs["moe"]
    same = ("attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size")
    same += ("initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads")
    same += ("num_hidden_layers", "num_key_value_heads", "pad_token_id", "pretraining_tp", "rms_norm_eps", "use_cache")
    for name in same:
        assert getattr(text, name) == theirs[name], name
    assert text.model_type == "llama"
    assert text.rope_parameters["rope_theta"] == theirs["rope_theta"]
    assert text.tie_word_embeddings == config.tie_word_embeddings == theirs["tie_word_embeddings"]
    assert config.original_vocab_size == config.image_token_index == theirs["vocab_size"]
    assert text.vocab_size == theirs["vocab_size"] + 1
    assert str(config.dtype) == f"torch.{theirs['torch_dtype']}"
    assert config.image_aspect_ratio == theirs["image_aspect_ratio"]

    assert vision.num_experts == moe["moe_encoder_num_experts"]
    assert (vision.lora_rank, vision.lora_alpha) == (moe["moe_encoder_lora_rank"], moe["moe_encoder_lora_alpha"])
    assert vision.dense_routing == moe["moe_encoder_dense"]
    assert (vision.expert_bias, vision.router_gradient, vision.expert_init) == (True, "none", "kaiming")
    for name in ("hidden_act", "hidden_size", "image_size", "intermediate_size", "layer_norm_eps", "patch_size"):
        assert getattr(vision, name) == clip[name], name
    assert vision.num_attention_heads == clip["num_attention_heads"]
    depth, layer = clip["num_hidden_layers"], theirs["mm_vision_select_layer"]
    if vision.add_pooling_layer:
        assert (vision.num_hidden_layers, config.vision_feature_layer) == (depth, layer)
    else:
        assert (vision.num_hidden_layers, config.vision_feature_layer) == (depth + 1 + layer, -1)
    assert config.vision_feature_select_strategy == "default" and theirs["mm_vision_select_feature"] == "patch"
    dropped = json.loads((folder / "conversion.json").read_text())["dropped_config"]
    assert {name: theirs[name] for name in dropped} == dropped
    # What is left is all that neither says nor changes anything about the model
    assert {name.split("_")[0] for name in dropped} <= {
        "",
        "architectures",
        "freeze",
        "kd",
        "mm",
        "transformers",
        "tune",
    }


def test_processor(authors: Path, folder: Path, expected: Golden) -> None:
    tensors, metadata = expected
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    config = json.loads((authors / "config.json").read_text())
    clip = json.loads((authors / config["mm_vision_tower"] / "preprocessor_config.json").read_text())
    images = processor.image_processor
    assert images.do_pad
    assert (list(images.image_mean), list(images.image_std)) == (clip["image_mean"], clip["image_std"])
    assert (int(images.resample), images.rescale_factor) == (clip["resample"], clip["rescale_factor"])
    assert dict(images.size) == clip["size"] and dict(images.crop_size) == clip["crop_size"]
    assert processor.tokenizer.padding_side == config["tokenizer_padding_side"]
    for index, prompt in enumerate(metadata["prompts"]):
        # As in the chat template: the text behind an image begins a new word
        ids = processor.tokenizer(prompt.replace("<image>", "<image> "), return_tensors="pt").input_ids
        theirs = tensors[f"prompt{index}.input_ids"]
        assert torch.equal(ids.masked_fill(ids == processor.image_token_id, IMAGE_POSITION), theirs), prompt


@torch.no_grad()
def test_prompts(model: MoveKDForConditionalGeneration, expected: Golden) -> None:
    tensors, metadata = expected
    vision = model.get_image_features(tensors["pixel_values"], return_dict=True)
    features = vision.hidden_states[model.config.vision_feature_layer][:, 1:]
    assert_values(features, tensors["vision.selected_feature"], "selected features")
    assert_values(torch.stack(list(vision.pooler_output)), tensors["vision.projected"], "projected features")
    for index in range(len(metadata["prompts"])):
        case = with_prefix(tensors, f"prompt{index}.")
        input_ids, pixels = expand(case["input_ids"], model.config), tensors["pixel_values"][index : index + 1]
        noted: list[torch.Tensor] = []
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs, noted=noted: noted.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        logits = model(input_ids=input_ids, pixel_values=pixels).logits
        hook.remove()
        assert_values(noted[0], case["inputs_embeds"], f"inputs_embeds of prompt {index}")
        original = case["logits"].shape[-1]
        assert_values(logits[..., :original], case["logits"], f"logits of prompt {index}")
        # What is not the authors' can never win, whatever decodes
        assert (logits[..., original:].amax(dim=-1) < logits[..., :original].amax(dim=-1)).all()
        greedy = case["greedy_8_new_tokens"]
        generated = model.generate(
            input_ids=input_ids, pixel_values=pixels, max_new_tokens=greedy.shape[1], do_sample=False
        )
        assert torch.equal(generated[:, input_ids.shape[1] :], greedy)
        assert torch.equal(case["raw_generate_return"][:, 1:], greedy)


@torch.no_grad()
def test_batch(model: MoveKDForConditionalGeneration, expected: Golden) -> None:
    batch = with_prefix(expected[0], "batch.")
    inputs, _ = model_inputs(batch, model.config, batch["expanded_attention_mask"], batch["expanded_labels"])
    count = len(inputs["pixel_values"]) - inputs.pop("num_blank_images")
    outputs = model(**inputs | {"pixel_values": inputs["pixel_values"][:count]})
    mask = batch["expanded_attention_mask"].bool()
    original = batch["logits"].shape[-1]
    assert_values(outputs.logits[..., :original][mask], batch["logits"][mask], "logits of a batch")
    labels = batch["expanded_labels"]
    loss = nn.functional.cross_entropy(outputs.logits[:, :-1, :original].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, batch["lm_loss"], rtol=1e-5, atol=0)
    # With the row for <image> in the softmax it is larger by no more than that row's share
    assert loss <= outputs.loss < loss + 2 / original


def model_inputs(
    batch: dict[str, torch.Tensor], config: MoveKDConfig, mask: torch.Tensor, labels: torch.Tensor
) -> tuple[dict[str, Any], list[int]]:
    """A batch of the authors' as our collator would give it, images of text-only rows last, and the images' order."""
    rows = []
    for ids, given in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        rows.append(expand(ids[given], config)[0])
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=config.text_config.pad_token_id)
    assert torch.equal(torch.tensor([len(row) for row in rows]), mask.sum(dim=1))
    has_image = (batch["input_ids"] == IMAGE_POSITION).any(dim=1)
    order = sorted(range(len(rows)), key=lambda row: not has_image[row])
    return {
        "input_ids": input_ids,
        "attention_mask": mask.long(),
        "labels": labels,
        "pixel_values": batch["pixel_values"][order],
        "num_blank_images": int((~has_image).sum()),
    }, order


def as_files(tensors: dict[str, torch.Tensor]) -> WeightFiles:
    """Files with these tensors that cannot be read, only planned with."""
    files = WeightFiles([])
    files.tensors, files.paths = tensors, dict.fromkeys(tensors, Path("shapes.safetensors"))
    return files


def shapes(entries: dict[str, dict]) -> dict[str, torch.Tensor]:
    return {
        key: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        for key, entry in entries.items()
    }


def full_size(reference: dict[str, torch.Tensor], layers: int, cut: bool) -> MoveKDForConditionalGeneration:
    """The model of the published sizes, on the meta device."""
    rows, width = reference["model.embed_tokens.weight"].shape
    intermediate = reference["model.layers.0.mlp.gate_proj.weight"].shape[0]
    text = LlamaConfig(
        vocab_size=rows + 1,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
    )
    vision = MoveKDConfig().vision_config.to_dict() | {"expert_bias": True, "router_gradient": "none"}
    vision |= {} if cut else {"num_hidden_layers": 24, "add_pooling_layer": True}
    return empty_model(
        MoveKDConfig(
            vision_config=vision,
            text_config=text.to_dict(),
            vision_feature_layer=-1 if cut else -2,
            image_token_index=rows,
        )
    )


@pytest.fixture(scope="module")
def reference(authors: Path) -> dict[str, Any]:
    return json.loads((authors / "reference_keys_7b.json").read_text())


def test_every_key_of_7b(reference: dict[str, Any]) -> None:
    stage1 = {key for entries in reference["stage1_v1_0"].values() for key in entries}
    full = shapes(reference["finetuned_v1_0"])
    assert stage1 <= full.keys()
    assert {
        key: tuple(entry["shape"]) for entries in reference["stage1_v1_0"].values() for key, entry in entries.items()
    } == {key: tuple(full[key].shape) for key in stage1}
    full |= shapes(reference["extra_keys_v1_1"] | reference["extra_keys_if_pix2struct"])
    layers = len([key for key in full if key.endswith("self_attn.q_proj.weight") and "vision" not in key])
    for cut in (False, True):
        model = full_size(full, layers, cut)
        found = collect([Origin(as_files(full), key_from_authors)], model)
        pieces, distiller, new = make_pieces(found, model)
        assert not new
        planned = {key: tensor for piece in pieces for key, tensor in piece.plan().items()}
        expected = expected_weights(model)
        assert {key: value.shape for key, value in planned.items()} == {
            key: value.shape for key, value in expected.items()
        }
        assert {key.split(".")[1] for piece in distiller for key in piece.plan()} == set(NAMES.values()) - {"clip"}
        assert all(tensor.dtype == torch.bfloat16 for tensor in planned.values())
        used = sum(len(piece.parts) for piece in pieces + distiller)
        assert used + len(found.dropped) == len(full)
        assert bool(found.dropped) == cut
    counts = reference["parameter_counts"]
    assert sum(full[key].numel() for key in reference["finetuned_v1_0"]) == counts["total"]


def test_key_count_of_13b(reference: dict[str, Any]) -> None:
    summary, small = reference["summary_13b"], shapes(reference["finetuned_v1_0"])
    rows, width = summary["embed_tokens"]
    sizes = {"model.embed_tokens.weight": torch.empty(rows, width, device="meta")}
    sizes["model.layers.0.mlp.gate_proj.weight"] = torch.empty(13824, width, device="meta")
    model = full_size(sizes, 40, cut=False)
    back = state_dict_to_authors(expected_weights(model), model.config.vision_config.num_experts)
    adapters = {key: tensor for key, tensor in small.items() if "_adapter_" in key}
    assert len(back) + len(adapters) == summary["finetuned_13b_v1_0_key_count"]
    total = sum(tensor.numel() for tensor in (*back.values(), *adapters.values())) - 2 * width  # a row for <image>
    assert total == summary["total_parameters"]
    assert {key: list(back[key].shape) for key in summary["mm_projector"]} == summary["mm_projector"]


# ---- stage 1, and one training step


@pytest.fixture(scope="module")
def stage1(authors: Path, base_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of stage 1 and the base models in one."""
    vision, language = map(str, base_models)
    dest = tmp_path_factory.mktemp("stage1") / "converted"
    return convert(authors / "stage1", dest, vision_model=vision, language_model=language, keep_all_layers=True)


def test_stage1_with_base_models(authors: Path, stage1: Path) -> None:
    state = load_file(authors / "stage1_state.safetensors")
    expected = state_dict_from_authors(state)
    model = MoveKDForConditionalGeneration.from_pretrained(stage1)
    actual = model.state_dict() | with_prefix_added(load_file(stage1 / "distiller.safetensors"), "distiller.")
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key][: len(value)] if value.dim() else actual[key], value), key
    theirs = json.loads((authors / "stage1" / "config.json").read_text())
    images = AutoProcessor.from_pretrained(stage1, trust_remote_code=False).image_processor
    assert images.do_pad == (theirs["image_aspect_ratio"] == "pad")
    assert json.loads((stage1 / "conversion.json").read_text())["dropped_weights"] == {}


def with_prefix_added(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


class GivenFeatures(nn.Module):
    """A teacher's features as the golden numbers have them, in its place: its weights are not among them."""

    def __init__(self, name: str, raw: torch.Tensor) -> None:
        super().__init__()
        side = round(raw.shape[1] ** 0.5)
        self.grid = tuple(raw.shape[2:]) if raw.dim() == 4 else (side, side)
        tokens = raw.flatten(2).transpose(1, 2) if raw.dim() == 4 else raw
        self.config = TeacherConfig(name=name, model=name)
        self.features = TeacherFeatures(tokens, self.grid)
        self.width = tokens.shape[-1]

    def forward(self, _: None) -> TeacherFeatures:
        return self.features


class Step:
    """A trainer at the state of the golden step, and its batch."""

    def __init__(self, authors: Path, stage1: Path, vision_model: Path, stage: str, output_dir: Path) -> None:
        self.tensors, metadata = read_case(authors / "stage1_step.safetensors")
        model = MoveKDForConditionalGeneration.from_pretrained(stage1)
        # The row for <image> takes its small part of the softmax, and their vocabulary has none
        model.lm_head.weight = nn.Parameter(model.lm_head.weight[: model.config.original_vocab_size].detach().clone())
        inputs, order = model_inputs(
            self.tensors, model.config, self.tensors["expanded_attention_mask"], self.tensors["expanded_labels"]
        )
        teachers: dict[str, Any] = {"clip": load_teacher(TeacherConfig(name="clip", model=str(vision_model)))}
        for name in metadata["teachers"]:
            if name != "CLIP":
                teachers[NAMES[name]] = GivenFeatures(NAMES[name], self.tensors[f"raw.{name}"][order])
        tower = model.config.vision_config
        args = MoveKDSFTConfig(
            output_dir=str(output_dir),
            stage=stage,
            distillation_preset="released",
            teachers=list(teachers),
            num_experts=tower.num_experts,
            lora_rank=tower.lora_rank,
            lora_alpha=tower.lora_alpha,
            lambda_kd=metadata["kd_w"],
            clip_share=metadata["kd_memory_w"],
            lambda_balance=metadata["moe_encoder_balance_w"],
            token_weighting="released" if metadata["token_weight"] else "none",
            teacher_weighting="released" if metadata["teacher_weight"] else "equal",
            bf16=False,
            use_cpu=True,
            activation_checkpointing=False,
            report_to="none",
        )
        processor = AutoProcessor.from_pretrained(stage1, trust_remote_code=False)
        self.trainer = MoveKDTrainer(
            model,
            args,
            teachers=teachers,
            distiller=build_distiller(args, model, teachers, str(stage1)),
            train_dataset=load_conversations(llava_rows(2)),
            data_collator=build_collator(args, processor, teachers),
            processing_class=processor,
        )
        self.trainer.model.eval()  # as the golden step: no dropout
        self.args, self.order = args, order
        self.inputs = inputs | {
            "image_weights": torch.ones(len(order)),
            "teacher_pixel_values": {name: inputs["pixel_values"] if name == "clip" else None for name in teachers},
        }

    def loss(self) -> torch.Tensor:
        return self.trainer.compute_loss(self.trainer.model, dict(self.inputs))

    def terms(self) -> dict[str, float]:
        """Of the last loss, as they are logged, with their weights as the authors name them."""
        logged = {name: values[-1] for name, values in self.trainer._metrics["eval"].items()}
        return {
            "lm_loss": logged["text"],
            "kd_loss": self.args.lambda_kd * logged["kd"],
            "balancing_loss": logged["balance"],
        }


STAGES = {"stage1": "pretrain", "stage2": "finetune"}


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def step(authors: Path, stage1: Path, base_models: tuple[Path, Path], stage: str, tmp_path: Path) -> Step:
    return Step(authors, stage1, base_models[0], STAGES[stage], tmp_path)


def test_training_step(authors: Path, step: Step, stage: str) -> None:
    expected, _ = read_case(authors / f"{stage}_step.safetensors")
    clip = step.trainer.teachers["clip"](step.inputs["pixel_values"])
    for name, value in (("tokens", clip.tokens), ("cls_embedding", clip.cls)):
        assert_values(value, step.tensors[f"clip_teacher.{name}"][step.order], f"CLIP teacher's {name}")

    loss = step.loss()
    loss.backward()
    for name, value in ({"loss": loss.item()} | step.terms()).items():
        assert value == pytest.approx(expected[name].item(), rel=1e-5), name
    gradients = {name: value.grad for name, value in step.trainer.model.named_parameters()}
    golden = state_dict_from_authors(with_prefix(expected, "grad."))
    rows = step.trainer.model.config.original_vocab_size
    for name in gradients:
        if name.endswith("embed_tokens.weight") and gradients[name] is not None:
            assert not gradients[name][rows:].any()
            gradients[name] = gradients[name][:rows]
    adapters = {key: value for key, value in golden.items() if key.startswith("distiller.")}
    assert adapters
    # A bias of the keys shifts all scores of a query alike: its gradient is zero but for rounding
    noise = 1e-6 * max(value.abs().max().item() for value in golden.values())
    silent = {key for key in golden if key.endswith("k_proj.bias")}
    assert all(max(golden[key].abs().max(), gradients[key].abs().max()) < noise for key in silent)
    others = {key: value for key, value in golden.items() if key not in adapters.keys() | silent}
    assert_gradients(gradients, others)
    assert_gradients(gradients, adapters, tolerance=ADAPTER_TOLERANCE)
    assert {name for name, value in gradients.items() if value is not None} == golden.keys()


def test_steps_of_adamw(authors: Path, step: Step, stage: str) -> None:
    golden = json.loads((authors / "training_reference.json").read_text())[stage]
    settings = golden["adamw"]
    optimizer = torch.optim.AdamW(
        [value for value in step.trainer.model.parameters() if value.requires_grad],
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    for index, expected in enumerate(golden["losses_before_each_step_then_after"]):
        loss = step.loss()
        for name, value in ({"loss": loss.item()} | step.terms()).items():
            assert value == pytest.approx(expected[name], rel=2e-4), f"{name} after {index} steps"
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert index == settings["steps"]


def test_trainable_parameters(authors: Path, step: Step, stage: str) -> None:
    golden = json.loads((authors / "training_reference.json").read_text())[stage]
    trains = {name for name, value in step.trainer.model.named_parameters() if value.requires_grad}
    gradients, _ = read_case(authors / f"{stage}_step.safetensors")
    reached = {key_from_authors(key)[0] for key in with_prefix(gradients, "grad.")}
    # Theirs train parameters too that nothing reaches, behind the layer in use
    assert trains == reached
    if stage == "stage1":
        assert reached < {key_from_authors(key)[0] for key in golden["trainable"]}
    else:
        assert golden["frozen"] == []
