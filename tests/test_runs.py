"Runs: what was trained on is known, resuming is honest, nothing is lost and nothing wrong is let in."

import errno
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
import torch
from flux4d.cache import LiftCache
from flux4d.clips import Clip, ClipConfig, build_index, fingerprint, select_clips
from flux4d.clip_data import InputViews, TargetViews, load_views
from flux4d.gap_filling import InitConfig
from flux4d.files import DataError
from flux4d.pandaset import PandaSet
from flux4d.log_files import fabricate_log
from flux4d.predictor import PredictorConfig
from flux4d.run import logged_rows as logged
from flux4d.run import Run, commit_of, newest_run
from flux4d.run_setup import refuse_seen
from flux4d.file_damage import damaged_files, refuse_damaged
from flux4d.checkpoint import load_checkpoint, trained_frames
from flux4d.config import RENAMED, RETIRED, Config, DataConfig, TrainConfig, config_from_dict
from flux4d.interrupt import Interrupted
from flux4d.train import Trainer, every
from flux4d.optimiser import lr_at
from flux4d.loader import Loader, files_of
from flux4d.model import load_model
from flux4d.unet import UNetConfig
from flux4d.weights import averaged_weights, save_weights

TINY = Config(
    data=DataConfig(image_scale=1.0, loader_threads=1),
    init=InitConfig(fill=False),
    model=PredictorConfig(unet=UNetConfig(widths=(4, 8), blocks=1)),
    train=TrainConfig(iters=100, warmup=1, eval_every=0, log_every=5, save_ckpt_every=0, views_per_step=1),
)


def clips_of(root: Path) -> list[Clip]:
    "All clips of a data root."
    return [Clip(PandaSet(root)[r["scene_id"]], r) for r in select_clips(build_index(root, ClipConfig()))]


def with_train(**over) -> Config:
    "The tiny configuration with other training fields."
    return replace(TINY, train=replace(TINY.train, **over))


@pytest.fixture(scope="module")
def city(tmp_path_factory) -> Path:
    "A small log that gives three training clips."
    torch.set_num_threads(1)
    return fabricate_log(tmp_path_factory.mktemp("data"), "002", frames=20).parent


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> LiftCache:
    "Lifted clips, shared by all tests."
    return LiftCache(tmp_path_factory.mktemp("lifts"))


LAYOUTS = {}


def with_layouts(loader: Loader) -> Loader:
    "Clips are sorted into the grid once for all tests: that takes longer than all else."

    def index(i: int):
        clip = loader.clips[i]
        key = clip.log.root, clip.id
        if key not in LAYOUTS:
            LAYOUTS[key] = loader._index(i)
        return LAYOUTS[key]

    loader.index = index
    return loader


@pytest.fixture
def trainer(city, cache, tmp_path):
    "A function that makes a trainer in a folder, new or as it was left."

    def make(folder: str = "run", cfg: Config = TINY, clips=None, index: str = "", **how) -> Trainer:
        clips = clips_of(city) if clips is None else clips
        return Trainer(cfg, with_layouts(Loader(clips, cfg, cache)), Run(tmp_path / folder, **how), index)

    return make


def step_rows(t: Trainer) -> list[dict]:
    "The logged steps of a run, without validations."
    return [r for r in t.run.rows() if "total" in r]


def named(t: Trainer) -> list[int]:
    "The clips that the rows name, in the order of the micro-steps."
    return [i for r in step_rows(t) for i in r["clips"]]


# what was trained on


def test_rows_name_the_clip_of_every_step_also_after_a_resume(trainer):
    t = trainer()
    t.fit(8)  # rows at 1 and 5; 6 to 8 are in no row yet
    t.save()
    again = trainer(goes_on=True)
    again.resume(again.run.folder / "ckpt_last.pt")
    again.fit(10)
    drawn = [again.loader.draw(s)[0] for s in range(10)]
    assert named(again) == drawn
    ids = again.run.meta()["train_clips"]
    assert [ids[i] for i in drawn] == [again.loader.clips[i].id for i in drawn]


def test_every_micro_step_is_named(trainer):
    t = trainer(cfg=with_train(grad_accum_steps=2))
    t.fit(5)
    assert named(t) == [t.loader.draw(s, m)[0] for s in range(5) for m in range(2)]


def test_rows_keep_their_meaning_when_the_clips_change(trainer, city):
    t = trainer(clips=clips_of(city)[:1])
    t.fit(5)
    t.save()
    again = trainer(clips=clips_of(city)[1:], goes_on=True)
    again.resume(again.run.folder / "ckpt_last.pt")
    again.fit(10)
    assert (
        "differs from the clips of ckpt_last.pt: 1 are left out, 2 are new"
        in (again.run.folder / "train.log").read_text()
    )
    ids = again.run.meta()["train_clips"]
    assert {ids[i] for i in named(again)[:5]} == {t.loader.clips[0].id}
    assert not {ids[i] for i in named(again)[5:]} & {t.loader.clips[0].id}


