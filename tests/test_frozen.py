"""What must not change when code is renamed, split or rewritten: values stored by the code before, computed
again by the code of today.

`FLUX4D_FROZEN=exact` asks for equal bits, which one machine with one build of torch gives; without it numbers
may differ as far as another machine's rounding goes.
`python tests/test_frozen.py --store` writes the values anew: only where a difference is meant, and is named
in the notebook that owns it.
"""

import hashlib
import io
import json
import math
import os
import sys
import tempfile
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch
import pytest
import torch
from flux4d.background import init_data
from flux4d.baselines import BASELINES, motion_prior_alone
from flux4d.cache import LiftCache
from flux4d.city.logs import fixture_city
from flux4d.clips import Clip, ClipConfig, build_index, select_clips
from flux4d.clip_data import load_views
from flux4d.lift import clip_data
from flux4d.view_scores import EvalConfig
from flux4d.pandaset import PandaSet
from flux4d.predictor import PredictorConfig
from flux4d.run_facts import About
from flux4d.score_clips import Evaluation, evaluate, one_clip_loader
from flux4d.refine import Flux4D, FullConfig
from flux4d.render import RenderConfig, render
from flux4d.run import Run
from flux4d.loader import Loader
from flux4d.model import ClipInputs, lift_scene
from flux4d.train import Trainer
from flux4d.config import config_from_dict

STORED = Path(__file__).parent / "frozen" / "values.json"
EXACT = os.environ.get("FLUX4D_FROZEN") == "exact"
MACHINE = {
    "seconds_per_clip",
    "seconds_per_frame",
    "runtime",
    "seconds",
    "commit",
    "flux4d",
}  # what no code decides
SMALL = dict(
    data=dict(image_scale=0.25, loader_threads=1),
    init=dict(fill_blocks=[64, 32]),
    voxel=dict(size=0.4),
    # the stored values are those of a ground of one level, without small movers (14_motion_prior)
    model=dict(
        degree=1,
        unet=dict(widths=[8, 16], blocks=1),
        hidden=16,
        motion_prior=dict(ground="lowest", small=dict(min_sweeps=0)),
        membership=dict(edge=0.0),  # 14a_membership
    ),
    refine=dict(unet=dict(widths=[8, 16], blocks=1)),
    render=dict(backend="torch"),  # the stored values are the readable rasteriser's
    flow=dict(enabled=True),
    loss=dict(depth=0.1, berhu=8.0),
    train=dict(iters=3, warmup=1, log_every=1, eval_every=0, save_ckpt_every=0, supervise_inputs=False),
)


def bits(x):
    "A hash of a tensor's bytes, and numbers that another machine reproduces nearly."
    x = x.detach().cpu().contiguous()
    v = x.double().flatten()
    return dict(
        hash=hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16],
        shape=list(x.shape),
        mean=v.mean().item(),
        size=v.abs().mean().item(),
    )


def real_root():
    asked = os.environ.get("FLUX4D_PANDASET")
    found = Path(asked) if asked else Path(__file__).parents[1].parent / "shared" / "pandaset"
    return found if (found / "002" / "lidar").is_dir() else None


@lru_cache(1)
def city_clips():
    root = fixture_city()
    return [
        Clip(PandaSet(root)[row["scene_id"]], row) for row in select_clips(build_index(root, ClipConfig()))
    ]


def lifted(clip, cfg):
    data = clip_data(clip, cfg.init.lidar_sensors, cfg.data.cameras, cfg.data.image_scale)
    return init_data(data, cfg.init, cfg.background, 0)


def stored_prior(inputs):
    "The motion prior alone, with the settings that the stored values were made with."
    model = config_from_dict(SMALL, FullConfig).model
    cfg = PredictorConfig(degree=1, motion_prior=model.motion_prior, fine_prior=model.fine_prior)
    return motion_prior_alone(inputs, cfg=cfg)


def scene_values(clip, cfg, scale):
    "A lift, the motion prior on it, one rendered view."
    g = lifted(clip, cfg)
    scene = stored_prior(ClipInputs(clip, lift_scene(clip, g, cfg), cfg))
    velocity = scene.velocity
    views = load_views(clip, clip.target_frames[1:2], ("front_camera",), scale)
    out = render(g, velocity, clip.time.duration, views, RenderConfig(backend="torch"))
    return dict(
        gaussians=len(g),
        lift=bits(g.flat()),
        time=bits(g.t),
        velocity=bits(velocity),
        rgb=bits(out.rgb),
        depth=bits(out.depth),
        alpha=bits(out.alpha),
    )


