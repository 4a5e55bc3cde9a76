"""A real browser opens the report of a run full of attacks: none of them runs, all of them are
there to read.

The page has two defences, escaping and a content security policy. Each is tested without the other,
and the attacks are shown to work where there is neither. Needs chromium or a relative of it;
skipped, and said so, where there is none."""

import itertools
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import report_line
from test_report import FRAME, Elements, full_run, write

from show import report

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "msedge",
    "microsoft-edge",
)
POLICY_TAG = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', FRAME).group()


def attacks(site: str) -> list[str]:
    """Texts that mark the page's root with data-ran<number> if they are taken for more than
    text."""
    forms = (
        "<script>{}</script>",
        "</script><script>{}</script>",
        "<img src=nowhere onerror=\"{}\">",
        "<img src='{site}/picture' onload=1 onerror='{}'>",
        "\"><svg onload=\"{}\">",
        "'><details open ontoggle='{}'>",
        "</span></div><iframe srcdoc=\"<script>parent.{}</script>\"></iframe>",
        "--><script>{}</script><!--",
        "</title></style></textarea><script>{}</script>",
        "\u2028</code><script>{}</script>\u2029",
        "<style onload=\"{}\"></style>",
        "\x00<scr\x00ipt>{}</script><script>{}</script>",
        "]]></metadata></svg><script>{}</script>",
        "&lt;script&gt;</p><script>{}</script>",
        "<link rel=stylesheet href='{site}/style.css' onerror='{}'>",
        "<style>@import '{site}/import.css';</style><input autofocus onfocus='{}'>",
    )  # fmt: skip
    mark = "document.documentElement.setAttribute(`data-ran{}`,1)"
    return [form.replace("{site}", site).replace("{}", mark.format(number)) for number, form in enumerate(forms)]


def poisoned(texts: list[str]) -> dict:
    """The files of a run with an attack in place of every string, and as one more key of every
    object."""
    some = itertools.cycle(texts)

    def poison(value, key=""):
        if isinstance(value, dict):
            return {k: poison(v, k) for k, v in value.items()} | {next(some): next(some)}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return next(some) if isinstance(value, str) and key != "method" else value

    files = full_run()
    files["metrics.jsonl"] = files["metrics.jsonl"][:30]
    files = {name: poison(content) for name, content in files.items()}
    whole = {"question": "all", "tokens": texts, "rewards": [0.1] * len(texts)}
    cut = {"question": "cut in two", "tokens": [half for text in texts for half in (text[:4], text[4:])]}
    files["traces.json"] += [whole, cut]
    files["traces.json"] += [{"question": text, "answer": text, "source": text, "tokens": [text]} for text in texts]
    files["settings.json"] |= {text: text for text in texts}
    files["results.json"]["methods"] |= {text: {"t1": 0.5, "seconds": 1} for text in texts}
    return files


def outline(page: str) -> list:
    """Every kind of element on a page with the names of its attributes, once."""
    return sorted({(tag, *sorted(attributes)) for tag, attributes in Elements(page).found})


def test_attacks_add_no_element_and_no_attribute(tmp_path):
    """As a strict parser sees it; the harmless text 'x' makes the same page but for the text."""
    pages = []
    for name, texts in (("harmless", ["x", "y", "z"]), ("hostile", attacks("http://attacker.example"))):
        (tmp_path / name).mkdir()
        pages.append(report.write_report(write(tmp_path / name, poisoned(texts))).read_text(encoding="utf-8"))
    assert outline(pages[0]) == outline(pages[1])
    for text in attacks("http://attacker.example"):
        assert report.printable(text) in Elements(pages[1]).text


# In a browser -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> str:
    return next(filter(None, map(shutil.which, BROWSERS)), "")


@pytest.fixture
def site():
    """(address, paths asked for) of a web server on this machine: what a page that loads
    something would ask."""
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
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--virtual-time-budget=3000", "--dump-dom",
             f"--user-data-dir={folder / 'profile'}"]  # fmt: skip
    done = subprocess.run(
        [browser, *flags, (folder / "page.html").as_uri()], capture_output=True, timeout=120, check=False
    )
    return done.stdout.decode("utf-8", "replace")


class Root(HTMLParser):
    """The attributes of a page's root element."""

    def __init__(self, page: str):
        super().__init__()
        self.attributes: dict = {}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "html":
            self.attributes = dict(attrs)


def ran(page: str) -> list[str]:
    """Which attacks have left their mark on the root element."""
    return sorted(name for name in Root(page).attributes if name.startswith("data-ran"))


def test_no_attack_runs_in_a_browser(browser, site, tmp_path, request):
    if not browser:
        report_line(request.config, "browser: none found, so the report was not opened in one")
        pytest.skip(f"no browser found ({', '.join(BROWSERS[:3])}, ..): install chromium to run this test")
    address, asked = site
    texts = attacks(address)
    bare = "<!doctype html><html><head><title>bare</title></head><body>" + "\n".join(f"<p>{t}</p>-->" for t in texts)
    try:
        page = opened(browser, bare, tmp_path)
    except (OSError, subprocess.TimeoutExpired):
        page = ""
    if "<title>bare</title>" not in page:
        report_line(request.config, f"browser: {browser} does not start here, so the report was not opened in it")
        pytest.skip(f"{browser} does not start here")
    assert len(ran(page)) >= len(texts) - 3 and asked, "the attacks must work where nothing stops them"
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
        for text in texts:
            assert report.printable(text) in elements.text  # there to read
        assert outline(page) == outline(version)  # the browser sees the elements that we wrote, and no others
        assert not any(value and re.match(r"\s*(https?:)?//", value) for _, attributes in elements.found
                       for name, value in attributes.items() if name in ("src", "href", "srcset", "action", "data"))  # fmt: skip
    version = subprocess.run([browser, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    number = re.search(r"\d+(\.\d+)*", version)
    name = f"{browser.replace(chr(92), '/').split('/')[-1]} {number.group() if number else ''}".strip()
    report_line(
        request.config, f"browser: {name}, {len(marks)} of {len(texts)} payloads ran, {len(asked)} requests made"
    )
    assert not marks and not asked
