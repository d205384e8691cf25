"""Experts merged into a plain MLP: exact where that is possible, else the best of its rank; errors that are true."""

import copy
import json
import shutil

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, CLIPVisionModel

from hub.checkpoint_parts import load_image_processor, load_tower, read_config
from hub.export import main
from hub.export_forms import export, image_files, read_pixels
from hub.export_merged import (
    Moments,
    expert_outputs,
    limit_rank,
    mean_expert,
    merge_experts,
    merge_layer,
    ridge_towards,
    up_projection,
)
from modeling_movekd import MoveKDForConditionalGeneration, MoveKDVisionModel
from tests.helpers.exported import SIZE, make_model, make_tower, save_images, save_model, save_tower


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("pictures") / "images", 20)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory, images) -> list[torch.Tensor]:
    folder = save_tower(make_tower(), tmp_path_factory.mktemp("towers") / "tower")
    return read_pixels(image_files([images]), load_image_processor(folder, read_config(folder)))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def test_one_expert_merges_exactly(pixels):
    """With one expert nothing depends on the token."""
    tower = make_tower(num_experts=1, expert_bias=True)
    merged, report = merge_experts(tower, pixels)
    assert merged.config.num_experts == 0 and not any("expert" in key for key in merged.state_dict())
    assert report["features"]["merged"] < 1e-4 < 0.01 < report["features"]["dropped"]
    found = merged(torch.stack(pixels)).last_hidden_state
    torch.testing.assert_close(found, tower(torch.stack(pixels)).last_hidden_state, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_tokens_of_one_expert_merge_exactly(pixels):
    tower = make_tower()
    for layer in tower.encoder.layers:
        layer.mlp.router.bias[1] += 1e3
    merged, report = merge_experts(tower, pixels)
    assert report["features"]["merged"] < 1e-3 < 0.01 < report["features"]["dropped"]
    assert [layer["expert_shares"] for layer in report["layers"]] == [[0, 1, 0]] * 2


@pytest.mark.parametrize("settings", [{}, {"expert_bias": True}, {"dense_routing": True}, {"siglip": True}], ids=str)
@torch.no_grad()
def test_report_is_true(pixels, settings):
    """The errors in the report are found again by running the towers on the images that served for nothing else."""
    tower = make_tower(**settings)
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    merged, report = merge_experts(tower, pixels)
    assert all(torch.equal(before[key], value) for key, value in tower.state_dict().items())
    assert report["images"] == {"fitted": 12, "chosen": 4, "measured": 4}
    plain = make_tower(num_experts=0, siglip=settings.get("siglip", False))
    held_back = torch.stack(pixels[4::5])
    exact = tower(held_back).last_hidden_state
    for name, other in (("merged", merged), ("dropped", plain)):
        assert report["features"][name] == pytest.approx(relative(other(held_back).last_hidden_state, exact), rel=1e-3)
    assert report["features"]["merged"] < 0.8 * report["features"]["dropped"]
    assert all(layer["merged"] < layer["dropped"] for layer in report["layers"])
    # The first layer's error by hand
    layer, inputs = tower.encoder.layers[0], []
    layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    tower(held_back)
    expected = relative(merged.encoder.layers[0].mlp(inputs[0]), layer.mlp(inputs[0]))
    assert report["layers"][0]["merged"] == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_rank_limits_the_update(pixels):
    tower, errors = make_tower(), []
    for rank in (1, 3, 8, None):
        merged, report = merge_experts(tower, pixels, rank)
        for ours, plain in zip(merged.encoder.layers, tower.encoder.layers, strict=True):
            for name in ("fc1", "fc2"):
                update = getattr(ours.mlp, name).weight - getattr(plain.mlp, name).weight
                assert torch.linalg.matrix_rank(update, rtol=1e-4) <= (rank or 3 * 4)
        errors.append(report["layers"][0]["merged"])
    assert errors[0] > errors[1] > errors[2] > 0.9 * errors[3], errors


@torch.no_grad()
def test_update_is_the_least_squares_solution():
    """Against `lstsq` over the tokens, and its best approximation of a rank against a perturbed one."""
    mlp = make_tower(expert_bias=True).encoder.layers[0].mlp
    inputs = torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    gates = mlp.expert_gates(*mlp.router(inputs))
    outputs, up = expert_outputs(mlp.fc1_experts, inputs, gates), up_projection(mlp.fc1_experts)
    target = mlp.fc1_experts(inputs, torch.zeros(400, 48), gates)
    torch.testing.assert_close((outputs.double() @ up.t()).float(), target)
    moments = Moments()
    for part in range(4):
        moments.add(inputs[part * 100 :][:100], outputs[part * 100 :][:100])
    (solution,) = ridge_towards(mean_expert(mlp.fc1_experts, gates.mean(dim=0)), moments, [1e-9])
    ones = torch.cat([inputs, torch.ones(400, 1)], dim=1)
    expected = torch.linalg.lstsq(ones.double(), target.double()).solution.t()
    torch.testing.assert_close(up @ solution, expected, atol=1e-4, rtol=1e-4)
    assert moments.error(solution, up) == pytest.approx(float((ones @ expected.t().float() - target).square().sum()))

    def error(update: torch.Tensor) -> float:
        return float((ones.double() @ update.t() - target).square().sum())

    limited = limit_rank(solution, up, moments, 3)
    assert torch.linalg.matrix_rank(limited[:, :-1]) == 3
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        # Another update of that rank, near it
        left, values, right = torch.linalg.svd(limited[:, :-1], full_matrices=False)
        left = left[:, :3] + 0.03 * torch.randn(48, 3, generator=generator)
        right = right[:3] + 0.03 * torch.randn(3, 32, generator=generator)
        other = torch.cat([left @ values[:3].diag() @ right, limited[:, -1:]], dim=1)
        assert error(other) > error(limited) > error(expected)


@torch.no_grad()
def test_mean_of_the_experts():
    mlp = make_tower(expert_bias=True).encoder.layers[0].mlp
    shares = torch.tensor([0.5, 0.2, 0.3])
    inputs = torch.randn(7, 32)
    expected = sum(
        share * mlp.fc1_experts(inputs, torch.zeros(7, 48), torch.eye(3)[index].expand(7, 3))
        for index, share in enumerate(shares)
    )
    ones = torch.cat([inputs, torch.ones(7, 1)], dim=1).double()
    found = ones @ (up_projection(mlp.fc1_experts) @ mean_expert(mlp.fc1_experts, shares)).t()
    torch.testing.assert_close(found.float(), expected)


@torch.no_grad()
def test_whole_model_then_clip_and_llava(tmp_path, images, capsys):
    folder = save_model(make_model(make_tower()), tmp_path / "model")
    main([str(folder), str(tmp_path / "merged"), "--form", "merged", "--images", str(images), "--rank", "6"])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["rank"] == 6 and len(report["layers"]) == 2
    assert f"{report['features']['merged']:.4f}" in printed and "cannot be merged exactly" in printed
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert type(model).__name__ == "MoveKDForConditionalGeneration" and model.config.vision_config.num_experts == 0
    assert not (tmp_path / "merged" / "evaluation.json").exists(), "measured on another model"
    # What is not the tower is as it was
    before = MoveKDForConditionalGeneration.from_pretrained(folder).state_dict()
    kept = [key for key in before if "mlp.fc" not in key and "router" not in key and "expert" not in key]
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in kept)
    clip = CLIPVisionModel.from_pretrained(export(tmp_path / "merged", tmp_path / "clip", "clip"))
    pixels = torch.randn(2, 3, SIZE, SIZE)
    expected = load_tower(tmp_path / "merged")(pixels).last_hidden_state
    torch.testing.assert_close(clip(pixels).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    llava = AutoModelForImageTextToText.from_pretrained(export(tmp_path / "merged", tmp_path / "llava", "llava"))
    assert type(llava).__name__ == "LlavaForConditionalGeneration"


def test_encoder_alone_in_another_dtype(tmp_path, images):
    folder = save_tower(make_tower().bfloat16(), tmp_path / "tower")
    dest = export(folder, tmp_path / "merged", "merged", images=[images])
    merged = AutoModel.from_pretrained(dest, trust_remote_code=True)
    assert merged.dtype == torch.bfloat16 and (dest / "preprocessor_config.json").is_file()
    assert type(merged).__name__ == "MoveKDVisionModel" and merged.config.num_experts == 0


@torch.no_grad()
def test_better_than_the_mean_of_the_experts_and_than_fc1_alone(pixels):
    """Of one layer, on images apart: `fc2` makes good part of what `fc1` cannot do."""
    mlp = make_tower().encoder.layers[0].mlp
    inputs = [torch.randn(60, 32, generator=torch.Generator().manual_seed(index)) for index in range(60)]
    plain, facts = merge_layer(mlp, inputs, None)
    held_back = torch.cat(inputs[4::5])
    exact = mlp(held_back)
    means = []
    for name in ("fc1", "fc2"):
        experts = getattr(mlp, f"{name}_experts")
        update = (up_projection(experts) @ mean_expert(experts, torch.tensor(facts["expert_shares"]))).float()
        linear = copy.deepcopy(getattr(mlp, name))
        linear.weight += update[:, :-1]
        linear.bias += update[:, -1]
        means.append(linear)
    mean = relative(means[1](mlp.activation_fn(means[0](held_back))), exact)
    mixed = relative(means[1](mlp.activation_fn(plain.fc1(held_back))), exact)
    assert facts["merged"] < 0.98 * min(mean, mixed), (facts["merged"], mean, mixed)


def test_images_that_cannot_be_used_are_counted(images, tmp_path, capsys):
    folder = save_tower(make_tower(), tmp_path / "tower")
    for index, content in enumerate((b"", b"no image", next(images.iterdir()).read_bytes()[:60])):
        mixed = tmp_path / "mixed"
        shutil.copytree(images, mixed, dirs_exist_ok=True)
        (mixed / f"bad-{index}.png").write_bytes(content)
    dest = export(folder, tmp_path / "merged", "merged", images=[mixed])
    printed = capsys.readouterr().out
    assert "3 of 23 images cannot be used: " in printed and all(f"bad-{index}.png: " in printed for index in range(3))
    report = json.loads((dest / "merge_report.json").read_text())
    assert report["images"] == {"fitted": 12, "chosen": 4, "measured": 4, "skipped": 3}
    for path in images.iterdir():
        (mixed / path.name).write_bytes(b"")
    with pytest.raises(ValueError, match="23 of 23 images cannot be used: .* Give other images"):
        export(folder, tmp_path / "none", "merged", images=[mixed])


def test_refusals(pixels):
    with pytest.raises(ValueError, match="4 images.*at least 5"):
        merge_experts(make_tower(), pixels[:4])
    with pytest.raises(ValueError, match="`rank` is 0"):
        merge_experts(make_tower(), pixels, 0)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_experts(make_tower(num_experts=0), pixels)
    broken = make_tower()
    broken.encoder.layers[0].mlp.fc1.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        merge_experts(broken, pixels[:5])
    assert isinstance(merge_experts(make_tower(), pixels[:5])[0], MoveKDVisionModel)
