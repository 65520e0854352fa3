"""Sequence classification: labelled files, scores, new heads, and export to transformers."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers.processors import ByteLevel

from lordjax import factorize, materialize, save
from lordjax.conversions.families.registry import FAMILIES, model_config, with_labels
from lordjax.data.classification import classification
from lordjax.data.examples import Examples
from lordjax.evaluate.classification import classify, scores
from lordjax.models import ModelConfig, Transformer, init
from lordjax.models.output_heads import with_classes
from lordjax.storage.saved_model import open_saved

VOCAB = 300
ENCODER = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=8,
    mlp_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_size=4,
    max_positions=64,
    block="post_norm",
    norm="layer",
    gated=False,
    causal=False,
    rope=None,
    position_rows=64,
    token_types=2,
    embed_norm=True,
    final_norm=False,
    head="masked",
    head_bias=True,
    tie_embeddings=True,
)


@functools.cache
def encoder(**options):
    config = dataclasses.replace(ENCODER, **options)
    return config, init(config, jax.random.key(0))


@functools.cache
def tokenizer():
    """A tokenizer of bytes with [CLS] and [SEP]; the second text of a pair has type 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    ends = {"[CLS]": len(vocab), "[SEP]": len(vocab) + 1}
    made = Tokenizer(models.BPE(vocab=vocab | ends, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=list(ends.items()),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, cls_token="[CLS]", sep_token="[SEP]")


def read(path, content, **options):
    path.write_text(content)
    options = {"seq_len": 32, "vocab_size": VOCAB, "share": 0} | options
    return classification(path, tokenizer(), **options)


def texts(examples):
    rows = zip(examples.tokens, examples.mask, strict=True)
    return [tokenizer().decode(row[kept]) for row, kept in rows]


def contents(data):
    """Returns ``(text, label)`` of every example."""
    assert json.loads(json.dumps(data.facts)) == data.facts
    labels = data.facts["labels"]
    return list(zip(texts(data.train), [labels[i] for i in data.train.targets[:, 0]], strict=True))


# --- files ---------------------------------------------------------------------------------------

ONE = [("[CLS]good[SEP]", "1"), ("[CLS]not bad[SEP]", "0")]
PAIRS = [("[CLS]good[SEP]fine[SEP]", "1"), ("[CLS]bad[SEP]good[SEP]", "0")]


TWO_ROWS = "0\tgood\tfine\t1\n1\tbad\tgood\t0\n"
MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
MNLI = "sentence1\tsentence2\tlabel1\tgold_label\n"
FILES = {
    "CoLA": ("gj04\t1\t\tgood\nbc01\t0\t*\tnot bad\n", ONE),
    "SST-2": ("sentence\tlabel\ngood\t1\nnot bad\t0\n", ONE),
    "label first": ("1\tgood\n0\tnot bad", ONE),
    "label last": ("good\t1\r\n\r\nnot bad\t0\r\n", ONE),
    "text": ("label\tidx\ttext\n1\t0\tgood\n0\t1\tnot bad\n", ONE),
    "RTE": (f"index\tsentence1\tsentence2\tlabel\n{TWO_ROWS}", PAIRS),
    "QNLI": (f"index\tquestion\tsentence\tlabel\n{TWO_ROWS}", PAIRS),
    "QQP": (f"id\tquestion1\tquestion2\tis_duplicate\n{TWO_ROWS}", PAIRS),
    "MRPC": (f"{MRPC}1\t5\t6\tgood\tfine\n0\t7\t8\tbad\tgood\n", PAIRS),
    "MNLI": (f"{MNLI}good\tfine\tno\t1\nbad\tgood\tno\t0\n", PAIRS),
}


@pytest.mark.parametrize(("content", "expected"), FILES.values(), ids=FILES)
def test_known_files(tmp_path, content, expected):
    data = read(tmp_path / "a.tsv", content)
    assert contents(data) == expected
    assert data.train.targets.shape == (2, 1)
    assert data.train.targets.dtype == data.train.tokens.dtype == np.int32
    if expected is ONE:
        assert data.train.token_types is None
    else:
        # The second text with its end.
        assert data.train.token_types.sum(axis=1).tolist() == [5, 5]
        assert not data.train.token_types[~data.train.mask].any()


def test_columns_that_are_named(tmp_path):
    rows = "a\tgood\tyes\nb\tnot bad\tno\n"
    data = read(tmp_path / "a.tsv", rows, text_columns=[1], label_column=2)
    assert contents(data) == [("[CLS]good[SEP]", "yes"), ("[CLS]not bad[SEP]", "no")]
    assert data.facts["labels"] == ["no", "yes"]
    named = read(
        tmp_path / "a.tsv", "id\tq\ty\n" + rows, text_columns=["id", "q"], label_column="y"
    )
    assert texts(named.train)[0] == "[CLS]a[SEP]good[SEP]"
    given = read(
        tmp_path / "a.tsv", rows, text_columns=[1], label_column=2, labels=["yes", "no", "?"]
    )
    assert given.train.targets.ravel().tolist() == [0, 1]
    assert given.facts["labels"] == ["yes", "no", "?"]


def test_numbers_are_sorted_as_numbers(tmp_path):
    rows = "".join(f"{i % 12 - 1}\ttext {i}\n" for i in range(48))
    data = read(tmp_path / "a.tsv", rows)
    assert data.facts["labels"] == [str(i) for i in range(-1, 11)]
    assert data.train.targets.ravel().tolist() == [i % 12 for i in range(48)]


def test_long_texts_are_cut_between_their_ends(tmp_path):
    data = read(tmp_path / "a.tsv", f"1\t{'a' * 40}\n0\tb\n", seq_len=10)
    assert texts(data.train) == [f"[CLS]{'a' * 8}[SEP]", "[CLS]b[SEP]"]
    assert data.train.tokens.shape == (2, 10)


def test_a_text_is_held_out_with_all_its_labels(tmp_path):
    rows = "".join(f"{i % 2}\ttext {i % 25}\n" for i in range(75))
    data = read(tmp_path / "a.tsv", rows, share=0.3)
    train, validation = (set(texts(part)) for part in data[:2])
    assert not train & validation
    assert len(train | validation) == 25
    assert len(texts(data.validation)) == 3 * len(validation)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "no text"),
        ("sentence\tlabel\n", {}, "a header and nothing below it"),
        ("a\tb\tc\n1\t2\t3\n", {}, "none of a known kind.*0: 'a', 1: 'b', 2: 'c'"),
        ("1\t2\n1\t2\n", {}, "none of a known kind"),
        ("a\tb\nc\td\n", {}, "none of a known kind"),
        ("1\ta\n0\tb\tc\n", {}, "line 2: 3 columns; expected 2"),
        ("sentence\tlabel\na\t1\nb\t\n", {}, "line 3: no label"),
        ("1\ta\n1\tb\n", {}, r"labels \['1'\]; expected two different"),
        ("sentence\tlabel\na\t1.50\nb\t2.00\n", {}, "1.50 are scores"),
        ("sentence\tlabel\na\tx\nb\ty\nc\tz\n", {}, "3 different labels on 3 texts"),
        ("1\ta\n2\tb\n", {"labels": ["0", "1"]}, r"labels \['2'\] are none of"),
        ("1\ta\n0\tb\n", {"labels": ["0", "1", "1"]}, "expected two different"),
        ("1\ta\n0\tb\n", {"text_columns": ["a"]}, "give both"),
        ("1\ta\n0\tb\n", {"text_columns": [2], "label_column": 0}, "no columns.*0: '1', 1: 'a'"),
        ("1\ta\n0\tb\n", {"text_columns": ["x"], "label_column": "1"}, "no columns"),
        ("1\ta\n0\tb\n", {"text_columns": ["a"], "label_column": 0}, "no columns"),
        ("1\ta\n0\tb\n", {"text_columns": [], "label_column": 0}, "no columns"),
        ("1\ta\n0\tb\n", {"vocab_size": 256}, "expected 0 to 255"),
        ("1\ta\n0\tb\n", {"seq_len": 2}, "examples of 2 tokens; expected 3"),
        (FILES["RTE"][0], {"seq_len": 4}, "examples of 4 tokens; expected 5"),
    ],
)
def test_bad_files(tmp_path, content, options, message):
    with pytest.raises(ValueError, match=r"a\.tsv.*" + message):
        read(tmp_path / "a.tsv", content, **options)
    with pytest.raises(FileNotFoundError):
        classification(tmp_path / "b.tsv", tokenizer(), seq_len=32, vocab_size=VOCAB)


