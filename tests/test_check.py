"Numbers that cannot be true are found and their cause is named; an index and times from elsewhere are not believed."

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
import numpy as np
import pandas as pd
import pytest
from flux4d.broken_logs import (
    change_json,
    change_poses,
    change_sweeps,
    linked_copy,
    misread_order,
    moved_poses,
    turned_axes,
)
from flux4d.check import check_main, examine, implausible_numbers
from flux4d.check_mounting import check_camera_axes
from flux4d.city.logs import fixture_city
from flux4d.clips import Clip, ClipConfig, build_index, left_out_lines, long_log_clips, time_unit
from flux4d.index_files import index_hash, index_main, load_index
from flux4d.frames import (
    ClipTime,
    check_normalised,
    se3,
    se3_inverse,
    transform_points,
)
from flux4d.files import DataError
from flux4d.pandaset import Log, PandaSet, find_pandaset
from flux4d.log_files import fabricate_log
from flux4d.log_numbers import RULES, Limits, numbers_of, scaled_positions

FRAMES = 16
LIDAR, CAMERA = "lidar/poses.json", "camera/front_camera/poses.json"
LENS, SHUTTER = "camera/front_camera/intrinsics.json", "camera/front_camera/timestamps.json"
STAMPS = "lidar/timestamps.json", "meta/timestamps.json", SHUTTER


# a sound log, and ways to make it wrong


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    "The made-up city's first frames with every tenth return."
    source, root = fixture_city() / "001", tmp_path_factory.mktemp("sound")
    for path in source.rglob("*.json"):
        if path.name == "gps.json":
            continue
        value = json.loads(path.read_text())
        target = root / "001" / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(value[:FRAMES] if isinstance(value, list) else value))
    for k in range(FRAMES):
        shutil.copy(
            source / f"camera/front_camera/{k:02d}.jpg", root / f"001/camera/front_camera/{k:02d}.jpg"
        )
        pd.read_pickle(source / f"lidar/{k:02d}.pkl.gz")[::10].to_pickle(root / f"001/lidar/{k:02d}.pkl.gz")
    return root


@pytest.fixture
def log(sound, tmp_path):
    "A copy to break, its files linked to the sound ones."
    return linked_copy(Log(sound, "001"), tmp_path)


def moved(shift):
    return lambda T: moved_poses(T, np.stack([shift(k) for k in range(len(T))]))


def scaled(f):
    return lambda T: scaled_positions(T, f)


def axes(*columns):
    return lambda T: turned_axes(T, columns)


def lens(**change):
    return lambda log: change_json(log, lambda v: {k: change.get(k, lambda x: x)(x) for k, x in v.items()}, LENS)


def both(f):
    return lambda log: change_json(log, lambda v: {k: f * x for k, x in v.items()}, LENS)


def poses(change, *files):
    return lambda log: change_poses(log, change, *files)


def items(change, *files):
    return lambda log: change_json(log, change, *files)


def returns(change, frames=None):
    return lambda log: change_sweeps(log, change, frames)


def stamps(change, *files):
    return lambda log: change_json(log, change, *files)


def in_sensor_frame(log):
    T = log.lidar_poses

    def change(t, k):
        x = transform_points(se3_inverse(T[k]), t[["x", "y", "z"]].to_numpy())
        return t.assign(x=x[:, 0], y=x[:, 1], z=x[:, 2])

    change_sweeps(log, change)


def lost_frame(log):
    "Frame 9 falls out; the files after it move up."
    for file in (*STAMPS, LIDAR, CAMERA):
        change_json(log, lambda v: v[:9] + v[10:], file)
    for k in range(9, FRAMES - 1):
        for path in (log.sweep_path, lambda f: log.image_path("front_camera", f)):
            os.replace(path(k + 1), path(k))


def world_on_its_side(log):
    lying = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
    change_poses(log, lambda T: lying @ T, LIDAR, CAMERA)
    change_sweeps(log, lambda t, k: t.assign(y=t.z, z=-t.y))


