"""Records that several threads read for the first time at once."""

import subprocess
import sys

import pytest

RACE = """
import importlib, os, sys, threading, msgspec
from lamsonq import arguments

module, _, name = sys.argv[1].rpartition(".")
kind = getattr(importlib.import_module(module), name) if module else None

inner = [msgspec.defstruct(f"Inner{n}", [("one", int, 0)]) for n in range(20)]
Argument = msgspec.defstruct("Argument", [(each.__name__, each) for each in inner])

def read():
    gate.wait()
    for _ in range(20):
        try:
            if kind is None:
                arguments._from_told({each.__name__: {} for each in inner}, Argument)
            else:
                msgspec.convert(dict.fromkeys(kind.__struct_fields__, "a"), kind)
        except msgspec.MsgspecError:
            pass

sys.setswitchinterval(1e-6)
for _ in range(40):  # each child is one in which nothing has been read yet
    child = os.fork()
    if not child:
        gate = threading.Barrier(16)
        threads = [threading.Thread(target=read) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os._exit(0)
    if status := os.waitpid(child, 0)[1]:
        sys.exit(f"it ended with {os.waitstatus_to_exitcode(status)}")
"""


@pytest.mark.parametrize(
    "kind",
    [
        "lamsonq.envelope._Session",
        "lamsonq.backends.maildir_names.Record",
        "lamsonq.backends.maildir_guards.Number",
        "lamsonq.backends.maildir_commit.Manifest",
        "lamsonq.backends.sqlite_outgoing._Record",
        "lamsonq.scanners._Scan",
        "a call's argument",
    ],
)
def test_threads_that_read_the_first_record_together_do_not_end_the_process(kind: str) -> None:
    kind = kind if kind.startswith("lamsonq.") else "argument"
    done = subprocess.run([sys.executable, "-c", RACE, kind], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
