"""A tokenizer with a chat template, and examples that are read with it."""

import json

import numpy as np

from lordjax.data.examples import check
from lordjax.data.instructions import instructions
from lordjax.models import ModelConfig

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
    """A tokenizer of bytes; two line breaks are one token, and BOS before a text is optional."""
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
    """Reads a file; returns its examples, none of them held out, and the facts."""
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
    """Returns the targets of an example as text."""
    targets = examples.targets[i]
    places = np.flatnonzero(targets >= 0)
    np.testing.assert_array_equal(targets[places], examples.tokens[i][places + 1])
    return (tokenizer or make_tokenizer()).decode(targets[places])


def chat(*contents):
    """Returns messages of a user and an assistant in turn."""
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
