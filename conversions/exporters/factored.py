"""Exports a model as a Hugging Face directory with factors, pruned layers and quantized weights.

The directory also holds a copy of `modeling_lordjax`, whose class is the stock class with some
linear layers replaced. ``config.lordjax_export["linears"]`` describes them: from the name of a
Hugging Face layer to its sizes, bias, present inputs and outputs, and matrices. A fused layer
(``c_attn``) has several matrices. Matrices outside the blocks are stored dense.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from lordjax.conversions.exporters.hf_files import (
    ExportSpec,
    flat_block,
    of_block,
    outside,
    outside_blocks,
    stored,
    table_of_width,
    write_config,
    write_shards,
)
from lordjax.conversions.exporters.torch_layer import Layer, Part
from lordjax.conversions.families.registry import TensorSource, family_of, tensor_table
from lordjax.kernels.base import Kernel
from lordjax.kernels.quantized import LowRankPlusQuantized
from lordjax.models import head_axes
from lordjax.runtime.input_files import read_json
from lordjax.storage.tensor_files import write_json

FORMAT = 1  # version of config.lordjax_export
CODE = "modeling_lordjax"
TEMPLATE = "LlamaForCausalLM"  # base class in `modeling_lordjax`; replaced by the family's
# Suffix of an architecture -> class of transformers that opens it; the first match counts.
AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForPreTraining": "AutoModelForPreTraining",
    "Model": "AutoModel",
}
VLLM_RANK = 16  # vLLM's default for --max-lora-rank


VLLM_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # whose layers vLLM merges by the same names


def factored(job: ExportSpec, stage: Path) -> None:
    """Writes the factored model into the directory ``stage``."""
    linears = _tensors(job, stage, lambda name, layer: layer)
    _with_code(job, stage, linears)


def vllm(job: ExportSpec, stage: Path) -> None:
    """Writes the factored model for `vllm_plugin`: the stock class, with a quantization config.

    Every linear layer of a block has a description, because vLLM merges some of them.

    Raises:
      ValueError: if it is a model of another family, or has biases that the family has not.
    """
    source, family = job.source, family_of(job.source.hf_config).model_type
    if family not in VLLM_FAMILIES or source.config.head != "causal":
        raise ValueError(
            f"vllm exports are those of language models of {', '.join(VLLM_FAMILIES)}, not "
            f"{family} with head {source.config.head!r}; export with --to dense"
        )
    table = tensor_table(source.hf_config, leaves=source.leaves())
    added = sorted(p for p in source.leaves().keys() - table.keys() if p.endswith("/bias"))
    if added:
        raise ValueError(
            f"{family} models in vLLM have no place for {len(added)} biases that compression "
            f"added (the first is {added[0]}); export with --to factored"
        )
    linears = _tensors(job, stage, lambda name, layer: layer, every=True)
    for i in range(source.config.num_layers):
        for path, row in of_block(table, i).items():
            if path.endswith("/kernel"):
                linears[_module(row)]["whole"] = list(row.loaded_shape)
    found = {"quant_method": "lordjax", "format": FORMAT, "linears": linears}
    write_config(stage, source.hf_config, job.dtype, quantization_config=found)


def peft(job: ExportSpec, stage: Path) -> None:
    """Writes the quantized model into ``stage``, and its low-rank terms as a PEFT adapter.

    Raises:
      ValueError: if no matrix is quantized with a low-rank term.
    """
    if not any(isinstance(leaf, LowRankPlusQuantized) for leaf in job.source.leaves().values()):
        raise ValueError(
            "no matrix is quantized with a low-rank term, so there is nothing to make an adapter "
            "of; export with --to factored, or compress with --method lq"
        )
    adapters: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def split(name: str, layer: Layer) -> Layer:
        if (pair := layer.adapter()) is not None:
            adapters[name] = pair
        return layer.without_products()

    _with_code(job, stage, _tensors(job, stage, split))
    (stage / "adapter").mkdir()
    named = {}
    for name, pair in adapters.items():
        for letter, array in zip("AB", pair, strict=True):
            full = f"base_model.model.{name}.lora_{letter}.weight"
            named[full] = array
    save = stage / "adapter" / "adapter_model.safetensors"
    safetensors.numpy.save_file(named, save, {"format": "pt"})
    write_json(stage / "adapter" / "adapter_config.json", _adapter_config(job, adapters))


def _adapter_config(job: ExportSpec, adapters: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Any:
    """Returns the config of an adapter whose ranks may differ; every scale is alpha / r = 1."""
    ranks = {name: len(a) for name, (a, _) in adapters.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if job.source.config.head == "causal" else None,
        "base_model_name_or_path": str(job.out),
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def adapter_rank(directory: Path) -> int:
    """Returns the largest rank in the adapter of a `peft` export."""
    return read_json(directory / "adapter" / "adapter_config.json")["r"]


def _tensors(
    job: ExportSpec,
    stage: Path,
    change: Callable[[str, Layer], Layer],
    *,
    every: bool = False,
) -> dict[str, Any]:
    """Writes the weights; returns the descriptions of the replaced layers by their names.

    Args:
      job: the export.
      stage: directory to write into.
      change: function of the name and the content of a replaced layer; its result is written.
      every: whether all linear layers of a block are replaced, not only those that changed.
    """
    linears: dict[str, Any] = {}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        source, hf_config = job.source, job.source.hf_config
        whole = tensor_table(hf_config, leaves=source.leaves())
        of_width = functools.cache(functools.partial(table_of_width, hf_config))
        rest = outside_blocks(source)
        names = family_of(hf_config).module_names
        for name, array in stored(outside(whole), rest):
            yield names.get(name, name), array  # transformers renames only for its own classes
        for i in range(source.config.num_layers):
            flat = flat_block(source, i)
            width = flat["mlp/down/kernel"].shape[0]
            rows = of_block(of_width(width), i)
            old = None if every else of_block(whole, i)
            layers = _replaced(flat, rows, old, head_axes.places(flat, source.config))
            others = {p: row for p, row in rows.items() if _module(row) not in layers}
            yield from stored(others, flat)
            for name, layer in layers.items():
                layer = change(name, layer)
                linears[name] = layer.spec()
                for below, array in layer.tensors():
                    yield f"{name}.{below}", array

    write_shards(stage, tensors(), job.shard_bytes)
    return linears


def _with_code(job: ExportSpec, stage: Path, linears: dict[str, Any]) -> None:
    """Writes the config with the descriptions of replaced layers, and the code that reads them."""
    base = architecture_of(job.source.hf_config)
    code = Path(__file__).with_name(f"{CODE}.py").read_text("utf-8")
    (stage / f"{CODE}.py").write_text(code.replace(TEMPLATE, base), "utf-8")
    write_config(
        stage,
        job.source.hf_config,
        job.dtype,
        architectures=[f"Lordjax{base}"],
        auto_map={auto_class(base): f"{CODE}.Lordjax{base}"},
        lordjax_export={"format": FORMAT, "linears": linears},
    )


def architecture_of(hf_config: Mapping[str, Any]) -> str:
    """Returns the name of the transformers class that a config describes."""
    return (hf_config.get("architectures") or family_of(hf_config).architectures)[0]


def auto_class(architecture: str) -> str:
    """Returns the name of the transformers class that opens an architecture."""
    return next(auto for end, auto in AUTO_CLASSES.items() if architecture.endswith(end))


def _module(row: TensorSource) -> str:
    """Returns the name of the Hugging Face layer that a tensor belongs to."""
    return row.name.rpartition(".")[0]


def _replaced(
    flat: Mapping[str, Any],
    rows: Mapping[str, TensorSource],
    whole: Mapping[str, TensorSource] | None,
    places: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, Layer]:
    """Returns the linear layers of a block that the stock class cannot hold, by name.

    Args:
      flat: parameters of the block by path.
      rows: tensor table of the block with the present MLP width.
      whole: tensor table of the block with the original MLP width; None: all layers are returned.
      places: inputs and outputs of every kernel, from `head_axes.places`.
    """
    ours: dict[str, list[str]] = {}
    for path in places:
        ours.setdefault(_module(rows[path]), []).append(path)
    return {
        name: _layer(paths, flat, rows, places)
        for name, paths in ours.items()
        if whole is None or any(_is_changed(path, flat, whole) for path in paths)
    }


def _is_changed(path: str, flat: Mapping[str, Any], whole: Mapping[str, TensorSource]) -> bool:
    """Returns whether the stock class cannot hold a kernel or its bias."""
    bias = path.replace("/kernel", "/bias")
    return (
        isinstance(flat[path], Kernel)
        or flat[path].shape != whole[path].loaded_shape
        or (bias in flat and bias not in whole)
    )


def _layer(
    paths: list[str],
    flat: Mapping[str, Any],
    rows: Mapping[str, TensorSource],
    places: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> Layer:
    """Builds one Hugging Face layer from the kernels at ``paths``."""
    found, first = [], rows[paths[0]]
    size = first.shape[0 if first.transpose else -1]
    biases = {path: path.replace("/kernel", "/bias") for path in paths}
    kinds = [flat[name].dtype for name in biases.values() if name in flat]
    bias = np.zeros(size, kinds[0]) if kinds else None
    for path in paths:
        inputs, outputs = places[path]
        theirs = rows[path].places[outputs]
        found.append(Part(flat[path], inputs, theirs))
        if bias is not None and biases[path] in flat:
            bias[theirs] = np.asarray(flat[biases[path]])
    return Layer(found, (first.loaded_shape[0], size), bias)
