"""What a committed run of record says is checked by the same rules that let it be written, and what prose
says of a run is what the run says."""

import copy
import json
import re
import shutil
from pathlib import Path
import pytest
from flux4d.figures import SOURCES, figure_faults, figures_in, is_printed_right, run_arithmetic, text_faults
from flux4d.notebooks import read_notebooks
from flux4d.records import kept_runs, repo_root, runs_of_record
from flux4d.made_texts import pages_of_text, readme_text
from flux4d.baselines import still
from flux4d.cache import LiftCache
from flux4d.city.logs import fixture_city
from flux4d.clips import Clip, ClipConfig, build_index, select_clips
from flux4d.pandaset import PandaSet
from flux4d.config import Config, config_from_dict
from flux4d.run_facts import About
from flux4d.schema import check_metrics, disagreements
from flux4d.score_clips import Evaluation, evaluate, one_clip_loader
from flux4d.scores import SCORES, facts_of, metrics_from, read_scores, write_scores
from flux4d.view_scores import EvalConfig
from flux4d.report import report_text
from flux4d.report_pages import report_main, same_frames, with_baselines

ROOT = repo_root(Path(__file__).parent)
RECORDS = {
    run.name: m
    for run in runs_of_record(ROOT)
    if (run / "metrics.json").is_file()
    and "nvs" in (m := json.loads((run / "metrics.json").read_text(encoding="utf-8")))
}


@pytest.mark.skipif(not RECORDS, reason="no run of record with novel views is committed")
@pytest.mark.parametrize("name", RECORDS or ["none"])
def test_a_record_follows_the_schema(name):
    m = RECORDS[name]
    assert check_metrics(m) is m
    assert report_text(m).startswith(f"# Evaluation of {m['subject']}")


@pytest.mark.skipif(not RECORDS, reason="no run of record with novel views is committed")
@pytest.mark.parametrize("name", RECORDS or ["none"])
def test_a_report_is_what_its_record_says(name):
    "Alone, or with the baselines that another record scored on the same frames."
    m, path = RECORDS[name], ROOT / f"papermill_runs/{name}/report.md"
    said = path.read_text(encoding="utf-8")
    with_others = (
        report_text(with_baselines(m, {n: o}))
        for n, o in RECORDS.items()
        if n != name and o["baselines"] and same_frames(m, o)
    )  # made only where the record alone does not say the same
    assert said == report_text(m) or said in with_others, f"make it anew: flux4d-report papermill_runs/{name} --report"


TABLES = [run for run in runs_of_record(ROOT) if (run / SCORES).is_file() and run.name in RECORDS]


@pytest.mark.skipif(not TABLES, reason="no run of record with a table of scores is committed")
@pytest.mark.parametrize("run", TABLES or [Path("none")], ids=lambda run: run.name)
def test_metrics_are_those_of_the_stored_scores(run):
    "Every number of metrics.json is made again from scores.csv.gz."
    assert disagreements(RECORDS[run.name], read_scores(run / SCORES)) == []


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    "An evaluation of the made-up log: its folder and its metrics, as stored."
    root, folder = fixture_city(), tmp_path_factory.mktemp("evaluated") / "run"
    row = select_clips(build_index(root, ClipConfig()), settings=("eval_future",))[0]
    values = dict(data=dict(image_scale=0.5, loader_threads=1), init=dict(fill_blocks=[64, 16]))
    cfg = config_from_dict(values, Config)
    loader = one_clip_loader([Clip(PandaSet(root)[row["scene_id"]], row)], cfg, LiftCache(folder.parent / "lift"))
    about = About("lift", "unseen logs", "lift", scenes=("model",))
    metrics = evaluate(about, Evaluation(still, loader, folder, (), EvalConfig(save_renders=0), videos=0))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder, json.loads(json.dumps(metrics))


def test_metrics_are_a_function_of_the_table(evaluated):
    "Made again from the stored file to the last bit, and stored again to the last byte."
    folder, metrics = evaluated
    table = read_scores(folder / SCORES)
    assert metrics_from(table, facts_of(metrics)) == metrics
    assert check_metrics(metrics) is metrics
    first = (folder / SCORES).read_bytes()
    assert write_scores(folder, table).read_bytes() == first


