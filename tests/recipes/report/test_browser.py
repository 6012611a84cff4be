"""The report and the comparison in a real browser: as wide as a desktop and a phone, light and dark.

Their screenshots are compared with the small ones in `pictures`. After a change of how they look, write those anew, and
look at them:

    python -m pytest tests/recipes/report/test_browser.py --new-pictures
"""

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib as mpl
import pytest
from made_up import run_folder
from PIL import Image, ImageChops, ImageStat

from recipes.report.compare import compare
from recipes.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = {"desktop": 1280, "phone": 390}
HEIGHTS = {"desktop": 2880, "phone": 6720}  # of a screenshot: all charts are on it
SMALLER = {"desktop": 8, "phone": 6}  # times, a reference: what is left of a line of text is a grey bar
BLOCK = 4  # pixels of a reference that are compared as one, beside the mean of all
# Of 255, the most that may differ in the mean and in one block; without one chart it is 13 to 217.
MEAN, WORST = 2.0, 11
PICTURES = Path(__file__).parent / "pictures"
MODES = {"dark": 0, "light": 1}  # as Chromium's setting counts them

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine: apt-get install chromium"
)

# Runs in a page around the report, which itself has no script.
MEASURE = """<script>addEventListener("load", () => {
  const inside = document.querySelector("iframe").contentDocument, root = inside.documentElement;
  const boxes = (name) => [...inside.querySelectorAll(name)].map((element) => element.getBoundingClientRect());
  const figures = [...inside.querySelectorAll("figure")];
  document.body.textContent = "found" + JSON.stringify({
    width: root.clientWidth, scroll: root.scrollWidth,
    right: Math.max(...boxes("figure, article, .panel, .verdict, h1, h2, .facts").map((box) => box.right)),
    columns: new Set(boxes("figure").map((box) => Math.round(box.left))).size,
    beyond: figures.flatMap((figure) => [...figure.querySelectorAll("text")]
      .filter((text) => text.getBoundingClientRect().right > figure.getBoundingClientRect().right)
      .map((text) => text.textContent)),
    smallest: Math.min(...boxes("svg text").map((box) => box.height)),
    loaded: inside.defaultView.performance.getEntriesByType("resource").map((entry) => entry.name),
    folded: inside.querySelectorAll("article details:not([open])").length,
  }) + "end";
});</script>"""


