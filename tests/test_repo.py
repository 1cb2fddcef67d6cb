"""Promises that no single notebook can keep: arrows between modules, docstrings, pages and their links, what git sees.

That modules and tables are what the notebooks make of them is checked before these tests, by `make test`."""

import ast
import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
import pytest
import torch
from PIL import Image
from flux4d.cache import LiftCache
from flux4d.city.logs import fixture_city
from flux4d.config import Config, config_from_dict
from flux4d.loader import Loader
from flux4d.notebooks import Notebook, dead_links, read_notebooks
from flux4d.pandaset import PandaSet
from flux4d.records import repo_root, runs_of_record
from flux4d.made_texts import link_faults
from flux4d.run import Run
from flux4d.train import Trainer

ROOT = repo_root(Path(__file__).parent)
MODULES = sorted(p for p in (ROOT / "flux4d").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
NOTEBOOKS = read_notebooks(ROOT)
EXPORTING = {nb.module: nb for nb in NOTEBOOKS if nb.module}


def name(x):
    return x.path.name if isinstance(x, Notebook) else x.name


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def source(module):
    "The file of a module, which may lie in a sub-package."
    return ROOT / f"flux4d/{module.replace('.', '/')}.py"


@cache
def imported(module):
    "The flux4d modules that a module imports, inside functions too; a sub-package is its `__init__`."
    package = ["flux4d", *module.split(".")[:-1]]
    found = set()
    for n in ast.walk(tree(source(module))):
        if isinstance(n, ast.Import):
            found |= {a.name for a in n.names}
        if isinstance(n, ast.ImportFrom):  # nbdev writes `from .x import`
            start = package[: len(package) + 1 - n.level] if n.level else []
            path = ".".join([*start, *filter(None, [n.module])])
            parts = [f"{path}.{a.name}" for a in n.names]
            inside = [p for p in parts if p.startswith("flux4d.") and source(p[7:]).is_file()]
            found |= set(inside or [path])
    names = [f.removeprefix("flux4d.") for f in found if f.startswith("flux4d.")]
    return frozenset(f"{m}.__init__" if (ROOT / "flux4d" / m).is_dir() else m for m in names)


def reach(module, seen=()):
    "A module and all that it leads to."
    seen = set(seen) | {module}
    for m in imported(module) - seen:
        seen |= reach(m, seen)
    return seen


def python(code, **env):
    "Standard output of a fresh interpreter."
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def git(*args):
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    if "not a git repository" in done.stderr:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


def committed():
    "Text files that git has or would take."
    return [
        p
        for f in sorted(set(git("ls-files", "-co", "--exclude-standard")))
        if (p := ROOT / f).is_file() and p.suffix not in (".jpg", ".png", ".pdf")
    ]


# code


def undocumented(path):
    "Functions, methods and classes without docstring or annotation, but for dunders and what is inside functions."
    for owner in (tree(path), *(n for n in tree(path).body if isinstance(n, ast.ClassDef))):
        for f in owner.body:
            if not isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or f.name.startswith(
                "__"
            ):
                continue
            if not ast.get_docstring(f):
                yield f"{f.name}: no docstring"
            if isinstance(f, ast.ClassDef):
                continue
            static = any(getattr(d, "id", "") == "staticmethod" for d in f.decorator_list)
            args = [*f.args.posonlyargs, *f.args.args][int(isinstance(owner, ast.ClassDef) and not static) :]
            args += [*f.args.kwonlyargs, *filter(None, (f.args.vararg, f.args.kwarg))]
            if bare := [a.arg for a in args if a.annotation is None]:
                yield f"{f.name}: no annotation on {', '.join(bare)}"
            if f.returns is None:
                yield f"{f.name}: no return annotation"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_everything_has_docstring_and_annotations(path):
    assert list(undocumented(path)) == []


def parameters_without_comment(path):
    "Public functions' and methods' parameters that no comment explains, on their line or on the one above."
    lines = path.read_text(encoding="utf-8").splitlines()
    public = re.search(r"__all__ = \[(.*?)\]", "\n".join(lines), re.S)
    names = set(re.findall(r"'(\w+)'", public[1])) if public else None

    def bare(owner, f):
        args = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs, *filter(None, (f.args.vararg, f.args.kwarg))]
        for a in args:
            above = lines[a.lineno - 2].strip()
            said = "#" in lines[a.end_lineno - 1] or above.startswith("#") and not above.startswith("# %%")
            if a.arg not in ("self", "cls") and not said:
                yield f"{owner}{f.name}({a.arg})"

    for n in tree(path).body:
        if isinstance(n, ast.FunctionDef) and not n.name.startswith("_"):
            if n.decorator_list or names is None or n.name in names:
                yield from bare("", n)
        if isinstance(n, ast.ClassDef) and not n.name.startswith("_"):
            for f in n.body:
                if isinstance(f, ast.FunctionDef) and (not f.name.startswith("_") or f.name == "__init__"):
                    yield from bare(f"{n.name}.", f)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_public_parameter_is_explained(path):
    assert list(parameters_without_comment(path)) == []


