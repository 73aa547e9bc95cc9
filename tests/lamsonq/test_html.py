"""HTML mail: styles, Markdown, the text beside it; and the shape of a message with images and attachments."""

from __future__ import annotations

import html.parser
import http.server
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lamsonq import view
from lamsonq.errors import UsageError
from lamsonq.html import LENGTH_MAX, TAGS_MAX, HtmlMail, _pretty
from lamsonq.mail import MailRequest, MailResponse
from lamsonq.plaintext import text_of

PNG = b"\x89PNG\r\n\x1a\n\x00\xff"
TEMPLATES = {
    "style.css": "p { color: {{ color }} }\n.note > b { margin: 0 }\n@media print { p { color: black } }\n",
    "layout.html": (
        "<html><head><title>{{ site }}</title></head><body><div class=note>{{ content }}</div>"
        "<p><a href='https://{{ site }}/'>{{ name }}</a></p></body></html>"
    ),
    "news.md": "# Hello {{ name }}\n\n**New** things:\n\n* one\n* two\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
    "value.md": "{{ name }}\n",
    "raw.md": "{{ name|safe }}\n",
    "news.txt": "Hello {{ name }}!\n",
    "logo.md": "![Our logo]({{ images.logo }})\n",
}


@pytest.fixture(autouse=True)
def loader(here: Path) -> Iterator[None]:
    for name, source in TEMPLATES.items():
        Path(name).write_text(source)
    before, view.LOADER = view.LOADER, view.templates(str(here))
    yield
    view.LOADER = before


@pytest.fixture
def news() -> HtmlMail:
    return HtmlMail("style.css", "layout.html", {"site": "osb.test.com", "color": "red", "name": "nobody"})


def content(html: str) -> str:
    return html.partition('<div class="note">')[2].partition("</div>")[0].strip()


# Styles.


def test_styles_are_written_into_the_elements(news: HtmlMail) -> None:
    html = news.render({"name": "Jo"}, "news.md")
    assert "<h1>Hello Jo</h1>" in html
    assert '<p style="color: red;"><strong>New</strong> things:</p>' in html
    assert "<td>2</td>" in html
    assert "<title>osb.test.com</title>" in html
    assert "@media print" in html  # no element can hold it
    assert ".note" not in html


def test_variables_of_one_message_win(news: HtmlMail) -> None:
    html = news.render({"color": "green", "name": "Jo"}, "news.md")
    assert 'style="color: green;"' in html
    assert news.load_css().startswith("p { color: red }")
    assert news.variables["color"] == "red"


def test_style_sheets_are_never_fetched_from_the_net_nor_from_files(news: HtmlMail) -> None:
    asked = []

    class Sheets(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"b { color: blue }")

        def log_message(self, *_: object) -> None:
            pass

    Path("local.css").write_text("b { color: blue }")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sheets) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        net = f"http://127.0.0.1:{server.server_address[1]}/x.css"
        for href in (net, "local.css", f"file://{Path('local.css').absolute()}"):
            html = f'<link rel="stylesheet" href="{href}"><style>@import url("{href}");</style><b>x</b>'
            assert "<b>x</b>" in news.apply_styles(html)
        server.shutdown()
    assert asked == []


DEEPEST = """
import sys, threading
from jinja2 import DictLoader, Environment
from lamsonq import view
from lamsonq.html import TAGS_MAX, HtmlMail

opening, repeated, tags = {document!r}
view.LOADER = Environment(loader=DictLoader({{"style.css": "div div {{ color: red }} * > * {{ margin: 0 }}"}}))
html = opening + repeated * ((TAGS_MAX - 4) // tags)
sizes = []
threading.stack_size(128 * 1024)  # of a handler's thread, on some systems
thread = threading.Thread(target=lambda: sizes.append(len(HtmlMail("style.css", "x").apply_styles(html))))
thread.start()
thread.join()
assert sizes and sizes[0] > len(html), sizes
"""


