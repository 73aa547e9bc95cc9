"""How many bounces are understood: the samples of flufl.bounce, whose tests say which recipients are in each.

    pip download --no-binary :all: --no-deps flufl.bounce==6.0.0 && tar xf flufl_bounce-6.0.0.tar.gz
    python tests/bench/bounces.py flufl_bounce-6.0.0 [-v] [folder of mails that are no bounces ...]

Addresses are compared in lower case. A reader that does not tell permanent from temporary counts as saying permanent.
"""

import ast
import email
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from flufl.bounce import all_failures

from lamsonq.bounce import detect
from lamsonq.bouncetext import named, notice
from lamsonq.dsn import read_report
from lamsonq.mail import MailRequest

Found = dict[str, bool | None]
"""Address -> is it for good."""


def expected_in(sdist: Path) -> dict[str, Found]:
    """What flufl.bounce's own test says: file -> recipients."""
    tree = ast.parse((sdist / "tests" / "test_detectors.py").read_text())
    tables = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "DETECTORS"]
    expected: dict[str, Found] = {}
    for _, name, addresses, temporary in cast(list[tuple[str, str, list[bytes], bool]], ast.literal_eval(tables[0])):
        recipients = {address.decode().lower(): not temporary for address in addresses}
        expected.setdefault(name, {}).update(recipients)
    return {name: recipients for name, recipients in expected.items() if recipients}


def report_alone(data: bytes) -> Found:
    report = read_report(MailRequest("", None, None, data).base)
    return {r.address: r.permanent for r in report.recipients if r.address and r.failed}


def flufl_alone(data: bytes) -> Found:
    temporary, permanent = all_failures(email.message_from_bytes(data))
    found = {**dict.fromkeys(temporary, False), **dict.fromkeys(permanent, True)}
    return {address.decode().lower(): hard for address, hard in found.items()}


def without_flufl(data: bytes) -> Found:
    message = MailRequest("", None, None, data)
    text = notice(message.base)
    return report_alone(data) or dict.fromkeys(named(message, text))


def ours(data: bytes) -> Found:
    return {r.address: r.permanent for r in detect(MailRequest("", None, None, data)).recipients if r.failed}


def is_bounce(data: bytes) -> bool:
    message = MailRequest("", None, None, data)
    if message.From == "" and "return-path" not in message:
        message = MailRequest("", "nobody@example.org", None, data)  # nobody recorded a sender: that is no null sender
    return message.is_bounce()


READERS: dict[str, Callable[[bytes], Found]] = {
    "RFC 3464 alone": report_alone,
    "flufl.bounce alone": flufl_alone,
    "lamsonq without flufl.bounce": without_flufl,
    "lamsonq": ours,
}


def main(sdist: Path, folders: list[Path], verbose: bool) -> None:
    expected = expected_in(sdist)
    samples = {path.name: path.read_bytes() for path in sorted((sdist / "tests" / "data").glob("*.txt"))}
    print(f"{len(samples)} samples; the recipients of {len(expected)} of them are known")
    for reader, read in READERS.items():
        began = time.perf_counter()
        found = {name: read(samples[name]) for name in expected}
        seconds = time.perf_counter() - began
        exact = [name for name in expected if set(found[name]) == set(expected[name])]
        some = [name for name in expected if set(found[name]) & set(expected[name])]
        wrong = [name for name in expected if set(found[name]) - set(expected[name])]
        agree = [name for name in exact if all((found[name][a] is True) == hard for a, hard in expected[name].items())]
        print(
            f"{reader:30} exactly {len(exact):3}, some {len(some):3}, others {len(wrong):3};"
            f" hard or soft as expected {len(agree):3} of {len(exact)}; {seconds * 1000 / len(expected):.1f} ms each"
        )
        if verbose:
            for name in sorted(set(expected) - set(agree)):
                print(f"    {name}: {found[name]} where {expected[name]} was expected")
    told = [name for name in expected if is_bounce(samples[name])]
    print(f"is_bounce() is true of {len(told)}; false of {sorted(set(expected) - set(told))}")
    others = {name: is_bounce(samples[name]) for name in samples if name not in expected}
    print(f"is_bounce() of the others: {others}")
    for folder in folders:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        taken = [path.name for path in paths if is_bounce(path.read_bytes())]
        print(f"{folder}: is_bounce() is true of {len(taken)} of {len(paths)} files: {taken}")


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "-v"]
    main(Path(arguments[0]), [Path(argument) for argument in arguments[1:]], "-v" in sys.argv)
