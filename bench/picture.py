"""The picture in the README: the first screen of a real run's report, in a real browser.

The run is one of `isentropic train` with its defaults; if it is there already, only its report and the picture are made
again. Needs Debian's chromium and the extra `dev`.

    python bench/picture.py [--run DIR] [--out docs/results/report.png]
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

from results import ONE_THREAD, RESULTS, ROOT

WIDTH, HEIGHT = 1200, 1210
COLOURS = 256
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()


def isentropic(*argv):
    command = [sys.executable, "-m", "isentropic.cli", *map(str, argv)]
    subprocess.run(command, check=True, env={**os.environ, **ONE_THREAD})


def photograph(page, out):
    """The top of the page, in few enough colours for a light file."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or sys.exit("needs Chromium; on Debian: apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        view = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        view.goto(page.resolve().as_uri())
        view.wait_for_selector("body[data-ready]")
        picture = Image.open(io.BytesIO(view.screenshot()))
        browser.close()
    picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(out, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "picture")
    parser.add_argument("--out", type=Path, default=RESULTS / "report.png")
    options = parser.parse_args()
    if not (options.run / "summary.json").exists():
        isentropic("train", "--out", options.run)
    isentropic("report", options.run)
    photograph(options.run / "report.html", options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
