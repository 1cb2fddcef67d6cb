"""Logs unlike PandaSet's are written small, read, checked, cut and lifted; a fault of `rig.yaml` is one sentence."""

import importlib.util
import json
import re
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from flux4d.background import BackgroundConfig, init_data, init_gaussians, init_groups
from flux4d.baselines import motion_prior_alone
from flux4d.check import check_main, examine
from flux4d.city.logs import make_city
from flux4d.city.rays import Recording
from flux4d.clip_data import InputViews, ViewGroups, clip_data, load_views
from flux4d.clips import Clip, ClipConfig, Cut, _log_lists, at_rate, build_index, clip_entry, fingerprint
from flux4d.config import Config, DataConfig
from flux4d.files import DataError
from flux4d.gap_filling import InitConfig
from flux4d.log_faults import check_log
from flux4d.model import read_inputs
from flux4d.pandaset import Log, PandaSet
from flux4d.rig import Rig, poses_at, read_rig
from flux4d.rigs import lift_scores

FRAMES, SCALE, STEP = 4, 0.08, 1.5
TWO = ("front_camera", "front_left_camera")
BEND = (-0.3, 0.1, 1e-3, -5e-4, -0.01)
UTM = (4e5, 5.5e6, 300.0)
SMALL = Config(data=DataConfig(cameras=TWO[:1]), init=InitConfig(fill_blocks=(64, 32)))
NO_CV2 = importlib.util.find_spec("cv2") is None
VARIANTS = {  # how it is recorded, the note of flux4d-check, and words of its sentence
    "start": (Recording(stamps="start"), "other_stamps", "stamps are of the start of a turn.*0.1 s later"),
    "middle": (Recording(stamps="middle"), "other_stamps", "stamps are of the middle of a turn.*0.05 s later"),
    "no_times": (Recording(return_times=False), "other_stamps", "returns have no times of their own"),
    "hz2": (Recording(fps=2.0), "other_rate", "has 2 frames a second.*4 frames .* input frames 1 s apart"),
    "hz5": (Recording(fps=5.0), "other_rate", "has 5 frames a second.*9 frames .* input frames 0.4 s apart"),
    "hz20": (Recording(fps=20.0), "other_rate", "has 20 frames a second.*31 frames .* input frames 0.2 s apart"),
    "x_forward": (Recording(lidar_axes="forward left up"), "other_axes", "x, y, z of the LiDAR point forward left up"),
    "utm": (Recording(origin=UTM), "far_origin", "starts 5515 km from the world's origin"),
    "cropped": (Recording(cropped=True), "cropped", "returns in only .* of the directions.*cropped"),
    "from_37": (Recording(first=37), "other_names", "in their order, 37.pkl.gz to 40.pkl.gz"),
    "three_digits": (Recording(first=118, digits=3), "other_names", "in their order, 118.pkl.gz to 121.pkl.gz"),
    "past_99": (Recording(first=98), "other_names", "in their order, 98.pkl.gz to 101.pkl.gz"),
    "gaps": (Recording(gaps=(2,)), "uneven_steps", "steps by 0.2 at frame 1 .*; frames were lost there"),
    "sizes": (Recording(sizes=(1.0, 0.5)), "image_sizes", "front_left_camera.*"),
    "bent": (Recording(distortion=BEND), "other_lens", "front_camera has a radial-tangential lens"),
}


SAME_GEOMETRY = "start", "middle", "x_forward", "utm", "from_37", "three_digits", "past_99", "gaps", "sizes"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("rigs")


@pytest.fixture(scope="module")
def made(work):
    "Logs by name, written once."

    @lru_cache
    def log_of(name):
        recording = Recording() if name in ("plain", "two") else VARIANTS[name][0] if name in VARIANTS else None
        cameras = TWO if name in ("two", "sizes") else TWO[:1]
        make_city(work / name, 1, FRAMES, SCALE, cameras=cameras, workers=1, step=STEP, recording=recording)
        return PandaSet(work / name)["001"]

    return log_of


def copied(log, tmp_path):
    shutil.copytree(log.folder, tmp_path / "001")
    return tmp_path / "001"


