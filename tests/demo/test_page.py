"""The page in a headless browser: what visitors see and do, and which hosts the page asks."""

import http.server
import json
import os
import re
import shutil
import sys
import threading
import time
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

import convmixer
from convmixer.demo import server as module
from convmixer.demo.classifier import Classifier
from convmixer.demo.text import describe

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'convmixer[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="these tests need playwright: pip install playwright")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
NAMES = ["convmixer_128_8_ks7_p2", "convmixer_256_8"]
ADDRESSES: list[str] = []  # the hosts that this process has asked since the module began
TIMEOUT = 120_000  # milliseconds


def _note(event: str, arguments: tuple) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        ADDRESSES.append(str(arguments[1][0]))
    elif event == "socket.getaddrinfo":
        ADDRESSES.append(str(arguments[0]))


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=ARGUMENTS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a page with two models. Its server runs in this process, in an empty working directory."""
    sys.addaudithook(_note)  # it stays until the process ends
    ADDRESSES.clear()
    with pytest.MonkeyPatch.context() as patch, serving() as address:
        patch.chdir(tmp_path_factory.mktemp("working"))
        yield address


@contextmanager
def serving():
    """Serve a page with two models as long as the block lasts."""
    server = module.server(module.create_app(NAMES, device="cpu", backends=["eager"]))
    with module.listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def visit(browser, address, width=1300):
    """Open the page as a new visitor, and collect the browser's requests and its error messages."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    context.set_default_timeout(TIMEOUT)
    page = context.new_page()
    page.requests, page.errors = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("input[type=file]", state="attached")
    yield page
    context.close()


@pytest.fixture
def page(browser, address):
    with visit(browser, address) as page:
        yield page


def upload(page, path):
    page.set_input_files("input[type=file]", str(path))


def wait_for_bars(page, label):
    page.wait_for_selector(f'[data-testid="label-output-value"]:text-is("{label}")')


def bars(page):
    """The labels and values of the bars, in their order."""
    return [
        (meter.get_attribute("aria-label"), float(meter.get_attribute("value")))
        for meter in page.query_selector_all("meter")
    ]


def expected(name, path):
    model = convmixer.create_model(name, pretrained=True, device="cpu")
    return [(label, pytest.approx(p, abs=1e-6)) for label, p in convmixer.predict(model, path)]


def test_a_picture_its_classes_its_map_and_times(page, cat):
    assert not page.query_selector_all("meter")
    upload(page, cat)
    wait_for_bars(page, "cat")
    assert bars(page) == expected(NAMES[0], cat)
    heat = page.wait_for_selector("img[alt^='The regions of the picture']")
    page.wait_for_function(
        "image => image.complete && image.naturalWidth == 448 && image.naturalHeight == 448", arg=heat
    )
    page.wait_for_selector(".times td:text-is('fastest')")
    (row,) = page.query_selector_all(".times tbody tr")
    backend, milliseconds, _ = (cell.inner_text() for cell in row.query_selector_all("td"))
    assert backend == "eager"
    assert float(milliseconds) > 0
    assert page.inner_text(".times p") == f"Time for one image, {NAMES[0]}"


def test_a_broken_file_takes_the_old_answer_away(page, cat, tmp_path):
    upload(page, cat)
    wait_for_bars(page, "cat")
    page.click('[aria-label="Remove Image"]')
    page.wait_for_selector("meter", state="detached")
    (tmp_path / "broken.png").write_text("no picture")
    upload(page, tmp_path / "broken.png")
    alert = page.wait_for_selector("[role=alert]")
    assert alert.inner_text() == "'broken.png' is not an image that Pillow can read"
    assert not page.query_selector_all("meter, img[alt^='The regions'], .times table")
    page.click('[aria-label="Remove Image"]')
    upload(page, cat)
    wait_for_bars(page, "cat")
    page.wait_for_selector("[role=alert]", state="detached")


def test_pictures_that_follow_one_another_at_once(page, cat, tmp_path):
    """None is lost, although the answer to the removal is still on its way when the next picture comes."""
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    for _ in range(8):
        upload(page, broken)
        page.wait_for_selector("[role=alert]")
        page.click('[aria-label="Remove Image"]')
        upload(page, cat)
        wait_for_bars(page, "cat")
        page.click('[aria-label="Remove Image"]')
    page.wait_for_selector("meter", state="detached")
    upload(page, cat)
    page.wait_for_selector(".times td:text-is('fastest')")


def test_times_of_a_picture_that_is_gone(browser, cat, monkeypatch):
    """They vanish with it, and do not come back when the backend that was being timed is ready."""
    monkeypatch.setattr(Classifier, "_milliseconds", lambda self, backend: time.sleep(2) or 1.0)
    with serving() as address, visit(browser, address) as page:
        upload(page, cat)
        page.wait_for_selector(".times td:text-is('being timed')")
        page.click('[aria-label="Remove Image"]')
        page.wait_for_selector(".times table", state="detached")
        page.wait_for_timeout(3000)
        assert not page.query_selector_all(".times table")


