"""Draw docs/images/demo-light.png and demo-dark.png: the results on the page that `disttempnet demo` writes.

`draw_demo.py [runs/demo-heads/report.html]`. Needs Chromium on PATH.
"""

import shutil
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "images"
SIZE = (920, 820)  # CSS pixels: down to the chart of the first task
SCALE = 1.5
COLOURS = 48  # of a file's palette: a page has few
SCHEMES = {"light": 1, "dark": 0}  # blink's preferredColorScheme
LIMIT = 120_000  # bytes of a file


def draw(page: Path, scheme: str, browser: str) -> Path:
    """Write a picture of the top of a page in one colour scheme; return its path."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder, "page.png")
        subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--disable-dev-shm-usage", f"--user-data-dir={folder}/profile", "--hide-scrollbars",
                f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", f"--force-device-scale-factor={SCALE}",
                f"--window-size={SIZE[0]},{SIZE[1]}", f"--screenshot={shot}", page.resolve().as_uri(),
            ],
            check=True, capture_output=True, timeout=600,
        )  # fmt: skip
        picture = Image.open(BytesIO(shot.read_bytes())).convert("RGB")
    content = BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
    if len(content.getvalue()) > LIMIT:
        raise SystemExit(f"{scheme}: {len(content.getvalue()):,} bytes, more than {LIMIT:,}: lower COLOURS or SCALE")
    out = OUT / f"demo-{scheme}.png"
    out.write_bytes(content.getvalue())
    return out


if __name__ == "__main__":
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs", "demo-heads", "report.html")
    if not page.is_file():
        raise SystemExit(f"{page}: no such page; run `disttempnet demo` first")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("no chromium on PATH (apt-get install chromium)")
    for scheme in SCHEMES:
        print(draw(page, scheme, browser))
