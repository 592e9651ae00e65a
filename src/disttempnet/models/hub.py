"""The Hugging Face Hub: whether it can be reached, asked once, so that a machine without a network does not wait."""

from __future__ import annotations

import functools
import socket
import urllib.request
from urllib.parse import urlsplit

from huggingface_hub import constants

from disttempnet.sanitize import brief

HUB_SECONDS = 5.0


def hub_fault() -> str:
    """Return why the hub cannot be reached, in words; empty if it can, or if that is not known.

    Its client tries every file five times, which takes minutes without a network. So its host is connected to first.
    Where that fails, the client reads its cache alone from then on.
    """
    if constants.HF_HUB_OFFLINE:
        return _found_offline() or "HF_HUB_OFFLINE is set, so that the hub is not asked"
    if why := _unreachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
        _OFFLINE.append(why)
    return why


_OFFLINE: list[str] = []  # why this process turned the client's network off


def _found_offline() -> str:
    return _OFFLINE[0] if _OFFLINE else ""


@functools.cache
def _unreachable(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    if not host or urllib.request.getproxies():  # a proxy may know the host
        return ""
    try:
        socket.create_connection((host, port), timeout=HUB_SECONDS).close()
    except OSError as error:
        return f"{host} cannot be reached ({brief(error)})"
    return ""
