"""GGUF exports: read back by our reader, and by llama.cpp where it is installed."""

import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import CASES, hf_logits, hf_model, some_tokens
from llama_cpp import opened_by_llama_cpp
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as pre

from lordjax import compress, factorize, save
from lordjax.conversions.exporters.export import export
from lordjax.conversions.exporters.gguf_file import FILE
from lordjax.conversions.readers.checkpoint import open_checkpoint
from lordjax.conversions.readers.gguf.pre_tokenizers import PRE_TOKENIZERS
from lordjax.kernels import trees
from lordjax.kernels.normal_float import Format
from lordjax.kernels.quantized import NFQuantized
from lordjax.kernels.table import quantized_table
from lordjax.storage.saved_model import open_saved

TOKENS = some_tokens()
HELD = [
    *("llama", "llama-tied", "llama-linear", "llama-head-dim", "llama-multi-query"),
    *("qwen2", "qwen3", "gemma", "gemma2", "gemma3-deep", "mistral-full"),
]
# Case -> a part of the message that refuses it.
REFUSED = {
    "mistral-window": "llama.cpp runs llama models without sliding windows",
    "qwen2-window": "llama.cpp runs qwen2 models without sliding windows",
    "gemma3": "gemma3 models with full attention in every layer number 6",
    "gemma2-options": "gemma2 models with full attention in every layer number 2",
    "llama-all-heads": "gguf files cannot say the model's activation",
    "gpt2": "language models of llama, mistral, qwen2, .*, not gpt2 with head 'causal'",
    "llama-classes": "not llama with head 'classes'",
    "phi3": "not phi3",
}
# llama.cpp takes the width of a head; every sixth layer of Gemma 3 has full attention.
EXTRA = {
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma2-options": {"query_pre_attn_scalar": 8},
    "gemma3": {"query_pre_attn_scalar": 12},
}
CASES["gemma3-deep"] = (
    "gemma3_text",
    {"num_hidden_layers": 6, "sliding_window": 7, "query_pre_attn_scalar": 12}
    | {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
)


def case(name):
    kind, options, *head = CASES[name]
    return hf_model(kind, {**options, **EXTRA.get(name, {})}, *head)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    def make(name):
        directory = tmp_path_factory.mktemp(name)
        model = case(name)
        model.save_pretrained(directory)
        return model, open_checkpoint(directory)

    return make


def close(found, expected):
    """Equal logits: some of llama.cpp's products are of half precision, also with F32 weights."""
    gap, spread = found - expected, expected.std()
    assert np.sqrt((gap**2).mean()) < 2e-3 * spread
    assert np.abs(gap).max() < 2e-2 * spread


@pytest.mark.quick("llama-tied", "gemma")
@pytest.mark.parametrize("name", HELD)
def test_a_file_is_the_same_model(opened, tmp_path, name):
    """The same parameters and config by our reader, the same logits by llama.cpp."""
    model, checkpoint = opened(name)
    export(checkpoint, tmp_path / "out", "gguf")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".gguf"] == [FILE]
    found = open_checkpoint(tmp_path / "out" / FILE)
    assert found.config == checkpoint.config
    own, back = (trees.flatten(each.params()) for each in (checkpoint, found))
    assert own.keys() == back.keys()
    for path, leaf in own.items():
        np.testing.assert_allclose(back[path], leaf, rtol=0, atol=1e-6)
    theirs = opened_by_llama_cpp(tmp_path / "out" / FILE)
    for window in TOKENS:
        expected = hf_logits(model, window[None])[0]
        close(theirs.logits(window), expected)
    theirs.close()


@pytest.mark.quick("gpt2", "gemma3")
@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_run_as_another_model_is_refused(opened, tmp_path, name):
    _, checkpoint = opened(name)
    with pytest.raises(ValueError, match=f"{REFUSED[name]}.*; export with --to dense"):
        export(checkpoint, tmp_path / "out", "gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_the_scale_of_queries_is_not_in_the_file(tmp_path):
    """llama.cpp derives it; another one is refused, also where heads were dropped."""
    kind, options = CASES["gemma2"]
    hf_model(kind, {**options, "query_pre_attn_scalar": 24}).save_pretrained(tmp_path / "in")
    checkpoint = open_checkpoint(tmp_path / "in")
    with pytest.raises(ValueError, match="divided by the root of 12, this model with 24"):
        export(checkpoint, tmp_path / "out", "gguf")


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "step"), [("F32", 0), ("F16", 2**-10), ("BF16", 2**-8), ("Q8_0", 2**-7)]
)
def test_types_of_matrices(tmp_path, kind, step):
    """Vectors stay F32, rows of no whole blocks are F16; values differ by a rounding."""
    hf_model("llama", {"hidden_size": 64, "head_dim": 16}).save_pretrained(tmp_path / "in")
    checkpoint = open_checkpoint(tmp_path / "in")
    export(checkpoint, tmp_path / "out", "gguf", gguf_type=kind)
    reader = gguf.GGUFReader(tmp_path / "out" / FILE)
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == kind
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if kind == "Q8_0" else kind)  # 48 columns
    assert kinds["output_norm.weight"] == "F32"
    found = open_checkpoint(tmp_path / "out" / FILE)
    own, back = (trees.flatten(each.params()) for each in (checkpoint, found))
    for path, leaf in own.items():
        np.testing.assert_allclose(back[path], leaf, rtol=0, atol=step * np.abs(leaf).max())


