"""Finds models on the Hugging Face hub, and the base models of adapters."""

from __future__ import annotations

from pathlib import Path

from lordjax.conversions.readers.adapter import CONFIG, base_of
from lordjax.conversions.readers.beside_weights import TOKENIZER_FILES

EXPECTED = "expected a checkpoint directory, a .gguf file or a hub id like 'owner/model'"
# Torch files are downloaded only without safetensors: both would double the download.
_FILES = ["*.json", *TOKENIZER_FILES, "model*.safetensors", "adapter_model*"]


def download(name: str, patterns: list[str] = _FILES) -> Path:
    """Downloads files of a model from the hub, or finds them in the hub's cache."""
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise FileNotFoundError(f"{name}: no such file or directory; {EXPECTED}")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        path = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
        if patterns is _FILES and not any(
            file for kind in ("model*.safetensors", "adapter_model*") for file in path.glob(kind)
        ):
            path = Path(
                huggingface_hub.snapshot_download(
                    name, allow_patterns=[*patterns, "pytorch_model*.bin"]
                )
            )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name}: no such file or directory, and no model of this id from the Hugging Face "
            f"hub ({type(error).__name__}: {str(error).splitlines()[0]}); {EXPECTED}"
        ) from error
    return path


def base_of_adapter(adapter: Path) -> str:
    """Returns the base model of an adapter; raises FileNotFoundError if it cannot be found."""
    base = base_of(adapter)
    if not Path(base).expanduser().exists():
        try:
            return str(download(base))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{adapter}: the base model of this adapter is not there: {error}. Set "
                f"base_model_name_or_path in its {CONFIG} to the model's directory"
            ) from error
    return base
