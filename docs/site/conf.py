"""The site: Sphinx with MyST and the PyData theme, from the plain pages that `flux4d-repo pages` writes.

Sphinx is kept by many and needs nothing from the network. Formulas become MathML when the site is built (math-core), drawn with
the font STIX Two Math (from ziamath), so that no script is needed to read them."""

import html
import json
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.util import logging

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from flux4d import __version__ as release  # noqa: E402
from flux4d.scene_page import write_scene_files  # noqa: E402

project = "Flux4D in notebooks"
author = "the Flux4D-in-notebooks authors"
copyright = "the authors; Apache-2.0"
version = release
language = "en"
extensions = ["myst_parser"]
root_doc = "index"
myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 6
myst_heading_slug_func = "flux4d.notebooks.page_anchor"
suppress_warnings = ["myst.header"]  # a notebook may leave out a level
nitpicky = True
html_theme = "pydata_sphinx_theme"
html_title = project
html_favicon = str(HERE / "static/favicon.svg")
html_search_scorer = str(HERE / "search_scorer.js")
html_static_path = [str(HERE / "static")]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_sourcelink = False
html_permalinks_icon = "#"
html_domain_indices = False
html_last_updated_fmt = None
html_context = {"default_mode": "auto"}
pygments_style = "friendly"
html_sidebars = {"index": [], "**": ["sidebar-nav-bs"]}
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 8,
    "show_nav_level": 1,
    "navigation_depth": 3,
    "show_toc_level": 2,
    "secondary_sidebar_items": {"**": ["page-toc"], "gallery": []},  # pictures need the width
    "footer_start": ["copyright"],
    "footer_end": [],
    "back_to_top_button": False,
    "pygments_light_style": "friendly",
    "pygments_dark_style": "github-dark",
    "icon_links": [
        {
            "name": "Repository",
            "url": "https://github.com/flux4d/flux4d-in-notebooks",
            "icon": "fa-brands fa-github",
        }
    ],
}


# the order of the pages


def add_tree(app, docname, source):
    "Hang the pages of a chapter on it."
    children = app.tree.get(docname)
    if children:
        lines = [f"{title} <{page}>" if title else page for title, page in children]
        listed = "\n".join(lines)
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:maxdepth: 2\n\n{listed}\n```\n"


# the search


def add_subjects(app, docname, source):
    "Say what a page is searched for, as entries of the index."
    entries = app.subjects.get(docname)
    if entries:
        listed = "\n\n".join(f"```{{index}} ! {subject}\n```" for subject in entries)
        source[0] = source[0].replace("\n", f"\n\n{listed}\n", 1)


def leave_out_code(app, doctree):
    "Keep the Python code of notebooks out of the search: what they define is found by name."
    if app.env.docname in app.names["used"]:
        for block in doctree.findall(nodes.literal_block):
            if block.get("language") == "python":
                block["classes"].append("no-search")


# names


def note_names(app, doctree):
    "Tell the search of the site where names are defined."
    page = app.env.docname
    python = app.env.get_domain("py")
    for anchor, known in app.names["names"].items():
        if known["page"] == page:
            kind = {"constant": "data", "property": "property", "class": "class"}.get(known["kind"], "function")
            python.note_object(anchor, kind, anchor, location=doctree)
    if page == "configuration":
        for anchor in app.names["fields"]:
            python.note_object(anchor, "attribute", anchor, location=doctree)


SPAN = re.compile(
    r'(?P<before>(?:<span class="o">\.</span>)?)(?P<open><span class="(?:n|nf|nc|nn|nb)">)(?P<name>\w+)</span>'
)
CODE = re.compile(r'<code class="docutils literal notranslate"><span class="pre">(\w+)(\(\))?</span></code>')
CELL = re.compile(r"<code>(\w+)</code>")


def link_names(app, page, template, context, doctree):
    "Lead every name of the package to its definition."
    if "body" not in context or page not in app.names["used"]:
        return
    names, used = app.names["names"], app.names["used"][page]

    def target(name):
        "The opening of a link to a name; what the name means shows when the pointer rests on it."
        if name not in used:
            return None
        known = names[used[name]]
        url = f"#{used[name]}" if known["page"] == page else known["url"]
        said = html.escape(known["doc"].split(". ")[0][:200], quote=True)
        return f'<a class="name" href="{url}" title="{said}">'

    def span(m):
        link = target(m["name"])
        return m[0] if m["before"] or not link else f"{link}{m[0]}</a>"

    def code(m):
        inside_a_link = m.string.rfind("<a ", 0, m.start()) > m.string.rfind("</a>", 0, m.start())
        link = None if inside_a_link else target(m[1])
        return f"{link}{m[0]}</a>" if link else m[0]

    body = SPAN.sub(span, context["body"])
    context["body"] = CELL.sub(code, CODE.sub(code, body))


# sources

REPOSITORY = "https://github.com/flux4d/flux4d-in-notebooks/blob/main"


def add_source(app, page, template, context, doctree):
    "End the page of a notebook with a link to the notebook."
    if "body" in context and page in app.names["used"]:
        link = f'<a href="{REPOSITORY}/nbs/{page}.ipynb">nbs/{page}.ipynb</a>'
        context["body"] += f'<p class="needs">This page is made from the notebook {link}.</p>'


# formulas

FORMULAS = LatexToMathML(fancy_error=False)


def formula(translator, node, block):
    "A formula as MathML; one that cannot be read is a warning, and so ends the build."
    try:
        made = FORMULAS.convert_with_local_state(node.astext().strip(), displaystyle=block)
    except LatexError as e:
        logging.getLogger(__name__).warning("formula %r: %s", node.astext(), e, location=node)
        made = ""
    translator.body.append(f'<div class="formula">{made}</div>' if block else made)
    raise nodes.SkipNode


def inline_formula(translator, node):
    formula(translator, node, block=False)


def block_formula(translator, node):
    formula(translator, node, block=True)


def add_files(app, exception):
    "Put the font of formulas beside the style sheet, and a scene that a reader can turn and move in time."
    if not exception:
        static = Path(app.outdir) / "_static"
        fonts = Path(find_spec("ziamath").origin).parent / "fonts"
        shutil.copy(fonts / "STIXTwoMath-Regular.ttf", static)
        if app.builder.name == "html":
            write_scene_files(HERE.parent / "scene/pandaset002.scene", static)


def setup(app):
    for name in ("tree", "names", "subjects"):
        setattr(app, name, json.loads((Path(app.srcdir) / f"{name}.json").read_text(encoding="utf-8")))
    app.add_html_math_renderer("mathml", (inline_formula, None), (block_formula, None))
    app.config.html_math_renderer = "mathml"
    app.connect("source-read", add_tree)
    app.connect("source-read", add_subjects)
    app.connect("doctree-read", note_names)
    app.connect("doctree-read", leave_out_code)
    app.connect("html-page-context", link_names)
    app.connect("html-page-context", add_source)
    app.connect("build-finished", add_files)
