"""The viewer, the page that needs no server, and the panel, as their users meet them: in a browser without a
network, and with input that is wrong."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
import numpy as np
import pytest
import torch
from PIL import Image
from flux4d.city.logs import fixture_city
from flux4d.files import DataError
from flux4d.headless import HeadlessBrowser, find_browser
from flux4d.html import CENTRE_BITS, as_stored, rounded
from flux4d.scene_commands import html_main
from flux4d.model import build_model
from flux4d.pandaset import PandaSet
from flux4d.panel import ScenePanel
from flux4d.presets import preset_config
from flux4d.records import repo_root
from flux4d.splat_groups import in_ego0, moving_rows, splat_groups, thinned
from flux4d.viewer import load_viser
from flux4d.scene_commands import view_main

ROOT = repo_root(Path(__file__).parent)
SIZE = 800, 400  # px of the browser, 320 of it the viewer's controls
TITLE = slice(0, 200), slice(0, 330)  # what the page's notice about software drawing covers


class SomeActor(NamedTuple):
    "What the viewer reads of an actor."

    index: int
    mask: torch.Tensor


@pytest.fixture(scope="module")
def scene():
    "A made-up street with its motion prior, thinned so that software draws it quickly."
    clip = PandaSet(fixture_city())["001"].clip(start=0)
    model = build_model(preset_config("draft", dict(data=dict(image_scale=1.0)))).eval()
    return thinned(model.reconstruct(clip), 0.4)


@pytest.fixture(scope="module")
def actors(scene):
    "One actor: all that moves."
    return [SomeActor(3, moving_rows(in_ego0(scene)))]


@pytest.fixture(scope="module")
def browser_there():
    "Skip where a scene cannot be looked at."
    try:
        load_viser()
        with HeadlessBrowser("about:blank"):
            pass
    except DataError as e:
        pytest.skip(str(e))


def seen(browser, columns):
    "The scene's part of the page, once two pictures in a row are the same."
    last = None
    for _ in range(20):
        picture = browser.picture()[:340, columns].astype(float)
        picture[TITLE] = 0
        if last is not None and np.abs(picture - last).max() == 0:
            return picture
        last = picture
        time.sleep(0.5)
    return picture


def change(a, b):
    "Share of pixels that are clearly different."
    return (np.abs(a - b).max(2) > 25).mean()


def drag(browser, slider, share):
    "Click a slider's track."
    box = browser.do(lambda page: page.locator(slider).first.bounding_box())
    at = box["x"] + share * box["width"], box["y"] + box["height"] / 2
    browser.do(lambda page: page.mouse.click(*at))


# in a browser


def test_the_viewer_answers_its_controls(scene, actors, browser_there):
    with scene.view(browser=False, actors=actors) as viewer, HeadlessBrowser(viewer.url, SIZE) as browser:
        browser.do(lambda page: page.get_by_role("button", name="jump there").wait_for())
        time.sleep(3)  # the page fades in
        start = seen(browser, slice(0, 470))
        drag(browser, ".mantine-Slider-root", 0.8)
        later = seen(browser, slice(0, 470))
        assert change(start, later) > 0.02
        assert abs(viewer.seconds - 0.8 * scene.duration) < 0.1
        browser.do(lambda page: page.get_by_role("checkbox", name="actor 3").click())
        without = seen(browser, slice(0, 470))
        assert change(later, without) > 0.01
        viewer.seek(0.0)
        still = seen(browser, slice(0, 470))
        assert change(still, without) < 0.005  # nothing that moves is left
        viewer.look_from("front_camera", left=2.0)
        assert change(seen(browser, slice(0, 470)), still) > 0.05
        assert viewer.screenshot(width=320).shape[1] == 320
        assert browser.errors == []


def test_the_page_needs_no_network(scene, actors, browser_there, tmp_path):
    path = scene.to_html(tmp_path / "scene.html", rate=4, actors=actors)
    assert [p.name for p in tmp_path.iterdir()] == ["scene.html"]
    with HeadlessBrowser(path.as_uri(), SIZE, offline=True) as browser:
        browser.do(lambda page: page.wait_for_selector('[data-scene-node="/actor 3"]'))
        time.sleep(2)
        browser.do(lambda page: page.keyboard.press("Space"))  # pause
        drag(browser, ".mantine-Slider-root", 0.02)
        start = seen(browser, slice(0, 510))
        drag(browser, ".mantine-Slider-root", 0.75)
        later = seen(browser, slice(0, 510))
        assert change(start, later) > 0.02
        eye = '[data-scene-node="/actor 3"] svg'
        browser.do(lambda page: page.locator(eye).nth(1).dispatch_event("mousedown"))
        without = seen(browser, slice(0, 510))
        assert change(later, without) > 0.01
        drag(browser, ".mantine-Slider-root", 0.02)
        assert change(seen(browser, slice(0, 510)), without) < 0.005  # nothing that moves is left
        assert browser.errors == []


# without a browser


def test_every_gaussian_is_sent_once(scene, actors):
    groups = splat_groups(scene, actors)
    assert sum(len(g.scene) for g in groups) == len(scene)
    assert {g.name for g in groups if g.moves} == {"actor 3"}
    overlapping = [*actors, SomeActor(4, actors[0].mask)]
    assert sum(len(g.scene) for g in splat_groups(scene, overlapping)) == len(scene)


def test_methods_of_a_viewer_without_a_browser(scene, actors):
    pytest.importorskip("viser")
    with scene.view(browser=False, actors=actors) as viewer:
        viewer.seek(scene.duration)
        assert viewer._panel.time.value == round(scene.duration, 2)
        sent = viewer.nodes["actor 3"].centers
        wanted = in_ego0(scene).means_at(1.0)[actors[0].mask].numpy()
        assert np.abs(sent - wanted).max() < 1e-3
        viewer.switch("actor 3", False)
        assert not viewer.nodes["actor 3"].visible and not viewer._panel.shown["actor 3"].value
        viewer.show("depth")
        assert viewer._panel.legend.visible and viewer._panel.layer.value == "depth"
        viewer.seek(0.0)
        viewer.play(speed=2.0)
        time.sleep(0.5)
        viewer.pause()
        assert viewer.seconds > 0
        faults = {
            "choose a time from 0 to 1.5": lambda: viewer.seek(9.0),
            "choose a time": lambda: viewer.seek(float("nan")),
            "choose from rgb, depth, velocity": lambda: viewer.show("normals"),
            "choose from actor 3, static": lambda: viewer.switch("actor 7", False),
            "choose from front_camera": lambda: viewer.look_from("rear_camera"),
            "choose a number above 0": lambda: viewer.play(speed=0),
            "no browser shows the scene": lambda: viewer.screenshot(),
        }
        for sentence, act in faults.items():
            with pytest.raises(DataError, match=sentence):
                act()


def test_bad_requests_end_in_a_sentence(scene, tmp_path):
    pytest.importorskip("viser")
    faults = {
        "choose one from 1 to 65535": lambda: scene.view(port=0, browser=False),
        "use 127.0.0.1": lambda: scene.view(host="203.0.113.7", browser=False),
        "choose steps a second": lambda: scene.to_html(tmp_path / "a.html", rate=0),
        "choose more than that": lambda: scene.to_html(tmp_path / "a.html", most=10),
    }
    for sentence, act in faults.items():
        with pytest.raises(DataError, match=sentence):
            act()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError):
        scene.to_html(tmp_path / "file/a.html", rate=4)


def test_without_viser_the_sentence_brings_it(scene, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "viser", None)
    for act in (lambda: scene.view(browser=False), lambda: scene.to_html(tmp_path / "a.html")):
        with pytest.raises(DataError, match=r"pip install 'viser>=1.0,<2'"):
            act()
    saved = str(scene.save(tmp_path / "a.scene"))
    assert view_main([saved]) == 1 and html_main([saved]) == 1
    assert capsys.readouterr().out.count("pip install") == 2
    assert scene.panel(actors=()).drawn == 1  # the panel does without


def test_without_playwright_or_chromium(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(DataError, match="apt-get install chromium|pip install playwright"):
        find_browser()
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    with pytest.raises(DataError, match="pip install playwright"):
        find_browser()


def test_a_browser_that_does_not_start(monkeypatch, browser_there):
    monkeypatch.setattr("shutil.which", lambda name: "/bin/false")
    with pytest.raises(DataError, match="does not start .*; install Chromium"):
        HeadlessBrowser("about:blank")


def test_a_taken_port_is_no_fault(scene):
    pytest.importorskip("viser")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with scene.view(port=port, browser=False, actors=()) as viewer:
            assert viewer.url != f"http://127.0.0.1:{port}"
            assert urllib.request.urlopen(viewer.url, timeout=10).status == 200


def test_what_cannot_move_has_no_steps(scene, tmp_path):
    pytest.importorskip("viser")
    path = scene.moving(None).to_html(tmp_path / "still.html", actors=())
    assert 0 < path.stat().st_size < 3e6


def test_rounding_is_bounded():
    x = np.float32([0.0, -1.0, 1e-3, 123.456, -2999.9, 1e-30])
    assert np.abs(rounded(x) - x).max() <= 3000 * 2.0**-CENTRE_BITS
    assert (rounded(x[:2]) == x[:2]).all()


def test_what_the_file_holds_is_what_was_measured(scene):
    stored = as_stored(in_ego0(scene)).gaussians
    g = in_ego0(scene).gaussians
    assert (stored.colours - g.colours).abs().max() <= 1 / 255 + 1e-3
    assert (stored.scales / g.scales - 1).abs().max() < 1e-3


# the command


def test_the_command_serves_until_it_is_interrupted(scene, tmp_path):
    pytest.importorskip("viser")
    scene.save(tmp_path / "a.scene")
    code = "import sys; from flux4d.scene_commands import view_main; sys.exit(view_main())"
    words = [sys.executable, "-c", code, str(tmp_path / "a.scene"), "--no-browser", "--no-actors"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:") and "end with Ctrl-C" in line, line
        assert urllib.request.urlopen(line.split()[0], timeout=10).status == 200
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(20) == 0 and rest == ""


def test_the_html_command(scene, tmp_path, capsys):
    pytest.importorskip("viser")
    scene.save(tmp_path / "a.scene")
    assert html_main([str(tmp_path / "a.scene"), "--out", str(tmp_path / "b.html"), "--rate", "4", "--no-actors"]) == 0
    assert "b.html" in capsys.readouterr().out and (tmp_path / "b.html").stat().st_size > 1e5
    assert html_main([str(tmp_path / "a.scene"), "--out", str(tmp_path / "c.html"), "--rate", "-1"]) == 1
    assert "choose steps a second" in capsys.readouterr().out and not (tmp_path / "c.html").exists()


@pytest.mark.parametrize("main", [view_main, html_main])
def test_help_shows_an_example(main, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0 and "examples:\n  flux4d-" in capsys.readouterr().out


# the panel


def test_the_panel_says_nothing(scene, actors, capsys):
    shown = scene.panel(actors=actors)
    shown.time.value = 0.5
    shown.layer.value = "velocity"
    assert capsys.readouterr() == ("", "")
    picture = Image.open(io.BytesIO(shown.image.value))
    assert picture.size == (480, 270)
    with pytest.raises(DataError, match="no recorded camera"):
        replace(scene, cameras={}).panel()


def test_the_panel_draws_a_share_first_and_ends_its_timer(scene):
    shown = ScenePanel(scene, width=160, quick_most=500)
    shown.time.value = 0.3
    shown.time.value = 0.6
    assert len(shown.shown_scene(quick=True)) == 500 and shown.drawn == 3
    shown._timer.join(20)
    assert shown.drawn == 4 and not shown._timer.is_alive()
