"""JSON over HTTP, with a time-out on the whole of each exchange."""

import contextlib
import json
import socket
import ssl
import threading
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

BUSY = (429, 502, 503, 504)  # statuses of a server that may answer later


class ServerError(RuntimeError):
    """A server could not be reached, or what it answered cannot be used."""


class StatusError(ServerError):
    """A server answered with an error status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class JsonServer:
    """Requests to a server whose answers are JSON.

    A request that may be repeated is, up to `retries` times, when the connection fails or the
    server is busy; any other only when the connection was refused, so that it never ran. A request
    that timed out is not repeated. Raises `ServerError`, naming the address.
    """

    def __init__(self, url: str, *, retries: int, api_key: str | None = None, pause: float = 0.5):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(f"server={url!r} must be an address such as http://localhost:8000")
        self.url = url.rstrip("/")
        self._parts = parts
        self._path = parts.path.rstrip("/")
        self._retries = retries
        self._pause = pause
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str, *, timeout: float) -> Any:
        """The parsed answer to a GET, which may be repeated."""
        return self._ask("GET", path, None, timeout, repeat=True)

    def post(self, path: str, body: Any = None, *, timeout: float, repeat: bool) -> Any:
        """The parsed answer to a POST of JSON; None where there is none."""
        return self._ask("POST", path, body, timeout, repeat)

    def _ask(self, method: str, path: str, body: Any, timeout: float, repeat: bool) -> Any:
        where = f"{method} {self.url}{path}"
        payload = None if body is None else json.dumps(body).encode()
        for attempt in range(self._retries + 1):
            if attempt > 0:
                time.sleep(self._pause * 2 ** (attempt - 1))
            last = attempt == self._retries
            try:
                status, answer = self._exchange(method, path, payload, timeout)
            except TimeoutError:
                raise ServerError(f"{where}: no whole answer within {timeout:g} s") from None
            except (OSError, HTTPException) as error:
                if last or not (repeat or isinstance(error, ConnectionRefusedError)):
                    told = str(error) or type(error).__name__
                    raise ServerError(f"{where}: is the server up? {told}") from error
                continue
            if status in BUSY and repeat and not last:
                continue
            text = answer.decode("utf-8", "replace")
            if status != 200:
                raise StatusError(f"{where}: status {status}: {text[:500]}", status)
            try:
                return json.loads(text) if text.strip() else None
            except ValueError:
                raise ServerError(f"{where}: the answer is no JSON: {text[:200]!r}") from None
        raise AssertionError("unreachable")

    def _exchange(
        self, method: str, path: str, payload: bytes | None, timeout: float
    ) -> tuple[int, bytes]:
        host, port = self._parts.hostname or "", self._parts.port
        connection: HTTPConnection
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            connection = HTTPSConnection(host, port, timeout=timeout, context=context)
        else:
            connection = HTTPConnection(host, port, timeout=timeout)
        # The socket's own time-out starts again with each byte; this one does not.
        late = threading.Event()
        start = time.monotonic()
        connection.connect()
        peer = connection.sock

        def expire() -> None:
            late.set()
            with contextlib.suppress(OSError):  # closed by the other side meanwhile
                peer.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(max(0.0, timeout - (time.monotonic() - start)), expire)
        timer.daemon = True
        timer.start()
        try:
            connection.request(method, self._path + path, payload, self._headers)
            response = connection.getresponse()
            answer = response.read()
        except (OSError, HTTPException):
            if late.is_set():
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()
            connection.close()
        if late.is_set():  # the end of the connection may have looked like the answer's
            raise TimeoutError
        return response.status, answer