def test_checkpoint_and_meta_hold_the_frames_of_all_steps(trainer):
    t = trainer()
    t.fit(3)
    path = t.save()
    clips = [t.loader.clips[t.loader.draw(s)[0]] for s in range(3)]
    want = {(c.log.id, fingerprint(c.log, ())): set() for c in clips}
    for c in clips:
        want[c.log.id, fingerprint(c.log, ())] |= set(c.frames)
    assert trained_frames(path) == want
    assert trained_frames(json.loads((t.run.folder / "meta.json").read_text())) == want
    assert load_checkpoint(path)["trained"]["logs"][clips[0].log.id]["identity"] == fingerprint(
        clips[0].log, ()
    )


def test_end_of_training_writes_meta_without_a_checkpoint(trainer):
    t = trainer()
    t.run.write("meta.json", dict(machine="mine", trained=None))
    t.fit(2)
    assert t.run.meta()["machine"] == "mine" and trained_frames(t.run.meta()) == t.trained_on.frames


def test_weights_bring_their_history_and_two_data_sets_are_told_apart(trainer, tmp_path):
    t = trainer("first")
    t.fit(2)
    path = t.save()
    other = clips_of(fabricate_log(tmp_path / "other", "002", speed=8.0).parent)
    assert other[0].log.id in {log for log, _ in t.trained_on.frames}  # the same id, another street
    grown = trainer("second", clips=other)
    grown.resume(path, optimizer=False)
    assert grown.trained_on.frames == t.trained_on.frames and grown.step == 0
    grown.fit(1)
    found = trained_frames(grown.save())
    assert {k: found[k] for k in t.trained_on.frames} == t.trained_on.frames
    assert len({identity for log, identity in found if log == other[0].log.id}) == 2


def test_a_run_starts_from_a_weights_file_and_never_from_frames_it_leaves_out(trainer, tmp_path):
    t = trainer("first")
    t.fit(2)
    written = save_weights(tmp_path / "small.safetensors", averaged_weights(t.state(), "first"))
    other = clips_of(fabricate_log(tmp_path / "other", "002", speed=8.0).parent)
    begun = trainer("second", clips=other)
    begun.resume(written, optimizer=False)
    averaged = t.ema.module.state_dict()
    assert begun.step == 0 and begun.trained_on.frames == t.trained_on.frames
    assert all(torch.equal(x, averaged[key]) for key, x in begun.model.state_dict().items())
    said = (begun.run.folder / "train.log").read_text()
    assert "starts at step 0 from the weights of small.safetensors, step 2" in said
    begun.fit(1)
    assert len(step_rows(begun)) == 1 and {log for log, _ in trained_frames(begun.save())} == {"002"}
    with pytest.raises(DataError, match="^small.safetensors: holds weights alone; add resume_optimizer=False to start"):
        trainer("third").resume(written)
    refuse_seen(written, other)  # another recording of the same name
    with pytest.raises(DataError, match="^small.safetensors: was trained on frame [0-9]+ of log 002, which this run"):
        refuse_seen(written, t.loader.clips)


def test_unknown_history_stays_unknown(trainer, tmp_path):
    t = trainer("first")
    s = t.state()
    del s["trained"]
    torch.save(s, tmp_path / "old.pt")
    assert trained_frames(tmp_path / "old.pt") is None
    later = trainer("second")
    later.resume(tmp_path / "old.pt")
    later.fit(1)
    assert trained_frames(later.save()) is None
    assert "does not say which frames" in (later.run.folder / "train.log").read_text()


# what is looked at


def test_depth_of_targets_does_not_depend_on_the_lift(city, cache):
    clip = clips_of(city)[0]
    target = [(clip.target_frames[0], "front_camera")]

    def depth(lift, target_sensors, pairs, kind):
        cfg = replace(TINY, init=replace(TINY.init, lidar_sensors=lift))
        return Loader([clip], cfg, cache, target_sensors=target_sensors).views(clip, pairs, kind).depth

    judged = [depth(lift, (0,), target, TargetViews) for lift in ((0,), (1,), (0, 1))]
    assert all(torch.equal(d, judged[0]) for d in judged) and judged[0].any()
    assert not torch.equal(depth((1,), None, target, TargetViews), judged[0])  # left out: the lift's own
    inputs = [(f, "front_camera") for f in clip.input_frames]
    assert torch.equal(depth((1,), (0,), inputs, InputViews), depth((1,), None, inputs, InputViews))


def test_no_input_views_of_other_frames(city, cache):
    clip = clips_of(city)[0]
    loader = Loader([clip], TINY, cache)
    sentence = f"InputViews of {clip.id} must be chosen from frames .*never leaks"
    for frames in (clip.target_frames[:1], clip.input_frames + clip.target_frames[:1]):
        with pytest.raises(ValueError, match=sentence):
            loader.views(clip, [(f, "front_camera") for f in frames], InputViews)
        with pytest.raises(ValueError, match=sentence):
            load_views(clip, frames, kind=InputViews)
    clip.input_frames = clip.input_frames[:-1]  # what `inputs` reads is checked too
    assert set(loader.inputs(clip).views.frame.tolist()) == set(clip.input_frames)
    seen, targets = loader.inputs(clip).views, loader.views(clip, [(clip.target_frames[0], "front_camera")])
    for v, kind in ((seen, InputViews), (targets, TargetViews)):
        assert {type(x) for x in (v[0], v[:1], v.to("cpu"), replace(v, depth=v.depth))} == {kind}


