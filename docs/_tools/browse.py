"""Visits every page of the built site with a headless Chromium: ``make docs-test``.

On each page, in three widths and both colour schemes: no error in the console, no request that leaves the site,
formulas drawn and no TeX left in the text, nothing wider than the window. Every internal link and anchor exists; the
search finds a function.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urldefrag, urljoin

from playwright.sync_api import Browser, Error, Page, Request, Route, sync_playwright

VIEWS = {
    "narrow": {"width": 390, "height": 844},
    "medium": {"width": 1024, "height": 768},
    "wide": {"width": 1600, "height": 1000},
}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
# Text outside code and formulas, and what of it looks like TeX or reStructuredText.
RAW_MARKUP = """() => {
  const copy = document.querySelector("article").cloneNode(true);
  copy.querySelectorAll("code, pre, math, svg, script, style").forEach(e => e.remove());
  return (copy.textContent.match(/.{0,30}(\\$|\\\\[a-zA-Z([]|``|:\\w+:`)+.{0,30}/g) || []);
}"""
UNDRAWN = """() => [...document.querySelectorAll("article math")]
  .filter(e => e.checkVisibility() && (e.getBoundingClientRect().height < 4 || e.getBoundingClientRect().width < 2))
  .map(e => e.textContent)"""
UNKNOWN_ELEMENTS = """() => [...document.querySelectorAll("article math *")]
  .filter(e => e.namespaceURI !== "http://www.w3.org/1998/Math/MathML").map(e => e.outerHTML)"""
TOO_WIDE = "() => Math.max(0, document.documentElement.scrollWidth - window.innerWidth)"
LINKS = "() => [...document.querySelectorAll('a[href]')].map(a => a.href)"
IDS = "() => [...document.querySelectorAll('[id]')].map(e => e.id)"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def serve(site: Path) -> str:
    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


def watched(browser: Browser, root: str, problems: list[str], scheme: Literal["light", "dark"]) -> Page:
    """A page that writes down its errors and what it asks of other hosts, which it does not get."""
    page = browser.new_page(color_scheme=scheme)

    def outside(route: Route, request: Request) -> None:
        problems.append(f"{page.url} asks for {request.url}")
        route.abort()

    page.route(lambda url: not url.startswith((root, "data:", "blob:")), outside)
    page.on("console", lambda m: problems.append(f"{page.url}: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(f"{page.url}: {error}"))
    page.on("response", lambda r: problems.append(f"{page.url}: {r.status} {r.url}") if r.status >= 400 else None)
    return page


def search_finds(page: Page, root: str, name: str) -> bool:
    page.goto(root)
    page.keyboard.press("/")
    page.keyboard.type(name)
    try:
        page.wait_for_selector(f".md-search-result__item a[href*='fastgen.{name}']", timeout=20000)
    except Error:
        return False
    return True


def look(page: Page, where: str, view: str, scheme: str) -> list[str]:
    """What is wrong with a page as it stands, in one width and one colour scheme."""
    page.set_viewport_size(VIEWS[view])
    problems = []
    if page.get_attribute("body", "data-md-color-scheme") != {"light": "default", "dark": "slate"}[scheme]:
        problems.append(f"its colours are not {scheme}")
    problems += [f"undrawn formula {text}" for text in page.evaluate(UNDRAWN)]
    problems += [f"unknown element in a formula: {text}" for text in page.evaluate(UNKNOWN_ELEMENTS)]
    problems += [f"markup in the text: {text}" for text in page.evaluate(RAW_MARKUP)]
    if too_wide := page.evaluate(TOO_WIDE):
        problems.append(f"{too_wide} px wider than the window")
    return [f"{where} ({view}, {scheme}): {problem}" for problem in problems]


def dead_links(root: str, site: Path, ids: dict[str, set[str]], links: dict[str, set[str]]) -> Iterator[str]:
    for url, targets in links.items():
        for target in targets:
            path, anchor = urldefrag(urljoin(url, target))
            if not path.startswith(root):
                continue
            if path not in ids and not (site / unquote(path.removeprefix(root))).is_file():
                yield f"{url}: no {path}"
            elif path in ids and anchor and unquote(anchor) not in ids[path]:
                yield f"{url}: no {target}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("--pictures", type=Path, help="a folder for a picture of each page and view")
    options = parser.parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print("no Chromium: install one (apt-get install chromium), or name one with CHROMIUM=…", file=sys.stderr)
        return 1
    problems: list[str] = []
    root, start, formulas = serve(options.site), time.monotonic(), 0
    folders = sorted(p.parent.relative_to(options.site).as_posix() for p in options.site.rglob("index.html"))
    pages = [root + ("" if folder == "." else f"{folder}/") for folder in folders]
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
    ids: dict[str, set[str]] = {}
    links: dict[str, set[str]] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in SCHEMES:
            page = watched(browser, root, problems, scheme)
            for url in pages:
                code = "/source/" in url  # a page of code is the same in all views
                if code and scheme == "dark":
                    continue
                page.goto(url, wait_until="load")
                name = url.removeprefix(root).strip("/").replace("/", "-") or "index"
                for view in ("wide",) if code else VIEWS:
                    problems += look(page, name, view, scheme)
                    if options.pictures and not code:
                        page.screenshot(path=options.pictures / f"{name}-{view}-{scheme}.png")
                if scheme == "light":
                    ids[url], links[url] = set(page.evaluate(IDS)), set(page.evaluate(LINKS))
                    formulas += page.locator("article math").count()
            if not search_finds(page, root, "ddo_loss"):
                problems.append("the search does not find ddo_loss")
        browser.close()
    problems += dead_links(root, options.site, ids, links)
    if not formulas:
        problems.append("no formula on any page")
    print("\n".join(problems))
    taken = f"{time.monotonic() - start:.0f} s"
    print(f"{len(pages)} pages, {len(VIEWS)} widths, 2 colour schemes, {formulas} formulas, {taken}")
    print(f"{len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
