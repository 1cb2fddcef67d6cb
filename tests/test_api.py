"What a library user of the package may count on, whatever was imported before."

import importlib
import subprocess
import sys
from pathlib import Path
from flux4d.city.logs import fixture_city
from flux4d.lazy_methods import LazyMethods
from flux4d.records import repo_root

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
