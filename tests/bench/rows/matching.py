"""Finding the function for an address among 1, 10, 100 and 1,000 routes; and routing a message, built for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from ..contest import RATE, Contest, Entry, Measure, Sample, Scale, Target
from ..installed import python
from ..peers.lamsonq import ROOT

SIZES = (1, 10, 100, 1000)
MEASURES = [Measure(str(size), f"{size:,} routes, per second", ",.0f") for size in SIZES]
GROWTH = Measure("growth", "cost with 1,000 routes / with 10", ",.1f")
LAMSONQ, LOOP, SALMON = "lamsonq", "re.match in a loop", "Salmon"

COMMON = """
import itertools, json, re, sys, time

SECONDS = float(sys.argv[1])
BODY = b"From: a@example.org\\r\\nTo: b@example.org\\r\\nSubject: bench\\r\\n\\r\\n" + b"x" * 5000

def addresses(size):
    return [f"list{number * 7919 % size}-user{number}@example.com" for number in range(50_000)]

def rate(work, size):
    done, began = 0, time.perf_counter()
    for done, address in enumerate(itertools.cycle(addresses(size)), 1):
        work(address)
        if done % 50 == 0 and time.perf_counter() - began > SECONDS:
            return done / (time.perf_counter() - began)

handled = []

def handler(number):
    def START(message, who):
        handled.append(1)
    return START
"""
OURS = """
import pathlib, tempfile
from lamsonq.mail import MailRequest
from lamsonq.routing import RoutingBase

FUNCTION = '''
@route("list{number}-(who)@example[.]com", who="[a-z0-9]+")
@stateless
def START{number}(message, who):
    handled.append(1)
'''

def router_of(size):
    name = f"routes{size}"
    functions = "".join(FUNCTION.format(number=number) for number in range(size))
    with tempfile.TemporaryDirectory() as folder:
        head = "from __main__ import handled; from lamsonq.routing import route, stateless"
        pathlib.Path(folder, f"{name}.py").write_text(head + functions)
        sys.path.insert(0, folder)
        router = RoutingBase()
        router.load([name])
        sys.path.remove(folder)
    return router

def matcher(size):
    match = router_of(size).match
    def find(address):
        found = list(match(address))
        assert len(found) == 1
    return find

def router():
    deliver = router_of(100).deliver
    return lambda address: deliver(MailRequest("127.0.0.1", "a@example.org", address, BODY))
"""
THE_LOOP = """
def matcher(size):
    routes = [
        (re.compile(rf"list{number}-(?P<who>[a-z0-9]+)@example\\.com\\Z"), handler(number)) for number in range(size)
    ]
    def find(address):
        found = [(function, hit.groupdict()) for pattern, function in routes if (hit := pattern.match(address))]
        assert len(found) == 1
    return find
"""
THEIRS = """
from salmon.mail import MailRequest
from salmon.routing import Router, stateless

def router():
    for number in range(100):
        Router.register_route(f"^list{number}-(?P<who>[a-z0-9]+)@example\\\\.com$", stateless(handler(number)))
    return lambda address: Router.deliver(MailRequest("127.0.0.1", "a@example.org", address, BODY))
"""
MATCH = "print(json.dumps({str(size): rate(matcher(size), size) for size in (1, 10, 100, 1000)}))"
ROUTE = "found = rate(router(), 100); assert handled; print(json.dumps({'rate': found}))"


def contests(scale: Scale) -> Iterator[Contest]:
    seconds = scale.seconds / 2
    ours = partial(_run, sys.executable)
    yield Contest(
        "Matching an address",
        [
            Entry(LAMSONQ, "", partial(_match, OURS, seconds)),
            Entry(LOOP, "", partial(_match, THE_LOOP, seconds)),
        ],
        [
            *(
                Target(LAMSONQ, LOOP, measure, least=1 if size > 1 else None)
                for size, measure in zip(SIZES, MEASURES, strict=True)
            ),
            Target(LAMSONQ, None, GROWTH, most=10),
        ],
        measures=[*MEASURES, GROWTH],
        note="Every address is another one; the least cost of 1,000 routes would be 1, in a loop it is 100.",
    )
    missing = None if python() else "PyPI's packages cannot be installed"
    yield Contest(
        "Building a message and routing it among 100 routes, with an empty stateless function",
        [
            Entry(LAMSONQ, "", partial(ours, COMMON + OURS + ROUTE, seconds)),
            Entry(SALMON, "", partial(_run, python() or "", COMMON + THEIRS + ROUTE, seconds), missing),
        ],
        [Target(LAMSONQ, SALMON, RATE, least=2.5)],
        measures=[RATE],
    )


def _match(code: str, seconds: float) -> Sample:
    sample = _run(sys.executable, COMMON + code + MATCH, seconds)
    return sample | {"growth": sample["10"] / sample["1000"]}


def _run(interpreter: str, code: str, seconds: float) -> Sample:
    done = subprocess.run(
        [interpreter, "-c", code, str(seconds)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no word"])[-1])
    sample: Sample = json.loads(done.stdout)
    return sample
