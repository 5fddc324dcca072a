"""A chat-completions endpoint on the loopback interface, for tests of what asks models."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = tuple[int, dict[str, str], str]


class Endpoint:
    """Gives the scripted replies in turn, the last one for ever, or what `answer` makes of a body; keeps requests."""

    def __init__(self) -> None:
        self.replies: list[Reply] = [(200, {}, completion(""))]
        self.answer: Callable[[dict], Reply] | None = None
        self.requests: list[tuple[str, dict[str, str], dict]] = []
        self.delay_s = self.trickle_s = 0.0
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    endpoint.requests.append((self.path, dict(self.headers), body))
                    reply = endpoint.replies[0]
                    if len(endpoint.replies) > 1:
                        endpoint.replies.pop(0)
                status, headers, text = endpoint.answer(body) if endpoint.answer else reply
                time.sleep(endpoint.delay_s)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                for byte in text.encode() if endpoint.trickle_s else ():
                    self.wfile.write(bytes([byte]))
                    time.sleep(endpoint.trickle_s)
                if not endpoint.trickle_s:
                    self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # A client that gave up leaves a broken pipe behind, which is no news here.
        self.server.handle_error = lambda *_: None
        self.base_url = f"http://127.0.0.1:{self.server.server_port}/v1"


def completion(text: str) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@contextmanager
def serving() -> Iterator[Endpoint]:
    """An endpoint for as long as the block lasts."""
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.server.shutdown()
        endpoint.server.server_close()
        thread.join(timeout=5)
