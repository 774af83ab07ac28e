"""Pages of a folder in headless chromium: what a script in them finds, and what they ask a server for."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = "/probe.html"  # a page of the test, of the same origin as the folder


@dataclass
class Visit:
    """What the server saw: the value that the probe's script reported, and the paths that were asked for."""

    asked: list[str] = field(default_factory=list)
    value: Any = None
    reported: threading.Event = field(default_factory=threading.Event)


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *arguments: Any, visit: Visit, script: str, **keys: Any) -> None:
        self.visit, self.script = visit, script
        super().__init__(*arguments, **keys)

    def do_GET(self) -> None:
        if self.path == PROBE:
            page = f"<!doctype html><body><script type=module>{self.script}</script>".encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page)
            return
        self.visit.asked.append(self.path)
        super().do_GET()

    def do_POST(self) -> None:
        self.visit.value = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.visit.reported.set()

    def log_message(self, *arguments: Any) -> None:
        """Nothing: the test's output has no lines of the server."""


def visit_folder(folder: Path, script: str, seconds: float = 120) -> Visit:
    """Run a script of a page beside the folder's files; it ends by `report(value)`, with a value of JSON.

    No name but 127.0.0.1 is resolved, so that a page that needs another server fails.
    """
    visit = Visit()
    script = "const report = value => fetch('/', {method: 'POST', body: JSON.stringify(value)});\n" + script
    handler = partial(_Handler, visit=visit, script=script, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        command += ["--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        command += ["--remote-debugging-port=0", f"http://127.0.0.1:{server.server_port}{PROBE}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, **quiet) as browser:
            arrived = visit.reported.wait(seconds)
            browser.terminate()
            browser.wait(20)
    server.shutdown()
    server.server_close()
    assert arrived, f"the page reported nothing in {seconds} s; it asked for {visit.asked}"
    return visit
