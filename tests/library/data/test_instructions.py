"""Instructions: targets of a chat; truncated, omitted and held-out examples."""

import numpy as np
import pytest
from chats import CHATML, VOCAB, answers, chat, ids, make_tokenizer, read, write

from lordjax.data.instructions import instructions

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
    {"prompt": "Add.\n\n1 2", "completion": "3"},
    {"prompt": "Add.\n\n1 2", "response": "3", "completion": None},
    {"question": "Add.\n\n1 2", "answer": "3", "source": "made up"},
    {"prompt": chat("Add.\n\n1 2"), "completion": chat("Add.\n\n1 2", "3")[1:]},
    {"messages": None, "conversations": chat("Add.\n\n1 2", "3")},
    {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Add.\n\n"}, {"type": "text", "text": "1 2"}],
            },
            {"role": "assistant", "content": ["3"]},
        ]
    },
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_the_answer_is_learned_with_its_end(tmp_path, suffix):
    tokenizer = make_tokenizer()
    messages = chat("Add.\n\n1 2", "3")
    train, facts = read(write(tmp_path / f"a{suffix}", SAME), tokenizer)
    assert train.tokens.shape == (len(SAME), 64)
    assert facts["template"] == "chat"
    assert facts["left_out"] == facts["cut"] == 0
    assert facts["targets"] == len(SAME) * 2
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=False
    )
    for i in range(len(SAME)):
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
    """The tokens before an answer equal the tokens of the prompt in generation."""
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
        ({"query": "a"}, 'expected a JSON object with "messages" or'),
        ({"question": "a"}, '"answer" is None; expected text'),
        ({"prompt": "a", "completion": 3}, '"completion" is 3; expected text'),
        ({"prompt": chat("a"), "completion": "b"}, '"completion" is no list'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "a part of type 'image'",
        ),
        ({"messages": chat("a", "b"), "tools": "{"}, '"tools": not JSON'),
        (["a"], 'expected a JSON object with "messages" or'),
        ({"instruction": "a"}, '"output" is None; expected text'),
        ({"instruction": "a", "input": 3, "output": "b"}, '"input" is 3; expected text'),
        ({"messages": "a"}, '"messages" is no list'),
        ({"messages": []}, "no answer"),
        ({"messages": chat("a")}, "no answer"),
        ({"messages": chat("a", "b")[1:]}, "no answer"),
        (
            {"messages": [*chat("a", "b"), {"role": "narrator"}]},
            'message 3: expected "role", one of',
        ),
        ({"messages": [{"role": ["user"], "content": "a"}]}, 'message 1: expected "role", one of'),
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
    refusal = r"record 1: the chat template refuses this \(TemplateError: no\)"
    with pytest.raises(ValueError, match=refusal):
        refusing = make_tokenizer("{{ raise_exception('no') }}")
        read(write(tmp_path / "a.json", [ALPACA]), refusing)
    with pytest.raises(ValueError, match="expected 0 to 255"):
        read(tmp_path / "a.json", vocab_size=256)


def test_tools_and_developers(tmp_path):
    """A developer is a system; calls of tools are the template's to write."""
    template = (
        "{% for t in tools or [] %}{{ t['name'] }};{% endfor %}"
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}!{{ c['name'] }}{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    calls = [{"name": "clock", "arguments": {}}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "12:00", "name": "clock"},
        {"role": "assistant", "content": "Noon."},
    ]
    record = {"messages": messages, "tools": '[{"name": "clock"}]'}
    tokenizer = make_tokenizer(template)
    train, _ = read(write(tmp_path / "a.jsonl", [record]), tokenizer)
    text = tokenizer.decode(ids(train, 0))
    assert text.startswith("clock;<|system|>Be brief.<|end|><|user|>Time?")
    assert answers(train, 0) == "!clock<|end|>Noon.<|end|>"
    with pytest.raises(ValueError, match=r"line 1: calls of tools, but the tokenizer has no chat"):
        read(tmp_path / "a.jsonl", make_tokenizer(None))
    plain = {"messages": [messages[1], messages[3], messages[4]]}
    train, _ = read(write(tmp_path / "b.jsonl", [plain]), make_tokenizer(None))
    assert "### Tool:\n12:00" in make_tokenizer(None).decode(ids(train, 0))
