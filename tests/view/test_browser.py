"""The gallery in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.gallery import eventually, served
from tests.support.made_runs import HOSTILE, PARAMS, MadeRun, many_lines
from zimage_runner.outputs.stars import load_stars

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
AXE = Path(__file__).parents[2] / ".ci" / "axe-core" / "axe.min.js"
"""From the npm package axe-core; .ci/run fetches it."""
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
SWEEP = "multirun/x/2026-11-28_22-00-00"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every kind."""
    root = tmp_path_factory.mktemp("view") / "outputs"
    MadeRun(root / "a/pets", ["a cat", "a dog", "a bird"], [1, 2, 3, 4]).add_all(failed=[(1, 2)]).finish()
    started = root / "a/pets/items/00000_p/seed_1/record.json"
    record = json.loads(started.read_text(encoding="utf-8"))
    inputs = {"image": {"path": "/drawings/cat.png", "digest": "0" * 64, "width": 64, "height": 64}, "strength": 0.6}
    started.write_text(json.dumps(record | {"inputs": inputs}), encoding="utf-8")
    MadeRun(root / "b/hostile", HOSTILE, [1]).add_all().finish()
    for job, (steps, scale) in enumerate([(4, 0.0), (4, 3.0), (8, 0.0), (8, 3.0)]):
        params = {**PARAMS, "num_inference_steps": steps, "guidance_scale": scale}
        overrides = [f"sampling.num_inference_steps={steps}", f"sampling.guidance_scale={scale}"]
        MadeRun(root / SWEEP / str(job), ["a cat", "a dog"], [1], params, overrides).add_all().finish()
    (root / SWEEP / "multirun.yaml").write_text("{}", encoding="utf-8")
    many_lines(root / "c/many", 10_000, picture=Image.new("RGB", (48, 48), (90, 140, 120)))
    return root