def test_pairs_need_something_between_them(tmp_path):
    plain = type(tokenizer())(tokenizer_object=tokenizer().backend_tokenizer)
    plain.backend_tokenizer.post_processor = ByteLevel()
    path = tmp_path / "a.tsv"
    path.write_text(FILES["RTE"][0])
    with pytest.raises(ValueError, match="puts nothing between them"):
        classification(path, plain, seq_len=32, vocab_size=VOCAB)


# --- scores --------------------------------------------------------------------------------------


def of_table(table):
    """Returns (predicted, expected) with the given counts ``[expected, predicted]``."""
    pairs = [(p, e) for e, row in enumerate(table) for p, n in enumerate(row) for _ in range(n)]
    return np.array(pairs).T


def test_scores_of_two_classes_by_hand():
    # 6 true and 3 false positives, 1 false negative, 2 true negatives.
    found = scores(*of_table([[2, 3], [1, 6]]))
    assert found == pytest.approx(
        {
            "accuracy": 8 / 12,
            "f1": 2 * 6 / (2 * 6 + 3 + 1),
            "matthews": (6 * 2 - 3 * 1) / np.sqrt(9 * 7 * 5 * 3),
        }
    )


def test_scores_of_three_classes_by_hand():
    predicted, expected = of_table([[3, 1, 0], [0, 2, 2], [1, 0, 3]])
    found = scores(predicted, expected)
    assert found["accuracy"] == pytest.approx(8 / 12)
    assert found["f1"] == pytest.approx(np.mean([6 / 8, 4 / 7, 6 / 9]))
    # The correlation of the indicators, summed over classes.
    one, two = (np.eye(3)[a] - np.eye(3)[a].mean(axis=0) for a in (predicted, expected))
    expected_value = (one * two).sum() / np.sqrt((one**2).sum() * (two**2).sum())
    assert found["matthews"] == pytest.approx(expected_value)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_properties_of_scores(count):
    predicted, expected = np.random.default_rng(count).integers(0, count, (2, 60))
    assert scores(expected, expected) == {"accuracy": 1, "f1": 1, "matthews": 1}
    assert scores(np.full(60, count - 1), expected)["matthews"] == 0
    found = scores(predicted, expected)
    assert scores(expected, predicted) == pytest.approx(found)
    for names in itertools.islice(itertools.permutations(range(count)), 7):
        again = scores(np.array(names)[predicted], np.array(names)[expected])
        for name in ("accuracy", "matthews") if count == 2 else found:
            assert again[name] == pytest.approx(found[name])


