"""What tables, names and records claim is so: the motion prior stands beside what training adds, presets are
their table, unseen is unseen, and scores depend on no setting of the model."""

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from flux4d import baselines, clip_data, cuboids, evaluate, motion_prior, occupancy, score_clips, train, visibility
from flux4d.ablation import NOTHING_LEARNED, ablation_row, circumstances, paper_tables, time_table
from flux4d.baselines import BASELINES
from flux4d.cache import LiftCache
from flux4d.clips import Clip, ClipConfig, build_index, select_clips
from flux4d.flow import what_training_adds
from flux4d.records import repo_root, runs_of_record
from flux4d.gap_filling import InitConfig
from flux4d.view_scores import EvalConfig
from flux4d.files import DataError
from flux4d.pandaset import PandaSet
from flux4d.log_files import fabricate_log
from flux4d.presets import PRESETS, preset_config, preset_table
from flux4d.score_clips import ALWAYS, check_baselines, one_clip_loader
from flux4d.run_facts import comparable, frames_of, training_overlap
from flux4d.report import flow_tables, nvs_tables, summary_table, title_of
from flux4d.report_pages import foreign_faults
from flux4d.parameters import TrainingParameters
from flux4d.stage6 import curves_say, rows_due
from flux4d.run_setup import keep_aside, split_clips
from flux4d.config import config_to_dict, flattened

ROOT = repo_root(Path(__file__).parent)
RECORDS = {
    run.name: m
    for run in runs_of_record(ROOT)
    if (run / "metrics.json").is_file()
    and "nvs" in (m := json.loads((run / "metrics.json").read_text(encoding="utf-8")))
}
WITH_PRIOR = [n for n, m in RECORDS.items() if m["baselines"].get("motion_prior") and not foreign_faults(m)]


# what training adds to motion


@pytest.mark.parametrize("asked", [(), ("lift",), ("nearest", "static")])
def test_the_motion_prior_stands_beside_every_model(asked):
    assert "motion_prior" in BASELINES and "motion_prior" in check_baselines(asked)
    assert set(asked) <= set(check_baselines(asked)) and ALWAYS == ("motion_prior",)


def rows_of(table):
    "First cells of a table's rows."
    return [line.split("|")[1].strip() for line in table.splitlines()]


@pytest.mark.skipif(not WITH_PRIOR, reason="no record with the motion prior is committed")
@pytest.mark.parametrize("name", WITH_PRIOR or ["none"])
def test_every_table_that_scores_motion_has_the_prior(name):
    m = RECORDS[name]
    for table in (*flow_tables(m), nvs_tables(m)[0]):  # the second of views has V_RMSE too
        assert title_of("motion_prior") in rows_of(table), table.splitlines()[0]
    assert title_of("motion_prior") in summary_table(m).splitlines()[0]


def test_runs_whose_motion_is_claimed_have_the_prior():
    "The runs that the index compares with it, and every run made since."
    assert {
        "pandaset002_full",
        "pandaset002_full_heldout",
        "pandaset002_paper_heldout",
        "city_full",
        "city_full_trained",
    } <= set(
        WITH_PRIOR
    ) or not RECORDS
    assert all("motion_prior" in m["baselines"] for m in RECORDS.values() if "scored_with" in m)


def test_trained_weights_may_cover_other_pixels_than_the_prior():
    "Counts as trained and untrained weights left them on the same frames, and counts of other frames."
    trained = dict(moving_pixels=26_223, error_px=3.0, error_of_rest_px=7.0)
    prior = dict(moving_pixels=25_214, error_px=5.0, error_of_rest_px=7.0)
    assert what_training_adds(trained, prior)["adds"]
    for pixels in (0, 13_000, 52_000):
        with pytest.raises(DataError, match="compare the same frames"):
            what_training_adds(trained, prior | dict(moving_pixels=pixels))


