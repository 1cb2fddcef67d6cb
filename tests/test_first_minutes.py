"""What a newcomer sees first: the terminal of a run, the PyTorch of the demo, what a saved notebook leaves in git."""

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace
import pytest
from traitlets.config import Config
from flux4d.brief import brief_lines
from flux4d.notebooks import read_notebook, write_notebook
from flux4d.records import repo_root

ROOT = repo_root(Path(__file__).parent)

# the terminal of a headless notebook

CELL = """from flux4d.terminal import progress_bar, tell
tell("a line")
seen = list(progress_bar(range(3), "counting", "numbers"))"""


@pytest.fixture
def toy(tmp_path):
    "A notebook of one cell that says a line and shows a bar."
    kernel = dict(name="python3", display_name="python3", language="python")
    cell = dict(cell_type="code", id="c0", metadata={}, execution_count=None, outputs=[], source=CELL)
    content = dict(cells=[cell], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    write_notebook(tmp_path / "toy.ipynb", content)
    return tmp_path / "toy.ipynb"


def screen_of(columns):
    "Both ends of a terminal."
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 * bool(columns), columns, 0, 0))
    return ours, theirs


def shown(notebook, *options, columns=None, **env):
    "What the terminal gets while papermill runs a notebook."
    command = [sys.executable, "-m", "papermill", str(notebook), str(notebook.with_name("out.ipynb")), *options]
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTEST_CURRENT_TEST", "JPY_SESSION_NAME")}
    ours, theirs = os.pipe() if columns is None else screen_of(columns)
    where = dict(stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, cwd=notebook.parent)
    with subprocess.Popen(command, env=kept | dict(PYTHONPATH=str(ROOT)) | env, **where):
        os.close(theirs)
        found = b""
        try:
            while piece := os.read(ours, 65536):
                found += piece
        except OSError:  # how a screen ends
            pass
    os.close(ours)
    return found.decode()


def test_a_pipe_gets_whole_lines(toy):
    lines = shown(toy).splitlines()
    assert "a line" in lines
    bars = [line for line in lines if line.startswith("counting")]
    assert bars and bars[-1].startswith("counting: 100%") and "3 of 3 numbers" in bars[-1]
    assert len(bars) == len(set(bars))  # no state twice


@pytest.mark.parametrize("columns", [120, 0], ids=["wide", "of unknown width"])
def test_a_screen_gets_one_line_written_anew(toy, columns):
    said = shown(toy, columns=columns)
    assert "\r\x1b[Ka line\r\n" in said  # papermill's own bar is wiped first
    assert "\r\x1b[Kcounting: 100%" in said


def test_with_log_output_a_line_is_said_once(toy):
    assert shown(toy, "--log-output").count("a line") == 1


def test_a_kernel_of_a_server_leaves_its_terminal_alone(toy):
    said = shown(toy, JPY_SESSION_NAME="toy.ipynb")
    assert "a line" not in said and "counting" not in said
    assert "a line" in toy.with_name("out.ipynb").read_text()  # it stands below the cell


# what a run says first


def test_a_run_speaks_before_it_loads_anything():
    cells = [c["source"] for c in read_notebook(ROOT / "nbs/60_stage6.ipynb").cells if c["cell_type"] == "code"]
    first = next(i for i, source in enumerate(cells) if "tell(*announcement(" in source)
    heavy = next(i for i, source in enumerate(cells) if "flux4d.refine" in source)
    assert first < heavy
    code = "import sys, flux4d.announce; print({'spconv', 'gsplat', 'matplotlib', 'numba'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


FAULT = """from flux4d.files import DataError
from flux4d.terminal import say_faults_shortly
say_faults_shortly()
def somewhere_deep():
    raise DataError("eval_logs: is empty; name some.")
somewhere_deep()"""


def test_a_fault_of_the_data_ends_a_headless_notebook_with_its_sentence(toy):
    said = []
    for source in (FAULT, FAULT.replace("say_faults_shortly()\n", "")):
        content = json.loads(toy.read_text())
        content["cells"][0]["source"] = source
        toy.write_text(json.dumps(content))
        said.append(shown(toy))
    short, long = (text.partition('Exception encountered at "In [1]":')[2].strip() for text in said)
    assert short == "DataError: eval_logs: is empty; name some." and "somewhere_deep()" in long


def test_both_notebooks_that_measure_say_faults_shortly_and_where_the_result_is():
    for name in ("60_stage6", "61_evaluate"):
        source = "\n".join(c["source"] for c in read_notebook(ROOT / f"nbs/{name}.ipynb").cells)
        assert "\nsay_faults_shortly()\n" in source and "\ntell(*brief_lines(" in f"\n{source}"


def test_what_ends_the_demo_names_weights_and_the_next_command(tmp_path):
    run = tmp_path / "demo"
    shutil.copytree(ROOT / "papermill_runs/city_full", run, ignore=shutil.ignore_patterns("*.jpg"))
    (run / "ckpt_last.pt").touch()
    model, look = brief_lines(run, "data/city")[-3:-1]
    assert model.split() == ["model", f"{run}/ckpt_last.pt"]
    log = json.loads((run / "metrics.json").read_text())["logs"][0]
    assert look.split(None, 1)[1] == f"flux4d-view {run}/ckpt_last.pt data/city --log {log}"


# which PyTorch the demo installs

