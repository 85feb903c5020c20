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
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if re.match(r"https?://", named):
        source = "RAY_ADDRESS" if address == "auto" else "engine.address"
        raise AtlasError(
            f"{source}={named} is the address of a dashboard, which only jobs/submit and `ray job` use: set "
            f"engine.address=HOST:PORT, as in `ray start --address`{', or unset RAY_ADDRESS' * (address == 'auto')}."
        )
    host, port = _split(named)
    if host:
        try:
            socket.create_connection((host, port), timeout=TIMEOUT).close()
        except OSError as error:
            raise AtlasError(f"No Ray cluster at engine.address={address}: {error}") from error


def refusal(address: str | None, error: Exception) -> str:
    """Return a message for a connection that Ray refused or gave up; if the port answers, it names the token."""
    message = f"No Ray cluster at engine.address={address}: {error}"
    if address is None:
        return message
    host, port = _split(os.environ.get("RAY_ADDRESS", "") if address == "auto" else address)
    try:
        if host:
            socket.create_connection((host, port), timeout=TIMEOUT).close()
    except OSError:
        return message
    return f"{message}\n{_token_hint()}"


def _split(address: str) -> tuple[str, int]:
    """Return host and port; an empty host if `address` has another form."""
    match = re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address)
    return (match[1], int(match[2])) if match else ("", 0)


def _token_hint() -> str:
    """Return what is set here for the authentication, and what to set."""
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    token = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else os.environ.get("RAY_AUTH_TOKEN_PATH", "not set")
    return (
        "If the cluster demands a token, RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH must have the values of its `ray start` "
        f"in the shell of this command (now: mode {mode}, token {token}): export RAY_AUTH_MODE=token "
        "RAY_AUTH_TOKEN_PATH=FILE, or RAY_AUTH_MODE=disabled for a cluster without."
    )
