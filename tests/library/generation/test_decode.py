"""Generation: a cache changes nothing; random draws; when a row ends."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import BLOCKS, GPT2, source

from lordjax import compress
from lordjax.generation import decode
from lordjax.generation.prompt_batch import bucket
from lordjax.generation.sampling import Sampling, filtered, pick
from lordjax.kernels.convert import encode, factorize
from lordjax.models import Rope, Transformer, init
from lordjax.models.attention import CACHE

CAUSAL = [name for name, config in BLOCKS.items() if config.head == "causal"]
LINEAR = r"layer_\d+/.*/kernel$"
PROMPTS = [[5, 11, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [60]]


@pytest.fixture(scope="module")
def tiny():
    return source("starcoder2")


@functools.partial(jax.jit, static_argnames=("config", "method"))
def run(variables, *inputs, config, method="__call__"):
    return Transformer(config).apply(variables, *inputs, method=method, mutable=[CACHE])


def logits_of(config, params, tokens, length=GPT2.max_positions):
    """Logits of a causal model; tokens are padded, so that it is compiled once."""
    filled = np.zeros((1, length), np.int32)
    filled[0, : len(tokens)] = tokens
    return run({"params": params}, filled, config=config)[0][0, : len(tokens)]


def greedy(config, params, prompt, count, **how):
    """Greedy generation without a cache: the whole sequence runs for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(jnp.argmax(logits_of(config, params, tokens, **how)[-1])))
    return tokens[len(prompt) :]


def changed(model, how):
    """A model's parameters, compressed or not."""
    params = model.params
    if how == "dense":
        return params
    if how == "modegpt":
        tokens = np.random.default_rng(0).integers(0, GPT2.vocab_size, (8, 24), np.int32)
        return compress(model, tokens, method="modegpt", keep=0.6).params
    if how == "pairs":
        return factorize(params, keep=0.7, where=LINEAR)
    return encode(params, "nf4", where=LINEAR)


NARROWER = [(block, "modegpt") for block in ("gpt2", "gemma2", "starcoder2")]


@pytest.mark.quick("gpt2-dense", "gemma2-dense")
@pytest.mark.parametrize(("block", "how"), [*((block, "dense") for block in CAUSAL), *NARROWER])
def test_step_by_step_is_the_whole_at_once(block, how):
    """Decoding token by token with a cache gives the logits of one pass over all tokens."""
    model = source(block)
    config, params = model.config, changed(model, how)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 20), np.int32)
    whole, _ = run({"params": params}, tokens, config=config)
    split = 11  # more than the sliding window of 9
    first, state = run({"params": params}, tokens[:, :split], config=config)
    np.testing.assert_allclose(first, whole[:, :split], atol=1e-4)
    cache = decode.widened(state[CACHE], capacity=32)
    for i in range(split, 20):
        at = jnp.full((2, 1), i, jnp.int32)
        inputs = (tokens[:, i : i + 1], None, None, at)
        variables = {"params": params, CACHE: cache}
        x, state = run(variables, *inputs, config=config, method="hidden")
        cache = state[CACHE]
        logits, _ = run({"params": params}, x, config=config, method="unembed")
        np.testing.assert_allclose(logits[:, 0], whole[:, i], atol=1e-4)


@pytest.mark.quick("pairs")
@pytest.mark.parametrize("how", ["dense", "modegpt", "pairs", "codes"])
def test_greedy_tokens_of_a_ragged_batch(tiny, how):
    config, params = tiny.config, changed(tiny, how)
    found = decode.generate(config, params, PROMPTS, max_new_tokens=9)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        assert answer.tokens == greedy(config, params, prompt, 9)
        assert answer.reason == "length"


