"The nine lines that a user writes, as 70_use prints them, and the files that they read and write."

import json
import re
import struct
import warnings
from dataclasses import fields, replace
from pathlib import Path
import numpy as np
import pytest
import torch
import flux4d
from flux4d.bookkeeping import log_identity
from flux4d.checkpoint import load_checkpoint, save_checkpoint, trained_entry, trained_frames
from flux4d.city.logs import fixture_city
from flux4d.config import Config, config_to_dict
from flux4d.evaluate import open_subject
from flux4d.files import DataError
from flux4d.gap_filling import InitConfig
from flux4d.lazy_methods import patched_methods
from flux4d.model import build_model, load_model
from flux4d.notebooks import read_notebooks
from flux4d.predictor import PredictorConfig
from flux4d.records import repo_root
from flux4d.render import Cameras
from flux4d.scene import Scene
from flux4d.tensor_file import TensorFile, write_tensors
from flux4d.unet import UNetConfig
from flux4d.paths import recorded_path
from flux4d.weights import averaged_weights, read_weights, save_weights, weights_main

ROOT = repo_root(Path(__file__).parent)


def small_config():
    "A network that runs in a second."
    small = UNetConfig(widths=(8, 16), blocks=1)
    return Config(init=InitConfig(fill_blocks=(64, 32)), model=PredictorConfig(unet=small, hidden=16))


def small_checkpoint(folder):
    "What a run leaves of an untrained network whose heads are not zero."
    model = build_model(small_config()).eval()
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn(p.shape, generator=gen)
    log = flux4d.PandaSet(fixture_city())["001"]
    state = dict(
        model=model.state_dict(),
        ema={f"module.{k}": v for k, v in model.state_dict().items()} | dict(n_averaged=torch.tensor(7)),
        config=config_to_dict(model.cfg),
        kind=model.home,
        step=7,
        seconds=1.5,
        skipped=0,
        index_hash="ab",
        commit="0123abc",
        trained=trained_entry({("001", log_identity(log)): set(range(16))}),
    )
    return save_checkpoint(folder / "ckpt_best.pt", state)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def clip():
    return flux4d.PandaSet(fixture_city())["001"].clip(start=0)


@pytest.fixture(scope="module")
def scene(checkpoint, clip):
    return load_model(checkpoint, device="cpu").reconstruct(clip)


def nine_lines():
    "The program of 70_use, for a CPU and the city."
    page = next(nb for nb in read_notebooks(ROOT) if nb.path.name == "70_use.ipynb")
    code = re.search(r"## In nine lines\n\n```python\n(.*?)```", "\n".join(c["source"] for c in page.cells), re.S)[1]
    here = {'"ckpt_best.pt"': '"ckpt_best.pt", device="cpu"', "data/pandaset": str(fixture_city()), '"002"': '"001"'}
    for theirs, ours in here.items():
        assert theirs in code
        code = code.replace(theirs, ours)
    return code


