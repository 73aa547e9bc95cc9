"""start, stop, restart, status and log: what runs servers.

Rules:

1. A server can be started afresh by its command line alone: a reload runs the same words again, as a trial, and then
   in the server's own place (lamsonq/reload.py). A process of a reload is already where its options ask it to be.
2. What cannot start is refused before anything is written, and by `restart` before anything is stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from lamsonq.commands.options import declare, group, json_option, option, switch
from lamsonq.errors import PidFileError, Refusal, UsageError

if TYPE_CHECKING:
    from lamsonq.queue import Queue
    from lamsonq.server import Receiver

F = TypeVar("F", bound=Callable[..., Any])

BOOT = "config.boot"
LOG = "log"
"""What `lamsonq status` calls the server of `lamsonq log`, which has no boot."""

GRACE = 30
GRACE_RANGE = click.IntRange(0, 86_400)
RUN = "run"
SMTP_PID = "run/smtp.pid"
LOG_PID = "run/log.pid"
SETTINGS = "config/settings.toml"
LOG_FORMAT = "%(asctime)s [%(process)d] %(levelname)s:%(name)s:%(message)s"


def daemon_options(pid: str) -> Callable[[F], F]:
    """What every command has that starts a server: where, and as whom, it runs."""
    return group(
        option("pid", "The pid file, which is locked while the server runs.", default=pid, metavar="FILE"),
        option("chroot", "Make this the root directory; other paths are inside of it.", metavar="DIR"),
        option("chdir", "Change to this directory first.", default=".", metavar="DIR"),
        option("uid", "Be this user; only the port is taken as root.", metavar="NAME|N"),
        option("gid", "Be in this group; without it in that of the user.", metavar="NAME|N"),
        option("umask", "What nobody is allowed on new files; octal.", default="027", metavar="MODE"),
        switch("debug", "Stay in the foreground, with the log on stderr."),
        click.option("--daemon/--no-daemon", "daemon", default=True, help="Run in the background, or stay here."),
    )


force_option = switch("FORCE", "As in Lamson, but not needed: a pid file that nobody holds is taken over.", "-f")


@declare()
@option("boot", "The boot module.", default=BOOT, metavar="MODULE")
@option("workers", "How many processes.", type=click.IntRange(1, 1000), default=1, metavar="N")
@option(
    "grace",
    "Seconds to finish what has begun, at TERM and at HUP; what takes longer is cut.",
    type=GRACE_RANGE,
    default=GRACE,
    metavar="SECONDS",
)
@daemon_options(SMTP_PID)
@force_option
def start(boot: str, workers: int, grace: int, **options: Any) -> None:
    """Start a server: run the receiver of a boot module.

    Returns when it listens, or with the reason why it does not. TERM ends it, HUP loads the boot anew, USR1 opens its
    output files anew.
    """

    def receiver() -> Receiver:
        from lamsonq import settings

        found = _receiver_of(settings.boot(boot), boot)
        _check_states(found, workers)
        _check_queues(found, workers)
        return found

    _serve(boot, receiver, lambda: _check_project(boot), workers, grace, **options)


def _check_project(boot: str) -> None:
    """Refuse to start, before anything is written, where the boot cannot be."""
    from importlib.util import find_spec

    package = boot.split(".")[0]
    here = os.path.isdir(package) or os.path.isfile(f"{package}.py")
    # A boot may be installed, but "config" never is: a stray one on the path would be another project's.
    if not here and (package == "config" or find_spec(package) is None):
        raise UsageError(f"there is no {boot} in {os.getcwd()}: start a server in a project (lamsonq gen makes one)")


@declare()
@option("boot", f"The boot module; without it the one that runs, {BOOT} when none does.", metavar="MODULE")
@option("workers", "How many processes; without it as many as run.", type=click.IntRange(1, 1000), metavar="N")
@option("grace", "As of start; without it that of what runs.", type=GRACE_RANGE, metavar="SECONDS")
@daemon_options(SMTP_PID)
@switch("KILL", "End the old one at once, whatever it does.")
@click.pass_context
def restart(ctx: click.Context, /, pid: str, chroot: str | None, chdir: str, kill: bool, **_options: Any) -> None:
    """Stop a server, and start it with these options.

    One that does not run is only started. What cannot be booted is said before anything is stopped.
    """
    from lamsonq import identity, process, reload, survey

    inside = os.path.normpath(os.path.join(os.path.expanduser(chdir), pid))
    pid_file = identity.seen_from_outside(chroot, inside)
    server = survey.server(pid_file)
    words = _words_of_start(ctx)
    if server["running"]:
        words += _words_that_stay(pid_file, server["pid"], ctx.params)
    command = reload.Command.here(words)
    reload.rehearse(command)
    if server["running"]:
        troubles = process.stop([pid_file], kill, click.echo, lambda line: click.echo(line, err=True))
        if troubles:
            raise troubles[0]
    else:
        click.echo("lamsonq not running: it is only started.")
    reload.start_instead(command)


def _words_that_stay(pid_file: str, pid: int, given: dict[str, Any]) -> list[str]:
    """What is not given of what the server is, as it runs. Raises Refusal where that is not known."""
    from lamsonq import tally

    started = tally.started(pid_file, pid)
    if given["boot"] is None and started is None:
        raise Refusal(f"it is not known which boot runs under {pid_file} (yet): give -boot")
    if given["boot"] is None and started is not None and started.boot == LOG:
        raise Refusal(f"under {pid_file} runs `lamsonq log`: stop it, and start that again; or give -boot")
    if started is None:
        return []
    stay = {"boot": started.boot, "workers": started.workers, "grace": f"{started.grace:.0f}"}
    return [f"--{name}={value}" for name, value in stay.items() if given[name] is None]


def _words_of_start(ctx: click.Context) -> list[str]:
    """The command line that starts what this context is about: its options as they were given."""
    words = ["start" if ctx.info_name == "restart" else ctx.info_name or ""]
    for param in ctx.command.params:
        given = ctx.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE
        if not given or param.name in ("kill", "force"):
            continue
        value = ctx.params[param.name or ""]
        if isinstance(param, click.Option) and param.is_flag:
            words.append(max((param.opts if value else param.secondary_opts), key=len))
        else:
            words.append(f"{max(param.opts, key=len)}={value}")
    return words


@declare()
@option(
    "port",
    "The port to listen on, when it is not that of config/settings.toml; 0 takes a free one.",
    type=click.IntRange(0, 65535),
    envvar="LAMSONQ_RELAY__PORT",  # what a project relays to is what this stands for
    show_envvar=True,
    default=8825,
    metavar="N",
)
@option("host", "The address to listen on.", default="127.0.0.1", metavar="ADDRESS")
@daemon_options(LOG_PID)
@force_option
@click.pass_context
def log(ctx: click.Context, /, port: int, host: str, **options: Any) -> None:
    """Start a server that takes all mail and keeps it in run/queue.

    It logs to logs/logger.log. Relay to it while you develop: nothing leaves your machine. It listens where [relay] of
    config/settings.toml sends to, unless -port or -host is given.
    """
    given = any(ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in ("port", "host"))

    def receiver() -> Receiver:
        return _log_server(host, port)

    def check() -> None:
        nonlocal host, port
        if not os.path.isdir("config") and not os.path.isdir(RUN):
            raise UsageError(f"{os.getcwd()} is no project: it has neither config/ nor run/ (lamsonq gen makes one)")
        if not given:
            host, port = _relayed_to(host, port)

    _serve(LOG, receiver, check, 1, GRACE, **options)


def _relayed_to(host: str, port: int) -> tuple[str, int]:
    """Where the project relays to, if a server of ours can be there; else this host and port, which is said."""
    from lamsonq.settings import machine
    from lamsonq.sockets import is_this_machine

    if not os.path.isfile(SETTINGS):
        why = f"there is no {SETTINGS}"
    else:
        relay = machine(SETTINGS).relay
        if is_this_machine(relay.host) and not relay.host.startswith("/") and relay.port >= 1024:
            return relay.host, relay.port
        why = f"{SETTINGS} has [relay] host = {relay.host!r}, port = {relay.port}"
    click.echo(f"lamsonq log listens on {host}:{port}, because {why}.", err=True)
    return host, port


def _log_server(host: str, port: int) -> Receiver:
    """The boot of `lamsonq log`. Its states are in memory, and its handlers have none."""
    import logging
    from logging.handlers import WatchedFileHandler

    from lamsonq.queue import Queue
    from lamsonq.routing import Router
    from lamsonq.server import SMTPReceiver

    os.makedirs("logs", exist_ok=True)
    file = WatchedFileHandler("logs/logger.log")  # follows when logrotate moves the file away
    logging.basicConfig(handlers=[file], level=logging.DEBUG, format=LOG_FORMAT)
    logging.getLogger("mail.log").setLevel(logging.WARNING)  # every line of every dialogue is too much
    Router.load(["lamsonq.handlers.log", "lamsonq.handlers.queue"])
    Router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable-log")
    return SMTPReceiver(host, port)


def _serve(
    name: str,
    boot: Callable[[], Receiver],
    check: Callable[[], None],
    workers: int,
    grace: int,
    *,
    pid: str,
    force: bool,  # noqa: ARG001 - two servers on one pid file would be two servers that nobody can stop
    chroot: str | None,
    chdir: str,
    uid: str | None,
    gid: str | None,
    umask: str,
    debug: bool,
    daemon: bool,
) -> None:
    from lamsonq import identity, process, reload

    record = reload.inherited(pid)

    def place() -> None:
        identity.assume(uid, gid, chroot, umask)
        try:
            os.chdir(os.path.expanduser(chdir))
        except OSError as error:
            raise Refusal(f"cannot change to {chdir}: {error.strerror}") from error

    if record is None:
        place()
    command = reload.Command.here(_words_of_start(click.get_current_context()))

    def boot_here() -> Receiver:
        if record is not None:
            if not reload.already_placed():
                place()  # here, so that restart hears what is wrong with it
            check()
        return _logging_here(boot()) if debug else boot()

    service = process.Service(boot_here, pid, name, workers, grace, command)
    if record is not None:
        process.resume(service, record, daemon=daemon and not debug)
        return
    check()
    folder = os.path.dirname(pid) or "."
    identity.check_writable(folder, "logs")
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError as error:
        raise Refusal(f"{folder} is a file, and has to be a directory for {pid}: move it away") from error
    except OSError as error:
        raise Refusal(f"cannot make the directory of {pid}: {error.strerror}") from error
    if debug:
        click.echo("lamsonq started in debug mode. ctrl-c to quit...", err=True)
    if daemon and not debug:
        process.start(service)
    else:
        process.run(service)


def _receiver_of(settings: Any, boot: str) -> Receiver:
    receiver: Receiver | None = getattr(settings, "receiver", None)
    if receiver is None:
        raise UsageError(f"{boot} sets no settings.receiver: there is nothing to start; write settings.receiver = ...")
    _let_it_report(receiver, getattr(settings, "relay", None))
    return receiver


def _let_it_report(receiver: Receiver, relay: Any) -> None:
    """Whoever runs functions reports deliveries (RFC 3461), where the boot has a relay for that."""
    from lamsonq.smtp import SMTPReceiver
    from lamsonq.source import Source
    from lamsonq.worker import QueueReceiver

    parts = receiver.sources if isinstance(receiver, QueueReceiver) else [receiver]
    for part in parts:
        if isinstance(part, SMTPReceiver | Source) and part.reports is None and part.deliver is None:
            part.reports = getattr(relay, "deliver", None)


def _check_states(receiver: Receiver, workers: int) -> None:
    """Refuse several processes when each would have states of its own: a conversation would go on in any of them."""
    from lamsonq.routing import Router
    from lamsonq.state import MemoryStorage

    router = getattr(receiver, "router", Router)
    stateful = any(not handler.marks.stateless for handler in router.table.handlers.values())
    if workers > 1 and stateful and isinstance(router.STATE_STORE, MemoryStorage):
        advice = 'set Router.STATE_STORE = SQLiteStorage("run/state.db") in the boot'
        raise Refusal(f"{workers} processes need states that they share: {advice}")


def _check_queues(receiver: Receiver, workers: int) -> None:
    """Refuse several processes when each would have a queue of its own."""
    if workers == 1:
        return
    for queue in _queues_of(receiver):
        if "processes" not in queue.backend.capabilities:
            advice = "name a directory (run/posts) or sqlite:run/queues.db?queue=posts instead"
            raise Refusal(f"{workers} processes need queues that they share, and {queue.dir} is in one only: {advice}")


def _queues_of(receiver: Receiver) -> Iterator[Queue]:
    """The queues that a receiver works, or that its routers put what fails into."""
    from lamsonq.routing import Router

    sources: list[Any] | None = getattr(receiver, "sources", None)
    if sources is not None:
        yield from (source.queue for source in sources)
    parts: list[Any] = [receiver] if sources is None else sources
    for part in parts:
        router = getattr(part, "router", Router)
        if getattr(part, "deliver", None) is None and router.UNDELIVERABLE_QUEUE is not None:
            yield router.UNDELIVERABLE_QUEUE


def _logging_here(receiver: Receiver) -> Receiver:
    """After the boot has configured logging, show it on the terminal too."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    logging.getLogger().addHandler(handler)
    return receiver


