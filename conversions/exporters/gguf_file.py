"""Exports a model as one GGUF file, for llama.cpp.

The rows of the reader (`readers.gguf.architectures`) are read backwards: names, keys and layouts of
tensors. A file that the reader would open as another model is not written.

Llama-like models whose blocks have MLPs of their own widths are written as llama.cpp's architecture
``deci``, which has Llama's tensors and a width for every block (``src/models/deci.cpp``, 75dc8f6).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lordjax.conversions.exporters import gguf_tokenizer
from lordjax.conversions.exporters.hf_files import (
    ExportSpec,
    Opened,
    check_plain,
    flat_block,
    mlp_widths,
    of_block,
    outside,
    outside_blocks,
    own_table,
    stored,
)
from lordjax.conversions.families.registry import family_of, model_config
from lordjax.conversions.readers.checkpoint import open_checkpoint
from lordjax.conversions.readers.gguf.architectures.registry import ARCHITECTURES
from lordjax.conversions.readers.gguf.architectures.row import Architecture
from lordjax.conversions.readers.gguf.config import config_json
from lordjax.conversions.readers.gguf.facts import Facts
from lordjax.conversions.readers.gguf.layouts import INVERSES, Heads
from lordjax.conversions.readers.gguf.shards import read_headers
from lordjax.models.config import UNLIMITED, ModelConfig, Rope
from lordjax.models.rope import rope_frequencies

FILE = "model.gguf"
LLAMA, DECI = "llama", "deci"
# Family -> architecture in GGUF.
NAMES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
# Type of the matrices -> value of general.file_type. Vectors are F32.
TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}
# Value of general.file_type -> largest relative rounding error, in steps as machine epsilons are.
_EPSILONS = {0: 2.0**-23, 1: 2.0**-10, 32: 2.0**-7, 7: 2.0**-7}
_OF_DTYPE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Number of layers at which llama.cpp scales queries by the width per head, not by the head's.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def gguf(job: ExportSpec, stage: Path) -> None:
    """Writes ``model.gguf`` into the directory ``stage``.

    Raises:
      ValueError: if GGUF files, or llama.cpp, cannot express the model.
    """
    from gguf import GGUFWriter

    source = job.source
    name = architecture_name(source)
    row, kind = _row(name), job.gguf_type or _OF_DTYPE.get(str(job.dtype), "F32")
    writer = GGUFWriter(stage / FILE, name)
    for key, value in _keys(source, row, name).items():
        _add(writer, key, value)
    writer.add_file_type(TYPES[kind])
    for key, value in gguf_tokenizer.metadata(job, source.config.vocab_size).items():
        _add(writer, key, value)
    for own, shape, qtype in _infos(source, row, kind):
        _add_info(writer, own, shape, qtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for data in _values(source, row, kind):
            writer.write_tensor_data(data)
    finally:
        writer.close()
    _compare(source, stage / FILE)


def architecture_name(source: Opened) -> str:
    """Returns the architecture of a model in GGUF.

    Raises:
      ValueError: if the model has another shape than its config says, or llama.cpp would compute
        another function.
    """
    check_plain(source, "gguf", own_table(source))
    family, config = family_of(source.hf_config).model_type, source.config
    if family not in NAMES or config.head != "causal":
        raise ValueError(
            f"gguf exports are those of language models of {', '.join(NAMES)}, not {family} with "
            f"head {config.head!r}; export with --to dense"
        )
    name = NAMES[family]
    if (problem := _other_in_llama_cpp(config, name)) is not None:
        raise ValueError(f"llama.cpp runs {name} models {problem}; export with --to dense")
    if set(mlp_widths(source)) == {config.mlp_size}:
        return name
    if name != LLAMA:
        raise ValueError(
            f"gguf files of {name} models have one MLP width for all blocks; export with --to "
            "factored, or compress with --shape stock"
        )
    return DECI


def _row(name: str) -> Architecture:
    """Returns the row of an architecture; that of ``deci`` is Llama's."""
    return ARCHITECTURES[LLAMA if name == DECI else name]


