"""The commands: help that answers at once and shows an example, faults that are sentences, and nothing
deleted that a command did not make."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
import pytest
from flux4d import scene_commands
from flux4d.check import check_main
from flux4d.city.logs import city_main
from flux4d.convert import convert_main
from flux4d.notebooks import new_notebook, write_notebook
from flux4d.records import repo_root
from flux4d.repo import repo_main
from flux4d.report_pages import report_main

ROOT = repo_root(Path(__file__).parent)
COMMANDS = {
    "flux4d-repo": "repo:repo_main",
    "flux4d-city": "city:city_main",
    "flux4d-report": "report_pages:report_main",
    "flux4d-view": "scene_commands:view_main",
    "flux4d-html": "scene_commands:html_main",
    "flux4d-film": "scene_commands:film_main",
}
ALL_COMMANDS = dict(re.findall(r'^(flux4d-\w+) = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M))


def sentence(said):
    "One line that is no traceback and says more than a number."
    said = said.strip()
    assert (
        said
        and "\n" not in said
        and "Traceback" not in said
        and "[Errno" not in said
        and len(said.split()) > 5
    ), said
    return said


@pytest.fixture
def said(capsys):
    "Run a command in this process: exit status, and what it said on both channels."

    def run(main, *words):
        capsys.readouterr()
        code = main([str(w) for w in words])
        return code, "".join(capsys.readouterr())

    return run


def content(folder):
    "Every file below a folder."
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# help


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_imports_little(name):
    module, main = COMMANDS[name].split(":")
    code = f"""import sys
