"""Conversion of KITTI raw drives: planted faults, gaps, and the sixteen real frames where they are at hand."""

import os
import shutil
from pathlib import Path
import numpy as np
import pytest
from flux4d.check import check_main
from flux4d.clips import ClipConfig, build_index
from flux4d.files import DataError
from flux4d.convert import convert_main
from flux4d.kitti import convert_drive, drive_frames, find_drives, read_calibration, read_path
from flux4d.made_drive import make_drive
from flux4d.pandaset import PandaSet

DRIVE = "2011_09_26_drive_0001"


def real_drive():
    "The sixteen frames of a real drive, None where they are not."
    root = os.environ.get("FLUX4D_KITTI")
    roots = [Path(root)] if root else [p / "shared/kitti_raw" for p in Path(__file__).resolve().parents]
    root = next((r for r in roots if r.is_dir()), None)
    return None if root is None else find_drives(root)[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A small made-up drive, to be copied."
    return make_drive(tmp_path_factory.mktemp("raw"), frames=4, scale=0.1, step=4.0)


@pytest.fixture
def drive(made, tmp_path):
    "A copy that a test may damage."
    day = tmp_path / "raw" / made.parent.name
    shutil.copytree(made.parent, day)
    return day / made.name


def said(drive, out):
    "The sentence of the error that ends a conversion."
    with pytest.raises(DataError) as error:
        convert_drive(drive, out)
    text = str(error.value)
    assert text.endswith(".") and "; " in text and "\n" not in text, text
    assert not (out / DRIVE).exists()
    return text


def edit(path, old, new):
    "Replace text in a file."
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_drives_are_found_at_every_level(drive):
    for source in (drive, drive.parent, drive.parent.parent):
        assert find_drives(source) == [drive]
    with pytest.raises(DataError, match="holds no drive of KITTI raw"):
        find_drives(drive / "oxts")


@pytest.mark.parametrize("name", ["imu_to_velo", "velo_to_cam", "cam_to_cam"])
def test_missing_calibration(drive, tmp_path, name):
    (drive.parent / f"calib_{name}.txt").unlink()
    assert f"calib_{name}.txt: is missing" in said(drive, tmp_path / "logs")


@pytest.mark.parametrize(
    "name, old, new, words",
    [
        ("calib_velo_to_cam.txt", "R: ", "Q: ", "lacks R with 9 finite numbers"),
        ("calib_velo_to_cam.txt", "T: ", "T: nan ", "lacks T with 3 finite numbers"),
        ("calib_imu_to_velo.txt", "R: ", "R: 3", "no rotation"),
        ("calib_cam_to_cam.txt", "P_rect_02", "P_rect_03", "lacks P_rect_02 with 12 finite numbers"),
        ("calib_cam_to_cam.txt", "P_rect_02: ", "P_rect_02: -", "no pinhole camera"),
    ],
)
def test_broken_calibration(drive, tmp_path, name, old, new, words):
    edit(drive.parent / name, old, new)
    assert words in said(drive, tmp_path / "logs")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("velodyne_points/timestamps.txt", None, "is missing"),
        ("velodyne_points/timestamps_end.txt", "yesterday\n", "holds a line that is no moment"),
        ("velodyne_points/timestamps_start.txt", "", "is empty"),
        ("velodyne_points/timestamps.txt", "2011-09-26 13:11:01.5\n", "has 1 stamps where its start and end have 4"),
        ("oxts/timestamps.txt", "2011-09-26 13:11:01.5\n", "has 1 stamps where frames up to 3 are needed"),
        ("oxts/timestamps.txt", "2011-09-26 13:11:01.5\n" * 4, "does not run forward"),
        ("oxts/data/0000000002.txt", "49.0 8.4", "is no row of GPS/IMU numbers"),
        ("oxts/data/0000000002.txt", "49.0 8.4 nan 0 0 0 0 0 0 0 0", "is no row of GPS/IMU numbers"),
        ("velodyne_points/data/0000000001.bin", b"123", "has 3 bytes"),
        ("velodyne_points/data/0000000001.bin", np.full(8, np.nan, np.float32).tobytes(), "NaN or infinite"),
        ("image_02/data/0000000001.png", b"no image", "is truncated or not a JPEG"),
    ],
)
def test_broken_drive(drive, tmp_path, name, content, words):
    path = drive / name
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in said(drive, tmp_path / "logs")


