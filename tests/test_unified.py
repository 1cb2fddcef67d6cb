"""Logs of py123d: what is said where it is not installed, and a round trip through the library where it is."""

import importlib.util
import json
import os
import sys
from pathlib import Path
import numpy as np
import pytest
from flux4d.check import check_main
from flux4d.city.logs import make_city
from flux4d.city.rays import RIG
from flux4d.convert import convert_main
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


def unified(root, out):
    "The logs of a data root of PandaSet as py123d writes them; the folder of its logs."
    from py123d.api.scene.arrow.arrow_log_writer import ArrowLogWriter
    from py123d.api.scene.arrow.utils.log_writer_config import LogWriterConfig
    from py123d.parser.pandaset.pandaset_parser import PandasetParser

    stored = LogWriterConfig(camera_store_option="jpeg_binary", lidar_store_option="binary", lidar_codec="ipc_zstd")
    writer = ArrowLogWriter(stored, out / "logs", out / "sensors")
    names = [p.name for p in root.iterdir()]
    for log in PandasetParser(["pandaset_train"], root, names).get_log_parsers():
        writer.reset(log.get_log_metadata())
        for frame in log.iter_modalities_sync():
            writer.write_sync(frame)
        writer.close()
    return out / "logs"


def same_recording(one, other):
    "Assert that two logs hold the same returns, stamps, cameras and images."
    assert np.abs(one.lidar_stamps - other.lidar_stamps).max() < 2e-6
    for k in range(len(one.lidar_stamps)):
        a, b = one.sweep(k, (0, 1)), other.sweep(k, (0, 1))
        assert np.abs(a.points - b.points).max() < 1e-3
        assert np.abs(a.stamps - b.stamps).max() < 2e-6
        assert (a.sensor == b.sensor).all() and np.abs(a.intensity - b.intensity).max() <= 1
    assert set(one.cameras) == set(other.cameras) == set(RIG)
    for name in one.cameras:
        a, b = one.camera(name), other.camera(name)
        assert a.size == b.size and np.abs(a.K - b.K).max() < 1e-9
        assert np.abs(a.poses - b.poses).max() < 1e-6 and np.abs(a.stamps - b.stamps).max() < 2e-6
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
    logs = unified(tmp_path / "raw", tmp_path / "arrow")
    assert convert_main(["123d", str(logs), str(tmp_path / "back")]) == 0
    assert "001: 4 frames\n" in capsys.readouterr().out
    same_recording(PandaSet(tmp_path / "made")["001"], PandaSet(tmp_path / "back")["001"])
    assert convert_main(["123d", str(logs), str(tmp_path / "back")]) == 1
    assert "is there already" in capsys.readouterr().out


@NEEDS
@pytest.mark.skipif(real_log() is None, reason="no log 002 of PandaSet here (FLUX4D_PANDASET or ../shared/pandaset)")
def test_a_real_log_there_and_back(tmp_path, capsys):
    source = cut(real_log(), tmp_path / "raw/002", 4)
    logs = unified(source.parent, tmp_path / "arrow")
    assert convert_main(["123d", str(logs), str(tmp_path / "back")]) == 0
    capsys.readouterr()
    assert check_main([str(tmp_path / "back")]) == 0, capsys.readouterr().out
    log, back = PandaSet(source.parent)["002"], PandaSet(tmp_path / "back")["002"]
    same_recording(log, back)
    # py123d places the LiDAR by the front camera and PandaSet's calibration; the log's own poses are of a point
    # 0.8 m behind it and 1.8 m below
    off = np.einsum("fji,fj->fi", back.lidar_poses[:, :3, :3], log.lidar_poses[:, :3, 3] - back.lidar_poses[:, :3, 3])
    assert np.abs(off - [-0.8, 0, -1.85]).max() < 0.1, off
