"""What is exported is read back by a library that is not ours, or by the bytes, and equals the scene; bad wishes end
in one sentence and leave no file."""

import json
import sys
from dataclasses import replace
import numpy as np
import pytest
import torch
from PIL import Image
from flux4d.export import SH_C0, OPENGL, PLY_COLUMNS, SweepConfig, splats_of
from flux4d.files import DataError
from flux4d.frames import ClipTime, se3
from flux4d.gaussians import BACKGROUND, LIDAR, gaussians_from, scale_inv
from flux4d.scene import CameraPath, Scene

plyfile = pytest.importorskip("plyfile")


def made_scene(n=700, seed=0):
    "Gaussians in front of a camera that drives forward; every third moves to the left, the last fifty are far away."
    rng = torch.Generator().manual_seed(seed)
    spread = torch.tensor([30.0, 12.0, 3.0])
    means = (torch.rand(n, 3, generator=rng) - torch.tensor([0.0, 0.5, 0.5])) * spread + torch.tensor([6.0, 0, 1.5])
    means[-50:, 0] = 600.0
    kind = torch.full((n,), LIDAR)
    kind[-50:] = BACKGROUND
    scales = 0.05 + torch.rand(n, 3, generator=rng)
    quats = torch.nn.functional.normalize(torch.randn(n, 4, generator=rng), dim=1)
    g = gaussians_from(means, scales, torch.rand(n, 3, generator=rng), torch.rand(n, generator=rng), 0, kind, quats)
    g = replace(g, opacity_logits=torch.randn(n, generator=rng))
    velocity = torch.zeros(n, 1, 3)
    velocity[: n - 50 : 3, 0, 1] = 4.0
    forward = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # the camera's axes in the vehicle's
    poses = np.stack([se3(forward, np.array([0.8 * k, 0, 1.5])) for k in range(8)])
    K = np.array([[60.0, 0, 40], [0, 60, 30], [0, 0, 1]])
    front = CameraPath(K, poses, np.linspace(0, 1, 8), 60, 80)
    return Scene(g, velocity, ClipTime(10.0, 11.0), np.eye(4), dict(front=front))


@pytest.fixture(scope="module")
def scene():
    return made_scene()


def nearest(points, means):
    "Distance of each point to the nearest centre, and which that is."
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(torch.as_tensor(points.copy()).float(), means, compute_mode=exact).min(1)


def columns(vertex, names):
    return np.stack([np.asarray(vertex[name]) for name in names.split()], 1)


# Gaussians


