"""A real browser opens the report of a run full of attacks: none of them runs, all of them are
there to read.

The page has two defences, escaping and a content security policy. Each is tested without the other,
and the attacks are shown to work where there is neither. Needs chromium or a relative of it;
skipped, and said so, where there is none.
"""

import itertools
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import report_line
from test_report import FRAME, Elements, full_run, write

from show import report

BROWSERS = (
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"),
    *("chrome", "msedge", "microsoft-edge"),
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--dump-dom"),
    "--virtual-time-budget=3000",
)
POLICY_TAG = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', FRAME).group()


def attacks(site: str) -> list[str]:
    """Texts that mark the page's root with data-ran<number> if they are more than text to it."""
    forms = (
        "<script>{}</script>",
        "</script><script>{}</script>",
        '<img src=nowhere onerror="{}">',
        "<img src='{site}/picture' onload=1 onerror='{}'>",
        '"><svg onload="{}">',
        "'><details open ontoggle='{}'>",
        '</span></div><iframe srcdoc="<script>parent.{}</script>"></iframe>',
        "--><script>{}</script><!--",
        "</title></style></textarea><script>{}</script>",
        "\u2028</code><script>{}</script>\u2029",
        '<style onload="{}"></style>',
        "\x00<scr\x00ipt>{}</script><script>{}</script>",
        "]]></metadata></svg><script>{}</script>",
        "&lt;script&gt;</p><script>{}</script>",
        "<link rel=stylesheet href='{site}/style.css' onerror='{}'>",
        "<style>@import '{site}/import.css';</style><input autofocus onfocus='{}'>",
    )
    texts = []
    for number, form in enumerate(forms):
        mark = f"document.documentElement.setAttribute(`data-ran{number}`,1)"
        texts.append(form.replace("{site}", site).replace("{}", mark))
    return texts


def poisoned(texts: list[str]) -> dict:
    """The files of a run, an attack in place of every string and as a new key of every object."""
    some = itertools.cycle(texts)

    def poison(value, key=""):
        if isinstance(value, dict):
            poisoned_values = {k: poison(v, k) for k, v in value.items()}
            return poisoned_values | {next(some): next(some)}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return next(some) if isinstance(value, str) and key != "method" else value

    files = full_run()
    files["metrics.jsonl"] = files["metrics.jsonl"][:30]
    files = {name: poison(content) for name, content in files.items()}
    halves = [half for text in texts for half in (text[:4], text[4:])]
    files["traces.json"] += [
        {"question": "all", "tokens": texts, "rewards": [0.1] * len(texts)},
        {"question": "cut in two", "tokens": halves},
        *({"question": text, "answer": text, "source": text, "tokens": [text]} for text in texts),
    ]
    files["settings.json"] |= {text: text for text in texts}
    files["results.json"]["methods"] |= {text: {"t1": 0.5, "seconds": 1} for text in texts}
    return files


def outline(page: str) -> list:
    """Every kind of element on a page with the names of its attributes, once."""
    return sorted({(tag, *sorted(attributes)) for tag, attributes in Elements(page).found})


def test_attacks_add_no_element_and_no_attribute(tmp_path):
    """As a strict parser sees it; the harmless text 'x' makes the same page but for the text."""
    pages = []
    texts = attacks("http://attacker.example")
    for name, inserted in (("harmless", ["x", "y", "z"]), ("hostile", texts)):
        (tmp_path / name).mkdir()
        file = report.write_report(write(tmp_path / name, poisoned(inserted)))
        pages.append(file.read_text(encoding="utf-8"))
    assert outline(pages[0]) == outline(pages[1])
    shown = Elements(pages[1]).text
    assert all(report.printable(text) in shown for text in texts)


# In a browser -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> str:
    return next(filter(None, map(shutil.which, BROWSERS)), "")


@pytest.fixture
def site():
    """(address, paths asked for) of a web server here: what a page that loads something asks."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def opened(browser: str, page: str, folder) -> str:
    """The page as the browser has it once its scripts have run, as HTML."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [browser, *FLAGS, profile, (folder / "page.html").as_uri()]
    result = subprocess.run(command, capture_output=True, timeout=120)
    return result.stdout.decode("utf-8", "replace")


def ran(page: str) -> list[str]:
    """Which attacks have left their mark on the root element."""
    roots = [attributes for tag, attributes in Elements(page).found if tag == "html"]
    return sorted(name for name in roots[0] if name.startswith("data-ran"))


def loads_from_elsewhere(elements: Elements) -> bool:
    """Whether any element names an address on the web."""
    for _, attributes in elements.found:
        for name in ("src", "href", "srcset", "action", "data"):
            if re.match(r"\s*(https?:)?//", attributes.get(name) or ""):
                return True
    return False


def test_no_attack_runs_in_a_browser(browser, site, tmp_path, request):
    if not browser:
        report_line(request.config, "browser: none found, so the report was not opened in one")
        pytest.skip(f"no browser found ({', '.join(BROWSERS[:3])}, ..): install chromium")
    address, asked = site
    texts = attacks(address)
    paragraphs = "\n".join(f"<p>{text}</p>-->" for text in texts)
    head = "<!doctype html><html><head><title>bare</title></head><body>"
    bare = head + paragraphs
    try:
        page = opened(browser, bare, tmp_path)
    except (OSError, subprocess.TimeoutExpired):
        page = ""
    if "<title>bare</title>" not in page:
        report_line(request.config, f"browser: {browser} does not start here: report not opened")
        pytest.skip(f"{browser} does not start here")
    assert len(ran(page)) >= len(texts) - 3 and asked, "the attacks work where nothing stops them"
    asked.clear()

    policy_alone = opened(browser, bare.replace("<title>", POLICY_TAG + "<title>"), tmp_path)
    assert "<script>" in policy_alone and not ran(policy_alone) and not asked

    html = report.write_report(write(tmp_path, poisoned(texts))).read_text(encoding="utf-8")
    escaping_alone = html.replace(POLICY_TAG, "")
    assert escaping_alone != html
    marks = set()
    for version in (escaping_alone, html):
        page = opened(browser, version, tmp_path)
        marks |= set(ran(page))
        elements = Elements(page)
        assert elements.text.count("data-ran") > len(texts)
        assert all(report.printable(text) in elements.text for text in texts)  # there to read
        assert outline(page) == outline(version)  # the elements that we wrote, and no others
        assert not loads_from_elsewhere(elements)
    counts = f"{len(marks)} of {len(texts)} payloads ran, {len(asked)} requests made"
    report_line(request.config, f"browser: {Path(browser).name}, {counts}")
    assert not marks and not asked