@pytest.mark.parametrize("path", ["nvs.full.future.psnr.mean", "scene_flow.epe_3way.FD.pooled", "worst.0.psnr"])
def test_a_number_that_the_table_does_not_give_is_refused(evaluated, tmp_path, path, capsys):
    "By the command, in one sentence that names the entry."
    folder, metrics = evaluated
    shutil.copytree(folder, tmp_path / "run")
    m = copy.deepcopy(metrics)
    *up, last = path.split(".")
    at = m
    for k in up:
        at = at[int(k)] if isinstance(at, list) else at[k]
    at[last] += 0.01
    (tmp_path / "run/metrics.json").write_text(json.dumps(m))
    assert report_main([str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"run/metrics.json: {path}: is ") and "the stored scores give" in said and "\n" not in said
    shutil.copy(folder / "metrics.json", tmp_path / "run")
    assert report_main([str(tmp_path / "run")]) == 0


# figures of runs in prose

RUNS = kept_runs(ROOT)
TEXTS = {
    (nb.path.name, i): c["source"]
    for nb in read_notebooks(ROOT)
    for i, c in enumerate(nb.cells)
    if c["cell_type"] == "markdown"
}
TEXTS |= {
    (p.name, i): section
    for p in pages_of_text(ROOT)
    for i, section in enumerate(re.split(r"^(?=## )", p.read_text(encoding="utf-8"), flags=re.M))
}
CELLS = {place: text for place, text in TEXTS.items() if SOURCES.search(text)}


def test_figures_in_prose_are_those_of_their_runs():
    assert figure_faults(ROOT) == [], "flux4d-repo figures --write puts the right ones in"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    prose = "\n".join(
        line for line in readme.splitlines() if not line.startswith("|")
    )  # its tables are read from the runs
    assert readme == readme_text(ROOT), "the README is not what the index says: make readme"
    assert not SOURCES.search(readme), "sources stay in the index, where each figure is checked"
    of_index = {f.text for (name, _), text in TEXTS.items() if name == "00_index.ipynb" for f in figures_in(text, RUNS)}
    wanted = {f.text for f in figures_in(prose, RUNS) if f.wanted}
    assert len(wanted) > 10 and wanted <= of_index, wanted - of_index


def entries(text):
    "Figures and sources of a text, those with a run behind them."
    for marker in SOURCES.finditer(text):
        for line in marker[1].splitlines():
            figure, _, source = line.partition(" = ")
            if not line.startswith("holds ") and not source.startswith("-"):
                yield figure, source


@pytest.mark.skipif(not RUNS, reason="no run is committed")
@pytest.mark.parametrize("place", CELLS, ids=lambda p: f"{p[0]}-{p[1]}")
def test_a_stale_figure_is_found_and_mended(place):
    text = CELLS[place]
    for figure, source in entries(text):
        value = run_arithmetic(ROOT, source)
        old = re.sub(
            r"\d(?=\D*$)", lambda m: str((int(m[0]) + 5) % 10), figure
        )  # the last digit is another one
        stale = re.sub(rf"(?<![\w.,]){re.escape(figure)}(?![\w]|[.,]\d)", old, text)
        faults, mended = text_faults(stale, ROOT, RUNS)
        assert any(f.startswith(f"{old} is stale: ") for f in faults), (figure, source)
        assert not is_printed_right(value, old) and is_printed_right(value, figure)
        if all(f.split(" ")[1] == "is" for f in faults):
            assert text_faults(mended, ROOT, RUNS)[0] == []


@pytest.mark.skipif(not RUNS, reason="no run is committed")
@pytest.mark.parametrize("place", CELLS, ids=lambda p: f"{p[0]}-{p[1]}")
def test_a_figure_without_a_source_is_found(place):
    text = SOURCES.sub("", CELLS[place])
    wanted = [f.text for f in figures_in(text, RUNS) if f.wanted]
    assert text_faults(text, ROOT, RUNS)[0] == [f"{f} has no source" for f in wanted]
    assert wanted or not list(entries(CELLS[place]))


def test_the_ablation_claims_no_result_without_a_run():
    text = " ".join(
        c["source"]
        for nb in read_notebooks(ROOT)
        if nb.path.name == "62_ablation.ipynb"
        for c in nb.cells
        if c["cell_type"] == "markdown"
    )
    kept = [r for r in RUNS if r.startswith("ablation_")]
    assert ("No run of the ablation is of record yet" in text) == (not kept), (
        "62_ablation says what it does not know, or not what it knows"
    )
