"A lift cache stays in its folder, believes no file, and is no condition for a run."

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from dataclasses import fields
from pathlib import Path
import numpy as np
import pytest
import torch
from numpy.lib import format as npy
from flux4d import cache as module
from flux4d.background import BackgroundConfig
from flux4d.cache import LiftCache, load_arrays, pack, unpack, fill_cache
from flux4d.clips import Clip, ClipConfig, build_index
from flux4d.gaussians import Gaussians
from flux4d.gap_filling import InitConfig
from flux4d.pandaset import PandaSet
from flux4d.log_files import fabricate_log

HOW = InitConfig(fill=False), BackgroundConfig(mode="none")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    fabricate_log(root, "001", frames=16)
    return Clip(PandaSet(root)["001"], build_index(root, ClipConfig())["clips"][0])


def equal(a, b):
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Gaussians))


def said(f):
    "The result of a call, and the warnings it gave."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        out = f()
    return out, [str(w.message) for w in found]


@pytest.fixture
def kept(clip, tmp_path):
    "A filled cache, its file and what it holds."
    cache = LiftCache(tmp_path / "cache")
    g = cache.get(clip, *HOW)
    return cache, cache.path(clip, *HOW), g


@pytest.mark.parametrize("name", ("../../../away", "/away", "a/b", "..", "", "x" * 300, "nul\0byte"))
def test_a_clip_cannot_name_its_file(clip, tmp_path, name):
    odd = object.__new__(Clip)
    odd.__dict__.update(clip.__dict__ | dict(id=name))
    cache = LiftCache(tmp_path / "a/b/cache")
    before = set(tmp_path.rglob("*"))
    got, words = said(lambda: cache.get(odd, *HOW))
    assert words == [] and len(got)
    (new,) = set(tmp_path.rglob("*")) - before
    assert new.parent == cache.folder and new == cache.path(odd, *HOW)


def nan(d):
    d["means"] = np.where(np.arange(len(d["means"]))[:, None] == 3, np.nan, d["means"]).astype(np.float32)


def infinite(d):
    d["opacity_logits"] = np.full(1, np.inf, np.float32)


def shorter(d):
    d["colour_logits"] = d["colour_logits"][:-1]


def longer(d):
    d["t"] = np.concatenate([d["t"], d["t"]])


def vast(d):
    d.update({k: np.array([10**12, *d[k][1:]]) for k in d if k.endswith("_shape")})


def vast_one(d):
    d["t_shape"] = np.array([10**12])


def negative(d):
    d["t_shape"] = np.array([-1])


def flat(d):
    d["means"] = d["means"].ravel()


def scalar(d):
    d["means"] = np.float32(1)


def words(d):
    d["t"] = np.array(["now"] * len(d["means"]))


def kinds(d):
    d["kind"] = np.full(1, 9, np.int16)


def fewer(d):
    del d["quats"]


def none(d):
    d.update({k: np.array([0, *v[1:]]) if k.endswith("_shape") else v[:0] for k, v in d.items()})


@pytest.mark.parametrize(
    "fault",
    (nan, infinite, shorter, longer, vast, vast_one, negative, flat, scalar, words, kinds, fewer, none),
)
def test_wrong_files_are_made_again(clip, kept, fault):
    cache, path, g = kept
    d = pack(g)
    fault(d)
    np.savez(open(path, "wb"), **d)
    got, words = said(lambda: cache.get(clip, *HOW))
    assert equal(got, g) and words == [] and equal(unpack(load_arrays(path)), g)


def claims(path, d):
    "An archive whose array claims a terabyte."
    with zipfile.ZipFile(path, "w") as z:
        for k, v in d.items():
            with z.open(f"{k}.npy", "w") as f:
                if k == "means":
                    npy.write_array_header_1_0(f, dict(shape=(10**12, 3), fortran_order=False, descr="<f4"))
                else:
                    npy.write_array(f, v)


def squeezed(path, d):
    "An archive of zeros that unpacks to a hundred times its size."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for k, v in (d | dict(means=np.zeros((10**6, 3), np.float32))).items():
            with z.open(f"{k}.npy", "w") as f:
                npy.write_array(f, v)


FILES = dict(
    claims=claims,
    squeezed=squeezed,
    text=lambda p, d: p.write_text("no archive"),
    nothing=lambda p, d: p.write_bytes(b""),
    array=lambda p, d: np.save(open(p, "wb"), np.zeros(9)),
    objects=lambda p, d: np.savez(open(p, "wb"), **d | dict(means=np.array([None] * 9, object))),
)


