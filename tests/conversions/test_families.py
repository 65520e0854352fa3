"""Every family against tiny random models of transformers: logits equal to 1e-5."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import CASES, LENGTH, TINY, hf_logits, logits, some_tokens

from lordjax.conversions.readers.checkpoint import open_checkpoint
from lordjax.models.attention import attend, in_chunks
from lordjax.models.layers import RMSNorm
from lordjax.models.output_heads import CARRIED
from lordjax.models.transformer import Transformer, init

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# A case of every shape of block.
ONE_EACH = (
    *("llama", "qwen2-window", "qwen3", "phi4-mini", "gpt2", "codegen", "gpt_neox", "gemma2"),
    *("opt-350m", "roberta", "bert-classes", "olmo2", "smollm3", "phi", "llama-classes"),
)


@pytest.mark.quick(*ONE_EACH)
@pytest.mark.parametrize("case", CASES)
def test_logits(saved, case):
    model, checkpoint = saved(case)
    tokens = some_tokens()
    got = logits(checkpoint.config, checkpoint.params(), tokens)
    np.testing.assert_allclose(got, hf_logits(model, tokens), rtol=0, atol=1e-5)


@pytest.mark.quick(*ONE_EACH)
@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_the_model(saved, case):
    _, checkpoint = saved(case)
    ours = jax.eval_shape(lambda: init(checkpoint.config, jax.random.key(0)))
    theirs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), checkpoint.params())
    assert ours == {name: part for name, part in theirs.items() if name not in CARRIED}


@pytest.mark.quick("left-llama", "left-gpt2", "right-bert")
@pytest.mark.parametrize(
    "case", ["llama", "mistral-window", "qwen2-window", "gpt2", "gemma2", "bert"]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(saved, case, side):
    model, checkpoint = saved(case)
    tokens, lengths = some_tokens(3), np.array([LENGTH, 17, 30])
    index = np.arange(LENGTH)[None]
    mask = index < lengths[:, None] if side == "right" else index >= LENGTH - lengths[:, None]
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    expected = hf_logits(
        model,
        tokens,
        attention_mask=torch.as_tensor(mask).long(),
        position_ids=torch.as_tensor(positions),
    )
    got = np.asarray(logits(checkpoint.config, checkpoint.params(), tokens, jnp.asarray(mask)))
    np.testing.assert_allclose(got[mask], expected[mask], rtol=0, atol=1e-5)


@pytest.mark.quick("right-llama-classes")
@pytest.mark.parametrize("case", ["llama-classes", "gpt2-classes", "opt-350m-classes"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_classifies_the_last_token(saved, case, side):
    model, checkpoint = saved(case)
    tokens, lengths = some_tokens(3), np.array([LENGTH, 17, 30])
    index = np.arange(LENGTH)[None]
    mask = index < lengths[:, None] if side == "right" else index >= LENGTH - lengths[:, None]
    tokens = np.where(mask, tokens, model.config.pad_token_id)
    given = {"attention_mask": torch.as_tensor(mask).long()}
    if "opt" not in case:
        given["position_ids"] = torch.as_tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0))
    got = np.asarray(logits(checkpoint.config, checkpoint.params(), tokens, jnp.asarray(mask)))
    np.testing.assert_allclose(got, hf_logits(model, tokens, **given), rtol=0, atol=1e-5)


@pytest.mark.quick("left-roberta")
@pytest.mark.parametrize("case", ["roberta", "roberta-options", "roberta-bare", "roberta-classes"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_roberta_counts_positions_without_padding(saved, case, side):
    model, checkpoint = saved(case)
    tokens, lengths = some_tokens(3), np.array([LENGTH, 17, 30])
    index = np.arange(LENGTH)[None]
    mask = index < lengths[:, None] if side == "right" else index >= LENGTH - lengths[:, None]
    tokens = np.where(mask, tokens, model.config.pad_token_id)
    expected = hf_logits(model, tokens, attention_mask=torch.as_tensor(mask).long())
    got = np.asarray(logits(checkpoint.config, checkpoint.params(), tokens, jnp.asarray(mask)))
    rows = mask if case != "roberta-classes" else mask[:, 0]  # the first place is classified
    np.testing.assert_allclose(got[rows], expected[rows], rtol=0, atol=1e-5)


@pytest.mark.quick("bert-classes")
@pytest.mark.parametrize("case", ["bert", "bert-options", "bert-classes", "bert-bare"])
def test_token_types(saved, case):
    model, checkpoint = saved(case)
    tokens = some_tokens()
    types = np.random.default_rng(1).integers(0, checkpoint.config.token_types, tokens.shape)
    expected = hf_logits(model, tokens, token_type_ids=torch.as_tensor(types))
    types = jnp.asarray(types, jnp.int32)
    got = logits(checkpoint.config, checkpoint.params(), tokens, None, types)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_token_types_of_a_model_without(saved):
    _, checkpoint = saved("gpt2")
    tokens = some_tokens()
    with pytest.raises(ValueError, match="token types are given, but this model has none"):
        logits(checkpoint.config, checkpoint.params(), tokens, None, jnp.zeros_like(tokens))


@pytest.mark.parametrize("causal", [False, True])
def test_chunks_of_queries_change_nothing(causal):
    keys = jax.random.split(jax.random.key(0), 3)
    heads = zip(keys, (4, 2, 2), strict=True)
    q, k, v = (jax.random.normal(key, (2, 29, count, 8)) for key, count in heads)
    mask = jnp.arange(29)[None] < jnp.array([[29], [20]])
    options = {"scale": 0.3, "mask": mask, "causal": causal}
    whole, parts = (in_chunks(q, k, v, chunk=size, **options) for size in (29, 6))
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)


def test_a_window_must_be_causal():
    x = jnp.zeros((1, 4, 1, 2))
    with pytest.raises(ValueError, match="sliding window of 2 tokens: expected causal attention"):
        attend(x, x, x, scale=1.0, sliding_window=2, causal=False)


@pytest.mark.quick("roberta")
@pytest.mark.parametrize("case", ["roberta", "bert-classes"])
def test_every_token_of_an_encoder_sees_every_other(saved, case):
    """More tokens than a chunk of queries has, so that chunks see keys behind them."""
    _, checkpoint = saved(case)
    config = dataclasses.replace(checkpoint.config, position_rows=None)
    params = checkpoint.params()
    tokens = np.random.default_rng(0).integers(2, TINY["vocab_size"], (1, 300), np.int32)
    other = tokens.copy()
    other[0, -1] = (other[0, -1] + 1) % TINY["vocab_size"]
    a, b = (np.asarray(logits(config, params, t)) for t in (tokens, other))
    assert np.abs(a - b).reshape(-1, a.shape[-1]).max(axis=1).min() > 1e-6


def test_the_scale_of_embeddings_is_rounded_like_them(saved):
    model, checkpoint = saved("gemma2")
    embed, tokens = copy.deepcopy(model.get_input_embeddings()).to(torch.bfloat16), some_tokens()
    with torch.no_grad():
        expected = embed(torch.as_tensor(tokens).long()).float().numpy()
    rest = {"embed": checkpoint.params(jnp.bfloat16)["embed"]}
    model = Transformer(checkpoint.config)
    got = model.apply({"params": rest}, tokens, method=Transformer.embed_tokens)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got, np.float32), expected)


def test_norms_stored_less_one_lose_nothing(saved, tmp_path):
    """1 + w of a small w has more digits than bfloat16."""
    from safetensors.numpy import load_file, save_file

    _, checkpoint = saved("gemma3")
    tensors = load_file(checkpoint.path / "model.safetensors")
    tensors = {name: a.astype(jnp.bfloat16) for name, a in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.hf_config))
    narrow = open_checkpoint(tmp_path)
    for path, source in narrow.table.items():
        ours, theirs = narrow.read(path), tensors[source.name]
        assert (ours.shape, ours.dtype) == (
            narrow.leaves()[path].shape,
            narrow.leaves()[path].dtype,
        )
        if path.endswith("scale"):
            np.testing.assert_array_equal((ours - 1).astype(theirs.dtype), theirs)
        else:
            assert ours.dtype == theirs.dtype


def test_a_wide_scale_is_rounded_once():
    """Gemma multiplies before it rounds."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(50, 32)), jnp.bfloat16)
    params = {"scale": jnp.asarray(1 + 0.1 * rng.normal(size=32), jnp.float32)}
    got = RMSNorm(1e-6).apply({"params": params}, x)
    exact = RMSNorm(1e-6).apply({"params": params}, x.astype(jnp.float32))
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))
    rounded = {"scale": params["scale"].astype(jnp.bfloat16)}
    assert not np.array_equal(RMSNorm(1e-6).apply({"params": rounded}, x), got)


