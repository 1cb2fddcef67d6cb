"The kernels of the motion prior and the grid index give what their tensor operations do."

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_fast import LOOP
from torch.utils._python_dispatch import TorchDispatchMode

from flux4d import grid_kernels, motion_inputs, motion_prior, predictor, unet
from flux4d.clip_data import Returns
from flux4d.frames import se3_inverse, transform_points
from flux4d.grid_kernels import cell_tables, fused_local_velocity, fused_neighbours, fused_place
from flux4d.ground_kernels import fused_heights
from flux4d.matching import Consensus, Displacement, best_displacement, consensus, match_scores
from flux4d.matching_kernels import fused_matches
from flux4d.motion_inputs import local_velocity, street_gaussians
from flux4d.motion_prior import block_prior, estimate_block_motion, fit_trajectories, mean_gap, query_motion
from flux4d.occupancy import MotionPriorConfig, SweepPoints, bev_grid, height_above_ground, occupancy_maps
from flux4d.outlines import sees_a_part
from flux4d.predictor import PredictorConfig, make_grid_index
from flux4d.trajectories import density_map, merge_trajectories
from flux4d.trajectory_kernels import fused_density, fused_merge, fused_query, fused_trajectories
from flux4d.unet import grid_position, neighbours, voxelise
from flux4d.voxels import VoxelConfig

ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
with_kernels = pytest.mark.skipif(
    not (grid_kernels.triton and (INTERPRETED or ON_GPU)), reason="neither a GPU nor an interpreter"
)
on_gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU here")
DEVICE = "cuda" if ON_GPU else "cpu"
GRID = VoxelConfig(low=(-1.0, -1.5, -3.0), high=(4.2, 1.7, 5.0))  # its last blocks are larger than the others
COARSE = MotionPriorConfig(reach=3, neighbour_sweeps=2, margin=0.1, min_cells=1, confirmed_margin=0.05, min_inliers=2)
FINE = replace(COARSE, reach=2, block=3, observed_radius=0.3, consensus_rounds=1, refine_steps=0)


def scene(sweeps=4):
    "Two thirds of a few returns drive, in sweeps 0.2 s apart; some lie outside the grid."
    gen = torch.Generator().manual_seed(1)
    start = torch.rand(12, 3, generator=gen) * torch.tensor([3.6, 2.2, 1.2]) + torch.tensor([-0.8, -1.0, 0.0])
    start[:6, 2] += 0.5
    step = torch.tensor([0.5, 0.1, 0]) * (torch.arange(12) < 8)[:, None]
    points = torch.cat([start + k * step for k in range(sweeps)])
    sweep = torch.arange(sweeps).repeat_interleave(12)
    return SweepPoints(points, 0.2 * sweep, sweep)


def there(x):
    "Tensors, also within tuples, on the device of the kernels."
    if isinstance(x, torch.Tensor):
        return x.to(DEVICE)
    if isinstance(x, tuple):
        return type(x)(*map(there, x)) if hasattr(x, "_fields") else tuple(map(there, x))
    return x


