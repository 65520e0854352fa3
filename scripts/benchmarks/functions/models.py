"""Models of other people's packages, small and with random weights.

A case is a function of a parameter tree, as `lordjax.find_sites` takes it, with a batch for it. The
packages are those of the extra ``interop``; each is imported when a case of it is built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BATCH, LENGTH, WORDS = 4, 12, 64  # of the language models
SIDE, PATCH = 16, 8  # pixels of the images and of their patches
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model as a function.

    Attributes:
      apply: function ``(params, *batch) -> outputs``.
      params: its parameters: a dict, an ``nnx.State``, or the arrays of an Equinox module.
      batch: arrays with a leading axis of `BATCH` examples.
      logits: function from the outputs to the logits ``[..., classes]``.
    """

    apply: Callable[..., Any]
    params: Any
    batch: tuple[Any, ...]
    logits: Callable[[Any], Any] = lambda outputs: outputs

    def loss(self, outputs: Any, *batch: Any) -> Any:
        """Returns the cross-entropy against the model's own decisions, ``[...]``."""
        del batch
        logits = self.logits(outputs)
        best = jax.lax.stop_gradient(jnp.argmax(logits, -1))[..., None]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), best, -1)[..., 0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides the deprecation notes of other packages while they are imported and built."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build(name: str) -> Case:
    """Returns a case of `CASES` or `SHAPES` by its name.

    Raises:
      ImportError: if the package that it comes from is not installed.
    """
    with quiet():
        return (CASES | SHAPES)[name]()


def tokens(seed: int = 0) -> jax.Array:
    """Returns token ids ``[BATCH, LENGTH]``."""
    return jax.random.randint(jax.random.key(seed), (BATCH, LENGTH), 2, WORDS)


def images(channels_last: bool = False) -> jax.Array:
    """Returns images, ``[BATCH, 3, SIDE, SIDE]`` or with the channels last."""
    shape = (BATCH, SIDE, SIDE, 3) if channels_last else (BATCH, 3, SIDE, SIDE)
    return jax.random.normal(jax.random.key(1), shape)


def larger(params: Any, factor: float = 5.0) -> Any:
    """Returns parameters with larger matrices, so that no layer is close to doing nothing."""
    return jax.tree.map(lambda a: a * factor if a.ndim >= 2 else a, params)


def _flax(cls: str, config: str, *batch: Any, **options: Any) -> Case:
    """Returns a Flax model of transformers."""
    import transformers

    made = getattr(transformers, config)(**options)
    model = getattr(transformers, cls)(made, seed=0, dtype=jnp.float32)
    return Case(
        lambda params, *inputs: model(*inputs, params=params),
        larger(model.params),
        batch,
        lambda outputs: outputs["logits"],
    )


def llama() -> Case:
    """Llama: grouped heads, a gated MLP, a head of its own."""
    own = {**TEXT, "num_key_value_heads": 2}
    return _flax("FlaxLlamaForCausalLM", "LlamaConfig", tokens(), **own)


def gpt2() -> Case:
    """GPT-2: kernels ``[out, in]``, queries, keys and values in one, tied embeddings."""
    own = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return _flax("FlaxGPT2LMHeadModel", "GPT2Config", tokens(), **own)


def opt() -> Case:
    """OPT: a ReLU MLP on flattened tokens, tied embeddings."""
    own = {name: n for name, n in TEXT.items() if name != "intermediate_size"}
    return _flax(
        "FlaxOPTForCausalLM", "OPTConfig", tokens(), **own, ffn_dim=48, word_embed_proj_dim=32
    )


def roberta() -> Case:
    """RoBERTa with a classifier."""
    own = {**TEXT, "type_vocab_size": 1, "num_labels": 3}
    return _flax("FlaxRobertaForSequenceClassification", "RobertaConfig", tokens(), **own)


def bert() -> Case:
    """BERT as a masked language model, tied embeddings."""
    return _flax("FlaxBertForMaskedLM", "BertConfig", tokens(), **TEXT)


def vit() -> Case:
    """ViT with a classifier; patches by a convolution."""
    own = {name: n for name, n in TEXT.items() if name not in ("vocab_size",)}
    own.pop("max_position_embeddings")
    return _flax(
        "FlaxViTForImageClassification",
        "ViTConfig",
        images(),
        **own,
        image_size=SIDE,
        patch_size=PATCH,
        num_labels=5,
    )


def clip() -> Case:
    """CLIP: a text and an image encoder, outputs in nested dataclasses."""
    import transformers

    text = {**TEXT, "eos_token_id": WORDS - 1, "projection_dim": 24}
    image = {name: n for name, n in TEXT.items() if not name.startswith(("vocab", "max"))}
    config = transformers.CLIPConfig(
        text_config=text,
        vision_config={**image, "image_size": SIDE, "patch_size": PATCH, "projection_dim": 24},
        projection_dim=24,
    )
    model = transformers.FlaxCLIPModel(config, seed=0, input_shape=((1, 1), (1, SIDE, SIDE, 3)))
    return Case(
        lambda params, *inputs: model(*inputs, params=params),
        larger(model.params),
        (tokens(), images()),
        lambda outputs: outputs["logits_per_image"],
    )


def whisper() -> Case:
    """Whisper: speech to text, an encoder with convolutions and a decoder with cross attention."""
    own = {
        "vocab_size": WORDS,
        "num_mel_bins": 8,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_source_positions": 10,
        "max_target_positions": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "decoder_start_token_id": 1,
    }
    sound = jax.random.normal(jax.random.key(2), (BATCH, 8, 20))
    return _flax("FlaxWhisperForConditionalGeneration", "WhisperConfig", sound, tokens(), **own)


def equimo_vit() -> Case:
    """A vision transformer of equimo, in Equinox: one image at a time, mapped by ``vmap``."""
    import equinox as eqx
    from equimo.models import VisionTransformer

    model = VisionTransformer(
        img_size=SIDE,
        in_channels=3,
        dim=32,
        patch_size=PATCH,
        num_heads=4,
        depths=[2],
        reg_tokens=0,
        num_classes=5,
        key=jax.random.key(0),
    )
    params, rest = eqx.partition(model, eqx.is_inexact_array)

    def apply(params: Any, image: Any) -> Any:
        run = eqx.combine(params, rest)
        return jax.vmap(lambda one: run(one, key=jax.random.key(0), inference=True))(image)

    return Case(apply, params, (images(),))


def _tunix(config: Any) -> tuple[Any, Any]:
    """Returns the graph and the state of tunix's Llama 3, as shapes."""
    from flax import nnx
    from tunix.models.llama3 import model as llama3

    return nnx.split(nnx.eval_shape(lambda: llama3.Llama3(config, rngs=nnx.Rngs(0))))


def _tunix_apply(graph: Any) -> Callable[..., Any]:
    from flax import nnx

    def apply(state: Any, ids: Any) -> Any:
        count, length = ids.shape
        positions = jnp.broadcast_to(jnp.arange(length), (count, length))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (count, length, length))
        return nnx.merge(graph, state)(ids, positions, None, mask)[0]

    return apply


