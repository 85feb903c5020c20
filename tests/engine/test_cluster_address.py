"""What is said about the address of a cluster before and after Ray tries it."""

import socket
from collections.abc import Iterator

import pytest

from pipeline.core.errors import AtlasError
from pipeline.engine.cluster_address import check_address, host_and_port, refusal


@pytest.fixture
def listening() -> Iterator[str]:
    """The address of a port that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_the_address_of_a_dashboard_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """jobs/submit has RAY_ADDRESS set to one; Ray would only say that there is no cluster."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(AtlasError, match=r"RAY_ADDRESS=http://127\.0\.0\.1:8265 is the address of a dashboard.*unset"):
        check_address("auto")
    with pytest.raises(AtlasError, match=r"engine\.address=https://head:8265 is the address of a dashboard"):
        check_address("https://head:8265")


def test_only_an_answering_port_is_tried(listening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_address(listening)
    check_address(f"ray://{listening}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_address("auto")  # Ray looks for a cluster on this machine
    with pytest.raises(AtlasError, match=r"No Ray cluster at engine\.address=127\.0\.0\.1:1"):
        check_address("127.0.0.1:1")


def test_a_refusal_by_an_answering_port_names_the_token(listening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/.token")
    message = refusal(listening, ConnectionError("Failed to connect"))
    assert "Failed to connect" in message and "now: mode disabled, token /home/me/.token" in message
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert "secret" not in refusal(listening, ConnectionError("no"))
    # Nothing answers: the token is not the reason.
    assert "RAY_AUTH" not in refusal("127.0.0.1:1", ConnectionError("no"))
    assert "RAY_AUTH" not in refusal(None, ConnectionError("no"))


def test_only_the_port_of_a_head_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert host_and_port("auto") == "head:6379" and host_and_port("10.0.0.1:6390") == "10.0.0.1:6390"
    monkeypatch.delenv("RAY_ADDRESS")
    assert host_and_port("auto") is None and host_and_port("ray://head:10001") is None