@pytest.fixture(scope="module")
def address(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(root, tmp_path_factory.mktemp("cache")) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tool:
        found = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


Open = Callable[..., Any]


EXPECTED = "q=seed%3Dx"
"""An address that answers with an error in these tests: the question makes no sense. All thumbnails must come."""


def is_fault(message: Any) -> bool:
    return message.type in ("error", "warning") and EXPECTED not in message.location["url"]


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Open]:
    """``page("#/all")``: that view. Whatever the console says against it fails the test."""
    contexts, said = [], []

    def make(view: str, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": 1200, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(8000)
        page.on("console", lambda m: said.append(f"{m.text} {m.location}") if is_fault(m) else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"{address}/{view}")
        return page

    yield make
    for context in contexts:
        context.close()
    assert said == []


def until(page: Any, expression: str) -> None:
    """Wait for it to be true. Playwright's own waiting evaluates text in the page, which the page forbids."""
    eventually(lambda: page.evaluate(expression))


def scope_of(page: Any, path: str) -> str:
    """The address of a run's view."""
    runs = page.evaluate("fetch('/api/runs').then((answer) => answer.json())")["runs"]
    return f"#/run/{next(run['id'] for run in runs if run['path'] == path)}"


RUNS = """(path) => fetch('/api/runs').then((answer) => answer.json())
.then((all) => all.runs.some((run) => run.path === path && run.done))"""


def visit(page: Any, path: str, rest: str = "") -> str:
    """Go to a run, once the gallery knows it."""
    eventually(lambda: page.evaluate(RUNS, path))
    address = scope_of(page, path)
    page.evaluate("(hash) => { location.hash = hash; }", address + rest)
    return address


def test_from_the_runs_to_a_picture_by_keyboard(page: Open) -> None:
    tab = page("")
    card = tab.get_by_role("link", name="a", exact=True).or_(tab.locator(".card a", has_text="pets"))
    card.first.focus()
    tab.keyboard.press("Enter")
    tab.locator(".tile img").first.wait_for()
    assert tab.locator("h1").inner_text() == "pets"
    assert tab.locator(".tile").count() == 12
    assert "all black" in tab.locator(".tile .failed").inner_text()
    tab.keyboard.press("End")
    tab.keyboard.press("ArrowLeft")
    assert tab.evaluate("document.activeElement.textContent") == "a cat seed 2"
    tab.keyboard.press("Enter")
    viewer = tab.locator(".viewer")
    viewer.wait_for()
    until(tab, "document.querySelector('.large').naturalWidth === 64")
    tab.keyboard.press("ArrowRight")
    until(tab, "document.querySelector('.file-name .name').textContent === '00000_p/seed_1'")
    assert "12 of 12" in viewer.inner_text()
    tab.keyboard.press("+")
    until(tab, "document.querySelector('.zoom-level').textContent === '1.4×'")
    tab.keyboard.press("Escape")
    viewer.wait_for(state="detached")
    assert tab.evaluate("document.activeElement.textContent") == "a cat seed 1"
    tab.keyboard.press("?")
    assert tab.locator("dialog").is_visible()


def test_the_address_of_a_picture_works_by_itself_and_copies(page: Open, root: Path) -> None:
    tab = page("", permissions=["clipboard-read", "clipboard-write"])
    visit(tab, "a/pets", "?sort=prompt")
    tab.locator(".tile a").first.click()
    tab.locator(".viewer .info h3").first.wait_for()
    tab.reload()
    tab.locator(".viewer .info h3").first.wait_for()
    assert "/drawings/cat.png" in tab.locator(".viewer .info").inner_text()  # what it came from
    for name, text in (("Copy the prompt", "a cat"), ("Copy the seed", "1")):
        tab.get_by_label(name).click()
        until(tab, f"navigator.clipboard.readText().then((had) => had === '{text}')")
    tab.get_by_text("Command to draw it again").click()
    until(tab, "navigator.clipboard.readText().then((t) => t.startsWith('python -m zimage_runner model='))")
    tab.locator(".strip a").nth(1).click()
    until(tab, "document.querySelector('.file-name .name').textContent.endsWith('seed_3')")


def test_filters_are_kept_in_the_address(page: Open) -> None:
    tab = page("")
    visit(tab, "a/pets")
    tab.locator(".tile").first.wait_for()
    tab.keyboard.press("/")
    tab.keyboard.type("dog seed=1-3")
    until(tab, "document.querySelector('.total').textContent === '3 pictures'")
    tab.get_by_label("State").select_option("failed")
    until(tab, "document.querySelector('.total').textContent === '1 picture'")
    assert "status=failed" in tab.url
    tab.reload()
    until(tab, "document.querySelector('.total').textContent === '1 picture'")
    tab.get_by_label("Search prompts").fill("nothing like it")
    tab.get_by_role("button", name="Clear the filters").click()
    until(tab, "document.querySelector('.total').textContent === '12 pictures'")
    tab.get_by_label("Search prompts").fill("seed=x")
    tab.get_by_role("alert").get_by_text("write seed=7").wait_for()


def test_live_updates_and_a_run_that_breaks_off(page: Open, root: Path) -> None:
    run = MadeRun(root / "d/live", ["a fox"], range(40))
    lock = run.hold()
    for seed in range(8):
        run.add(0, seed)
    tab = page("")
    visit(tab, "d/live")
    tab.locator(".pill.running").wait_for()
    until(tab, "document.querySelectorAll('.tile').length === 8")
    tab.locator(".tile a").nth(2).focus()
    before = tab.evaluate("document.activeElement.textContent")
    run.add(0, 8)
    until(tab, "document.querySelectorAll('.tile').length === 9")
    assert tab.locator(".tile a").first.text_content() == "a fox seed 8"
    assert tab.evaluate("document.activeElement.textContent") == before
    assert tab.get_by_role("progressbar").get_attribute("aria-valuenow") == "9"
    lock.release()  # as the kernel does for a killed process; no summary is written
    tab.locator(".pill.interrupted").wait_for()
    assert "9 of 40" in tab.locator(".facts").inner_text()


def test_scrolling_through_ten_thousand(page: Open) -> None:
    tab = page("")
    visit(tab, "c/many", "?sort=prompt")
    until(tab, "document.querySelector('.total').textContent === '10,000 pictures'")
    height = tab.evaluate("document.querySelector('#main').scrollHeight")
    for share in (0.13, 0.5, 0.51, 0.9, 1):
        tab.evaluate(
            "([share, height]) => { document.querySelector('#main').scrollTop = share * height; }", [share, height]
        )
        until(
            tab,
            """(() => { const main = document.querySelector('#main').getBoundingClientRect();
            const seen = [...document.querySelectorAll('.tile')].filter((tile) => {
                const box = tile.getBoundingClientRect(); return box.bottom > main.top && box.top < main.bottom; });
            return seen.length >= 10 && seen.every((tile) => tile.querySelector('.seed')); })()""",
        )
        places = tab.evaluate("[...document.querySelectorAll('.tile')].map((tile) => Number(tile.ariaPosInSet))")
        assert places == list(range(places[0], places[0] + len(places)))  # no gap, in the order of reading
        assert len(places) < 100
    assert places[-1] == 10_000
    assert "number 9999" in tab.locator(".tile a").last.text_content()
    tab.keyboard.press("Home")
    until(tab, "document.querySelector('.tile').ariaPosInSet === '1'")


def test_stars_are_kept(page: Open, root: Path) -> None:
    tab = page("")
    visit(tab, "a/pets", "?sort=prompt")
    tab.locator(".tile a").nth(2).focus()
    tab.keyboard.press("s")
    tab.locator(".tile.starred").wait_for()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("x")
    tab.locator(".tile.rejected").wait_for()
    stars = load_stars(root / "a/pets")
    assert (stars.starred, stars.rejected) == ({"items/00000_p/seed_3"}, {"items/00000_p/seed_4"})
    tab.reload()
    tab.locator(".tile.starred").wait_for()
    tab.get_by_label("Mark").select_option("starred")
    until(tab, "document.querySelector('.total').textContent === '1 picture'")
    tab.locator(".tile a").first.click()
    tab.locator(".viewer").wait_for()
    tab.locator(".viewer .info h3").first.wait_for()
    tab.keyboard.press("s")
    eventually(lambda: not load_stars(root / "a/pets").starred)


def test_compare(page: Open) -> None:
    tab = page("")
    visit(tab, "a/pets", "?sort=prompt")
    tab.locator(".tile a").first.focus()
    for key in ("c", "ArrowRight", "c", "ArrowRight", "c"):
        tab.keyboard.press(key)
    tab.get_by_role("button", name="Compare").click()
    until(tab, "[...document.querySelectorAll('.large')].filter((i) => i.naturalWidth).length === 3")
    box = tab.locator(".stage").first.bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.4)
    tab.mouse.wheel(0, -600)
    until(tab, "document.querySelectorAll('.stage.zoomed').length === 3")
    shown = tab.evaluate("[...document.querySelectorAll('.large')].map((image) => image.style.transform)")
    assert len(set(shown)) == 1
    assert "scale(1)" not in shown[0]
    assert "seed 3" in tab.locator("figcaption").nth(2).inner_text()
    tab.keyboard.press("Escape")
    tab.get_by_role("button", name="Clear the selection").click()
    for n in (0, 1):
        tab.locator(".tile a").nth(n).focus()
        tab.keyboard.press("c")
    tab.get_by_role("button", name="Compare").click()
    tab.get_by_role("button", name="Slider").click()
    tab.get_by_role("slider").fill("20")
    assert "inset(0px 0px 0px 20%)" in tab.locator(".cover").get_attribute("style")


