"""Fill the page ``api.md`` from the public names themselves, so that none can be forgotten.

A line ``<!-- names: A B -->`` becomes one section per name; a name that holds a table (``METHODS``)
becomes a table of its rows. MkDocs calls the functions ``on_…`` for every page.
"""

import inspect
import re
from typing import Any

import lordjax
from lordjax.conversions import open_checkpoint

PAGE = "api.md"
NO_DEFAULT = "<code>Sentinel.UNSET</code>"  # what mkdocs-click writes with click 8.3
LINE = re.compile(r"<!-- names: (.*) -->")
PUBLIC = {name: getattr(lordjax, name) for name in lordjax.__all__}
PUBLIC["open_checkpoint"] = open_checkpoint


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page with its names documented.

    Raises:
      ValueError: if a public name is missing from the page or listed twice, or another is listed.
    """
    if page.file.src_uri != PAGE:
        return markdown
    listed = [name for line in LINE.findall(markdown) for name in line.split()]
    wrong = set(PUBLIC) ^ set(listed) or {name for name in listed if listed.count(name) > 1}
    if wrong:
        raise ValueError(f"{PAGE} must list every public name once; check {sorted(wrong)}")
    return LINE.sub(lambda found: "\n\n".join(map(section, found[1].split())), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Return the page without the defaults of options that have none."""
    return html.replace(NO_DEFAULT, "")


def section(name: str) -> str:
    """Return the Markdown of one public name."""
    value = PUBLIC[name]
    if inspect.isclass(value) or inspect.isroutine(value):
        # `conversions` lies beside `lordjax`, where the reader of docstrings looks for it.
        module = value.__module__.replace("lordjax.conversions", "conversions")
        return f"::: {module}.{value.__qualname__}"
    rows = "\n".join(f"| `{key}` | {row.summary} |" for key, row in value.items())
    return f"### {name} {{ #{name} }}\n\n| key | what it does |\n|---|---|\n{rows}"