@pytest.mark.skipif(not WITH_PRIOR, reason="no record with the motion prior is committed")
def test_the_ablation_has_the_prior_in_every_table():
    name = WITH_PRIOR[0]
    run = ROOT / "papermill_runs" / name
    row = ablation_row(run)
    of_prior = RECORDS[name]["baselines"]["motion_prior"]
    assert row["prior"]["V_RMSE"] == of_prior["scene_flow"]["v_rmse"]["dynamic"]["mean"] is not None
    for table in paper_tables([row]).split("\n\n")[1::2]:
        head, *lines = (line.strip("| ").split(" | ") for line in table.splitlines())
        of_speed = next(line for line in lines if line[0] == "V_RMSE")  # a run is a column, a figure a line
        assert head[-1] == NOTHING_LEARNED and f"{row['prior']['V_RMSE']:.4g}" == of_speed[-1]
    assert paper_tables([]).count(NOTHING_LEARNED) == 2  # said even where nothing was measured
    for table in (circumstances([row]), time_table([run])):
        named = " ".join(line.strip("| ").split(" | ")[0] for line in table.splitlines())
        assert "motion prior alone" in named and re.search(r"V_RMSE|FD EPE", named), named


# presets


def test_presets_differ_as_their_table_says_and_in_nothing_else():
    table = [[c.strip() for c in line.strip("|").split("|")] for line in preset_table().splitlines()]
    head, rows = table[0][1:], {r[0].strip("`"): r[1:] for r in table[2:]}
    configs = {n: flattened(config_to_dict(preset_config(n))) for n in PRESETS}
    assert head == list(PRESETS) and set(PRESETS) == {"default", "paper", "learned", "base", "draft"}
    for field, value in configs["default"].items():
        shown = rows.get(field, [""] * len(head))
        for name, cell in zip(head, shown):
            differs = configs[name][field] != value
            assert bool(cell) == (differs or (name == "default" and field in rows)), (field, name)
            if cell:
                assert cell == str(configs[name][field])


CHOICES = {
    "init.fill": False,
    "init.scale_factor": 1.0,
    "init.time_source": "sweep",
    "background.mode": "hemisphere",
    "background.num_sky_points": 1_000_000,
    "background.sky_opacity": 0.5,
    "model.motion_prior.reach": 0,
    "model.local_velocity_cells": [],
    "model.dead_zone": 0.0,
    "model.unet.norm": "batch",
    "refine.unet.norm": "batch",
    "train.supervise_inputs": False,
    "train.random_background": False,
    "loss.berhu": None,
    "loss.depth": 0.01,
    "loss.velocity_unit": "clip",
    "refine.error": "training",
    "data.settings": ["train_future"],
}


@pytest.mark.parametrize("field", CHOICES)
def test_paper_restores_every_known_choice(field):
    assert flattened(config_to_dict(preset_config("paper")))[field] == CHOICES[field]
    assert flattened(config_to_dict(preset_config("paper")))["background.inside_points"] > 0


# which frames are unseen


def all_clips(root, **how):
    return [
        Clip(PandaSet(root)[r["scene_id"]], r) for r in select_clips(build_index(root, ClipConfig(**how)))
    ]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "Two data sets with logs of the same names."
    roots = [tmp_path_factory.mktemp(n) for n in ("a", "b")]
    for k, root in enumerate(roots):
        for log in ("001", "002", "003"):
            fabricate_log(root, log, 40, contents=False, start=1.5e9 + 1e6 * k)
    return roots


def test_logs_of_one_name_in_two_data_sets_are_two_logs(two):
    a, b = map(all_clips, two)
    assert [c.id for c in a] == [c.id for c in b]
    assert training_overlap(frames_of(a), b) == "unseen logs"
    assert training_overlap(frames_of(a), a).startswith("training frames (")
    assert (
        training_overlap(frames_of([c for c in a if c.log.id == "001"]), [c for c in a if c.log.id == "002"])
        == "unseen logs"
    )
    early, late = [c for c in a if c.frames[-1] < 12], [c for c in a if c.frames[0] >= 20]
    assert (
        training_overlap(frames_of(early), [c for c in late if c.log.id in {e.log.id for e in early}])
        == "unseen frames of training logs"
    )
    assert training_overlap(None, a).startswith("unknown")


@pytest.mark.parametrize("most", [0, 1, 2, 3, 50])
def test_validation_clips_are_neither_trained_on_nor_tested(two, most):
    index = build_index(two[0], ClipConfig(train_scenes=("001", "002"), test_scenes=("003",)))
    train, watched, tested = split_clips(two[0], index, TrainingParameters(), preset_config("default"), most)

    def touched(cs):
        return {(c.log.id, f) for c in cs for f in c.frames}

    assert train and tested and len(watched) == min(most, 2)
    assert not touched(watched) & touched(train) and not touched(watched) & touched(tested)
    assert {c.split for c in watched} <= {"train"} and {c.split for c in tested} == {"test"}


