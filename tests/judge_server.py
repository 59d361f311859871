"""A small OpenAI-compatible chat endpoint in this process, on the loopback interface, for judge tests.

``answer(text, number)`` gets the prompt of each request and its count and returns a reply text, or a :class:`Fault`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An answer that is no reply: a status and body, a reply cut short, any bytes, or a closed connection (status 0)."""

    status: int = 200
    message: str = "fault"
    content: str | None = None
    finish: str = "stop"
    raw: bytes | None = None  # a body that is no reply at all
    headers: dict[str, str] = field(default_factory=lambda: {"retry-after-ms": "1"})


@dataclass(slots=True)
class JudgeServer:
    url: str
    texts: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def judge_server(answer: Callable[[str, int], str | Fault], delay: float = 0.0) -> Iterator[JudgeServer]:
    """Serves until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            text = body["messages"][-1]["content"]
            with state.lock:
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
                state.texts.append(text)
                state.bodies.append(body)
                state.keys.append(self.headers.get("authorization", ""))
                state.headers.append({name.lower(): value for name, value in self.headers.items()})
                number = len(state.texts)
            time.sleep(delay)
            given = answer(text, number)
            with state.lock:
                state.at_once -= 1
            self.send(given if isinstance(given, Fault) else Fault(content=given))

        def send(self, given: Fault) -> None:
            if given.status == 0:
                self.connection.close()
                self.close_connection = True
                return
            choice = {
                "index": 0,
                "finish_reason": given.finish,
                "message": {"role": "assistant", "content": given.content},
            }
            reply = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "judge-2026-01-01",
                "choices": [choice],
            }
            reply["usage"] = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
            data = json.dumps(reply if given.status == 200 else {"error": {"message": given.message}}).encode()
            data = data if given.raw is None else given.raw
            self.send_response(given.status)
            for name, value in given.headers.items():
                self.send_header(name, value)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # connections that a test closes on purpose

    server = Server(("127.0.0.1", 0), Handler)
    state = JudgeServer(url=f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
