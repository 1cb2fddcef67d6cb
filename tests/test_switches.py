"""Switches that restore what the paper is known to have done: each changes what it names, and all of them
train together."""

import io
from contextlib import redirect_stdout
from dataclasses import replace

import numpy as np
import pytest
import torch

from flux4d.background import BackgroundConfig, init_gaussians
from flux4d.cache import LiftCache
from flux4d.city.logs import fixture_city
from flux4d.clips import Clip, ClipConfig, build_index, select_clips
from flux4d.gaussians import BACKGROUND, LIDAR
from flux4d.gap_filling import InitConfig
from flux4d.losses import LossConfig
from flux4d.pandaset import PandaSet
from flux4d.predictor import PredictorConfig
from flux4d.decode import decode_velocity
from flux4d.motion_inputs import motion_feature_count
from flux4d.records import repo_root
from flux4d.presets import PRESETS, preset_config, preset_table
from flux4d.refine import Flux4D, FullConfig, RefineConfig, feedback
from flux4d.loader import Loader
from flux4d.train import Trainer
from flux4d.config import config_from_dict, merged
from flux4d.run import Run
from flux4d.occupancy import MotionPriorConfig

SMALL = dict(
    data=dict(image_scale=0.25, loader_threads=1),
    init=dict(fill_blocks=[64, 32]),
    voxel=dict(size=0.4),
    model=dict(unet=dict(widths=[8, 16], blocks=1), hidden=16),
    refine=dict(unet=dict(widths=[8, 16], blocks=1)),
    train=dict(iters=2, warmup=1, log_every=1, eval_every=0, save_ckpt_every=0),
)
TINY_SKY = dict(
    paper=dict(background=dict(num_sky_points=20_000, inside_points=2_000))
)  # a million points take longer than the test may


@pytest.fixture(scope="module")
def clips():
    torch.set_num_threads(1)
    root = fixture_city()
    return [Clip(PandaSet(root)[r["scene_id"]], r) for r in select_clips(build_index(root, ClipConfig()))]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_train(clips, tmp_path, name):
    cfg = preset_config(name, merged(SMALL, TINY_SKY.get(name, {})))
    loader = Loader(clips[:1], cfg, LiftCache(tmp_path / "cache"))
    trainer = Trainer(cfg, loader, Run(tmp_path / "run"), kind=Flux4D)
    before = [p.clone() for p in trainer.model.parameters()]
    with redirect_stdout(io.StringIO()):
        rows = trainer.fit()
    assert len(rows) == 2 and trainer.skipped == 0
    assert all(np.isfinite(r[k]) for r in rows for k in ("total", "rgb", "ssim", "depth", "vel", "psnr"))
    assert any((p != q).any() for p, q in zip(before, trainer.model.parameters()))
    with torch.no_grad():
        scene = trainer.ema.module.eval().reconstruct(loader.batch(2).inputs)
    g, velocity = scene.gaussians, scene.velocity
    assert g.flat().isfinite().all() and velocity.shape == (len(g), cfg.model.degree + 1, 3)
    if name == "paper":
        assert len(g.t[g.kind == LIDAR].unique()) == len(clips[0].input_frames)


def test_points_inside_the_sphere_join_the_near_field(clips):
    bare, some = (
        init_gaussians(
            clips[0],
            InitConfig(fill=False),
            BackgroundConfig("hemisphere", num_sky_points=2000, inside_points=n),
        )
        for n in (0, 2000)
    )
    more = len(some) - len(bare)
    near = (bare.kind == LIDAR).sum().item()
    assert more > 50
    assert torch.equal(some[:near].flat(), bare[:near].flat())
    assert (some.kind[near : near + more] == LIDAR).all() and (some.kind[near + more :] == BACKGROUND).all()
    assert torch.allclose(some.opacities[near : near + more], torch.tensor(0.5))


def test_speed_is_counted_per_clip_in_training(clips, tmp_path):
    cfg = config_from_dict(SMALL, FullConfig)
    loader = Loader(clips[:1], cfg, LiftCache(tmp_path / "cache"))
    b = loader.batch(0)
    lift = b.inputs.scene
    moving = lift.moving(torch.ones(len(lift), 1, 3))
    per = {}
    for unit in ("second", "clip"):
        trainer = Trainer(
            replace(cfg, loss=LossConfig(velocity_unit=unit)), loader, Run(tmp_path / unit), kind=Flux4D
        )
        per[unit] = float(trainer.losses(b, moving)["vel"])
    assert per["second"] == pytest.approx(3**0.5) and per["clip"] == pytest.approx(
        3**0.5 * b.clip.time.duration
    )


def test_feedback_of_the_training_loss_follows_its_weights(clips, tmp_path):
    cfg = config_from_dict(SMALL, FullConfig)
    b = Loader(clips[:1], cfg, LiftCache(tmp_path / "cache")).batch(0)
    lift = b.inputs.scene
    still = lift.moving(torch.zeros(len(lift), 1, 3))
    tell = RefineConfig(error="training", normalisation="plain")

    def say(loss, how=tell):
        return feedback(still, b.inputs.views, how, loss).grad

    once, twice = say(LossConfig()), say(LossConfig(rgb=1.6, ssim=0.4, depth=0.02))
    assert torch.allclose(2 * once, twice, atol=1e-4 * once.abs().max().item())
    assert not torch.equal(once, say(LossConfig(depth=0.0)))
    assert torch.equal(say(LossConfig(), RefineConfig()), say(LossConfig(rgb=0.0), RefineConfig()))


def test_no_prior_no_local_velocity_no_dead_zone():
    free = PredictorConfig(motion_prior=MotionPriorConfig(reach=0), local_velocity_cells=(), dead_zone=0.0)
    assert motion_feature_count(free.motion_inputs) == 0
    assert motion_feature_count(PredictorConfig().motion_inputs) == 16 + 8
    raw = 1e-3 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    ask = (raw, None, torch.zeros(50), torch.eye(4))
    assert torch.equal(decode_velocity(*ask, free.decoding, use_dead_zone=True), decode_velocity(*ask, free.decoding))
    assert (decode_velocity(*ask, replace(free, dead_zone=0.5).decoding, use_dead_zone=True) == 0).all()


def test_the_page_of_presets_is_todays():
    assert preset_table() in (repo_root() / "docs/presets.md").read_text(encoding="utf-8"), "run make readme"
