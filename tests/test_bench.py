"""Timings are refused where they are none, two runs are laid side by side by the command, a row that fails costs
itself alone, and what is measured is what the method does."""

import copy
import json
import math
import pytest
import torch
from flux4d.bench import BENCH_PARTS, machine_name, neighbour_pairs, scene_of_size, step_parts, unet_operations
from flux4d.files import DataError
from flux4d.frames import ClipTime
from flux4d.gaussians import gaussians_from
from flux4d.report_pages import report_main
from flux4d.scaling import Costs, Machine, bench_runs, costs_of, limits_of, plan_for
from flux4d.scene import Scene
from flux4d.timing import Ceilings, Timings, Work, union_length, growth_by_group, least_seconds, measure
from flux4d.timing_tables import compare_timings, timing_rows, timing_table
from flux4d.unet import UNetConfig


def took(seconds, scatter=0.1, **more):
    return dict(median=seconds, p10=seconds * (1 - scatter), p90=seconds * (1 + scatter), count=9, **more)


RECORD = dict(
    subject="bench of a machine",
    runtime=dict(machine="a machine", torch="2.13", image_scale=1.0, iters=0, gpu=None),
    data=dict(
        log="002",
        gaussians=331_000,
        bytes=dict(
            image_file=250_000,
            sweep_file=1_500_000,
            frame=14_500_000,
            lift=25_000_000,
            index=60_000_000,
            entry=9_000,
            weights=50_000_000,
        ),
    ),
    timing=dict(
        lift=dict(from_files=took(0.5), from_memory=took(0.04, least=0.001)),
        data=dict(image=took(0.02), sweep=took(0.03)),
        step_full=dict(whole=took(0.2, peak_bytes=7_000_000_000)),
    ),
    growth={},
    left_out={"film.frame_written": "RuntimeError: no encoder"},
)


def kept(folder, m):
    "A run's folder."
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(m), encoding="utf-8")
    return str(folder)


# the command