def clip_of(log, inputs=(0, 2), length=FRAMES):
    cfg = ClipConfig(input_frames=inputs, future_len=length, cameras=tuple(log.cameras))
    entry = clip_entry(log.id, Cut("eval_future", "test", list(range(length)), 1), _log_lists(log, cfg), 10.0, cfg)
    return Clip(log, entry)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_is_checked_indexed_and_lifted(made, name):
    log, plain = made(name), made("plain")
    if name == "bent" and NO_CV2:
        pytest.skip("OpenCV is not installed")
    found = examine(log)
    assert [f.check for f in found if f.severity == "fault"] == [], found
    _, check, words = VARIANTS[name]
    said = [f.text for f in found if f.check == check]
    assert len(said) == 1 and re.search(words, said[0]), found
    assert build_index(log.root, ClipConfig(input_frames=(0,), future_len=2, test_scenes=("001",)))["clips"]
    length = 2 if name == "gaps" else FRAMES
    g = init_gaussians(clip_of(log, (0,), length), InitConfig(fill_blocks=(64, 32)), cameras=TWO[:1])
    wanted = init_gaussians(clip_of(plain, (0,), length), InitConfig(fill_blocks=(64, 32)), cameras=TWO[:1])
    assert 0.8 < len(g) / len(wanted) < 1.25
    if name in SAME_GEOMETRY:
        a, b = (torch.sort(x.means[x.kind == 0][:, 2])[0] for x in (g, wanted))
        assert len(a) == len(b) and (a - b).abs().max() < 0.01


def test_stamps_and_poses_of_any_moment_mean_the_end_of_the_sweep(made):
    plain = made("plain")
    for name in ("start", "middle"):
        log = made(name)
        assert np.abs(log.lidar_stamps - plain.lidar_stamps).max() < 1e-5
        assert np.abs(log.lidar_poses - plain.lidar_poses).max() < 0.01
        assert np.abs(log.sweep(1).stamps - plain.sweep(1).stamps).max() < 1e-5


def test_returns_without_times_are_of_the_middle_of_the_turn(made):
    s, log = made("no_times").sweep(1), made("no_times")
    assert (s.stamps == log.lidar_stamps[1] - 0.05).all()
    assert read_rig(log.folder).return_times == "none"


def test_axes_give_the_same_vehicle(made, tmp_path):
    plain, log = made("plain"), made("x_forward")
    for frame in range(FRAMES):
        assert np.abs(log.ego_pose(frame) - plain.ego_pose(frame)).max() < 1e-6
    folder = copied(log, tmp_path)
    (folder / "rig.yaml").write_text("lidar_axes: right forward up")
    for path in (folder / "lidar/poses.json",):  # a drive of more than five metres
        poses = json.loads(path.read_text())
        for k, pose in enumerate(poses):
            along = Log(tmp_path, "001").lidar_poses[0][:3, 0]
            start = np.array(list(poses[0]["position"].values()))
            pose["position"] = dict(zip("xyz", (start + 3 * k * along).tolist()))
        path.write_text(json.dumps(poses))
    with pytest.raises(DataError, match="001/rig.yaml: says lidar_axes 'right forward up', by which .* sideways"):
        Log(tmp_path, "001").ego_pose(0)


def test_a_far_origin_loses_nothing(made):
    plain, log = made("plain"), made("utm")
    turned = plain.sweep(2).points - plain.lidar_poses[2][:3, 3]
    assert np.abs(log.sweep(2).points - log.lidar_poses[2][:3, 3] - turned).max() < 0.0021
    assert np.abs(log.to_world(log.sweep(2).points) - UTM - plain.to_world(plain.sweep(2).points)).max() < 0.0021


def test_names_in_order(made, tmp_path):
    log = made("three_digits")
    assert [log.sweep_path(f).name for f in (0, FRAMES - 1)] == ["118.pkl.gz", f"{118 + FRAMES - 1}.pkl.gz"]
    folder = copied(log, tmp_path)
    (folder / "rig.yaml").unlink()
    with pytest.raises(DataError, match="numbering: order"):
        Log(tmp_path, "001").sweep(0)
    assert any("write 'numbering: order' in rig.yaml" in text for text in check_log(Log(tmp_path, "001")))
    (folder / "rig.yaml").write_text("numbering: order")
    (folder / "lidar/119.pkl.gz").unlink()
    assert check_log(Log(tmp_path, "001")) == [
        f"001/lidar: has {FRAMES - 1} files where lidar/timestamps.json has {FRAMES} stamps; give each frame its file, "
        "or leave 'numbering: order' out of rig.yaml."
    ]


