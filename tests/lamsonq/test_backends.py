"""The conformance suite, on every backend that is always there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lamsonq.conformance import BackendConformance
from tests.lamsonq.stores import MaildirStores, MemoryStores, SQLiteStores


class TestMemory(BackendConformance):
    @pytest.fixture
    def stores(self) -> MemoryStores:
        return MemoryStores()


class TestMaildir(BackendConformance):
    @pytest.fixture
    def stores(self, tmp_path: Path) -> Iterator[MaildirStores]:
        stores = MaildirStores(tmp_path)
        yield stores
        stores.close()


class TestSQLite(BackendConformance):
    @pytest.fixture
    def stores(self, tmp_path: Path) -> Iterator[SQLiteStores]:
        stores = SQLiteStores(tmp_path)
        yield stores
        stores.close()
