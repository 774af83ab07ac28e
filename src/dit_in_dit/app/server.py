"""The page as a server on this machine, or with a token on another address."""

from __future__ import annotations

import os
import secrets
import socket
import warnings
from collections.abc import Callable
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: no request leaves the machine

import gradio as gr

from dit_in_dit.app.data_screen import DataScreen
from dit_in_dit.app.design_screen import DesignScreen
from dit_in_dit.app.draw_screen import DrawScreen
from dit_in_dit.app.inside_screen import InsideScreen
from dit_in_dit.app.library import Library
from dit_in_dit.app.markup import CSS
from dit_in_dit.app.runs_screen import RunsScreen
from dit_in_dit.app.token_gate import TokenGate, needs_token
from dit_in_dit.config.errors import LeftOutWarning, UserError, check_whole, one_line

HOUR = 3600  # age at which uploaded pictures are deleted
SCREENS: dict[str, Callable[[Library], object]] = {
    "Draw": DrawScreen,
    "Inside": InsideScreen,
    "Design": DesignScreen,
    "Runs": RunsScreen,
    "Data": DataScreen,
}


def build(library: Library) -> gr.Blocks:
    """The page with all screens."""
    with gr.Blocks(title="DiT-in-DiT", analytics_enabled=False, fill_width=True, delete_cache=(HOUR, HOUR)) as page:
        gr.Markdown("# DiT-in-DiT")
        with gr.Tabs():
            for name, screen in SCREENS.items():
                with gr.Tab(name):
                    screen(library)
    return page


def serve(library: Library, host: str = "127.0.0.1", port: int | None = None) -> tuple[gr.Blocks, str]:
    """Serve the page in threads of this process. Returns the page, whose `block_thread()` waits for an interrupt, and
    its address.

    Args:
        host: address to listen at. Any other than this machine's own needs a token, which is part of the address.
        port: None: the first free one from 7860.

    Raises:
        UserError: the address cannot be used.
    """
    warnings.filterwarnings("ignore", category=LeftOutWarning)  # the screen Design shows them beside its fields
    _check_address(host, port)
    token = secrets.token_urlsafe(24) if needs_token(host) else ""
    page = build(library).queue(max_size=64)
    try:
        _, address, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=CSS,
            footer_links=[],
            max_file_size="20mb",
            state_session_capacity=100,
            app_kwargs={"middleware": [_middleware(host, token)]},
            enable_monitoring=False,
            ssr_mode=False,
        )
    except Exception as error:  # gradio has no class of its own for a page that it cannot reach itself
        if not isinstance(error, OSError) and "localhost" not in str(error):
            raise
        way_out = "behind a proxy, set no_proxy=localhost,127.0.0.1"
        raise UserError(f"the page cannot be served at --host {host}: {one_line(str(error))}; {way_out}") from None
    return page, address + (f"?token={token}" if token else "")


def _check_address(host: str, port: int | None) -> None:
    """Refuse what gradio would meet in a thread that never ends."""
    if port is not None:
        check_whole(port, "--port", 1, 65535)
    try:
        family = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port or 0), family=family).close()
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen at --host {host}{f', --port {port}' if port else ''}: {error}") from None


def _middleware(host: str, token: str) -> Any:
    """The token's gate; without a token, only names of this machine are served, so that a page of another site whose
    name leads to 127.0.0.1 (DNS rebinding) cannot use this one."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    if token:
        return Middleware(TokenGate, token=token)
    return Middleware(TrustedHostMiddleware, allowed_hosts=[host, "localhost", "127.0.0.1", "::1", "[::1]"])
