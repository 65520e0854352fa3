"""Opens an export with the program that it is for, and compares it with the original model.

Both run in float32 on the same tokens, so that a difference comes from the stored weights and not
from half-precision arithmetic. Some of llama.cpp's products are of half precision all the same. The
tolerance is relative to the standard deviation of the logits: the larger of `TOLERANCE` and `STEPS`
times the machine epsilon of the stored dtype.

A GGUF file is opened by llama.cpp where that is installed, else by lordjax's own reader, and the
result says by which one.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lordjax.conversions.exporters import llama_cpp
from lordjax.conversions.exporters.factored import architecture_of, auto_class
from lordjax.conversions.exporters.gguf_file import FILE, epsilon, has_widths
from lordjax.conversions.exporters.hf_files import Opened
from lordjax.conversions.exporters.orbax import restore_orbax
from lordjax.conversions.families.registry import carried_names
from lordjax.conversions.readers.checkpoint import open_checkpoint
from lordjax.kernels.kinds import astype
from lordjax.models.config import ModelConfig
from lordjax.models.source import InMemory
from lordjax.models.transformer import Transformer
from lordjax.names import layer, listed
from lordjax.runtime.input_files import read_json

TOLERANCE = 1e-3
STEPS = 16
LLAMA_CPP = 2.0**-9  # twice the machine epsilon of half precision
OWN_READER = "lordjax's own reader, because llama.cpp is not installed"

Logits = Callable[[np.ndarray], np.ndarray]  # tokens [1, L] -> float32 [L, vocab]


def torch_logits(directory: Path, *, remote: bool) -> Logits:
    """Opens a directory with transformers.

    Args:
      directory: path of the export.
      remote: whether to run the code in the directory (``trust_remote_code``).

    Returns:
      Function that computes the model's logits.

    Raises:
      ValueError: if transformers reports missing or unknown tensors.
    """
    return _run_torch(_open_torch(directory, remote))


def peft_logits(directory: Path) -> Logits:
    """Opens the model of a directory and its adapter with PEFT."""
    from peft import PeftModel

    base = _open_torch(directory, True)
    return _run_torch(PeftModel.from_pretrained(base, directory / "adapter"))


def gguf_logits(directory: Path) -> Logits:
    """Opens a GGUF export with llama.cpp where that is installed, else with lordjax's own reader.

    Raises:
      ImportError: if llama.cpp is not installed, and our reader does not open such files.
    """
    file = directory / FILE
    if llama_cpp.is_installed():
        model = llama_cpp.LlamaCpp(file)
        return lambda tokens: model.logits(tokens[0])
    if has_widths(file):
        raise ImportError(
            f"{file}: a file with an MLP width for every block is verified by llama.cpp only; pip "
            "install 'lordjax[llamacpp]', or leave out --verify"
        )
    return our_logits(open_checkpoint(file))


def orbax_logits(directory: Path) -> Logits:
    """Opens a directory with Orbax."""
    return our_logits(InMemory(*restore_orbax(directory)))


class Target(NamedTuple):
    """How a kind of export is opened.

    Attributes:
      logits: function that opens a directory.
      needs: packages that the function needs.
      name: what opens it, for the result.
    """

    logits: Callable[[Path], Logits]
    needs: tuple[str, ...]
    name: str


RELOAD: dict[str, Target] = {
    "dense": Target(functools.partial(torch_logits, remote=False), ("torch",), "transformers"),
    "factored": Target(
        functools.partial(torch_logits, remote=True), ("torch",), "transformers, with its own code"
    ),
    "peft": Target(peft_logits, ("torch", "peft"), "PEFT"),
    "nemotron-nas": Target(
        functools.partial(torch_logits, remote=True), ("torch",), "transformers, with its own code"
    ),
    "gguf": Target(gguf_logits, (), "llama.cpp"),
    "orbax": Target(orbax_logits, (), "Orbax"),
}


def target_of(to: str) -> str:
    """Returns the name of the program that opens a kind of export on this machine."""
    if to == "gguf" and not llama_cpp.is_installed():
        return OWN_READER
    return RELOAD[to].name


def check_installed(to: str) -> None:
    """Raises ImportError if a package that opens this kind of export is not installed."""
    if to not in RELOAD:
        raise ImportError(
            f"--verify does not run {to}; leave it out, and verify the same model with --to "
            "factored, which holds the same tensors"
        )
    needs = RELOAD[to].needs
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"--verify of a {to} export needs {' and '.join(needs)}; not installed: "
            f"{', '.join(missing)}; pip install 'lordjax[export]', or leave out --verify"
        )


def _open_torch(directory: Path, remote: bool) -> Any:
    import torch
    import transformers

    hf_config = read_json(directory / "config.json")
    opener = getattr(transformers, auto_class(architecture_of(hf_config)))
    model, loading = opener.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=remote, output_loading_info=True
    )
    skipped = carried_names(hf_config)
    wrong = {
        what: [n for n in sorted(names) if n not in skipped] for what, names in loading.items()
    }
    wrong = {what: listed(names) for what, names in wrong.items() if names}
    if wrong:
        raise ValueError(
            f"{directory}: transformers finds tensors that do not match the model: {wrong}; "
            "export it again"
        )
    return model.eval()


def _run_torch(model: Any) -> Logits:
    import torch

    def logits(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            out = model(torch.as_tensor(tokens).long())
            if "start_logits" in out:
                logits = torch.stack([out.start_logits, out.end_logits], dim=-1)
            else:
                names = ("last_hidden_state", "prediction_logits", "logits")
                logits = out[next(name for name in names if name in out)]
            return logits[0].float().numpy()

    return logits


def our_logits(source: Any) -> Logits:
    """Returns a function that computes a model's logits with lordjax in float32."""
    config: ModelConfig = source.config
    blocks = {layer(i): source.block(i) for i in range(config.num_layers)}
    params = jax.tree.map(jnp.asarray, astype({**source.non_block_params(), **blocks}, jnp.float32))

    @jax.jit
    def run(params: Any, tokens: Any) -> Any:
        return Transformer(config).apply({"params": params}, tokens)

    def logits(tokens: np.ndarray) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return np.asarray(run(params, jnp.asarray(tokens, jnp.int32))[0])

    return logits


