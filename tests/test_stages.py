"""Runs of several stages: what clients know of the stage, and what is written, kept and begun again at their ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

import fldist
from fldist.algorithm import Clients, Me, Server, Stage, State, on_client
from fldist.analysis.check import check
from fldist.analysis.compare import Final, gather, split
from fldist.analysis.report import write
from fldist.analysis.tables import text_of
from fldist.cli import main
from fldist.config import ConfigError, build, load, load_branch
from fldist.console import Progress
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.fold import Mean, collect
from fldist.inspection import dry_run, predict_stages
from fldist.kinds import Kind, MaxBytes, Scalar, Weights
from fldist.runner import resume_here, run_here
from fldist.runtime.checkpoint import ClientFiles, read_facts
from fldist.runtime.stages import check_fields
from tests.conftest import Hosts, Recorder, small
from tests.own import Base
from tests.test_launch import ROOT, mpirun
from tests.test_recovery import kinds
from tests.test_recovery import rounds as rounds_of


class Told(NamedTuple):
    y: Weights
    n: Scalar
    stage: Scalar


@dataclass(frozen=True)
class Three(Base):
    """Three stages, in which clients add 1, `add` and `last` to the model and note the stage."""

    stage_fields: ClassVar[Mapping[str, str | None]] = {"middle": None, "end": None, "add": "middle", "last": "end"}

    middle: int = 2  # rounds of the second stage
    end: int = 1  # rounds of the third
    add: float = 2.0
    last: float = 3.0

    def init_client(self, task: Task, client: int) -> State:
        return State(seen=[])

    def setup(self, server: Server, clients: Clients) -> None:
        clients.all().call(self.greet)

    @on_client
    def greet(self, me: Me, data: ClientData) -> None:
        me.seen = [*me.seen, -1 - me.stage]

    def stages(self, rounds: int) -> list[Stage]:
        return [
            Stage("first", rounds - self.middle - self.end, self._exchange),
            Stage("middle", self.middle, self._exchange),
            Stage("end", self.end, self._exchange),
        ]

    def _exchange(self, server: Server, clients: Clients) -> None:
        got = clients.selected().call(self.update, x=server.x, fold={"y": Mean(by="n")})
        server.x = got.y
        server.log(told=sum(got.stage.values()) / len(got.stage))
        server.images(blank=torch.zeros(1, 2, 2))
        server.table(rows=[{"round": server.round}])

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Told:
        y = x.clone()
        y.floats += (1.0, self.add, self.last)[me.stage]
        me.seen = [*me.seen, me.stage]
        return Told(y, data.n, me.stage)


THREE = "tests.test_stages:Three"


def config(rounds: int = 5, *, algorithm: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return small(rounds=rounds, algorithm={"name": THREE, **(algorithm or {})}, **changes)


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def told(directory: Path) -> list[tuple[str, float]]:
    return [(line["stage"], line["log"]["told"]) for line in lines(directory)]


# ---- me.stage
IN_TURN = [("first", 0.0), ("first", 0.0), ("middle", 1.0), ("middle", 1.0), ("end", 2.0)]


@pytest.mark.parametrize("nproc", [1, 3])
def test_a_client_knows_the_stage_of_the_call(tmp_path: Path, hosts: Hosts, nproc: int) -> None:
    run_here(load(config()), nproc=nproc, output=tmp_path / "run", spawn=hosts)
    assert told(tmp_path / "run") == IN_TURN


def test_a_client_knows_the_stage_under_mpi(tmp_path: Path) -> None:
    (tmp_path / "jobs.json").write_text(json.dumps([{"config": config(), "output": str(tmp_path / "run")}]))
    done = mpirun(2, [str(ROOT / "tests" / "mpi_runs.py"), str(tmp_path / "jobs.json")])
    assert done.returncode == 0, done.stderr
    assert told(tmp_path / "run") == IN_TURN


def test_stages_without_rounds_count_too(tmp_path: Path) -> None:
    fldist.run(config(3, algorithm={"middle": 0, "end": 3}), output=tmp_path / "run")
    assert told(tmp_path / "run") == [("end", 2.0)] * 3


# ---- checkpoints at the ends of stages
def checkpoints(directory: Path) -> list[int]:
    return sorted(int(path.stem[6:]) for path in (directory / "checkpoints").glob("round-*"))


def test_checkpoints_at_the_ends_of_stages_stay_with_the_states_that_they_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"checkpoint": {"every": 2, "keep": 1}, "algorithm": {"middle": 5, "end": 6}}
    fldist.run(config(12, **settings, stop={"rounds": 9}), output=run)
    assert checkpoints(run) == [1, 6, 8, 9]  # 1 and 6: ends
    fldist.resume(run, ["stop.rounds=null"])
    assert checkpoints(run) == [1, 6, 11, 12]
    files = ClientFiles(run / "clients")
    for number, seen in ((1, [-1, 0]), (6, [-1, 0, *[1] * 5]), (12, [-1, 0, *[1] * 5, *[2] * 6])):
        facts = read_facts(run / "checkpoints" / f"round-{number:06d}.safetensors")
        for client, version in facts["versions"].items():
            assert files.read(int(client), version)["seen"] == seen
            assert version in {
                p.name.removesuffix(".safetensors") for p in files.path(int(client), "x").parent.iterdir()
            }


def test_a_run_of_one_stage_keeps_no_more_than_before(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fldist.run(small(rounds=1), output=run)
    fldist.resume(run, ["rounds=4"])
    assert checkpoints(run) == [1, 3, 4]


# ---- beginning again with a stage
def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 2, 2 and 1 rounds. Nothing may be changed in it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    fldist.run(config(), output=run)
    return run


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize(("stage", "done"), [("middle", 2), ("end", 4)])
def test_a_run_begun_with_a_stage_is_the_run_that_it_was_begun_from(
    tmp_path: Path, whole: Path, hosts: Hosts, stage: str, done: int, nproc: int
) -> None:
    before = files(whole)
    seen = Recorder()
    new = tmp_path / "new"
    result = resume_here(whole, stage=stage, output=new, nproc=nproc, observer=seen, spawn=hosts)
    assert files(whole) == before
    assert [line["round"] for line in seen.lines] == list(range(done + 1, 6))
    expected = json.loads((whole / "result.json").read_text())
    for name in ("state_hash", "final", "best", "rounds"):
        assert result[name] == expected[name], name
    for name in ("logical", "encoded", "by_kind", "by_phase"):
        assert result["bytes"][name] == expected["bytes"][name], name
    assert kinds(new) == kinds(whole)
    assert result["seconds"]["total"] >= sum(line["seconds"]["total"] for line in lines(whole)[:done])
    assert rounds_of(new) == rounds_of(whole)
    spent = [[line["spent"][f"{way}link_bytes"] for way in ("up", "down")] for line in lines(new)]
    assert spent == [[line["spent"][f"{way}link_bytes"] for way in ("up", "down")] for line in lines(whole)]
    for folder in ("images", "tables"):
        assert {p.name for p in (new / folder).iterdir()} == {p.name for p in (whole / folder).iterdir()}
    assert {k: json.loads((new / "origin.json").read_text())[k] for k in ("run", "stage", "round")} == {
        "run": str(whole), "stage": stage, "round": done,
    }  # fmt: skip
    assert check(new).failed == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new"]


def test_what_is_copied_is_what_there_was_then(tmp_path: Path, whole: Path) -> None:
    settings, branch = load_branch(whole, "middle")
    branch.make(tmp_path / "new", settings.resolved())
    new = tmp_path / "new"
    assert checkpoints(new) == [2]
    assert [line["round"] for line in lines(new)] == [1, 2]
    assert {row[0] for row in kinds(new)} == {1, 2}
    assert {p.name[:12] for p in (new / "tables").iterdir()} == {"round-000001", "round-000002"}
    assert {len(list(folder.glob("*.safetensors"))) for folder in (new / "clients").iterdir() if folder.is_dir()} == {1}
    assert not {"result.json", "run.h5", "model", "owner.lock", "token"} & {p.name for p in new.iterdir()}
    _, later = load_branch(whole, "end")
    later.make(tmp_path / "later", settings.resolved())
    assert checkpoints(tmp_path / "later") == [2, 4]  # the stage before may be begun again, too


def test_the_same_command_goes_on_with_what_it_has_begun(tmp_path: Path, whole: Path) -> None:
    new = tmp_path / "new"
    fldist.resume(whole, ["stop.rounds=4"], from_stage="middle", output=new)
    again = ["stop.rounds=4"]
    with pytest.raises(ValueError, match=r"holds a finished run; `fldist resume .*new rounds=N` extends it"):
        fldist.resume(whole, again, from_stage="middle", output=new)
    (new / "result.json").unlink()
    assert fldist.resume(whole, again, from_stage="middle", output=new)["rounds"] == 4
    with pytest.raises(ValueError, match=r"output: .*new exists, and a run that is begun from another one needs a new"):
        fldist.resume(whole, from_stage="end", output=new)
    assert fldist.resume(new, ["stop.rounds=null"])["state_hash"] == json.loads(
        (whole / "result.json").read_text()
    )["state_hash"]  # fmt: skip


def test_a_stage_is_begun_again_with_other_values_and_lengths(tmp_path: Path, whole: Path) -> None:
    new = tmp_path / "new"
    changes = {"middle": 3, "end": 2, "add": 5.0, "last": 7.0}
    overrides = [f"algorithm.{name}={value}" for name, value in changes.items()]
    with pytest.raises(ConfigError, match=r"rounds: 5 would have stage middle begin after round 0, .* set rounds=7"):
        fldist.resume(whole, overrides, from_stage="middle", output=new)
    result = fldist.resume(whole, ["rounds=7", *overrides], from_stage="middle", output=new)
    fresh = fldist.run(config(7, algorithm=changes), output=tmp_path / "fresh")
    assert result["state_hash"] == fresh["state_hash"]
    assert [line["stage"] for line in lines(new)] == ["first"] * 2 + ["middle"] * 3 + ["end"] * 2


@pytest.mark.parametrize(
    ("stage", "output", "overrides", "message"),
    [
        ("middle", None, [], r"--from: middle begins a run in a new directory, since .* as it is; name it with --o"),
        (None, "new", [], r"--output: a run goes on in its own directory, .*; --from STAGE begins another"),
        ("last", "new", [], r"--from: there is no stage 'last'; this run's stages: first, middle, end"),
        ("first", "new", [], r"--from: no round comes before stage first; begin a new run: fldist run"),
        ("end", "new", ["algorithm.add=9"], r"algorithm.add: stage middle reads it, which began with round 3, and 4 r"),
        ("end", "new", ["local.lr=9"], r"local.lr: it cannot be .* of the algorithm algorithm.middle, .*.last"),
        ("end", "new", ["algorithm.end=0", "rounds=4"], r"--from: from stage end on nothing is to be done with"),
        ("middle", "new", ["checkpoint.every=0"], r"checkpoint.every: 0, but a run is to go on"),
    ],
)  # fmt: skip
def test_what_cannot_be_begun_is_told(
    tmp_path: Path, whole: Path, stage: str | None, output: str | None, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fldist.resume(whole, overrides, from_stage=stage, output=tmp_path / output if output else None)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_not_there_is_told(tmp_path: Path, whole: Path) -> None:
    new = tmp_path / "new"

    def refused(run: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            fldist.resume(run, from_stage="middle", output=new)
        assert not new.exists()

    fldist.run(config(checkpoint={"every": 0}), output=tmp_path / "none")
    refused(tmp_path / "none", r"keeps no checkpoints \(checkpoint.every: 0\); run it anew.*checkpoint.every=1 or more")
    fldist.run(config(stop={"rounds": 1}), output=tmp_path / "short")
    refused(tmp_path / "short", r"stage middle begins after round 2, .* come to round 1; go on .*`fldist resume .*")
    old = tmp_path / "old"
    shutil.copytree(whole, old)
    path = old / "checkpoints" / "round-000002.safetensors"
    path.rename(tmp_path / "kept")
    refused(old, r"stage middle begins after round 2, and .*old does not have the checkpoint of that round any more")
    path.write_bytes((tmp_path / "kept").read_bytes()[:-1])
    refused(old, r"round-000002.safetensors is damaged: .*; run it anew")
    (tmp_path / "kept").rename(path)
    state = next(p for p in (old / "clients" / "00001").iterdir() if p.name.startswith("2."))
    state.rename(tmp_path / "state")
    refused(old, r"the checkpoint of round 2 cannot be used: .*clients/00001/2.0.1.0.safetensors")
    (tmp_path / "state").rename(state)
    with (old / "messages.jsonl").open("r+") as file:
        file.truncate(10)
    refused(old, r"the checkpoint of round 2 cannot be used: .*messages.jsonl has lost lines")


def test_from_the_command_line(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    new = tmp_path / "new"
    monkeypatch.setattr("sys.argv", ["fldist", "resume", str(whole), "--from", "end", "--output", str(new)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "continued after round 4" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "holds a finished run" in capsys.readouterr().err


# ---- what may change when a run goes on
def test_a_field_may_change_until_a_stage_reads_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fldist.run(config(stop={"rounds": 2}), output=run)
    fldist.resume(run, ["stop.rounds=3", "algorithm.add=4", "algorithm.last=5"])  # neither has been read
    before = (run / "config.yaml").read_text(), (run / "result.json").read_text()
    message = (
        r"algorithm.add: stage middle reads it, which began with round 3, and 3 rounds are done; "
        r"`fldist resume RUN --from middle --output NEW` begins again from there"
    )
    with pytest.raises(ValueError, match=message):
        fldist.resume(run, ["stop.rounds=4", "algorithm.add=6"])
    assert ((run / "config.yaml").read_text(), (run / "result.json").read_text()) == before
    result = fldist.resume(run, ["stop.rounds=null", "algorithm.add=4.0", "algorithm.last=6"])
    fresh = fldist.run(config(algorithm={"add": 4.0, "last": 6.0}), output=tmp_path / "fresh")
    assert result["state_hash"] == fresh["state_hash"]


def test_rounds_that_are_done_stay_in_their_stages(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fldist.run(config(4, algorithm={"end": 0}), output=run)
    before = (run / "config.yaml").read_text()
    with pytest.raises(
        ValueError, match="rounds: 4 rounds are done, and with this number of rounds and these stages they would"
    ):
        fldist.resume(run, ["rounds=6"])
    assert (run / "config.yaml").read_text() == before
    assert fldist.resume(run, ["rounds=6", "algorithm.end=2"])["rounds"] == 6
    assert [line["stage"] for line in lines(run)] == ["first"] * 2 + ["middle"] * 2 + ["end"] * 2


def test_a_stage_that_is_none_is_a_fault_of_the_algorithm() -> None:
    with pytest.raises(ValueError, match="there is no stage 'middle'; this run's stages: first"):
        check_fields(Three(add=1.0), Three(add=2.0), [("first", 3)], 1)


# ---- some of the stages
def test_a_run_does_the_stages_that_are_chosen_and_another_the_rest(tmp_path: Path) -> None:
    whole = fldist.run(config(), output=tmp_path / "whole")
    part = fldist.run(config(stages=["first", "middle"]), output=tmp_path / "part")
    assert told(tmp_path / "part") == IN_TURN[:4]
    assert part["rounds"] == 4 or len(lines(tmp_path / "part")) == 4
    rest = resume_here(tmp_path / "part", ["stages=null"])
    assert told(tmp_path / "part") == IN_TURN
    assert rest["state_hash"] == whole["state_hash"]


def test_a_stage_in_between_may_be_left_out(tmp_path: Path) -> None:
    fldist.run(config(stages=["first", "end"]), output=tmp_path / "run")
    assert told(tmp_path / "run") == [("first", 0.0), ("first", 0.0), ("end", 2.0)]
    with pytest.raises(ValueError, match=r"rounds: 3 rounds are done, and .* these stages they would have been other"):
        resume_here(tmp_path / "run", ["stages=null"])


@pytest.mark.parametrize(
    ("stages", "what"),
    [
        (["first", "last"], "stages: there is no stage 'last'; this run's stages: first, middle, end"),
        ([], "stages: none of 5 rounds is nothing to do"),
        ("first", "stages: input should be a valid list"),
    ],
)
def test_stages_that_cannot_be_chosen(stages: Any, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        build(load(config(stages=stages)))


# ---- a dry run of several stages
class Image(NamedTuple):
    image: Annotated[Tensor, Kind.IMAGES, MaxBytes(1 << 20)]


@dataclass(frozen=True)
class Makes(Three):
    """Clients are asked for images in the second stage; in the third they are given those that came, twice."""

    made: bool = True  # whether the size of an image is known before

    def stages(self, rounds: int) -> list[Stage]:
        first, middle, end = Three.stages(self, rounds)
        return [
            Stage(first.name, first.rounds, first.step),
            Stage("nothing", 0, first.step),
            Stage(middle.name, middle.rounds, self.make),
            Stage(end.name, end.rounds, self.show),
        ]

    def make(self, server: Server, clients: Clients) -> None:
        server.images_made = [
            *clients.all().call(self.paint, size=server.round, fold={"image": collect()}).image.values()
        ]

    def show(self, server: Server, clients: Clients) -> None:
        clients.only([0, 1]).call(self.look, images=torch.cat(server.images_made), word=1)

    def made_up(self, task: Task, client: int, method: str, field: str) -> Tensor | None:
        return torch.zeros(1, 3, 4) if self.made else None

    @on_client
    def paint(self, me: Me, data: ClientData, size: Scalar) -> Image:
        return Image(torch.zeros(1, 3, 4))

    @on_client
    def look(self, me: Me, data: ClientData, images: Annotated[Tensor, Kind.IMAGES], word: Scalar) -> None: ...


MAKES = {"name": "tests.test_stages:Makes", "middle": 3, "end": 1}


def test_every_stage_is_predicted_and_so_is_the_run(tmp_path: Path) -> None:
    settings = load(config(6, algorithm=MAKES, eval={"where": "clients"}))
    predicted = predict_stages(build(settings))
    assert [(stage.name, stage.rounds) for stage, _ in predicted] == [("first", 2), ("middle", 3), ("end", 1)]
    result = run_here(settings, output=tmp_path / "run")
    for way in ("up", "down"):
        whole = sum(of.of_run(stage.rounds)[way] for stage, of in predicted)
        assert whole == result["bytes"]["logical"][way]
        for (_, of), line in zip(predicted, [lines(tmp_path / "run")[n] for n in (0, 2, 5)], strict=True):
            by_kind = {kind: ways[way] for kind, ways in of.by_kind.items()}
            assert by_kind == {kind: ways[way] for kind, ways in line["bytes"]["by_kind"].items()}
    assert [of.by_kind.get("images") for _, of in predicted] == [
        None, {"up": 6 * 48, "down": 0}, {"up": 0, "down": 2 * 6 * 48},
    ]  # fmt: skip


def test_the_dry_run_shows_the_stages() -> None:
    shown = dry_run(load(config(6, algorithm=MAKES)), 1).splitlines()
    at = next(
        i for i, line in enumerate(shown) if line.startswith("predicted logical bytes of the first round of each")
    )
    of_stages = [line for line in shown[at:] if not line.startswith("  ")]
    assert of_stages == [shown[at], "stage first:", "stage middle:", "stage end:", "in all stages:"]
    totals = [line.split() for line in shown[at:] if " round" in line and line.startswith("  ")]
    assert [line[:2] for line in totals] == [["2", "rounds"], ["3", "rounds"], ["1", "round"], ["6", "rounds"]]
    numbers = [int(line[3].replace(",", "")) for line in totals]
    assert numbers[3] == sum(numbers[:3])
    assert numbers[1] == 3 * 6 * 48


def test_what_a_stage_cannot_be_predicted_for_is_said() -> None:
    shown = dry_run(load(config(6, algorithm={**MAKES, "made": False})), 1)
    assert "not predictable: stage middle: paint.image (images): its size is known only when it runs" in shown
    assert "not predictable: stage end: replies that are made up lead nowhere: the state has no 'images_made'" in shown
    assert "stage first: " not in shown


# ---- how runs of several stages are shown
@dataclass(frozen=True)
class Alone(Three):
    """In the second stage the server calls nobody."""

    def stages(self, rounds: int) -> list[Stage]:
        first, middle, end = Three.stages(self, rounds)
        return [first, Stage(middle.name, middle.rounds, self.think), end]

    def think(self, server: Server, clients: Clients) -> None:
        server.x = server.x * 0.5


ALONE = {"name": "tests.test_stages:Alone"}


def test_the_terminal_names_the_stages_and_expects_each_by_itself(tmp_path: Path, capsys: Any) -> None:
    run_here(load(config(algorithm=ALONE)), output=tmp_path / "several", observer=Progress())
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round ")]
    assert [line.split()[1:3] for line in shown] == [
        ["1/5", "first"], ["2/5", "first"], ["3/5", "middle"], ["4/5", "middle"], ["5/5", "end"],
    ]  # fmt: skip
    assert [line.partition("ETA")[2].partition(" to ")[2] for line in shown] == [
        "the end of first", "", "the end of middle", "", "",
    ]  # fmt: skip
    assert "0/0 replies" in shown[2]
    run_here(load(small()), output=tmp_path / "one", observer=Progress())
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round ")]
    assert [line.split()[1:3] for line in shown] == [["1/2", "accuracy"], ["2/2", "accuracy"]]
    assert shown[0].rpartition("  ETA ")[2].endswith(" s")


def test_rounds_in_which_nobody_is_called_are_checked_compared_and_reported(tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    result = fldist.run(config(algorithm=ALONE), output=run)
    assert result["status"] == "finished"
    assert [line["committed"] for line in lines(run)] == [True] * 5
    assert [line["bytes"]["logical"]["up"] for line in lines(run)[2:4]] == [0, 0]
    found = check(run)
    assert (found.failed, found.unknown) == ([], [])
    usable, left_out = gather([run, whole])
    assert (len(usable), left_out) == (2, [])
    assert "Alone" in text_of(split(usable), None, [], [], [], Final(1, False))
    made = write([run, whole], tmp_path / "report.html")
    assert (made.num_runs, made.unread) == (2, [])
    assert "Alone" in (tmp_path / "report.html").read_text()