def made_up_log():
    "Names and bytes of every file of a made-up log, unpacked."
    import gzip

    root = fixture_city()
    parts = hashlib.sha256()
    for path in sorted(p for p in Path(root).rglob("*") if p.is_file()):
        raw = path.read_bytes()
        parts.update(str(path.relative_to(root)).encode())
        parts.update(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    return dict(files=sum(p.is_file() for p in Path(root).rglob("*")), hash=parts.hexdigest()[:16])


def city_scene():
    return scene_values(city_clips()[0], config_from_dict(SMALL, FullConfig), 0.25)


def real_scene():
    log = PandaSet(real_root())["002"]
    row = next(
        r
        for r in select_clips(build_index(real_root(), ClipConfig()))
        if r["setting"] == "train_future" and r["scene_id"] == "002"
    )
    return scene_values(Clip(log, row), config_from_dict(SMALL, FullConfig), 0.125)


@lru_cache(1)
def trained():
    cfg = config_from_dict(SMALL, FullConfig)
    folder = Path(tempfile.mkdtemp())
    loader = Loader(city_clips()[:2], cfg, LiftCache(folder / "cache"))
    trainer = Trainer(cfg, loader, Run(folder / "run"), kind=Flux4D)
    gradients = []
    step = trainer.opt.step

    def watched(*args, **kwargs):
        gradients.append(
            bits(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
        )
        return step(*args, **kwargs)

    trainer.opt.step = watched
    with redirect_stdout(io.StringIO()):
        rows = trainer.fit()
    return trainer, [r["total"] for r in rows if "total" in r], gradients


def three_steps():
    trainer, losses, gradients = trained()
    weights = bits(torch.cat([p.flatten() for p in trainer.model.parameters()]))
    return dict(losses=losses, gradients=gradients, weights=weights)


def evaluation():
    "Every number of an evaluation of the model trained for three steps."
    trainer, _, _ = trained()
    model = trainer.ema.module.eval()
    folder = Path(tempfile.mkdtemp())
    loader = one_clip_loader(city_clips()[:1], trainer.cfg, LiftCache(folder / "cache"))
    cfg = EvalConfig(save_renders=0)
    with redirect_stdout(io.StringIO()), patch.dict(BASELINES, motion_prior=stored_prior):
        found = evaluate(
            About("test", "seen logs"),
            Evaluation(model.reconstruct, loader, folder, ("lift", "zero_motion"), cfg, videos=0),
        )
    return numbers(found)


def numbers(x, at=""):
    "Numbers of a nested record by dotted name, but for what the machine decides."
    if isinstance(x, dict):
        return {
            k: v
            for key, value in x.items()
            if key not in MACHINE
            for k, v in numbers(value, f"{at}.{key}".lstrip(".")).items()
        }
    if isinstance(x, list):
        return {k: v for i, value in enumerate(x) for k, v in numbers(value, f"{at}.{i}").items()}
    return {at: x} if isinstance(x, (int, float)) and not isinstance(x, bool) else {}


PARTS = dict(
    made_up_log=made_up_log,
    city_scene=city_scene,
    three_steps=three_steps,
    evaluation=evaluation,
    real_scene=real_scene,
)


def same(got, want, at, exact):
    "Lines that say where two nested values differ."
    if isinstance(want, dict):
        keys = sorted(set(got) | set(want))
        return [
            line
            for k in keys
            for line in (
                [f"{at}.{k}: only on one side"]
                if k not in got or k not in want
                else same(got[k], want[k], f"{at}.{k}", exact)
            )
        ]
    if isinstance(want, list):
        if len(got) != len(want):
            return [f"{at}: {len(got)} entries, {len(want)} before"]
        return [line for i, (a, b) in enumerate(zip(got, want)) for line in same(a, b, f"{at}.{i}", exact)]
    if isinstance(want, float) and not exact:
        return [] if math.isclose(got, want, rel_tol=2e-3, abs_tol=1e-5) else [f"{at}: {got}, {want} before"]
    if isinstance(want, float) and at.startswith("evaluation."):  # means of a table add up in another order
        return [] if math.isclose(got, want, rel_tol=1e-12, abs_tol=1e-15) else [f"{at}: {got}, {want} before"]
    if not exact and at.endswith(".hash"):
        return []
    return [] if got == want else [f"{at}: {got}, {want} before"]


@pytest.mark.parametrize("part", PARTS)
def test_frozen(part):
    if part == "real_scene" and not real_root():
        pytest.skip("no PandaSet log 002 here")
    stored = json.loads(STORED.read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        got = json.loads(json.dumps(PARTS[part]()))
    finally:
        torch.set_num_threads(threads)
    assert not (lines := same(got, stored[part], part, EXACT)), "\n".join(lines[:20])


if __name__ == "__main__" and "--store" in sys.argv:
    torch.set_num_threads(1)
    STORED.parent.mkdir(exist_ok=True)
    STORED.write_text(
        json.dumps({name: part() for name, part in PARTS.items()}, indent=1, sort_keys=True) + "\n"
    )
