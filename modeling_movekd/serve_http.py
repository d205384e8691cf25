"""A uvicorn server that waits neither for silent clients nor, when it is told to end, for what still runs."""

import asyncio
import os
import threading
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol


# For the head of a request to arrive, from the beginning of the connection or the end of the answer before it. uvicorn
# itself has a limit for the time between requests alone, which the first byte ends.
HEAD_SECONDS = 10
# After a signal, open requests are answered for the first time. After the second the process ends, whatever runs.
ANSWERING_SECONDS = 4
ENDING_SECONDS = 8


class TimedProtocol(H11Protocol):
    """Closes connections that send no whole request in time. The application limits the time of a request's body."""

    _timer: asyncio.TimerHandle | None = None

    def _wait_for_request(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(HEAD_SECONDS, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()


class Server(uvicorn.Server):
    """Ends within `ENDING_SECONDS` of a signal: threads that prepare a request would otherwise be waited for."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        end = threading.Timer(ENDING_SECONDS, os._exit, [128 + sig])
        end.daemon = True
        end.start()


def build_server(app: ASGIApp) -> Server:
    """Build a server for an application."""
    return Server(
        uvicorn.Config(
            app,
            http=TimedProtocol,
            ws="none",
            log_level="warning",
            timeout_graceful_shutdown=ANSWERING_SECONDS,
        )
    )
