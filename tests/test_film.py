"""Films and camera paths: what cannot be filmed is said in one sentence and leaves no file; what is filmed is what was
asked for."""

import sys
from dataclasses import replace
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
import flux4d.mp4
from flux4d.files import DataError
from flux4d.scene_commands import film_main
from flux4d.frames import ClipTime, se3
from flux4d.gaussians import gaussians_from
from flux4d.mp4 import read_film, write_film
from flux4d.paths import PATHS, FilmPath, path_of, path_through, recorded_path
from flux4d.scene import CameraPath, Scene


@pytest.fixture(scope="module")
def scene():
    "A wall of random colours in front of a vehicle that drives a curve; a camera looks ahead, another to the left."
    rng = torch.Generator().manual_seed(0)
    means = torch.rand(400, 3, generator=rng) * torch.tensor([30.0, 20.0, 5.0]) + torch.tensor([5.0, -10, 0])
    g = gaussians_from(means, torch.full((400,), 0.5), torch.rand(400, 3, generator=rng), torch.zeros(400), 0)
    velocity = torch.zeros(400, 1, 3)
    velocity[::2, 0, 1] = 3.0
    ahead = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    aside = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    angles = np.linspace(0, 0.3, 8)
    turns = Rotation.from_euler("z", angles[:, None]).as_matrix()
    vehicle = [se3(R, np.array([20 * np.sin(a), 20 * (1 - np.cos(a)), 0])) for R, a in zip(turns, angles)]
    K = np.array([[60.0, 0, 40], [0, 60, 30], [0, 0, 1]])

    def camera(axes):
        poses = np.stack([T @ se3(axes, np.array([0.5, 0, 1.5])) for T in vehicle])
        return CameraPath(K, poses, np.linspace(0, 1, 8), 60, 80)

    return Scene(g, velocity, ClipTime(10.0, 11.0), np.eye(4), dict(front=camera(ahead), left=camera(aside)))


def grey(count, size=(32, 48)):
    return (np.full((*size, 3), 9 * k, np.uint8) for k in range(count))


# writing


def test_a_film_is_what_browsers_play(tmp_path):
    film = read_film(write_film(tmp_path / "new/a.mp4", grey(12), fps=24))
    assert (film.codec, film.pixels, film.fps) == ("h264", "yuv420p", 24.0)
    assert sum(1 for _ in film.frames) == 12


@pytest.mark.parametrize("size", [(33, 48), (32, 49), (17, 17)])
def test_odd_sizes_become_even(tmp_path, size):
    frames = list(read_film(write_film(tmp_path / "a.mp4", grey(2, size), fps=5)).frames)
    assert frames[0].shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_film_that_breaks_off_leaves_what_was_there(tmp_path, error):
    path = write_film(tmp_path / "a.mp4", grey(3), fps=5)
    before = path.read_bytes()

    def broken():
        yield from grey(2)
        raise error

    with pytest.raises(error):
        write_film(path, broken(), fps=5)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and path.read_bytes() == before


def test_a_film_that_lacks_frames_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(flux4d.mp4, "count_frames", lambda path: 2)
    with pytest.raises(DataError, match="a.mp4: could not be encoded completely; free some space and make it again."):
        write_film(tmp_path / "a.mp4", grey(3), fps=5)
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_stops_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(flux4d.mp4, "_OUTPUT", ["-f", "no_such_format"])
    with pytest.raises(DataError, match="a.mp4: could not be encoded completely; free some space and make it again."):
        write_film(tmp_path / "a.mp4", grey(300, (256, 256)), fps=5)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "a").write_text("a file, no folder")
    with pytest.raises(DataError, match="could not be written because"):
        write_film(tmp_path / "a/b.mp4", grey(2), fps=5)


def test_a_missing_ffmpeg_is_said_with_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(DataError, match="imageio-ffmpeg is not installed; run `pip install imageio-ffmpeg`."):
        write_film(tmp_path / "a.mp4", grey(2), fps=5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"text", b"\0\0\0\x20ftypisom" + b"\0" * 40])
