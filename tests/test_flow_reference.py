"""Scene-flow metrics against the published evaluators and against plain loops; flow from boxes against what
the made-up city knows.

The evaluators are `bucketed-scene-flow-eval` (Khatri et al.) and `av2` (Argoverse 2). Both pull in far more
than this project needs, so they are not
required: where one can be imported it is run, and what it said about the same returns is kept below. `python
tests/test_flow_reference.py` prints it anew."""

import contextlib
import io
import math
import os
import random
import shutil
from pathlib import Path
import numpy as np
import pytest
from flux4d.city.logs import fixture_city
from flux4d.clips import long_log_clips
from flux4d.cuboids import CLASSES
from flux4d.box_motion import CuboidConfig, flow_ground_truth
from flux4d.flow_metrics import FlowSample, FlowScoreConfig, flow_rows, truth_rows
from flux4d.flow_truth import clip_truth, exact_flow
from flux4d.files import DataError
from flux4d.pandaset import PandaSet
from flux4d.scores import flow_block, score_table

# PandaSet's name -> the nearest category of Argoverse 2;
# the meta-classes below are those of av2_metacategories.py, not ours
AV2 = {
    "": "BACKGROUND",
    "Car": "REGULAR_VEHICLE",
    "Pickup Truck": "REGULAR_VEHICLE",
    "Bus": "BUS",
    "Semi-truck": "TRUCK_CAB",
    "Towed Object": "VEHICULAR_TRAILER",
    "Pedestrian": "PEDESTRIAN",
    "Pedestrian with Object": "STROLLER",
    "Bicycle": "BICYCLE",
    "Motorcycle": "MOTORCYCLE",
    "Motorized Scooter": "WHEELED_DEVICE",
    "Cones": "CONSTRUCTION_CONE",
    "Signs": "SIGN",
}
SIGNS = {"CONSTRUCTION_CONE", "SIGN"}
META = dict(
    BACKGROUND=["BACKGROUND"],
    CAR=["REGULAR_VEHICLE"],
    PEDESTRIAN=["PEDESTRIAN", "STROLLER", "WHEELCHAIR", "OFFICIAL_SIGNALER"],
    WHEELED_VRU=["BICYCLE", "BICYCLIST", "MOTORCYCLE", "MOTORCYCLIST", "WHEELED_DEVICE", "WHEELED_RIDER"],
    OTHER_VEHICLES=[
        "BOX_TRUCK",
        "LARGE_VEHICLE",
        "RAILED_VEHICLE",
        "TRUCK",
        "TRUCK_CAB",
        "VEHICULAR_TRAILER",
        "ARTICULATED_BUS",
        "BUS",
        "SCHOOL_BUS",
    ],
)
NAMES = sorted(AV2)


# returns


def frame(r, n, names, moving_background):
    "n returns: names, points, true and predicted displacement. `random.Random.random` says the same in every Python."
    u, out = r.random, []
    for k in range(n):
        name, how = names[int(u() * len(names))], u()
        speed = (
            0.0
            if how < 0.2
            else 0.04 * int(u() * 51)
            if how < 0.35
            else 0.05
            if how < 0.4
            else 0.1 * u()
            if how < 0.6
            else 2.4 * u()
        )
        if name == "" and not moving_background:
            speed = 0.0
        d = [u() - 0.5 for _ in range(3)]
        long = math.sqrt(sum(x * x for x in d))
        axis = int(u() * 3)
        gt = [
            speed * float(i == axis) if how < 0.4 else speed * x / long for i, x in enumerate(d)
        ]  # along an axis the length is exact: on the edge itself
        kind, noise = u(), [0.2 * (u() - 0.5) for _ in range(3)]
        pred = (
            [0.0] * 3 if kind < 0.2 else list(gt) if kind < 0.3 else [g * 1.1 + e for g, e in zip(gt, noise)]
        )
        out.append((name, [35.0 if k % 37 == 0 else 90 * u() - 45, 90 * u() - 45, 4 * u()], gt, pred))
    return out


def frames(moving_background=False):
    "Six frames in which classes come and go."
    r = random.Random(20240917)
    return [
        frame(r, n, names, moving_background)
        for n, names in (
            (500, NAMES),
            (300, NAMES),
            (200, ["", "Car", "Cones"]),
            (1, [""]),
            (2, ["Pedestrian"]),
            (400, NAMES),
        )
    ]


def ours(fs):
    "What this project makes of them."
    tables = []
    for number, f in enumerate(fs):
        names, points, gt, pred = zip(*f)
        label = np.array([CLASSES.index(n) for n in names])
        sample = FlowSample(np.array(pred), np.array(gt), label, np.abs(np.array(points)[:, :2]).max(1))
        place = dict(log="001", clip="a", frame=number, setting="flow")
        tables.append(flow_rows(sample).assign(scene="model", **place))
        tables.append(truth_rows(sample).assign(scene="truth", **place))
    return flow_block(score_table(tables), "model")