def test_arrows_run_from_higher_to_lower_numbers():
    order = {m: i for i, m in enumerate(EXPORTING)}
    assert [
        f"{m} imports {o}" for m in order for o in imported(m) if order.get(o, len(order)) >= order[m]
    ] == []


UNLABELLED = [
    m for m, nb in EXPORTING.items() if nb.path.name[0] in "123" or nb.path.name.startswith(("50", "73_", "73a_"))
]


@pytest.mark.parametrize("module", UNLABELLED)
def test_reconstruction_leads_to_no_labels(module):
    assert "cuboids" not in reach(module)


@pytest.mark.skipif(not UNLABELLED, reason="no notebook of the parts 1x to 3x yet")
def test_reconstruction_imports_no_labels_and_compiles_nothing(tmp_path):
    code = f"import sys; {'; '.join(f'import flux4d.{m}' for m in UNLABELLED)}; print(*sys.modules)"
    loaded = python(code, TORCH_EXTENSIONS_DIR=str(tmp_path)).split()
    assert "flux4d.train" in loaded or "train" not in UNLABELLED
    assert "flux4d.cuboids" not in loaded
    assert "gsplat.cuda._backend" not in loaded  # importing it builds the CUDA kernels
    assert list(tmp_path.iterdir()) == []


def test_data_side_imports_no_torch():
    loaded = python("import sys, flux4d.pandaset, flux4d.frames; print(*sys.modules)").split()
    assert "flux4d.frames" in loaded and "torch" not in loaded


def config_fields():
    for path in MODULES:
        for c in tree(path).body:
            if isinstance(c, ast.ClassDef) and c.name.endswith("Config"):
                yield from ((path.stem, c.name, f.target.id) for f in c.body if isinstance(f, ast.AnnAssign))


def test_every_config_field_is_read():
    read = {
        n.attr
        for p in MODULES
        for n in ast.walk(tree(p))
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
    }
    assert [f"{m}.{c}.{f}" for m, c, f in config_fields() if f not in read] == []


def test_files_are_loaded_without_running_code():
    bad = []
    for path in MODULES:
        for n in ast.walk(tree(path)):
            if not (
                isinstance(n, ast.Call)
                and isinstance(n.func, ast.Attribute)
                and isinstance(n.func.value, ast.Name)
            ):
                continue
            call = f"{n.func.value.id}.{n.func.attr}"
            kw = {k.arg: getattr(k.value, "value", None) for k in n.keywords}
            if call in (
                "pickle.load",
                "pickle.loads",
                "pd.read_pickle",
                "pandas.read_pickle",
                "yaml.load",
                "yaml.unsafe_load",
            ):
                bad.append(f"{path.name}:{n.lineno} {call}")
            if call == "torch.load" and kw.get("weights_only") is not True:
                bad.append(f"{path.name}:{n.lineno} torch.load without weights_only=True")
            if call == "np.load" and kw.get("allow_pickle"):
                bad.append(f"{path.name}:{n.lineno} np.load with allow_pickle")
    assert bad == []


# notebooks


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=name)
def test_notebook_opens_with_title_and_subtitle(nb):
    assert nb.title and nb.subtitle, "the first cell is '# Title', an empty line, '> one line'"


