"""Clips that the data cannot give are named with their reason, by training and by evaluation, and stand in
the record."""

import shutil

from flux4d.city.logs import fixture_city
from flux4d.clips import ClipConfig, build_index, left_out_lines
from flux4d.evaluate import Subject, about_of, eval_clips_of
from flux4d.schema import OPTIONAL, faults
from flux4d.run_facts import About
from flux4d.refine import FullConfig


def test_a_missing_sweep_is_named(tmp_path):
    root = tmp_path / "city"
    shutil.copytree(fixture_city(), root, ignore=shutil.ignore_patterns("_truth"))
    shutil.copytree(root / "001", root / "003")
    (root / "003/lidar/05.pkl.gz").unlink()
    clips, left_out = eval_clips_of(root, ("front_camera",), ("001", "003"))
    assert [c.id for c in clips] == ["001_eval_future_s000_e015"]
    assert (
        list(left_out) == ["003_eval_future_s000_e015"]
        and "lidar/05.pkl.gz" in left_out["003_eval_future_s000_e015"]
    )
    lines = left_out_lines(build_index(root, ClipConfig(test_scenes=("001", "003"), train_scenes=())))
    assert lines[0] == "1 clips left out:" and "003_eval_future_s000_e015" in lines[1]
    subject = Subject("lift", "lift", None, FullConfig(), None, 0, 0.0, 0)
    assert about_of(subject, clips, left_out).left_out == left_out
    assert About("x", "y").left_out == {} and not faults(left_out, OPTIONAL["left_out"])
