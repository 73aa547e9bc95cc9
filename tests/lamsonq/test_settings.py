"""Settings: what is right is taken, what is wrong is one line that names file, key, wanted and found."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamsonq import settings
from lamsonq.errors import Refusal, SettingsError, UsageError
from lamsonq.lmtp import LMTPReceiver
from lamsonq.smtp import SMTPReceiver

TOML = """
hosts = ["test.com", "localhost"]
[receiver]
port = 8823
[relay]
host = "mail.example.com"
"""


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config" / "settings.toml"
    path.parent.mkdir()
    path.write_text(TOML)
    return path


def refusal(environ: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        settings.machine(environ=environ or {})
    return str(caught.value)


def test_values_come_from_the_file_and_the_rest_are_defaults(toml: Path) -> None:
    here = settings.machine(environ={})
    assert here.receiver.port == 8823
    assert here.relay.config()["host"] == "mail.example.com"
    assert here.relay.config()["timeout"] == 30.0


def test_the_mark_of_free_disk_goes_to_the_receiver(toml: Path) -> None:
    assert settings.machine(environ={}).receiver.config()["min_free"] == 64 * 1024 * 1024
    assert settings.machine(environ={"LAMSONQ_RECEIVER__MIN_FREE": "0"}).receiver.config()["min_free"] == 0
    toml.write_text("[receiver]\nmin_free = -1\n")
    assert refusal() == "config/settings.toml: receiver.min_free: expected an int >= 0, found the int -1"


def test_hosts_are_matched_literally(toml: Path) -> None:
    assert settings.machine(environ={}).host_pattern() == r"test\.com|localhost"


def test_a_value_of_the_wrong_type_is_named_with_what_was_found(toml: Path) -> None:
    toml.write_text('[receiver]\nport = "88x"\n')
    assert refusal() == 'config/settings.toml: receiver.port: expected an int, found the str "88x"'


def test_a_word_that_is_none_of_the_choices_is_told_which_there_are(toml: Path) -> None:
    toml.write_text('[receiver]\ntls = "require"\n')
    expected = 'receiver.tls: expected one of "offered", "required", "implicit", found the str "require"'
    assert refusal() == f"config/settings.toml: {expected}"


def test_a_number_out_of_range_is_refused(toml: Path) -> None:
    toml.write_text("[receiver]\nport = 70000\n")
    assert refusal() == "config/settings.toml: receiver.port: expected an int <= 65535, found the int 70000"


def test_an_unknown_key_is_named_with_the_nearest_known_one(toml: Path) -> None:
    toml.write_text("[receiver]\nprot = 1\n")
    assert refusal() == "config/settings.toml: receiver.prot: there is no such setting; did you mean port?"


def test_an_unknown_table_is_refused(toml: Path) -> None:
    toml.write_text("[smtp]\nport = 1\n")
    assert refusal().startswith("config/settings.toml: smtp: there is no such setting; known here: hosts, receiver")


def test_a_value_where_a_table_belongs_is_refused(toml: Path) -> None:
    toml.write_text("receiver = 8823\n")
    assert refusal() == "config/settings.toml: receiver: expected a table, found the int 8823"


def test_broken_toml_names_the_line(toml: Path) -> None:
    toml.write_text("[receiver]\nport =\n")
    assert refusal().startswith("config/settings.toml: this is not TOML: ")
    assert "line 2" in refusal()


def test_a_file_that_is_not_there_is_named(toml: Path) -> None:
    toml.unlink()
    assert refusal() == "config/settings.toml: cannot be read: No such file or directory"


@pytest.mark.parametrize("name", ["CERTIFICATE_FILE", "KEY_FILE", "LOGINS_FILE"])
def test_an_empty_path_is_told_that_a_file_is_wanted(toml: Path, name: str) -> None:
    expected = f'receiver.{name.lower()}: expected the path of a file, found the str ""'
    assert refusal({f"LAMSONQ_RECEIVER__{name}": ""}) == f"LAMSONQ_RECEIVER__{name}: {expected}"
    toml.write_text(f'[receiver]\n{name.lower()} = ""\n')
    assert refusal() == f"config/settings.toml: {expected}"


@pytest.mark.parametrize(("key", "value"), [("key_file", "mx.key"), ("tls", "required")])
def test_what_needs_a_certificate_says_so_without_one(toml: Path, key: str, value: str) -> None:
    expected = f"receiver.{key}: expected receiver.certificate_file, too (in PEM), found none"
    assert refusal({f"LAMSONQ_RECEIVER__{key.upper()}": value}) == f"LAMSONQ_RECEIVER__{key.upper()}: {expected}"
    toml.write_text(f'[receiver]\n{key} = "{value}"\n')
    assert refusal() == f"config/settings.toml: {expected}"


def test_the_hosts_that_strangers_may_send_to_go_to_the_receiver(toml: Path) -> None:
    assert settings.machine(environ={}).receiver.config()["hosts"] is None
    toml.write_text('[receiver]\nhosts = ["Example.org"]\n')
    here = settings.machine(environ={}).receiver.config()
    assert SMTPReceiver(**here).hosts == LMTPReceiver(**here).hosts == frozenset(["example.org"])
    here = settings.machine(environ={"LAMSONQ_RECEIVER__HOSTS": "a.org, b.org"}).receiver.config()
    assert here["hosts"] == ["a.org", "b.org"]


@pytest.mark.parametrize("host", ["@example.org", "*.example.org", "", "joe@example.org", "example.org."])
def test_a_host_that_is_no_domain_is_refused(toml: Path, host: str) -> None:
    toml.write_text(f'[receiver]\nhosts = ["example.net", "{host}"]\n')
    expected = f'receiver.hosts: expected domains, as example.org, found the str "{host}"'
    assert refusal() == f"config/settings.toml: {expected}"
    with pytest.raises(ValueError, match=r"hosts: '.*' is no domain; one is written as example\.org"):
        SMTPReceiver(hosts=["example.net", host])


def test_hosts_that_are_one_text_are_told_that_a_list_is_wanted(toml: Path) -> None:
    toml.write_text('[receiver]\nhosts = "example.org"\n')
    assert refusal() == 'config/settings.toml: receiver.hosts: expected a list, found the str "example.org"'


def test_toml_of_version_1_1_is_read(toml: Path) -> None:
    toml.write_text("receiver = {\n  port = 2525,\n}\n")
    assert settings.machine(environ={}).receiver.port == 2525


def test_the_environment_wins(toml: Path) -> None:
    environ = {"LAMSONQ_RECEIVER__PORT": "2525", "LAMSONQ_RELAY__STARTTLS": "true", "LAMSONQ_HOSTS": "a.org, b.org"}
    here = settings.machine(environ=environ)
    assert (here.receiver.port, here.relay.starttls, here.hosts) == (2525, True, ["a.org", "b.org"])


def test_a_variable_with_one_underscore_is_not_ignored(toml: Path) -> None:
    expected = "LAMSONQ_RECEIVER_PORT is no setting: did you mean LAMSONQ_RECEIVER__PORT?"
    assert refusal({"LAMSONQ_RECEIVER_PORT": "2525"}) == expected
    assert settings.machine(environ={"LAMSONQ_QUEUE": "run/jobs", "LAMSONQ_START_BOOT": "x"}).receiver.port == 8823


def test_a_wrong_value_of_the_environment_names_the_variable(toml: Path) -> None:
    expected = 'LAMSONQ_RECEIVER__PORT: receiver.port: expected an int, found the str "88x"'
    assert refusal({"LAMSONQ_RECEIVER__PORT": "88x"}) == expected


def test_an_unknown_variable_names_the_nearest_setting(toml: Path) -> None:
    message = refusal({"LAMSONQ_RECEIVER__PROT": "1"})
    assert message == "LAMSONQ_RECEIVER__PROT: receiver.prot: there is no such setting; did you mean port?"


def test_other_variables_that_begin_like_ours_are_left_alone(toml: Path) -> None:
    assert settings.machine(environ={"LAMSONQ_QUEUE": "run/jobs"}).receiver.port == 8823


def test_a_credential_is_read_from_its_file(toml: Path) -> None:
    Path("secret").write_text("s3cret\n")
    toml.write_text('[relay]\nusername = "joe"\npassword_file = "secret"\n')
    assert settings.machine(environ={}).relay.config()["password"] == "s3cret"


def test_a_credential_file_that_is_missing_is_named(toml: Path) -> None:
    toml.write_text('[relay]\npassword_file = "nowhere"\n')
    with pytest.raises(SettingsError, match=r"relay\.password_file: cannot read nowhere"):
        settings.machine(environ={}).relay.config()


def test_a_credential_that_is_given_twice_is_refused(toml: Path) -> None:
    toml.write_text('[relay]\npassword = "x"\npassword_file = "y"\n')
    with pytest.raises(SettingsError, match="both given"):
        settings.machine(environ={}).relay.config()


def test_a_broken_credential_is_not_shown(toml: Path) -> None:
    toml.write_text("[relay]\npassword = 12345\n")
    assert refusal() == "config/settings.toml: relay.password: expected a str, found the int"


def test_the_applications_own_table_is_taken_as_it_is(toml: Path) -> None:
    toml.write_text("[app]\nanything = [1, 'two']\n")
    assert settings.machine(environ={}).app == {"anything": [1, "two"]}


# ---- logging ---------------------------------------------------------------------------------------------------


@pytest.fixture
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


LOGGING = """
version = 1
[handlers.file]
class = "logging.FileHandler"
filename = "%s"
[root]
level = "INFO"
handlers = ["file"]
"""


@pytest.mark.usefixtures("_logging_as_it_was")
def test_logging_makes_the_directory_of_its_file(toml: Path) -> None:
    Path("config/logging.toml").write_text(LOGGING % "logs/deep/x.log")
    somebody = logging.getLogger("somebody")  # it is there before, as those of imported modules are
    settings.load_logging()
    somebody.info("hello")
    assert Path("logs/deep/x.log").read_text() == "hello\n"


@pytest.mark.usefixtures("_logging_as_it_was")
def test_a_log_file_that_cannot_be_written_is_refused_in_a_line(toml: Path) -> None:
    Path("logs").write_text("not a directory")
    Path("config/logging.toml").write_text(LOGGING % "logs/x.log")
    with pytest.raises(Refusal, match=r"config/logging\.toml: cannot write the log file logs") as caught:
        settings.load_logging()
    assert caught.value.exit_code == 1


@pytest.mark.usefixtures("_logging_as_it_was")
def test_a_mistake_in_the_logging_file_is_named(toml: Path) -> None:
    Path("config/logging.toml").write_text('version = 1\n[root]\nlevel = "LOUD"\n')
    with pytest.raises(SettingsError, match=r"config/logging\.toml: .*root.*LOUD"):
        settings.load_logging()


# ---- boots -----------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty project whose package has a name that no other test uses; what it imports is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    package = tmp_path / "bootpkg" / "deep"
    package.mkdir(parents=True)
    (package / "settings.py").write_text("receiver = None\n")
    yield package
    for name in set(sys.modules) - before:
        if name.startswith("bootpkg"):
            del sys.modules[name]


def boot_fails(kind: type[Refusal] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        settings.boot("bootpkg.deep.boot")
    return str(caught.value)


def test_a_boot_returns_the_settings_that_it_filled_at_any_depth(project: Path) -> None:
    (project / "boot.py").write_text("from bootpkg.deep import settings\nsettings.receiver = 'me'\n")
    assert settings.boot("bootpkg.deep.boot").receiver == "me"


def test_a_boot_that_does_not_exist_is_named(project: Path) -> None:
    assert (
        boot_fails() == f"there is no module bootpkg.deep.boot in {os.getcwd()} (no module named 'bootpkg.deep.boot')"
    )


def test_an_import_that_fails_in_a_boot_names_file_and_line(project: Path) -> None:
    (project / "boot.py").write_text("\nimport no_such_module_at_all\n")
    assert boot_fails() == "bootpkg/deep/boot.py:2: ModuleNotFoundError: No module named 'no_such_module_at_all'"


def test_a_syntax_error_names_file_and_line(project: Path) -> None:
    (project / "boot.py").write_text("x = 1\ndef :\n")
    assert boot_fails().startswith("bootpkg/deep/boot.py:2: SyntaxError: ")


def test_an_exception_in_what_a_boot_imports_names_the_innermost_line_of_the_project(project: Path) -> None:
    (project / "helper.py").write_text("import json\n\njson.loads('{')\n")
    (project / "boot.py").write_text("from bootpkg.deep import helper\n")
    assert boot_fails().startswith("bootpkg/deep/helper.py:3: JSONDecodeError: ")


def test_settings_errors_of_a_boot_stay_what_they_are(project: Path) -> None:
    (project / "boot.py").write_text("from lamsonq.settings import machine\nmachine('nowhere.toml')\n")
    assert boot_fails(SettingsError) == "nowhere.toml: cannot be read: No such file or directory"


def test_a_module_without_settings_is_no_boot(project: Path) -> None:
    (project / "boot.py").write_text("")
    assert boot_fails() == "bootpkg.deep.boot is no boot: it imports no module named settings"
