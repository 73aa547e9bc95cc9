"""HTML mail from Markdown: content, layout and style sheet are three templates.

    NEWS = HtmlMail("style.css", "layout.html", {"site": "osb.test.com"})

    @route("news@(host)")
    def START(message, host=None):
        relay.deliver(NEWS.respond({"name": "Jo"}, "news.md", From="news@%(host)s", To=message.From, Subject="News"))

`news.md` is Markdown with Jinja2 in it, `layout.html` shows the result as `{{ content }}`, and the style sheet is
written into the elements, because mail readers drop style sheets. Needs `pip install 'lamsonq[html]'`.

Rules:

1. Values are data: in the Markdown they are text, whatever they hold, and HTML in the Markdown is shown, not obeyed.
   `{{ value|safe }}` lets a value be Markdown; HTML it never is. With a `wiki` of one's own values are escaped as
   HTML. In the style sheet a value is CSS: it can spoil the looks, but never end the `style` element.
2. Nothing is fetched: neither style sheets nor anything else, from the net or from files.
3. HTML never goes out without a text.
4. No HTML can crash the process. The CSS library recurses into the elements, and how deep those stand, and how many
   they are, only a browser's parser can tell. So what bounds it is what every parser agrees on: how often `<` stands
   before a letter or a slash.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import lru_cache
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from lamsonq import view
from lamsonq.errors import UsageError
from lamsonq.mail import MailResponse
from lamsonq.plaintext import text_of

LENGTH_MAX = 1_000_000
"""Characters of a document. Mail readers cut it off long before (Gmail at 102 kB); images go beside it (`images=`)."""

TAGS_MAX = 20_000
"""Tags of a document, opening and closing ones."""

REOPENED_MAX = 512 * 1024 * 1024
"""Octets that elements which are not closed where they should be may take: see `_reopened`."""

STYLES_MAX = 2 * 1024 * 1024 * 1024
"""Octets that the style sheet may take when all of it is written into each element."""

_STACK = 1024 * 1024
_STACK_PER_TAG = 8 * 1024
"""What the library needs was measured: 840 octets for an element, and two tags can make four (`<table><td>`)."""

_TAG = re.compile(r"<[a-zA-Z/]")
_END_TAG = re.compile(r"</(?=[a-zA-Z])")
_FORMATTING = re.compile(r"<(a|b|big|code|em|font|i|nobr|s|small|strike|strong|tt|u)(?=[ \t\r\n\f/>])", re.I)
_ATTRIBUTES = re.compile(  # as the HTML standard reads them: a value in quotes may hold ">"
    r"""(?:[ \t\r\n\f/]*+[^ \t\r\n\f/>][^ \t\r\n\f/>=]*+
    (?:[ \t\r\n\f]*+=[ \t\r\n\f]*+(?:"[^"]*+"?|'[^']*+'?|[^ \t\r\n\f>"'][^ \t\r\n\f>]*+)?)?)*+""",
    re.VERBOSE,
)
_ELEMENT = 400
"""Octets of memory that an element takes."""

_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_LINE_END = re.compile(r"\r\n?")
_INDENT = re.compile(r"^(?: {4}| {0,3}\t)[ \t]*", re.MULTILINE)
_BLOCK = re.compile(
    r"(?<=>)\s*(?=</?(?:html|head|body|style|meta|div|p|h[1-6]|ul|ol|li|table|tbody|tr|td|th|hr)\b)", re.I
)
_KEPT = re.compile(r"(<pre\b.*?(?:</pre\s*>|\Z))", re.I | re.S)


class HtmlMail:
    """Messages in one style.

    `css_template`, `html_template` and each content are names of templates in `view.LOADER`. `variables` are for all
    three. `wiki` makes HTML of the content's text; Markdown (CommonMark with tables) when it is not given.

    Source: Lamson's `html.HtmlMail`; its style sheets were CleverCSS, these are CSS.
    """

    def __init__(
        self,
        css_template: str,
        html_template: str,
        variables: Mapping[str, Any] | None = None,
        wiki: Callable[[str], str] | None = None,
    ) -> None:
        self.css_template = css_template
        self.html_template = html_template
        self.variables = dict(variables or {})
        self.wiki = wiki or _markdown

    def load_css(self, variables: Mapping[str, Any] | None = None) -> str:
        """The style sheet, as it may stand in a `style` element: `</` is `<\\/`, which is the same in CSS."""
        return _END_TAG.sub(r"<\/", view.render({**self.variables, **(variables or {})}, self.css_template))

    def apply_styles(self, html: str, variables: Mapping[str, Any] | None = None) -> str:
        """The document with the style sheet, and its own `style` elements, written into its elements.

        Rules that no element can hold (`@media`) stay in the head. Links to style sheets are dropped. Raises ValueError
        for what is beyond LENGTH_MAX, TAGS_MAX, REOPENED_MAX or STYLES_MAX.
        """
        try:
            from css_inline import CSSInliner
        except ImportError as error:
            raise _missing("css-inline") from error
        css = self.load_css(variables)
        tags = _checked_tags(html, css)
        inliner = CSSInliner(load_remote_stylesheets=False, keep_at_rules=True, extra_css=css)
        return _with_stack(_STACK + _STACK_PER_TAG * tags, lambda: inliner.inline(html))

    def render(self, variables: Mapping[str, Any], content_template: str, pretty: bool = False) -> str:
        """The document: content in layout, styled. `pretty` begins a new line with each block, for people to read."""
        variables = {**self.variables, **variables}
        source = _escaping(view.environment(), self.wiki is _markdown).get_template(content_template).render(variables)
        content = Markup(self.wiki(source))
        html = self.apply_styles(view.render({**variables, "content": content}, self.html_template), variables)
        return _pretty(html) if pretty else html

    def respond(
        self,
        variables: Mapping[str, Any],
        content: str,
        *,
        Body: str | None = None,
        images: view.Images | None = None,
        **headers: str,
    ) -> MailResponse:
        """A message with this content as HTML, and as text.

        `Body` is the template of the text; the name of the content itself sends its Markdown as it is. Without it the
        text is made from the HTML. `images` and `headers` are as in `view.respond`.
        """
        response = MailResponse()
        variables = {**self.variables, **variables}
        if images:
            variables["images"] = view.embed(response, images)
        response.Html = self.render(variables, content)
        response.Body = view.render(variables, Body) if Body is not None else text_of(response.Html)
        view.complete(response, variables, headers)
        return response


def _missing(library: str) -> UsageError:
    return UsageError(f"HTML mail needs {library}: pip install 'lamsonq[html]'")


def _markdown(source: str) -> str:
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise _missing("markdown-it-py") from error
    # HTML of whoever wrote the source is shown as text.
    html: str = MarkdownIt("commonmark", {"html": False}).enable("table").render(source)
    return html


@lru_cache(maxsize=4)
def _escaping(environment: Environment, markdown: bool) -> Environment:
    """The same templates, but what is put into them is escaped: for Markdown, else as HTML."""
    if markdown:
        return environment.overlay(autoescape=False, finalize=_escaped)
    return environment.overlay(autoescape=True)


def _escaped(value: object) -> object:
    """The value as text that Markdown leaves alone: no indented code, a backslash before each punctuation character."""
    if hasattr(value, "__html__"):
        return value
    lines = _LINE_END.sub("\n", str(value))
    return _PUNCTUATION.sub(r"\\\1", _INDENT.sub("   ", lines))


def _checked_tags(html: str, css: str) -> int:
    """How many tags there are, at the most. Raises ValueError when the library had better not see this."""
    _check(len(html), LENGTH_MAX, "characters")
    tags = len(_TAG.findall(html))
    _check(tags, TAGS_MAX, "tags")
    _check(tags * _reopened(html), REOPENED_MAX, "octets of elements that are left open")
    _check(tags * len(css), STYLES_MAX, "octets of styles")
    return tags


def _check(count: int, limit: int, of: str) -> None:
    if count > limit:
        raise ValueError(f"HTML of {count} {of} cannot be styled, {limit} are the most; are all elements closed?")


def _reopened(html: str) -> int:
    """Octets that may come with each tag: a `<b>` or `<font>` that a paragraph leaves open is opened again in the next
    one, and in all that follow (the HTML standard's list of active formatting elements).

    That list holds three of those that are the same, and one `<a>`. A tag is looked at wherever it may begin, because
    what is a comment, a script or a value to us need not be one to another parser.
    """
    tags: set[str] = set()
    link = read = 0
    for found in _FORMATTING.finditer(html):
        attributes = _ATTRIBUTES.match(html, found.end())
        tag = found[0] + (attributes[0] if attributes else "")
        read += len(tag)
        if read > 16 * LENGTH_MAX:
            raise ValueError("HTML with so many quotes that are not closed cannot be styled")
        if found[1] in "aA":
            link = max(link, len(tag))
        else:
            tags.add(tag)
    return link + sum(3 * (_ELEMENT + len(tag)) for tag in tags)


def _with_stack(octets: int, function: Callable[[], str]) -> str:
    """What the function returns or raises, called in a thread that has a stack of this size."""
    result: Future[str] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:  # for who waits for it, whatever it is
            result.set_exception(error)

    thread = threading.Thread(target=run, name="lamsonq-html", daemon=True)
    with _starting:
        before = threading.stack_size(-(-octets // _PAGE) * _PAGE)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    return result.result()


_starting = threading.Lock()
"""The size of stacks is one setting for the whole process. Who starts another thread just then gets a large stack: that
is address space, not memory."""
_PAGE = 64 * 1024


def _pretty(html: str) -> str:
    pieces = _KEPT.split(html)
    pieces[::2] = [_BLOCK.sub("\n", piece) for piece in pieces[::2]]
    return "".join(pieces).strip() + "\n"
