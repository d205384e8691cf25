"""kNN and linear probe of an encoder's features, on scikit-learn's digits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


pytest.importorskip("sklearn", reason="needs scikit-learn")
pytest.importorskip("datasets")

from sklearn.datasets import load_digits
from transformers import CLIPImageProcessor, CLIPVisionModel

from benchmarks.features import (
    evaluate_features,
    extract,
    linear_probe,
    load_encoders,
    load_rows,
    main,
    nearest_neighbors,
)
from modeling_movekd import MoveKDForConditionalGeneration
from tests.helpers.evaluation_data import save_checkpoint


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Forty pictures of each of three digits, a folder each."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    for label in (0, 1, 4):
        (folder / str(label)).mkdir()
        for index in np.flatnonzero(labels == label)[:40]:
            pixels = (255 - images[index].reshape(8, 8) * 15).astype(np.uint8)
            Image.fromarray(pixels).resize((16, 16)).save(folder / str(label) / f"{index}.png")
    return folder


@pytest.fixture(scope="module", params=["pad", "anyres"])
def checkpoint(request, tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp(request.param) / "student", image_aspect_ratio=request.param)


def test_digits_are_told_apart(checkpoint, digits, tmp_path, capsys):
    out = tmp_path / "found.json"
    assert main([str(checkpoint), "--data", str(digits), "--neighbors", "5", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["rows"] == {"train": 96, "test": 24}, "a fifth of each class"
    by_kind = {row["features"]: row for row in found["accuracies"]}
    assert by_kind.keys() == {"patch mean", "[CLS]"}
    # Chance is a third; a random tower's features of shapes so different are linearly separable for the most part
    assert by_kind["patch mean"]["linear"] > 0.8 and by_kind["patch mean"]["knn"] > 0.6
    shown = capsys.readouterr()
    assert "24 test images of 3 classes; the most frequent class: 33.3." in shown.out
    assert "96/96" in shown.err, "a progress bar"


def test_features_are_those_of_the_tower(checkpoint, digits):
    train, test = load_rows(digits)
    model = MoveKDForConditionalGeneration.from_pretrained(checkpoint)
    (tokens,) = load_encoders(str(checkpoint)).values()
    features = extract(tokens, test, batch_size=7)
    images = [image.convert("RGB") for image in test["image"]]
    # The pictures are squares of the tower's own size: neither padded nor resized
    settings = {"size": {"height": 16, "width": 16}, "do_center_crop": False}
    pixels = CLIPImageProcessor(**settings)(images=images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = model.model.vision_tower(pixels).last_hidden_state
    np.testing.assert_allclose(features["patch mean"], expected[:, 1:].mean(dim=1), atol=1e-5)
    np.testing.assert_allclose(features["[CLS]"], expected[:, 0], atol=1e-5)
    assert features["[CLS]"].std(axis=0).mean() > 1e-3, "a tower that looks at nothing would pass"


def test_plain_clip_stands_beside_it_at_the_same_layer(checkpoint, digits, tmp_path):
    from transformers import CLIPVisionConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    for layers, folder in ((3, tmp_path / "clip"), (1, tmp_path / "short")):
        CLIPVisionModel(CLIPVisionConfig(**sizes, num_hidden_layers=layers)).save_pretrained(folder)
        square = {"height": 16, "width": 16}
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=square).save_pretrained(folder)
    _, test = load_rows(digits)
    functions = load_encoders(str(checkpoint), str(tmp_path / "clip"))
    assert list(functions) == ["student", "clip, layer 2"]
    images = [image.convert("RGB") for image in test["image"][:3]]
    clip = CLIPVisionModel.from_pretrained(tmp_path / "clip")
    pixels = CLIPImageProcessor.from_pretrained(tmp_path / "clip")(images=images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = clip(pixels, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(functions["clip, layer 2"](images), expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="short has 1 layers, the student 2"):
            load_encoders(str(checkpoint), str(tmp_path / "short"))["short, layer 2"](images)


def test_known_features_give_the_known_accuracy():
    generator = np.random.default_rng(0)
    centres = 8 * np.eye(4, dtype=np.float32)
    labels, others = generator.integers(4, size=200), generator.integers(4, size=80)
    train = centres[labels] + generator.normal(size=(200, 4))
    test = centres[others] + generator.normal(size=(80, 4))
    assert nearest_neighbors(train, labels, test, others) == 1
    assert linear_probe(train, labels, test, others)[0] == 1
    # A quarter of the test's labels wrong, and labels that have nothing to do with the features
    wrong = np.where(np.arange(80) % 4 == 0, (others + 1) % 4, others)
    assert nearest_neighbors(train, labels, test, wrong) == 0.75
    assert linear_probe(train, labels, test, wrong)[0] == 0.75
    assert linear_probe(train, generator.permutation(labels), test, others)[0] < 0.6


def test_what_cannot_be_measured_is_refused(checkpoint, digits, tmp_path, capsys):
    train, test = load_rows(digits)
    functions = load_encoders(str(checkpoint))
    with pytest.raises(ValueError, match="has 10 rows, 1 classes, and 10 rows of the rarest; it needs at least 20, 2"):
        evaluate_features(functions, train.filter(lambda row: row["label"] == 0).select(range(10)), test)
    with pytest.warns(FutureWarning, match="--neighbors"):
        assert main([str(checkpoint), "--data", str(tmp_path / "none"), "--neighbours", "5"]) == 1
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no column 'kind', but"):
        load_rows(digits, label_column="kind")
    split = tmp_path / "split"
    for part, classes in (("train", "01"), ("test", "04")):
        for label in classes:
            (split / part / label).mkdir(parents=True)
            for path in sorted((digits / label).iterdir())[:4]:
                (split / part / label / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="classes that the training split lacks"):
        load_rows(split)