def test_frames_that_lack_a_file_are_left_out(drive, tmp_path, capsys):
    (drive / "velodyne_points/data/0000000001.bin").unlink()
    assert drive_frames(drive).left_out == [1]
    assert convert_main(["kitti", str(drive), str(tmp_path / "logs")]) == 0
    assert "3 frames, 0.3 s, 1 frames without all files left out" in capsys.readouterr().out
    log = PandaSet(tmp_path / "logs")[DRIVE]
    assert np.allclose(np.diff(log.lidar_stamps), [0.2, 0.1], atol=1e-6)  # the gap stays visible
    for frame in (1, 2):
        (drive / f"image_02/data/000000000{frame + 1}.png").unlink()
    assert "has 1 frames with sweep, image" in said(drive, tmp_path / "other")


def test_nothing_is_written_over(drive, tmp_path):
    log = convert_drive(drive, tmp_path / "logs")
    before = (log / "lidar/00.pkl.gz").read_bytes()
    with pytest.raises(DataError, match="is there already; choose another folder"):
        convert_drive(drive, tmp_path / "logs")
    assert (log / "lidar/00.pkl.gz").read_bytes() == before
    assert [p.name for p in (tmp_path / "logs").iterdir()] == [DRIVE]


def test_command_line(drive, tmp_path, capsys):
    assert convert_main(["kitti", str(tmp_path / "nowhere"), str(tmp_path / "logs")]) == 1
    assert "nowhere: does not exist" in capsys.readouterr().out
    assert convert_main(["kitti", str(drive / "oxts"), str(tmp_path / "logs")]) == 1
    assert "holds no drive of KITTI raw" in capsys.readouterr().out
    for wrong in (["kitti"], ["waymo", "a", "b"], ["kitti", "a", "b", "--quality", "0"]):
        with pytest.raises(SystemExit) as stop:
            convert_main(wrong)
        assert stop.value.code == 2
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert convert_main(["kitti", str(drive), str(tmp_path / "file")]) == 1
    assert "could not be written" in capsys.readouterr().out


def test_path_before_and_after_its_rows(made):
    path = read_path(made, [0, 1, 2, 3])
    outside = path.at(path.stamps[[0, -1]] + [-0.07, 0.07])[:, :3, 3]
    step = np.linalg.norm(outside - path.position[[0, -1]], axis=1)
    assert np.allclose(step, 0.07 * np.linalg.norm(path.velocity[[0, -1]], axis=1), rtol=0.02)


@pytest.mark.skipif(real_drive() is None, reason="no KITTI raw drive here (FLUX4D_KITTI or ../shared/kitti_raw)")
def test_real_frames(tmp_path, capsys):
    source = real_drive()
    day = tmp_path / "raw" / source.parent.name
    drive = day / source.name
    for path in source.parent.glob("calib_*.txt"):
        day.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, day)
    for path in source.rglob("*"):  # four frames are enough
        if path.is_file() and (not path.stem.isdecimal() or int(path.stem) in range(4, 8)):
            (drive / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, drive / path.relative_to(source))
    log = convert_drive(drive, tmp_path / "logs")
    assert check_main([str(tmp_path / "logs")]) == 0, capsys.readouterr().out
    opened = PandaSet(tmp_path / "logs")[log.name]
    assert opened.camera("front_camera").size == (1242, 375)
    speed = np.linalg.norm(np.diff(opened.lidar_poses[:, :3, 3], axis=0), axis=1) / np.diff(opened.lidar_stamps)
    assert ((speed > 10.7) & (speed < 13.6)).all()
    K = read_calibration(day).K
    assert np.allclose(K[:2, 2], [610.0593, 173.354], atol=1e-3)
    cfg = ClipConfig(preset="debug", debug_len_s=0.4, debug_stride_s=0.4, input_frames=(0, 2))
    assert len(build_index(tmp_path / "logs", cfg)["clips"]) == 1
