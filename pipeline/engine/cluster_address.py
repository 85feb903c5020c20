"""The address of a Ray cluster: checks before the connection, and an explanation of a refused one."""

import os
import re
import socket

from pipeline.core.errors import AtlasError

# Seconds to wait for an answer.
TIMEOUT = 10.0


def check_address(address: str) -> None:
    """Raise `AtlasError` within seconds if nothing listens at `address`: Ray tries for many minutes.

    Raises:
        AtlasError: If there is no answer, or if the address is that of a dashboard, which speaks HTTP.
    """
    named = _named(address)
    if re.match(r"https?://", named):
        source = "RAY_ADDRESS" if address == "auto" else "engine.address"
        raise AtlasError(
            f"{source}={named} is the address of a dashboard, which only jobs/submit and `ray job` use: set "
            f"engine.address=HOST:PORT, as in `ray start --address`{', or unset RAY_ADDRESS' * (address == 'auto')}."
        )
    try:
        _connect(named)
    except OSError as error:
        raise AtlasError(f"No Ray cluster at engine.address={address}: {error}") from error


def refusal(address: str | None, error: Exception) -> str:
    """Return a message for a connection that Ray refused or gave up; if the port answers, it names the token."""
    message = f"No Ray cluster at engine.address={address}: {error}"
    if address is None:
        return message
    try:
        _connect(_named(address))
    except OSError:
        return message
    return f"{message}\n{_token_hint()}"


def host_and_port(address: str) -> str | None:
    """Return HOST:PORT of a cluster's head; None for an address of another form, or none at all."""
    named = _named(address)
    return named if re.fullmatch(r"[^:/]+:\d+", named) else None


def _named(address: str) -> str:
    """Return the address that Ray would use; empty if Ray would look for a cluster on this machine."""
    return os.environ.get("RAY_ADDRESS", "") if address == "auto" else address


def _connect(named: str) -> None:
    """Connect to HOST:PORT and disconnect; do nothing for an address of another form.

    Raises:
        OSError: If nothing answers.
    """
    match = re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", named)
    if match:
        socket.create_connection((match[1], int(match[2])), timeout=TIMEOUT).close()


def _token_hint() -> str:
    """Return what is set here for the authentication, and what to set."""
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    token = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else os.environ.get("RAY_AUTH_TOKEN_PATH", "not set")
    return (
        "If the cluster demands a token, RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH must have the values of its `ray start` "
        f"in the shell of this command (now: mode {mode}, token {token}): export RAY_AUTH_MODE=token "
        "RAY_AUTH_TOKEN_PATH=FILE, or RAY_AUTH_MODE=disabled for a cluster without."
    )
