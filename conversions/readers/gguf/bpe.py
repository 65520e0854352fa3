"""Builds the two kinds of byte-pair encoding that GGUF files have."""

from __future__ import annotations

from typing import Any

from lordjax.conversions.readers.gguf.pre_tokenizers import PRE_TOKENIZERS
from lordjax.conversions.readers.gguf.special_tokens import (
    BYTE,
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    token_id,
)
from lordjax.conversions.readers.gguf.vocabulary import Vocabulary


def byte_level(vocabulary: Vocabulary) -> tuple[Any, bool]:
    """Builds a byte-level BPE (kind "gpt2"); also returns whether it adds a BOS by default.

    Raises:
      ValueError: if the pre-tokenizer is not known, or a merge is not of the vocabulary.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if vocabulary.pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"{vocabulary.file}: pre-tokenizer {vocabulary.pre!r} (tokenizer.ggml.pre) is not "
            f"known; known: {', '.join(PRE_TOKENIZERS)}. Another one would give other token ids; "
            "open the model's Hugging Face directory instead"
        )
    row, ids = PRE_TOKENIZERS[vocabulary.pre], vocabulary.ids()
    model = models.BPE(ids, _merges(vocabulary, ids), ignore_merges=row.whole_words)
    tokenizer = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in row.splits]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    if row.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, row.adds_bos


def _merges(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Returns the merges, in their order of precedence."""
    merges = []
    for merge in vocabulary.items("merges", str):
        # The first token of a merge is never empty, but in old files it may be a space.
        at = merge.find(" ", 1)
        pair = merge[:at], merge[at + 1 :]
        if at < 0 or not {*pair, "".join(pair)} <= ids.keys():
            raise vocabulary.wrong(f"tokenizer.ggml.merges has {merge!r}, whose tokens are missing")
        merges.append(pair)
    return merges


def sentence_piece(vocabulary: Vocabulary) -> tuple[Any, bool]:
    """Builds SentencePiece's BPE with byte fallback (kind "llama"), which adds a BOS by default.

    SentencePiece merges the two neighbours whose union has the highest score. So the list of merges
    is every split of a token into two tokens, sorted by falling score of the token.

    Raises:
      ValueError: if the scores are damaged.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids, scores = vocabulary.ids(), vocabulary.items("scores", float)
    if len(scores) != len(ids):
        raise vocabulary.wrong(f"{len(scores)} scores of {len(ids)} tokens")
    cuts = (
        (-scores[i], ids[token[:at]], ids[token[at:]], token[:at], token[at:])
        for token, i in ids.items()
        if vocabulary.types[i] not in (UNKNOWN, CONTROL, USER_DEFINED, BYTE)
        for at in range(1, len(token))
        if token[:at] in ids and token[at:] in ids
    )
    merges = [(left, right) for *_, left, right in sorted(cuts)]
    unknown = token_id(vocabulary.metadata, "unknown")
    model = models.BPE(
        ids,
        merges,
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = bool(vocabulary.metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * prefix
    )
    return tokenizer, True
