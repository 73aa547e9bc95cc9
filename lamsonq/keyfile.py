"""The file of a private key: strangers on this machine must not be able to use it."""

from __future__ import annotations

import os
import stat

from lamsonq.errors import SettingsError


def refuse_shared(what: str, path: str, descriptor: int | None = None) -> None:
    """Raises SettingsError when others than its owner can read the key, or write it; a group of its own may read it.

    `what` begins the message; `descriptor` is the open file, where there is one. Raises OSError.
    """
    mode = os.stat(path if descriptor is None else descriptor).st_mode
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise SettingsError(
            f"{what}: others than its owner can use the key {path} (mode {stat.S_IMODE(mode):o}): chmod 600 it"
        )
