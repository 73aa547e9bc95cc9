"""The direction of the imports: a message walks the files in one direction, and so do the imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import lamsonq

PACKAGE = Path(lamsonq.__file__).parent
LAYERS = [
    "errors records space address headers mime plaintext statuscodes tally verdicts limits keyfile tls logins identity"
    " systemd clock schedule arguments names keys spf dmarc expressions",
    "jobs reports policy marks events",
    "envelope trace content mail bounce bouncetext dsn notification response lists verp suppression signing",
    "modules table settings state about logs",
    "wire threads sockets connection mx transaction pidfile signatures authentication",
    "backends attempt queue relay view deferred conformance databases",
    "routing outbound delivery confirm scanners spam html",
    "source session worker spool fsck survey",
    "commit",
    "smtp lmtp ingress handlers",
    "server",
    "child supervisor reload process testing metrics",
    "demo pytest_plugin commands __main__",
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports at its top."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def part_of(path: Path) -> str:
    """The file or folder of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def top(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def test_every_file_has_its_layer() -> None:
    files = {part_of(path) for path in PACKAGE.rglob("*.py")}
    assert files - {"lamsonq", "__init__", "__pycache__"} == set(LEVEL)


def test_imports_point_down() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path in PACKAGE.rglob("*.py")
        for module in imports(path)
        if module.startswith("lamsonq.") and top(module) in LEVEL
        if LEVEL[top(module)] > LEVEL[part_of(path)]
    ]
    assert wrong == []


def test_the_package_never_imports_the_project() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not [m for m in imports(path) if m.split(".")[0] in ("app", "config")], path
