"""``report.html``: what a compression did, on one page that needs no other file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import jax

from lordjax.models.config import ModelConfig
from lordjax.models.stock import reshaped
from lordjax.names import is_block_linear, layer, layer_index
from lordjax.runtime import json_files
from lordjax.scripts.console import say
from lordjax.scripts.report import figures
from lordjax.scripts.report.grid import Grid, grid_of
from lordjax.scripts.report.parameters import block_linear, original_shapes, parameter_rows
from lordjax.scripts.report.spectra import Spectra, affordable, of_factors, of_stored
from lordjax.scripts.report.tables import measured, numbers, sites, table

PAGE = "report.html"
OPERATIONS, MOST = 5e10, 3  # what singular values may cost a page, and of how many layers
# Between these marks stands what differs from run to run: times and memory.
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
STYLE = """
body { font: 15px/1.5 sans-serif; color: #111; background: #fff; max-width: 62rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .6rem 0; }
td, th { border-bottom: 1px solid #bbb; padding: .15rem .9rem .15rem 0; text-align: left; }
.numbers :is(td, th):not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: .6rem 0; overflow-x: auto; } svg { max-width: 100%; height: auto; }
figcaption, .note { color: #444; font-size: .9rem; }
pre { background: #f2f2f2; padding: .7rem; overflow-x: auto; }
"""
NEXT = (
    ("Measure the perplexity", "lordjax evaluate . --tokens PATH"),
    ("Let it write", 'lordjax generate . "def fibonacci(n):"'),
    ("Write it for stock transformers", "lordjax export . ../exported --to dense --verify"),
    ("Train it further", "lordjax finetune . ../finetuned --data PATH"),
    ("Multiply adapters into the weights", "lordjax merge ../finetuned ../merged"),
)
NEXT_ELASTIC = (("Cut it to a budget", "lordjax export . ../small --keep 0.7"), *NEXT[:2])


def add_page(directory: Path, factors: Mapping[str, Any]) -> None:
    """Writes the page into a complete model directory, or says why there is none.

    A page that cannot be made costs nobody a model that is.

    Args:
      directory: see `page_of`.
      factors: see `page_of`.

    Raises:
      OSError: if the disk is full.
    """
    try:
        text = page_of(directory, factors)
    except Exception as error:
        say(f"note: the result has no {PAGE} ({type(error).__name__}: {error})")
        return
    (directory / PAGE).write_text(text, encoding="utf-8")


def page_of(directory: Path, factors: Mapping[str, Any]) -> str:
    """The page about a complete model directory.

    Args:
      directory: with ``plan.json`` and ``report.json``.
      factors: site path -> factors at all ranks, where the method has some; their spectra are
        shown. Else the page shows singular values of the stored matrices, if that is quick.

    Raises:
      ValueError: if the directory is no model, or a file in it is damaged.
    """
    from lordjax.storage.saved_model import open_saved

    saved = open_saved(directory, verify=False)  # it was just written; its checksums come last
    plan, report, leaves = saved.plan(), saved.report(), saved.leaves()
    if plan is None:
        raise ValueError(f"{directory}: has no plan.json; a report is about a plan")
    config = saved.config
    if (original := report.get("original_config")) is not None:
        config = ModelConfig.from_json(original)
        leaves = _by_original_numbers(config, plan.ranks, leaves)
    if factors:
        spectra = of_factors(factors, plan.ranks, config.num_layers)
    else:
        spectra = of_stored(saved, affordable(saved.config, leaves, OPERATIONS, MOST))
    return page(config, plan, report, leaves, spectra)


def _by_original_numbers(
    config: ModelConfig, ranks: Mapping[str, int | None], leaves: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the parameters of a stock-shaped model under their original paths.

    Args:
      config: the architecture before compression.
      ranks: site path -> rank; 0: removed.
      leaves: parameter path -> array, or its shape. Matrices of removed blocks become empty ones.
    """
    _, left = reshaped(config, ranks)
    found = {path: leaf for path, leaf in leaves.items() if not path.startswith("layer_")}
    found |= {
        path: jax.ShapeDtypeStruct((0, 0), leaf.dtype)
        for path, leaf in original_shapes(config).items()
        if is_block_linear(path) and layer_index(path) not in left
    }
    for path, leaf in leaves.items():
        if path.startswith("layer_"):
            number, inside = path.split("/", 1)
            found[f"{layer(left[layer_index(number)])}/{inside}"] = leaf
    return found


def page(
    config: Any,
    plan: Any,
    report: Mapping[str, Any],
    leaves: Mapping[str, Any],
    spectra: Spectra,
) -> str:
    """The text of the page.

    Args:
      config: the architecture.
      plan: what was decided.
      report: the contents of ``report.json``.
      leaves: parameter path -> kernel or array, or shapes of them.
      spectra: the curves.
    """
    is_elastic = "elastic" in report.get("settings", {})
    rows, grid = parameter_rows(config, leaves), grid_of(config, leaves)
    name = Path(report.get("settings", {}).get("model") or "a model").name
    title = f"{name}, compressed by {plan.method}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_summary(grid, block_linear(rows), is_elastic=is_elastic))}</p>",
        table(numbers(config, plan, report, rows)),
        "<h2>Layers and matrices</h2>",
        _figure(figures.map_svg(grid), f"Every cell is one matrix and shows its {grid.unit}."),
        "<h2>Spectra</h2>",
        _spectra(spectra),
        *_errors(report),
        BEGIN,
        "<h2>Predicted and measured</h2>",
        measured(report),
        END,
        "<h2>How to go on</h2>",
        "<p>Run these commands in the directory of this page.</p>",
        _commands(NEXT_ELASTIC if is_elastic else NEXT),
        "<h2>Every site</h2>",
        f"<details><summary>{len(plan.ranks)} sites of the plan</summary>",
        sites(plan, report, rows),
        "</details>",
        "<h2>Settings</h2>",
        f"<pre>{escape(json_files.dumps_measured(report.get('settings', {}), indent=1))}</pre>",
    ]
    return _document(title, "\n".join(sections))


def without_times(text: str) -> str:
    """A page without what differs between two runs of one command."""
    return re.sub(f"{BEGIN}.*?{END}", "", text, flags=re.S)


def _document(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _summary(grid: Grid, linear: Mapping[str, Any], *, is_elastic: bool) -> str:
    if is_elastic:
        return (
            "This is the original model with the factors of every site beside it. Any budget can "
            "be cut from it without calibration."
        )
    text = grid.summary(linear)
    return f"{text[0].upper()}{text[1:]}."


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _spectra(spectra: Spectra) -> str:
    """The curves, or how to get them."""
    if not spectra.curves:
        return (
            '<p class="note">Not computed here: singular values of this model take long. '
            "<code>lordjax inspect . --picture spectra.svg</code> computes some.</p>"
        )
    return _figure(figures.spectra_svg(spectra), figures.caption(spectra))


def _errors(report: Mapping[str, Any]) -> list[str]:
    """The errors by layer, if there are any."""
    rows = report.get("layers", {})
    errors = {path: row["relative_error"] for path, row in rows.items()}
    if not any(error > 0 for error in errors.values()):
        return []
    is_quantized = any("format" in row for row in rows.values())
    about = (
        "Measured: squared distance of the stored matrix from the original one, relative to the "
        "original's squares."
        if is_quantized
        else "Predicted: the part of the method's measure that the chosen rank loses. Matrices "
        "that are left as they are have no point."
    )
    if "distillation" in report:
        about += " These are the errors before distillation."
    return ["<h2>Errors</h2>", _figure(figures.errors_svg(errors, "relative error"), about)]


def _commands(rows: tuple[tuple[str, str], ...]) -> str:
    lines = [f"# {what}\n{command}" for what, command in rows]
    return f"<pre>{escape(chr(10).join(lines))}</pre>"
