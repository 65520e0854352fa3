"""Examples: their order, what is held out, and that a model learns answers and nothing else."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lordjax.data.examples import (
    Examples,
    batch_indices,
    check,
    fingerprint,
    packed,
    pad,
    split_documents,
)
from lordjax.data.instructions import instructions
from lordjax.models import ModelConfig, objective

VOCAB = 300
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=8,
    mlp_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_size=8,
    max_positions=512,
)
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<s>")


def make_tokenizer(template=CHATML, begin=False):
    """Bytes, two line breaks as one token, and special tokens; BOS before a text if wanted."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        bos_token="<s>",
        extra_special_tokens=list(SPECIAL[1:4]),
    )
    if begin:
        tokenizer = fast.backend_tokenizer
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", fast.bos_token_id)]
        )
    fast.chat_template = template
    return fast


def write(path, records):
    text = "\n".join(map(json.dumps, records)) if path.suffix == ".jsonl" else json.dumps(records)
    path.write_text(text)
    return path


def read(path, tokenizer=None, **options):
    """The examples of a file, none of them held out, and the facts."""
    tokenizer = tokenizer or make_tokenizer()
    options = {"seq_len": 512, "vocab_size": VOCAB, "share": 0} | options
    train, validation, facts = instructions(path, tokenizer, **options)
    assert not validation.size
    assert json.loads(json.dumps(facts)) == facts
    check(CONFIG, train)
    return train, facts


def ids(examples, i):
    return examples.tokens[i][slice(None) if examples.mask is None else examples.mask[i]]


def answers(examples, i, tokenizer=None):
    """What is learned of an example, as text."""
    targets = examples.targets[i]
    places = np.flatnonzero(targets >= 0)
    np.testing.assert_array_equal(targets[places], examples.tokens[i][places + 1])
    return (tokenizer or make_tokenizer()).decode(targets[places])


def chat(*contents):
    """Messages of a user and an assistant in turn."""
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


# --- order ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 9))
def test_an_epoch_reads_every_example_once(count, batch, seed):
    steps = -(-3 * count // batch)
    # Backwards: no step needs those before it.
    stream = [batch_indices(count, batch, k, seed) for k in reversed(range(steps))][::-1]
    assert all(len(part) == batch for part in stream)
    epochs = np.concatenate(stream)[: 3 * count].reshape(3, count)
    for e, epoch in enumerate(epochs):
        np.testing.assert_array_equal(epoch, np.random.default_rng([seed, e]).permutation(count))


def test_epochs_and_seeds_have_other_orders():
    orders = {tuple(batch_indices(50, 50, k, seed)) for k in range(3) for seed in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("wrong", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)])
def test_bad_positions(wrong):
    with pytest.raises(ValueError, match="expected 1 or more examples"):
        batch_indices(*wrong)


# --- containers ----------------------------------------------------------------------------------


def test_rows_and_fingerprint():
    tokens = np.arange(6, dtype=np.int32).reshape(3, 2)
    plain = Examples(tokens, tokens)
    whole = Examples(tokens, tokens, tokens > 1, tokens % 2)
    assert whole.size == 3
    chosen = whole.rows(np.array([2, 0]))
    np.testing.assert_array_equal(chosen.tokens, tokens[[2, 0]])
    np.testing.assert_array_equal(chosen.mask, [[True, True], [False, False]])
    assert plain.rows(np.array([True, False, True])).token_types is None
    others = [plain, whole, chosen, *(whole._replace(**{n: getattr(whole, n) * 0}) for n in fields)]
    prints = [fingerprint(e) for e in others]
    assert len(set(prints)) == len(prints)
    assert fingerprint(whole.rows(np.arange(3))) == fingerprint(whole)


fields = Examples._fields


@pytest.mark.parametrize(("longest", "length"), [(3, 64), (64, 64), (65, 100), (130, 100)])
def test_rows_are_filled_up_to_a_multiple(longest, length):
    tokens, mask = pad([[5] * longest, [6, 7]], 100)
    assert tokens.shape == (2, length)
    assert list(tokens[1][:3]) == [6, 7, 0]
    assert mask.sum(axis=1).tolist() == [min(longest, length), 2]
    assert pad([[5] * 64] * 2, 100)[1] is None


