"""The compiled rasteriser beside the readable one: batches of views, feature channels, threads, a missing package,
folders that cannot be written to, Ctrl-C."""

import os
import signal
import subprocess
import sys
from pathlib import Path
import pytest
import torch
from flux4d import compiled_code, raster_compiled, render as render_module
from flux4d.compiled_code import have_numba, in_threads
from flux4d.raster import Blend, DrawRules, Ellipsoids, Pinhole, rasterise
from flux4d.compiled_projection import rasterise_compiled
from flux4d.raster_compiled import CompiledBlend, blend_tiles
from flux4d.raster_compiled import sum_entries, unblend_tiles
from flux4d.render import Cameras, RenderConfig, pick_backend, render
from flux4d.gaussians import gaussians_from

ROOT = Path(__file__).parents[1]
needs_numba = pytest.mark.skipif(not have_numba(), reason="numba is not installed")


def scene(n=400, seed=0):
    "Moving Gaussians before a camera that looks along z."
    gen = torch.Generator().manual_seed(seed)
    z = 3 + 12 * torch.rand(n, generator=gen)
    means = torch.stack([(torch.rand(n, generator=gen) - 0.5) * z, (torch.rand(n, generator=gen) - 0.5) * z, z], -1)
    colours = torch.rand(n, 3, generator=gen)
    g = gaussians_from(means, 0.03 * z, colours, torch.rand(n, generator=gen), 0)
    return g, torch.randn(n, 2, 3, generator=gen)


def cameras(width=101, height=59):
    "Three views at three times."
    K = torch.tensor([[90.0, 0, 50], [0, 92, 29], [0, 0, 1]]).expand(3, 3, 3)
    return Cameras(K, torch.eye(4).expand(3, 4, 4), torch.tensor([0.0, 0.4, 1.0]), height, width)


def drawn(backend, background=None, channels=4):
    "Pictures of a batch and the gradient of everything that was drawn."
    g, velocity = scene()
    raw = g.flat().requires_grad_()
    velocity = velocity.requires_grad_()
    features = torch.rand(3, len(g), channels, generator=torch.Generator().manual_seed(1)).requires_grad_()
    cfg = RenderConfig(backend=backend, background=background)
    out = render(g.with_flat(raw), velocity, 1.0, cameras(), cfg, features)
    pictures = [out.rgb, out.depth * out.alpha, out.alpha, out.features]
    total = sum((p * torch.rand(p.shape, generator=torch.Generator().manual_seed(2))).sum() for p in pictures)
    return [p.detach() for p in pictures], torch.autograd.grad(total, [raw, velocity, features])


@needs_numba
@pytest.mark.parametrize("background", [None, (0.0, 0.5, 1.0)])
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_batch_of_views_equals_torch(background, channels):
    for own, twin in zip(drawn("compiled", background, channels), drawn("torch", background, channels)):
        for a, b in zip(own, twin):
            assert (a - b).abs().max() < 1e-5 * b.abs().max().clamp_min(1)


@needs_numba
def test_same_bits_at_any_number_of_threads(monkeypatch):
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(compiled_code, "worker_threads", lambda: threads)
        pictures, gradients = drawn("compiled")
        found.append([v.numpy().tobytes() for v in (*pictures, *gradients)])
    assert found[0] == found[1] == found[2]


@needs_numba
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 7), (3, 40)])
def test_pictures_of_any_size(size):
    g, _ = scene(200, 3)
    camera = Pinhole(torch.tensor([[30.0, 0, size[0] / 2], [0, 30, size[1] / 2], [0, 0, 1]]), torch.eye(4), *size)
    e = Ellipsoids(g.means, g.unit_quats, g.scales, g.opacities)
    for antialiased in (False, True):
        rules = DrawRules(antialiased=antialiased)
        own, twin = (draw(e, g.colours, camera, rules) for draw in (rasterise_compiled, rasterise))
        torch.testing.assert_close(own.features, twin.features, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own.alpha, twin.alpha, rtol=1e-5, atol=1e-6)


@needs_numba
def test_double_precision_is_left_to_torch():
    g, _ = scene(50)
    K = torch.tensor([[30.0, 0, 16], [0, 30, 16], [0, 0, 1]], dtype=torch.float64)
    camera = Pinhole(K, torch.eye(4, dtype=torch.float64), 32, 32)
    e = Ellipsoids(*(v.double() for v in (g.means, g.unit_quats, g.scales, g.opacities)))
    own, twin = (draw(e, g.colours.double(), camera) for draw in (rasterise_compiled, rasterise))
    assert own.features.dtype == torch.float64 and torch.equal(own.features, twin.features)


@needs_numba
def test_no_gradient_is_asked_for():
    uv, conic = torch.tensor([[4.0, 4.0]]), torch.tensor([[0.2, 0.0, 0.2]])
    with torch.no_grad():
        both = [b.apply(uv, conic, torch.tensor([0.7]), torch.ones(1, 2), 11, 9) for b in (CompiledBlend, Blend)]
    torch.testing.assert_close(*both)


def test_errors_in_threads_are_raised(monkeypatch):
    monkeypatch.setattr(compiled_code, "worker_threads", lambda: 2)

    def kernel(first, stop):
        raise ArithmeticError(f"{first}..{stop}")

    with pytest.raises(ArithmeticError):
        in_threads(kernel, 10)


def test_without_numba(monkeypatch):
    monkeypatch.setattr(compiled_code, "numba", None)
    assert pick_backend("auto", torch.device("cpu")) is render_module._with_torch
    g, _ = scene(5)
    with pytest.raises(ImportError, match="pip install numba.*backend='torch'"):
        render(g, None, 1.0, cameras(), RenderConfig(backend="compiled"))
    assert render(g, None, 1.0, cameras(), RenderConfig()).rgb.isfinite().all()


@needs_numba
def test_auto_takes_the_compiled_one():
    assert pick_backend("auto", torch.device("cpu")) is render_module._with_numba


@needs_numba
def test_import_compiles_nothing_and_the_cache_is_used(tmp_path):
    code = (
        "import flux4d.raster_compiled as r, torch, os; listed = lambda: sum(len(f) for _, _, f in os.walk(r'%s'));"
        "print(listed(), len(r.tile_lists.signatures));"
        "r.CompiledBlend.apply(torch.ones(1, 2), torch.tensor([[1., 0, 1]]), torch.ones(1), torch.ones(1, 3), 8, 8);"
        "print(listed(), sum(r.blend_tiles.stats.cache_hits.values()))" % tmp_path
    )
    env = os.environ | dict(NUMBA_CACHE_DIR=str(tmp_path))
    first, second = (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    before, after = first.stdout.split("\n")[:2]
    assert before == "0 0" and int(after.split()[0]) > 0
    assert second.stdout.split("\n")[1].split()[1] == "1"


@needs_numba
@pytest.mark.parametrize("strikes_at", [blend_tiles, unblend_tiles, sum_entries], ids=lambda kernel: kernel.__name__)
def test_an_interrupt_waits_until_compiled_code_has_ended(monkeypatch, strikes_at):
    "An exception while numba hands over its results would end the process with a segmentation fault."
    ended = []

    def struck(kernel, *args):
        if kernel is strikes_at:
            signal.raise_signal(signal.SIGINT)
        in_threads(kernel, *args)
        ended.append(kernel)

    monkeypatch.setattr(raster_compiled, "in_threads", struck)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            drawn("compiled")
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended[-1] is (blend_tiles if strikes_at is blend_tiles else sum_entries)
