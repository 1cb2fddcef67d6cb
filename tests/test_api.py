"What a library user of the package may count on, whatever was imported before."

import importlib
import inspect
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
import pytest
from flux4d.city.logs import fixture_city
from flux4d.config import Config
from flux4d.files import DataError
from flux4d.lazy_methods import LazyMethods
from flux4d.processes import ALONE
from flux4d.records import repo_root
from flux4d.render import RenderConfig
from flux4d.scene import scene_of
from flux4d.scene_commands import check_source, clip_parser

ROOT = repo_root(Path(__file__).parent)


def fresh(code):
    "Standard output of a fresh interpreter."
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def classes_added_to():
    "Classes with public methods from other modules than their own: (module, class, method) of each."
    index = importlib.import_module("flux4d._modidx").d["syms"]
    home = {symbol.rpartition(".")[2]: module for module, symbols in index.items() for symbol in symbols}
    found = []
    for module, symbols in index.items():
        for symbol in symbols:
            owner, _, method = symbol.removeprefix(f"{module}.").rpartition(".")
            if owner and not method.startswith("_") and home[owner] != module:
                found.append((home[owner], owner, method))
    return found


def test_methods_from_other_modules_are_there_whatever_was_imported():
    added = classes_added_to()
    assert {("Log", "clip"), ("Actor", "alone"), ("Actor", "silhouette"), ("Scene", "film")} <= {a[1:] for a in added}
    for module, owner, method in added:
        cls = getattr(importlib.import_module(module), owner)
        assert issubclass(cls, LazyMethods), f"{module}.{owner}.{method} is there only after another import"


def test_a_log_gives_clips_in_a_fresh_process():
    code = (
        "import sys, flux4d; "
        f"log = flux4d.PandaSet({str(fixture_city())!r})['001']; "
        "before = 'flux4d.clips' in sys.modules; "
        "assert 'clip' in dir(log); "
        "print(before, log.clip(0).frames)"
    )
    assert fresh(code) == f"False {list(range(16))}"


def test_an_actor_has_its_edits_in_a_fresh_process():
    code = (
        "import sys; from flux4d.actors import Actor; "
        "actor = object.__new__(Actor); "
        "before = 'flux4d.edits' in sys.modules; "
        "print(before, callable(actor.alone), callable(actor.silhouette))"
    )
    assert fresh(code) == "False True True"


def test_a_derived_class_keeps_the_methods_that_come_later():
    code = (
        "import flux4d; from flux4d.pandaset import Log\n"
        "class NightLog(Log): pass\n"
        f"print(NightLog({str(fixture_city())!r}, '001').clip(0).frames[:2])"
    )
    assert fresh(code) == "[0, 1]"


def functions_of(module):
    "Public functions of a module and methods of its classes."
    for name, thing in vars(module).items():
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(thing):
            yield from ((f"{name}.{n}", f) for n, f in vars(thing).items() if inspect.isfunction(f))
        elif inspect.isfunction(thing):
            yield name, thing


def mutable(value):
    "Whether a default is a dataclass that somebody could change, itself or a part of it."
    if not is_dataclass(value) or isinstance(value, type):
        return False
    if not type(value).__dataclass_params__.frozen:
        return True
    return any(mutable(getattr(value, f.name)) for f in fields(value))


def test_no_default_can_be_changed_by_who_uses_it():
    assert mutable(Config()) and not mutable(RenderConfig())
    index = importlib.import_module("flux4d._modidx").d["syms"]
    modules = [importlib.import_module(name) for name in index]
    found = [
        f"{module.__name__}.{name}({parameter.name}={type(parameter.default).__name__})"
        for module in modules
        for name, function in functions_of(module)
        for parameter in inspect.signature(function).parameters.values()
        # the run's only process: nothing in it changes where there is no other process
        if mutable(parameter.default) and parameter.default is not ALONE
    ]
    assert not found, f"a caller who changes one changes every later call: {found}"


def test_settings_of_a_scene_change_no_other_scene():
    with pytest.raises(FrozenInstanceError):
        inspect.signature(scene_of).parameters["cfg"].default.far = 1.0


def test_a_record_that_cannot_be_made_fails():
    call = ["make", "record", "RUN=typo", f"PYTHON={sys.executable}"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "typo is no complete run" in done.stdout + done.stderr


@pytest.mark.parametrize("option", [("--log", "002"), ("--start", "3"), ("--device", "cuda")])
def test_options_that_a_saved_scene_cannot_follow_are_refused(option):
    args = clip_parser("flux4d-view", "", "").parse_args([str(ROOT / "docs/scene/pandaset002.scene"), *option])
    with pytest.raises(DataError, match=f"{option[0]}: is {option[1]}, but .*pandaset002.scene is a scene that was"):
        check_source(args)