def bucketed(m):
    return {
        k: (m["bucketed"]["reference"][k]["static"]["mean"], m["bucketed"]["reference"][k]["dynamic"]["mean"])
        for k in (*META, "all")
    }


def ways(m):
    return {k: m["epe_3way"][k]["pooled"] for k in ("BS", "FS", "FD", "all")}


def near_and_no_signs(fs):
    return [[x for x in f if max(map(abs, x[1][:2])) < 35 and AV2[x[0]] not in SIGNS] for f in fs]


def close(a, b):
    return a is b is None or None not in (a, b) and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def same(a, b):
    "Equal up to rounding, and empty where the other is."

    def flat(d):
        return {(k, i): x for k, v in d.items() for i, x in enumerate(v if isinstance(v, tuple) else (v,))}

    a, b = flat(a), flat(b)
    assert a.keys() == b.keys() and {k: (a[k], b[k]) for k in a if not close(a[k], b[k])} == {}


# the definition, by other means


def length(v):
    return math.sqrt(sum(x * x for x in v))


def error(gt, pred):
    return length([a - b for a, b in zip(gt, pred)])


def mean(xs):
    return math.fsum(xs) / len(xs) if xs else None


def slow_bucketed(fs):
    "Points and bins one by one."
    edges = [0.04 * k for k in range(51)] + [math.inf]
    held = {(m, b): [] for m in META for b in range(51)}
    for name, point, gt, pred in (x for f in fs for x in f):
        if not (abs(point[0]) < 35 and abs(point[1]) < 35):
            continue
        for m, categories in META.items():
            if AV2[name] in categories:
                for b in range(51):
                    if edges[b] <= length(gt) < edges[b + 1]:
                        held[m, b].append((error(gt, pred), length(gt)))
    out = {}
    for m in META:
        share = [
            math.fsum(e for e, _ in held[m, b]) / math.fsum(s for _, s in held[m, b])
            for b in range(1, 51)
            if held[m, b]
        ]
        out[m] = mean([e for e, _ in held[m, 0]]), mean(share)
    return out | dict(all=tuple(mean([out[m][i] for m in META if out[m][i] is not None]) for i in (0, 1)))


def slow_ways(fs):
    "Three groups; per frame with absent groups skipped, and pooled."
    pooled, by_frame, three = dict(BS=[], FS=[], FD=[]), dict(BS=[], FS=[], FD=[]), []
    for f in fs:
        here = dict(BS=[], FS=[], FD=[])
        for name, _, gt, pred in f:
            here["BS" if name == "" else "FD" if length(gt) >= 0.05 else "FS"].append(error(gt, pred))
        for k, v in here.items():
            pooled[k] += v
            if v:
                by_frame[k].append(mean(v))
        three.append(mean([mean(v) for v in here.values() if v]))
    return {k: mean(v) for k, v in pooled.items()}, {k: mean(v) for k, v in by_frame.items()} | dict(
        all=mean(three)
    )


@pytest.mark.parametrize("moving_background", [False, True])
def test_against_plain_loops(moving_background):
    fs = frames(moving_background)
    m = ours(fs)
    pooled, by_frame = slow_ways(fs)
    same(bucketed(m), slow_bucketed(fs))
    same(ways(m), pooled | dict(all=mean(list(pooled.values()))))
    same({k: m["epe_3way"][k]["mean"] for k in by_frame}, by_frame)
    assert (
        30 < m["bucketed"]["reference"]["CAR"]["dynamic"]["bins"] < 50
    )  # some bins are empty and must not count


def test_returns_are_hard_enough():
    xs = [x for f in frames(True) for x in f]
    speeds = [length(x[2]) for x in xs]
    assert (
        {x[0] for x in xs} == set(AV2)
        and max(speeds) > 2.2
        and sum(s in [0.04 * k for k in range(1, 51)] for s in speeds) > 50
        and speeds.count(0.05) > 20
    )
    assert sum(x[1][0] == 35 for x in xs) > 20 and sum(max(map(abs, x[1][:2])) > 35 for x in xs) > 100


# the published evaluators


