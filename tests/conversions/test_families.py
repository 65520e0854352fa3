"""Every family against tiny random models of transformers: logits equal to 1e-5."""

import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax.conversions.families import FAMILIES, model_config, tensor_table
from lordjax.conversions.huggingface import open_checkpoint
from lordjax.models.layers import RMSNorm, attend
from lordjax.models.transformer import Transformer, init

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 40
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def stretches(pairs):
    """Factors of longrope, one per rotary pair."""
    return {f"{name}_factor": [a + 0.3 * i for i in range(pairs)] for name, a in LONG.items()}


LONG = {"short": 1.0, "long": 1.5}
LONGROPE = {"rope_scaling": {"rope_type": "longrope", **stretches(4)}}
CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-dynamic": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    ),
    "llama-dynamic-short": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama-llama3": (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3}, "rope_theta": 500.0},
    ),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "llama-yarn-options": (
        "llama",
        {
            "rope_scaling": {**YARN, "attention_factor": 1.3, "beta_fast": 8, "beta_slow": 2}
            | {"truncate": False},
            "rope_theta": 50.0,
        },
    ),
    "llama-yarn-mscale": (
        "llama",
        {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}, "rope_theta": 50.0},
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 12}),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1}),
    "llama-all-heads": ("llama", {"num_key_value_heads": 4, "hidden_act": "gelu"}),
    "mistral-window": ("mistral", {"sliding_window": 7, "head_dim": 16}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "phi3-window": ("phi3", {"pad_token_id": 0, "sliding_window": 6, "tie_word_embeddings": True}),
    "phi3-long": ("phi3", {"pad_token_id": 0, **LONGROPE, "original_max_position_embeddings": 16}),
    "phi3-short": ("phi3", {"pad_token_id": 0, **LONGROPE, "original_max_position_embeddings": 48}),
    "phi4-mini": (
        "phi3",
        {"pad_token_id": 0, "hidden_size": 64, "partial_rotary_factor": 0.75}
        | {"original_max_position_embeddings": 16, "tie_word_embeddings": True}
        | {"rope_scaling": {"type": "longrope", **stretches(6), "attention_factor": 1.2}},
    ),
    "starcoder2": ("starcoder2", {}),
    "starcoder2-options": (
        "starcoder2",
        {"use_bias": False, "sliding_window": 9, "tie_word_embeddings": False},
    ),
    "gpt2": ("gpt2", {}),
    "gpt2-options": (
        "gpt2",
        {"n_inner": 40, "activation_function": "relu", "tie_word_embeddings": False},
    ),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "gpt_bigcode-heads": ("gpt_bigcode", {"multi_query": False, "activation_function": "gelu_new"}),
    "opt": ("opt", {}),
    "codegen": ("codegen", {"rotary_dim": 4}),
    "codegen-whole-heads": ("codegen", {"rotary_dim": 8, "n_inner": 40}),
    "qwen3": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-options": (
        "qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 5}
        | {"max_window_layers": 1},
    ),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.25, "hidden_size": 64}),
    "gpt_neox-options": (
        "gpt_neox",
        {"rotary_pct": 1.0, "rotary_emb_base": 500, "attention_bias": False}
        | {"use_parallel_residual": False, "hidden_act": "gelu_fast"},
    ),
    "gpt_neox-linear": (
        "gpt_neox",
        {"rotary_pct": 0.5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "gpt_neox-yarn": ("gpt_neox", {"rotary_pct": 0.5, "rope_scaling": YARN}),
    "gemma2": (
        "gemma2",
        {"sliding_window": 7, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}
        | {"final_logit_softcapping": 1.5},
    ),
    "gemma2-options": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 8}
        | {"attention_bias": True, "tie_word_embeddings": False, "sliding_window": 5}
        | {"layer_types": ["full_attention", "sliding_attention"]},
    ),
    "gemma3": (
        "gemma3_text",
        {"num_hidden_layers": 3, "sliding_window": 7, "query_pre_attn_scalar": 24}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "gemma3-options": (
        "gemma3_text",
        {"attention_bias": True, "sliding_window": 9, "final_logit_softcapping": 1.5}
        | {"layer_types": ["full_attention", "sliding_attention"]}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 700.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            }
        },
    ),
    "opt-unbiased": ("opt", {"enable_bias": False, "activation_function": "gelu"}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt-350m-untied": (
        "opt",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 20, "tie_word_embeddings": False},
    ),
    "opt-no-final-norm": ("opt", {"_remove_final_layer_norm": True}),
    "roberta": ("roberta", {}, "MaskedLM"),
    "roberta-options": (
        "roberta",
        {"type_vocab_size": 1, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5}
        | {"tie_word_embeddings": False, "pad_token_id": 0},
        "MaskedLM",
    ),
    "roberta-classes": ("roberta", {"num_labels": 3}, "SequenceClassification"),
    "roberta-bare": ("roberta", {}, ""),
    "bert": ("bert", {}, "MaskedLM"),
    "bert-options": (
        "bert",
        {"hidden_act": "relu", "tie_word_embeddings": False, "type_vocab_size": 3},
        "MaskedLM",
    ),
    "bert-classes": ("bert", {}, "SequenceClassification"),
    "bert-one-class": ("bert", {"num_labels": 1}, "SequenceClassification"),
    "bert-bare": ("bert", {}, ""),
}
# What the sizes of `TINY` are called where they are called something else.
_GPT2 = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": None,
    "num_key_value_heads": None,
}
NAMES = {
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "codegen": _GPT2,
    "opt": {"intermediate_size": "ffn_dim", "num_key_value_heads": None},
    "roberta": {"num_key_value_heads": None},
    "bert": {"num_key_value_heads": None},
}
NAMES["gpt_neox"] = {"num_key_value_heads": None}
EXTRA = {"opt": {"word_embed_proj_dim": TINY["hidden_size"]}, "codegen": {"rotary_dim": 8}}
EXTRA["gemma2"] = EXTRA["gemma3_text"] = {"head_dim": 12}
EXTRA["gpt_neox"] = {"rotary_pct": 0.5}


