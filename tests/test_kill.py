"A trainer killed at a random moment, twenty times, leaves nothing that fails to load (design: trust)."

import multiprocessing as mp
import os
import random
import signal
import time
from pathlib import Path
import numpy as np
from flux4d.city.logs import fixture_city
from flux4d.clips import Clip, ClipConfig, build_index, select_clips
from flux4d.pandaset import PandaSet
from flux4d.cache import LiftCache
from flux4d.config import Config, DataConfig, TrainConfig
from flux4d.gap_filling import InitConfig
from flux4d.loader import Loader
from flux4d.occupancy import MotionPriorConfig
from flux4d.train import Trainer
from flux4d.run import Run
from flux4d.checkpoint import load_checkpoint
from flux4d.predictor import PredictorConfig
from flux4d.unet import UNetConfig

KILLS = 20
PRELOAD = ["tests.preloaded", "torch._dynamo", "flux4d.train", "flux4d.city.logs", "flux4d.clips", "flux4d.cache"]


def small_trainer(folder: Path) -> Trainer:
    "A trainer small enough to save many checkpoints a second."
    root = fixture_city()
    clips = [Clip(PandaSet(root)[r["scene_id"]], r) for r in select_clips(build_index(root, ClipConfig()))]
    cfg = Config(
        data=DataConfig(image_scale=0.25, loader_threads=1),
        init=InitConfig(fill_blocks=(64, 32), voxel_downsample=1.0),
        model=PredictorConfig(
            unet=UNetConfig(widths=(4, 8), blocks=1), hidden=16, motion_prior=MotionPriorConfig(reach=0)
        ),
        train=TrainConfig(
            iters=100_000, warmup=1, eval_every=0, log_every=1, save_ckpt_every=1, views_per_step=1
        ),
    )
    trainer = Trainer(cfg, Loader(clips, cfg, LiftCache(folder / "cache")), Run(folder, goes_on=True))
    if (folder / "ckpt_last.pt").exists():
        trainer.resume(folder / "ckpt_last.pt")
    return trainer


def work(folder: str) -> None:
    "Child: train for ever, saving every step; now and then forget a cached lift so that it is written again."
    import torch

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    trainer = small_trainer(Path(folder))
    while True:
        for f in (Path(folder) / "cache").glob("*.npz"):
            f.unlink()
        trainer.loader.store.clear()
        trainer.fit(trainer.step + 3)


def test_twenty_kills(tmp_path: Path) -> None:
    "Checkpoints and cached lifts load after every kill, and the run goes on from where it was."
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    rng, steps, last = random.Random(0), [], tmp_path / "ckpt_last.pt"
    for k in range(KILLS):
        before = os.readlink(last) if last.exists() else ""
        child = context.Process(target=work, args=(str(tmp_path),), daemon=True)
        child.start()
        wait = time.time() + 60  # until it has saved something of its own
        while (not last.exists() or os.readlink(last) == before) and child.is_alive() and time.time() < wait:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.0))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        steps.append(load_checkpoint(tmp_path / "ckpt_last.pt")["step"])
        for f in tmp_path.glob("ckpt_step_*.pt"):
            assert load_checkpoint(f)["step"] == int(f.stem[-6:])
        for f in (tmp_path / "cache").glob("*.npz"):
            with np.load(f) as z:
                assert all(np.isfinite(z[n].astype(float)).all() for n in z.files if z[n].dtype.kind == "f")
    assert steps == sorted(steps) and steps[-1] > steps[0], steps
    assert small_trainer(tmp_path).step == steps[-1]
