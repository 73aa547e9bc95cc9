"""What the program is, and where it runs: two files, and no value in both.

`config/settings.py` says what the program *is*: its handlers, route defaults and queues. `config/settings.toml` says
where it *runs*: hosts, ports, paths, credentials. Rules:

1. A table is checked against a record with types. A key that the record does not have, or a value of another type,
   ends the boot with one line: which file, which key, what was wanted, what was found.
2. The environment wins over the file: `LAMSONQ_RECEIVER__PORT=8823` is `port` of `[receiver]`. A list is written with
   commas.
3. A credential may be in a file of its own: `password_file` instead of `password`.
4. A boot is a module (`config.boot`) that fills `settings.receiver` and loads the router. What it raises becomes one
   line with file and line.
"""

from __future__ import annotations

import importlib
import ipaddress
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from ssl import SSLContext, SSLError, create_default_context
from types import ModuleType
from typing import Annotated, Any, Literal, TypedDict, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import tomli

from lamsonq.address import is_domain
from lamsonq.errors import Refusal, SettingsError, UsageError, reason_of
from lamsonq.limits import Limits
from lamsonq.logins import Logins
from lamsonq.modules import load
from lamsonq.signing import DKIM
from lamsonq.space import MIN_FREE
from lamsonq.tls import TLS

PREFIX = "LAMSONQ_"

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Bytes = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
SecondsOrNone = Annotated[float, msgspec.Meta(ge=0)]
File = Annotated[str, msgspec.Meta(min_length=1, description="the path of a file")]
"""A description is what a value that does not fit is told."""


class _Unfit(ValueError):
    """A value that does not fit to the others of its table: which, what was wanted and what was found."""


class QueueConfig(TypedDict):
    """What `config/queue.py` gives its QueueReceiver: the queue, and how often it says that it is idle (seconds)."""

    queue: str
    sleep: int


class ReceiverConfig(TypedDict):
    """The arguments of SMTPReceiver and LMTPReceiver; times in seconds, sizes in octets."""

    host: str
    port: int
    socket: str | None
    workers: int
    timeout: float
    size_limit: int
    min_free: int
    tls: TLS | None
    logins: Logins | None
    login_required: bool
    hosts: list[str] | None
    limits: Limits
    trusted: list[str]
    proxies: list[str]
    refuse_bare: bool
    verify: bool
    authserv_id: str | None


class RelayConfig(TypedDict):
    """The arguments of Relay; `timeout` in seconds."""

    host: str
    port: int
    username: str | None
    password: str | None
    ssl: bool | SSLContext
    starttls: bool | SSLContext
    lmtp: bool
    clear_login: bool
    timeout: float
    sign: list[DKIM]


class ReceiverTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`[receiver]`: where mail comes in. With `socket`, the path of a unix socket, there instead of at host and port.

    `workers` are threads, `timeout` is for one call of a handler; below `min_free` bytes of free disk mail is put off.
    With `certificate_file` (and `key_file`, if the key stands apart) TLS is spoken: `tls` is "offered", "required" or
    "implicit". With `logins_file` one may log in, with `login_required` one has to. `hosts` are the domains that
    strangers may send to, on top of what the routes say. `proxies` and `trusted` are lists of networks: who speaks the
    PROXY protocol, and who has no limits. `refuse_bare` refuses a message with a bare CR or LF, or with a NUL. `verify`
    looks at SPF, DKIM, DMARC and ARC, in the name of `authserv_id`.
    """

    host: str = "127.0.0.1"
    port: Port = 8823
    socket: str | None = None
    workers: Count = 10
    timeout: Seconds = 300.0
    size_limit: Bytes = 32 * 1024 * 1024
    min_free: Bytes = MIN_FREE
    certificate_file: File | None = None
    key_file: File | None = None
    tls: Literal["offered", "required", "implicit"] | None = None
    logins_file: File | None = None
    login_required: bool = False
    hosts: list[str] | None = None
    proxies: list[str] = msgspec.field(default_factory=list)
    trusted: list[str] = msgspec.field(default_factory=list)
    refuse_bare: bool = False
    verify: bool = False
    authserv_id: str | None = None
    limits: LimitsTable = msgspec.field(default_factory=lambda: LimitsTable())

    def __post_init__(self) -> None:
        for name in ("tls", "key_file"):
            if getattr(self, name) is not None and self.certificate_file is None:
                raise _Unfit(name, "receiver.certificate_file, too (in PEM)", "none")
        for name in ("proxies", "trusted"):
            for text in getattr(self, name):
                _check_network(name, text)
        for host in self.hosts or ():
            if not is_domain(host):
                raise _Unfit("hosts", "domains, as example.org", f"the str {json.dumps(host)}")

    def config(self) -> ReceiverConfig:
        """Raises SettingsError when a certificate or the logins cannot be used."""
        return ReceiverConfig(
            host=self.host,
            port=self.port,
            socket=self.socket,
            workers=self.workers,
            timeout=self.timeout,
            size_limit=self.size_limit,
            min_free=self.min_free,
            tls=self._certificate(),
            logins=None if self.logins_file is None else Logins(self.logins_file),
            login_required=self.login_required,
            hosts=self.hosts,
            limits=self.limits.limits(),
            trusted=self.trusted,
            proxies=self.proxies,
            refuse_bare=self.refuse_bare,
            verify=self.verify,
            authserv_id=self.authserv_id,
        )

    def _certificate(self) -> TLS | None:
        if self.certificate_file is None:
            return None
        return TLS(
            self.certificate_file,
            self.key_file,
            required=self.tls == "required",
            implicit=self.tls == "implicit",
        )


class LimitsTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`[receiver.limits]`: what `limits.Limits` has, and says."""

    connections: Bytes | None = None
    connections_per_address: Bytes | None = None
    connections_per_minute: Bytes | None = None
    messages_per_minute: Bytes | None = None
    recipients_per_minute: Bytes | None = None
    messages_per_connection: Bytes | None = None
    recipients: Bytes | None = None
    memory: Bytes | None = None
    command_timeout: SecondsOrNone | None = None
    data_timeout: SecondsOrNone | None = None
    bad_commands: Bytes | None = None

    def limits(self) -> Limits:
        return Limits(**{name: value for name, value in msgspec.structs.asdict(self).items() if value is not None})


