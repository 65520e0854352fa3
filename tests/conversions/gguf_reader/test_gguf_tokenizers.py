# ruff: noqa: RUF001
"""Tokenizers of GGUF files give the ids of the model's own tokenizer."""

import json
import os
from itertools import pairwise

import numpy as np
import pytest
from damage import fails
from gguf_models import write_model
from hf_models import hf_model, logits
from mixed_text import mixed_lines
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from lordjax.conversions.readers.checkpoint import open_checkpoint
from lordjax.conversions.readers.gguf.pre_tokenizers import PRE_TOKENIZERS

TEXT = (
    "The tower is 324 metres (1,063 ft) tall, about the same height as an 81-storey building.\n\n"
    "def f(x):\n    return x**2 + 1000000  # it's what WE'LL do\n\tÄpfel, 東京 and 🎉 don't\r\n   "
    "  12345   67 +=<|>$ ~^ e\u0301 ½ <|end|>after "
)
SPECIAL = ["<|unk|>", "<|begin|>", "<|end|>"]

# --- Byte-level BPE ---

# Pre-tokenizers as they stand in the tokenizer.json of a model.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _GPT4O.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}")
_SEED = _LLAMA3.replace("{1,3}", "{1}").replace(r"\p{N}]+[\r\n]*", r"\p{N}\r\n]+")
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def cut(*expressions):
    """Cuts by expressions, then turns bytes into letters."""
    splits = [pre.Split(Regex(expression), "isolated") for expression in expressions]
    return [*splits, pre.ByteLevel(add_prefix_space=False, use_regex=False)]


def words():
    return [pre.ByteLevel(add_prefix_space=False, use_regex=True)]


def digits():
    return [pre.Digits(individual_digits=True), *words()]


