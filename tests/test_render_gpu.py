"""gsplat against the plain-torch twin: pictures and gradients. Needs a GPU; `pytest tests/test_render_gpu.py
-s` prints every difference."""

import pytest
import torch
from torch import tensor
from flux4d.gaussians import BACKGROUND, LIDAR, Gaussians
from flux4d.render import Cameras, RenderConfig, compare_backends, render

if not torch.cuda.is_available():
    pytest.skip("no GPU here: gsplat's kernels need one", allow_module_level=True)
pytest.importorskip("gsplat", reason="gsplat is not installed")


def GEN():
    return torch.Generator().manual_seed(0)


def scene(n=4000, sky=400, coefficients=1):
    "Long thin Gaussians in view, beside it, behind it and far away, and their velocities; on the GPU."
    gen = GEN()

    def rand(*shape):
        return torch.rand(*shape, generator=gen)

    def randn(*shape):
        return torch.randn(*shape, generator=gen)

    far = torch.arange(n + sky) >= n
    z = torch.where(far, 1200 + 800 * rand(n + sky), 40 * rand(n + sky) - 4)
    means = torch.stack(
        [(rand(n + sky) - 0.5) * 1.6 * z.abs().clamp_min(2), (rand(n + sky) - 0.5) * z.abs().clamp_min(2), z],
        -1,
    )
    sizes = (0.002 + 0.02 * rand(n + sky, 3)) * z.abs()[:, None].clamp_min(1)
    g = Gaussians(
        means,
        randn(n + sky, 4),
        sizes.expm1().log(),
        2 * randn(n + sky),
        randn(n + sky, 3),
        rand(n + sky),
        torch.zeros(n + sky).long(),
        torch.where(far, BACKGROUND, LIDAR),
    )
    v = randn(n + sky, coefficients, 3) * 5 * (~far)[:, None, None]
    return g.to("cuda"), v.cuda()


def cameras(width=200, height=117):  # not multiples of the kernels' tiles
    turn = torch.eye(4).repeat(3, 1, 1)
    turn[1, :3, 3] = tensor([0.5, -0.2, 1.0])
    turn[2, 0, 0] = turn[2, 2, 2] = 0.98
    turn[2, 0, 2], turn[2, 2, 0] = 0.199, -0.199
    K = tensor([[180.0, 0, 97.3], [0, 176.0, 60.8], [0, 0, 1]]).repeat(3, 1, 1)
    return Cameras(K, turn, tensor([0.0, 0.4, 1.0]), height, width).to("cuda")


def check(found):
    print("", *(f"{k:20s}{v:.1e}" for k, v in found.items()), sep="\n  ")
    assert found["rgb mean"] < 2e-5 and found["alpha mean"] < 2e-5 and found["features mean"] < 2e-5
    assert found["rgb max"] < 5e-2 and found["alpha max"] < 2e-2  # one or two skipped Gaussians in a pixel
    assert max(v for k, v in found.items() if k.startswith("d ")) < 5e-3


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("coefficients", [1, 2])
def test_twins_agree(antialiased, coefficients):
    g, v = scene(coefficients=coefficients)
    check(
        compare_backends(
            g,
            v,
            1.5,
            cameras(),
            torch.rand(len(g), 3, generator=GEN()).cuda(),
            RenderConfig(antialiased=antialiased),
        )
    )


@pytest.mark.parametrize("channels", [1, 6, 32])  # with colour and depth 5, 10 (padded), and 36 (two passes)
def test_twins_agree_on_features_of_each_view(channels):
    g, v = scene(1500, 100)
    check(compare_backends(g, v, 1.0, cameras(), torch.randn(3, len(g), channels, generator=GEN()).cuda()))


@pytest.mark.parametrize("channels", [0, 1, 3, 4])  # with colour and depth 5, 6 and 8 (both drawn as 8), 9
@pytest.mark.parametrize("antialiased", [False, True])
def test_tiles_are_gsplat_with_another_gradient(channels, antialiased):
    """Pictures are gsplat's own. Its gradient begins with 1 - alpha, which has lost three digits where a pixel is full,
    and ours does not: hence 5e-4 of the length, and 3e-5 between ours and float64 in `test_fast.py`."""
    g, v = scene()
    features = torch.rand(len(g), max(channels, 1), generator=GEN()).cuda()
    cfg = RenderConfig(antialiased=antialiased)
    if channels:
        found = compare_backends(g, v, 1.5, cameras(), features, cfg, backends=("tiles", "gsplat"))
        print("", *(f"{k:20s}{v:.1e}" for k, v in found.items()), sep="\n  ")
        assert all(x == 0 for k, x in found.items() if k[:2] != "d ")
        assert max(x for k, x in found.items() if k[:2] == "d ") < 5e-4
        return
    grads = []
    for backend in ("tiles", "gsplat"):
        raw = g.flat().detach().requires_grad_()
        out = render(g.with_flat(raw), v, 1.5, cameras(), RenderConfig(backend=backend, antialiased=antialiased))
        (d,) = torch.autograd.grad((out.rgb * torch.linspace(0, 1, out.rgb.numel()).cuda().view_as(out.rgb)).sum(), raw)
        grads.append(d)
    assert (grads[0] - grads[1]).norm() < 5e-4 * grads[1].norm()


def test_a_batch_of_views_is_its_views_one_by_one():
    g, v = scene()
    views = cameras()
    both = render(g, v, 1.5, views)
    for i in range(3):
        one = render(
            g,
            v,
            1.5,
            Cameras(
                views.K[i : i + 1],
                views.world_to_cam[i : i + 1],
                views.t[i : i + 1],
                views.height,
                views.width,
            ),
        )
        for a, b in zip(both[:3], one[:3]):
            assert torch.equal(a[i], b[0])


def test_auto_takes_gsplat_and_the_sky_is_in_it():
    g, v = scene()
    sky = g[g.kind == BACKGROUND]
    views = cameras()
    auto, named = (render(sky, None, 1.0, views, RenderConfig(backend=b)) for b in ("auto", "gsplat"))
    assert torch.equal(auto.rgb, named.rgb) and auto.alpha.max() > 0.3
    assert render(sky, None, 1.0, views, RenderConfig(far=200.0)).alpha.max() == 0
