"""Open the API reference in a headless browser: ``python -m tests.api_pages.browse``, after it was built.

Needs ``pip install playwright`` and a Chromium, for example Debian's ``chromium``; ``--browser`` says where it is.
Opens every page on a desktop and on a phone, follows every link, and searches for every public name. Prints what is
wrong, and fails.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

from . import FOLDER, PAGES, public_names

BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome", "chrome")
DESK: dict[str, Any] = {"viewport": {"width": 1200, "height": 900}}
PHONE: dict[str, Any] = {"viewport": {"width": 400, "height": 850}, "is_mobile": True, "has_touch": True}
SMALLEST = 12  # CSS pixels of a letter, except in an index

# every link, as the browser resolves it
LINKS = "[...document.querySelectorAll('a[href]')].map(a => a.href)"
PLACES = "[...document.querySelectorAll('[id]')].map(one => one.id)"
# what goes beyond the right edge, unless it scrolls by itself
WIDE = """
[...document.querySelectorAll('main *')].filter(one => {
  const inside = one.closest('pre, .pdoc-code');
  return !inside && one.getBoundingClientRect().right > %d + 1;
}).map(one => one.textContent.trim().slice(0, 80))
"""
SMALL = """
[...document.querySelectorAll('main p, main li, main code, main h1, main h2, main .pdoc-code, .formula')]
  .filter(one => parseFloat(getComputedStyle(one).fontSize) < %d).map(one => one.textContent.slice(0, 80))
"""
# a browser without MathML writes a fraction in one line
FLAT = """
[...document.querySelectorAll('mfrac')].filter(one => {
  const [above, below] = [...one.children].map(part => part.getBoundingClientRect());
  return above.bottom > below.top + 1 || !above.width || !below.width;
}).map(one => one.textContent)
"""


def unreadable(page: Any, address: str) -> Iterator[str]:
    """Open a page, and yield what cannot be read on it."""
    page.goto(address)
    width = page.viewport_size["width"]
    if page.evaluate("document.documentElement.scrollWidth") > width:
        yield "wider than the screen"
    scripts = {"leaves the screen": WIDE % width, "small": SMALL % SMALLEST, "a fraction in one line": FLAT}
    for complaint, script in scripts.items():
        yield from (f"{complaint}: {text}" for text in page.evaluate(script))


def dead_links(page: Any, addresses: Sequence[str]) -> Iterator[str]:
    """Yield the links that lead to no page, or to no place on it."""
    places: dict[str, set[str]] = {}
    links: dict[str, set[str]] = {}
    for address in addresses:
        page.goto(address)
        places[address], links[address] = set(page.evaluate(PLACES)), set(page.evaluate(LINKS))
    for address, targets in links.items():
        for target, place in map(urldefrag, sorted(targets)):
            # the others lead to pdoc
            if target.startswith("file:") and not (target in places and unquote(place) in {"", *places[target]}):
                yield f"{address}: a dead link to {target}#{place}"
    yield from ("no links" for _ in range(sum(map(len, links.values())) < 300))


def open_menu(page: Any, start: str) -> Iterator[str]:
    """Go to another page by the menu of a phone, and open the menu there; yield if it was open before."""
    page.goto(start)
    entry = page.locator("nav.pdoc a", has_text="functional").first
    button = page.locator("label#navtoggle")
    if entry.is_visible():
        yield "the menu covers a phone"
    button.tap()
    entry.tap()
    page.wait_for_url("**/functional.html")
    button.tap()


def lost(page: Any) -> Iterator[str]:
    """Search for every public name, and yield those that are not found; follow a result."""
    field = page.locator("input[type=search]")
    field.fill("slots")
    # the index is loaded first
    page.locator(".search-result").first.wait_for()
    for name in {name: None for module in PAGES for name in public_names(module) if name != "__version__"}:
        field.fill(name)
        if not page.locator(f".search-result a[href$='#{name}']").count():
            yield f"not found by search: {name}"
    field.fill("overlap of slots")
    page.locator(".search-result a[href$='#slot_overlap']").first.click()
    if not page.locator("#slot_overlap").is_visible():
        yield f"a result of the search leads to {page.url}"


def complaints(browser: Any, folder: Path) -> Iterator[str]:
    """Yield everything that is wrong."""
    addresses = [path.resolve().as_uri() for path in sorted(folder.rglob("*.html")) if path.name != "index.html"]
    start = (folder / "ssync_loss.html").resolve().as_uri()
    heard: list[str] = []
    for kind, screen in {"desk": DESK, "phone": PHONE}.items():
        page = browser.new_page(**screen)
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: heard.append(f"a script fails: {error}"))
        page.on("requestfailed", lambda request: heard.append(f"cannot be loaded: {request.url}"))
        # the pages ask nothing of a network
        page.route(re.compile("^(?!file:|data:)"), lambda route: route.abort())
        for address in addresses:
            yield from (f"{kind}, {address}: {one}" for one in unreadable(page, address))
        if kind == "phone":
            yield from open_menu(page, start)
        else:
            yield from dead_links(page, addresses)
            page.goto((folder / "index.html").resolve().as_uri())
            page.wait_for_url(start)
        yield from lost(page)
    yield from heard


def main(arguments: Sequence[str]) -> int:
    """Return the number of complaints."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="of the pages")
    parser.add_argument("--browser", default=next(filter(None, map(shutil.which, BROWSERS)), None), help="its program")
    options = parser.parse_args(arguments)
    if not (options.folder / "index.html").is_file():
        parser.error(f"no pages in {options.folder}: python -m tests.api_pages writes them")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser)
        count = 0
        for complaint in complaints(browser, options.folder):
            print(complaint)
            count += 1
        print(f"Chromium {browser.version}: {count} complaints")
    return count


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