def tiny(kind, options=()):
    """`TINY` in the words of a family."""
    names = NAMES.get(kind, {})
    sizes = {names.get(key, key): value for key, value in TINY.items()}
    sizes.pop(None, None)
    return {**sizes, **EXTRA.get(kind, {}), **dict(options)}


def hf_model(kind, options, head="CausalLM"):
    """A random model whose biases and norms are not at their initial 0 and 1."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **tiny(kind, options))
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.15 * torch.randn(parameter.shape)
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(HF model, checkpoint) of a case, each made once."""

    @functools.cache
    def make(case):
        directory = tmp_path_factory.mktemp(case)
        model = hf_model(*CASES[case])
        model.save_pretrained(directory)
        return model, open_checkpoint(directory)

    return make


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens, mask=None, token_types=None):
    return Transformer(config).apply({"params": params}, tokens, mask, token_types)


def hf_logits(model, tokens, **kwargs):
    with torch.no_grad():
        out = model(torch.as_tensor(np.asarray(tokens)).long(), **kwargs)
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


def some_tokens(batch=2):
    """Without 0 and 1, which RoBERTa takes for padding."""
    return np.random.default_rng(0).integers(2, TINY["vocab_size"], (batch, LENGTH), np.int32)


@pytest.mark.parametrize("case", CASES)
def test_logits(saved, case):
    model, checkpoint = saved(case)
    tokens = some_tokens()
    got = logits(checkpoint.config, checkpoint.params(), tokens)
    np.testing.assert_allclose(got, hf_logits(model, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_the_model(saved, case):
    _, checkpoint = saved(case)
    ours = jax.eval_shape(lambda: init(checkpoint.config, jax.random.key(0)))
    theirs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), checkpoint.params())
    assert ours == theirs


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
    whole, parts = (attend(q, k, v, chunk=size, **options) for size in (29, 6))
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)


def test_a_window_must_be_causal():
    x = jnp.zeros((1, 4, 1, 2))
    with pytest.raises(ValueError, match="a window of 2 positions back, but attention looks ahead"):
        attend(x, x, x, scale=1.0, window=2, causal=False)


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


