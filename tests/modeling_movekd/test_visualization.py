"""Pictures from tensors: each shows what its numbers say, patch by patch."""

import pytest
import torch

from modeling_movekd.visualization_movekd import (
    component_picture,
    expert_colors,
    expert_map,
    heat_map,
    principal_components,
    relational_distance,
    to_grid,
)


GRAY = torch.full((1, 8, 8, 3), 128, dtype=torch.uint8)


def test_pictures_of_a_layer(make_tower, pixels):
    tower = make_tower(num_experts=3)
    for layer in (0, -1, 2):
        pictures = tower.visualize(pixels, layer=layer)
        outputs = tower(pixels, cls_attention_layer=layer, output_expert_indices=True, output_hidden_states=True)
        indices = outputs.expert_indices[layer][:, 1:]
        assert pictures.image.shape == pictures.experts.shape == (3, 16, 16, 3)
        assert pictures.experts.dtype == pictures.cls_attention.dtype == pictures.components.dtype == torch.uint8
        counts = torch.stack([(indices == expert).sum(dim=1) for expert in range(3)], dim=1) / 16
        torch.testing.assert_close(pictures.expert_shares, counts)
        tokens = outputs.hidden_states[layer + 1 if layer >= 0 else layer][:, 1:]
        torch.testing.assert_close(pictures.tokens, tokens)
        attention = outputs.cls_attention[:, :, 1:].mean(dim=1)
        assert torch.equal(pictures.cls_attention, heat_map(attention, pictures.image))
    last = tower(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(tower.visualize(pixels).tokens, last)
    with pytest.raises(ValueError, match="`cls_attention_layer` is 7; the tower has 3 layers"):
        tower.visualize(pixels, layer=7)


def test_mode_stays_and_folded_towers_draw_the_same(make_tower, pixels):
    tower = make_tower().train()
    expected = tower.visualize(pixels)
    assert tower.training
    with pytest.raises(ValueError, match="cls_attention_layer"):
        tower.visualize(pixels, layer=7)
    assert tower.training, "also after a layer that is refused"
    tower.eval().fold_experts()
    assert torch.equal(tower.visualize(pixels).experts, expected.experts)
    assert not tower.training and tower.encoder.layers[0].mlp.folded is not None


def test_without_experts_and_with_tiles(make_model, make_tower, pixels):
    pictures = make_tower(num_experts=0).visualize(pixels)
    assert pictures.experts is None and pictures.expert_shares is None and pictures.cls_attention.any()
    model = make_model(image_aspect_ratio="anyres")
    tiles = torch.stack([pixels, pixels.flip(0)], dim=1)
    assert torch.equal(model.visualize(tiles).experts, model.model.vision_tower.visualize(pixels).experts)


def test_other_encoders_beside_the_student(make_tower, make_model, pixels):
    tower = make_tower()
    alone = tower.visualize(pixels, layer=1)
    assert alone.others == {}
    generator = torch.Generator().manual_seed(0)
    turned = alone.tokens @ torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    others = {"same": turned, "finer": torch.randn(3, 36, 20, generator=generator)}
    pictures = tower.visualize(pixels, layer=1, other_tokens=others)
    assert torch.equal(pictures.components, alone.components)
    components, distance, distances = pictures.others["same"]
    assert (components.int() - alone.components.int()).abs().max() <= 1, "the same colors in another basis"
    assert distances.max() < 1e-4
    assert torch.equal(distance, heat_map(torch.zeros(3, 16), pictures.image, top=1.0))
    finer = pictures.others["finer"]
    assert torch.equal(finer.distances, relational_distance(alone.tokens, others["finer"]))
    assert torch.equal(finer.distance, heat_map(finer.distances, pictures.image, top=1.0))
    assert finer.components.shape == (3, 16, 16, 3)
    # The whole model takes the same keywords
    model = make_model()
    assert list(model.visualize(pixels, other_tokens=others).others) == ["same", "finer"]
    for wrong in (torch.zeros(3, 17, 8), torch.zeros(2, 16, 8), torch.zeros(3, 8, 4, 4)):
        with pytest.raises(ValueError, match=r"The features of 'clip' have the shape \("):
            tower.visualize(pixels, other_tokens={"clip": wrong})


def test_colors_are_kept_from_one_step_to_the_next(make_tower, pixels):
    tower = make_tower()
    before = tower.visualize(pixels)
    with torch.no_grad():
        # Signs and order of components are arbitrary: turn the features, and nothing of what they say
        turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))[0]
        values = principal_components(before.tokens @ turn, before.values)
    assert torch.equal(component_picture(before.values, (16, 16)), before.components)
    torch.testing.assert_close(values, before.values, atol=1e-3, rtol=0)
    again = tower.visualize(pixels, reference=-before.values)
    torch.testing.assert_close(again.values, -before.values, atol=1e-3, rtol=0)


