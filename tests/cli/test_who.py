"""Who answers a command: the order, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvl.cli.who import Who, find
from qvl.client import Client, local_server
from qvl.errors import ModelNotFound, Unavailable
from tests.client.misbehaving import misbehaving, reply
from tests.server.live import Live

NOBODY = "http://127.0.0.1:9"


def test_a_named_server_comes_first(server: Live) -> None:
    found = find(Who(server.url), NOBODY)
    assert isinstance(found.model, Client)
    assert (found.model.model, found.told) == ("parrot", f"parrot at {server.url}")
    with pytest.raises(Unavailable, match="no server answers"):
        find(Who(NOBODY), server.url)
    named = find(Who(server.url, "nightingale"), NOBODY)
    with pytest.raises(ModelNotFound):
        list(named.model.stream("Hi"))


def test_then_the_one_on_this_machine(server: Live) -> None:
    assert find(Who(), server.url).told == find(Who(None, "parrot"), server.url).told == f"parrot at {server.url}"


def test_else_the_model_is_loaded_here(server: Live, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = find(Who(None, str(checkpoint)), server.url)
    assert not isinstance(found.model, Client)
    assert found.told == f"{checkpoint} in process"
    assert f"loading {checkpoint} here" in capsys.readouterr().err
    find(Who(None, str(checkpoint)), NOBODY, quiet=True)
    assert capsys.readouterr().err == ""


def test_a_server_that_is_not_ready_does_not_count(server: Live) -> None:
    with misbehaving([reply("503 Service Unavailable")]) as starting:
        assert local_server(starting.url, None, None) is None
    assert local_server(NOBODY, None, None) is None
    assert local_server(server.url, "nightingale", None) is None
    client = local_server(server.url, None, None)
    assert client is not None and client.model == "parrot"
