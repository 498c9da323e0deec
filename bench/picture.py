"""The picture of the documentation's first page: the first figure of the page that `make demo` writes, in a browser.

The page compares a run of the default with plain GRPO on two tasks, one after the other; if it is there already, only
the picture is made again. Needs Debian's chromium and the extra `dev`.

    python bench/picture.py [--page FILE] [--out docs/results/demo.png]
"""

import argparse
import io
import shutil
import subprocess
import sys
from pathlib import Path

from results import RESULTS, ROOT

WIDTH, HEIGHT = 1200, 500
COLOURS = 256
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()


def photograph(page, out):
    """The curves below the legend of the page, in few enough colours for a light file."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or sys.exit("needs Chromium; on Debian: apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        view = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        view.goto(page.resolve().as_uri())
        view.wait_for_selector("body[data-ready]")
        view.evaluate("document.getElementById('curves').scrollIntoView()")
        view.wait_for_timeout(1000)  # figures are drawn as they come into view
        picture = Image.open(io.BytesIO(view.screenshot()))
        browser.close()
    picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(out, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, default=ROOT / "runs" / "demo" / "report.html")
    parser.add_argument("--out", type=Path, default=RESULTS / "demo.png")
    options = parser.parse_args()
    if not options.page.exists():
        subprocess.run(["make", "demo"], cwd=ROOT, check=True)
    photograph(options.page, options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