@pytest.mark.parametrize(
    "nb",
    [o for o in NOTEBOOKS if o.path.stem in ("04_clips", "10_lift", "30_unet", "35_overfit", "60_stage6")],
    ids=name,
)
def test_a_notebook_that_closes_a_part_ends_with_its_record(nb):
    text = "\n".join(c["source"] for c in nb.cells if c["cell_type"] == "markdown")
    assert re.search(r"^## Record\s*$", text, re.M), "no section '## Record'"
    record = re.split(r"^## Record\s*$", text, flags=re.M)[-1]
    assert re.findall(r"(?:^#{3,4} |\*\*)(Motive|Decided|Verified|Concluded|Next)\b", record, re.M) == [
        "Motive",
        "Decided",
        "Verified",
        "Concluded",
        "Next",
    ]


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=name)
def test_stored_outputs_are_presentable(nb):
    for c in nb.cells:
        for o in c.get("outputs", []):
            assert o["output_type"] != "error", f"an error is stored below: {c['source'][:80]}"
            assert o.get("name") != "stderr", f"standard error is stored below: {c['source'][:80]}"
    assert nb.path.stat().st_size < 700_000, "over 700 KB: store smaller pictures"


def is_lesson(cell):
    return (
        cell["cell_type"] == "code"
        and not re.search(r"^#\|\s*export", cell["source"], re.M)
        and re.search(r"\bassert\b|\btest_\w+\(|\bis_close\(|assert_\w+\(", cell["source"])
    )


def twice_defined(source):
    "Names that the top level of a module defines more than once; methods that are patched in count by their class."
    names = [
        (n.name, ast.unparse(n.args.args[0].annotation) if is_patched(n) else "")
        for n in ast.parse(source).body
        if isinstance(n, (ast.FunctionDef, ast.ClassDef))
    ]
    return sorted({name for name, owner in names if names.count((name, owner)) > 1})


def is_patched(n):
    "Whether a definition is a method of a class that stands elsewhere."
    decorators = [ast.unparse(d) for d in n.decorator_list]
    return any(d.startswith("patch") for d in decorators) and isinstance(n, ast.FunctionDef) and bool(n.args.args)


def test_no_module_defines_a_name_twice():
    of_two = "@patch\ndef to(self: A): pass\n\n@patch\ndef to(self: B): pass\n"
    assert twice_defined(of_two) == [] and twice_defined("def f(): pass\n\ndef f(x): pass\n") == ["f"]
    assert {p.name: twice_defined(p.read_text()) for p in MODULES if twice_defined(p.read_text())} == {}


def is_export(cell):
    return (
        cell["cell_type"] == "code"
        and re.search(r"^#\|\s*export", cell["source"], re.M)
        and re.search(r"^(@|def |class )", cell["source"], re.M)
    )


@pytest.mark.parametrize("nb", EXPORTING.values(), ids=name)
def test_exported_cells_have_lessons(nb):
    waiting = longest = 0  # exported cells since the last lesson
    for c in nb.cells:
        waiting = 0 if is_lesson(c) else waiting + bool(is_export(c))
        longest = max(longest, waiting)
    assert longest <= 3 and waiting == 0, (
        f"{longest} exported cells stand in a row without one that asserts something, {waiting} at the end"
    )


# pages and their links


def test_links_lead_somewhere():
    assert link_faults(ROOT) == []
    odd = "[x](01_frames.ipynb#No-such-heading) [y](no.ipynb)"
    assert list(dead_links(odd, ROOT / "nbs")) == ["01_frames.ipynb#No-such-heading", "no.ipynb"]


def page(path):
    return (ROOT / path).read_text(encoding="utf-8")


DEMANDS = 130  # of the development log: none may fall out of the page that says where each is shown


def test_every_demand_of_the_log_is_covered():
    lines = [line for line in page("docs/coverage.md").splitlines() if line.startswith("- ")]
    shown = re.compile(r"\]\((?:\.\./nbs/\w+\.ipynb|\w+\.md)#[^)]+\)")
    assert [line for line in lines if not shown.search(line)] == []  # each names a section
    assert len(lines) == len(set(lines)) >= DEMANDS
    assert list(dead_links("\n".join(lines), ROOT / "docs")) == []


