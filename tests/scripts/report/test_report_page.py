"""``report.html``, which ``compress`` writes beside ``report.json``."""

import json
import re
import shlex
from html.parser import HTMLParser

import pytest

from lordjax.allocation.plan import Plan
from lordjax.scripts.cli import cli
from lordjax.scripts.report import page as pages

pytestmark = pytest.mark.full

METHODS = {
    "modegpt": ("--method", "modegpt", "--keep", 0.6),
    "rom": ("--method", "rom", "--keep", 0.6),  # has no factors at all ranks
    "nf": ("--method", "nf", "--format", "nf4"),
    "elastic": ("--method", "svd", "--elastic"),
}
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Reader(HTMLParser):
    """Checks that tags close, and gathers text, tags, attributes and ids."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module", params=METHODS)
def made(request, tiny, run, tmp_path_factory):
    """A directory that ``compress`` wrote."""
    out = tmp_path_factory.mktemp(request.param) / "out"
    options = ("--calibration", tiny / "tokens.npy", "--seq-len", 16)
    found = run("compress", tiny / "model", out, *options, *METHODS[request.param])
    assert found.exit_code == 0, found.stderr
    assert f"report: {out / 'report.html'}" in found.stdout
    return out


@pytest.fixture
def text(made):
    return (made / pages.PAGE).read_text()


def test_the_page_parses_and_needs_no_other_file(text):
    page = Reader(text)
    assert page.tags[0] == "html" and page.tags.count("svg") >= 2
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    inside = [value for value in links if value.startswith("#")]
    # Scales of colours are pictures inside the page.
    assert all(value.startswith("data:image/png;") for value in set(links) - set(inside))
    style = "".join(re.findall(r"<style.*?</style>", text, flags=re.S))
    assert "@import" not in style and "url(" not in style and "http" not in style
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(inside) <= {f"#{name}" for name in ids}


def test_the_page_has_every_site_with_its_rank(made, text):
    plan = Plan.read(made / "plan.json")
    for path, rank in plan.ranks.items():
        (cells,) = re.findall(rf"<tr><td>{path}</td>(.*?)</tr>", text)
        cells = re.findall("<td>(.*?)</td>", cells)
        form = plan.formats.get(path)
        assert cells[0] == ("as it was" if rank is None and form is None else str(rank or "-"))
        assert cells[1] == (form or "-")


def test_the_page_has_the_numbers_of_the_report(made, text, run):
    linear = json.loads(run("inspect", made, "--json").stdout)["block_linear"]
    assert f"{linear['bits_per_weight']:.3f}" in text
    assert f"{linear['weights']:,} for {linear['dense_weights']:,}" in text
    report = json.loads((made / "report.json").read_text())
    assert f"{report['happened']['seconds']['total']:.1f} s" in text
    layers = report["layers"]
    for path, row in layers.items():
        assert re.search(
            rf"{path}</td>.*<td>{re.escape(format(row['relative_error'], '.3g'))}<", text
        )


def test_the_page_shows_spectra_and_says_which(made, text):
    has_factors = Plan.read(made / "plan.json").method in ("modegpt", "svd")
    assert ("predicted error that is left" in text) == has_factors
    assert ("squared singular values of the stored" in text) != has_factors


def test_the_next_commands_exist(text):
    (commands,) = re.findall(r"<pre>(# .*?)</pre>", text, flags=re.S)
    lines = [line for line in commands.splitlines() if not line.startswith("#")]
    assert len(lines) >= 3
    for line in lines:
        name, verb, *arguments = shlex.split(line.replace("&quot;", '"'))
        assert name == "lordjax"
        cli.commands[verb].make_context(verb, arguments)  # click takes them


def test_two_runs_differ_in_times_only(made, text, tiny, run, tmp_path):
    settings = json.loads((made / "report.json").read_text())["settings"]
    options = next(row for row in METHODS.values() if row[1] == settings["method"])
    given = ("--calibration", tiny / "tokens.npy", "--seq-len", 16)
    again = run("compress", tiny / "model", tmp_path / "again", *given, *options)
    assert again.exit_code == 0, again.stderr
    other = (tmp_path / "again" / pages.PAGE).read_text()
    assert pages.without_times(other) == pages.without_times(text)
    assert "Predicted and measured" in text
    assert "Predicted and measured" not in pages.without_times(text)


def test_a_page_that_cannot_be_made_costs_no_model(tiny, run, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(pages, "page_of", broken)
    found = run("compress", tiny / "model", tmp_path / "out", *METHODS["nf"])
    assert found.exit_code == 0
    assert "note: the result has no report.html (RuntimeError: no ink)" in found.stderr
    assert "report:" not in found.stdout
    assert (tmp_path / "out" / "report.json").exists()
    assert not (tmp_path / "out" / pages.PAGE).exists()
    # A directory without the page is a model like others.
    assert run("inspect", tmp_path / "out").exit_code == 0


def test_a_model_that_takes_long_gets_a_hint_in_place_of_spectra(made, monkeypatch):
    monkeypatch.setattr(pages, "OPERATIONS", 1.0)
    assert "lordjax inspect . --picture" in pages.page_of(made, {})


def test_a_budget_of_an_elastic_model_has_a_page(tiny, run, tmp_path):
    whole, small = tmp_path / "whole", tmp_path / "small"
    given = ("--calibration", tiny / "tokens.npy", "--seq-len", 16)
    assert run("compress", tiny / "model", whole, *given, *METHODS["elastic"]).exit_code == 0
    assert "Any budget can be cut" in (whole / pages.PAGE).read_text()
    found = run("export", whole, small, "--keep", 0.6)
    assert found.exit_code == 0, found.stderr
    assert "predicted error that is left" in (small / pages.PAGE).read_text()


def test_names_are_escaped(made):
    from lordjax.storage.saved_model import open_saved

    saved, report = open_saved(made), json.loads((made / "report.json").read_text())
    report["settings"]["model"] = "<script>alert(1)</script>"
    spectra = pages.Spectra((), "", saved.config.num_layers)
    text = pages.page(saved.config, saved.plan(), report, saved.leaves(), spectra)
    assert "<script" not in text
