"Other machines: without spconv, without the locks of Unix, with another Python, and what pip takes for each."

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
import pytest
import torch
from packaging.requirements import Requirement
import flux4d
from flux4d import files
from flux4d.city.logs import fixture_city
from flux4d.records import repo_root
from test_use import small_checkpoint

ROOT = repo_root(Path(__file__).parent)
MODULES = sorted((ROOT / "flux4d").rglob("*.py"))

HIDE = """import sys
for missing in ("spconv", "cumm", "fcntl", "resource", "triton"):
    sys.modules[missing] = None
"""

IMPORT_ALL = """
import importlib, pkgutil, flux4d
for found in pkgutil.walk_packages(flux4d.__path__, "flux4d."):
    importlib.import_module(found.name)
from flux4d.unet import spconv
assert spconv.SparseConvTensor.__module__ == "flux4d.sparse_convolution"
"""

TRAIN = """
from pathlib import Path
import torch
from test_kill import small_trainer
torch.set_num_threads(1)
trainer = small_trainer(Path(sys.argv[1]))
before = [p.detach().clone() for p in trainer.model.parameters()]
trainer.fit(2)
assert trainer.step == 2
assert any((p - q).abs().max() > 0 for p, q in zip(trainer.model.parameters(), before))
assert all(p.isfinite().all() for p in trainer.model.parameters())
"""

USE = """
import flux4d
from flux4d.city.logs import fixture_city
model = flux4d.load(sys.argv[1], device="cpu")
scene = model.reconstruct(flux4d.PandaSet(fixture_city())["001"].clip(start=0))
assert scene.render(scene.camera("front_camera", seconds=0.75)).rgb.isfinite().all()
scene.save(sys.argv[2])
"""

REPORT = """
from flux4d.report_pages import report_main
assert report_main([sys.argv[1], "--report"]) == 0
"""


def run_without(program, *args):
    "A program on a machine that lacks what only some have."
    command = [sys.executable, "-c", HIDE + program, *map(str, args)]
    paths = dict(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]), OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | paths, cwd=ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_every_module_is_imported():
    run_without(IMPORT_ALL)


def test_a_small_model_trains(tmp_path):
    run_without(TRAIN, tmp_path)


def test_weights_make_the_same_scene(tmp_path):
    small_checkpoint(tmp_path)
    run_without(USE, tmp_path / "ckpt_best.pt", tmp_path / "a.scene")
    without = flux4d.load_scene(tmp_path / "a.scene")
    clip = flux4d.PandaSet(fixture_city())["001"].clip(start=0)
    scene = flux4d.load(tmp_path / "ckpt_best.pt", device="cpu").reconstruct(clip)
    assert len(scene) == len(without)
    for name in ("means", "log_scales", "colour_logits", "opacity_logits"):
        a, b = (getattr(s.gaussians, name) for s in (scene, without))
        assert (a - b).norm() <= 1e-4 * a.norm(), name
    moves = scene.velocity.norm()
    assert moves > 0 and (scene.velocity - without.velocity).norm() <= 1e-3 * moves


def test_a_run_is_reported(tmp_path):
    shutil.copytree(ROOT / "papermill_runs/pandaset002_full_heldout", tmp_path / "run")
    run_without(REPORT, tmp_path / "run")
    assert "PSNR" in (tmp_path / "run/report.md").read_text()


def test_files_are_written_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    for text in ("one", "two"):
        with files.atomic_write(tmp_path / "a.txt") as tmp:
            tmp.write_text(text)
    with pytest.raises(RuntimeError), files.atomic_write(tmp_path / "a.txt") as tmp:
        tmp.write_text("half")
        raise RuntimeError
    assert [p.read_text() for p in tmp_path.iterdir()] == ["two"]


def wanted_by(**machine):
    "Names of the packages that pip takes for a machine."
    project = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("\n]")[0]
    asked = map(Requirement, re.findall(r'^    "([^"]+)"', project, re.M))
    return {r.name for r in asked if r.marker is None or r.marker.evaluate(machine)}


@pytest.mark.parametrize(
    "system, machine, python, package",
    [
        ("linux", "x86_64", "3.10", "spconv-cu120"),
        ("linux", "x86_64", "3.11", "spconv-cu120"),
        ("linux", "x86_64", "3.12", "spconv-cu126"),
        ("linux", "x86_64", "3.13", "spconv-cu126"),
        ("win32", "AMD64", "3.11", "spconv-cu120"),
        ("win32", "AMD64", "3.13", "spconv-cu126"),
        ("linux", "aarch64", "3.12", None),
        ("darwin", "arm64", "3.12", None),
        ("darwin", "x86_64", "3.11", None),
    ],
)
def test_pip_takes_the_package_that_exists(system, machine, python, package):
    names = wanted_by(sys_platform=system, platform_machine=machine, python_version=python)
    assert {name for name in names if name.startswith("spconv")} == ({package} if package else set())
    assert {"torch", "gsplat", "numba"} <= names


def test_modules_are_read_by_python_3_10_to_3_13():
    "The grammar of the oldest one; of the standard library, nothing that the oldest lacks or the newest has lost."
    young = {"tomllib"}
    gone = {"asynchat", "asyncore", "cgi", "crypt", "distutils", "imp", "pipes", "smtpd", "telnetlib"}
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
        names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
        names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert not (gone | young) & {str(name).split(".")[0] for name in names}, path.name


def test_without_cuda_spconv_describes_no_kernels_for_gpus():
    "Describing them takes seconds of every process that imports a network."
    core = pytest.importorskip("spconv.core")
    importlib.import_module("flux4d.unet")
    described = bool(core.ALL_NATIVE_PARAMS), bool(core.ALL_IMPGEMM_PARAMS)
    assert described == (torch.backends.cuda.is_built(),) * 2
