"""`MoveKDVisionModel`: building it from CLIP, what it computes, and what it records on request."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionModel, CLIPVisionModelWithProjection
from transformers.models.clip.modeling_clip import CLIPMLP

from modeling_movekd import MoveKDVisionModel
from modeling_movekd.base_encoders_movekd import load_strictly


@pytest.fixture(scope="module")
def clip(make_clip) -> CLIPVisionModel:
    return make_clip()


@pytest.fixture(scope="module")
def tower(make_tower) -> MoveKDVisionModel:
    return make_tower()


def clip_folder(folder: Path, clip: CLIPVisionModel, edit=lambda weights: weights) -> Path:
    clip.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})
    return folder


def old_layout(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in weights.items()}


def new_layout(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("vision_model."): value for key, value in weights.items()}


# --- Built from CLIP ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_experts", [0, 1, 3, 5])
@pytest.mark.parametrize(
    ("feature_layer", "hidden_state"), [(-2, 3), (-1, 4), (1, 1), (3, 3), (4, 4), (None, 4)], ids=str
)
@torch.no_grad()
def test_starts_as_clip_exactly(clip, pixels, feature_layer, hidden_state, num_experts):
    tower = MoveKDVisionModel.from_clip(clip, feature_layer, num_experts=num_experts, lora_rank=4)
    expected = clip(pixels, output_hidden_states=True)
    output = tower(pixels)
    assert torch.equal(output.last_hidden_state, expected.hidden_states[hidden_state])
    assert len(tower.encoder.layers) == tower.config.num_hidden_layers == hidden_state
    if feature_layer is None:
        assert torch.equal(output.pooler_output, expected.pooler_output)
    else:
        assert output.pooler_output is None
        assert not any("post_layernorm" in key for key in tower.state_dict())


def test_clip_is_left_as_it_was(make_clip, pixels):
    clip = make_clip()
    weights = {key: value.clone() for key, value in clip.state_dict().items()}
    config = clip.config.to_dict()
    clip.train()
    tower = MoveKDVisionModel.from_clip(clip)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.fill_(9.0)
    assert clip.config.to_dict() == config and clip.training
    assert not any("expert" in key or "router" in key for key in clip.state_dict())
    for key, value in clip.state_dict().items():
        assert torch.equal(value, weights[key]), key
    storages = {parameter.untyped_storage().data_ptr() for parameter in clip.parameters()}
    assert not storages & {parameter.untyped_storage().data_ptr() for parameter in tower.parameters()}


@torch.no_grad()
def test_from_every_kind_of_clip(clip, pixels, tmp_path):
    text = CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    both = CLIPModel(CLIPConfig(vision_config=clip.config.to_dict(), text_config=text.to_dict(), projection_dim=24))
    both.vision_model.load_state_dict(clip.state_dict())
    projected = CLIPVisionModelWithProjection(clip.config)
    projected.vision_model.load_state_dict(clip.state_dict())
    both.save_pretrained(tmp_path / "both")
    sources = {
        "CLIPModel": both,
        "CLIPVisionModelWithProjection": projected,
        "folder of a CLIPModel": tmp_path / "both",
        "folder": clip_folder(tmp_path / "as_saved", clip),
        "old layout": str(clip_folder(tmp_path / "old", clip, old_layout)),
        "new layout": str(clip_folder(tmp_path / "new", clip, new_layout)),
    }
    assert all(key.startswith("vision_model.") for key in load_file(tmp_path / "old" / "model.safetensors"))
    assert not any(key.startswith("vision_model.") for key in load_file(tmp_path / "new" / "model.safetensors"))
    expected = clip(pixels, output_hidden_states=True).hidden_states[-2]
    for name, source in sources.items():
        tower = MoveKDVisionModel.from_clip(source)
        assert torch.equal(tower(pixels).last_hidden_state, expected), name


@pytest.mark.parametrize("layout", [old_layout, new_layout])
def test_folder_that_lacks_a_weight(clip, tmp_path, layout):
    lost = "encoder.layers.1.self_attn.q_proj.bias"

    def drop(weights):
        return {key: value for key, value in layout(weights).items() if not key.endswith(lost)}

    with pytest.raises(ValueError, match="missing.*" + lost):
        MoveKDVisionModel.from_clip(clip_folder(tmp_path, clip, drop))


def test_weights_missing_or_left_over(make_clip):
    clip = make_clip()
    del clip.encoder.layers[0].self_attn.k_proj.bias
    with pytest.raises(ValueError, match="missing.*encoder.layers.0.self_attn.k_proj.bias"):
        MoveKDVisionModel.from_clip(clip)
    clip = make_clip()
    clip.encoder.layers[0].extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="left over.*encoder.layers.0.extra.bias.*encoder.layers.0.extra.weight"):
        MoveKDVisionModel.from_clip(clip)


@pytest.mark.parametrize("layout", [old_layout, new_layout])
def test_folder_with_a_weight_left_over(clip, tmp_path, layout):
    """A CLIP with something more (another model that calls itself CLIP) is not quietly cut to what is known."""

    def add(weights):
        return layout(weights | {"encoder.layers.0.gate": torch.ones(2)})

    with pytest.raises(ValueError, match="left over.*encoder.layers.0.gate"):
        MoveKDVisionModel.from_clip(clip_folder(tmp_path, clip, add))


def test_load_strictly_names_every_key(make_tower):
    tower = make_tower()
    weights = tower.state_dict()
    del weights["pre_layrnorm.bias"], weights["encoder.layers.0.mlp.router.bias"]
    weights["head.weight"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"missing \['pre_layrnorm.bias'\], left over \['head.weight'\]"):
        load_strictly(tower, weights, may_lack=lambda key: "router" in key, assign=False)


@pytest.mark.parametrize("feature_layer", [0, 5, -5, -6])
def test_feature_layer_that_selects_no_layer(clip, feature_layer):
    with pytest.raises(ValueError, match=rf"`feature_layer` is {feature_layer}.*of the 4"):
        MoveKDVisionModel.from_clip(clip, feature_layer)


def test_not_a_clip(make_language, tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM.*CLIP vision tower"):
        MoveKDVisionModel.from_clip(make_language())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises((ValueError, OSError)):
        MoveKDVisionModel.from_clip(tmp_path)


def test_dtype_and_attention_of_clip_are_kept(make_clip):
    clip = make_clip().bfloat16()
    clip.set_attn_implementation("eager")
    tower = MoveKDVisionModel.from_clip(clip)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}
    assert tower.config._attn_implementation == "eager" and not tower.training


def test_mole_alone_is_named_expert_or_router(clip, make_tower):
    tower = make_tower(expert_bias=True)
    inherited = set(clip.state_dict())
    for key in tower.state_dict():
        assert ("expert" in key or "router" in key) == (key not in inherited), key
    plain = MoveKDVisionModel.from_clip(clip, num_experts=0)
    assert set(plain.state_dict()) < inherited
    assert all(type(layer.mlp) is CLIPMLP for layer in plain.encoder.layers)


# --- Attention implementations and records -------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@torch.no_grad()
def test_attention_implementations_agree(make_tower, pixels, implementation, compiled):
    tower = make_tower()
    tower.set_attn_implementation("eager")
    expected = tower(pixels, cls_attention_layer=1)
    tower.set_attn_implementation(implementation)
    assert tower.encoder.layers[0].self_attn.config._attn_implementation == implementation
    # Flex attention compiles itself at its first call, which takes half a minute
    torch.compiler.reset()
    with torch.compiler.set_stance("default" if compiled else "force_eager"):
        output = tower(pixels, cls_attention_layer=1)
    # Float32 rounds by the size of the largest feature (32 here): eager attention is 2e-5 from float64. Compiled flex
    # attention takes exp from the CPU's vector instructions, so its last digits differ between AVX2 and AVX-512
    atol = 1e-6 * expected.last_hidden_state.abs().max().item()
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, atol=atol, rtol=1e-5)
    torch.testing.assert_close(output.cls_attention, expected.cls_attention, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="FlashAttention is installed")
@pytest.mark.parametrize("whole", [False, True])
def test_flash_attention_says_what_to_install(make_tower, make_model, tmp_path, whole):
    model = make_model() if whole else make_tower()
    model.save_pretrained(tmp_path)
    message = "(?s)FlashAttention.*pip install flash-attn.*sdpa"
    with pytest.raises(ImportError, match=message):
        type(model).from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    with pytest.raises(ImportError, match=message):
        model.set_attn_implementation("flash_attention_2")
    with pytest.raises(ImportError, match=message):
        type(model)._from_config(model.config, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("layer", [0, 1, 2, -1, -3])
@torch.no_grad()
def test_cls_attention_is_the_row_of_eager_attention(make_tower, pixels, layer):
    tower = make_tower()
    tower.set_attn_implementation("eager")
    attentions = tower(pixels, output_attentions=True).attentions
    assert len(attentions) == 3
    tower.set_attn_implementation("sdpa")
    output = tower(pixels, cls_attention_layer=layer)
    assert output.cls_attention.shape == (3, 2, 17)
    torch.testing.assert_close(output.cls_attention, attentions[layer][:, :, 0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output.cls_attention.sum(-1), torch.ones(3, 2))
    assert torch.equal(output.last_hidden_state, tower(pixels).last_hidden_state)


def test_cls_attention_of_a_layer_that_is_not_there(tower, pixels):
    for layer in (3, -4):
        with pytest.raises(ValueError, match=f"{layer}; the tower has 3 layers"):
            tower(pixels, cls_attention_layer=layer)


@torch.no_grad()
def test_records_only_what_is_asked_for(tower, pixels):
    plain = tower(pixels)
    for name in ("router_probabilities", "expert_indices", "cls_attention", "hidden_states", "attentions"):
        assert getattr(plain, name) is None and name not in plain, name
    output = tower(pixels, output_router_probabilities=True)
    assert output.expert_indices is None and output.hidden_states is None
    output = tower(pixels, output_router_probabilities=True, output_expert_indices=True, output_hidden_states=True)
    assert len(output.router_probabilities) == len(output.expert_indices) == 3
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    for layer, probabilities, indices in zip(
        tower.encoder.layers, output.router_probabilities, output.expert_indices, strict=True
    ):
        assert probabilities.shape == (3, 17, 3) and probabilities.dtype == torch.float32
        assert indices.shape == (3, 17) and indices.dtype == torch.int64
        assert torch.equal(indices, probabilities.argmax(-1))
        assert len(indices.unique()) > 1, "this test sees nothing if one expert takes every token"
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, 17))
        assert layer.mlp.router.weight.shape == (3, 32)
    assert torch.equal(output.last_hidden_state, plain.last_hidden_state)


@torch.no_grad()
def test_recorded_probabilities_are_the_router_of_the_mlp_input(tower, pixels):
    output = tower(pixels, output_router_probabilities=True, output_hidden_states=True)
    layer, hidden = tower.encoder.layers[1], output.hidden_states[1]
    hidden = hidden + layer.self_attn(layer.layer_norm1(hidden))[0]
    logits = layer.layer_norm2(hidden) @ layer.mlp.router.weight.T + layer.mlp.router.bias
    torch.testing.assert_close(output.router_probabilities[1], logits.softmax(-1))


def test_records_carry_gradient(make_tower, pixels):
    tower = make_tower()
    output = tower(pixels, output_router_probabilities=True, cls_attention_layer=-1)
    sum(probabilities.square().mean() for probabilities in output.router_probabilities).backward()
    assert all(layer.mlp.router.weight.grad.abs().sum() > 0 for layer in tower.encoder.layers)
    tower.zero_grad()
    tower(pixels, cls_attention_layer=-1).cls_attention[..., 0].sum().backward()
    assert tower.encoder.layers[-1].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_without_experts_nothing_is_recorded(make_clip, pixels):
    tower = MoveKDVisionModel.from_clip(make_clip(), num_experts=0)
    output = tower(pixels, output_router_probabilities=True, output_expert_indices=True)
    assert not output.router_probabilities and not output.expert_indices


# --- Bad pixels, compilation ---------------------------------------------------------------------------------------


def test_pixels_of_a_wrong_size_or_rank(tower, pixels):
    with pytest.raises(ValueError, match="(?s)20.*16"):
        tower(torch.randn(1, 3, 20, 20))
    with pytest.raises(ValueError, match=r"5 dimensions \(1, 3, 3, 16, 16\)"):
        tower(pixels[None])
    assert tower(torch.randn(1, 3, 24, 16), interpolate_pos_encoding=True).last_hidden_state.shape == (1, 25, 32)


def compile_and_compare(make_tower, pixels, backend: str, **settings) -> None:
    torch.compiler.reset()
    tower = make_tower(**settings)
    compiled = torch.compile(tower, fullgraph=True, backend=backend)
    expected = tower(pixels)
    expected.last_hidden_state.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in tower.named_parameters()}
    tower.zero_grad()
    output = compiled(pixels)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, atol=1e-4, rtol=1e-4)
    output.last_hidden_state.square().mean().backward()
    for name, parameter in tower.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [{}, {"dense_routing": True}, {"router_gradient": "none", "expert_bias": True}, {"base": "siglip"}],
    ids=str,
)
def test_compiles_without_graph_breaks(make_tower, pixels, settings):
    compile_and_compare(make_tower, pixels, "aot_eager", **settings)


def test_compiles_with_records(make_tower, pixels):
    torch.compiler.reset()
    tower = make_tower()
    asked = {"output_router_probabilities": True, "output_expert_indices": True, "cls_attention_layer": -1}
    expected = tower(pixels, **asked)
    output = torch.compile(tower, fullgraph=True, backend="eager")(pixels, **asked)
    torch.testing.assert_close(output.router_probabilities, expected.router_probabilities)
    assert all(map(torch.equal, output.expert_indices, expected.expert_indices))
    torch.testing.assert_close(output.cls_attention, expected.cls_attention)


@pytest.mark.slow
def test_compiles_with_inductor(make_tower, pixels):
    compile_and_compare(make_tower, pixels, "inductor")
