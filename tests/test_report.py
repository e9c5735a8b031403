"""What a report gathers: groups, means, bytes, participation, pictures; and that its page holds nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fldist
from fldist.analysis import excerpt, participation, pictures, report
from fldist.analysis.excerpt import shown_rounds
from fldist.analysis.grouping import group
from fldist.analysis.html import embedded, html
from fldist.analysis.participation import NOT_CALLED, NOT_USED, USED, Participation
from fldist.analysis.runs import AXES, read
from fldist.cli import app
from tests.conftest import small
from tests.made_runs import Made, picture

HOSTILE = "<img src=x onerror=alert(1)>"


def data_of(page: Path) -> dict:
    """What the page's script gets."""
    text = page.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found)


def made(tmp_path, **runs) -> list[Path]:
    return [Made(**{"rounds": 4, **options}).write(tmp_path / name) for name, options in runs.items()]


# ---- groups
def test_every_run_is_in_a_method_and_means_are_over_one_run_a_seed(tmp_path):
    paths = made(
        tmp_path,
        a0={},
        b={"algorithm": {"name": "fedprox", "mu": 0.1}},
        a1={"seed": 1},
        again={"seed": 1, "rounds": 3},
        d={"data": "mnist", "clients": 3},
        unscored={"seed": 2, "every": 100},
    )
    rewrite(paths[5], lambda line: line | {"accuracy": None, "loss": None})
    runs = {run.name: run for run in map(read, paths)}
    tasks, groups = group(list(runs.values()))
    digits, mnist = (title for title, _ in tasks)
    assert digits.startswith("digits, dirichlet alpha=0.3")
    assert mnist.startswith("mnist, dirichlet alpha=0.3")
    assert [(of.label, of.task, [r.name for r in of.runs], [r.name for r in of.others]) for of in groups] == [
        ("fedavg", 0, ["a0", "a1", "unscored"], ["again"]),
        ("fedprox", 0, ["b"], []),
        ("made", 1, ["d"], []),
    ]
    notes = dict(tasks)[digits]
    assert any(f"seed 1: {paths[2]} is used (more rounds than {paths[3]})" in note for note in notes)


def test_runs_without_any_score_are_shown_all_the_same(tmp_path):
    (path,) = made(tmp_path, a={})
    rewrite(path, lambda line: line | {"accuracy": None, "loss": None})
    report.write([path], tmp_path / "r.html")
    data = data_of(tmp_path / "r.html")
    assert data["runs"][0]["accuracy"] is None
    assert data["runs"][0]["curve"]["rounds"] == data["methods"][0]["mean"]["rounds"] == []


def test_what_all_have_alike_is_told_from_what_differs(tmp_path):
    paths = made(tmp_path, a={"environment": {"suite": {"jobs": 2}}}, b={"seed": 1, "environment": {"gpus": ["x"]}})
    report.write(paths, tmp_path / "r.html")
    data = data_of(tmp_path / "r.html")
    assert data["config"]["differing"] == ["seed"]
    assert data["config"]["rows"] == [["0"], ["1"]]
    assert ["task.partition.alpha", "0.3"] in data["config"]["same"]
    assert ["clients.models", "[]"] in data["config"]["same"]
    assert data["environment"]["differing"] == ["command", "suite.jobs", "gpus"]
    assert data["environment"]["rows"][0] == ["fldist run configs/quickstart.yaml seed=0", "2", ""]
    assert ["hosts", "1: vm cpu, 2: vm cpu"] in data["environment"]["same"]


def rewrite(path: Path, change) -> None:
    lines = [json.loads(text) for text in (path / "rounds.jsonl").read_text().splitlines()]
    (path / "rounds.jsonl").write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