def test_rates_are_cut_by_seconds():
    for fps, frames in ((2.0, 4), (5.0, 9), (10.0, 16), (20.0, 31)):
        cfg = at_rate(ClipConfig(), fps)
        assert cfg.future_len == frames
        assert 1.4 <= (frames - 1) / fps <= 1.6
    assert at_rate(ClipConfig(interp_len=7), 20.0) == ClipConfig(interp_len=7)  # what was chosen stays


UNEVEN = np.cumsum([0, 4, 6, 5, 5, 4, 6, 6, 4, 5, 5, 6, 4, 5, 5, 5])  # fiftieths of a second
LENGTHS = {4: (0, 2), 9: (0, 2, 4), 40: tuple(range(0, 40, 4))}


@pytest.fixture(scope="module")
def uneven(work):
    "A log whose frames follow each other after 0.08, 0.1 or 0.12 s."
    lost = np.setdiff1d(np.arange(UNEVEN[-1] + 1), UNEVEN)
    recording = Recording(fps=50.0, gaps=tuple(int(f) for f in lost))
    make_city(work / "uneven", 1, 16, 0.0625, workers=1, step=1.0, recording=recording)
    return PandaSet(work / "uneven")["001"]


def test_frames_at_uneven_times_are_cut_lifted_and_moved(uneven):
    assert np.allclose(np.diff(uneven.lidar_stamps), np.diff(UNEVEN) / 50, atol=1e-5)
    assert [f.check for f in examine(uneven)] == ["other_names"]  # steps that differ by a fifth are none to speak of
    index = build_index(uneven.root, ClipConfig(test_scenes=("001",)))
    assert [c["clip_id"] for c in index["clips"]] == ["001_eval_future_s000_e015"] and not index.get("left_out")
    scores = lift_scores(uneven.clip(0))
    assert scores.psnr_prior["front_camera"] > scores.psnr["front_camera"] + 1
    assert scores.moving_error < 1.0 and scores.static_motion < 0.05


def test_a_step_that_is_twice_as_long_is_one_sentence(made):
    with pytest.raises(DataError, match="gives no clip at all .*steps by 0.200 s at its frame 1 where 0.100 s"):
        build_index(made("gaps").root, ClipConfig(input_frames=(0, 2), future_len=3, test_scenes=("001",)))


@pytest.mark.parametrize("frames", LENGTHS)
def test_clips_of_any_length_are_lifted_and_moved(work, frames):
    make_city(work / "long", 1, 40, 0.0625, workers=1, step=1.5)
    inputs = read_inputs(clip_of(PandaSet(work / "long")["001"], LENGTHS[frames], frames), SMALL)
    assert inputs.clip.input_frames == list(LENGTHS[frames])
    scene = motion_prior_alone(inputs)
    g = scene.gaussians
    assert g.t.min() * scene.duration >= -0.1 and g.t.max() <= 1  # a sweep begins half a turn before its frame
    assert set(g.frame[g.kind == 0].tolist()) == set(LENGTHS[frames])
    speed = scene.velocity[:, 0].norm(dim=1)
    assert torch.isfinite(scene.velocity).all() and 2 < speed.max() < 40


def test_images_of_two_sizes(made):
    log = made("sizes")
    assert log.by_size() == [[TWO[0]], [TWO[1]]]
    assert [f.severity for f in examine(log) if f.check == "image_sizes"] == ["note"]
    clip = clip_of(log)
    views = load_views(clip, [0, 2], TWO, kind=InputViews)
    assert isinstance(views, ViewGroups) and len(views) == 4
    assert [g.images.shape[2] for g in views.groups] == [154, 77]
    assert views[3].camera == [TWO[1]] and views[0].width == 154
    with pytest.raises(IndexError):
        views[4]
    small = InitConfig(fill_blocks=(64, 32))
    g = init_gaussians(clip, small, cameras=list(TWO))
    alone = [init_gaussians(clip, small, cameras=[name]) for name in TWO]
    lidar = [int((x.kind == 0).sum()) for x in (g, *alone)]
    assert max(lidar[1:]) < lidar[0] <= sum(lidar[1:])
    assert (g.kind.diff() >= 0).all()  # LiDAR first, then background


