"""MLPs of a function, found by how the outputs of its products flow."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lordjax.functions.sites import FunctionModule, FunctionSite

SEVERAL_AXES = "several axes"  # in place of what uses outputs


def modules_of(
    rows: Mapping[str, FunctionSite],
    flows: Mapping[str, Collection[frozenset[str]]],
    exposed: Mapping[str, str],
    counts: Mapping[str, int],
) -> tuple[tuple[FunctionModule, ...], dict[str, str]]:
    """Returns the MLPs of a function, and why other hidden axes are none.

    An MLP is a set of matrices whose outputs reach the inputs of one other matrix through
    elementwise functions only, and nothing else.

    Args:
      rows: the parameters with two axes or more.
      flows: path of a matrix -> paths whose outputs are its inputs, for each of its products.
      exposed: path -> what uses its outputs otherwise.
      counts: path -> number of uses of the parameter.
    """
    modules, refused, names = [], {}, set()
    for down, found in flows.items():
        paths = sorted(frozenset().union(*found))
        ups = [path for path in paths if path in rows and rows[path].matrix is not None]
        biases = [path for path in paths if path not in ups]
        others = [other for other in flows if other != down]
        shared = [p for p in paths if any(p in each for o in others for each in flows[o])]
        reason = _reason(rows, down, ups, biases, exposed, counts)
        if reason is None and (len(found) > 1 or shared):
            reason = f"the outputs of {(shared or ups)[0]} are inputs of several products"
        if reason is not None:
            refused[down] = reason
            continue
        name = _name([*ups, down])
        name = name if name not in names | set(rows) else f"{down}.mlp"
        names.add(name)
        width = rows[down].fan_in
        modules.append(FunctionModule(name, tuple(ups), down, tuple(biases), width))
    ended = {path for found in flows.values() for paths in found for path in paths}
    for path, row in rows.items():  # hidden axes, which are wider, that end in no product
        wide = row.reason is None and row.fan_out > row.fan_in
        if wide and path in exposed and path not in ended:
            refused[path] = _exposed(exposed[path], "its outputs")
    return tuple(modules), refused


def _exposed(use: str, outputs: str) -> str:
    """Returns why a matrix's outputs are no neurons."""
    return f"{outputs} are {use}" if use == SEVERAL_AXES else f"{use} uses {outputs}"


def _reason(
    rows: Mapping[str, FunctionSite],
    down: str,
    ups: Collection[str],
    biases: Collection[str],
    exposed: Mapping[str, str],
    counts: Mapping[str, int],
) -> str | None:
    """Returns why matrices are no MLP, or None."""
    if not ups:
        return "its inputs are no outputs of a product"
    for path in (*ups, *biases):
        if path in exposed:
            return _exposed(exposed[path], f"the outputs of {path}")
    for path in (*ups, down):
        if rows[path].reason is not None:
            return f"{path} stays dense: {rows[path].reason}"
    for path in (*ups, *biases, down):
        if counts[path] != 1:
            return f"{path} is used {counts[path]} times"
    for path in ups:
        if rows[path].stack != rows[down].stack or rows[path].fan_out != rows[down].fan_in:
            return f"{path} is stacked in another way"
    return None


def _name(paths: Collection[str]) -> str:
    """Returns the keys that some paths begin with, or else the last path."""
    split = [path.split("/") for path in paths]
    common = []
    for keys in zip(*split, strict=False):
        if len(set(keys)) > 1:
            break
        common.append(keys[0])
    return "/".join(common) or "/".join(split[-1][:-1]) or split[-1][-1]
