"""A small cache, as one process sees it and as another would."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tlcli.cache.entry import Entry
from tlcli.cache.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "features")


@pytest.fixture
def entry(store: Store) -> Entry:
    from tests.cache.cached import spec

    return store.entry(spec())


@pytest.fixture
def reopen(store: Store) -> Callable[..., Entry]:
    """Return a function that opens the same cache as another process would."""
    from tests.cache.cached import spec

    return lambda **facts: Store(store.root).entry(spec(**facts))
