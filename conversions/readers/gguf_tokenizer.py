"""Rebuilds the tokenizer of a GGUF file with the ``tokenizers`` package.

A GGUF file only names its pre-tokenizer; `PRE_TOKENIZERS` holds the regular expressions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lordjax.conversions.readers.gguf import Gguf

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Value of tokenizer.ggml.pre -> regular expressions, applied one after the other. Each splits the
# text into matches and the rest. "gpt-2" and "smollm" use GPT-2's expression (as in ByteLevel),
# "default" is llama.cpp's, and the others come from the models' tokenizer.json.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_WORDS + r"|\s+",),
    "smollm": (r"\p{N}", _WORDS + r"|\s+"),
    "llama-bpe": (rf"{_CONTRACTIONS}|\p{{N}}{{1,3}}|{_REST}",),
    "qwen2": (rf"{_CONTRACTIONS}|\p{{N}}|{_REST}",),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type


def read_tokenizer(file: Gguf) -> tuple[Any, dict[str, Any]]:
    """Rebuilds the tokenizer of a GGUF file.

    Returns:
      The tokenizer, and the content of its ``tokenizer_config.json``.

    Raises:
      ValueError: if the kind or the pre-tokenizer is not supported, or the vocabulary is damaged.
    """
    from tokenizers import AddedToken, processors

    tokens = file.meta("tokenizer.ggml.tokens") or []
    types = file.meta("tokenizer.ggml.token_type") or [1] * len(tokens)
    kind = file.meta("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise ValueError(f"{file.path}: tokenizer of kind {kind!r}; supported: {', '.join(_KINDS)}")
    if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise ValueError(
            f"{file.path}: damaged vocabulary: {len(tokens)} tokens, {len(set(tokens))} of them "
            f"different, {len(types)} token types; expected three equal numbers"
        )
    tokenizer, bos_default = _KINDS[kind](file, tokens)
    pairs = list(zip(tokens, types, strict=True))
    special = [t for t, k in pairs if k in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    user = [t for t, k in pairs if k == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in user])

    ids = {
        n: file.meta(f"tokenizer.ggml.{n}_token_id") for n in ("bos", "eos", "unknown", "padding")
    }
    ends = {}
    for name, default in (("bos", bos_default), ("eos", False)):
        if file.meta(f"tokenizer.ggml.add_{name}_token", default) and ids[name] is not None:
            ends[name] = tokens[ids[name]]
    if ends:
        template = [ends.get("bos"), "$A", ends.get("eos")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in template if part],
            special_tokens=[(token, tokens.index(token)) for token in set(ends.values())],
        )
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    config: dict[str, Any] = {names[n]: tokens[i] for n, i in ids.items() if i is not None}
    config["model_max_length"] = file.hf_config["max_position_embeddings"]
    config["clean_up_tokenization_spaces"] = False
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template := file.meta("tokenizer.chat_template"):
        config["chat_template"] = template
    return tokenizer, config


def _byte_level(file: Gguf, tokens: list[str]) -> tuple[Any, bool]:
    """Builds a byte-level BPE (kind "gpt2"); also returns whether it adds a BOS by default."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = file.meta("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"{file.path}: pre-tokenizer {pre!r} (tokenizer.ggml.pre) is not known; known: "
            f"{', '.join(PRE_TOKENIZERS)}. Another one would give other token ids; open the "
            "model's Hugging Face directory instead"
        )
    llama3 = pre == "llama-bpe"
    # The first token of a merge is never empty, but in old files it may be a space: search from 1.
    merges = [
        (m[: (at := m.index(" ", 1))], m[at + 1 :]) for m in file.meta("tokenizer.ggml.merges")
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=llama3))
    splits = [pre_tokenizers.Split(Regex(r), "isolated") for r in PRE_TOKENIZERS[pre]]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, llama3


def _sentence_piece(file: Gguf, tokens: list[str]) -> tuple[Any, bool]:
    """Builds SentencePiece's BPE with byte fallback (kind "llama"), which adds a BOS by default.

    SentencePiece merges the two neighbours whose union has the highest score. So the list of merges
    is every split of a token into two tokens, sorted by falling score of the token.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.meta("tokenizer.ggml.scores")
    if scores is None:
        raise ValueError(
            f"{file.path}: a tokenizer of kind llama needs tokenizer.ggml.scores, which is missing"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    cuts = (
        (-scores[i], vocab[token[:at]], vocab[token[at:]], token[:at], token[at:])
        for token, i in vocab.items()
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    )
    merges = [(left, right) for *_, left, right in sorted(cuts)]
    unknown = file.meta("tokenizer.ggml.unknown_token_id")
    model = models.BPE(
        vocab,
        merges,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = file.meta("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * prefix
    )
    return tokenizer, True


_KINDS = {"gpt2": _byte_level, "llama": _sentence_piece}
