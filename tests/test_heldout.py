"""Held-out windows: what goes wrong in one of several trainings is said in one sentence and stops no other, and a kept
record is what its own table of scores says, window by window."""

import json
import os
import signal
from pathlib import Path
from threading import Thread
from time import sleep
import pytest
from flux4d import heldout
from flux4d.ablation import ABLATIONS, IMPORTANT, ablation_row, ablation_table, variant_runs
from flux4d.files import DataError
from flux4d.heldout import HeldoutParameters, WindowRun, WindowWorker, own_frames, places, run_windows
from flux4d.heldout import window_runs, windows_table
from flux4d.records import repo_root, runs_of_record
from flux4d.scores import SCORES, flat, metrics_from, facts_of, read_scores
from flux4d.settings import read_parameters

ROOT = repo_root(Path(__file__).parent)
def is_joint(run):
    "Whether a record is made of several windows."
    meta = run / "meta.json"
    return meta.is_file() and "windows" in json.loads(meta.read_text(encoding="utf-8"))


JOINT = [run for run in runs_of_record(ROOT) if is_joint(run)]


def asked(**given):
    return read_parameters(HeldoutParameters, given)


class Pretended:
    "A worker that trains nothing: it writes down what it was given, and fails where the run's folder says so."

    started, given = [], []

    def __init__(self, device, threads):
        Pretended.started.append(device)

    def run(self, run):
        Pretended.given.append(run.folder.name)
        sleep(0.1)  # the other places have begun meanwhile
        if "bad" in run.folder.name:
            return "iters: is -1; choose a whole number at least 0."
        run.folder.mkdir(parents=True)
        (run.folder / "metrics.json").write_text("{}")
        return ""

    def close(self):
        pass


@pytest.fixture
def pretended(monkeypatch):
    Pretended.started, Pretended.given = [], []
    monkeypatch.setattr(heldout, "WindowWorker", Pretended)
    monkeypatch.setattr(heldout, "is_finished", lambda run: (run.folder / "metrics.json").is_file())


def made_up(folder, names):
    return [WindowRun(0, folder / name, {}) for name in names]


def test_a_window_that_fails_stops_no_other(pretended, tmp_path, capsys):
    runs = made_up(tmp_path, ["a", "bad", "b", "c"])
    with pytest.raises(DataError, match="1 of 4 windows failed, the first is bad: iters: is -1"):
        run_windows(runs, ["cpu"])
    assert Pretended.given == ["a", "bad", "b", "c"]  # in their order
    assert Pretended.started == ["cpu", "cpu"]  # the process that failed is not used again
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and said[1].startswith("2 of 4 windows: bad, ")


def test_what_is_finished_is_not_run_again_and_no_place_is_idle(pretended, tmp_path):
    runs = made_up(tmp_path, "abcdef")
    run_windows(runs[:2], ["0"])
    run_windows(runs, ["0", "1"])
    assert sorted(Pretended.given) == list("abcdef") and set(Pretended.started) == {"0", "1"}
    run_windows(runs, ["0"])
    assert len(Pretended.given) == 6


def test_a_process_says_what_is_wrong_and_its_end_is_noticed(tmp_path):
    "A parameter nobody knows, then a process that is killed."
    run = WindowRun(0, tmp_path / "windows/a_00", dict(itres=3))
    worker = WindowWorker("cpu", 1)
    assert worker.run(run) == "itres: is no parameter of a run; did you mean iters?"
    worker.close()
    assert worker.process.poll() is not None
    lost = WindowWorker("cpu", 1)
    Thread(target=lambda: (sleep(1), os.kill(lost.process.pid, signal.SIGKILL)), daemon=True).start()
    assert lost.run(run).startswith("its process ended with status -9 ")
    lost.close()


@pytest.mark.parametrize("name", ["out_dir", "seed", "train_logs", "device", "resume_from"])
def test_what_the_protocol_decides_is_refused_among_the_others(name):
    with pytest.raises(DataError, match=f"^others.{name}: is decided by the parameter .*; give it there.$"):
        window_runs(asked(others={name: 1}), Path("a"))


def test_what_every_window_starts_from_is_opened_before_anything_is_trained(tmp_path):
    wrong = tmp_path / "notes.pt"
    wrong.write_text("no weights")
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes((2).to_bytes(8, "little") + b"{}")
    for path, fault in ((tmp_path / "no.pt", "is no file; name weights or a checkpoint"), (wrong, ""), (foreign, "")):
        with pytest.raises(DataError) as e:
            window_runs(asked(start_from=str(path)), tmp_path / "a")
        assert path.name in str(e.value) and fault in str(e.value) and str(e.value).count(". ") == 0
    assert not (tmp_path / "windows").exists()


def test_weights_to_start_from_may_know_other_logs_of_the_same_name():
    logs = {"002": dict(identity="city", frames=[0, 1, 2]), "002@real": dict(identity="real", frames=[16, 17])}
    meta = dict(trained=dict(logs=logs))
    assert own_frames(meta | dict(scored_logs={"002": "real"})) == {16, 17}
    assert own_frames(meta) == {0, 1, 2, 16, 17}  # where nothing says which log is scored, all count
    assert own_frames({}) == set()


def test_important_variants_are_trained_first(tmp_path):
    runs = variant_runs(list(ABLATIONS), tmp_path, dict(iters=2))
    names = list(dict.fromkeys(run.folder.name[:-3].removeprefix("ablation_") for run in runs))
    assert set(names[: len(IMPORTANT)]) == set(IMPORTANT) and set(names) == set(ABLATIONS)
    assert len(runs) == 3 * len(ABLATIONS) and len({run.folder for run in runs}) == len(runs)
    with pytest.raises(DataError, match="61a_heldout has no parameter 'colour'"):
        variant_runs(["full"], tmp_path, dict(colour=1))


def test_places_take_every_device_once_before_any_twice():
    assert places(("0", "1"), 3) == ["0", "1", "0", "1", "0", "1"]


# records


@pytest.mark.skipif(not JOINT, reason="no record of held-out windows is committed")
@pytest.mark.parametrize("run", JOINT or [Path("none")], ids=lambda run: run.name)
def test_no_window_was_trained_on_and_each_is_what_the_scores_say(run):
    meta = json.loads((run / "meta.json").read_text(encoding="utf-8"))
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    table = read_scores(run / SCORES)
    assert "training frames" not in metrics["evaluated_on"]
    for first, kept in meta["windows"].items():
        assert not own_frames(kept) & set(range(int(first), int(first) + 16))
        of_window = table[table["clip"].isin(kept["clips"])]
        again = flat(metrics_from(of_window, facts_of(metrics)))
        for path, value in flat({k: kept[k] for k in ("nvs", "scene_flow", "baselines", "zero_motion")}).items():
            assert value == pytest.approx(again[f"{path}.mean"], rel=1e-9), path
    assert windows_table(run).count("\n") == len(meta["windows"]) + 2


ABLATED = [run for run in JOINT if run.name.startswith("ablation_")]


@pytest.mark.skipif(not ABLATED, reason="no run of the ablation is committed")
def test_every_kept_variant_has_its_line_and_is_called_by_its_own_name():
    rows = [ablation_row(run) for run in ABLATED]
    named = [row for row in rows if row["run"].removeprefix("ablation_") in ABLATIONS]
    assert all(row["variant"] == row["run"].removeprefix("ablation_") for row in named)
    assert len({(row["paired"], row["steps"]) for row in named}) == 1
    assert ablation_table(named).count("\n") == len(named) + 3