def chromium(profile, mode, *arguments):
    call = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={MODES[mode]}", *arguments,
    ]  # fmt: skip
    return subprocess.run(call, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    one, two = run_folder(root, "a" * 40), run_folder(root, "other", gain=0.2)
    return {"report": write_report(one), "comparison": compare([one.path, two.path], root / "both")}


@pytest.mark.parametrize("page", ["report", "comparison"])
@pytest.mark.parametrize(("screen", "columns"), [("desktop", 3), ("phone", 1)])
def test_nothing_runs_off_the_screen(pages, tmp_path, page, screen, columns):
    width = WIDTHS[screen]
    around = f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{html.escape(pages[page].read_text())}">'
    (tmp_path / "around.html").write_text(f"<!doctype html><body>{around}</iframe>{MEASURE}")
    shown = chromium(
        tmp_path, "light", "--window-size=1400,900", "--dump-dom", f"file://{tmp_path}/around.html"
    )
    found = json.loads(html.unescape(re.search(r"found(\{.*\})end", shown, re.DOTALL)[1]))
    assert found["width"] <= width
    assert found["scroll"] == found["width"]
    assert found["right"] <= found["width"]
    assert found["columns"] == columns
    assert found["beyond"] == []
    assert found["smallest"] > 8
    assert found["loaded"] == []
    assert found["folded"] == (3 if page == "report" else 0)


def in_one_font(page):
    """The page with a font that comes with matplotlib: lines break alike whatever fonts a machine has."""
    font = base64.b64encode(
        (Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf").read_bytes()
    ).decode()
    face = (
        f'@font-face {{ font-family: pinned; src: url("data:font/ttf;base64,{font}"); font-display: block }}'
    )
    return page.replace("</head>", f"<style>{face} * {{ font-family: pinned !important }}</style></head>")


def screenshot(page, folder, screen, mode):
    """The top of a page, given as text, so that every chart is on it."""
    (folder / "page.html").write_text(in_one_font(page))
    path, size = folder / f"{screen}-{mode}.png", f"{WIDTHS[screen]},{HEIGHTS[screen]}"
    place = (folder / "page.html").as_uri()
    chromium(folder / mode, mode, f"--window-size={size}", f"--screenshot={path}", place)
    with Image.open(path) as picture:
        assert picture.size == (WIDTHS[screen], HEIGHTS[screen])
        return picture.convert("RGB")


def smaller(picture, screen):
    return picture.reduce(SMALLER[screen])


def difference(picture, reference):
    """Of two small pictures, 0 to 255 in the channel that differs most: in the mean, and in the worst block.

    A block is averaged before it is compared: letters that another Chromium puts half a pixel off do not count there.
    """
    assert picture.size == reference.size
    blocks = _most(picture.reduce(BLOCK), reference.reduce(BLOCK))
    return ImageStat.Stat(_most(picture, reference)).mean[0], blocks.getextrema()[1]


def _most(one, other):
    red, green, blue = ImageChops.difference(one, other).split()
    return ImageChops.lighter(ImageChops.lighter(red, green), blue)


def picture_of(page, screen, mode):
    return PICTURES / f"{page}-{WIDTHS[screen]}-{mode}.png"


def reference(page, screen, mode):
    with Image.open(picture_of(page, screen, mode)) as picture:
        return picture.convert("RGB")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("screen", WIDTHS)
@pytest.mark.parametrize("page", ["report", "comparison"])
def test_a_page_looks_as_it_did(pages, tmp_path, request, page, screen, mode):
    shown = screenshot(pages[page].read_text(), tmp_path, screen, mode)
    assert shown.getpixel((2, 2)) == ((0xF7, 0xF7, 0xF5) if mode == "light" else (0x12, 0x15, 0x18))
    found, place = smaller(shown, screen), picture_of(page, screen, mode)
    if request.config.getoption("--new-pictures"):
        found.quantize(256, kmeans=2, dither=Image.Dither.NONE).save(place, optimize=True)
    found.save(tmp_path / place.name)
    mean, worst = difference(found, reference(page, screen, mode))
    which = f"{tmp_path / place.name} and {place}"
    assert mean <= MEAN, f"{which} differ by {mean:.1f} in the mean"
    assert worst <= WORST, f"{which} differ by {worst} in one place"


def a_blank_chart(page):
    """One chart has its frame and its title, and nothing in it."""
    return page.replace("</style>", "figure:nth-child(5) svg { visibility: hidden }</style>", 1)


def a_chart_without_its_curve(page):
    return page.replace("</style>", "figure:nth-child(1) svg path { visibility: hidden }</style>", 1)


def one_over_another(page):
    return page.replace("</style>", "figure:nth-child(2) { transform: translateX(-6rem) }</style>", 1)


def light_in_the_dark(page):
    return page.replace("prefers-color-scheme: dark", "prefers-color-scheme: none")


def a_figure_in_another_colour(page):
    return page.replace("--c0: #1764ab", "--c0: #ab6417").replace("--c0: #6db1f2", "--c0: #f2b16d")


@pytest.mark.parametrize(
    "broken",
    [
        a_blank_chart,
        a_chart_without_its_curve,
        one_over_another,
        light_in_the_dark,
        a_figure_in_another_colour,
    ],
)
def test_a_page_that_looks_otherwise_is_told(pages, tmp_path, broken):
    page = pages["report"].read_text()
    assert broken(page) != page
    shown = smaller(screenshot(broken(page), tmp_path, "desktop", "dark"), "desktop")
    mean, worst = difference(shown, reference("report", "desktop", "dark"))
    assert mean > MEAN or worst > WORST
