"""The encoder in ONNX Runtime: the same features, and every token by the same expert."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hub.export import main
from hub.export_onnx import EncoderGraph, check_onnx, write_onnx
from modeling_movekd import MoveKDVisionModel
from tests.helpers.exported import SIZE, make_pixels, make_tower, save_images, save_tower


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
