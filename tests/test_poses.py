"Pose corrections: what they may see, what they leave alone, what they refuse."
import json
from dataclasses import replace

import pytest
import torch

from flux4d.city.logs import fixture_city
from flux4d.clip_data import TargetViews, load_views
from flux4d.config import merged
from flux4d.files import DataError
from flux4d.model import build_model
from flux4d.pandaset import PandaSet
from flux4d.polish import PolishConfig, Polisher
from flux4d.pose_scores import pose_scores, pose_table, static_masks
from flux4d.poses import PoseConfig, carried, corrected, fit_poses, picture_pair, rotation_of
from flux4d.presets import preset_config
from flux4d.refine import Flux4D
from flux4d.scene import Scene
from flux4d.scene_file import load_scene

torch.set_num_threads(1)
SMALL = dict(
    init=dict(fill_blocks=[64, 32]),
    model=dict(hidden=16, degree=1, unet=dict(widths=[8, 16], blocks=1)),
)
QUICK = PoseConfig(passes=1, pools=(2,), rounds=(0.0, 0.5))


@pytest.fixture(scope="module")
def clip():
    "A second of the city."
    return PandaSet(fixture_city())["001"].clip(start=0)


@pytest.fixture(scope="module")
def made(clip) -> Scene:
    "Its reconstruction by a small model that was not trained."
    return build_model(preset_config("base", merged(SMALL, {})), Flux4D).eval().reconstruct(clip)


@pytest.fixture(scope="module")
def polished(made) -> Scene:
    "Polished for a few steps, poses corrected."
    return replace(made).polish(steps=4, cfg=PolishConfig(poses=QUICK))


def test_poses_are_taken_as_they_are_unless_asked(made):
    "The default draws the views it was given, and says nothing of corrections."
    polisher = Polisher(made, made.inputs.views)
    polisher.advance(0.0)
    assert polisher.aimed is polisher.views and not polisher.poses.any()
    assert "pose_corrections" not in replace(made).polish(steps=1).source


def test_corrections_are_kept_with_the_scene(polished, clip, tmp_path):
    "As plain numbers, in its file too."
    rows = polished.source["pose_corrections"]
    assert [row["frame"] for row in rows] == clip.input_frames
    assert any(row["pitch"] for row in rows) and not any(row["right"] for row in rows)
    json.dumps(rows)
    assert load_scene(polished.save(tmp_path / "a.scene")).source["pose_corrections"] == rows


def test_the_same_scene_every_time(made, polished):
    "Bit for bit."
    again = replace(made).polish(steps=4, cfg=PolishConfig(poses=QUICK))
    assert torch.equal(again.gaussians.flat(), polished.gaussians.flat())
    assert not torch.equal(replace(made).polish(steps=4).gaussians.flat(), polished.gaussians.flat())


def test_an_image_has_no_part_in_what_it_is_compared_with(made):
    "The picture of a pair stays when the Gaussians of its own frame change."
    views = made.inputs.views
    own = made.gaussians.frame == views.frame[2]
    logits = torch.where(own[:, None], 3.0, made.gaussians.colour_logits)
    spoilt = replace(made, gaussians=replace(made.gaussians, colour_logits=logits))
    cfg = replace(made.render_cfg, background=(0.5, 0.5, 0.5))
    first, second = (
        picture_pair(replace(x, render_cfg=cfg), views[2], None, PoseConfig()).picture for x in (made, spoilt)
    )
    assert torch.equal(first, second)


def test_the_mean_of_all_corrections_stays_zero(made):
    "In the axes of the world."
    views = made.inputs.views
    change = fit_poses(made, views, replace(QUICK, shift=True))
    to_world = views.world_to_cam[:, :3, :3].double().mT
    in_world = (to_world @ change.unflatten(1, (2, 3)).mT).mean(0)
    assert change.abs().max() > 1e-5
    assert in_world.abs().max() < 1e-6 * change.abs().max()  # axes are stored in float32


