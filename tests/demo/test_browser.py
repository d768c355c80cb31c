"""The page in a browser: what a visitor sees is what was recorded."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from tiny_pipelines import at_work

from evaluations.overlay import overlay

pytestmark = pytest.mark.browser
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
FLAGS = (*FLAGS, "--disable-background-networking", "--disable-component-update")


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, server):
    """A call that opens the page anew, as another visitor; others' addresses are noted."""
    contexts, others = [], []

    def go(width=1280):
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: others.append(request.url))
        page.goto(server.url)
        page.wait_for_selector("#generate")
        return page

    yield go
    for context in contexts:
        context.close()
    outside = [u for u in others if not u.startswith((server.url, "data:", "blob:"))]
    assert not outside


def choose(page, **values):
    for name, value in values.items():
        if name == "what":
            page.click("#what input")
            page.get_by_role("option", name=str(value), exact=True).click()
        else:
            page.fill(f"#{name} input[type=number]", str(value))
            page.press(f"#{name} input[type=number]", "Tab")


def generate(page):
    page.click("#generate")
    page.wait_for_selector("#figures .dm-tiles", timeout=30000)


def pixels(page, kind):
    sources = page.eval_on_selector_all(f"#pictures img.{kind}", "all => all.map(i => i.src)")
    parts = [base64.b64decode(source.partition(",")[2]) for source in sources]
    return np.stack([np.array(Image.open(io.BytesIO(part))) for part in parts])


def drawn(server, label, seed, count=2, steps=4):
    pipe = next(iter(server.pipes.values()))
    words = {"sampler": "euler", "num_steps": steps, "cfg_scale": 2.0}
    *parts, result = pipe.stream([label] * count, seed=seed, **words)
    return parts, result


def test_pictures_appear_and_the_slider_shows_what_was_recorded(visit, server):
    page = visit()
    choose(page, what=2, count=2, seed=5, steps=4)
    generate(page)
    steps, result = drawn(server, 2, 5)
    np.testing.assert_array_equal(pixels(page, "dm-image"), result.images)
    for step, layer in ((1, 0), (3, 2)):
        choose(page, step=step, layer=layer)
        where = "mean over layers" if layer == 0 else f"MoE layer {layer} of 2"
        page.wait_for_selector(f"text=evaluation {step} of 4 · {where}")
        numbers = result.routing.numbers(None if layer == 0 else layer - 1)[step - 1]
        wanted = overlay(steps[step - 1].images, numbers, 2.5)
        np.testing.assert_array_equal(pixels(page, "dm-map"), wanted)
        np.testing.assert_array_equal(pixels(page, "dm-image"), steps[step - 1].images)
    # What reaches the eye is that picture, one square for each token.
    shown = page.locator("#pictures img.dm-map").first
    seen = np.array(Image.open(io.BytesIO(shown.screenshot())).convert("RGB"))
    height, width = seen.shape[:2]
    cell = seen[int(2.5 * height / 4), int(1.5 * width / 4)].astype(int)
    assert np.abs(cell - wanted[0][2, 1]).max() <= 3


def test_the_lens_and_the_classes(visit):
    page = visit()
    choose(page, count=2, steps=3)
    generate(page)
    page.get_by_role("tab", name="Expert lens").click()
    page.wait_for_selector("text=Expert 1 of layer 1 computed")
    page.get_by_role("tab", name="Hard and easy").click()
    page.click("#measure")
    page.wait_for_selector("#ranking .dm-row", timeout=30000)
    assert page.locator("#ranking .dm-row").count() == 3


def test_wrong_input_is_one_line_in_the_page_and_nothing_is_lost(visit):
    page = visit()
    choose(page, count=1, steps=2)
    generate(page)
    before = pixels(page, "dm-image")
    choose(page, seed=-4)
    page.click("#generate")
    page.wait_for_selector("text=seed: -4 is not allowed; allowed: a whole number")
    assert "Traceback" not in page.content()
    np.testing.assert_array_equal(pixels(page, "dm-image"), before)
    choose(page, step=1)  # what was drawn is still there to be looked at
    page.wait_for_selector("text=evaluation 1 of 2")
    choose(page, seed=1)
    generate(page)
    page.wait_for_function("document.querySelectorAll('#pictures img.dm-map').length === 1")


def test_two_tabs_at_once_do_not_mix(visit, server):
    pages = [visit(), visit()]
    for page, label in zip(pages, (0, 2), strict=True):
        choose(page, what=label, count=2, seed=label + 1, steps=4)
    for page in pages:
        page.click("#generate")
    for page, label in zip(pages, (0, 2), strict=True):
        page.wait_for_selector("#figures .dm-tiles", timeout=30000)
        _, result = drawn(server, label, label + 1)
        np.testing.assert_array_equal(pixels(page, "dm-image"), result.images)


def test_a_closed_tab_stops_the_work_and_makes_room(visit, server):
    page, calls = visit(), []
    model = next(iter(server.pipes.values())).pretrained.model
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    choose(page, count=16, steps=200)
    page.click("#generate")
    page.wait_for_selector("#pictures img.dm-map")
    assert at_work() == 1
    page.close()
    other = visit()
    choose(other, count=1, steps=2)
    generate(other)
    hook.remove()
    assert at_work() == 0
    assert len(calls) < 2 * 200  # all that was asked for first


def test_the_stop_button_stops(visit):
    page = visit()
    choose(page, count=16, steps=200)
    page.click("#generate")
    page.wait_for_selector("#pictures img.dm-map")
    page.click("#stop")
    for _ in range(100):
        if not at_work():
            break
        page.wait_for_timeout(50)
    assert at_work() == 0


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window(visit, width):
    page = visit(width)
    choose(page, count=2, steps=2)
    generate(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    card = page.locator("#pictures img.dm-map").first.bounding_box()
    assert card["width"] >= 80
