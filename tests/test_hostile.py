"""Files made to harm: nothing runs, nothing outside is read, the process lives, and each ends in one sentence
that names the file."""

import gzip
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from flux4d.clips import build_index
from flux4d.index_files import index_main, load_index
from flux4d.cuboids import load_cuboids
from flux4d.files import plain_fault
from flux4d.files import DataError
from flux4d.pandaset import Log
from flux4d.log_files import fabricate_log, read_intrinsics
from flux4d.checkpoint import load_checkpoint, trained_frames
from flux4d.model import load_model
from flux4d.tables import safe_load_pickle

ROOT = Path(__file__).parents[1]


def sentence(error, file):
    "One short sentence about that file."
    text = str(error.value)
    assert (
        text.startswith(file)
        and text.endswith(".")
        and "\n" not in text
        and text.isprintable()
        and len(text) < 500
    ), text


# pickled tables


def text(s):
    return b"\x8c" + bytes([len(s)]) + s.encode()


def name(module, word):
    return text(module) + text(word) + b"\x93"


def arrow_frame(kind, n=0, starts=b""):
    "A table whose names are text of Arrow with a type, a length and places as given."
    buffers = (
        b"](N"
        + name("pyarrow.lib", "py_buffer")
        + b"B"
        + struct.pack("<I", len(starts))
        + starts
        + b"\x85RNe"
    )
    array = (
        name("pyarrow.lib", "_restore_array")
        + b"("
        + name("pyarrow.lib", "type_for_alias")
        + kind
        + b"RJ"
        + struct.pack("<i", n)
        + b"K\0K\0"
        + buffers
        + b"]Nt\x85R"
    )
    column = (
        name("pandas.arrays", "ArrowStringArray")
        + b")\x81}("
        + text("_pa_array")
        + array
        + text("_dtype")
        + name("pandas", "StringDtype")
        + b")Rub"
    )
    index = (
        name("pandas.core.indexes.base", "_new_Index")
        + name("pandas", "Index")
        + b"}("
        + text("data")
        + column
        + text("name")
        + b"Nu\x86R"
    )
    return (
        b"\x80\4"
        + name("pandas", "DataFrame")
        + b")\x81}"
        + text("_mgr")
        + name("pandas.core.internals.managers", "BlockManager")
        + b")]("
        + index * 2
        + b"e\x86Rsb."
    )


def of_categories():
    "A table of 300 columns, each with its own copy of the same 2**20 categories."
    bits = name("numpy", "dtype") + text("b1") + b"\x89\x88\x87R"
    many = (
        name("numpy._core.numeric", "_frombuffer")
        + b"(B"
        + struct.pack("<I", 2**20)
        + bytes(2**20)
        + bits
        + b"J"
        + struct.pack("<i", 2**20)
        + b"\x85"
        + text("C")
        + b"tR"
    )
    index = (
        name("pandas.core.indexes.base", "_new_Index")
        + name("pandas", "Index")
        + b"}("
        + text("data")
        + many
        + text("name")
        + b"Nu\x86Rq\1"
    )
    kind = (
        name("pandas", "CategoricalDtype")
        + b")\x81}("
        + text("categories")
        + index
        + text("ordered")
        + b"\x89ubq\2"
    )
    codes = (
        name("numpy._core.numeric", "_frombuffer")
        + b"(C\0"
        + name("numpy", "dtype")
        + text("i1")
        + b"\x89\x88\x87RK\0\x85"
        + text("C")
        + b"tRq\3"
    )

    def span(n):
        return (
            name("pandas.core.indexes.base", "_new_Index")
            + name("pandas", "RangeIndex")
            + b"}("
            + text("start")
            + b"K\0"
            + text("stop")
            + b"J"
            + struct.pack("<i", n)
            + text("step")
            + b"K\1u\x86R"
        )

    def block(i):
        return (
            name("pandas.core.internals.blocks", "new_block")
            + name("pandas", "Categorical")
            + b")\x81}("
            + text("_dtype")
            + b"h\2"
            + text("_codes")
            + b"h\3ub"
            + b"J"
            + struct.pack("<i", i)
            + b"\x86R"
        )

    first = (
        name("pandas.core.internals.blocks", "new_block")
        + name("pandas", "Categorical")
        + b")\x81}("
        + text("_dtype")
        + kind
        + text("_codes")
        + codes
        + b"ubK\0\x86R"
    )
    blocks = b"(" + first + b"".join(block(i) for i in range(1, 300)) + b"t"
    return (
        b"\x80\4"
        + name("pandas", "DataFrame")
        + b")\x81}"
        + text("_mgr")
        + name("pandas.core.internals.managers", "BlockManager")
        + blocks
        + b"]("
        + span(300)
        + span(0)
        + b"e\x86Rsb."
    )


