"""What a connection to Ray leaves behind."""

import os

import pytest

from pipeline.engine.connection import _restored_environment


def test_variables_for_a_private_instance_do_not_outlive_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would change the address that a later `ray start` of this process listens at, and its token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    before = dict(os.environ)
    with pytest.raises(KeyError), _restored_environment():
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
        raise KeyError
    assert dict(os.environ) == before
