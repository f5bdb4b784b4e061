"""The code of a page of docs, to be run as it stands."""

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def code_of(page, mark=""):
    """The blocks of Python on a page; those that need more than Flax bear a mark."""
    text = (DOCS / page).read_text()
    pattern = rf"^```python{f' {mark}' if mark else ''}\n(.*?)^```"
    return "\n".join(re.findall(pattern, text, flags=re.DOTALL | re.MULTILINE))
