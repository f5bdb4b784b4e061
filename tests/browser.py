"""A folder of pages in headless Chromium, which reports how they look."""

import json
import shutil
import subprocess
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue

INSPECTOR = Path(__file__).parent / "inspector.html"
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --window-size=1400,1000"
).split()


def installed():
    """The browser's command, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class _Handler(SimpleHTTPRequestHandler):
    """Serves a folder and the page that inspects it, and takes what that page reports."""

    def __init__(self, *arguments, reports, **options):
        self.reports = reports
        super().__init__(*arguments, **options)

    def do_GET(self):
        if self.path.startswith("/inspector.html"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(INSPECTOR.read_bytes())
        else:
            super().do_GET()

    def do_POST(self):
        self.reports.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@contextmanager
def _served(folder):
    reports = Queue()
    handler = partial(_Handler, directory=folder, reports=reports)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/inspector.html", reports
        finally:
            server.shutdown()


def inspect(folder, pages, profile, *, search, seconds=300):
    """Opens every page at the width of a desk and of a phone, by day and by night, and searches.

    Returns:
        ``{"looks": [...], "found": [...]}`` as `inspector.html` writes it.
    """
    with _served(folder) as (address, reports):
        query = "&".join([f"search={search}", *(f"page={page}" for page in pages)])
        command = [installed(), *FLAGS, f"--user-data-dir={profile}", f"{address}?{query}"]
        browser = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )
        try:
            return json.loads(reports.get(timeout=seconds))
        finally:
            browser.terminate()
            browser.wait()
