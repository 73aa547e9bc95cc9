"""The headers of mailing lists and newsletters, and the way out of them (RFC 2369, 2919, 8058).

    news = MailingList("news.example.org", "The news", secret=secret, unsubscribe="https://example.org/leave")
    news.mark(message, "joe@y.org")

Rules:

1. Every recipient gets a link of his own, whose token says who he is and for which list, and which nobody else can
   make. It does not expire: an old mail must still be good for leaving (RFC 8058 section 3.1 asks for no login).
2. One click is an HTTPS POST with `List-Unsubscribe=One-Click`; a GET changes nothing, because scanners follow links.
3. Both headers of it are signed by what signs the message (lamsonq.signing), as RFC 8058 section 4 demands.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from urllib.parse import parse_qs, quote, urlsplit

from lamsonq.address import canonical, is_path_address
from lamsonq.errors import SettingsError
from lamsonq.headers import check_value, encoded_words
from lamsonq.response import MailResponse
from lamsonq.verp import octets_of, token_of

ONE_CLICK = "List-Unsubscribe=One-Click"
"""The body of the POST, and the value of List-Unsubscribe-Post (RFC 8058 section 3.1)."""

BODY_MAX = 64 * 1024
TOKEN_MAX = 2000
LETTERS = 24
_list_id = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)+")
_url = re.compile(r"[!-;=?-~]+")
_form_field = re.compile(
    rb'\r?\nContent-Disposition:[^\r\n]*\bname="?List-Unsubscribe"?[^\r\n]*(?:\r?\n[^\r\n]+)*\r?\n\r?\nOne-Click\r?\n--',
    re.IGNORECASE,
)


class MailingList:
    """A list by its `id` (RFC 2919: a name with dots, under a domain of yours) and what its headers say.

    `unsubscribe` is the HTTPS address of your web app, which gets the token as `?token=...`; `unsubscribe_mail` an
    address that takes the same by mail, with the token in the subject. `post` is an address (or "NO", RFC 2369 section
    3.4), `help`, `archive`, `owner` and `subscribe` are addresses or URLs. Raises SettingsError.
    """

    def __init__(
        self,
        id: str,
        name: str = "",
        *,
        secret: str | bytes,
        unsubscribe: str = "",
        unsubscribe_mail: str = "",
        post: str = "",
        help: str = "",
        archive: str = "",
        owner: str = "",
        subscribe: str = "",
    ) -> None:
        if not _list_id.fullmatch(id) or len(id) > 255:
            raise SettingsError(f"MailingList: {id!r} is no list id: a name with dots, as news.example.org")
        if not (unsubscribe or unsubscribe_mail):
            raise SettingsError(f"MailingList {id}: nobody can leave it: unsubscribe='https://...'")
        if unsubscribe and urlsplit(unsubscribe).scheme != "https":
            raise SettingsError(f"MailingList {id}: unsubscribe={unsubscribe!r}: one click needs https (RFC 8058)")
        if unsubscribe_mail and not is_path_address(unsubscribe_mail):
            raise SettingsError(f"MailingList {id}: unsubscribe_mail={unsubscribe_mail!r} is no address")
        self.id = id
        self.name = check_value("List-Id", name)
        self.unsubscribe = _link(unsubscribe)
        self.unsubscribe_mail = unsubscribe_mail
        links = {"Help": help, "Subscribe": subscribe, "Post": post, "Owner": owner, "Archive": archive}
        self._links = {f"List-{word}": link for word, link in links.items() if link}
        self._headers = {header: self._shown(link) for header, link in self._links.items()}
        self._secret = octets_of(secret)

    def headers(self, recipient: str) -> dict[str, str]:
        """The headers of a message of this list to this recipient. Raises ValueError for what is no address."""
        token = self.token(recipient)
        ways = []
        if self.unsubscribe:
            ways.append(f"<{self.unsubscribe}{'&' if '?' in self.unsubscribe else '?'}token={token}>")
        if self.unsubscribe_mail:
            ways.append(f"<mailto:{_quoted(self.unsubscribe_mail)}?subject=unsubscribe%20{token}>")
        found = {"List-Id": self._identity(), **self._headers, "List-Unsubscribe": ", ".join(ways)}
        return {**found, "List-Unsubscribe-Post": ONE_CLICK} if self.unsubscribe else found

    def mark(self, response: MailResponse, recipient: str) -> MailResponse:
        """Put the headers onto a message for this one recipient; the message."""
        response.update(self.headers(recipient))
        return response

    def token(self, recipient: str) -> str:
        """What stands in this recipient's links. Raises ValueError for what is no address."""
        if not is_path_address(recipient):
            raise ValueError(f"{recipient!r} is no address")
        recipient = canonical(recipient)
        name = base64.urlsafe_b64encode(recipient.encode()).decode().rstrip("=")
        return f"{name}.{token_of(self._secret, 'unsubscribe', self.id, recipient, letters=LETTERS)}"

    def member(self, token: str) -> str | None:
        """Whose token this is; None for one that is not of this list."""
        name, _, proof = token.rpartition(".")
        if not name or len(token) > TOKEN_MAX or not token.isascii():
            return None
        try:
            recipient = base64.urlsafe_b64decode(name + "=" * (-len(name) % 4)).decode()
        except (ValueError, binascii.Error):  # UnicodeDecodeError is a ValueError
            return None
        made = token_of(self._secret, "unsubscribe", self.id, recipient, letters=LETTERS)
        return recipient if hmac.compare_digest(proof, made) else None

    def unsubscribed(self, token: str, body: bytes) -> str | None:
        """Who leaves with this POST: `token` of its URL, and its body. None when it is no one-click, or forged.

        The body is a form of either kind, urlencoded or multipart (RFC 8058 section 3.2).
        """
        return self.member(token) if is_one_click(body) else None

    def _identity(self) -> str:
        if not self.name:
            return f"<{self.id}>"
        name = encoded_words(self.name) if not self.name.isascii() else self.name
        return f'"{_escaped(name)}" <{self.id}>' if self.name.isascii() else f"{name} <{self.id}>"

    def _shown(self, link: str) -> str:
        if link == "NO" and link == self._links.get("List-Post"):
            return "NO"
        return f"<mailto:{_quoted(link)}>" if is_path_address(link) else f"<{_link(link)}>"


def is_one_click(body: bytes) -> bool:
    """Whether this is the body of a one-click POST."""
    if len(body) > BODY_MAX:
        return False
    if body.lstrip().startswith(b"--"):
        return _form_field.search(body) is not None
    try:
        form = parse_qs(body.decode("ascii").strip(), max_num_fields=100)
    except ValueError:
        return False
    return form.get("List-Unsubscribe") == ["One-Click"]


def _link(url: str) -> str:
    """A URL that can stand in angle brackets. Raises SettingsError."""
    if url and not (_url.fullmatch(url) and urlsplit(url).scheme in ("https", "http", "mailto", "ftp")):
        raise SettingsError(f"MailingList: {url!r} is neither an address nor a URL")
    return url


def _quoted(address: str) -> str:
    return quote(address, safe="@!$'*+-._~")


def _escaped(name: str) -> str:
    return name.replace("\\", "\\\\").replace('"', '\\"')
