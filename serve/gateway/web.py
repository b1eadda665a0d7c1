"""The HTTP server of the STOW-RS receiver: uvicorn in a thread, with time limits that it lacks."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.gateway.config import GatewayConfig, Web
from serve.gateway.intake import Intake
from serve.gateway.metrics import GatewayMetrics
from serve.gateway.routing import Caller, TurnedAway
from serve.gateway.stow import build_stow_api
from serve.gateway.tls import server_context
from ssacl.data.quiet import quiet_loggers
from ssacl.errors import ServeError

_OPENING_S = 10.0
"""From a connection to its request."""
_LINGER_S = 5.0
_STOP_S = 10


class WebServer:
    """A started receiver.

    Raises
    ------
    ConfigError
        Other machines would be served without access, or a file that is named cannot be used.
    ServeError
        The address is taken or not of this machine.
    """

    def __init__(self, config: GatewayConfig, web: Web, intake: Intake, metrics: GatewayMetrics, turned_away: TurnedAway) -> None:
        # Paths hold Study Instance UIDs.
        quiet_loggers("uvicorn", "uvicorn.error", "uvicorn.access", "python_multipart.multipart")
        tls = web.tls
        settings = uvicorn.Config(
            _Lingering(build_stow_api(config, web, intake, metrics)),
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            # One request a connection: none is held open for nothing.
            headers=[("connection", "close")],
            limit_concurrency=8 * web.max_requests,
            timeout_graceful_shutdown=_STOP_S,
            ssl_context_factory=(lambda *_: _watched(server_context(tls), turned_away)) if tls else None,
        )
        settings.load()
        try:
            listener = socket.create_server((web.host, web.port), family=socket.AF_INET6 if ":" in web.host else socket.AF_INET)
        except OSError as error:
            raise ServeError(f"Cannot listen on {web.host}:{web.port}. Choose another web.host or web.port.") from error
        self.port = int(listener.getsockname()[1])
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="ssacl-web", daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)
        if not self._server.started:
            raise ServeError("The STOW-RS receiver did not start. Look at the log, and try it without `web`.")

    def stop(self) -> None:
        """Take no more; requests in hand may end."""
        self._server.should_exit = True
        self._thread.join(2 * _STOP_S)


def _watched(context: ssl.SSLContext, turned_away: TurnedAway) -> ssl.SSLContext:
    """Handshakes that fail are told of: the event loop drops them without a word, and their address with them."""

    class Handshake(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError:
                turned_away("tls", Caller("", "stow-rs"))
                raise

    context.sslobject_class = Handshake
    return context


class _Connection(H11Protocol):
    """Ends when no request has come in time: uvicorn would wait for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(_OPENING_S, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None:
            self.transport.close()


class _Lingering:
    """Reads the rest of a refused body for a while before the refusal is sent: a client in the midst of sending would not see it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A client that asks first has sent nothing yet.
        ended = any(name == b"expect" for name, _ in scope["headers"])

        async def tracked() -> Message:
            nonlocal ended
            message = await receive()
            ended = not message.get("more_body", False)
            return message

        async def lingering(message: Message) -> None:
            if message["type"] == "http.response.start":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LINGER_S):
                        while not ended:
                            await tracked()
            await send(message)

        await self._app(scope, tracked, lingering)
