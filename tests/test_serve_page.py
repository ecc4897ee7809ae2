"""The page in headless Chromium, where `playwright` and a browser are installed: over the stand-in engine, as a person would.

Planted faults seen to fail: an answer put in as markup; an answer not added to the conversation; a stop button of no effect.
"""
import contextlib
import json
import shutil
import time

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested with the package playwright")
pytest.importorskip("fastapi", reason="the service needs the extra 'serve'")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("the page is tested in Chromium, and none is installed", allow_module_level=True)

from serving import at_rest, metrics, standin  # noqa: E402

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=OPTIONS)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, url, **context):
    """A page of its own; it must have asked nobody but its server, and have broken nothing."""
    where = browser.new_context(**context)
    page, asked, faults = where.new_page(), [], []
    page.set_default_timeout(10_000)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
    page.goto(url)
    yield page
    assert faults == [] and all(a.startswith((url, "data:")) for a in asked), (faults, asked)
    where.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with standin(tmp_path_factory.mktemp("page"), engine={"delay": 0.01}) as found:
        yield found.url


def say(page, text):
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")


def test_a_conversation(browser, url):
    with opened(browser, url) as page:
        sync_api.expect(page.get_by_role("heading")).to_have_text("standin")
        bodies = []
        page.on("request", lambda r: bodies.append(json.loads(r.post_data)) if r.method == "POST" else None)
        evil = "<img src=x onerror=alert(1)> &amp; 🙂\n  two"
        say(page, "say:" + evil)
        answer = page.locator(".assistant").nth(0)
        sync_api.expect(answer.locator(".note")).to_contain_text("tokens/s")
        assert answer.locator(".said").text_content() == evil and page.locator("#log img").count() == 0
        assert page.locator(".user .said").text_content() == "say:" + evil
        page.get_by_text("Settings").click()
        page.get_by_label("System prompt").fill("Be kind.")
        page.get_by_label("Temperature").fill("0.2")
        page.get_by_label("Most tokens").fill("3")
        say(page, "say:second answer")
        sync_api.expect(page.locator(".assistant .note").nth(1)).to_contain_text("cut at its length; 3 tokens")
        assert bodies[1]["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "say:" + evil},
                                         {"role": "assistant", "content": evil}, {"role": "user", "content": "say:second answer"}]
        assert bodies[1]["temperature"] == 0.2 and bodies[1]["max_completion_tokens"] == 3
        assert "max_completion_tokens" not in bodies[0]
        page.get_by_role("button", name="New conversation").click()
        assert page.locator("#log").text_content() == "" and page.locator("#empty").is_visible()
        say(page, "say:afresh")
        sync_api.expect(page.locator(".assistant .said")).to_have_text("afr")
        assert [m["content"] for m in bodies[2]["messages"]] == ["Be kind.", "say:afresh"]


def test_stop_ends_the_engines_work_and_keeps_what_came(browser, url):
    with opened(browser, url) as page:
        before = metrics(url)["dsv3_engine_generated_tokens_total"]
        say(page, "slow")
        said = page.locator(".assistant .said")
        sync_api.expect(said).not_to_be_empty()
        page.get_by_role("button", name="Stop").click()
        sync_api.expect(page.locator(".assistant .note")).to_have_text("stopped")
        m = at_rest(url, 2)
        assert m["dsv3_engine_generated_tokens_total"] - before < 300 and said.text_content()
        say(page, "say:and on")
        sync_api.expect(page.locator(".assistant .said").nth(1)).to_have_text("and on")


def test_text_comes_in_pieces(browser, url):
    with opened(browser, url) as page:
        say(page, "slow")
        lengths = []
        while len(set(lengths)) < 5 and len(lengths) < 200:
            lengths.append(len(page.locator(".assistant .said").text_content()))
            time.sleep(0.03)
        assert len(set(lengths)) == 5 and lengths == sorted(lengths)
        page.keyboard.press("Escape")
        sync_api.expect(page.locator(".assistant .note")).to_have_text("stopped")


def test_errors_are_shown_and_the_message_is_not_lost(browser, url):
    with opened(browser, url) as page:
        say(page, "x" * 2000)
        sync_api.expect(page.get_by_role("alert")).to_contain_text("this server takes at most")
        assert page.get_by_label("Your message").input_value() == "x" * 2000 and page.locator("#log").text_content() == ""
        say(page, "say:shorter")
        sync_api.expect(page.locator(".assistant .said")).to_have_text("shorter")
        assert page.get_by_role("alert").text_content() == ""


def test_the_key_is_asked_for(browser, tmp_path):
    with standin(tmp_path, api_key="sesame") as found, opened(browser, found.url) as page:
        key = page.get_by_role("textbox", name="API key")
        key.fill("wrong")
        key.press("Enter")
        sync_api.expect(key).to_have_value("")
        key.fill("sesame")
        page.get_by_role("button", name="Use it").click()
        sync_api.expect(page.get_by_role("heading")).to_have_text("standin")
        say(page, "say:open")
        sync_api.expect(page.locator(".assistant .said")).to_have_text("open")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(browser, url, scheme, tmp_path):
    with opened(browser, url, viewport={"width": 320, "height": 560}, color_scheme=scheme, has_touch=True) as page:
        page.get_by_text("Settings").click()
        say(page, "say:" + "a" * 60 + " " + "words " * 60)
        sync_api.expect(page.locator(".assistant .note")).to_contain_text("tokens/s")
        wide, high = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        assert wide <= 320 and high <= 560
        for name in ("Send", "New conversation"):
            box = page.get_by_role("button", name=name).bounding_box()
            assert box["height"] >= 40 and box["x"] >= 0 and box["x"] + box["width"] <= 320 and box["y"] + box["height"] <= 560
        back, ink = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
        light = [sum(map(int, c[4:-1].split(","))) / 765 for c in (back, ink)]
        assert (light[0] > 0.9 and light[1] < 0.2) if scheme == "light" else (light[0] < 0.2 and light[1] > 0.8)
        page.screenshot(path=str(tmp_path / "phone.png"))