def _other_in_llama_cpp(config: ModelConfig, name: str) -> str | None:
    """Returns what llama.cpp computes differently, because its files do not say it; or None.

    Source: the functions ``load_arch_hparams`` of llama.cpp's ``src/models``.
    """
    windows = config.windows
    if name in _LAYERS_OF_27B:
        wide = config.num_layers == _LAYERS_OF_27B[name]
        size = config.hidden_size // config.num_heads if wide else config.head_size
        scale = config.attention_scale or config.head_size**-0.5
        if not np.isclose(scale, size**-0.5, rtol=1e-6):
            return f"with queries divided by the root of {size}, this model with {scale**-2:g}"
        period = {"gemma2": 2, "gemma3": 6}[name]
        every = [(i + 1) % period != 0 for i in range(config.num_layers)]
        if windows is not None and [w is not None for w in windows] != every:
            return f"with full attention in every layer number {period}, which this one has not"
        return None
    narrow = [w for w in windows or () if w not in (None, UNLIMITED) and w < config.max_positions]
    return "without sliding windows" if narrow else None


def _keys(source: Opened, row: Architecture, name: str) -> dict[str, Any]:
    """Returns the metadata of the model's sizes and positions."""
    config, family = source.config, family_of(source.hf_config)
    values = {**family.defaults, **source.hf_config}
    # Sizes that follow from others in the config are written out.
    values |= {family.fields[f]: getattr(config, f) for f in ("num_kv_heads", "head_size")}
    found = {
        f"{name}.{key}": kind(values[field])
        for key, (field, kind, _) in row.keys.items()
        if values.get(field) is not None
    }
    sizes = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    found |= dict.fromkeys((f"{name}.{key}" for key in sizes), config.head_size)
    found |= {f"{name}.vocab_size": config.vocab_size}
    if name == DECI:
        found[f"{name}.feed_forward_length"] = list(mlp_widths(source))
    found |= {f"{name}.{key}": value for key, value in _rope_keys(config.rope).items()}
    if config.local_rope is not None:
        found[f"{name}.rope.freq_base_swa"] = float(config.local_rope.theta)
    if (license_ := source.hf_config.get("license")) is not None:
        found["general.license"] = str(license_)
    return found


def _rope_keys(rope: Rope | None) -> dict[str, Any]:
    """Returns the metadata of rotary positions, without the architecture's name."""
    if rope is None:
        return {}
    found: dict[str, Any] = {"rope.freq_base": float(rope.theta)}
    if rope.kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(rope.factor)}
    if rope.kind in ("llama3", "yarn") and rope.original_max_positions is not None:
        found["rope.scaling.original_context_length"] = rope.original_max_positions
    return found


def _matrices(source: Opened, row: Architecture) -> dict[str, str]:
    """Returns Hugging Face's name of every tensor -> its name in GGUF."""
    names = {}
    for own, template in row.tensors.items():
        for i in range(source.config.num_layers if "{i}" in template else 1):
            start = f"blk.{i}." if "{i}" in template else ""
            for end in (".weight", ".bias"):
                names[template.format(i=i) + end] = f"{start}{own}{end}"
    return names