def tunix_llama() -> Case:
    """Llama 3 of tunix, in NNX: products by ``einsum`` with heads as axes of their own."""
    from tunix.models.llama3 import model as llama3

    graph, shapes = _tunix(
        llama3.ModelConfig(
            num_layers=2,
            vocab_size=WORDS,
            embed_dim=32,
            hidden_dim=48,
            num_heads=4,
            head_dim=8,
            num_kv_heads=2,
            rope_theta=10_000,
            norm_eps=1e-5,
        )
    )
    draw = np.random.default_rng(0).normal
    state = jax.tree.map(lambda s: jnp.asarray(draw(s.ndim == 1, 0.1, s.shape), s.dtype), shapes)
    return Case(_tunix_apply(graph), state, (tokens(),))


def _by_shapes(size: str) -> Case:
    """Llama 3.1 of tunix by shapes alone: billions of parameters that are nowhere."""
    from tunix.models.llama3 import model as llama3

    graph, shapes = _tunix(getattr(llama3.ModelConfig, f"llama3p1_{size}")())
    return Case(_tunix_apply(graph), shapes, (jax.ShapeDtypeStruct((1, 2048), jnp.int32),))


CASES: dict[str, Callable[[], Case]] = {
    "FlaxLlama": llama,
    "FlaxGPT2": gpt2,
    "FlaxOPT": opt,
    "FlaxRoberta": roberta,
    "FlaxBert": bert,
    "FlaxViT": vit,
    "FlaxCLIP": clip,
    "FlaxWhisper": whisper,
    "equimo ViT (Equinox)": equimo_vit,
    "tunix Llama 3 (NNX)": tunix_llama,
}
SHAPES: dict[str, Callable[[], Case]] = {
    "tunix Llama 3.1 8B (NNX)": lambda: _by_shapes("8b"),
    "tunix Llama 3.1 405B (NNX)": lambda: _by_shapes("405b"),
}