# ---- curves
def test_means_are_over_rounds_that_all_have_scored(tmp_path):
    paths = made(tmp_path, a={}, b={"seed": 1}, c={"seed": 2, "rounds": 3})
    accuracy = {"a": [0.1, 0.2, 0.3, 0.4], "b": [0.3, 0.4, 0.5, 0.6], "c": [0.5, None, 0.1]}
    for path in paths:

        def change(line, name=path.name):
            line["spent"]["seconds"] = 10 * line["round"] + len(name) * "abc".index(name)
            return line | {"accuracy": accuracy[name][line["round"] - 1]}

        rewrite(path, change)
    mean = report.mean_over_seeds([read(path) for path in paths])
    assert mean["rounds"].tolist() == [1, 3]  # c has no score in round 2, and no round 4
    assert mean["accuracy"] == pytest.approx([0.3, 0.3])
    assert mean["accuracy_sd"] == pytest.approx([0.2, 0.2])  # of 0.1, 0.3, 0.5, over n - 1
    assert mean["seconds"] == pytest.approx([11, 31])
    alone = report.mean_over_seeds([read(paths[0])])
    assert "accuracy_sd" not in alone
    assert alone["accuracy"] == pytest.approx(accuracy["a"])


def test_the_page_has_every_axis_in_full(tmp_path):
    paths = made(tmp_path, a={"lost": 0.3}, b={"seed": 1}, c={"seed": 2, "simulated": True})
    report.write(paths, tmp_path / "report.html")
    data = data_of(tmp_path / "report.html")
    assert [axis["key"] for axis in data["axes"]] == list(AXES)
    for path, of in zip(paths, data["runs"], strict=True):
        run = read(path)
        for axis in AXES:
            if not run.has(axis):
                assert set(of["curve"][axis]) == {None}
                assert of[axis] is None
                continue
            assert of["curve"][axis] == pytest.approx(run.spent(axis).tolist(), rel=1e-11)
        assert of["curve"]["accuracy"] == pytest.approx(run.accuracy.tolist(), rel=1e-11)
        last = run.rounds[-1]
        assert of["uplink_bytes"] == last["spent"]["uplink_bytes"]
        assert of["downlink_bytes"] == last["spent"]["downlink_bytes"]
        assert of["seconds"] == last["spent"]["seconds"]
        assert of["joules"] == last["spent"].get("joules")
        assert of["accuracy"] == run.result["final"]["accuracy"]
        assert of["state_hash"] == run.result["state_hash"]


def test_axes_that_no_run_has_are_not_there(tmp_path):
    report.write(made(tmp_path, a={}), tmp_path / "r.html")
    axes = data_of(tmp_path / "r.html")["axes"]
    assert [(axis["key"], axis["unit"]) for axis in axes] == [
        ("rounds", "rounds"), ("uplink_bytes", "B"), ("total_bytes", "B"), ("wire_bytes", "B"), ("seconds", "s"),
    ]  # fmt: skip


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "POINTS", 7)
    report.write(made(tmp_path, a={"rounds": 50}), tmp_path / "r.html")
    rounds = data_of(tmp_path / "r.html")["runs"][0]["curve"]["rounds"]
    assert (len(rounds), rounds[0], rounds[-1]) == (7, 1, 50)


def test_what_makes_a_mean_doubtful_is_said(tmp_path):
    paths = made(
        tmp_path,
        a={},
        b={"seed": 1, "rounds": 3},
        c={"algorithm": {"name": "moon"}, "environment": {"hostname": "other"}},
    )
    report.write(paths, tmp_path / "r.html")
    data = data_of(tmp_path / "r.html")
    assert data["methods"][0]["notes"] == [
        "fedavg: the mean ends with round 3, since not all runs were scored after that: b"
    ]
    notes = " ".join(data["tasks"][0]["notes"])
    assert "The runs have from 3 to 4 rounds" in notes
    assert "different machines (seconds are not of one machine)" in notes


