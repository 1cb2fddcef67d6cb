"A polish sees the input views and nothing else, keeps what stands still, and refuses what makes no sense."
import inspect
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flux4d.city.logs import fixture_city
from flux4d.clip_data import InputViews, TargetViews, load_views
from flux4d.config import merged
from flux4d.files import DataError
from flux4d.gaussians import LIDAR, velocity_at
from flux4d.model import build_model
from flux4d.pandaset import PandaSet
from flux4d.polish import PolishConfig, Polisher, motion_groups
from flux4d.presets import preset_config
from flux4d.refine import Flux4D
from flux4d.scene import Scene
from flux4d.scene_file import load_scene

torch.set_num_threads(1)
SMALL = dict(
    init=dict(fill_blocks=[64, 32]),
    model=dict(hidden=16, degree=1, unet=dict(widths=[8, 16], blocks=1)),
)
STEPS = 7  # every one of the six input views, and one of them again


@pytest.fixture(scope="module")
def model():
    "A small model that was not trained."
    torch.manual_seed(0)
    return build_model(preset_config("base", merged(SMALL, {})), Flux4D).eval()


@pytest.fixture(scope="module")
def clip():
    "A second of the city."
    return PandaSet(fixture_city())["001"].clip(start=0)


@pytest.fixture(scope="module")
def made(model, clip) -> Scene:
    "Its reconstruction; tests polish copies of it."
    return model.reconstruct(clip)


@pytest.fixture(scope="module")
def polished(made) -> Scene:
    "After a few steps."
    return replace(made).polish(steps=STEPS)


def same(a: Scene, b: Scene) -> bool:
    "Equal bit for bit."
    return torch.equal(a.gaussians.flat(), b.gaussians.flat()) and torch.equal(a.velocity, b.velocity)


def with_noise(path: Path, rng: np.random.Generator) -> None:
    "Another image of the same size; a sweep of the same length that is nowhere."
    if path.suffix == ".jpg":
        with Image.open(path) as image:
            size = image.size
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
        return
    import pandas as pd

    sweep = pd.read_pickle(path)
    numbers = sweep.select_dtypes("number").columns
    if path.parent.name == "lidar":
        numbers = ["x", "y", "z"]
    spoilt = sweep.assign(**{name: np.full(len(sweep), np.nan) for name in numbers if sweep[name].dtype.kind == "f"})
    spoilt.to_pickle(path)


def unreadable(path: Path, rng: np.random.Generator) -> None:
    "Bytes that are no file of its kind."
    path.write_bytes(rng.bytes(100))


@pytest.mark.parametrize("spoil", [with_noise, unreadable])
def test_no_target_is_seen(model, clip, polished, tmp_path, spoil):
    "Images, returns and labels of every other frame are replaced on disk; the polished scene stays, bit for bit."
    shutil.copytree(fixture_city() / "001", tmp_path / "001")
    rng = np.random.default_rng(0)
    inputs = {f"{frame:02d}" for frame in clip.input_frames}
    spoilt = [
        path
        for path in sorted((tmp_path / "001").rglob("*"))
        if path.name.split(".")[0].isdigit() and path.name.split(".")[0] not in inputs
    ]
    assert {path.parent.name for path in spoilt} >= {"lidar", "front_camera"}
    assert {f"{frame:02d}" for frame in clip.target_frames} <= {path.name.split(".")[0] for path in spoilt}
    for path in spoilt:
        spoil(path, rng)
    again = model.reconstruct(PandaSet(tmp_path)["001"].clip(start=0)).polish(steps=STEPS)
    assert same(again, polished)


def test_target_views_are_refused(made, clip):
    "By type, by the polisher and by the method; and input views cannot hold a target."
    targets = load_views(clip, clip.target_frames[:1], kind=TargetViews)
    with pytest.raises(TypeError, match="polish works on InputViews only, got TargetViews"):
        Polisher(made, targets)
    with pytest.raises(DataError, match="inputs: is TargetViews; hand over model.inputs"):
        replace(made).polish(steps=1, inputs=targets)
    with pytest.raises(ValueError, match="a clip never leaks its targets"):
        InputViews(**vars(targets), allowed=tuple(clip.input_frames))


def test_an_input_photo_is_seen(made, model, clip, polished):
    "The other way round: what the input views show does change the polish."
    inputs = model.inputs(clip)
    inputs.views = replace(inputs.views, images=1 - inputs.views.images)
    assert not same(replace(made).polish(steps=STEPS, inputs=inputs.views), polished)