def second_camera(log):
    from PIL import Image

    shutil.copytree(
        log.folder / "camera/front_camera",
        log.folder / "camera/left_camera",
        ignore=shutil.ignore_patterns("*.jpg"),
    )
    change_poses(log, axes((0, 0, -1), (0, 1, 0), (1, 0, 0)), "camera/left_camera/poses.json")  # looks left
    change_json(log, lambda v: {k: x / 2 for k, x in v.items()}, "camera/left_camera/intrinsics.json")
    for k in range(FRAMES):
        with Image.open(log.image_path("front_camera", k)) as im:
            im.resize((im.width // 2, im.height // 2)).save(log.image_path("left_camera", k))


def renamed(name):
    return lambda log: os.rename(log.folder / "camera/front_camera", log.folder / f"camera/{name}")


def stray(x):
    return lambda t, k: t.assign(x=np.where(np.arange(len(t)) == 9, t.x + x, t.x))


def far_and_lower(log):
    T = log.lidar_poses

    def change(t, k):
        far = np.hypot(t.x - T[k, 0, 3], t.y - T[k, 1, 3]) > 45
        return t[far].assign(z=t.z[far] - 60)

    change_sweeps(log, change)


def coarse(log):
    shift = np.r_[5e5, 5e6, 0.0]
    change_poses(log, moved(lambda k: shift), LIDAR, CAMERA)
    change_sweeps(log, lambda t, k: t.assign(**{a: (t[a] + b).astype(np.float32) for a, b in zip("xyz", shift)}))


def copied(source, target):
    content = source.read_bytes()
    target.unlink()
    target.write_bytes(content)


def exchanged_sweeps(log):
    a, b = (log.sweep_path(k).read_bytes() for k in (8, 9))
    for k, content in ((8, b), (9, a)):
        log.sweep_path(k).unlink()
        log.sweep_path(k).write_bytes(content)


PLANTED = {  # name: (how to plant it, the check that finds it, what its sentence says)
    "stamps in ms": (stamps(lambda v: [t * 1e3 for t in v], *STAMPS), "time_unit", "stamps are milliseconds"),
    "stamps in us": (stamps(lambda v: [t * 1e6 for t in v], *STAMPS), "time_unit", "stamps are microseconds"),
    "a frame lost": (lost_frame, "uneven_steps", "at frame 8"),
    "camera stamps in ms": (
        stamps(lambda v: [t * 1e3 for t in v], SHUTTER),
        "camera_clock",
        "they are milliseconds",
    ),
    "camera stamps a frame early": (
        stamps(lambda v: [t - 0.1 for t in v], SHUTTER),
        "camera_clock",
        "other frames",
    ),
    "camera stamps from zero": (
        stamps(lambda v: [t - v[0] for t in v], SHUTTER),
        "camera_clock",
        "count from the start",
    ),
    "camera three frames late": (
        stamps(lambda v: [t + 0.3 for t in v], SHUTTER),
        "camera_clock",
        "other frames",
    ),
    "return times in us": (
        returns(lambda t, k: t.assign(t=t.t * 1e6)),
        "return_clock",
        "they are microseconds",
    ),
    "return times from zero": (
        returns(lambda t, k: t.assign(t=t.t - t.t.min())),
        "return_clock",
        "count from the start",
    ),
    "return times of GPS": (returns(lambda t, k: t.assign(t=t.t + 18)), "return_clock", "GPS"),
    "a sweep of another frame": (
        returns(lambda t, k: t.assign(t=t.t + 0.4), [7]),
        "return_clock",
        "this sweep belongs",
    ),
    "three sweeps in one": (
        returns(lambda t, k: t.assign(t=t.t.mean() + 3 * (t.t - t.t.mean()))),
        "return_span",
        "several sweeps",
    ),
    "no time per return": (
        returns(lambda t, k: t.assign(t=t.t.max())),
        "no_return_times",
        "the time of each return was lost",
    ),
    "LiDAR poses in mm": (poses(scaled(1e3), LIDAR, CAMERA), "speed", "in millimetres"),
    "LiDAR poses in cm": (poses(scaled(1e2), LIDAR, CAMERA), "speed", "in centimetres"),
    "a pose 2 m aside": (
        poses(moved(lambda k: np.r_[2.0 * (k == 9), 0, 0]), LIDAR, CAMERA),
        "jump",
        "at frame 9",
    ),
    "poses off by 10 cm": (
        poses(moved(lambda k: np.r_[0.1 * (k % 2), 0, 0]), LIDAR, CAMERA),
        "rough_motion",
        "noisy",
    ),
    "points in mm": (
        returns(lambda t, k: t.assign(x=t.x * 1e3, y=t.y * 1e3, z=t.z * 1e3)),
        "range",
        "in millimetres",
    ),
    "a return at 1000 km": (returns(stray(1e6), [5]), "range", "drop such returns"),
    "a return at 600 m": (returns(stray(600.0), [5]), "far_returns", "few LiDARs"),
    "points in the sensor's frame": (in_sensor_frame, "world_points", "sensor's own frame"),
    "LiDAR poses inverted": (poses(se3_inverse, LIDAR), "world_points", "world-to-sensor"),
    "LiDAR poses all the same": (
        items(lambda v: v[:1] * len(v), LIDAR, CAMERA),
        "world_points",
        "different frames",
    ),
    "poses of another origin": (
        poses(moved(lambda k: np.r_[4e5, 4e6, 0]), LIDAR, CAMERA),
        "world_points",
        "another origin",
    ),
    "LiDAR quaternions x y z w": (items(misread_order, LIDAR), "lidar_axes", "stored x, y, z, w"),
    "LiDAR on its side": (
        poses(axes((0, 0, 1), (0, 1, 0), (-1, 0, 0)), LIDAR),
        "lidar_axes",
        "90 degrees from up",
    ),
    "LiDAR turned by 40 degrees": (
        poses(axes((0.766, -0.643, 0), (0.643, 0.766, 0), (0, 0, 1)), LIDAR),
        "lidar_axes",
        "40 degrees from the way",
    ),
    "world on its side": (world_on_its_side, "world_up", "z axis is not up"),
    "images halved": (both(2), "principal_point", "multiply fx, fy, cx and cy by 0.5"),
    "images doubled": (both(0.5), "principal_point", "multiply fx, fy, cx and cy by 2"),
    "images cropped": (lens(cy=lambda y: y + 50), "principal_point", "cropped"),
    "pixels on their side": (
        lambda log: change_json(log, lambda v: v | dict(cx=v["cy"], cy=v["cx"]), LENS),
        "principal_point",
        "on their side",
    ),
    "K in shares": (
        lens(fx=lambda x: x / 240, fy=lambda x: x / 135, cx=lambda x: x / 240, cy=lambda x: x / 135),
        "principal_point",
        "shares of the image",
    ),
    "fx in millimetres": (lens(fx=lambda x: 6.0, fy=lambda x: 6.0), "field_of_view", "another unit"),
    "images squeezed": (lens(fx=lambda x: 0.75 * x), "pixel_aspect", "squeezed"),
    "camera poses inverted": (poses(se3_inverse, CAMERA), "camera_distance", "world-to-camera"),
    "camera positions in mm": (poses(scaled(1e3), CAMERA), "camera_distance", "in millimetres"),
    "camera of another origin": (
        poses(moved(lambda k: np.r_[30.0, 0, 0]), CAMERA),
        "camera_distance",
        "another origin",
    ),
    "camera quaternions x y z w": (items(misread_order, CAMERA), "camera_axes", "stored x, y, z, w"),
    "camera axes of OpenGL": (
        poses(axes((1, 0, 0), (0, -1, 0), (0, 0, -1)), CAMERA),
        "camera_axes",
        "right, up, backward",
    ),
    "camera axes of a vehicle": (
        poses(axes((0, -1, 0), (0, 0, -1), (1, 0, 0)), CAMERA),
        "camera_axes",
        "forward, left, up",
    ),
    "camera on its side": (
        poses(axes((0, 1, 0), (-1, 0, 0), (0, 0, 1)), CAMERA),
        "camera_axes",
        "on their side",
    ),
    "front camera called back_camera": (renamed("back_camera"), "camera_axes", "where front_camera should"),
    "camera poses out of order": (
        items(lambda v: v[:5] + v[5:13][::-1] + v[13:], CAMERA),
        "loose_camera",
        "another order",
    ),
    "one camera pose late": (items(lambda v: v[:9] + [v[8]] + v[10:], CAMERA), "shaky_camera", "a frame off"),
    "points 60 m lower": (returns(lambda t, k: t.assign(z=t.z - 60)), "world_points", "origin in height"),
    "far points 60 m lower": (far_and_lower, "nothing_in_view", "do not belong together"),
    "a zero for no return": (
        returns(lambda t, k: t.assign(**{a: np.where(np.arange(len(t)) % 20, t[a], 0) for a in "xyz"})),
        "one_place",
        "stand for no return",
    ),
    "float32 far from zero": (coarse, "coarse_points", "single precision"),
    "poses in feet": (poses(scaled(3.28084), LIDAR, CAMERA), "world_points", "poses.json is in feet"),
    "poses in kilometres": (poses(scaled(1e-3), LIDAR, CAMERA), "world_points", "in kilometres"),
    "points in feet": (
        returns(lambda t, k: t.assign(x=t.x * 3.28084, y=t.y * 3.28084, z=t.z * 3.28084)),
        "world_points",
        "points are in feet",
    ),
    "two sweeps exchanged": (exchanged_sweeps, "return_clock", "restore the order of the files"),
    "a sweep twice": (
        lambda log: copied(log.sweep_path(8), log.sweep_path(9)),
        "return_clock",
        "belongs to another frame",
    ),
    "an image twice": (
        lambda log: copied(log.image_path("front_camera", 8), log.image_path("front_camera", 9)),
        "repeated_image",
        "is the image of the frame before",
    ),
    "log stamps from zero": (
        stamps(lambda v: [t - v[0] for t in v], *STAMPS),
        "return_clock",
        "the log's stamps count",
    ),
    "return times in ns from the sweep's start": (
        returns(lambda t, k: t.assign(t=(t.t - t.t.min()) * 1e9)),
        "return_clock",
        "nanoseconds from the start of the sweep",
    ),
    "return times in float32": (
        returns(lambda t, k: t.assign(t=t.t.astype("float32"))),
        "return_clock",
        "as float64",
    ),
    "a heading turned": (
        items(lambda v: v[:9] + [v[9] | dict(heading=dict(w=0.0, x=0.0, y=0.0, z=1.0))] + v[10:], LIDAR),
        "jump",
        "degrees a second",
    ),
    "camera headings inverted": (
        poses(lambda T: se3(T[:, :3, :3].swapaxes(1, 2), T[:, :3, 3]), CAMERA),
        "camera_axes",
        "conjugate the quaternions",
    ),
    "camera poses of the frame before": (
        items(lambda v: v[:1] + v[:-1], CAMERA),
        "shaky_camera",
        "a frame off",
    ),
    "images of 3/4": (both(4 / 3), "principal_point", "by 0.75"),
    "focal length and centre exchanged": (
        lambda log: change_json(log, lambda v: dict(fx=v["cx"], fy=v["cy"], cx=v["fx"], cy=v["fy"]), LENS),
        "principal_point",
        "are exchanged",
    ),
    "two image sizes": (second_camera, "image_sizes", "left_camera 120x67"),
    "CAM_FRONT": (renamed("CAM_FRONT"), "unknown_camera", "rename the folder to one of front_camera"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault_gives_one_sentence(log, name):
    plant, check, says = PLANTED[name]
    plant(log)
    found = implausible_numbers(log)
    assert [f.check for f in found] == [check], [str(f) for f in found]
    text = found[0].text
    assert says in text and text.startswith("001/") and text.endswith("."), text
    assert ". " not in text and "\n" not in text, text


@pytest.mark.parametrize(
    "plant, file, status",
    [(second_camera, "camera/left_camera", 0), (renamed("CAM_FRONT"), "camera/CAM_FRONT", 1)],  # a note, a fault
)
def test_cameras_that_are_not_read_yet_are_said_once(log, plant, file, status, capsys):
    plant(log)
    for images in ([], ["--no-images"]):
        assert check_main([str(log.root), *images]) == status
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 2 and f"001/{file}" in said[0], said


def test_the_lidar_of_another_log_is_one_sentence(log):
    second_camera(log)
    for file in STAMPS[:1]:
        change_json(log, lambda v: [t + 3600 for t in v], file)
    change_sweeps(log, lambda t, k: t.assign(t=t.t + 3600))
    said = [f.text for f in examine(log, images=False) if f.check != "image_sizes"]
    assert (
        len(said) == 1
        and said[0].startswith("001/lidar/timestamps.json: lies 3600 s")
        and "another log" in said[0]
    ), said


def test_lens_distortion_is_said_once(log):
    change_json(log, lambda v: v | dict(k1=-0.3), LENS)
    said = [f.text for f in examine(log, images=False) if LENS in f.text]
    assert len(said) == 1 and "k1" in said[0], said  # the reader's sentence, where it has one


def test_a_slow_vehicle_may_drive_backwards(log):
    change_poses(log, axes((-1, 0, 0), (0, 1, 0), (0, 0, -1)), CAMERA)
    slow = replace(Limits(), reverse_speed=20.0)
    assert [f.check for f in check_camera_axes(numbers_of(log), slow)] == ["reverse"]
    assert [f.check for f in check_camera_axes(numbers_of(log), Limits())] == ["camera_axes"]


def test_every_rule_has_its_planted_fault():
    elsewhere = {"files", "odd_json", "distortion", "reverse"}
    # those of tests/test_rig.py
    unlike_pandaset = "other_axes other_stamps other_names other_lens other_rate cropped far_origin"
    elsewhere |= set(unlike_pandaset.split())
    assert {check for _, check, _ in PLANTED.values()} | elsewhere == set(RULES)


def test_faults_are_refused_and_notes_only_said(log, capsys):
    change_json(log, lambda v: v | dict(fx=0.75 * v["fx"]), LENS)
    assert check_main([str(log.root), "--no-images"]) == 0
    assert "note: 001/camera/front_camera/intrinsics.json" in capsys.readouterr().out
    change_json(log, misread_order, CAMERA)
    assert check_main([str(log.root), "--log", "001", "--no-images"]) == 1
    assert "1 faults, 1 notes" in capsys.readouterr().out


def test_the_reader_does_not_repeat_a_named_cause(log, capsys):
    change_json(log, lambda v: [t * 1e3 for t in v], *STAMPS)
    assert check_main([str(log.root), "--no-images"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2  # the fault, and the log's last line


def test_a_camera_that_stumbles_is_said_beside_another(log):
    change_json(log, lambda v: [t + 0.005 * (k % 2) for k, t in enumerate(v)], SHUTTER)
    assert ["has an offset to the LiDAR that varies" in f.text for f in examine(log, images=False)] == [True]


# sound logs


def test_sound_city(sound, capsys):
    assert examine(Log(sound, "001")) == []
    assert check_main([str(sound)]) == 0 and "0 faults, 0 notes" in capsys.readouterr().out


def test_sound_far_from_the_origin(log):
    shift = np.r_[5e5, 4e6, 30.0]
    change_poses(log, moved(lambda k: shift), LIDAR, CAMERA)
    change_sweeps(log, lambda t, k: t.assign(x=t.x + shift[0], y=t.y + shift[1], z=t.z + shift[2]))
    found = implausible_numbers(log)
    assert [(f.check, f.severity) for f in found] == [("far_origin", "note")], found


def test_all_returns_in_view_is_no_fault(tmp_path):
    for id, speed in (("001", 10.0), ("002", 0.0)):
        fabricate_log(tmp_path, id, 12, ("front_camera",), speed=speed)
    assert [examine(Log(tmp_path, id)) for id in ("001", "002")] == [[], []]


def test_sound_pandaset():
    root = find_pandaset()
    if root is None or not (root / "002").is_dir():
        pytest.skip("PandaSet log 002 is not here")
    assert implausible_numbers(PandaSet(root)["002"]) == []


# files


@pytest.mark.parametrize(
    "text, says",
    [("null", "holds null"), ("[" * 100_000 + "]" * 100_000, "nests too deep")],
    ids=["null", "deep"],
)
@pytest.mark.parametrize("file", [*STAMPS, LIDAR, CAMERA, LENS])
def test_json_that_holds_nothing_or_has_no_end(log, file, text, says, capsys):
    (log.folder / file).unlink()
    (log.folder / file).write_text(text)
    assert check_main([str(log.root), "--no-images"]) == 1
    said = [l for l in capsys.readouterr().out.splitlines() if f"001/{file}:" in l]
    assert len(said) == 1, said


def test_one_sentence_for_many_renamed_images(log):
    for k in range(FRAMES):
        log.image_path("front_camera", k).rename(log.folder / f"camera/front_camera/{k:03d}.jpg")
    found = [str(f) for f in examine(log)]
    assert (
        len(found) == 1 and "000.jpg is there" in found[0] and f"(and {FRAMES - 1} files more)" in found[0]
    ), found


def test_one_sentence_for_many_files(log):
    for k in range(FRAMES):
        log.sweep_path(k).unlink()
    found = [str(f) for f in examine(log, images=False)]
    assert len(found) == 1 and f"(and {FRAMES - 1} files more)" in found[0]


@pytest.mark.parametrize("command", ["check:check_main", "index_files:index_main"])
def test_help_has_an_example_and_starts_at_once(command):
    module, main = command.split(":")
    code = f"""import sys
from flux4d.{module} import {main}
try: {main}(["--help"])
finally: print("loaded:", *(m for m in ("torch", "pandas", "matplotlib") if m in sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "example:" in done.stdout and done.stdout.splitlines()[-1].split() == ["loaded:"], (
        done.stdout + done.stderr
    )


# indices


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    "Two logs without contents."
    root = tmp_path_factory.mktemp("drive")
    for id in ("001", "002"):
        fabricate_log(root, id, 40, contents=False)
    return root


def restamp(log, change):
    "Change all stamps of a log: frame, stamp -> stamp."
    for path in log.rglob("timestamps.json"):
        path.write_text(json.dumps([change(k, t) for k, t in enumerate(json.loads(path.read_text()))]))


@pytest.mark.parametrize("factor, unit", [(1e3, "milliseconds"), (1e6, "microseconds"), (1e9, "nanoseconds")])
def test_index_stops_at_a_unit_and_names_it(tmp_path, factor, unit, capsys):
    log = fabricate_log(tmp_path, "001", 20, contents=False)
    restamp(log, lambda k, t: t * factor)
    says = f"001/lidar/timestamps.json: .*{unit}; divide its stamps by {factor:.0f}"
    with pytest.raises(DataError, match=says):
        build_index(tmp_path)
    assert index_main([str(tmp_path), str(tmp_path / "index")]) == 1 and unit in capsys.readouterr().out


def test_rates_of_other_recordings_are_no_unit_mistake():
    assert [time_unit(s) for s in (0.01, 0.05, 0.1, 0.5, 1.0, 4.0)] == [None] * 6


def test_uneven_steps_are_left_out_with_the_reason(tmp_path, capsys):
    log = fabricate_log(tmp_path, "001", 40, contents=False)
    restamp(log, lambda k, t: t + 0.1 * (k >= 25))
    index = build_index(tmp_path)
    assert [c["frame_start"] for c in index["clips"]] == [0]
    lines = left_out_lines(index)
    assert lines[0] == "1 clips left out:"
    assert "001_eval_future_s020_e035: steps by 0.200 s at its frame 4 where 0.100 s are usual" in lines[1]
    assert len(build_index(tmp_path, ClipConfig(max_step_ratio=2.5))["clips"]) == 2
    assert index_main([str(tmp_path), str(tmp_path / "index")]) == 0
    out = capsys.readouterr().out
    assert f"wrote {tmp_path / 'index' / 'pandaset_full_clips.pkl'}" in out and lines[1] in out
    with pytest.raises(DataError, match="steps by 0.200 s"):
        long_log_clips(PandaSet(tmp_path), "001")


def test_hash_of_an_index_is_its_cut_and_data(drive):
    index = build_index(drive)
    old = {
        **index,
        "meta": index["meta"]
        | dict(config={k: v for k, v in index["meta"]["config"].items() if k != "max_step_ratio"}),
    }
    assert index_hash(old) == index_hash(index)


FIELDS = dict(
    clip_id=["../../..", "/etc/x", "a/b", "a\\b", "", "..", 7, None, "x\ny"],
    scene_id=["../001", "/", 1],
    setting=["../x", None],
    split=["val", ["test"]],
    fps=["10", 0, float("nan"), True],
    fps_actual=[None],
    clip_len_frames=["11", -1, 1.5],
    frame_start=[None],
    frame_ids=["abc", [0, "1"], [-1, 0], [True]],
    input_frame_ids=[None, {}],
    target_frame_ids=[[1.5]],
    timestamps=[None, dict(lidar=["a"], cameras={}), dict(lidar=[], cameras={"../x": []})],
    intrinsics=[{"front_camera": dict(fx=1)}, {"front_camera": None}, []],
    extrinsics=[dict(lidar=[[1]], cameras={}), dict(lidar=None, cameras={})],
    image_paths=[{"front_camera": ["../../etc/passwd"]}, {"../x": []}, {"front_camera": "x"}],
    lidar_paths=[["/etc/passwd"], [None], "abc"],
    views=[{}, dict(input=[["../x", 0]], target=[]), dict(input=[[1]], target=[])],
)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_a_record_has_its_type(drive, tmp_path, field):
    index, path = build_index(drive), tmp_path / "clips.pkl"
    for value in FIELDS[field]:
        path.write_bytes(
            pickle.dumps(index | dict(clips=[index["clips"][0], index["clips"][1] | {field: value}]))
        )
        for root in (None, drive):
            with pytest.raises(DataError) as e:
                load_index(path, root)
            text = str(e.value)
            assert f"in clip 1, {field} must be" in text and "\n" not in text, text
            assert text.endswith("write it again with flux4d-index."), text


META = dict(
    version=["1", None],
    preset=[1],
    config=[None, {}, dict(cameras="front_camera"), dict(cameras=["../x"])],
    coord=[[]],
    scenes=["001", ["../x"], [1]],
    fingerprint=[[], {"../../x": "0"}, {"001": 1}],
    left_out=[None, [1], [{}]],
)


@pytest.mark.parametrize("field", META)
def test_every_field_of_the_meta_has_its_type(drive, tmp_path, field):
    index, path = build_index(drive), tmp_path / "clips.pkl"
    for value in META[field]:
        path.write_bytes(pickle.dumps(index | dict(meta=index["meta"] | {field: value})))
        with pytest.raises(DataError, match=f"its {field} must be"):
            load_index(path, drive)


def test_index_names_only_what_the_data_root_holds(drive, tmp_path):
    index, path = build_index(drive), tmp_path / "clips.pkl"

    def written(**change):
        path.write_bytes(pickle.dumps(index | dict(clips=[index["clips"][0] | change])))

    for change, says in (
        (dict(scene_id="777"), "not among the index's logs"),
        (dict(image_paths={"side_camera": []}), "not among the index's cameras"),
        (dict(frame_ids=[5, 3]), "consecutive"),
        (dict(lidar_paths=[]), "one per frame"),
        (dict(input_frame_ids=[99]), "must lie in frame_ids"),
    ):
        written(**change)
        with pytest.raises(DataError, match=says):
            load_index(path, drive)
    path.write_bytes(pickle.dumps(index | dict(meta=index["meta"] | dict(fingerprint={"777": "0"}))))
    with pytest.raises(DataError, match="other data than log 777"):
        load_index(path, drive)
    for content in (
        None,
        dict(meta=index["meta"], clips=5),
        dict(meta=index["meta"], clips=None),
        dict(meta=None, clips=[]),
    ):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match="lacks fields"):
            load_index(path)


def test_a_clip_cannot_lead_out_of_a_folder(drive):
    record = build_index(drive)["clips"][0]
    for id in ("../../..", "/etc/x", "a/b", "..", ""):
        with pytest.raises(DataError, match="is not a plain name"):
            Clip(Log(drive, "001"), record | dict(clip_id=id))


def test_index_command_ends_in_sentences(drive, tmp_path, capsys):
    assert index_main([str(drive), str(tmp_path / "out")]) == 0
    full = tmp_path / "out/pandaset_full_clips.pkl"
    assert f"wrote {full}" in capsys.readouterr().out
    for number in ("999", "-1"):
        assert index_main(["--inspect", str(full), "--clip", number]) == 1
        assert re.fullmatch(
            rf"clip: {number} is not in this index; choose a number from 0 to \d+\.\n",
            capsys.readouterr().out,
        )
    (tmp_path / "file").touch()
    assert index_main([str(drive), str(tmp_path / "file/sub")]) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert "written" in said and said.endswith(".")


# times


def test_a_time_outside_the_clip_is_refused(drive):
    log = Log(drive, "001")
    clip = Clip(log, build_index(drive)["clips"][0])
    assert -0.1 < clip.t_of_camera("front_camera", 0) < 0
    camera = log.camera("front_camera")
    for shift, of in ((0.3, 15), (-0.3, 0), (2.0, 0), (1e9, 3)):
        camera.stamps[:] += shift
        with pytest.raises(
            DataError,
            match=f"001/camera/front_camera/timestamps.json: puts frame {of} at .* "
            "outside 0..1; compare its unit",
        ):
            clip.t_of_camera("front_camera", of)
        camera.stamps[:] -= shift


def test_the_tolerance_is_a_field():
    assert ClipTime(0.0, 1.5).reach == 0.1 and ClipTime(0.0, 1.5, slack=0.3).reach == 0.3
    assert ClipTime(0.0, 0.4).reach > 0.25  # one sweep, in a short clip
    check_normalised(np.array([-0.1, 1.1]))
    for t in (2.0, 1.2, -0.2, float("nan")):
        with pytest.raises(ValueError, match="target time spans"):
            check_normalised(t, "target time")


def test_seconds_do_not_pass_for_clip_time():
    import torch
    from flux4d.gaussians import advance

    still = torch.zeros(1, 3), torch.ones(1, 1, 3), torch.zeros(1)
    assert advance(*still, 1.1, 1.5).shape == (1, 3)
    for t in (2.0, 1.2, torch.tensor([0.0, 1.5])):
        with pytest.raises(ValueError, match="must be normalised"):
            advance(*still, t, 1.5)
    assert advance(*still, 2.0, 1.5, slack=1.0).shape == (1, 3)


def test_returns_of_another_time_make_no_gaussians(sound):
    from flux4d.lift import clip_data

    clip = Clip(Log(sound, "001"), build_index(sound, ClipConfig(test_scenes=("001",)))["clips"][0])
    assert (~clip_data(clip).points[..., 0].isnan()).sum() > 1000
    moved = clip.log.sweep

    def late(frame, sensors=(0,)):
        s = moved(frame, sensors)
        s.stamps += 1.0
        return s

    clip.log.sweep = late
    with pytest.raises(DataError, match="001/lidar/.*: holds returns at"):
        clip_data(clip)
