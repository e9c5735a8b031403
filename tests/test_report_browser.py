"""The report's page in a real browser: what it shows, what its controls do, and that it asks nobody for anything."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fldist.analysis import report
from fldist.analysis.runs import AXES, read
from tests.made_runs import Made, picture

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: `apt-get install chromium` for these tests"),
    pytest.mark.timeout(90),
]
HOSTILE = "<img src=x onerror=alert(1)>"
MARK = f"--fldist-report-test={os.getpid()}"
SECTIONS = ("summary", "curves", "bytes", "timeline", "participation", "pictures", "configuration")
PLOTS = ("curves", "bytes", "timeline", "participation", "often")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for all tests here; it is gone afterwards."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", MARK], timeout=60_000)
        try:
            yield made
        finally:
            made.close()
    left = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if MARK.encode() in _bytes(path)]
    assert left == [], "the browser outlived its tests"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A page about runs of several methods, tasks and sizes, and where these are."""
    root = tmp_path_factory.mktemp("report")
    runs = [
        Made(seed=0, rounds=6, clients=8, lost=0.2, simulated=True).write(root / "fedavg-0"),
        Made(seed=1, rounds=6, clients=8, simulated=True).write(root / "fedavg-1"),
        Made(algorithm={"name": "fedprox", "mu": 0.1}, rounds=6, clients=8, best=0.7, ranks=5).write(root / "fedprox"),
        Made(rounds=5, clients=5, ranks=1, name="<b>bold</b> %{x}").write(root / HOSTILE),
        Made(rounds=4, clients=6, data="mnist", environment={"hostname": "other"}).write(root / "mnist"),
        Made(rounds=250, clients=300, per_round=9, best=0.6, finished=False).write(root / "long"),
        Made(algorithm={"name": "moon"}, rounds=6, clients=8, best=0.8).write(root / "moon"),
    ]
    for number in range(1, 7):
        (runs[0] / "images").mkdir(exist_ok=True)
        (runs[0] / "images" / f"round-{number:06d}-<i>.png").write_bytes(picture(24, 30 * number))
    report.write(runs, root / "page" / "report.html")
    return root / "page" / "report.html", runs


class Watched:
    """A page, and everything that it has complained of or asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("dialog", lambda dialog: (self.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def open(self, path: Path) -> Any:
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]", timeout=30_000)
        return self.page

    def check(self) -> None:
        assert self.complaints == []
        asked = [url for url in self.requests if not url.startswith(("data:", "blob:"))]
        assert len(asked) == 1, asked
        assert asked[0].startswith("file://")


@pytest.fixture
def watched(browser: Any) -> Iterator[Watched]:
    """A fresh page; whatever a test does with it, it may not complain nor ask for anything."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(20_000)
    of = Watched(context.new_page())
    try:
        yield of
        of.check()
    finally:
        context.close()


@pytest.fixture
def page(watched: Watched, made: tuple[Path, list[Path]]) -> Any:
    return watched.open(made[0])


def drawn(page: Any, name: str) -> list[dict[str, Any]]:
    """The traces of a chart as plotly.js has them."""
    return json.loads(page.evaluate(f"JSON.stringify(document.getElementById('{name}-plot').data)"))


def choose(page: Any, control: str, label: str) -> None:
    page.select_option(f"#{control}", label=label)


def shown_labels(page: Any, control: str) -> list[str]:
    return page.eval_on_selector_all(f"#{control} option", "all => all.map(one => one.textContent)")


def cells(page: Any, table: str) -> list[list[str]]:
    return page.eval_on_selector_all(
        f"#{table} tr", "rows => rows.map(row => [...row.children].map(cell => cell.textContent))"
    )


def titled(page: Any, words: str) -> str:
    """The task whose title has these words."""
    (title,) = [label for label in shown_labels(page, "curves-task") if words in label]
    return title


def choose_task(page: Any, words: str) -> None:
    for control in ("curves-task", "bytes-task"):
        choose(page, control, titled(page, words))


