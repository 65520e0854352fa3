"""Every pointer "theory/NAME §N" in code, tests and docs names a heading of docs/pages/theory."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
THEORY = ROOT / "docs" / "pages" / "theory"
SECTION = r"§(\d+(?:\.\d+)*[a-z]?)"
# One page and its sections: "theory/lq_lora §2, §7", "theory/modegpt §2 to §4".
POINTER = re.compile(rf"theory/(\w+)(?:\.md)?((?:(?:\s|#|,|and|to)*{SECTION})+)")
CODE = [f for folder in ("lordjax", "tests") for f in sorted((ROOT / folder).rglob("*.py"))]
CODE += [f for folder in ("conversions", "scripts") for f in sorted((ROOT / folder).rglob("*.py"))]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def headings(page):
    """Numbers of the sections of a page."""
    return set(re.findall(r"^#+ (\d+(?:\.\d+)*[a-z]?)\.? ", page.read_text("utf-8"), re.M))


def pointers(text):
    """Pairs of a theory page and a section that a text points to."""
    return [(m[1], n) for m in POINTER.finditer(text) for n in re.findall(SECTION, m[2])]


@pytest.mark.parametrize("page", ["lord_rom", "modegpt", "lq_lora"])
def test_sections_are_numbered_in_order(page):
    top = [int(n) for n in headings(THEORY / f"{page}.md") if n.isdigit()]
    assert sorted(top) == list(range(len(top)))


def test_code_points_to_headings():
    found = {(f.name, *p) for f in CODE for p in pointers(f.read_text("utf-8"))}
    missing = {p for p in found if p[2] not in headings(THEORY / f"{p[1]}.md")}
    assert not missing
    assert len(found) > 20  # the pattern still finds them


def test_no_section_is_named_without_its_page():
    """A bare "§N" in the code leads nowhere."""
    files = [f for f in CODE if f != Path(__file__)]
    texts = {f.name: f.read_text("utf-8") for f in files}
    bare = {n for n, t in texts.items() if len(re.findall(SECTION, t)) != len(pointers(t))}
    assert not bare


def test_pages_point_to_headings():
    found = {(page, *p) for page in PAGES for p in pointers(page.read_text("utf-8"))}
    assert not {p for p in found if p[2] not in headings(THEORY / f"{p[1]}.md")}


@pytest.mark.parametrize("page", ["lord_rom", "modegpt", "lq_lora"])
def test_theory_pages_point_to_their_own_headings(page):
    """A bare "§N" of a theory page is a section of that page."""
    path = THEORY / f"{page}.md"
    own = set(re.findall(SECTION, POINTER.sub("", path.read_text("utf-8"))))
    assert own and own <= headings(path)
