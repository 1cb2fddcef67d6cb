"""Layers that fade with time and the dense plane sweep above the highest beam: off they change no bit; a scene that
fades keeps it on disk and in its files; masks, standing cars and several cameras are handled; bad values end in one
sentence."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flux4d.background import BackgroundConfig, init_data
from flux4d.clip_data import clip_data
from flux4d.city.logs import fixture_city
from flux4d.config import Config, config_from_dict
from flux4d.export import splats_of
from flux4d.files import DataError
from flux4d.frames import ClipTime, se3
from flux4d.gaussians import BACKGROUND, gaussians_from
from flux4d.pandaset import PandaSet
from flux4d.plane_sweep import agreed_depths, cell_grid
from flux4d.render import RenderConfig, opacities_at, render
from flux4d.scene import CameraPath, Scene
from flux4d.scene_file import load_scene

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def scene():
    "Two hundred Gaussians recorded at six moments, before one camera."
    rng = torch.Generator().manual_seed(0)
    means = torch.rand(200, 3, generator=rng) * torch.tensor([20.0, 10, 4]) + torch.tensor([5.0, -5, 0])
    t = torch.arange(200) % 6 / 5
    g = gaussians_from(means, torch.full((200,), 0.5), torch.rand(200, 3, generator=rng), t, 0)
    forward = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    poses = np.stack([se3(forward, np.array([0.0, 0, 1.5]))] * 4)
    K = np.array([[60.0, 0, 40], [0, 60, 30], [0, 0, 1]])
    front = CameraPath(K, poses, np.linspace(0, 1, 4), 60, 80)
    cfg = RenderConfig(fade=0.1)
    return Scene(g, None, ClipTime(10.0, 11.0), np.eye(4), dict(front=front), render_cfg=cfg)


def test_without_fade_the_opacities_are_the_same_object(scene):
    g = scene.gaussians
    opacity = g.opacities
    assert opacities_at(g, opacity, torch.tensor([0.5]), 1.0, RenderConfig()) is opacity
    assert replace(scene, render_cfg=RenderConfig()).of_moment(0.3).gaussians is g


@pytest.mark.parametrize("backend", ["torch", "compiled"])
def test_views_of_one_batch_are_drawn_as_alone(scene, backend):
    views = [scene.camera("front", s) for s in (0.0, 0.5, 1.0)]
    both = replace(views[0], **{n: torch.cat([getattr(v, n) for v in views]) for n in ("K", "world_to_cam", "t")})
    cfg = replace(scene.render_cfg, backend=backend)
    together = scene.render(both, cfg).rgb
    for k, view in enumerate(views):
        assert torch.equal(scene.render(view, cfg).rgb[0], together[k])
    assert (together[0] - together[2]).abs().mean() > 0.01


def test_a_scene_file_keeps_it(scene, tmp_path):
    scene.save(tmp_path / "a.scene")
    again = load_scene(tmp_path / "a.scene")
    assert again.render_cfg.fade == 0.1
    view = scene.camera("front", 0.4)
    assert torch.equal(again.render(again.camera("front", 0.4)).rgb, scene.render(view).rgb)


@pytest.mark.parametrize("seconds", [0.0, 0.55, 1.0])
def test_an_exported_moment_looks_like_it(scene, seconds):
    stored = splats_of(scene, seconds).opacity
    view = scene.camera("front", seconds)
    fixed = replace(scene, gaussians=replace(scene.gaussians, opacity_logits=stored), render_cfg=RenderConfig())
    assert (fixed.render(view).rgb - scene.render(view).rgb).abs().max() < 2e-3
    other = scene.render(scene.camera("front", 1 - seconds)).rgb
    assert (fixed.render(view).rgb - other).abs().mean() > 1e-3 or seconds == 0.55


def test_gradients_reach_opacities_and_stay_finite(scene):
    g = scene.gaussians
    raw = g.flat().requires_grad_()
    raw.data[:20, 10] = 40.0  # opaque to the last bit
    view = scene.camera("front", 0.5)
    render(g.with_flat(raw), None, 1.0, view, replace(scene.render_cfg, backend="torch")).rgb.sum().backward()
    assert raw.grad.isfinite().all() and (raw.grad[:, 10] != 0).any()


@pytest.mark.parametrize("bad", [0, -0.1, "soon", float("nan")])
def test_a_bad_time_ends_in_one_sentence(bad):
    with pytest.raises(DataError, match="render.fade") as e:
        config_from_dict(dict(render=dict(fade=bad)), Config)
    assert "\n" not in str(e.value)


# the sweep


@pytest.fixture(scope="module")
def data():
    "The fixture city, its highest beam lowered so that there is something above."
    found = clip_data(PandaSet(fixture_city())["001"].clip(0))
    low = found.points.clone()
    low[low[..., 2] > low[..., 2].nanquantile(0.6)] = torch.nan
    return replace(found, points=low)


def test_the_sweep_moves_only_what_lies_above_the_field(data):
    plain, swept = (init_data(data, bg_cfg=BackgroundConfig(above_sweep=on)) for on in (False, True))
    assert len(plain) == len(swept)
    moved = (plain.means != swept.means).any(1)
    assert moved.any() and (swept.kind[moved] == BACKGROUND).all()
    assert torch.equal(plain.colour_logits, swept.colour_logits)


def test_hidden_cells_have_no_say(data):
    V, C, h, w = data.images.shape[:4]
    valid = torch.ones(C, h, w, dtype=torch.bool)
    valid[:, :, : w // 2] = False
    results = []
    for seed in (1, 2):
        images = data.images.clone()
        noise = torch.randint(0, 255, images[:, :, :, : w // 2].shape, generator=torch.Generator().manual_seed(seed))
        images[:, :, :, : w // 2] = noise.to(images)
        results.append(init_data(replace(data, images=images, valid=valid)))
    assert len(results[0]) == len(results[1])
    assert torch.equal(results[0].means, results[1].means)


def test_unknown_depths_agree_with_nothing(data):
    grid = cell_grid(data, 4, 6, 8)
    V = len(grid.origin)
    mean, others = agreed_depths(grid, torch.full((V, 6, 8), torch.nan))
    assert (others == 0).all() and mean.isnan().all()
    mean, others = agreed_depths(grid, torch.full((V, 6, 8), 400.0))
    assert (others > 0).any() and ((mean - 400).abs() < 60).all()


@pytest.mark.parametrize("bad", ["yes please", 3, None])
def test_a_bad_switch_ends_in_one_sentence(bad):
    with pytest.raises(DataError, match="background.above_sweep"):
        config_from_dict(dict(background=dict(above_sweep=bad)), Config)