def _infos(source: Opened, row: Architecture, kind: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields name, shape and type of the tensors, in the order of `_values`."""
    table, names = own_table(source), _matrices(source, row)
    for rows in (outside(table), *(of_block(table, i) for i in range(source.config.num_layers))):
        shapes = {each.name: each.shape for each in rows.values()}
        for name, shape in shapes.items():
            yield names[name], shape, _type(kind, shape)
    if (divisors := _divisors(source.config)) is not None:
        yield "rope_freqs.weight", divisors.shape, _type("F32", divisors.shape)


def _values(source: Opened, row: Architecture, kind: str) -> Iterator[np.ndarray]:
    """Yields the values of the tensors as they are stored, block by block."""
    from gguf.quants import quantize

    table, names = own_table(source), _matrices(source, row)
    heads = Heads(source.config.num_heads, source.config.num_kv_heads)

    def encoded(rows: Mapping[str, Any], flat: Mapping[str, Any]) -> Iterator[np.ndarray]:
        for name, tensor in stored(rows, flat, np.dtype(np.float32)):
            plain = re.sub(r"^blk\.\d+\.|\.\w+$", "", names[name])
            if (layout := row.layouts.get(plain)) is not None:
                tensor = INVERSES[layout](tensor, heads)
            yield quantize(np.ascontiguousarray(tensor), _type(kind, tensor.shape))

    yield from encoded(outside(table), outside_blocks(source))
    for i in range(source.config.num_layers):
        yield from encoded(of_block(table, i), flat_block(source, i))
    if (divisors := _divisors(source.config)) is not None:
        yield divisors


def _divisors(config: ModelConfig) -> np.ndarray | None:
    """Returns the table of Llama 3's rotary scaling: divisor of every frequency; or None."""
    rope = config.rope
    if rope is None or rope.kind != "llama3":
        return None
    length = config.max_positions
    plain, _ = rope_frequencies(Rope(rope.theta), config.head_size, length, length)
    scaled, _ = rope_frequencies(rope, config.head_size, length, length)
    return np.asarray(plain / scaled, np.float32)


def _type(kind: str, shape: tuple[int, ...]) -> Any:
    """Returns the type of a tensor: vectors are F32, rows of no whole blocks F16."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2:
        return GGMLQuantizationType.F32
    qtype, columns = GGMLQuantizationType[kind], shape[-1]
    return qtype if columns % GGML_QUANT_SIZES[qtype][0] == 0 else GGMLQuantizationType.F16


def _add_info(writer: Any, name: str, shape: tuple[int, ...], qtype: Any) -> None:
    """Adds the header of a tensor whose values come later."""
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    if qtype in plain:
        dtype = np.dtype(plain[qtype])
        size = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(name, shape, dtype, size)
        return
    shape = quant_shape_to_byte_shape(shape, qtype)
    writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=qtype)


def _add(writer: Any, key: str, value: Any) -> None:
    """Adds metadata; integers are unsigned 32-bit numbers, as llama.cpp reads them."""
    from gguf import GGUFValueType

    if isinstance(value, list):
        writer.add_array(key, value)
        return
    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32}
    kinds |= {float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
    writer.add_key_value(key, value, kinds[type(value)])


def epsilon(directory: Path) -> float:
    """Returns the machine epsilon of the matrices of a ``gguf`` export."""
    return _EPSILONS[read_headers(directory / FILE).metadata["general.file_type"]]


def has_widths(file: Path) -> bool:
    """Returns whether a file has an MLP width for every block."""
    return read_headers(file).metadata["general.architecture"] == DECI


def _compare(source: Opened, file: Path) -> None:
    """Raises ValueError if a file describes another model than the one that it was made from."""
    found, config = vars(_described(source, file)), vars(source.config)
    other = [name for name, value in config.items() if found[name] != value]
    if other:
        raise ValueError(
            f"gguf files cannot say the model's {', '.join(other)}; export with --to dense"
        )


def _described(source: Opened, file: Path) -> ModelConfig:
    """Returns the architecture that a file describes; widths of single blocks are left out."""
    if not has_widths(file):
        return open_checkpoint(file).config
    header = read_headers(file)
    metadata = {key.replace(f"{DECI}.", f"{LLAMA}.", 1): v for key, v in header.metadata.items()}
    metadata |= {"general.architecture": LLAMA}
    metadata |= {f"{LLAMA}.feed_forward_length": source.config.mlp_size}
    facts = Facts(metadata, header.tensors)
    hf_config = config_json(facts, ARCHITECTURES[LLAMA], ())
    if facts.problems:
        raise ValueError(f"{facts.problems[0]}; export with --to dense")
    return model_config(hf_config)
