"""The lift's compiled loops beside the tensor operations that define them."""

from dataclasses import replace
import pytest
import torch
from test_lift_kernels import DEVICE, street
from flux4d import background, gap_filling, lift
from flux4d.background import BackgroundConfig, init_data, photometric_cost, shrunk_images
from flux4d.compiled_code import have_numba, runs_compiled
from flux4d.compiled_search import EXACT_SIDE
from flux4d.gap_filling import InitConfig, block_moments, clip_blocks, cut_blocks, even_opacity
from flux4d.gaussians import gaussians_from

pytestmark = pytest.mark.skipif(not have_numba() or DEVICE != "cpu", reason="numba is not installed, or kernels run")


def both(monkeypatch, f):
    "What a function gives by tensor operations, and by compiled loops at one thread and at three."
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    monkeypatch.setattr("flux4d.compiled_code.worker_threads", lambda: 1)
    with monkeypatch.context() as m:
        for module in (lift, gap_filling, background):
            m.setattr(module, "runs_compiled", lambda *x: False)
        wanted = f()
    found = f()
    monkeypatch.setattr("flux4d.compiled_code.worker_threads", lambda: 3)
    return wanted, found, f()


def same(results):
    "Equal to the bit, NaN where the other is NaN."
    wanted, *found = ([x] if torch.is_tensor(x) else list(x) for x in results)
    for other in found:
        for a, b in zip(wanted, other):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_neighbours_are_as_far_away_as_by_tensor_operations(monkeypatch, clip, k):
    monkeypatch.setattr(lift, "WINDOWS", ((0.15, 3), (0.15, 9), (0.6, 6)))
    data = street(returns=900)
    f, n = data.points.isfinite().all(-1).nonzero(as_tuple=True)
    results = both(monkeypatch, lambda: lift.window_neighbours(data, f, n, k, clip))
    assert results[0].isfinite().sum() > 100
    same(results)


def test_neighbours_are_found_across_the_seam(monkeypatch):
    data = street(returns=900)
    turned = data.points[..., [2, 0, 1]] * torch.tensor([-1.0, 1, 1])  # the camera's axis becomes the azimuth's seam
    data = replace(data, points=turned)
    f, n = data.points.isfinite().all(-1).nonzero(as_tuple=True)
    azimuth = lift.directions(lift.from_cameras(data))[1]
    assert (azimuth < 1).any() and (azimuth > 359).any()
    same(both(monkeypatch, lambda: lift.window_neighbours(data, f, n, 3, False)))


def test_the_nearest_return_of_each_cell(monkeypatch):
    gen = torch.Generator().manual_seed(0)
    cell = torch.randint(-1, 40, (3, 200), generator=gen)
    z = 1 + torch.randint(0, 9, (3, 200), generator=gen) / 4  # many are equal
    results = both(monkeypatch, lambda: lift.nearest_return(cell, z, 50))
    assert (results[0][40:] == -1).all()
    same(results)


@pytest.mark.parametrize("sides", [[4, 2], [16, 8, 4], [EXACT_SIDE], [2 * EXACT_SIDE]])
def test_blocks_have_the_moments_of_tensor_operations(monkeypatch, sides):
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 37, 70, 3), generator=gen, dtype=torch.uint8)
    same(both(monkeypatch, lambda: [x for pair in block_moments(images, sides) for x in pair]))
    same(both(monkeypatch, lambda: cut_blocks(images.div(40, rounding_mode="floor"), sides, 0.004)))


@pytest.mark.parametrize("cameras", [1, 2])
def test_blocks_have_the_depth_of_tensor_operations(monkeypatch, cameras):
    data = street(returns=500, cameras=cameras)
    results = both(monkeypatch, lambda: clip_blocks(data, InitConfig(fill_blocks=(120, 60))))
    assert 50 < (results[0].z > 0).sum() < len(results[0].z) - 50
    same(results)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_depths_cost_what_they_do_by_tensor_operations(monkeypatch, masked, each):
    data = street(returns=500, frames=5)
    gen = torch.Generator().manual_seed(0)
    b = clip_blocks(data, InitConfig(fill_blocks=(120, 60)))
    small = both(monkeypatch, lambda: shrunk_images(data, 2))
    same(small)
    shown = torch.rand(small[0].shape[:3], generator=gen) < 0.8 if masked else None
    depth = 5 + 50 * torch.rand(len(b.z), 1, generator=gen).double() if each else 20.0
    wanted, *found = both(monkeypatch, lambda: photometric_cost(data, small[0], 2, b, depth, shown))
    assert (wanted > 0.01).any()
    for cost in found:
        assert (cost - wanted).abs().max() < 1e-6 and torch.equal(cost, found[0])


@pytest.mark.parametrize("each", [False, True])
def test_opacities_are_evened_as_by_tensor_operations(monkeypatch, each):
    data = street(frames=3)
    x = data.points.nan_to_num(1).flatten(0, 1)[::5].float()
    ones = torch.ones(len(x))
    g = gaussians_from(x, 0.1 * ones, ones[:, None].expand(-1, 3), 0 * ones, 0)
    opacity = 0.2 + 0.5 * torch.rand(len(x), generator=torch.Generator().manual_seed(0)) if each else 0.5
    results = both(monkeypatch, lambda: even_opacity(g, data, opacity).opacity_logits)
    assert len(results[0].unique()) > 2
    same(results)


@pytest.mark.parametrize("cameras, cfg", [
    (1, InitConfig(fill_blocks=(120, 60), voxel_downsample=0.2)),
    (2, InitConfig(fill_blocks=(120, 60), neighbours="clip")),
])
def test_a_lift_is_that_of_tensor_operations(monkeypatch, cameras, cfg):
    data = street(returns=900, frames=3, cameras=cameras)
    wanted, found, threaded = both(monkeypatch, lambda: init_data(replace(data), cfg, BackgroundConfig()))
    for name in wanted.__dataclass_fields__:
        one, other = getattr(found, name), getattr(wanted, name)
        assert torch.equal(one, getattr(threaded, name))
        assert one.shape == other.shape
        off = (one - other).abs() > 1e-6 * (1 + other.abs())
        assert off.float().mean() < 1e-3  # where the last digit of a cost decides


def test_other_tensors_are_left_to_tensor_operations():
    x = torch.zeros(2)
    assert runs_compiled(x) and not runs_compiled(x.double()) and not runs_compiled(x.requires_grad_())
    assert not runs_compiled(torch.zeros(2, device="meta"))