def test_two_runs_side_by_side(tmp_path, capsys):
    new = copy.deepcopy(RECORD)
    new["timing"]["step_full"]["whole"] = took(0.08)
    new["data"]["gaussians"] = 300_000
    assert report_main([kept(tmp_path / "old", RECORD), kept(tmp_path / "new", new)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Not the code alone differs: gaussians 331000 and 300000.")
    assert "| step full: whole | 200 | 80.0 | 0.40 | faster |" in said
    assert "| lift: from files | 500 | 500 | 1.00 |  |" in said


@pytest.mark.parametrize(
    "row,said",
    (
        (None, "has no median"),
        (5, "has no median"),
        (dict(median=1.0, p10=1.0, p90=1.0), "has no median"),
        (took(math.nan), "has no median"),
        (took(0.0), "are no times in their order"),
        (took(-1.0), "are no times in their order"),
        (dict(took(1.0), p10=2.0), "are no times in their order"),
        (dict(took(1.0), count=0), "are no times in their order"),
        (dict(took(1.0), median=True), "has no median"),
    ),
)
def test_what_is_no_timing_ends_in_one_sentence(tmp_path, capsys, row, said):
    bad = copy.deepcopy(RECORD)
    bad["timing"]["lift"]["from_files"] = row
    with pytest.raises(DataError, match=f"timing.lift.from_files: .*{said}.*80_bench.$"):
        timing_rows(bad)
    assert report_main([kept(tmp_path / "old", RECORD), kept(tmp_path / "bad", bad)]) == 1
    sentence = capsys.readouterr().err.strip()
    assert sentence.count("\n") == 0 and sentence.endswith(".")


@pytest.mark.parametrize("timing", (None, [], 5, {"lift": 5}, {"lift": [1]}))
def test_a_record_without_timings_is_refused(timing):
    with pytest.raises(DataError, match="timing: is no group of timings; name a run of 80_bench."):
        timing_table(dict(timing=timing))


def test_names_in_a_record_are_shown_as_text():
    odd = dict(RECORD, timing={"a|b<script>": {"x": took(1.0)}})
    for text in (timing_table(odd), compare_timings(odd, odd)):
        assert "<script>" not in text and r"a\|b" in text


def test_one_run_alone_is_shown_as_before(tmp_path, capsys):
    assert report_main([kept(tmp_path / "alone", RECORD)]) == 0
    assert "machine" in capsys.readouterr().out


# measuring


def test_calls_are_counted_and_warm_up_is_not_measured():
    seen = []

    def clock():
        return float(sum(seen))

    def call():
        seen.append(100.0 if len(seen) < 2 else 1.0)

    found = measure(call, warmup=2, repeats=4, clock=clock)
    assert len(seen) == 6 and (found.median, found.p10, found.p90, found.count) == (1.0, 1.0, 1.0, 4)


@pytest.mark.parametrize("fault", (RuntimeError, MemoryError, DataError, OSError, torch.OutOfMemoryError))
def test_a_row_that_fails_costs_itself_alone(fault):
    t = Timings(repeats=2)

    def fail():
        raise fault("no\nroom")

    t.time("render", 4_000_000, fail, size=4_000_000)
    t.time("render", 1000, lambda: None, size=1000)
    assert list(t.found["render"]) == ["1000"]
    assert t.left_out == {"render.4000000": f"{fault.__name__}: no room"}
    with pytest.raises(KeyboardInterrupt), t.noted("render"):
        raise KeyboardInterrupt
    assert growth_by_group(t.found) == {}  # one size has no growth


def test_least_times_need_ceilings():
    t = Timings(repeats=1)
    t.time("copy", "a", lambda: None, work=Work(1.0))
    assert "least" not in t.found["copy"]["a"]
    assert least_seconds(Work(10.0, 50.0), Ceilings(copy=10.0, float32=5.0, tf32=100.0)) == 1.0
    assert union_length([(0, 1), (3, 4), (0.5, 3.5)]) == 4


# what is measured


def brute_pairs(coords):
    near = (coords[:, None] - coords[None]).abs().amax(2) <= 1
    return int(near.sum())


@pytest.mark.parametrize("seed", range(4))
def test_pairs_of_voxels_are_those_of_all_against_all(seed):
    draw = torch.Generator().manual_seed(seed)
    coords = torch.unique(torch.randint(-4, 5, (150, 3), generator=draw), dim=0)
    assert neighbour_pairs(coords) == brute_pairs(coords)


def test_operations_of_a_dense_block_are_those_of_a_dense_convolution():
    solid = torch.cartesian_prod(*[torch.arange(6)] * 3)
    weight = torch.ones(1, 1, 3, 3, 3)
    taps = torch.nn.functional.conv3d(torch.ones(1, 1, 6, 6, 6), weight, padding=1).sum()
    of_one_block = unet_operations(solid, 4, UNetConfig(widths=(4,), blocks=1)) - 2 * 216 * 4 * 4
    assert of_one_block == 2 * float(taps) * 4 * 4


@pytest.mark.parametrize("count", (1, 7, 20, 21, 59))
def test_a_scene_of_any_size(count):
    draw = torch.Generator().manual_seed(0)
    g = gaussians_from(
        torch.rand(20, 3, generator=draw), torch.full((20,), 0.1), torch.rand(20, 3, generator=draw), torch.rand(20), 0
    )
    scene = Scene(g, torch.arange(60.0).view(20, 1, 3), ClipTime(0.0, 1.0), torch.eye(4).numpy())
    made = scene_of_size(scene, count)
    assert len(made) == count and made.velocity.shape == (count, 1, 3)
    assert set(made.velocity[:, 0, 0].tolist()) <= set(scene.velocity[:, 0, 0].tolist())
    assert torch.equal(made.gaussians.means, scene_of_size(scene, count).gaussians.means)


def test_parts_of_a_step_add_up_to_it():
    names = ("forward", "losses", "gradients", "at_hand", "whole")
    found = {name: took(float(k + 1)) for k, name in enumerate(names)}
    assert sum(step_parts(found).values()) == 5.0
    for name in names:
        assert step_parts({k: v for k, v in found.items() if k != name}) == {}


@pytest.mark.parametrize(
    "machine,name",
    (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
        ("x86_64, 16 cores", "cpu16"),
        ("../..", "machine"),
        ("", "machine"),
    ),
)
def test_a_machine_has_a_name_for_a_folder(machine, name):
    assert machine_name(machine) == name


def test_parts_are_named_once():
    assert len(set(BENCH_PARTS)) == len(BENCH_PARTS)


# larger data sets


def test_costs_come_from_a_run_with_all_its_parts():
    costs = costs_of(RECORD)
    assert costs.step_seconds == 0.2 and costs.lift == 25_000_000
    for at in (("data", "bytes"), ("timing", "data"), ("timing",)):
        bad = copy.deepcopy(RECORD)
        inside = bad
        for key in at[:-1]:
            inside = inside[key]
        inside[at[-1]] = None
        with pytest.raises(DataError, match="was not measured in this run; run 80_bench with all its parts."):
            costs_of(bad)


def test_a_limit_is_where_a_plan_uses_a_resource_up():
    costs, machine = costs_of(RECORD), Machine()
    by_name = {limit.name: limit for limit in limits_of(costs, machine)}
    logs = by_name["host memory: decoded frames"].logs
    assert plan_for(1_000_000, costs).frames * logs / 1_000_000 == pytest.approx(machine.host_bytes / 2)
    hours = plan_for(103, costs).gpu_hours
    assert by_name["a week of training, one GPU"].logs == pytest.approx(103 * machine.train_hours / hours)
    assert all(limit.logs > 0 for limit in by_name.values())


def test_more_of_everything_never_reaches_further():
    costs = costs_of(RECORD)
    before = {limit.name: limit.logs for limit in limits_of(costs)}
    for name in Costs.__dataclass_fields__:
        more = Costs(**{**vars(costs), name: 2 * getattr(costs, name)})
        after = {limit.name: limit.logs for limit in limits_of(more)}
        assert all(after[k] <= before[k] * (1 + 1e-9) for k in before), name


def test_runs_without_timings_are_passed_over(tmp_path):
    runs = tmp_path / "papermill_runs"
    runs.mkdir()
    kept(runs / "bench_cpu2", RECORD)
    kept(runs / "bench_h100", dict(RECORD, runtime=dict(gpu="NVIDIA H100")))
    kept(runs / "bench_other", dict(nvs={}))
    assert [p.name for p in bench_runs(tmp_path)] == ["bench_h100", "bench_cpu2"]
    assert bench_runs(tmp_path / "nowhere") == []
