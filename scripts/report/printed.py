"""The summary of a compression that is printed for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lordjax.scripts.console import format_bytes, say
from lordjax.scripts.jobs import distillation_line
from lordjax.scripts.report.page import PAGE


def show(result: dict[str, Any]) -> None:
    """Prints the summary for people."""
    calibration = result["calibration"]
    what = (
        f"{result['kept']:.3f} of the block linear weights kept"
        if "kept" in result
        else f"{result['bits_per_weight']:.3f} bits per block linear weight"
    )
    method, size = result["settings"]["method"], format_bytes(result["bytes"])
    if (written := result.get("file_bytes")) is not None:
        size = f"{size} ({written:,} bytes of files)"
    print(f"{result['output']}: {method}, {what}, {size}, {result['seconds']:.0f} s")
    for path, form in result.get("tables", {}).items():
        print(f"{path}: {form}")
    if result["predicted"] is not None:
        _show_cost(result["predicted"], result["happened"])
    if calibration is not None:
        print(
            f"calibrated on {calibration['windows']} sequences of {calibration['seq_len']} tokens: "
            f"{calibration['source']}"
        )
    _show_loss(result)
    if result.get("distillation") is not None:
        print(distillation_line(result["distillation"]))
    if (page := Path(result["output"]) / PAGE).exists():
        print(f"report: {page}")
    if "elastic" in result["settings"]:
        print(f"next: lordjax export {result['output']} small --keep 0.7")
        return
    print(f"next: lordjax inspect {result['output']}")
    print(f"      lordjax evaluate {result['output']} --tokens PATH")


def _show_loss(result: dict[str, Any]) -> None:
    """Prints the predicted loss, and the measured losses of the sites that were checked."""
    loss, check = result.get("loss"), result.get("held_out_check")
    if loss is not None and any(loss.values()):
        print(
            f"predicted loss: {loss['held_out']:.3f} nats on unseen text like the calibration "
            f"text ({loss['in_sample']:.3f} on the calibration tokens, before corrections)"
        )
    if not check:
        return
    from lordjax.allocation.measured_errors import summary, warning

    print(summary(check))
    if (message := warning(check)) is not None:
        say(f"warning: {message}")


def _show_cost(predicted: dict[str, Any], happened: dict[str, Any]) -> None:
    """Prints measured memory and time beside the predicted ones."""
    memory = predicted["memory"]["with a work directory"]["host"]
    line = (
        f"peak memory {format_bytes(happened['peak_rss_bytes'])} (expected {format_bytes(memory)})"
    )
    if "seconds" in predicted:
        expected = predicted["seconds"]["total"] - predicted["seconds"].get("write", 0.0)
        line += f", {happened['seconds']['total']:.0f} s (expected {expected:.0f} s)"
    print(line)
    for name, row in happened.get("devices", {}).items():
        each = ", ".join(f"{share:.2f}" for share in row["shares"])
        print(f"{name}: {row['seconds']:.1f} s; share of each device in its operations: {each}")