@pytest.mark.parametrize(
    "document",
    [
        ("", "<div>", 1),
        ("<!-->", "<div>", 1),  # a comment that ends at once: not so for who looks for "-->"
        ("<svg><title>", "<div>", 1),  # no text as in HTML, but elements
        pytest.param(("<svg>", "<g>", 1), marks=pytest.mark.slow),
        pytest.param(("", "<table><td>", 2), marks=pytest.mark.slow),  # four elements
        pytest.param(("", "<template>", 1), marks=pytest.mark.slow),
    ],
    ids=lambda document: "".join(document[:2]),
)
def test_no_html_crashes_the_process_however_deep_and_in_whatever_disguise(document: tuple[str, str, int]) -> None:
    program = DEEPEST.format(document=document)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_big_newsletter_is_styled(news: HtmlMail) -> None:
    article = "<tr><td class=note><h2>News</h2><p>x<br>y <b>z</b> <a href='https://x.org/?a=1'>more</a></td></tr>"
    html = news.apply_styles(f"<table>{article * 1000}</table>" + "<p>x" * 1000)
    assert html.count('<p style="color: red;">') == 2000


@pytest.mark.parametrize("where", ["", "<!-->", "<svg><title>", "<p title='", "<script>"])
def test_html_of_too_many_tags_is_refused_wherever_they_stand(news: HtmlMail, where: str) -> None:
    with pytest.raises(ValueError, match=f"HTML of 200.. tags cannot be styled, {TAGS_MAX} are the most"):
        news.apply_styles(where + "<i></i>" * (TAGS_MAX // 2) + "<i>")
    with pytest.raises(ValueError, match=f"characters cannot be styled, {LENGTH_MAX} are the most"):
        news.apply_styles(where + "x" * LENGTH_MAX + ">")


@pytest.mark.parametrize(
    "left_open",
    [
        "".join(f"<font size={n}>" for n in range(2000)),
        "".join(f'<b title=">{n}">' for n in range(2000)),  # alike up to the first ">"
        "".join(f"<b a=\"'\" b='>{n}'>" for n in range(2000)),
        "".join(f"<!--><i/{n}>" for n in range(2000)),
        f"<b title={'x' * 500_000}>",
        f"<a title='{'x' * 500_000}'>",
    ],
    ids=["many", "quoted", "both quotes", "behind a comment", "long", "a long link"],
)
def test_elements_that_are_opened_again_in_each_paragraph_cannot_fill_the_memory(
    news: HtmlMail, left_open: str
) -> None:
    with pytest.raises(ValueError, match="octets of elements that are left open"):
        news.apply_styles("<p>" + left_open + "<p>x" * 2000)


def test_some_may_be_left_open(news: HtmlMail) -> None:
    html = news.apply_styles("<p><b title='>1'><b title='>2'>x<p>y" + "<b>z</b>" * 5000 + "<a href=x>x</a>" * 2000)
    assert '<p style="color: red;"><b title=">1"><b title=">2">y' in html


def test_a_long_value_in_the_style_sheet_cannot_fill_the_memory(news: HtmlMail) -> None:
    with pytest.raises(ValueError, match="octets of styles"):
        news.apply_styles("<p>x" * 5000, {"color": "x" * 500_000})


class _Tags(html.parser.HTMLParser):
    def __init__(self, document: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002 - its base has it
        self.seen.append(tag)


@pytest.mark.parametrize(
    "value",
    [
        "red</style><script>alert(1)</script>",
        "red}</STYLE\n><script>",
        "url('</style><script>')",
        "url(</style/><script>)",
        "'\\</style><script>'",
        "red; } </style><script> {",
        '"></style><script>',
        "</</style><script>",
    ],
)
def test_no_value_gets_out_of_the_style_element_nor_of_an_attribute(news: HtmlMail, value: str) -> None:
    Path("style.css").write_text(
        "@import '{{ color }}';\n@media print { p { color: {{ color }} } }\np { color: {{ color }} }\n"
    )
    html = news.apply_styles("<p>x", {"color": value})
    assert _Tags(html).seen == ["html", "head", "style", "body", "p"]
    assert "<script>" in html.partition("</style>")[0]  # it is there, but means nothing


def test_what_css_means_is_not_changed_by_that(news: HtmlMail) -> None:
    css = "@media (400px<=width<700px) { p::before { content: '<\\/style>' } }"
    Path("style.css").write_text(css.replace("\\", ""))
    assert news.load_css() == css
    assert css in news.apply_styles("<p>x")


def test_what_the_library_raises_reaches_the_caller(news: HtmlMail) -> None:
    before = threading.stack_size()
    with pytest.raises(UnicodeEncodeError):
        news.apply_styles("<p>\ud800")
    assert threading.stack_size() == before


def test_pretty_begins_a_line_with_each_block(news: HtmlMail) -> None:
    html = news.render({"name": "Jo"}, "news.md", pretty=True)
    assert '<div class="note">\n<h1>Hello Jo</h1>\n<p style' in html
    Path("value.md").write_text("    code\n\n      more\n\n<p>")
    assert "code\n\n  more\n" in news.render({}, "value.md", pretty=True)


def test_pretty_costs_linear_time() -> None:
    began = time.process_time()
    _pretty('<p title="<pre">' * 20_000 + "x" * 500_000)
    assert time.process_time() - began < 5


# Values.


@pytest.mark.parametrize(
    "value",
    [
        "<script>alert(1)</script>",
        "[click](https://evil.example)",
        "<https://evil.example>",
        "![x](https://evil.example/pixel.png)",
        "# heading",
        "**bold** _it_ `code` ~x~",
        "&copy; &#x41;",
        "back\\slash \\* \\",
        "a | b",
        "1. one",
        "+ a",
        "{{ 7 * 7 }} %(x)s",
        "[ref]: https://evil.example",
        "größe 用户",
    ],
)
def test_a_value_is_text_whatever_it_holds(news: HtmlMail, value: str) -> None:
    html = news.render({"name": value}, "value.md")
    shown = text_of(content(html))
    assert shown == f"{value}\n"
    tags = {part.partition(">")[0].partition(" ")[0] for part in content(html).split("<")[1:]}
    assert tags == {"p", "/p"}


def test_an_indented_value_is_no_code(news: HtmlMail) -> None:
    assert "<code>" not in news.render({"name": "    a*b\n\n\tc"}, "value.md")


def test_no_line_end_in_a_value_makes_code(news: HtmlMail) -> None:
    for end in ("\r", "\r\n", "\n"):
        html = news.render({"name": f"a{end}{end}    *b*{end}{end}\tc"}, "value.md")
        assert "<code>" not in html
        assert text_of(content(html)) == "a\n\n*b*\n\nc\n"


def test_a_value_may_be_markdown_but_never_html(news: HtmlMail) -> None:
    html = news.render({"name": "**b** <script>x</script> [l](javascript:alert(1))"}, "raw.md")
    assert "<strong>b</strong> &lt;script&gt;" in html
    assert 'href="javascript' not in html


def test_values_are_escaped_as_html_for_a_wiki_of_ones_own() -> None:
    own = HtmlMail("style.css", "layout.html", {"site": "x", "color": "red"}, wiki=lambda text: f"<i>{text}</i>")
    assert "<i>&lt;b&gt;*x*\n</i>" in own.render({"name": "<b>*x*"}, "value.md")


def test_an_unknown_variable_is_named(news: HtmlMail) -> None:
    Path("value.md").write_text("{{ nmae }}")
    with pytest.raises(Exception, match="'nmae' is undefined"):
        news.render({}, "value.md")


# Messages.


def test_a_message_has_the_html_and_a_text_made_from_it(news: HtmlMail) -> None:
    message = MailRequest("p", "jo@x.org", "news@y", b"Message-ID: <1@x>\r\n\r\n")
    variables = {"name": "<Jo>", "message": message, "host": "y.org"}
    response = news.respond(variables, "news.md", From="news@%(host)s", To="jo@x.org", Subject="%(name)s")
    assert (response["From"], response["Subject"], response["In-Reply-To"]) == ("news@y.org", "<Jo>", "<1@x>")
    assert "<h1>Hello &lt;Jo&gt;</h1>" in str(response.Html)
    assert response.Body == ("Hello <Jo>\n\nNew things:\n\n- one\n- two\n\na b\n1 2\n\n<Jo> <https://osb.test.com/>\n")


def test_the_content_itself_or_another_template_may_be_the_text(news: HtmlMail) -> None:
    raw = news.respond({"name": "*Jo*"}, "news.md", Body="news.md", From="a@b", To="c@d")
    assert str(raw.Body).startswith("# Hello *Jo*\n\n**New** things:")
    own = news.respond({"name": "Jo"}, "news.md", Body="news.txt", From="a@b", To="c@d")
    assert own.Body == "Hello Jo!\n"


def test_content_shows_images(news: HtmlMail) -> None:
    response = news.respond({}, "logo.md", images={"logo.png": PNG, "logo": PNG}, From="a@b", To="c@d")
    content_id = str(response.embedded[1]["part"]["Content-ID"]).strip("<>")
    assert f'<img src="cid:{content_id}" alt="Our logo">' in str(response.Html)
    assert str(response.Body).startswith("Our logo\n")


def test_without_the_extra_one_line_says_what_to_install(news: HtmlMail, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("css_inline", "markdown_it"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, library, None)
            with pytest.raises(UsageError, match=r"pip install 'lamsonq\[html\]'"):
                news.render({}, "news.md")


def test_nothing_of_the_extra_is_needed_to_import_it() -> None:
    program = (
        "import sys; sys.modules['css_inline'] = sys.modules['markdown_it'] = None; import lamsonq.html, lamsonq.view"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# The text of HTML.


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("", ""),
        ("<p> one\n two </p><p>three", "one two\n\nthree\n"),
        ("a<b>b</b> <i> c</i>", "ab c\n"),
        ("<div><br>a<br><br><br><br>b<br></div>", "a\n\nb\n"),
        ("a<br>b<div>c</div>d", "a\nb\nc\nd\n"),
        ("<head><title>t</title></head><style>p{}</style><script>'</p>'</script>x<!-- y -->z", "xz\n"),
        ("<a href='https://x.org/a?b=1&amp;c=2'>here</a>", "here <https://x.org/a?b=1&c=2>\n"),
        ('<a href="https://x.org/">x.org</a> <a href="mailto:a@b">a@b</a>', "x.org a@b\n"),
        ('<a href="https://x.org"><img src="cid:1" alt=""></a>', "<https://x.org>\n"),
        ('<a href="#top">up</a><a href="javascript:x">no</a>', "upno\n"),
        ('<img alt="a > b" src=x>', "a > b\n"),
        ("<ol><li>a<ul><li>x</ul><li>b</ol>", "1. a\n  - x\n2. b\n"),
        ("<pre>a\n  b</pre>", "a\n  b\n"),
        ("1 &lt; 2 &amp; 3 < 4", "1 < 2 & 3 < 4\n"),
        ("<table><tr><td>a</td><td>b</td></tr><tr><th>c", "a b\nc\n"),
        ("</p></ul></a>a<a", "a\n"),
        (f"a&#{'9' * 5000};b<img alt='&#{'9' * 5000}'>", "a\ufffdb\ufffd\n"),
        ("&#65;&#x42;&#00000000067;&amp;&#1114112;", "ABC&\ufffd\n"),
        ("a<hr>b", f"a\n\n{'-' * 40}\n\nb\n"),
    ],
)
def test_the_text_is_what_a_reader_sees(html: str, text: str) -> None:
    assert text_of(html) == text


@pytest.mark.parametrize(
    "html",
    [
        *("<a " * 100_000, "<" * 300_000, "<!--" * 100_000, "<a '\">" * 50_000, "<title>" * 50_000, "&" * 300_000),
        *("<a href=" + "=x" * 100_000 + ">", "<a x" + " " * 200_000 + ">", "<a href=x>" * 30_000, "<ul><li>" * 20_000),
        *("<style " * 50_000, "<style>" * 50_000, "&#" + "1" * 300_000, "&#1" * 100_000, "<img alt='&#1" * 30_000),
    ],
    ids=itertools.count(),
)
def test_broken_html_costs_linear_time(html: str) -> None:
    began = time.process_time()
    text_of(html)
    assert time.process_time() - began < 5  # tenths of a second; quadratic would be minutes


# The shape of a message.


def shape(message: Any) -> Any:
    """`(subtype of multipart, parts)`, a leaf as its type."""
    if message.is_multipart():
        return message.get_content_subtype(), [shape(part) for part in message.get_payload()]
    return message.get_content_type()


def built(*, text: bool, html: bool, image: bool, attachment: bool, calendar: bool = False) -> MailResponse:
    response = MailResponse(To="a@b", From="c@d", Subject="s", Body="text" if text else None)
    url = response.embed("logo.png", data=PNG) if image else ""
    response.Html = f'<img src="{url}">' if html else None
    if attachment:
        response.attach("x.bin", data=b"\x00\xff\r\n")
    if calendar:
        response.add_alternative("BEGIN:VCALENDAR\r\nSUMMARY:Grüße\r\n", "text/calendar; method=REQUEST")
    return response


def expected(*, text: bool, html: bool, image: bool, attachment: bool, calendar: bool) -> Any:
    related = ("related", ["text/html", "image/png"]) if image else "text/html"
    attached = [*(["image/png"] if image and not html else []), *(["application/octet-stream"] if attachment else [])]
    text = text or not (html or calendar or attached)
    forms = [*(["text/plain"] if text else []), *([related] if html else []), *(["text/calendar"] if calendar else [])]
    whole = [("alternative", forms)] if len(forms) > 1 else forms
    return ("mixed", [*whole, *attached]) if attached else whole[0]


CHOICES = [
    dict(zip(("text", "html", "image", "attachment", "calendar"), c, strict=True))
    for c in itertools.product((False, True), repeat=5)
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "+".join(k for k, v in choice.items() if v) or "nothing")
def test_every_combination_has_its_shape(choice: dict[str, bool]) -> None:
    response = built(**choice)
    message = response.to_message()
    assert shape(message) == expected(**choice)
    parsed = MailRequest("p", None, None, response.to_bytes())
    assert shape(parsed.base) == expected(**choice)
    assert parsed.defects == []
    assert parsed.get_all("mime-version") == ["1.0"]
    assert all(part["mime-version"] is None for part in parsed.walk() if part.message is not parsed.base)
    data = {part.content_type: part.data for part in parsed.all_parts()}
    for kind, octets in (("image/png", PNG), ("application/octet-stream", b"\x00\xff\r\n")):
        assert data.get(kind, octets) == octets
    assert response.to_bytes() == response.to_bytes()


def test_related_names_its_root_and_its_images() -> None:
    response = built(text=True, html=True, image=True, attachment=True)
    related = next(part for part in response.to_message().walk() if part.get_content_subtype() == "related")
    assert related.get_param("type") == "text/html"
    parts: Any = related.get_payload()
    html, image = parts
    content_id = str(image["Content-ID"])
    assert html.get_content().strip() == f'<img src="cid:{content_id[1:-1]}">'
    assert image.get_content_disposition() == "inline"
    assert image.get_filename() == "logo.png"


def test_content_ids_are_unique_also_over_messages() -> None:
    one, two = MailResponse(), MailResponse()
    urls = [response.embed("x.png", data=PNG) for response in (one, one, two)]
    one.clear()
    urls.append(one.embed("x.png", data=PNG))
    assert len(set(urls)) == 4


def test_an_invitation_keeps_its_method_and_its_letters() -> None:
    response = built(text=True, html=True, image=False, attachment=False, calendar=True)
    [calendar] = [p for p in response.to_message().walk() if p.get_content_type() == "text/calendar"]
    assert (calendar.get_param("method"), calendar.get_content_charset()) == ("REQUEST", "utf-8")
    assert calendar.get_content() == "BEGIN:VCALENDAR\r\nSUMMARY:Grüße\r\n"
    assert calendar.get_content_disposition() is None
    with pytest.raises(ValueError, match="no content type"):
        response.add_alternative("x", "calendar")


def test_clear_drops_images_and_attachments_and_keeps_the_texts() -> None:
    response = built(text=True, html=True, image=True, attachment=True)
    response.clear()
    assert (response.attachments, response.embedded) == ([], [])
    assert shape(response.to_message()) == ("alternative", ["text/plain", "text/html"])


def test_a_file_is_embedded_by_its_name(here: Path) -> None:
    (here / "logo.svg").write_bytes(b"<svg/>")
    response = MailResponse(Html="x")
    response.embed(str(here / "logo.svg"))
    response.embed("font.bin", data=b"x", content_type="font/woff2")
    [svg, font] = response.embedded
    assert (svg["filename"], svg["content_type"], svg["data"]) == ("logo.svg", "image/svg+xml", b"<svg/>")
    assert (font["content_type"], font["disposition"]) == ("font/woff2", "inline")
    with pytest.raises(TypeError):
        response.embed()


def test_what_came_in_with_images_goes_out_with_them() -> None:
    came = MailRequest("p", None, None, built(text=True, html=True, image=True, attachment=True).to_bytes())
    response = MailResponse(Body="forwarded")
    response.attach_all_parts(came)
    types = [part.content_type for part in response.all_parts()]
    assert types == ["text/plain", "text/plain", "text/html", "image/png", "application/octet-stream"]
    assert response.attachments[2]["data"] == PNG