# the schedule


def test_warm_up_is_bounded_by_the_budget():
    cfg = TrainConfig(iters=30_000, warmup=200, minutes=1.0)
    slow = [lr_at(s, cfg, seconds=2.0 * s) for s in range(31)]  # 30 steps fit
    assert max(slow) > 0.9 * cfg.lr and slow.index(max(slow)) <= 4
    assert slow[-1] == pytest.approx(cfg.lr * cfg.final_lr)
    assert slow[:2] == sorted(slow[:2]) and slow[0] < 0.1 * cfg.lr
    assert (
        lr_at(1, replace(cfg, minutes=10.0), seconds=76.0, started=75.0) < 0.1 * cfg.lr
    )  # a first step that compiled for 75 s
    assert [lr_at(s, replace(cfg, minutes=None)) for s in (0, 99, 199)] == pytest.approx(
        [cfg.lr / 200, cfg.lr / 2, cfg.lr]
    )


# resuming


def test_resume_says_what_differs(trainer):
    t = trainer("first")
    path = t.save()
    later = trainer(
        "second", cfg=replace(with_train(seed=3, lr=5e-4), data=replace(TINY.data, image_scale=0.5))
    )
    later.resume(path)
    log = (later.run.folder / "train.log").read_text()
    for said in ("train.seed: 0 -> 3", "train.lr: 0.001 -> 0.0005", "data.image_scale: 1.0 -> 0.5"):
        assert said in log
    assert "train.iters" not in log


def test_resume_says_what_the_checkpoint_lacked(trainer, tmp_path):
    t = trainer("first")
    s = t.state()
    lost = [k for k in s["model"] if k.endswith("weight")][0]
    del s["model"][lost]
    torch.save(s, tmp_path / "part.pt")
    later = trainer("second")
    later.resume(tmp_path / "part.pt", optimizer=False)
    assert (
        f"part.pt lacks 1 tensors, which start untrained: {lost}"
        in (later.run.folder / "train.log").read_text()
    )
    with pytest.raises(DataError, match="another architecture"):
        trainer("third").resume(tmp_path / "part.pt")


def test_the_gpu_generators_are_restored(trainer, monkeypatch):
    t, found = trainer(), []
    path = t.save()
    s = load_checkpoint(path)
    s["rng"]["cuda"] = [torch.arange(4, dtype=torch.uint8)]
    torch.save(s, path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", found.append)
    trainer(goes_on=True).resume(path)
    assert [r.tolist() for r in found[0]] == [[0, 1, 2, 3]]


# where the code comes from


def test_no_commit_is_no_commit(tmp_path):
    assert commit_of(tmp_path) is None  # a copy without history
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "a.py").write_text("")
    assert commit_of(tmp_path) is None  # not tracked by the repository around it
    subprocess.run(["git", "add", "a.py"], cwd=tmp_path, check=True)
    assert commit_of(tmp_path) is None  # tracked, but nothing is committed yet
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"], cwd=tmp_path, check=True
    )
    assert len(commit_of(tmp_path)) == 40
    (tmp_path / "a.py").write_text("1")
    assert commit_of(tmp_path).endswith(" with changes")


# a run's folder


def test_a_folder_with_steps_or_checkpoints_is_refused(trainer, tmp_path):
    t = trainer()
    t.fit(1)
    with pytest.raises(
        DataError, match="run: holds steps of an earlier run; go on with resume_from=last, .* overwrite=True"
    ):
        Run(tmp_path / "run")
    t.save()
    (tmp_path / "run/metrics.jsonl").unlink()
    with pytest.raises(DataError, match="run: holds checkpoints of an earlier run"):
        Run(tmp_path / "run")
    Run(tmp_path / "run", goes_on=True)
    Run(tmp_path / "run", overwrite=True)


def test_opening_a_folder_deletes_nothing(tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(DataError, match="is finished"):
        Run(tmp_path)
    run = Run(tmp_path, overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != ".lock"} == before
    run.write("config.yaml", {})
    assert not (tmp_path / "metrics.json").exists()


def child(code: str, *args, **how) -> subprocess.Popen:
    "Another process that runs some lines."
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        **how,
    )


def test_a_second_writer_is_refused_and_a_dead_one_forgotten(tmp_path):
    first = child(
        """
        import sys, time
        from flux4d.run import Run
        run = Run(sys.argv[1])
        print("open", flush=True)
        time.sleep(60)
        """,
        tmp_path,
    )
    assert first.stdout.readline() == "open\n"
    with pytest.raises(DataError, match="another process writes to this folder"):
        Run(tmp_path)
    first.kill()
    first.wait()
    Run(tmp_path).say("mine")
    Run(tmp_path, goes_on=True).say("the same process may open it again")