def test_a_file_that_is_no_film_is_said(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(DataError, match="a.mp4: cannot be read as a film; make it again."):
        read_film(tmp_path / "a.mp4")


def test_a_film_that_is_not_there_is_said(tmp_path):
    with pytest.raises(DataError, match="a.mp4: is missing; give the path of a film."):
        read_film(tmp_path / "a.mp4")


# paths


@pytest.mark.parametrize("name", PATHS)
def test_every_path_is_filmed(scene, tmp_path, name):
    film = read_film(scene.film(tmp_path / "a.mp4", name, fps=2, size=32))
    frames = list(film.frames)
    assert len(frames) == len(path_of(scene, name).moments(2)) and frames[0].shape == (24, 32, 3)


@pytest.mark.parametrize("camera", ["front", "left"])
def test_a_lane_shift_goes_to_the_vehicles_left(scene, camera):
    "In a curve, and for a camera that looks aside."
    recorded, shifted = recorded_path(scene, camera), PATHS["lane_shift"](scene, camera, left=2.5)
    ahead = recorded_path(scene, "front")
    for k in (5, 6, 7):
        offset = shifted.keys[k].pose[:3, 3] - recorded.keys[k].pose[:3, 3]
        assert np.allclose(offset, -2.5 * ahead.keys[k].pose[:3, 0], atol=1e-9)
        assert np.array_equal(shifted.keys[k].pose[:3, :3], recorded.keys[k].pose[:3, :3])


def test_a_list_is_a_mixture(scene):
    parts = [recorded_path(scene), "birds_eye", "front"]
    path = path_of(scene, parts)
    assert path.duration > 3.0  # three seconds and the transitions
    assert [key.at for key in path.keys] == sorted(key.at for key in path.keys)


def test_a_path_through_views_takes_their_moments(scene):
    path = path_through(scene, [scene.camera("front", s) for s in (0.1, 0.9, 0.4)], seconds=2.0)
    assert np.allclose([key.seconds for key in path.keys], [0.1, 0.9, 0.4], atol=1e-6)
    assert np.allclose([key.at for key in path.keys], [0.0, 1.0, 2.0])


def test_a_single_view_is_a_film_of_one_frame(scene, tmp_path):
    path = path_through(scene, [scene.camera("front", 0.5)])
    assert sum(1 for _ in read_film(scene.film(tmp_path / "a.mp4", path, size=32)).frames) == 1


@pytest.mark.parametrize("layers", ["depth", ("rgb", "depth"), ("rgb", "depth", "speed", "velocity")])
def test_layers_stand_in_a_grid(scene, tmp_path, layers):
    film = scene.film(tmp_path / "a.mp4", "fixed", layers, fps=2, size=64)
    frame = next(read_film(film).frames)
    columns = min(len(layers), 2) if isinstance(layers, tuple) else 1
    assert frame.shape[1] == 64 * columns and frame.shape[0] > 48


def broken(path, **change):
    "A path whose third key frame is changed."
    keys = list(path.keys)
    keys[2] = keys[2]._replace(**change)
    return replace(path, keys=tuple(keys))


FAULTS = [
    (lambda s, f: s.film(f, "roof"), "path: 'roof' is none; choose from recorded, lane_shift"),
    (lambda s, f: s.film(f, []), "path: is 'list'; give a FilmPath, a name or a list of them."),
    (lambda s, f: s.film(f, 7), "path: is 'int'; give a FilmPath"),
    (lambda s, f: s.film(f, layers="colour"), "layers: 'colour' is none; choose from rgb, depth, speed, velocity."),
    (lambda s, f: s.film(f, layers=()), "layers: names none"),
    (lambda s, f: s.film(f, layers="error"), "layers: 'error' needs photos; call film_beside_photos"),
    (lambda s, f: s.film(f, fps=0), "fps: is 0; choose a rate above 0"),
    (lambda s, f: s.film(f, fps="30"), "fps: is 30; choose a rate above 0"),
    (lambda s, f: s.film(f, fps=float("inf")), "fps: is inf; choose a rate above 0"),
    (lambda s, f: s.film(f, seconds=-1), "factor: is -1.0; choose a number above 0."),
    (lambda s, f: s.film(f, size=5), "size: is 5x4 px; choose a width and a height from 16 to 4096 px."),
    (lambda s, f: s.film(f, size=(64, 9000)), "size: is 64x9000 px; choose a width and a height"),
    (lambda s, f: s.film(f, "orbit", ("rgb", "depth"), size=3000, fps=1), "size: makes a frame 6000 px wide; choose"),
    (lambda s, f: s.film(f.with_suffix(".avi")), "does not end in .mp4; name the film so."),
    (lambda s, f: s.film(f, recorded_path(s).timed(0.0, 3.0)), "path: shows the scene at 1.2"),
    (lambda s, f: s.film(f, broken(recorded_path(s), pose=np.full((4, 4), np.nan))), "path: a key frame holds a value"),
    (lambda s, f: s.film(f, broken(recorded_path(s), at=-1.0)), "path: its key frames are not in the order of"),
    (lambda s, f: s.film(f, FilmPath((), 60, 80)), "path: has no key frame; give at least one."),
    (lambda s, f: replace(s, cameras={}).film(f), "camera: this scene has no recorded cameras; give"),
    (lambda s, f: path_through(s, []), "path: its views have 0 sizes; give at least one view, all of one size."),
    (lambda s, f: PATHS["orbit"](s, "roof"), "camera: 'roof' is not in this scene; choose from front, left."),
]  # fmt: skip


@pytest.mark.parametrize("wish, sentence", FAULTS, ids=[f"{k}" for k in range(len(FAULTS))])
def test_what_cannot_be_filmed_is_said_in_a_sentence(scene, tmp_path, wish, sentence):
    with pytest.raises(DataError) as e:
        wish(scene, tmp_path / "a.mp4")
    assert sentence in str(e.value) and "\n" not in str(e.value) and str(e.value).endswith(".")
    assert not list(tmp_path.iterdir())


def test_a_scene_without_cameras_is_filmed_through_views(scene, tmp_path):
    views = [scene.camera("front", s) for s in (0.0, 0.5)]
    bare = replace(scene, cameras={})
    assert bare.film(tmp_path / "a.mp4", path_through(bare, views, seconds=1.0), fps=2, size=32).is_file()


# the command


@pytest.mark.parametrize("words, sentence", [
    (["no.pt", "nowhere", "--log", "001"], "no.pt: does not exist"),
])  # fmt: skip
def test_the_command_says_what_is_wrong(words, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert film_main(words) == 1
    said = capsys.readouterr().out.strip()
    assert sentence in said and "\n" not in said
    assert not list(tmp_path.iterdir())


def test_the_command_has_an_example(capsys):
    with pytest.raises(SystemExit) as e:
        film_main(["--help"])
    assert e.value.code == 0 and "examples:\n  flux4d-film docs/scene/pandaset002.scene" in capsys.readouterr().out
