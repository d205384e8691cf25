"""Encoders and whole models in ONNX Runtime: the same features, every token by the same expert, the same answers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, Mamba2Config, Qwen3Config

from hub.export import main
from hub.export_forms import export
from hub.export_onnx import GRAPHS, DecoderGraph, EncoderGraph, check_decoder, check_onnx, write_onnx
from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel
from modeling_movekd.processing import load_processor
from tests.helpers.exported import SIZE, make_model, make_pixels, make_tower, save_images, save_model, save_tower
from tests.helpers.tiny import SIZES, VOCABULARY, llama_config, spread


onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def session(folder: Path) -> "onnxruntime.InferenceSession":
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def run(graph: "onnxruntime.InferenceSession", pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [output.name for output in graph.get_outputs()]
    outputs = graph.run(None, {"pixel_values": pixels.numpy()})
    return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}


@pytest.fixture(scope="module")
def tower() -> MoveKDVisionModel:
    return make_tower()


@pytest.fixture(scope="module")
def exported(tower, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("onnx")
    images = save_images(root / "images", 3)
    folder = save_tower(tower, root / "tower")
    main([str(folder), str(root / "onnx"), "--form", "onnx", "--images", str(images)])
    return root / "onnx"


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@torch.no_grad()
def test_features_and_routing(tower, exported, batch_size):
    pixels = make_pixels(batch_size)
    found = run(session(exported), pixels)
    expected = tower(pixels, output_expert_indices=True)
    experts = torch.stack(expected.expert_indices)
    assert (torch.bincount(experts.flatten(), minlength=3) > experts.numel() / 20).all(), "an expert was not tried"
    assert torch.equal(found["expert_indices"], experts)
    torch.testing.assert_close(found["last_hidden_state"], expected.last_hidden_state, atol=1e-3, rtol=1e-4)
    assert torch.equal(found["features"], found["last_hidden_state"][:, 1:])


@torch.no_grad()
def test_experts_in_the_graph_are_those_of_the_tokens(tower, exported):
    """A graph with one expert for all, or none, would not be as near."""
    pixels = make_pixels(3)
    found = run(session(exported), pixels)["last_hidden_state"]
    exact = (found - tower(pixels).last_hidden_state).norm()
    for change in (0, 1, 2, "none"):
        other = make_tower()
        for layer in other.encoder.layers:
            if change == "none":
                layer.mlp.fc1_experts.weight_b.zero_()
                layer.mlp.fc2_experts.weight_b.zero_()
            else:
                layer.mlp.router.bias[change] += 1e3
        assert (found - other(pixels).last_hidden_state).norm() > 100 * exact, change


def test_files_and_signature(exported):
    names = {path.name for path in exported.iterdir()}
    assert {"model.onnx", "model.onnx.data", "preprocessor_config.json"} <= names
    assert not {"model.safetensors", "vision_movekd.py"} & names
    graph = session(exported)
    (pixel_values,) = graph.get_inputs()
    assert pixel_values.name == "pixel_values" and pixel_values.shape[1:] == [3, SIZE, SIZE]
    assert isinstance(pixel_values.shape[0], str), "the batch size is fixed"
    assert [output.name for output in graph.get_outputs()] == ["last_hidden_state", "features", "expert_indices"]
    onnx.checker.check_model(exported / "model.onnx")


@torch.no_grad()
def test_picture_to_features_with_what_is_in_the_folder(tower, exported):
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(24, 40, 3), dtype=np.uint8))
    pixels = AutoImageProcessor.from_pretrained(exported)(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(
        run(session(exported), pixels)["features"], tower(pixels).last_hidden_state[:, 1:], atol=1e-3, rtol=1e-4
    )


@torch.no_grad()
def test_whole_tower_without_experts(tmp_path):
    tower = make_tower(None, num_experts=0)
    tower.config.feature_layer = [-2, -1]
    report = check_onnx(write_onnx(tower, tmp_path / "model.onnx", "full"), tmp_path / "model.onnx")
    assert report["tokens_off"] == report["rerouted"] == 0 and report["difference"] < 1e-4
    found, expected = run(session(tmp_path), make_pixels()), tower(make_pixels(), output_hidden_states=True)
    assert set(found) == {"last_hidden_state", "features", "pooler_output"}
    torch.testing.assert_close(found["features"], torch.cat(expected.hidden_states[-2:], -1), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found["pooler_output"], expected.pooler_output, atol=1e-3, rtol=1e-4)


def test_another_graph_is_refused(tower, exported):
    path = exported / "model.onnx"
    report = check_onnx(EncoderGraph(tower, "default"), path)
    assert report["tokens_off"] == report["rerouted"] == 0 < report["difference"] < 1e-4
    other = make_tower()
    other.encoder.layers[1].mlp.router.bias.data[0] += 1
    with pytest.raises(ValueError, match=r"gives other features than torch.*decisions differ"):
        check_onnx(EncoderGraph(other, "default"), path)
    other = make_tower()
    other.encoder.layers[1].mlp.fc2.bias.data += 0.1
    with pytest.raises(ValueError, match="100.00% of the tokens"):
        check_onnx(EncoderGraph(other, "default"), path)
    # What is no number equals nothing
    with pytest.raises(ValueError, match="100.00% of the tokens"):
        check_onnx(EncoderGraph(tower, "default"), path, torch.full((1, 3, SIZE, SIZE), float("nan")))


def test_only_float32(tmp_path):
    with pytest.raises(ValueError, match=r"float32; the tower is torch.bfloat16"):
        write_onnx(make_tower().bfloat16(), tmp_path / "model.onnx")


@torch.no_grad()
def test_features_of_siglip_are_all_patches(tmp_path):
    tower = make_tower(siglip=True)
    report = check_onnx(write_onnx(tower, tmp_path / "model.onnx"), tmp_path / "model.onnx")
    assert report["tokens_off"] == report["rerouted"] == 0
    found, expected = run(session(tmp_path), make_pixels()), tower(make_pixels())
    torch.testing.assert_close(found["features"], expected.last_hidden_state, atol=1e-3, rtol=1e-4)
    assert found["expert_indices"].shape == (2, 3, 16)


# --- Whole models ----------------------------------------------------------------------------------------------------

IDS = {"vocab_size": len(VOCABULARY), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LANGUAGE_MODELS = {
    # Keys of one head for two, and a rotary base that is not the default
    "llama": llama_config(num_key_value_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    # Normalized keys, heads that are wider than the model, and a tied head
    "qwen": Qwen3Config(
        **SIZES | IDS, num_hidden_layers=2, head_dim=32, num_key_value_heads=2, tie_word_embeddings=True
    ),
}


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen", marks=pytest.mark.slow)])
def whole(request, tmp_path_factory) -> tuple[MoveKDForConditionalGeneration, Path, Path]:
    """A model, the folder that it is saved in, and the folder of its graphs."""
    root = tmp_path_factory.mktemp(request.param)
    language = AutoModelForCausalLM.from_config(LANGUAGE_MODELS[request.param])
    spread(language, 2)
    model = MoveKDForConditionalGeneration.from_parts(make_tower(), language)
    spread(model.model.multi_modal_projector, 3)
    folder = save_model(model.eval(), root / "model")
    export(folder, root / "onnx", "onnx", images=[save_images(root / "images", 6)])
    return model, folder, root / "onnx"


class Runtime:
    """What a user of ONNX Runtime writes around the three graphs: the greedy answer to one question."""

    def __init__(self, folder: Path):
        self.config = AutoConfig.from_pretrained(folder)
        self.suppressed = json.loads((folder / "generation_config.json").read_text())["suppress_tokens"]
        self.encoder, self.embedding, self.decoder = (
            onnxruntime.InferenceSession(folder / "onnx" / name, providers=["CPUExecutionProvider"]) for name in GRAPHS
        )

    def generate(self, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> list[int]:
        input_ids = inputs["input_ids"].numpy()
        embeds = self.embedding.run(None, {"input_ids": input_ids})[0]
        if "pixel_values" in inputs:
            features = self.encoder.run(None, {"pixel_values": inputs["pixel_values"].numpy()})[0]
            embeds[input_ids == self.config.image_token_index] = features.reshape(-1, features.shape[-1])
        names = [node.name for node in self.decoder.get_inputs()]
        text = self.config.text_config
        past = [np.zeros((1, text.num_key_value_heads, 0, text.head_dim), np.float32)] * 2 * text.num_hidden_layers
        tokens: list[int] = []
        while len(tokens) < max_new_tokens and (not tokens or tokens[-1] != text.eos_token_id):
            length = past[0].shape[2] + embeds.shape[1]
            positions = np.arange(past[0].shape[2], length)[None]
            values = [embeds, np.ones((1, length), np.int64), positions, *past]
            logits, *past = self.decoder.run(None, dict(zip(names, values, strict=True)))
            logits[..., self.suppressed] = -np.inf
            tokens.append(int(logits[0, -1].argmax()))
            embeds = self.embedding.run(None, {"input_ids": np.array([tokens[-1:]])})[0]
        return tokens


def make_inputs(folder: Path, picture: Image.Image | None, question: str) -> dict[str, torch.Tensor]:
    content = [] if picture is None else [{"type": "image", "image": picture}]
    return load_processor(folder).apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def test_greedy_answers(whole):
    """With what is in the folder, on several pictures and without one: the tokens of `generate`."""
    model, folder, dest = whole
    runtime = Runtime(dest)
    pictures = [Image.open(path) for path in sorted((dest.parent / "images").iterdir())]
    answers = []
    for picture in [*pictures, None]:
        for question in ("What is this?", "Which color?"):
            inputs, theirs = (make_inputs(it, picture, question) for it in (folder, dest))
            assert inputs.keys() == theirs.keys() and all(torch.equal(inputs[key], theirs[key]) for key in inputs)
            expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            answers.append(tuple(expected.tolist()))
            assert runtime.generate(theirs, 12) == expected.tolist()
    assert len(set(answers)) > 6, "the answers do not depend on the picture"


def test_batches_and_pasts_of_any_length(whole):
    """A part of the batch is padded; the names are those that transformers.js asks for."""
    model, _, dest = whole
    assert check_decoder(DecoderGraph(model), dest / "onnx") < 1e-5
    encoder, embedding, decoder = (onnxruntime.InferenceSession(dest / "onnx" / name) for name in GRAPHS)
    parts = [f"{index}.{part}" for index in range(2) for part in ("key", "value")]
    inputs = {node.name: node.shape for node in decoder.get_inputs()}
    past = [f"past_key_values.{part}" for part in parts]
    assert list(inputs) == ["inputs_embeds", "attention_mask", "position_ids", *past]
    # transformers.js makes the empty past from the symbols: every one but the batch's is 0
    assert inputs[past[0]][0] == "batch_size" and isinstance(inputs[past[0]][2], str)
    assert [node.name for node in decoder.get_outputs()] == ["logits", *(f"present.{part}" for part in parts)]
    assert [node.name for node in embedding.get_inputs()] == ["input_ids"]
    assert [node.name for node in embedding.get_outputs()] == ["inputs_embeds"]
    features = encoder.run(["image_features"], {"pixel_values": make_pixels(5).numpy()})[0]
    expected = torch.stack(list(model.get_image_features(make_pixels(5)).pooler_output))
    torch.testing.assert_close(torch.from_numpy(features), expected, atol=1e-3, rtol=1e-4)


def test_another_decoder_is_refused(whole):
    model, folder, dest = whole
    other = MoveKDForConditionalGeneration.from_pretrained(folder)
    for change in (1.01, float("nan")):
        other.model.language_model.norm.weight.data *= change
        with pytest.raises(ValueError, match="gives other logits than torch"):
            check_decoder(DecoderGraph(other), dest / "onnx")


def test_files_that_transformers_js_reads(whole):
    model, _, dest = whole
    files = {path.relative_to(dest).as_posix() for path in dest.rglob("*")}
    assert files >= {f"onnx/{name}{ending}" for name in GRAPHS for ending in ("", "_data")}
    assert files >= {"generation_config.json", "tokenizer.json", "chat_template.jinja", "processor_config.json"}
    assert not [name for name in files if name.endswith((".py", ".safetensors"))] and "evaluation.json" not in files
    config = json.loads((dest / "config.json").read_text())
    assert config["model_type"] == "llava" and config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["image_token_index"] == model.config.image_token_id and "auto_map" not in config
    assert config["transformers.js_config"]["use_external_data_format"] == dict.fromkeys(GRAPHS, True)
    images = json.loads((dest / "preprocessor_config.json").read_text())
    assert images["processor_class"] == "LlavaProcessor" and images["pad_size"] == {"height": SIZE, "width": SIZE}
    # transformers.js repeats `<image>` once for each patch and each additional token
    assert json.loads((dest / "processor_config.json").read_text())["num_additional_image_tokens"] == 0
    tokenizer = json.loads((dest / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["chat_template"] == (dest / "chat_template.jinja").read_text()


def test_tiles_are_refused(tmp_path):
    folder = save_model(make_model(make_tower(), image_aspect_ratio="anyres"), tmp_path / "model")
    with pytest.raises(ValueError, match="`anyres`.*`--form encoder`, then `--form onnx`"):
        export(folder, tmp_path / "onnx", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_state_that_is_no_past_is_refused():
    config = Mamba2Config(vocab_size=40, hidden_size=32, num_heads=8, head_dim=8, state_size=4, n_groups=1)
    config.num_hidden_layers = 1
    model = MoveKDForConditionalGeneration.from_parts(make_tower(), AutoModelForCausalLM.from_config(config))
    with pytest.raises(ValueError, match="Mamba2Model keeps more than the keys and values"):
        DecoderGraph(model).example(1, 1, 0)
