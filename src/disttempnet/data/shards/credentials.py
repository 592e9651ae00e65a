"""Credentials in the URLs of shards: taken off before anything is named or kept, put back where one is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import quote, unquote

from disttempnet.errors import UserError
from disttempnet.sanitize import HIDDEN, from_environment, placeholders, redacted

KEPT = "%:@!$&'()*+,;=~"  # of a user and password from the environment; what would end them in a URL is quoted
SHORTEST = 4  # letters of a value that is looked for in the words of others; "1" is in too many of them
_URL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*://)(?:(?P<user>[^/?#]*)@)?(?P<rest>.*)", re.DOTALL)


class Credentials(NamedTuple):
    """As they were written: `user:password`, and the query of an HTTP URL; ${NAME} in them is not replaced yet."""

    user: str = ""
    query: str = ""

    def applied(self, url: str) -> str:
        """The URL to open, with its credentials, those of the environment included.

        Raises:
            UserError: the environment has no such variable, or they were taken out of a run's config.
        """
        scheme, rest = url.split("://", 1)
        if HIDDEN in (self.user, *re.split("[=&]", self.query)):
            raise UserError(
                f"{url}: its credentials are not kept in a run's files: give them again with data.train=…, best as "
                f"${{NAME}}, which takes them from the environment"
            )
        try:
            user = quote(from_environment(self.user), KEPT)
            query = from_environment(self.query)
        except KeyError as error:
            full = f"{scheme}://{self.user}{'@' if self.user else ''}{rest}{'?' if self.query else ''}{self.query}"
            raise UserError(f"{redacted(full)}: the environment has no variable {error.args[0]}") from None
        return f"{scheme}://{user}{'@' if user else ''}{rest}{'?' if query else ''}{query}"

    def hidden(self, text: str) -> str:
        """The words of others, who know the URL that was opened, without these credentials in any of their forms."""
        forms = {form for value in self._values() for form in (value, unquote(value))}
        forms |= {quote(form, safe) for form in forms for safe in ("", "/", KEPT)}
        for form in sorted(forms, key=len, reverse=True):
            text = text.replace(form, HIDDEN)
        return text

    def _values(self) -> Iterator[str]:
        """Whatever of them could be secret, as it was written and with the values of the environment."""
        parts = [self.user, *self.user.split(":", 1), self.query, *re.split("[&;]", self.query)]
        parts += [part.partition("=")[2] for part in re.split("[&;]", self.query)]
        values = [os.environ.get(name, "") for name in placeholders(f"{self.user} {self.query}")]
        for part in parts:
            try:
                values.append(from_environment(part))
            except KeyError:
                continue  # it was never opened
        return (value for value in values if len(value) >= SHORTEST)


def detached(url: str) -> tuple[str, Credentials]:
    """A URL without its credentials, and these.

    Raises:
        UserError: they hold what ends a user in a URL, or the rest holds a ${NAME}.
    """
    match = _URL.fullmatch(url)
    if match is None:
        return url, Credentials()
    scheme, user, rest = match["scheme"], match["user"] or "", match["rest"]
    if re.search(r"[\s\"'<>\\]", user) or (not user and _has_split_user(rest)):
        raise UserError(
            f"{scheme}***@{rest.rpartition('@')[2]}: a user or password in a URL is written with %2F for /, %20 for a "
            "blank and so on; or leave it to the environment, where fsspec finds it"
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
    """Whether user:password@ was cut at a "/" of the password; host:8000/ is none."""
    return re.match(r"[^/?#:@\[]*:(?!\d{1,5}(?:[/?#]|$))[^?#]*@", rest) is not None