REFERENCES = {
    "gpt-2": words(),
    "smollm": digits(),
    "starcoder": digits(),
    "refact": digits(),
    "command-r": digits(),
    "olmo": words(),
    "mpt": words(),
    "llama-bpe": cut(_LLAMA3),
    "dbrx": cut(_LLAMA3),
    "qwen2": cut(_QWEN2),
    "stablelm2": cut(_QWEN2),
    "hunyuan": cut(_QWEN2),
    "qwen35": cut(_QWEN35),
    "gpt-4o": cut(_GPT4O),
    "tekken": cut(_TEKKEN),
    "seed-coder": cut(_SEED),
    "deepseek-v3": cut(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3),
    "deepseek-coder": cut(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "deepseek-llm": [
        *cut(
            r"[\r\n]",
            r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",  # its list of letters, as far as the lines below have them
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            "[一-龥ࠀ-一가-퟿]+",
        )[:-1],
        pre.Digits(individual_digits=True),
        pre.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "bloom": cut(_BLOOM),
    "viking": cut(_BLOOM, r"\p{N}"),
}
COMPOSED = ("qwen2", "qwen35", "stablelm2", "olmo", "mpt", "command-r")
WHOLE_WORDS = BEGINS = ("llama-bpe", "tekken")


def reference_tokenizer(name):
    """A small trained tokenizer that cuts text as the models' tokenizer.json do."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=name in WHOLE_WORDS))
    if name in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(REFERENCES[name])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3 + mixed_lines(300, seed=1), trainer)
    return tokenizer


def merges_of(reference):
    return [" ".join(merge) for merge in json.loads(reference.to_str())["model"]["merges"]]


def write_tokenizer(path, kind, tokens, model, types, fields):
    """A file with a tokenizer; the embedding gets as many rows."""
    model.resize_token_embeddings(max(len(tokens), 97), mean_resizing=False)

    def extra(writer):
        writer.add_tokenizer_model(kind)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_chat_template("{{ messages }}")
        fields(writer)

    return write_model(path, model, extra=extra)


def sorted_tokens(vocab):
    return sorted(vocab, key=vocab.get)


@pytest.mark.quick("gpt-2", "llama-bpe", "qwen2")
@pytest.mark.parametrize("name", REFERENCES)
def test_byte_level_tokenizer(tmp_path, model, name):
    from transformers import AutoTokenizer

    reference = reference_tokenizer(name)
    tokens = sorted_tokens(reference.get_vocab())

    def fields(writer):
        writer.add_tokenizer_pre(name)
        writer.add_token_merges(merges_of(reference))

    types = [3] * 3 + [1] * (len(tokens) - 3)
    path = write_tokenizer(tmp_path / "model.gguf", "gpt2", tokens, model, types, fields)
    tokenizer = open_checkpoint(path).tokenizer()
    for line in (TEXT, *mixed_lines()):
        expected = reference.encode(line).ids
        assert tokenizer.encode(line, add_special_tokens=False) == expected
        assert tokenizer.encode(line) == [1] * (name in BEGINS) + expected
    assert tokenizer.decode(expected) == reference.decode(expected, skip_special_tokens=False)

    open_checkpoint(path).tokenizer_files(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert (again.bos_token, again.eos_token) == ("<|begin|>", "<|end|>")
    assert again.chat_template == "{{ messages }}"


def test_names_of_one_kind_are_one_pre_tokenizer():
    same = [("qwen2", "deepseek-r1-qwen"), ("llama-bpe", "falcon3"), ("gpt-2", "phi-2")]
    assert all(PRE_TOKENIZERS[one] == PRE_TOKENIZERS[other] for one, other in same)


def test_default_pre_tokenizer(tmp_path, model):
    """llama.cpp's default cuts punctuation and digits, in threes, from words."""
    tokens = ["<u>", "<b>", "<e>", *"abc123Ġ,"]
    merges = ["a b", "b c", "1 2", "2 3", "12 3", "Ġ a", ", a", "c 1"]
    tokens += [merge.replace(" ", "") for merge in merges]

    def fields(writer):
        writer.add_tokenizer_pre("default")
        writer.add_token_merges(merges)

    types = [3] * 3 + [1] * (len(tokens) - 3)
    path = write_tokenizer(tmp_path / "model.gguf", "gpt2", tokens, model, types, fields)
    tokens = open_checkpoint(path).tokenizer().tokenize("abc,a 12312 ab,ac1")
    assert tokens == ["ab", "c", ",", "a", "Ġ", "123", "12", "Ġ", "ab", ",", "a", "c", "1"]


def test_old_files_without_a_pre_tokenizer_have_that_of_their_architecture(tmp_path, model):
    """Llama's files do not say enough: their models have different ones."""
    tokens = ["<u>", "<b>", "<e>", "1", "2", "12"]

    def fields(writer):
        writer.add_token_merges(["1 2"])

    def opened(name):
        own = hf_model(name, {})
        types = [3, 3, 3, 1, 1, 1]
        return write_tokenizer(tmp_path / f"{name}.gguf", "gpt2", tokens, own, types, fields)

    tokenizer = open_checkpoint(opened("gpt2")).tokenizer()
    assert tokenizer.encode("12") == [5]
    tokenizer = open_checkpoint(opened("qwen2")).tokenizer()
    assert tokenizer.encode("12") == [3, 4]
    fails(opened("llama"), "pre-tokenizer None", "known: gpt-2", then=lambda c: c.tokenizer())


# --- SentencePiece ---


def test_sentence_piece_tokenizer(tmp_path, model):
    reference = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    reference.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, limit_alphabet=50, show_progress=False
    )
    reference.train_from_iterator([TEXT.replace(" ", "\n")] * 3 + TEXT.split() * 3, trainer)
    tokens = sorted_tokens(reference.get_vocab())
    types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)

    def fields(writer):
        writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)])

    path = write_tokenizer(tmp_path / "model.gguf", "llama", tokens, model, types, fields)
    tokenizer = open_checkpoint(path).tokenizer()
    text = TEXT.replace("<|end|>", "")
    assert tokenizer.encode(text) == [1, *reference.encode(text).ids]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def highest_scores_first(text, scores):
    """SentencePiece's algorithm: of all neighbours those are merged whose union scores highest."""
    parts = list(text)
    while True:
        unions = [(scores.get(a + b, -np.inf), -i) for i, (a, b) in enumerate(pairwise(parts))]
        if not unions or (best := max(unions))[0] == -np.inf:
            return parts
        at = -best[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.parametrize("prefix", ["▁", ""])
def test_pieces_are_merged_by_their_scores(tmp_path, model, prefix):
    lines = [line.replace(" ", "▁")[:60] for line in mixed_lines(200)]
    alphabet = sorted(set("".join(lines)) | {"▁"})
    draw = np.random.default_rng(0)
    pieces = {line[i : i + n] for line in lines for i in (0, 3, 8) for n in (2, 3, 4)}
    pieces = sorted(pieces - set(alphabet) - {""})
    tokens = ["<unk>", "<s>", "</s>", *alphabet, *pieces]
    scores = dict(zip(pieces, (-draw.permutation(len(pieces)) - 1.0).tolist(), strict=True))

    def fields(writer):
        writer.add_token_scores([scores.get(token, -1e6) for token in tokens])
        writer.add_add_space_prefix(bool(prefix))

    types = [2, 3, 3] + [1] * (len(tokens) - 3)
    path = write_tokenizer(tmp_path / "model.gguf", "llama", tokens, model, types, fields)
    tokenizer = open_checkpoint(path).tokenizer()
    for line in lines:
        expected = highest_scores_first(prefix + line, scores)
        assert tokenizer.tokenize(line.replace("▁", " ")) == expected


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_those_of_the_library_sentencepiece(tmp_path, model, prefix):
    """Gemma's kind has no prefix, and runs of spaces and line breaks are tokens of their own."""
    sentencepiece = pytest.importorskip("sentencepiece")
    # U+2581 in a text is a space for the library, but a sign for the models' tokenizer.json.
    lines = [line.replace("\x00", "").replace("▁", "") for line in mixed_lines(1200, seed=2)]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8", newline="\n")
    own = [] if prefix else ["\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<div>"]
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "own"),
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        user_defined_symbols=own,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "own.model"))
    count = pieces.get_piece_size()
    tokens = [pieces.id_to_piece(i) for i in range(count)]
    types = [1] * count
    for i in range(count):
        if tokens[i] in own:
            types[i], tokens[i] = 4, tokens[i].replace("▁", " ")
        elif pieces.is_byte(i):
            types[i] = 6
        elif pieces.is_control(i) or pieces.is_unknown(i):
            types[i] = 3 - pieces.is_unknown(i)

    def fields(writer):
        writer.add_token_scores([pieces.get_score(i) for i in range(count)])
        writer.add_add_space_prefix(prefix)

    path = write_tokenizer(tmp_path / "model.gguf", "llama", tokens, model, types, fields)
    tokenizer = open_checkpoint(path).tokenizer()
    for line in lines[:1000]:
        assert tokenizer.encode(line) == [1, *pieces.encode(line)], repr(line)


