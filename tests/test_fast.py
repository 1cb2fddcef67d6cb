"""Fast paths beside the plain ones that define them. What needs a GPU is skipped without one; Triton kernels are also
tried on the processor, by Triton's interpreter, where Triton is installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from flux4d import losses_fused
from flux4d.losses import LossConfig, image_terms
from flux4d.losses_fused import can_fuse, fused_image_terms, kernels_work
from flux4d.training_loss import reconstruction_loss

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
@pytest.mark.parametrize("shape", [(2, 23, 31, 3), (1, 11, 12, 3), (3, 17, 190, 3), (1, 40, 18, 1)])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("weighted", [False, True])
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


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_kernels_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    env = os.environ | dict(TRITON_INTERPRET="1")
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
    def broken(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(losses_fused, "fused_image_terms", broken)
    kernels_work.cache_clear()
    with pytest.warns(UserWarning, match="plain ones are used: RuntimeError: no compiler"):
        assert not kernels_work(torch.device("cuda", 0))
    kernels_work.cache_clear()
