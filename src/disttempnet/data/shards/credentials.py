"""Credentials in URLs of shards: removed before anything is named or stored, inserted when a URL is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import quote, unquote

from disttempnet.errors import UserError
from disttempnet.sanitize import HIDDEN, from_environment, placeholders, redacted

KEPT = "%:@!$&'()*+,;=~"  # characters of user and password from the environment that are not quoted
SHORTEST = 4  # length of a value that is replaced in foreign messages; "1" is in too many of them
_URL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*://)(?:(?P<user>[^/?#]*)@)?(?P<rest>.*)", re.DOTALL)


class Credentials(NamedTuple):
    """Credentials as written: `user:password`, and the query of an HTTP URL; ${NAME} is not replaced yet."""

    user: str = ""
    query: str = ""

    def applied(self, url: str) -> str:
        """Return the URL to open, with credentials, including those from the environment.

        Raises:
            UserError: the environment variable does not exist, or the credentials were removed from a run's config.
        """
        scheme, rest = url.split("://", 1)
        if HIDDEN in (self.user, *re.split("[=&]", self.query)):
            raise UserError(
                f"{url}: its credentials are not stored in a run's files: give them again with data.train=…, best as "
                f"${{NAME}}, which reads them from the environment"
            )
        try:
            user = quote(from_environment(self.user), KEPT)
            query = from_environment(self.query)
        except KeyError as error:
            full = f"{scheme}://{self.user}{'@' if self.user else ''}{rest}{'?' if self.query else ''}{self.query}"
            raise UserError(f"{redacted(full)}: the environment has no variable {error.args[0]}") from None
        return f"{scheme}://{user}{'@' if user else ''}{rest}{'?' if query else ''}{query}"

    def hidden(self, text: str) -> str:
        """Remove these credentials, in all their quoted forms, from a foreign message about the opened URL."""
        forms = {form for value in self._values() for form in (value, unquote(value))}
        forms |= {quote(form, safe) for form in forms for safe in ("", "/", KEPT)}
        for form in sorted(forms, key=len, reverse=True):
            text = text.replace(form, HIDDEN)
        return text

    def _values(self) -> Iterator[str]:
        """Yield all parts that could be secret, as written and with values of the environment."""
        parts = [self.user, *self.user.split(":", 1), self.query, *re.split("[&;]", self.query)]
        parts += [part.partition("=")[2] for part in re.split("[&;]", self.query)]
        values = [os.environ.get(name, "") for name in placeholders(f"{self.user} {self.query}")]
        for part in parts:
            try:
                values.append(from_environment(part))
            except KeyError:
                continue  # the URL was never opened
        return (value for value in values if len(value) >= SHORTEST)


def detached(url: str) -> tuple[str, Credentials]:
    """Return a URL without its credentials, and the credentials.

    Raises:
        UserError: they have characters that a URL does not allow in them, or the rest has a ${NAME}.
    """
    match = _URL.fullmatch(url)
    if match is None:
        return url, Credentials()
    scheme, user, rest = match["scheme"], match["user"] or "", match["rest"]
    if re.search(r"[\s\"'<>\\]", user) or (not user and _has_split_user(rest)):
        raise UserError(
            f"{scheme}***@{rest.rpartition('@')[2]}: a user or password in a URL is written with %2F for /, %20 for a "
            "blank and so on; or leave them to the environment, where fsspec finds them"
        )
    query = ""
    if scheme in ("http://", "https://"):
        rest, _, query = rest.partition("?")
    if names := placeholders(rest):
        raise UserError(
            f"{scheme}{rest}: ${{{names[0]}}} is replaced in the credentials of a URL only, before its @ and, over "
            "HTTP, after its ?: write host and path out"
        )
    return scheme + rest, Credentials(user, query)


def _has_split_user(rest: str) -> bool:
    """Tell whether user:password@ was cut at a "/" of the password; host:8000/ was not."""
    return re.match(r"[^/?#:@\[]*:(?!\d{1,5}(?:[/?#]|$))[^?#]*@", rest) is not None
