"""Asks a judge behind an endpoint with OpenAI's interface for conversations.

Nothing but the standard library is used. The key stands in one header, and nowhere else: not in
messages, whatever a server answers, and not in another server's log, because redirects are refused.
"""

import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.trainer.errors import ConfigError, DataError

Messages = Sequence[Mapping[str, str]]
"""Turns of a conversation, each with role and content."""

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_MOST_REPLY_BYTES = 1 << 22
_CHUNK = 1 << 16
_TRANSIENT = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may succeed."""
_LONGEST_PAUSE = 60.0


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """Says where a judge is, and how patient to be."""

    url: str
    """Up to `/chat/completions`."""
    model: str
    """Name of the judge there."""
    key: str | None = field(default=None, repr=False)
    """Sent as a bearer token; None sends none."""
    seconds: float = 120.0
    """Of one try, from the request to the last byte."""
    retries: int = 5
    """Further tries after a failure that may pass."""
    concurrency: int = 8
    """Requests side by side."""

    def __post_init__(self) -> None:
        """Refuse an address that is none, and to send a key in the clear."""
        try:
            parts = urllib.parse.urlsplit(self.url)
            host = parts.hostname
        except ValueError:
            parts, host = urllib.parse.urlsplit(""), None
        if parts.scheme not in ("http", "https") or not host or parts.username is not None:
            # It may hold a password, which must not be shown.
            raise ConfigError(
                "--judge-url must be http://HOST... or https://HOST... without a name and password;"
                " give for example http://localhost:8000/v1"
            )
        if self.key is not None and parts.scheme == "http" and host not in _LOOPBACK:
            raise ConfigError(
                f"--judge-url is {self.url}, where the key would travel unencrypted; use https, or"
                " give no key"
            )
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise ConfigError(
                "the judge's key has characters that no header may have; check the file or variable"
                " that holds it"
            )


class ChatEndpoint:
    """Asks a judge, again where that may help; threads may share it.

    Args:
        settings: where it is.
        pause: waits some seconds between tries, or until it is stopped.
    """

    def __init__(
        self, settings: JudgeSettings, *, pause: Callable[[float], object] | None = None
    ) -> None:
        self._settings = settings
        self._stopped = threading.Event()
        self._pause = self._stopped.wait if pause is None else pause
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if urllib.parse.urlsplit(settings.url).hostname in _LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def stop(self) -> None:
        """Let no further try begin."""
        self._stopped.set()

    def ask(self, messages: Messages, *, max_tokens: int) -> str:
        """Return what the judge answers at temperature 0.

        Raises:
            DataError: it refuses, or all tries have failed; then no further try begins.
            JudgeStoppedError: one failed before.
        """
        try:
            return self._ask(messages, max_tokens)
        except DataError:
            self.stop()
            raise

    def _ask(self, messages: Messages, max_tokens: int) -> str:
        body = {
            "model": self._settings.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        data = json.dumps(body).encode()
        reason = ""
        for number in range(self._settings.retries + 1):
            if self._stopped.is_set():
                raise JudgeStoppedError("the judge is not asked any more")
            try:
                return _content(self._post(data))
            except _TransientError as error:
                reason = self._shown(str(error))
                wait = error.retry_after if error.retry_after is not None else 2.0**number
            if number < self._settings.retries:
                self._pause(min(wait, _LONGEST_PAUSE))
        raise DataError(
            f"the judge at {self._settings.url} failed {self._settings.retries + 1} times, at last:"
            f" {reason}; judgements so far are kept: see to the judge, and start again with the"
            " same --output"
        )

    def _post(self, data: bytes) -> bytes:
        """Return the body of the reply.

        Raises:
            _TransientError: another try may succeed.
            DataError: none will.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._settings.key is not None:
            headers["Authorization"] = f"Bearer {self._settings.key}"
        request = urllib.request.Request(
            f"{self._settings.url.rstrip('/')}/chat/completions", data=data, headers=headers
        )
        deadline = time.monotonic() + self._settings.seconds
        try:
            with self._opener.open(request, timeout=self._settings.seconds) as reply:
                return _read(reply, deadline)
        except urllib.error.HTTPError as error:
            with error:
                shown = f"status {error.code}: {_beginning(error)}"
                if error.code in _TRANSIENT or error.code >= 500:
                    wait = error.headers.get("Retry-After", "")
                    raise _TransientError(
                        shown, float(wait) if wait.isdecimal() else None
                    ) from None
            raise DataError(
                f"the judge at {self._settings.url} refuses: {self._shown(shown)}; check"
                " --judge-url, --judge-model and the key"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise _TransientError(f"{type(error).__name__}: {error}") from None

    def _shown(self, text: str) -> str:
        """Return a text of the server without the key, should it say it."""
        return text if self._settings.key is None else text.replace(self._settings.key, "***")


class JudgeStoppedError(DataError):
    """Reports that another question has failed before this one was asked."""


class _TransientError(Exception):
    """Reports what may not happen again.

    Args:
        reason: for the user.
        retry_after: seconds that the server asks to wait.
    """

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the next server would get the key."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse."""
        return None


def _read(reply: http.client.HTTPResponse, deadline: float) -> bytes:
    """Read a body that may be long or slow."""
    found = bytearray()
    while chunk := reply.read1(_CHUNK):
        found += chunk
        if len(found) > _MOST_REPLY_BYTES:
            raise _TransientError(f"its reply has more than {_MOST_REPLY_BYTES >> 20} MiB")
        if time.monotonic() > deadline:
            raise _TransientError("its reply did not end in time")
    return bytes(found)


def _beginning(error: urllib.error.HTTPError) -> str:
    """Return how the body of an error begins."""
    try:
        return error.read(1000).decode("utf-8", errors="replace").strip()
    except (OSError, http.client.HTTPException):
        return ""


def _content(reply: bytes) -> str:
    """Return the text of the answer in a reply."""
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        content = None
    if not isinstance(content, str):
        start = reply[:200].decode("utf-8", errors="replace")
        raise _TransientError(f"its reply has no choices[0].message.content: {start!r}")
    return content
