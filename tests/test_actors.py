"Actors and edits: what is refused, what stays untouched, and what labels never do."

from dataclasses import replace
import numpy as np
import pytest
import torch
from test_repo import reach
from flux4d.actors import find_actors
from flux4d.city.logs import fixture_city
from flux4d.config import config_from_dict
from flux4d.files import DataError
from flux4d.frames import ClipTime
from flux4d.model import build_model
from flux4d.pandaset import PandaSet
from flux4d.scene import Scene


@pytest.fixture(scope="module")
def scene() -> Scene:
    "A clip of the small city, reconstructed by an untrained network."
    torch.set_num_threads(1)
    model = build_model(config_from_dict({"model": {"degree": 1}})).eval()
    return model.reconstruct(PandaSet(fixture_city())["001"].clip(0, ("front_camera",)))


@pytest.fixture
def view(scene):
    "The front camera, half a second after the clip's start."
    return scene.camera("front_camera", seconds=0.5)


def sentence(error) -> str:
    "The message, which has to be one sentence with a remedy."
    text = str(error.value)
    assert text.endswith(".") and "; " in text and "\n" not in text, text
    return text


# what is refused


@pytest.mark.parametrize("number", [99, -1, "0", None, True, 1.0])
def test_no_such_actor(scene, number):
    for edit in (scene.without, scene.move):
        with pytest.raises(DataError) as error:
            edit(number)
        assert "choose from 0" in sentence(error)


def test_nothing_is_named(scene):
    with pytest.raises(DataError) as error:
        scene.without()
    assert "names no actor" in sentence(error)


def test_no_actor_where_nothing_moves(scene):
    with pytest.raises(DataError) as error:
        scene.moving(None).without(0)
    assert "nothing moves in this scene" in sentence(error)


def test_an_actor_of_another_scene_is_inserted_first(scene):
    with pytest.raises(DataError) as error:
        replace(scene).without(scene.actors[0])
    assert "insert it first" in sentence(error)


@pytest.mark.parametrize("seconds", [9.0, -1.6, float("nan"), float("inf")])
def test_time_outside_the_clip(scene, seconds):
    with pytest.raises(DataError) as error:
        scene.move(0, seconds=seconds)
    assert "the clip is 1.50 s long" in sentence(error)


@pytest.mark.parametrize("at", [[1, 2], np.eye(3), 2 * np.eye(4), np.diag([1, -1, 1, 1]), [np.nan, 0, 0]])
def test_no_place_and_no_pose(scene, at):
    with pytest.raises(DataError) as error:
        scene.insert(scene.actors[0], at=at)
    assert "at: is " in sentence(error)


@pytest.mark.parametrize("way", ["left", "forward"])
def test_no_distance(scene, way):
    with pytest.raises(DataError) as error:
        scene.move(0, **{way: float("inf")})
    assert f"{way}: is inf" in sentence(error)


# what an edit does


def test_edits_leave_the_scene_as_it_was(scene):
    means, velocity, source = scene.gaussians.means.clone(), scene.velocity.clone(), dict(scene.source)
    for edited in (scene.without(0), scene.move(1, left=2, seconds=0.2), scene.insert(scene.actors[0]), scene.static()):
        assert type(edited) is Scene and edited is not scene
        assert len(edited.source["edits"]) == 1
    assert (scene.gaussians.means == means).all() and (scene.velocity == velocity).all() and scene.source == source


def test_removal_changes_nothing_outside_the_silhouette(scene, view):
    before = scene.render(view).rgb[0]
    for actor in scene.actors:
        change = (scene.without(actor).render(view).rgb[0] - before).abs().mean(-1).numpy() * 255
        outside = ~actor.silhouette(view, grow=8)[0]
        assert change[outside].mean() < 0.1 and (change[outside] > 2).mean() < 0.01, actor


def test_the_colour_behind_everything_stays(scene, view):
    empty = replace(view, K=view.K.clone())
    bare = scene.without(*scene.actors)
    nothing = torch.zeros(len(bare), dtype=torch.bool)
    gone = replace(bare, gaussians=bare.gaussians[nothing], velocity=bare.velocity[nothing])
    lidar = scene.gaussians.colours[scene.gaussians.kind == 0].mean(0)
    assert torch.allclose(gone.render(empty).rgb[0], lidar.expand(view.height, view.width, 3), atol=1e-4)


def test_out_and_in_again(scene, view):
    actor = scene.actors[1]
    moved = scene.move(actor, left=3.0, forward=1.0).move(actor, left=-3.0, forward=-1.0)
    assert torch.allclose(moved.render(view).rgb, scene.without(actor).insert(actor).render(view).rgb, atol=0.05)
    assert np.allclose(moved.actors[1].pose(0.3), actor.pose(0.3), atol=1e-6)


