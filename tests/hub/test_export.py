"""Exports: what leaves is read by the real libraries, and gives the features and answers of what it came from."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    PhiConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from hub.card_write import write_card
from hub.export import main
from hub.export_forms import add_older_names, check_equal, export, image_files, read_pixels, stock_llava
from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel
from modeling_movekd.processing import load_processor
from tests.helpers.cards import COMMIT, RESULT, metadata
from tests.helpers.conversions import BAD_WEIGHTS, change_weight, edit_json
from tests.helpers.exported import SIZE, make_model, make_pixels, make_tower, save_images, save_model, save_tower
from tests.helpers.tiny import llama_config, spread


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "model": save_model(make_model(make_tower()), root / "model"),
        "plain": save_model(make_model(make_tower(num_experts=0)), root / "plain"),
        "plain anyres": save_model(
            make_model(make_tower(num_experts=0), tied=True, image_aspect_ratio="anyres"), root / "plain_anyres"
        ),
        "plain whole": save_model(make_model(make_tower(None, num_experts=0)), root / "plain_whole"),
        "siglip": save_model(make_model(make_tower(num_experts=0, siglip=True)), root / "siglip"),
        "siglip anyres": save_model(
            make_model(make_tower(num_experts=0, siglip=True), image_aspect_ratio="anyres"), root / "siglip_anyres"
        ),
        "encoder": save_tower(make_tower(), root / "encoder"),
        "images": save_images(root / "images", 10),
    }


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_images_to_measure_on_are_decoded_like_any_other(tmp_path):
    """Of 16 bits the upper 8, which Pillow alone clips to white; upright; none whose values have no known range."""
    values = torch.arange(24 * 40).view(24, 40) // 4
    plain, deep = (
        Image.fromarray((values * factor).numpy().astype(f"uint{bits}")) for factor, bits in ((1, 8), (257, 16))
    )
    plain.save(tmp_path / "0.png")
    deep.save(tmp_path / "1.png")
    exif = plain.getexif()
    exif[274] = 6
    plain.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "2.png", exif=exif)
    processor = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": SIZE}, crop_size=SIZE)
    expected, *others = read_pixels(image_files([tmp_path]), processor)
    assert len(expected.unique()) > 100 and len(others) == 2 and all(torch.equal(it, expected) for it in others)
    Image.new("F", (8, 8)).save(tmp_path / "3.tif")
    assert len(read_pixels(image_files([tmp_path]), processor)) == 3, "the others are used"
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"There is no image in .*none'\]: none ends in \['.bmp'"):
        image_files([tmp_path / "none"])
    with pytest.raises(ValueError, match="3.tif: an image of mode 'F', whose values have no known range"):
        read_pixels([tmp_path / "3.tif"], processor)


# --- The encoder -----------------------------------------------------------------------------------------------------

STRANGER = textwrap.dedent(
    """
    import sys
    from pathlib import Path

    sys.path[:] = [p for p in sys.path if "site-packages" in p or not (Path(p) / "modeling_movekd").is_dir()]
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import AutoImageProcessor, AutoModel

    folder, image, result = sys.argv[1:]
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    pixels = AutoImageProcessor.from_pretrained(folder)(Image.open(image), return_tensors="pt")["pixel_values"]
    output = model(pixels, output_expert_indices=True)
    assert "modeling_movekd" not in sys.modules and type(model).__module__.startswith("transformers_modules.")
    experts = __import__("torch").stack(output.expert_indices)
    save_file({"pixels": pixels, "features": output.last_hidden_state.detach(), "experts": experts}, result)
    """
)


def test_encoder_loads_where_nothing_of_ours_is(folders, tmp_path):
    export(folders["model"], tmp_path / "encoder", "encoder")
    image = next(folders["images"].iterdir())
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LD_LIBRARY_PATH")}
    command = [sys.executable, "-I", "-c", STRANGER, tmp_path / "encoder", image, tmp_path / "result"]
    environment = kept | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    result = load_file(tmp_path / "result")
    with torch.no_grad():
        expected = make_tower()(result["pixels"], output_expert_indices=True)
    assert result["pixels"].shape == (1, 3, SIZE, SIZE)
    same(result["features"], expected.last_hidden_state)
    assert torch.equal(result["experts"], torch.stack(expected.expert_indices))


def test_encoder_holds_the_tower_and_nothing_else(folders, tmp_path):
    dest = export(folders["model"], tmp_path / "encoder", "encoder")
    assert set(load_file(dest / "model.safetensors")) == set(make_tower().state_dict())
    names = {path.name for path in dest.iterdir()}
    assert {"config.json", "preprocessor_config.json", "vision_movekd.py", "training_facts.json"} <= names
    assert not names & {"tokenizer.json", "chat_template.jinja", "modeling_movekd.py", "evaluation.json"}
    config = json.loads((dest / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_movekd.MoveKDVisionConfig",
        "AutoModel": "vision_movekd.MoveKDVisionModel",
    }
    assert config["feature_layer"] == -1 and config["num_hidden_layers"] == 2
    # An encoder is exported again as it is
    again = export(dest, tmp_path / "again", "encoder")
    assert (again / "config.json").read_text() == (dest / "config.json").read_text()


def test_encoder_of_a_converted_checkpoint_says_where_it_is_from(converted, tmp_path):
    folder = Path(shutil.copytree(converted, tmp_path / "converted"))
    edit_json(folder / "conversion.json", source="owner/source", revision=COMMIT, license="cc-by-nc-4.0")
    card = write_card(export(folder, tmp_path / "encoder", "encoder"))
    found = metadata(card)
    assert "owner/source" in found["base_model"] and found["license"] == "cc-by-nc-4.0"
    assert f"| whole model | `owner/source` | `{COMMIT}` |" in card.read_text()


@pytest.mark.parametrize("form", ["encoder", "clip", "llava"])
def test_the_code_in_the_card_runs(folders, tmp_path, monkeypatch, form):
    dest = export(folders["plain"], tmp_path / form, form)
    text = write_card(dest, repo_id="somebody/student").read_text()
    Image.new("RGB", (40, 24), "red").save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(text.split("```python")[1].split("```")[0].replace("somebody/student", str(dest)), names)
    if form == "llava":
        assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
    else:
        assert names["features"].shape == (1, 1 + (SIZE // 4) ** 2, 32)


def test_encoder_of_a_whole_tower_keeps_its_feature_layer(folders, tmp_path):
    dest = export(folders["plain whole"], tmp_path / "encoder", "encoder")
    config = json.loads((dest / "config.json").read_text())
    assert config["feature_layer"] == -2 and config["num_hidden_layers"] == 3
    assert MoveKDVisionModel.from_pretrained(dest)(make_pixels()).pooler_output is not None


def test_encoder_of_tiles_sees_the_whole_image(folders, tmp_path):
    """`anyres` makes tiles; the encoder alone gets the crop that holds all of the image."""
    dest = export(folders["plain anyres"], tmp_path / "encoder", "encoder")
    image = Image.open(next(folders["images"].iterdir()))
    found = AutoImageProcessor.from_pretrained(dest)(image, return_tensors="pt")["pixel_values"]
    tiles = AutoProcessor.from_pretrained(folders["plain anyres"]).image_processor(image, return_tensors="pt")
    torch.testing.assert_close(found, tiles["pixel_values"][:, 0], atol=0.05, rtol=0)


def test_dtype(folders, tmp_path):
    dest = export(folders["model"], tmp_path / "encoder", "encoder", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(dest / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModel.from_pretrained(dest, trust_remote_code=True).dtype == torch.bfloat16


def test_encoder_of_a_sharded_checkpoint(folders, tmp_path):
    model = MoveKDForConditionalGeneration.from_pretrained(folders["model"])
    folder = tmp_path / "model"
    save_model(model, folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    weights = load_file(export(folder, tmp_path / "encoder", "encoder") / "model.safetensors")
    expected = model.model.vision_tower.state_dict()
    assert set(weights) == set(expected) and all(torch.equal(weights[key], expected[key]) for key in weights)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(ValueError, match=r"\.\./model-00001"):
        export(folder, tmp_path / "again", "encoder")


def test_nothing_is_asked_at_the_terminal(folders, tmp_path, monkeypatch):
    """transformers asks whether to run the checkpoint's code unless it is told."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail(f"asked: {args}"))
    for form in ("encoder", "clip", "llava"):
        export(folders["plain"], tmp_path / form, form)