def test_spaces_of_user_defined_tokens(tmp_path, model):
    """Old files write them as U+2581; they are cut out of a text before spaces are replaced."""
    tokens = ["<unk>", "<s>", "</s>", "▁", "x", "▁x", "▁▁"]
    types = [2, 3, 3, 1, 1, 1, 4]

    def fields(writer):
        writer.add_array("tokenizer.ggml.scores", [0, 0, 0, -9, -9, -1, 0])  # whole numbers
        writer.add_add_space_prefix(False)

    path = write_tokenizer(tmp_path / "model.gguf", "llama", tokens, model, types, fields)
    tokenizer = open_checkpoint(path).tokenizer()
    assert tokenizer.encode("x  x x") == [1, 4, 6, 4, 5]


def test_added_tokens_of_phi3_take_the_spaces_behind_them(tmp_path, model):
    tokens = ["<unk>", "<s>", "</s>", "▁", "x", "▁x", "<|user|>", "<|endoftext|>"]
    types = [2, 3, 3, 1, 1, 1, 3, 3]

    def written(name):
        def fields(writer):
            writer.add_name(name)
            writer.add_token_scores([0.0, 0.0, 0.0, -9.0, -9.0, -1.0, 0.0, 0.0])
            writer.add_add_space_prefix(False)

        return write_tokenizer(tmp_path / f"{name}.gguf", "llama", tokens, model, types, fields)

    text = "<|user|> x<|endoftext|> x"
    assert open_checkpoint(written("Phi-3-mini")).tokenizer().encode(text) == [1, 6, 4, 7, 5]
    assert open_checkpoint(written("Other")).tokenizer().encode(text) == [1, 6, 5, 7, 5]


# --- Special tokens ---

CHAT = ["<u>", "<b>", "</s>", "a", "<|im_end|>", "<|endoftext|>", "<|im_start|>", "<EOT>", "aa"]
TYPES = [3, 3, 3, 1, 3, 4, 3, 1, 1]


@pytest.mark.parametrize("given", [{}, {"bos": True}, {"bos": False, "eos": True}])
def test_bos_and_eos_are_added_where_the_file_says_so(tmp_path, model, given):
    def fields(writer):
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(["a a"])
        for name, value in given.items():
            getattr(writer, f"add_add_{name}_token")(value)

    path = write_tokenizer(tmp_path / "model.gguf", "gpt2", CHAT, model, TYPES, fields)
    expected = [1] * given.get("bos", False) + [3] + [2] * given.get("eos", False)
    assert open_checkpoint(path).tokenizer().encode("a") == expected


