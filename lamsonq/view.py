"""Messages from templates.

`respond("page_ready.msg", locals())` takes everything from one template: header lines, an empty line, the text.
`respond(locals(), Body="x.msg", From="%(me)s", ...)` is Lamson's form: texts from templates, headers from arguments.

Rules:

1. A template is trusted, what is put into it is not: header lines are rendered one by one, and a line end in a value
   becomes a space, so no value can make another header.
2. Values are never templates. Templates of `.html` files escape them.
3. HTML never goes out without a text: where no Body is given, it is made from the HTML.
4. Images that the HTML shows are in the message (`images=`); templates name them `{{ images.logo }}`.
5. A message that is made while there is a `message` among the variables is a program's, written because of that one,
   and says so: rule 6 of lamsonq/response.py. A template of what a person writes has the line `Auto-Submitted: no`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, overload

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, select_autoescape
from jinja2.sandbox import SandboxedEnvironment

from lamsonq.errors import UsageError
from lamsonq.headers import check_name
from lamsonq.mail import MailRequest, MailResponse
from lamsonq.plaintext import text_of

LOADER: Environment | None = None
"""Where templates come from; a boot file sets it."""

Variables = Mapping[str, Any]
Images = Mapping[str, str | os.PathLike[str] | bytes]


def templates(*folders: str) -> Environment:
    """What `LOADER` is set to: the templates in these folders, the first one that has a name wins.

    An unknown variable in a template is an error that names it.
    """
    return SandboxedEnvironment(
        loader=FileSystemLoader(folders),
        autoescape=select_autoescape(["html", "htm", "xhtml"], default_for_string=False),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )


def load(template: str) -> Template:
    """The template of this name. Raises UsageError when no LOADER is set, jinja2.TemplateNotFound."""
    return environment().get_template(template)


def render(variables: Variables, template: str) -> str:
    """The text of the template of this name."""
    return load(template).render(variables)


@overload
def respond(
    variables: str,
    Body: Variables,
    Html: str | None = None,
    *,
    images: Images | None = None,
    **headers: str,
) -> MailResponse: ...


@overload
def respond(
    variables: Variables,
    Body: str | None = None,
    Html: str | None = None,
    *,
    images: Images | None = None,
    **headers: str,
) -> MailResponse: ...


def respond(
    variables: str | Variables,
    Body: str | Variables | None = None,
    Html: str | None = None,
    *,
    images: Images | None = None,
    **headers: str,
) -> MailResponse:
    """A message from templates: `respond("x.msg", variables)` or `respond(variables, Body="x.txt", From=...)`.

    The values of `headers` are filled with `% variables`; an underscore in a name stands for the hyphen. A `.msg`
    without a To answers the sender of `variables["message"]`. `images` are shown by the Html template:
    `images={"logo": "app/data/logo.png", "chart.png": png}` are `{{ images.logo }}` and `{{ images["chart.png"] }}`.
    Raises UsageError when something is missing.

    Source: Lamson's and Salmon's `view.respond`.
    """
    msg = variables if isinstance(variables, str) else None
    if msg is not None and isinstance(Body, str):
        raise UsageError("view.respond: a .msg has its own text; Body= goes with the form without a .msg")
    if msg is None and not isinstance(Body, str | None):
        raise TypeError("view.respond: the variables come first and alone, or behind the name of a .msg")
    known: Variables = {}
    for given in (variables, Body):
        known = known if given is None or isinstance(given, str) else given
    response = MailResponse()
    if images and Html is None:
        raise UsageError("view.respond: images= are shown by an Html template; attach(...) is for files")
    if images:
        known = {**known, "images": embed(response, images)}
    if msg is not None:
        read_msg(response, msg, known)
    elif isinstance(Body, str):
        response.Body = render(known, Body)
    elif Html is None:
        raise UsageError("view.respond needs a template: Body=..., Html=..., or both")
    complete(response, known, headers)
    if msg is not None:
        _check_addressed(response, msg)
    if Html is not None:
        response.Html = render(known, Html)
        if response.Body is None:
            response.Body = text_of(response.Html)
    return response


def embed(response: MailResponse, images: Images) -> dict[str, str]:
    """Put images into a message: name -> the `cid:` URL by which its HTML shows it.

    The value is a file's path, or the bytes of an image, whose name tells its type. Raises what MailResponse.embed
    raises.
    """
    return {
        name: response.embed(name, image) if isinstance(image, bytes) else response.embed(os.fspath(image))
        for name, image in images.items()
    }


def complete(response: MailResponse, variables: Variables, headers: Mapping[str, str]) -> None:
    """Fill and set headers, and say that `variables["message"]` is the reason for this message, if there is one."""
    response.update(_filled(headers, variables))
    message = variables.get("message")
    if isinstance(message, MailRequest):
        response.original = message


def read_msg(response: MailResponse, template: str, variables: Variables) -> None:
    """Fill a message with the headers and the text of a `.msg`. Raises UsageError."""
    head, body = _split(template)
    for number, line in enumerate(head.splitlines(), 1):
        name, colon, value = line.partition(":")
        try:
            if not colon:
                raise ValueError("a header line is `Name: value`; an empty line ends the headers")
            response[check_name(name.strip())] = _one_line(environment().from_string(value).render(variables)) or None
        except ValueError as problem:
            raise UsageError(f"template {template}, line {number}: {problem}") from problem
    response.Body = environment().from_string(body).render(variables)
    message = variables.get("message")
    if "To" not in response and isinstance(message, MailRequest):
        response["To"] = message.From or None


def has_headers(template: str) -> bool:
    """Whether a template begins with headers, as a `.msg` does: lines `Name: value`, From or Subject among them."""
    if getattr(environment(), "loader", None) is None:  # another kind of LOADER: it only renders
        return False
    names = [line.partition(": ")[0] for line in _split(template)[0].splitlines()]
    return {"From", "Subject"} & set(names) != set() and all(name.replace("-", "").isalpha() for name in names)


def attach(
    msg: MailResponse,
    variables: Variables,
    template: str,
    filename: str | None = None,
    content_type: str | None = None,
    disposition: str | None = None,
) -> None:
    """Attach a rendered template; its type is guessed from `filename`, else from the template's name."""
    text = render(variables, template)
    msg.attach(filename=filename or template, content_type=content_type, data=text, disposition=disposition)


