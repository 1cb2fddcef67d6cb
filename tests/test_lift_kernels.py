"""The lift's kernels beside the tensor operations that define them, on a GPU or in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from flux4d import background, clip_data, gap_filling, lift
from flux4d.background import BackgroundConfig, FarBlocks, far_gaussians, field_top, init_data
from flux4d.clip_data import project_returns, toy_data
from flux4d.frames import transform_points
from flux4d.gap_filling import InitConfig, clip_blocks, cut_blocks, even_opacity, fill_gaps
from flux4d.gaussians import gaussians_from
from flux4d.kernels import kernels_work
from flux4d.return_kernels import triton

ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
with_kernels = pytest.mark.skipif(
    not (triton and (INTERPRETED or torch.cuda.is_available())), reason="neither a GPU nor an interpreter"
)


def both(monkeypatch, f):
    "What a function gives by tensor operations, and by kernels."
    found = []
    for works in (False, True):
        for module in (clip_data, lift, gap_filling, background):
            monkeypatch.setattr(module, "kernels_work", lambda device, works=works: works)
        found.append(f())
    return found


def street(returns=300, frames=2, cameras=1):
    "A road that ends at a wall, from a height of 1.5 m, and a board before it; a camera that moves and turns a little."
    gen = torch.Generator().manual_seed(0)
    focal, width, height = 600.0, 64, 36
    u, v = torch.rand(2, frames * returns, generator=gen, dtype=torch.float64)
    u, v = u * (width - 8) - 4, 6 + v * (height - 14)  # no returns to the right, above and below
    z = (1.5 * focal / (v - 8).clamp_min(1)).clamp_max(60)
    through = torch.arange(len(u)) % 7 == 0  # these lie behind the board, hidden by it
    z = torch.where((u > 20) & (u < 30) & (v < 25) & ~through, 12.0, z)
    points = torch.stack([(u - width / 2) / focal * z, (v - height / 2) / focal * z, z], 1)
    points[::37] *= -1  # some lie behind the camera
    points[::41] = torch.nan  # some are none
    pose = []
    for i in range(frames):
        T = torch.eye(4, dtype=torch.float64)
        T[:3, 3] = torch.tensor([0.02 * i, 0.0, 0.3 * i])
        pose.append(T)
    points = torch.cat([transform_points(T, x) for T, x in zip(pose, points.view(frames, -1, 3))])
    image = torch.randint(0, 256, (height, width, 3), generator=gen, dtype=torch.uint8)
    image[:, :32] = 90
    lens = ((focal, 0, width / 2), (0, focal, height / 2), (0, 0, 1))
    stamps = 0.1 * torch.arange(frames, dtype=torch.float64)[:, None]
    stamps = stamps + 0.02 * torch.rand(frames, returns, generator=gen)
    data = toy_data(points, frames, image, lens, pose, stamps)
    if cameras > 1:
        other = data.pose.clone()
        other[..., 0, 3] += 0.05
        data = replace(
            data,
            images=torch.cat([data.images, 255 - data.images], 1),
            K=data.K.repeat(1, 2, 1, 1),
            pose=torch.cat([data.pose, other], 1),
            shutter=data.shutter.repeat(1, 2),
        )
    return data.to(DEVICE)


def close(found, wanted, within):
    "Equal within a share of the largest, NaN where the other is NaN."
    found, wanted = found.cpu().double(), wanted.cpu().double()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert (found - wanted).nan_to_num(0).abs().max() <= within * max(1.0, wanted.nan_to_num(0).abs().max().item())


@with_kernels
def test_the_nearest_return_of_each_cell(monkeypatch):
    gen = torch.Generator().manual_seed(0)
    cell = torch.randint(-1, 40, (3, 200), generator=gen).to(DEVICE)
    z = (1 + torch.randint(0, 9, (3, 200), generator=gen) / 4).to(DEVICE)  # many are equal
    wanted, found = both(monkeypatch, lambda: lift.nearest_return(cell, z, 50))
    assert torch.equal(found, wanted) and (wanted[40:] == -1).all()


@with_kernels
@pytest.mark.parametrize("cameras, kept", [(1, False), (2, True)])
def test_returns_are_projected_as_by_tensor_operations(monkeypatch, cameras, kept):
    data = street(cameras=cameras)
    keep = valid = None
    if kept:
        keep = torch.rand(data.shutter.shape + data.stamps.shape[1:], generator=torch.Generator().manual_seed(1)) < 0.7
        valid = torch.ones(2, 36, 64, dtype=torch.bool)
        valid[1, 20:, :40] = False
        keep, valid = keep.to(DEVICE), valid.to(DEVICE)
    data = replace(data, valid=valid)
    wanted, found = both(monkeypatch, lambda: project_returns(data, keep))
    hidden = (wanted.uv.amin(-1) > 0) & (wanted.uv[..., 0] < 64) & (wanted.uv[..., 1] < 36) & ~wanted.visible
    assert wanted.visible.sum() > 100 and hidden.sum() > 5 and wanted.uv.isnan().any()
    assert torch.equal(found.visible, wanted.visible)
    close(found.uv, wanted.uv, 1e-6)
    close(found.z, wanted.z, 1e-6)
    close(found.colour[wanted.visible], wanted.colour[wanted.visible], 1e-6)


@with_kernels
@pytest.mark.parametrize("clip, k", [(False, 3), (True, 2)])
def test_neighbours_are_those_of_tensor_operations(monkeypatch, clip, k):
    monkeypatch.setattr(lift, "WINDOWS", ((0.15, 2), (0.15, 6), (0.6, 9)))
    data = street(returns=60)
    f, n = data.points.isfinite().all(-1).nonzero(as_tuple=True)
    f, n = f[::7], n[::7]
    wanted, found = both(monkeypatch, lambda: lift.knn_distance(data, f, n, k, clip))
    assert (wanted < 1).any() and (wanted == wanted.max()).sum() < len(wanted)
    close(found, wanted, 1e-5)


@with_kernels
@pytest.mark.parametrize("size", [(36, 64), (29, 50)])
def test_images_are_cut_as_by_tensor_operations(monkeypatch, size):
    image = street().images[:, 0, : size[0], : size[1]].clone()
    image[1] //= 4
    image[:, 8:12, 40:44] = 50  # one side's square is even, and the larger one around it is not
    wanted, found = both(monkeypatch, lambda: cut_blocks(image, [8, 4, 2], 0.09))
    sides = wanted.side[wanted.kept.any(0)]
    assert len(sides.unique()) == 3
    assert torch.equal(found.kept, wanted.kept)
    for one, other in zip(found[:3], wanted[:3]):
        close(one, other, 1e-6)


@with_kernels
@pytest.mark.parametrize("cameras, ground", [(1, True), (2, False)])
def test_blocks_have_the_depth_of_tensor_operations(monkeypatch, cameras, ground):
    data = street(returns=500, cameras=cameras)
    cfg = InitConfig(fill_blocks=(120, 60), fill_ground=ground)
    seen = data.projected

    def blocks():
        fresh = replace(data)
        fresh.projected = seen
        return clip_blocks(fresh, cfg)

    wanted, found = both(monkeypatch, blocks)
    assert 50 < (wanted.z > 0).sum() < len(wanted.z) - 50
    assert torch.equal(found.z > 0, wanted.z > 0)
    for one, other in zip(found, wanted):
        close(one, other, 1e-5)


@with_kernels
def test_a_clip_without_returns_in_time_has_no_depth(monkeypatch):
    data = street(returns=40)
    data = replace(data, stamps=data.stamps + 1)
    wanted, found = both(monkeypatch, lambda: clip_blocks(replace(data), InitConfig(fill_blocks=(120, 60))))
    assert not wanted.z.any() and not found.z.any()


@with_kernels
@pytest.mark.parametrize("cameras, cfg", [
    (1, InitConfig(fill_blocks=(120, 60))),
    (2, InitConfig(fill_blocks=(120, 60), time_source="sweep", rotation="identity", opacity=0.3)),
])
def test_gaussians_are_those_of_tensor_operations(monkeypatch, cameras, cfg):
    monkeypatch.setattr(lift, "WINDOWS", ((0.6, 3),))
    data = street(returns=60, cameras=cameras)
    data.projected  # by tensor operations
    blocks = clip_blocks(data, cfg)
    far = FarBlocks(blocks._replace(z=20 + blocks.side), blocks.side > 3)

    def sets():
        rng = torch.Generator(DEVICE).manual_seed(0)
        returns = lift.lift_returns(data, cfg, rng, largest_px=0.7)
        return returns, fill_gaps(data, blocks, cfg, rng), far_gaussians(data, far, cfg, BackgroundConfig())

    for wanted, found in zip(*both(monkeypatch, sets)):
        assert len(wanted) > 20 and len(found) == len(wanted)
        for name in wanted.__dataclass_fields__:
            one, other = getattr(found, name), getattr(wanted, name)
            assert one.dtype == other.dtype and one.shape == other.shape
            close(one, other, 1e-5)


@with_kernels
@pytest.mark.parametrize("each", [False, True])
def test_opacities_are_evened_as_by_tensor_operations(monkeypatch, each):
    data = street(frames=3)
    x = data.points.nan_to_num(1).flatten(0, 1)[::5].float()
    ones = torch.ones(len(x), device=DEVICE)
    g = gaussians_from(x, 0.1 * ones, ones[:, None].expand(-1, 3), 0 * ones, 0)
    opacity = 0.2 + 0.5 * torch.rand(len(x), generator=torch.Generator().manual_seed(0)).to(DEVICE) if each else 0.5
    wanted, found = both(monkeypatch, lambda: even_opacity(g, data, opacity).opacity_logits)
    assert len(wanted.unique()) > 2
    close(found, wanted, 1e-5)


def test_the_top_of_the_field_is_that_of_sorting():
    data = street(returns=3000)
    x = transform_points(data.world_to_cam[:, 0], data.points)
    e = torch.rad2deg(torch.atan2(-x[..., 1], torch.hypot(x[..., 0], x[..., 2])))
    e = e[x.norm(dim=-1) > 10].sort().values
    for share in (0.5, 0.99, 0.999, 1.0):
        wanted = e[-int(-(share * len(e)) // 1) - 1]
        assert field_top(data, share)[0] == wanted
    assert field_top(data, nearest=1e9).isinf().all()


class Operations(TorchDispatchMode):
    "The names of operations, views and new tensors left out."

    HOST = """view _unsafe_view reshape slice select expand permute transpose unsqueeze squeeze unbind split
        split_with_sizes detach alias lift_fresh empty new_empty empty_strided""".split()

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.HOST:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_stamps_are_asked_about_once():
    data = street()
    assert data.projected.visible.any()
    with Operations() as done:
        assert lift.sound_stamps(data, 0.03) is data
    assert len([name for name in done.names if name in ("_local_scalar_dense", "nonzero")]) <= 2  # of one tensor


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here")
def test_a_lift_on_a_gpu_is_that_of_tensor_operations_in_few_operations(monkeypatch):
    data = street(returns=4000, frames=3)
    cfg = InitConfig(fill_blocks=(120, 60), rotation="identity")
    wanted, found = both(monkeypatch, lambda: init_data(replace(data), cfg))
    assert len(found) == len(wanted)
    for name in ("means", "log_scales", "opacity_logits", "colour_logits", "t"):
        far = (getattr(found, name) - getattr(wanted, name)).abs() > 1e-3 * (1 + getattr(wanted, name).abs())
        assert far.float().mean() < 0.01  # where rounding decides
    monkeypatch.undo()

    def operations(sweep):
        with Operations() as done:
            init_data(replace(data), cfg, BackgroundConfig(above_sweep=sweep))
        return len(done.names)

    assert BackgroundConfig().above_sweep
    assert operations(False) < 300
    assert operations(True) - operations(False) < 450  # it takes each of the three images by itself


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_the_processor_takes_tensor_operations():
    assert not kernels_work(torch.device("cpu"))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_kernels_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    env = os.environ | dict(TRITON_INTERPRET="1")
    # a loop over a number of the launch: Triton 3.6's interpreter fails at it with NumPy from 2.5 on
    probe = "import torch; from flux4d.gap_kernels import column_returns as f; f(torch.zeros(1, 3, 4).long())"
    tried = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, env=env, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"Triton's interpreter fails here: {tried.stderr.strip().splitlines()[-1]}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout[-2000:]
