"""The site: its pages as they are written from the notebooks, and, where it was built, as a browser shows them offline.

`make docs` builds it; `FLUX4D_SITE=_docs pytest tests/test_site.py` then looks at nine pages in three widths, light
and dark."""

import json
import os
import re
from pathlib import Path
import pytest
from flux4d.chapters import SUBJECTS
from flux4d.config import config_to_dict, flattened
from flux4d.definitions import definitions
from flux4d.files import DataError
from flux4d.headless import find_browser
from flux4d.notebooks import Notebook, read_notebooks
from flux4d.presets import preset_config
from flux4d.reading_page import notebook_page, source_text
from flux4d.reference import config_groups, defined_names, field_comments, names_used
from flux4d.records import repo_root
from flux4d.scene_file import load_scene
from flux4d.site import page_name, site_link, write_site
from flux4d.site_check import built_page, raw_words, site_faults

ROOT = repo_root(Path(__file__).parent)
NOTEBOOKS = read_notebooks(ROOT)
PAGES = "index", "scene", "10_lift", "14_motion_prior", "50_refine", "api", "configuration", "gallery", "command_help"
PAGES += "how_it_works", "runs", "62_ablation"
WIDTHS = 390, 1280, 1920


# pages as they are written


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    "The pages of this repository, without those that import the model."
    out = tmp_path_factory.mktemp("site") / "pages"
    write_site(ROOT, out, reference=False)
    return out


def texts(pages):
    return {p.name: p.read_text(encoding="utf-8") for p in pages.glob("*.md")}


def test_every_notebook_and_text_has_a_page(pages):
    have = {p.name for p in pages.iterdir()}
    assert {f"{nb.path.stem}.md" for nb in NOTEBOOKS} <= have
    assert {page_name(f"docs/{p.name}") for p in (ROOT / "docs").glob("*.md")} <= have
    assert {"index.md", "runs.md", "gallery.md", "reference.md", "project.md", "tree.json", "names.json"} <= have


def test_every_page_hangs_in_the_tree_once(pages):
    tree = json.loads((pages / "tree.json").read_text())
    hung = [page for children in tree.values() for _, page in children]
    made_by_package = {"api", "command_help", "configuration"}
    assert sorted(set(hung)) == sorted(hung)
    assert {p.stem for p in pages.glob("*.md")} - {"index"} == set(hung) - made_by_package


def test_no_page_names_what_only_tools_need(pages):
    for name, text in texts(pages).items():
        code_apart = re.sub(r"(`{3,})[\s\S]*?\n\1|`[^`]*`", "", text)
        assert "<!--" not in code_apart, name
        assert not re.search(r"^#\| ", code_apart, re.M), name


def test_html_in_pages_is_closed(pages):
    "Each kind of element is opened as often as it is closed, outside code."
    for name, text in texts(pages).items():
        code_apart = re.sub(r"^(`{3,})[\s\S]*?^\1|`[^`\n]*`", "", text, flags=re.M)
        for tag in ("div", "details", "table", "figure"):
            opened, closed = len(re.findall(rf"<{tag}\b", code_apart)), code_apart.count(f"</{tag}>")
            assert opened == closed, (name, tag, opened, closed)


def test_every_picture_is_written_and_has_words(pages):
    for name, text in texts(pages).items():
        code_apart = re.sub(r"^(`{3,})[\s\S]*?^\1|`[^`\n]*`", "", text, flags=re.M)
        for words, picture in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", code_apart):
            assert words.strip(), (name, picture)
            assert (pages / picture).is_file(), (name, picture)


def test_a_name_is_defined_once_and_its_comments_are_shown(pages):
    places = [d.url for d in defined_names(NOTEBOOKS)]
    assert len(places) == len(set(places))
    text = (pages / "10_lift.md").read_text()
    assert 'id="flux4d.lift.lift_sweep"' in text
    assert "<td>rendered standard deviation per mean neighbour distance</td>" in text


def test_names_on_a_page_are_its_own_or_imported():
    lift = next(nb for nb in NOTEBOOKS if nb.path.stem == "10_lift")
    used = names_used(lift, defined_names(NOTEBOOKS))
    assert {"lift_sweep", "project", "Gaussians"} <= set(used)
    assert "Trainer" not in used


