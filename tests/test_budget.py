"""Memory budgets hold while a run goes on, and change no number of it; nor does decoding in other processes."""

import os
import signal
import warnings
from pathlib import Path
import pytest
import torch
from flux4d.cache import LiftCache
from flux4d.city.logs import fixture_city
from flux4d.config import Config, DataConfig, TrainConfig
from flux4d.files import DataError
from flux4d.loader import Loader
from flux4d.pandaset import PandaSet
from flux4d.predictor import PredictorConfig
from flux4d.run import Run
from flux4d.store import ByteLRU, bytes_of
from flux4d.train import Trainer
from flux4d.unet import UNetConfig

STEPS = 8


def config(**data: object) -> Config:
    "A small model; which memory and which processes it uses is given."
    return Config(
        data=DataConfig(image_scale=0.25, **data),
        model=PredictorConfig(unet=UNetConfig(widths=(4, 8), blocks=1)),
        train=TrainConfig(iters=STEPS, warmup=1, eval_every=0, log_every=1, save_ckpt_every=0, views_per_step=2),
    )


@pytest.fixture(scope="module")
def clips():
    "Four clips that overlap, so that they share frames."
    log = PandaSet(fixture_city())["001"]
    return [log.clip(start) for start in (0, 2, 4, 6)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return LiftCache(tmp_path_factory.mktemp("lifts"))


def trained(folder: Path, cfg: Config, clips: list, cache: LiftCache) -> Trainer:
    "A run from its first step to its last."
    torch.set_num_threads(1)
    trainer = Trainer(cfg, Loader(clips, cfg, cache), Run(folder))
    trainer.fit()
    return trainer


def record(trainer: Trainer) -> list:
    "What a run logged, without what the clock says."
    return [{k: v for k, v in r.items() if k not in ("seconds", "waited", "host_bytes")} for r in trainer.run.rows()]


def equal(a: Trainer, b: Trainer) -> bool:
    "Whether two runs have the same bits."
    same = [torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values())]
    return all(same) and record(a) == record(b)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory, clips, cache):
    "A run with room for everything."
    return trained(tmp_path_factory.mktemp("runs") / "roomy", config(loader_threads=1), clips, cache)


def test_a_run_keeps_within_its_budget_and_has_the_same_bits(tmp_path, clips, cache, roomy, monkeypatch):
    all_of_it = roomy.loader.store.host.used
    one_clip = max(bytes_of((roomy.loader.lifted(i), roomy.loader.index(i))) for i in range(len(clips)))
    budget = 1.2 * one_clip
    assert budget < all_of_it / 2
    sound, most = ByteLRU.put, [0]

    def put(self: ByteLRU, key: object, value: object) -> None:
        sound(self, key, value)
        most[0] = max(most[0], self.used)
        assert self.used <= self.budget

    monkeypatch.setattr(ByteLRU, "put", put)
    tight = trained(tmp_path / "tight", config(host_gb=budget / 1e9, loader_threads=3), clips, cache)
    assert 0.5 * budget < most[0] <= budget
    assert equal(tight, roomy)


def test_no_room_at_all(tmp_path, clips, cache, roomy):
    none = trained(tmp_path / "none", config(host_gb=1e-9, loader_threads=2), clips, cache)
    assert none.loader.store.host.used == 0 and equal(none, roomy)


def test_two_levels_have_the_same_bits(tmp_path, clips, cache, roomy):
    "What a GPU's store does, with the CPU in both parts: values leave one level for the other and come back."
    cfg = config(loader_threads=2)
    loader = Loader(clips, cfg, cache)
    store = loader.store
    one_clip = max(bytes_of((roomy.loader.lifted(i), roomy.loader.index(i))) for i in range(len(clips)))
    store.near = ByteLRU(1.2 * one_clip, store._to_host)
    trainer = Trainer(cfg, loader, Run(tmp_path / "levels"))
    trainer.fit()
    assert equal(trainer, roomy)
    assert 0 < store.near.used <= store.near.budget and store.host.used > 0


def test_another_process_decodes_and_lifts(tmp_path, clips, roomy):
    fresh = LiftCache(tmp_path / "lifts")
    cfg = config(loader_processes=1, loader_threads=2)
    loader = Loader(clips, cfg, fresh)
    trainer = Trainer(cfg, loader, Run(tmp_path / "apart"))
    trainer.fit(3)
    (pid,) = loader.workers.pool._processes
    assert len(list(fresh.folder.glob("*.npz"))) >= 3
    loader.store.clear()
    os.kill(pid, signal.SIGKILL)  # a process that the system ends for want of memory costs a warning
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit()
    assert sum("a process was killed" in str(w.message) for w in said) == 1
    assert equal(trainer, roomy)


def test_a_fault_in_another_process_is_the_same_sentence(clips, cache):
    loader = Loader(clips, config(loader_processes=1), cache)
    with pytest.raises(DataError, match="rear_window"):
        loader.frame("001", "rear_window", 0)
    loader.workers.close()


def test_waiting_is_recorded(roomy):
    rows = roomy.run.rows()
    assert rows[0]["waited"] == 0 and all(0 <= r["waited"] <= r["seconds"] for r in rows)
    said = (roomy.run.folder / "train.log").read_text().splitlines()[-1]
    assert said.startswith("steps after the first waited for data ") and said.endswith("%")


def test_validation_shares_the_budget(clips, cache):
    cfg = config()
    train = Loader(clips[:2], cfg, cache)
    held = Loader(clips[2:], cfg, cache, target_sensors=(0, 1), beside=train)
    assert held.store is train.store and held.workers is train.workers
    assert held.frame("001", "front_camera", 4) is not train.frame("001", "front_camera", 4)  # other LiDARs' depth
    assert held.lifted(0) is not train.lifted(0)
