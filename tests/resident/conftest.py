"""One resident process for all tests of a module, in a cache of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.resident_place import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    # A path that no socket's address has room for: it is reached through the folder's descriptor.
    cache = tmp_path_factory.mktemp("cache") / ("long" * 40)
    found = Place(tmp_path_factory.mktemp("runs"), cache)
    yield found
    found.run("resident", "stop")
