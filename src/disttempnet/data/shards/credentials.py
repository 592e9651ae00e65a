"""Credentials in the URLs of shards: taken off before anything is named or kept, put back where one is opened."""

from __future__ import annotations

import re
from typing import NamedTuple

from disttempnet.errors import UserError
from disttempnet.sanitize import HIDDEN, from_environment, redacted

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
        user, query = f"{self.user}@" if self.user else "", f"?{self.query}" if self.query else ""
        full = f"{scheme}://{user}{rest}{query}"
        if HIDDEN in (self.user, *re.split("[=&]", self.query)):
            raise UserError(
                f"{url}: its credentials are not kept in a run's files: give them again with data.train=…, best as "
                f"${{NAME}}, which takes them from the environment"
            )
        try:
            return from_environment(full)
        except KeyError as error:
            raise UserError(f"{redacted(full)}: the environment has no variable {error.args[0]}") from None


def detached(url: str) -> tuple[str, Credentials]:
    """A URL without its credentials, and these."""
    match = _URL.fullmatch(url)
    if match is None:
        return url, Credentials()
    scheme, user, rest = match["scheme"], match["user"] or "", match["rest"]
    query = ""
    if scheme in ("http://", "https://"):
        rest, _, query = rest.partition("?")
    return scheme + rest, Credentials(user, query)
