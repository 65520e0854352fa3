"""``lordjax inspect``: the parameters of a model as a list, and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lordjax.scripts.console import format_bytes, progress_report, say
from lordjax.scripts.flags.options import verifies
from lordjax.scripts.opened_model import Model, file_bytes, open_model

if TYPE_CHECKING:
    from lordjax.scripts.report.spectra import Spectra

OPERATIONS = 1e12  # what singular values for a picture may cost: under a minute on two cores
FOLDED = "rows of several blocks add up weights and bytes; --full lists every parameter"


def inspect_model(model: str, picture: str | None = None) -> dict[str, Any]:
    """Describes a model: totals, and one entry per parameter path.

    Args:
      model: see `open_model`.
      picture: the file that gets the map and the spectra; None: no picture.
    """
    from lordjax.scripts.report.figures import check_picture, write_picture
    from lordjax.scripts.report.grid import grid_of
    from lordjax.scripts.report.parameters import block_linear, parameter_rows

    path = None if picture is None else check_picture(picture)
    opened = open_model(model)
    leaves = opened.leaves()
    rows = parameter_rows(opened.config, leaves)
    if path is not None:
        grid = grid_of(opened.config, leaves)
        title = f"{opened.path.name}: {grid.summary(block_linear(rows))}"
        write_picture(path, title, grid, _spectra(opened, leaves))
        say(f"picture: {path}")
    return {
        "model": model,
        "kind": opened.kind,
        "config": opened.config.to_json(),
        "weights": sum(row["weights"] for row in rows.values()),
        "bytes": sum(row["bytes"] for row in rows.values()),
        "file_bytes": file_bytes(opened.path),
        "block_linear": block_linear(rows),
        "parameters": rows,
    }


def _spectra(opened: Model, leaves: dict[str, Any]) -> Spectra:
    """Predicted errors of an elastic model; else singular values, of as many layers as is quick."""
    from lordjax.compression import elastic
    from lordjax.scripts.report.spectra import affordable, of_factors, of_stored

    if elastic.is_elastic(opened.path):
        factors = elastic.factors_of(opened.path, verify=verifies())
        return of_factors(factors, dict.fromkeys(factors), opened.config.num_layers)
    layers = affordable(opened.config, leaves, OPERATIONS) or [opened.config.num_layers // 2]
    with progress_report() as progress:
        return of_stored(opened.source, layers, progress)


def show(result: dict[str, Any], *, full: bool = False) -> None:
    """Prints the parameters for people.

    Args:
      result: of `inspect_model`.
      full: a row for every parameter; else one for a parameter in all blocks.
    """
    linear, files = result["block_linear"], format_bytes(result["file_bytes"])
    print(f"{result['model']}: {result['kind']}, {result['config']['num_layers']} blocks")
    print(
        f"{result['weights']:,} weights, {format_bytes(result['bytes'])} in memory, {files} on disk"
    )
    counts = f"{linear['weights']:,} of {linear['dense_weights']:,}"
    print(f"kept {linear['kept']:.4f} of the block linear weights: {counts}")
    print(f"{linear['bits_per_weight']:.3f} bits per block linear weight of the original")
    print("" if full else f"{FOLDED}\n")
    print(_line("parameter", "kind", "rank", "shape", "dtype", "bytes", "kept", "bits"))
    shown: list[str] = []
    for path, row in _full(result) if full else _folded(result):
        *branches, layer, name = path.split("/")
        for depth, branch in enumerate(branches):
            if branches[: depth + 1] != shown[: depth + 1]:
                print("  " * depth + branch + "/")
        shown = branches
        facts = (row["kind"], _extent(row["rank"]), " x ".join(map(_extent, row["shape"])))
        facts = (*facts, row["dtype"], format_bytes(row["bytes"]), f"{row['kept']:.3f}")
        line = _line("  " * len(branches) + f"{layer}/{name}", *facts, f"{row['bits']:.2f}")
        print(line + row.get("where", ""))


def _full(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Path and row of every parameter, blocks in their order."""
    from lordjax.scripts.report.parameters import natural

    return sorted(result["parameters"].items(), key=lambda item: natural(item[0]))


def _folded(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Path and row of every parameter, all blocks together; rows of some blocks say of which."""
    from lordjax.scripts.report.parameters import fold, ranges

    blocks = range(result["config"]["num_layers"])
    found = []
    for row in fold(result["parameters"]):
        layers = row["layers"]
        if layers is None:
            found.append((row["path"], row))
            continue
        where = "" if layers == list(blocks) else f"  layers {ranges(layers)}"
        found.append((f"layer_{ranges(blocks)}/{row['path']}", row | {"where": where}))
    return found


def _extent(value: int | list[int] | None) -> str:
    """A number, or from where to where: ``24…288``."""
    if value is None:
        return ""
    return "…".join(map(str, value)) if isinstance(value, list) else str(value)


def _line(
    name: str, kind: str, rank: str, shape: str, dtype: str, nbytes: str, kept: str, bits: str
) -> str:
    return f"{name:26}{kind:25}{rank:>8}{shape:>18}{dtype:>10}{nbytes:>11}{kept:>7}{bits:>7}"
