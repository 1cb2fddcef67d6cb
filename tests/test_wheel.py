"The package as somebody installs it: a wheel in a fresh environment, used in an empty folder."

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
import pytest
import yaml
import flux4d
from flux4d.records import repo_root
from test_use import nine_lines, small_checkpoint

ROOT = repo_root(Path(__file__).parent)


def run(command, folder, **env):
    "Standard output of a command that knows nothing of this repository."
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("FLUX4D_")}
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True, env=kept | env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from what a source package holds; nothing is downloaded."
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "flux4d", source / "flux4d", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", source, "--no-deps", "--no-build-isolation", "--no-index", "-w", folder / "out"], folder)
    (built,) = (folder / "out").glob("flux4d-*.whl")
    return built


def share_compiled(source, copy):
    "What numba has made of these files serves for their copies too, once those have the same times."
    for path in source.rglob("*"):
        if path.suffix in (".py", ".nbi", ".nbc"):
            place = copy / path.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            if path.suffix != ".py":
                shutil.copy(path, place)
            os.utime(place, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "A fresh environment with the wheel; what it needs comes from the running one."
    home = tmp_path_factory.mktemp("fresh") / "env"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin/python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run([*pip, "install", "--no-deps", "--no-index", wheel], home)
    packages = run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], home).strip()
    theirs = sorted({sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")})
    Path(packages, "running_environment.pth").write_text("\n".join(theirs) + "\n")
    share_compiled(ROOT / "flux4d", Path(packages, "flux4d"))
    return home


def test_the_wheel_is_whole(wheel):
    "All files of the package, the licence, and what an installer reads."
    with zipfile.ZipFile(wheel) as held:
        names = set(held.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        said = held.read(about).decode()
    ours = {p for p in (ROOT / "flux4d").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {str(p.relative_to(ROOT)) for p in ours} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"flux4d", about.split("/")[0]}
    for line in (f"Version: {flux4d.__version__}", "License-Expression: Apache-2.0", "Requires-Python: >=3.10"):
        assert line in said.splitlines()
    for extra in ("viewer", "lenses", "datasets", "kernels", "lpips", "docs", "dev"):
        assert f"Provides-Extra: {extra}" in said and f"| `{extra}` |" in (ROOT / "docs/run.md").read_text()


def test_the_citation_names_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == flux4d.__version__ and cited["license"] == "Apache-2.0"
    assert cited["references"][0]["title"] in (ROOT / "README.md").read_text()
    assert f"## {flux4d.__version__}\n" in (ROOT / "docs/changelog.md").read_text()


def test_the_nine_lines_from_a_wheel(installed, tmp_path):
    small_checkpoint(tmp_path / "made")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "ckpt_best.pt").write_bytes((tmp_path / "made/ckpt_best.pt").read_bytes())
    (empty / "program.py").write_text(nine_lines() + "print(flux4d.__file__)\n")
    out = run([installed / "bin/python", "program.py"], empty)
    assert Path(out.splitlines()[-1]).resolve().is_relative_to(installed.resolve())
    assert {"a.scene", "a.ply", "a.mp4"} <= {p.name for p in empty.iterdir()}


def test_commands_from_a_wheel(installed, tmp_path):
    for command in ("flux4d-weights", "flux4d-check", "flux4d-city"):
        assert "usage: " + command in run([installed / "bin" / command, "--help"], tmp_path)
    loaded = "import sys, flux4d; print(sorted({'torch', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    assert run([installed / "bin/python", "-c", loaded], tmp_path).strip() == "[]"
    assert not list(tmp_path.iterdir())
