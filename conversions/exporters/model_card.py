"""The model card of an export: ``README.md`` with what is known about the model.

A number stands in it only if the model's own ``plan.json`` or ``report.json`` has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lordjax.conversions.exporters.hf_files import Opened

README = "README.md"
WITH_CODE = ("factored", "peft", "nemotron-nas")  # exports with torch code beside the weights
# Kind of export -> lines of code that open it in the directory of the card.
_TRANSFORMERS = (
    "from transformers import {auto}",
    'model = {auto}.from_pretrained("."{more})',
)
_OPEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "dense": ("python", _TRANSFORMERS),
    "factored": ("python", _TRANSFORMERS),
    "peft": (
        "python",
        (
            *_TRANSFORMERS,
            "from peft import PeftModel",
            'PeftModel.from_pretrained(model, "adapter")',
        ),
    ),
    "nemotron-nas": ("python", _TRANSFORMERS),
    "vllm": ("bash", ('pip install "lordjax[vllm]"', "vllm serve .")),
    "gguf": ("bash", ("llama-cli -m model.gguf",)),
    "orbax": (
        "python",
        (
            "from lordjax.conversions.exporters.orbax import restore_orbax",
            'config, params = restore_orbax(".")',
        ),
    ),
}


def write_card(stage: Path, source: Opened, to: str, auto: str) -> None:
    """Writes ``README.md`` into the directory of an export.

    Args:
      stage: the directory.
      source: the exported model; its ``plan`` and ``report`` are read if it has them.
      to: kind of the export.
      auto: class of transformers that opens the model.
    """
    report = _called(source, "report") or {}
    plan = _called(source, "plan")
    settings = report.get("settings") or {}
    base = _name(settings.get("model") or getattr(source, "path", None))
    lines = ["---", *_front(source.hf_config, base), "---", "", f"# {base}, {_what(plan, to)}", ""]
    rows = [("base model", base), *_rows(plan, report)]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    language, code = _OPEN[to]
    more = ", trust_remote_code=True" if to in WITH_CODE else ""
    code = tuple(line.format(auto=auto, more=more) for line in code)
    lines += ["## Open it", "", f"```{language}", *code, "```", ""]
    lines += ["Made with lordjax."]
    (stage / README).write_text("\n".join(lines) + "\n", "utf-8")


def _called(source: Any, name: str) -> Any:
    """Returns what a method of the source says; None if it has no such method."""
    method = getattr(source, name, None)
    return method() if callable(method) else None


def _name(model: Any) -> str:
    """Returns the name of a model without the folders of the machine that it was made on.

    A hub id keeps its owner.
    """
    text = str(model or "a model")
    parts = text.replace("\\", "/").rstrip("/").split("/")
    is_id = len(parts) == 2 and not text.startswith((".", "/", "~")) and not Path(text).exists()
    return text if is_id else parts[-1].removesuffix(".gguf")


def _front(hf_config: Mapping[str, Any], base: str) -> Iterator[str]:
    """Yields the lines of the card's metadata; the licence is the source's, or is left out."""
    if isinstance(license_ := hf_config.get("license"), str):
        yield f"license: {license_}"
    if "/" in base:
        yield f"base_model: {base}"
    yield "tags: [lordjax, compressed]"


def _what(plan: Any, to: str) -> str:
    return f"exported to {to}" if plan is None else f"compressed by {plan.method}"


def _rows(plan: Any, report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields name and value of what is known about the compression."""
    if plan is None:
        return
    yield "method", f"{plan.method}, allocation {plan.policy}"
    if plan.keep is not None:
        yield "budget", f"{plan.keep:g} of the block linear weights"
    if plan.bits is not None:
        yield "budget", f"{plan.bits:g} bits per block linear weight"
    if (kept := report.get("plan", {}).get("kept")) is not None:
        yield "kept", f"{kept:.4f} of the block linear weights"
    facts = report.get("calibration") or {}
    if "windows" in facts:
        length = facts.get("seq_len", facts.get("length"))
        where = _name(facts["source"]) if isinstance(facts.get("source"), str) else "tokens"
        yield "calibration", f"{facts['windows']} sequences of {length} tokens: {where}"
    if plan.predicted is not None:
        loss = plan.predicted["held_out"]
        text = f"{loss:.3f} nats more than the base model, on unseen text like the calibration text"
        yield "predicted loss", text