def test_dense_weighs_all_experts(folders, tmp_path, capsys):
    main([str(folders["model"]), str(tmp_path / "dense"), "--form", "dense", "--images", str(folders["images"])])
    dense = AutoModel.from_pretrained(tmp_path / "dense", trust_remote_code=True)
    pixels, tower = make_pixels(), make_tower()
    with torch.no_grad():
        found, top_1 = dense(pixels).last_hidden_state, tower(pixels).last_hidden_state
        expected = make_tower(dense_routing=True)(pixels).last_hidden_state
    same(found, expected)
    assert (found - top_1).norm() > 0.01 * top_1.norm()
    printed = capsys.readouterr().out
    change = float(printed.split("features change by ")[1].split("%")[0])
    assert "On 10 images" in printed and 1 < change < 200
    # Dense already: the same again
    main([str(tmp_path / "dense"), str(tmp_path / "again"), "--form", "dense"])
    assert "nothing changes" in capsys.readouterr().out
    with torch.no_grad():
        same(MoveKDVisionModel.from_pretrained(tmp_path / "again")(pixels).last_hidden_state, expected)


# --- Plain CLIP ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["plain", "plain whole"])
def clip(folders, request, tmp_path_factory) -> tuple[Path, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The exported folder, and the tower's pixels, features and pooled output."""
    dest = export(folders[request.param], tmp_path_factory.mktemp("clip") / "clip", "clip")
    tower = MoveKDForConditionalGeneration.from_pretrained(folders[request.param]).model.vision_tower
    pixels = make_pixels()
    with torch.no_grad():
        output = tower(pixels)
    return dest, pixels, output.last_hidden_state, output.pooler_output


@torch.no_grad()
def test_transformers_reads_clip(clip):
    dest, pixels, features, pooled = clip
    for auto_class in (CLIPVisionModel, AutoModel):
        model, info = auto_class.from_pretrained(dest, output_loading_info=True)
        assert type(model) is CLIPVisionModel and not info["missing_keys"] and not info["unexpected_keys"]
        same(model(pixels).last_hidden_state, features)
        if pooled is not None:
            same(model(pixels).pooler_output, pooled)
    assert AutoImageProcessor.from_pretrained(dest).size
    config = json.loads((dest / "config.json").read_text())
    assert config["model_type"] == "clip_vision_model" and "auto_map" not in config
    assert not {"num_experts", "lora_rank", "dense_routing", "add_pooling_layer"} & set(config)
    assert config["feature_layer"] == (-1 if pooled is None else -2)
    # The layout of transformers 4, where every key of the class begins so
    layers = {key.split(".")[3] for key in load_file(dest / "model.safetensors") if ".layers." in key}
    assert all(key.startswith("vision_model.") for key in load_file(dest / "model.safetensors"))
    assert len(layers) == config["num_hidden_layers"] and not list(dest.rglob("*.py"))


@torch.no_grad()
def test_timm_reads_clip(clip):
    timm = pytest.importorskip("timm")
    dest, pixels, features, pooled = clip
    model = timm.create_model(f"local-dir:{dest / 'timm'}", pretrained=True).eval()
    tokens = model.forward_intermediates(
        pixels, indices=1, norm=False, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )
    patches, cls = tokens[0]
    same(torch.cat([cls, patches], dim=1), features)
    if pooled is None:
        same(model.forward_features(pixels), features)
    else:
        same(model(pixels), pooled)
    assert not {"license", "tag", "notes"} & set(json.loads((dest / "timm/config.json").read_text())["pretrained_cfg"])
    settings = timm.data.resolve_model_data_config(model)
    assert settings["input_size"] == (3, SIZE, SIZE) and settings["mean"][0] == pytest.approx(0.4815, abs=1e-3)


@torch.no_grad()
def test_open_clip_reads_clip(clip):
    open_clip = pytest.importorskip("open_clip")
    dest, pixels, features, pooled = clip
    model = open_clip.create_model(f"local-dir:{dest / 'open_clip'}", load_weights=False).eval()
    model.visual.load_state_dict(load_file(dest / "open_clip" / "visual.safetensors"), strict=True)
    depth = len(model.visual.transformer.resblocks)
    output = model.visual.forward_intermediates(
        pixels, indices=[depth - 1], output_fmt="NLC", output_extra_tokens=True, intermediates_only=True
    )
    tokens = torch.cat([output["image_intermediates_prefix"][0], output["image_intermediates"][0]], dim=1)
    same(tokens, features)
    if pooled is not None:
        same(model.encode_image(pixels), pooled)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_clip_with_the_exact_activation(tmp_path, dtype):
    timm, open_clip = pytest.importorskip("timm"), pytest.importorskip("open_clip")
    tower = make_tower(None, num_experts=0, hidden_act="gelu")
    dest = export(save_tower(tower, tmp_path / "tower"), tmp_path / "clip", "clip", dtype=dtype)
    assert load_file(dest / "timm" / "model.safetensors")["pos_embed"].dtype == getattr(torch, dtype)
    if dtype == "float32":
        pooled = tower(make_pixels()).pooler_output
        same(timm.create_model(f"local-dir:{dest / 'timm'}", pretrained=True).eval()(make_pixels()), pooled)
        model = open_clip.create_model(f"local-dir:{dest / 'open_clip'}", load_weights=False).eval()
        model.visual.load_state_dict(load_file(dest / "open_clip" / "visual.safetensors"))
        same(model.encode_image(make_pixels()), pooled)


# --- A stock LLaVA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "plain anyres", "plain whole", "siglip", "siglip anyres"])
@torch.no_grad()
def test_llava(folders, tmp_path, kind):
    dest = export(folders[kind], tmp_path / "llava", "llava")
    stock, info = AutoModelForImageTextToText.from_pretrained(dest, output_loading_info=True)
    expected_class = "LlavaNextForConditionalGeneration" if "anyres" in kind else "LlavaForConditionalGeneration"
    assert type(stock).__name__ == expected_class and type(stock).__module__.startswith("transformers.models.")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not list(dest.rglob("*.py"))
    model = MoveKDForConditionalGeneration.from_pretrained(folders[kind])
    content = [{"type": "image", "image": Image.open(next(folders["images"].iterdir()))}]
    content.append({"type": "text", "text": "What is this?"})
    inputs, theirs = (
        AutoProcessor.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        for folder in (folders[kind], dest)
    )
    assert torch.equal(inputs["input_ids"], theirs["input_ids"])
    same(theirs["pixel_values"], inputs["pixel_values"])
    same(stock(**theirs).logits, model(**inputs).logits)
    answers = [it.generate(**inputs, max_new_tokens=8, do_sample=False) for it in (stock, model)]
    assert torch.equal(*answers) and answers[0].shape[1] > inputs["input_ids"].shape[1]
    config = json.loads((dest / "config.json").read_text())
    vision_type = "siglip_vision_model" if "siglip" in kind else "clip_vision_model"
    assert "auto_map" not in config and config["vision_config"]["model_type"] == vision_type
    # The same model: what was measured holds for it, and its card says so
    assert metadata(write_card(dest))["model-index"][0]["results"][0]["metrics"][0]["value"] == RESULT["value"]
    # The layout of transformers 4
    parts = {".".join(key.split(".")[:2]) for key in load_file(dest / "model.safetensors")}
    parts -= {"image_newline", "language_model.lm_head"}
    assert {part for part in parts if "projector" not in part} == {"vision_tower.vision_model", "language_model.model"}


LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 64}
GEMMA_3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}


