"Bad input on the data side ends in one sentence that names the file, the fault and the remedy (design, section 7)."

import json
import re
import shutil
import numpy as np
import pandas as pd
import pytest
from flux4d.check import check_main
from flux4d.files import DataError
from flux4d.pandaset import Log, PandaSet
from flux4d.log_faults import check_log
from flux4d.log_files import fabricate_log
from flux4d.clips import Clip, ClipConfig, build_index, select_clips
from flux4d.index_files import load_index, write_index, index_main
from flux4d.clip_data import InputViews, load_views

CAMS = "front_camera", "left_camera"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    "A sound data root with one log of 20 frames."
    root = tmp_path_factory.mktemp("sound")
    fabricate_log(root, "001", 20, CAMS)
    return root


@pytest.fixture
def root(sound, tmp_path):
    "A copy to break."
    shutil.copytree(sound / "001", tmp_path / "001")
    return tmp_path


def sentence(excinfo, file, remedy, fault=""):
    "Is the error one sentence with file, fault and remedy?"
    text = str(excinfo.value)
    assert (
        excinfo.type is DataError
        and excinfo.value.__cause__ is None
        and not re.search(r"Traceback|0x[0-9a-f]{6}|/tmp", text)
    ), text
    assert (
        text.startswith(file)
        and fault in text
        and text.endswith(".")
        and "\n" not in text
        and ". " not in text
    ), text
    assert "; " in text and remedy in text.split("; ", 1)[1], text


def edit(path, change):
    "Change a JSON file in place."
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def resweep(root, change):
    "Change a sweep's table in place."
    p = root / "001/lidar/03.pkl.gz"
    t = pd.read_pickle(p)
    change(t).to_pickle(p)


FILES = {
    "lidar/timestamps.json": lambda log: log.lidar_stamps,
    "lidar/poses.json": lambda log: log.lidar_poses,
    "lidar/03.pkl.gz": lambda log: log.sweep(3),
    "camera/front_camera/intrinsics.json": lambda log: log.camera(),
    "camera/front_camera/poses.json": lambda log: log.camera(),
    "camera/front_camera/timestamps.json": lambda log: log.camera(),
    "camera/front_camera/03.jpg": lambda log: log.image("front_camera", 3),
}


def test_sound(root):
    assert check_log(Log(root, "001")) == []


@pytest.mark.parametrize("file", FILES)
def test_missing_file(root, file):
    (root / "001" / file).unlink()
    with pytest.raises(DataError) as e:
        FILES[file](Log(root, "001"))
    sentence(e, f"001/{file}", "get the file again", "is missing")


@pytest.mark.parametrize("share", (0, 0.01, 0.5, 0.95))
@pytest.mark.parametrize("file", FILES)
def test_truncated_file(root, file, share):
    p = root / "001" / file
    b = p.read_bytes()
    p.write_bytes(b[: int(share * len(b))])
    with pytest.raises(DataError) as e:
        FILES[file](Log(root, "001"))
    sentence(e, f"001/{file}", "get the file again", "is truncated")


@pytest.mark.parametrize(
    "file", ("lidar/poses.json", "camera/front_camera/poses.json", "camera/front_camera/timestamps.json")
)
def test_lists_of_different_length(root, file):
    edit(root / "001" / file, lambda v: v[:-1])
    with pytest.raises(DataError) as e:
        FILES[file](Log(root, "001"))
    sentence(e, f"001/{file}", "cut both to the same frames", "19 entries where the LiDAR has 20")


@pytest.mark.parametrize("column", "xyzit")
@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
def test_points_not_finite(root, column, value):
    resweep(root, lambda t: t.assign(**{column: t[column].where(t.index != 7, value)}))
    with pytest.raises(DataError) as e:
        Log(root, "001").sweep(3)
    sentence(e, "001/lidar/03.pkl.gz", "drop these rows", "1 returns that are NaN or infinite")


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda t: t.drop(columns="t"), "lacks the columns t"),
        (lambda t: t[:0], "holds no returns"),
        (lambda t: t.assign(d=5), "neither 0 nor 1"),
        (lambda t: t.assign(x="far"), "not a number"),
    ],
)
def test_wrong_table(root, change, fault):
    resweep(root, change)
    with pytest.raises(DataError) as e:
        Log(root, "001").sweep(3)
    sentence(e, "001/lidar/03.pkl.gz", "get the file again", fault)


@pytest.mark.parametrize("file", ("lidar/poses.json", "camera/front_camera/poses.json"))
def test_quaternion_not_unit(root, file):
    def stretch(v):
        v[4]["heading"] = {k: 0.9 * x for k, x in v[4]["heading"].items()}
        return v

    edit(root / "001" / file, stretch)
    with pytest.raises(DataError) as e:
        FILES[file](Log(root, "001"))
    sentence(e, f"001/{file}", "get the file again", "norm 0.900 at frame 4")