def test_an_unfinished_line_is_dropped_and_a_bad_one_named(tmp_path):
    run = Run(tmp_path)
    run.record(dict(step=1))
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 2, "total"')
    assert run.rows() == [dict(step=1)]
    run.rewind(2)
    run.record(dict(step=2))
    assert run.rows() == [dict(step=1), dict(step=2)]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnull\n{"step": 3}\n')
    with pytest.raises(DataError, match="metrics.jsonl: line 2 is not a logged step"):
        run.rows()


class FullFile:
    "A text file on a full disk: half of what is written arrives."

    def __init__(self, f):
        self.f = f

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.f.close()

    def write(self, text):
        self.f.write(text[: len(text) // 2])
        self.f.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said_and_leaves_no_torn_line(trainer, monkeypatch):
    t = trainer()
    t.run.record(dict(step=1))
    plain = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", **how: (
            FullFile(plain(self, mode, **how)) if mode == "a" else plain(self, mode, **how)
        ),
    )
    with pytest.raises(
        DataError,
        match="run/metrics.jsonl: could not be written because the disk is full; "
        "free some space and go on with resume_from=last",
    ):
        t.run.record(dict(step=2))
    monkeypatch.undo()
    assert (t.run.folder / "metrics.jsonl").read_text() == '{"step": 1}\n'

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        DataError, match="ckpt_step_000000.pt: could not be written because the disk is full; free some space"
    ):
        t.save()
    assert not list(t.run.folder.glob(".*.tmp"))


@pytest.mark.parametrize("hard", [True, False])
def test_file_systems_without_links(trainer, monkeypatch, hard):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    if not hard:
        monkeypatch.setattr(os, "link", refuse)
    t = trainer()
    t.fit(1)
    t.save()
    t.keep_best(20.0)
    t.fit(2)
    t.save()
    read = {a: load_checkpoint(t.run.folder / f"ckpt_{a}.pt")["step"] for a in ("last", "best")}
    assert read == dict(last=2, best=1) and not (t.run.folder / "ckpt_last.pt").is_symlink()


def test_text_is_utf8_under_any_locale(tmp_path):
    done = child(
        r"""
        import sys
        from flux4d.run import Run
        run = Run(sys.argv[1])
        run.record(dict(step=1, clip="stra\u00dfe"))
        run.note(machine="gr\u00f6\u00dfer")
        run.say("10 \u00b5s")
        run.write("a.txt", "\u00fc")
        print(run.rows()[0]["clip"] == "stra\u00dfe", run.meta()["machine"] == "gr\u00f6\u00dfer")
        """,
        tmp_path,
        env=os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="utf-8"),
    )
    assert done.communicate()[0].splitlines()[-1] == "True True"
    assert (tmp_path / "train.log").read_text(encoding="utf-8") == "10 µs\n" and (
        tmp_path / "a.txt"
    ).read_bytes() == "ü".encode()


@pytest.mark.parametrize("limit", ["disk", "size"])
def test_a_log_that_cannot_be_written_is_said_in_a_sentence(tmp_path, limit):
    done = child(
        r"""
        import os, resource, sys
        from pathlib import Path
        from flux4d.files import DataError
        from flux4d.run import Run
        run = Run(sys.argv[1])
        run.record(dict(step=1))
        if sys.argv[2] == "size": resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))
        else: Path.open = lambda *_, **__: open("/dev/full", "w", buffering=1)
        try: run.record(dict(step=2, note="x"*100))
        except DataError as e: sys.stdout.write(str(e))
        """,
        tmp_path / "run",
        limit,
    )
    said = done.communicate()[0]
    assert re.fullmatch(
        r"run/metrics.jsonl: could not be written because the (disk is full|file is larger than allowed); "
        r".* and go on with resume_from=last\.",
        said,
    )
    assert logged(tmp_path / "run/metrics.jsonl") == [dict(step=1)] and (
        tmp_path / "run/metrics.jsonl"
    ).read_text().endswith("\n")


def test_a_folder_that_cannot_be_made_is_said_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/run", Path("/proc/run")):
        with pytest.raises(
            DataError,
            match=r"/\.lock: could not be written because [^\n]*; "
            r"choose another place or correct its permissions and start again\.$",
        ):
            Run(folder)


@pytest.mark.parametrize("name", ["videos", "renders", "config.yaml", "report.html"])
def test_what_no_run_made_is_not_replaced(tmp_path, name):
    own = tmp_path / name
    if "." in name:
        own.write_text("mine: true")
    else:
        own.mkdir()
    for overwrite in (False, True):
        with pytest.raises(
            DataError, match=f"{name}: was not made by a run and would be replaced; choose another out_dir"
        ):
            Run(tmp_path, overwrite)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    run = Run(tmp_path / "run")
    run.write("config.yaml", dict(voxel={}, render={}, train={}))
    (tmp_path / "run/videos").mkdir()
    run.lock.release()
    (tmp_path / "run/.lock").unlink(missing_ok=True)  # a run's folder that was copied
    Run(tmp_path / "run")


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("flux4d.run.FileLock.acquire", refuse)
    Run(tmp_path).say("mine")


