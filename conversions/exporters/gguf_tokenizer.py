"""The tokenizer of a GGUF file: carried over from another one, or written from ``tokenizer.json``.

Two kinds can be written: byte-level BPE, whose pre-tokenizer llama.cpp knows by a name, and
SentencePiece's BPE with byte fallback.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lordjax.conversions.exporters.hf_files import ExportSpec
from lordjax.conversions.readers.gguf.pre_tokenizers import PRE_TOKENIZERS, WORDS
from lordjax.conversions.readers.gguf.shards import is_gguf, read_headers
from lordjax.conversions.readers.gguf.special_tokens import (
    BYTE,
    CONTROL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from lordjax.runtime.input_files import read_json, reading

NORMAL = 1  # value of tokenizer.ggml.token_type
_KEY = "tokenizer.ggml."
_IDS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_INSTEAD = "export with --to dense"


def metadata(job: ExportSpec, rows: int) -> dict[str, Any]:
    """Returns the metadata of the tokenizer.

    Args:
      job: the export; a model that was opened from a GGUF file keeps that file's tokenizer.
      rows: rows of the token embedding; unused tokens fill the vocabulary up.

    Raises:
      ValueError: if llama.cpp has no such tokenizer.
    """
    path = getattr(job.source, "path", None)
    if isinstance(path, Path) and path.is_file() and is_gguf(path):
        given = read_headers(path).metadata
        found = {key: value for key, value in given.items() if key.startswith("tokenizer.")}
    else:
        found = _from_files(job)
    if f"{_KEY}tokens" not in found:
        return {f"{_KEY}model": "none"}
    tokens = found[f"{_KEY}tokens"]
    missing = [f"[PAD{i}]" for i in range(len(tokens), rows)]
    if len(tokens) > rows:
        raise ValueError(
            f"{len(tokens)} tokens, but {rows} rows of the embedding: llama.cpp needs as many; "
            f"{_INSTEAD}"
        )
    found[f"{_KEY}tokens"] = [*tokens, *missing]
    fill = {"token_type": UNUSED, "scores": 0.0}
    for name, value in fill.items():
        if f"{_KEY}{name}" in found:
            found[f"{_KEY}{name}"] = [*found[f"{_KEY}{name}"], *[value] * len(missing)]
    return found


def _from_files(job: ExportSpec) -> dict[str, Any]:
    """Returns the metadata from the tokenizer's files; empty if there are none."""
    if job.write_tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        job.write_tokenizer(Path(folder))
        files = {name: Path(folder) / f"{name}.json" for name in ("tokenizer", "tokenizer_config")}
        if not files["tokenizer"].exists():
            if any(Path(folder).glob("*token*")):
                raise ValueError(f"the tokenizer has no tokenizer.json; {_INSTEAD}")
            return {}
        content = read_json(files["tokenizer"])
        settings = (
            read_json(files["tokenizer_config"]) if files["tokenizer_config"].exists() else {}
        )
        template = Path(folder) / "chat_template.jinja"
        if template.exists():
            settings["chat_template"] = template.read_text("utf-8")
    with reading("tokenizer.json", "no tokenizer for GGUF can be made of it", _INSTEAD):
        return _from_json(content, settings)