@pytest.mark.full
def test_llama3_scaling_is_a_table(opened, tmp_path):
    """The reader recovers the parameters; llama.cpp divides by the table."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = hf_model("llama", {"rope_scaling": scaling, "rope_theta": 500_000.0, "head_dim": 64})
    model.save_pretrained(tmp_path / "in")
    checkpoint = open_checkpoint(tmp_path / "in")
    export(checkpoint, tmp_path / "out", "gguf")
    assert open_checkpoint(tmp_path / "out" / FILE).config == checkpoint.config
    theirs, expected = opened_by_llama_cpp(tmp_path / "out" / FILE), hf_logits(model, TOKENS[:1])[0]
    close(theirs.logits(TOKENS[0]), expected)
    theirs.close()


def _saved(tmp_path, params, checkpoint):
    save(tmp_path / "model", checkpoint.config, params, hf_config=checkpoint.hf_config)
    return open_saved(tmp_path / "model")


def test_pairs_narrow_layers_and_new_parameters_are_refused(opened, tmp_path):
    _, checkpoint = opened("llama")
    flat = trees.flatten(checkpoint.params())
    pairs = factorize(trees.unflatten(flat), keep=0.5, where=r"layer_1/mlp/.*kernel")
    bias = flat | {"layer_0/mlp/down/bias": np.ones(32, np.float32)}
    narrow = {**flat, "layer_1/attention/o/kernel": flat["layer_1/attention/o/kernel"][:16]}
    narrow["layer_1/attention/v/kernel"] = flat["layer_1/attention/v/kernel"][:, :8]
    index = np.tile(np.arange(4, dtype=np.int32), (2, 1))
    wrong = {
        "low-rank pairs or quantized matrices (3 of them": trees.flatten(pairs),
        "parameters that llama models do not have (1 of them": bias,
        "narrower layers or parts of heads (2 of them": narrow,
        "narrower layers or parts of heads (1 of them": flat
        | {"layer_0/attention/rope_index": index},
    }
    for i, (message, tree) in enumerate(wrong.items()):
        saved = _saved(tmp_path / str(i), trees.unflatten(tree), checkpoint)
        with pytest.raises(ValueError, match="a gguf export cannot hold") as found:
            export(saved, tmp_path / "out", "gguf")
        assert message in str(found.value)
        assert str(found.value).endswith("--to factored, or compress with --shape stock")
        assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_a_stock_shaped_model_in_llama_cpp(opened, tmp_path):
    """Fewer heads and blocks, a narrower MLP: the same logits as ours."""
    from lordjax.conversions import resized
    from lordjax.conversions.exporters.verify import verify

    _, checkpoint = opened("qwen3")
    tokens = np.random.default_rng(1).integers(2, 97, (8, 24)).astype(np.int32)
    given = {"shape": "stock", "multiple": 4, "ranks": {"mlp": 32, "attention": 1}}
    result = compress(checkpoint, tokens, **given)
    hf_config = resized(checkpoint.hf_config, result.config)
    save(tmp_path / "small", result.config, result.params, hf_config=hf_config)
    saved = open_saved(tmp_path / "small")
    export(saved, tmp_path / "out", "gguf")
    assert verify(saved, tmp_path / "out", "gguf", TOKENS)["passed"]
    from lordjax.conversions.exporters.verify import our_logits

    theirs, expected = opened_by_llama_cpp(tmp_path / "out" / FILE), our_logits(saved)(TOKENS[:1])
    close(theirs.logits(TOKENS[0]), expected)
    theirs.close()


# --- Tokenizers ---

TEXT = (
    "The tower is 324 metres (1,063 ft) tall.\n\ndef f(x):\n    return x**2 + 1000000  # it's\n"
    "\tÄpfel, 東京 and 🎉 don't   12345   67 +=<|>$ <|end|>after "
)
LINES = [TEXT, "lorem ipsum dolor sit amet 2024 " * 5, "def g(y):\n    return y - 1\n" * 5]


def byte_level(name):
    """A byte-level BPE with a pre-tokenizer that a GGUF file names."""
    row = PRE_TOKENIZERS[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=row.whole_words))
    if name == "smollm":  # as it stands in the model's own tokenizer.json
        steps = [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    else:
        steps = [pre.Split(Regex(split), "isolated") for split in row.splits]
        steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre.Sequence(steps)
    if row.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if row.adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    return tokenizer, {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


def sentence_piece():
    """SentencePiece's BPE: bytes are tokens, spaces are U+2581."""
    words = ["▁the", "▁def", "▁return", "▁12", "it", "re", "▁t", "th", "▁th", "ur", "tur", "▁d"]
    words += ["ef", "he", "et", "urn", "ret", "▁re", "▁ret", "▁1"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += [*sorted(set("▁" + "abcdefghijklmnopqrstuvwxyz0123456789():+-*#.,'")), *words]
    vocabulary = {token: i for i, token in enumerate(pieces)}
    merges = [
        (word[:at], word[at:])
        for word in words
        for at in range(1, len(word))
        if word[:at] in vocabulary and word[at:] in vocabulary
    ]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in pieces[:3]]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def written(tmp_path, tokenizer, names):
    """A GGUF export of a model with a tokenizer; the embedding has some rows more."""
    rows = tokenizer.get_vocab_size() + 3
    model = hf_model("llama", {"vocab_size": rows})
    model.save_pretrained(tmp_path / "in")
    tokenizer.save(str(tmp_path / "in" / "tokenizer.json"))
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(names))
    checkpoint = open_checkpoint(tmp_path / "in")
    export(checkpoint, tmp_path / "out", "gguf", write_tokenizer=checkpoint.tokenizer_files)
    return tmp_path / "out" / FILE