# ---- bytes
def test_bytes_of_a_cut_off_run_are_the_sums_of_its_rounds(tmp_path):
    whole, cut = made(tmp_path, whole={"lost": 0.4}, cut={"lost": 0.4, "finished": False})
    of_whole, of_cut = report.bytes_of(read(whole)), report.bytes_of(read(cut))
    result = json.loads((whole / "result.json").read_text())["bytes"]
    assert of_whole["kind"] == of_cut["kind"] == result["by_kind"]
    assert of_whole["phase"] == of_cut["phase"] == result["by_phase"]
    assert of_whole["wire"] == {**result["wire_by_phase"], "transport": result["transport"]}
    for way in ("up", "down"):  # the bars by phase add up to all that was handed to the transport
        assert (
            sum(of[way] for of in of_whole["wire"].values()) == result["wire"][way] == of_whole["levels"]["wire"][way]
        )
    assert of_whole["overhead"] == {
        "framing": result["framing"],
        "transport": result["transport"],
        "not used: lost": result["wasted"]["lost"],
    }
    assert "transport" not in of_cut["overhead"]


# ---- timeline
def test_the_rounds_that_are_shown_are_the_first_the_last_and_the_slowest(monkeypatch):
    monkeypatch.setattr(excerpt, "ROUNDS", 8)
    lines = [{"round": n, "selected": 10, "seconds": {"total": 1.0 + (n in (50, 51)) * n}} for n in range(1, 101)]
    assert shown_rounds(lines) == {0, 1, 2, 3, 4, 50, 51, 99, 100}
    assert shown_rounds(lines[:8]) == set(range(9))
    large = [line | {"selected": 1000} for line in lines]
    assert shown_rounds(large) == {0, 1, 2, 51}


def test_the_page_holds_few_spans_and_sums_of_all_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(excerpt, "SPANS", 100)
    (path,) = made(tmp_path, a={"rounds": 30, "clients": 20})
    report.write([path], tmp_path / "r.html")
    of = data_of(tmp_path / "r.html")["runs"][0]["timeline"]
    assert [r["number"] for r in of["rounds"]][:2] == [1, 2]
    assert len(of["rounds"]) == 3
    assert all(len(r["spans"]) <= 34 for r in of["rounds"])
    assert any("drawn as one" in note for note in of["notes"])
    rows = [json.loads(text) for text in (path / "messages.jsonl").read_text().splitlines()]
    for lane, rank in ((1, 1), (2, 2)):
        computed = [r["ready_ns"] - r["started_ns"] for r in rows if r.get("started_ns") and r["rank"] == rank]
        assert of["busy"][lane]["compute"] == pytest.approx(sum(computed) / 1e9)
        busy = of["busy"][lane]
        assert busy["encode"] > 0
        assert busy["compute"] + busy["encode"] + busy["wait"] == pytest.approx(of["seconds"])


def test_more_hosts_than_fit_are_left_to_the_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(excerpt, "LANES", 3)
    report.write(made(tmp_path, a={"ranks": 5}), tmp_path / "r.html")
    of = data_of(tmp_path / "r.html")["runs"][0]["timeline"]
    assert [lane["label"] for lane in of["lanes"]] == ["server", "host 1 (vm)", "host 2 (vm)"]
    assert "2 more hosts are not drawn here; all are in the trace" in of["notes"]


# ---- participation
def row(number, client, way="down", status="delivered", phase="train"):
    return {"row": "message", "round": number, "client": client, "direction": way, "status": status, "phase": phase}


def test_clients_are_called_used_or_not():
    taking = Participation(3, 4)
    seen = [
        *(row(1, c) for c in (0, 1, 2)),
        row(1, 0, "up"),
        row(1, 1, "up", "late"),
        row(1, 2, "up"),
        row(2, 0),
        row(2, 0, "up", "resent"),
        row(2, 0),
        row(2, 0, "up"),
        row(3, 3, phase="evaluate"),
        row(3, 3, "up", phase="evaluate"),
        row(4, 0),  # of a round that was not finished
        row(1, 99),
        {**row(3, 1), "row": "kind"},
        {"row": "message"},
    ]
    for one in seen:
        taking.see(one)
    taking.missing([{"round": 1, "missing": {"2": "refused: y: nan"}}, {"round": 9, "missing": {"0": "lost"}}])
    assert taking.table.tolist() == [
        [USED, NOT_USED, NOT_USED, NOT_CALLED],
        [USED, NOT_CALLED, NOT_CALLED, NOT_CALLED],
        [NOT_CALLED] * 4,
    ]
    shown = taking.shown()
    assert shown["cells"] == ["220", "100", "100", "000"]
    assert (shown["called"], shown["unused"], shown["least"], shown["median"], shown["most"]) == (4, 2, 0, 0.0, 2)
    assert shown["by_client"] == {"used": [2, 0, 0, 0], "unused": [0, 1, 1, 0]}


