"""Routes, states, plans and the table: Lamson's rules, and the few that changed."""

import asyncio
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from lamsonq.errors import Dead, Later, RouteError, SMTPError, Undelivered, UsageError
from lamsonq.jobs import Job
from lamsonq.mail import MailRequest
from lamsonq.queue import Queue
from lamsonq.routing import RoutingBase, route, route_like
from lamsonq.state import MemoryStorage, SQLiteStorage, StateStorage

from .waiting import PATIENCE

Mail = Callable[..., MailRequest]
Module = Callable[..., str]

WAITING = """
@route('desk@example.com')
def START(message):
    CALLS.append('START')
    return WAIT

@route('desk@example.com')
def WAIT(message): CALLS.append('WAIT')
"""


def calls_of(name: str) -> list[object]:
    return sys.modules[name].CALLS  # type: ignore[no-any-return]


def test_captures_become_keyword_arguments(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        @route("(list_name)-(action)@(host)", action="subscribe|leave", list_name="[a-z]+")
        def START(message, list_name=None, action=None, host=None):
            CALLS.append((list_name, action, host))
        """
    )
    router.defaults(host="example\\.com")
    router.load([name])
    router.deliver(mail("News-LEAVE@Example.com"))
    assert calls_of(name) == [("news", "leave", "example.com")]


def test_an_expression_matches_the_whole_address(router: RoutingBase, module: Module) -> None:
    name = module("@route('desk@example.com')\ndef START(message): ...\n")
    router.load([name])
    assert router.takes("desk@example.com")
    assert router.takes("DESK@example.com")
    for address in ("desk@example.com.evil", "xdesk@example.com", "desk@example.com\n"):
        assert not router.takes(address)


def test_groups_that_are_no_bare_word_stay_what_they_are(router: RoutingBase, module: Module) -> None:
    name = module("@route(r'(?:a|b)(.+)\\(x\\)@h')\ndef START(message): ...\n")
    router.load([name])
    assert router.takes("a-c(x)@h")


def test_a_capture_that_nothing_defines_fails_the_load_with_file_and_line(router: RoutingBase, module: Module) -> None:
    good = module("@route('desk@h')\ndef START(message): ...\n")
    bad = module("@route('(nobody)@h')\ndef START(message): ...\n")
    router.load([good])
    with pytest.raises(RouteError, match=rf"{bad}\.py:4: @route.*uses \(nobody\)"):
        router.load([bad])
    assert router.takes("desk@h"), "the old table stays"


def test_a_broken_expression_fails_the_load(router: RoutingBase, module: Module) -> None:
    with pytest.raises(RouteError, match="not a regular expression"):
        router.load([module("@route('(?:desk@h')\ndef START(message): ...\n")])


@pytest.mark.parametrize(
    ("function", "trouble"),
    [
        ("def START(message): ...", "got an unexpected keyword argument 'host'"),
        ("def START(message, host, name): ...", "missing a required argument: 'name'"),
        ("def START(host): ...", "multiple values for argument 'host'"),
        ("async def START(): ...", "too many positional arguments"),
    ],
)
def test_a_function_that_cannot_be_called_with_what_its_route_captures_fails_the_load(
    function: str, trouble: str, router: RoutingBase, module: Module
) -> None:
    bad = module(f"@route('desk@(host)', host='h')\n{function}\n")
    with pytest.raises(RouteError) as refused:
        router.load([bad])
    at = rf"{bad}\.py:4: @route\('desk@\(host\)'\): "
    assert re.search(rf"{at}{bad}\.START is called as START\(message, host=\.\.\.\): {trouble}$", str(refused.value))


def test_one_asterisk_for_two_is_warned_of(
    router: RoutingBase, module: Module, caplog: pytest.LogCaptureFixture
) -> None:
    name = module("@route('desk@(host)', host='h')\ndef START(message, *kw): ...\n")
    router.load([name])
    assert router.takes("desk@h")
    assert f"{name}.py:4: @route('desk@(host)'): {name}.START is called as START(message, host=...): " in caplog.text
    assert caplog.text.endswith("it will fail: write **captures, not *captures\n")


def test_a_decorator_may_fill_in_what_the_function_below_it_needs(
    router: RoutingBase, module: Module, mail: Mail
) -> None:
    name = module(
        """
        import functools
        def with_desk(function):
            @functools.wraps(function)
            def called(message, **captures):
                return function(message, desk="desk", **captures)
            return called
        @route('(who)@(host)', who='desk(?P<number>[0-9]+)?', host='example.com')
        @with_desk
        def START(message, desk, who, host, number=None): CALLS.append((desk, who, host, number))
        """
    )
    router.load([name])
    router.deliver(mail())
    assert calls_of(name) == [("desk", "desk", "example.com", None)]


def test_a_handler_module_that_does_not_import_fails_the_load_in_one_line(router: RoutingBase, module: Module) -> None:
    name = module("import no_such_module_anywhere\n")
    with pytest.raises(UsageError, match=rf"{name}\.py:4: ModuleNotFoundError"):
        router.load([name])
    with pytest.raises(UsageError, match="no_such_handlers"):
        router.load(["no_such_handlers"])


def test_a_state_function_that_was_defined_over_fails_the_load(router: RoutingBase, module: Module) -> None:
    name = module("@route('a@h')\ndef START(message): ...\n@route('b@h')\ndef START(message): ...\n")
    with pytest.raises(RouteError, match="holds another START"):
        router.load([name])


def test_defaults_may_come_after_load(router: RoutingBase, module: Module) -> None:
    name = module("@route('desk@(host)', host='h')\ndef START(message, host): ...\n")
    router.load([name])
    router.defaults(host="other")
    assert router.takes("desk@h")


def test_defaults_stay_when_the_routes_are_cleared(router: RoutingBase, module: Module) -> None:
    name = module("@route('desk@(host)')\ndef START(message, host): ...\n")
    router.defaults(host="h")
    router.load([name])
    router.clear_routes()
    assert not router.takes("desk@h")
    router.load([name])
    assert router.takes("desk@h")


def test_decorators_return_the_same_function(module: Module) -> None:
    def plain(message: MailRequest) -> None: ...

    assert route("a@b")(plain) is plain


def test_methods_cannot_be_routed() -> None:
    with pytest.raises(TypeError, match="not methods"):

        class Desk:
            @route("a@b")
            def START(self, message: MailRequest) -> None: ...


def test_all_stateless_functions_run_and_the_first_stateful_one_in_state(
    router: RoutingBase, module: Module, mail: Mail
) -> None:
    name = module(
        """
        @route('desk@(host)', host='.+')
        @stateless
        def LOG(message, host): CALLS.append('LOG')

        @route('desk@(host)', host='.+')
        def START(message, host): CALLS.append('START')

        @route('desk@example.com')
        def SECOND(message): CALLS.append('SECOND')

        @route('desk@example.com')
        @stateless
        def COUNT(message): CALLS.append('COUNT')
        """
    )
    other = module("@route('desk@example.com')\ndef START(message): raise AssertionError('only the first')\n")
    router.load([name, other])
    assert [call.name for call in router.plan(mail())] == [f"{name}.LOG", f"{name}.START", f"{name}.COUNT"]
    router.deliver(mail())
    assert calls_of(name) == ["LOG", "START", "COUNT"]


def test_a_returned_function_is_the_next_state(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        @route('desk@example.com')
        def START(message):
            CALLS.append('START')
            return CONFIRM

        @route('desk@example.com')
        def CONFIRM(message):
            CALLS.append('CONFIRM')
            return START
        """
    )
    router.load([name])
    for _ in range(3):
        router.deliver(mail())
    router.deliver(mail(sender="bob@example.com"))
    assert calls_of(name) == ["START", "CONFIRM", "START", "START"]