@pytest.mark.parametrize(
    ("config", "older"),
    [
        (LlamaConfig(), {"rope_theta": 10000.0, "rope_scaling": None}),
        (LlamaConfig(rope_parameters={"rope_theta": 1e5}), {"rope_theta": 1e5, "rope_scaling": None}),
        (LlamaConfig(rope_parameters=LLAMA_3 | {"rope_theta": 5e5}), {"rope_theta": 5e5, "rope_scaling": LLAMA_3}),
        (PhiConfig(), {"rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": 0.5}),
        (
            Gemma3TextConfig(rope_parameters=GEMMA_3),
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 10000.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (GPT2Config(), {}),
    ],
    ids=["default", "theta", "llama3", "phi", "gemma3", "gpt2"],
)
def test_names_of_transformers_4(tmp_path, config, older):
    """What transformers 4 reads beside what 5 reads, which reads the same configuration back."""
    config.dtype = torch.bfloat16
    expected = LlavaConfig(text_config=config)
    expected.save_pretrained(tmp_path)
    add_older_names(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert {name: text.get(name) for name in older} == older and text["torch_dtype"] == "bfloat16"
    found = AutoConfig.from_pretrained(tmp_path)
    assert found.text_config.rope_parameters == config.rope_parameters if older else "rope_theta" not in text
    assert found.text_config.to_dict() == expected.text_config.to_dict() | {
        name: value for name, value in found.text_config.to_dict().items() if name in older
    }


def test_llava_loads_in_transformers_4(folders, tmp_path):
    """Its classes of tokenizer and image processor are those of 4, in the files that 4 reads; the ids stay."""
    dest = export(folders["plain"], tmp_path / "llava", "llava")
    settings = json.loads((dest / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in settings
    assert settings["additional_special_tokens"] == ["<image>"]
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert json.loads((dest / "preprocessor_config.json").read_text())["image_processor_type"] == "LlavaImageProcessor"
    ours, theirs = (AutoProcessor.from_pretrained(folder).tokenizer for folder in (folders["plain"], dest))
    for text in ("<image>\nWhat is this?</s>", "é  <s>"):
        assert dict(ours(text)) == dict(theirs(text)) and ours.all_special_tokens == theirs.all_special_tokens


VISITOR_4 = textwrap.dedent(
    """
    import json, sys

    import transformers
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    assert transformers.__version__.startswith("4."), transformers.__version__
    answers = []
    for folder in sys.argv[2:]:
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        processor = AutoProcessor.from_pretrained(folder)
        for messages in json.loads(sys.argv[1]):
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            answers.append(model.generate(**inputs, max_new_tokens=12, do_sample=False).tolist()[0])
    print("ANSWERS" + json.dumps(answers))
    """
)


@pytest.mark.slow
def test_llava_answers_alike_in_transformers_4(folders, tmp_path):
    """
    In an environment of its own, which takes torch and all else from the one that runs the tests. A rotary base that
    is not the default, keys of one head for two, tiles, and a prompt without a picture.
    """
    torch.manual_seed(0)
    language = AutoModelForCausalLM.from_config(
        llama_config(num_key_value_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    )
    spread(language, 2)
    model = MoveKDForConditionalGeneration.from_parts(make_tower(num_experts=0), language)
    spread(model.model.multi_modal_projector, 3)
    sources = [save_model(model, tmp_path / "model"), folders["plain anyres"]]
    dests = [export(source, tmp_path / f"llava{index}", "llava") for index, source in enumerate(sources)]
    questions = [[{"type": "text", "text": "What is this?"}]]
    questions += [[{"type": "image", "path": str(it)}, *questions[0]] for it in image_files([folders["images"]])]
    conversations = [[{"role": "user", "content": question}] for question in questions]
    venv.create(tmp_path / "venv", with_pip=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", "transformers<5"], check=True)
    command = [python, "-I", "-c", VISITOR_4, json.dumps(conversations), *dests]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = iter(json.loads(done.stdout.split("ANSWERS")[1]))
    for source in sources:
        model, processor = MoveKDForConditionalGeneration.from_pretrained(source), load_processor(source)
        for messages in conversations:
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()
            assert next(answers) == expected


def test_llava_of_another_type_is_to_be_evaluated_itself(folders, tmp_path):
    """Its weights are rounded. Results of other weights than the folder's do not get those of the export either."""
    dest = export(folders["plain"], tmp_path / "rounded", "llava", dtype="bfloat16")
    assert not (dest / "evaluation.json").exists()
    folder = Path(shutil.copytree(folders["plain"], tmp_path / "plain"))
    edit_json(folder / "evaluation.json", weights="0123456789abcdef")
    with pytest.raises(ValueError, match="is of the weights '0123456789abcdef', but the folder holds"):
        export(folder, tmp_path / "llava", "llava")
    assert not (tmp_path / "llava").exists()


def test_llava_that_differs_is_refused(folders):
    """A language model that the stock class wires otherwise must not pass for the same."""
    model = MoveKDForConditionalGeneration.from_pretrained(folders["plain"])
    stock = stock_llava(model)
    assert stock.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr(), "weights are held twice"
    stock.lm_head.weight = torch.nn.Parameter(stock.lm_head.weight * 1.01)
    with pytest.raises(ValueError, match="gives other logits"):
        check_equal(model, stock)
    stock = stock_llava(model)
    stock.model.vision_tower.encoder.layers[1].mlp.fc1 = torch.nn.Linear(32, 48)
    with pytest.raises(ValueError, match="gives other image features"):
        check_equal(model, stock)


def test_llava_with_a_language_model_it_cannot_tie():
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    model = MoveKDForConditionalGeneration.from_parts(make_tower(num_experts=0), GPT2LMHeadModel(config))
    with pytest.raises(ValueError, match="GPT2Model has not"):
        stock_llava(model)


# --- Refusals --------------------------------------------------------------------------------------------------------


def refused(capsys, *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code not in (0, None)
    return f"{stop.value.code}{capsys.readouterr().err}"


@pytest.mark.parametrize("form", ["clip", "llava"])
def test_experts_are_no_plain_mlp(folders, tmp_path, capsys, form):
    message = refused(capsys, folders["model"], tmp_path / "out", "--form", form)
    assert "cannot be merged exactly" in message and "--form merged" in message and "3 experts" in message
    assert not list(tmp_path.iterdir())


def test_refusals(folders, tmp_path, capsys):
    out = tmp_path / "out"
    assert "needs a whole model" in refused(
        capsys, save_tower(make_tower(num_experts=0), tmp_path / "t"), out, "--form", "llava"
    )
    for form, message in (("clip", "without [CLS]"), ("gguf", "`class_token` is False")):
        assert message in refused(capsys, folders["siglip"], out, "--form", form)
    assert "no dense form" in refused(capsys, folders["plain"], out, "--form", "dense")
    assert "nothing to merge" in refused(
        capsys, folders["plain"], out, "--form", "merged", "--images", folders["images"]
    )
    assert "needs `--images`" in refused(capsys, folders["model"], out, "--form", "merged")
    assert "for the form `merged`" in refused(capsys, folders["model"], out, "--form", "clip", "--rank", "2")
    assert "`images` are for the forms dense" in refused(
        capsys, folders["model"], out, "--form", "encoder", "--images", "x"
    )
    assert "no image or folder" in refused(capsys, folders["model"], out, "--form", "dense", "--images", "nowhere")
    assert "float32" in refused(capsys, folders["model"], out, "--form", "onnx", "--dtype", "bfloat16")
    assert not out.exists() and {path.name for path in tmp_path.iterdir()} == {"t"}
    with pytest.raises(ValueError, match="'tiny'.*encoder, dense"):
        export(folders["model"], out, "tiny")
    with pytest.raises(ValueError, match="'int8'.*float32"):
        export(folders["model"], out, "encoder", dtype="int8")


@pytest.mark.parametrize(("form", "package"), [("clip", "timm"), ("onnx", "onnxscript"), ("onnx", "onnxruntime")])
def test_missing_package(folders, tmp_path, monkeypatch, capsys, form, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = refused(capsys, folders["plain"], tmp_path / "out", "--form", form)
    assert package in message.split("pip install ")[1]
    assert not list(tmp_path.iterdir())


def test_dest_that_holds_something_is_left_alone(folders, tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ValueError, match="exists already"):
        export(folders["model"], tmp_path, "encoder")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert (export(folders["model"], tmp_path / "empty", "encoder") / "config.json").is_file()


@pytest.mark.parametrize("form", ["encoder", "dense", "onnx"])
@pytest.mark.parametrize("change", ["lost", "left over"])
def test_weights_missing_or_left_over(folders, tmp_path, form, change):
    weights = load_file(folders["encoder"] / "model.safetensors")
    if change == "lost":
        weights.pop("encoder.layers.1.mlp.router.weight")
    else:
        weights["encoder.layers.7.mlp.router.weight"] = torch.ones(1)
    folder = save_tower(make_tower(), tmp_path / "tower")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"encoder.layers.\d.mlp.router.weight"):
        export(folder, tmp_path / "out", form)
    assert [path.name for path in tmp_path.iterdir()] == ["tower"]


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
@pytest.mark.parametrize(
    ("form", "part"), [("encoder", "vision_tower.pre_layrnorm"), ("llava", "language_model.norm")]
)
def test_values_that_no_weight_has(folders, tmp_path, kind, form, part):
    folder = Path(shutil.copytree(folders["plain"], tmp_path / "plain"))
    change, message = BAD_WEIGHTS[kind]
    change_weight(folder, f"model.{part}.weight", change)
    with pytest.raises(ValueError, match=rf"`model.{part}.weight` of .*{message}"):
        export(folder, tmp_path / "out", form)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


@pytest.mark.parametrize("form", ["encoder", "llava"])
def test_a_processor_with_other_grids(folders, tmp_path, form):
    folder = Path(shutil.copytree(folders["plain anyres"], tmp_path / "plain"))
    edit_json(folder / "config.json", image_grid_pinpoints=[[SIZE, SIZE]])
    with pytest.raises(ValueError, match="cuts tiles by the grids"):
        export(folder, tmp_path / "out", form)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_not_a_checkpoint(tmp_path, folders):
    with pytest.raises(ValueError, match=r"config.json is missing"):
        export(save_images(tmp_path / "images", 1), tmp_path / "out", "encoder")
    clip = export(folders["plain"], tmp_path / "clip", "clip")
    with pytest.raises(ValueError, match="'clip_vision_model'.*'movekd_vision'"):
        export(clip, tmp_path / "out", "encoder")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (clip / name).unlink(missing_ok=True)
    make_tower().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no image processor"):
        export(tmp_path / "bare", tmp_path / "out", "encoder")
    assert not (tmp_path / "out").exists()


def test_command_line_from_anywhere(folders, tmp_path):
    script = Path(__file__).parents[2] / "hub" / "export.py"
    command = [sys.executable, script, folders["model"], tmp_path / "out", "--form", "clip"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "--form merged" in done.stderr and "Traceback" not in done.stderr
