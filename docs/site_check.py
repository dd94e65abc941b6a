"""Looks at a built site in Chromium: `python -m docs.site_check FOLDER`.

Every page, at three widths, must be no wider than the window (tables and formulas scroll inside),
ask for nothing outside, show every picture, draw every formula, and raise no script error.
Without Chromium it says so and exits with 0.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

WIDTHS = (400, 820, 1400)
LIMIT = 300
"""Seconds for all pages; some twenty are usual."""
NAMES = ("chromium", "chromium-browser", "google-chrome")

LOOK = """<!doctype html><meta charset="utf-8"><body><script>
const pages = %s, widths = %s, found = [];
function look(frame, page, width) {
  const at = frame.contentDocument, root = at.documentElement, say = w => found.push([page, width, w]);
  const wide = Math.max(root.scrollWidth, at.body.scrollWidth);
  if (wide > width) {
    const by = [...at.querySelectorAll("article *")].filter(e => e.getBoundingClientRect().right > width
      && !e.closest(".table-wrapper, .formula, .highlight, pre, math")).slice(0, 1).map(e => e.outerHTML.slice(0, 90));
    say(`${wide} px wide: ${by}`);
  }
  for (const one of frame.contentWindow.performance.getEntriesByType("resource"))
    if (new URL(one.name).origin !== location.origin && !one.name.startsWith("data:")) say("asks for " + one.name);
  for (const one of at.querySelectorAll("article img"))
    if (!one.naturalWidth) say("no picture: " + one.src);
    else if (!one.alt) say("no words for the picture " + one.src);
  for (const one of at.querySelectorAll("math"))
    if (!one.getBoundingClientRect().width) say("a formula is not drawn");
}
async function all() {
  for (const page of pages) for (const width of widths) {
    const frame = document.createElement("iframe");
    frame.style = `width:${width}px;height:900px;border:0`;
    frame.src = "/" + page;
    const loaded = new Promise(done => frame.onload = done);
    document.body.append(frame);
    frame.contentWindow.onerror = message => found.push([page, width, message]);
    await loaded;
    look(frame, page, width);
    frame.remove();
  }
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
}
all().catch(error => fetch("/found", {method: "POST", body: JSON.stringify([["", 0, String(error)]])}));
</script>"""


class Server(SimpleHTTPRequestHandler):
    """The site, the page that looks at it, and where that page tells what it found."""

    look = ""
    found: list[list[object]] | None = None
    done = threading.Event()

    def do_GET(self) -> None:
        if self.path != "/look":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(Server.look.encode())
        return None

    def do_POST(self) -> None:
        Server.found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        Server.done.set()

    def log_message(self, format: str, *args: object) -> None:
        pass


def check(folder: Path, browser: str) -> list[list[object]]:
    """[page, width, what is wrong] of a built site.

    Raises:
        TimeoutError: the browser did not answer within LIMIT seconds.
    """
    pages = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.html"))
    Server.look, Server.found = LOOK % (json.dumps(pages), json.dumps(WIDTHS)), None
    Server.done.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += ["--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
        outside = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        address = f"http://127.0.0.1:{server.server_port}/look"
        process = subprocess.Popen(
            [browser, *options, outside, "--remote-debugging-port=0", address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            if not Server.done.wait(LIMIT) or Server.found is None:
                raise TimeoutError(f"{browser} has not looked at {len(pages)} pages in {LIMIT} s")
        finally:
            process.terminate()
            process.wait()
            server.shutdown()
            server.server_close()
    return Server.found


def browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def main(folder: str) -> int:
    """The exit code; what is wrong is printed."""
    found = browser()
    if found is None:
        print("pages are not looked at: there is no Chromium here")
        return 0
    wrong = check(Path(folder).resolve(), found)
    for page, width, what in wrong:
        print(f"{page} at {width} px: {what}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
