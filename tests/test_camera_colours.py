"""Two cameras of which one is darker: the lift has the first one's colours, and each view its own camera's."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from flux4d import camera_colours
from flux4d.baselines import still
from flux4d.camera_colours import clip_tones, to_reference
from flux4d.city.logs import make_city
from flux4d.clip_data import InputViews, load_views
from flux4d.config import Config, DataConfig
from flux4d.files import DataError
from flux4d.gap_filling import InitConfig
from flux4d.image_metrics import psnr
from flux4d.model import read_inputs
from flux4d.pandaset import PandaSet
from flux4d.refine import RefineConfig, feedback
from flux4d.scene_file import load_scene
from flux4d.tensor_file import read_tensors, write_tensors

TWO = ("front_camera", "front_left_camera")
FRAMES = 16


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    "The city as two equal cameras see it, and with a second camera that is darker."
    work = tmp_path_factory.mktemp("colours")
    make_city(work / "equal", 1, FRAMES, 0.12, cameras=TWO, workers=1, step=1.5)
    shutil.copytree(work / "equal", work / "darker")
    for path in (work / "darker/001/camera" / TWO[1]).glob("*.jpg"):
        levels = np.array(Image.open(path), float) * [0.6, 0.7, 0.65] + 5
        Image.fromarray(levels.round().astype(np.uint8)).save(path, quality=95)
    return {name: PandaSet(work / name)["001"] for name in ("equal", "darker")}


@pytest.fixture(autouse=True)
def whole_images(monkeypatch):
    "At a quarter, images of 230 px hold too few cells."
    monkeypatch.setattr(camera_colours, "TONE_SCALE", 1.0)


def lift_of(log, cameras=TWO, **init):
    cfg = Config(data=DataConfig(cameras=cameras), init=InitConfig(fill_blocks=(64, 32), **init))
    return still(read_inputs(log.clip(0, list(cameras)), cfg))


def psnr_in(scene, log, camera):
    clip = log.clip(0, list(TWO))
    view = load_views(clip, [clip.input_frames[0]], (camera,), with_depth=False)
    return float(psnr(scene.render(view).rgb, view.images))


def test_the_curve_is_that_of_the_darker_camera(logs):
    clip = logs["darker"].clip(0, list(TWO))
    tones = clip_tones(clip)
    assert list(tones) == [TWO[1]] and clip_tones(clip) is tones  # read once
    true = torch.linspace(0.2, 0.6, 20)[:, None].expand(-1, 3)
    seen = true * torch.tensor([0.6, 0.7, 0.65]) + 5 / 255
    assert (to_reference(seen, tones[TWO[1]]) - true).abs().max() < 0.06
    assert clip_tones(clip, [TWO[0]]) == {}


def test_equal_cameras_keep_their_colours(logs):
    for curve in clip_tones(logs["equal"].clip(0, list(TWO))).values():
        assert (curve - torch.linspace(0, 1, 256)).abs().max() < 0.06


def test_each_camera_is_drawn_in_its_own_colours(logs):
    log = logs["darker"]
    matched, plain = lift_of(log), lift_of(log, match_colours=False)
    assert list(matched.tones) == [TWO[1]] and plain.tones == {}
    assert psnr_in(matched, log, TWO[1]) > psnr_in(plain, log, TWO[1]) + 0.5
    assert psnr_in(matched, log, TWO[0]) > psnr_in(plain, log, TWO[0]) - 0.05
    free = matched.render(matched.camera(TWO[1], 0.0)).rgb  # a view without a camera's name has the first one's colours
    assert free.mean() > 1.2 * plain.render(plain.camera(TWO[1], 0.0)).rgb.mean()


def test_one_camera_has_no_curve(logs):
    on, off = (lift_of(logs["darker"], TWO[:1], match_colours=k) for k in (True, False))
    assert on.tones == {} and torch.equal(on.gaussians.flat(), off.gaussians.flat())


def test_feedback_compares_in_the_cameras_own_colours(logs):
    log = logs["darker"]
    clip, scene = log.clip(0, list(TWO)), lift_of(log)
    views = load_views(clip, [clip.input_frames[0]], TWO, kind=InputViews)
    found = feedback(scene, views, RefineConfig())
    assert found.grad.isfinite().all()
    drawn = scene.render(views).rgb
    assert (drawn[1] - views.images[1]).mean().abs() < 0.02  # no camera is too bright as a whole


def test_curves_are_saved_with_the_scene(logs, tmp_path):
    scene = lift_of(logs["darker"])
    path = scene.save(tmp_path / "a.scene")
    again = load_scene(path)
    assert torch.equal(again.tones[TWO[1]], scene.tones[TWO[1]])
    content = read_tensors(path, "flux4d-scene", 1)
    content.tensors[f"tones.{TWO[1]}"] = scene.tones[TWO[1]].flip(1)
    with pytest.raises(DataError, match="colour curve of camera 'front_left_camera' that does not rise"):
        load_scene(write_tensors(tmp_path / "b.scene", content, "flux4d-scene", 1))
    content.tensors[f"tones.{TWO[1]}"] = scene.tones[TWO[1]][:, :7].clone()
    with pytest.raises(DataError, match="tones.front_left_camera of shape"):
        load_scene(write_tensors(tmp_path / "c.scene", content, "flux4d-scene", 1))