def test_what_is_carried_is_where_its_own_image_had_it(made):
    "A view and what came from it, moved together, show the same; and back again."
    views = made.inputs.views
    change = torch.zeros(len(views), 6, dtype=torch.float64)
    change[1] = torch.tensor([0.01, 0.02, -0.03, 0.1, -0.2, 0.3])
    rows = made.gaussians.frame == views.frame[1]
    moved = carried(made, views, change)
    assert torch.equal(moved.gaussians.means[~rows], made.gaussians.means[~rows])
    before = made.gaussians.means[rows].double() @ views.world_to_cam[1, :3, :3].double().T
    turned = corrected(views, change).world_to_cam[1].double()
    after = moved.gaussians.means[rows].double() @ turned[:3, :3].T + turned[:3, 3]
    wanted = before + views.world_to_cam[1, :3, 3].double()
    near = wanted.norm(dim=1) < 60
    assert (after - wanted)[near].abs().max() < 0.02  # a shift is applied before the turn, a product of small numbers
    assert carried(made, load_views(made.inputs.clip, [1], kind=TargetViews), change[:1]) is made


def test_a_clip_of_one_image_has_nothing_to_compare(made):
    "Its correction is none."
    views = made.inputs.views[:1]
    alone = made.gaussians.frame == views.frame[0]
    one = replace(made, gaussians=made.gaussians.map(lambda x: x[alone]), velocity=made.velocity[alone])
    assert not fit_poses(one, views, QUICK).any() and not fit_poses(one, views, QUICK, hold=False).any()


def test_a_mask_without_pixels_changes_nothing(made):
    views = made.inputs.views
    assert not fit_poses(made, views, QUICK, torch.zeros(len(views), views.height, views.width, dtype=torch.bool)).any()


def test_held_out_frames_are_scored_twice(made, clip):
    "A row a frame; the table's means are theirs."
    targets = load_views(clip, clip.target_frames[:2], kind=TargetViews, with_depth=False)
    rows = pose_scores(made, targets, static_masks(clip, targets, 1.0), QUICK)
    assert rows.frame.tolist() == clip.target_frames[:2] and {"recorded", "aligned", "pitch"} <= set(rows)
    table = pose_table(dict(lift=rows), clip.target_frames[:1])
    assert table.loc["lift", "aligned"] == rows.aligned[0]


def test_rotations_are_rotations():
    turn = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()
    made = rotation_of(turn)
    assert torch.allclose(made @ made.mT, torch.eye(3).double().expand(20, 3, 3), atol=1e-12)
    assert torch.allclose(torch.linalg.det(made), torch.ones(20).double())


WRONG = [
    (dict(per="log"), "per: is 'log'; choose image or camera"),
    (dict(rotation_sd=0), "rotation_sd: is 0; choose a number above 0"),
    (dict(shift_sd=float("nan")), "shift_sd: is nan; choose a number above 0"),
    (dict(pull=-1), "pull: is -1; choose a number above 0"),
    (dict(passes=0), "passes: is 0; choose a number above 0"),
    (dict(pools=(0,)), "pools: is .*; choose sides of squares"),
    (dict(rounds=()), "rounds: is .*; choose shares from 0 to 1"),
]


@pytest.mark.parametrize("given, said", WRONG, ids=lambda x: str(x)[:30])
def test_what_is_no_fit_is_refused(given, said):
    with pytest.raises(DataError, match=said) as fault:
        PoseConfig(**given)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("poses", [True, "image", dict(per="image")])
def test_another_type_is_refused(made, poses):
    own = replace(made)
    with pytest.raises(DataError, match=r"poses: is .*; hand over PoseConfig\(\)"):
        own.polish(steps=1, cfg=PolishConfig(poses=poses))
    assert torch.equal(own.gaussians.flat(), made.gaussians.flat())
