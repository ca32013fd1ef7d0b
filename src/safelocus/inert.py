"""Text of others (responses, names, templates, paths) where it is shown: it says what it says, and does nothing.

A terminal obeys control characters, and everything that sets text obeys marks of direction, which can show a name
other than it is. Both are spelled out: `\\u001b`, `\\u202e`. In JSON that is how strings spell them anyway.
"""

import re
from urllib.parse import urlsplit, urlunsplit

# control characters but tab and line feed; marks of direction and of lines; halves of surrogate pairs
_ACTIVE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def inert(text: str) -> str:
    """The text with all that acts spelled out."""
    return _ACTIVE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def line(text: str) -> str:
    """One line of it."""
    return inert(text).replace("\n", "\\n").replace("\t", " ")


def markdown(text: str) -> str:
    """One line of it for a Markdown document: no HTML, no column of a table, no link or picture."""
    text = re.sub(r"([\\`|])", r"\\\1", line(text))
    text = re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", text)  # what begins a tag; "< 0.01" does not
    return text.replace("](", "]\\(").replace("][", "]\\[")


def code(text: str) -> str:
    """One line of it between the backticks of a Markdown document."""
    return f"`{line(text).replace('`', chr(39))}`"


def without_secrets(address: str) -> str:
    """A URL without the name, password, query and fragment in it; any other text as it is."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return address
    if not parts.netloc:
        return address
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