@pytest.mark.parametrize("case", ["llama-llama3", "llama-dynamic", "qwen2-window", "gpt_neox"])
def test_config_of_transformers_4(saved, case):
    """The older spelling of the rotary keys gives the same model."""
    _, checkpoint = saved(case)
    config = dict(checkpoint.hf_config)
    if rope := config.pop("rope_parameters", None):
        config["rotary_emb_base" if case == "gpt_neox" else "rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            config["rotary_pct"] = rope.pop("partial_rotary_factor")
        rope["type"] = rope.pop("rope_type")
        config["rope_scaling"] = None if rope == {"type": "default"} else rope
    assert model_config(config) == checkpoint.config


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


def test_gemma3_config_of_transformers_4(saved):
    _, checkpoint = saved("gemma3-options")
    config = dict(checkpoint.hf_config)
    del config["rope_parameters"], config["layer_types"]
    config |= {"rope_theta": 700, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config |= {"rope_local_base_freq": 50, "sliding_window_pattern": 1}
    expected = dataclasses.replace(checkpoint.config, windows=(None, None))
    assert model_config(config) == expected
    windows = model_config({**config, "sliding_window_pattern": 2}).windows
    assert windows == (9, None)


@pytest.mark.parametrize("kind", FAMILIES)
def test_defaults_are_those_of_transformers(kind):
    full = transformers.AutoConfig.for_model(kind).to_dict()
    assert model_config(json.loads(json.dumps(full, default=str))) == model_config(
        {"model_type": kind}
    )


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
        extra = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
        extra = (*extra, "cls.seq_relationship.weight", "cls.seq_relationship.bias")
        new |= {name: np.zeros(2, np.float32) for name in extra}
        new["bert.embeddings.position_ids"] = np.arange(64)[None]
        new["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
        return new

    again = rewrite(checkpoint, tmp_path, rename, architectures=["BertForPreTraining"])
    jax.tree.map(np.testing.assert_array_equal, again.params(), checkpoint.params())


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


_SUMMARY = {
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
}
_DROPOUT = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
# Keys that released checkpoints have besides the sizes: leftovers of training and of other code.
RELEASED = {
    "phi3": {
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "attention_bias": False,
        "embd_pdrop": 0.0,
        "original_max_position_embeddings": 4096,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
    },
    "qwen3": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_window_layers": 28,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "codegen": {
        **_SUMMARY,
        **_DROPOUT,
        "gradient_checkpointing": False,
        "n_ctx": 2048,
        "scale_attn_weights": True,
        "task_specific_params": {"text-generation": {"do_sample": True}},
    },
    "gemma2": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
    },
    "gemma3_text": {
        "_sliding_window_pattern": 6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "sliding_attention"],
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "use_bidirectional_attention": False,
    },
    "gpt_neox": {
        "attention_bias": True,
        "attention_dropout": 0.0,
        "attention_probs_dropout_prob": 0,
        "classifier_dropout": 0.1,
        "hidden_dropout": 0.0,
        "hidden_dropout_prob": 0,
        "rope_scaling": None,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
    },
    "gpt_bigcode": {
        **_SUMMARY,
        **_DROPOUT,
        "attention_softmax_in_fp32": True,
        "inference_runner": 0,
        "max_batch_size": None,
        "max_sequence_length": None,
        "multi_query": True,
        "pad_key_length": True,
        "pre_allocate_kv_cache": False,
        "scale_attention_softmax_in_fp32": True,
        "validate_runner_input": True,
    },
    "opt": {
        "_remove_final_layer_norm": False,
        "activation_dropout": 0.0,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "prefix": "</s>",
    },
    "roberta": {
        "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": None,
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "output_past": True,
        "pad_token_id": 1,
        "position_embedding_type": "absolute",
    },
    "bert": {
        "attention_probs_dropout_prob": 0.1,
        "directionality": "bidi",
        "gradient_checkpointing": False,
        "hidden_dropout_prob": 0.1,
        "pad_token_id": 0,
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
        "position_embedding_type": "absolute",
        "use_cache": True,
    },
}


@pytest.mark.parametrize("kind", RELEASED)
def test_leftover_keys_of_released_checkpoints(kind):
    plain = {"model_type": kind, **tiny(kind)}
    config, expected = model_config({**plain, **RELEASED[kind]}), model_config(plain)
    windows = (2047, 2047) if kind == "phi3" else expected.windows
    assert config == dataclasses.replace(expected, windows=windows)


def test_keys_of_phi4_mini():
    keys = {"model_type": "phi3", **tiny("phi3", CASES["phi4-mini"][1])}
    others = {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False}
    assert model_config({**keys, **others}) == model_config(keys)
    with pytest.raises(ValueError, match="full_attn_mod = 2: only 1 is supported"):
        model_config({**keys, "full_attn_mod": 2})


@pytest.mark.parametrize("old", ["su", "yarn"])
def test_old_names_of_longrope(old):
    keys = {"model_type": "phi3", **tiny("phi3", LONGROPE)}
    named = {"rope_scaling": {**stretches(4), "type": old}}
    assert model_config({**keys, **named}) == model_config(keys)


def test_the_head_is_that_of_the_architecture():
    keys = {"model_type": "bert", **tiny("bert")}
    masked = model_config(keys)
    assert (masked.head, masked.num_classes) == ("masked", None)
    labels = {"id2label": {str(i): f"label {i}" for i in range(5)}}
    classes = model_config({**keys, "architectures": ["BertForSequenceClassification"], **labels})
    assert (classes.head, classes.num_classes) == ("classes", 5)
    assert model_config({**keys, "architectures": ["BertModel"]}).head == "none"
    assert model_config({"model_type": "gpt2"}).head == "causal"


def test_every_tensor_is_used_once():
    named = [(kind, name) for kind, row in FAMILIES.items() for name in row.architectures]
    for kind, name in named:
        table = tensor_table({"model_type": kind, "architectures": [name], **tiny(kind)})
        parts = {}
        for source in table.values():
            parts.setdefault(source.name, []).append(source)
        for sources in parts.values():  # all of it, and nothing twice
            out = sources[0].shape[0 if sources[0].transpose else -1]
            places = np.concatenate([source.places for source in sources])
            np.testing.assert_array_equal(np.sort(places), np.arange(out))


