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
   HTML.
2. Nothing is fetched: neither style sheets nor anything else, from the net or from files.
3. HTML never goes out without a text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from lamsonq import view
from lamsonq.errors import UsageError
from lamsonq.mail import MailResponse
from lamsonq.plaintext import tags, text_of

DEPTH_MAX = 200
"""How deep elements may stand in each other: far beyond it the CSS library runs out of stack, and kills the process."""

_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_INDENT = re.compile(r"^(?: {4}| {0,3}\t)[ \t]*", re.MULTILINE)
_CHILDLESS = frozenset(
    {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
)
_ENDS_BY_ITSELF = frozenset({"p", "li", "dt", "dd", "tr", "td", "th", "thead", "tbody", "tfoot", "colgroup", "option"})
_BLOCK = re.compile(
    r"(?<=>)\s*(?=</?(?:html|head|body|style|meta|div|p|h[1-6]|ul|ol|li|table|tbody|tr|td|th|hr)\b)", re.I
)
_KEPT = re.compile(r"(<pre\b.*?</pre\s*>)", re.I | re.S)


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
        """The style sheet."""
        return view.render({**self.variables, **(variables or {})}, self.css_template)

    def apply_styles(self, html: str, variables: Mapping[str, Any] | None = None) -> str:
        """The document with the style sheet, and its own `style` elements, written into its elements.

        Rules that no element can hold (`@media`) stay in the head. Links to style sheets are dropped. Raises ValueError
        for HTML that is nested more than DEPTH_MAX deep.
        """
        try:
            from css_inline import CSSInliner
        except ImportError as error:
            raise _missing("css-inline") from error
        _check_depth(html)
        inliner = CSSInliner(load_remote_stylesheets=False, keep_at_rules=True, extra_css=self.load_css(variables))
        return inliner.inline(html)

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
    return _PUNCTUATION.sub(r"\\\1", _INDENT.sub("   ", str(value)))


def _check_depth(html: str) -> None:
    """Raises ValueError when too many elements are open at once."""
    open_now: Counter[str] = Counter()
    depth = 0
    for tag in tags(html):
        if not tag.name or tag.name in _CHILDLESS or tag.name in _ENDS_BY_ITSELF:
            continue
        if not tag.closes:
            open_now[tag.name] += 1
            depth += 1
        elif open_now[tag.name]:
            open_now[tag.name] -= 1
            depth -= 1
        if depth > DEPTH_MAX:
            raise ValueError(
                f"HTML that is nested more than {DEPTH_MAX} deep cannot be styled; are all elements closed?"
            )


def _pretty(html: str) -> str:
    pieces = _KEPT.split(html)
    pieces[::2] = [_BLOCK.sub("\n", piece) for piece in pieces[::2]]
    return "".join(pieces).strip() + "\n"