def khatri(fs, out):
    "Bucketed and three-way error as bucketed-scene-flow-eval computes them; points in the vehicle's frame."
    from bucketed_scene_flow_eval.datastructures import PointCloud
    from bucketed_scene_flow_eval.datasets.argoverse2.av2_metacategories import (
        BUCKETED_METACATAGORIES,
        THREEWAY_EPE_METACATAGORIES,
    )
    from bucketed_scene_flow_eval.eval import BucketedEPEEvaluator, ThreeWayEPEEvaluator

    names = sorted(set(AV2.values()))
    ids = dict(enumerate(names))
    both = [
        C(class_id_to_name=ids, meta_class_lookup=meta, output_path=Path(out) / C.__name__)
        for C, meta in (
            (BucketedEPEEvaluator, BUCKETED_METACATAGORIES),
            (ThreeWayEPEEvaluator, THREEWAY_EPE_METACATAGORIES),
        )
    ]
    for f in fs:
        name, points, gt, pred = zip(*f)
        args = (
            PointCloud(np.array(points)),
            np.array([names.index(AV2[n]) for n in name]),
            np.array(gt),
            np.array(pred),
        )
        for e in both:
            e.eval_frame_results.append(e._build_eval_frame_results(*args))
    with contextlib.redirect_stdout(io.StringIO()):
        buckets, three = (e.compute_results(save_results=False) for e in both)

    def tidy(d):
        return {
            k: tuple(None if v is None or math.isnan(v) else float(v) for v in pair) for k, pair in d.items()
        }

    average = (
        both[0]
        ._build_stat_table(both[0]._category_to_average_stats(both[0]._category_to_per_frame_stats()), 35)
        .get_mean_average_values()
        .to_tuple()
    )
    return tidy(buckets | dict(all=average)), dict(
        BS=float(three["BACKGROUND"][0]), FS=float(three["FOREGROUND"][0]), FD=float(three["FOREGROUND"][1])
    )


def argoverse(fs):
    "Three-way error and accuracies as av2 computes them."
    import pandas as pd
    from av2.evaluation.scene_flow import constants as c, eval as e

    columns = [
        "Example",
        "Class",
        "Motion",
        "Distance",
        "Count",
        *e.SceneFlowMetricType,
        *e.SegmentationMetricType,
    ]
    rows = {k: [] for k in columns}

    def index(n):
        return 0 if n == "" else c.CATEGORY_TO_INDEX[AV2[n]]

    for k, f in enumerate(fs):
        name, points, gt, pred = zip(*f)
        gt = np.array(gt)
        moves = np.linalg.norm(gt, axis=1) >= c.SCENE_FLOW_DYNAMIC_THRESHOLD
        x = np.array(points)
        got = e.compute_metrics(
            np.array(pred),
            moves,
            gt,
            np.array([index(n) for n in name]),
            moves,
            np.abs(x[:, :2]).max(1) < 35,
            np.ones(len(f), bool),
            c.FOREGROUND_BACKGROUND_BREAKDOWN,
        )
        for key, values in got.items():
            rows[key] += values
        rows["Example"] += [str(k)] * len(got["Count"])
    table = pd.DataFrame(rows, columns=columns)
    d = e.results_to_dict(table)

    def everything(key):
        return float((table[key] * table.Count).sum() / table.Count.sum())

    return dict(
        BS=float(d["EPE/Background/Static"]),
        FS=float(d["EPE/Foreground/Static"]),
        FD=float(d["EPE/Foreground/Dynamic"]),
        all=float(d["EPE 3-Way Average"]),
        acc5=everything(e.SceneFlowMetricType.ACCURACY_STRICT),
        acc10=everything(e.SceneFlowMetricType.ACCURACY_RELAX),
    )


# bucketed-scene-flow-eval 2.0.25: static in m, dynamic as a share; BS, FS, FD in m
KHATRI = {
    "bucketed": dict(
        BACKGROUND=(0.07359562369146282, None),
        CAR=(0.07405474933520909, 0.33238908915692333),
        OTHER_VEHICLES=(0.07448279551969833, 0.3738707224466959),
        PEDESTRIAN=(0.07102426285803767, 0.29839877160284495),
        WHEELED_VRU=(0.06328875666579249, 0.37915392904597933),
        all=(0.07128923761404007, 0.34595312806311085),
    ),
    "bucketed, moving background": dict(
        BACKGROUND=(0.08030120854835789, 0.4013757612897518),
        CAR=(0.07405474933520909, 0.33238908915692333),
        OTHER_VEHICLES=(0.07448279551969833, 0.3738707224466959),
        PEDESTRIAN=(0.07102426285803767, 0.29839877160284495),
        WHEELED_VRU=(0.06328875666579249, 0.37915392904597933),
        all=(0.07263035458541908, 0.35703765470843907),
    ),
    "three ways": dict(BS=0.07359562369146282, FS=0.07057388596658731, FD=0.2988379300895925),
}
# av2 0.3.6: m, and shares of the returns
ARGOVERSE = dict(
    BS=0.07068104016433367,
    FS=0.06830349834223186,
    FD=0.3067139637607191,
    all=0.1485661674224282,
    acc5=0.20955096222380612,
    acc10=0.5260156806842481,
)