def test_bare_model_without_its_prefix(saved, tmp_path):
    """GPT-2 as released: no ``transformer.``, and the causal mask among the tensors."""
    from safetensors.numpy import load_file, save_file

    _, checkpoint = saved("gpt2")
    tensors = load_file(checkpoint.path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): a for name, a in tensors.items()}
    save_file({**tensors, "h.0.attn.bias": np.tri(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.hf_config))
    again = open_checkpoint(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params(), checkpoint.params())


@pytest.mark.parametrize("name", ["bias", "masked_bias", "rotary_emb.inv_freq"])
def test_leftover_tensors_of_pythia(saved, tmp_path, name):
    from safetensors.numpy import load_file, save_file

    _, checkpoint = saved("gpt_neox")
    tensors = load_file(checkpoint.path / "model.safetensors")
    save_file(
        {**tensors, f"gpt_neox.layers.1.attention.{name}": np.tri(4)},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.hf_config))
    again = open_checkpoint(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params(), checkpoint.params())


def rewrite(checkpoint, directory, rename, **config):
    """The checkpoint again, tensors renamed and added, keys of its config replaced."""
    from safetensors.numpy import load_file, save_file

    tensors = rename(load_file(checkpoint.path / "model.safetensors"))
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**checkpoint.hf_config, **config}))
    return open_checkpoint(directory)


