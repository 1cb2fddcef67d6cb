"Stamps unlike PandaSet's do not halve a lift, and one function decides what a camera sees."

import warnings
from dataclasses import replace
import numpy as np
import pytest
import torch
from flux4d import clip_data as clip_data_module, visibility
from flux4d.background import BackgroundConfig, init_data, init_gaussians
from flux4d.city.logs import fixture_city
from flux4d.clips import Clip, ClipConfig, build_index, select_clips
from flux4d.visibility import project_sweep
from flux4d.frames import se3_inverse
from flux4d.gap_filling import InitConfig
from flux4d.lift import clip_data, lift_clip, lift_data
from flux4d.clip_data import clip_returns
from flux4d.files import DataError
from flux4d.pandaset import PandaSet

NO_BACKGROUND = BackgroundConfig(mode="none")


def opened():
    "A fresh clip of the made-up city."
    root = fixture_city()
    record = select_clips(build_index(root, ClipConfig()), settings=("eval_future",))[0]
    return Clip(PandaSet(root)["001"], record)


def stamped(change):
    "A clip whose sweeps are read with other stamps; `change` gets a sweep and its frame."
    clip = opened()
    read = clip.log.sweep

    def sweep(frame, sensors=(0,)):
        s = read(frame, sensors)
        return replace(s, stamps=change(s, frame))

    clip.log.sweep = sweep
    return clip


@pytest.fixture(scope="module")
def sound():
    "A clip, and it again with images that never agree, as moving cameras before detailed surfaces see them."
    data = clip_data(opened())
    noise = torch.randint(
        256, data.images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return data, replace(data, images=noise)


def said(f):
    "The result of a call, and the warnings it gave."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        out = f()
    return out, [str(w.message) for w in found if w.category is UserWarning]


FAULTS = {
    "all at the sweep's end": lambda d: d.sweep_stamps[:, None].expand_as(d.stamps),
    "40 ms late": lambda d: d.stamps + 0.04,
    "40 ms early": lambda d: d.stamps - 0.04,
    "one sweep late": lambda d: d.stamps + 0.06 * (torch.arange(len(d.stamps)) == 2)[:, None],
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("fill", (False, True))
def test_stamps_unlike_the_shutter_lose_nothing(sound, fault, fill):
    data, restless = sound
    cfg = InitConfig(fill=fill, fill_blocks=(64, 16))
    want, nothing = said(lambda: init_data(restless, cfg, NO_BACKGROUND))
    assert nothing == []
    stamps = torch.where(data.stamps.isnan(), data.stamps, FAULTS[fault](data))
    got, words = said(lambda: init_data(replace(restless, stamps=stamps), cfg, NO_BACKGROUND))
    assert 0.97 * len(want) < len(got) < 1.03 * len(want)
    assert (
        len(words) == 1
        and "log 001" in words[0]
        and "late_after" in words[0]
        and words[0].endswith(".")
        and ". " not in words[0]
    )
    apart = (got.t - want.t).abs().max() * data.duration if len(got) == len(want) else torch.tensor(0.0)
    assert apart < 0.03


def test_it_is_said_once_for_returns_gaps_and_far_field(sound):
    data, _ = sound
    late = replace(data, stamps=data.stamps + 0.04)
    _, words = said(lambda: init_data(late, InitConfig(fill_blocks=(64, 16)), BackgroundConfig(depth_candidates=())))
    assert len(words) == 1


def test_files_with_such_stamps_lift_as_many(sound):
    cfg = InitConfig(fill=False)
    ends = opened().log.lidar_stamps
    got, words = said(lambda: lift_clip(stamped(lambda s, f: np.full(len(s), ends[f])), cfg))
    assert len(got) > 0.95 * len(lift_clip(opened(), cfg)) and len(words) == 1


def test_the_tolerance_is_a_field(sound):
    _, restless = sound
    late = replace(restless, stamps=restless.stamps + 0.04)
    got, words = said(lambda: lift_data(late, InitConfig(fill=False, late_after=0.06)))
    want = lift_data(restless, InitConfig(fill=False))
    assert words == [] and len(got) == len(want)
    assert abs(float((got.t - want.t).mean()) * restless.duration - 0.04) < 1e-3  # the stamps are believed


@pytest.mark.parametrize("off", (18.0, -18.0, 1e9))
def test_times_far_outside_the_clip_stop_the_lift(sound, off):
    data, _ = sound
    with pytest.raises(DataError) as e:
        lift_data(replace(data, stamps=data.stamps + off), InitConfig(fill=False))
    text = str(e.value)
    assert (
        text.startswith(data.id)
        and "times of their own outside the clip" in text
        and "correct the stamps" in text
        and ". " not in text
        and text.endswith(".")
    )


def test_a_shutter_outside_the_clip_stops_the_lift(sound):
    data, _ = sound
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="correct the stamps"):
            lift_data(replace(data, shutter=data.shutter + 18), InitConfig(fill=False))


def test_one_function_decides_what_a_camera_sees(sound, monkeypatch):
    data, _ = sound
    assert clip_data_module.unoccluded is visibility.unoccluded
    for f in (0, 3):
        K, T = data.K[f, 0].numpy(), se3_inverse(data.pose[f, 0]).numpy()
        x = data.points[f][~data.points[f, :, 0].isnan()].numpy()
        h, w = data.images.shape[2:4]
        visible = project_sweep(x, K, T, w, h)[2]
        assert (
            (visible != data.projected.visible[f, 0, : len(x)].numpy()).mean() < 1e-4
            and visible.any()
            and not visible.all()
        )
    monkeypatch.setattr(visibility, "unoccluded", lambda uv, z, inside, *how, **more: inside)
    assert project_sweep(x, K, T, w, h)[2].sum() > visible.sum()


def test_returns_are_read_in_one_way(sound):
    data, _ = sound
    there = ~data.points[..., 0].isnan()
    points, seconds, frame = clip_returns(opened())
    assert (
        torch.equal(points, data.points[there])
        and torch.equal(seconds, data.stamps[there])
        and torch.equal(frame, data.frames[:, None].expand_as(there)[there])
    )
    assert not hasattr(data, "returns")


@pytest.mark.parametrize("mode", ("grid", "hemisphere"))
def test_a_sensor_without_returns_is_said(mode):
    with pytest.raises(
        DataError, match="no LiDAR return is visible in an input image; choose other cameras or sensors"
    ):
        init_gaussians(opened(), InitConfig(lidar_sensors=(1,)), BackgroundConfig(mode=mode))