def test_later_and_earlier_cancel(scene):
    actor = scene.actors[0]
    back = scene.move(actor, seconds=0.5).move(actor, seconds=-0.5)
    a = back.actors[0]
    assert np.allclose(a.pose(0.7), actor.pose(0.7), atol=1e-6)
    here, there = (s.means_at(0.5)[s.actors[0].mask] for s in (scene.move(actor), back))
    assert torch.allclose(here, there, atol=0.02)


def test_insert_into_a_scene_with_another_clock(scene):
    "Half a second after the start of a clip twice as long the guest is where it was half a second after its own."
    clock = ClipTime(scene.time.start + 500, scene.time.start + 500 + 2 * scene.duration)
    g = scene.gaussians
    host = replace(scene.static(), gaussians=replace(g[:1000], t=g.t[:1000] / 2), velocity=None, time=clock)
    actor = scene.actors[0]
    guest = host.insert(actor).actors[-1]
    assert len(host.insert(actor)) == 1000 + len(actor)
    assert np.allclose(guest.pose(0.5), actor.pose(0.5), atol=1e-6)
    both = host.insert(actor)
    placed = both.means_at(0.5 / both.duration)[guest.mask].mean(0)
    alone = scene.move(actor)
    wanted = alone.means_at(0.5 / scene.duration)[alone.actors[0].mask].mean(0)
    assert torch.allclose(placed, wanted, atol=0.02)


def test_insert_into_a_shorter_clip_keeps_own_times_inside(scene):
    short = replace(scene, time=ClipTime(scene.time.start, scene.time.start + 0.6))
    g = scene.gaussians[:10]
    short = replace(short, gaussians=replace(g, t=g.t.clamp(0, 1)), velocity=scene.velocity[:10])
    both = short.insert(scene.actors[0], seconds=0.3)
    assert both.gaussians.t.min() >= -0.101 and both.gaussians.t.max() <= 1.101
    t = 0.3 / 0.6
    placed = both.means_at(t)[both.actors[-1].mask].mean(0)
    alone = scene.move(0)
    assert torch.allclose(placed, alone.means_at(0.3 / scene.duration)[alone.actors[0].mask].mean(0), atol=0.02)


def test_degrees_of_motion_are_joined(scene):
    straight = scene.moving(scene.velocity[:, :1])
    assert straight.insert(scene.actors[0]).velocity.shape[1] == 2
    assert scene.insert(straight.actors[0]).velocity.shape[1] == 2


# actors


def test_the_same_scene_has_the_same_actors(scene):
    first, again = find_actors(scene), find_actors(replace(scene))
    assert [a.index for a in first] == [a.index for a in again] and len(first) > 2
    for a, b in zip(first, again):
        assert (a.mask == b.mask).all() and (a.track == b.track).all() and (a.size == b.size).all()


def test_actors_are_found_again_when_a_tensor_changed(scene):
    copy = scene.moving(scene.velocity.clone())
    before = copy.actors
    assert copy.actors is before
    copy.velocity.zero_()
    assert copy.actors == []


def test_numbers_stay_through_edits(scene):
    numbers = [a.index for a in scene.actors]
    gone = scene.without(1)
    assert [a.index for a in gone.actors] == [n for n in numbers if n != 1]
    more = gone.insert(scene.actors[1])
    assert [a.index for a in more.actors] == [n for n in numbers if n != 1] + [max(numbers) + 1]
    assert all(len(a.mask) == len(more) for a in more.actors)


def test_an_empty_scene_has_no_actors(scene):
    nothing = torch.zeros(len(scene), dtype=torch.bool)
    empty = replace(scene, gaussians=scene.gaussians[nothing], velocity=scene.velocity[nothing])
    assert empty.actors == [] and empty.static().actors == []


# labels


@pytest.mark.parametrize("module", ["actors", "edits"])
def test_actors_and_edits_lead_to_no_labels(module):
    assert not reach(module) & {"cuboids", "actor_scores", "flow_truth"}


def test_labels_are_not_needed(tmp_path, scene):
    "Without label files the same actors are found."
    whole = fixture_city() / "001"
    (tmp_path / "001").mkdir()
    for part in ("lidar", "camera", "meta"):
        (tmp_path / "001" / part).symlink_to(whole / part, target_is_directory=True)
    model = build_model(config_from_dict({"model": {"degree": 1}})).eval()
    bare = model.reconstruct(PandaSet(tmp_path)["001"].clip(0, ("front_camera",)))
    assert [len(a) for a in bare.actors] == [len(a) for a in scene.actors]


# what a scene leaves at rest


def test_a_scene_at_rest_has_no_actors(scene):
    assert scene.moving(None).actors == [] and scene.static().actors == []