def test_bert_as_released(saved, tmp_path):
    """Norms named as in TensorFlow, both heads of pre-training, the pooler, numbered positions."""
    _, checkpoint = saved("bert")

    def rename(tensors):
        new = {
            name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): a
            for name, a in tensors.items()
        }
        new |= EXTRA_OF_BERT
        new["bert.embeddings.position_ids"] = np.arange(64)[None]
        new["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
        return new

    again = rewrite(checkpoint, tmp_path, rename, architectures=["BertForPreTraining"])
    found = again.params()
    kept = {"pooler": found.pop("pooler"), "seq_relationship": found.pop("seq_relationship")}
    jax.tree.map(np.testing.assert_array_equal, found, checkpoint.params())
    np.testing.assert_array_equal(
        kept["pooler"]["dense"]["kernel"], EXTRA_OF_BERT["bert.pooler.dense.weight"].T
    )
    np.testing.assert_array_equal(
        kept["seq_relationship"]["kernel"], EXTRA_OF_BERT["cls.seq_relationship.weight"].T
    )
    for part, name in (
        ("pooler", "bert.pooler.dense"),
        ("seq_relationship", "cls.seq_relationship"),
    ):
        layer = kept[part].get("dense", kept[part])
        np.testing.assert_array_equal(layer["bias"], EXTRA_OF_BERT[f"{name}.bias"])


_RANDOM = np.random.default_rng(3)
EXTRA_OF_BERT = {
    name: _RANDOM.normal(size=shape).astype(np.float32)
    for name, shape in {
        "bert.pooler.dense.weight": (32, 32),
        "bert.pooler.dense.bias": (32,),
        "cls.seq_relationship.weight": (2, 32),
        "cls.seq_relationship.bias": (2,),
    }.items()
}


def test_codebert_as_released(saved, tmp_path):
    """The bare model without its prefix, but with its pooler."""
    _, checkpoint = saved("roberta-bare")

    def rename(tensors):
        assert "pooler.dense.weight" in tensors
        return {**tensors, "embeddings.position_ids": np.arange(64)[None]}

    again = rewrite(checkpoint, tmp_path, rename, output_past=True)
    assert again.config.head == "none"
    jax.tree.map(np.testing.assert_array_equal, again.params(), checkpoint.params())


@pytest.mark.parametrize("name", ["lm_head.decoder.weight", "lm_head.decoder.bias"])
def test_a_tied_copy_must_be_one(saved, tmp_path, name):
    _, checkpoint = saved("roberta")
    kind = name.rpartition(".")[2]
    original = {"weight": "roberta.embeddings.word_embeddings.weight", "bias": "lm_head.bias"}[kind]
    same = rewrite(checkpoint, tmp_path, lambda t: {**t, name: t[original]})
    jax.tree.map(np.testing.assert_array_equal, same.params(), checkpoint.params())
    other = rewrite(checkpoint, tmp_path, lambda t: {**t, name: t[original] + 1})
    with pytest.raises(ValueError, match=f"{name} differs from the .*, but tie_word_embeddings"):
        other.params()


def test_more_tokens_than_learned_positions(saved):
    _, checkpoint = saved("gpt2")
    tokens = np.zeros((1, TINY["max_position_embeddings"] + 1), np.int32)
    with pytest.raises(ValueError, match="65 tokens, but the model has learned 64 positions"):
        logits(checkpoint.config, checkpoint.params(), tokens)


_TEXT = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
_TEXT |= {"max_position_embeddings": 64, "sliding_window": 7, "pad_token_id": 0}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
_VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}


@pytest.mark.quick("text part-gemma3")
@pytest.mark.parametrize("spelling", ["text part", "model.text part"])
@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_text_part_of_several_modalities(kind, spelling, tmp_path):
    """The tensors of images are left out, and the rest is a model of text."""
    from safetensors.numpy import load_file, save_file

    torch.manual_seed(0)
    text = _TEXT | ({"query_pre_attn_scalar": 24} if kind == "gemma3" else {})
    extra = {
        "mm_tokens_per_image": 4,
        "image_token_id": 90,
        "tie_word_embeddings": kind == "gemma3",
    }
    text |= {"tie_word_embeddings": kind == "gemma3"}
    config = transformers.AutoConfig.for_model(
        kind, text_config=text, vision_config=dict(_VISION), **extra
    )
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path)
    if spelling == "model.text part":
        tensors = load_file(tmp_path / "model.safetensors")
        save_file({_newer(n): a for n, a in tensors.items()}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.left_out and all("language_model" not in n for n in checkpoint.left_out)
    tokens = np.random.default_rng(0).integers(2, 80, (2, LENGTH), np.int32)
    got = logits(checkpoint.config, checkpoint.params(), tokens)
    np.testing.assert_allclose(got, hf_logits(model, tokens), rtol=0, atol=1e-5)


def _newer(name):
    """``language_model.model.norm`` -> ``model.language_model.norm``; other parts likewise."""
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.")
    return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"
