"""The pages of ``inspect`` and ``finetune`` in a real browser."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from browser import CUT, OVERLAPS, SMALLEST, Browser, browser
from safetensors.numpy import save_file
from test_report_training import comparison, run

from svftool.stages.audit import audit

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.xdist_group("browser")

BLOCKS = 14
LONG = "a_name_that_goes_on_without_any_dot_" * 3
WIDTHS = (1280, 1141, 420, 320)  # 1141: the narrowest that tables have


def _checkpoints(folder: Path) -> list[Path]:
    """Write a base and two fine-tunes whose drifts, names and shapes are far apart."""
    draw = np.random.default_rng(0)
    shapes = {f"model.layers.{i}.mlp.weight": (12, 8) for i in range(BLOCKS)}
    shapes |= {f"{LONG}.{i}.weight": (6, 6) for i in range(3)}
    shapes |= {"名前.0.weight": (6, 6), "head.weight": (2, 8), "<b>.weight": (5, 5)}
    base = {name: draw.standard_normal(shape) for name, shape in shapes.items()}
    made = []
    for index, size in enumerate((0.0, 0.02, 0.05)):
        tensors = {
            name: (one + size * (1 + place) * draw.standard_normal(one.shape)).astype(np.float32)
            for place, (name, one) in enumerate(base.items())
        }
        if index:
            tensors["head.weight"] = 30.0 * base["head.weight"].astype(np.float32) * index
            tensors["extra.bias"] = np.zeros(3, np.float32)
        made.append(folder / f"{['base', 'step_with_a_long_name'][index > 0]}{index}.safetensors")
        save_file(tensors, made[-1])
    return made


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Write pages of every kind: a pair, a series, a checkpoint alone, trainings."""
    from svftool.report.inspect.page import page as inspect_page
    from svftool.report.training.page import page as training_page

    folder = tmp_path_factory.mktemp("pages")
    base, *tuned = _checkpoints(folder)
    long = [run(f"regime-with-a-long-name-{r}", s, 20.0 + s, metric="perplexity")
            for s in range(3) for r in "abcdef"]  # fmt: skip
    folds = [run(regime, seed, 0.6 + 0.1 * fold, shots=shots, facts={"fold": fold})
             for regime in ("head", "svf") for shots in (1, 5) for seed in range(2)
             for fold in range(2)]  # fmt: skip
    texts = {
        "pair": inspect_page(audit(base, tuned[:1])),
        "series": inspect_page(audit(base, tuned)),
        "alone": inspect_page(audit(base, [])),
        "regimes": training_page(comparison()),
        "long": training_page(comparison(long, "perplexity")),
        "folds": training_page(comparison(folds)),
        "one seed": training_page(comparison([run("head", 0, 0.61), run("svf", 0, 0.63)])),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Start one browser for all tests."""
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def _names(window: Browser) -> list[str]:
    return window.texts("tbody td.name")


def test_the_filter_leaves_what_it_names(window: Browser, pages: Mapping[str, Path]) -> None:
    for width in (1280, 420):
        window.show(pages["pair"], width=width)
        everything = _names(window)
        assert len(everything) == BLOCKS + 6
        (field,) = window.find("input[type=search]")
        field.send_keys("LAYERS.1")
        assert sorted(_names(window)) == sorted(
            name for name in everything if "layers.1" in name.lower()
        )
        assert len(_names(window)) == 1 + BLOCKS - 10
        field.send_keys("no such name")
        assert _names(window) == []
        window.run(
            "const f = arguments[0]; f.value = ''; f.dispatchEvent(new Event('input'))", field
        )
        assert _names(window) == everything


@pytest.mark.parametrize("width", [1280, 420])
def test_columns_sort_by_number_and_by_name(
    window: Browser, pages: Mapping[str, Path], width: int
) -> None:
    from selenium.webdriver.common.keys import Keys

    window.show(pages["pair"], width=width)
    heads = {one.text: one for one in window.find("th[data-sort]")}
    values = (
        "return [...document.querySelectorAll(`tbody td[data-l='${arguments[0]}']`)]"
        ".map((cell) => Number.parseFloat(cell.dataset.v))"
    )
    for column in ("matrix", "weight drift", "of the change", "spectral drift", "svf share"):
        heads[column].click()
        found = window.run(values, column)
        assert found == sorted(found, reverse=True)
        assert found[0] > found[-1]
        assert heads[column].get_attribute("aria-sort") == "descending"
        heads[column].send_keys(Keys.ENTER)
        assert window.run(values, column) == sorted(found)
    heads["layer"].click()
    names = _names(window)
    layers = [name for name in names if name.startswith("model.layers")]
    assert layers == [f"model.layers.{i}.mlp.weight" for i in range(BLOCKS)]  # 2 before 10
    assert [one.get_attribute("aria-sort") for one in heads.values()].count(None) == len(heads) - 1


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut(window: Browser, pages: Mapping[str, Path], width: int) -> None:
    for name, page in pages.items():
        window.show(page, width=width)
        assert (name, window.run(CUT)) == (name, [])
    assert [one for one in window.driver.get_log("browser") if one["level"] == "SEVERE"] == []


def test_what_is_cut_is_found(window: Browser, pages: Mapping[str, Path]) -> None:
    window.show(pages["alone"], width=420)
    for style in ("width: 600px", "position: relative; left: -40px", "white-space: nowrap"):
        window.run(
            "const p = document.createElement('p'); p.id = 'wide'; p.style = arguments[0];"
            "p.textContent = 'word '.repeat(60); document.querySelector('main').append(p)",
            style,
        )
        assert window.run(CUT) != []
        window.run("document.getElementById('wide').remove()")
    assert window.run(CUT) == []
    window.run("const t = document.querySelector('svg text'); t.setAttribute('x', -40)")
    assert any("outside its drawing" in one for one in window.run(CUT))


def test_charts_that_go_on_sideways_say_so(window: Browser, pages: Mapping[str, Path]) -> None:
    goes_on = (
        "return [...document.querySelectorAll('.chart')].map((one) => [one.scrollWidth > "
        "one.clientWidth, one.previousElementSibling.checkVisibility()])"
    )
    for width, expected in ((1280, False), (420, True)):
        window.show(pages["series"], width=width)
        assert window.run(goes_on) == [[expected, expected]] * 5


@pytest.mark.parametrize("name", ["pair", "series", "alone"])
def test_every_block_has_its_name_and_no_name_covers_another(
    window: Browser, pages: Mapping[str, Path], name: str
) -> None:
    window.show(pages[name])
    assert window.run(OVERLAPS) == []
    drawn = window.run(
        "return [...document.querySelector('section .chart svg[aria-label^=Heat]')"
        ".querySelectorAll('text')].map((one) => one.textContent)"
    )
    assert {f"layers.{i}" for i in range(BLOCKS)} <= set(drawn)
    assert {"head", "<b>", "名前.0"} <= set(drawn)


def test_words_of_drawings_are_read_on_a_telephone(
    window: Browser, pages: Mapping[str, Path]
) -> None:
    for name in ("pair", "series", "regimes", "one seed"):
        window.show(pages[name], width=420)
        assert window.run(SMALLEST) >= 8.0


def _contrast(first: str, second: str) -> float:
    """Return the contrast of two colours by WCAG 2: from 1 to 21."""

    def light(colour: str) -> float:
        parts = np.array([float(x) for x in re.findall(r"[\d.]+", colour)[:3]]) / 255.0
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    low, high = sorted((light(first), light(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", ["pair", "regimes"])
def test_both_schemes_are_read(window: Browser, pages: Mapping[str, Path], name: str) -> None:
    papers = {}
    for scheme in ("light", "dark"):
        window.show(pages[name], scheme=scheme)
        papers[scheme] = window.style("body", "backgroundColor")
        for words in ("h1", ".lead", ".quiet", "svg text"):
            colour = window.style(words, "fill" if words == "svg text" else "color")
            assert _contrast(colour, papers[scheme]) >= 4.5, (scheme, words, colour)
    assert _contrast(papers["light"], "rgb(255, 255, 255)") < 1.2
    assert _contrast(papers["dark"], "rgb(0, 0, 0)") < 1.4


def test_before_and_after_are_told_apart_where_they_coincide(
    window: Browser, pages: Mapping[str, Path]
) -> None:
    for scheme in ("light", "dark"):
        window.show(pages["pair"], scheme=scheme)
        before, after = "svg.small .before", "svg.small .after"
        widths = [float(window.style(one, "strokeWidth")[:-2]) for one in (before, after)]
        assert widths[0] >= 3 * widths[1]
        colours = [window.style(one, "stroke") for one in (before, after)]
        assert _contrast(*colours) >= 2.0


def test_print_is_white_and_whole(window: Browser, pages: Mapping[str, Path]) -> None:
    for name in ("pair", "regimes"):
        for scheme in ("light", "dark"):
            window.show(pages[name], width=720, scheme=scheme, media="print")
            assert window.run(CUT) == []
            assert window.style("body", "backgroundColor") == "rgb(255, 255, 255)"
            assert window.texts("input, .hint") == []
            assert window.style("tbody tr", "display") == "table-row"
            assert _contrast(window.style("h1", "color"), "rgb(255, 255, 255)") > 10
            sideways = "return [...document.querySelectorAll('.chart')].every("
            sideways += "(one) => one.scrollWidth <= one.clientWidth)"
            assert window.run(sideways)
        printed = window.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
        assert base64.b64decode(printed["data"]).startswith(b"%PDF")


def test_the_verdict_of_a_training_is_on_the_first_screen(
    window: Browser, pages: Mapping[str, Path]
) -> None:
    words = {"regimes": "3 seeds: svf above head by 10.3", "one seed": "1 seed: svf above head"}
    for name, start in words.items():
        window.show(pages[name], width=420)
        (word,) = window.find(".verdict .word")
        assert word.text.startswith(start)
        assert word.rect["y"] + word.rect["height"] < 400
        assert len(window.find(".warning")) == (name == "one seed")
