"""mlx-lm's server, checked before it is used."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import mlx_lm.models.cache
import mlx_lm.server
import pytest

from mlx_promptcache import host
from mlx_promptcache.errors import ServingError


def test_the_installed_server_is_as_it_is_relied_on() -> None:
    assert host.missing(mlx_lm.server) == []
    assert host.server() is mlx_lm.server


@pytest.mark.parametrize("name", [*host.NAMES, *host.PARAMETERS])
def test_a_server_that_lacks_a_name_is_refused_in_a_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home: Any = mlx_lm.models.cache if name.startswith("LRUPromptCache") else mlx_lm.server
    *path, last = name.split(".")
    for part in path:
        home = getattr(home, part)
    monkeypatch.delattr(home, last)
    with pytest.raises(ServingError, match=f"{name.split('.')[0]}.* use mlx-lm 0.31.3 to"):
        host.server()


def test_a_server_whose_functions_take_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mlx_lm.server, "_run_http_server", lambda host, port: None)
    with pytest.raises(ServingError, match="_run_http_server is not as it was"):
        host.server()


def test_a_server_that_cannot_be_imported_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["mlx_lm"], "server", None)
    monkeypatch.setitem(sys.modules, "mlx_lm.server", None)
    monkeypatch.delattr(sys.modules["mlx_lm"], "server")
    with pytest.raises(ServingError, match=r"mlx-lm .* cannot be imported"):
        host.server()


def test_nothing_is_missing_that_nobody_relies_on() -> None:
    assert host.missing(SimpleNamespace()) != []
