"Input views show input frames only, whatever made them."
from dataclasses import replace

import pytest
import torch

from flux4d.cache import LiftCache
from flux4d.clips import Clip, ClipConfig, build_index, select_clips
from flux4d.clip_data import InputViews, TargetViews, load_views
from flux4d.gap_filling import InitConfig
from flux4d.pandaset import PandaSet
from flux4d.log_files import fabricate_log
from flux4d.config import Config, DataConfig
from flux4d.loader import Loader

CAMERA = "front_camera"


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Clip:
    "One clip of a small log."
    root = fabricate_log(tmp_path_factory.mktemp("data"), "002", frames=20).parent
    return Clip(PandaSet(root)["002"], select_clips(build_index(root, ClipConfig()))[0])


@pytest.fixture(scope="module")
def loader(clip, tmp_path_factory) -> Loader:
    "A loader of that clip."
    cfg = Config(data=DataConfig(image_scale=1., loader_threads=1), init=InitConfig(fill=False))
    return Loader([clip], cfg, LiftCache(tmp_path_factory.mktemp("lifts")))


def by_constructor(clip, loader, frames):
    "Fields of target views of the frames, put into `InputViews` by hand."
    shown = load_views(clip, frames, with_depth=False)
    return InputViews(**vars(shown), allowed=tuple(clip.input_frames))


def by_load_views(clip, loader, frames):
    return load_views(clip, frames, kind=InputViews, with_depth=False)


def by_loader(clip, loader, frames):
    return loader.views(clip, [(f, CAMERA) for f in frames], InputViews)


def by_replace(clip, loader, frames):
    "The frames of sound views exchanged."
    sound = by_load_views(clip, loader, clip.input_frames[:1]*len(frames))
    return replace(sound, frame=torch.tensor(frames))


def by_mapping(clip, loader, frames):
    "The same by way of `_map`, which moves and cuts views."
    sound = by_load_views(clip, loader, clip.input_frames[:1]*len(frames))
    return sound._map(lambda x: torch.tensor(frames) if x.dtype == torch.int64 else x)


WAYS = (by_constructor, by_load_views, by_loader, by_replace, by_mapping)


@pytest.mark.parametrize("make", WAYS)
def test_a_target_is_refused(make, clip, loader):
    for frames in (clip.target_frames[:1], [clip.input_frames[0], clip.target_frames[-1]]):
        with pytest.raises(ValueError, match="a clip never leaks its targets"):
            make(clip, loader, frames)


@pytest.mark.parametrize("make", WAYS)
def test_inputs_are_shown(make, clip, loader):
    views = make(clip, loader, clip.input_frames[:2])
    assert views.frame.tolist() == clip.input_frames[:2]
    assert views.allowed == tuple(clip.input_frames)


def test_nothing_may_be_shown_where_no_frames_are_named(clip):
    shown = load_views(clip, clip.input_frames[:1], with_depth=False)
    with pytest.raises(ValueError, match=r"not among the allowed ones, \[\]; name the clip's input frames"):
        InputViews(**vars(shown))


def test_moved_and_cut_views_still_know_their_frames(clip, loader):
    views = loader.inputs(clip).views
    there = views.to("meta")                                     # another device, whose numbers cannot be read
    assert type(there) is InputViews and there.frame.device.type == "meta"
    for part in (there, views[0], views[:2], views[[1, 0]], views.to("cpu"), replace(views, depth=views.depth)):
        assert part.allowed == tuple(clip.input_frames)


def test_targets_have_no_such_bound(clip, loader):
    views = loader.views(clip, [(f, CAMERA) for f in clip.target_frames[:2]])
    assert type(views) is TargetViews and not hasattr(views, "allowed")
    assert type(views[0]) is type(views.to("cpu")) is TargetViews
