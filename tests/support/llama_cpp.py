"""llama.cpp itself, where it is installed; tests that need it are skipped elsewhere."""

import pytest

from lordjax.conversions.exporters.llama_cpp import LlamaCpp, is_installed


def opened_by_llama_cpp(path):
    """A GGUF file that llama.cpp has opened."""
    if not is_installed():
        pytest.skip("llama.cpp is not installed: pip install 'lordjax[llamacpp]'")
    return LlamaCpp(path)