def test_keeping_all_aside_is_refused(two):
    one = all_clips(two[0], train_scenes=("001",), test_scenes=("003",))
    first = [c for c in one if c.split == "train"][:1]
    with pytest.raises(DataError, match="^val_clips: keeping 1 of 1 training clips aside leaves none"):
        keep_aside(first, 1)


# scores and the settings of the model


def test_depth_is_scored_with_fixed_sensors(two):
    clip = all_clips(two[0])[0]
    for sensors in ((0,), (1,), (0, 1)):
        cfg = replace(preset_config("draft"), init=InitConfig(lidar_sensors=sensors))
        assert (
            one_clip_loader([clip], cfg, LiftCache(two[0] / "cache")).target_sensors
            == (0,)
            == EvalConfig().depth_sensors
        )


@pytest.mark.parametrize(
    "change,why",
    [
        (dict(data=dict(image_scale=0.5)), "scale 0.5"),
        (dict(data=dict(cameras=("back_camera",))), "cameras back_camera"),
        (dict(init=dict(lidar_sensors=(0, 1))), "LiDARs 0, 1 lifted"),
    ],
)
def test_other_sensors_cameras_or_scale_are_not_comparable(two, change, why):
    clip = all_clips(two[0])[0]
    sound = comparable([clip], preset_config("default"))
    assert sound.startswith("no: ") and why not in sound
    assert why in comparable([clip], preset_config("default", change))
    assert "depth of LiDARs 1" in comparable([clip], preset_config("default"), (1,))


# curves of a run


def test_curves_say_what_was_not_trained_and_not_watched():
    def row(step, **values):
        return dict(step=step, total=0.1, **values)

    assert curves_say([], 0)[0].startswith("Nothing was learned") and curves_say([], 0)[1].startswith(
        "Nothing was watched"
    )
    assert curves_say([row(1)], 1, 1)[0].startswith("Nothing was learned: 1 steps, none with an update")
    assert "too few for a curve" in curves_say([row(1), row(3)], 3)[0]
    assert "not a course" in curves_say([row(1, score=20.0)], 1)[1]
    assert "from 21.00 to 24.00 dB" in curves_say([row(k, score=20.0 + k) for k in range(1, 5)], 4)[1]
    assert (
        rows_due(0, 25, 10, True, (1,)) == {1, 10, 20, 25}
        and rows_due(0, 25, 10, False) == {10, 20}
        and rows_due(3, 3, 1, True) == set()
    )


def test_the_training_notebook_says_it_and_compares_weights():
    "An untrained network and an empty history must be told from a trained one and a course."
    cells = json.loads((ROOT / "nbs/60_stage6.ipynb").read_text(encoding="utf-8"))["cells"]
    fit = next("".join(c["source"]) for c in cells if "rows = trainer.fit(" in "".join(c["source"]))
    for part in (
        "test_eq(moved, updates > 0)",
        "curves_say(rows, trainer.step, trainer.skipped)",
        "rows_due(first, trainer.step, cfg.train.eval_every",
    ):
        assert part in fit, part


# names that nobody used

GONE = [
    (cuboids, "box_pose"),
    (clip_data.ClipData, "returns"),
    (EvalConfig, "max_clips"),
    (baselines, "above_ground"),
    (motion_prior, "above_ground"),
    (train.Loader, "input_views"),
    (score_clips, "input_views"),
]


@pytest.mark.parametrize("where,name", GONE, ids=lambda x: getattr(x, "__name__", x))
def test_dead_and_double_names_are_gone(where, name):
    assert not hasattr(where, name) and name not in getattr(where, "__annotations__", {})


def test_one_height_above_ground_and_one_way_to_inputs():
    assert baselines.height_above_ground is occupancy.height_above_ground
    assert inspect.getsource(visibility.project_sweep).count("unoccluded(") == 1  # one test of what is hidden
    source = "".join(inspect.getsource(m) for m in (train, score_clips, evaluate))
    assert not re.search(r"\binput_views\b", source)
