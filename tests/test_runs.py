"Runs: what was trained on is known, resuming is honest, nothing is lost and nothing wrong is let in."
import json, subprocess
from dataclasses import replace
from pathlib import Path
import pytest
import torch
from flux4d.cache import LiftCache
from flux4d.clips import Clip, ClipConfig, InputViews, TargetViews, build_index, fingerprint, load_views, select_clips
from flux4d.lift import LiftConfig
from flux4d.pandaset import DataError, PandaSet, fabricate_log
from flux4d.predictor import PredictorConfig
from flux4d.run import Run, commit_of, load_checkpoint, trained_frames
from flux4d.train import Config, DataConfig, Loader, TrainConfig, Trainer, lr_at
from flux4d.unet import UNetConfig

TINY = Config(data=DataConfig(image_scale=1., loader_threads=1), init=LiftConfig(fill=False),
              model=PredictorConfig(unet=UNetConfig(widths=(4, 8), blocks=1)),
              train=TrainConfig(iters=100, warmup=1, eval_every=0, log_every=5, save_ckpt_every=0, views_per_step=1))


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


@pytest.fixture
def trainer(city, cache, tmp_path):
    "A function that makes a trainer in a folder."
    def make(folder: str = "run", cfg: Config = TINY, clips=None, index: str = "", **how) -> Trainer:
        clips = clips_of(city) if clips is None else clips
        return Trainer(cfg, Loader(clips, cfg, cache), Run(tmp_path / folder, **how), index)
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
    t.fit(8)                                                     # rows at 1 and 5; 6 to 8 are in no row yet
    t.save()
    again = trainer()
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
    again = trainer(clips=clips_of(city)[1:])
    again.resume(again.run.folder / "ckpt_last.pt")
    again.fit(10)
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
    assert load_checkpoint(path)["trained"]["logs"][clips[0].log.id]["identity"] == fingerprint(clips[0].log, ())


def test_end_of_training_writes_meta_without_a_checkpoint(trainer):
    t = trainer()
    t.run.write("meta.json", dict(machine="mine", trained=None))
    t.fit(2)
    assert t.run.meta()["machine"] == "mine" and trained_frames(t.run.meta()) == t.trained


def test_weights_bring_their_history_and_two_data_sets_are_told_apart(trainer, tmp_path):
    t = trainer("first")
    t.fit(2)
    path = t.save()
    other = clips_of(fabricate_log(tmp_path / "other", "002", speed=8.).parent)
    assert other[0].log.id in {log for log, _ in t.trained}      # the same id, another street
    grown = trainer("second", clips=other)
    grown.resume(path, optimizer=False)
    assert grown.trained == t.trained and grown.step == 0
    grown.fit(1)
    found = trained_frames(grown.save())
    assert {k: found[k] for k in t.trained} == t.trained
    assert len({identity for log, identity in found if log == other[0].log.id}) == 2


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
    assert not torch.equal(depth((1,), None, target, TargetViews), judged[0])          # left out: the lift's own
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
    clip.input_frames = clip.input_frames[:-1]                   # what `inputs` reads is checked too
    assert set(loader.inputs(clip).frame.tolist()) == set(clip.input_frames)
    seen, targets = loader.inputs(clip), loader.views(clip, [(clip.target_frames[0], "front_camera")])
    for v, kind in ((seen, InputViews), (targets, TargetViews)):
        assert {type(x) for x in (v[0], v[:1], v.to("cpu"), replace(v, depth=v.depth))} == {kind}


# the schedule

def test_warm_up_is_bounded_by_the_budget():
    cfg = TrainConfig(iters=30_000, warmup=200, minutes=1.)
    slow = [lr_at(s, cfg, seconds=2.*s) for s in range(31)]      # 30 steps fit
    assert max(slow) > .9*cfg.lr and slow.index(max(slow)) <= 4
    assert slow[-1] == pytest.approx(cfg.lr*cfg.final_lr)
    assert slow[:2] == sorted(slow[:2]) and slow[0] < .1*cfg.lr
    assert lr_at(1, replace(cfg, minutes=10.), seconds=76., started=75.) < .1*cfg.lr # a first step that compiled for 75 s
    assert [lr_at(s, replace(cfg, minutes=None)) for s in (0, 99, 199)] == pytest.approx([cfg.lr/200, cfg.lr/2, cfg.lr])


# resuming

def test_resume_says_what_differs(trainer):
    t = trainer("first")
    path = t.save()
    later = trainer("second", cfg=replace(with_train(seed=3, lr=5e-4), data=replace(TINY.data, image_scale=.5)))
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
    assert f"part.pt lacks 1 tensors, which start untrained: {lost}" in (later.run.folder / "train.log").read_text()
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
    trainer().resume(path)
    assert [r.tolist() for r in found[0]] == [[0, 1, 2, 3]]


# where the code comes from

def test_no_commit_is_no_commit(tmp_path):
    assert commit_of(tmp_path) is None                           # a copy without history
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "a.py").write_text("")
    assert commit_of(tmp_path) is None                           # not tracked by the repository around it
    subprocess.run(["git", "add", "a.py"], cwd=tmp_path, check=True)
    assert commit_of(tmp_path) is None                           # tracked, but nothing is committed yet
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"], cwd=tmp_path, check=True)
    assert len(commit_of(tmp_path)) == 40
    (tmp_path / "a.py").write_text("1")
    assert commit_of(tmp_path).endswith(" with changes")
