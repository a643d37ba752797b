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
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

from playwright.sync_api import Browser, Page, sync_playwright

VIEWS = {
    "narrow": {"width": 390, "height": 844},
    "medium": {"width": 1024, "height": 768},
    "wide": {"width": 1600, "height": 1000},
}
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


def watched(browser: Browser, root: str, problems: list[str], **options: object) -> Page:
    """A page that writes down its errors and what it asks of other hosts, which it does not get."""
    page = browser.new_page(**options)  # type: ignore[arg-type]

    def outside(route: object, request: object) -> None:
        problems.append(f"{page.url} asks for {request.url}")  # type: ignore[attr-defined]
        route.abort()  # type: ignore[attr-defined]

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
    except Exception:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("--pictures", type=Path, help="a folder for a picture of each page and view")
    options = parser.parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print("no Chromium: install one (apt-get install chromium), or name one with CHROMIUM=…", file=sys.stderr)
        return 1
    root, problems, start = serve(options.site), [], time.monotonic()
    files = sorted(p.relative_to(options.site) for p in options.site.rglob("*.html") if p.name != "404.html")
    pages = [root + str(p.parent).replace(".", "", 1 if str(p.parent) == "." else 0).strip("/") for p in files]
    pages = [url if url.endswith("/") else url + "/" for url in pages]
    ids: dict[str, set[str]] = {}
    links: dict[str, set[str]] = {}
    formulas = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for view, size in VIEWS.items():
            for scheme in ("light", "dark"):
                page = watched(browser, root, problems, viewport=size, color_scheme=scheme)
                for url in pages:
                    if "/source/" in url and (view, scheme) != ("wide", "light"):
                        continue  # a page of code is the same in all of them
                    page.goto(url, wait_until="load")
                    where = f"{url.removeprefix(root) or 'index'} ({view}, {scheme})"
                    wanted = "slate" if scheme == "dark" else "default"
                    if page.get_attribute("body", "data-md-color-scheme") != wanted:
                        problems.append(f"{where}: its colours are not {scheme}")
                    for what, found in (
                        ("undrawn", page.evaluate(UNDRAWN)),
                        ("unknown", page.evaluate(UNKNOWN_ELEMENTS)),
                    ):
                        problems += [f"{where}: {what} formula {text}" for text in found]
                    problems += [f"{where}: markup in the text: {text}" for text in page.evaluate(RAW_MARKUP)]
                    if too_wide := page.evaluate(TOO_WIDE):
                        problems.append(f"{where}: {too_wide} px wider than the window")
                    if (view, scheme) == ("wide", "light"):
                        ids[url], links[url] = set(page.evaluate(IDS)), set(page.evaluate(LINKS))
                        formulas += page.locator("article math").count()
                    if options.pictures and "/source/" not in url:
                        name = url.removeprefix(root).strip("/").replace("/", "-") or "index"
                        options.pictures.mkdir(parents=True, exist_ok=True)
                        page.screenshot(path=str(options.pictures / f"{name}-{view}-{scheme}.png"))
                page.close()
        page = watched(browser, root, problems)
        if not search_finds(page, root, "ddo_loss"):
            problems.append("the search does not find ddo_loss")
        browser.close()
    for url, targets in links.items():
        for target in targets:
            path, anchor = urldefrag(urljoin(url, target))
            if not path.startswith(root):
                continue
            known = ids.get(path) if path in ids else None
            on_disk = options.site / unquote(path.removeprefix(root))
            if known is None and not on_disk.is_file():
                problems.append(f"{url}: no {path}")
            elif known is not None and anchor and unquote(anchor) not in known:
                problems.append(f"{url}: no {target}")
    if not formulas:
        problems.append("no formula on any page")
    print("\n".join(problems))
    views = f"{len(VIEWS)} widths, 2 colour schemes"
    print(
        f"{len(pages)} pages, {views}, {formulas} formulas, {time.monotonic() - start:.0f} s; {len(problems)} problems"
    )
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
