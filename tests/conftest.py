"""On how many processes the tests run, and what may be slow in them."""

import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("busy", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")  # a machine that others use too fails no property

AT_MOST = 4
"""A user may have 128 instances of inotify(7), and a process of the tests has a dozen of them at times."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole suite runs in a process more than there are processors, because much of it waits, and a file in one of
    them. What is named on the command line runs in this process: that has ended before others have started. So do the
    long tests, which measure time."""
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS and not config.option.keyword
    plain = config.option.markexpr == "not slow"
    return min(AT_MOST, 1 + len(os.sched_getaffinity(0))) if whole and plain else 0