def test_the_nine_lines(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt_best.pt").symlink_to(checkpoint.resolve())
    names = {}
    exec(nine_lines(), names)
    view, picture = names["view"], names["picture"]
    assert picture.shape == (1, view.height, view.width, 3) and picture.isfinite().all() and picture.std() > 0.05
    written = {p.name: p.stat().st_size for p in tmp_path.iterdir() if p.is_file() and not p.is_symlink()}
    assert set(written) == {"a.scene", "a.ply", "a.mp4"} and min(written.values()) > 10_000
    again = flux4d.load_scene("a.scene")
    assert equal_bits(again, names["scene"])  # pictures to rounding, because tensors lie otherwise in memory
    assert (again.render(view).rgb - names["scene"].render(view).rgb).abs().max() < 1e-3


# weights


def test_weights_give_the_same_scene_bit_for_bit(checkpoint, clip, scene, tmp_path):
    file = save_weights(tmp_path / "w.bin", read_weights(checkpoint))  # known by content, not by name
    again = flux4d.load(file, device="cpu").reconstruct(clip)
    assert torch.equal(again.gaussians.flat(), scene.gaussians.flat()) and torch.equal(again.velocity, scene.velocity)
    assert again.source["model"].endswith("w.bin, step 7")
    half = flux4d.load(save_weights(tmp_path / "h.bin", read_weights(checkpoint), half=True), device="cpu")
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert (half.reconstruct(clip).velocity - scene.velocity).abs().max() < 0.1
    assert (tmp_path / "h.bin").stat().st_size < 0.65 * file.stat().st_size < 0.65 * checkpoint.stat().st_size


def test_weights_say_what_they_were_trained_on(checkpoint, clip, tmp_path):
    file = save_weights(tmp_path / "w.safetensors", read_weights(checkpoint))
    frames = trained_frames(load_checkpoint(checkpoint))
    assert trained_frames(read_weights(file).history) == frames == {("001", log_identity(clip.log)): set(range(16))}
    for path in (checkpoint, file):
        subject = open_subject(str(path))
        assert (subject.steps, subject.seconds, subject.trained) == (7, 1.5, frames)


def test_the_weights_command(checkpoint, tmp_path, capsys):
    assert weights_main([str(checkpoint), str(tmp_path / "w.safetensors"), "--half"]) == 0
    assert re.fullmatch(r"w\.safetensors: [\d,]+ weights after 7 steps, [\d.]+ MB\n", capsys.readouterr().out)
    assert weights_main([str(tmp_path / "w.safetensors"), str(tmp_path / "again.safetensors")]) == 0
    capsys.readouterr()
    for wrong in ("none.pt", "."):
        assert weights_main([str(tmp_path / wrong), str(tmp_path / "x.safetensors")]) == 1
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and said.err.rstrip().endswith(".") and not said.out
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(SystemExit):
        weights_main(["--help"])
    assert "ckpt_best.pt flux4d.safetensors" in capsys.readouterr().out


def refused(call, *words):
    "One sentence that names all of these."
    with pytest.raises(DataError) as e:
        call()
    said = str(e.value)
    assert "\n" not in said and said.endswith((".", "?")), said
    for word in words:
        assert word in said, said


def test_files_given_in_the_wrong_place(checkpoint, scene, tmp_path):
    weights = save_weights(tmp_path / "w.bin", read_weights(checkpoint))
    saved = scene.save(tmp_path / "s.bin")
    refused(lambda: flux4d.load(saved, device="cpu"), "s.bin", "flux4d.load_scene")
    refused(lambda: flux4d.load_scene(weights), "w.bin", "read it with flux4d.load")
    refused(lambda: flux4d.load_scene(checkpoint), "not a readable flux4d-scene")
    refused(lambda: load_checkpoint(weights), "weights without an optimiser", "ckpt_step")
    refused(lambda: flux4d.load(checkpoint, device="cuda:9"), "device", "cuda:9")


@pytest.mark.parametrize("reader", [flux4d.load, flux4d.load_scene])
def test_broken_files(reader, checkpoint, scene, tmp_path):
    is_scene = reader is flux4d.load_scene
    path = scene.save(tmp_path / "a") if is_scene else save_weights(tmp_path / "a", read_weights(checkpoint))
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    first = next(name for name in header if name != "__metadata__")

    def with_header(change):
        "The same numbers under another header."
        other = json.loads(json.dumps(header))
        change(other)
        text = json.dumps(other).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + size :]

    faults = {
        "cut": whole[: len(whole) // 2],
        "without its end": whole[:-1],
        "with more": whole + b"\0",
        "header alone": whole[: 8 + size],
        "empty": b"",
        "eight bytes": whole[:8],
        "zeros": bytes(1000),
        "vast header": struct.pack("<Q", 2**62) + whole[8:],
        "no header text": with_header(lambda h: h.pop("__metadata__")),
        "no version": with_header(lambda h: h["__metadata__"].pop("version")),
        "odd version": with_header(lambda h: h["__metadata__"].update(version="²")),
        "newer": with_header(lambda h: h["__metadata__"].update(version="99")),
        "odd about": with_header(lambda h: h["__metadata__"].update(about="[" * 5000)),
        "about a list": with_header(lambda h: h["__metadata__"].update(about="[1]")),
        "about nothing": with_header(lambda h: h["__metadata__"].update(about="{}")),
        "other shape": with_header(lambda h: h[first].update(shape=[1, *h[first]["shape"]])),
        "more than there is": with_header(lambda h: h[first].update(shape=[10**12])),
        "unknown type": with_header(lambda h: h[first].update(dtype="Q7")),
        "a tensor less": with_header(lambda h: h.pop(first)),
        "another program's": b"solid cube\n",
    }
    for name, data in faults.items():
        (tmp_path / "odd").write_bytes(data)
        refused(lambda: reader(tmp_path / "odd"), "odd")
        assert name
    numbers = bytearray(whole)
    float_tensor = "velocity" if is_scene else first
    at = 8 + size + header[float_tensor]["data_offsets"][0]
    numbers[at : at + 4] = b"\xff" * 4  # NaN
    (tmp_path / "odd").write_bytes(bytes(numbers))
    refused(lambda: reader(tmp_path / "odd"), "odd", "NaN")
    refused(lambda: reader(tmp_path), tmp_path.name)


# scenes


def equal_bits(a, b):
    "Whether two scenes are equal in all their tensors and numbers."
    tensors = [(getattr(a.gaussians, o.name), getattr(b.gaussians, o.name)) for o in fields(a.gaussians)]
    tensors += [(a.velocity, b.velocity)]
    arrays = [(a.ego0, b.ego0)] + [
        pair for name in a.cameras for pair in zip(a.cameras[name][:3], b.cameras[name][:3])
    ]
    sizes = [{name: path[3:] for name, path in x.cameras.items()} for x in (a, b)]
    plain = (a.time, a.source, a.render_cfg) == (b.time, b.source, b.render_cfg) and sizes[0] == sizes[1]
    same_tensors = all(x.dtype == y.dtype and torch.equal(x, y) for x, y in tensors)
    return plain and same_tensors and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in arrays)