def _from_json(content: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metadata from the contents of the two files."""
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"tokenizer of type {model['type']}: llama.cpp reads BPE here; {_INSTEAD}")
    pieces = bool(model.get("byte_fallback"))
    vocabulary = dict(model["vocab"])
    types = dict.fromkeys(vocabulary, NORMAL)
    if pieces:
        types |= {t: BYTE for t in vocabulary if re.fullmatch(r"<0x[0-9A-F]{2}>", t)}
    for added in content.get("added_tokens") or ():
        vocabulary[added["content"]] = added["id"]
        types[added["content"]] = CONTROL if added.get("special") else USER_DEFINED
    if pieces and (unknown := model.get("unk_token")) in vocabulary:
        types[unknown] = UNKNOWN
    by_id = {i: token for token, i in vocabulary.items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(max(by_id) + 1)]
    found: dict[str, Any] = {
        f"{_KEY}tokens": tokens,
        f"{_KEY}token_type": [types.get(token, UNUSED) for token in tokens],
        f"{_KEY}add_bos_token": _begins(content, settings.get("bos_token")),
        f"{_KEY}add_eos_token": False,
    }
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    found |= _pieces(content, tokens, merges) if pieces else _bytes(content, merges)
    for name, key in _IDS.items():
        token = _text(settings.get(key))
        if token in vocabulary:
            found[f"{_KEY}{name}_token_id"] = vocabulary[token]
    if isinstance(template := settings.get("chat_template"), str):
        found["tokenizer.chat_template"] = template
    return found


def _text(token: Any) -> Any:
    """Returns the text of a special token, which may be a dict."""
    return token.get("content") if isinstance(token, Mapping) else token


def _begins(content: Mapping[str, Any], bos: Any) -> bool:
    """Returns whether an encoded text begins with the token BOS."""
    parts = _listed(content.get("post_processor"), "processors")
    first = next((p["single"][0] for p in parts if p.get("type") == "TemplateProcessing"), {})
    return bos is not None and first.get("SpecialToken", {}).get("id") == _text(bos)


def _listed(part: Any, key: str) -> list[Mapping[str, Any]]:
    """Returns the steps of a part of ``tokenizer.json``, which may be a sequence of them."""
    if part is None:
        return []
    return list(part[key]) if part.get("type") == "Sequence" else [part]


def _bytes(content: Mapping[str, Any], merges: list[str]) -> dict[str, Any]:
    """Returns the metadata of a byte-level BPE: its merges, and its pre-tokenizer by name."""
    splits: list[str] = []
    for step in _listed(content.get("pre_tokenizer"), "pretokenizers"):
        match step["type"]:
            case "Split" if step["behavior"] == "Isolated" and "Regex" in step["pattern"]:
                splits.append(step["pattern"]["Regex"])
            case "Digits" if step["individual_digits"]:
                splits.append(r"\p{N}")
            case "ByteLevel" if not step.get("add_prefix_space"):
                splits += [WORDS] * bool(step.get("use_regex", True))
            case other:
                raise ValueError(f"pre-tokenizer {other}: llama.cpp has none; {_INSTEAD}")
    steps = _listed(content.get("normalizer"), "normalizers")
    composes = [step["type"] for step in steps] == ["NFC"]
    whole = bool(content["model"].get("ignore_merges"))
    for name, row in PRE_TOKENIZERS.items():
        if (row.splits, row.composes, row.whole_words) == (tuple(splits), composes, whole):
            return {f"{_KEY}model": "gpt2", f"{_KEY}pre": name, f"{_KEY}merges": merges}
    raise ValueError(
        f"the pre-tokenizer splits by {splits}: llama.cpp has no name for that; {_INSTEAD}"
    )


def _pieces(content: Mapping[str, Any], tokens: list[str], merges: list[str]) -> dict[str, Any]:
    """Returns the metadata of SentencePiece's BPE: a score per token, by the order of merges."""
    rank: dict[str, int] = {}
    for merge in merges:
        at = merge.find(" ", 1)
        rank.setdefault(merge[:at] + merge[at + 1 :], len(rank))
    steps = _listed(content.get("normalizer"), "normalizers")
    steps += _listed(content.get("pre_tokenizer"), "pretokenizers")
    kinds = {step["type"]: step for step in steps}
    prefix = "Prepend" in kinds or kinds.get("Metaspace", {}).get("prepend_scheme") in (
        "always",
        "first",
    )
    return {
        f"{_KEY}model": "llama",
        f"{_KEY}pre": "default",
        f"{_KEY}scores": [-float(rank.get(token, len(rank))) for token in tokens],
        f"{_KEY}add_space_prefix": prefix,
    }
