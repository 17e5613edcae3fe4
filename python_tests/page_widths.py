"""Opens every page of the site in a headless Chromium: none is wider than its window, every picture has a text.

python python_tests/page_widths.py [chromium], after `make docs`
"""

from __future__ import annotations

import functools
import html
import json
import re
import subprocess
import sys
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SITE = Path(__file__).parents[1] / "build" / "site"
WIDTHS = (400, 1280)

# A frame is a window of its own to a page, and may be narrower than browsers let their windows be.
MEASURE = """<!DOCTYPE html><body><script>
async function measure() {
  const found = [];
  for (const width of WIDTHS) for (const page of PAGES) {
    const frame = document.createElement("iframe");
    frame.style.cssText = `width: ${width}px; height: 800px; border: 0`;
    const loaded = new Promise(done => frame.onload = done);
    frame.src = page;
    document.body.append(frame);
    await loaded;
    const root = frame.contentDocument;
    const bare = [...root.images].filter(i => !i.alt || !i.naturalWidth).map(i => i.src);
    found.push([page, width, root.documentElement.scrollWidth, bare]);
    frame.remove();
  }
  document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
}
measure();
</script></body>"""


class Handler(SimpleHTTPRequestHandler):
    """The site and, beside it, the page that opens all others."""

    def do_GET(self) -> None:
        if self.path != "/measure":
            super().do_GET()
            return
        pages = [f"/{p.relative_to(SITE).as_posix()}" for p in sorted(SITE.rglob("*.html"))]
        text = MEASURE.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS))
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def measured(chromium: str) -> list[tuple[str, int, int, list[str]]]:
    """Page, width of the window, width of the page, and pictures without a text or that are not there."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [
            f"--user-data-dir={profile}",
            "--virtual-time-budget=600000",
            "--timeout=600000",
        ]
        address = f"http://127.0.0.1:{server.server_port}/measure"
        done = subprocess.run([*command, address], capture_output=True, text=True, check=True)
    server.shutdown()
    found = re.search("<pre>(.*)</pre>", done.stdout, re.DOTALL)
    if found is None:
        raise RuntimeError(f"{chromium}: got no measurements, expected some\n{done.stderr}")
    return [tuple(each) for each in json.loads(html.unescape(found[1]))]


def main() -> int:
    """Print what is wrong; the number of faults is the exit status."""
    found = measured(sys.argv[1] if len(sys.argv) > 1 else "chromium")
    faults = [f"{p}: {wide} px in a window of {w}" for p, w, wide, _ in found if wide > w]
    faults += sorted({f"{p}: no text for {src}" for p, _, _, bare in found for src in bare})
    print(*faults, f"{len(found)} measurements, {len(faults)} faults", sep="\n")
    return min(len(faults), 1)


if __name__ == "__main__":
    sys.exit(main())