def axis_label(axis: str) -> str:
    return report.AXIS_LABELS[axis]


# ---- summary
def test_the_table_has_the_numbers_of_the_runs_files(page, made):
    head, *rows = cells(page, "runs-table")
    assert head == ["Run", "Method", "Task", "Seed", "Status", "Rounds", "Accuracy", "Uplink bytes", "Downlink bytes",
                    "Seconds", "Simulated seconds", "Joules (simulated)", "state_hash"]  # fmt: skip
    assert [row[0] for row in rows] == [path.name for path in made[1]]
    for path, row in zip(made[1], rows, strict=True):
        run = read(path)
        spent = run.rounds[-1]["spent"]
        of = dict(zip(head, row, strict=True))
        assert of["Accuracy"] == f"{run.rounds[-1]['accuracy']:.4f}"
        assert of["Uplink bytes"] == f"{spent['uplink_bytes']:,}"
        assert of["Downlink bytes"] == f"{spent['downlink_bytes']:,}"
        assert of["Seconds"] == f"{spent['seconds']:.2f}"
        simulated = [f"{spent[name]:.1f}" if name in spent else "" for name in ("simulated_seconds", "joules")]
        assert [of["Simulated seconds"], of["Joules (simulated)"]] == simulated
        assert of["Rounds"] == str(run.rounds[-1]["round"])
        assert of["Status"] == run.status
        assert of["state_hash"] == (run.result["state_hash"][:12] if run.result else "")
        if run.result is not None:
            assert run.result["final"]["accuracy"] == run.rounds[-1]["accuracy"]
    notes = page.inner_text("#notes")
    assert "long: it was cut off after round 250" in notes


def test_a_click_on_a_head_sorts_by_it(page):
    head, *before = cells(page, "runs-table")
    at = head.index("Uplink bytes")

    def values():
        rows = cells(page, "runs-table")[1:]
        assert sorted(rows) == sorted(before)
        return [int(row[at].replace(",", "")) for row in rows]

    page.click("#runs-table th button:text('Uplink bytes')")
    assert values() == sorted(values())
    page.click("#runs-table th button:text('Uplink bytes')")
    assert values() == sorted(values(), reverse=True)
    assert values()[0] > values()[-1]
    assert page.get_attribute("#runs-table th:has-text('Uplink bytes')", "aria-sort") == "descending"


# ---- curves
def test_the_axis_of_costs_has_the_runs_values(page, made):
    choose_task(page, " 8 clients")
    choose(page, "curves-runs", "every run")
    runs = [read(path) for path in made[1][:2]]
    for axis in AXES:
        choose(page, "curves-x", axis_label(axis))
        assert page.evaluate("document.getElementById('curves-plot').layout.xaxis.title.text") == axis_label(axis)
        lines = [trace for trace in drawn(page, "curves") if trace["legendgroup"] == "fedavg (3 ranks)"]
        for run, trace in zip(runs, lines, strict=True):
            assert trace["x"] == pytest.approx(run.spent(axis).tolist(), rel=1e-11)
            assert trace["y"] == pytest.approx(run.accuracy.tolist(), rel=1e-11)


def test_methods_without_simulated_devices_are_not_drawn_against_them(page):
    choose_task(page, " 8 clients")
    choose(page, "curves-x", axis_label("joules"))
    assert {trace["legendgroup"] for trace in drawn(page, "curves")} == {"fedavg (3 ranks)"}
    line = next(trace for trace in drawn(page, "curves") if trace["name"] != "band")
    assert f"{axis_label('joules')}: 720 J" in line["hovertext"][0]
    assert f"moon (3 ranks): not all of its runs have {axis_label('joules')}" in page.inner_text("#curves-notes")
    choose(page, "curves-x", axis_label("total_bytes"))
    assert len({trace["legendgroup"] for trace in drawn(page, "curves")}) == 3
    assert "not all of its runs" not in page.inner_text("#curves-notes")