def compare_khatri(still, moving, said):
    "Ours beside bucketed-scene-flow-eval's, without signs and beyond 35 m, which its three ways do not know."
    same(bucketed(ours(still)), said["bucketed"])
    same(bucketed(ours(moving)), said["bucketed, moving background"])
    own = ways(ours([f for f in near_and_no_signs(still) if f]))
    own.pop("all")
    same(own, said["three ways"])


def compare_argoverse(still, said):
    "Ours beside av2's, pooled over returns."
    m = ours(still)
    same(ways(m) | dict(acc5=m["acc5_relative"]["pooled"], acc10=m["acc10_relative"]["pooled"]), said)


def run_khatri(out):
    return {
        "bucketed": khatri(frames(), out)[0],
        "bucketed, moving background": khatri(frames(True), out)[0],
        "three ways": khatri(frames(), out)[1],
    }


def test_against_recorded_khatri():
    compare_khatri(frames(), frames(True), KHATRI)


def test_against_recorded_argoverse():
    compare_argoverse(frames(), ARGOVERSE)


def test_against_khatri(tmp_path):
    pytest.importorskip(
        "bucketed_scene_flow_eval.eval",
        reason="bucketed-scene-flow-eval is not installed; its recorded answers are compared",
        exc_type=ImportError,
    )
    said = run_khatri(tmp_path)
    compare_khatri(frames(), frames(True), said)
    for k in KHATRI:
        same(said[k], KHATRI[k])


def test_against_argoverse():
    pytest.importorskip(
        "av2.evaluation.scene_flow.eval",
        reason="av2 is not installed; its recorded answers are compared",
        exc_type=ImportError,
    )
    said = argoverse(frames())
    compare_argoverse(frames(), said)
    same(said, ARGOVERSE)


# what the made-up city knows


@pytest.fixture(scope="module")
def city():
    root = fixture_city()
    return root, PandaSet(root)["001"]


def box_errors(city, timed):
    "Error of the boxes' flow on each mover's returns, m, by object."
    root, log = city
    found = {}
    for f in log.frame_ids[:-1]:
        boxed, exact = (
            flow_ground_truth(log, f, cfg=CuboidConfig(timed=timed)),
            exact_flow(log, f, FlowScoreConfig()),
        )
        near = boxed.label < len(CLASSES) - 1
        with np.load(root / f"_truth/001/{f:02d}.npz") as z:
            thing = z["object"]
        # `near` would include a mirror that sticks out of its box: such a return is in no box and stays where it is
        for i in np.unique(thing[thing >= 0]):
            found.setdefault(int(i), []).append(
                np.linalg.norm(boxed.flow - exact.flow, axis=1)[(thing == i) & near & boxed.valid]
            )
    return {i: e for i, v in found.items() if len(e := np.concatenate(v))}


def test_flow_of_boxes_is_the_citys(city):
    timed, plain = box_errors(city, True), box_errors(city, False)

    def every(d):
        return np.concatenate(list(d.values()))

    assert (
        len(timed) > 10
        and max(e.mean() for e in timed.values()) < 1e-3
        and every(timed).mean() < 2e-4
        and every(timed).max() < 2e-3
    )
    assert (
        every(plain).mean() > 1e-3 and 0.03 < every(plain).max() < 0.06
    )  # boxes taken to be one stamp apart: up to 6 % of a passing car's way


def test_labels_of_another_clip_are_noticed(city, tmp_path):
    root, log = city
    clips = long_log_clips(PandaSet(root), "001")
    later = clips[1]
    shift = later.frames[0] - clips[0].frames[0]
    assert shift == 10
    assert clip_truth(later, FlowScoreConfig(truth="cuboids")).left_out == {}
    for k in ("lidar", "camera", "meta"):
        if (log.folder / k).is_dir():
            (tmp_path / "001").mkdir(exist_ok=True)
            os.symlink(log.folder / k, tmp_path / "001" / k)
    (tmp_path / "001/annotations/cuboids").mkdir(parents=True)
    for f in log.frame_ids:
        shutil.copy(
            log.cuboid_path(max(f - shift, 0)), tmp_path / f"001/annotations/cuboids/{f:02d}.pkl.gz"
        )  # the second clip gets the first one's labels
    wrong = long_log_clips(PandaSet(tmp_path), "001")[1]
    assert wrong.id == later.id
    with pytest.raises(DataError, match="check 'labels'.*look labels up by the log's frame id"):
        clip_truth(wrong, FlowScoreConfig(truth="cuboids"))


if __name__ == "__main__":
    import pprint
    import tempfile
    from importlib.metadata import version

    with tempfile.TemporaryDirectory() as d:
        for name, package, f in (
            ("KHATRI", "bucketed-scene-flow-eval", lambda: run_khatri(d)),
            ("ARGOVERSE", "av2", lambda: argoverse(frames())),
        ):
            print(
                f"# {package} {version(package)}\n{name} = {pprint.pformat(f(), width=150, sort_dicts=False)}"
            )
