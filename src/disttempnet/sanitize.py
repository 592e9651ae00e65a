"""Make text of data, files and users safe to show and write: credentials, control characters, table cells."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
# user@ or user:password@ of a URL. A password goes up to the last @ of the word, since those of AWS contain "/". A port
# is no password, and a quotation mark that ends a JSON string ends it.
_USER = re.compile(
    r"(?<=://)(?:[^/?#\s:@\"'<>\\\[]*:(?!\d{1,5}(?:[/?#\s\"'<>,;)\]}\\]|$))(?:[^\s\"<>]|\"(?![\s,:}\]]|$)){1,1000}@"
    r"|[^/?#\s\"<>\\]+@)"
)
# the query of a shard's URL: services have their own names for secrets there
_SHARD_QUERY = re.compile(r"(?<=\.tar\?)[^\s\"'<>#]+")
# parameters of presigned and token URLs: X-Amz-Signature, X-Goog-Credential, sig (SAS), AWSAccessKeyId, token, api_key
_PARAMETER = re.compile(
    r"(?<=[?&;#])"
    r"((?:code|pw|sas|hmac|otp|pin)|"
    r"[\w.%~-]*(?:sig|token|secret|key|pass|pwd|auth|credential|policy|session|access|jwt)[\w.%~-]*)"
    r"=([^\s&;\"'<>#]+)",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
# C0 except tab and newline, DEL, C1; line and paragraph separators; bidirectional marks; lone surrogates
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_MARKDOWN = re.compile(r"[\\|`*\[\]]")


def redacted(text: str) -> str:
    """Return the text with the credentials of its URLs replaced by ***.

    Credentials are users and passwords, values of parameters with secret names, and all values in the query of a shard
    (.tar?…). A placeholder, ${NAME}, is no secret and stays.
    """
    if "://" not in text and "=" not in text:
        return text
    return _PARAMETER.sub(_parameter, _SHARD_QUERY.sub(_shard_query, _USER.sub(_user, text)))


def redacted_table(value: Any) -> Any:
    """Return a nested table with `redacted` applied to every string; tuples become lists, as in files."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {key: redacted_table(inner) for key, inner in value.items()}
    return [redacted_table(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _user(match: re.Match[str]) -> str:
    first = re.match(r"[^/?#@]*@", match[0])  # an @ behind a placeholder belongs to the path
    if first is not None and _is_public(_secret(first[0])):
        return match[0]
    return f"{HIDDEN}@"


def _secret(user: str) -> str:
    name, colon, password = user.removesuffix("@").partition(":")
    return password if colon else name


def _is_public(secret: str) -> bool:
    """Return whether it consists of placeholders only, or is hidden already."""
    return not _PLACEHOLDER.sub("", secret).replace(HIDDEN, "")


def _parameter(match: re.Match[str]) -> str:
    return match[0] if _is_public(match[2]) else f"{match[1]}={HIDDEN}"


def _shard_query(match: re.Match[str]) -> str:
    return re.sub(r"(?!amp;)(?<![^&;])([^&;=]+=)?([^&;]+)", _hidden_value, match[0])


def _hidden_value(match: re.Match[str]) -> str:
    return match[0] if _is_public(match[2]) else f"{match[1] or ''}{HIDDEN}"


def placeholders(text: str) -> list[str]:
    """Return the names of the placeholders, ${NAME}, in a text."""
    return [match[1] for match in _PLACEHOLDER.finditer(text)]


def from_environment(url: str) -> str:
    """Return a URL with each ${NAME} replaced by that environment variable.

    Raises:
        KeyError: the variable is not set; its argument is the name.
    """
    return _PLACEHOLDER.sub(lambda match: os.environ[match[1]], url)


def printable(text: str) -> str:
    """Return the text with control characters escaped (ESC becomes \\x1b), so that a terminal ignores them."""
    return _CONTROL.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def one_line(text: str) -> str:
    """Return `printable` text with line breaks escaped too, so that a name or caption cannot fake a line of output."""
    return printable(text).replace("\n", "\\n")


def brief(error: object, longest: int = 500) -> str:
    """Return an exception or a text of another library as one line, without colours and control characters."""
    text = _COLOUR.sub("", str(error))
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= longest else f"{text[:longest]} …"


def csv_cell(value: Any) -> Any:
    """Return a cell of a CSV. Text that a spreadsheet would run as a formula gets an apostrophe; numbers stay."""
    if not isinstance(value, str) or not value.startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def markdown_cell(text: str) -> str:
    """Return text as a cell of a Markdown table: marks, links, HTML and pipes are escaped."""
    words = re.sub(r"&(?=[\w#]+;)", "&amp;", one_line(text)).replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\g<0>", words)