def test_f1_is_of_classes_that_occur():
    zero, one = np.zeros(4, int), np.array([0, 0, 0, 1])
    assert scores(zero, zero) == {"accuracy": 1, "f1": 0, "matthews": 0}
    assert scores(zero, one, 5)["f1"] == pytest.approx((6 / 7 + 0) / 2)
    for bad in [(zero, one[:2]), (zero[:0], zero[:0]), (zero - 1, zero), (zero[None], zero[None])]:
        with pytest.raises(ValueError, match="expected"):
            scores(*bad)
    with pytest.raises(ValueError, match="classes 0 to 3; expected 0 to 2"):
        scores(3 * one, zero, 3)


# --- running -------------------------------------------------------------------------------------


def some_examples(count, classes=3):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (count, 16), np.int32)
    mask = np.arange(16) < rng.integers(4, 17, (count, 1))
    targets = rng.integers(0, classes, (count, 1), np.int32)
    return Examples(tokens, targets, mask, (tokens % 2))


def test_classify_is_what_the_model_says_in_any_batch():
    config, params = with_classes(*encoder(), 3, jax.random.key(1))
    params["head"]["kernel"] = 20 * params["head"]["kernel"]
    examples = some_examples(7)
    run = jax.jit(lambda *inputs: Transformer(config).apply({"params": params}, *inputs))
    expected = np.asarray(run(examples.tokens, examples.mask, examples.token_types)).argmax(axis=1)
    assert len(set(expected)) > 1
    for batch in (1, 3, 7, 50):
        predicted, found = classify(config, params, examples, batch)
        np.testing.assert_array_equal(predicted, expected)
        assert found == scores(expected, examples.targets[:, 0], 3)
    # What stands at padding is not read.
    noise = examples._replace(tokens=np.where(examples.mask, examples.tokens, 5))
    np.testing.assert_array_equal(classify(config, params, noise)[0], expected)