def test_batches_feedback_and_scores_of_two_sizes(made, tmp_path):
    from flux4d.cache import LiftCache
    from flux4d.config import config_from_dict
    from flux4d.loader import Loader
    from flux4d.model import build_model
    from flux4d.refine import Flux4D, FullConfig
    from flux4d.score_clips import target_views

    cfg = config_from_dict(
        dict(
            data=dict(cameras=list(TWO), loader_threads=1),
            init=dict(fill_blocks=[64, 32]),
            voxel=dict(size=0.8),
            model=dict(degree=1, unet=dict(widths=[8, 16], blocks=1), hidden=16),
            refine=dict(unet=dict(widths=[8, 16], blocks=1), steps=2),
            render=dict(backend="torch"),
            train=dict(views_per_step=2, prefetch=0),
        ),
        FullConfig,
    )
    loader = Loader([clip_of(made("sizes"))], cfg, LiftCache(tmp_path / "cache"))
    drawn = [{c for _, c in loader.draw(step)[1]} for step in range(20)]
    assert all(len(cameras) == 1 for cameras in drawn) and set.union(*drawn) == set(TWO)
    widths = {loader.batch(step).views.width for step in range(8)}
    assert widths == {154, 77}
    inputs = loader.inputs(0)
    assert isinstance(inputs.views, ViewGroups)
    scene = build_model(cfg, Flux4D).eval().reconstruct(inputs)  # its feedback sums over both sizes
    targets = [views for _, views in target_views(loader, loader.clips[0], 4)]
    shown = [(views.camera[0], scene.render(views).rgb.shape[2]) for views in targets]
    assert set(shown) == {(TWO[0], 154), (TWO[1], 77)}
    with pytest.raises(DataError, match="polish: works on images of one size"):
        scene.polish(steps=1)


def test_cameras_of_other_names(made, tmp_path):
    folder = copied(made("plain"), tmp_path)
    (folder / "camera/front_camera").rename(folder / "camera/cam0")
    log = Log(tmp_path, "001")
    assert log.camera("cam0").width == 154  # by its own name
    with pytest.raises(DataError, match="choose from cam0"):
        log.camera("front_camera")
    assert any("--cameras cam0" in f.text and "rig.yaml" in f.text for f in examine(log))
    (folder / "rig.yaml").write_text("cameras: {cam0: {heading: 0}}")
    log = Log(tmp_path, "001")
    assert log.cameras == ["cam0"] and examine(log) == []
    (folder / "rig.yaml").write_text("cameras: {cam0: {heading: 90}}")
    assert [f.check for f in examine(Log(tmp_path, "001"))] in ([], ["camera_axes"])  # where the drive is long enough


def test_the_description_is_part_of_a_logs_identity(made, tmp_path):
    folder = copied(made("plain"), tmp_path)
    before = fingerprint(Log(tmp_path, "001"), TWO[:1])
    assert before == fingerprint(made("plain"), TWO[:1])
    (folder / "rig.yaml").write_text("stamps: start")
    assert fingerprint(Log(tmp_path, "001"), TWO[:1]) != before