def test_two_at_once(browser, address, photographs):
    paths = photographs / "cat.png", photographs / "dog.jpg"
    with visit(browser, address) as one, visit(browser, address) as two:
        for page, path in zip((one, two), paths, strict=True):
            upload(page, path)
        for page, path in zip((one, two), paths, strict=True):
            wait_for_bars(page, path.stem)
            assert bars(page) == expected(NAMES[0], path)
            page.wait_for_selector(".times td:text-is('fastest')")


def test_another_model(page, cat):
    first, second = (describe(c) for c in module.open_classifiers(NAMES, device="cpu", backends=()).values())
    page.wait_for_selector(f"text={first}")
    upload(page, cat)
    wait_for_bars(page, "cat")
    page.click("[role=combobox]")
    page.click(f"[role=option]:has-text('{NAMES[1]}')")
    page.wait_for_selector(f"text={second}")
    page.wait_for_function(
        f"() => document.querySelector('meter')?.value.toFixed(4) == {expected(NAMES[1], cat)[0][1].expected:.4f}"
    )
    assert bars(page) == expected(NAMES[1], cat)
    page.wait_for_selector(f".times p:has-text('{NAMES[1]}')")


@pytest.mark.parametrize("stream", [False, True])
def test_only_uploaded_files_are_read(address, cat, stream):
    """A request that names another file of this machine, or a URL, which the page itself never sends."""
    before = len(ADDRESSES)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as other:
        for path in (str(cat), f"http://127.0.0.1:{other.server_port}/cat.png"):
            file = {"path": path, "is_stream": stream, "meta": {"_type": "gradio.FileData"}}
            text = call(address, [NAMES[0], file])
            assert "confidence" not in text
            assert text.startswith("event: error") or "no image at" in text
        other.socket.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has connected
            other.socket.accept()
    del ADDRESSES[before:]  # Gradio asks a name server about a host that a request names


def test_pictures_are_deleted_when_the_server_ends(tmp_path, monkeypatch, cat):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with serving() as address:
        before = set(tmp_path.rglob("*.*"))
        head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="cat.png"\r\n\r\n'
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        body = head + cat.read_bytes() + b"\r\n--b--\r\n"
        with urlopen(Request(f"{address}/gradio_api/upload", body, headers), timeout=60) as response:
            (path,) = json.load(response)
        assert "confidence" in call(address, [NAMES[0], {"path": path, "meta": {"_type": "gradio.FileData"}}])
        assert {file.name for file in set(tmp_path.rglob("*.*")) - before} == {"cat.png", "image.webp"}
    assert set(tmp_path.rglob("*.*")) <= before


def call(address, data):
    """Ask the server to classify, as a program would, and return its answer."""
    url, headers = f"{address}/gradio_api/call/classify", {"Content-Type": "application/json"}
    with urlopen(Request(url, json.dumps({"data": data}).encode(), headers), timeout=60) as response:
        event = json.load(response)["event_id"]
    with urlopen(f"{url}/{event}", timeout=60) as response:
        return response.read().decode()


def test_an_example(page):
    page.wait_for_selector("img[src$='dog.jpg']")
    examples = page.query_selector_all("img[src$='.jpg']")
    assert [os.path.basename(e.get_attribute("src")) for e in examples] == [
        "airplane.jpg",
        "cat.jpg",
        "coffee.jpg",
        "dog.jpg",
    ]
    examples[0].click()
    wait_for_bars(page, "airplane")


def test_a_camera_is_offered(page):
    assert page.query_selector('[aria-label="Capture from camera"]')


def test_a_telephone(browser, address, cat):
    with visit(browser, address, width=400) as page:
        upload(page, cat)
        wait_for_bars(page, "cat")
        page.wait_for_selector(".times td:text-is('fastest')")
        assert page.evaluate("document.documentElement.scrollWidth") == 400


def test_nothing_leaves_the_machine(page, address, cat):
    """Neither the browser of a visit, nor the process that opened the models and serves the page, asks another host."""
    upload(page, cat)
    wait_for_bars(page, "cat")
    page.wait_for_selector(".times td:text-is('fastest')")
    page.wait_for_timeout(1000)  # the page keeps a connection open, so that it is never idle
    assert len(page.requests) > 10
    assert {urlsplit(url).hostname for url in page.requests if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}
    assert not page.errors
    assert set(ADDRESSES) <= {"127.0.0.1", "localhost", "::1"}
    assert "convmixer" in page.title()


def test_the_browser_lets_nothing_through(page, address):
    """If a component asked another host, here this server by another name, the policy would refuse it."""
    page.evaluate("fetch(location.href)")
    with pytest.raises(playwright.Error, match=r"Failed to fetch|Content Security Policy"):
        page.evaluate("url => fetch(url, {mode: 'no-cors'})", address.replace("127.0.0.1", "localhost"))
    assert re.search("Content Security Policy", " ".join(page.errors))
