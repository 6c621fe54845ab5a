"""Both pages in headless Chromium: no error, no request, controls that do something, nothing wider than the screen."""

import csv
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sample_sweep import ALL_GROUPS, write_sweep

from torchlamp.evaluation.inspect import inspect
from torchlamp.report.data import read_report_data
from torchlamp.report.inspect_page import inspect_page
from torchlamp.report.report import report_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
LAPTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
TEXT = "the quick brown fox jumps over the lazy dog and then it sleeps again the fox"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        own = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield own
        own.close()


@pytest.fixture(scope="module")
def pages(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    study = read_report_data([write_sweep(tiny[0], folder)])
    found = {"report": report_page(study, ["somewhere"])}
    found["inspect"] = inspect_page(inspect(*tiny, TEXT, "ps3+strict:0.5"), "tiny")
    for name, html in found.items():
        (folder / f"{name}.html").write_text(html, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in found}


@contextmanager
def opened(browser: Any, page: Path, size: dict[str, int] = LAPTOP, scheme: str = "light") -> Iterator[Any]:
    """The page in a window; fails on a message of the console, an error, or a request for anything but itself."""
    context = browser.new_context(viewport=size, color_scheme=scheme)
    tab, wrong = context.new_page(), []
    tab.on("console", lambda message: wrong.append(f"console: {message.text}"))
    tab.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    tab.on(
        "request",
        lambda request: request.url != page.as_uri() and wrong.append(f"request: {request.url[:200]}"),
    )
    tab.goto(page.as_uri())
    tab.wait_for_selector(".plot .main-svg")
    yield tab
    context.close()
    assert wrong == []


def background(tab: Any) -> list[int]:
    words = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    return [int(part) for part in words.removeprefix("rgb(").removesuffix(")").split(",")]


def shown(tab: Any, plot: str) -> Any:
    """What plotly was given: the values of all traces of a plot."""
    return tab.evaluate(f"document.getElementById('{plot}').data.map(t => [t.name, t.x, t.y, t.z])")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
@pytest.mark.parametrize("name", ["report", "inspect"])
def test_pages_fit_the_screen_and_follow_the_system(browser, pages, name, size, scheme):
    with opened(browser, pages[name], size, scheme) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= size["width"]
        assert (sum(background(tab)) < 3 * 64) == (scheme == "dark")
        plots = tab.locator(".plot:visible")
        assert plots.count() >= 2
        for i in range(plots.count()):
            scrolls = "p => p.parentElement.scrollWidth > p.parentElement.clientWidth + 1"
            framed = plots.nth(i).locator("xpath=..").get_attribute("class") == "wide"
            if framed and tab.evaluate(scrolls, plots.nth(i).element_handle()):
                continue  # The map of a long text scrolls in its own frame on a phone.
            box = plots.nth(i).locator(".main-svg").first.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= size["width"] + 1
            paper = tab.evaluate("p => p.layout.paper_bgcolor", plots.nth(i).element_handle())
            assert (int(paper[1:3], 16) < 64) == (scheme == "dark")
        # A picture that holds one colour only would be an empty page.
        assert len(tab.screenshot()) > 20_000


@pytest.mark.parametrize("name", ["report", "inspect"])
def test_the_button_chooses_light_or_dark(browser, pages, name):
    with opened(browser, pages[name], scheme="light") as tab:
        found = []
        for _ in range(3):
            found.append((tab.inner_text("#theme"), sum(background(tab)) > 3 * 128))
            tab.click("#theme")
        assert found == [("Theme: system", True), ("Theme: light", True), ("Theme: dark", False)]
        assert tab.inner_text("#theme") == "Theme: system"


HOSTILE = """<img src=x onerror="window.hit='yes'"><script>window.hit='yes'</script><b>bold</b>"""


def hostile_report(tiny: Any, folder: Path) -> str:
    """A report whose strings end with HTML, but for those that the page compares with its own."""
    data = read_report_data([write_sweep(tiny[0], folder, ALL_GROUPS[:1])])
    for name in data.points.columns.drop(["rule", "tokens"]):
        data.points[name] = data.points[name].map(
            lambda v: v + HOSTILE if isinstance(v, str) and v != "all" else v
        )
    data.failed = [dict.fromkeys(point, HOSTILE) for point in data.failed]
    data.notes = [HOSTILE]
    data.environments = [{HOSTILE: HOSTILE, "list": [HOSTILE]}]
    return report_page(data, [HOSTILE])


def hostile_inspection(tiny: Any) -> str:
    seen = inspect(*tiny, TEXT, "ps3+strict:0.5")
    return inspect_page(replace(seen, policy=HOSTILE, tokens=[HOSTILE] * len(seen.tokens)), HOSTILE)


@pytest.mark.parametrize("name", ["report", "inspect"])
def test_html_in_results_and_texts_stays_text(browser, tiny, tmp_path, name):
    page = tmp_path / f"{name}.html"
    page.write_text(hostile_report(tiny, tmp_path) if name == "report" else hostile_inspection(tiny))
    with opened(browser, page) as tab:
        assert "onerror" in tab.inner_text("main")
        for select in tab.locator("select:visible").all():
            for value in [option.get_attribute("value") for option in select.locator("option").all()][-2:]:
                if value in [option.get_attribute("value") for option in select.locator("option").all()]:
                    select.select_option(value)
        assert tab.evaluate("window.hit") is None
        assert tab.locator("body img, body b, .plot script").count() == 0
        assert tab.locator("script").count() == 3
        if name == "report":
            tab.select_option("#site", index=0)
            tab.select_option("#accumulate", "")
            assert "onerror" in tab.inner_text("#points tbody")
            assert "onerror" in tab.inner_text("#equal tbody")
            assert tab.evaluate("document.getElementById('pareto').data[0].text[0]").count("<b>") == 1
        else:
            assert "<b>" not in tab.evaluate("document.getElementById('map').data[0].text[2][1]")


@pytest.mark.parametrize("name", ["report", "inspect"])
def test_the_browser_refuses_scripts_that_the_page_did_not_bring(browser, pages, tmp_path, name):
    """What would happen if text became HTML after all: the content-security policy stops it."""
    page = tmp_path / f"{name}.html"
    page.write_text(pages[name].read_text("utf-8").replace("</main>", HOSTILE + "</main>"))
    tab = browser.new_page()
    tab.goto(page.as_uri())
    tab.wait_for_selector(".plot .main-svg")
    assert tab.locator("main img").count() == 1
    assert tab.evaluate("window.hit") is None
    tab.close()


def test_controls_of_the_report_change_what_is_shown(browser, pages):
    with opened(browser, pages["report"]) as tab:
        before = shown(tab, "pareto")
        assert {trace[0] for trace in before} == {"strict", "running", "random"}
        for control, value in (
            ("accumulate", ""), ("metric", "flip"), ("axis", "cost_tile_16x16"), ("error", "_narrow"),
            ("tokens", "shuffled"), ("text", "code"), ("site", "mlp_up"),
        ):  # fmt: skip
            tab.select_option(f"#{control}", value)
            after = shown(tab, "pareto")
            assert after != before, control
            before = after
        # Shuffled tokens were measured for prose only: the control went back to what there is.
        assert tab.input_value("#tokens") == "real"
        assert "cost" in tab.inner_text("#pareto-title")
        assert tab.inner_text("#pareto-title").startswith("Flips")


def test_the_legend_hides_a_rule_everywhere(browser, pages):
    with opened(browser, pages["report"]) as tab:
        button = tab.locator('#legend button[data-rule="strict"]')
        button.click()
        assert button.get_attribute("aria-pressed") == "false"
        for plot in ("pareto", "mu"):
            assert not any(str(trace[0]).startswith("strict") for trace in shown(tab, plot))
        button.click()
        assert any(trace[0] == "strict" for trace in shown(tab, "pareto"))


def test_tables_maps_and_failures_of_the_report(browser, pages):
    with opened(browser, pages["report"]) as tab:
        assert tab.locator("#equal tbody tr").count() == 3
        assert "±" in tab.inner_text("#equal")
        headings = [h.strip() for h in tab.locator("#points thead th").all_inner_texts()]
        assert headings == [
            "Policy",
            "layers",
            "PPL",
            "ΔPPL",
            "KLD",
            "99 % KLD",
            "RMS Δp",
            "same top",
            "recomputed",
        ]
        tab.select_option("#accumulate", "")
        tab.select_option("#transform", "")
        assert tab.locator("#points tbody tr").count() == 4 + 18 + 2 + 3
        assert "CUDA is away" in tab.inner_text("#failed")
        rates = shown(tab, "heads")[0][3]
        assert (len(rates), len(rates[0])) == (2, 4)
        first = tab.input_value("#heads-policy")
        other = tab.locator("#heads-policy option").last.get_attribute("value")
        assert other != first
        tab.select_option("#heads-policy", other)
        assert shown(tab, "heads")[0][3] != rates
        assert sorted(shown(tab, "layers")[0][1]) == [0, 1]
        assert {site for trace in shown(tab, "sites") for site in trace[2]} == {"scores", "mlp_up"}
        assert "dequantised" in tab.inner_text("main")


def test_inspect_shows_another_head_and_marks_tokens(browser, pages):
    with opened(browser, pages["inspect"]) as tab:
        before = shown(tab, "map")
        title = tab.inner_text("#map-title")
        other = "0" if tab.input_value("#layer") == "1" else "1"
        tab.select_option("#layer", other)
        tab.select_option("#head", "3")
        assert shown(tab, "map") != before
        assert tab.inner_text("#map-title") != title
        assert tab.inner_text("#map-title").startswith(f"Layer {other}, head 3")
        word = tab.locator("#words button").nth(4)
        word.click()
        assert tab.locator("#words button").nth(4).get_attribute("aria-pressed") == "true"
        assert len(tab.evaluate("document.getElementById('map').layout.shapes")) == 2
        shades = tab.locator("#words").inner_html()
        tab.select_option("#shade", "kl")
        assert tab.locator("#words").inner_html() != shades


def test_a_press_on_the_map_of_heads_chooses_one(browser, pages):
    with opened(browser, pages["inspect"]) as tab:
        tab.select_option("#layer", "0")
        tab.select_option("#head", "0")
        box = tab.locator("#rates .nsewdrag").bounding_box()
        # The last of four heads, in the second of two layers.
        tab.mouse.click(box["x"] + box["width"] * 7 / 8, box["y"] + box["height"] * 3 / 4)
        tab.wait_for_function(
            "document.getElementById('map-title').textContent.startsWith('Layer 1, head 3')"
        )
        assert (tab.input_value("#layer"), tab.input_value("#head")) == ("1", "3")


def test_a_point_of_the_map_tells_its_token_and_scores(browser, pages):
    with opened(browser, pages["inspect"]) as tab:
        area, count = tab.locator("#map .nsewdrag"), tab.locator("#words button").count()
        area.scroll_into_view_if_needed()
        box = area.bounding_box()
        query, cell = count // 2, box["width"] / count
        tab.mouse.move(box["x"] + 0.3 * cell, box["y"] + (query + 0.3) * box["height"] / count)
        tab.mouse.move(box["x"] + 0.6 * cell, box["y"] + (query + 0.6) * box["height"] / count)
        tab.wait_for_selector("#map .hoverlayer text")
        words = tab.locator("#map .hoverlayer").text_content()
        for part in (f"query {query}", "key 0", "probability", "score, low precision", "score, float32"):
            assert part in words


def test_points_are_sorted_and_counted(browser, pages):
    with opened(browser, pages["report"]) as tab:

        def column() -> list[str]:
            return tab.evaluate(
                "[...document.querySelectorAll('#points tbody tr')].map(r => r.lastElementChild.textContent)"
            )

        rates = [float(text.removesuffix(" %")) for text in column()]
        assert f"{len(rates)} of " in tab.inner_text("#points-count")
        tab.click("#points th:last-child button")
        assert [float(text.removesuffix(" %")) for text in column()] == sorted(rates)
        tab.click("#points th:last-child button")
        assert [float(text.removesuffix(" %")) for text in column()] == sorted(rates, reverse=True)
        assert tab.get_attribute("#points th:last-child", "aria-sort") == "descending"


def test_what_is_chosen_stands_in_the_address(browser, pages):
    with opened(browser, pages["report"]) as tab:
        tab.select_option("#metric", "flip")
        tab.click("#legend button >> nth=0")
        tab.click("#points th:last-child button")
        address = tab.evaluate("location.hash")
        title, pressed = (
            tab.inner_text("#pareto-title"),
            tab.get_attribute("#legend button >> nth=0", "aria-pressed"),
        )
        assert pressed == "false"
        tab.goto("about:blank")
        tab.goto(pages["report"].as_uri() + address)
        tab.wait_for_selector(".plot .main-svg")
        assert tab.inner_text("#pareto-title") == title == "Flips against recompute rate"
        assert tab.get_attribute("#legend button >> nth=0", "aria-pressed") == "false"
        assert tab.get_attribute("#points th:last-child", "aria-sort") == "ascending"


def test_lines_across_layers_are_the_recomputed_scores(browser, pages):
    with opened(browser, pages["inspect"]) as tab:
        pairs = tab.evaluate(
            "[...Array(ENTRIES).keys()].filter(k => layers.some(l => [...Array(l.heads).keys()].some("
            "h => bit(l.chosen, h * ENTRIES + k)))).length"
        )
        assert tab.locator("#across line").count() == min(pairs, 2000) > 0
        tab.locator("#words button").nth(4).click()
        ends = tab.evaluate("lines(0).map(x => [x.i, x.j])")
        assert 0 < len(ends) == tab.locator("#across line").count() < pairs
        assert all(4 in pair for pair in ends)
        assert len(shown(tab, "depth")[0][3]) == 2
        tab.select_option("#lines", "layer")
        tab.select_option("#layer", "1")
        words = tab.evaluate("lines(1).map(x => x.words)")
        assert all(word.startswith("head ") for word in words)
        assert "layer 1" in tab.inner_text("#across-note")
        address = tab.evaluate("location.hash")
        tab.goto("about:blank")
        tab.goto(pages["inspect"].as_uri() + address)
        tab.wait_for_selector(".plot .main-svg")
        assert (tab.input_value("#lines"), tab.input_value("#layer")) == ("layer", "1")
        assert tab.locator("#words button").nth(4).get_attribute("aria-pressed") == "true"


def table(download: Any) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(download.path()).read_bytes().decode(), newline="")))


