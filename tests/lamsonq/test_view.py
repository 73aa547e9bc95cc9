"""Messages from templates, in both forms."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jinja2
import pytest

from lamsonq import view
from lamsonq.errors import UsageError
from lamsonq.mail import MailRequest, MailResponse
from lamsonq.relay import Relay

TEMPLATES = {
    "page_ready.msg": (
        "From: noreply@{{ host }}\nTo: {{ message.From }}\nSubject: Your page {{ title }}\n\nHello,\n{{ title }}\n"
    ),
    "no_to.msg": "From: noreply@x\nSubject: s\n\nbody\n",
    "no_from.msg": "To: a@b\n\nbody\n",
    "no_colon.msg": "From: a@b\nnonsense\n\nbody\n",
    "body.txt": "Hi {{ name }}\n",
    "body.html": "<p>Hi {{ name }}</p>\n",
    "pictures.html": '<p><img src="{{ images.logo }}" alt="Logo"><img src="{{ images["chart.png"] }}"></p>',
    "crlf.msg": "From: a@b\r\nTo: c@d\r\n\r\none\r\n\r\ntwo\r\n",
}
LETTER = b"Message-ID: <1@x>\r\nSubject: Hi\r\n\r\n"


@pytest.fixture(autouse=True)
def loader(tmp_path: Path) -> Iterator[None]:
    for name, source in TEMPLATES.items():
        (tmp_path / name).write_bytes(source.encode())
    before = view.LOADER
    view.LOADER = view.templates(str(tmp_path))
    yield
    view.LOADER = before


def letter(sender: str = "joe@x.org") -> MailRequest:
    return MailRequest("peer", sender, "blog@y", LETTER)


def test_a_msg_template_is_the_whole_message() -> None:
    host, title, message = "y.org", "Ü", letter()
    response = view.respond("page_ready.msg", locals())
    assert (response["From"], response["To"], response["Subject"]) == ("noreply@y.org", "joe@x.org", "Your page Ü")
    assert response.Body == "Hello,\nÜ\n"
    assert (response["In-Reply-To"], response["References"]) == ("<1@x>", "<1@x>")


def test_lamsons_form_fills_arguments_with_variables() -> None:
    variables = {"name": "<Jo>", "host": "y.org", "message": letter("other@x")}
    response = view.respond(
        variables,
        Body="body.txt",
        Html="body.html",
        From="bot@%(host)s",
        To="a@b",
        Subject="%(name)s",
        Reply_To="r@%(host)s",
    )
    assert (response["From"], response["Subject"], response["Reply-To"]) == ("bot@y.org", "<Jo>", "r@y.org")
    assert (response.Body, response.Html) == ("Hi <Jo>\n", "<p>Hi &lt;Jo&gt;</p>\n")
    assert "In-Reply-To" not in response


@pytest.mark.parametrize("title", ["x\r\nBcc: evil@x", "x\nBcc: evil@x", "x\u2028Bcc: evil@x", "x\rBcc: evil@x"])
def test_a_variable_cannot_make_a_header(title: str) -> None:
    variables = {"host": "y", "title": title, "message": letter()}
    response = view.respond("page_ready.msg", variables)
    assert response["Subject"] == "Your page x Bcc: evil@x"
    assert "Bcc" not in response
    assert view.respond(variables, Body="crlf.msg", Subject="%(title)s")["Subject"] == "x Bcc: evil@x"


def test_a_variable_is_never_a_template() -> None:
    response = view.respond({"name": "{{ 7 * 7 }}%(x)s"}, Body="body.txt", Subject="%(name)s")
    assert (response.Body, response["Subject"]) == ("Hi {{ 7 * 7 }}%(x)s\n", "{{ 7 * 7 }}%(x)s")


def test_a_template_without_a_to_answers_the_sender() -> None:
    response = view.respond("no_to.msg", {"message": letter()})
    assert (response.recipients, response["In-Reply-To"]) == (["joe@x.org"], "<1@x>")


def test_a_template_without_a_to_has_nobody_to_send_to_where_there_is_no_message() -> None:
    with pytest.raises(UsageError, match=r"no_to\.msg has no To"):
        view.respond("no_to.msg", {"message": None})


# ---- what a program writes because of a message ----------------------------------------------------------------

DESK = {"host": "y.org", "title": "t", "name": "Jo"}


def marks(response: MailResponse) -> list[str | None]:
    """Auto-Submitted, In-Reply-To and References as they go out."""
    sent = MailRequest("p", None, None, response.to_bytes())
    found = [sent[name] for name in ("Auto-Submitted", "In-Reply-To", "References")]
    assert found == [response[name] for name in ("Auto-Submitted", "In-Reply-To", "References")]
    return found


def both_forms(message: MailRequest, To: str) -> list[MailResponse]:
    variables = {**DESK, "message": message}
    answer = view.respond("page_ready.msg", variables)
    answer["To"] = To
    return [answer, view.respond(variables, Body="body.txt", From="desk@y.org", To=To, Subject="s")]


def from_header(sender: str, more: bytes = b"") -> MailRequest:
    data = b"From: Joe <Joe@x.org>\r\nReply-To: joes-desk@x.org\r\n" + more + LETTER
    return MailRequest("peer", sender, "blog@y", data)


@pytest.mark.parametrize("to", ["joe@x.org", "Joe <JOE@x.org>", "bounces@x.org", "joes-desk@x.org", "a@b, joe@x.org"])
def test_what_goes_to_who_wrote_the_message_is_in_its_thread_and_says_that_no_person_wrote_it(to: str) -> None:
    for response in both_forms(from_header("bounces@x.org"), to):
        assert marks(response) == ["auto-replied", "<1@x>", "<1@x>"]


def test_what_tells_others_of_a_message_says_that_no_person_wrote_it_and_is_in_no_thread() -> None:
    for response in both_forms(from_header("joe@x.org"), "boss@y.org"):
        assert marks(response) == ["auto-generated", None, None]


def test_what_a_template_says_of_itself_stays(tmp_path: Path) -> None:
    (tmp_path / "person.msg").write_text("From: a@b\nTo: joe@x.org\nAuto-Submitted: no\nReferences: <2@y>\n\nbody\n")
    assert marks(view.respond("person.msg", {"message": letter()})) == ["no", None, "<2@y>"]
    assert marks(view.respond("person.msg", {})) == ["no", None, "<2@y>"]


def test_a_recipient_that_is_set_later_counts() -> None:
    response = view.respond({**DESK, "message": letter()}, Body="body.txt", From="desk@y.org", Subject="s")
    response["To"] = "boss@y.org"
    assert marks(response)[0] == "auto-generated"
    response["To"] = "joe@x.org"
    assert marks(response)[0] == "auto-replied"
    assert {"Auto-Submitted", "In-Reply-To"} <= set(response.keys()) == set(dict(response.items()))


def test_without_a_message_nothing_is_marked() -> None:
    response = view.respond(DESK, Body="body.txt", From="desk@y.org", To="joe@x.org", Subject="s")
    assert marks(response) == [None, None, None]


UNANSWERABLE = [
    from_header(""),
    *(
        from_header("joe@x.org", b"Auto-Submitted: " + value + b"\r\n")
        for value in (b"auto-replied", b"Auto-Replied (holiday); x=y", b"auto-notified")
    ),
]


@pytest.mark.parametrize("message", UNANSWERABLE)
def test_an_answer_to_a_program_or_to_the_null_sender_is_dropped_and_logged(
    message: MailRequest, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[MailRequest] = []
    with caplog.at_level("INFO"):
        for response in both_forms(message, "joe@x.org"):
            Relay(deliver=sent.append).deliver(response)
    assert sent == []
    lines = [record for record in caplog.records if record.getMessage().startswith("Not replying to a message from ")]
    assert [line.levelname for line in lines] == ["INFO", "INFO"]


@pytest.mark.parametrize("message", UNANSWERABLE)
def test_others_are_told_of_a_message_that_is_not_answered(message: MailRequest) -> None:
    sent: list[MailRequest] = []
    for response in both_forms(message, "joe@x.org, boss@y.org"):
        Relay(deliver=sent.append).deliver(response)
    assert [each.route_to for each in sent] == [["boss@y.org"]] * 2


def test_what_a_person_writes_goes_to_everybody(tmp_path: Path) -> None:
    (tmp_path / "person.msg").write_text("From: a@b\nTo: joe@x.org\nAuto-Submitted: no\n\nbody\n")
    sent: list[MailRequest] = []
    for message in UNANSWERABLE:
        Relay(deliver=sent.append).deliver(view.respond("person.msg", {"message": message}))
    assert len(sent) == len(UNANSWERABLE)


def test_mail_of_a_program_that_is_no_answer_is_answered() -> None:
    sent: list[MailRequest] = []
    for header in (b"Auto-Submitted: auto-generated\r\n", b"Precedence: bulk\r\n"):
        for response in both_forms(from_header("joe@x.org", header), "joe@x.org"):
            Relay(deliver=sent.append).deliver(response)
    assert len(sent) == 4


def test_an_answer_to_the_null_sender_needs_no_to(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        Relay(deliver=print).deliver(view.respond("no_to.msg", {"message": letter("")}))
    assert "Not replying to a message from the null sender to 'blog@y'." in caplog.messages


def test_two_desks_do_not_answer_each_other_for_ever() -> None:
    sent: list[str] = []

    def answer(message: MailRequest) -> None:
        name = message.To
        to = message["from"]
        relay.deliver(view.respond(locals(), Body="body.txt", From="%(name)s", To="%(to)s", Subject="Re"))

    def carry(message: MailRequest) -> None:
        sent.append(message.To)
        if len(sent) < 10:
            answer(message)

    relay = Relay(deliver=carry)
    answer(MailRequest("p", "two@y.org", "one@y.org", b"From: two@y.org\r\n" + LETTER))
    assert sent == ["two@y.org"]


def test_a_broken_template_says_where() -> None:
    with pytest.raises(UsageError, match=r"no_from\.msg has no From"):
        view.respond("no_from.msg", {})
    with pytest.raises(UsageError, match=r"no_colon\.msg, line 2: a header line is"):
        view.respond("no_colon.msg", {})
    with pytest.raises(UsageError, match="Subject"):
        view.respond({}, Body="crlf.msg", Subject="%(missing)s")
    with pytest.raises(jinja2.UndefinedError, match="'name' is undefined"):
        view.respond({}, Body="body.txt")
    with pytest.raises(jinja2.TemplateNotFound):
        view.respond("../page_ready.msg", {})


def test_only_the_first_empty_line_ends_the_headers() -> None:
    assert view.respond("crlf.msg", {}).Body == "one\n\ntwo\n"


def test_a_response_needs_a_template() -> None:
    with pytest.raises(UsageError, match="Body"):
        view.respond({}, From="a@b")


def test_a_missing_loader_names_the_line_for_the_boot_file() -> None:
    view.LOADER = None
    with pytest.raises(UsageError, match=r'view\.LOADER = view\.templates\("app/templates"\)'):
        view.load("body.txt")


def test_a_template_is_attached() -> None:
    response = MailResponse(To="a@b", From="c@d", Body="see")
    view.attach(response, {"name": "Jo"}, "body.html")
    view.attach(response, {"name": "Jo"}, "body.txt", filename="x.csv", content_type="text/csv")
    _, html, csv = MailRequest("p", None, None, response.to_bytes()).all_parts()
    assert (html.content_type, html.filename, html.body) == ("text/html", "body.html", "<p>Hi Jo</p>\n")
    assert (csv.content_type, csv.filename, csv.body) == ("text/csv", "x.csv", "Hi Jo\n")


def test_html_never_goes_out_without_a_text() -> None:
    response = view.respond({"name": "<Jo>"}, Html="body.html", From="a@b", To="c@d")
    assert (response.Html, response.Body) == ("<p>Hi &lt;Jo&gt;</p>\n", "Hi <Jo>\n")
    assert response.to_message().get_content_type() == "multipart/alternative"


def test_images_stand_beside_the_html_that_shows_them(tmp_path: Path) -> None:
    (tmp_path / "our logo.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    images: view.Images = {"logo": tmp_path / "our logo.png", "chart.png": b"\x89chart"}
    response = view.respond({}, Html="pictures.html", images=images, From="a@b", To="c@d", Subject="s")
    text, html, logo, chart = MailRequest("p", None, None, response.to_bytes()).all_parts()
    assert (text.content_type, text.body) == ("text/plain", "Logo\n")
    assert (logo.filename, logo.data) == ("our logo.png", b"\x89PNG\r\n\x1a\n\x00\xff")
    assert (chart.filename, chart.data, chart.content_type) == ("chart.png", b"\x89chart", "image/png")
    for image in (logo, chart):
        assert image.disposition == "inline"
        assert f'src="cid:{str(image["content-id"]).strip("<>")}"' in str(html.body)
    assert logo["content-id"] != chart["content-id"]
    assert response.attachments == []


def test_a_msg_may_have_html_with_images() -> None:
    variables = {"host": "y.org", "title": "t", "message": letter()}
    response = view.respond("page_ready.msg", variables, Html="pictures.html", images={"logo": b"", "chart.png": b"x"})
    assert (response.Body, len(response.embedded)) == ("Hello,\nt\n", 2)
    assert "images" not in variables


def test_images_need_html_to_show_them() -> None:
    with pytest.raises(UsageError, match="images= are shown by an Html template"):
        view.respond({}, Body="crlf.msg", images={"logo": b"x"})
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        view.respond({}, Html="pictures.html", images={"logo": "nowhere.png"})


def test_templates_run_in_a_sandbox(tmp_path: Path) -> None:
    (tmp_path / "evil.txt").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(jinja2.exceptions.SecurityError):
        view.render({}, "evil.txt")


def test_the_templates_may_stand_by_position_as_lamsons_users_write_them() -> None:
    response = view.respond({"name": "Jo"}, "body.txt", "body.html", From="a@b", To="c@d")
    assert (response.Body, response.Html) == (
        view.render({"name": "Jo"}, "body.txt"),
        view.render({"name": "Jo"}, "body.html"),
    )
    assert view.respond(variables={"name": "Jo"}, Body="body.txt").Body == response.Body