@declare()
@option("pid", "The pid file of the server.", default=SMTP_PID, metavar="FILE")
@click.option("-ALL", "--all", "run", is_flag=False, flag_value=RUN, metavar="[DIR]", help="All of a directory. [run]")
@switch("KILL", "End it at once, whatever it does.", "--force", "-f")
def stop(pid: str, run: str | None, kill: bool) -> None:
    """Stop a server, or all of a directory.

    Returns when they have ended.
    """
    from lamsonq import process, survey

    if run is not None:
        files = survey.pid_files(run)
        click.echo(f"Stopping processes with the following PID files:\n{files}")
    elif os.path.lexists(pid):
        files = [pid]
    else:
        raise PidFileError(f"PID file {pid} doesn't exist, maybe lamsonq isn't running?")
    troubles = process.stop(files, kill, click.echo, lambda line: click.echo(line, err=True))
    for trouble in troubles[:-1]:
        click.echo(f"ERROR: {trouble}", err=True)
    if troubles:
        raise troubles[-1]


@declare()
@option("pid", "The pid file of the server.", default=SMTP_PID, metavar="FILE")
@click.option("-ALL", "--all", "run", is_flag=False, flag_value=RUN, metavar="[DIR]", help="All of a directory. [run]")
@json_option
@click.pass_context
def status(ctx: click.Context, pid: str, run: str | None, as_json: bool) -> None:
    """Tell whether a server runs, and what waits in the queues.

    Exits with 1 when it does not run.
    """
    from lamsonq import survey
    from lamsonq.commands.queues.printed import columns, print_line

    queues_in = run or os.path.dirname(pid) or "."
    servers = (
        [survey.server(pid)] if run is None else [survey.server_or_trouble(path) for path in survey.pid_files(run)]
    )
    if as_json:
        click.echo(json.dumps({"servers": servers, "queues": survey.queues(queues_in)}))
    elif run is None:
        click.echo(_line(servers[0]), err=not servers[0]["running"])
    else:
        for server in servers:
            click.echo(f"{server['pid_file']}: {_line(server)}")
        if not servers:
            click.echo(f"lamsonq not running: no pid file in {run}.", err=True)
    if not as_json:
        for line in columns(survey.queues(queues_in)):
            print_line(line)
    ctx.exit(0 if servers and all(server["running"] for server in servers) else 1)


def _line(server: dict[str, Any]) -> str:
    if "trouble" in server:
        return f"{server['trouble']}"
    return f"lamsonq running with PID {server['pid']}" if server["running"] else "lamsonq not running."
