"""What a mask hides of the own vehicle is seen by nothing: two logs that differ there only have the same lift, the same
training, the same polish and the same scores to the last bit; returns in the vehicle's box are left out."""

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flux4d.background import init_gaussians
from flux4d.cache import LiftCache
from flux4d.city.logs import fixture_city
from flux4d.config import config_from_dict, merged
from flux4d.files import DataError
from flux4d.loader import Loader
from flux4d.pandaset import PandaSet
from flux4d.refine import Flux4D, FullConfig
from flux4d.run import Run
from flux4d.run_facts import About
from flux4d.score_clips import Evaluation, evaluate, one_clip_loader
from flux4d.train import Trainer
from flux4d.view_scores import EvalConfig

torch.set_num_threads(1)
HIDDEN = 96  # first hidden row: a multiple of eight, so that no block of a JPEG file has both sides
SMALL = dict(
    data=dict(loader_threads=1),
    init=dict(fill_blocks=[32, 16]),
    model=dict(unet=dict(widths=[8, 16], blocks=1), hidden=16, degree=1),
    refine=dict(unet=dict(widths=[8, 16], blocks=1)),
    train=dict(iters=2, warmup=1, log_every=1, eval_every=0, save_ckpt_every=0),
)


def log_with(folder: Path, seed: int | None, rig: str) -> Path:
    "A log whose images hold noise in the hidden rows, black without a seed; a data root."
    shutil.copytree(fixture_city(), folder)
    rng = np.random.default_rng(seed)
    images = sorted((folder / "001" / "camera" / "front_camera").glob("*.jpg"))
    for path in images:
        image = np.array(Image.open(path).convert("RGB"))
        hidden = image[HIDDEN:]
        image[HIDDEN:] = 0 if seed is None else rng.integers(0, 256, hidden.shape, np.uint8)
        Image.fromarray(image).save(path, quality=95, subsampling=0)
    mask = np.full(image.shape[:2], 255, np.uint8)
    mask[HIDDEN:] = 0
    Image.fromarray(mask).save(folder / "001" / "mask.png")
    (folder / "001" / "rig.yaml").write_text(rig)
    return folder


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    "The same log twice with a mask, with other pixels behind it."
    work, rig = tmp_path_factory.mktemp("own"), "cameras: {front_camera: {mask: mask.png}}\n"
    return [log_with(work / f"log{seed}", seed, rig) for seed in (1, 2)]


FEWER = dict(data=dict(image_scale=0.5), init=dict(voxel_downsample=1.0))  # pixels and returns: a step is short


def config(**changed):
    return config_from_dict(merged(SMALL, changed), FullConfig)


def lifted(root, cfg):
    return init_gaussians(PandaSet(root)["001"].clip(0), cfg.init, cfg.background)


def test_without_the_mask_the_pixels_matter(tmp_path):
    a, b = (lifted(log_with(tmp_path / str(seed), seed, ""), config()) for seed in (1, 2))
    assert len(a) != len(b) or not torch.equal(a.flat(), b.flat())


def test_a_lift_sees_nothing_behind_the_mask(roots):
    a, b = (lifted(root, config()) for root in roots)
    assert torch.equal(a.flat(), b.flat()) and torch.equal(a.t, b.t)


@pytest.fixture(scope="module")
def trained(roots, tmp_path_factory):
    "Two steps of the full model on each log, refinement included."
    found = []
    for root in roots:
        folder = tmp_path_factory.mktemp("runs")
        loader = Loader([PandaSet(root)["001"].clip(0)], config(**FEWER), LiftCache(folder / "cache"))
        trainer = Trainer(config(**FEWER), loader, Run(folder / "run"), kind=Flux4D)
        with redirect_stdout(io.StringIO()):
            trainer.fit()
        found.append(trainer)
    return found


def test_training_sees_nothing_behind_the_mask(trained):
    a, b = (torch.cat([p.flatten() for p in trainer.model.parameters()]) for trainer in trained)
    assert torch.equal(a, b)


def test_a_polish_sees_nothing_behind_the_mask(roots, trained):
    model = trained[0].ema.module.eval()
    scenes = [model.reconstruct(PandaSet(root)["001"].clip(0)) for root in roots]
    assert torch.equal(*(s.gaussians.flat() for s in scenes))
    for scene in scenes:
        scene.polish(steps=3)
    assert torch.equal(*(s.gaussians.flat() for s in scenes))


def test_scores_see_nothing_behind_the_mask(roots, trained, tmp_path):
    model = trained[0].ema.module.eval()
    found = []
    for k, root in enumerate(roots):
        loader = one_clip_loader([PandaSet(root)["001"].clip(0)], config(**FEWER), LiftCache(tmp_path / f"cache{k}"))
        how = Evaluation(
            model.reconstruct, loader, tmp_path / str(k), ("lift",), EvalConfig(save_renders=0), videos=0
        )
        with redirect_stdout(io.StringIO()):
            found.append(evaluate(About("test", "seen logs"), how)["nvs"])
    assert json.dumps(found[0]) == json.dumps(found[1])
    assert found[0]["full"]["interpolation"]["psnr"]["mean"] > 10


def test_returns_in_the_vehicles_box_are_left_out(tmp_path):
    root = tmp_path / "boxed"
    shutil.copytree(fixture_city(), root)
    log = PandaSet(root)["001"]
    points = log.sweep(0).points
    place = np.linalg.inv(log.ego_pose(0)) @ np.c_[points, np.ones(len(points))].T
    near = place[:3, np.linalg.norm(place[:2], axis=0).argmin()]
    box = [x for c in near for x in (round(float(c) - 0.5, 3), round(float(c) + 0.5, 3))]
    (root / "001" / "rig.yaml").write_text(f"own_box: {box}\n")
    boxed = PandaSet(root)["001"].sweep(0).points
    inside = ((place[:3].T > box[::2]) & (place[:3].T < box[1::2])).all(1)
    assert 0 < inside.sum() == len(points) - len(boxed)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda p: Image.new("L", (7, 5), 255).save(p), "7 x 5 pixels"),
        (lambda p: Image.new("L", Image.open(p).size, 0).save(p), "black everywhere"),
        (lambda p: p.unlink(), "mask.png"),
        (lambda p: p.write_bytes(b"no picture"), "mask.png"),
    ],
)
def test_a_mask_that_cannot_be_is_refused(tmp_path, spoil, said):
    root = log_with(tmp_path / "log", None, "cameras: {front_camera: {mask: mask.png}}\n")
    spoil(root / "001" / "mask.png")
    with pytest.raises(DataError, match=said):
        PandaSet(root)["001"].mask("front_camera")