def bad(**keys):
    with pytest.raises(ValueError) as error:
        model_config({"model_type": "llama", **TINY, **keys}, "here/config.json")
    assert str(error.value).startswith("here/config.json")
    return str(error.value)


def test_all_problems_in_one_error():
    message = bad(
        attn_logit_softcapping=50.0,
        residual_multiplier=0.2,
        hidden_act="quick",
        rope_interleaved=True,
        mlp_bias="yes",
        rope_scaling={"rope_type": "linear", "short_factor": [1.0]},
    )
    for part in (
        "attn_logit_softcapping = 50.0: unknown key",
        "residual_multiplier = 0.2: unknown key",
        "hidden_act = 'quick': supported: silu",
        "rope_interleaved = True: only False",
        "mlp_bias = 'yes': expected a bool",
        "rope type linear: factor is missing",
        "rope type linear: unknown key short_factor",
        "7 thing(s)",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: llama, mis"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, "supported for llama: LlamaForCausalLM"),
        ({"num_attention_heads": 3}, "hidden_size is no multiple"),
        ({"num_key_value_heads": 3}, "4 query heads are no multiple of 3"),
        ({"head_dim": 7}, "head size 7"),
        ({"vocab_size": 0}, "vocab_size = 0: expected a positive integer"),
        ({"hidden_size": None}, "hidden_size = None: expected a int"),
        ({"quantization_config": {"bits": 4}}, "the checkpoint is quantised"),
        ({"rope_scaling": {"type": "ntk"}}, "rope type 'ntk': supported: default, lin"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type longrope: long_factor is missing"),
        ({"model_type": "phi3", **LONGROPE, "hidden_size": 48}, "4 numbers, expected one for each"),
        (
            {"rope_scaling": {"type": "longrope", **stretches(4), "long_factor": [1, 0]}},
            "long_factor: expected a list of numbers above 0",
        ),
        ({"model_type": "phi3", "partial_rotary_factor": 0.4}, "partial_rotary_factor = 0.4: expe"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor = -1: expected a number"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 6.0}, "rope_theta = 6.0, but 5.0"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias = True: only False"),
        ({"model_type": "gpt2", "num_key_value_heads": 2}, "num_key_value_heads = 2: unknown key"),
        ({"model_type": "gpt2", "rope_theta": 5.0}, "rope_theta = 5.0: unknown key"),
        ({"model_type": "codegen", "rotary_dim": 7}, "rotary_dim = 7: expected an even number"),
        (
            {"model_type": "gpt_neox", "rotary_pct": 0.4},
            "rotary_pct = 0.4: expected an even number",
        ),
        ({"model_type": "gpt_neox", "rope_theta": 5.0}, "rope_theta = 5.0, but rotary_emb_base 1"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0: expec"),
        ({"model_type": "gemma2", "attn_logit_softcapping": -1.0}, "softcapping = -1.0: expected"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "attention = True: only"),
        ({"model_type": "gemma3", "text_config": {}}, "model_type 'gemma3' is not supported"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "50.0: only None"),
        ({"model_type": "gemma3_text", "sliding_window": None}, "sliding_window = None: expec"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "pattern = 0: expected a pos"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 5.0}},
            "rope_parameters = {'rope_theta': 5.0}: expected those of full_attention and sliding",
        ),
        (
            {"model_type": "gpt_bigcode", "num_key_value_heads": 2},
            "num_key_value_heads = 2: only 1 is supported with multi_query True",
        ),
        ({"model_type": "codegen", "n_head": 6}, "n_head = 6: expected a multiple of 4"),
        ({"model_type": "opt", "word_embed_proj_dim": -1}, "word_embed_proj_dim = -1: expected a"),
        ({"model_type": "roberta", "pad_token_id": None}, "pad_token_id = None: expected a int"),
        ({"model_type": "roberta", "pad_token_id": 63}, "pad_token_id = 63: expected an id below"),
        ({"model_type": "roberta", "is_decoder": True}, "is_decoder = True: only False"),
        (
            {"model_type": "bert", "position_embedding_type": "relative_key"},
            "position_embedding_type = 'relative_key': only 'absolute'",
        ),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM", "BertModel"]},
            "heads of several kinds",
        ),
        (
            {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}
            | {"num_labels": 0},
            "num_labels = 0: expected a positive integer",
        ),
        ({"model_type": "mistral", "sliding_window": -3}, "sliding_window = -3"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["chunked"] * 2},
            "layer_types = ['chunked', 'chunked']: expected 2 times full_attention",
        ),
    ],
)
def test_bad_config(keys, part):
    assert part in bad(**keys)