def verify(source: Opened, directory: Path, to: str, tokens: np.ndarray) -> dict[str, Any]:
    """Compares the logits of an export with those of the model that it was made from.

    Args:
      source: exported model.
      directory: path of the export.
      to: kind of the export, a key of `RELOAD`.
      tokens: token ids ``[sequences, length]``.

    Returns:
      A dict with ``target`` (what opened the export), ``logit_difference`` (the largest absolute
      one), ``tolerance``, ``windows`` (the number of sequences) and ``passed``. For a causal model
      also ``perplexity`` of the export, and ``perplexity_difference``, the export's minus the
      model's.

    Raises:
      ImportError: if a package that opens the export is not installed; see `check_installed`.
      ValueError: if the export does not open correctly.
    """
    theirs, ours = RELOAD[to].logits(directory), our_logits(source)
    dtype = np.dtype(source.leaves()["embed/embedding"].dtype)
    largest, spread, nlls = 0.0, [], []
    for window in tokens:
        a, b = theirs(window[None]), ours(window[None])
        difference = float(np.abs(a - b).max())
        largest = max(largest, difference) if difference == difference else float("inf")
        spread.append(float(b.std()))
        if source.config.head == "causal":
            nlls.append([_nll(logits, window) for logits in (a, b)])
    step = float(jnp.finfo(dtype).eps)
    if to == "gguf":
        step = max(step, epsilon(directory), LLAMA_CPP if llama_cpp.is_installed() else 0.0)
    tolerance = max(TOLERANCE, STEPS * step) * float(np.mean(spread))
    result = {
        "target": target_of(to),
        "logit_difference": largest,
        "tolerance": tolerance,
        "windows": len(tokens),
        "passed": largest <= tolerance,
    }
    if nlls:
        perplexity, expected = (float(x) for x in np.exp(np.mean(nlls, axis=0)))
        result |= {"perplexity": perplexity, "perplexity_difference": perplexity - expected}
    return result


def _nll(logits: np.ndarray, window: np.ndarray) -> float:
    """Returns the mean negative log-likelihood of the tokens 1 … L-1, in nats."""
    rows = logits[:-1].astype(np.float64)
    peak = rows.max(axis=1, keepdims=True)
    total = np.log(np.exp(rows - peak).sum(axis=1)) + peak[:, 0]
    return float(np.mean(total - rows[np.arange(len(rows)), window[1:]]))