def sweep(**change):
    n = 6
    return pd.DataFrame(
        dict(
            x=np.arange(n) * 1.0, y=np.ones(n), z=np.ones(n), i=np.ones(n), t=np.ones(n), d=[0, 1] * (n // 2)
        )
    ).assign(**change)


def many_columns():
    "The pickle of a table of 2**23 columns by way of one of 300: to make the large one takes pandas most of a minute."
    small = pickle.dumps(pd.DataFrame(columns=pd.RangeIndex(300)), 4)
    body = small[11:].replace(b"M" + struct.pack("<H", 300), b"J" + struct.pack("<i", 2**23))
    return small[:3] + struct.pack("<Q", len(body)) + body


TABLES = {  # made when their test runs
    "a hash of deep tuples": lambda: arrow_frame(b")" + b"\x85" * 500_000),  # ended the process
    "deep tuples where text is read": lambda: arrow_frame(b")" + b"\x85" * 400_000 + b"\x85"),
    "many lists": lambda: b"\x80\4" + b"]" * (40 << 20) + b".",  # took 100 s and gigabytes
    "many marks": lambda: b"\x80\4" + b"(" * (40 << 20) + b".",
    "many places in the memo": lambda: b"\x80\4N" + b"\x94" * (40 << 20) + b".",
    "a million texts": lambda: arrow_frame(text("string") + b"\x85", 4 * 2**20, bytes(4 * (4 * 2**20 + 1))),
    "copies of categories": of_categories,
    "numbers beyond floats": lambda: pickle.dumps(sweep(x=pd.Series([10**400] * 6, dtype=object)), 4),
    "numbers beyond text": lambda: pickle.dumps(sweep(uuid=pd.Series([10**5000] * 6, dtype=object)), 4),
    "halves of characters": lambda: b"\x80\4\x8c\3\xed\xa0\x80.",
    "halves of characters in a list": lambda: b"\x80\4]\x8c\3\xed\xa0\x80a.",
    "many columns": many_columns,
}


@pytest.mark.parametrize("what", TABLES)
def test_a_hostile_table_ends_in_a_sentence(tmp_path, what):
    "In another process, because some of these ended it."
    (tmp_path / "001/lidar").mkdir(parents=True)
    p = tmp_path / "001/lidar/03.pkl.gz"
    p.write_bytes(gzip.compress(TABLES[what](), 1))
    code = f"""import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from flux4d.files import DataError
from flux4d.tables import safe_load_pickle
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: print("read as", type(safe_load_pickle({str(p)!r})).__name__)
except DataError as e: print(e)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    said, grown = done.stdout.splitlines()
    assert said.startswith("001/lidar/03.pkl.gz: ") and said.endswith(".") and int(grown) < 700, (said, grown)


def test_a_sound_table_may_have_numbers_of_64_bits(tmp_path):
    table = sweep(track=pd.Series([2**64 - 1, -(2**63), 0, None, "a", 1.5], dtype=object))
    table.to_pickle(tmp_path / "t.pkl")
    pd.testing.assert_frame_equal(safe_load_pickle(tmp_path / "t.pkl"), table)


# a log


@pytest.fixture
def root(tmp_path):
    fabricate_log(tmp_path, "001", 20)
    return tmp_path


@pytest.mark.parametrize("value", [10**400, [[10**400]], "\x1b[31m", [[]], {}], ids=str)
def test_distortion_of_any_kind(root, value):
    p = root / "001/camera/front_camera/intrinsics.json"
    p.write_text(json.dumps(json.loads(p.read_text()) | dict(k1=value)))
    found = []
    read_intrinsics(p, found)
    assert all("\n" not in f and f.isprintable() for f in found)


LONG = "x" * 10**5


@pytest.mark.parametrize(
    "change",
    [dict(label=LONG), dict(label="\x1b[31m\n"), dict(uuid="\n" + LONG), dict(uuid=2**63)],
    ids=["long class", "control characters", "long id", "number"],
)
def test_labels_of_any_kind(root, change):
    boxes = (
        pd.DataFrame(
            {k: [1.0] * 4 for k in ("yaw", *(f"{a}.{b}" for a in ("position", "dimensions") for b in "xyz"))}
        )
        .assign(uuid=list("abcd"), label="Car")
        .assign(**change)
    )
    p = root / "001/annotations/cuboids/00.pkl.gz"
    p.parent.mkdir(parents=True)
    boxes.to_pickle(p)
    from flux4d.cuboids import class_ids

    with pytest.raises(DataError) as e:
        class_ids(load_cuboids(Log(root, "001"), 0).label, source="001/annotations/cuboids/00.pkl.gz")
    sentence(e, "001/annotations/cuboids/00.pkl.gz")


# an index


def spoil(index, path, value):
    "An index with another value somewhere."
    index = pickle.loads(pickle.dumps(index))
    *up, last = path
    at = index
    for k in up:
        at = at[k]
    at[last] = value
    return index


def loop():
    x = []
    x.append(x)
    return x


def deep(n=500):
    x = []
    for _ in range(n):
        x = [x]
    return x


def laughs():
    x = [0]
    for _ in range(12):
        x = [x] * 1000
    return x


PLACES = [
    ("meta", "coord", "up"),
    ("meta", "config", "fps"),
    ("meta", "preset"),
    ("clips", 0, "frame_start"),
    ("clips", 0, "frame_ids"),
    ("clips", 0, "intrinsics", "front_camera", "fx"),
    ("clips", 0, "extrinsics", "lidar"),
    ("clips", 0, "timestamps", "lidar"),
    ("clips", 0, "image_paths", "front_camera"),
    ("clips", 0, "views", "input"),
]
VALUES = dict(
    huge=10**400,
    huger=10**5000,
    large=2**70,
    loop=loop(),
    deep=deep(100),
    laughs=laughs(),
    bytes=b"x",
    control="\x1b[2J",
    matrix=[[[10**400] * 4] * 4],
    infinite=float("inf"),
)


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    root = tmp_path_factory.mktemp("drive")
    fabricate_log(root, "001", 20, contents=False)
    return root, build_index(root)


@pytest.mark.parametrize("value", VALUES)
def test_an_index_with_anything_in_it(drive, tmp_path, value, capsys):
    root, index = drive
    path = tmp_path / "clips.pkl"
    for place in PLACES:
        path.write_bytes(pickle.dumps(spoil(index, place, VALUES[value]), 4))
        start = time.perf_counter()
        status = index_main(["--inspect", str(path), str(root)])
        said = capsys.readouterr().out
        assert time.perf_counter() - start < 2 and "\x1b" not in said
        if status:
            assert re.fullmatch(r"[^\n]{1,400}\.\n", said), said
        elif place[:2] != ("meta", "coord") and place[:2] != ("meta", "config"):
            pytest.fail(f"{value} in {place} was taken")


def test_the_logs_of_an_index_are_below_the_data_root(drive, tmp_path):
    root, index = drive
    (root / "002").symlink_to(tmp_path)  # a log that is no log
    for change in (
        (("meta", "fingerprint"), {"002": "0"}),
        (("meta", "fingerprint"), {"\u202e001": "0"}),
        (("meta", "config", "cameras"), ["side_camera"]),
    ):
        (tmp_path / "clips.pkl").write_bytes(pickle.dumps(spoil(index, *change)))
        with pytest.raises(DataError) as e:
            load_index(tmp_path / "clips.pkl", root)
        assert "\n" not in str(e.value)
    (root / "002").unlink()


def test_a_pipe_is_no_file(tmp_path):
    "Opening one would wait for ever."
    for file in ("clips.pkl", "ckpt_last.pt"):
        os.mkfifo(tmp_path / file)
    with pytest.raises(DataError):
        load_index(tmp_path / "clips.pkl")
    with pytest.raises(DataError):
        load_checkpoint(tmp_path / "ckpt_last.pt")


# checkpoints


def with_program(path, program):
    "A file of torch whose pickle is another."
    torch.save(dict(model={}), path)
    with zipfile.ZipFile(path) as z:
        parts = {i.filename: z.read(i) for i in z.infolist()}
    with zipfile.ZipFile(path, "w") as z:
        for part, content in parts.items():
            z.writestr(part, program if part.endswith("data.pkl") else content)


PROGRAMS = {
    "a key of deep tuples": b"\x80\2})" + b"\x85" * 1_000_000 + b"Ns.",  # ended the process
    "many lists": b"\x80\2}" + b"]" * 3_000_000 + b".",
    "a call": b"\x80\2cposix\nsystem\nX\6\0\0\0touch x\x85R.",
    "a memo index": b"\x80\2Nr\xff\xff\xff\x7f.",
    "long bytes": b"\x80\4\x8e" + struct.pack("<Q", 2**40) + b".",
    "nothing": b"",
}


def test_hostile_pickles_in_checkpoints(tmp_path):
    "In another process, because one of them ended it."
    for k, program in enumerate(PROGRAMS.values()):
        with_program(tmp_path / f"odd{k}.pt", program)
    code = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
from flux4d.files import DataError
from flux4d.checkpoint import load_checkpoint
for k in range({len(PROGRAMS)}):
    try: print(load_checkpoint(f"odd{{k}}.pt"))
    except DataError as e: print(e)"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=tmp_path
    )
    said = done.stdout.splitlines()
    assert done.returncode == 0 and len(said) == len(PROGRAMS), (
        done.returncode,
        done.stdout,
        done.stderr[-300:],
    )
    assert all(
        line.startswith(f"odd{k}.pt: not a readable flux4d checkpoint") for k, line in enumerate(said)
    ), said
    assert len(list(tmp_path.iterdir())) == len(PROGRAMS)


STATES = {
    "numbers that are not there": dict(a=torch.zeros(1).expand(10**12)),
    "no numbers at all": dict(a=torch.zeros(2, device="meta")),
    "sparse": dict(a=torch.eye(2).to_sparse()),
    "deep": deep(100),
    "loop": loop(),
    "large": 10**400,
}


@pytest.mark.parametrize("what", STATES)
@pytest.mark.parametrize("part", ["model", "ema", "config", "trained"])
def test_a_checkpoint_with_anything_in_it(tmp_path, part, what):
    state = dict(model={}, ema={}, config={}, kind="flux4d.refine:Flux4D") | {part: STATES[what]}
    torch.save(state, tmp_path / "odd.pt")
    for read in (load_checkpoint, load_model, trained_frames):
        with pytest.raises(DataError) as e:
            read(tmp_path / "odd.pt")
        sentence(e, "odd.pt: ")


def test_a_checkpoint_that_unpacks_to_more(tmp_path):
    torch.save(dict(model=dict(a=torch.zeros(2**22))), tmp_path / "sound.pt")
    assert load_checkpoint(tmp_path / "sound.pt")["model"]["a"].shape == (2**22,)
    with (
        zipfile.ZipFile(tmp_path / "sound.pt") as z,
        zipfile.ZipFile(tmp_path / "odd.pt", "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for i in z.infolist():
            out.writestr(i.filename, z.read(i))
    assert (tmp_path / "odd.pt").stat().st_size < 2**20
    with pytest.raises(DataError) as e:
        load_checkpoint(tmp_path / "odd.pt")
    sentence(e, "odd.pt: ")


def test_frames_that_are_no_numbers(tmp_path):
    for frames in ([float("inf")], [float("nan")], ["a"], 3):
        with pytest.raises(DataError):
            trained_frames(dict(trained=dict(logs={"002": dict(identity="x", frames=frames)})))


@pytest.mark.parametrize(
    "values",
    [
        dict(model=dict(hidden=10**9)),
        dict(model=dict(unet=dict(widths=[10**9]))),
        dict(model=dict(unet=dict(blocks=10**9))),
    ],
    ids=str,
)
def test_a_checkpoint_that_asks_for_a_large_model(tmp_path, values):
    torch.save(
        dict(model={}, ema={"module.a": torch.zeros(3)}, config=values, kind="flux4d.refine:Flux4D"),
        tmp_path / "odd.pt",
    )
    with pytest.raises(DataError):
        load_model(tmp_path / "odd.pt", device="cpu")


def test_plain_values_are_plain():
    assert plain_fault(dict(a=[1, (2.0, None)], b={"c": True})) is None
    assert plain_fault([0] * 10**5) is None and plain_fault([0] * 10, most=5)