@pytest.mark.full
def test_several_tokens_behind_a_cache(tiny):
    """Several tokens can follow a cache, from a different column in every row."""
    config, params = tiny.config, tiny.params
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, 12), np.int32)
    _, state = run({"params": params}, tokens[:, :6], config=config)
    cache = decode.widened(state[CACHE], capacity=16)
    starts = jnp.asarray([6, 4], jnp.int32)  # the second row's last two columns are padding
    tail = jnp.stack([tokens[0, 6:10], tokens[1, 4:8]])
    positions = starts[:, None] + jnp.arange(4, dtype=jnp.int32)[None]
    variables = {"params": params, CACHE: cache}
    x, _ = run(variables, tail, None, None, positions, config=config, method="hidden")
    for row, end in ((0, 10), (1, 8)):
        inputs = tokens[row : row + 1, :end]
        whole, _ = run({"params": params}, inputs, config=config, method="hidden")
        np.testing.assert_allclose(x[row], whole[0, -4:], atol=1e-4)


def test_stop_tokens_end_a_row(tiny):
    config, params = tiny.config, tiny.params
    free = [a.tokens for a in decode.generate(config, params, PROMPTS, max_new_tokens=20)]
    stop = free[0][4]
    found = decode.generate(config, params, PROMPTS, max_new_tokens=20, stop_tokens=[stop])
    for before, after in zip(free, found, strict=True):
        if stop in before:
            assert (after.tokens, after.reason) == (before[: before.index(stop)], "stop")
        else:
            assert (after.tokens, after.reason) == (before, "length")


def test_the_caller_ends_a_row(tiny):
    config, params = tiny.config, tiny.params
    asked = []

    def ended(row, tokens):
        asked.append(row)
        return row == 1

    found = decode.generate(config, params, PROMPTS, max_new_tokens=30, ended=ended)
    assert [a.reason for a in found] == ["length", "text", "length"]
    assert len(found[1].tokens) < 30 and asked.count(1) == 1


@pytest.mark.full
def test_draws_depend_on_the_row_and_the_seed_only(tiny):
    config, params = tiny.config, tiny.params
    how = {"max_new_tokens": 12, "sampling": Sampling(temperature=1.5)}
    together = decode.generate(config, params, PROMPTS, **how)
    again = decode.generate(config, params, PROMPTS, **how)
    alone = decode.generate(config, params, PROMPTS[1:2], **how, rows=[1])
    other = decode.generate(config, params, PROMPTS, **how, seed=1)
    assert together == again
    assert together[1] == alone[0]
    assert [a.tokens for a in together] != [a.tokens for a in other]
    twice = decode.generate(config, params, [PROMPTS[0]] * 2, **how)
    assert twice[0] != twice[1]


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.asarray([0.5, 0.25, 0.15, 0.1]))
    kind, values = Sampling(temperature=1.0, top_p=0.7).kind, Sampling(1.0, top_p=0.7).values
    keys = jax.random.split(jax.random.key(0), 3000)
    drawn = pick(jnp.tile(logits, (3000, 1)), None, keys, kind, values)
    shares = np.bincount(drawn, minlength=4) / 3000
    np.testing.assert_allclose(shares, [2 / 3, 1 / 3, 0, 0], atol=0.04)


@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.6, 1.0])
def test_filters_are_those_of_transformers(top_k, top_p):
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = np.random.default_rng(3).normal(size=(4, 50)).astype(np.float32) * 3
    expected = TemperatureLogitsWarper(0.7)(None, torch.tensor(scores))
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    sampling = Sampling(0.7, top_k, top_p)
    found = filtered(jnp.asarray(scores) / 0.7, sampling.kind, sampling.values)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_repetition_penalty_is_that_of_transformers(tiny):
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    config, params = tiny.config, tiny.params
    penalty = RepetitionPenaltyLogitsProcessor(1.8)
    how = {"max_new_tokens": 10, "sampling": Sampling(repetition_penalty=1.8)}
    found = decode.generate(config, params, PROMPTS, **how)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        tokens = list(prompt)
        for token in answer.tokens:
            scores = np.array(logits_of(config, params, tokens)[-1:])
            scores = penalty(torch.tensor([tokens]), torch.tensor(scores))
            assert token == int(scores.argmax())
            tokens.append(token)
    assert found != decode.generate(config, params, PROMPTS, max_new_tokens=10)