def far(a, b):
    "The largest difference of two tensors."
    assert a.shape == b.shape and a.dtype == b.dtype
    if not a.numel():
        return 0
    return (a.cpu().double() - b.cpu().double()).abs().max().item()


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_these_kernels_in_the_interpreter(tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    env = os.environ | dict(TRITON_INTERPRET="1")
    probe = tmp_path / "probe.py"
    probe.write_text(LOOP)
    tried = subprocess.run([sys.executable, probe], env=env, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"Triton's interpreter fails here: {tried.stderr.strip().splitlines()[-1]}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout[-2000:]


@with_kernels
@pytest.mark.parametrize("cfg, sweeps", [(COARSE, 4), (FINE, 3)])
def test_blocks_match_as_by_tensor_operations(cfg, sweeps):
    returns = scene(sweeps)
    height = returns.points[:, 2].contiguous()
    bev = bev_grid(GRID, cfg)
    maps = occupancy_maps(returns.points, height, returns.frame, sweeps, bev, cfg.height, cfg.observed_radius)
    scores = match_scores(maps, bev, cfg.reach, cfg.neighbour_sweeps)
    found = best_displacement(scores.score, scores.zero_motion, cfg.cell, cfg.zero_motion_penalty)
    agreed = consensus(found, scores, torch.tensor(0.2), cfg.consensus_rule)
    fused = fused_matches(there(returns), there(height), sweeps, 0.2, bev, cfg)
    assert far(fused.blocks.number, scores.blocks.number) == far(fused.blocks.place, scores.blocks.place) == 0
    assert fused.blocks.place.is_contiguous() and fused.blocks.edge == scores.blocks.edge
    assert far(fused.found.score, found.score) == far(fused.found.zero_motion, found.zero_motion) == 0
    assert far(fused.found.xy, found.xy) < 1e-6 and far(fused.agreed.xy, agreed.xy) < 1e-6
    assert 0 < agreed.trusted.sum() < len(agreed.trusted)
    assert far(fused.agreed.trusted, agreed.trusted) == 0
    assert fused.movable.sum() > maps.occupied.sum() > 0
    at = tuple(maps.occupied.nonzero().T)
    assert fused.movable.cpu()[at].all()


@with_kernels
def test_nothing_at_matched_heights_gives_no_blocks():
    returns = scene(2)
    bev = bev_grid(GRID, COARSE)
    fused = fused_matches(there(returns), there(torch.full((24,), 9.0)), 2, 0.2, bev, COARSE)
    assert len(fused.found.score) == len(fused.agreed.trusted) == len(fused.blocks.place) == 0
    assert not fused.movable.any() and (fused.blocks.number == 0).all()


@with_kernels
def test_density_is_that_of_tensor_operations():
    returns = scene()
    wanted = density_map(returns, 4, GRID, COARSE.fine_cell, COARSE.blur_std)
    found = fused_density(there(returns), 4, GRID, COARSE)
    assert far(found.values, wanted.values) < 1e-5 and wanted.values.abs().max() > 0.1
    assert found[1:] == wanted[1:]


@with_kernels
def test_trajectories_are_fitted_as_by_tensor_operations():
    returns = scene()
    motion = estimate_block_motion(returns, returns.points[:, 2].contiguous(), GRID, replace(COARSE, refine_steps=0))
    gen = torch.Generator().manual_seed(8)
    velocity = motion.prior.velocity[:-1, :2] + 0.3 * torch.randn(len(motion.prior.score) - 1, 2, generator=gen)
    trusted = torch.rand(len(velocity), generator=gen) < 0.5
    times = torch.tensor([0.0, 0.21, 0.4, 0.6])
    cfg = replace(COARSE, refine_steps=3, fine_cell=0.25)
    agreed = Consensus(velocity * mean_gap(times), trusted)
    wanted = fit_trajectories(returns, agreed, motion.blocks, times, GRID, cfg)
    found = fused_trajectories(*map(there, (velocity, trusted, returns, motion.blocks, times)), GRID, cfg)
    assert far(found, wanted) < 1e-3 and wanted[:, 1].abs().max() > 0.05
    still = fused_trajectories(*map(there, (velocity, trusted & False, returns, motion.blocks, times)), GRID, cfg)
    assert far(still[:, 0], velocity) < 1e-4  # without a trusted block nothing is moved


def some_motion():
    "Blocks of the scene, with trajectories that differ."
    returns = scene()
    motion = estimate_block_motion(returns, returns.points[:, 2].contiguous(), GRID, COARSE)
    gen = torch.Generator().manual_seed(2)
    trajectory = torch.stack([motion.prior.velocity, motion.prior.acceleration], 1)[:-1, :, :2]
    trajectory = trajectory + 0.3 * torch.randn(trajectory.shape, generator=gen)
    return motion, trajectory, torch.rand(len(trajectory), generator=gen) < 0.7


@with_kernels
def test_trajectories_merge_as_by_tensor_operations():
    motion, trajectory, trusted = some_motion()
    times = torch.tensor([0.0, 0.21, 0.4, 0.6])
    wanted = trajectory
    for _ in range(COARSE.merge_rounds):
        wanted = merge_trajectories(wanted, trusted, motion.blocks, times, COARSE.inlier_speed)
    found = fused_merge(*map(there, (trajectory, trusted, motion.blocks, times)), COARSE)
    assert far(found, wanted) < 1e-5 and (wanted - trajectory).abs().max() > 0.1


@with_kernels
def test_points_are_told_the_motion_of_their_blocks():
    motion, trajectory, trusted = some_motion()
    found = Displacement(trajectory[:, 0], motion.prior.score[:-1], motion.prior.zero_motion_score[:-1])
    gen = torch.Generator().manual_seed(3)
    points = motion.bev.cell * 8 * torch.randn(60, 3, generator=gen) + torch.tensor([1.5, 0, 1])
    frame = torch.randint(-1, 6, (60,), generator=gen)  # some before the first sweep, some after the last one
    query = SweepPoints(points, 0.2 * frame, frame)
    motion = motion._replace(prior=block_prior(trajectory, found, trusted))
    wanted = query_motion(motion, query, points[:, 2], (0.1, 4.0))
    moved = there(motion)
    places = moved.blocks, moved.movable, moved.bev, moved.frames
    found = fused_query(moved.prior, *places, there(query), there(points[:, 2]), (0.1, 4.0))
    assert [far(a, b) for a, b in zip(found, wanted)] == [0] * 6
    assert wanted.may_move.any() and wanted.trusted.any() and not wanted.may_move.all()


@with_kernels
@pytest.mark.parametrize("cell, share", [(2.0, 0.2), (1.7, 0.35)])
def test_heights_are_those_of_tensor_operations(cell, share):
    gen = torch.Generator().manual_seed(4)
    points = torch.randn(500, 3, generator=gen) * torch.tensor([9.0, 7, 2])
    query = torch.randn(300, 3, generator=gen) * torch.tensor([19.0, 17, 2])
    wanted = height_above_ground(points, cell, share, query=torch.cat([points, query]))
    found = torch.cat(fused_heights(there(points), there(query), cell, share))
    assert far(found, wanted) == 0 and (wanted == 0).any() and (wanted > 1).any()


@with_kernels
def test_points_are_placed_as_by_tensor_operations():
    gen = torch.Generator().manual_seed(5)
    points = torch.rand(400, 3, generator=gen, dtype=torch.float64)
    points = points * torch.tensor([170.0, 110, 22]) + torch.tensor([-15.0, -55, -7])
    angle = torch.tensor(0.3, dtype=torch.float64)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:2, :2] = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    pose[:3, 3] = torch.tensor([4e5, 5.5e6, 300.0])
    world = transform_points(pose, points)
    wanted = transform_points(se3_inverse(pose), world)
    found, inside = fused_place(there(world), there(pose), VoxelConfig())
    assert far(found, wanted) < 1e-7
    assert far(inside, grid_position(wanted, VoxelConfig())[1]) == 0 and 0 < inside.sum() < 400


@with_kernels
def test_neighbours_are_those_of_tensor_operations():
    gen = torch.Generator().manual_seed(6)
    points = torch.rand(90, 3, generator=gen) * torch.tensor([3.0, 3, 1]) + torch.tensor([-10.0, -50, -6])
    for some in (points[:60], points[:1]):
        keys = voxelise(some, some[:, :0], VoxelConfig()).keys
        row, weight = fused_neighbours(there(keys), there(points), VoxelConfig())
        wanted = neighbours(keys, points, VoxelConfig())
        assert far(row, wanted[0]) == 0 and far(weight, wanted[1]) < 1e-6
    assert (wanted[1] > 0).any()


@with_kernels
def test_local_velocity_is_that_of_tensor_operations():
    gen = torch.Generator().manual_seed(7)
    points = torch.rand(200, 3, generator=gen) * torch.tensor([12.0, 9, 2]) + torch.tensor([100.0, -49, -6])
    seconds = torch.rand(200, generator=gen)
    edges = 2.0, 4.0, 7.0
    found = fused_local_velocity(there(points), there(seconds), VoxelConfig(), edges, 0.8)
    for edge, of_size in zip(edges, found.unbind(1)):
        wanted = local_velocity(points, seconds, edge, 0.8)
        assert far(of_size[:, :3], wanted.velocity) < 2e-4 and far(of_size[:, 3], wanted.spread) < 1e-5
        assert wanted.velocity.abs().max() > 0.5
    outside = fused_local_velocity(there(points + 1e4), there(seconds), VoxelConfig(), edges, 0.8)
    assert not outside.any()
    assert cell_tables(VoxelConfig(), edges, 0.8, torch.device(DEVICE)).rows < 300_000


class Count(TorchDispatchMode):
    "How many operations are called."

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


@on_gpu
def test_a_grid_index_by_kernels_is_one_by_tensor_operations(monkeypatch):
    g, _, _ = street_gaussians(velocity=torch.tensor([6.0, 1.5, 0]), n_ground=9000, n_box=2500)
    g = replace(g, means=g.means - torch.tensor([8.0, 0, 0])).to("cuda")  # the vehicle stands in the street
    returns = Returns(g.means.double(), g.t.clone(), g.frame)
    assert not sees_a_part(g.means[g.frame == 0])  # as kernels need it
    given = g, torch.eye(4, dtype=torch.float64), 1.0, VoxelConfig(), PredictorConfig().motion_inputs, returns
    make_grid_index(*given)
    with Count() as count:
        fused = make_grid_index(*given)
    for module in (motion_inputs, motion_prior, predictor, unet):
        monkeypatch.setattr(module, "kernels_work", lambda device: False)
    with Count() as before:
        plain = make_grid_index(*given)
    assert count.n < 0.5 * before.n
    for name in ("inside", "background", "seconds", "corners"):
        assert far(getattr(fused, name), getattr(plain, name)) == 0
    assert far(fused.voxels.keys, plain.voxels.keys) == 0 and far(fused.weights, plain.weights) < 1e-5
    assert far(fused.prior.may_move, plain.prior.may_move) == 0
    same = fused.prior.trusted == plain.prior.trusted
    assert same.float().mean() > 0.999 and plain.prior.trusted.float().mean() > 0.1
    apart = (fused.prior.velocity - plain.prior.velocity).norm(dim=1)[same]
    assert apart.quantile(0.99) < 1e-2 and (fused.motion - plain.motion).abs().median() < 1e-5