def environment() -> Environment:
    """`LOADER`. Raises UsageError when none is set."""
    if LOADER is None:
        raise UsageError(
            'no templates: put the line  view.LOADER = view.templates("app/templates")  into the boot file '
            "(and `from lamsonq import view` above it)"
        )
    return LOADER


def _filled(headers: Mapping[str, str], variables: Variables) -> dict[str, str]:
    filled = {}
    for name, value in headers.items():
        try:
            filled[name.replace("_", "-")] = _one_line(value % variables)
        except (KeyError, TypeError, ValueError) as problem:
            raise UsageError(f"view.respond: {name}={value!r} cannot be filled: {problem!r}") from problem
    return filled


def _check_addressed(response: MailResponse, template: str) -> None:
    nobody = response.original is not None and not response.original.From  # an answer to the null sender: not sent
    for name in ("From", "To"):
        if name not in response and not (name == "To" and nobody):
            raise UsageError(
                f"template {template} has no {name}: line, so nobody knows whom the message is {name.lower()}"
            )


def _split(template: str) -> tuple[str, str]:
    """The header lines and the text behind the first empty line, both as they stand in the template."""
    loader = environment()
    if loader.loader is None:
        raise UsageError("view.LOADER has no loader of its own: use view.templates(folder)")
    source = loader.loader.get_source(loader, template)[0].replace("\r\n", "\n")
    head, _, body = source.partition("\n\n")
    return head, body


def _one_line(value: str) -> str:
    return " ".join(value.split())