def test_nothing_is_compiled_twice(tiny):
    """One program serves prompts of a bucket, answers that fit a cache, and settings of a kind."""
    config, params = tiny.config, tiny.params

    def sizes(prompt, count, temperature, top_p):
        how = {"sampling": Sampling(temperature, top_p=top_p), "stop_tokens": [prompt]}
        decode.generate(config, params, [[1] * prompt], max_new_tokens=count, **how)
        return decode.prefill._cache_size(), decode.decode._cache_size()

    before = sizes(3, 5, 0.5, 0.3)
    assert sizes(14, 19, 0.9, 0.8) == before
    assert sizes(16, 30, 2.0, 0.1) == before


def lowered(config, params, rows, length):
    """`prefill`, lowered but not compiled."""
    sampling = Sampling()
    keys = jax.vmap(jax.random.key)(jnp.zeros(rows, jnp.uint32))
    stops, limit = jnp.full(16, decode.NOTHING, jnp.int32), jnp.asarray(4, jnp.int32)
    order = decode.RunSettings(sampling.values, stops, keys, limit)
    tokens, lengths = jnp.zeros((rows, length), jnp.int32), jnp.full(rows, length, jnp.int32)
    given = (params, tokens, lengths, order)
    return decode.prefill.lower(*given, config=config, kind=sampling.kind)


def test_prefill_makes_logits_of_the_last_tokens_only(tiny):
    rows, length, vocab = 4, 40, 8192
    config = dataclasses.replace(tiny.config, vocab_size=vocab)
    params = init(config, jax.random.key(0))
    found = lowered(config, params, rows, length).compile().memory_analysis()
    made = found.output_size_in_bytes + found.temp_size_in_bytes
    assert made < rows * length * vocab * 4 / 4


@pytest.mark.quick("True")
@pytest.mark.parametrize("equal", [True, False])
def test_equal_blocks_are_one_function(tiny, equal):
    config = dataclasses.replace(tiny.config, num_layers=5, windows=None)
    params = init(config, jax.random.key(0))
    if not equal:  # one block has another MLP width
        mlp = params["layer_3"]["mlp"]
        mlp["up"] = jax.tree.map(lambda a: a[..., :-1], mlp["up"])
        mlp["down"]["kernel"] = mlp["down"]["kernel"][:-1]
    text = lowered(config, params, 2, 16).as_text()
    assert text.count("call @_block") == 5
    assert text.count("func.func private @_block") == (1 if equal else 2)


def test_buckets():
    sizes = sorted({bucket(n) for n in range(1, 2000)})
    assert sizes[:6] == [16, 24, 32, 48, 64, 96]
    assert all(n <= bucket(n) <= max(16, 1.5 * n) for n in range(1, 2000))


def unpadded(tokens, mask):
    """The prompts of a batch that a tokenizer has padded, on whichever side."""
    return [row[seen].tolist() for row, seen in zip(tokens, mask, strict=True)]


def test_prompts_of_a_padded_batch(tiny):
    """Padding is taken off before generation; its side and its ids do not matter."""
    tokens = np.array([[0, 0, 5, 6], [7, 8, 0, 0]])
    mask = np.array([[False, False, True, True], [True, True, False, False]])
    found = decode.generate(tiny.config, tiny.params, unpadded(tokens, mask), max_new_tokens=9)
    expected = [greedy(tiny.config, tiny.params, prompt, 9) for prompt in ([5, 6], [7, 8])]
    assert [answer.tokens for answer in found] == expected


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([[1], []], 4, r"prompts of \[1, 0\] tokens"),
        ([[1]], 0, "0 new tokens"),
        ([[1, 61]], 4, "token ids from 0 to 61: expected 0 to 60"),
        ([[1] * 40], 9, "are 49, but the model's longest sequence is 48"),
    ],
)
def test_wrong_inputs(tiny, prompts, count, message):
    with pytest.raises(ValueError, match=message):
        decode.generate(tiny.config, tiny.params, prompts, max_new_tokens=count)


def test_encoders_do_not_generate():
    model = source("roberta")
    with pytest.raises(ValueError, match="head 'masked' does not generate"):
        decode.generate(model.config, model.params, [[1]], max_new_tokens=1)


@pytest.mark.parametrize("field", ["temperature", "top_k", "top_p", "repetition_penalty"])
def test_settings_out_of_range(field):
    with pytest.raises(ValueError, match=f"{field} -1: expected"):
        Sampling(**{field: -1})