def test_each_patch_has_the_color_of_its_expert():
    indices = torch.tensor([[0, 1, 2, 0]])
    picture, shares = expert_map(indices, 3, GRAY, opacity=1.0)
    colors = expert_colors(3)
    for patch, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        cell = picture[0, row : row + 4, column : column + 4].reshape(-1, 3)
        assert (cell == colors[indices[0, patch]]).all()
    assert shares.tolist() == [[0.5, 0.25, 0.25]]
    half, _ = expert_map(indices, 3, GRAY, opacity=0.5)
    torch.testing.assert_close(half.float(), (picture.float() + 128) / 2, atol=0.5, rtol=0)
    many = expert_colors(16)
    assert len({tuple(color) for color in many.tolist()}) == 16


def test_heat_grows_with_the_number():
    values = torch.tensor([[0.0, 0.1, 0.2, 0.4]])
    light = heat_map(values, GRAY, opacity=1.0).float().mean(dim=-1)[0]
    corners = [light[0, 0], light[0, -1], light[-1, 0], light[-1, -1]]
    assert all(first < second for first, second in zip(corners, corners[1:], strict=False))
    assert torch.equal(heat_map(values, GRAY), heat_map(values * 7, GRAY)), "each image has a scale of its own"
    assert not torch.equal(heat_map(values, GRAY, top=1.0), heat_map(values * 2, GRAY, top=1.0))
    assert torch.isfinite(heat_map(values * 0, GRAY).float()).all()


def test_components_are_the_largest_directions_and_turn_to_the_reference():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 16, 3, generator=generator)
    wide = hidden * torch.tensor([9.0, 5.0, 3.0]) @ torch.linalg.qr(torch.randn(20, 20, generator=generator))[0][:3]
    wide = wide + 0.01 * torch.randn(wide.shape, generator=generator)
    components = principal_components(wide).flatten(0, 1)
    torch.testing.assert_close(components.T @ components / 32, torch.eye(3), atol=1e-4, rtol=0)
    # They span what the three hidden directions span
    centered = hidden.flatten(0, 1) - hidden.flatten(0, 1).mean(dim=0)
    left = torch.linalg.lstsq(components, centered).solution
    torch.testing.assert_close(components @ left, centered, atol=0.05, rtol=0)
    # Another encoder that knows the same, in another basis, gets the same colors
    reference = principal_components(wide)
    other = wide @ torch.linalg.qr(torch.randn(20, 20, generator=generator))[0]
    torch.testing.assert_close(principal_components(other, reference), reference, atol=1e-3, rtol=0)
    assert component_picture(reference, (8, 8)).shape == (2, 8, 8, 3)
    assert torch.isfinite(principal_components(torch.ones(1, 4, 2))).all()


@pytest.mark.parametrize("shape", [(2, 1024, 300), (1, 400, 700), (1, 16, 40), (4, 16, 3)])
def test_components_of_any_size_are_those_of_the_decomposition(shape):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(shape, generator=generator) / torch.arange(1, shape[-1] + 1) ** 0.5 + 3
    state = torch.get_rng_state()
    components = principal_components(tokens).flatten(0, 1)
    assert torch.equal(torch.get_rng_state(), state), "a training run's random numbers stay"
    flat = tokens.flatten(0, 1).double()
    left = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)[0][:, :3].float() * len(flat) ** 0.5
    agreement = (components.T @ left / len(flat)).abs()
    torch.testing.assert_close(agreement, torch.eye(3), atol=0.02, rtol=0)
    assert torch.equal(principal_components(tokens).flatten(0, 1), components)


@pytest.mark.parametrize("width", [8, 600])
def test_features_with_fewer_than_three_directions(width):
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(width, 2, generator=generator))[0].T
    for rank in range(3):
        tokens = torch.randn(1, 900, rank, generator=generator) @ directions[:rank] + 1
        components = principal_components(tokens)[0]
        assert torch.isfinite(components).all()
        found = (components.norm(dim=0) > 1).sum()
        assert found == rank, (rank, components.norm(dim=0))


def test_distance_is_of_relations_and_not_of_coordinates():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 16, 12, generator=generator)
    turned = 3 * tokens @ torch.linalg.qr(torch.randn(12, 12, generator=generator))[0] + 5
    assert relational_distance(tokens, turned).max() < 1e-5
    others = torch.randn(2, 16, 30, generator=generator)
    assert relational_distance(tokens, others).mean() > 0.7
    moved = tokens.clone()
    moved[:, 5] = torch.randn(2, 12, generator=generator)
    assert (relational_distance(tokens, moved).argmax(dim=1) == 5).all()
    # Of a finer grid the same content is at the same place
    fine = to_grid(tokens).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1, 2)
    assert relational_distance(tokens, fine).mean() < 0.2 < relational_distance(tokens, fine.flip(1)).mean()


def test_patches_that_are_no_square():
    with pytest.raises(ValueError, match=r"17 patches are no square grid; give the patches alone, without \[CLS\]"):
        heat_map(torch.zeros(1, 17), GRAY)


def test_the_former_name_of_the_colors_still_works(make_tower, pixels):
    pictures = make_tower().visualize(pixels)
    with pytest.warns(FutureWarning, match="`expert_colours` is now `expert_colors`"):
        assert torch.equal(pictures.expert_colours, pictures.expert_colors)
