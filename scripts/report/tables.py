"""The tables of ``report.html``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from lordjax.models.sites import LINEAR_SITES, MODULE_SITES
from lordjax.scripts.console import format_bytes
from lordjax.scripts.report.parameters import Row, block_linear

KERNELS = {site.path: site.kernels for site in (*LINEAR_SITES, *MODULE_SITES)}


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """An HTML table; with a head, all columns but the first are those of numbers."""
    lines = [_line("th", head)] if head else []
    lines += [_line("td", row) for row in rows]
    kind = ' class="numbers"' if head else ""
    return f"<table{kind}>\n" + "\n".join(lines) + "\n</table>"


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def numbers(
    config: Any, plan: Any, report: Mapping[str, Any], rows: Mapping[str, Row]
) -> list[tuple[str, str]]:
    """What was decided and what it weighs: the same in every run of one command."""
    linear = block_linear(rows)
    asked = f"keep {plan.keep}" if plan.bits is None else f"{plan.bits:.4g} bits per weight"
    found = [
        ("method", plan.method),
        ("budget", asked if plan.keep or plan.bits else "ranks or formats were given"),
        ("allocation", plan.policy),
        ("model", f"{config.num_layers} layers of width {config.hidden_size}"),
        (
            "numbers stored for block linear weights",
            f"{linear['weights']:,} for {linear['dense_weights']:,} ({linear['kept']:.4f})",
        ),
        ("bits per original weight", f"{linear['bits_per_weight']:.3f}"),
        ("all weights", format_bytes(sum(row["bytes"] for row in rows.values()))),
        ("files with weights", format_bytes(report["file_bytes"])),
    ]
    if plan.gap is not None:
        found.append(("distance from the best plan, at most", f"{plan.gap:.2g}"))
    if plan.temperature is not None:
        found.append(("temperature", f"{plan.temperature:g}"))
    if (facts := report.get("calibration")) is not None and "windows" in facts:
        length = facts.get("seq_len", facts.get("length"))
        text = f"{facts['windows']} windows of {length} tokens"
        found.append(("calibration", f"{text}: {facts['source']}" if "source" in facts else text))
    return found + _distilled(report.get("distillation"))


def _distilled(facts: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What distillation did, if there was any."""
    if facts is None:
        return []
    before, after = facts["before"], facts["after"]
    kept = "" if facts["kept"] else "; no gain, so the weights before it are kept"
    return [
        (
            "distilled on",
            f"{facts['tokens']:,} tokens of {facts['source']}, {facts['settings']['steps']} steps"
            f"{kept}",
        ),
        ("judged on", f"{facts['held_out_tokens']:,} held-out tokens"),
        *(
            (name, f"{before[key]:.4f} nats before, {after[key]:.4f} after")
            for name, key in (("divergence", "divergence"), ("loss", "nats"))
        ),
    ]


def sites(plan: Any, report: Mapping[str, Any], rows: Mapping[str, Row]) -> str:
    """A table of all sites of a plan: rank or width, format, share kept, bits, error."""
    layers = report.get("layers", {})
    lines = []
    for path, rank in plan.ranks.items():
        layer, inside = path.split("/", 1)
        kernels = [f"{layer}/{kernel}" for kernel in KERNELS[inside]]
        found = [rows[kernel] for kernel in kernels if kernel in rows]
        total = {key: sum(row[key] for row in found) for key in ("weights", "dense_weights")}
        bits = 8 * sum(row["bytes"] for row in found) / max(total["dense_weights"], 1)
        error = layers.get(path, {}).get("relative_error")
        lines.append(
            (
                path,
                "removed" if rank == 0 else _rank(rank, left=path not in plan.formats),
                plan.formats.get(path, "-"),
                f"{total['weights'] / max(total['dense_weights'], 1):.3f}",
                f"{bits:.2f}",
                "-" if error is None else f"{error:.3g}",
            )
        )
    return table(lines, ("site", "rank or width", "format", "kept", "bits", "relative error"))


def _rank(rank: int | None, *, left: bool) -> str:
    """What a site has become; ``left`` means that it was not quantized."""
    return f"{rank}" if rank is not None else "as it was" if left else "-"


def measured(report: Mapping[str, Any]) -> str:
    """Seconds, memory and operations: as they were predicted, and as they were."""
    text = _stages(report)
    if (facts := report.get("distillation")) is None:
        return text
    peak = format_bytes(facts["peak_rss_bytes"])
    rows = [("distillation", f"{facts['seconds']:.1f} s"), ("peak memory with it", peak)]
    return text + table(rows, ("", "measured"))


def _stages(report: Mapping[str, Any]) -> str:
    """Seconds, memory and operations of the compression before any distillation."""
    predicted, happened = report.get("predicted"), report.get("happened")
    if predicted is None or happened is None:
        rows = [(stage, f"{s:.1f} s") for stage, s in report.get("seconds", {}).items()]
        peak = report.get("peak_rss_bytes")
        rows += [] if peak is None else [("peak memory", format_bytes(peak))]
        note = '<p class="note">Nothing was predicted: of a run that goes on, this is the rest.</p>'
        return note + table(rows, ("", "measured"))
    expected = predicted.get("seconds", {})
    memory = predicted["memory"]["with a work directory"]["host"]
    rows = [
        (
            "weights in memory",
            format_bytes(predicted["bytes"]),
            format_bytes(happened["bytes"]),
            "-",
            "-",
        ),
        ("peak memory", format_bytes(memory), format_bytes(happened["peak_rss_bytes"]), "-", "-"),
    ]
    for stage, seconds in happened["seconds"].items():
        flops = predicted["flops"].get(stage)
        rate = happened["flops_per_second"].get(stage)
        rows.append(
            (
                stage,
                f"{expected[stage]:.1f} s" if stage in expected else "-",
                f"{seconds:.1f} s",
                "-" if flops is None else f"{flops / 1e9:.1f}",
                "-" if rate is None else f"{rate / 1e9:.1f}",
            )
        )
    head = ("", "predicted", "measured", "GFLOP", "GFLOP/s")
    plan = escape(predicted["ranks_are"])
    note = f'<p class="note">The plan that the forecast assumed: {plan}.</p>'
    return table(rows, head) + note + _devices(happened)


def _devices(happened: Mapping[str, Any]) -> str:
    """Shares of the operations that each device did, if there were several."""
    rows = [
        (stage, f"{row['seconds']:.1f} s", ", ".join(f"{share:.2f}" for share in row["shares"]))
        for stage, row in happened.get("devices", {}).items()
    ]
    return table(rows, ("", "seconds", "share of each device")) if rows else ""