def test_the_gallery_has_pictures_of_the_parts_and_says_what_they_are(pages):
    text = (pages / "gallery.md").read_text()
    for digit in "01345":
        assert f"\n## {digit} " in text, digit
    assert "## 6 whole data set" in text and "(runs.md)" in text
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert len(captions) > 20 and all(len(re.sub("<.*?>", "", words)) > 15 for words in captions)


def test_the_kept_scene_is_small_and_says_where_it_comes_from():
    scene = load_scene(ROOT / "docs/scene/pandaset002.scene")
    assert (ROOT / "docs/scene/pandaset002.scene").stat().st_size <= 1_400_000
    assert scene.source["log"] == "002" and "CC BY 4.0" in scene.source["licence"]
    assert scene.source["reduced_from"] > 5 * len(scene) and "front_camera" in scene.cameras
    assert scene.future(1.0) == 0.0 and abs(scene.future(1.45) - 0.45) < 0.01  # its last input is at 1.0 s
    assert f"{len(scene):,} Gaussians" in (ROOT / "docs/scene.md").read_text()


def test_the_method_in_prose_is_linked_and_hangs_first_below_the_method(pages):
    for name in ("index.md", "method.md"):
        assert "(how_it_works.md)" in (pages / name).read_text()
    assert json.loads((pages / "tree.json").read_text())["method"][0][1] == "how_it_works"
    text = (pages / "how_it_works.md").read_text()
    assert text.count("$$") >= 2 * 15
    assert {f"{n}_" for n in ("10", "14", "20", "23", "24", "31", "50")} <= set(re.findall(r"\((\d\d_)", text))


def test_the_index_is_an_overview_and_the_results_come_first(pages):
    overview = (pages / "00_index.md").read_text()
    assert overview.startswith("# Overview\n") and "hero" not in overview.split("## ")[0]
    runs = (pages / "runs.md").read_text()
    assert runs.startswith("# Results: runs of record\n")
    order = [runs.index(words) for words in ("interpolated / future frames", "## How to read them", "## All runs")]
    assert order == sorted(order) and runs.index("**Evaluated on") > order[-1]


def test_what_differs_from_the_paper_names_fields_that_are_there():
    text = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    fields = flattened(config_to_dict(preset_config("default")))
    named = re.findall(r"`(\w+\.[\w.]+)`", text)
    assert len(named) > 15
    assert [n for n in named if n not in fields and not any(f.startswith(f"{n}.") for f in fields)] == []


def test_a_field_says_where_the_preset_default_has_another_value():
    "The table of a class shows the class's own default; its comment says the preset's."
    names = {d.definition.name: d for d in defined_names(NOTEBOOKS)}
    default = preset_config("default")
    own, preset = (flattened(config_to_dict(cfg)) for cfg in (type(default)(), default))
    comments = {}
    for at, cfg in config_groups(default):
        comments |= {f"{at}.{k}".lstrip("."): a.meaning for k, a in field_comments(type(cfg), names).items()}
    said = {k: words.partition("preset default: ")[2] for k, words in comments.items() if "preset default: " in words}
    differ = {k: value for k, value in preset.items() if value != own[k]}
    assert said == {k: f"{value:g}" if type(value) is float else str(value) for k, value in differ.items()}


def test_parts_point_to_what_lies_elsewhere(pages):
    part = (pages / "part_4.md").read_text()
    leads = set(re.findall(r"\((\w+)\.md\)", part))
    assert {"14_motion_prior", "30c_decode", "24_image_velocity"} <= leads
    assert "(13e_sparse_convolution.md)" in (pages / "part_3.md").read_text()
    assert "[ablation](62_ablation.md)" in (pages / "part_6.md").read_text()


def test_words_of_two_cells_are_two_words_of_a_search(pages):
    for name in ("10_lift.md", "22_scene.md"):
        assert not re.search(r"</t[dh]><t[d]", (pages / name).read_text()), name


# odd cells


