"""Input that is far from zero, named otherwise, hostile or lost: equal numbers, or one sentence.

The sentence has the file, the fault and the remedy."""

import ast
import bz2
import errno
import gzip
import io
import json
import lzma
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from flux4d.files import WriteError, atomic_write, remove_unfinished
from flux4d.files import DataError
from flux4d.pandaset import Log, PandaSet
from flux4d.log_faults import check_log
from flux4d.log_files import fabricate_log, read_image, read_poses, read_sweep
from flux4d.tables import safe_load_pickle

CAMS = "front_camera", "left_camera"
ROOT = Path(__file__).parent.parent


def sentence(excinfo, *parts):
    "Is the error one sentence with these parts, and does it end in a remedy?"
    text = str(excinfo.value)
    assert isinstance(excinfo.value, DataError) and excinfo.value.__cause__ is None, repr(excinfo.value)
    assert (
        text.endswith(".")
        and "\n" not in text
        and ". " not in text
        and "; " in text
        and not re.search(r"Traceback|0x[0-9a-f]{6}|/tmp", text)
    ), text
    for part in parts:
        assert part in text, text


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    "A sound data root with one log of 16 frames."
    root = tmp_path_factory.mktemp("sound")
    fabricate_log(root, "001", 16, CAMS)
    return root


@pytest.fixture
def root(sound, tmp_path):
    "A copy to break."
    shutil.copytree(sound / "001", tmp_path / "001")
    return tmp_path


def edit(path, change):
    "Change a JSON file in place."
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


# far from zero

GRID = 2.0**-20  # m; sums of such numbers with UTM's are exact in float64


def moved(source, root, by):
    "A log with its coordinates on a grid and a constant added to all of them."
    log = Path(root) / source.name
    shutil.copytree(source, log)

    def there(v, b):
        return float(np.round(v / GRID) * GRID + b)

    for p in log.rglob("poses.json"):
        edit(
            p,
            lambda poses: [
                q | dict(position={a: there(q["position"][a], b) for a, b in zip("xyz", by)}) for q in poses
            ],
        )
    for folder, columns in (("lidar", "xyz"), ("annotations/cuboids", [f"position.{a}" for a in "xyz"])):
        for p in (log / folder).glob("*.pkl.gz"):
            t = safe_load_pickle(p)
            for c, b in zip(columns, by):
                t[c] = np.round(t[c].to_numpy(np.float64) / GRID) * GRID + b
            t.to_pickle(p, compression=dict(method="gzip", compresslevel=1))
    return Log(root, source.name)


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    "A log of the made-up city, and the same in a map's coordinates."
    from flux4d.city.logs import fixture_city

    work = tmp_path_factory.mktemp("maps")
    source = work / "source/001"
    shutil.copytree(fixture_city() / "001", source)
    return moved(source, work / "near", (0.0, 0.0, 0.0)), moved(source, work / "far", (5e5, 5e6, 312.0))


def test_a_far_log_reads_the_same_numbers(maps):
    from flux4d.clips import build_index
    from flux4d.cuboids import load_cuboids

    near, far = maps
    assert near.origin.tolist() == [0, 0, 0] and far.origin.tolist() == [5e5, 5e6, 312]
    for read in (
        lambda l: l.lidar_poses,
        lambda l: l.camera().poses,
        lambda l: l.sweep(3, (0, 1)).points,
        lambda l: load_cuboids(l, 3).centre,
        lambda l: l.ego_pose(3),
    ):
        assert np.array_equal(read(near), read(far))
    a, b = (build_index(l.root)["clips"][0] for l in maps)
    assert (
        a["extrinsics"] == b["extrinsics"]
        and b["extrinsics"]["lidar"] == far.lidar_poses[b["frame_ids"]].tolist()
    )


def test_a_far_log_gives_the_same_pixels(maps):
    import torch
    from flux4d.background import init_gaussians
    from flux4d.clips import Clip, build_index
    from flux4d.clip_data import load_views
    from flux4d.render import render

    out = []
    for log in maps:
        clip = Clip(log, build_index(log.root)["clips"][0])
        g = init_gaussians(clip)
        views = load_views(clip, clip.target_frames[:1])
        with torch.no_grad():
            out.append((g.flat(), render(g, None, clip.time.duration, views).rgb))
    assert all(torch.equal(a, b) for a, b in zip(*out)) and out[0][1].std() > 0.05