def test_a_scene_comes_back_bit_for_bit(scene, tmp_path):
    again = flux4d.load_scene(scene.save(tmp_path / "a.scene"))
    assert equal_bits(scene, again)
    assert equal_bits(scene, flux4d.load_scene(again.save(tmp_path / "b.scene")))
    needs_gradient = replace(scene, velocity=scene.velocity.clone().requires_grad_())
    assert equal_bits(scene, flux4d.load_scene(needs_gradient.save(tmp_path / "c.scene")))


def test_a_scene_that_cannot_be_written_leaves_nothing(scene, tmp_path):
    odd = scene.gaussians.map(torch.clone)
    odd.means[3, 1] = float("inf")
    refused(lambda: replace(scene, gaussians=odd).save(tmp_path / "a.scene"), "a.scene", "gaussians.means")
    refused(lambda: replace(scene, source=dict(made={1, 2})).save(tmp_path / "a.scene"), "JSON")
    refused(lambda: replace(scene, velocity=scene.velocity + 1e6).save(tmp_path / "a.scene", half=True), "half")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    refused(lambda: scene.save(tmp_path / "file/a.scene"), "could not be written")


def test_an_older_reader_refuses_what_it_does_not_know(scene, tmp_path):
    file = write_tensors(tmp_path / "a", TensorFile({}, {}), "flux4d-scene", 2)
    refused(lambda: flux4d.load_scene(file), "version 2 of flux4d-scene", "pip install -U flux4d")


# what an interactive user sees


def test_objects_are_shown_in_one_line(scene, clip):
    picture = scene.render(scene.camera("front_camera").resized(width=64))
    path = recorded_path(scene, "front_camera")
    for shown in (scene, scene.gaussians, picture, path, clip, clip.log, flux4d.PandaSet(fixture_city())):
        assert "\n" not in repr(shown) and len(repr(shown)) < 200 and " object at 0x" not in repr(shown)
    assert f"{len(scene):,} Gaussians" in repr(scene) and "front_camera" in repr(scene)
    assert repr(flux4d.PandaSet(fixture_city())).endswith("1 log (001)")


def test_a_model_goes_where_the_gpu_is(checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr("flux4d.model.find_device", lambda device: asked.append(device) or "cpu")
    flux4d.load(checkpoint)
    flux4d.load(checkpoint, device="cpu")
    assert asked == ["", "cpu"]  # empty: the GPU where there is one


@pytest.mark.parametrize("device", ("cuda:64", "gpu", "cuda:x"))
def test_a_device_that_is_none(checkpoint, device):
    refused(lambda: flux4d.load(checkpoint, device=device), "device: is", "choose cpu", "leave it out")


# views and clips


def test_times_outside_the_clip(scene):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seconds in (0, 0.75, scene.duration, -0.1, scene.duration + 0.1, np.float64(0.5), torch.tensor(0.5)):
            scene.camera("front_camera", seconds=seconds)
    for seconds in (-1.0, 2 * scene.duration):
        refused(lambda: scene.camera("front_camera", seconds=seconds), "seconds: is", "beyond=True")
        refused(lambda: scene.export_ply("a.ply", seconds=seconds), "seconds: is")
        view = scene.camera("front_camera", seconds=seconds, beyond=True)
        assert scene.render(view.moved(left=1.0).turned(yaw=3).resized(0.5)).rgb.isfinite().all()
    for seconds in (float("nan"), -float("inf"), "now", None, [1, 2]):
        refused(lambda: scene.camera("front_camera", seconds=seconds), "seconds")
    refused(lambda: scene.camera("roof"), "'roof'", "front_camera")
    refused(lambda: replace(scene, cameras={}).camera("front_camera"), "without recorded cameras")


def test_what_a_clip_asks_for_is_what_is_read(checkpoint):
    log = flux4d.PandaSet(fixture_city())["001"]
    odd = (dict(lidar=3), dict(lidar=()), dict(cameras=()), dict(cameras="roof"), dict(start=-1), dict(start=1.5))
    for asked in odd:
        refused(lambda: log.clip(**asked), "")
    refused(lambda: flux4d.PandaSet(fixture_city())["999"], "choose one of 001")
    model = load_model(checkpoint, device="cpu")
    assert log.clip(lidar=0).input_lidar == (0,) and log.clip(cameras="front_camera").input_cameras == ("front_camera",)
    plain, named = (model.reconstruct(c) for c in (log.clip(), log.clip(cameras="front_camera", lidar=0)))
    assert torch.equal(plain.gaussians.flat(), named.gaussians.flat())


# methods that are imported when they are asked for


def test_methods_are_found_where_they_are_written(scene):
    for kind, made in ((Scene, scene), (Cameras, scene.camera("front_camera"))):
        for name, module in patched_methods(kind.__name__).items():
            assert name in dir(made)
            __import__(module)
            assert hasattr(kind, name), f"{module} does not give {kind.__name__}.{name}"
    with pytest.raises(AttributeError):
        scene.teleport
    assert {"load", "load_scene", "PandaSet"} <= set(dir(flux4d))


def test_averaged_weights_need_their_parts():
    refused(lambda: averaged_weights(dict(kind="flux4d.model:Flux4DBase", ema={}), "a.pt"), "a.pt", "config")