def _check_network(name: str, text: str) -> None:
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        raise _Unfit(name, "networks, as 10.0.0.0/8", f"the str {json.dumps(text)}: {error}") from error


class DKIMTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`[relay.dkim]`, or several `[[relay.dkim]]`: a key that signs what leaves (see lamsonq.signing)."""

    domain: str
    selector: str
    key_file: File


class RelayTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`[relay]`: the server that takes what we send; an empty `host`: the mail servers of each recipient's domain.

    `ca_file` holds the certificates (PEM) of the authorities that `ssl` or `starttls` trusts, instead of the system's.
    """

    host: str = "127.0.0.1"
    port: Port = 25
    username: str | None = None
    password: str | None = None
    password_file: File | None = None
    ssl: bool = False
    starttls: bool = False
    ca_file: File | None = None
    lmtp: bool = False
    clear_login: bool = False
    timeout: Seconds = 30.0
    dkim: list[DKIMTable] = msgspec.field(default_factory=list)

    def config(self) -> RelayConfig:
        """Raises SettingsError when `password_file`, `ca_file` or a key cannot be used."""
        trusting = self._private_authority()
        return RelayConfig(
            host=self.host,
            port=self.port,
            username=self.username,
            password=_secret("relay.password", self.password, self.password_file),
            ssl=self.ssl and (trusting or True),
            starttls=self.starttls and (trusting or True),
            lmtp=self.lmtp,
            clear_login=self.clear_login,
            timeout=self.timeout,
            sign=[DKIM(key.domain, key.selector, key.key_file) for key in self.dkim],
        )

    def _private_authority(self) -> SSLContext | None:
        if self.ca_file is None:
            return None
        if not (self.ssl or self.starttls):
            raise SettingsError("relay.ca_file is given, and nothing is encrypted: starttls = true, or ssl = true")
        try:
            return create_default_context(cafile=self.ca_file)
        except OSError as error:  # SSLError is one
            why = error.strerror if error.filename or not isinstance(error, SSLError) else "it holds no certificate"
            raise SettingsError(f"relay.ca_file: cannot use {self.ca_file}: {why}") from error


class DatabaseTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`[database]`: where the application keeps its own data."""

    path: str = "run/app.db"


class Machine(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`config/settings.toml`, whole. `[app]` is for what your own handlers need: nothing in it is checked."""

    hosts: list[str] = msgspec.field(default_factory=lambda: ["localhost"])
    receiver: ReceiverTable = msgspec.field(default_factory=ReceiverTable)
    relay: RelayTable = msgspec.field(default_factory=RelayTable)
    database: DatabaseTable = msgspec.field(default_factory=DatabaseTable)
    app: dict[str, Any] = msgspec.field(default_factory=dict)

    def host_pattern(self) -> str:
        """The expression that matches exactly these hosts: what `(host)` of a route stands for."""
        return "|".join(re.escape(host) for host in self.hosts)


