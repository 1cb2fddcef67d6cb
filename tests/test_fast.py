"""Fast paths beside the plain ones that define them. What needs a GPU is skipped without one; Triton kernels are also
tried on the processor, by Triton's interpreter, where Triton is installed."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from flux4d import attribute_kernels, block_kernels, kernels, level_tables, losses_fused, splat_kernels
from flux4d import render as render_module, tile_kernels, unet
from flux4d.background import photometric_cost
from flux4d.attribute_kernels import fused_feedback, fused_mix, fused_point, fused_residual, fused_sum
from flux4d.decode import AttributeBounds, decode_residual
from flux4d.frames import quat_to_mat, se3_inverse
from flux4d.gap_filling import Blocks
from flux4d.gaussians import BACKGROUND, LIDAR, Gaussians
from flux4d.losses import LossConfig, image_terms
from flux4d.losses_fused import can_fuse, fused_image_terms
from flux4d.kernels import kernels_work
from flux4d.tile_kernels import TILE_SIDE, Splats2D, TileLists, blend_plain, pixel_strengths, tile_gradients
from flux4d.tile_lists import list_splats
from flux4d.input_kernels import fused_channels, fused_far, fused_means, fused_rows, fused_slopes, fused_slots
from flux4d.motion_inputs import street_gaussians
from flux4d.network_inputs import PointFeatures, TimeBins, describe_points, grid_numbers, time_slots, voxel_features
from flux4d.raster import Ellipsoids
from flux4d.occupancy import MotionPriorConfig
from flux4d.predictor import BasePredictor, PredictorConfig, make_grid_index
from flux4d.refine import Feedback, RefineConfig, Refiner, far_channels, feedback_features, feedback_slopes
from flux4d.render import Cameras, RenderConfig, render
from flux4d.search_kernels import CostCameras, RefineRule, fused_costs, fused_refine
from flux4d.sparse_convolution import convolve_pairs
from flux4d.training_loss import reconstruction_loss
from flux4d.trajectories import DensityMap, MemberCells, refine_trajectories
from flux4d.unet import SparseUNet, UNetConfig, mix_voxels, voxelise
from flux4d.voxels import VoxelConfig, Voxels

ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
with_kernels = pytest.mark.skipif(
    not (losses_fused.triton and (INTERPRETED or torch.cuda.is_available())), reason="neither a GPU nor an interpreter"
)
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def pictures(shape, flat=False, device=DEVICE):
    "A render and its views, with equal rows, clamped colours, pixels without a return; a weight for each pixel."
    gen = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=gen) * 1.2 - 0.1
    y = torch.rand(shape, generator=gen)
    if flat:
        x, y = 0.5 + 1e-3 * x, 0.5 + 1e-3 * y
    x[:, :3] = y[:, :3]
    depth = 60 * torch.rand(shape[:3], generator=gen)
    off = torch.randn(shape[:3], generator=gen)
    measured = torch.where(torch.rand(shape[:3], generator=gen) < 0.3, depth + off, 0.0)
    weight = 1 + torch.rand(shape[:3], generator=gen)
    out = SimpleNamespace(rgb=x.to(device).requires_grad_(), depth=depth.to(device).requires_grad_())
    return out, SimpleNamespace(images=y.to(device), depth=measured.to(device)), weight.to(device)


def terms_and_gradients(terms_of, out, views, cfg, weight):
    "The four terms, and the gradient of a weighted sum of three by colour and depth."
    terms = terms_of(out, views, cfg, weight)
    total = 0.8 * terms.rgb - 0.2 * terms.ssim + 0.01 * terms.depth
    grads = torch.autograd.grad(total, (out.rgb, out.depth), allow_unused=True)
    return torch.stack([*terms]).detach(), [torch.zeros(1) if g is None else g for g in grads]


CONFIGS = dict(
    paper=LossConfig(),
    small=LossConfig(ssim_window=7, ssim_sigma=1.0),
    berhu=LossConfig(berhu=0.5, max_depth=40.0),
    colour=LossConfig(use_depth=False),
)


@with_kernels
@pytest.mark.parametrize(
    "shape,name,weighted",
    [
        ((2, 23, 31, 3), "paper", False),
        ((2, 23, 31, 3), "paper", True),
        ((1, 11, 12, 3), "berhu", False),
        ((1, 17, 190, 3), "small", True),
        ((1, 40, 18, 1), "colour", False),
    ],
)
def test_fused_terms_are_the_plain_ones(shape, name, weighted):
    out, views, weight = pictures(shape)
    weight = weight if weighted else None
    value, grads = terms_and_gradients(fused_image_terms, out, views, CONFIGS[name], weight)
    wanted, wanted_grads = terms_and_gradients(image_terms, out, views, CONFIGS[name], weight)
    assert (value - wanted).abs().max() < 1e-5
    for found, reference in zip(grads, wanted_grads):
        assert (found - reference).abs().max() <= 1e-5 * reference.abs().max()


@with_kernels
def test_a_flat_wall_keeps_its_variance():
    out, views, _ = pictures((1, 30, 41, 3), flat=True)
    value, grads = terms_and_gradients(fused_image_terms, out, views, LossConfig(), None)
    double = SimpleNamespace(rgb=out.rgb.detach().double().requires_grad_(), depth=out.depth)
    views64 = SimpleNamespace(images=views.images.double(), depth=views.depth)
    exact, exact_grads = terms_and_gradients(image_terms, double, views64, LossConfig(), None)
    assert (value - exact).abs().max() < 1e-5
    assert (grads[0] - exact_grads[0]).abs().max() < 2e-3 * exact_grads[0].abs().max()


@with_kernels
def test_nothing_measured_is_no_depth_term():
    out, views, _ = pictures((1, 12, 12, 3))
    views.depth = torch.zeros_like(views.depth)
    value, grads = terms_and_gradients(fused_image_terms, out, views, LossConfig(), None)
    assert value[2] == 0 and not grads[1].any()


@with_kernels
def test_terms_without_a_gradient():
    out, views, _ = pictures((1, 20, 24, 3))
    with torch.no_grad():
        found = fused_image_terms(out, views, LossConfig())
    assert not found.rgb.requires_grad
    assert torch.allclose(torch.stack([*found]), torch.stack([*image_terms(out, views, LossConfig())]), atol=1e-5)


def flat_splats(V, N, channels, height, width):
    "Splats of V pictures, some beside them and some opaque, and lists in which most tiles miss some of them."
    gen = torch.Generator().manual_seed(channels)
    size = torch.tensor([width, height])
    means = (1.2 * torch.rand(V, N, 2, generator=gen) - 0.1) * size
    axes = 2 * torch.randn(V, N, 2, 2, generator=gen)
    inverse = torch.linalg.inv(axes @ axes.mT + 0.3 * torch.eye(2))
    conics = torch.stack([inverse[..., 0, 0], inverse[..., 0, 1], inverse[..., 1, 1]], -1)
    opacities = (1.2 * torch.rand(V, N, generator=gen)).clamp(0.02, 1)
    s = Splats2D(means, conics, torch.randn(V, N, channels, generator=gen), opacities)
    rows, columns = -(-height // TILE_SIDE), -(-width // TILE_SIDE)
    offsets, ids = [], []
    for view in range(V):
        for middle in torch.cartesian_prod(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5) * TILE_SIDE:
            offsets.append(len(ids))
            near = (means[view].flip(-1) - middle).abs().amax(-1) < 16
            ids += (view * N + near.nonzero()[:, 0]).tolist()
    offsets = torch.tensor(offsets, dtype=torch.int32).view(V, rows, columns)
    return s, TileLists(offsets, torch.tensor(ids, dtype=torch.int32), height, width)


@with_kernels
@pytest.mark.parametrize("channels", [5, 8, 9])
def test_tiles_go_back_as_autograd_does(channels):
    s, lists = flat_splats(2, 60, channels, 13, 19)
    leaves = [x.double().requires_grad_() for x in s]
    image, alpha, last = blend_plain(Splats2D(*leaves), lists)
    assert (last > 0).any() and alpha.max() > 0.999
    gen = torch.Generator().manual_seed(1)
    d_image, d_alpha = (torch.randn(x.shape, generator=gen, dtype=x.dtype) for x in (image, alpha))
    wanted = torch.autograd.grad((image * d_image).sum() + (alpha * d_alpha).sum(), leaves)

    def there(x):
        return x.detach().to(DEVICE, torch.float32 if x.is_floating_point() else x.dtype).contiguous()

    lists = lists._replace(offsets=there(lists.offsets), ids=there(lists.ids))
    drawn = there(image), there(alpha), there(last)
    found = tile_gradients(Splats2D(*map(there, s)), lists, drawn, there(d_image), there(d_alpha))
    for name, a, b in zip(Splats2D._fields, found, wanted):
        assert (a.cpu() - b).abs().max() < 3e-5 * b.abs().max(), name


def tile_pixels(tile, lists):
    "View of a tile and centres of its pixels."
    _, rows, columns = lists.offsets.shape
    row, column = tile // columns % rows, tile % columns
    at = torch.stack(torch.meshgrid(torch.arange(TILE_SIDE), torch.arange(TILE_SIDE), indexing="xy"), -1).view(-1, 2)
    return tile // (rows * columns), at + torch.tensor([column, row]) * TILE_SIDE + 0.5


@with_kernels
def test_each_tile_lists_what_it_draws_nearest_first():
    s, size = flat_splats(2, 60, 5, 29, 37)[0], (29, 37)
    s.opacities[:, :5] = 0.001
    depths = (1 + 30 * torch.rand(2, 60, generator=torch.Generator().manual_seed(0))).round()  # many are equal
    radii = torch.ones(2, 60, 2, dtype=torch.int32)
    radii[1, 7] = 0
    there = Splats2D(*(x.to(DEVICE) for x in s))
    lists = TileLists(*list_splats(there, radii.to(DEVICE), depths.to(DEVICE), size, (0.1, 1e4)))
    ids, bounds = lists.ids.cpu(), [*lists.offsets.flatten().tolist(), len(lists.ids)]
    more = 0
    for tile in range(len(bounds) - 1):
        view, at = tile_pixels(tile, lists)
        of_view = torch.arange(view * 60, view * 60 + 60)
        needed = of_view[(pixel_strengths(s, of_view, at) > 0).any(1) & (radii[view, :, 0] > 0)].tolist()
        found = ids[bounds[tile] : bounds[tile + 1]].tolist()
        assert {*needed} <= {*found} <= {*of_view.tolist()}
        assert found == sorted(found, key=lambda i: (depths.flatten()[i], i))
        more += len(found) - len(needed)
    assert more <= 0.02 * len(ids)


@with_kernels
@pytest.mark.parametrize("antialiased", [False, True])
def test_the_tiles_of_a_render(monkeypatch, antialiased):
    "What is called on a GPU, with tensor operations in place of gsplat's kernels, against the plain rasteriser."
    gsplat = pytest.importorskip("gsplat", reason="gsplat is not installed")
    twins = pytest.importorskip("gsplat.cuda._torch_impl")

    def project(means, covars, quats, scales, cameras, K, width, height, opacities, **rules):
        axes = quat_to_mat(quats) * scales[..., None, :]
        return twins._fully_fused_projection(means, axes @ axes.mT, cameras, K, width, height, **rules)

    def blend(means, conics, features, opacities, backgrounds, masks, width, height, tile, offsets, ids):
        with torch.no_grad():
            lists = TileLists(offsets.cpu(), ids.cpu(), height, width)
            found = blend_plain(Splats2D(*(x.cpu() for x in (means, conics, features, opacities))), lists)
            return tuple(x.to(DEVICE) for x in found)

    monkeypatch.setattr(gsplat, "fully_fused_projection", project)
    monkeypatch.setattr(tile_kernels, "gsplat_blend", lambda: blend)
    monkeypatch.setattr(render_module, "tiles_take", lambda values: True)
    monkeypatch.setattr(render_module, "_gsplat_rasterization", lambda device: None)
    gen = torch.Generator().manual_seed(0)
    means = (torch.rand(2, 40, 3, generator=gen) - 0.5) * torch.tensor([8.0, 6, 0]) + torch.tensor([0.0, 0, 8])
    means[..., 2] += torch.arange(40) / 10
    means[:, :3, 2] *= -1  # behind the cameras
    quats = torch.nn.functional.normalize(torch.randn(40, 4, generator=gen), dim=1)
    e = Ellipsoids(means, quats, 0.1 + 0.6 * torch.rand(40, 3, generator=gen), torch.rand(40, generator=gen))
    leaves = [x.to(DEVICE).requires_grad_() for x in (*e, torch.rand(2, 40, 6, generator=gen))]
    K = torch.tensor([[20.0, 0, 14], [0, 20, 11], [0, 0, 1]]).repeat(2, 1, 1)
    views = Cameras(K, torch.eye(4).repeat(2, 1, 1), torch.zeros(2), 21, 29).to(DEVICE)
    cfg = RenderConfig(antialiased=antialiased)

    def pictures_and_slopes(draw, device):
        at = [x.detach().to(device).requires_grad_() for x in leaves]
        image, alpha = draw(Ellipsoids(*at[:4]), at[4], views.to(device), cfg)
        weights = torch.linspace(-1, 1, image.numel(), device=device).view_as(image)
        loss = (image * weights).sum() + (alpha * weights[..., 0]).sum()
        return [x.cpu() for x in (image, alpha, *torch.autograd.grad(loss, at))]

    found = pictures_and_slopes(render_module._with_tiles, DEVICE)
    for a, b in zip(found, pictures_and_slopes(render_module._with_torch, "cpu")):
        assert (a - b).abs().max() < 5e-4 * b.abs().max()


@with_kernels
def test_no_splat_is_seen():
    s, size = flat_splats(1, 10, 5, 20, 20)[0], (20, 20)
    there = Splats2D(*(x.to(DEVICE) for x in s))
    unseen = torch.zeros(1, 10, 2, dtype=torch.int32, device=DEVICE)
    lists = list_splats(there, unseen, torch.ones(1, 10, device=DEVICE), size, (0.1, 1e4))
    assert len(lists.ids) == 0 and (lists.offsets == 0).all()


# A loop over a number of the launch: Triton 3.6 makes an index of an array for it, which NumPy refuses from 2.5 on.
LOOP = """
import torch
import triton
import triton.language as tl


