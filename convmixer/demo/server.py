"""Serve the page: the address, and what a browser may fetch for it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from convmixer.demo.classifier import Classifier, open_classifiers
from convmixer.errors import ArgumentError, check_count, optional

HOST, PORT = "127.0.0.1", 7860
# Nothing from other hosts, whatever a library on the page asks for. Gradio's own code is inline and calls eval.
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"


def serve(
    models: Sequence[str] | Mapping[str, str] = (),
    *,
    host: str = HOST,
    port: int = PORT,
    device: str = "auto",
    backends: Sequence[str] | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Open models and serve a page to try them, until Ctrl-C.

    Args:
        models: Names of `create_model`, folders of finished runs of `convmixer train`, or .safetensors files; or a
            mapping from the name that the page shows to one of these. Without any, the weights that ship with the
            package.
        host: Address to listen on. Only this machine reaches the default; "0.0.0.0" stands for all its addresses.
        port: Port to listen on; 0 takes any that is free.
        device: As in `create_model`.
        backends: The backends to time; None: all that can compute a model here except "compile", which compiles for
            minutes.
        report: Called with a line that holds the address of the page.

    Raises:
        ArgumentError: The port is taken, or this machine does not have the address.
        DependencyError: Gradio is not installed.
        ConvMixerError: A model cannot be opened or does not classify pictures, or a backend does not compute it.

    Example:
        >>> from convmixer.demo import serve
        >>> serve(["convmixer_256_8", "runs/flowers"], port=8000)  # doctest: +SKIP
        http://127.0.0.1:8000 (Ctrl-C ends it)
    """
    optional("gradio", "the page", "demo")
    with listen(host, port) as listener:
        app = create_app(models, device=device, backends=backends)
        name, port = listener.getsockname()[:2]
        shown = f"[{name}]" if ":" in name else name
        warning = "" if ipaddress.ip_address(name).is_loopback else "other machines may reach it; "
        report(f"http://{shown}:{port} ({warning}Ctrl-C ends it)")
        with contextlib.suppress(KeyboardInterrupt):
            server(app).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on a host and a port; raise ArgumentError if that is impossible."""
    check_count("port", port, least=0)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError, OverflowError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        advice = "give another port, or 0 for any that is free" if taken else f"the usual ones are {HOST!r} and {PORT}"
        reason = "another program uses this port" if taken else str(error)
        raise ArgumentError(f"cannot listen at host={host!r}, port={port}: {reason}; {advice}") from error


def create_app(
    models: Sequence[str] | Mapping[str, str] = (), *, device: str = "auto", backends: Sequence[str] | None = None
) -> Any:
    """Build the page and the application that serves it. The arguments are those of `serve`."""
    gradio = optional("gradio", "the page", "demo")
    classifiers = open_classifiers(models, device=device, backends=backends)
    # In a thread with a running event loop: without one Gradio creates loops of its own, and leaves them open.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, _mount(gradio, classifiers)).result()


async def _mount(gradio: Any, classifiers: Mapping[str, Classifier]) -> Any:
    """Return an application with the page at its root."""
    import fastapi  # with Gradio

    from convmixer.demo.page import CSS, PHOTOGRAPHS, build_page, theme

    page = build_page(classifiers)
    # Not by Gradio's launch(), which asks a local address through a proxy and can open a tunnel.
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        page,
        path="/",
        theme=theme(),
        css=CSS,
        allowed_paths=[str(PHOTOGRAPHS)],
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
    )
    page.has_launched = True  # as launch() does: until then, a request may name any file of this machine
    app.add_middleware(_OnlyOwnHost)
    return app


def server(app: Any) -> Any:
    """Return the HTTP server of an application. It ends without waiting for the connections of open pages."""
    import uvicorn  # with Gradio

    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))


class _OnlyOwnHost:
    """ASGI middleware whose header keeps browsers from fetching anything from other hosts for this page."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)