FAULTS = {
    "stamps: [end": "is not YAML",
    "- stamps": "give fields by name",
    "stamps: begin": "stamps: is 'begin'; choose start, middle or end",
    "stamp: start": "did you mean stamps",
    "turn: 0": "turn: is 0; choose a number above 0",
    "turn: .inf": "turn: is inf",
    "lidar_axes: forward forward up": "right-handed",
    "lidar_axes: x y z": "say where x, y and z point",
    "lidar_axes: 3": "lidar_axes",
    "numbering: alphabetical": "choose number or order",
    "return_times: 5": "choose own or none",
    "cameras: 7": "cameras",
    "cameras: {front_camera: 7}": "cameras.front_camera",
    "cameras: {front_camera: {lens: omni}}": "choose pinhole, radial-tangential or fisheye",
    "cameras: {front_camera: {lens: fisheye, distortion: [1]}}": "a fisheye lens has 4",
    "cameras: {front_camera: {distortion: [1, 2, 3, 4]}}": "a pinhole lens has 0",
    "cameras: {front_camera: {lens: radial-tangential, distortion: [a, b, c, d]}}": "distortion",
    "cameras: {front_camera: {heading: 400}}": "heading",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_of_the_description_is_one_sentence(made, tmp_path, text, capsys):
    folder = copied(made("plain"), tmp_path)
    (folder / "rig.yaml").write_text(text)
    with pytest.raises(DataError) as e:
        Log(tmp_path, "001").camera()
    assert str(e.value).startswith("001/rig.yaml: ") and FAULTS[text] in str(e.value)
    assert "\n" not in str(e.value)
    assert check_main([str(tmp_path)]) == 1
    assert "001/rig.yaml: " in capsys.readouterr().out


def test_a_description_of_bytes(made, tmp_path):
    folder = copied(made("plain"), tmp_path)
    (folder / "rig.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not YAML"):
        Log(tmp_path, "001").rig


def test_poses_at_the_stamps_are_the_poses():
    rng = np.random.default_rng(0)
    from flux4d.frames import quat_to_mat, se3

    poses = se3(quat_to_mat(rng.normal(size=(5, 4))), rng.normal(size=(5, 3)))
    stamps = np.cumsum(rng.uniform(0.1, 0.2, 5))
    assert np.abs(poses_at(poses, stamps, stamps) - poses).max() < 1e-9
    assert poses_at(poses[:1], stamps[:1], stamps).shape == (5, 4, 4)


@pytest.mark.skipif(NO_CV2, reason="OpenCV is not installed")
def test_a_bent_lens_is_read_straight(made):
    bent, plain = made("bent").camera(), made("plain").camera()
    assert bent.lens is not None and bent.K[0, 0] == bent.K[1, 1]
    # the same world through both pinhole cameras: a straightened pixel is one of the plain image
    image, other = (log.image("front_camera", 0).astype(float) for log in (made("bent"), made("plain")))
    raw = np.asarray(Image.open(made("bent").image_path("front_camera", 0)), float)
    v, u = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    at = (np.stack([u, v], -1) - bent.K[:2, 2]) / bent.K[0, 0] * plain.K[0, 0] + plain.K[:2, 2]
    col, row = np.floor(at).astype(int).T
    height, width = other.shape[:2]
    border = (np.abs(u - width / 2) > 0.3 * width).T & (row >= 0) & (row < height) & (col >= 0) & (col < width)
    wanted = other[row[border], col[border]]
    apart = [np.abs(x.swapaxes(0, 1)[border] - wanted).mean() for x in (image, raw)]
    assert apart[0] < 0.8 * apart[1], apart


@pytest.mark.skipif(not NO_CV2, reason="OpenCV is installed")
def test_a_bent_lens_without_opencv_is_one_sentence(made):
    with pytest.raises(DataError, match="pip install opencv-python-headless"):
        made("bent").camera()


def test_a_rig_is_pandasets_unless_stated():
    assert Rig() == Rig(**yaml.safe_load("{}")) and Rig().turn_of(0.1) == 0.1
    assert Path("docs/format.md").is_file() or Path(__file__).parents[1].joinpath("docs/format.md").is_file()
    page = (Path(__file__).parents[1] / "docs/format.md").read_text()
    for field in ("lidar_axes", "stamps", "turn", "return_times", "numbering", "heading", "lens", "distortion"):
        assert f"`{field}`" in page or f".{field}`" in page
    example = yaml.safe_load(page.split("```yaml")[1].split("```")[0])
    assert Rig(**example).cameras["cam1"].heading == 90


@pytest.mark.parametrize("mode", ("none", "grid", "hemisphere"))
@pytest.mark.parametrize("fill", (False, True))
def test_a_camera_may_add_no_return_of_its_own(made, mode, fill):
    "The second camera sees only what the first one has lifted, and a third one sees nothing at all."
    clip = clip_of(made("plain"))
    whole, half = clip_data(clip), clip_data(clip, image_scale=0.5)
    up = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]).double()
    blind = clip_data(clip, image_scale=0.25)
    blind.pose = blind.pose @ up  # it looks at the zenith
    how = InitConfig(fill=fill, fill_blocks=(64, 32)), BackgroundConfig(mode, num_sky_points=2000)
    alone, together = init_data(whole, *how), init_groups([whole, half, blind], *how)
    assert torch.equal(together.means[:100], alone.means[:100])
    returns = init_data(whole, InitConfig(fill=False), BackgroundConfig("none"))
    if not fill:
        assert (together.kind == 0).sum() == len(returns) == (alone.kind == 0).sum()
    assert (together.kind.diff() >= 0).all()  # what is near comes first
    if not fill and mode == "none":
        with pytest.raises(DataError, match="no LiDAR return is visible in an input image"):
            init_groups([blind, blind], *how)
