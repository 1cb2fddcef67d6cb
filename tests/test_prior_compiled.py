"""The motion prior's compiled steps beside the tensor operations: whole priors, random maps, threads, a missing
package, Ctrl-C."""

import signal
import pytest
import torch
from flux4d import compiled_code, compiled_matching
from flux4d.compiled_code import have_numba, in_threads, runs_compiled
from flux4d.compiled_matching import compiled_heights, compiled_maps, compiled_scores
from flux4d.matching import match_scores
from flux4d.membership import MembershipConfig, member_motion_prior
from flux4d.occupancy import BevGrid, Occupancy, SweepPoints, grown_mask, height_above_ground, street_sweeps
from flux4d.voxels import VoxelConfig

pytestmark = pytest.mark.skipif(not have_numba(), reason="numba is not installed")
GRID = VoxelConfig(low=(-5.0, -25.0, -3.0), high=(65.0, 25.0, 5.0))
ON = MembershipConfig(edge=0.3)


def street(velocity=(11.0, -4.0)):
    points, sweep, part = street_sweeps(1, velocity)
    return SweepPoints(points, sweep * 0.2, sweep)


def without_numba(monkeypatch):
    monkeypatch.setattr(compiled_code, "numba", None)


@pytest.mark.parametrize("velocity", [(11.0, -4.0), (0.0, 0.0)])
@pytest.mark.parametrize("membership", [ON, MembershipConfig()])
@pytest.mark.parametrize("nearer_than", [70.0, 24.0])
def test_a_prior_is_that_of_tensor_operations(monkeypatch, velocity, membership, nearer_than):
    returns = street(velocity)
    returns = returns.part(returns.points[:, 0] < nearer_than)  # also a cloud that shows a part of what is around
    asked = SweepPoints(
        torch.cat([returns.points + 0.2, returns.points[:9] + 300.0]), *(torch.cat([x, x[:9]]) for x in returns[1:])
    )
    given = dict(query=asked, membership=membership, find_view=True)
    own = member_motion_prior(returns, GRID, **given)
    without_numba(monkeypatch)
    assert not runs_compiled(returns.points)
    plain = member_motion_prior(returns, GRID, **given)
    for name in ("score", "zero_motion_score", "trusted", "may_move"):
        assert torch.equal(getattr(own, name), getattr(plain, name)), name
    assert plain.trusted.any() == (velocity != (0.0, 0.0))
    assert (own.velocity - plain.velocity).abs().max() < 2e-3
    assert (own.acceleration - plain.acceleration).abs().max() < 4e-3


@pytest.mark.parametrize("sweeps, steps, reach, block", [(6, 3, 4, 4), (2, 3, 7, 3), (3, 1, 1, 1), (4, 2, 5, 7)])
def test_scores_of_random_maps(sweeps, steps, reach, block):
    gen = torch.Generator().manual_seed(reach)
    bev = BevGrid((0.0, 0.0), (31, 22), 0.25, reach * steps, block)
    inner = torch.zeros(sweeps, *bev.size, dtype=torch.bool)
    B = bev.border
    inner[:, B : B + 31, B : B + 22] = True
    occupied, observed = (inner & (torch.rand(inner.shape, generator=gen) < share) for share in (0.2, 0.7))
    maps = Occupancy(occupied, observed)
    own = compiled_scores(maps, grown_mask(occupied, 1), bev, reach, steps)
    plain = match_scores(maps, bev, reach, steps)
    assert all(torch.equal(a, b) for a, b in zip(own[:3], plain[:3])) and 0 < own.score.max() <= 1
    assert all(torch.equal(a, b) for a, b in zip(own.blocks[:2], plain.blocks[:2]))


@pytest.mark.parametrize("points", [1, 3, 4, 500])
@pytest.mark.parametrize("share", [0.0, 0.35, 0.99])
def test_heights_of_random_points(points, share):
    gen = torch.Generator().manual_seed(points)
    p = torch.randn(points, 3, generator=gen) * torch.tensor([5.0, 3.0, 1.0])
    p[::2] = p[::2].round()  # equal heights too
    query = torch.randn(40, 3, generator=gen) * 20
    own = torch.cat(compiled_heights(p, query, 1.5, share))
    assert torch.equal(own, height_above_ground(p, 1.5, share, query=torch.cat([p, query])))


def test_the_same_bits_at_any_number_of_threads(monkeypatch):
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(compiled_code, "worker_threads", lambda: threads)
        prior = member_motion_prior(street(), GRID, membership=ON)
        found.append([x.numpy().tobytes() for x in prior])
    assert found[0] == found[1] == found[2]


def test_what_is_compiled_is_asked_for_single_precision_on_the_processor():
    x = torch.zeros(3)
    assert runs_compiled(x) and not runs_compiled(x.double()) and not runs_compiled(x.to("meta"))


def test_tensors_in_any_order_of_memory():
    returns = street()
    bev = BevGrid(GRID.low[:2], (280, 200), 0.25, 4, 4)
    turned = returns._replace(points=returns.points.T.contiguous().T)
    given = returns.points[:, 2], 6, bev, (0.3, 3.0), 0.75
    for a, b in zip(compiled_maps(returns, *given), compiled_maps(turned, *given)):
        assert torch.equal(a, b) and a.any()


def test_an_interrupt_waits_until_compiled_code_has_ended(monkeypatch):
    ended = []

    def struck(kernel, *args):
        if not ended:
            signal.raise_signal(signal.SIGINT)
        in_threads(kernel, *args)
        ended.append(kernel)

    monkeypatch.setattr(compiled_matching, "in_threads", struck)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            member_motion_prior(street(), GRID, membership=ON)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == 2 * [compiled_matching.heights_over]  # of the returns, and of the points that ask