def test_a_large_table_is_binned_and_nothing_is_lost():
    taking = Participation(1000, 1000)
    rng = np.random.default_rng(0)
    taking.table[:] = rng.integers(0, 3, (1000, 1000))
    shown = taking.shown()
    assert "cells" not in shown
    bins = shown["bins"]
    assert np.sum(bins["used"]) == (taking.table == USED).sum()
    assert np.sum(bins["unused"]) == (taking.table == NOT_USED).sum()
    first = taking.table[: bins["rounds"][1] - 1, : bins["clients"][1]]
    assert bins["used"][0][0] == (first == USED).sum()
    last = taking.table[bins["rounds"][-2] - 1 :, bins["clients"][-2] :]
    assert bins["unused"][-1][-1] == (last == NOT_USED).sum()
    assert sum(shown["histogram"]["clients"]) == 1000
    assert len(json.dumps(shown)) < 100_000


def test_a_table_that_is_too_large_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(participation, "_MOST_CELLS", 20)
    report.write(made(tmp_path, a={}), tmp_path / "r.html")
    of = data_of(tmp_path / "r.html")["runs"][0]
    assert of["participation"] is None
    assert of["notes"] == ["participation: 4 rounds of 6 clients are more than the 20 cells that are drawn"]


def test_participation_of_a_real_run_is_what_its_rounds_say(tmp_path):
    fldist.run(small(clients={"num_clients": 6, "per_round": 3}, rounds=3), output=tmp_path / "run")
    report.write([tmp_path / "run"], tmp_path / "r.html")
    of = data_of(tmp_path / "r.html")["runs"][0]["participation"]
    assert (of["called"], of["unused"], of["rounds"], of["clients"]) == (9, 0, 3, 6)
    for number in range(3):
        assert [cells[number] for cells in of["cells"]].count("2") == 3


# ---- pictures
def test_pictures_are_few_small_and_the_newest_come_first(tmp_path, monkeypatch):
    (path,) = made(tmp_path, a={})
    (path / "images").mkdir()
    for number in range(1, 11):
        (path / "images" / f"round-{number:06d}-samples.png").write_bytes(picture(16, number))
    (path / "images" / "round-000003-fake.png").write_bytes(b"<svg onload=alert(1)>")
    (path / "images" / "notes.png").write_bytes(picture())
    ((found, *_), left_out) = pictures.pictures([read(path)])
    assert [(of["name"], of["round"]) for of in found] == [("samples", n) for n in (1, 4, 7, 10)]
    assert left_out == 7
    assert base64.b64decode(found[-1]["source"].removeprefix("data:image/png;base64,")) == picture(16, 10)
    monkeypatch.setattr(pictures, "ALL_PICTURES_BYTES", len(picture(16, 10)) + 10)
    ((found, *_), left_out) = pictures.pictures([read(path)])
    assert [of["round"] for of in found] == [10]
    assert left_out == 10
    monkeypatch.setattr(pictures, "PICTURE_BYTES", 10)
    assert pictures.pictures([read(path)]) == ([[]], 11)


# ---- the page
def test_nothing_in_the_data_can_end_its_script_element():
    value = {"a": "</script><!-- ]]> \u2028\u2029 & ü", "n": [float("nan"), float("inf"), 1.5], "t": (1, None)}
    text = embedded(value)
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": value["a"], "n": [None, None, 1.5], "t": [1, None]}