@pytest.mark.parametrize("value", (0, -5, float("nan")))
def test_zero_focal_length(root, value):
    edit(root / "001/camera/front_camera/intrinsics.json", lambda v: v | dict(fx=value))
    with pytest.raises(DataError) as e:
        Log(root, "001").camera()
    sentence(e, "001/camera/front_camera/intrinsics.json", "calibration", "must be positive")


@pytest.mark.parametrize("file", ("lidar/timestamps.json", "camera/front_camera/timestamps.json"))
@pytest.mark.parametrize("swap", (True, False))
def test_time_runs_backwards(root, file, swap):
    edit(root / "001" / file, lambda v: v[:5] + ([v[6], v[5]] if swap else [v[4], v[6]]) + v[7:])
    with pytest.raises(DataError) as e:
        FILES[file](Log(root, "001"))
    sentence(e, f"001/{file}", "restore the recording's order", "runs backwards at frame")


def test_empty_clip(sound):
    record = build_index(sound)["clips"][0]
    for empty in (dict(frame_ids=[]), dict(input_frame_ids=[]), dict(frame_ids=[0])):
        with pytest.raises(DataError) as e:
            Clip(Log(sound, "001"), record | empty)
        sentence(e, record["clip_id"], "write the index again", "empty clip")


def test_log_too_short(tmp_path):
    fabricate_log(tmp_path, "001", 9)
    with pytest.raises(DataError) as e:
        build_index(tmp_path)
    sentence(e, tmp_path.parent.name, "get more frames", "no clip")


def test_camera_not_there(sound):
    for ask in (
        lambda: Log(sound, "001").camera("back_camera"),
        lambda: build_index(sound, ClipConfig(cameras=("back_camera",))),
        lambda: load_views(Clip(Log(sound, "001"), build_index(sound)["clips"][0]), [0], ["back_camera"]),
    ):
        with pytest.raises(DataError) as e:
            ask()
        sentence(e, "001/camera/back_camera", "choose from front_camera, left_camera", "does not have")


def test_log_not_there(sound, tmp_path):
    with pytest.raises(DataError) as e:
        PandaSet(sound)["777"]
    sentence(e, sound.name + "/777", "choose one of 001", "not among the logs")
    with pytest.raises(DataError) as e:
        PandaSet(tmp_path / "nowhere")
    sentence(e, tmp_path.name + "/nowhere", "data root", "does not exist")
    with pytest.raises(DataError) as e:
        PandaSet(sound / "001")
    sentence(e, sound.name + "/001", "data root", "is a log")
    with pytest.raises(DataError) as e:
        PandaSet(sound / "001/lidar")
    sentence(e, "001/lidar", "data root", "holds no logs")


def test_index_of_other_data(sound, tmp_path):
    full, _ = write_index(sound, tmp_path / "index")
    record = load_index(full, sound)["clips"][0]
    fabricate_log(tmp_path, "001", 20, CAMS, start=1.6e9)
    with pytest.raises(DataError) as e:
        load_index(full, tmp_path)
    sentence(e, "index/pandaset_full_clips.pkl", "flux4d-index", "other data than log 001")
    with pytest.raises(DataError) as e:
        Clip(Log(tmp_path, "001"), record)
    sentence(e, record["clip_id"], "flux4d-index", "other data")


def test_index_not_an_index(tmp_path):
    p = tmp_path / "clips.pkl"
    import pickle

    for content in (
        [],
        {},
        dict(meta={}, clips=[]),
        dict(meta=dict(coord={}, config={}, fingerprint={}), clips=[dict(clip_id="a")]),
    ):
        p.write_bytes(pickle.dumps(content))
        with pytest.raises(DataError) as e:
            load_index(p)
        sentence(e, f"{tmp_path.name}/clips.pkl", "flux4d-index", "lacks fields")


def test_selection_empty(sound):
    with pytest.raises(DataError) as e:
        select_clips(build_index(sound), split="train")
    sentence(e, "index", "train_scenes", "no clip with split train")


def test_targets_do_not_pass_for_inputs(sound):
    clip = Clip(Log(sound, "001"), build_index(sound)["clips"][0])
    with pytest.raises(ValueError, match="never leaks"):
        load_views(clip, clip.target_frames, kind=InputViews)


def test_hostile_pickle_runs_nothing(root, tmp_path):
    import os
    import pickle
    import gzip

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "bang"),)

    p = root / "001/lidar/03.pkl.gz"
    p.write_bytes(gzip.compress(pickle.dumps(Bomb())))
    with pytest.raises(DataError) as e:
        Log(root, "001").sweep(3)
    sentence(e, "001/lidar/03.pkl.gz", "a source you trust", "mkdir")
    assert not (tmp_path / "bang").exists()


def test_commands_fail_with_the_sentence(root, capsys):
    (root / "001/lidar/03.pkl.gz").write_bytes(b"")
    assert check_main([str(root)]) == 1 and "001/lidar/03.pkl.gz: is truncated" in capsys.readouterr().out
    edit(root / "001/lidar/timestamps.json", lambda v: v[::-1])
    assert index_main([str(root), str(root / "index")]) == 1 and "runs backwards" in capsys.readouterr().out
    assert not (root / "index").exists()
