"""The pre-tokenizers that a GGUF file names: how they cut a text before byte-pair encoding.

The regular expressions are those of the models' own ``tokenizer.json``. The name ``default``
stands for llama.cpp's own. The list of names is in llama.cpp's ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

from typing import NamedTuple


class PreTokenizer(NamedTuple):
    """How a text becomes words.

    Attributes:
      splits: regular expressions, applied one after the other. Each splits the text into matches
        and the rest.
      composes: whether the text is brought into Unicode's composed form (NFC) first.
      adds_bos: whether a text begins with BOS, unless the file says otherwise.
      whole_words: whether a word that is a token is taken whole, without merges.
    """

    splits: tuple[str, ...]
    composes: bool = False
    adds_bos: bool = False
    whole_words: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(after: str, digits: str) -> str:
    """Returns the expression of words that end where a capital letter follows small ones.

    Args:
      after: expression of what may follow a word.
      digits: expression of a number.
    """
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{after}|{start}{_UPPER}+{_LOWER}*{after}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
# Stops and commas of several scripts end a word, as spaces, brackets and bars do.
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

WORDS = _GPT2 + r"|\s+"  # how byte-level BPE splits by default
_WORDS = PreTokenizer((WORDS,))
_DIGITS_AND_WORDS = PreTokenizer((r"\p{N}", WORDS))
_THREE_DIGITS = PreTokenizer((rf"{_SHORT_FORMS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}",))
_LLAMA3 = _THREE_DIGITS._replace(adds_bos=True, whole_words=True)
_ONE_DIGIT = PreTokenizer((rf"{_SHORT_FORMS}|{_WORD}|\p{{N}}|{_REST}",))
_QWEN2 = _ONE_DIGIT._replace(composes=True)
# Letters with capital forms, as DeepSeek-LLM's tokenizer lists them.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15"
    "\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124"
    "\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184"
    "\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f"
    "\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CHINESE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK3 = PreTokenizer(
    (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        _ASCII_SIGNS + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    )
)

_NAMES: dict[str, PreTokenizer] = {
    "gpt-2 phi-2 jais gigachat a.x-4.0 mellum exaone4 trillion granite-docling": _WORDS,
    "mpt olmo gpt-neox": _WORDS._replace(composes=True),
    "smollm starcoder refact codeshell exaone minerva-7b mellum2": _DIGITS_AND_WORDS,
    "command-r": _DIGITS_AND_WORDS._replace(composes=True),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": _LLAMA3,
    "dbrx smaug-bpe glm4 chatglm-bpe": _THREE_DIGITS,
    "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2": _QWEN2,
    "megrez hunyuan solar-open grok-2": _ONE_DIGIT,
    "qwen35": PreTokenizer(
        (
            rf"{_SHORT_FORMS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        ),
        composes=True,
    ),
    "tekken": PreTokenizer((_cased("", r"\p{N}"),), adds_bos=True, whole_words=True),
    "gpt-4o llama4 kanana2": PreTokenizer((_cased(f"{_SHORT_FORMS}?", r"\p{N}{1,3}"),)),
    "seed-coder": PreTokenizer(
        (rf"{_SHORT_FORMS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)
    ),
    "deepseek-coder": PreTokenizer(
        (
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
            r"\p{N}",
        )
    ),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_CASED}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _CHINESE,
            r"\p{N}",
        )
    ),
    "deepseek-v3 hunyuan-dense joyai-llm": _DEEPSEEK3,
    "bloom poro-chat gpt3-finnish": PreTokenizer((_BLOOM,)),
    "viking": PreTokenizer((_BLOOM, r"\p{N}")),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
PRE_TOKENIZERS = {name: row for names, row in _NAMES.items() for name in names.split()}