def test_export_restores_the_origin(maps):
    near, far = maps
    points = far.sweep(5, (0, 1)).points
    assert np.array_equal(far.to_world(points), read_sweep(far.sweep_path(5)).points)
    assert np.array_equal(far.from_world(far.to_world(points)), points)


def test_a_near_log_keeps_every_bit(sound):
    log = Log(sound, "001")
    assert not log.origin.any()
    assert np.array_equal(log.sweep(3, (0, 1)).points, read_sweep(log.sweep_path(3)).points)
    assert np.array_equal(log.lidar_poses, read_poses(log.folder / "lidar/poses.json"))


# what lies beside a missing file

RENAMED = [
    ("camera/front_camera/03.jpg", "camera/front_camera/03.JPG", "03.JPG is there; rename it to 03.jpg"),
    ("camera/front_camera/03.jpg", "camera/front_camera/03.png", "03.png is there; convert"),
    ("camera/front_camera/03.jpg", "camera/front_camera/003.jpg", "003.jpg is there; rename it to 03.jpg"),
    ("lidar/03.pkl.gz", "lidar/03.pkl", "03.pkl is there; convert"),
    ("lidar/03.pkl.gz", "lidar/003.pkl.gz", "003.pkl.gz is there; rename"),
    ("lidar/poses.json", "lidar/Poses.json", "Poses.json is there; rename it to poses.json"),
    ("lidar/poses.json", "lidar/pose.json", "pose.json is there; rename it to poses.json"),
    ("lidar/poses.json", "lidar/poses.txt", "poses.txt is there; convert it to poses.json"),
    ("camera/front_camera/03.jpg", "camera/front_camera/03.webp", "03.webp is there; convert"),
    ("lidar/03.pkl.gz", "lidar/03.parquet", "03.parquet is there; convert"),
]
READ = {
    "camera/front_camera/03.jpg": lambda log: log.image("front_camera", 3),
    "lidar/03.pkl.gz": lambda log: log.sweep(3),
    "lidar/poses.json": lambda log: log.lidar_poses,
}


@pytest.mark.parametrize("file, there, said", RENAMED)
def test_missing_file_names_its_neighbour(root, file, there, said):
    (root / "001" / file).rename(root / "001" / there)
    with pytest.raises(DataError) as e:
        READ[file](Log(root, "001"))
    sentence(e, f"001/{file}: is missing", said, "get the file again")
    assert any(said.split(";")[0] in f for f in check_log(Log(root, "001")))


def test_files_numbered_from_one(root):
    folder = root / "001/camera/front_camera"
    for f in reversed(range(16)):
        (folder / f"{f:02d}.jpg").rename(folder / f"{f + 1:02d}.jpg")
    with pytest.raises(DataError) as e:
        Log(root, "001").image("front_camera", 0)
    sentence(e, "numbered 1 to 16", "number them from 0")


@pytest.mark.parametrize("folder, ending", [("camera/front_camera", "jpg"), ("lidar", "pkl.gz")])
def test_numbers_from_one_give_no_clip(root, folder, ending):
    from flux4d.clips import ClipConfig, build_index

    short = ClipConfig(preset="debug", debug_len_s=0.5, debug_stride_s=0.5)
    names = [root / f"001/{folder}/{f:02d}.{ending}" for f in range(17)]
    for f in reversed(range(16)):
        names[f].rename(names[f + 1])
    with pytest.raises(DataError) as e:
        build_index(root, short)
    sentence(e, "numbered 1 to 16", "number them from 0")  # not the clips that begin later, each a frame off
    names[16].unlink()
    assert [c["frame_start"] for c in build_index(root, short)["clips"]] == [
        5,
        10,
    ]  # frame 0 is lost, the others are right


def test_files_of_other_names(root):
    folder = root / "001/camera/front_camera"
    for f in range(16):
        (folder / f"{f:02d}.jpg").rename(folder / f"frame_{f:02d}.jpg")
    with pytest.raises(DataError) as e:
        Log(root, "001").image("front_camera", 3)
    sentence(e, "named like frame_00.jpg", "in the order of the stamps")


