"""What every test session needs."""

from __future__ import annotations

import os
import tempfile

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Measure into a folder of this session's own, never into the user's cache.

    Set before pytest-xdist starts its workers, which inherit it, as do programs that tests start.
    """
    if "QGRAPH_CACHE" in os.environ:
        return
    folder = tempfile.TemporaryDirectory(prefix="qgraph-test-cache-")
    os.environ["QGRAPH_CACHE"] = folder.name
    config.add_cleanup(folder.cleanup)
    config.add_cleanup(lambda: os.unsetenv("QGRAPH_CACHE"))
