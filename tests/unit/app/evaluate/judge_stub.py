"""Serves as a judge on this machine: answers, fails and hangs as it is told."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[BaseHTTPRequestHandler], None]
"""Answers one request."""


class JudgeStub:
    """Answers requests one after the other by a script, then all others by a rule.

    Args:
        script: of the first requests.
        rule: from what the user says to what the judge does.
    """

    def __init__(self, *script: Reply, rule: Callable[[str], str] | None = None) -> None:
        self.script = list(script)
        self.rule = rule or (lambda text: "fine")
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()

    @contextmanager
    def served(self) -> Iterator[str]:
        """Serve within the context; yield the URL."""
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with stub._lock:
                    stub.asked.append({"path": self.path, **json.loads(body)})
                    stub.keys.append(self.headers.get("Authorization"))
                    reply = stub.script.pop(0) if stub.script else None
                if reply is None:
                    reply = says(stub.rule(stub.asked[-1]["messages"][-1]["content"]))
                try:
                    reply(self)
                except OSError:  # whoever asked has gone
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            self.closing.set()
            server.shutdown()
            thread.join()
            server.server_close()

    def hangs(self, handler: BaseHTTPRequestHandler) -> None:
        """Say nothing until the end."""
        self.closing.wait()

    def stalls(self, handler: BaseHTTPRequestHandler) -> None:
        """Begin to answer, and say nothing more until the end."""
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b'{"choices"')
        handler.wfile.flush()
        self.closing.wait()


def sends(body: bytes, *, status: int = 200, **headers: str) -> Reply:
    """Return what sends a status, headers (`_` for `-`) and a body."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def says(text: str) -> Reply:
    """Return what sends an answer in the form of the interface."""
    return sends(json.dumps({"choices": [{"message": {"content": text}}]}).encode())


def closes(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without a word."""
    handler.close_connection = True
