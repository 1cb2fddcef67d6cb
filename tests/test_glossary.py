"""The page of words: every word that the front page leaves undefined is there, and each row leads to a section."""

import re
from pathlib import Path
import pytest
from flux4d.notebooks import dead_links
from flux4d.records import repo_root

ROOT = repo_root(Path(__file__).parent)
PAGE = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| **")]
LINK = re.compile(r"\]\((?:\.\./nbs/\w+\.ipynb|\w+\.md)#[^)]+\)")


def words(row):
    return row.split("**")[1]


def test_each_word_stands_once_in_order_and_is_defined_in_a_section():
    assert [row for row in ROWS if row.count("|") != 5 or not LINK.search(row)] == []
    named = [words(row).lower() for row in ROWS]
    assert named == sorted(set(named))
    assert list(dead_links(PAGE, ROOT / "docs")) == []


@pytest.mark.parametrize("word", ["log", "sweep", "return", "lift", "gate", "ego0", "clip", "frame", "motion prior"])
def test_a_word_of_the_front_page_is_explained(word):
    assert [row for row in ROWS if re.search(rf"(?:^|, ){word}(?:$|, )", words(row))]


def test_the_front_page_leads_there():
    index = (ROOT / "nbs/00_index.ipynb").read_text(encoding="utf-8")
    assert "(../docs/glossary.md)" in index