def test_none_leaves_the_state_as_it_is(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(WAITING)
    router.load([name])
    router.deliver(mail())
    router.deliver(mail())
    assert router.get_state(name, mail()) == "WAIT"


def test_a_state_function_may_call_another(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        @route('desk@example.com')
        def START(message): return POSTING(message)
        @route('desk@example.com')
        def POSTING(message): return POSTING
        """
    )
    router.load([name])
    router.deliver(mail())
    assert router.get_state(name, mail()) == "POSTING"


def test_stacked_routes_are_tried_bottom_up(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        @route('sales@(host)', host='.+')
        @route('desk@(host)', host='.+')
        def START(message, host=None): CALLS.append(message.To)
        """
    )
    router.load([name])
    assert router.ORDER == ["desk@(?P<host>.+)", "sales@(?P<host>.+)"]
    router.deliver(mail("sales@example.com"))
    router.deliver(mail("desk@example.com"))
    assert calls_of(name) == ["sales@example.com", "desk@example.com"]


def test_route_like_copies_the_route_of_another(router: RoutingBase, module: Module, mail: Mail) -> None:
    first = module("@route('(who)@example.com', who='[a-z]+')\ndef START(message, who): ...\n")
    second = module(
        f"""
        import {first}
        @route_like({first}.START)
        @stateless
        def START(message, who): CALLS.append(who)
        """
    )
    router.load([second])
    router.deliver(mail())
    assert calls_of(second) == ["desk"]
    with pytest.raises(TypeError, match="no @route to copy"):
        route_like(print)


def test_each_recipient_is_a_delivery_of_its_own(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        @route('(who)@example.com', who='.+')
        def START(message, who): CALLS.append((message.To, who))
        """
    )
    router.load([name])
    router.deliver(mail(["a@example.com", "b@example.com"]))
    assert calls_of(name) == [("a@example.com", "a"), ("b@example.com", "b")]


def test_another_modules_function_moves_the_conversation_there_and_back(
    router: RoutingBase, module: Module, mail: Mail
) -> None:
    second = "handlers_second"
    first = module(
        f"""
        import {second}
        @route('desk@example.com')
        def START(message):
            CALLS.append('first.START')
            return {second}.ASKED
        @route('desk@example.com')
        def BACK(message): CALLS.append('first.BACK')
        """
    )
    module(
        f"""
        @route('desk@example.com')
        def START(message): raise AssertionError('not in state')
        @route('desk@example.com')
        def ASKED(message):
            import {first}
            {first}.CALLS.append('second.ASKED')
            return {first}.BACK
        """,
        second,
    )
    router.load([first, second])
    for _ in range(3):
        router.deliver(mail())
    assert calls_of(first) == ["first.START", "second.ASKED", "first.BACK"]


def test_a_conversation_that_is_nowhere_begins_anew(router: RoutingBase, module: Module, mail: Mail) -> None:
    other = module("@route('elsewhere@example.com')\ndef ASKED(message): ...\n")
    name = module(
        f"""
        import {other}
        @route('desk@example.com')
        def START(message):
            CALLS.append(1)
            return {other}.ASKED
        """
    )
    router.load([name, other])
    router.deliver(mail())
    router.deliver(mail())
    assert calls_of(name) == [1, 1]


def test_a_conversation_handed_to_a_queue_goes_there_until_it_is_handed_back(
    router: RoutingBase, module: Module, mail: Mail
) -> None:
    """Two routers stand for the two processes; they share the states, as SQLite shares them."""
    behind = "handlers_behind"
    front = module(
        f"""
        import {behind}
        @route('desk@example.com')
        def START(message):
            CALLS.append('START')
            return {behind}.INDEXING
        @route('desk@example.com')
        def INDEXED(message): CALLS.append('INDEXED')
        """
    )
    module(
        f"""
        ENOUGH = 2
        @route('desk@example.com')
        def INDEXING(message):
            import {front}
            {front}.CALLS.append('INDEXING')
            return {front}.INDEXED if {front}.CALLS.count('INDEXING') == 2 else INDEXING
        """,
        behind,
    )
    worker = RoutingBase()
    router.STATE_STORE = worker.STATE_STORE = SQLiteStorage("state.db")
    router.hand_over([behind], "run/posts")
    router.load([front])
    worker.load([behind])
    posts = Queue("run/posts")

    def work() -> None:
        while (found := posts.pop())[0] is not None:
            worker.deliver(found[1])

    router.deliver(mail())
    assert posts.count() == 1, "the message that moved the conversation goes with it"
    work()
    router.deliver(mail())
    assert posts.count() == 1, "and the next ones follow"
    work()
    router.deliver(mail())
    assert posts.count() == 0
    assert calls_of(front) == ["START", "INDEXING", "INDEXING", "INDEXED"]


def test_a_message_that_the_handler_pushed_itself_is_not_pushed_twice(
    router: RoutingBase, module: Module, mail: Mail
) -> None:
    behind = module("@route('desk@example.com')\ndef INDEXING(message): ...\n")
    front = module(
        f"""
        import {behind}
        from lamsonq.queue import Queue
        @route('desk@example.com')
        def START(message):
            Queue('run/posts').push(message)
            return {behind}.INDEXING
        """
    )
    router.hand_over([behind], "run/posts")
    router.load([front])
    router.deliver(mail())
    assert Queue("run/posts").count() == 1


def test_a_state_that_no_function_has_routes_as_start(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module("@route('desk@example.com')\ndef START(message): CALLS.append(1)\n")
    router.load([name])
    router.set_state(name, mail(), "REMOVED_IN_THE_LAST_RELEASE")
    router.deliver(mail())
    assert calls_of(name) == [1]


def test_a_crash_is_recorded_as_error_and_the_next_message_starts_anew(
    router: RoutingBase, module: Module, mail: Mail
) -> None:
    name = module(
        """
        @route('desk@example.com')
        def START(message):
            CALLS.append(1)
            if len(CALLS) == 1: raise RuntimeError('boom')
        """
    )
    router.load([name])
    with pytest.raises(Undelivered) as caught:
        router.deliver(mail())
    (failure,) = caught.value.failures
    assert (failure.target, failure.recipient) == (f"{name}.START", "desk@example.com")
    assert isinstance(failure.error, RuntimeError)
    assert router.in_error(sys.modules[name].START, mail())
    router.deliver(mail())
    assert calls_of(name) == [1, 1]


def test_a_module_with_an_error_state_gets_the_next_message_there(
    router: RoutingBase, module: Module, mail: Mail
) -> None:
    name = module(
        """
        @route('desk@example.com')
        def START(message): raise RuntimeError('boom')
        @route('desk@example.com')
        def ERROR(message): CALLS.append('ERROR')
        """
    )
    router.load([name])
    with pytest.raises(Undelivered):
        router.deliver(mail())
    router.deliver(mail())
    assert calls_of(name) == ["ERROR"]


@pytest.mark.parametrize("error", ["SMTPError(450)", "SMTPError(550)", "Later('soon')", "Dead('no')"])
def test_a_failure_on_purpose_moves_nobody(router: RoutingBase, module: Module, mail: Mail, error: str) -> None:
    name = module(f"@route('desk@example.com')\ndef START(message): raise {error}\n")
    router.load([name])
    with pytest.raises(Undelivered) as caught:
        router.deliver(mail())
    assert isinstance(caught.value.failures[0].error, SMTPError | Later | Dead)
    assert router.get_state(name, mail()) == "START"


@pytest.mark.parametrize("value", ["'POSTING'", "42", "(lambda message: None)", "print"])
def test_a_nonsense_return_value_is_a_failure(router: RoutingBase, module: Module, mail: Mail, value: str) -> None:
    router.load([module(f"@route('desk@example.com')\ndef START(message): return {value}\n")])
    with pytest.raises(Undelivered, match="return None, or the state function that comes next"):
        router.deliver(mail())


def test_one_failure_does_not_keep_the_others_from_running(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        @route('desk@example.com')
        @stateless
        def FIRST(message): raise RuntimeError('boom')
        @route('desk@example.com')
        @stateless
        def SECOND(message): CALLS.append('SECOND')
        """
    )
    router.load([name])
    with pytest.raises(Undelivered) as caught:
        router.deliver(mail())
    assert [f.target for f in caught.value.failures] == [f"{name}.FIRST"]
    assert calls_of(name) == ["SECOND"]


def test_what_a_handler_pushed_leaves_only_with_its_success(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        from lamsonq.queue import Queue
        @route('(how)@example.com', how='good|bad|now')
        @stateless
        def START(message, how):
            Queue('run/posts').push(message, now=(how == 'now'))
            assert Queue('run/posts').count() == (how == 'now')
            if how != 'good': raise RuntimeError('boom')
        """
    )
    router.load([name])
    for how, kept in (("bad", 0), ("now", 1)):
        with pytest.raises(Undelivered):
            router.deliver(mail(f"{how}@example.com"))
        assert Queue("run/posts").count() == kept
        Queue("run/posts").clear()
    router.deliver(mail("good@example.com"))
    assert Queue("run/posts").count() == 1


def test_the_null_sender_has_no_conversation(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(WAITING)
    router.load([name])
    router.deliver(mail(sender=""))
    router.deliver(mail(sender=""))
    assert calls_of(name) == ["START", "START"]


def test_a_message_that_nothing_takes_goes_to_the_undeliverable_queue(router: RoutingBase, mail: Mail) -> None:
    router.deliver(mail())
    router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
    message = mail()
    router.deliver(message)
    key, kept = router.UNDELIVERABLE_QUEUE.pop()
    assert key is not None
    assert kept is not None
    assert kept.Data == message.Data
    assert kept.envelope.rcpt_tos == ("desk@example.com",)


def test_of_several_recipients_those_that_nothing_takes_are_undeliverable(
    router: RoutingBase, module: Module, mail: Mail
) -> None:
    router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
    name = module("@route('desk@example.com')\n@stateless\ndef START(message): CALLS.append(message.To)\n")
    router.load([name])
    router.deliver(mail(["desk@example.com", "typo@example.com"]))
    assert calls_of(name) == ["desk@example.com"]
    _, kept = router.UNDELIVERABLE_QUEUE.pop()
    assert kept is not None
    assert kept.route_to == ["typo@example.com"]


def test_a_message_that_no_function_in_state_takes_is_undeliverable(
    router: RoutingBase, module: Module, mail: Mail
) -> None:
    name = module("@route('desk@example.com')\ndef CONFIRM(message): CALLS.append(1)\n")
    router.load([name])
    with pytest.raises(Undelivered, match=r"no function that takes desk@example\.com is in the sender's state"):
        router.deliver(mail())
    router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
    router.deliver(mail())
    assert router.UNDELIVERABLE_QUEUE.count() == 1
    router.deliver(mail(sender=""))
    assert router.UNDELIVERABLE_QUEUE.count() == 2
    assert calls_of(name) == []


def test_a_message_whose_push_failed_is_routed_again_by_the_state_that_it_found(
    router: RoutingBase, module: Module, mail: Mail
) -> None:
    """The function that comes next has another address, so nothing in state takes the message when it comes again."""
    name = module(
        """
        from lamsonq.queue import Queue
        @route('join@example.com')
        def START(message):
            CALLS.append('START')
            Queue('run/out').push(message)
            return CONFIRM
        @route('confirm@example.com')
        def CONFIRM(message): CALLS.append('CONFIRM')
        """
    )
    router.UNDELIVERABLE_QUEUE = Queue("run/undeliverable")
    router.load([name])
    Path("run").mkdir(exist_ok=True)
    Path("run/out").write_text("no directory")
    message = mail("join@example.com")
    with pytest.raises(Undelivered, match="could not be kept"):
        router.deliver(message)
    Path("run/out").unlink()
    router.deliver(message)
    assert calls_of(name) == ["START", "START"]
    assert Queue("run/out").count() == 1
    assert router.UNDELIVERABLE_QUEUE.count() == 0


UNKEPT = """
from lamsonq.queue import Queue

@route('(desk)@example.com', desk='desk|other')
def START(message, desk):
    CALLS.append('START')
    Queue('run/out').push(message)
    return NEXT

@route('(desk)@example.com', desk='desk|other')
def NEXT(message, desk): CALLS.append('NEXT')
"""


@pytest.mark.parametrize("store", [MemoryStorage, lambda: SQLiteStorage("run/state.db")], ids=["memory", "SQLite"])
def test_a_message_whose_push_failed_has_not_moved_its_conversation(
    router: RoutingBase, module: Module, mail: Mail, store: Callable[[], StateStorage]
) -> None:
    """Not for itself alone: another message of its sender may come before it is sent again."""
    name = module(UNKEPT)
    router.STATE_STORE = store()
    router.load([name])
    Path("run").mkdir(exist_ok=True)
    Path("run/out").write_text("no directory")
    with pytest.raises(Undelivered, match="could not be kept"):
        router.deliver(mail("desk@example.com"))
    assert router.get_state(name, mail()) == "START"
    Path("run/out").unlink()
    router.deliver(mail("other@example.com"))
    router.deliver(mail("desk@example.com"))
    assert calls_of(name) == ["START", "START", "NEXT"]


def test_a_state_that_cannot_be_put_back_is_no_other_error(
    router: RoutingBase, module: Module, mail: Mail, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = module(UNKEPT)
    router.STATE_STORE = MemoryStorage()
    monkeypatch.setattr(router.STATE_STORE, "undo", Mock(side_effect=OSError("disk full")))
    router.load([name])
    Path("run").mkdir(exist_ok=True)
    Path("run/out").write_text("no directory")
    with pytest.raises(Undelivered, match="what the handler pushed could not be kept"):
        router.deliver(mail("desk@example.com"))
    assert "its conversation could not be put back" in caplog.text
    Path("run/out").unlink()
    router.deliver(mail("desk@example.com"))
    assert calls_of(name) == ["START", "START"]


def test_a_relay_that_is_down_is_no_error_of_the_conversation(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        @route('desk@example.com')
        def START(message): raise Undelivered([Failure('out@example.com', None, Later('the relay is down'))])
        """
    )
    router.load([name])
    with pytest.raises(Undelivered):
        router.deliver(mail())
    assert router.get_state(name, mail()) == "START"


def test_a_generator_is_no_state_function(router: RoutingBase, module: Module) -> None:
    with pytest.raises(RouteError, match="is a generator"):
        router.load([module("@route('desk@example.com')\n@stateless\ndef START(message): yield 1\n")])


def test_a_state_key_generator_says_which_conversation(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        @state_key_generator
        def by_list(module_name, message): return f"{module_name}:{message.To}"
        @route('(name)@example.com', name='.+')
        def START(message, name):
            CALLS.append(f'START {name}')
            return NEXT
        @route('(name)@example.com', name='.+')
        def NEXT(message, name): CALLS.append(f'NEXT {name}')
        """
    )
    router.load([name])
    for to in ("a", "b", "a"):
        router.deliver(mail(f"{to}@example.com"))
    assert calls_of(name) == ["START a", "START b", "NEXT a"]
    assert router.STATE_STORE.get(f"{name}:b@example.com", "alice@example.com") == "NEXT"


def test_async_functions_are_state_functions_too(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        import asyncio
        from lamsonq.queue import Queue
        @route('desk@example.com')
        async def START(message):
            await asyncio.sleep(0)
            Queue('run/posts').push(message)
            CALLS.append('START')
            return NEXT
        @route('desk@example.com')
        async def NEXT(message):
            await asyncio.sleep(0)
            raise RuntimeError('boom')
        """
    )
    router.load([name])
    router.deliver(mail())
    assert calls_of(name) == ["START"]
    assert Queue("run/posts").count() == 1
    with pytest.raises(Undelivered, match="boom"):
        router.deliver(mail())


def test_an_async_function_that_exits_fails_alone(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        @route('(how)@example.com', how='exit|go')
        @stateless
        async def START(message, how):
            if how == 'exit': raise SystemExit(3)
            CALLS.append(how)
        """
    )
    router.load([name])
    with pytest.raises(Undelivered, match=r"SystemExit\(3\)"):
        router.deliver(mail("exit@example.com"))
    router.deliver(mail("go@example.com"))
    assert calls_of(name) == ["go"]


def test_an_async_function_that_waits_for_another_is_told_so(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        ROUTER = []
        @route('(who)@example.com', who='outer|inner')
        @stateless
        async def START(message, who):
            from lamsonq.mail import MailRequest
            if who == 'outer': ROUTER[0].deliver(MailRequest('inside', message.From, 'inner@example.com', message.Data))
        """
    )
    router.load([name])
    sys.modules[name].ROUTER.append(router)
    with pytest.raises(Undelivered, match=r"asyncio\.to_thread"):
        router.deliver(mail("outer@example.com"))


def test_deliver_may_be_called_on_an_event_loop(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module("@route('desk@example.com')\nasync def START(message): CALLS.append(1)\n")
    router.load([name])

    async def main() -> None:
        router.deliver(mail())

    asyncio.run(main())
    assert calls_of(name) == [1]


def test_one_sender_at_a_time_and_others_beside(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        import threading
        INSIDE = threading.Barrier(2, timeout=60)
        RUNNING = set()
        @route('desk@example.com')
        def START(message):
            assert message.From not in RUNNING
            RUNNING.add(message.From)
            INSIDE.wait()                    # passes only when two senders are inside together
            RUNNING.discard(message.From)
            CALLS.append(message.From)
        """
    )
    router.load([name])
    threads = [
        threading.Thread(target=router.deliver, args=[mail(sender=f"{who}@example.com")])
        for who in ("alice", "bob", "alice", "bob")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls_of(name)) == ["alice@example.com"] * 2 + ["bob@example.com"] * 2  # type: ignore[type-var]


def test_a_state_that_changes_while_a_plan_is_made_is_seen_once(
    router: RoutingBase, module: Module, mail: Mail
) -> None:
    class Restless(MemoryStorage):
        def get(self, key: str, sender: str) -> str:
            self.states[self.key(key, sender)] = now = "WAIT" if super().get(key, sender) == "START" else "START"
            return now

    name = module(WAITING)
    router.STATE_STORE = Restless()
    router.load([name])
    for _ in range(3):
        assert len(router.plan(mail())) == 1


def test_who_waited_in_line_goes_on_in_his_own_thread(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        import threading, time
        @route('desk@example.com')
        def START(message):
            time.sleep(0.01)
            CALLS.append((message.body().strip(), threading.current_thread().name))
        """
    )
    router.load([name])
    threads = [threading.Thread(target=router.deliver, args=[mail(body=str(n))], name=str(n)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, calls_of(name))) == sorted(str((str(n), str(n))) for n in range(8))


def test_nolocking_does_not_lead_around_the_lock_of_another_function(
    router: RoutingBase, module: Module, mail: Mail
) -> None:
    name = module(
        """
        import threading
        ALONE = threading.Lock()
        @route('desk@example.com')
        @nolocking
        def START(message): ...
        @route('desk@example.com')
        def NEXT(message):
            assert ALONE.acquire(blocking=False)
            CALLS.append(1)
            threading.Event().wait(0.02)
            ALONE.release()
        """
    )
    router.load([name])
    planned = [(mail(), router.plan(mail())[0]) for _ in range(4)]
    router.set_state(name, mail(), "NEXT")
    attempts = [router.attempt(call, m, key=str(n), settle=lambda *_: None) for n, (m, call) in enumerate(planned)]
    threads = [threading.Thread(target=attempt.start) for attempt in attempts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls_of(name) == [1, 1, 1, 1]
    assert router.get_state(name, mail()) == "NEXT", "nobody has failed"


def test_nolocking_lets_two_messages_of_one_sender_in(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        import threading
        INSIDE = threading.Barrier(2, timeout=60)
        @route('desk@example.com')
        @nolocking
        def START(message):
            INSIDE.wait()
            CALLS.append(1)
        """
    )
    router.load([name])
    threads = [threading.Thread(target=router.deliver, args=[mail()]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls_of(name) == [1, 1]


def test_two_routers_know_nothing_of_each_other(module: Module, mail: Mail) -> None:
    first, second = RoutingBase(), RoutingBase()
    name = module("@route('desk@(host)')\ndef START(message, host): ...\n")
    first.defaults(host="one")
    second.defaults(host="two")
    first.load([name])
    second.load([name])
    assert first.takes("desk@one")
    assert not first.takes("desk@two")
    assert second.takes("desk@two")


def test_reload_takes_what_changed(router: RoutingBase, module: Module, mail: Mail, here: Path) -> None:
    name = module("@route('desk@example.com')\ndef START(message): ...\n")
    router.load([name])
    (here / f"{name}.py").write_text("from lamsonq.routing import *\n@route('sales@example.com')\ndef START(m): ...\n")
    router.reload()
    assert router.takes("sales@example.com")
    assert not router.takes("desk@example.com")


@pytest.mark.parametrize(
    "broken",
    [
        "import sys; sys.exit(3)\n",
        "def START(:\n",
        "raise RuntimeError('boom')\n",
        "@route('(x)@h')\ndef START(m): ...\n",
    ],
)
def test_a_reload_that_fails_leaves_everything_as_it_was(
    router: RoutingBase, module: Module, mail: Mail, here: Path, broken: str
) -> None:
    name = module("WORD = 'old'\n@route('desk@example.com')\ndef START(message): CALLS.append(WORD)\n")
    router.load([name])
    (here / f"{name}.py").write_text("from lamsonq.routing import *\nWORD = 'new'\n" + broken)
    router.reload()
    router.deliver(mail())
    assert calls_of(name) == ["old"]
    router.LOG_EXCEPTIONS = False
    with pytest.raises((SystemExit, SyntaxError, RuntimeError, RouteError)):
        router.reload()


def test_with_reload_on_a_changed_file_is_noticed(
    router: RoutingBase, module: Module, mail: Mail, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamsonq.routing.RELOAD_INTERVAL", 0.0)
    name = module("@route('desk@example.com')\ndef START(message): ...\n")
    router.load([name])
    router.RELOAD = True
    path = here / f"{name}.py"
    path.write_text("from lamsonq.routing import *\n@route('sales@example.com')\ndef START(m): ...\n")
    os.utime(path, (time.time() + 5, time.time() + 5))
    assert router.plan(mail()) == []


def test_a_kicked_job_runs_the_handler_that_was_fixed(
    router: RoutingBase, module: Module, mail: Mail, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamsonq.routing.RELOAD_INTERVAL", 0.0)
    name = module("@route('desk@example.com')\n@stateless\ndef START(message): return 'broken'\n")
    router.load([name])
    router.RELOAD = True
    router.plan(mail())
    path = here / f"{name}.py"
    path.write_text(path.read_text().replace("broken", "fixed"))
    os.utime(path, (time.time() + 5, time.time() + 5))
    call = router.bound(Job(key="k", body=b"", target=f"{name}.START"), mail())
    assert call.function(mail()) == "fixed"


def test_a_bound_job_runs_exactly_its_function(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        @route('(who)@example.com', who='.+')
        @stateless
        def FIRST(message, who): ...
        @route('(who)@example.com', who='.+')
        @stateless
        def SECOND(message, who): ...
        """
    )
    router.load([name])
    job = Job(key="k", body=b"", recipients=("desk@example.com",), target=f"{name}.SECOND")
    call = router.bound(job, mail())
    assert (call.name, call.captures) == (f"{name}.SECOND", {"who": "desk"})
    with pytest.raises(Later, match="no handler"):
        router.bound(Job(key="k", body=b"", target="os.system"), mail())
    with pytest.raises(Dead, match="route gone"):
        router.bound(job, mail("desk@elsewhere.com"))


def test_a_bound_call_follows_its_conversation_when_that_has_moved_on(
    router: RoutingBase, module: Module, mail: Mail
) -> None:
    name = module(WAITING)
    router.load([name])
    job = Job(key="k", body=b"", recipients=("desk@example.com",), target=f"{name}.START")
    call = router.bound(job, mail())  # in START yet
    router.deliver(mail())  # another message is first
    router.attempt(call, mail(), key="k", settle=lambda *_: None).start()
    assert calls_of(name) == ["START", "WAIT"]


def test_a_bound_call_that_failed_runs_again_in_error(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(WAITING)
    router.load([name])
    router.set_state(name, mail(), "ERROR")
    job = Job(key="k", body=b"", recipients=("desk@example.com",), target=f"{name}.WAIT")
    router.attempt(router.bound(job, mail()), mail(), key="k", settle=lambda *_: None).start()
    assert calls_of(name) == ["WAIT"]


def test_a_handler_may_deliver_to_its_own_conversation(router: RoutingBase, module: Module, mail: Mail) -> None:
    """And what that pushes leaves only when the outer function succeeds."""
    name = module(
        """
        from lamsonq.queue import Queue
        ROUTER = []
        @route('(who)@example.com', who='.+')
        def START(message, who):
            CALLS.append(who)
            if who == 'inner':
                Queue('run/posts').push(message)
                return START
            from lamsonq.mail import MailRequest
            ROUTER[0].deliver(MailRequest('inside', message.From, 'inner@example.com', message.Data))
            assert Queue('run/posts').count() == 0
            if who == 'bad': raise RuntimeError('boom')
        """
    )
    router.load([name])
    sys.modules[name].ROUTER.append(router)
    with pytest.raises(Undelivered, match="boom"):
        router.deliver(mail("bad@example.com"))
    assert Queue("run/posts").count() == 0
    router.deliver(mail("good@example.com"))
    assert calls_of(name) == ["bad", "inner", "good", "inner"]
    assert Queue("run/posts").count() == 1


def test_a_message_that_comes_again_after_a_crash_is_routed_by_the_state_that_it_found(
    router: RoutingBase, module: Module, mail: Mail
) -> None:
    """The state was committed, then the process died before the job was settled."""
    name = module(
        """
        @route('desk@example.com')
        def START(message):
            CALLS.append('START')
            return CONFIRMED
        @route('desk@example.com')
        def CONFIRMED(message): CALLS.append('CONFIRMED')
        """
    )
    router.load([name])
    message = mail()
    conversation = (name, "alice@example.com")
    (call,) = router.plan(message)
    router.STATE_STORE.commit({conversation: "CONFIRMED"}, "job-1")
    router.attempt(call, message, key="job-1", settle=lambda *_: None).start()
    router.attempt(router.plan(message)[0], message, key="job-2", settle=lambda *_: None).start()
    assert calls_of(name) == ["START", "CONFIRMED"]
    assert router.STATE_STORE.found_by(*conversation, "job-1") is None, "it is settled: the same words again are new"


def test_an_attempt_that_was_given_up_settles_nothing(router: RoutingBase, module: Module, mail: Mail) -> None:
    name = module(
        """
        import threading
        GO, HERE = threading.Event(), threading.Event()
        @route('desk@example.com')
        def START(message):
            HERE.set()
            GO.wait(60)
            return START
        """
    )
    router.load([name])
    settled: list[object] = []
    attempt = router.attempt(router.plan(mail())[0], mail(), key="k", settle=lambda *settling: settled.append(settling))
    thread = threading.Thread(target=attempt.start)
    thread.start()
    assert sys.modules[name].HERE.wait(PATIENCE)
    outcome = attempt.hung(0.1)
    assert attempt.give_up()
    assert "GO.wait" in "".join(outcome.__notes__)
    sys.modules[name].GO.set()
    thread.join()
    assert settled == []
    assert not attempt.give_up()
    router.deliver(mail(sender="alice@example.com"))  # the conversation is free again


def test_a_conversation_in_a_function_that_is_stateless_now_begins_anew(
    router: RoutingBase, module: Callable[..., str], mail: Callable[..., MailRequest]
) -> None:
    name = module(
        """
        @route("desk@example.com")
        def START(message):
            CALLS.append("start")

        @route("desk@example.com")
        @stateless
        def TICKET(message):
            CALLS.append("ticket")
        """
    )
    router.load([name])
    router.set_state(name, mail(), "TICKET")
    router.deliver(mail())
    assert sorted(sys.modules[name].CALLS) == ["start", "ticket"]


def test_with_reload_a_new_route_is_known_at_rcpt(
    router: RoutingBase, module: Callable[..., str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module('@route("one@example.com")\n@stateless\ndef ONE(message): pass\n')
    router.load([name])
    router.RELOAD = True
    assert not router.takes("two@example.com")
    module('@route("two@example.com")\n@stateless\ndef TWO(message): pass\n', name=name)
    os.utime(here / f"{name}.py", (1, 1))
    monkeypatch.setattr(router, "_next_look", 0.0)
    assert router.takes("two@example.com")