@pytest.mark.parametrize("kind", FILES)
def test_odd_archives_are_made_again(clip, kept, kind):
    cache, path, g = kept
    FILES[kind](path, pack(g))
    got, words = said(lambda: cache.get(clip, *HOW))
    assert equal(got, g) and words == [] and equal(unpack(load_arrays(path)), g)


def test_a_folder_in_place_of_the_file(clip, kept):
    cache, path, g = kept
    path.unlink()
    (path / "inside").mkdir(parents=True)
    (got, again), words = said(lambda: (cache.get(clip, *HOW), cache.get(clip, *HOW)))
    assert equal(got, g) and equal(again, g) and len(words) == 1 and (path / "inside").is_dir()


def one_sentence(words, *parts):
    assert (
        len(words) == 1
        and words[0].endswith(".")
        and ". " not in words[0]
        and all(p in words[0] for p in parts)
    ), words


def test_a_cache_that_cannot_be_made(clip, kept, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file/below"):

        def run():
            cache = LiftCache(folder)
            return [cache.get(clip, *HOW) for _ in range(3)]

        got, words = said(run)
        assert all(equal(g, kept[2]) for g in got)
        one_sentence(words, "lift cache", "not kept", "choose another folder")


def test_a_full_disk(clip, kept, monkeypatch):
    cache, path, g = kept
    path.unlink()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    got, words = said(lambda: [cache.get(clip, *HOW) for _ in range(3)])
    assert all(equal(x, g) for x in got) and list(cache.folder.iterdir()) == []
    one_sentence(words, "no space left", "free space")


def write_slowly(path, started, go):
    "Write a file, its clock far in the past, and wait in the middle."
    from flux4d.files import atomic_write

    with atomic_write(path) as tmp:
        tmp.write_bytes(b"half")
        os.utime(tmp, (1, 1))
        started.set()
        go.wait(60)
        tmp.write_bytes(b"whole")


@pytest.mark.parametrize("age", (0, 1e9, -1e9))
def test_left_overs_go_whatever_their_clock_says(tmp_path, age):
    left = tmp_path / ".001_000_015_ab.npz.x1y2.tmp"
    left.write_bytes(b"half")
    os.utime(left, (time.time() - age,) * 2)
    other = tmp_path / ".hidden"
    other.touch()
    mine = tmp_path / "notes.tmp"
    mine.touch()
    LiftCache(tmp_path)
    assert not left.exists() and other.exists() and mine.exists()


def test_what_a_live_process_writes_stays(tmp_path):
    there = multiprocessing.get_context("fork")
    started, go = there.Event(), there.Event()
    p = there.Process(target=write_slowly, args=(tmp_path / "X.npz", started, go))
    p.start()
    assert started.wait(60)
    (busy,) = tmp_path.glob(".X.npz.*.tmp")
    LiftCache(tmp_path)
    assert busy.exists()
    go.set()
    p.join(60)
    assert p.exitcode == 0 and (tmp_path / "X.npz").read_bytes() == b"whole"
    p = there.Process(target=write_slowly, args=(tmp_path / "Y.npz", started := there.Event(), there.Event()))
    p.start()
    assert started.wait(60)
    p.kill()
    p.join(60)
    (left,) = tmp_path.glob(".Y.npz.*.tmp")
    LiftCache(tmp_path)
    assert not left.exists()


def test_workers_lift_elsewhere_and_warn_here_once(clip, kept, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(module, "init_gaussians", None)  # of no use in this process
    n, words = said(lambda: fill_cache(LiftCache(tmp_path / "file"), [clip, clip], *HOW, workers=1))
    assert n == [len(kept[2])] * 2
    one_sentence(words, "not kept")


FOREVER = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from flux4d.cache import end_with_parent
if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    (tmp_path / "forever.py").write_text(FOREVER)
    p = subprocess.Popen(
        [sys.executable, tmp_path / "forever.py"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(Path(module.__file__).parents[1])),
    )
    worker = int(p.stdout.readline())
    p.send_signal(signal.SIGKILL)
    p.wait()
    p.stdout.close()

    def alive():
        "Running, and not just waiting to be collected."
        try:
            return "State:\tZ" not in Path(f"/proc/{worker}/status").read_text()
        except FileNotFoundError:
            return False

    for _ in range(100):
        if not alive():
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    assert False, "the worker goes on without its parent"
