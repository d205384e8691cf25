"""The command line that draws: its pictures are those of `model.visualize`, its page holds what it needs."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextImageProcessor,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from modeling_movekd import visualize
from modeling_movekd.images import pad_to_square, shared_crop
from modeling_movekd.inference import load_tower
from modeling_movekd.vision_encoders import OtherEncoder
from modeling_movekd.visualize import choose_layers, draw_layers
from modeling_movekd.visualize_page import expert_entries, with_legend


SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(make_model, make_tower, make_clip, make_processor, tmp_path_factory) -> Path:
    """Students, plain CLIP and other encoders as folders."""
    folder = tmp_path_factory.mktemp("encoders")
    for form in ("pad", "anyres"):
        model = make_model(image_aspect_ratio=form, image_token_id=None)
        model.save_pretrained(folder / form)
        processor = make_processor(model)
        processor.save_pretrained(folder / form)
        if form == "pad":
            clip_processor = processor.image_processor
    # Experts that change nothing: the student is CLIP
    for name, settings in {"encoder": {}, "fresh": {"expert_init": "zero"}, "plain": {"num_experts": 0}}.items():
        tower = make_tower(**settings)
        if name == "fresh":
            for parameter_name, parameter in tower.named_parameters():
                if parameter_name.endswith("weight_b"):
                    parameter.data.zero_()
        tower.save_pretrained(folder / name)
        clip_processor.save_pretrained(folder / name)
    make_clip().save_pretrained(folder / "clip")
    clip_processor.save_pretrained(folder / "clip")
    registers = Dinov2WithRegistersConfig(**SIZES, image_size=28, patch_size=4, num_register_tokens=4)
    torch.manual_seed(0)
    Dinov2WithRegistersModel(registers).save_pretrained(folder / "dinov2")
    # Its own way would be to cut off an eighth on each side
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 24, "width": 24}).save_pretrained(
        folder / "dinov2"
    )
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory, make_image) -> list[str]:
    folder = tmp_path_factory.mktemp("photos")
    make_image(24, 16, seed=1).save(folder / 'a "wide" <one>.png')
    make_image(16, 16, seed=2).save(folder / "b.jpg")
    return [str(folder / 'a "wide" <one>.png'), str(folder / "b.jpg")]


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: list[dict] = []
        self.words, self.open = "", []
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def pixels_of(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path)))


@pytest.mark.parametrize("student", ["pad", "anyres", "encoder"])
def test_pictures_are_those_of_the_model(student, folder, photos, tmp_path, capsys):
    out = tmp_path / "new" / "pictures"
    arguments = [str(folder / student), *photos, "--out", str(out), "--layer", "-1", "0", "2"]
    others = ["--clip", str(folder / "clip"), "--teacher", str(folder / "dinov2")]
    assert visualize.main([*arguments, *others]) == 0
    assert "2 images, 2 layers" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "pictures"]
    assert [path.name for path in out.parent.iterdir()] == ["pictures"], "nothing temporary is left"

    tower, processor = load_tower(folder / student)
    images = [Image.open(path).convert("RGB") for path in photos]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    pixels = pixels[:, 0] if student == "anyres" else pixels
    clip, dinov2 = OtherEncoder(str(folder / "clip")), OtherEncoder(str(folder / "dinov2"))
    crops = [shared_crop(image, processor) for image in images]
    for layer in (2, 0):
        tokens = {"plain CLIP": clip.patch_tokens(crops, [layer])[0], "dinov2": dinov2.patch_tokens(crops)[0]}
        expected = tower.visualize(pixels, layer, other_tokens=tokens)
        for index, name in enumerate(("001-a-wide-one", "002-b")):
            of_layer = out / "pictures" / name / f"layer-{layer:02d}-"
            # 16 pixels are drawn 21 times as large: patches in whole cells, so the small picture is the middle of each
            components = pixels_of(Path(f"{of_layer}components.png"))
            assert components.shape == (336, 336, 3)
            assert torch.equal(components[10::21, 10::21], expected.components[index])
            experts = pixels_of(Path(f"{of_layer}experts.png"))
            assert experts.shape[0] > 336
            assert torch.equal(experts[10:336:21, 10::21], expected.experts[index])
            other = pixels_of(Path(f"{of_layer}components-dinov2.png"))
            assert torch.equal(other[10::21, 10::21], expected.others["dinov2"].components[index])
            # Smooth ones differ a little where they are smoothed over more pixels
            distance = expected.others["plain CLIP"].distance
            for stem, picture in (("cls-attention", expected.cls_attention), ("distance-plain-CLIP", distance)):
                drawn = pixels_of(Path(f"{of_layer}{stem}.png"))[10::21, 10::21].float()
                torch.testing.assert_close(drawn, picture[index].float(), atol=2, rtol=0)
        image = pixels_of(out / "pictures" / "002-b" / "image.png")
        assert torch.equal(image[10::21, 10::21], expected.image[1])

    page = Page(out / "index.html")
    text = (out / "index.html").read_text()
    assert page.open == [], "every tag is closed"
    assert len(page.images) == 2 * (1 + 2 * 7) == len(list(out.rglob("*.png")))
    for image in page.images:
        with Image.open(out / image["src"]) as opened:
            assert (str(opened.width), str(opened.height)) == (image["width"], image["height"])
        assert len(image["alt"]) > 10
    assert len({image["alt"] for image in page.images}) == len(page.images)
    assert 'a "wide" <one>.png' in page.words and "<one>" not in text
    shares = expert_entries(tower.visualize(pixels, 2), 0)
    assert all(f" {entry}" in page.words for _, entry in shares)
    # Nothing is asked of another place, and nothing is told of this machine
    assert not re.findall(r"(?:https?:|src=\"/|url\(|@import|<script|<link)", text)
    assert str(folder) not in text and str(Path(photos[0]).parent) not in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_a_student_that_is_still_clip_is_at_no_distance(folder, photos):
    clip = OtherEncoder(str(folder / "clip"))
    images = [Image.open(path).convert("RGB") for path in photos]
    for name in ("fresh", "plain"):
        pictures = draw_layers(*load_tower(folder / name), images, [0, 1, 2], clip)
        for layer, of_layer in pictures.items():
            other = of_layer.others["plain CLIP"]
            assert other.distances.max() < 1e-4, layer
            assert (other.components.int() - of_layer.components.int()).abs().max() <= 1
        assert (pictures[0].experts is None) == (name == "plain")
    trained = draw_layers(*load_tower(folder / "encoder"), images, [2], clip)[2]
    assert trained.others["plain CLIP"].distances.mean() > 0.05


def test_legend_has_the_colors_and_room_for_every_expert():
    picture = Image.new("RGB", (60, 40), (1, 2, 3))
    entries = [((10 * i, 200 - i, 50), f"expert {i}: {i}%") for i in range(9)]
    drawn = with_legend(picture, entries)
    assert drawn.crop((0, 0, 60, 40)).tobytes() == picture.tobytes()
    colors = {color for _, color in drawn.getcolors(10_000)}
    assert {color for color, _ in entries} <= colors and (20, 20, 20) in colors, "chips and letters"


def test_layers():
    assert choose_layers(["all"], 3) == [0, 1, 2]
    assert choose_layers(["-1", "0", "2", "-3"], 3) == [2, 0]
    for wrong in ("3", "-4", "last", "1.0"):
        with pytest.raises(ValueError, match=f"--layer {wrong}: the tower has 3 layers; give 0 to 2, -1 to -3"):
            choose_layers([wrong], 3)


def test_encoders_give_their_patches_alone(folder, tmp_path, make_image):
    """Of each kind of output the patches, which is seen by moving one: its own feature changes most."""
    torch.manual_seed(0)
    square = {"size": {"height": 32, "width": 32}}
    sizes = SIZES | {"image_size": 32, "patch_size": 8}
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(**square).save_pretrained(tmp_path / "vit")
    SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(tmp_path / "siglip")
    SiglipImageProcessor(**square).save_pretrained(tmp_path / "siglip")
    text = SIZES | {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1}
    CLIPModel(CLIPConfig(vision_config=sizes, text_config=text, projection_dim=8)).save_pretrained(tmp_path / "whole")
    SiglipImageProcessor(**square).save_pretrained(tmp_path / "whole")
    ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 24], depths=[1, 1, 1, 1])).save_pretrained(tmp_path / "map")
    ConvNextImageProcessor(size={"shortest_edge": 128}).save_pretrained(tmp_path / "map")
    swin = SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    SwinModel(swin).save_pretrained(tmp_path / "swin")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "swin")
    sides = {"vit": 4, "siglip": 4, "whole": 4, "map": 4, "swin": 8}
    encoders = {name: (OtherEncoder(str(tmp_path / name)), side) for name, side in sides.items()}
    encoders["dinov2"] = (OtherEncoder(str(folder / "dinov2")), 6)
    image = make_image(96, 96, seed=3)
    for name, (encoder, side) in encoders.items():
        assert encoder.name == name
        (tokens,) = encoder.patch_tokens([image])
        assert tokens.shape[:2] == (1, side * side), name
        cell, changed = 96 // side, image.copy()
        row, column = 1, side - 1
        changed.paste((255, 255, 255), (column * cell, row * cell, (column + 1) * cell, (row + 1) * cell))
        moved = (encoder.patch_tokens([changed])[0] - tokens).norm(dim=-1)[0]
        assert moved.argmax() == row * side + column, name


def test_encoders_see_the_whole_crop_and_not_their_own(folder, make_image):
    encoder = OtherEncoder(str(folder / "dinov2"))
    wide = pad_to_square(make_image(48, 24, seed=4), (0, 0, 0))
    pixels = encoder.preprocess([wide])
    expected = torch.from_numpy(np.array(wide.resize((24, 24), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (encoder.processor.image_mean, encoder.processor.image_std)
    )
    torch.testing.assert_close(pixels[0], (expected - mean) / std, atol=1e-5, rtol=0)


def test_folders_that_are_not_ours_stay_as_they_are(folder, photos, tmp_path, capsys):
    out = tmp_path / "out"
    command = [str(folder / "encoder"), photos[1], "--out", str(out)]
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert visualize.main(command) == 1
    assert "holds files that this command did not write" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert visualize.main([*command, "--overwrite"]) == 0
    assert (out / "thesis.txt").read_text() == "mine"
    # A page of ours is replaced, with nothing left of the one before
    assert visualize.main([str(folder / "encoder"), photos[0], "--out", str(out)]) == 0
    assert [path.name for path in (out / "pictures").iterdir()] == ["001-a-wide-one"]
    page = (out / "index.html").read_text()
    # What fails leaves the page that was there, and no part of a new one
    assert visualize.main([*command, "--layer", "9"]) == 1
    assert (out / "index.html").read_text() == page and (out / "pictures" / "001-a-wide-one").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    for wrong in (["--teacher", str(tmp_path / "nowhere")], ["--batch-size", "0"]):
        with pytest.raises(SystemExit):
            visualize.main([*command, *wrong])
    file = tmp_path / "file"
    file.write_text("")
    assert visualize.main([*command[:2], "--out", str(file)]) == 1
    assert "is a file" in capsys.readouterr().err


def test_errors_are_sentences(folder, photos, tmp_path, capsys, make_tower, make_clip):
    torch.manual_seed(0)
    make_tower().save_pretrained(tmp_path / "bare")
    BertModel(BertConfig(**SIZES, vocab_size=20)).save_pretrained(tmp_path / "words")
    ViTImageProcessor().save_pretrained(tmp_path / "words")
    # 4 x 8 patches, of an image processor that speaks of squares
    ViTModel(ViTConfig(**SIZES, image_size=(32, 64), patch_size=8)).save_pretrained(tmp_path / "oblong")
    ViTImageProcessor(size={"height": 32, "width": 64}).save_pretrained(tmp_path / "oblong")
    make_clip(num_hidden_layers=1).save_pretrained(tmp_path / "shallow")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "shallow")
    lacking = make_clip()
    weights = {key: value for key, value in lacking.state_dict().items() if "layers.1.mlp.fc1" not in key}
    lacking.save_pretrained(tmp_path / "lacking", state_dict=weights)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "lacking")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n")
    student, photo = str(folder / "encoder"), photos[1]
    cases = [
        ([str(tmp_path / "bare"), photo], "has no image processor"),
        ([str(folder / "clip"), photo], "is a 'clip_vision_model' checkpoint"),
        ([student, str(broken)], "broken.png: not an image of a known format"),
        ([student, photo, "--layer", "3"], "--layer 3: the tower has 3 layers"),
        ([student, photo, "--teacher", str(tmp_path / "words")], "and no `pixel_values`"),
        ([student, photo, "--teacher", str(tmp_path / "oblong")], "takes no squares of one size"),
        ([student, photo, "--teacher", str(tmp_path / "bare")], "cannot be read"),
        ([student, photo, "--clip", str(tmp_path / "shallow")], "has 1 layers, and no layer 2"),
        ([student, photo, "--clip", str(tmp_path / "lacking")], "would stay random"),
        ([student, photo, "--teacher", *[str(folder / "dinov2")] * 2], "Two teachers have the same name"),
    ]
    for arguments, message in cases:
        assert visualize.main([*arguments, "--out", str(tmp_path / "out")]) == 1, arguments
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
        assert not (tmp_path / "out").exists()


def test_no_module_for_the_demo_is_needed(folder, photos, tmp_path, monkeypatch):
    """With the wheel alone: nothing of a clone, and no package of an extra."""
    for name in ("matplotlib", "timm", "train", "hub"):
        monkeypatch.setitem(sys.modules, name, None)
    assert visualize.main([str(folder / "plain"), photos[1], "--out", str(tmp_path / "out")]) == 0