@pytest.mark.parametrize(
    "source, kinds",
    [
        ("def f(a, *, b=1, **kw): ...", ["function"]),
        ("async def f() -> None: ...", ["function"]),
        ("A, B = 1, 2", ["constant", "constant"]),
        ("x = 1\n_A = 2\n_f = 3", []),
        ("class C:\n    def __init__(self, a: int = 1):  # m\n        pass", ["class"]),
        ("@patch(as_prop=True)\ndef size(self: Scene) -> int:  # px\n    'How large.'", ["property"]),
        ("", []),
    ],
)
def test_definitions_of_odd_cells(source, kinds):
    assert [d.kind for d in definitions(source)] == kinds


def cell(source, *outputs):
    return dict(cell_type="code", source=source, outputs=list(outputs), metadata={})


def test_code_that_holds_a_fence_stays_inside_its_own():
    text = source_text(cell('s = """\n```\ninside\n```\n"""'), None)
    assert text.startswith("````python\n") and text.endswith("\n````")


def test_hostile_outputs_stay_outputs():
    "Text of an output is text: neither its markup nor its formulas are read."
    said = dict(output_type="stream", text=["```\n<script>1</script> $x$\n```"])
    page = notebook_page(Notebook(Path("01_a.ipynb"), [cell("1", said)]), str)
    assert re.search(r"````text\n```\n<script>1</script> \$x\$\n```\n````", page.parts[0])


def test_links_of_lessons_to_files_that_never_were_become_text(pages):
    assert "](01_add" not in re.sub(r"^(`{3,})[\s\S]*?^\1", "", (pages / "91b_made_texts.md").read_text(), flags=re.M)


@pytest.mark.parametrize(
    "link, want",
    [
        ("nbs/10_lift.ipynb", "10_lift.md"),
        ("docs/glossary.md", "glossary.md"),
        ("docs/data.md#coordinates", "data.md#coordinates"),
        ("papermill_runs/README.md", "runs.md"),
        ("papermill_runs/a/report.md", "https://x.org/papermill_runs/a/report.md"),
        ("papermill_runs/a/pairs.jpg", "papermill_runs-a-pairs.jpg"),
        ("flux4d/lift.py", "https://x.org/flux4d/lift.py"),
    ],
)
def test_links_lead_to_pages_or_to_the_repository(link, want):
    assert site_link(link, "https://x.org/") == want


# the checker finds what it is for


@pytest.mark.parametrize(
    "html, said",
    [
        ('<a href="gone.html">x</a>', "links to gone.html"),
        ('<a href="#gone">x</a>', "no such anchor"),
        ('<img src="gone.png" alt="a">', "gone.png, which is not there"),
        ('<img src="page.html">', "without alternative text"),
        ('<link rel="stylesheet" href="https://fonts.org/a.css">', "from the network"),
        ('<script src="//cdn.org/a.js"></script>', "from the network"),
        (r"<p>where $\frac{a}{b}$ is</p>", "a formula as it was typed"),
        (r"<p>where \mathbf v is</p>", "a formula as it was typed"),
        ("<p>see [it](a.md#b)</p>", "a link as it was typed"),
        ("<p>```python</p>", "a fence of code"),
    ],
)
def test_planted_faults_are_found(tmp_path, html, said):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\ngit_url = https://x.org/r\nbranch = main\n")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/page.html").write_text(f"<h1>A</h1>{html}")
    (fault,) = site_faults(tmp_path / "site", tmp_path)
    assert fault.startswith("page.html: ") and said in fault


@pytest.mark.parametrize(
    "html", [r"<pre>$\frac$ [a](b.md)</pre>", "<code>```</code>", r"<math><mi>\sigma</mi></math>", "<p>5 $ and 6 $</p>"]
)
def test_code_and_formulas_are_no_faults(html):
    assert raw_words(built_page(html)) == []


# the built site


@pytest.fixture(scope="module")
def built():
    "The site that `make docs` built."
    named = os.environ.get("FLUX4D_SITE")
    if not named:
        pytest.skip("FLUX4D_SITE names no built site: make docs, then FLUX4D_SITE=_docs pytest tests/test_site.py")
    return (ROOT / named).resolve()