def test_means_bands_loss_and_logarithms(page, made):
    choose_task(page, "mnist")
    (alone,) = drawn(page, "curves")
    assert alone["y"] == pytest.approx(read(made[1][4]).accuracy.tolist())
    choose_task(page, " 8 clients")
    mean = report.mean_over_seeds([read(path) for path in made[1][:2]])
    of = {trace["name"]: trace for trace in drawn(page, "curves") if trace["legendgroup"] == "fedavg (3 ranks)"}
    assert of["fedavg (3 ranks)"]["y"] == pytest.approx(mean["accuracy"].tolist())
    upper = of["band"]["y"][: len(mean["rounds"])]
    assert upper == pytest.approx((mean["accuracy"] + mean["accuracy_sd"]).tolist())
    choose(page, "curves-y", "loss")
    of = {trace["name"]: trace for trace in drawn(page, "curves") if trace["legendgroup"] == "fedavg (3 ranks)"}
    assert of["fedavg (3 ranks)"]["y"] == pytest.approx(mean["loss"].tolist())
    kind = "document.getElementById('curves-plot')._fullLayout.xaxis.type"
    assert page.evaluate(kind) == "linear"
    page.check("#curves-log")
    assert page.evaluate(kind) == "log"


def test_methods_are_told_apart_by_more_than_colour(page):
    choose_task(page, " 8 clients")
    lines = [trace for trace in drawn(page, "curves") if trace["name"] != "band"]
    looks = [(trace["line"]["color"], trace["line"]["dash"], trace["marker"]["symbol"]) for trace in lines]
    assert len(looks) == 3
    for part in range(3):
        assert len({look[part] for look in looks}) == 3


def test_what_a_task_makes_doubtful_is_said_beside_its_curves(page):
    choose_task(page, " 8 clients")
    assert "different backends (seconds and wire bytes are not of one kind)" in page.inner_text("#curves-notes")
    choose_task(page, "mnist")
    assert "different backends" not in page.inner_text("#curves-notes")
    assert "One seed only" in page.inner_text("#curves-notes")


# ---- bytes
def test_bytes_are_those_of_result_json(page, made):
    choose_task(page, " 8 clients")
    choose(page, "bytes-of", "every run")
    runs = [*made[1][:3], made[1][6]]
    for label in shown_labels(page, "bytes-view"):
        choose(page, "bytes-view", label)
        key = next(key for key, of, *_ in report.VIEWS if of == label)
        head, *rows = cells(page, "bytes-table")
        by_run = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
        for path in runs:
            of = report.bytes_of(read(path))[key]
            for name, ways in of.items():
                for way, count in ways.items():
                    assert by_run[path.name][f"{name} {way}"] == f"{count:,}"
        bars = {(trace["legendgroup"], trace["xaxis"]): trace["x"] for trace in drawn(page, "bytes")}
        order = [row[0] for row in rows]
        for (name, side), values in bars.items():
            for path in runs:
                way = "up" if side == "x" else "down"
                expected = report.bytes_of(read(path))[key].get(name, {}).get(way, 0)
                assert values[order.index(path.name)] == expected
    choose(page, "bytes-of", "methods (mean over their runs)")
    assert len(cells(page, "bytes-table")) == 4  # a head, three methods


