"""The finished pages, checked without a browser: links and their anchors, pictures, nothing loaded from elsewhere."""
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

OUTSIDE = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//", re.I)


class Page(HTMLParser):
    "Anchors, links, resources and pictures of a page."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.resources, self.bare, self.figures, self.open = set(), [], [], [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if "id" in a: self.ids.add(a["id"])
        if tag == "a" and "name" in a: self.ids.add(a["name"])
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag == "link" and a.get("href") and a.get("rel") in ("stylesheet", "icon", "shortcut icon", "preload"):
            self.resources.append(a["href"])
        if tag in ("script", "img", "source", "iframe") and a.get("src"): self.resources.append(a["src"])
        if tag == "img" and not (a.get("alt") or "").strip() and a.get("aria-hidden") != "true":
            self.bare.append(a.get("src", "?"))


def check(site):
    "Faults of a built site, and its links to elsewhere: ([fault], {address: [pages]})."
    site, faults, elsewhere = Path(site), [], {}
    pages = {
        p.relative_to(site).as_posix(): Page(p.read_text(encoding="utf-8"))
        for p in sorted(site.rglob("*.html"))
        if "_static" not in p.relative_to(site).parts
    }
    for name, page in pages.items():
        for src in page.bare: faults.append(f"{name}: the picture {src[:80]} has no alternative text")
        for r in page.resources:
            if OUTSIDE.match(r):
                faults.append(f"{name}: loads {r} from elsewhere")
            elif not r.startswith("data:") and not target(site, name, r).is_file():
                faults.append(f"{name}: {r} is missing")
        for href in page.links:
            if OUTSIDE.match(href):
                elsewhere.setdefault(href, []).append(name)
                continue
            if re.match(r"[a-z]+:", href): continue
            faults += inside(site, pages, name, href)
    for css in sorted(site.rglob("*.css")):
        for url in re.findall(
            r"""(?:@import|url\()\s*["']?((?:https?:)?//[^"')\s]+)""", css.read_text(encoding="utf-8")
        ):
            faults.append(f"{css.relative_to(site)}: loads {url} from elsewhere")
    return faults, elsewhere


def target(site, page, href):
    return (site / page).parent / unquote(urlsplit(href).path) if urlsplit(href).path else site / page


def inside(site, pages, name, href):
    "Faults of one link within the site."
    file = target(site, name, href).resolve()
    if file.is_dir(): file = file/"index.html"
    if not file.is_file(): return [f"{name}: a link to {href}, and there is no such page"]
    anchor, key = unquote(urlsplit(href).fragment), file.relative_to(site.resolve()).as_posix()
    return (
        [f"{name}: a link to {href}, and that page has no such place"]
        if anchor and key in pages and anchor not in pages[key].ids
        else []
    )