def test_the_kl_of_the_next_token_has_a_scale_and_is_exported(browser, pages):
    with opened(browser, pages["inspect"], PHONE) as tab:
        tab.select_option("#shade", "kl")
        kl = tab.evaluate("DATA.kl")
        assert float(tab.inner_text("#scale-high").split(" nats")[0]) == pytest.approx(max(kl), rel=1e-2)
        count = tab.locator("#words button").count()
        assert tab.locator("#map .xtick").count() == count == tab.locator("#map .ytick").count()
        with tab.expect_download() as download:
            tab.click("#save-tokens")
        rows = table(download.value)
        assert [float(row["kl"]) for row in rows] == kl
        with tab.expect_download() as download:
            tab.click("#save-map")
        rows = table(download.value)
        assert len(rows) == count * (count + 1) // 2
        assert {row["recomputed"] for row in rows} == {"0", "1"}


def test_zoomed_axes_have_ticks_and_every_axis_two(browser, pages):
    with opened(browser, pages["report"]) as tab:
        labels = """[...document.querySelectorAll(".plot")].filter(p => p.offsetParent && p._fullLayout).map(
            p => [p.id, ["x", "y"].map(a =>
                new Set([...p.querySelectorAll(`.${a}tick`)].map(t => t.textContent)).size)])"""
        assert all(min(counts) >= 2 for _, counts in tab.evaluate(labels))
        tab.evaluate("Plotly.relayout('pareto', { 'yaxis.range[0]': -2.02, 'yaxis.range[1]': -1.98 })")
        assert tab.locator("#pareto .ytick").count() >= 2
        tab.evaluate("Plotly.relayout('pareto', { 'yaxis.autorange': true })")
        assert tab.locator("#pareto .ytick").count() >= 2


def test_transforms_and_all_points_are_shown(browser, pages):
    with opened(browser, pages["report"]) as tab:
        tab.select_option("#accumulate", "ps3")
        assert {"ps3", "ps3.center"} <= set(shown(tab, "transforms")[0][1])
        tab.select_option("#transform", "")
        looks = tab.evaluate(
            "document.getElementById('pareto').data.map(t => [t.line.color, t.line.dash, t.marker.symbol].join())"
        )
        assert len(set(looks)) == len(looks) > 3
        tab.select_option("#transform", "center")
        assert {trace[0] for trace in shown(tab, "pareto")} == {"strict"}
        tab.select_option("#points-of", "all")
        total = tab.evaluate("DATA.points.length")
        assert tab.locator("#points tbody tr").count() == total
        assert f"{total} of {total} points" in tab.inner_text("#points-count")
        links = tab.locator("#pareto-files a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
        assert links == [f"figures/kl-rate-tiny-prose-real.{end}" for end in ("svg", "png", "csv")]