def test_left_over_files_are_swept_by_the_one_writer(tmp_path):
    (tmp_path / ".ckpt_step_000010.pt.x.tmp").write_bytes(b"half")
    run = Run(tmp_path)
    assert (tmp_path / ".ckpt_step_000010.pt.x.tmp").exists()
    run.say("first write")
    assert not list(tmp_path.glob(".*.tmp"))


# checkpoints


def test_last_and_best_are_kept_and_more_on_request(trainer):
    t = trainer(cfg=with_train(save_ckpt_every=1))
    t.callbacks = [lambda t: t.keep_best(30.0 - t.step) and None]  # the first is the best
    t.fit(4)

    def steps(t):
        return sorted(int(p.stem[-6:]) for p in t.run.folder.glob("ckpt_step_*.pt"))

    assert steps(t) == [1, 4]
    more = trainer("more", cfg=with_train(save_ckpt_every=1, keep_ckpts=3))
    more.fit(4)
    assert steps(more) == [2, 3, 4]


def test_saved_at_the_end_and_by_the_clock(trainer):
    t = trainer(cfg=with_train(iters=2, save_ckpt_every=0))
    t.fit()
    assert load_checkpoint(t.run.folder / "ckpt_last.pt")["step"] == 2
    often = trainer("often", cfg=with_train(save_ckpt_every=0, save_ckpt_minutes=1e-9))
    often.fit(1)  # not at its end
    assert load_checkpoint(often.run.folder / "ckpt_last.pt")["step"] == 1


def test_last_is_never_an_old_run(trainer):
    old = trainer()
    old.fit(3)
    old.save()
    new = trainer(overwrite=True)
    new.fit(1)  # ends before it saved anything
    assert (
        not (new.run.folder / "ckpt_last.pt").exists() and (new.run.folder / "ckpt_step_000003.pt").exists()
    )
    assert [r["step"] for r in step_rows(new)] == [1]
    new.save()
    assert load_checkpoint(new.run.folder / "ckpt_last.pt")["step"] == 1
    assert not (new.run.folder / "ckpt_step_000003.pt").exists()  # replaced only now


def test_newest_run(tmp_path):
    with pytest.raises(DataError, match="no run in .* has a checkpoint"):
        newest_run(tmp_path)
    for k, name in enumerate(("b", "a", "empty")):
        (tmp_path / name).mkdir()
        if name != "empty":
            (tmp_path / name / "ckpt_last.pt").write_text("")
            os.utime(tmp_path / name / "ckpt_last.pt", (k, k))
    assert newest_run(tmp_path).name == "a"


def test_where_a_run_starts_and_writes(trainer, tmp_path, monkeypatch):
    from flux4d.run_setup import resume_point

    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no run in papermill_runs has a checkpoint"):
        resume_point("last", "")
    assert not list(tmp_path.iterdir())  # nothing is left behind
    t = trainer("papermill_runs/run_001")
    t.fit(1)
    own, last = t.run.folder, t.save().with_name("ckpt_last.pt")

    def as_is(*a, **k):
        return tuple(x.resolve() if isinstance(x, Path) else x for x in resume_point(*a, **k))

    assert (
        as_is("last", "")
        == as_is("last", str(own))
        == as_is(str(last), str(own))
        == (last.resolve(), own.resolve(), True)
    )
    assert resume_point(str(last), "new") == (last, Path("new"), False) and not Path("new").exists()
    with pytest.raises(DataError, match="run_001: holds steps and checkpoints of an earlier run"):
        resume_point("", str(own))
    with pytest.raises(DataError, match="run_001: holds steps"):
        resume_point("last", str(own), optimizer=False)  # its steps would be lost
    assert resume_point("", str(own), overwrite=True) == (None, own, False)
    (own / "metrics.json").write_text("{}")
    with pytest.raises(DataError, match="this run is finished"):
        resume_point("last", "")
    (own / "ckpt_last.pt").unlink()
    with pytest.raises(DataError, match=r"run_001/ckpt_last.pt: does not exist; "):
        resume_point("last", str(own))


def spoil(what: str):
    "A change that makes a checkpoint wrong."

    def change(s: dict) -> None:
        part, _, how = what.partition(" ")
        if how == "gone":
            del s[part]
        elif how == "text":
            s[part] = "nonsense"
        elif how == "nan":
            next(v for v in s[part].values() if torch.is_tensor(v) and v.is_floating_point()).view(-1)[0] = (
                float("nan")
            )
        elif how == "tensor text":
            s[part][list(s[part])[-1]] = "nonsense"
        elif how == "odd":
            s[part] = dict(logs={"002": [1]})
        elif how == "foreign":
            s[part] = "os:system"

    return change