TRAINED = 24
STRETCHED = Rope(
    kind="longrope",
    original_max_positions=TRAINED,
    short_factor=(1.0,) * 4,
    long_factor=(2.0, 3.0, 4.0, 5.0),
    factor=2.0,
)


@pytest.fixture(scope="module")
def longrope():
    """A model whose rotary frequencies change beyond 24 tokens, and its parameters."""
    config = dataclasses.replace(BLOCKS["starcoder2"], windows=None, rope=STRETCHED)
    return config, init(config, jax.random.key(3))


def at_own_length(config, params, prompt, count):
    """Greedy generation without a cache, in passes that are as long as the text so far asks for."""
    tokens = list(prompt)
    for _ in range(count):
        length = TRAINED if len(tokens) <= TRAINED else GPT2.max_positions
        tokens.append(int(jnp.argmax(logits_of(config, params, tokens, length=length)[-1])))
    return tokens[len(prompt) :]


def test_long_rotary_frequencies_are_those_of_each_row(longrope):
    """Rows below, at and beyond the trained length, and one that crosses it, in one batch."""
    config, params = longrope
    draw = np.random.default_rng(8)
    prompts = [draw.integers(0, 61, n).tolist() for n in (3, 20, TRAINED, TRAINED + 1, 30)]
    found = decode.generate(config, params, prompts, max_new_tokens=18)
    for prompt, answer in zip(prompts, found, strict=True):
        assert answer.tokens == at_own_length(config, params, prompt, 18)


def test_long_rotary_frequencies_depend_on_no_limit_and_no_neighbour(longrope):
    config, params = longrope
    prompts = [[3, 4, 5], list(range(20))]
    whole = decode.generate(config, params, prompts, max_new_tokens=28)
    for count in (1, 4, 5, 12):
        for prompt, answer in zip(prompts, whole, strict=True):
            (alone,) = decode.generate(config, params, [prompt], max_new_tokens=count)
            assert alone.tokens == answer.tokens[:count]
    # A row that ends where the other one crosses.
    stop = whole[1].tokens[4]
    (first, second) = decode.generate(
        config, params, prompts, max_new_tokens=12, stop_tokens=[stop]
    )
    assert second.tokens == whole[1].tokens[: whole[1].tokens.index(stop)]
    expected = whole[0].tokens[:12]
    end = expected.index(stop) if stop in expected else 12
    assert first.tokens == expected[:end]


@pytest.mark.full
def test_a_batch_is_cut_when_most_rows_have_ended(longrope):
    """The rows that go on draw what they draw alone, also beyond the trained length."""
    config, params = longrope
    draw = np.random.default_rng(9)
    prompts = [draw.integers(0, 61, 3 + i).tolist() for i in range(decode.CUT_ROWS)]
    open_rows = (2, 7, 15)  # all outgrow the trained length after the cut
    how = {"max_new_tokens": 30, "sampling": Sampling(temperature=1.5)}
    cuts = decode._taken._cache_size()
    found = decode.generate(
        config, params, prompts, **how, ended=lambda row, tokens: row not in open_rows
    )
    assert decode._taken._cache_size() == cuts + 1
    assert [i for i, answer in enumerate(found) if answer.reason == "length"] == list(open_rows)
    for i in open_rows:
        (alone,) = decode.generate(config, params, [prompts[i]], **how, rows=[i])
        assert found[i].tokens == alone.tokens


@pytest.mark.full
def test_dynamic_rotary_frequencies_end_at_the_trained_length():
    rope = Rope(kind="dynamic", factor=2.0, original_max_positions=TRAINED)
    dynamic = dataclasses.replace(BLOCKS["starcoder2"], windows=None, rope=rope)
    params = init(dynamic, jax.random.key(3))
    (inside,) = decode.generate(dynamic, params, [[3, 4, 5]], max_new_tokens=20)
    assert inside.tokens == greedy(dynamic, params, [3, 4, 5], 20, length=TRAINED)
    with pytest.raises(ValueError, match="frequencies of dynamic rotary positions change"):
        decode.generate(dynamic, params, [[3, 4, 5]], max_new_tokens=30)
