"""The operator's page in a real browser, on a real pair that a real session works with."""

from __future__ import annotations

import browser as browsers
import grpc
import pytest
from browser import Browser
from robot import at_work

from robodual.pair import Options, Pair
from robodual_client import wire
from robodual_client.wire import rpc

TOKEN = "a-token-of-sixteen-or-more"
INSTRUCTION = '<b id="injected">lift</b> the red block <img src=x onerror="window.injected = 1"> & "push" it'

pytestmark = pytest.mark.skipif(
    browsers.EXECUTABLE is None, reason=f"needs Chromium: none of {', '.join(browsers.NAMES)} is on PATH"
)


def test_an_operator_sees_a_session_live_and_that_the_service_is_gone() -> None:
    options = Options("toy", device="cpu", settings={"ROBODUAL_TOKENS": TOKEN})
    with Pair(options) as pair, Browser() as browser:
        with at_work(pair, INSTRUCTION, "arm-1", token=TOKEN):
            browser.open(f"http://127.0.0.1:{pair.http_ports['specialist']}/operator/")
            _assert_token_is_asked_for(browser)
            browser.type("#token", TOKEN)
            _assert_live(browser)
            _assert_instruction_is_text(browser)
            _assert_token_is_kept_in_the_tab_alone(browser)
            _assert_another_session_can_be_chosen(browser, pair)
            _assert_errors_are_shown(browser, pair)
            _assert_nothing_is_asked_for_in_the_background(browser)
            _assert_everybody_can_read_it(browser)
            assert browser.complaints == []
        pair.stop()
        browser.until("document.querySelector('#status').dataset.state == 'lost'")
        assert "connection lost" in browser.text("#status")
        browser.click("#forget")
        browser.until("!document.querySelector('#door').hidden")
        assert browser.evaluate("sessionStorage.length") == 0


def _assert_token_is_asked_for(browser: Browser) -> None:
    browser.until("!document.querySelector('#door').hidden")
    browser.type("#token", "a-wrong-token-of-16-characters")
    browser.until("document.querySelector('#refusal').innerText != ''")
    assert browser.text("#refusal") == "The service does not know this token."
    assert browser.evaluate("document.querySelector('#board').hidden")
    # Without a token and with a wrong one; the browser itself writes both answers on its console.
    assert ["401 (Unauthorized)" in said for said in browser.complaints] == [True, True]
    browser.complaints.clear()


def _assert_live(browser: Browser) -> None:
    browser.until("document.querySelector('#static').naturalWidth == 200")
    browser.until("document.querySelector('#gripper').naturalWidth == 84")
    assert browser.evaluate("document.querySelector('#status').dataset.state") == "live"
    first = browser.evaluate("document.querySelector('#static').src")
    browser.until(f"document.querySelector('#static').src != {first!r}")
    # Ages go up and, with the next thought, down.
    browser.evaluate(
        "window.ages = []; setInterval(() => ages.push(Number(document.querySelector('#age').innerText)), 50)"
    )
    browser.until("new Set(ages).size >= 3 && ages.some((age, index) => age < ages[index - 1])")
    browser.until("document.querySelectorAll('.plot polyline.executed').length == 7")
    browser.until("document.querySelector('#plot-x polyline.executed').points.length > 5")
    browser.until("document.querySelectorAll('#plot-x polyline.reference').length > 1")
    assert browser.evaluate("document.querySelector('#plot-x polyline.reference').points.length") == 8
    browser.until("/^p50 [\\d.]+p99 [\\d.]+$/.test(document.querySelector('#stage-total .figures').textContent)")
    browser.until("Number(document.querySelector('#total-rate').innerText) > 0")


def _assert_instruction_is_text(browser: Browser) -> None:
    assert browser.text("#instruction") == INSTRUCTION
    assert browser.text("#sessions .instruction") == INSTRUCTION
    assert browser.evaluate("document.querySelector('#injected')") is None
    assert browser.evaluate("window.injected") is None
    assert browser.evaluate("document.querySelectorAll('img').length") == 3  # the sign and the two cameras


def _assert_token_is_kept_in_the_tab_alone(browser: Browser) -> None:
    assert TOKEN not in browser.evaluate("location.href")
    assert not browser.evaluate(f"performance.getEntries().some((entry) => entry.name.includes({TOKEN!r}))")
    assert browser.evaluate("document.querySelector('#token').value") == ""
    assert browser.evaluate("localStorage.length + document.cookie.length") == 0
    assert browser.evaluate("sessionStorage.getItem('robodual.token')") == TOKEN


def _assert_another_session_can_be_chosen(browser: Browser, pair: Pair) -> None:
    with _specialist(pair) as channel:
        reset = rpc.Stub(channel, rpc.SPECIALIST).Reset
        for number in range(21):
            reset(wire.ResetRequest(session_id=f"idle-{number}", episode=1), metadata=_bearer(), timeout=20)
    browser.until("document.querySelector('#facts').innerText.includes('idle-20')")  # the newest
    browser.until("document.querySelector('#place').innerText == '1 of 2'")
    browser.click("#older")
    browser.until("document.querySelectorAll('#sessions li').length == 2")
    browser.click("[data-session=arm-1] button")
    browser.until("document.querySelector('#facts').innerText.includes('arm-1')")
    assert not browser.evaluate("document.querySelector('#follow').checked")
    browser.until("document.querySelector('#static').naturalWidth == 200")


def _assert_errors_are_shown(browser: Browser, pair: Pair) -> None:
    assert browser.text("#total-errors") == "0"
    with _specialist(pair) as channel, pytest.raises(grpc.RpcError):
        rpc.Stub(channel, rpc.SPECIALIST).Act(
            wire.ActRequest(session_id="nobody", episode=1), metadata=_bearer(), timeout=20
        )
    browser.until("document.querySelector('#total-errors').innerText == '1'")
    browser.until("document.querySelectorAll('#problems tr').length == 1")
    assert "NOT_FOUND\tnobody\tsession_id: nobody is not open here" in browser.text("#problems")


def _assert_nothing_is_asked_for_in_the_background(browser: Browser) -> None:
    picture = "document.querySelector('#static').src"
    turn = (
        "Object.defineProperty(document, 'hidden', {{value: {}, configurable: true}});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    browser.evaluate(turn.format("true"))
    last = browser.evaluate(picture)
    browser.evaluate("new Promise((resolve) => setTimeout(resolve, 1000))")
    assert browser.evaluate(picture) == last
    browser.evaluate(turn.format("false"))
    browser.until(f"{picture} != {last!r}")


def _assert_everybody_can_read_it(browser: Browser) -> None:
    assert browser.nameless() == []
    grounds = []
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        grounds.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(set(grounds)) == 2
    for width in (320, 390, 800):
        browser.resize((width, 800), phone=True)
        assert browser.evaluate("document.scrollingElement.scrollWidth") <= width


def _specialist(pair: Pair) -> grpc.Channel:
    return grpc.insecure_channel(pair.addresses["specialist"])


def _bearer() -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {TOKEN}")]