def test_the_built_site_is_whole(built):
    assert site_faults(built, ROOT) == []
    assert {f"{nb.path.stem}.html" for nb in NOTEBOOKS} <= {p.name for p in built.iterdir()}


def test_names_are_found_by_the_search(built):
    index = (built / "searchindex.js").read_text(encoding="utf-8")
    assert '"lift_sweep"' in index and "instal" in index  # words are stored by their stem


@pytest.fixture(scope="module")
def browser():
    "Chromium, driven by playwright."
    try:
        sync_playwright, path = find_browser()
    except DataError as e:
        pytest.skip(str(e))
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


CUT_OFF = """() => [...document.querySelectorAll("article *")].filter(e => {
    const style = getComputedStyle(e);
    const hidden = ["hidden", "clip"].includes(style.overflowX);
    return hidden && e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 && style.position != "absolute";
}).map(e => e.tagName + "." + e.className)"""
BROKEN = "() => [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
FLAT = """() => [...document.querySelectorAll("math")]
    .filter(m => m.checkVisibility() && !m.getBoundingClientRect().height).length"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_in_a_browser_without_a_network(built, browser, width, scheme):
    "No script error, no missing picture, nothing wider than the screen, nothing cut off, formulas drawn in their font."
    context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme, offline=True)
    context.set_default_timeout(180_000)  # the largest pages take long where cores are busy
    page, said = context.new_page(), []
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    page.on("requestfailed", lambda r: said.append(f"not loaded: {r.url}"))
    for name in PAGES:
        page.goto(f"file://{built}/{name}.html")
        page.wait_for_load_state("networkidle")
        assert said == [], name
        assert page.evaluate(BROKEN) == [], name
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, name
        assert page.evaluate(CUT_OFF) == [], name
        assert page.evaluate(FLAT) == 0, name
        if name == "50_refine":
            page.evaluate("document.fonts.ready")
            assert page.evaluate("document.fonts.check('16px \"STIX Two Math\"')")
    context.close()


def test_folds_open_by_the_button_and_stay_open(built, browser):
    page = browser.new_context(offline=True).new_page()
    page.goto(f"file://{built}/10_lift.html")
    folds = "document.querySelectorAll('details.code').length"
    unfolded = "document.querySelectorAll('details.code[open]').length"
    assert page.evaluate(folds) > 5 and page.evaluate(unfolded) == 0
    page.click("button.unfold")
    assert page.evaluate(unfolded) == page.evaluate(folds)
    page.reload()
    assert page.evaluate(unfolded) == page.evaluate(folds)


NOT_OURS = r"THREE\.Clock: This module has been deprecated|GL Driver Message"  # of viser, and of drawing by software


def test_a_scene_is_loaded_on_a_click(built, browser):
    page, said = browser.new_context(offline=True).new_page(), []
    page.on("requestfailed", lambda r: said.append(r.url))
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
    page.goto(f"file://{built}/scene.html")
    assert page.evaluate("document.querySelectorAll('iframe').length") == 0
    assert page.locator("div.scene img").is_visible()
    page.click("div.scene button")
    page.wait_for_selector("div.scene iframe")
    page.frames[1].wait_for_selector("canvas", timeout=120_000)
    page.wait_for_timeout(8_000)  # the splats are drawn a little after their canvas is there
    assert [words for words in said if not re.search(NOT_OURS, words)] == []
    assert (built / "_static/scene.html").stat().st_size < 4e6


MOMENT = """film => {const [window, image] = ['.window', 'img'].map(s => film.querySelector(s).getBoundingClientRect());
    return [window.height, image.height, window.top - image.top]}"""


def test_a_slider_moves_the_time_of_a_film(built, browser):
    page = browser.new_context(offline=True).new_page()
    page.goto(f"file://{built}/scene.html")
    films = page.query_selector_all("div.film")
    assert len(films) == 2
    for film in films:
        moments = int(film.get_attribute("data-moments"))
        film.scroll_into_view_if_needed()
        shown = []
        for k in (0, moments // 2, moments - 1):
            slider = film.query_selector("input")
            slider.evaluate("(e, k) => {e.value = k; e.dispatchEvent(new Event('input'))}", k)
            window, image, place = film.evaluate(MOMENT)
            assert abs(window - image / moments) < 2 and abs(place - k * image / moments) < 2
            shown.append((film.query_selector("output").inner_text(), film.query_selector(".window").screenshot()))
        assert len(set(shown)) == 3
        slider.focus()
        page.keyboard.press("ArrowLeft")
        assert film.query_selector("output").inner_text() != shown[-1][0]


def test_without_a_script_pictures_are_left(built, browser):
    page = browser.new_context(offline=True, java_script_enabled=False).new_page()
    page.goto(f"file://{built}/scene.html")
    assert page.locator("div.scene button").count() == page.locator("div.film input").count() == 0
    assert page.locator("div.scene img").is_visible()
    for window in page.query_selector_all("div.film .window"):
        box = window.bounding_box()
        assert 100 < box["height"] < 1.3 * box["width"]


def test_the_search_finds_a_function(built, browser):
    page = browser.new_context(offline=True).new_page()
    page.goto(f"file://{built}/search.html?q=lift_sweep")
    page.wait_for_selector("ul.search li a")
    assert "10_lift.html" in page.eval_on_selector("ul.search li a", "a => a.href")


SEARCHED = {  # what a reader types -> page that is among the first three
    "results": "runs",
    "velocity": "glossary",
    "motion prior": "14_motion_prior",
    "GPU memory": "80_bench",
    "FD EPE": "runs",
    "install": "run",
    "own data": "own_data",
    "license": "repository",
    "licence": "repository",
    "video": "71a_filming",
    "half precision": "weights",
    "max_gaussians": "configuration#init.max_gaussians",
    "init.max_gaussians": "configuration#init.max_gaussians",
    "dead_zone": "configuration#model.dead_zone",
    "ablation": "62_ablation",
    "equations": "how_it_works",
    "stage": "50_refine",
    "future": "04_clips",
    "learning rate": "33c_optimiser",
}


@pytest.fixture(scope="module")
def search(built, browser):
    "What a search lists first."
    page = browser.new_context(offline=True).new_page()

    def first(query, count=3):
        page.goto(f"file://{built}/search.html?q={query}")
        page.wait_for_function("/found/.test(document.querySelector('p.search-summary')?.innerText || '')")
        addresses = "as => as.map(a => a.getAttribute('href'))"
        return [a.replace(".html", "") for a in page.eval_on_selector_all("ul.search li a", addresses)][:count]

    return first


@pytest.mark.parametrize("query", SEARCHED)
def test_the_search_answers_first(search, query):
    found, want = search(query), SEARCHED[query]
    assert any(f == want or "#" not in want and f.partition("#")[0] == want for f in found), found


def test_every_subject_leads_to_its_page(search):
    for page, subjects in list(SUBJECTS.items())[::4]:
        assert page in [f.partition("#")[0] for f in search(subjects[0])], (page, subjects[0])


def test_tools_stand_behind_what_a_reader_seeks(search):
    found = [f.partition("#")[0] for f in search("scene", 300)]
    tools = [k for k, page in enumerate(found) if re.match(r"9\d[a-z]?_", page)]
    assert tools and max(found.index(page) for page in ("index", "glossary", "how_it_works", "run")) < min(tools)


def test_code_of_cells_is_not_searched(built):
    index = (built / "searchindex.js").read_text(encoding="utf-8")
    assert '"suptitl"' not in index and '"figsiz"' not in index  # words of plots' code alone


def test_a_field_has_a_place_of_its_own(built, browser):
    page = browser.new_context(offline=True).new_page()
    page.goto(f"file://{built}/configuration.html#init.max_gaussians")
    row = page.locator("tr[id='init.max_gaussians']")
    assert row.is_visible() and "max_gaussians" in row.inner_text()
    assert row.locator("a.headerlink").get_attribute("href") == "#init.max_gaussians"
    assert row.evaluate("e => e.matches(':target')")


def test_prose_alone_can_be_read(built, browser):
    "One button hides code, parameter tables and tests; it is remembered, and a link to a definition brings them back."
    page = browser.new_context(offline=True).new_page()
    page.goto(f"file://{built}/10_lift.html")
    code = "[...document.querySelectorAll('article :is(.highlight-python, table.arguments, details.code)')]"
    seen = f"{code}.filter(e => e.checkVisibility()).length"
    assert page.evaluate(seen) > 20
    page.click("button.prose")
    assert page.evaluate(seen) == 0
    assert page.locator("article math").first.is_visible() and page.locator("article .output img").first.is_visible()
    page.goto(f"file://{built}/50_refine.html")
    assert page.evaluate(seen) == 0 and page.inner_text("button.prose") == "Show code"
    page.goto(f"file://{built}/10_lift.html#flux4d.lift.lift_sweep")
    assert page.locator("[id='flux4d.lift.lift_sweep']").is_visible()
    page.click("button.prose")
    page.click("button.prose")
    assert page.evaluate(seen) > 20


def test_the_navigation_folds_and_stays_folded(built, browser):
    page = browser.new_context(offline=True, viewport=dict(width=1280, height=900)).new_page()
    page.goto(f"file://{built}/10_lift.html")
    width = "document.querySelector('article').getBoundingClientRect().width"
    before = page.evaluate(width)
    page.click("button.fold-navigation")
    assert not page.locator(".bd-sidebar-primary").is_visible() and page.evaluate(width) > before + 150
    page.goto(f"file://{built}/50_refine.html")
    assert not page.locator(".bd-sidebar-primary").is_visible()
    page.click("button.fold-navigation")
    assert page.locator(".bd-sidebar-primary").is_visible()


TOO_WIDE = """([selector]) => [...document.querySelectorAll(selector)].filter(e => e.checkVisibility() &&
    e.scrollWidth > e.clientWidth + 1)
    .map(e => `${e.scrollWidth} in ${e.clientWidth}: ${e.textContent.trim().slice(0, 50)}`)"""
WIDE_PAGES = "index", "runs", "configuration", "62_ablation", "glossary", "23_losses", "how_it_works", "61_evaluate"


@pytest.mark.parametrize("name", WIDE_PAGES)
@pytest.mark.parametrize("width", [390, 1280])
def test_tables_and_formulas_fit_the_page(built, browser, name, width):
    page = browser.new_context(offline=True, viewport=dict(width=width, height=900)).new_page()
    page.goto(f"file://{built}/{name}.html")
    assert page.evaluate(TOO_WIDE, ["article table, article .formula, article pre"]) == []


def test_the_main_formulas_fit_the_page(built, browser):
    page = browser.new_context(offline=True, viewport=dict(width=1280, height=900)).new_page()
    for name in ("20_raster", "24_image_velocity", "50_refine", "31_predictor", "30c_decode", "13b_matching"):
        page.goto(f"file://{built}/{name}.html")
        assert page.evaluate(TOO_WIDE, ["article .formula"]) == [], name


def test_the_last_column_is_read_on_a_narrow_screen(built, browser):
    page = browser.new_context(offline=True, viewport=dict(width=390, height=900)).new_page()
    page.goto(f"file://{built}/index.html")
    cell = page.locator("article table tbody tr").first.locator("td").last
    box = cell.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and re.search(r"\(\d\.\d\d\)", cell.inner_text())
    assert "motion error" in cell.get_attribute("data-label")
    page.goto(f"file://{built}/how_it_works.html")
    assert page.locator("img.narrow").is_visible() and not page.locator("img[src*=docs-pipeline]").is_visible()


def test_a_film_says_where_the_inputs_end(built, browser):
    page = browser.new_context(offline=True).new_page()
    page.goto(f"file://{built}/scene.html")
    for film in page.query_selector_all("div.film"):
        slider, time = film.query_selector("input"), film.query_selector("output")
        assert "future" not in time.inner_text()
        last = int(film.get_attribute("data-moments")) - 1
        slider.evaluate("(e, k) => {e.value = k; e.dispatchEvent(new Event('input'))}", last)
        assert time.inner_text() == film.get_attribute("data-seconds").split()[-1].ljust(4, "0") + " s, future"
