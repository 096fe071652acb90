"""Makes docs/operator.png: the operator's page with the shipped pair and two robots on the built-in simulator.

python tests/end_to_end/operator_picture.py docs/operator.png
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from browser import Browser
from PIL import Image
from robot import at_work

from robodual.pair import Options, Pair

SIZE = (1400, 900)
SCHEME = "dark"
COLOURS = 200


def main(path: Path) -> None:
    with (
        Pair(Options("playtable", device="cpu")) as pair,
        at_work(pair, "move the door all the way to the right", "bench-2", period=0.4, seed=2),
        at_work(pair, "move the door all the way to the left", "bench-1", seed=0),
        Browser(size=SIZE) as browser,
    ):
        browser.prefer(SCHEME)
        browser.open(f"http://127.0.0.1:{pair.http_ports['specialist']}/operator/")
        browser.until("document.querySelector('[data-session=bench-1]')")
        browser.click("[data-session=bench-1] button")
        browser.until("document.querySelector('#facts').innerText.includes('bench-1')")
        # Late in its second episode, when all lines are long.
        late = "/episode 2[^]*step 5\\d/.test(document.querySelector('#facts').innerText)"
        browser.until(late, seconds=300)
        with Image.open(io.BytesIO(browser.picture())) as image:
            image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