@pytest.mark.parametrize("seconds", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("background", [True, False])
def test_a_ply_is_the_scene_at_its_moment(scene, tmp_path, seconds, background):
    read = plyfile.PlyData.read(scene.export_ply(tmp_path / "a.ply", seconds, background=background))
    vertex, g = read["vertex"], scene.gaussians
    kept = torch.ones(len(g), dtype=bool) if background else g.kind == LIDAR
    assert [p.name for p in vertex.properties] == PLY_COLUMNS
    assert {p.val_dtype for p in vertex.properties} == {"f4"}
    assert len(vertex) == int(kept.sum())
    assert np.array_equal(columns(vertex, "x y z"), scene.means_at(seconds / scene.duration)[kept].numpy())
    assert np.allclose(0.5 + SH_C0 * columns(vertex, "f_dc_0 f_dc_1 f_dc_2"), g.colours[kept], atol=1e-6)
    assert np.array_equal(np.asarray(vertex["opacity"]), g.opacity_logits[kept].numpy())
    drawn = torch.where(g.kind[kept, None] == LIDAR, g.scales[kept].clamp_max(1.0), g.scales[kept])
    assert np.allclose(np.exp(columns(vertex, "scale_0 scale_1 scale_2")), drawn, rtol=1e-5)
    assert np.allclose(columns(vertex, "rot_0 rot_1 rot_2 rot_3"), g.unit_quats[kept], atol=1e-6)
    assert not columns(vertex, "nx ny nz").any()


def test_a_ply_renders_as_the_scene_does(scene, tmp_path):
    vertex = plyfile.PlyData.read(scene.export_ply(tmp_path / "a.ply", 0.4))["vertex"]
    tensors = {
        name: torch.as_tensor(columns(vertex, wanted))
        for name, wanted in dict(
            means="x y z",
            quats="rot_0 rot_1 rot_2 rot_3",
            scales="scale_0 scale_1 scale_2",
            f_dc="f_dc_0 f_dc_1 f_dc_2",
            opacity="opacity",
        ).items()
    }
    g = replace(
        scene.gaussians,
        means=tensors["means"],
        quats=tensors["quats"],
        log_scales=scale_inv(tensors["scales"].exp()),
        opacity_logits=tensors["opacity"][:, 0],
        colour_logits=torch.logit(0.5 + SH_C0 * tensors["f_dc"]),
    )
    view = scene.camera("front", 0.4)
    again = replace(scene, gaussians=g, velocity=None).render(view)
    assert (again.rgb - scene.render(view).rgb).abs().max() < 1e-3
    elsewhere = scene.render(scene.camera("front", 0.4), replace(scene.render_cfg)).rgb
    late = replace(scene, gaussians=g, velocity=None).render(replace(view, t=view.t + 0.5))
    assert (late.rgb - elsewhere).abs().max() < 1e-3  # what is exported stands still


def decoded(path):
    "Positions, natural logarithms of scales, colours and opacities of a compressed .ply, and its quaternions."
    read = plyfile.PlyData.read(path)
    chunk, vertex = read["chunk"], read["vertex"]
    of = np.arange(len(vertex)) // 256

    def boxed(packed, names, bits=(11, 10, 11), shifts=(21, 11, 0)):
        share = np.stack([packed >> s & (1 << b) - 1 for b, s in zip(bits, shifts)], 1) / [(1 << b) - 1 for b in bits]
        low, high = (np.stack([np.asarray(chunk[f"{end}_{n}"])[of] for n in names], 1) for end in ("min", "max"))
        return low + share * (high - low)

    packed = {name: np.asarray(vertex[f"packed_{name}"]).astype(np.int64) for name in ("position", "scale", "color")}
    colours = boxed(packed["color"], "rgb", (8, 8, 8), (24, 16, 8))
    return (
        boxed(packed["position"], "xyz"),
        boxed(packed["scale"], ["scale_x", "scale_y", "scale_z"]),
        colours,
        (packed["color"] & 255) / 255,
    )


def test_a_compressed_ply_is_the_scene_rounded(scene, tmp_path):
    path = scene.export_ply(tmp_path / "a.compressed.ply", 0.4, compressed=True, background=False)
    positions, log_scales, colours, opacities = decoded(path)
    splats = splats_of(scene, 0.4, background=False)
    visible = torch.sigmoid(splats.opacity) > 1 / 255
    assert len(positions) == int(visible.sum())
    off, which = nearest(positions, splats.means)
    assert off.max() < 0.05 and len(set(which.tolist())) == len(positions)
    assert np.allclose(log_scales, splats.log_scales[which], atol=0.01)
    assert np.allclose(colours, 0.5 + SH_C0 * splats.f_dc[which], atol=0.01)
    assert np.allclose(opacities, torch.sigmoid(splats.opacity)[which], atol=0.01)
    assert "sh" not in [e.name for e in plyfile.PlyData.read(path).elements]


@pytest.mark.parametrize("n", [1, 256, 257])
def test_gaussians_that_are_alike_are_compressed_too(scene, tmp_path, n):
    g = scene.gaussians[:n]
    g = replace(g, log_scales=torch.zeros(n, 3), colour_logits=torch.zeros(n, 3))
    alike = replace(scene, gaussians=g, velocity=None)
    positions, log_scales, colours, _ = decoded(alike.export_ply(tmp_path / "a.ply", compressed=True))
    assert len(positions) == n
    assert np.allclose(log_scales, np.log(np.log(2.0)), atol=1e-5)
    assert np.allclose(colours, 0.5, atol=1e-5)
    assert nearest(positions, g.means).values.max() < 0.05


def test_a_splat_has_records_of_32_bytes(scene, tmp_path):
    content = scene.export_splat(tmp_path / "a.splat", 0.4).read_bytes()
    assert len(content) == 32 * len(scene)
    layout = [("xyz", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("rot", "u1", 4)]
    records = np.frombuffer(content, np.dtype(layout))
    splats = splats_of(scene, 0.4)
    off, which = nearest(records["xyz"], splats.means)
    assert off.max() == 0 and sorted(which.tolist()) == list(range(len(scene)))
    assert np.array_equal(records["xyz"], splats.means[which].numpy())
    assert np.allclose(records["scale"], splats.log_scales[which].exp(), rtol=1e-5)
    rgba = torch.cat([0.5 + SH_C0 * splats.f_dc, torch.sigmoid(splats.opacity)[:, None]], 1)[which]
    assert abs(records["rgba"] / 255 - rgba.numpy()).max() < 1.01 / 255
    turns = (records["rot"].astype(float) - 128) / 128
    turns /= np.linalg.norm(turns, axis=1, keepdims=True)
    assert abs((turns * splats.quats[which].numpy()).sum(1)).min() > 0.999


def test_a_sequence_shows_what_moves(scene, tmp_path):
    files = scene.export_ply_sequence(tmp_path / "steps", fps=4, background=False)
    assert [f.name for f in files] == [f"frame{k:04d}.ply" for k in range(1, 6)]
    tracks = np.stack([columns(plyfile.PlyData.read(f)["vertex"], "x y z") for f in files])
    moved = tracks[-1] - tracks[0]
    own = scene.gaussians.kind == LIDAR
    assert np.allclose(moved, scene.velocity[own, 0].numpy(), atol=1e-4)  # one second


# cameras, depth, flow


def test_cameras_are_those_of_the_scene(scene, tmp_path):
    path = scene.export_cameras(tmp_path / "transforms.json", images=True, ply="a.ply")
    read = json.loads(path.read_text())
    front = scene.cameras["front"]
    assert read["camera_model"] == "OPENCV" and read["ply_file_path"] == "a.ply"
    assert all(read[k] == 0 for k in ("k1", "k2", "p1", "p2"))
    for frame, pose in zip(read["frames"], front.poses, strict=True):
        assert np.allclose(np.array(frame["transform_matrix"]) @ OPENGL, pose)
        lens = dict(fl_x=60, fl_y=60, cx=40, cy=30, w=80, h=60)
        assert {name: frame[name] for name in lens} == lens
        with Image.open(tmp_path / frame["file_path"]) as picture:
            assert picture.size == (80, 60)
    one = read["frames"][3]
    shown = np.asarray(Image.open(tmp_path / one["file_path"])) / 255
    drawn = scene.render(scene.camera("front", one["time"])).rgb[0].clamp(0, 1).numpy()
    assert abs(shown - drawn).max() <= 1.01 / 255


def test_depth_is_a_16_bit_png_times_256(scene, tmp_path):
    read = np.asarray(Image.open(scene.export_depth(tmp_path / "d.png", "front", 0.4)))
    metres = np.load(scene.export_depth(tmp_path / "d.npy", "front", 0.4))
    assert read.dtype == np.uint16 and metres.dtype == np.float32 and read.shape == metres.shape == (60, 80)
    known = (metres > 0) & (metres < 255)
    assert known.mean() > 0.2 and abs(read[known] / 256 - metres[known]).max() <= 0.5 / 256 + 1e-6
    assert not read[~known].any()


def test_depth_beyond_what_16_bits_hold_is_no_value(scene, tmp_path):
    away = replace(scene, gaussians=replace(scene.gaussians, means=scene.gaussians.means + torch.tensor([400.0, 0, 0])))
    near, far = (np.load(s.export_depth(tmp_path / "d.npy", "front")) for s in (scene, away))
    read = np.asarray(Image.open(away.export_depth(tmp_path / "d.png", "front")))
    assert near.max() < 100 and far.max() > 300 and not read[far > 256].any()


def test_optical_flow_is_that_of_a_plane(tmp_path):
    "A camera that drives towards a standing wall sees it grow about the principal point."
    scene = made_scene()
    y, z = torch.meshgrid(torch.linspace(-14, 14, 94), torch.linspace(-9, 12, 70), indexing="ij")
    wall = torch.stack([torch.full_like(y, 12.0), y, z], -1).reshape(-1, 3)
    g = gaussians_from(wall, torch.full((len(wall),), 0.3), torch.rand(len(wall), 3), torch.zeros(len(wall)), 0)
    standing = replace(scene, gaussians=g, velocity=None)
    flow = np.load(standing.export_optical_flow(tmp_path / "f.npy", "front", 0.0, step=0.5))
    driven = 0.8 * 7 * 0.5
    u, v = np.meshgrid(np.arange(80) + 0.5 - 40, np.arange(60) + 0.5 - 30)
    grows = 12.0 / (12.0 - driven) - 1
    valid = flow[..., 2] > 0
    assert flow.dtype == np.float32 and valid.mean() > 0.9
    off = flow[..., :2] - grows * np.stack([u, v], -1)
    assert abs(off[valid]).max() < 0.75  # px, half a Gaussian


def test_scene_flow_counts_the_vehicle_as_argoverse_does(scene, tmp_path):
    rows = np.load(scene.export_scene_flow(tmp_path / "a.npy", 0.3, step=0.1))
    world = np.load(scene.export_scene_flow(tmp_path / "w.npy", 0.3, step=0.1, world=True))
    n = int((scene.gaussians.kind == LIDAR).sum())
    assert rows.dtype.names == ("x", "y", "z", "flow_tx_m", "flow_ty_m", "flow_tz_m", "is_dynamic") and len(rows) == n
    moving = np.arange(n) % 3 == 0
    assert np.array_equal(rows["is_dynamic"], moving)
    assert np.allclose(rows["flow_tx_m"], -0.56, atol=1e-3)  # the vehicle drives 5.6 m/s forward
    assert np.allclose(world["flow_tx_m"], 0, atol=1e-4)
    for r in (rows, world):
        assert np.allclose(r["flow_ty_m"], np.where(moving, 0.4, 0.0), atol=1e-3)


@pytest.mark.parametrize("ending", ["npy", "pcd"])
def test_a_sweep_meets_a_wall_where_the_beams_do(tmp_path, ending):
    scene = made_scene()
    y, z = torch.meshgrid(torch.linspace(-30, 30, 240), torch.linspace(-8, 10, 90), indexing="ij")
    wall = torch.stack([torch.full_like(y, 20.0), y, z], -1).reshape(-1, 3)
    g = gaussians_from(wall, torch.full((len(wall),), 0.2), torch.rand(len(wall), 3), torch.zeros(len(wall)), 0)
    g = replace(g, opacity_logits=torch.full((len(wall),), 4.0))
    standing = replace(scene, gaussians=g, velocity=None)
    cfg = SweepConfig(lowest=-10.0, highest=10.0, beams=8, azimuth_step=1.0)
    path = standing.export_lidar(tmp_path / f"a.{ending}", 0.5, cfg)
    if ending == "npy":
        points = np.load(path)
    else:
        header, _, body = path.read_bytes().partition(b"DATA binary\n")
        assert b"FIELDS x y z" in header
        points = np.frombuffer(body, "<f4").reshape(-1, 3)
    beam = points - np.array(cfg.origin)
    azimuth = np.degrees(np.arctan2(beam[:, 1], beam[:, 0]))
    elevation = np.degrees(np.arctan2(beam[:, 2], np.hypot(beam[:, 0], beam[:, 1])))
    ahead = abs(azimuth) < 40
    assert np.allclose(points[ahead, 0], 20.0 - 5.6 * 0.5, atol=0.05)  # the vehicle drove towards it
    assert np.allclose(points[:, 0], 20.0 - 5.6 * 0.5, atol=1.0)  # seen at a flat angle
    assert np.allclose(azimuth, azimuth.round(), atol=1e-3) and azimuth.min() < -45 < 45 < azimuth.max()
    steps = (elevation + 10) / (20 / 7)
    assert np.allclose(steps, steps.round(), atol=1e-3)


# what cannot be done


FAULTS = [
    (lambda s, d: s.export_ply(d / "a.txt"), "does not end in .ply; name the file so."),
    (lambda s, d: s.export_splat(d / "a.ply"), "does not end in .splat; name the file so."),
    (lambda s, d: s.export_ply(d / "a.ply", 7.0), "seconds: is 7.0; choose a moment from -0.11 to 1.11 s"),
    (lambda s, d: s.export_ply(d / "a.ply", float("nan")), "seconds: is nan; choose a moment"),
    (lambda s, d: s.export_ply(d / "a.ply", "now"), "seconds: is now; choose a moment"),
    (lambda s, d: s.export_ply_sequence(d / "steps", fps=0), "fps: is 0; choose a rate above 0"),
    (lambda s, d: s.export_depth(d / "a.jpg", "front"), "does not end in .png or .npy; name the file so."),
    (lambda s, d: s.export_depth(d / "a.png", "roof"), "camera: 'roof' is not in this scene; choose from front."),
    (lambda s, d: s.export_depth(d / "a.png", "front", 9.0), "seconds: is 9.0; choose a moment"),
    (lambda s, d: s.export_optical_flow(d / "a.png", "front"), "does not end in .npy; name the file so."),
    (lambda s, d: s.export_optical_flow(d / "a.npy", "front", 1.0, step=1.0), "seconds: is 2.0; choose a moment"),
    (lambda s, d: s.export_scene_flow(d / "a.npy", 9.0), "seconds: is 9.0; choose a moment"),
    (lambda s, d: s.export_cameras(d / "a.json", ["roof"]), "camera: 'roof' is not in this scene; choose from front."),
    (lambda s, d: s.export_lidar(d / "a.txt"), "does not end in .pcd or .npy; name the file so."),
    (lambda s, d: s.export_lidar(d / "a.npy", 9.0), "seconds: is 9.0; choose a moment"),
    (lambda s, d: s.export_cameras(d / "a.txt"), "does not end in .json; name the file so."),
    (lambda s, d: replace(s, cameras={}).export_scene_flow(d / "a.npy"), "camera: this scene has no recorded cameras"),
    (lambda s, d: replace(s, gaussians=s.gaussians[s.gaussians.kind == BACKGROUND], velocity=None).export_ply(
        d / "a.ply", background=False), "scene: has no Gaussian to export"),
]  # fmt: skip


@pytest.mark.parametrize("wish, sentence", FAULTS, ids=[f"{k}" for k in range(len(FAULTS))])
def test_what_cannot_be_exported_is_said_in_a_sentence(scene, tmp_path, wish, sentence):
    with pytest.raises(DataError) as e:
        wish(scene, tmp_path)
    assert sentence in str(e.value) and "\n" not in str(e.value) and str(e.value).endswith(".")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_value_that_is_not_finite_is_not_exported(scene, tmp_path):
    means = scene.gaussians.means.clone()
    means[3] = float("nan")
    broken = replace(scene, gaussians=replace(scene.gaussians, means=means))
    with pytest.raises(DataError, match="scene: holds 3 values that are not finite; reconstruct it again"):
        broken.export_ply(tmp_path / "a.ply")


def test_a_folder_with_files_is_left_alone(scene, tmp_path):
    (tmp_path / "frame0009.ply").write_text("of another export")
    with pytest.raises(DataError, match="is not empty; choose an empty folder."):
        scene.export_ply_sequence(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["frame0009.ply"]


def test_a_place_that_cannot_be_written_is_said(scene, tmp_path):
    (tmp_path / "a").write_text("a file, no folder")
    for wish in (scene.export_ply, scene.export_splat):
        with pytest.raises(DataError, match="could not be written because"):
            wish(tmp_path / f"a/b.{'ply' if wish == scene.export_ply else 'splat'}")


def test_without_gsplat_a_plain_ply_is_written(scene, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gsplat", None)
    scene.export_ply(tmp_path / "a.ply")
    with pytest.raises(DataError, match="gsplat is not installed; run `pip install gsplat`, or export a plain .ply."):
        scene.export_splat(tmp_path / "a.splat")
