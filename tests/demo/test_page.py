"""The page of `odelt-fast demo` from outside: hostile requests over HTTP, and a browser that uses
it as a person does."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from odelt_fast.demo.settings import Dials
from tests.helpers.demo_server import DemoServer, demo_server
from tests.helpers.serving import HANG

pytest.importorskip("gradio")

GOOD = Dials(4, 0)
SLOW = Dials(12, 5, "rk4", guidance=3)
WAITING = 3


@pytest.fixture(scope="module")
def server() -> Iterator[DemoServer]:
    with demo_server(
        "--waiting", str(WAITING), quiet=False
    ) as started:  # Gradio prints what malformed calls lack
        yield started


def join(server: DemoServer, values: Any, name: str = "draw") -> httpx.Response:
    return httpx.post(f"{server.url}/gradio_api/call/{name}", json={"data": values}, timeout=HANG)


def result(server: DemoServer, event: str, name: str = "draw") -> tuple[str, Any]:
    """The last event of a call, complete or error, and its data."""
    with httpx.stream(
        "GET", f"{server.url}/gradio_api/call/{name}/{event}", timeout=HANG
    ) as stream:
        lines = [line for line in stream.iter_lines() if line]
    return lines[-2].removeprefix("event: "), json.loads(lines[-1].removeprefix("data: "))


def call(server: DemoServer, values: Any, name: str = "draw") -> tuple[str, Any]:
    """("complete", data), ("error", data) or ("refused", status) of a call."""
    answer = join(server, values, name)
    return (
        result(server, answer.json()["event_id"], name)
        if answer.status_code == 200
        else ("refused", answer.status_code)
    )


def alive(server: DemoServer) -> None:
    kind, data = call(server, GOOD)
    assert kind == "complete"
    assert "data:image/png;base64," in data[0]
    assert server.process.poll() is None, server.errors


def test_a_call_draws(server: DemoServer) -> None:
    alive(server)


def test_a_drawing_depends_on_every_dial(server: DemoServer) -> None:
    def picture(**changed: Any) -> str:
        kind, data = call(server, GOOD._replace(**changed))
        assert kind == "complete", data
        return str(data[0].split("base64,")[1].split('"')[0])

    first = picture()
    assert first == picture()
    changes: list[dict[str, Any]] = [
        {"depth": 8},
        {"exponent": 2},
        {"solver": "rk4"},
        {"guidance": 3},
        {"seed": 1},
        {"labels": "3"},
    ]
    assert len({first, *(picture(**change) for change in changes)}) == 7


def test_the_grid_comes_picture_by_picture(server: DemoServer) -> None:
    kind, data = call(server, GOOD, "grid")
    assert kind == "complete"
    assert data[0].count("<img") == 9
    assert data[0].count(" ms</td>") + data[0].count(" s</td>") == 9


def test_hostile_values_are_refused_and_the_page_lives_on(server: DemoServer) -> None:
    """Gradio's own checks are in the browser, for whom they are meant: here every dial gets what it
    cannot send."""
    values = [
        None,
        True,
        "x",
        "<img src=x onerror=alert(1)>",
        [],
        {},
        -1,
        1e308,
        10**30,
        0.3,
        "9" * 5000,
        [[[[[[[[[[1]]]]]]]]]],
        {"path": "/etc/passwd"},
    ]
    draw = random.Random(0)
    for place in range(len(GOOD)):
        for value in values:
            if (place, value) == (len(GOOD) - 1, None):
                continue
            sent = [value if i == place else good for i, good in enumerate(GOOD)]
            kind, data = call(server, sent, draw.choice(["draw", "grid"]))
            assert kind == "error" or (kind == "refused" and data in (400, 413, 422)), (
                sent,
                kind,
                data,
            )
            if kind == "error":
                allowed = ("must be", "not allowed", "labels go from")
                assert any(words in data["error"] for words in allowed), data
                assert "<" not in data["error"]
                assert "Traceback" not in str(data)
    alive(server)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"data": 5}',
        b'{"data": []}',
        b'{"data": [1,2,3,4,5,6,7,8,9]}',
        b'{"data": NaN}',
        b"\xff\xfe",
        b"[" * 15_000,
    ],
    ids=lambda body: repr(body)[:24],
)
def test_malformed_bodies_are_answered(server: DemoServer, body: bytes) -> None:
    for path in ("call/draw", "queue/join", "cancel", "reset"):
        answer = httpx.post(
            f"{server.url}/gradio_api/{path}",
            content=body,
            headers={"content-type": "application/json"},
            timeout=HANG,
        )
        if answer.status_code == 200 and path == "call/draw":
            assert result(server, answer.json()["event_id"])[0] == "error"
        else:
            assert answer.status_code in (200, 400, 413, 422, 500), (path, answer.status_code)
    alive(server)


def test_a_body_has_a_greatest_size_however_it_is_sent(server: DemoServer) -> None:
    url = f"{server.url}/gradio_api/call/draw"
    large = json.dumps({"data": [*GOOD[:-1], "1 " * 10_000]}).encode()
    assert (
        httpx.post(url, content=large, headers={"content-type": "application/json"}).status_code
        == 413
    )
    chunked = (large[i : i + 1000] for i in range(0, len(large), 1000))  # no content-length
    assert (
        httpx.post(url, content=chunked, headers={"content-type": "application/json"}).status_code
        == 413
    )


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("GET", "/gradio_api/file=http://127.0.0.1:1/"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1:1/"),
        ("POST", "//gradio_api/upload"),
        ("POST", "/gradio_api/call/../upload"),
        ("POST", "/gradio_api/%75pload"),
        ("GET", "/gradio_api/deep_link?session_hash=abcdefgh"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/login"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/gradio_api/run/draw"),
        ("GET", "/gradio_api/run-history/buckets"),
        ("GET", "/monitoring"),
        ("GET", "/monitoring/summary"),
        ("GET", "/assets/../../../../etc/passwd"),
        ("GET", "/assets/..%2f..%2f..%2fetc/passwd"),
        ("GET", "/static//etc/passwd"),
        ("DELETE", "/"),
        ("PUT", "/gradio_api/call/draw"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
    ],
)
def test_what_the_page_does_not_need_is_not_there(
    server: DemoServer, method: str, path: str
) -> None:
    answer = httpx.request(method, server.url + path)
    assert answer.status_code in (403, 404)
    assert "root:" not in answer.text


def test_another_site_that_resolves_to_this_machine_is_not_served(server: DemoServer) -> None:
    assert httpx.get(server.url, headers={"host": "attacker.example"}).status_code == 400
    assert httpx.get(server.url, headers={"host": "localhost:80"}).status_code == 200


def test_the_queue_is_bounded_and_says_so(server: DemoServer) -> None:
    """Of more requests than may wait the rest is told that the page is busy; all that were taken
    are answered, and then it is free."""
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: join(server, SLOW), range(16)))
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 503}
    assert all("Queue is full" in answer.text for answer in answers if answer.status_code == 503)
    taken = [answer.json()["event_id"] for answer in answers if answer.status_code == 200]
    with ThreadPoolExecutor(16) as pool:
        assert {kind for kind, _ in pool.map(lambda event: result(server, event), taken)} == {
            "complete"
        }
    alive(server)


def test_it_ends_quietly_while_visitors_are_connected() -> None:
    with (
        httpx.Client() as client,
        contextlib.ExitStack() as visitors,
        demo_server() as own,
    ):  # which is interrupted first
        for place in ("heartbeat/abcdefgh", "queue/data?session_hash=abcdefgh"):
            answer = visitors.enter_context(client.stream("GET", f"{own.url}/gradio_api/{place}"))
            assert answer.status_code == 200


def browser(folder: Path) -> Any:
    """A headless Chromium; where there is none the test is left out, and says so, unless
    ODELT_REQUIRE_BROWSER is set."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        missing.append("selenium")
    if missing:
        words = (
            f"the page was not tried in a browser: no {', no '.join(missing)} (Debian: apt-get"
            " install chromium chromium-driver)"
        )
        (pytest.fail if os.environ.get("ODELT_REQUIRE_BROWSER") else pytest.skip)(words)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
        " disable-component-update disable-sync"
    )
    for flag in (
        *flags.split(),
        "hide-scrollbars",
        "window-size=1280,1360",
        f"user-data-dir={folder}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def test_a_person_uses_the_page(tmp_path: Path) -> None:
    """Opens it, moves a slider, draws the grid, makes a mistake; nothing is fetched from elsewhere
    and the console stays empty."""
    driver = browser(tmp_path / "profile")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def wait(condition: Any, what: str) -> Any:
        return WebDriverWait(driver, HANG, ignored_exceptions=[Exception]).until(
            lambda _: condition(), what
        )

    def find(selector: str) -> Any:
        return driver.find_element(By.CSS_SELECTOR, selector)

    def picture() -> str:
        return str(find("#picture img").get_attribute("src"))

    with demo_server() as server:
        try:
            driver.get(server.url)
            first = wait(picture, "no picture")
            assert driver.title == "odelt-fast: digits"
            assert (
                driver.execute_script("return arguments[0].naturalWidth", find("#picture img"))
                == 5 * 64 + 4 * 2
            )
            find("#draw-grid").click()
            wait(lambda: len(driver.find_elements(By.CSS_SELECTOR, "#grid td img")) == 9, "no grid")
            assert all(
                cell.text.endswith("s")
                for cell in driver.find_elements(By.CSS_SELECTOR, "#grid td")
            )  # ms or s

            find("#depth input[type=range]").send_keys(Keys.ARROW_LEFT)
            second = wait(lambda: picture() if picture() != first else None, "no other depth")
            assert "l = 8, T = 4" in find("#picture").text
            find("#steps input[type=range]").send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
            wait(lambda: "l = 8, T = 1" in find("#picture").text, "no other T")
            assert "T = 1" in find("#steps").text
            third = picture()
            find("#another").click()
            wait(lambda: picture() != third, "no other seed")
            assert len({first, second, third, picture()}) == 4
            assert driver.execute_script(
                "return document.documentElement.scrollWidth <= window.innerWidth"
            )  # nothing sticks out
            assert (
                driver.execute_script("return arguments[0].naturalWidth", find("#plot img")) > 600
            )
            drawn = picture()
            if "ODELT_SCREENSHOT" in os.environ:
                time.sleep(1)  # for the marks of work in progress to fade
                driver.save_screenshot(os.environ["ODELT_SCREENSHOT"])

            seed = find("#seed input")
            seed.send_keys(Keys.CONTROL + "a")
            seed.send_keys("-1", Keys.ENTER)
            wait(
                lambda: (
                    "seed must be a whole number from 0 to 9007199254740991, not -1"
                    in find("body").text
                ),
                "no message",
            )
            assert picture() == drawn
            driver.save_screenshot(str(tmp_path / "page.png"))
            assert (tmp_path / "page.png").stat().st_size > 10_000
            assert [
                entry
                for entry in driver.get_log("browser")
                if entry["level"] in ("SEVERE", "WARNING")
            ] == []
            events = [
                json.loads(entry["message"])["message"] for entry in driver.get_log("performance")
            ]
            asked = [
                event["params"]["request"]["url"]
                for event in events
                if event["method"] == "Network.requestWillBeSent"
            ]
            assert [
                url
                for url in asked
                if not url.startswith((server.url, "data:", "blob:", "chrome:"))
            ] == []
            assert len(asked) > 20
        finally:
            driver.quit()
