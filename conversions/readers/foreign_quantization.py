"""Recognises weights that another program has quantized, which are refused with advice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lordjax.conversions.readers.tensor_files import TensorFiles

# Ends of the names of tensors that stand beside or for a quantized matrix -> whose format it is.
_TENSORS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".SCB": "bitsandbytes (8 bits)",
    ".absmax": "bitsandbytes (4 bits)",
    ".quant_map": "bitsandbytes (4 bits)",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_packed": "compressed-tensors",
    ".weight_blocks": "MXFP4",
}
_NAMES = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": "MXFP4",
}
_ADVICE = (
    "lordjax reads float32, float16 and bfloat16, and GGUF files. Open {original}, or save this "
    "one dequantized with transformers: AutoModelForCausalLM.from_pretrained(…).dequantize()"
    ".save_pretrained(…)"
)


def refuse_quantized_config(hf_config: Mapping[str, Any], where: str) -> None:
    """Checks that a config does not say that another program has quantized the weights.

    Args:
      hf_config: content of ``config.json``.
      where: path of the file, for error messages.

    Raises:
      ValueError: if it does; names the format, and what to open instead.
    """
    settings = hf_config.get("quantization_config")
    if not settings:
        return
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    name = _NAMES.get(str(method), str(method or "an unknown program"))
    raise ValueError(
        f"{where}: the weights are quantized by {name} (quantization_config); "
        + _advice(hf_config.get("_name_or_path"))
    )


def refuse_quantized_tensors(files: TensorFiles) -> None:
    """Checks that no tensor is one of a format of other programs.

    Raises:
      ValueError: if there is one; names its file, and what to open instead.
    """
    for name in files.names():
        for end, kind in _TENSORS.items():
            if name.endswith(end):
                raise ValueError(
                    f"{files.where(name)} belongs to weights that are quantized by {kind}; "
                    + _advice(None)
                )


def _advice(original: Any) -> str:
    named = isinstance(original, str) and original not in ("", ".")
    model = "the original model" + (f" (perhaps {original})" if named else "")
    return _ADVICE.format(original=model)
