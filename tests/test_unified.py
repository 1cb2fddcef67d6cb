"""Logs of py123d: what is said where it is not installed, and a round trip through the library where it is."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from scipy.spatial.transform import Rotation
from flux4d.check import check_main
from flux4d.city.logs import make_city, world_of
from flux4d.city.rays import RIG, Raycaster, Recording, ego_pose, make_street
from flux4d.convert import convert_main
from flux4d.frames import se3, se3_inverse, transform_points
from flux4d.pandaset import PandaSet

NEEDS = pytest.mark.skipif(importlib.util.find_spec("py123d") is None, reason="py123d is not installed")


def real_log():
    "Log 002 of PandaSet, None where it is not."
    root = os.environ.get("FLUX4D_PANDASET")
    roots = [Path(root)] if root else [p / "shared/pandaset" for p in Path(__file__).resolve().parents]
    return next((p / "002" for p in roots if (p / "002").is_dir()), None)


def cut(source, folder, frames):
    "The first frames of a log; sweeps and images are links."
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            value = json.loads(path.read_text())
            target.write_text(json.dumps(value[:frames] if isinstance(value, list) else value))
        elif path.name.split(".")[0].isdecimal() and int(path.name.split(".")[0]) < frames:
            target.symlink_to(path)
    return folder


STORED = dict(camera_store_option="jpeg_binary", lidar_store_option="binary", lidar_codec="ipc_zstd")


def unified(parser, out, **stored):
    "Logs as py123d writes them; the folder of all."
    from py123d.api.scene.arrow.arrow_log_writer import ArrowLogWriter
    from py123d.api.scene.arrow.utils.log_writer_config import LogWriterConfig

    writer = ArrowLogWriter(LogWriterConfig(**stored), out / "logs", out / "sensors")
    for log in parser.get_log_parsers():
        writer.reset(log.get_log_metadata())
        for frame in log.iter_modalities_sync():
            writer.write_sync(frame)
        writer.close()
    return out / "logs"


def pandaset_parser(root):
    "py123d's parser of a data root of PandaSet."
    from py123d.parser.pandaset.pandaset_parser import PandasetParser

    return PandasetParser(["pandaset_train"], root, [p.name for p in root.iterdir()])


def rows(T, **columns):
    "Poses (N,4,4) as Argoverse stores them, beside other columns."
    q = Rotation.from_matrix(T[:, :3, :3]).as_quat()[:, [3, 0, 1, 2]]
    numbers = dict(zip(("qw", "qx", "qy", "qz"), q.T)) | dict(zip(("tx_m", "ty_m", "tz_m"), T[:, :3, 3].T))
    return pd.DataFrame(columns | numbers)


RING = dict(front_camera="ring_front_center", left_camera="ring_side_left")
REAR_AXLE = se3(np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]]), np.array([0, -0.84, -1.85]))  # ego to LiDAR frame


def argoverse_log(city, folder):
    "A log of the city in the files of Argoverse 2: stamps at the start of a turn, poses of the rear axle."
    street = Raycaster(make_street("001"))

    def ego(nanoseconds):
        tau = np.asarray(nanoseconds) / 1e9 - city.lidar_stamps[0]
        return world_of(street, Recording()) @ ego_pose(street.street.ego, tau) @ REAR_AXLE

    def stored(table, path):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        table.to_feather(folder / path)

    starts = [round((t - 0.1) * 1e6) * 1000 for t in city.lidar_stamps]
    shots = {name: [round(t * 1e6) * 1000 for t in city.camera(name).stamps] for name in RING}
    for k, (start, at) in enumerate(zip(starts, ego(starts))):
        s = city.sweep(k)
        x, y, z = transform_points(se3_inverse(at), s.points).astype(np.float32).T
        late = np.round((s.stamps - start / 1e9) * 1e9).astype(np.int32)
        laser = np.arange(len(x), dtype=np.uint8) % 64
        columns = dict(x=x, y=y, z=z, intensity=s.intensity.astype(np.uint8), laser_number=laser, offset_ns=late)
        stored(pd.DataFrame(columns), f"sensors/lidar/{start}.feather")
    for name, ring in RING.items():
        (folder / f"sensors/cameras/{ring}").mkdir(parents=True)
        for k, shot in enumerate(shots[name]):
            shutil.copy(city.root / f"001/camera/{name}/{k:02d}.jpg", folder / f"sensors/cameras/{ring}/{shot}.jpg")
    times = sorted({*starts, *sum(shots.values(), [])})
    stored(rows(ego(times), timestamp_ns=times), "city_SE3_egovehicle.feather")
    mounted = [se3_inverse(ego(shots[n][:1])[0]) @ city.camera(n).poses[0] for n in RING]
    top = se3_inverse(REAR_AXLE)
    names = [*RING.values(), "up_lidar", "down_lidar"]
    stored(rows(np.stack([*mounted, top, top]), sensor_name=names), "calibration/egovehicle_SE3_sensor.feather")
    K = np.stack([city.camera(n).K for n in RING])
    width, height = np.array([city.camera(n).size for n in RING]).T
    lens = dict(fx_px=K[:, 0, 0], fy_px=K[:, 1, 1], cx_px=K[:, 0, 2] - 0.5, cy_px=K[:, 1, 2] - 0.5)
    about = dict(sensor_name=list(RING.values()), height_px=height, width_px=width, k1=0.1, k2=0.0, k3=0.0, **lens)
    stored(pd.DataFrame(about), "calibration/intrinsics.feather")
    (folder / "map").mkdir()
    (folder / "map/log_map_archive_made____PIT_city_1.json").write_text("{}")


def same_recording(one, other):
    "Assert that two logs hold the same returns, stamps, cameras and images."
    assert np.abs(one.lidar_stamps - other.lidar_stamps).max() < 2e-6
    for k in range(len(one.lidar_stamps)):
        a, b = one.sweep(k, (0, 1)), other.sweep(k, (0, 1))
        assert np.abs(a.points - b.points).max() < 1e-3
        assert np.abs(a.stamps - b.stamps).max() < 2e-6
        assert (a.sensor == b.sensor).all() and np.abs(a.intensity - b.intensity).max() <= 1
    assert set(one.cameras) == set(other.cameras)
    for name in one.cameras:
        a, b = one.camera(name), other.camera(name)
        assert a.size == b.size and np.abs(a.K - b.K).max() < 1e-9
        assert np.abs(a.poses - b.poses).max() < 2e-5 and np.abs(a.stamps - b.stamps).max() < 2e-6  # 20 m/s for 1 us
        assert np.abs(one.image(name, 1).astype(float) - other.image(name, 1)).mean() < 2


def test_where_py123d_is_not_installed(tmp_path, monkeypatch, capsys):
    log = tmp_path / "logs/av2-sensor_val/a"
    log.mkdir(parents=True)
    (log / "sync.arrow").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "py123d"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "py123d", None)
    assert convert_main(["123d", str(tmp_path), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.endswith("pip install py123d.\n"), said
    assert convert_main(["123d", str(tmp_path / "no"), str(tmp_path / "out")]) == 1
    assert "no: does not exist; " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@NEEDS
def test_a_made_up_log_there_and_back(tmp_path, capsys):
    make_city(tmp_path / "made", 1, frames=4, scale=0.1, cameras=tuple(RIG), workers=1, step=2.0)
    cut(tmp_path / "made/001", tmp_path / "raw/001", 4)
    logs = unified(pandaset_parser(tmp_path / "raw"), tmp_path / "arrow", **STORED)
    assert convert_main(["123d", str(logs), str(tmp_path / "back")]) == 0
    assert "001: 4 frames\n" in capsys.readouterr().out
    same_recording(PandaSet(tmp_path / "made")["001"], PandaSet(tmp_path / "back")["001"])
    assert convert_main(["123d", str(logs), str(tmp_path / "back")]) == 1
    assert "is there already" in capsys.readouterr().out


@NEEDS
def test_a_made_up_log_in_the_files_of_argoverse(tmp_path, capsys, monkeypatch):
    from py123d.parser.av2.av2_sensor_parser import Av2SensorParser

    make_city(tmp_path / "made", 1, frames=4, scale=0.1, cameras=tuple(RING), workers=1, step=2.0)
    city = PandaSet(tmp_path / "made")["001"]
    argoverse_log(city, tmp_path / "raw/val/001")
    parser = Av2SensorParser(["av2-sensor_val"], tmp_path / "raw")
    logs = unified(parser, tmp_path / "arrow", **STORED)
    assert convert_main(["123d", str(logs), str(tmp_path / "back")]) == 0
    back = PandaSet(tmp_path / "back")["001"]
    same_recording(city, back)
    for k in range(4):
        assert np.abs(back.ego_pose(k) - city.ego_pose(k)).max() < 5e-3
    assert back.rig.turn == 0.1 and back.rig.cameras["left_camera"].lens == "pinhole"
    monkeypatch.delenv("AV2_DATA_ROOT", raising=False)
    paths = unified(parser, tmp_path / "paths")  # as py123d does unless told otherwise: sweeps and images stay there
    capsys.readouterr()
    assert convert_main(["123d", str(paths), str(tmp_path / "again")]) == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "001: py123d cannot read it (" in said and not (tmp_path / "again/001").exists()


@NEEDS
@pytest.mark.skipif(real_log() is None, reason="no log 002 of PandaSet here (FLUX4D_PANDASET or ../shared/pandaset)")
def test_a_real_log_there_and_back(tmp_path, capsys):
    source = cut(real_log(), tmp_path / "raw/002", 4)
    logs = unified(pandaset_parser(source.parent), tmp_path / "arrow", **STORED)
    assert convert_main(["123d", str(logs), str(tmp_path / "back")]) == 0
    capsys.readouterr()
    assert check_main([str(tmp_path / "back")]) == 0, capsys.readouterr().out
    log, back = PandaSet(source.parent)["002"], PandaSet(tmp_path / "back")["002"]
    same_recording(log, back)
    # py123d places the LiDAR by the front camera and PandaSet's calibration; the log's own poses are of a point
    # 0.8 m behind it and 1.8 m below
    off = np.einsum("fji,fj->fi", back.lidar_poses[:, :3, :3], log.lidar_poses[:, :3, 3] - back.lidar_poses[:, :3, 3])
    assert np.abs(off - [-0.8, 0, -1.85]).max() < 0.1, off