# ---- timeline
def test_the_timeline_follows_its_run_and_its_rounds(page, made):
    choose(page, "timeline-run", "fedavg-0")
    lanes = "document.getElementById('timeline-plot').layout.yaxis.ticktext"
    assert page.evaluate(lanes) == ["server", "host 1 (vm)", "host 2 (vm)"]
    assert [page.input_value(f"#timeline-{end}") for end in ("from", "to")] == ["0", "1"]
    rows = [json.loads(text) for text in (made[1][0] / "messages.jsonl").read_text().splitlines()]
    ups = [r for r in rows if r["row"] == "message" and r["direction"] == "up"]

    def computing():
        (of,) = [trace for trace in drawn(page, "timeline") if trace["name"] == "computing"]
        return of

    def expected(*rounds):
        return [r for r in ups if r["round"] in rounds]

    assert len(computing()["x"]) == len(expected(1, 2)) == 16
    seconds = sum((r["ready_ns"] - r["started_ns"]) // 1000 for r in expected(1, 2)) / 1e6
    assert sum(computing()["x"]) == pytest.approx(seconds, abs=1e-4)
    page.click("#timeline-on")
    assert [page.input_value(f"#timeline-{end}") for end in ("from", "to")] == ["2", "3"]
    began = [json.loads(text)["began_ns"] for text in (made[1][0] / "timeline.jsonl").read_text().splitlines()]
    first = min(r["started_ns"] for r in expected(3, 4))
    assert min(computing()["base"]) == pytest.approx((first - began[2]) / 1e9, abs=1e-5)
    choose(page, "timeline-zero", "the run's begin")
    assert min(computing()["base"]) == pytest.approx((first - began[0]) / 1e9, abs=1e-5)
    page.click("#timeline-back")
    page.click("#timeline-back")  # there is nothing before
    assert [page.input_value(f"#timeline-{end}") for end in ("from", "to")] == ["0", "1"]
    choose(page, "timeline-from", "round 5")  # the end follows
    assert [page.input_value(f"#timeline-{end}") for end in ("from", "to")] == ["4", "4"]
    assert len(computing()["x"]) == len(expected(5))
    choose(page, "timeline-to", "round 2")
    assert [page.input_value(f"#timeline-{end}") for end in ("from", "to")] == ["1", "1"]
    assert any("client 3" in text for text in computing()["hovertext"])
    choose(page, "timeline-run", "fedprox")
    assert len(page.evaluate(lanes)) == 5
    choose(page, "timeline-run", HOSTILE)
    assert page.evaluate(lanes) == ["server", "host, in the same process"]
    assert "one process" in page.inner_text("#timeline-notes")


def test_the_timeline_tells_what_it_leaves_out_and_where_all_of_it_is(page, made):
    choose(page, "timeline-run", "long")
    hint = page.inner_text("#timeline-hint")
    assert "of 250. The whole timeline is in report-traces/long.json.gz" in hint
    link = page.get_attribute("#timeline-hint a", "href")
    assert (made[0].parent / link).is_file()
    options = shown_labels(page, "timeline-to")
    choose(page, "timeline-to", options[-1])
    assert "some that this page does not hold" in page.inner_text("#timeline-notes")
    choose(page, "timeline-run", "fedavg-0")
    clocks = cells(page, "timeline-clocks")
    assert clocks[1:] == [["host 1", "0.002000 s", "± 90 µs"], ["host 2", "0.004000 s", "± 180 µs"]]
    busy = cells(page, "timeline-busy")
    assert [row[0] for row in busy[1:]] == ["server", "host 1 (vm)", "host 2 (vm)"]
    assert all(row[1].endswith("%)") for row in busy[1:])


# ---- participation, pictures, configuration
def test_participation_by_cell_and_in_bins(page, made):
    choose(page, "participation-run", "fedavg-0")
    (cells_,) = drawn(page, "participation")
    run = read(made[1][0])
    for number, line in enumerate(run.rounds):
        states = [row[number] for row in cells_["z"]]
        assert states.count(2) == line["replied"]
        assert [client for client, state in enumerate(states) if state == 1] == sorted(map(int, line["missing"]))
    assert not page.is_visible("#participation-what")
    often = {trace["name"]: trace["y"] for trace in drawn(page, "often")}
    assert often["replied"] == [row.count(2) for row in cells_["z"]]
    assert often["not used"] == [row.count(1) for row in cells_["z"]]
    choose(page, "participation-run", "long")
    assert page.is_visible("#participation-what")
    (used,) = drawn(page, "participation")
    choose(page, "participation-what", "called, and not used")
    (unused,) = drawn(page, "participation")
    assert max(map(max, unused["z"])) == 0 < max(map(max, used["z"]))
    (histogram,) = drawn(page, "often")
    assert sum(histogram["y"]) == 300


def test_pictures_and_facts(page):
    assert page.locator("#pictures img").count() == 4
    sizes = page.eval_on_selector_all("#pictures img", "all => all.map(one => one.naturalWidth)")
    assert sizes == [24] * 4
    assert page.inner_text("#pictures figure:first-child figcaption") == "<i>, round 1"
    head, *rows = cells(page, "config-table")
    assert {"Run", "seed", "rounds", "clients.num_clients", "algorithm.name", "task.data.name"} <= set(head)
    assert [row[head.index("task.data.name")] for row in rows] == ["digits"] * 4 + ["mnist", "digits", "digits"]
    same = page.inner_text("#config-same")
    assert "local.momentum" in same
    head, *rows = cells(page, "environment-table")
    assert [row[head.index("hostname")] for row in rows] == ["vm"] * 4 + ["other", "vm", "vm"]


def test_a_page_about_one_run_has_no_empty_parts(watched, tmp_path):
    report.write([Made(rounds=3).write(tmp_path / "alone")], tmp_path / "report.html")
    page = watched.open(tmp_path / "report.html")
    assert page.title() == "fldist report: alone"
    assert not page.is_visible("#pictures")
    assert not page.is_visible("nav a[href='#pictures']")
    assert not page.is_visible("#config-differing")
    assert not page.is_visible("#curves-task")
    assert all(page.is_visible(f"#{name}") for name in SECTIONS if name != "pictures")


# ---- hostile names
def test_names_are_text_wherever_they_are_shown(page, watched):
    assert HOSTILE in page.inner_text("#runs-table")
    assert "<b>bold</b> %{x}" in page.inner_text("#runs-table")
    assert HOSTILE in shown_labels(page, "timeline-run")
    choose_task(page, " 5 clients")
    choose(page, "bytes-of", "every run")
    choose(page, "timeline-run", HOSTILE)
    choose(page, "participation-run", HOSTILE)
    ticks = page.eval_on_selector_all("#bytes-plot .ytick text", "all => all.map(one => one.textContent)")
    assert HOSTILE in ticks
    legend = page.eval_on_selector_all("#curves-plot .legendtext", "all => all.map(one => one.textContent)")
    assert "<b>bold</b> %{x}" in legend
    assert page.evaluate("document.querySelectorAll('img[onerror], svg b, svg a, table b').length") == 0
    page.locator("#curves-plot").scroll_into_view_if_needed()
    choose(page, "curves-runs", "every run")
    point = page.locator("#curves-plot .scatterlayer .trace").first.locator(".point").last
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#curves-plot .hoverlayer text")
    assert "round" in page.text_content("#curves-plot .hoverlayer")
    texts = [text for trace in drawn(page, "curves") for text in trace["hovertext"]]
    assert any("&lt;img src=x onerror=alert(1)&gt;<br>" in text for text in texts)
    assert not any("<img" in text for text in texts)


def test_the_page_may_neither_ask_nor_run_what_is_not_its_own(browser, made):
    """The policy holds in the browser: a request, a script and a handler that get into the page do nothing."""
    context = browser.new_context()
    try:
        with socket.create_server(("127.0.0.1", 0)) as somebody:
            watched = Watched(context.new_page())
            page = watched.open(made[0])
            page.evaluate(
                """(port) => {
                  const picture = `<img src='http://127.0.0.1:${port}/x.png' onerror='window.ran = 1'>`;
                  document.body.insertAdjacentHTML("beforeend", picture);
                  const script = document.createElement("script");
                  script.textContent = "window.ran = 2";
                  document.body.append(script);
                  return fetch(`http://127.0.0.1:${port}/`).catch(() => null);
                }""",
                somebody.getsockname()[1],
            )
            page.wait_for_timeout(200)
            somebody.setblocking(False)
            with pytest.raises(BlockingIOError):  # nobody called
                somebody.accept()
            assert page.evaluate("window.ran") is None
            assert sum("Content Security Policy" in text for text in watched.complaints) >= 4
    finally:
        context.close()


def test_no_button_of_a_chart_sends_it_anywhere(page):
    titles = page.eval_on_selector_all(".modebar-btn", "all => all.map(one => one.dataset.title.toLowerCase())")
    allowed = {"download plot as a png", "zoom", "pan", "zoom in", "zoom out", "reset axes"}
    assert titles
    assert set(titles) <= allowed


# ---- layout
def overlaps(page: Any) -> list[Any]:
    """Axis titles that lie on their ticks or legends, and legends that lie on what is drawn."""
    return page.evaluate(
        """(names) => names.flatMap((name) => {
          const of = document.getElementById(`${name}-plot`), box = (one) => one.getBoundingClientRect();
          const title = box(of.querySelector(".xtitle")), legend = of.querySelector(".legend");
          const ticks = Math.max(...[...of.querySelectorAll(".xtick text")].map((one) => box(one).bottom));
          const found = [];
          if (title.top < ticks - 1) found.push([name, "title on ticks"]);
          if (legend && box(legend).top < title.bottom - 1) found.push([name, "legend on title"]);
          if (box(of).right > innerWidth) found.push([name, "too wide"]);
          return found;
        })""",
        list(PLOTS),
    )


@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_is_cut_off_or_on_top_of_something_else(watched, made, width):
    watched.page.set_viewport_size({"width": width, "height": 900})
    page = watched.open(made[0])
    for run in shown_labels(page, "timeline-run"):
        choose(page, "timeline-run", run)
        choose(page, "participation-run", run)
        assert overlaps(page) == []
    for view in shown_labels(page, "bytes-view"):
        choose(page, "bytes-view", view)
        assert overlaps(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_charts_follow_the_window(page):
    page.set_viewport_size({"width": 820, "height": 900})
    deadline = time.monotonic() + 10
    while page.evaluate("document.getElementById('curves-plot')._fullLayout.width") >= 800:
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)
    assert page.evaluate("document.documentElement.scrollWidth") <= 820
    assert overlaps(page) == []


def test_it_can_be_used_without_a_mouse(page):
    assert page.get_attribute("html", "lang") == "en"
    assert page.locator("h1").count() == 1
    unlabelled = page.eval_on_selector_all(
        "select, input", "all => all.filter((one) => !one.labels.length).map((one) => one.id)"
    )
    assert unlabelled == []
    for name in PLOTS:
        assert page.get_attribute(f"#{name}-plot", "role") == "img"
        assert len(page.get_attribute(f"#{name}-plot", "aria-label")) > 20
    page.focus("#curves-x")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.getElementById('curves-plot').layout.xaxis.title.text") == axis_label("uplink_bytes")
    page.focus("#timeline-on")
    page.keyboard.press("Enter")
    assert page.input_value("#timeline-from") == "2"


# ---- print
def test_paper_has_no_controls_and_charts_that_fit(page):
    page.emulate_media(media="print")
    for selector in (".controls", "nav", ".modebar-container"):
        assert page.locator(selector).count() > 0
        assert not any(one.is_visible() for one in page.locator(selector).all())
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    widths = dict(
        page.eval_on_selector_all(".js-plotly-plot", "all => all.map((one) => [one.id, one._fullLayout.width])")
    )
    assert set(widths) == {f"{name}-plot" for name in PLOTS}
    assert max(widths.values()) <= 690  # what is between the margins of A4
    assert overlaps(page) == []
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    assert page.evaluate("document.getElementById('curves-plot')._fullLayout.width") > 1000


def test_it_prints(page, tmp_path):
    page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF-")
    assert len(content) > 20_000
    assert page.evaluate("document.getElementById('curves-plot')._fullLayout.width") > 1000  # back on the screen
