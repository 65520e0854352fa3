"""Fill the page ``api.md`` from the public names themselves, so that none can be forgotten.

MkDocs calls `on_page_markdown` for every page. A line ``<!-- names: A B -->`` becomes one section
per name of ``lordjax``; a name that holds a table (``METHODS``) becomes a list of its rows.
"""

import inspect
import re
from typing import Any

import lordjax

PAGE = "api.md"
LINE = re.compile(r"<!-- names: (.*) -->")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page with its names documented.

    Raises:
      ValueError: if a public name is missing from the page, or a name is listed twice.
    """
    if page.file.src_uri != PAGE:
        return markdown
    listed = [name for line in LINE.findall(markdown) for name in line.split()]
    wrong = set(lordjax.__all__) ^ set(listed)
    if wrong or len(listed) != len(set(listed)):
        raise ValueError(f"{PAGE} must list every public name once; check {sorted(wrong)}")
    return LINE.sub(lambda found: "\n\n".join(map(section, found[1].split())), markdown)


def section(name: str) -> str:
    """Return the Markdown of one public name."""
    value = getattr(lordjax, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        return f"::: {value.__module__}.{value.__qualname__}"
    rows = "\n".join(f"| `{key}` | {row.summary} |" for key, row in value.items())
    return f"### {name} {{ #{name} }}\n\n| key | what it does |\n|---|---|\n{rows}"