def test_a_folder_that_is_not_there(root):
    (root / "001/meta").rename(root / "001/Meta")
    assert "only Meta; rename" in check_log(Log(root, "001"))[0]
    shutil.rmtree(root / "001/Meta")
    assert check_log(Log(root, "001"))[0] == "001/meta/timestamps.json: is missing; get the file again."


def test_an_index_names_the_neighbour(root):
    from flux4d.clips import build_index

    for p in (root / "001/camera/front_camera").glob("*.jpg"):
        p.rename(p.with_suffix(".JPG"))
    with pytest.raises(DataError) as e:
        build_index(root)
    sentence(e, "gives no clip", "00.JPG is there")


def test_dot_files_are_ignored(root):
    for folder in (
        root,
        root / "001",
        root / "001/camera",
        root / "001/camera/front_camera",
        root / "001/lidar",
    ):
        for name in (".DS_Store", "._00.jpg", "._00.pkl.gz", "._001"):
            (folder / name).write_bytes(b"\0\5\x16\7")
    (root / "._002/lidar").mkdir(parents=True)
    log = PandaSet(root)["001"]
    assert PandaSet(root).log_ids == ["001"] and log.camera().size == (64, 36) and check_log(log) == []


# pickles: honest


def as_2020(table):
    "A table of one block of numbers, as pandas of 2020 pickled it."

    def text(s):
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    def name(m, n):
        return f"c{m}\n{n}\n".encode()

    def dtype(code, order):
        return (
            name("numpy", "dtype")
            + text(code)
            + b"K\0K\1\x87R(K\3"
            + text(order)
            + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK"
            + (b"\x3f" if code == "O8" else b"\0")
            + b"tb"
        )

    def array(shape, code, order, data):
        dims = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in shape) + b"t"
        return (
            name("numpy.core.multiarray", "_reconstruct")
            + name("numpy", "ndarray")
            + b"K\0\x85C\1b\x87R(K\1"
            + dims
            + dtype(code, order)
            + b"\x89"
            + data
            + b"tb"
        )

    def numbers(a):
        return array(a.shape, a.dtype.str[1:], "<", b"B" + struct.pack("<I", a.nbytes) + a.tobytes())

    def index(cls, data):
        return (
            name("pandas.core.indexes.base", "_new_Index")
            + cls
            + b"}("
            + text("data")
            + data
            + text("name")
            + b"Nu\x86R"
        )

    columns = array((len(table.columns),), "O8", "|", b"](" + b"".join(map(text, table.columns)) + b"e")
    axes = (
        b"]("
        + index(name("pandas.core.indexes.base", "Index"), columns)
        + index(name("pandas.core.indexes.numeric", "Int64Index"), numbers(table.index.to_numpy(np.int64)))
        + b"e"
    )
    values = numbers(np.ascontiguousarray(table.to_numpy(np.float64).T))
    places = name("builtins", "slice") + b"K\0J" + struct.pack("<i", len(table.columns)) + b"K\1\x87R"
    block = b"}(" + text("values") + values + text("mgr_locs") + places + b"u"
    state = (
        b"("
        + axes
        + b"]"
        + b"]"
        + b"}"
        + text("0.14.1")
        + b"}("
        + text("axes")
        + axes
        + text("blocks")
        + b"]"
        + block
        + b"aust"
    )
    return (
        b"\x80\3"
        + name("pandas.core.frame", "DataFrame")
        + b")\x81}("
        + text("_data")
        + name("pandas.core.internals.managers", "BlockManager")
        + b")\x81"
        + state
        + b"b"
        + text("_typ")
        + text("dataframe")
        + b"ub."
    )