from flux4d.{module} import {main} as main
try: main(["--help"])
except SystemExit as e: assert e.code == 0
print("\\n".join(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    text, _, _ = done.stdout.partition("\nsys\n")
    assert "examples:" in text and f"\n  {name} " in text
    assert not {"torch", "spconv", "gsplat", "scipy"} & set(done.stdout.splitlines())  # they take seconds


@pytest.mark.parametrize("name", ALL_COMMANDS)
def test_every_option_says_what_it_is(name, monkeypatch):
    module, main = ALL_COMMANDS[name].split(":")
    silent = []

    def parse(parser, *words):
        silent.extend(action.dest for action in parser._actions if not action.help)
        raise SystemExit(0)

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", parse)
    with pytest.raises(SystemExit):
        getattr(importlib.import_module(module), main)([])
    assert silent == []


@pytest.mark.parametrize("main", ("view_main", "html_main", "film_main"))
def test_a_mistyped_path_is_answered_before_anything_is_loaded(main, tmp_path):
    (tmp_path / "ckpt_last.pt").write_bytes(b"PK")
    words = [str(tmp_path / "ckpt_best.pt"), str(tmp_path / "no"), "--log", "002"]
    call = f"print({main}({words!r}), 'torch' in sys.modules)"
    code = f"import sys; from flux4d.scene_commands import {main}; {call}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    said, status = done.stdout.splitlines()
    assert status == "1 False"
    assert sentence(said).endswith("ckpt_best.pt: does not exist; its folder holds ckpt_last.pt.")


@pytest.mark.parametrize("main", (scene_commands.view_main, scene_commands.film_main))
def test_weights_without_a_recording(said, tmp_path, main):
    (tmp_path / "ckpt_last.pt").write_bytes(b"PK")
    code, text = said(main, tmp_path / "ckpt_last.pt", "--log", "002")
    assert code == 1 and "data_root: is missing" in sentence(text) and "holds weights" in text


def test_a_saved_scene_is_filmed(said, tmp_path):
    scene = ROOT / "docs/scene/pandaset002.scene"
    words = [scene, "--out", tmp_path / "new/a.mp4", "--fps", 1, "--size", 64, "--device", "cpu"]
    code, text = said(scene_commands.film_main, *words)
    assert code == 0 and (tmp_path / "new/a.mp4").stat().st_size > 500, text


@pytest.mark.parametrize("main, words", [(check_main, ()), (convert_main, ("kitti",))])
def test_what_is_absent_is_not_called_empty(said, tmp_path, monkeypatch, main, words):
    monkeypatch.chdir(tmp_path)
    Path("data/empty").mkdir(parents=True)
    rest = ("out",) if words else ()
    for folder, fault in (("data/nowhere", "does not exist"), ("data/empty", "holds no ")):
        code, text = said(main, *words, folder, *rest)
        assert code == 1 and sentence(text).startswith(f"{folder}: {fault}"), text


def test_two_runs_are_compared_on_one_screen(said):
    runs = [ROOT / "papermill_runs" / name for name in ("pandaset002_full", "pandaset002_full_heldout")]
    code, text = said(report_main, *runs)
    assert code == 0 and 20 < len(text.splitlines()) < 40 and "nvs full future psnr" in text and "--all" in text
    short, whole = (
        [line.split() for line in lines.splitlines()] for lines in (text, said(report_main, *runs, "--all")[1])
    )
    assert len(whole) > 100 and all(words in whole for words in short[:-1])  # columns are as wide as they must


# what is not a command's own stays


@pytest.fixture
def small_repo(tmp_path, monkeypatch):
    "A repository with two notebooks, in which the commands run."
    root = tmp_path / "repo"
    root.mkdir()
    shutil.copy(ROOT / "settings.ini", root)
    for name in ("00_index", "01_frames"):
        opening = f"# {name}\n\n> One line."
        write_notebook(root / f"nbs/{name}.ipynb", new_notebook(("markdown", opening)))
    monkeypatch.chdir(root)
    return root


@pytest.mark.parametrize("target", ("nbs", ".", "mine"))
def test_pages_leave_a_folder_that_holds_something_else(small_repo, said, target):
    (small_repo / "mine").mkdir()
    (small_repo / "mine/notes.txt").write_text("mine")
    before = content(small_repo)
    code, text = said(repo_main, "pages", target)
    assert code == 1 and "which flux4d-repo did not write" in sentence(text)
    assert content(small_repo) == before


def test_pages_replace_pages(small_repo, said):
    assert said(repo_main, "pages", "build/pages") == (0, "")
    (small_repo / "nbs/01_frames.ipynb").rename(small_repo / "nbs/02_other.ipynb")
    assert said(repo_main, "pages", "build/pages") == (0, "")
    assert sorted(p.name for p in (small_repo / "build/pages").glob("0*.md")) == [
        "00_index.md",
        "02_other.md",
    ]  # none of the old ones is left


@pytest.mark.parametrize("change", ("add", "edit", "link", "folder", "mark"))
def test_pages_leave_what_somebody_put_there(small_repo, said, change):
    out = small_repo / "build/pages"
    said(repo_main, "pages", out)
    if change == "add":
        (out / "notes.md").write_text("mine")
    if change == "edit":
        (out / "00_index.md").write_text("mine")
    if change == "link":
        (out / "data").symlink_to(small_repo / "nbs")
    if change == "folder":
        (out / "data").mkdir()
        (out / "data/x").write_text("mine")
    if change == "mark":
        (out / ".made_by_flux4d_repo").write_text('["00_index.md"]')  # not what the command writes
    before = content(small_repo)
    code, text = said(repo_main, "pages", out)
    assert code == 1 and "did not write" in sentence(text)
    assert content(small_repo) == before


# tracebacks became sentences


@pytest.mark.parametrize("command", ("show", "record", "pages"))
def test_a_command_without_its_path(small_repo, said, command):
    code, text = said(repo_main, command)
    assert code == 1 and sentence(text).startswith(f"flux4d-repo {command}: needs ")


@pytest.mark.parametrize("command", ("show", "record", "pages"))
def test_a_path_that_is_none(small_repo, said, command):
    (small_repo / "file").touch()
    for path in ("file", "file/below") if command == "pages" else ("file", "file/below", "nowhere", "nbs"):
        code, text = said(repo_main, command, path)
        assert code == 1 and sentence(text)


@pytest.mark.parametrize("command", ("pages", "check", "readme", "figures"))
def test_outside_a_repository(tmp_path, monkeypatch, said, command):
    monkeypatch.chdir(tmp_path)
    code, text = said(repo_main, command, "pages")
    assert code == 1 and "run this inside the repository" in sentence(text)


@pytest.mark.parametrize(
    "text",
    ("", "[]", '{"runtime": 3}', '{"a": {"mean": "x"}}', '{"a":' * 100_000),
    ids=("empty", "a list", "runtime", "mean", "deep"),
)
def test_a_record_that_is_none_is_not_shown(tmp_path, said, text):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.json").write_text(text)
    code, told = said(repo_main, "show", run)
    assert code == 1 and sentence(told).startswith("run/metrics.json: ")


def test_a_report_that_cannot_be_written(said, tmp_path):
    for target in (tmp_path / "nowhere", tmp_path):
        code, text = said(report_main, target)
        assert code == 1 and "no such file" in sentence(text)


# the city

WRONG = {
    "--frames": ("0", "-3", "1001"),
    "--logs": ("0", "-1", "1000"),
    "--scale": ("0", "-1", "nan", "inf", "1e-9"),
    "--step": ("0", "-1", "nan", "400"),
    "--workers": ("0", "-2"),
    "--seed": ("-1",),
}


@pytest.mark.parametrize("option, value", [(o, v) for o, vs in WRONG.items() for v in vs])
def test_numbers_that_no_city_has(said, tmp_path, option, value):
    code, text = said(city_main, tmp_path / "city", option, value)
    assert (
        code == 1
        and sentence(text).startswith(
            f"{option[2:]}: is {float(value) if option in ('--scale', '--step') else value}"
        )
        and not (tmp_path / "city").exists()
    )


def test_places_where_no_city_can_be(said, tmp_path):
    (tmp_path / "file").touch()
    for where in ("file", "file/below"):
        code, text = said(city_main, tmp_path / where, "--logs", 1, "--frames", 1)
        assert code == 1 and sentence(text)
    for text in ("", "[1]", "3"):
        (tmp_path / "odd").mkdir(exist_ok=True)
        (tmp_path / "odd/city.json").write_text(text)
        code, told = said(city_main, tmp_path / "odd", "--logs", 1)
        assert code == 1 and sentence(told).startswith("odd/city.json: holds no parameters of a city")


def test_a_city_says_how_far_it_is_and_what_to_do_after_an_interrupt(said, tmp_path, monkeypatch):
    small = "--logs", 1, "--frames", 12, "--scale", 0.0625, "--step", 4, "--workers", 1
    import flux4d.city.logs

    frames, write = [], flux4d.city.logs.write_frame

    def interrupted(*args):
        frames.append(args[3])
        if len(frames) == 8:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(flux4d.city.logs, "write_frame", interrupted)
    code, text = said(city_main, tmp_path / "city", *small)
    assert code == 130 and "the same command goes on where this one stopped." in text
    monkeypatch.setattr(flux4d.city.logs, "write_frame", write)
    code, text = said(city_main, tmp_path / "city", *small)
    assert code == 0 and "city: 100%" in text and "2/2" in text and "1 logs of 12 frames: 001 .. 001" in text
