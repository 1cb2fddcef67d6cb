"""Reports are pages that people open, made of records that may come from anywhere.

A name is shown and does nothing; nothing outside a run's folder is read; a record that is none ends in one sentence."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
import pytest
from flux4d.records import repo_root, runs_of_record
from flux4d.files import DataError
from flux4d.report_pages import (
    foreign_faults,
    read_record,
    report_main,
    side_by_side,
    to_html,
    write_report_pages,
)
from flux4d.report import report_text

ROOT = repo_root(Path(__file__).parent)
SOUND = next(
    (
        m
        for run in runs_of_record(ROOT)
        if (m := json.loads((run / "metrics.json").read_text(encoding="utf-8"))).get("videos")
        and not foreign_faults(m)
    ),
    None,
)
pytestmark = pytest.mark.skipif(SOUND is None, reason="no run of record with novel views is committed")
PIXEL = bytes.fromhex("ffd8ffe000104a46494600010100000100010000ffd9")  # begins and ends like a JPEG


@pytest.fixture
def record():
    "A sound record to spoil."
    return copy.deepcopy(SOUND)


@pytest.fixture
def run(tmp_path):
    "A run's folder with its five worst frames."
    folder = tmp_path / "run"
    (folder / "worst").mkdir(parents=True)
    for k in range(5):
        (folder / f"worst/{k}.jpg").write_bytes(PIXEL)
    return folder


def keep(folder, record):
    "Write a record as if it came from elsewhere."
    (folder / "metrics.json").write_text(
        record if isinstance(record, str) else json.dumps(record), encoding="utf-8"
    )
    return folder


class Page(HTMLParser):
    "The tags of a page and its text."

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


TAGS = set("html meta title style h1 h2 p table thead tbody tr th td ul li a img video strong code".split())
ATTRIBUTES = {
    "html": {"lang"},
    "meta": {"charset", "http-equiv", "content"},
    "a": {"href"},
    "img": {"alt", "src"},
    "video": {"controls", "loop", "muted", "preload", "src"},
    "th": {"style"},
    "td": {"style"},
}


def harmless(text):
    "A page that has nothing but what a report is made of."
    page = Page(text)
    assert {t for t, _ in page.tags} <= TAGS
    for tag, attrs in page.tags:
        assert set(attrs) <= ATTRIBUTES.get(tag, set()), (tag, attrs)
        assert not re.match(
            r"(?i)\s*(javascript|vbscript|file|https?):|//", attrs.get("href") or attrs.get("src") or ""
        ), attrs
        assert set(re.findall(r"[\w-]+:", attrs.get("style", ""))) <= {"text-align:"}
    return page


HOSTILE = [
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![x](https://example.org/a.png)",
    '" onmouseover="alert(1)',
    "<img src=x onerror=alert(1)>",
    "](javascript:alert(1)) [",
    "` <b> `",
    "a | b | c",
    "**bold** _it_",
    "&lt;i&gt;",
    "\\](javascript:alert(1))",
    "[a]: javascript:alert(1)",
    "<javascript:alert(1)>",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_shown_and_do_nothing(record, run, name):
    sound = harmless(to_html(report_text(record), run))
    clip = next(iter(record["per_clip"]))
    record["subject"] = record["evaluated_on"] = record["runtime"]["machine"] = record["comparable"] = record[
        "logs"
    ][0] = name
    for clips in (record["per_clip"], record["per_clip_flow"]):
        clips[name] = clips.pop(clip)
    record["worst"][0] |= dict(clip=name, camera=name, setting=name)
    record["scene_flow"]["labels"][name] = 7
    record["reasons"][name] = name
    record["videos"] = [f"videos/{name.replace('/', '')}.webp"]
    record["baselines"] = {
        name: copy.deepcopy(
            SOUND["baselines"].get("nearest")
            or dict(nvs=None, scene_flow=SOUND["zero_motion"]["scene_flow"], seconds_per_frame=0.0)
        )
    }
    page = harmless(to_html(report_text(record), run))

    def count(p, tag):
        return sum(t == tag for t, _ in p.tags)

    assert [count(page, t) for t in ("h1", "h2", "table", "script", "b")] == [
        count(sound, t) for t in ("h1", "h2", "table")
    ] + [0, 0]
    assert page.text.count(name.replace("`", "'")) >= 10  # as it is written, markup and all
    columns = {}
    for line in re.findall(r"<tr>.*?</tr>", to_html(report_text(record), run), re.S):
        columns.setdefault(len(re.findall("<t[dh]", line)), line)
    assert set(columns) <= {
        len(re.findall("<t[dh]", l))
        for l in re.findall(
            r"<tr>.*?</tr>",
            to_html(report_text(SOUND | dict(baselines=dict(x=record["baselines"][name]))), run),
            re.S,
        )
    }


FILMS = [
    "/etc/hostname",
    "../../secret.webp",
    "videos/../../secret.webp",
    "https://example.org/a.webp",
    "file:///etc/hostname",
    "javascript:alert(1).webp",
    "../../secret.mp4",
    "videos/../../secret.mp4",
    "https://example.org/a.mp4",
    "javascript:alert(1).mp4",
    "notes.txt",
]


@pytest.mark.parametrize("film", FILMS)
def test_a_film_lies_below_the_run(record, run, film):
    record["videos"] = [film]
    with pytest.raises(
        DataError,
        match=r"^run/metrics.json: videos: .* is no film below the run's folder; evaluate the run again",
    ):
        read_record(keep(run, record), whole=True)
    harmless(to_html(report_text(record), run))


def test_a_film_is_played_by_the_page(record, run):
    record["videos"] = ["videos/a film.mp4", 'videos/"onerror="alert(1).mp4']
    page = harmless(to_html(report_text(record), run))
    films = [a["src"] for t, a in page.tags if t == "video"]
    assert films == ["videos/a%20film.mp4", "videos/%22onerror%3D%22alert%281%29.mp4"]


def test_no_file_outside_is_embedded(record, run, tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(PIXEL[:-2] + b"a secret" + PIXEL[-2:])
    (run / "worst/0.jpg").unlink()
    (run / "worst/0.jpg").symlink_to(secret)  # a picture that leads out of the folder
    (run / "worst/1.jpg").write_text("no picture, a secret")  # and one that is none
    write_report_pages(run, record)
    page = harmless((run / "report.html").read_text(encoding="utf-8"))
    sources = [a["src"] for t, a in page.tags if t == "img"]
    assert sum(s.startswith("data:image/jpeg;base64,") for s in sources) == min(5, len(record["worst"])) - 2
    import base64

    assert not any(
        b"secret" in base64.b64decode(s.partition(",")[2]) for s in sources if s.startswith("data:")
    )


def test_pictures_are_embedded(record, run):
    write_report_pages(run, record)
    page = harmless((run / "report.html").read_text(encoding="utf-8"))
    assert sum(a["src"].startswith("data:image/jpeg") for t, a in page.tags if t == "img") == len(
        record["worst"]
    )
    assert [a["href"] for t, a in page.tags if t == "a"] == record["videos"]


def spoilt(path, value):
    "A record with one entry replaced."
    m = copy.deepcopy(SOUND)
    *up, last = path
    at = m
    for k in up:
        at = at[k]
    at[last] = value
    return m


FOREIGN = {
    "no json": ("{", "is no JSON"),
    "a list": ("[]", "no group of named values"),
    "a number": ("3", "no group of named values"),
    "null": ("null", "no group of named values"),
    "deep lists": ("[" * 100_000, "nested too deeply"),
    "deep dicts": ('{"a":' * 100_000, "nested too deeply"),
    "latin-1": ("caf\udce9", "is no JSON"),
    "runtime is text": ('{"runtime": "fast"}', "no group of named values"),
    "a mean is text": ('{"nvs": {"mean": "high"}}', "no number"),
    "infinite": ('{"nvs": {"mean": 1e999}}', "no number"),
    "huge": ('{"nvs": {"mean": 1' + "0" * 400 + "}}", "no number"),
}


@pytest.mark.parametrize("report", ([], ["--report"]), ids=("compared", "reported"))
@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_record_ends_in_a_sentence(run, capsys, name, report):
    text, says = FOREIGN[name]
    (run / "metrics.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert report_main([str(run), *report]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("run/metrics.json: ") and says in said and "\n" not in said and len(said) < 600
    assert not (run / "report.md").exists()


SPOILT = {
    "nvs": None,
    "scene_flow": [],
    "reasons": 3,
    "per_clip": {},
    "analysis": {},
    "worst": [{}],
    "source_frames": 0,
    "baselines": {"x": {}},
    "logs": "002",
    "subject": "two\nlines",
    "evaluated_on": "\x1b[31mred",
}


@pytest.mark.parametrize("key", SPOILT)
def test_a_spoilt_record_is_refused(run, key):
    with pytest.raises(
        DataError, match=r"^run/metrics.json: .*evaluate the run again with this version.$"
    ) as e:
        read_record(keep(run, spoilt([key], SPOILT[key])), whole=True)
    assert "\n" not in str(e.value) and "\x1b" not in str(e.value)


def paths(value, at=()):
    "Where the entries of a record are, of lists and of groups with free names the first."
    items = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    free = isinstance(value, list) or (
        at
        and at[-1]
        in ("per_clip", "per_clip_flow", "baselines", "labels", "reasons", "bucketed", "reference", "own")
    )
    for k, v in items[:1] if free else items:
        yield (*at, k)
        yield from paths(v, (*at, k))


def test_any_one_entry_may_be_wrong():
    "Whatever stands in an entry, the record is refused or the report is made."
    tried = refused = 0
    for n, path in enumerate(
        paths({k: v for k, v in SOUND.items() if k not in ("lift", "zero_velocity", "zero_motion")})
    ):
        m = spoilt(path, (None, -1, "", 10**400, [], 0, {"a": {}}, True)[n % 8])
        bad = foreign_faults(m)
        if not bad:
            report_text(m)
        if not foreign_faults(m, whole=False):
            side_by_side({"a": m})
        tried, refused = tried + 1, refused + bool(bad)
    assert refused > tried / 2


def test_a_report_replaces_reports_alone(record, run, capsys):
    keep(run, record)
    (run / "report.md").write_text("my own notes")
    assert report_main([str(run), "--report"]) == 1
    assert capsys.readouterr().err.startswith("run/report.md: is no report of a run; move it away first")
    assert (run / "report.md").read_text() == "my own notes"
    (run / "report.md").unlink()
    assert report_main([str(run / "metrics.json"), "--report"]) == 0  # by its file as well as by its folder
    assert report_main([str(run), "--report"]) == 0
    assert (run / "report.md").read_text(encoding="utf-8") == report_text(record)


def test_an_older_record_can_be_compared(record, run, capsys):
    for k in ("lpips", "per_clip_flow", "baselines"):
        record.pop(k)
    assert report_main([str(keep(run, record))]) == 0
    assert "nvs full interpolation psnr" in capsys.readouterr().out
    with pytest.raises(DataError, match="is missing"):
        read_record(run, whole=True)


@pytest.mark.parametrize("name", HOSTILE)
def test_tables_of_runs_show_names_as_text(tmp_path, record, name):
    "The README and the site have these tables."
    from markdown_it import MarkdownIt
    from flux4d.result_tables import RUN_COLUMNS, circumstances_line, run_row
    from flux4d.records import run_summary

    record["evaluated_on"] = record["runtime"]["machine"] = name
    (tmp_path / "run").mkdir()
    keep(tmp_path / "run", record)
    row = f"| {' | '.join(run_row(tmp_path / 'run', record))} |"
    columns = 3 + len(RUN_COLUMNS)  # name, trained, reconstruction
    head = "| " + " | ".join("a" * columns) + " |\n" + "| --- " * columns + "|\n"
    for text in (f"{circumstances_line(record)}\n\n{head}{row}", run_summary(tmp_path / "run")):
        page = Page(
            MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
        )  # as a site renders it
        assert {t for t, _ in page.tags} <= TAGS - {"a", "img"} | {"strong"} and all(
            set(a) <= {"style"} for _, a in page.tags
        )
        assert name.replace("`", "'") in page.text
    assert row.replace("\\|", "").count("|") == columns + 1
