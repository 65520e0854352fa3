"""Records of every task as published, and what scores are compared with."""

import functools
import json

import jax
import numpy as np

from lordjax.models import Transformer


@functools.partial(jax.jit, static_argnames="config")
def log_probabilities(config, params, tokens):
    logits = Transformer(config).apply({"params": params}, tokens)
    return jax.nn.log_softmax(logits[0], axis=-1)


def alone(config, params, pair, length=None):
    """A pair by a plain pass over all of its tokens, filled up to a length."""
    context, continuation = pair
    tokens = np.zeros((1, length or len(context) + len(continuation) - 1), np.int32)
    inputs = [*context, *continuation][:-1]
    tokens[0, : len(inputs)] = inputs
    found = np.asarray(log_probabilities(config, params, tokens), np.float64)
    rows = found[len(context) - 1 : len(inputs)]
    best = list(rows.argmax(axis=-1)) == list(continuation)
    return rows[np.arange(len(rows)), continuation].sum(), best


def tokenizer_of(words, **special):
    """A byte-pair tokenizer whose tokens begin with spaces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=list(special.values())
    )
    made.train_from_iterator([words] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


PUBLISHED = {
    "arc_easy": {
        "question": "What?",
        "choices": {"text": ["one", "two"], "label": ["1", "2"]},
        "answerKey": "2",
    },
    "arc_challenge": {
        "question": "What?",
        "choices": {"text": ["one", "two"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "openbookqa": {
        "question_stem": "What?",
        "choices": {"text": ["one", "two"], "label": ["A", "B"]},
        "answerKey": " B",
    },
    "piqa": {"goal": "What?", "sol1": "one", "sol2": "two", "label": 1},
    "boolq": {"question": "is it", "passage": "It is.", "label": 1},
    "social_iqa": {
        "context": "It is.",
        "question": "What?",
        "answerA": "one",
        "answerB": "two",
        "answerC": "three",
        "label": "2",
    },
    "winogrande": {"sentence": "He saw _ there .", "option1": "A", "option2": "B", "answer": "2"},
    "hellaswag": {
        "activity_label": "Sewing",
        "ctx_a": "A man [substeps] sits.",
        "ctx_b": "he  Sews [title] well.",
        "endings": ["one [x]", " two"],
        "label": "1",
    },
}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
