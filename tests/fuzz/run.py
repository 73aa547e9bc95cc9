"""Fuzz one target with atheris, which keeps what reaches new code: python tests/fuzz/run.py session 300

What it finds is in a file beside the corpus, and its end is 77 then: put the file into tests/fuzz/seeds, where the
plain tests replay it, and mend what is wrong. The corpus that it grows stays in the folder CORPUS, if that is set.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
from pathlib import Path

import atheris

SEEDS = Path(__file__).parent / "seeds"


def main(target: str, seconds: str) -> None:
    logging.disable(logging.CRITICAL)
    sys.path.insert(0, str(Path(__file__).parent))
    with atheris.instrument_imports(include=["lamsonq", "aiosmtpd"]):
        check = importlib.import_module(target).check
    corpus = Path(os.environ.get("CORPUS") or tempfile.mkdtemp(prefix="lamsonq-fuzz-")) / target
    corpus.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        f"-artifact_prefix={corpus.parent}/{target}-",
        "-timeout=10",
        "-rss_limit_mb=1024",
        "-max_len=4096",
        "-print_final_stats=1",
        "-error_exitcode=77",
        f"-dict={SEEDS.parent / (target + '.dict')}",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus), str(SEEDS / target)], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
