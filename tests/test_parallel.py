"""A run of several processes is the run of one: same clips, same weights, same record; and whatever ends one of them
ends all, in one sentence, with nothing lost."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
import pytest
import torch
from flux4d.cache import LiftCache
from flux4d.checkpoint import load_checkpoint
from flux4d.city.logs import fixture_city
from flux4d.clips import Clip, ClipConfig, build_index, select_clips
from flux4d.config import DataConfig, TrainConfig
from flux4d.files import DataError
from flux4d.gap_filling import InitConfig
from flux4d.loader import Loader
from flux4d.occupancy import MotionPriorConfig
from flux4d.pandaset import PandaSet
from flux4d.predictor import PredictorConfig
from flux4d.processes import ALONE, Processes, SilentRun, group_processes
from flux4d.refine import Flux4D, FullConfig, RefineConfig
from flux4d.run import Run
from flux4d.train import Trainer
from flux4d.unet import UNetConfig

PRELOAD = ["tests.preloaded", "pytest", "torch._dynamo", "flux4d.refine", "flux4d.train", "flux4d.city.logs"]


STEPS = dict(iters=5, warmup=1, eval_every=0, log_every=1, save_ckpt_every=0, views_per_step=1, prefetch=1)


def small_config(norm: str = "clip", reach: int = 0, **train: object) -> FullConfig:
    "A model of two stages, small enough for some steps a second; `reach` 0: no motion prior, a second a clip."
    unet = UNetConfig(widths=(4, 8), blocks=1, norm=norm)
    return FullConfig(
        data=DataConfig(image_scale=0.25, loader_threads=1),
        init=InitConfig(fill_blocks=(64, 32), voxel_downsample=1.0),
        model=PredictorConfig(unet=unet, hidden=16, motion_prior=MotionPriorConfig(reach=reach)),
        refine=RefineConfig(steps=2, unet=unet),
        train=TrainConfig(**STEPS | train),
    )


def small_trainer(folder: Path, cfg: FullConfig, processes: Processes = ALONE) -> Trainer:
    "A run in a folder, gone on with where it has a checkpoint."
    root = fixture_city()
    clips = [Clip(PandaSet(root)[r["scene_id"]], r) for r in select_clips(build_index(root, ClipConfig()))]
    run = Run(folder, goes_on=True) if processes.first else SilentRun(folder)
    loader = Loader(clips, cfg, LiftCache(folder.parents[1] / "lifts"), processes=processes)
    trainer = Trainer(cfg, loader, run, kind=Flux4D)
    if (folder / "ckpt_last.pt").exists():
        trainer.resume(folder / "ckpt_last.pt")
    return trainer


def nothing(trainer: Trainer) -> None:
    "Leave a trainer as it is."


def member(rank: int, folder: Path, cfg: FullConfig, change: object, out: object) -> None:
    "Child: one of two processes of a run."
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    group = f"file://{folder}.meeting"
    torch.distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=2)
    processes = group_processes()
    try:
        with processes.together():
            trainer = small_trainer(folder, cfg, processes)
            change(trainer)
            trainer.fit()
        said = f"ended at step {trainer.step}"
    except Exception as e:
        said = f"{type(e).__name__}: {e}"
    out.put((rank, said))
    out.close()
    out.join_thread()


def in_two(folder: Path, cfg: FullConfig, change: object = nothing) -> list:
    "What each of two processes says at its end, None where it was killed."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    Path(f"{folder}.meeting").unlink(missing_ok=True)
    out = context.Queue()
    pair = [context.Process(target=member, args=(r, folder, cfg, change, out), daemon=True) for r in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(240)
    hang = [process.pid for process in pair if process.is_alive()]
    for process in pair:
        process.kill()
    assert not hang, "processes wait for each other"
    found = dict(out.get(timeout=10) for process in pair if process.exitcode == 0)
    return [found.get(rank) for rank in (0, 1)]


def gap(a: Path, b: Path) -> float:
    "Largest difference of two runs' last weights, averaged weights and optimiser."
    one, two = (load_checkpoint(folder / "ckpt_last.pt") for folder in (a, b))
    assert one["step"] == two["step"] and one["trained"] == two["trained"]
    found = [(one[part][name], two[part][name]) for part in ("model", "ema") for name in one[part]]
    moments = [(s[k], two["optimizer"]["state"][i][k]) for i, s in one["optimizer"]["state"].items() for k in s]
    return max(float((x.double() - y.double()).abs().max()) for x, y in found + moments)


def rows(folder: Path) -> list:
    "The record without what the clock says."
    found = Run(folder, goes_on=True).rows()
    return [{k: v for k, v in r.items() if k not in ("seconds", "waited", "host_bytes")} for r in found]


def alike(a: list, b: list) -> bool:
    "Whether two records say the same, numbers within 1e-5."
    if [list(r) for r in a] != [list(r) for r in b]:
        return False
    pairs = [(x[k], y[k]) for x, y in zip(a, b) for k in x]
    return all(abs(x - y) <= 1e-5 * max(1, abs(x)) if isinstance(x, float) else x == y for x, y in pairs)


@pytest.mark.parametrize("norm", ("clip", "batch"))
def test_two_processes_are_one_with_two_micro_steps(tmp_path, norm):
    "Weights, averages, optimiser and record after three steps."
    torch.set_num_threads(1)
    cfg = small_config(norm, MotionPriorConfig().reach, iters=3)
    whole = replace(cfg, train=replace(cfg.train, grad_accum_steps=2))
    small_trainer(tmp_path / "one", whole).fit()
    assert in_two(tmp_path / "two", cfg) == ["ended at step 3"] * 2
    assert gap(tmp_path / "one", tmp_path / "two") <= 1e-5
    assert alike(rows(tmp_path / "one"), rows(tmp_path / "two"))
    assert len(rows(tmp_path / "two")[0]["clips"]) == 2


def dies(rank: int, trainer: Trainer) -> None:
    "Kill one process in the middle of its third step."
    sound = trainer.losses

    def losses(*args: object) -> dict:
        if trainer.step == 2 and trainer.processes.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return sound(*args)

    trainer.losses = losses


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "A run of two processes and five steps."
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    assert in_two(folder, small_config()) == ["ended at step 5"] * 2
    return folder


def test_a_killed_process_ends_the_run_in_a_sentence_and_resuming_is_exact(tmp_path, unbroken):
    kept, gone = in_two(tmp_path / "run", small_config(), partial(dies, 1))
    assert gone is None
    assert kept == (
        "Interrupted: process 2 of 2 has ended; interrupted at step 2, saved as ckpt_step_000002.pt; "
        f"go on with -p resume_from last -p out_dir {tmp_path / 'run'}"
    )
    assert kept.partition(": ")[2] in (tmp_path / "run/train.log").read_text()
    assert in_two(tmp_path / "run", small_config()) == ["ended at step 5"] * 2
    assert gap(tmp_path / "run", unbroken) == 0 and rows(tmp_path / "run") == rows(unbroken)


def test_the_writer_is_killed(tmp_path, unbroken):
    cfg = small_config(save_ckpt_every=1)
    gone, kept = in_two(tmp_path / "run", cfg, partial(dies, 0))
    assert gone is None
    ended = "Interrupted: process 1 of 2 has ended; interrupted at step 2; go on with -p resume_from last"
    assert kept.startswith(ended)
    assert in_two(tmp_path / "run", cfg) == ["ended at step 5"] * 2
    assert gap(tmp_path / "run", unbroken) == 0 and rows(tmp_path / "run") == rows(unbroken)


def asked(rank: int, trainer: Trainer) -> None:
    "Ask one process to stop in the middle of its third step."
    sound = trainer.losses

    def losses(*args: object) -> dict:
        if trainer.step == 2 and trainer.processes.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return sound(*args)

    trainer.losses = losses


@pytest.mark.parametrize("rank", (0, 1))
def test_a_request_to_stop_one_process_stops_both(tmp_path, rank):
    said = in_two(tmp_path / "run", small_config(), partial(asked, rank))
    how = f"go on with -p resume_from last -p out_dir {tmp_path / 'run'}"
    assert said[0] == f"Interrupted: interrupted at step 2, saved as ckpt_step_000002.pt; {how}"
    assert said[1].startswith("Interrupted: interrupted at step 2; ")


def cannot_read(trainer: Trainer) -> None:
    "The second process finds a bad file at its second step."
    load = trainer.loader._load

    def bad(step: int, micro: int) -> object:
        if step == 1 and trainer.processes.rank == 1:
            raise DataError("001/lidar/07.pkl.gz: is truncated; get the file again.")
        return load(step, micro)

    trainer.loader._load = bad


def test_what_one_process_cannot_read_is_noted_by_the_writer(tmp_path):
    cfg = small_config(iters=3)
    assert in_two(tmp_path / "run", cfg, cannot_read) == ["ended at step 3"] * 2
    noted = rows(tmp_path / "run")
    assert noted[1]["clips"][1] is None and noted[1]["clips"][0] is not None and None not in noted[2]["clips"]
    assert noted[2]["unread"] == 1 and noted[2]["skipped"] == 0
    meta = json.loads((tmp_path / "run/meta.json").read_text())
    assert meta["unread"] == {"001/lidar/07.pkl.gz: is truncated; get the file again.": 1}
    strict = small_config(iters=3, max_unread=0)
    said = in_two(tmp_path / "strict", strict, cannot_read)
    assert said[0] == said[1] and said[0].startswith("DataError: training: 1 files went bad while it ran, the last one")


def poisoned(trainer: Trainer) -> None:
    "The loss of the second process is not a number at its second step."
    sound = trainer.losses

    def losses(*args: object) -> dict:
        found = sound(*args)
        bad = trainer.step == 1 and trainer.processes.rank == 1
        return found | dict(total=found["total"] * float("nan")) if bad else found

    trainer.losses = losses


def test_both_skip_a_step_that_one_spoils(tmp_path):
    cfg = small_config(iters=3)
    assert in_two(tmp_path / "run", cfg, poisoned) == ["ended at step 3"] * 2
    assert [r["skipped"] for r in rows(tmp_path / "run")] == [0, 1, 1]
    alone = small_trainer(tmp_path / "alone", replace(cfg, train=replace(cfg.train, grad_accum_steps=2)))
    i, pairs = alone.loader.draw(1, 1)
    said = (tmp_path / "run/train.log").read_text()
    assert f"its gradient is not finite, with clip {alone.loader.clips[i].id}, frame {pairs[0][0]} of" in said


def slow_to_validate(trainer: Trainer) -> None:
    "The writer validates for a while after each step, and then finds a fault."

    def validate(trainer: Trainer) -> dict:
        time.sleep(1)
        if trainer.step == 2:
            raise DataError("002/annotations/cuboids/07.pkl.gz: is missing; get the file again.")
        return dict(score=1.0)

    trainer.callbacks = [validate]


def test_a_fault_of_the_writer_ends_the_others(tmp_path):
    said = in_two(tmp_path / "run", small_config(), slow_to_validate)
    assert said == ["DataError: 002/annotations/cuboids/07.pkl.gz: is missing; get the file again."] * 2


def test_the_clock_of_the_slowest_ends_all_at_the_same_step(tmp_path):
    cfg = small_config(iters=1000, minutes=0.05)
    said = in_two(tmp_path / "run", cfg)
    assert said[0] == said[1] and said[0].startswith("ended at step ")


def test_processes_that_drift_apart_are_found(tmp_path):
    said = in_two(tmp_path / "run", small_config(), drifts)
    assert said[0] == said[1] and "which have drifted apart; go on with resume_from=last" in said[0]


def drifts(trainer: Trainer) -> None:
    "The second process takes its own norm for another."
    joined = trainer._join

    def join(row: dict) -> dict:
        trainer.last_norm *= 1.01 if trainer.processes.rank else 1
        return joined(row)

    trainer._join = join


# by the launcher


def command(launcher: list, *parameters: str) -> list:
    "A command line that trains on the small city."
    how = dict(
        data_root=fixture_city(),
        train_logs="001",
        eval_logs="001",
        max_train_clips=2,
        max_eval_clips=1,
        preset="draft",
        image_scale=0.25,
        device="cpu",
        eval_every=0,
        save_renders=0,
        baselines="",
        log_every=1,
        overrides="{model: {unet: {widths: [4, 8], blocks: 1}, hidden: 16, motion_prior: {reach: 0}}}",
    )
    given = [x for name, value in how.items() for x in ("-p", name, str(value))]
    return [sys.executable, *launcher, "flux4d.stage6", *given, *parameters]


TWO = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533", "-m"]


def test_the_command_in_two_processes(tmp_path):
    "`torch.distributed.run` is what `accelerate launch` calls for several GPUs."
    pytest.importorskip("accelerate")
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(map(str, sys.path)))
    out = str(tmp_path / "run")
    done = subprocess.run(
        command(TWO, "-p", "out_dir", out, "-p", "iters", "2"), env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("the run is in") == 1 and done.stdout.count("step      2  total") == 1
    meta = json.loads(Path(out, "meta.json").read_text())
    assert meta["processes"] == 2 and json.loads(Path(out, "metrics.json").read_text())
