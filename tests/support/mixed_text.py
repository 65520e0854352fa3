# ruff: noqa: RUF001
"""Lines of mixed text: prose in several scripts, code, numbers, signs and spaces of all kinds."""

import numpy as np

_PROSE = (
    "The tower is 324 metres tall|about the same height|it's what WE'LL do|don't|I'Ve|Ärger|über"
)
_SCRIPTS = (
    "naïve café|東京は日本の首都です|東京|你好，世界|안녕하세요|Привет, мир|नमस्ते|"
    "مرحبا بالعالم|שלום|ภาษาไทย|🎉|👩\u200d👩\u200d👧|😀😀"
)
_NUMBERS = "1|12|123|1234|1000000|3.14159|1,063|½|²|٣٤٥|Ⅷ|0x1F|2024-11-30"
_CODE = (
    "def f(x):|return x**2 + 1|for i in range(10):|if (a != b) {|}|;|# comment|// TODO: x|"
    '"quoted"|\'a\'|<div class="x">|</div>|https://example.org/a?b=c&d=1|a_b|camelCase|'
    "HTTPServer|snake_case_name|+=|<|>|$|~|^|\\|`code`|[1, 2]|(x)|...|…|!?|--|—"
)
_ODD = (
    "e\u0301|n\u0303|\u00a0|\u3000|\u200b|\t|  |    |\u2581|<0x41>|\x00|\x7f|ﬁ|Å|\u212a|ß|İ|ǅ|ʼ|"
    "’s|“so”"
)
PIECES = "|".join((_PROSE, _SCRIPTS, _NUMBERS, _CODE, _ODD)).split("|")
JOINTS = ("", " ", " ", " ", "  ", "\t", "\n", "\n\n", "\r\n", "    ")


def mixed_lines(count=1000, seed=0):
    """Texts of up to twelve pieces each; they hold line breaks, too."""
    draw = np.random.default_rng(seed)
    return [
        "".join(
            f"{JOINTS[draw.integers(len(JOINTS))]}{PIECES[draw.integers(len(PIECES))]}"
            for _ in range(draw.integers(1, 13))
        )
        for _ in range(count)
    ]
