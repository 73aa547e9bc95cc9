"""Messages from templates, in both forms."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jinja2
import pytest

from lamsonq import view
from lamsonq.errors import UsageError
from lamsonq.mail import MailRequest, MailResponse

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


@pytest.mark.parametrize("message", [letter(""), None])
def test_a_template_without_a_to_has_nobody_to_answer(message: MailRequest | None) -> None:
    with pytest.raises(UsageError, match=r"no_to\.msg has no To"):
        view.respond("no_to.msg", {"message": message})


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