FAKE = """#!/bin/bash
here=$(cd "$(dirname "$0")" && pwd)
echo "$*" >> "$LOG"
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python;;
  *urlopen*) exit $UNREACHABLE;;
  *--index-url*) exit $NO_WHEEL;;
esac
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    "What `make .venv/.ready` asks pip for, in a folder of its own."
    if not shutil.which("make"):
        pytest.skip("no make here")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "uname", "touch", "dirname", "mkdir", "cp", "sed", "id", "nproc", "make"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python3").write_text(FAKE)
    (tools / "python3").chmod(0o755)

    def run(*words, gpu=False, unreachable=0, no_wheel=0):
        if gpu:
            (tools / "nvidia-smi").symlink_to(shutil.which("touch"))
        env = dict(PATH=str(tools), LOG=str(tmp_path / "log"), UNREACHABLE=str(unreachable), NO_WHEEL=str(no_wheel))
        done = subprocess.run(["make", ".venv/.ready", *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "log").read_text().splitlines()
        return [re.sub(r".*root-user-action=ignore ", "", line) for line in lines if "-m pip" in line]

    return run


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="CUDA comes along on Linux only")
PLAIN = "torch==2.13.0"
ALL = f"{PLAIN} -e .[dev]"


@LINUX
def test_without_a_gpu_no_cuda_is_installed(install):
    assert install() == [f"{PLAIN} --index-url https://download.pytorch.org/whl/cpu", ALL]


@LINUX
@pytest.mark.parametrize("fault", [dict(unreachable=1), dict(no_wheel=1)])
def test_without_the_index_pip_looks_where_it_always_does(install, fault):
    assert install(**fault)[-2:] == [PLAIN, ALL]


def test_with_a_gpu_the_usual_build_is_installed(install):
    assert install(gpu=True) == [PLAIN, ALL]


def test_a_build_that_is_named_is_taken(install):
    assert install("TORCH=torch==2.12.0") == ["torch==2.12.0", "torch==2.12.0 -e .[dev]"]


# JupyterLab


def make_says(*words):
    "The commands that make would run."
    done = subprocess.run(["make", "-n", "PYTHON=python", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_lab_takes_flags_and_runs_as_root():
    said = make_says("lab", "LAB=--no-browser --port 9000")
    assert "--no-browser --port 9000" in said
    assert ("--allow-root" in said) == (os.getuid() == 0)


def saved(name, change=lambda cells: None, **env):
    "A notebook that was run in JupyterLab, and what its server writes of it; both as JSON."
    text = (ROOT / f"nbs/{name}.ipynb").read_text(encoding="utf-8")
    kept, run = json.loads(text), json.loads(text)
    run["metadata"] |= dict(language_info=dict(name="python", version="3.11.7"), toc=False)
    for k, cell in enumerate(run["cells"], 1):
        cell["metadata"] |= dict(scrolled=True, execution={"iopub.execute_input": "2026-01-01T00:00:00Z"})
        if cell["cell_type"] == "code":
            cell["execution_count"] = k
            cell["outputs"] = [dict(output_type="stream", name="stdout", text="took 3.1 s\n")]
    change(run["cells"])
    config = Config()
    exec((ROOT / "docs/lab/jupyter_server_config.py").read_text(), dict(c=config))
    server = SimpleNamespace(root_dir=str(ROOT / "nbs"))
    model = dict(type="notebook", content=run)
    config.ContentsManager.pre_save_hook(path=f"{name}.ipynb", model=model, contents_manager=server)
    return kept, run


@pytest.fixture
def at_root(monkeypatch):
    "The folder that `make lab` starts from, with the notebooks as they were committed."
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("OUTPUTS", raising=False)
    if git("status", "--porcelain", "nbs/01_frames.ipynb", "nbs/10_lift.ipynb"):
        pytest.skip("notebooks are being edited")


def git(*words):
    "What git says; skips outside of a repository."
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout


@pytest.mark.parametrize("name", ["01_frames", "10_lift"])
def test_a_notebook_that_was_only_run_leaves_no_noise(at_root, name):
    kept, run = saved(name)
    assert run == kept


def test_outputs_from_the_first_edited_cell_on_are_stored(at_root):
    kept, run = saved("10_lift", lambda cells: cells[12].update(source="1 + 1"))
    assert run["cells"][:12] == kept["cells"][:12]
    below = [cell for cell in run["cells"][12:] if cell["cell_type"] == "code"]
    assert below and all(cell["outputs"][0]["text"] == "took 3.1 s\n" for cell in below)


def test_all_outputs_are_stored_when_asked_for(at_root, monkeypatch):
    monkeypatch.setenv("OUTPUTS", "new")
    assert saved("01_frames")[1] != saved("01_frames")[0]
    assert "execution" not in saved("01_frames")[1]["cells"][0]["metadata"]


def test_a_notebook_that_git_does_not_know_is_saved_as_it_is(at_root, tmp_path):
    config = Config()
    exec((ROOT / "docs/lab/jupyter_server_config.py").read_text(), dict(c=config))
    cell = dict(cell_type="code", id="a", metadata={}, execution_count=2, outputs=[], source="1")
    cell["outputs"].append(dict(output_type="stream", name="stdout", text="1"))
    model = dict(type="notebook", content=dict(cells=[cell], metadata={}, nbformat=4))
    server = SimpleNamespace(root_dir=str(tmp_path))
    config.ContentsManager.pre_save_hook(path="new.ipynb", model=model, contents_manager=server)
    assert cell["outputs"][0]["text"] == "1" and cell["execution_count"] is None