def test_the_grid_of_a_multirun(page: Open) -> None:
    tab = page("")
    tab.locator(".card a", has_text="x").first.wait_for()
    tab.evaluate("(path) => { location.hash = `#/sweep/${encodeURIComponent(path)}/grid`; }", SWEEP)
    table = tab.locator(".axes-table table")
    table.wait_for()
    assert tab.get_by_label("Columns").input_value() in ("num_inference_steps", "guidance_scale")
    assert table.locator("img").count() == 4
    assert tab.get_by_label("Page", exact=True).locator("option").all_inner_texts() == ["a cat", "a dog"]
    tab.get_by_label("Rows").select_option("prompt")  # takes the place of the pages' field
    until(tab, "[...document.querySelectorAll('th[scope=row]')].map((t) => t.textContent).join() === 'a cat,a dog'")
    with tab.expect_download() as download:
        tab.get_by_role("link", name="Save as picture").click()
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")


def test_hostile_prompts_are_text(page: Open) -> None:
    tab = page("")
    visit(tab, "b/hostile", "?sort=prompt")
    tab.locator(".tile img").nth(3).wait_for()
    assert tab.locator(".tile .prompt").all_text_contents() == list(HOSTILE)
    for n in range(len(HOSTILE)):
        tab.locator(".tile a").nth(n).click()
        tab.locator(".viewer .info .text").first.wait_for()
        assert tab.locator(".viewer .info .text").first.text_content() == HOSTILE[n]
        tab.keyboard.press("Escape")
        tab.locator(".viewer").wait_for(state="detached")
    assert tab.evaluate("window.pwned") is None
    assert tab.locator("#main script, #main svg[onload], .tile .prompt *").count() == 0


@pytest.mark.skipif(not AXE.is_file(), reason=f"no {AXE}: npm pack axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(page: Open, scheme: str) -> None:
    tab = page("", color_scheme=scheme, reduced_motion="reduce", bypass_csp=True)
    pets = visit(tab, "a/pets", "?sort=prompt")
    tab.locator(".tile img").first.wait_for()
    sweep = f"#/sweep/{SWEEP.replace('/', '%2F')}"
    views = (
        ("#/", ".card img"), (pets, ".tile img"), (f"{pets}?q=zzz", ".empty h2"), (f"{pets}/p/1", ".info .strip img"),
        (sweep, ".jobs"), (f"{sweep}/grid", ".axes-table img"), ("#/compare/1,2", "figure img"),
        ("#/compare/1,2?mode=slider", ".divider"),
    )  # fmt: skip
    tab.add_script_tag(path=AXE)
    for view, ready in views:
        tab.evaluate("(hash) => { location.hash = hash; }", view)
        tab.locator(ready).first.wait_for()
        found = tab.evaluate("axe.run(document, {resultTypes: ['violations']}).then((r) => r.violations)")
        told = [(rule["id"], node["target"], node["failureSummary"]) for rule in found for node in rule["nodes"]]
        assert not told, (view, told)