def machine(path: str = "config/settings.toml", environ: Mapping[str, str] | None = None) -> Machine:
    """Read where this program runs. Raises SettingsError with the one line that says what is wrong."""
    table = _read_toml(path)
    origins = _override(table, os.environ if environ is None else environ)
    return _Check(path, origins).record(Machine, table, ())


def _read_toml(path: str) -> dict[str, Any]:
    try:
        return tomli.loads(Path(path).read_text("utf-8"))
    except tomli.TOMLDecodeError as error:
        raise SettingsError(f"{path}: this is not TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: TOML is UTF-8, found the byte 0x{error.object[error.start]:02x}") from error
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error


def _override(table: dict[str, Any], environ: Mapping[str, str]) -> dict[tuple[str, ...], str]:
    """Put the environment's values into the table; tells which variable each of them came from."""
    origins = {}
    for name in sorted(environ):
        keys = tuple(name.removeprefix(PREFIX).lower().split("__"))
        if name.startswith(PREFIX) and len(keys) == 1:
            _refuse_single_underscore(name, keys[0])
        # Without "__" only a setting of the first level is meant: other programs' names begin with LAMSONQ_ too.
        if not name.startswith(PREFIX) or (len(keys) == 1 and keys[0] not in Machine.__struct_fields__):
            continue
        place = table
        for key in keys[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise SettingsError(f"{name}: {key} is no table that could hold {keys[-1]}")
        place[keys[-1]] = environ[name]
        origins[keys] = name
    return origins


def _refuse_single_underscore(name: str, key: str) -> None:
    """`LAMSONQ_RECEIVER_PORT` is a slip that would otherwise change nothing."""
    table, _, rest = key.partition("_")
    if rest and key not in Machine.__struct_fields__ and table in Machine.__struct_fields__:
        raise SettingsError(f"{name} is no setting: did you mean {PREFIX}{table.upper()}__{rest.upper()}?")


R = TypeVar("R", bound=msgspec.Struct)


class _Check:
    """Turns tables into records; keeps the name of the file, and which values came from the environment."""

    def __init__(self, path: str, origins: Mapping[tuple[str, ...], str]) -> None:
        self.path = path
        self.origins = origins

    def record(self, kind: type[R], table: object, keys: tuple[str, ...]) -> R:
        if not isinstance(table, dict):
            raise self.wrong(keys, "a table", table)
        kinds = get_type_hints(kind, include_extras=True)
        values = {}
        for key, value in table.items():
            if key not in kinds:
                raise self.unknown((*keys, key), kinds)
            values[key] = self.value(kinds[key], value, (*keys, key))
        try:
            return kind(**values)
        except TypeError:
            missing = next(f.name for f in msgspec.structs.fields(kind) if f.required and f.name not in values)
            raise SettingsError(f"{self.origin(keys)}: {'.'.join(keys)}: {missing} is missing") from None
        except _Unfit as unfit:
            key, wanted, found = unfit.args
            place = (*keys, key)
            raise SettingsError(f"{self.origin(place)}: {'.'.join(place)}: expected {wanted}, found {found}") from None

    def value(self, kind: Any, value: object, keys: tuple[str, ...]) -> object:
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return self.record(kind, value, keys)
        record = next(iter(get_args(kind)), None)
        if isinstance(record, type) and issubclass(record, msgspec.Struct):  # a list of tables, or one table
            tables = value if isinstance(value, list) else [value]
            return [self.record(record, table, (*keys, str(number))) for number, table in enumerate(tables)]
        from_environment = keys in self.origins
        kinds = (kind, *get_args(kind))
        if from_environment and any(get_origin(one) is list for one in kinds):
            value = [item.strip() for item in str(value).split(",") if item.strip()]
        try:
            return msgspec.convert(value, kind, strict=not from_environment)
        except msgspec.ValidationError as error:
            choice = next((get_args(one) for one in kinds if get_origin(one) is Literal), ())
            # msgspec says of a word that is none of these only that it is none.
            wanted = f"one of {', '.join(json.dumps(word) for word in choice)}" if choice else _description(kinds)
            wanted = wanted or _wanted(str(error))
            raise self.wrong(keys, wanted, value) from error

    def wrong(self, keys: tuple[str, ...], wanted: str, found: object) -> SettingsError:
        # A credential is never shown, not even a broken one.
        shown = "" if "password" in keys[-1] else f" {json.dumps(found, default=str)}"
        return SettingsError(
            f"{self.origin(keys)}: {'.'.join(keys)}: expected {wanted}, found the {type(found).__name__}{shown}"
        )

    def unknown(self, keys: tuple[str, ...], known: Mapping[str, object]) -> SettingsError:
        import difflib  # when it is used: a boot is only slowed down by it

        near = difflib.get_close_matches(keys[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return SettingsError(f"{self.origin(keys)}: {'.'.join(keys)}: there is no such setting; {hint}")

    def origin(self, keys: tuple[str, ...]) -> str:
        for place, name in self.origins.items():
            if place[: len(keys)] == keys:
                return name
        return self.path


def _description(kinds: Iterable[Any]) -> str:
    metas = (meta for kind in kinds for meta in getattr(kind, "__metadata__", ()))
    return next((meta.description for meta in metas if meta.description), "")


def _wanted(complaint: str) -> str:
    """'an int', out of msgspec's 'Expected `int`, got `str` - at `$`'."""
    kind = complaint.split(", got")[0].split(" - at")[0].removeprefix("Expected ").replace("`", "")
    kind = kind.replace("array", "list").replace("object", "table").replace(" | null", "")
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _secret(key: str, value: str | None, path: str | None) -> str | None:
    """The credential itself, or the first line of the file that holds it."""
    if path is None:
        return value
    if value is not None:
        raise SettingsError(f"{key} and {key}_file are both given: keep one")
    try:
        return Path(path).read_text("utf-8").split("\n")[0].rstrip("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{key}_file: cannot read {path}: {reason_of(error)}") from error


def load_logging(path: str = "config/logging.toml") -> None:
    """Configure logging from a file in the format of `logging.config.dictConfig`; makes the log files' directories.

    Loggers that exist already go on, unless the file says `disable_existing_loggers = true`.

    Raises SettingsError.
    """
    from logging.config import dictConfig  # when it is used: it brings the network's handlers and pickle

    table = _read_toml(path)
    table.setdefault("disable_existing_loggers", False)  # dictConfig would silence everything imported before
    handlers = table.get("handlers", {})
    try:
        for handler in handlers.values():
            if "filename" in handler:
                os.makedirs(os.path.dirname(handler["filename"]) or ".", exist_ok=True)
        dictConfig(table)
    except OSError as error:
        raise Refusal(f"{path}: cannot write the log file {error.filename}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        cause = error.__cause__
        if isinstance(cause, OSError):
            raise Refusal(f"{path}: cannot write the log file {cause.filename}: {cause.strerror}") from error
        raise SettingsError(f"{path}: {error}{f': {cause}' if cause else ''}") from error


def boot(module: str = "config.boot") -> ModuleType:
    """Import a boot module and return the settings that it filled: its own `settings`, at any depth of packages.

    Raises SettingsError for settings, UsageError for whatever else goes wrong while modules are imported, and any
    other Refusal as it is.
    """
    use_project()
    settings = getattr(load(module), "settings", None)
    if not isinstance(settings, ModuleType):
        raise UsageError(f"{module} is no boot: it imports no module named settings")
    _hand_over(settings)
    _booted[:] = [settings]
    return settings


_booted: list[ModuleType] = []


def booted() -> Any:
    """The settings module of the boot that this process runs. Raises UsageError before there is one."""
    if not _booted:
        raise UsageError("no boot module has been run in this process: settings.boot('config.boot') does that")
    return _booted[0]


def use_project() -> None:
    """Let the modules of the project in the current directory be imported, before all others."""
    here = os.getcwd()
    if sys.path[:1] != [here]:
        sys.path.insert(0, here)
        importlib.invalidate_caches()


def _hand_over(settings: ModuleType) -> None:
    """Tell those who need it what the settings module says."""
    _hand_over_queue_handlers(settings)
    names: object = getattr(settings, "request_types", None)
    if names is None:
        return
    if not isinstance(names, dict) or not all(
        isinstance(word, str) and word for pair in names.items() for word in pair
    ):
        raise SettingsError(
            f"{settings.__name__}.request_types: expected a table of names such as"
            f' {{"send_email": "app.jobs.send_email"}}, found {names!r}'
        )
    for dotted in names.values():
        if "." not in dotted:
            raise SettingsError(f"{settings.__name__}.request_types: {dotted!r} names no module: app.jobs.{dotted}")
    from lamsonq.deferred import request_types  # deferred stands above this file; most projects never need it

    request_types(names)


def _hand_over_queue_handlers(settings: ModuleType) -> None:
    """Tell the router which functions belong to the queue's process, unless this is that process."""
    config: QueueConfig | None = getattr(settings, "queue_config", None)
    handlers: list[str] | None = getattr(settings, "queue_handlers", None)
    if config is None or handlers is None:
        return
    own = getattr(getattr(settings, "receiver", None), "queue", None)
    if own is not None and os.path.abspath(str(own.dir)) == os.path.abspath(config["queue"]):
        return
    from lamsonq.routing import Router  # routing stands above this file; a project without queues never needs it

    Router.hand_over(handlers, config["queue"])