def sweep_table(n=6):
    return pd.DataFrame(
        dict(
            x=np.arange(n) * 1.0,
            y=np.arange(n) * 2.0,
            z=np.ones(n),
            i=np.arange(n) * 3.0,
            t=1.5e9 + np.arange(n) * 0.1,
            d=[0, 1] * (n // 2),
        )
    )


TABLES = dict(
    sweep=sweep_table(),
    rows=sweep_table().query("d == 0"),
    empty=sweep_table()[:0],
    named=sweep_table().rename_axis("index"),
    small=sweep_table().astype(dict(d="int8", x="float32")),
    text=pd.DataFrame(dict(uuid=list("ab"), yaw=[0.0, 1], stationary=[True, False])),
    objects=pd.DataFrame(dict(a=np.array(["a", None, 2.5, np.float64(7)], object))),
    kinds=pd.DataFrame(dict(label=pd.Categorical(["Car", "Bus", None, "Car"], ordered=True))),
    columns=pd.DataFrame(np.asfortranarray(np.arange(12.0).reshape(3, 4))),
    python=pd.DataFrame(dict(a=pd.array(["a", None], dtype=pd.StringDtype("python")))),
    none=pd.DataFrame(),
)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("name", TABLES)
def test_sound_tables_load_equal(tmp_path, name, protocol):
    p = tmp_path / "t.pkl.gz"
    TABLES[name].to_pickle(p, protocol=protocol)
    pd.testing.assert_frame_equal(safe_load_pickle(p), TABLES[name])
    assert safe_load_pickle(p).equals(TABLES[name])


def test_a_pickle_of_2020_loads_equal(tmp_path):
    table = sweep_table().astype(float).query("d == 1")
    (tmp_path / "t.pkl").write_bytes(as_2020(table))
    pd.testing.assert_frame_equal(safe_load_pickle(tmp_path / "t.pkl"), table, check_column_type=False)
    pd.testing.assert_frame_equal(pd.read_pickle(tmp_path / "t.pkl"), table, check_column_type=False)


def test_numpy_1_and_2_are_read_alike(tmp_path):
    table = sweep_table()
    data = pickle.dumps(table, 3)
    other = (
        data.replace(b"cnumpy._core.", b"cnumpy.core.")
        if b"cnumpy._core." in data
        else data.replace(b"cnumpy.core.", b"cnumpy._core.")
    )
    assert other != data
    for k, d in enumerate((data, other)):
        (tmp_path / f"{k}.pkl").write_bytes(d)
        assert safe_load_pickle(tmp_path / f"{k}.pkl").equals(table)


def test_sweeps_and_labels_of_pandaset_load_equal():
    root = os.environ.get("FLUX4D_PANDASET")
    if not root:
        pytest.skip("FLUX4D_PANDASET names no data")
    for f in (0, 30):
        for p in (
            Path(root) / f"002/lidar/{f:02d}.pkl.gz",
            Path(root) / f"002/annotations/cuboids/{f:02d}.pkl.gz",
        ):
            a, b = safe_load_pickle(p), pd.read_pickle(p)
            pd.testing.assert_frame_equal(a, b)
            assert a.equals(b)


ODD = {
    "nullable column": lambda t: t.assign(d=t.d.astype("Int64")),
    "a nullable column": lambda t: t.assign(x=t.x.astype("Float64")),
    "of a kind that is not read": lambda t: t.set_index(["d", "x"]),
    "an object column": lambda t: t.assign(x=pd.Series([1.0, "far"] * 3, dtype=object)),
    "kept as text": lambda t: t.assign(x=list("abcdef")),
    "kept as categories": lambda t: t.assign(x=pd.Categorical(list("abcdef"))),
    "kind that is not read": lambda t: t.assign(t=pd.to_datetime(t.t, unit="s")),
}


@pytest.mark.parametrize("said", ODD)
def test_honest_tables_of_other_kinds_are_named(root, said):
    p = root / "001/lidar/03.pkl.gz"
    ODD[said](sweep_table()).to_pickle(p)
    with pytest.raises(DataError) as e:
        Log(root, "001").sweep(3)
    sentence(e, "001/lidar/03.pkl.gz", said)
    assert "a source you trust" not in str(e.value) and "truncated" not in str(e.value)


FIRST = {
    "bzip2": lambda b: bz2.compress(b),
    "packed by xz": lambda b: lzma.compress(b),
    "Parquet": lambda b: gzip.compress(b"PAR1" + b),
    "Git LFS": lambda b: b"version https://git-lfs.github.com/spec/v1\n",
    "web page": lambda b: b"<!DOCTYPE html>",
    "packed twice": lambda b: gzip.compress(gzip.compress(b)),
}


@pytest.mark.parametrize("said", FIRST)
def test_files_of_other_kinds_are_named(root, said):
    (root / "001/lidar/03.pkl.gz").write_bytes(FIRST[said](pickle.dumps(sweep_table())))
    with pytest.raises(DataError) as e:
        Log(root, "001").sweep(3)
    sentence(e, "001/lidar/03.pkl.gz", said)


def test_a_pickle_that_is_not_packed_is_read(root):
    (root / "001/lidar/03.pkl.gz").write_bytes(pickle.dumps(sweep_table()))
    assert np.array_equal(read_sweep(root / "001/lidar/03.pkl.gz").points, sweep_table()[["x", "y", "z"]])


def test_other_columns_are_named(root):
    sweep_table().rename(columns=dict(i="intensity")).to_pickle(root / "001/lidar/03.pkl.gz")
    with pytest.raises(DataError) as e:
        Log(root, "001").sweep(3)
    sentence(e, "lacks the columns i (it has x, y, z, intensity, t, d)", "rename the columns")


def test_a_newer_pandas_is_named(root):
    data = pickle.dumps(sweep_table(), 3).replace(
        b"cpandas.core.internals.managers\nBlockManager\n", b"cpandas.core.internals.managers\nColumnStore\n"
    )
    (root / "001/lidar/03.pkl.gz").write_bytes(gzip.compress(data))
    with pytest.raises(DataError) as e:
        Log(root, "001").sweep(3)
    sentence(e, "newer pandas", "ColumnStore")


# pickles: hostile


def text(s):
    return b"\x8c" + bytes([len(s)]) + s.encode()


OBJECTS = (
    b"cnumpy\ndtype\n"
    + text("O8")
    + b"\x89\x88\x87R(K\x03"
    + text("|")
    + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb"
)
RECONSTRUCT = b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R"
HOSTILE = {
    "call an array": b"cnumpy\nndarray\n(K\1\x85" + OBJECTS + b"C\x08AAAAAAAAtR",
    "reconstruct another": b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\0\0\0\x7f\x85"
    + OBJECTS
    + b"\x87R",
    "objects over bytes": RECONSTRUCT + b"(K\1K\1\x85" + OBJECTS + b"\x89C\x08AAAAAAAAtb",
    "objects from a buffer": b"cnumpy._core.numeric\n_frombuffer\n(C\x08AAAAAAAA"
    + OBJECTS
    + b"K\1\x85"
    + text("C")
    + b"tR",
    "object scalar": b"cnumpy._core.multiarray\nscalar\n" + OBJECTS + b"C\x08AAAAAAAA\x86R",
    "large array": RECONSTRUCT
    + b"(K\1\x8a\x06\0\0\0\0\0\x01\x85cnumpy\ndtype\n"
    + text("f8")
    + b"\x89\x88\x87R\x89C\0tb",
    "large bytearray": b"cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R",
    "state on a class": b"cpandas\nIndex\n}" + text("_typ") + text("series") + b"sb",
    "state on a class in two parts": b"cpandas\nIndex\nN}" + text("dtype") + b"Ns\x86b",
    "state twice": b"cpandas\nDataFrame\n)\x81}b}" + text("_mgr") + b"Nsb",
    "a zone in a type": b"cpandas.core.indexes.base\n_new_Index\ncpandas\nIndex\n}("
    + text("data")
    + b"]"
    + text("dtype")
    + text("datetime64[ns, dateutil//etc/passwd]")
    + b"u\x86R",
    "many rows": pickle.dumps(pd.DataFrame(index=pd.RangeIndex(10**9)), 4)[2:-1],
    "memo": b"Nr\0\0\0\x04",
    "longer memo": b"Nr\xff\xff\xff\xff",
    "long bytes": b"\x8e" + struct.pack("<Q", 2**40),
    "long bytearray": b"\x96" + struct.pack("<Q", 2**36),
    "long text": b"\x8d" + struct.pack("<Q", 2**40),
    "persistent id": b"Pid\n",
    "extension": b"\x82\1",
    "instance": b"(iposix\nsystem\n",
    "new object with names": b"cpandas\nDataFrame\n)}\x92",
    "a name with a newline": text("os\nsystem. x") + text("a\nb") + b"\x93",
    "a very long name": b"\x8c\xff" + b"a" * 255 + b"\x8c\xff" + b"b" * 255 + b"\x93",
    "a call of a note": b"cpandas\nDataFrame\n)\x81)R",
    "keys that are no text": b"}K\1K\2s",
    "an attribute": text("pandas") + text("DataFrame.to_pickle") + b"\x93",
    "nested": b"]" + b"\x85" * 10**5 + b"cpandas\nIndex\n\x86",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_end_in_a_sentence(root, name):
    p = root / "001/lidar/03.pkl.gz"
    p.write_bytes(gzip.compress(b"\x80\4" + HOSTILE[name] + b"."))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(DataError) as e:
        Log(root, "001").sweep(3)
    sentence(e, "001/lidar/03.pkl.gz")
    assert len(str(e.value)) < 500 and time.perf_counter() - start < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KB
    assert len(Log(root, "001").sweep(4)) == 200  # what is read afterwards is sound


SWEEP = pickle.dumps(sweep_table(), 4)
WRONG = {
    "objects over bytes": (b"\x8c\x02f8", b"\x8c\x02O8"),
    "a smaller type": (b"\x8c\x02f8", b"\x8c\x02f4"),
    "a type of no size": (b"\x8c\x02f8", b"\x8c\x02V0"),
    "dates": (b"\x8c\x02f8", b"\x8c\x02M8"),
    "a block of more rows": (b"K\5K\6\x86", b"K\5K\7\x86"),
    "places beyond the table": (b"K\0K\5K\1\x87", b"K\2K\7K\1\x87"),
    "places twice": (b"K\5K\6K\1\x87", b"K\0K\1K\1\x87"),
    "a step of 0": (b"K\0K\5K\1\x87", b"K\0K\5K\0\x87"),
    "an index of more rows": (b"\x8c\x04stop\x94K\6", b"\x8c\x04stop\x94K\7"),
    "an index of 1e9 rows": (b"\x8c\x04stop\x94K\6", b"\x8c\x04stop\x94J\0\0\0\x40"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tables_that_disagree_with_themselves(root, name):
    old, new = WRONG[name]
    assert old in SWEEP
    (root / "001/lidar/03.pkl.gz").write_bytes(gzip.compress(SWEEP.replace(old, new)))
    with pytest.raises(DataError) as e:
        Log(root, "001").sweep(3)
    sentence(e, "001/lidar/03.pkl.gz", "more than 16777216 rows" if "1e9" in name else "")


def test_bytes_at_random_end_in_a_sentence_or_a_table(tmp_path):
    rng = np.random.default_rng(0)
    read = 0
    for name in ("sweep", "text", "kinds", "objects"):
        sound = pickle.dumps(TABLES[name], 4)
        for k in range(150):
            data = bytearray(sound)
            for i in rng.integers(2, len(data), 1 + k % 3):
                data[i] = rng.integers(256)
            (tmp_path / "t.pkl").write_bytes(data)
            try:
                safe_load_pickle(tmp_path / "t.pkl")
                read += 1
            except DataError as e:
                assert str(e).endswith(".") and "\n" not in str(e)
    assert read > 20


def test_gzip_bombs_are_not_unpacked(root):
    p = root / "001/lidar/03.pkl.gz"
    part = gzip.compress(bytes(2**26), 9)
    for data in (part * 16, gzip.compress(b"N") * 1000):
        p.write_bytes(data)
        start = time.perf_counter()
        with pytest.raises(DataError) as e:
            Log(root, "001").sweep(3)
        sentence(e, "001/lidar/03.pkl.gz", "a source you trust")
        assert time.perf_counter() - start < 5


def test_nothing_that_a_pickle_names_is_imported(tmp_path):
    (tmp_path / "t.pkl").write_bytes(b"\x80\4" + pickle.dumps(sweep_table(), 4)[2:])
    code = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from flux4d.tables import load_table
t = load_table({str(tmp_path / 't.pkl')!r})
print(len(t), 'pandas' in sys.modules)"""
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split() == ["6", "False"]


# images


def test_only_jpeg_and_png_are_opened(root, tmp_path, monkeypatch):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 36\n%%EndComments\nshowpage\n"
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("another program was started"))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("another program was started"))
    (root / "001/camera/front_camera/03.jpg").write_bytes(eps)
    with pytest.raises(DataError) as e:
        Log(root, "001").image("front_camera", 3)
    sentence(e, "001/camera/front_camera/03.jpg", "not a JPEG")
    (root / "001/camera/front_camera/00.jpg").write_bytes(eps)
    with pytest.raises(DataError) as e:
        Log(root, "001").camera().size
    sentence(e, "001/camera/front_camera/00.jpg", "not a JPEG")
    Image.new("RGB", (64, 36), (9, 8, 7)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, 0].tolist() == [9, 8, 7]


def test_an_image_that_claims_too_much(tmp_path):
    out = io.BytesIO()
    Image.new("RGB", (64, 36)).save(out, format="PNG")
    data = bytearray(out.getvalue())
    data[16:24] = struct.pack(">II", 60000, 60000)
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    (tmp_path / "03.jpg").write_bytes(bytes(data))
    with pytest.raises(DataError) as e:
        read_image(tmp_path / "03.jpg")
    sentence(e)


# lists


@pytest.mark.parametrize(
    "content, said",
    [
        ("null", "not a list"),
        ("[" * 10**5, "nested deeper"),
        ("{}", "not a list"),
        ("3", "not a list"),
        ('"a"', "not a list"),
        ("[1e5, {\"a\": []}]", ""),
    ],
)
@pytest.mark.parametrize(
    "file",
    (
        "lidar/timestamps.json",
        "lidar/poses.json",
        "camera/front_camera/poses.json",
        "camera/front_camera/intrinsics.json",
        "meta/timestamps.json",
    ),
)
def test_lists_that_are_none_or_deep(root, file, content, said):
    (root / "001" / file).write_text(content, encoding="utf-8")
    if "intrinsics" in file:
        said = said if "deeper" in said else "lacks one of"
    if "meta" not in file:
        with pytest.raises(DataError) as e:
            Log(root, "001").camera(), Log(root, "001").lidar_poses
        sentence(e, f"001/{file}", said)
    found = check_log(Log(root, "001"), images=False)
    assert any(f.startswith(f"001/{file}") and said in f for f in found), found


def test_numbers_beyond_floats(root):
    for file in ("lidar/timestamps.json", "camera/front_camera/intrinsics.json"):
        edit(
            root / "001" / file, lambda v: v | dict(fx=10**400) if isinstance(v, dict) else [10**400] + v[1:]
        )
    assert len(check_log(Log(root, "001"), images=False)) >= 2


# rigs that the reader would misread


def test_unknown_cameras_are_named(root):
    (root / "001/camera/front_camera").rename(root / "001/camera/CAM_FRONT")
    with pytest.raises(DataError) as e:
        Log(root, "001").camera()
    sentence(e, "001/camera/front_camera", "CAM_FRONT", "rename")
    assert any("CAM_FRONT: is not one of PandaSet's cameras" in f for f in check_log(Log(root, "001")))
    shutil.rmtree(root / "001/camera/left_camera")
    assert Log(root, "001").cameras == []
    with pytest.raises(DataError) as e:
        Log(root, "001").camera()
    sentence(e, "001/camera/front_camera", "CAM_FRONT", "choose from CAM_FRONT")


@pytest.mark.parametrize(
    "extra",
    (
        dict(k1=-0.3),
        dict(k1=0, k2=0, p1=1e-3),
        dict(distortion=[0, 0.1]),
        dict(dist_coeffs="plumb_bob"),
        dict(D=[0.2, 0, 0, 0]),
    ),
)
def test_distortion_is_refused(root, extra):
    edit(root / "001/camera/front_camera/intrinsics.json", lambda v: v | extra)
    with pytest.raises(DataError) as e:
        Log(root, "001").camera()
    sentence(e, "001/camera/front_camera/intrinsics.json", "lens distortion", "undistort")
    assert any("lens distortion" in f for f in check_log(Log(root, "001")))


def test_no_distortion_is_no_fault(root):
    edit(
        root / "001/camera/front_camera/intrinsics.json",
        lambda v: v | dict(k1=0, k2=0.0, distortion=[0, 0], model="pinhole"),
    )
    assert check_log(Log(root, "001")) == []


def test_cameras_of_two_sizes(root):
    from flux4d.lift import clip_data
    from flux4d.clips import Clip, ClipConfig, build_index
    from flux4d.clip_data import load_views

    for p in (root / "001/camera/left_camera").glob("*.jpg"):
        Image.new("RGB", (32, 18)).save(p)
    log = Log(root, "001")
    clip = Clip(log, build_index(root, ClipConfig(cameras=CAMS))["clips"][0])
    views = load_views(clip, [0])
    assert [group.images.shape[1:3] for group in views.groups] == [(36, 64), (18, 32)]  # size by size
    with pytest.raises(DataError) as e:
        clip_data(clip)  # one array, which takes one size
    sentence(e, "001/camera/left_camera", "32 x 18 pixels where front_camera has 64 x 36")
    assert len(load_views(clip, [0], ["front_camera"])) == 1
    assert check_log(log) == []


@pytest.mark.parametrize(
    "heading, said",
    [
        ((0.5**0.5, 0, 0, 0.5**0.5), "looks across the direction"),
        ((0.354, -0.354, 0.146, -0.854), "off every axis"),
    ],
)
def test_a_rig_of_other_axes(root, heading, said):
    q = np.array(heading) / np.linalg.norm(heading)
    edit(
        root / "001/camera/front_camera/poses.json",
        lambda v: [p | dict(heading=dict(zip("wxyz", q))) for p in v],
    )
    with pytest.raises(DataError) as e:
        Log(root, "001").ego_pose(0)
    sentence(e, "001/camera/front_camera/poses.json", said, "x right, y down, z forward")


# whole files


def test_a_full_disk_says_so(tmp_path):
    (tmp_path / "a.json").write_text("old", encoding="utf-8")
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ):
        with pytest.raises(WriteError) as e:
            with atomic_write(tmp_path / "a.json"):
                raise error
        sentence(e, "a.json: could not be written", "free some space")
        assert isinstance(e.value, OSError) and isinstance(e.value, DataError)
    with pytest.raises(KeyError):
        with atomic_write(tmp_path / "a.json"):
            raise KeyError("another error stays itself")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "old" and [
        p.name for p in tmp_path.iterdir()
    ] == ["a.json"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(WriteError) as e:
        with atomic_write(tmp_path / "a/b.json"):
            pass
    sentence(e, "a/b.json: could not be written", "choose another place")


def test_left_over_temporary_files(tmp_path):
    out = tmp_path / "a[1].json"
    code = f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
from flux4d.files import atomic_write
with atomic_write({str(out)!r}): os._exit(9)"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    [left] = tmp_path.glob(".*.tmp")
    os.utime(left, (0, 0))
    with atomic_write(tmp_path / "b.json") as other:
        os.utime(other, (0, 0))  # its clock says 1970, and it is being written
        assert remove_unfinished(tmp_path, "b.json") == 0 and left.exists()
        with atomic_write(out) as tmp:
            tmp.write_text("whole", encoding="utf-8")
        assert not left.exists() and other.exists()
        other.write_text("too", encoding="utf-8")
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["a[1].json", "b.json"]
        and out.read_text(encoding="utf-8") == "whole"
    )


def test_text_files_name_their_encoding():
    bad = []
    for module in ("frames", "files", "unpickle", "pandaset"):
        for n in ast.walk(ast.parse((ROOT / f"flux4d/{module}.py").read_text(encoding="utf-8"))):
            if not (
                isinstance(n, ast.Call)
                and isinstance(n.func, ast.Attribute)
                and n.func.attr in ("read_text", "write_text")
            ):
                continue
            if "encoding" not in {k.arg for k in n.keywords}:
                bad.append(f"{module}:{n.lineno}")
    assert bad == []


def test_lists_are_read_under_any_locale(root):
    code = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from flux4d.pandaset import Log
print(len(Log({str(root)!r}, '001').camera().stamps))"""
    edit(root / "001/camera/front_camera/intrinsics.json", lambda v: v | dict(note="Straße"))
    p = root / "001/camera/front_camera/intrinsics.json"
    p.write_text(json.dumps(json.loads(p.read_text(encoding="utf-8")), ensure_ascii=False), encoding="utf-8")
    env = os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
        ).stdout.strip()
        == "16"
    )
