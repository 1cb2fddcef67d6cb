"Memory full, disk full, a spoilt cache, a data root that is gone: each ends in one sentence, and no step is lost."

import errno
import shutil
from pathlib import Path
import pytest
import torch
from flux4d import checkpoint as checkpoint_module
from flux4d.cache import LiftCache
from flux4d.checkpoint import load_checkpoint
from flux4d.city.logs import fixture_city
from flux4d.config import Config, DataConfig, TrainConfig
from flux4d.files import DataError, WriteError
from flux4d.gap_filling import InitConfig
from flux4d.interrupt import Interrupted
from flux4d.loader import Loader
from flux4d.occupancy import MotionPriorConfig
from flux4d.pandaset import PandaSet
from flux4d.predictor import PredictorConfig
from flux4d.run import Run
from flux4d.train import Trainer
from flux4d.unet import UNetConfig

CFG = Config(
    data=DataConfig(image_scale=0.25, loader_threads=1),
    init=InitConfig(fill_blocks=(64, 32), voxel_downsample=1.0),
    model=PredictorConfig(unet=UNetConfig(widths=(4, 8), blocks=1), hidden=16, motion_prior=MotionPriorConfig(reach=0)),
    train=TrainConfig(
        iters=5, warmup=1, eval_every=0, log_every=1, save_ckpt_every=0, views_per_step=1, prefetch=0, max_unread=2
    ),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return LiftCache(tmp_path_factory.mktemp("lifts"))


def trainer(folder: Path, cache: LiftCache, root: Path | None = None, goes_on: bool = False) -> Trainer:
    "A small run on two clips."
    torch.set_num_threads(1)
    log = PandaSet(root or fixture_city())["001"]
    run = Trainer(CFG, Loader([log.clip(0), log.clip(4)], CFG, cache), Run(folder, goes_on=goes_on))
    if goes_on:
        run.resume(folder / "ckpt_last.pt")
    return run


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, cache):
    run = trainer(tmp_path_factory.mktemp("runs") / "unbroken", cache)
    run.fit()
    return run


def same_end(a: Trainer, b: Trainer) -> bool:
    "Whether two runs have ended with the same bits and the same record."
    weights = zip(a.model.state_dict().values(), b.model.state_dict().values())
    rows = [[{k: r[k] for k in ("step", "total", "clips")} for r in t.run.rows()] for t in (a, b)]
    return all(torch.equal(x, y) for x, y in weights) and rows[0] == rows[1]


FULL = {
    "the GPU's memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"),
    "host memory": RuntimeError("[enforce fail at alloc_cpu.cpp:116] . DefaultCPUAllocator: can't allocate memory"),
}


@pytest.mark.parametrize("where", FULL)
def test_memory_full(tmp_path, cache, unbroken, where):
    run = trainer(tmp_path / "run", cache)
    sound = run.losses

    def losses(*args: object) -> dict:
        if run.step == 2:
            raise FULL[where]
        return sound(*args)

    run.losses = losses
    with pytest.raises(Interrupted) as e:
        run.fit()
    assert str(e.value) == (
        f"{where} is full, so lower data.device_gb, data.host_gb, views_per_step or max_gaussians; "
        f"interrupted at step 2, saved as ckpt_step_000002.pt; go on with -p resume_from last -p out_dir {tmp_path}/run"
    )
    assert e.value.__cause__ is None and len(run.trained_on.pending) == 0
    again = trainer(tmp_path / "run", cache, goes_on=True)
    again.fit()
    assert same_end(again, unbroken)


def test_another_fault_of_a_step_is_not_taken_for_full_memory(tmp_path, cache):
    run = trainer(tmp_path / "run", cache)
    run.losses = lambda *args: torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="size"):
        run.fit()


def test_data_root_gone(tmp_path, unbroken):
    root = tmp_path / "city"
    shutil.copytree(fixture_city(), root, ignore=shutil.ignore_patterns("_truth"))
    fresh = LiftCache(tmp_path / "lifts")
    run = trainer(tmp_path / "run", fresh, root)
    run.fit(2)
    root.rename(tmp_path / "elsewhere")
    run.loader.store.clear()
    with pytest.raises(DataError) as e:
        run.fit()
    assert str(e.value) == f"data_root: {root} is not there any more; bring it back and go on with resume_from=last."
    assert load_checkpoint(tmp_path / "run/ckpt_last.pt")["step"] == 2
    (tmp_path / "elsewhere").rename(root)
    again = trainer(tmp_path / "run", fresh, root, goes_on=True)
    again.fit()
    assert same_end(again, unbroken)


def test_files_that_go_bad_cost_no_step(tmp_path, cache):
    run = trainer(tmp_path / "run", cache)
    load = run.loader._load

    def bad(step: int, micro: int) -> object:
        if step >= 1:
            raise DataError(f"001/lidar/{step:02d}.pkl.gz: is truncated; get the file again.")
        return load(step, micro)

    run.loader._load = bad
    with pytest.raises(DataError, match="training: 3 files went bad while it ran"):
        run.fit()
    assert load_checkpoint(tmp_path / "run/ckpt_last.pt")["step"] == 3  # one step taken, two skipped


def test_disk_full_at_a_checkpoint(tmp_path, cache, unbroken, monkeypatch):
    run = trainer(tmp_path / "run", cache)
    run.fit(2)
    run.save()
    sound = torch.save

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module.torch, "save", full)
    run.fit(4)
    with pytest.raises(WriteError) as e:
        run.save()
    assert str(e.value) == (
        "run/ckpt_step_000004.pt: could not be written because the disk is full; "
        "free some space and go on with resume_from=last."
    )
    monkeypatch.setattr(checkpoint_module.torch, "save", sound)
    assert load_checkpoint(tmp_path / "run/ckpt_last.pt")["step"] == 2
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.endswith(".tmp")]
    again = trainer(tmp_path / "run", cache, goes_on=True)
    again.fit()
    assert same_end(again, unbroken)


def test_a_cache_that_is_spoilt_while_a_run_goes_on(tmp_path, unbroken):
    own = LiftCache(tmp_path / "lifts")
    run = trainer(tmp_path / "run", own)
    run.fit(2)
    for path in own.folder.glob("*.npz"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run.loader.store.clear()
    run.fit()
    assert same_end(run, unbroken)
