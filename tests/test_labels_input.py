"Faults of label files end in one sentence before anything is scored, or do not matter."

import gzip
import re
import shutil
import uuid
import numpy as np
import pandas as pd
import pytest
from flux4d import cuboids
from flux4d.city.logs import fixture_city
from flux4d.clips import Clip, ClipConfig, build_index, select_clips
from flux4d.cuboids import CLASSES, load_cuboids
from flux4d.box_motion import CuboidConfig, flow_ground_truth, moves, same_track
from flux4d.label_check import check_labels
from flux4d.view_scores import check_clip
from flux4d.files import DataError
from flux4d.pandaset import PandaSet
from flux4d.tables import safe_load_pickle

FRAMES = (2, 4, 6)


@pytest.fixture
def log(tmp_path):
    "A made-up log whose label files may be changed."
    whole = fixture_city() / "001"
    for part in ("lidar", "camera", "meta"):
        (tmp_path / "001").mkdir(exist_ok=True)
        (tmp_path / "001" / part).symlink_to(whole / part, target_is_directory=True)
    shutil.copytree(whole / "annotations", tmp_path / "001/annotations")
    return PandaSet(tmp_path)["001"]


def rewrite(log, change, frames=range(24)):
    "Change the table of some frames."
    for f in frames:
        if log.cuboid_path(f).is_file():
            change(safe_load_pickle(log.cuboid_path(f)).copy(), f).to_pickle(log.cuboid_path(f))


def sentence(error, *parts):
    "Is it one sentence with all these parts?"
    text = str(error.value)
    assert (
        error.type is DataError
        and text.endswith(".")
        and ". " not in text
        and "; " in text
        and "\n" not in text
    ), text
    assert re.match(r"001/annotations/cuboids/\d\d\.pkl\.gz: ", text) and all(p in text for p in parts), text


def numbered(log, kind):
    "The same tracks, by number."
    number = {}
    for f in range(24):
        for u in load_cuboids(log, f).uuid:
            number.setdefault(u, len(number) + 1)
    rewrite(log, lambda t, f: t.assign(uuid=[kind(number[u]) for u in t.uuid]))


@pytest.mark.parametrize("kind", (int, float, np.int32, str))
def test_ids_may_be_numbers(log, kind):
    want = flow_ground_truth(log, 4), moves(log, 4, CuboidConfig()), check_labels(log, FRAMES)
    numbered(log, kind)
    got = flow_ground_truth(log, 4), moves(log, 4, CuboidConfig()), check_labels(log, FRAMES)
    assert (
        all(np.array_equal(a, b) for a, b in zip(want[0], got[0]))
        and list(want[1].values()) == list(got[1].values())
        and want[2] == got[2]
    )
    assert all(isinstance(u, str) and u.isdecimal() for u in load_cuboids(log, 4).uuid)


@pytest.mark.parametrize("value", (None, np.nan, "", " "))
def test_missing_ids(log, value):
    def lose(t, f):
        t = t.astype({"uuid": object})
        t.loc[t.index[:2], "uuid"] = value
        return t

    rewrite(log, lose, [4])
    with pytest.raises(DataError) as e:
        check_labels(log, FRAMES)
    sentence(e, "04.pkl.gz", "2 boxes without an id", "give every object an id")


@pytest.mark.parametrize("value", ("nan", "None", "<NA>"))
def test_a_missing_id_may_have_become_text(log, value):
    rewrite(log, lambda t, f: t.assign(uuid=[value] + list(t.uuid[1:])), [4])
    with pytest.raises(DataError) as e:
        check_labels(log, FRAMES)
    sentence(e, "04.pkl.gz", "1 boxes without an id")


@pytest.mark.parametrize("kind", (uuid.UUID, str.encode, lambda u: u + " "), ids=["uuid", "bytes", "spaces"])
def test_ids_of_other_types_become_text(log, kind):
    want = flow_ground_truth(log, 4)
    rewrite(
        log, lambda t, f: t.assign(uuid=pd.Series([kind(u) for u in t.uuid], index=t.index, dtype=object))
    )
    got = flow_ground_truth(log, 4)
    assert all(np.array_equal(a, b) for a, b in zip(want, got)) and all(
        isinstance(u, str) for u in load_cuboids(log, 4).uuid
    )


@pytest.mark.parametrize(
    "ids, part",
    [
        (lambda t, f: np.arange(len(t)), "tracks that move by up to"),
        (
            lambda t, f: np.random.default_rng(f).permutation(t.uuid.to_numpy(object)),
            "tracks that move by up to",
        ),
        (lambda t, f: [f"{f}-{i}" for i in range(len(t))], "shares only 0 of its"),
    ],
    ids=["rows", "shuffled", "anew"],
)
def test_ids_that_name_other_objects(log, ids, part):
    rewrite(log, lambda t, f: t.assign(uuid=ids(t, f)))
    with pytest.raises(DataError) as e:
        check_labels(log, FRAMES)
    sentence(e, part, "keeps from frame to frame")


def test_one_id_for_all(log):
    rewrite(log, lambda t, f: t.assign(uuid="car"))
    with pytest.raises(DataError) as e:
        check_labels(log, FRAMES)
    sentence(e, "gives the id 'car' to", "an id of its own")