TOKENIZERS = ["sentence-piece", "smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o"]


@pytest.mark.quick("smollm")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(tmp_path, name):
    """The ids are those of the model's own tokenizer: by our reader, and by llama.cpp."""
    tokenizer, names = sentence_piece() if name == "sentence-piece" else byte_level(name)
    file = written(tmp_path, tokenizer, names)
    expected = tokenizer.encode(TEXT).ids
    assert open_checkpoint(file).tokenizer()(TEXT)["input_ids"] == expected
    theirs = opened_by_llama_cpp(file)
    assert theirs.tokenize(TEXT) == expected
    theirs.close()
    # A file that was made from a file keeps its tokenizer.
    again = open_checkpoint(file)
    export(again, tmp_path / "again", "gguf", write_tokenizer=again.tokenizer_files)
    first, second = (
        {k: v for k, v in open_checkpoint(f)._files._metadata.items() if k.startswith("tokenizer")}
        for f in (file, tmp_path / "again" / FILE)
    )
    assert first == second


@pytest.mark.full
def test_tokenizers_that_llama_cpp_has_not(tmp_path):
    tokenizer, names = byte_level("gpt-2")
    tokenizer.pre_tokenizer = pre.Sequence([pre.Whitespace(), pre.ByteLevel(use_regex=False)])
    with pytest.raises(
        ValueError, match=r"Whitespace: llama\.cpp has none; export with --to dense"
    ):
        written(tmp_path / "a", tokenizer, names)
    tokenizer.pre_tokenizer = pre.Split(Regex("x+"), "isolated")
    with pytest.raises(ValueError, match=r"splits by \['x\+'\]: llama.cpp has no name for that"):
        written(tmp_path / "b", tokenizer, names)
    unigram = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], None, False))
    with pytest.raises(ValueError, match="tokenizer of type Unigram"):
        written(tmp_path / "c", unigram, {})
    assert not any((tmp_path / name / "out").exists() for name in "abc")


@pytest.mark.full
def test_coded_tables_are_decoded(opened, tmp_path):
    _, checkpoint = opened("llama-tied")
    params = checkpoint.params()
    kernel = NFQuantized.encode(jnp.asarray(params["embed"]["embedding"]).T, Format())
    coded = trees.update(params, {"embed/embedding": quantized_table(kernel, "float32")})
    save(tmp_path / "coded", checkpoint.config, coded, hf_config=checkpoint.hf_config)
    export(open_saved(tmp_path / "coded"), tmp_path / "out", "gguf")
    found = open_checkpoint(tmp_path / "out" / FILE).params()["embed"]["embedding"]
    np.testing.assert_allclose(found, kernel.materialize().T, rtol=1e-6)
