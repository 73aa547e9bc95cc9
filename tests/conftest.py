"""On how many processes the tests run."""

import pytest


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """The whole suite runs on all processors, a file to one of them, and what is named runs here: that is sooner done
    than others are started. The long tests run alone, because they measure time, and load the machine."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS or config.option.keyword
    plain = config.option.markexpr == "not slow"
    return 0 if named or not plain else None