def test_an_id_that_two_boxes_share_names_neither(log):
    a, b = load_cuboids(log, 4), load_cuboids(log, 5)
    twice = cuboids.replace(b, uuid=np.where(np.arange(len(b)) == 1, b.uuid[0], b.uuid))
    assert b.uuid[0] in a.uuid and b.uuid[0] not in a.uuid[same_track(a, twice)[0]]
    assert len(same_track(a, twice)[0]) == len(same_track(a, b)[0]) - (1 + (b.uuid[1] in a.uuid))


@pytest.mark.parametrize(
    "change, part",
    [
        (dict(yaw=90.0), "a yaw beyond 7 rad"),
        ({"position.x": "here"}, "not a number"),
        ({"cuboids.sensor_id": 4}, "names a sensor"),
        ({"cuboids.sensor_id": np.nan}, "names a sensor"),
        ({"dimensions.z": 0.0}, "have no volume"),
    ],
)
def test_wrong_numbers(log, change, part):
    rewrite(log, lambda t, f: t.assign(**change), [4])
    with pytest.raises(DataError) as e:
        check_labels(log, FRAMES)
    sentence(e, "04.pkl.gz", part)


def test_unknown_classes_are_found_by_the_check(log):
    def rename(t, f):
        return t.assign(label=t.label.replace("Car", "Hovercraft"))

    before = flow_ground_truth(log, 4)
    rewrite(log, rename)
    with pytest.raises(DataError) as e:
        check_labels(log, FRAMES)
    sentence(e, "02.pkl.gz", "names the class 'Hovercraft'", "'ignore' or 'other'")
    for unknown in ("ignore", "other"):
        cfg = CuboidConfig(unknown=unknown)
        check_labels(log, FRAMES, cfg=cfg)
        after, cars = flow_ground_truth(log, 4, cfg=cfg), before.label == CLASSES.index("Car")
        assert cars.any() and (after.label[cars] == CLASSES.index("unlisted")).all()
        assert np.array_equal(after.valid, before.valid & ~cars if unknown == "ignore" else before.valid)
        assert np.array_equal(after.flow[~cars], before.flow[~cars])


@pytest.mark.parametrize(
    "empty", (pd.DataFrame(), pd.DataFrame(columns=["label"]), pd.DataFrame({"uuid": [], "label": []}))
)
def test_a_frame_without_columns_is_empty(log, empty):
    empty.to_pickle(log.cuboid_path(4))
    assert len(load_cuboids(log, 4)) == 0
    truth = flow_ground_truth(log, 4)
    assert truth.valid.all() and not truth.flow.any() and not truth.dynamic.any()


def test_rows_need_columns(log):
    pd.DataFrame(index=range(5)).to_pickle(log.cuboid_path(4))
    with pytest.raises(DataError) as e:
        load_cuboids(log, 4)
    sentence(e, "lacks the columns uuid label")


def scaled(f, axes="xyz"):
    return lambda t, _: t.assign(**{f"dimensions.{a}": t[f"dimensions.{a}"] * f for a in axes})


def exchanged(t, _):
    return t.assign(**{"dimensions.x": t["dimensions.y"], "dimensions.y": t["dimensions.x"]})


def beside(t, _):
    return t.assign(**{"position.x": t["position.x"] + 1, "position.y": t["position.y"] + 1})


@pytest.mark.parametrize(
    "change, part",
    [
        (scaled(2), "of which returns fill only"),
        (scaled(3.28), "of which returns fill only"),
        (scaled(2, "xy"), "of which returns fill only"),
        (scaled(0.5), "hold only"),
        (beside, "contain returns"),
        (lambda t, _: t.assign(yaw=-t.yaw), "hold only"),
        (lambda t, _: t.assign(yaw=t.yaw + np.pi / 2), "when turned by a quarter"),
        (exchanged, "when turned by a quarter"),
        (
            lambda t, _: t.assign(**{f"position.{a}": t[f"position.{a}"] * 1e3 for a in "xyz"}),
            "m from the LiDAR",
        ),
        (lambda t, _: t.assign(**{"position.x": t["position.x"] + 5e5}), "m from the LiDAR"),
    ],
)
def test_boxes_of_another_size_or_place(log, change, part):
    rewrite(log, change)
    with pytest.raises(DataError) as e:
        check_labels(log, FRAMES)
    sentence(e, "02.pkl.gz", part)


def test_labels_that_are_not_packed(log):
    want = flow_ground_truth(log, 4)
    for f in range(24):
        p = log.cuboid_path(f)
        p.write_bytes(gzip.decompress(p.read_bytes()))
    assert all(np.array_equal(a, b) for a, b in zip(want, flow_ground_truth(log, 4)))


def test_sound_labels_pass(log):
    found = check_labels(log, FRAMES)
    assert found["hit"] > 0.8 and found["fit"] > 0.95 and found["fill"] > 0.6
    assert not hasattr(cuboids, "box_pose")


@pytest.mark.parametrize("part", ("input_frames", "target_frames"))
def test_labels_of_all_frames_are_read_before_the_first_step(log, part):
    record = select_clips(build_index(log.root, ClipConfig()), settings=("eval_future",))[0]
    clip = Clip(log, record)
    check_clip(clip, CuboidConfig())
    frame = getattr(clip, part)[1]
    log.cuboid_path(frame).write_bytes(log.cuboid_path(frame).read_bytes()[:-30])
    with pytest.raises(DataError, match=f"001/annotations/cuboids/{frame:02d}.pkl.gz: "):
        check_clip(Clip(PandaSet(log.root)["001"], record), CuboidConfig())