def test_the_page_forbids_all_but_its_own_scripts_and_names_no_other_file(tmp_path):
    report.write(made(tmp_path, **{HOSTILE: {"name": "{{data}} {{script}}"}}), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert HOSTILE not in text
    scripts = re.findall(r"<script(?: [^>]*)?>(.*?)</script>", text, re.S)
    assert len(scripts) == 3
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    policy = policy.replace("&#x27;", "'")
    assert policy.startswith("default-src 'none'; ")
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    assert allowed == [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts[1:]]
    assert "unsafe-eval" not in policy
    assert re.search(r"script-src[^;]*unsafe", policy) is None
    without_scripts = re.sub(r"(<script[^>]*>).*?(</script>)", r"\1\2", text, flags=re.S)
    assert not re.search(r"https?:|//|<[^>]*\bsrc=|<link|@import|url\(|<iframe|<base", without_scripts)
    assert data_of(tmp_path / "r.html")["runs"][0]["label"] == HOSTILE
    assert data_of(tmp_path / "r.html")["config"]["same"][0] == ["name", "{{data}} {{script}}"]


def test_the_title_is_escaped():
    got = html({"title": "<b>&amp;</b>"})
    assert "<title>&lt;b&gt;&amp;amp;&lt;/b&gt;</title>" in got


def test_runs_of_one_name_are_told_apart_and_traces_have_harmless_names(tmp_path):
    paths = made(
        tmp_path,
        **{"x/s0": {}, "y/s0": {"seed": 1}, "y/a b": {"seed": 2}, "y/a_b": {"seed": 3}} | {HOSTILE: {}, "..x": {}},
    )
    got = report.write([tmp_path], tmp_path / "out" / "my report.html")
    data = data_of(got.page)
    assert len(paths) == len(data["runs"]) == got.num_runs
    names = [run["label"] for run in data["runs"]]
    assert len(set(names)) == len(names)
    assert {"x/s0", "y/s0", HOSTILE} <= set(names)
    assert all(trace.parent == tmp_path / "out" / "my report-traces" for trace in got.traces)
    assert all(re.fullmatch(r"[\w.-]+\.json\.gz", trace.name) and trace.is_file() for trace in got.traces)
    assert len({trace.name.lower() for trace in got.traces}) == len(got.traces)
    assert data["runs"][0]["trace"]["href"].startswith("my%20report-traces/")
    assert not list(tmp_path.glob("out/**/*.tmp"))


def test_damaged_and_cut_off_runs_are_there_with_what_is_wrong(tmp_path):
    good, cut, half = made(tmp_path, good={}, cut={"finished": False}, half={})
    with (cut / "rounds.jsonl").open("a") as file:
        file.write('{"round": 5, "acc')
    (half / "messages.jsonl").write_bytes((half / "messages.jsonl").read_bytes()[:-40])
    broken = tmp_path / "broken"
    shutil.copytree(good, broken)
    (broken / "rounds.jsonl").write_text("")
    odd = tmp_path / "odd"
    shutil.copytree(good, odd)
    rewrite(odd, lambda line: {k: v for k, v in line.items() if k != "selected"})
    got = report.write([tmp_path], tmp_path / "r.html")
    data = data_of(got.page)
    assert [run["label"] for run in data["runs"]] == ["cut", "good", "half"]
    notes = {run["label"]: run["notes"] for run in data["runs"]}
    assert notes["good"] == []
    assert notes["cut"] == [
        "rounds.jsonl: 1 line is damaged and skipped (line 5; the last one ends in the middle)",
        "it was cut off after round 4, or is still going: there is no result.json",
        "its bytes by kind and phase are sums over its finished rounds, without transport",
    ]
    assert len(notes["half"]) == 1
    assert notes["half"][0].startswith("messages.jsonl: 1 line is damaged and skipped")
    assert got.unread == [
        f"{broken}: no round was finished",
        f"{odd}: its files have not the form of this version of fldist (KeyError: 'selected')",
    ]
    assert data["notes"] == [f"not read: {text}" for text in got.unread]


def test_a_run_that_is_left_as_run_h5_alone_has_its_tables(tmp_path):
    fldist.run(small(rounds=3), output=tmp_path / "run")
    (tmp_path / "kept").mkdir()
    shutil.copy(tmp_path / "run" / "run.h5", tmp_path / "kept" / "run.h5")
    got = report.write([tmp_path / "kept" / "run.h5"], tmp_path / "r.html")
    of = data_of(got.page)["runs"][0]
    assert (of["label"], of["rounds"], of["timeline"], of["participation"], of["trace"]) == (
        "kept",
        3,
        None,
        None,
        None,
    )
    assert of["curve"]["rounds"] == [1, 2, 3]
    assert got.traces == []


def test_a_real_run_is_reported_without_a_note(tmp_path):
    result = fldist.run(small(rounds=3), output=tmp_path / "run")
    got = report.write([tmp_path / "run"], tmp_path / "r.html")
    of = data_of(got.page)["runs"][0]
    assert of["notes"] == []
    assert (of["accuracy"], of["state_hash"]) == (result["final"]["accuracy"], result["state_hash"])
    assert of["bytes"]["kind"] == {k: v for k, v in result["bytes"]["by_kind"].items() if any(v.values())}
    assert of["timeline"]["notes"] == [
        "server and host are one process here: they have two lanes, and do one thing at a time"
    ]
    assert of["method_label"] == "small"  # its configuration's name


# ---- the command
def test_the_command_says_what_it_wrote(tmp_path):
    (path,) = made(tmp_path, a={})
    shutil.copytree(path, tmp_path / "broken")
    (tmp_path / "broken" / "rounds.jsonl").unlink()
    got = CliRunner().invoke(app, ["report", str(tmp_path), "-o", str(tmp_path / "r.html")])
    assert got.exit_code == 0, got.output
    assert f"timeline for ui.perfetto.dev or chrome://tracing: {tmp_path / 'r-traces' / 'a.json.gz'}" in got.output
    assert re.search(rf"report of 1 run: {re.escape(str(tmp_path / 'r.html'))} \([\d.]+ MB\)", got.output)
    assert f"not read: {tmp_path / 'broken'}: no round was finished" in got.output


def test_the_command_refuses_what_it_cannot_do(tmp_path):
    (path,) = made(tmp_path, a={})
    with pytest.raises(ValueError, match="holds no run"):
        report.write([path, _empty(tmp_path)], tmp_path / "r.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"report: .*file.*--output names another place to write to"):
        report.write([path], tmp_path / "file" / "r.html")
    (path / "rounds.jsonl").unlink()
    with pytest.raises(ValueError, match=r"there is no run to report on: .*no round was finished"):
        report.write([path], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def _empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


# ---- sizes
def test_a_report_of_thirty_runs_is_small_and_quick(tmp_path):
    """30 runs of 100 rounds and 20 clients: under 15 MB, made in under 30 s."""
    paths = [
        Made(algorithm={"name": name}, seed=seed, rounds=100, clients=20, ranks=3).write(tmp_path / f"{name}-{seed}")
        for name in ("fedavg", "fedprox", "scaffold", "fednova", "moon", "local")
        for seed in range(5)
    ]
    began = time.monotonic()
    got = report.write(paths, tmp_path / "r.html")
    took_s = time.monotonic() - began
    size = got.page.stat().st_size
    print(f"{size / 1e6:.1f} MB in {took_s:.1f} s")
    assert size < 15e6
    assert took_s < 30
    assert len(got.traces) == 30


def test_a_long_run_of_many_clients_stays_small(tmp_path):
    (path,) = made(tmp_path, a={"rounds": 300, "clients": 1000, "per_round": 60, "ranks": 5})
    got = report.write([path], tmp_path / "r.html")
    assert len(json.dumps(data_of(got.page))) < 500_000
