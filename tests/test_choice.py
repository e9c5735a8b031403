"""What the runtime does for selectors: a state that is kept and put back, calls, probes, and models of clients."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fldist
from fldist.config import build, load
from fldist.data.client_data import ClientData
from fldist.inspection import predict
from fldist.runner import run_here
from fldist.runtime.checkpoint import Checkpoints
from fldist.seeding import Streams, forked
from tests.conftest import Hosts, Recorder, small

N, K = 6, 2


def config(selector: Any, **changes: Any) -> dict[str, Any]:
    made = small(rounds=3, clients={"num_clients": N, "per_round": K}, selection=selector, **changes)
    made["task"]["partition"] = {"name": "dirichlet", "alpha": 0.5}
    return made


def asks(**fields: Any) -> dict[str, Any]:
    return {"name": "tests.own_selectors:Asks", **fields}


def begins(**fields: Any) -> dict[str, Any]:
    return {"name": "tests.own_selectors:Begins", **fields}


def fixed(sets: Any) -> dict[str, Any]:
    return {"name": "tests.own_selectors:Fixed", "sets": sets}


def model_bytes(settings: dict[str, Any]) -> int:
    return 4 * build(load(settings)).task.layout.num_floats


def messages(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "messages.jsonl").read_text().splitlines()]


def kept(run: Path) -> Any:
    """What the selector keeps, of the last checkpoint."""
    found = Checkpoints(run / "checkpoints").newest()
    assert found is not None
    return found[1]["selector"]


def final_model(run: Path) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for _, t in sorted(load_file(run / "model" / "model.safetensors").items())])


# ---- calls of its own, and what it keeps
def test_what_a_selector_asks_is_counted_apart_and_changes_no_training(tmp_path: Path) -> None:
    settings = config(asks())
    result = fldist.run(settings, output=tmp_path / "run")
    size = model_bytes(settings)
    state = kept(tmp_path / "run")
    assert state.rounds == 3
    assert [row[0] for row in state.told] == [1, 2, 3]
    phases = result["bytes"]["by_phase"]
    assert phases["setup"] == {"up": N * (size + 8), "down": N * size}
    assert phases["select"] == {"up": 3 * 2 * 8, "down": 3 * 2 * size}
    assert phases["train"] == {"up": 3 * K * (size + 8 + 40), "down": 3 * K * size}
    assert result["bytes"]["logical"] == phases["train"]
    sets = [row[1] for row in state.told]
    alike = fldist.run(config(fixed(sets)), output=tmp_path / "alike")
    assert alike["final"] == result["final"]
    assert torch.equal(final_model(tmp_path / "alike"), final_model(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [line["selected"] for line in lines] == [K] * 3
    assert all(0 < line["seconds"]["select"] <= line["seconds"]["server"] for line in lines)
    accuracies = [line["accuracy"] for line in lines]
    assert [row[3] for row in state.told] == accuracies


def test_the_same_choice_on_any_number_of_ranks_and_after_a_resume(tmp_path: Path, hosts: Hosts) -> None:
    settings = config(asks())
    alone = fldist.run(settings, output=tmp_path / "alone")
    ranks = run_here(load(settings), nproc=3, output=tmp_path / "ranks", spawn=hosts)
    assert ranks["state_hash"] == alone["state_hash"]
    assert ranks["bytes"]["by_phase"] == alone["bytes"]["by_phase"]
    fldist.run({**settings, "rounds": 1}, output=tmp_path / "again")
    resumed = fldist.resume(tmp_path / "again", ["rounds=3"])
    assert resumed["state_hash"] == alone["state_hash"]
    assert kept(tmp_path / "again").told == kept(tmp_path / "alone").told


def test_what_it_has_learnt_in_a_void_attempt_is_forgotten(tmp_path: Path, hosts: Hosts) -> None:
    settings = config(asks(), faults={"min_replies": "all", "on_quorum_loss": "retry"})
    undisturbed = fldist.run(settings, output=tmp_path / "undisturbed")
    hosts.moments[1] = ("computing", int(signal.SIGKILL), 2, str(tmp_path / "mark"))
    seen = Recorder()
    result = run_here(load(settings), nproc=2, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert (tmp_path / "mark").exists()
    assert sum(line["attempt"] for line in seen.lines) == 1
    assert result["state_hash"] == undisturbed["state_hash"]


def test_a_client_that_does_not_answer_a_selector_loses_nothing_else(tmp_path: Path) -> None:
    """Its state is committed as if nothing had been asked; the user is told."""
    settings = config(asks(fails=1), algorithm={"name": "scaffold"}, faults={"min_replies": "all"})
    seen = Recorder()
    result = run_here(load(settings), output=tmp_path / "run", observer=seen)
    assert any("client 1 did not answer the selector: error" in text for text in seen.warnings)
    assert all(not line["missing"] for line in seen.lines)
    sets = [row[1] for row in kept(tmp_path / "run").told]
    assert any(1 in ids for ids in sets), "client 1 is never selected: the test shows nothing"
    run_here(load({**settings, "selection": fixed(sets)}), output=tmp_path / "alike")
    assert torch.equal(final_model(tmp_path / "alike"), final_model(tmp_path / "run"))
    assert result["status"] == "finished"


def test_a_state_that_is_changed_in_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the selector's state was changed in place in round 1"):
        fldist.run(config(asks(spoils=True)), output=tmp_path / "run")


@pytest.mark.parametrize(
    ("selector", "error"),
    [
        (fixed([[0, 17]]), "Fixed selects client 17, which it is not offered"),
        (fixed([[]]), "Fixed selects nobody in round 1"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(tmp_path: Path, selector: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        fldist.run(config(selector), output=tmp_path / "run")


def test_a_prediction_counts_what_a_selector_asks(tmp_path: Path) -> None:
    settings = config(asks())
    result = fldist.run({**settings, "rounds": 1}, output=tmp_path / "run")
    prediction = predict(build(load(settings)))
    assert prediction.before["setup"] == result["bytes"]["by_phase"]["setup"]
    assert prediction.phases["select"] == result["bytes"]["by_phase"]["select"]
    assert prediction.training == result["bytes"]["logical"]


# ---- probes
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fedprox"])
def test_those_who_go_on_train_as_if_they_had_not_been_probed(tmp_path: Path, algorithm: str) -> None:
    settings = config(begins(), algorithm={"name": algorithm}, local__epochs=3, local__momentum=0.9)
    result = fldist.run(settings, output=tmp_path / "run")
    sets = kept(tmp_path / "run").kept
    assert len({tuple(ids) for ids in sets}) > 1 or sets[0] != [0, 1], "the first two always go on: nothing is shown"
    fldist.run({**settings, "selection": fixed(sets)}, output=tmp_path / "alike")
    assert torch.equal(final_model(tmp_path / "alike"), final_model(tmp_path / "run"))
    phases, size = result["bytes"]["by_phase"], model_bytes(settings)
    down = 2 * size if algorithm == "scaffold" else size
    assert phases["select"] == {"up": 3 * 4 * 16, "down": 3 * 4 * down}
    assert phases["train"] == {"up": 3 * K * (down + 8), "down": 0}


@pytest.mark.parametrize("topology", ["star", "collective"])
def test_probes_on_several_ranks(tmp_path: Path, hosts: Hosts, topology: str) -> None:
    settings = config(begins(), local__epochs=2)
    alone = fldist.run(settings, output=tmp_path / "alone")
    ranks = run_here(load({**settings, "topology": topology}), nproc=3, output=tmp_path / "ranks", spawn=hosts)
    assert final_model(tmp_path / "ranks").equal(final_model(tmp_path / "alone"))
    assert kept(tmp_path / "ranks").kept == kept(tmp_path / "alone").kept
    assert ranks["bytes"]["by_phase"] == alone["bytes"]["by_phase"]


def test_a_probe_counts_towards_the_scores_of_training(tmp_path: Path) -> None:
    """Losses and scores that clients tell of their training are those of all its epochs."""
    evaluation = {"own": True, "cumulative_train": True, "split": "test"}
    settings = config(begins(), local__epochs=2, eval=evaluation, task__split={"test": 0.25})
    run_here(load(settings), output=tmp_path / "run", observer=(probed := Recorder()))
    sets = kept(tmp_path / "run").kept
    run_here(load({**settings, "selection": fixed(sets)}), output=tmp_path / "alike", observer=(plain := Recorder()))
    assert [line["scores"]["own_train"] for line in probed.lines] == [
        line["scores"]["own_train"] for line in plain.lines
    ]


@pytest.mark.parametrize(
    ("algorithm", "error"),
    [
        ("lg_fedavg", "this selector decides in the first call of a round, and LgFedAvg asks before it"),
        ("tests.own:Base", "in this call they train no model"),
    ],
)
def test_algorithms_whose_training_cannot_be_begun_are_refused(tmp_path: Path, algorithm: str, error: str) -> None:
    with pytest.raises(Exception, match=error):
        fldist.run(config(begins(), algorithm={"name": algorithm}), output=tmp_path / "run")


def test_a_prediction_of_probes_is_what_a_run_sends(tmp_path: Path) -> None:
    settings = config(begins(), local__epochs=2)
    result = fldist.run({**settings, "rounds": 1}, output=tmp_path / "run")
    prediction = predict(build(load(settings)))
    assert prediction.phases["select"]["up"] == result["bytes"]["by_phase"]["select"]["up"]
    assert prediction.training == result["bytes"]["logical"]


# ---- clients' models
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fednova"])
def test_a_selector_sees_the_models_that_clients_have_trained(tmp_path: Path, algorithm: str) -> None:
    settings = config({"name": "tests.own_selectors:Looks"}, algorithm={"name": algorithm})
    fldist.run({**settings, "rounds": 1}, output=tmp_path / "run")
    norms = kept(tmp_path / "run").norms[0]
    job = build(load(settings))
    with forked(job.seed, "init_server"):
        x = job.algorithm.init_server(job.task).x
    for client, norm in norms.items():
        data = ClientData(job.task, int(client), Streams(job.seed, 1, int(client)))
        assert float(data.train(x).params.floats.double().norm()) == pytest.approx(norm, rel=1e-6)
    assert set(norms) == {"0", "1"}


def test_a_selector_that_wants_models_or_scores_which_are_not_there_is_refused(tmp_path: Path) -> None:
    looks = {"name": "tests.own_selectors:Looks"}
    with pytest.raises(ValueError, match=r"selection.name: this selector looks at the models .* Local do not"):
        fldist.run(config(looks, algorithm={"name": "local"}), output=tmp_path / "run")
    with pytest.raises(ValueError, match=r"eval.every: 2, but this selector goes by every round's accuracy; use 1"):
        fldist.run(config(looks, eval={"every": 2}), output=tmp_path / "run")
    for selector in (looks, begins()):
        with pytest.raises(ValueError, match=r"topology: reduce, but this selector .*; use star"):
            fldist.run(config(selector, topology="reduce"), output=tmp_path / "run")