@triton.jit
def count(x_ptr, n):
    for i in range(n):
        tl.store(x_ptr + i, 1.0)


x = torch.zeros(3)
count[(1,)](x, 3)
assert x.sum() == 3
"""


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_kernels_in_the_interpreter(tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    env = os.environ | dict(TRITON_INTERPRET="1")
    probe = tmp_path / "probe.py"
    probe.write_text(LOOP)
    tried = subprocess.run([sys.executable, probe], env=env, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"Triton's interpreter fails here: {tried.stderr.strip().splitlines()[-1]}")
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-2000:]


def test_the_processor_takes_the_plain_terms():
    out, views, _ = pictures((1, 12, 12, 3), device="cpu")
    assert not can_fuse(out.rgb, views.images)


@on_gpu
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_the_gpu_takes_the_fused_terms(monkeypatch):
    out, views, weight = pictures((2, 64, 80, 3))
    kind = torch.zeros(1).long().cuda()
    assert kernels_work(out.rgb.device) and can_fuse(out.rgb, views.images)
    assert not can_fuse(out.rgb.double(), views.images.double())
    assert not can_fuse(out.rgb[:, :10], views.images[:, :10])
    fast = reconstruction_loss(out, views, None, kind, LossConfig(), weight)
    monkeypatch.setattr("flux4d.training_loss.can_fuse", lambda *_: False)
    plain = reconstruction_loss(out, views, None, kind, LossConfig(), weight)
    for name, value in plain.items():
        assert torch.allclose(fast[name], value, rtol=1e-5, atol=1e-5), name


@on_gpu
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_a_machine_that_cannot_compile_says_so_and_goes_on(monkeypatch):
    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("no compiler")

    monkeypatch.setattr(kernels, "one_kernel", Broken())
    kernels_work.cache_clear()
    with pytest.warns(UserWarning, match="tensor operations do the work: RuntimeError: no compiler"):
        assert not kernels_work(torch.device("cuda", 0))
    kernels_work.cache_clear()


def gaussians(n=300, orders=1, device=DEVICE):
    "Raw numbers in one table and a velocity, with a gradient; sizes on both sides of the limit, a third far away."
    gen = torch.Generator().manual_seed(0)
    raw = 3 * torch.randn(n, 14, generator=gen)
    kind = (torch.arange(n) % 3 == 0).long()
    t = torch.rand(n, generator=gen)
    raw, kind, t = (x.to(device) for x in (raw, kind, t))
    empty = Gaussians(raw[:, :3], raw[:, :4], raw[:, :3], raw[:, 0], raw[:, :3], t, kind, kind)
    raw.requires_grad_()
    velocity = torch.randn(n, orders, 3, generator=gen).to(device).requires_grad_() if orders else None
    return empty.with_flat(raw), raw, velocity


def three_cameras(device=DEVICE):
    "Three poses at three times."
    gen = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(3, 3, 3, generator=gen))[0]
    pose = torch.eye(4).repeat(3, 1, 1)
    pose[:, :3, :3] = turn
    pose[:, :3, 3] = torch.randn(3, 3, generator=gen)
    return Cameras(torch.eye(3).repeat(3, 1, 1), pose, torch.tensor([0.0, 0.4, 1.0]), 20, 30).to(device)


@with_kernels
@pytest.mark.parametrize("orders", [0, 1, 3])
@pytest.mark.parametrize("features", [None, "one for all", "one a view"])
def test_splats_are_placed_as_by_tensor_operations(orders, features):
    g, raw, velocity = gaussians(orders=orders)
    size = {None: None, "one for all": (300, 2), "one a view": (3, 300, 2)}[features]
    drawn = size and torch.randn(size, generator=torch.Generator().manual_seed(2)).to(DEVICE).requires_grad_()
    inputs = [x for x in (raw, velocity, drawn) if x is not None]
    found = []
    for place in (render_module._place_fused, render_module.place_plain):
        e, values = place(g, velocity, 1.5, three_cameras(), RenderConfig(), drawn)
        values, unused = values.split([5 + (size or [0])[-1], values.shape[-1] - 5 - (size or [0])[-1]], -1)
        assert not unused.any()
        parts = [x if len(x) == 3 and x.dim() > 1 else x.expand(3, *x.shape) for x in (*e, values)]
        weights = [torch.linspace(-1, 1, x.numel(), device=DEVICE).view(x.shape).sin() for x in parts]
        total = sum((x * w).sum() for x, w in zip(parts, weights))
        found.append((parts, torch.autograd.grad(total, inputs)))
    for a, b in zip(found[0][0] + list(found[0][1]), found[1][0] + list(found[1][1])):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max()


@with_kernels
@pytest.mark.parametrize("channels,reach,features", [(5, 2, 0), (6, 0, 1), (7, 8, 2), (8, 2, 1), (8, 0, 0)])
def test_pictures_are_finished_as_by_tensor_operations(channels, reach, features):
    gen = torch.Generator().manual_seed(0)
    image = torch.rand(2, 21, 70, channels, generator=gen)
    empty = torch.rand(2, 21, 70, generator=gen) < 0.3
    empty[0, :12, :20] = True
    image[..., 3:5] *= ~empty[..., None]
    image[1, 5, 5, 3:5] = 1e-12  # hardly anything is drawn there
    inputs = [image.to(DEVICE).requires_grad_(), torch.rand(2, 21, 70, generator=gen).to(DEVICE).requires_grad_()]
    background = torch.tensor([0.1, 0.5, 0.9], device=DEVICE)
    found = []
    for finish in (splat_kernels.finish_pictures, render_module.finish_plain):
        pictures = [x for x in finish(*inputs, background, reach, features) if x is not None and x.shape[-1]]
        total = sum((x * torch.linspace(-1, 1, x.numel(), device=DEVICE).view(x.shape)).sum() for x in pictures)
        found.append((pictures, torch.autograd.grad(total, inputs)))
    for a, b in zip(found[0][0], found[1][0]):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert (found[0][0][1][0, :12, :20] > 0).any() == (reach > 0)  # depth from around
    for a, b in zip(found[0][1], found[1][1]):
        assert ((a - b).abs() <= 1e-5 * b.abs() + 1e-5).all()


@on_gpu
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_a_render_with_kernels_is_one_without(monkeypatch):
    g, raw, velocity = gaussians(n=2000)
    views = three_cameras()
    K = torch.tensor([[30.0, 0, 60], [0, 30, 40], [0, 0, 1]]).cuda().repeat(3, 1, 1)
    views = Cameras(K, views.world_to_cam, views.t, 80, 120)
    extra = torch.ones(2000, 1, device=DEVICE)
    found = []
    for fused in (True, False):
        monkeypatch.setattr(render_module, "kernels_take", lambda *_: fused)
        out = render(g, velocity, 1.5, views, RenderConfig(background=(0.2, 0.3, 0.4)), extra)
        total = sum((x * torch.linspace(-1, 1, x.numel(), device=DEVICE).view(x.shape)).mean() for x in out)
        found.append((out, torch.autograd.grad(total, (raw, velocity))))
    for a, b in zip(found[0][0], found[1][0]):
        assert ((a - b).abs() <= 1e-4 * b.abs() + 1e-4).float().mean() > 0.999
    for a, b in zip(found[0][1], found[1][1]):
        assert (a - b).norm() < 1e-3 * b.norm()


BOUNDS = AttributeBounds()


def close(found, wanted, tolerance=1e-5):
    "Whether two results agree within a share of the largest entry; one of them may be on the GPU."
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and (a.cpu() - b.cpu()).abs().max() <= tolerance * b.abs().max()


def turn_and_move():
    "A pose, float64."
    gen = torch.Generator().manual_seed(3)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = torch.linalg.qr(torch.randn(3, 3, generator=gen, dtype=torch.float64))[0]
    pose[:3, 3] = torch.tensor([3.0, -2, 1])
    return pose


@with_kernels
def test_changes_are_decoded_as_by_tensor_operations():
    g, *_ = gaussians(device="cpu")
    g = g.map(torch.Tensor.detach)
    gen = torch.Generator().manual_seed(4)
    raw = 5 * torch.randn(300, 14, generator=gen) * torch.rand(300, 1, generator=gen) ** 6
    weights = torch.randn(300, 14, generator=gen)
    found = []
    for decode, device in ((fused_residual, DEVICE), (decode_residual, "cpu")):
        x = raw.to(device).requires_grad_()
        change = decode(x, g.to(device), turn_and_move().to(device), BOUNDS)
        found.append((change.detach(), torch.autograd.grad((change * weights.to(device)).sum(), x)[0]))
    close(*found)
    nothing = fused_residual(torch.zeros(300, 14, device=DEVICE), g.to(DEVICE), turn_and_move().to(DEVICE), BOUNDS)
    assert not nothing.any()


@with_kernels
def test_changes_are_applied_as_by_tensor_operations():
    g, *_ = gaussians(device="cpu")
    g = g.map(torch.Tensor.detach)
    change = torch.randn(300, 14, generator=torch.Generator().manual_seed(5))
    change[:100, 3:7] = 0
    weights = torch.randn(300, 14, generator=torch.Generator().manual_seed(6))
    found = []
    for add, device in ((fused_sum, DEVICE), (Gaussians.add, "cpu")):
        x = change.to(device).requires_grad_()
        flat = add(g.to(device), x).flat()
        found.append((flat.detach(), torch.autograd.grad((flat * weights.to(device)).sum(), x)[0]))
    close(*found)
    same = fused_sum(g.to(DEVICE), torch.zeros(300, 14, device=DEVICE))
    assert torch.equal(same.flat().cpu(), g.flat())  # bit for bit


@with_kernels
def test_points_are_described_as_by_tensor_operations():
    g, *_ = gaussians(device="cpu")
    g = g.map(torch.Tensor.detach)
    gen = torch.Generator().manual_seed(7)
    seconds, voxel = torch.rand(300, generator=gen), VoxelConfig()
    cells = torch.randint(0, 100, (300, 3), generator=gen)
    wanted = describe_points(g, seconds, cells, turn_and_move(), voxel)
    around = [x.to(DEVICE) for x in (seconds, cells, turn_and_move())]
    grid = torch.tensor([*voxel.low, *voxel.shape, voxel.size], dtype=torch.float64, device=DEVICE)
    channels, turn = fused_point(g.to(DEVICE), *around, grid)
    close((*channels.split([3, 3, 1, 3, 1, 3], 1), turn), (*wanted[0], wanted[1]))


@with_kernels
def test_feedback_is_read_as_by_tensor_operations():
    g, *_ = gaussians(device="cpu")
    g = g.map(torch.Tensor.detach)
    gen = torch.Generator().manual_seed(8)
    grad = torch.randn(300, 14, generator=gen) * 10 ** torch.linspace(-3, 3, 14)
    filled = 50 * torch.rand(300, generator=gen) ** 3
    filled[:20] = 0
    wanted = feedback_features(Feedback(grad, filled), g, turn_and_move(), RefineConfig())
    found = fused_feedback(*(x.to(DEVICE) for x in (grad, filled)), g.to(DEVICE), turn_and_move().to(DEVICE), 1.0)
    close(found.split(1, 1), wanted.split(1, 1))
    zero = torch.zeros(300, 14, device=DEVICE), torch.zeros(300, device=DEVICE)
    none = fused_feedback(*zero, g.to(DEVICE), turn_and_move().to(DEVICE), 1.0)
    assert not none.any()


@with_kernels
def test_some_gaussians_are_those_of_an_index():
    g, *_ = gaussians(device="cpu")
    g = g.map(torch.Tensor.detach)
    rows = torch.randint(0, 300, (170,), generator=torch.Generator().manual_seed(10))
    for some in (rows, rows[:0]):
        found, wanted = fused_rows(g.to(DEVICE), some.to(DEVICE)), g[some]
        for name, x in vars(wanted).items():
            made = getattr(found, name)
            assert made.dtype == x.dtype and torch.equal(made.cpu(), x), name


@with_kernels
def test_the_far_field_is_described_as_by_tensor_operations():
    g, *_ = gaussians(device="cpu")
    g = g.map(torch.Tensor.detach)
    rows = torch.arange(3, 300, 2)
    extra = torch.randn(300, 15, generator=torch.Generator().manual_seed(11))
    index = SimpleNamespace(to_ego=turn_and_move(), background=rows)
    wanted = far_channels(g[rows], index, extra)
    given = (g[rows].to(DEVICE), *(x.to(DEVICE) for x in (turn_and_move(), extra, rows)))
    close(fused_far(*given).split(1, 1), wanted.split(1, 1))


@with_kernels
@pytest.mark.parametrize("channels, features", [(8, 1), (5, 0), (7, 2)])
def test_the_slope_of_an_error_is_that_of_tensor_operations(channels, features):
    gen = torch.Generator().manual_seed(13)
    image, alpha = torch.rand(2, 21, 30, channels, generator=gen), torch.rand(2, 21, 30, generator=gen)
    image[..., 4] *= 60
    image[0, :9, :, 3:5] = 0  # nothing of the LiDAR is drawn there
    image[1, 3, 4, 3:5] = 1e-12
    photos, returns = torch.rand(2, 21, 30, 3, generator=gen), 60 * torch.rand(2, 21, 30, generator=gen)
    views = SimpleNamespace(images=photos, depth=returns)
    views.depth[:, ::3] = 0
    views.depth[0, 9:12] = (image[..., 4] / image[..., 3])[0, 9:12]  # measured just so
    cfg, background = RefineConfig(rgb=0.7, depth=3.0), torch.tensor([0.1, 0.5, 0.9])
    inputs = [x.clone().requires_grad_() for x in (image, alpha)]
    rgb, depth, drawn = render_module.finish_plain(*inputs, background, 2, features)
    slopes = feedback_slopes(SimpleNamespace(rgb=rgb, depth=depth), views, cfg)
    wanted = torch.autograd.grad((rgb, depth, drawn), inputs, (*slopes, torch.ones_like(drawn)))
    given = [x.to(DEVICE) for x in (image, alpha, background, views.images, views.depth)]
    found = fused_slopes(given[:3], *given[3:], (cfg.rgb, cfg.depth), features)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and ((a.cpu() - b).abs() <= 1e-5 * b.abs() + 1e-5).all()
    assert not found[0][0, 9:12, :, 3:5].any()  # a depth that is right has no slope, however it was divided


@with_kernels
@pytest.mark.parametrize("bins, extra", [(TimeBins(), 15), (TimeBins(3, 0.4, 0.0), 0)])
def test_voxels_are_averaged_as_by_tensor_operations(bins, extra):
    gen = torch.Generator().manual_seed(12)
    n, V = 400, 37
    seconds, voxel = 1.7 * torch.rand(n, generator=gen) - 0.1, torch.randint(0, V, (n,), generator=gen)
    seconds[:9] = 0.2 * torch.arange(9) - 0.15  # on the edges of bins
    channels = torch.randn(n, 14 + extra, generator=gen)
    count = torch.bincount(voxel, minlength=V)
    point = PointFeatures(*channels[:, :14].split([3, 3, 1, 3, 1, 3], 1))
    slots = time_slots(seconds, voxel, V, bins)
    moved = [x.to(DEVICE) for x in (seconds, voxel, count)]
    made = fused_slots(*moved, bins)
    for name in ("slot", "count"):
        assert torch.equal(getattr(made, name).cpu(), getattr(slots, name))
    close([made.place, made.log_count, made.spread], [slots.place, slots.log_count, slots.spread])
    v = Voxels(torch.arange(V), None, None, count, voxel, None)
    wanted = voxel_features(channels, point, seconds, v, bins, slots)
    found = fused_means(channels.to(DEVICE), *moved[1:], made, bins.count)
    assert found.shape == wanted.shape and (found.cpu() - wanted).abs().max() < 1e-5 * wanted.abs().max()


@with_kernels
@pytest.mark.parametrize("channels", [32, 5])
def test_voxels_are_mixed_as_by_tensor_operations(channels):
    gen = torch.Generator().manual_seed(9)
    features, row = torch.randn(40, channels, generator=gen), torch.randint(0, 40, (70, 8), generator=gen)
    w = torch.rand(70, 8, generator=gen) * (torch.rand(70, 8, generator=gen) < 0.6)
    weights = torch.randn(70, channels, generator=gen)
    found = []
    for mix, device in ((fused_mix, DEVICE), (fused_mix_behind, DEVICE), (mix_voxels, "cpu")):
        x = features.to(device).requires_grad_()
        y = mix(x, row.to(device), w.to(device))
        found.append((y.detach(), torch.autograd.grad((y * weights.to(device)).sum(), x)[0]))
    for one in found[:2]:
        close(one, found[2])


def fused_mix_behind(features, row, w):
    "Mixed into the last columns of a table."
    table = torch.full((len(row), 3 + features.shape[1]), 7.0, device=features.device)
    mixed = fused_mix(features, row, w, table, 3)
    assert mixed.data_ptr() == table.data_ptr() and (mixed[:, :3] == 7).all()
    return mixed[:, 3:]


@with_kernels
@pytest.mark.parametrize("extra", [0, 4])
def test_a_table_of_channels_is_their_tables_side_by_side(extra):
    g, *_ = gaussians(device="cpu")
    g = g.map(torch.Tensor.detach)
    gen = torch.Generator().manual_seed(14)
    seconds, voxel, motion = torch.rand(300, generator=gen), VoxelConfig(), torch.randn(300, 5, generator=gen)
    cells = torch.randint(0, 100, (300, 3), generator=gen)
    more = torch.randn(300, extra, generator=gen) if extra else None
    point, turn = describe_points(g, seconds, cells, turn_and_move(), voxel)
    wanted = [*point, motion, *([more] if extra else []), turn]
    place = [x.to(DEVICE) for x in (seconds, cells, turn_and_move(), grid_numbers(voxel, turn_and_move()))]
    given = motion.to(DEVICE), more if more is None else more.to(DEVICE)
    table, own = fused_channels(g.to(DEVICE), place, *given, 6)
    assert own == 19 + extra and table.shape == (300, own + 9 + 6)
    close(table[:, :-6].split([x.shape[1] for x in wanted], 1), wanted)


@with_kernels
def test_networks_with_kernels_are_those_without(monkeypatch):
    "Base and refiner on a small street, with gradients."
    gen = torch.Generator().manual_seed(15)
    g = street_gaussians(n_ground=20, n_box=8).gaussians
    g = replace(g, kind=torch.where(torch.arange(len(g)) % 9 == 0, BACKGROUND, LIDAR))
    unet_cfg = UNetConfig(widths=(16, 16), blocks=1, precision="float32")
    bare = MotionPriorConfig(reach=0)
    cfg = PredictorConfig(unet=unet_cfg, hidden=8, motion_prior=bare, fine_prior=bare, degree=1)
    grid = VoxelConfig(0.5, (-4.0, -20.0, -3.0), (36.0, 20.0, 3.0))
    torch.manual_seed(0)
    base, refiner = BasePredictor(cfg), Refiner(cfg)
    for head in (base.attributes, base.motion, refiner.net.attributes, refiner.far):
        torch.nn.init.normal_(head[-1].weight, std=0.1)
    extra = torch.randn(len(g), 15, generator=gen)
    weight = torch.randn(len(g), 14, generator=gen)
    found = []
    for device, fused in (("cpu", False), (DEVICE, True)):
        if INTERPRETED:
            for module in (attribute_kernels, block_kernels, level_tables):
                monkeypatch.setattr(module, "kernels_work", lambda device: fused)
        elif fused:
            assert kernels_work(torch.device(device))
        there, nets = g.to(device), [net.to(device) for net in (base, refiner)]
        index = make_grid_index(there, torch.eye(4), 1.2, grid, cfg.motion_inputs, None)
        results = *nets[0](there, index), nets[1](there, index, extra.to(device))
        with torch.no_grad():
            close(nets[1](there, index, extra.to(device)).split(14, 1), results[2].split(14, 1))
        totals = [(results[k] * weight.to(device)).sum() for k in (0, 2)]
        grads = [torch.autograd.grad(t, list(n.unet.parameters())) for t, n in zip(totals, (nets[0], nets[1].net))]
        found.append([x.detach().cpu() for x in (*results, *grads[0], *grads[1])])
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape and (a - b).norm() <= 1e-3 * a.norm() + 1e-6


def test_a_convolution_on_known_voxels_gives_spconv_what_its_layers_do(monkeypatch):
    "The GPU's path without containers, traced on the processor: the same arguments reach the same function."
    from spconv.core import ConvAlgo
    from spconv.pytorch import SparseConvTensor
    from spconv.pytorch.core import ImplicitGemmIndiceData

    def table(name, n_in, n_out, subm):
        made = {k: f"{name}.{k}" for k in ("pair_fwd", "pair_bwd", "masks")}
        sides = [(k, side) for k in ("pair_mask", "mask_argsort") for side in ("fwd", "bwd")]
        made |= {f"{k}_{side}_splits": f"{name}.{k}.{side}" for k, side in sides}
        size = 3 if subm else 2
        how = dict(is_subm=subm, algo=ConvAlgo.MaskImplicitGemm, ksize=[size] * 3, stride=[1 if subm else 2] * 3)
        shapes = dict(spatial_shape=[8] * 3, out_spatial_shape=[8 if subm else 4] * 3)
        at = torch.zeros(n_out, 4).int(), torch.zeros(n_in, 4).int()
        return ImplicitGemmIndiceData(*at, padding=[0] * 3, dilation=[1] * 3, **made, **how, **shapes)

    calls = []

    def record(features, weight, *rest):
        rest = [x for x in rest if not isinstance(x, unet.CUDAKernelTimer)]
        calls.append((tuple(features.shape), tuple(weight.shape), *rest))
        rows = next(x for x in calls[-1][2:] if isinstance(x, int) and not isinstance(x, bool))
        return torch.zeros(rows, weight.shape[0])

    monkeypatch.setattr(unet.spconv_functional, "implicit_gemm", record)
    monkeypatch.setattr(unet.spconv_ops, "implicit_gemm", lambda *a, **k: (record(*a), None, None))
    level = table("level", 50, 50, True)
    down = table("down", 50, 20, False)
    both = dict(level=level, down=down)
    x, at = torch.zeros(50, 4), torch.zeros(50, 4).int()
    tables = unet.kept_tables(SparseConvTensor(x, at, [8] * 3, 1, indice_dict=both))
    sizes = (4, 6, "level"), (4, 6, "down", "down"), (6, 4, "down", "up")
    layers = [unet.SparseConv(*size) for size in sizes]
    for training in (True, False):
        calls.clear()
        with torch.set_grad_enabled(training):
            for layer in layers:
                n, shape = (20, [4] * 3) if layer.kind == "up" else (50, [8] * 3)
                x, at = torch.zeros(n, layer.in_channels), torch.zeros(n, 4).int()
                given = SparseConvTensor(x, at, shape, 1, indice_dict=tables)
                layer.algo = ConvAlgo.MaskImplicitGemm
                layer.inverse = layer.kind != "same"
                layer.indice_key = layer.key + unet.AGAIN * (layer.kind == "down")
                layer._conv_forward(training, given, layer.weight, None)
                layer.again(x, tables)
        assert len(calls) == 6
        for by_layer, by_table in zip(calls[::2], calls[1::2]):
            assert by_layer[: len(by_table)] == by_table


@on_gpu
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.parametrize("fused", [True, False])
def test_a_second_pass_over_the_same_voxels_is_the_first(monkeypatch, fused):
    monkeypatch.setattr(unet.Kernels, "fused", fused)
    gen = torch.Generator().manual_seed(0)
    points = torch.rand(4000, 3, generator=gen) * torch.tensor([40.0, 30, 3])
    v = voxelise(points.cuda(), points.cuda(), VoxelConfig())
    torch.manual_seed(0)
    net = SparseUNet(3, UNetConfig(widths=(8, 16, 32), blocks=1)).cuda()
    tables, found = {}, []
    for _ in range(2):
        y = net(v, VoxelConfig().shape, tables)
        weights = torch.linspace(-1, 1, y.numel(), device="cuda").view(y.shape)
        found.append((y.detach(), *torch.autograd.grad((y * weights).sum(), list(net.parameters()))))
    with torch.no_grad():
        still = [net(v, VoxelConfig().shape, tables) for _ in range(2)]
    for a, b in zip(*found):
        assert (a - b).norm() <= 1e-3 * b.norm()
    for y in still:
        assert (y - found[0][0]).norm() <= 1e-3 * y.norm()


def voxels_of_a_street(n=130):
    "Cells of a wavy surface in no order, and their grid."
    gen = torch.Generator().manual_seed(0)
    points = torch.rand(n, 3, generator=gen) * torch.tensor([15.0, 11, 1])
    points[:, 2] += 3 + 2 * torch.sin(points[:, 0] / 3)
    at = points.long().unique(dim=0)
    return at[torch.randperm(len(at), generator=gen)], [16, 12, 8]


def plain_block(x, weight, norm, table, slope):
    "A block of the network by tensor operations."
    pairs, counts = torch.stack(table.pairs[:2]).long(), table.pairs.starts.diff().tolist()
    y = convolve_pairs(x, weight, pairs, counts, table.there.rows.shape[1])
    return torch.nn.functional.leaky_relu(norm(y), slope)


@with_kernels
@pytest.mark.parametrize("name, kind, n_in, n_out", [
    ("level0", "same", 16, 20), ("level0", "same", 5, 40), ("down0", "down", 16, 32), ("down0", "up", 40, 16)
])
def test_a_block_is_what_tensor_operations_give(monkeypatch, name, kind, n_in, n_out):
    at, grid = voxels_of_a_street()
    table = block_kernels.network_tables(at.to(DEVICE), grid, 2, train=True)[name, kind]
    plain_table = block_kernels.network_tables(at, grid, 2, train=True)[name, kind]
    monkeypatch.setattr(block_kernels, "share_out", lambda programs, wanted, most: 2)  # parts are added up, too
    gen = torch.Generator().manual_seed(1)
    size = 3 if kind == "same" else 2
    x = torch.randn(int(plain_table.there.rows.max()) + 1, n_in, generator=gen)
    weight = torch.randn(n_out, size, size, size, n_in, generator=gen) / 8
    norm = torch.nn.BatchNorm1d(n_out, track_running_stats=False)
    norm.weight.data, norm.bias.data = torch.rand(n_out, generator=gen), torch.randn(n_out, generator=gen)
    d = torch.randn(plain_table.there.rows.shape[1], 2 * n_out, generator=gen)[:, :n_out]  # rows have gaps
    found = []
    for device, block in ((DEVICE, block_kernels.fused_block), ("cpu", plain_block)):
        a, w = (v.to(device).detach().requires_grad_() for v in (x, weight))
        norm, given = norm.to(device), (table if block is block_kernels.fused_block else plain_table)
        y = block(a, w, norm, given, 0.1, *(["float32"] if block is block_kernels.fused_block else []))
        grads = torch.autograd.grad(y, (a, w, norm.weight, norm.bias), grad_outputs=d.to(device))
        found.append([v.detach().cpu() for v in (y, *grads)])
    for a, b in zip(*found):
        assert a.shape == b.shape and (a - b).norm() < 1e-5 * b.norm()


@with_kernels
@pytest.mark.parametrize("levels, points", [(1, 130), (3, 130), (5, 900), (2, 1)])
def test_tables_made_by_kernels_are_those_made_by_tensor_operations(levels, points):
    at, grid = voxels_of_a_street(points)
    wanted = block_kernels.network_tables(at, [16 * n for n in grid], levels, train=True)
    found = level_tables.fused_tables(at.to(DEVICE), levels, train=True)
    assert found.keys() == wanted.keys()
    for name, layer in wanted.items():
        made = found[name]
        assert made.mirrored == layer.mirrored
        for one, other in ((made.there, layer.there), (made.back, layer.back)):
            assert torch.equal(one.rows.cpu(), other.rows) and torch.equal(one.order.cpu(), other.order)
            for counted, plain in zip(one.cells.cpu(), other.cells, strict=True):
                assert torch.equal(counted[: 1 + counted[0]], plain[: 1 + plain[0]])
        for one, other in zip(made.pairs, layer.pairs, strict=True):
            assert torch.equal(one.cpu(), other)


@with_kernels
def test_tables_at_the_ends_of_a_grid():
    at = torch.tensor([[0, 0, 0], [0, 0, 2], [2**20 - 2, 5, 7], [2**20 - 2, 4, 7], [2**20 - 2, 2**20 - 2, 2**20 - 2]])
    wanted = block_kernels.network_tables(at, [2**20 - 1] * 3, 1, train=False)["level0", "same"].there
    found = level_tables.fused_tables(at.to(DEVICE), 1, train=False)["level0", "same"].there
    assert torch.equal(found.rows.cpu(), wanted.rows) and (wanted.rows >= 0).sum() == 7


@with_kernels
def test_trajectories_are_refined_as_by_tensor_operations():
    gen = torch.Generator().manual_seed(2)
    sweeps, blocks, cells = 5, 12, 90
    times = 0.2 * torch.arange(sweeps) + 0.01 * torch.rand(sweeps, generator=gen)
    sweep = torch.randint(0, sweeps, (blocks,), generator=gen)
    maps = torch.rand(sweeps, 3, 40, 30, generator=gen)
    maps[:, 1:] = 2 * maps[:, 1:] - 1
    block = torch.randint(0, blocks - 2, (cells,), generator=gen)  # two blocks have no cells
    xy = torch.rand(cells, 2, generator=gen) * torch.tensor([12.0, 9]) - torch.tensor([3.0, 4])  # some lie outside
    velocity = 5 * torch.randn(blocks, 2, generator=gen)
    density = DensityMap(maps, (-2.0, -3.0), 0.25)
    wanted = refine_trajectories(velocity, times, MemberCells(block, xy, sweep[block]), density, 0.15, 2.0, 6)
    given = [x.to(DEVICE) for x in (velocity, times, block, xy, sweep[block], maps)]
    found = fused_refine(*given, RefineRule(density.low, density.cell, 0.15, 2.0, 6))
    assert (found.cpu() - wanted).abs().max() < 1e-3 and (found.cpu() - wanted).abs().median() < 1e-5


@with_kernels
@pytest.mark.parametrize("masked", [True, False])
def test_depths_cost_what_they_do_by_tensor_operations(masked):
    gen = torch.Generator().manual_seed(3)
    V, B, side = 3, 20, 32
    pose = torch.eye(4, dtype=torch.float64).repeat(V, 1, 1)
    pose[:, :3, 3] = 4 * torch.rand(V, 3, generator=gen, dtype=torch.float64)
    pose[2, 0, 0] = pose[2, 2, 2] = -1  # looks the other way
    K = torch.tensor([[30.0, 0, 16], [0, 31, 15], [0, 0, 1]], dtype=torch.float64).repeat(V, 1, 1)
    images = 0.2 * torch.rand(V, side // 4, side // 4, 3, generator=gen)
    shown = torch.rand(V, side // 4, side // 4, generator=gen) < 0.8 if masked else None
    uv = side * torch.rand(B, 2, generator=gen)
    ray = torch.cat([(uv.double() - 16) / 30, torch.ones(B, 1)], 1)
    depths = 1 + 10 * torch.rand(B, 3, generator=gen, dtype=torch.float64)
    zero = torch.zeros(B)
    image = torch.randint(0, V, (B,), generator=gen)
    blocks = Blocks(image, uv, torch.zeros(B, 3), torch.full((B,), 4.0), ray, zero, zero.double())
    data = SimpleNamespace(pose=pose[:, None], K=K[:, None], world_to_cam=se3_inverse(pose)[:, None])
    wanted = torch.stack([photometric_cost(data, images, 4, blocks, d[:, None], shown) for d in depths.unbind(1)], 1)
    cameras = CostCameras(images, shown, K, pose, se3_inverse(pose))
    cameras = CostCameras(*(x if x is None else x.to(DEVICE) for x in cameras))
    given = [x.to(DEVICE) for x in (image, uv, blocks.side, ray, depths)]
    assert (wanted > 0).any() and (wanted == 0).any()
    assert (fused_costs(cameras, *given, 4).cpu() - wanted).abs().max() < 1e-6


@on_gpu
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_a_network_of_fused_blocks_is_one_of_plain_ones(monkeypatch, precision):
    gen = torch.Generator().manual_seed(0)
    points = (torch.rand(20_000, 3, generator=gen) * torch.tensor([40.0, 30, 1])).cuda()
    v = voxelise(points, points, VoxelConfig())
    torch.manual_seed(0)
    net = SparseUNet(3, UNetConfig(widths=(32, 64, 128), precision=precision)).cuda()
    weights = torch.randn(len(v), net.n_out, generator=gen).cuda()
    found = []
    for block in (block_kernels.fused_block, lambda *a: plain_block(*a[:-1])):
        monkeypatch.setattr(unet, "fused_block", block)
        y = net(v, VoxelConfig().shape)
        grads = torch.autograd.grad((y * weights).mean(), list(net.parameters()))
        found.append((y.detach(), torch.cat([g.flatten() for g in grads])))
    most = dict(float32=(1e-4, 1e-2), tf32=(5e-3, 0.2))[precision]
    for a, b, limit in zip(*found, most):
        assert (a - b).norm() < limit * b.norm()