WRONG = [
    "rng gone",
    "rng text",
    "ema gone",
    "ema nan",
    "ema tensor text",
    "step gone",
    "step text",
    "kind gone",
    "kind foreign",
    "index_hash gone",
    "model text",
    "model nan",
    "model tensor text",
    "optimizer gone",
    "optimizer text",
    "config text",
    "seconds text",
    "trained text",
    "trained odd",
]


@pytest.mark.parametrize("what", WRONG)
def test_wrong_checkpoints_are_refused_in_a_sentence(trainer, tmp_path, what):
    t = trainer("first")
    s = t.state()
    spoil(what)(s)
    torch.save(s, tmp_path / "wrong.pt")
    with pytest.raises(DataError, match=r"^wrong\.pt: [^\n]*\.$"):
        trainer("second").resume(tmp_path / "wrong.pt")
    if what.split()[0] in ("ema", "kind", "config"):
        with pytest.raises(DataError, match=r"^wrong\.pt: [^\n]*\.$"):
            load_model(tmp_path / "wrong.pt", device="cpu")


OLDER = {
    "a field that has another name now": lambda s: s["config"]["model"].update(votes={}),
    "a model that is elsewhere now": lambda s: s.update(kind="flux4d.train:Flux4DBase"),
}


@pytest.mark.parametrize("what", OLDER)
def test_checkpoints_of_earlier_versions_are_met_with_a_sentence(trainer, tmp_path, what):
    s = trainer("first").state()
    OLDER[what](s)
    torch.save(s, tmp_path / "older.pt")
    sentence = r"^older\.pt: [^\n]*(is 'model.motion_prior' now|flux4d.train:Flux4DBase', which this version)[^\n]*\.$"
    with pytest.raises(DataError, match=sentence):
        load_model(tmp_path / "older.pt", device="cpu")
    for optimizer in (True, False):
        with pytest.raises(DataError, match=sentence):
            trainer("second", overwrite=True).resume(tmp_path / "older.pt", optimizer)


def test_a_config_of_an_earlier_version_is_met_with_a_sentence():
    for old, new in RENAMED.items():
        values = 1
        for part in reversed(old.split(".")):
            values = {part: values}
        with pytest.raises(DataError, match=f"has '{old}', a field of an earlier version of flux4d that is '{new}'"):
            config_from_dict(values, name="config.yaml")


def test_a_field_that_is_retired_is_met_with_a_sentence_and_read_over_in_a_checkpoint(trainer, tmp_path):
    for old, new in RETIRED.items():
        group, name = old.split(".")
        with pytest.raises(DataError, match=f"overrides: has '{old}', .* leave it out, or set {new}"):
            config_from_dict({group: {name: 1}}, name="overrides")
    s = trainer("first").state()
    s["config"]["data"] |= dict(keep_frames=1200, keep_clips=200)
    torch.save(s, tmp_path / "older.pt")
    load_model(tmp_path / "older.pt", device="cpu")
    trainer("second").resume(tmp_path / "older.pt")


def test_an_optimizer_or_generator_that_does_not_fit_is_refused(trainer, tmp_path):
    for k, change in enumerate(
        (
            dict(optimizer={}),
            dict(optimizer=dict(state={}, param_groups=[])),
            dict(rng=dict(cpu=torch.zeros(3, dtype=torch.uint8), cuda=[])),
            dict(rng=dict(cpu="x")),
            dict(best="high"),
            dict(kind="flux4d.nowhere:Model"),
        )
    ):
        torch.save(trainer(f"first{k}").state() | change, tmp_path / "odd.pt")
        with pytest.raises(DataError, match=r"^odd\.pt: "):
            if "kind" in change:
                load_model(tmp_path / "odd.pt", device="cpu")
            else:
                trainer(f"second{k}").resume(tmp_path / "odd.pt")


# steps that cannot be taken


def poison(t: Trainer, from_step: int, to_step: int = 10**9) -> None:
    "Make the loss of some steps NaN."
    sound = t.losses

    def losses(b, scene):
        out = sound(b, scene)
        bad = from_step <= t.step < to_step
        return {k: v * float("nan") for k, v in out.items()} if bad else out

    t.losses = losses


def test_training_that_is_not_finite_stops_and_names_the_first_clip(trainer):
    t = trainer(cfg=with_train(max_skipped=4))
    poison(t, 2)
    i, pairs = t.loader.draw(2)
    clip, (frame, camera) = t.loader.clips[i].id, pairs[0]
    sentence = (
        "training: 4 steps in a row were skipped, the first was step 3: its gradient is not finite, "
        f"with clip {clip}, frame {frame} of {camera}; .*max_skipped"
    )
    with pytest.raises(DataError, match=sentence):
        t.fit(50)
    log = (t.run.folder / "train.log").read_text()
    assert [int(s) for s in re.findall(r"step +(\d+)  skipped", log)] == [3, 4, 5, 6]


