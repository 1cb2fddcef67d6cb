"Which returns travel with what moves: nothing changes where the test is off, and it is asked for in one place."

from dataclasses import replace
import pytest
import torch
from flux4d.config import config_from_dict, config_to_dict
from flux4d.files import DataError
from flux4d.membership import MembershipConfig, member_motion_prior
from flux4d.motion_inputs import MotionInputs, motion_features, unpack_prior
from flux4d.motion_prior import estimate_motion_prior
from flux4d.occupancy import SweepPoints, street_sweeps
from flux4d.presets import PRESETS, preset_config
from flux4d.refine import FullConfig
from flux4d.voxels import VoxelConfig

GRID = VoxelConfig(low=(-5.0, -25.0, -3.0), high=(65.0, 25.0, 5.0))
ON = MembershipConfig(edge=0.3)


@pytest.fixture(scope="module")
def street():
    torch.set_num_threads(1)
    points, sweep, part = street_sweeps()
    return SweepPoints(points, sweep * 0.2, sweep), part


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def test_presets_but_the_papers_test_points_and_a_configuration_without_the_fields_has_it_off():
    assert {name for name in PRESETS if preset_config(name).model.membership.edge == 0} == {"paper"}
    values = config_to_dict(preset_config("default"))
    del values["model"]["membership"]
    assert config_from_dict(values, FullConfig).model.membership == MembershipConfig()


@pytest.mark.parametrize("wrong", [dict(edge=-1.0), dict(margin=2.0), dict(cell=0.0), dict(edge="wide")])
def test_a_value_out_of_range_is_named(wrong):
    with pytest.raises(DataError, match=f"membership.{next(iter(wrong))}: is "):
        preset_config("default", dict(model=dict(membership=wrong)))


def test_what_the_network_is_shown_follows_the_switch(street):
    returns, part = street
    on = motion_features(returns, None, GRID, MotionInputs(membership=ON))
    off = motion_features(returns, None, GRID, MotionInputs())
    assert torch.equal(on.local, off.local) and not torch.equal(on.prior, off.prior)
    shown = unpack_prior(on.prior, MotionInputs().velocity_scale)
    assert torch.equal(shown.trusted, member_motion_prior(returns, GRID, membership=ON).trusted)


def test_points_outside_the_grid_and_sweeps_without_movers_are_no_fault(street):
    returns, part = street
    far = returns.part(part == 1)._replace(points=returns.points[part == 1] + 500.0)
    asked = SweepPoints(*(torch.cat([a, b]) for a, b in zip(returns, far)))
    found = member_motion_prior(returns, GRID, query=asked, membership=ON)
    assert not found.trusted[len(part) :].any()
    rest = returns.part(part != 2)
    quiet = member_motion_prior(rest, GRID, membership=ON)
    plain = estimate_motion_prior(rest, GRID)
    assert quiet.trusted.sum() <= plain.trusted.sum() and quiet.may_move.sum() < plain.may_move.sum()
    none = returns.part(torch.zeros(len(part), dtype=torch.bool))
    assert same(member_motion_prior(none, GRID, query=far, membership=ON), estimate_motion_prior(none, GRID, query=far))


def test_a_query_changes_nothing(street):
    returns, part = street
    some = part == 2
    whole = member_motion_prior(returns, GRID, membership=ON)
    apart = member_motion_prior(returns, GRID, query=returns.part(some), membership=ON)
    assert same(apart, type(whole)(*(a[some] for a in whole)))
    assert replace(ON, edge=0.0) == MembershipConfig()