def test_examples_that_a_model_cannot_read():
    tokens = np.full((2, 4), 7, np.int32)
    good = Examples(tokens, tokens)
    check(CONFIG, good)
    for bad, message in [
        (Examples(np.full((1, 513), 7), np.full((1, 513), 7)), "513 tokens.*512.*--seq-len"),
        (good._replace(tokens=tokens + VOCAB), "token id 307 at window 0"),
        (good._replace(targets=tokens + VOCAB), "target 307; expected 0 to 299"),
        (good._replace(targets=tokens[:, :1]), "head 'causal'; expected an id for every token"),
        (good._replace(token_types=tokens), "token type 7, but the model has 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            check(CONFIG, bad)


# --- split ---------------------------------------------------------------------------------------


def held(texts, **options):
    chosen = split_documents(texts, **options)
    return {text for text, h in zip(texts, chosen, strict=True) if h}


def test_a_document_is_held_out_wherever_it_stands():
    texts = [f"document {i}" for i in range(1000)]
    first = held(texts)
    assert 20 < len(first) < 90
    assert held(texts[::-1]) == first
    assert held(texts[:700]) == first & set(texts[:700])
    assert held([text.encode() for text in texts]) == {text.encode() for text in first}
    assert not np.any(split_documents(texts, share=0))
    assert len(held(texts, seed=1) & first) < len(first) / 2
    assert first < held(texts, share=0.1)


def test_equal_documents_stay_together_and_one_is_held_out_at_least():
    for share in (1e-6, 0.5, 0.999999):
        chosen = split_documents(["a", "b", "a", "b", "c"], share=share)
        assert chosen[0] == chosen[2]
        assert chosen[1] == chosen[3]
        assert 0 < chosen.sum() < 5


@pytest.mark.parametrize("texts", [[], ["a"], ["a", "a"]])
def test_nothing_to_hold_out(texts):
    with pytest.raises(ValueError, match=r"not two different ones.*validation share of 0"):
        split_documents(texts)
    with pytest.raises(ValueError, match=r"share 1\.5"):
        split_documents(texts, share=1.5)


# --- packed text ---------------------------------------------------------------------------------


def pack(path, **options):
    return packed(path, make_tokenizer(), **{"seq_len": 8, "vocab_size": VOCAB} | options)


def letters(examples):
    """Which letters the documents of a part are made of."""
    return set(make_tokenizer().decode(examples.tokens.ravel()).replace("<|end|>", ""))


def test_no_document_is_in_both_parts(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(chr(65 + i) * 20)
    data = pack(tmp_path, share=0.3)
    parts = [letters(part) for part in data[:2]]
    assert not parts[0] & parts[1]
    assert all(parts)
    documents = data.facts["documents"]
    assert sum(documents.values()) == 40
    assert documents["validation"] == len(parts[1])
    assert data.facts["examples"] == {"train": data.train.size, "validation": data.validation.size}
    # Under other names and in another order the same texts are held out.
    for i in range(40):
        (tmp_path / f"{i:02}.txt").rename(tmp_path / f"{99 - i}.md")
    again = pack(tmp_path, share=0.3)
    assert [letters(part) for part in again[:2]] == parts


def test_targets_of_packed_text_are_those_of_the_objective(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    train, validation, facts = pack(tmp_path, share=0)
    expected = objective.targets(CONFIG, train.tokens, None)
    np.testing.assert_array_equal(train.targets, expected)
    assert train.mask is None
    assert validation.size == 0
    assert facts["sha256"]["train"] == fingerprint(train)
    with pytest.raises(ValueError, match="1 document"):
        pack(tmp_path)


def test_rows_of_an_array_are_documents(tmp_path):
    rows = np.random.default_rng(0).integers(0, VOCAB, (30, 12))
    np.save(tmp_path / "a.npy", np.concatenate([rows, rows]))
    train, validation, _ = pack(tmp_path / "a.npy", share=0.2)
    sides = [{tuple(row) for row in part.tokens} for part in (train, validation)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {tuple(row) for row in rows[:, :8]}
    assert train.size + validation.size == 60


# --- instructions --------------------------------------------------------------------------------

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
SAME = [
    ALPACA,
    {"messages": chat("Add.\n\n1 2", "3")},
    {"messages": [*chat("Add.\n\n1 2", "3"), {"role": "user", "content": "unanswered"}]},
    {
        "conversations": [
            {"from": "human", "value": "Add.\n\n1 2"},
            {"from": "gpt", "value": "3"},
        ],
        "id": 7,
    },
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_the_answer_is_learned_with_its_end(tmp_path, suffix):
    tokenizer = make_tokenizer()
    messages = chat("Add.\n\n1 2", "3")
    train, facts = read(write(tmp_path / f"a{suffix}", SAME), tokenizer)
    assert train.tokens.shape == (4, 64)
    assert facts["template"] == "chat"
    assert facts["left_out"] == facts["cut"] == 0
    assert facts["targets"] == 4 * 2
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=False
    )
    for i in range(4):
        assert tokenizer.decode(ids(train, i)) == whole.rstrip()
        assert list(ids(train, i)[: len(prompt)]) == prompt
        assert answers(train, i) == "3<|end|>"
        assert np.flatnonzero(train.targets[i] >= 0)[0] == len(prompt) - 1


def test_every_answer_of_a_chat_is_learned(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    messages = [system, *chat("Hi", "Hello", "Who?", "A model.")]
    train, _ = read(write(tmp_path / "a.json", [{"messages": messages}]))
    assert train.size == 1
    assert answers(train, 0) == "Hello<|end|>A model.<|end|>"


def test_a_template_that_rewrites_past_answers_gives_an_example_an_answer(tmp_path):
    """What the model reads before an answer is what it would read when asked."""
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{{ m['content'] if loop.last else m['content'].split(']')[-1] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    messages = chat("Hi", "[greet]Hello", "Who?", "[say]A model.")
    train, _ = read(write(tmp_path / "a.json", [{"messages": messages}]), tokenizer)
    assert train.size == 2
    for i, end in enumerate((2, 4)):
        assert answers(train, i) == f"{messages[end - 1]['content']}<|end|>"
        prompt = tokenizer.apply_chat_template(
            messages[: end - 1], add_generation_prompt=True, return_dict=False
        )
        assert list(ids(train, i)[: len(prompt)]) == prompt


def test_a_prompt_that_says_more_than_the_record(tmp_path):
    template = CHATML.replace("<|assistant|>{% endif", "<|assistant|><think>{% endif")
    train, _ = read(write(tmp_path / "a.json", [ALPACA]), make_tokenizer(template))
    assert answers(train, 0) == "3<|end|>"


def test_no_token_is_part_prompt_and_part_answer(tmp_path):
    template = CHATML.replace("|>{{ m['content']", "|>\n{{ m['content']")
    tokenizer = make_tokenizer(template.replace("<|assistant|>{%", "<|assistant|>\n{%"))
    assert len(tokenizer.encode("\n\n", add_special_tokens=False)) == 1
    messages = chat("Hi", "\nHello", "Who?", "\nMe")
    train, _ = read(write(tmp_path / "a.json", [{"messages": messages}]), tokenizer)
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=False
    )
    assert list(ids(train, 0)[: len(prompt)]) == prompt
    assert answers(train, 0) == "\nHello<|end|>\nMe<|end|>"
    expected = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    assert tokenizer.decode(ids(train, 0)) == expected


@pytest.mark.parametrize("begin", [False, True])
def test_without_a_template_there_are_headings(tmp_path, begin):
    tokenizer = make_tokenizer(None, begin)
    records = [ALPACA, {"messages": chat("Hi", "Hello", "Who?", "Me")}]
    train, facts = read(write(tmp_path / "a.json", records), tokenizer)
    assert facts["template"] == "headings"
    assert answers(train, 0) == "3<|end|>"
    assert answers(train, 1) == "Hello<|end|>Me<|end|>"
    # As the tokenizer begins a text.
    text = tokenizer.decode(ids(train, 0)[begin:])
    assert list(ids(train, 0)) == tokenizer.encode(text)
    assert text == "### Instruction:\nAdd.\n\n1 2\n\n### Response:\n3<|end|>"


def test_long_examples_are_cut_or_left_out_and_counted(tmp_path):
    records = [ALPACA, {**ALPACA, "output": "3" * 100}, {**ALPACA, "instruction": "x" * 100}]
    train, facts = read(write(tmp_path / "a.json", records), seq_len=40)
    assert train.tokens.shape == (2, 40)
    assert (facts["cut"], facts["left_out"]) == (1, 1)
    assert answers(train, 1) == "3" * (40 - 12)  # behind two roles, ten letters, an end, a break
    with pytest.raises(ValueError, match="no example of at most 5 tokens, 3 left out"):
        read(tmp_path / "a.json", seq_len=5)
    with pytest.raises(ValueError, match="examples of 1 tokens"):
        read(tmp_path / "a.json", seq_len=1)


def test_a_question_is_held_out_with_all_its_answers(tmp_path):
    records = [{"instruction": f"{i % 20}", "output": f"{i}"} for i in range(60)]
    path = write(tmp_path / "a.json", records)
    train, validation, facts = instructions(
        path, make_tokenizer(), seq_len=64, vocab_size=VOCAB, share=0.3
    )
    assert (train.size, validation.size) == tuple(facts["examples"].values())
    assert train.size % 3 == validation.size % 3 == 0
    assert train.size + validation.size == 60


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a"}, 'expected a record with "messages" or'),
        (["a"], 'expected a record with "messages" or'),
        ({"instruction": "a"}, '"output" is None; expected text'),
        ({"instruction": "a", "input": 3, "output": "b"}, '"input" is 3; expected text'),
        ({"messages": "a"}, '"messages" is no list'),
        ({"messages": []}, "no answer"),
        ({"messages": chat("a")}, "no answer"),
        ({"messages": chat("a", "b")[1:]}, "no answer"),
        ({"messages": [*chat("a", "b"), {"role": "tool"}]}, 'message 3: expected "role", one of'),
        ({"messages": [{"role": "user"}]}, 'message 1: "content" is None'),
        ({"conversations": [{"from": "user", "value": 1}]}, 'message 1: "value" is 1'),
    ],
)
def test_bad_records(tmp_path, record, message):
    with pytest.raises(ValueError, match=r"a\.json, record 2.*" + message):
        read(write(tmp_path / "a.json", [ALPACA, record]))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2.*" + message):
        read(write(tmp_path / "a.jsonl", [ALPACA, record]))


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
        read(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{}\n{}")
    with pytest.raises(ValueError, match=r"a\.json: not JSON"):
        read(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a\.json: dict; expected a list"):
        read(tmp_path / "a.json")
    with pytest.raises(ValueError, match="record 1: the chat template refuses this: no"):
        refusing = make_tokenizer("{{ raise_exception('no') }}")
        read(write(tmp_path / "a.json", [ALPACA]), refusing)
    with pytest.raises(ValueError, match="expected 0 to 255"):
        read(tmp_path / "a.json", vocab_size=256)