def test_the_readme_is_short_and_speaks_plainly():
    readme = page("README.md")
    assert len(readme.splitlines()) <= 150
    assert re.findall(r"\b(?:G|S\d)-\d\d\b", readme) == []  # ids of demands mean nothing to a reader
    table = re.search(r"<!-- made by results_table -->\n([\s\S]*?)<!-- end -->", readme)[1].splitlines()
    assert len(table) <= 2 + 6 and {line.count("|") for line in table} == {1 + 5}
    pictures = [ROOT / p for p in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", readme)]
    assert pictures and sum(p.stat().st_size for p in pictures) < 2**20


SMALL = dict(
    data=dict(image_scale=0.5, loader_threads=1),
    init=dict(fill_blocks=[64, 32], voxel_downsample=0.5),
    voxel=dict(size=0.4),
    model=dict(hidden=16, motion_prior=dict(reach=0), unet=dict(widths=[8, 16], blocks=1)),
)


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    "A folder as the README's reader has it after make demo: a saved scene, logs of the city, and a checkpoint."
    torch.set_num_threads(1)
    (tmp_path / "docs/scene").mkdir(parents=True)
    shutil.copy(ROOT / "docs/scene/pandaset002.scene", tmp_path / "docs/scene")
    shutil.copytree(fixture_city() / "001", tmp_path / "data/city/001")
    cfg = config_from_dict(SMALL, Config)
    clip = PandaSet(tmp_path / "data/city")["001"].clip(start=0, cameras=("front_camera",))
    loader = Loader([clip], cfg, LiftCache(tmp_path / "lifts"))
    saved = Trainer(cfg, loader, Run(tmp_path / "run")).save()
    (tmp_path / "papermill_runs/demo").mkdir(parents=True)
    shutil.copy(saved, tmp_path / "papermill_runs/demo/ckpt_last.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_snippets_of_the_readme_run(user_folder):
    found, (scene, weights) = {}, re.findall(r"```python\n(.*?)```", page("README.md"), re.S)
    exec(scene, found)
    height, width = found["view"].height, found["view"].width
    assert found["picture"].shape == (1, height, width, 3)
    assert found["scene"].source["log"] == "002" and 0.2 < found["picture"].mean() < 0.8  # not an empty picture
    with Image.open("papermill_runs/picture.png") as kept:
        assert kept.size == (width, height)
    exec(weights, found)
    assert found["scene"].source["log"] == "001"
    written = [Path("papermill_runs") / name for name in ("a.scene", "a.ply", "a.mp4")]
    assert min(path.stat().st_size for path in written) > 10_000
    assert {path.name for path in Path().iterdir()} <= {"docs", "data", "lifts", "run", "papermill_runs"}


def commands():
    "Lines of the bash blocks of README and docs, continuation lines joined, comments off."
    texts = [
        page("README.md"),
        *(p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").glob("*.md"))),
    ]
    blocks = [b for text in texts for b in re.findall(r"```bash\n(.*?)```", text, re.S)]
    lines = [re.sub(r"\s+#.*", "", l).strip() for b in blocks for l in b.replace("\\\n", " ").splitlines()]
    return [l for l in lines if l and not l.startswith("#")]


def parameters(path):
    "Names in a notebook's cell of papermill parameters."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    source = "".join("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    return {t.id for n in ast.parse(source).body if isinstance(n, ast.Assign) for t in n.targets}


def command_faults(line, targets, scripts):
    "What a command names that is not there."
    words = [w for w in shlex.split(line) if not re.match(r"[A-Z_0-9]+=", w)]
    if words[0] == "make":
        return [f"{line}: no target {t}" for t in set(words[1:]) - targets]
    if words[0].startswith("flux4d-"):
        return [] if words[0] in scripts else [f"{line}: no such command"]
    if words[0] == "papermill" and not (ROOT / words[1]).is_file():
        return [f"{line}: no such notebook"]
    if words[0] == "papermill":
        asked = set(re.findall(r"-p (\w+)", line))
        return [f"{line}: no parameter {p}" for p in asked - parameters(ROOT / words[1])]
    return []


def test_commands_in_texts_name_what_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    scripts = set(re.findall(r"^(flux4d-\w+) = ", (ROOT / "pyproject.toml").read_text(), re.M))
    lines = commands()
    assert [fault for line in lines for fault in command_faults(line, targets, scripts)] == []
    assert {"make", "papermill", "flux4d-index", "pip"} <= {line.split()[0] for line in lines}
    for odd in ("make no", "flux4d-no", "papermill nbs/no.ipynb", "papermill nbs/60_stage6.ipynb -p no 1"):
        assert command_faults(odd, targets, scripts), odd


# repository

PRODUCED = """.venv/bin/python .cache/x data/city/001/lidar/00.pkl.gz _docs/index.html build/pages/index.ipynb
flux4d/__pycache__/frames.cpython-311.pyc nbs/.ipynb_checkpoints/10_lift-checkpoint.ipynb
papermill_runs/run_001/ckpt_last.pt papermill_runs/run_001/metrics.json papermill_runs/run_001/config.yaml
papermill_runs/run_001/out.ipynb papermill_runs/run_001/renders/01.png papermill_runs/demo/60_stage6.ipynb
flux4d.egg-info/PKG-INFO .pytest_cache/x .ruff_cache/x
data/pandaset_full_clips.pkl papermill_runs/cache/001.npz indices/pandaset_full_clips.pkl
a.scene a.ply a.mp4 out.ipynb""".split()


def test_what_runs_produce_is_ignored():
    assert sorted(set(PRODUCED) - set(git("check-ignore", "--no-index", *PRODUCED))) == []
    assert (
        git(
            "check-ignore",
            "--no-index",
            "nbs/10_lift.ipynb",
            "flux4d/lift.py",
            "README.md",
            ".ci/run",
            "docs/site/conf.py",
        )
        == []
    )


def test_no_paths_of_one_machine():
    own = re.compile(
        r"(?<![\w.])/(home|root|tmp|work|farm|Users|mnt|scratch)/\w"
    )  # the pattern does not match itself
    assert [
        str(p.relative_to(ROOT))
        for p in committed()
        if own.search(p.read_text(encoding="utf-8", errors="replace"))
    ] == []


def test_files_are_small_and_no_data_is_committed():
    files = committed()
    assert [p.name for p in files if p.stat().st_size > 1_500_000] == []
    assert [p.name for p in files if p.name.endswith((".pkl.gz", ".pkl", ".pt", ".npz"))] == []
    for run in runs_of_record(ROOT):
        kept = [ROOT / f for f in git("ls-files", str(run.relative_to(ROOT))) if f.endswith(".jpg")]
        assert len(kept) <= 8 and sum(p.stat().st_size for p in kept) <= 2**20, run.name


def test_licence_is_the_whole_apache_text():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text and len(text) > 10_000


def test_settings_and_pyproject_agree():
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    ini = ini["DEFAULT"]
    project = (ROOT / "pyproject.toml").read_text()
    assert f'name = "{ini["lib_name"]}"' in project and f'description = "{ini["description"]}"' in project
    assert f'requires-python = ">={ini["min_python"]}"' in project
    assert f'__version__ = "{ini["version"]}"' in (ROOT / "flux4d/__init__.py").read_text()


def packages_of(imports):
    "Top-level names of packages that import statements name; relative ones are our own."
    names = set()
    for n in imports:
        if isinstance(n, ast.Import):
            names |= {x.name.split(".")[0] for x in n.names}
        elif n.module and not n.level:
            names.add(n.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"flux4d"}


def test_packages_imported_are_declared():
    project, extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")
    extras = extras.split("[project.scripts]")[0]
    spelled = dict(
        PIL="pillow",
        yaml="pyyaml",
        spconv="spconv-cu120",
        skimage="scikit-image",
        sklearn="scikit-learn",
        cv2="opencv-python",
        IPython="ipykernel",
        annotated_types="annotated-types",
        nbclient="papermill",
        nbformat="papermill",  # the last ones come with these
        psutil="ipykernel",
        markdown_it="markdown-it-py",
        imageio_ffmpeg="imageio-ffmpeg",
    )
    imports = [n for p in MODULES for n in ast.walk(tree(p)) if isinstance(n, (ast.Import, ast.ImportFrom))]
    at_once = [n for p in MODULES for n in tree(p).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    for names, declared in ((packages_of(at_once), project), (packages_of(imports), project + extras)):
        # an optional package may be imported where it is used, never when a module is
        assert sorted(m for m in names if f'"{spelled.get(m, m)}' not in declared) == []
    cells = "\n".join(c["source"] for nb in NOTEBOOKS for c in nb.cells) + (ROOT / "Makefile").read_text()
    declared = set(re.findall(r'^    "([a-z0-9-]+)[><=]', project, re.M)) - {
        "ipykernel",
        "ipywidgets",
    }  # the kernel, and tqdm's bars in a notebook
    names = {v: k for k, v in spelled.items()} | {"spconv-cu126": "spconv"}
    assert sorted(d for d in declared if not re.search(rf"\b{names.get(d, d)}\b", cells)) == []