def test_tokens_that_end_a_turn_are_in_the_config(tmp_path, model):
    """By the file's keys, and by their names unless they are ordinary tokens."""

    def fields(writer):
        writer.add_eot_token_id(6)
        writer.add_pad_token_id(2**32 - 1)

    path = write_tokenizer(tmp_path / "model.gguf", "gpt2", CHAT, model, TYPES, fields)
    hf_config = open_checkpoint(path).hf_config
    assert hf_config["eos_token_id"] == [2, 6, 4, 5]
    assert (hf_config["bos_token_id"], hf_config["pad_token_id"]) == (1, None)


def test_one_end_token_is_a_number(tmp_path, model):
    path = write_tokenizer(
        tmp_path / "model.gguf", "gpt2", CHAT, model, [1] * len(CHAT), lambda writer: None
    )
    assert open_checkpoint(path).hf_config["eos_token_id"] == 2


# --- Damage ---

SMALL = ["<u>", "<b>", "<e>", "a", "b", "ab"]


def damaged(path, model, fields, kind="gpt2", tokens=SMALL, types=None):
    def all_fields(writer):
        writer.add_tokenizer_pre("gpt-2")
        fields(writer)

    types = [3, 3, 3, 1, 1, 1] if types is None else types
    return write_tokenizer(path, kind, tokens, model, types, all_fields)


DAMAGES = {
    "merge-of-other-tokens": ("gpt2", lambda w: w.add_token_merges(["a c"]), "has 'a c'"),
    "merge-of-one-token": ("gpt2", lambda w: w.add_token_merges(["ab"]), "has 'ab'"),
    "no-merges": ("gpt2", lambda w: None, "tokenizer.ggml.merges: expected a list of type str"),
    "no-scores": ("llama", lambda w: None, "tokenizer.ggml.scores: expected a list of type float"),
    "few-scores": ("llama", lambda w: w.add_token_scores([1.0]), "1 scores of 6 tokens"),
    "other-kind": ("bert", lambda w: None, "tokenizer of kind 'bert'; supported: gpt2, llama"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_tokenizer_is_one_error(tmp_path, model, case):
    kind, fields, part = DAMAGES[case]
    path = damaged(tmp_path / "model.gguf", model, fields, kind)
    fails(path, part, "Hugging Face directory", then=lambda c: c.tokenizer())


def test_damaged_vocabulary_is_one_error(tmp_path, model):
    path, merges = tmp_path / "model.gguf", lambda w: w.add_token_merges(["a b"])
    damaged(path, model, merges, tokens=["a"] * 6)
    fails(path, "6 tokens, 1 of them different", then=lambda c: c.tokenizer())
    damaged(path, model, merges, types=[3, 3])
    fails(path, "2 token types", then=lambda c: c.tokenizer())


def test_special_id_beyond_the_vocabulary_is_one_error(tmp_path, model):
    path = tmp_path / "model.gguf"
    damaged(path, model, lambda w: w.add_eot_token_id(99))
    fails(path, "metadata tokenizer.ggml.eot_token_id = 99: expected an id below 6")


def test_unknown_pre_tokenizer(tmp_path, model):
    def fields(writer):
        writer.add_tokenizer_pre("odd")
        writer.add_token_merges(["a b"])

    types = [3, 3, 3, 1, 1, 1]
    path = write_tokenizer(tmp_path / "model.gguf", "gpt2", SMALL, model, types, fields)
    fails(path, "pre-tokenizer 'odd'", "known", then=lambda c: c.tokenizer())


# --- Directories and real files ---


def test_directory_tokenizer(directory, tmp_path_factory):
    reference = reference_tokenizer("smollm")
    reference.save(str(directory / "tokenizer.json"))
    checkpoint = open_checkpoint(directory)
    assert checkpoint.tokenizer().encode(TEXT) == reference.encode(TEXT).ids
    checkpoint.tokenizer_files(copy := tmp_path_factory.mktemp("copy"))
    assert (copy / "tokenizer.json").exists()
    (directory / "tokenizer.json").unlink()
    fails(directory, "no tokenizer", kind=FileNotFoundError, then=lambda c: c.tokenizer())


REAL = os.environ.get("LORDJAX_SMOLLM2_GGUF", "")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="LORDJAX_SMOLLM2_GGUF names no SmolLM2 GGUF file")
def test_real_gguf():
    """SmolLM2-135M-Instruct: ids, round trip, and next tokens that make sense."""
    checkpoint = open_checkpoint(REAL)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.tokenize("   in 1947") == ["ĠĠ", "Ġin", "Ġ", "1", "9", "4", "7"]
    ids = np.array([tokenizer.encode("The capital of France is")])
    best = int(logits(checkpoint.config, checkpoint.params(), ids)[0, -1].argmax())
    assert tokenizer.decode([best]) == " Paris"