def test_single_skipped_steps_are_said_and_do_not_end_a_run(trainer):
    t = trainer(cfg=with_train(max_skipped=2, log_every=1))
    poison(t, 1, 2)
    rows = t.fit(3)
    assert t.skipped == 1 and [np.isfinite(r["grad_norm"]) for r in rows] == [True, False, True]
    assert all(torch.isfinite(p).all() for p in t.model.parameters())
    assert "step      2  skipped" in (t.run.folder / "train.log").read_text()


def go_bad(t: Trainer, names) -> None:
    "Make the clips of some steps unreadable."
    load = t.loader._load

    def bad(step, micro):
        if name := names(step, micro):
            raise DataError(f"002/lidar/{name}.pkl.gz: is truncated; get the file again.")
        return load(step, micro)

    t.loader._load = bad


def test_a_file_that_goes_bad_costs_its_steps_only(trainer):
    t = trainer(cfg=with_train(iters=6))
    go_bad(t, lambda step, micro: "07" if step in (1, 4) else "")
    rows = t.fit()
    assert (
        t.step == 6
        and t.skipped == 2
        and t.run.meta()["unread"] == {"002/lidar/07.pkl.gz: is truncated; get the file again.": 2}
    )
    assert [c for r in rows for c in r["clips"]] == [
        None if s in (1, 4) else t.loader.draw(s)[0] for s in range(6)
    ]
    assert (t.run.folder / "train.log").read_text().count("a clip is left out: 002/lidar/07.pkl.gz") == 2
    assert load_checkpoint(t.run.folder / "ckpt_last.pt")["unread"] == t.trained_on.unread and rows[-1]["unread"] == 2


def test_files_that_go_bad_are_bounded(trainer):
    t = trainer(cfg=with_train(max_unread=2, max_skipped=99))
    go_bad(t, lambda step, micro: f"{step:02d}" if step else "")
    with pytest.raises(
        DataError, match="training: 3 files went bad while it ran, the last one: 002/lidar/03.pkl.gz"
    ):
        t.fit()
    one = trainer("one", cfg=with_train(max_skipped=3))
    go_bad(one, lambda step, micro: "07")
    with pytest.raises(
        DataError, match="3 steps in a row were skipped, the first was step 1: nothing could be read"
    ):
        one.fit()


def test_one_micro_step_that_cannot_be_read(trainer):
    t = trainer(cfg=with_train(grad_accum_steps=2))
    go_bad(t, lambda step, micro: "07" if (step, micro) == (0, 1) else "")
    t.fit(1)
    assert t.skipped == 0 and named(t)[1] is None


def test_training_that_never_takes_a_step_ends_in_a_sentence(trainer):
    t = trainer(cfg=with_train(iters=3))
    poison(t, 0)
    with pytest.raises(
        DataError,
        match="training: none of its 3 steps could be taken, the first was step 1: "
        "its gradient is not finite, with clip",
    ):
        t.fit()
    assert not (t.run.folder / "ckpt_last.pt").exists()


# before the first step


def test_files_are_opened_before_the_first_step(tmp_path, monkeypatch):
    root = fabricate_log(tmp_path, "002", frames=20).parent
    files = files_of(clips_of(root), ("front_camera",))
    assert len(files) == len(set(files)) == 34 and damaged_files(files) == []
    photo, sweep = root / "002/camera/front_camera/03.jpg", root / "002/lidar/05.pkl.gz"
    photo.write_bytes(photo.read_bytes()[:-30])
    sweep.write_bytes(sweep.read_bytes()[:-30])
    (root / "002/lidar/06.pkl.gz").write_bytes(b"not gzip")
    (root / "002/lidar/07.pkl.gz").unlink()
    (root / "002/camera/front_camera/08.jpg").write_bytes(b"")
    found = damaged_files(files, progress=list)
    assert [f.split(": ")[0].rsplit("/", 1)[1] for f in found] == [
        "03.jpg",
        "08.jpg",
        "05.pkl.gz",
        "06.pkl.gz",
        "07.pkl.gz",
    ]
    with pytest.raises(
        DataError, match=r"03.jpg: is truncated or damaged; .*\(2 more files are not sound either.\)"
    ):
        refuse_damaged(files)
    with gzip.open(sweep, "wb") as f:
        f.write(bytes(5 << 20) + b".")  # what unpacks large is not kept
    assert damaged_files([sweep]) == []
    with gzip.open(sweep, "wb") as f:
        f.write(bytes(5 << 20))  # whole, but no pickle
    assert len(damaged_files([sweep])) == 1


# stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_says_how_to_go_on(trainer, number):
    straight = trainer("straight", cfg=with_train(log_every=1))
    straight.fit(6)
    t = trainer(cfg=with_train(log_every=1))
    sound = t.losses

    def losses(*args):
        if t.step == 2:
            os.kill(os.getpid(), number)  # in the middle of the third step
        return sound(*args)

    t.losses = losses
    before = signal.getsignal(number)
    with pytest.raises(
        Interrupted,
        match="interrupted at step 2, saved as ckpt_step_000002.pt; go on with -p resume_from last -p out_dir .*run",
    ) as e:
        t.fit(6)
    assert signal.getsignal(number) is before and e.value._render_traceback_() == [str(e.value)]
    assert not (t.run.folder / "metrics.json").exists()
    again = trainer(cfg=with_train(log_every=1), goes_on=True)
    again.resume(again.run.folder / "ckpt_last.pt")
    assert again.step == 2 and again.trained_on.pending == []
    again.fit(6)

    def same(t):
        return [{k: v for k, v in r.items() if k not in ("seconds", "waited", "host_bytes")} for r in step_rows(t)]

    assert same(again) == same(straight)  # bit for bit
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.model.state_dict().values(), straight.model.state_dict().values())
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_of_the_evaluation_says_how_to_go_on(trainer, number):
    t = trainer(cfg=with_train(iters=1))
    for remedy in ("start again", "go on with -p resume_from last -p out_dir .*run"):
        with pytest.raises(Interrupted, match=f"interrupted after step {t.step}, the last one; {remedy}$"):
            with t.after_training():
                os.kill(os.getpid(), number)
                raise AssertionError("evaluation went on")
        t.fit()


def test_an_interrupt_while_waiting_or_validating_takes_effect_at_once(trainer):
    t = trainer()

    def slow(trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("validation went on")

    t.callbacks = [slow]
    with pytest.raises(Interrupted, match="at step 1"):
        t.fit(5)
    waiting = trainer("waiting")
    waiting.fit(1)
    release, batch = threading.Event(), waiting.loader.batch

    def wait(step, micro):
        os.kill(os.getpid(), signal.SIGINT)
        release.wait(20)
        return batch(step, micro)

    waiting.loader.batch = wait
    start = time.time()
    with pytest.raises(Interrupted, match="at step 1"):
        waiting.fit(5)
    assert time.time() - start < 10


@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("kill", ["signal", "before its score", "after its score"])
def test_a_validation_that_was_cut_off_is_made_up_for(trainer, kill, at):
    class Killed(BaseException):
        pass

    cfg = with_train(iters=4, eval_every=2, save_ckpt_every=1, log_every=1)

    def watch(t, until=0):
        def call(t):
            if t.step == until and kill == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            if t.step == until and kill == "before its score":
                raise Killed
            found = t.keep_best(20.0 + t.step)
            if t.step == until:
                raise Killed
            return found

        t.callbacks = [every(2, call)]
        return t

    straight = watch(trainer("straight", cfg=cfg))
    straight.fit()
    with pytest.raises((Killed, Interrupted)):
        watch(trainer(cfg=cfg), at).fit()
    again = watch(trainer(cfg=cfg, goes_on=True))
    again.resume(again.run.folder / "ckpt_last.pt")
    again.fit()

    def same(t):
        return [{k: v for k, v in r.items() if k not in ("seconds", "waited", "host_bytes")} for r in t.run.rows()]

    assert same(again) == same(straight) and [r["step"] for r in same(again) if "score" in r] == [2, 4]

    def best(t):
        return load_checkpoint(t.run.folder / "ckpt_best.pt")

    assert best(again)["step"] == best(straight)["step"] == 4
    assert all(torch.equal(a, b) for a, b in zip(best(again)["ema"].values(), best(straight)["ema"].values()))


def test_an_update_is_never_cut_in_two(trainer):
    t = trainer()
    update = t.opt.step

    def step():
        os.kill(os.getpid(), signal.SIGINT)
        update()

    t.opt.step = step
    with pytest.raises(Interrupted, match="at step 1"):
        t.fit(5)
    s = load_checkpoint(t.run.folder / "ckpt_last.pt")
    assert s["step"] == 1 and s["ema"]["n_averaged"] == 1 and len(s["pending"]) == 0


def test_a_second_interrupt_ends_without_saving(trainer):
    t = trainer()
    t.fit(1)

    def save(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    t.losses, t.save = lambda *_: os.kill(os.getpid(), signal.SIGINT), save
    with pytest.raises(KeyboardInterrupt):
        t.fit(5)


def test_no_batch_is_loaded_after_training_ends(trainer):
    t = trainer(cfg=with_train(prefetch=8))
    t.fit(1)
    assert t.loader.ahead == {}


# evaluation


def test_an_evaluation_reads_a_killed_runs_log_and_replaces_no_training_run(trainer, tmp_path):
    from flux4d.evaluate import open_subject, report_folder, training_rows

    t = trainer()
    t.fit(1)
    with (t.run.folder / "metrics.jsonl").open("a") as f:
        f.write('{"step": 2, "tot')
    assert [r["step"] for r in training_rows(t.run.folder)] == [1] and training_rows(None) == []
    with pytest.raises(
        DataError, match="out_dir: run holds a training run, whose record would be replaced; choose another"
    ):
        report_folder(open_subject("", "lift"), str(t.run.folder))
    torch.save(t.state() | dict(step="many"), tmp_path / "odd.pt")
    with pytest.raises(DataError, match="odd.pt: has something else for 'step'"):
        open_subject(str(tmp_path / "odd.pt"))
