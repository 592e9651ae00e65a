"""Without a network the hub is asked once, in seconds, and the message says so."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from disttempnet.errors import UserError
from disttempnet.models import hub, load_model


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    """The client's network is on; a host that no name server has stands for the hub. Yields the connections."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(hub, "_OFFLINE", [])
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    asked: list[tuple] = []

    def refuse(address: tuple, timeout: float) -> socket.socket:
        asked.append(address)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    hub._unreachable.cache_clear()
    yield asked
    hub._unreachable.cache_clear()


@pytest.mark.parametrize(
    ("name", "pretrained"), [("ViT-B-32", "laion2b_s34b_b79k"), ("hf-hub:nobody/nothing-of-this-name", "")]
)
def test_missing_weights_are_said_within_seconds(name: str, pretrained: str, online: list[tuple]) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"hub\.invalid cannot be reached .*Name or service not known") as caught:
        load_model(name, pretrained)
    assert time.monotonic() - begun < 20
    assert "cache" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"hub\.invalid cannot be reached"):
        load_model(name, pretrained)
    assert online == [("hub.invalid", 443)], "asked once"


def test_a_proxy_is_not_bypassed(online: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    assert hub.hub_fault() == ""
    assert not constants.HF_HUB_OFFLINE
    assert online == []


def test_the_users_own_setting_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_OFFLINE", [])
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        load_model("ViT-B-32", "laion2b_s34b_b79k")