def test_classify_refuses():
    config, params = with_classes(*encoder(), 3, jax.random.key(1))
    examples = some_examples(4)
    with pytest.raises(ValueError, match="head 'masked' does not classify"):
        classify(*encoder(), examples)
    with pytest.raises(ValueError, match="0 examples"):
        classify(config, params, examples.rows([]))
    with pytest.raises(ValueError, match="target 3; expected 0 to 2"):
        classify(config, params, examples._replace(targets=0 * examples.targets + 3))
    with pytest.raises(ValueError, match="example 0: a logit is not finite"):
        params["head"]["bias"] = params["head"]["bias"] * np.nan
        classify(config, params, examples)


# --- new heads -----------------------------------------------------------------------------------

HEADS = {
    "masked": {},
    "masked, untied": {"tie_embeddings": False},
    "none": {"head": "none", "tie_embeddings": False},
    "classes": {"head": "classes", "num_classes": 5, "tie_embeddings": False},
}


@pytest.mark.parametrize("head", HEADS)
def test_a_new_head_leaves_the_rest_alone(head):
    config, params = encoder(**HEADS[head])
    new, changed = with_classes(config, params, 4, jax.random.key(1))
    assert (new.head, new.num_classes) == ("classes", 4)
    shapes = jax.eval_shape(lambda: init(new, jax.random.key(0)))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), changed) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes
    )
    for part in changed.keys() - {"head", "transform"}:
        assert changed[part] is params[part]
    assert (changed["transform"] is params.get("transform")) == (head == "classes")
    assert not np.any(changed["head"]["bias"])
    assert 0.01 < np.std(changed["head"]["kernel"]) < 0.03
    assert classify(new, changed, some_examples(3))[0].shape == (3,)
    # The key decides.
    other = with_classes(config, params, 4, jax.random.key(2))[1]
    assert not np.array_equal(other["head"]["kernel"], changed["head"]["kernel"])


def test_a_new_head_has_the_dtype_of_the_model():
    config, params = encoder()
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    _, changed = with_classes(config, params, 2, jax.random.key(1))
    assert {a.dtype for a in jax.tree.leaves(changed)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.full
def test_a_compressed_encoder_gets_a_head_too():
    config, params = encoder()
    small = factorize(params, rank=3, where=r"layer_\d+/.*kernel")
    config, changed = with_classes(config, small, 3, jax.random.key(1))
    assert changed["layer_0"] is small["layer_0"]
    changed["head"]["kernel"] = 20 * changed["head"]["kernel"]
    examples = some_examples(5)
    found = classify(config, changed, examples)[0]
    np.testing.assert_array_equal(found, classify(config, materialize(changed), examples)[0])
    assert len(set(found)) > 1


def test_no_new_head():
    with pytest.raises(ValueError, match="only encoders"):
        with_classes(dataclasses.replace(ENCODER, causal=True), {}, 2, jax.random.key(0))
    with pytest.raises(ValueError, match="1 classes"):
        with_classes(*encoder(), 1, jax.random.key(0))
    with pytest.raises(ValueError, match="llama: no classification head"):
        with_labels({"model_type": "llama"}, ["a", "b"])
    with pytest.raises(ValueError, match="expected different names"):
        with_labels({"model_type": "bert"}, ["a", "a"])


@pytest.mark.full
@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("head", ["MaskedLM", "", "SequenceClassification"])
def test_a_new_head_is_saved_and_exported(tmp_path, kind, head):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from hf_models import hf_model, some_tokens

    from lordjax.conversions.exporters.export import export
    from lordjax.conversions.readers.checkpoint import open_checkpoint

    options = {"num_labels": 5} if head == "SequenceClassification" else {}
    hf_model(kind, options, head).save_pretrained(tmp_path / "in")
    original = open_checkpoint(tmp_path / "in")
    labels = ["no", "maybe", "yes"]
    config, params = with_classes(original.config, original.params(), 3, jax.random.key(1))
    hf_config = with_labels(original.hf_config, labels)
    assert model_config(hf_config) == config
    assert hf_config["architectures"][0] in FAMILIES[kind].architectures
    save(tmp_path / "saved", config, params, hf_config=hf_config)
    saved = open_saved(tmp_path / "saved")
    assert saved.config == config
    export(saved, tmp_path / "out", "dense")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == dict(enumerate(labels))
    assert model.config.label2id == {label: i for i, label in enumerate(labels)}
    tokens = some_tokens()
    with torch.no_grad():
        expected = model(torch.as_tensor(tokens).long()).logits.numpy()
    found = Transformer(config).apply({"params": saved.params()}, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