def test_what_stands_still_keeps_its_velocity(made, polished):
    "Bit for bit; what moves may change."
    times = made.inputs.views.t
    middle = float(times.min() + times.max()) / 2
    speed = velocity_at(made.velocity, middle, made.duration).norm(dim=1)
    rest = (speed <= PolishConfig().least_speed) | (made.gaussians.kind != LIDAR)
    assert rest.any() and not rest.all()
    assert torch.equal(polished.velocity[rest], made.velocity[rest])
    rows = motion_groups(made, middle).rows
    changed = (polished.velocity - made.velocity).abs().amax((1, 2)) > 0
    assert not rest[rows].any() and changed[rows].any()
    assert not changed[~torch.isin(torch.arange(len(made)), rows)].any()


def test_a_scene_without_motion_can_be_polished(made):
    "Nothing moves before, nothing moves after."
    still = made.moving(None).polish(steps=STEPS)
    assert still.velocity is None and not torch.equal(still.gaussians.flat(), made.gaussians.flat())
    at_rest = made.moving(torch.zeros_like(made.velocity)).polish(steps=STEPS)
    assert not at_rest.velocity.any()


def test_steps_give_the_same_scene_every_time(made, polished):
    "And another seed gives another one."
    assert same(replace(made).polish(steps=STEPS), polished)
    assert not same(replace(made).polish(steps=STEPS, cfg=PolishConfig(seed=1)), polished)
    assert polished.source["polish_steps"] == STEPS


def test_the_scene_is_changed_in_place_and_returned(made):
    "Its copies are not."
    own = replace(made)
    assert own.polish(steps=1) is own and not same(own, made)


def test_seconds_are_wall_clock_time(made):
    "At least one step; at most the budget and a step."
    import time

    begin = time.perf_counter()
    one = replace(made).polish(steps=1)
    longest = time.perf_counter() - begin
    begin = time.perf_counter()
    hurried = replace(made).polish(seconds=1e-6)
    assert one.source["polish_steps"] == hurried.source["polish_steps"] == 1
    assert time.perf_counter() - begin < 5 * longest + 1


BUDGETS = [
    (dict(seconds=1, steps=1), "has both seconds and steps; leave one of the two out"),
    *(
        (dict(seconds=s), "seconds: is .*; choose a number above 0")
        for s in (0, -1, float("nan"), float("inf"), "2", True)
    ),
    *((dict(steps=n), "steps: is .*; choose a whole number above 0") for n in (0, -3, 1.5, "8", True)),
]


@pytest.mark.parametrize("budget, said", BUDGETS, ids=lambda x: str(x)[:30])
def test_a_budget_that_is_none_is_refused(made, budget, said):
    own = replace(made)
    with pytest.raises(DataError, match=said) as fault:
        own.polish(**budget)
    assert "\n" not in str(fault.value) and same(own, made)


def test_a_scene_from_a_file_is_told_its_inputs(made, model, clip, tmp_path, polished):
    "It has none of its own: one sentence says how to hand them over, and then the polish is the same."
    path = made.save(tmp_path / "scene.flux4d")
    loaded = load_scene(path)
    with pytest.raises(DataError, match=r"has no input views.*scene\.polish\(\.\.\., inputs=model\.inputs\(clip\)\)"):
        loaded.polish(steps=1)
    loaded.polish(steps=STEPS, inputs=model.inputs(clip))
    assert loaded.source["polish_steps"] == STEPS


def test_inputs_of_another_clip_are_refused(made, model):
    other = PandaSet(fixture_city())["001"].clip(start=4)
    with pytest.raises(DataError, match="take that clip's"):
        replace(made).polish(steps=1, inputs=model.inputs(other))
    with pytest.raises(DataError, match="inputs: is str; hand over"):
        replace(made).polish(steps=1, inputs="001")


def test_a_polish_that_diverges_leaves_the_scene_alone(made):
    own = replace(made)
    with pytest.raises(DataError, match="take smaller steps"):
        own.polish(steps=4, cfg=PolishConfig(colour_step=float("inf")))
    assert same(own, made)


def test_every_parameter_is_documented():
    "Each has a type, and a comment beside it."
    text = inspect.getsource(Scene.polish)
    for name in list(inspect.signature(Scene.polish).parameters)[1:]:
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{name}:"))
        assert "#" in line, name
