"""`eval.clients: unselected` and `eval.own`: who scores which model, by hand and on whole runs."""

import dataclasses
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

import fldist
from fldist.algorithm import on_client
from fldist.algorithms.fedavg import FedAvg
from fldist.config import ConfigError, build, load
from fldist.data.client_data import ClientData
from fldist.fold import collect
from fldist.inspection import predict
from fldist.kinds import Scalar, Weights
from fldist.models.evaluate import Evaluation, Scores, warm_up_metrics
from fldist.models.train import warm_up
from fldist.runner import run_here
from fldist.runtime import host
from fldist.runtime.summary import difference, over_clients
from fldist.seeding import Streams, generator
from tests.conftest import Recorder
from tests.own import ByReports, Twice
from tests.test_evaluate import MLP_BYTES, Idle, by_class, rows_of, run_job
from tests.test_laws import CNN, NUM_CLIENTS, SEED, assert_same_bits, config

FAMILY = ("fedavg", "fedprox", "scaffold", "fednova", "moon", "fedopt", "local")
TEST = {"test": 0.25}


@pytest.fixture(autouse=True, scope="module")
def _imports():
    """Let no test pay for what torch and scikit-learn import at their first use."""
    warm_up()
    warm_up_metrics(Evaluation(metrics=("f1",)))


def settings_of(algorithm="fedavg", eval=None, split=TEST, task=None, **other):
    whole = config(algorithm, eval={"every": 0, **(eval or {})}, **other)
    whole["task"] |= {"split": split or {}, **(task or {})}
    return whole


def run(directory, *args, **kwargs):
    result = fldist.run(settings_of(*args, **kwargs), output=directory)
    return result, rows_of(directory, "rounds.jsonl"), rows_of(directory, "clients.jsonl")


def trained_in(directory, number):
    rows = rows_of(directory, "messages.jsonl")
    return sorted({r["client"] for r in rows if r["round"] == number and r["phase"] == "train"})


# ---- clients: unselected
@pytest.mark.parametrize(
    ("per_round", "fraction", "count"),
    [(2, 1, 3), (2, 0.7, 2), (2, 0.5, 1), (2, 0.1, 1), (4, 0.3, 1), (5, 1, 5), (5, 0.2, 5)],
)
def test_who_was_not_selected_scores_the_global_model(tmp_path, per_round, fraction, count):
    how = {"every": 1, "clients": "unselected", "fraction": fraction, "where": "clients"}
    result, lines, of_clients = run(tmp_path / "run", eval=how, clients={"per_round": per_round}, rounds=4)
    task = build(load(settings_of())).task
    drawn = []
    for number in range(1, 5):
        trained = trained_in(tmp_path / "run", number)
        assert len(trained) == per_round
        left = [c for c in range(NUM_CLIENTS) if c not in trained]
        order = torch.randperm(len(left), generator=generator(SEED, "evaluate", number))[:count]
        expected = sorted(left[i] for i in order.tolist()) or list(range(NUM_CLIENTS))
        assert [line["client"] for line in of_clients if line["round"] == number] == expected
        assert lines[number - 1]["scores"]["clients"]["count"] == count
        drawn.append(tuple(expected))
    if count < NUM_CLIENTS:
        assert len(set(drawn)) > 1
    assert result["bytes"]["by_phase"]["evaluate"] == {"down": 4 * count * MLP_BYTES, "up": 4 * count * 24}
    assert {line["n"] for line in of_clients} <= {task.count(c, "test") for c in range(NUM_CLIENTS)}
    silent, _, _ = run(tmp_path / "silent", clients={"per_round": per_round}, rounds=4)
    assert result["state_hash"] == silent["state_hash"]


def test_only_clients_with_samples_of_the_split_count(tmp_path):
    """floor(0.25 n) of 3 samples is none: of five unselected clients three have a part, and half of these is one."""
    partition = {"name": "tests.test_family:Sizes", "sizes": [40, 3, 60, 3, 50, 70]}
    how = {"every": 1, "clients": "unselected", "where": "clients", "fraction": 0.5}
    job = build(load(settings_of(eval=how, task={"partition": partition}, clients={"num_clients": 6})))

    def scored(number, selected):
        clients = SimpleNamespace(
            selected=lambda: SimpleNamespace(ids=selected),
            all=lambda: SimpleNamespace(ids=list(range(6))),
            only=list,
        )
        return job.algorithm.scored_clients(SimpleNamespace(task=job.task, round=number), clients)

    drawn = [scored(number, [1, 4]) for number in range(1, 20)]
    assert {len(ids) for ids in drawn} == {1}
    assert {ids[0] for ids in drawn} == {0, 2, 5}
    assert scored(1, [0, 2, 4, 5]) == [0, 2, 4, 5]  # the others have no part


@dataclass(frozen=True)
class Halved(FedAvg):
    """Sends half of the model to be scored, in a call of its own."""

    def evaluate(self, server, clients):
        model = 0.5 * server.x
        cohort = self.scored_clients(server, clients)
        return cohort.call(self.evaluate_client, model=model, fold={"scores": collect()}, phase="evaluate")


def test_an_algorithm_that_scores_in_its_own_way_asks_the_same_clients(tmp_path):
    how = {"every": 1, "clients": "unselected", "fraction": 0.7, "where": "clients"}
    seen = {}
    for name, algorithm in (("plain", FedAvg()), ("halved", Halved())):
        job = dataclasses.replace(
            build(load(settings_of(eval=how, clients={"per_round": 2}, rounds=3))), algorithm=algorithm
        )
        run_job(job, tmp_path / name)
        seen[name] = rows_of(tmp_path / name, "clients.jsonl")
    plain, halved = ([(line["round"], line["client"], line["n"]) for line in seen[n]] for n in ("plain", "halved"))
    assert plain == halved
    assert [line["loss"] for line in seen["plain"]] != [line["loss"] for line in seen["halved"]]


# ---- own: by hand
def plainly_trained(task, state, number, client, epochs=1):
    """A model after plain training, and by epoch what it gave for the samples before each step: outputs, labels."""
    x, y = task.rows(client)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    module.load_state_dict(state)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    order = Streams(SEED, number, client).generator("order")
    by_epoch = []
    for _ in range(epochs):
        seen = []
        for rows in torch.randperm(len(y), generator=order).split(64):
            outputs = module(x[rows])
            seen.append((outputs.detach(), y[rows]))
            optimizer.zero_grad()
            cross_entropy(outputs, y[rows]).backward()
            optimizer.step()
        by_epoch.append((torch.cat([o for o, _ in seen]), torch.cat([y for _, y in seen])))
    return module, by_epoch


def figures(outputs, labels):
    return {
        "accuracy": float((outputs.argmax(1) == labels).double().mean()),
        "loss": float(cross_entropy(outputs.double(), labels)),
        **{"f1": by_class(outputs, labels, "weighted")["f1"]},
    }


def expected(task, clients, epochs=1, cumulative=False, number=1, state=None):
    """`own` and `own_train` of round 1 where every client begins with the initial model."""
    own, training = {}, {}
    state = state or dict(task.init_params().named())
    for k in clients:
        module, by_epoch = plainly_trained(task, state, number, k, epochs)
        x, y = task.rows(k, "test")
        with torch.no_grad():
            own[k] = Scores(len(y), figures(module(x), y))
        parts = by_epoch if cumulative else by_epoch[-1:]
        found = figures(torch.cat([o for o, _ in parts]), torch.cat([y for _, y in parts]))
        training[k] = Scores(task.sizes[k], {**found, "loss": figures(*by_epoch[-1])["loss"]})
    return over_clients(own), over_clients(training)


def assert_like(got, wanted):
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert got[key] == pytest.approx(value, abs=1e-5), key


@pytest.mark.parametrize("algorithm", FAMILY)
def test_what_clients_have_trained_in_the_first_round(tmp_path, algorithm):
    """All begin with the initial model and train it plainly, whatever they then make of it: FedNova's clients send
    another one, which is not what is scored."""
    own = {"fedprox": {"name": "fedprox", "mu": 0.0}}.get(algorithm, algorithm)
    how = {"own": True, "metrics": ["f1"]}
    _, lines, _ = run(tmp_path / "run", own, how, rounds=1, clients={"per_round": 3})
    task = build(load(settings_of(own, how))).task
    wanted_own, wanted_train = expected(task, trained_in(tmp_path / "run", 1))
    scores = lines[0]["scores"]
    assert set(scores) == {"own", "own_train"}
    assert_like(scores["own"], wanted_own)
    assert_like(scores["own_train"], wanted_train)
    assert scores["own"]["std"]["loss"] > 0
    assert abs(scores["own"]["samples"]["loss"] - scores["own"]["equal"]["loss"]) > 1e-6
    assert scores["own_train"]["n"] == sum(task.sizes[k] for k in trained_in(tmp_path / "run", 1))


@pytest.mark.parametrize("cumulative", [False, True])
def test_training_figures_are_of_the_last_epoch_or_of_all(tmp_path, cumulative):
    how = {"own": True, "metrics": ["f1"], "cumulative_train": cumulative}
    _, lines, _ = run(tmp_path / "run", eval=how, rounds=1, local={"epochs": 3})
    task = build(load(settings_of())).task
    wanted = expected(task, range(NUM_CLIENTS), epochs=3, cumulative=cumulative)
    assert_like(lines[0]["scores"]["own"], wanted[0])
    assert_like(lines[0]["scores"]["own_train"], wanted[1])
    other = expected(task, range(NUM_CLIENTS), epochs=3, cumulative=not cumulative)[1]
    assert abs(other["samples"]["accuracy"] - wanted[1]["samples"]["accuracy"]) > 1e-3
    assert other["samples"]["loss"] == wanted[1]["samples"]["loss"]


@pytest.mark.parametrize("cumulative", [False, True])
def test_a_training_in_pieces_is_told_as_one_without(cumulative):
    how = {"own": True, "cumulative_train": cumulative}
    task = build(load(settings_of(eval=how, local={"epochs": 3}))).task

    def outputs(*pieces):
        data = ClientData(task, 1, Streams(SEED, 1, 1), own=True)
        trained = None
        for epochs in pieces:
            trained = data.train(task.init_params(), epochs=epochs, resume_from=trained)
        assert_same_bits(dict(trained.whole.named()), dict(data.own_model.named()))
        return torch.cat([o for o, _ in trained.outputs])

    whole = outputs(3)
    assert len(whole) == (3 if cumulative else 1) * task.sizes[1]
    assert torch.equal(whole, outputs(1, 2, 3))
    assert torch.equal(whole, outputs(2, 2, 3, 3))


def test_of_several_trainings_in_a_round_the_last_one_counts(tmp_path):
    job = dataclasses.replace(build(load(settings_of(eval={"own": True}, rounds=1))), algorithm=Twice())
    seen = Recorder()
    run_job(job, tmp_path / "run", seen)
    task, n = job.task, np.array(job.task.sizes, dtype=np.float64)
    ends = [
        ClientData(task, k, Streams(SEED, 1, k)).train(task.init_params()).params.named() for k in range(NUM_CLIENTS)
    ]
    ends = [dict(end) for end in ends]
    mean = {name: sum(w * end[name] for w, end in zip(n / n.sum(), ends, strict=True)) for name in ends[0]}
    own = {}
    for k in range(NUM_CLIENTS):
        streams = Streams(SEED, 1, k)
        streams.generator("order")  # the first training's
        start = task.init_params()
        start.write(type(start).zeros(start.layout))
        for name, view in start.named():
            view.copy_(mean[name])
        own[k] = task.evaluate_client(ClientData(task, k, streams).train(start).params, k, "test")
    assert_like(seen.lines[0]["scores"]["own"], over_clients(own))


@pytest.mark.parametrize("split", ["train", "val"])
def test_own_models_are_scored_on_the_part_that_is_named(tmp_path, split):
    """Which is no wish to have the global model scored at the clients as well."""
    parts = {"val": 0.2, "test": 0.2}
    result, lines, _ = run(tmp_path / "run", eval={"every": 1, "own": True, "split": split}, split=parts, rounds=1)
    task = build(load(settings_of(split=parts))).task
    assert lines[0]["scores"].keys() == {"global", "own", "own_train"}
    assert lines[0]["scores"]["own"]["n"] == sum(task.count(k, split) for k in range(NUM_CLIENTS))
    assert result["bytes"]["by_phase"].keys() == {"train"}
    trained = {k: ClientData(task, k, Streams(SEED, 1, k)).train(task.init_params()).whole for k in range(NUM_CLIENTS)}
    own = over_clients({k: task.evaluate_client(model, k, split) for k, model in trained.items()})
    assert_like(lines[0]["scores"]["own"], own)


def test_a_client_without_a_part_tells_of_its_training_alone(tmp_path):
    partition = {"name": "tests.test_family:Sizes", "sizes": [40, 3, 60]}
    _, lines, _ = run(
        tmp_path / "run", eval={"own": True}, task={"partition": partition}, clients={"num_clients": 3}, rounds=1
    )
    scores = lines[0]["scores"]
    assert (scores["own"]["count"], scores["own"]["n"]) == (2, 10 + 15)
    assert (scores["own_train"]["count"], scores["own_train"]["n"]) == (3, 30 + 3 + 45)
    assert all(math.isfinite(v) for of in scores.values() for v in of["samples"].values())


# ---- own: when, and what it costs
def test_own_models_are_scored_in_every_round(tmp_path):
    how = {"every": 3, "own": True}
    result, lines, _ = run(tmp_path / "run", eval=how, rounds=5, clients={"per_round": 2})
    assert ["own" in line["scores"] for line in lines] == [True] * 5
    assert ["global" in line["scores"] for line in lines] == [False, False, True, False, True]
    assert [line["accuracy"] is None for line in lines] == [True, True, False, True, False]
    assert result["final"]["scores"] == lines[-1]["scores"]
    assert len({line["scores"]["own"]["samples"]["loss"] for line in lines}) == 5


@pytest.mark.parametrize("metrics", [[], ["top5", "f1"]])
def test_bytes_of_own_scores(tmp_path, metrics):
    """8 (1 + 2 M), of its own kind; with FedAvg's n it is 8 (2 + 2 (1 + m)), m metrics beside the loss."""
    how = {"own": True, "metrics": metrics}
    told, _, _ = run(tmp_path / "told", eval=how, clients={"per_round": 3})
    quiet, _, _ = run(tmp_path / "quiet", clients={"per_round": 3})
    num, messages = 2 + len(metrics), 2 * 3
    report = 8 * (1 + 2 * num)
    assert told["bytes"]["by_kind"] == {
        **quiet["bytes"]["by_kind"],
        "report": {"down": 0, "up": messages * report},
    }
    assert told["bytes"]["by_kind"]["scalars"]["up"] + messages * report == messages * 8 * (2 + 2 * num)
    assert told["bytes"]["by_phase"].keys() == {"train"}
    predicted = predict(build(load(settings_of(eval=how, clients={"per_round": 3}))))
    assert predicted.by_kind["report"] == {"down": 0, "up": 3 * report}


@pytest.mark.parametrize("algorithm", FAMILY)
def test_nothing_that_is_trained_changes(tmp_path, algorithm):
    """BatchNorm, augmentation and its random stream, three rounds of states."""
    hashes, models = [], []
    for name, how in (
        ("none", {}),
        ("own", {"own": True, "batch_norm": "batch"}),
        ("all", {"every": 1, "own": True, "cumulative_train": True, "clients": "unselected", "fraction": 0.5}),
    ):
        whole = settings_of(algorithm, how, model=CNN, rounds=3, clients={"per_round": 3})
        whole["task"]["augment"] = {"crop": 1}
        result = fldist.run(whole, output=tmp_path / name)
        hashes.append(result["state_hash"])
        if algorithm != "local":
            models.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    assert len(set(hashes)) == 1
    for other in models[1:]:
        assert_same_bits(models[0], other)


def test_a_selectors_reports_travel_beside(tmp_path):
    reports = {}
    for own in (False, True):
        settings = settings_of(eval={"own": own}, rounds=3, clients={"per_round": 2})
        job = dataclasses.replace(build(load(settings)), selector=ByReports())
        result = run_job(job, tmp_path / str(own))
        reports[own] = result["bytes"]["by_kind"]["report"]["up"], result["state_hash"]
    assert reports[False] == (6 * 40, reports[True][1])
    assert reports[True][0] == 6 * (40 + 8 * 5)


class Found(NamedTuple):
    y: Weights
    n: Scalar


@dataclass(frozen=True)
class Prepared(FedAvg):
    """Lets all clients train before the first round."""

    def setup(self, server, clients):
        server.x = clients.all().call(self.update, x=server.x, fold={"y": collect()}).y[0]


def test_what_setup_trains_is_not_scored(tmp_path):
    job = dataclasses.replace(build(load(settings_of(eval={"own": True}, rounds=1))), algorithm=Prepared())
    result = run_job(job, tmp_path / "run")
    assert result["bytes"]["by_phase"]["setup"]["up"] == NUM_CLIENTS * (MLP_BYTES + 8)
    assert result["bytes"]["by_kind"]["report"]["up"] == NUM_CLIENTS * 40


def test_a_call_without_training_tells_nothing(tmp_path):
    job = dataclasses.replace(build(load(settings_of(eval={"own": True}))), algorithm=Idle())
    seen = Recorder()
    result = run_job(job, tmp_path / "run", seen)
    assert [line["scores"] for line in seen.lines] == [None, None]
    assert "report" not in result["bytes"]["by_kind"]


@dataclass(frozen=True)
class Piecewise(FedAvg):
    """Runs a part of its module only."""

    @on_client
    def update(self, me, data, x: Weights) -> Found:
        return Found(data.train(x, loss=lambda module, batch: module[1](module[0](batch.x)).square().mean()).params, 1)


def test_a_loss_that_does_not_run_the_model_cannot_be_told_of(tmp_path):
    job = dataclasses.replace(build(load(settings_of(eval={"own": True}))), algorithm=Piecewise())
    with pytest.raises(RuntimeError, match=r"eval\.own and selectors .* need the model's outputs for each batch"):
        run_job(job, tmp_path / "run")


# ---- on several ranks
@pytest.mark.parametrize("topology", ["star", "collective", "reduce"])
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "local"])
def test_ranks_and_topologies_tell_the_same(tmp_path, hosts, algorithm, topology):
    how = {"every": 2, "own": True, "clients": "unselected", "fraction": 0.6, "metrics": ["top5"]}
    settings = settings_of(algorithm, how, model=CNN, rounds=2, clients={"per_round": 3})
    alone = fldist.run(settings, output=tmp_path / "alone")
    many = run_here(load({**settings, "topology": topology}), nproc=3, output=tmp_path / "many", spawn=hosts)
    one, other = (rows_of(tmp_path / name, "rounds.jsonl") for name in ("alone", "many"))
    assert [line["scores"] for line in one] == [line["scores"] for line in other]
    assert one[0]["scores"]["own"]["count"] == 3
    assert rows_of(tmp_path / "alone", "clients.jsonl") == rows_of(tmp_path / "many", "clients.jsonl")
    assert alone["bytes"]["by_kind"] == many["bytes"]["by_kind"]
    assert alone["state_hash"] == many["state_hash"]


# ---- the generalisation gap
def test_the_gap_is_what_the_others_reach_less_what_the_selected_do(tmp_path):
    how = {"every": 2, "own": True, "clients": "unselected", "where": "both", "metrics": ["f1"]}
    _, lines, of_clients = run(tmp_path / "run", eval=how, rounds=4, clients={"per_round": 2})
    assert ["gap" in line["scores"] for line in lines] == [False, True, False, True]
    scores = lines[1]["scores"]
    rows = [row for row in of_clients if row["round"] == 2]
    n = np.array([row["n"] for row in rows], dtype=np.float64)
    for name in ("accuracy", "loss", "f1"):
        values = np.array([row[name] for row in rows])
        own = scores["own"]
        assert scores["gap"]["equal"][name] == pytest.approx(values.mean() - own["equal"][name], abs=1e-12)
        weighted = (values * n).sum() / n.sum()
        assert scores["gap"]["samples"][name] == pytest.approx(weighted - own["samples"][name], abs=1e-12)
    assert set(scores["gap"]) == {"samples", "equal"}


@pytest.mark.parametrize("how", [{"clients": "all"}, {"clients": "unselected"}])
def test_there_is_no_gap_where_a_client_is_on_both_sides(tmp_path, how):
    per_round = 2 if how["clients"] == "all" else NUM_CLIENTS
    how = {"every": 1, "own": True, "where": "both", **how}
    _, lines, _ = run(tmp_path / "run", eval=how, rounds=1, clients={"per_round": per_round})
    assert set(lines[0]["scores"]) == {"global", "clients", "own", "own_train"}


def test_a_difference_is_of_what_both_have():
    one = {"samples": {"accuracy": 0.75, "auc": 0.5}, "equal": {"accuracy": 0.5, "auc": 0.25}, "std": {}, "n": 3}
    other = {"samples": {"accuracy": 1.0}, "equal": {"accuracy": 0.25}, "std": {}, "n": 4}
    assert difference(one, other) == {"samples": {"accuracy": -0.25}, "equal": {"accuracy": 0.25}}


# ---- what is refused
@pytest.mark.parametrize(
    "row",
    [
        [1.0, 0.5, 1.0, 0.5],  # too short
        [[90.0, 0.5, 1.0, 0.5, 1.0]],
        [7.0, 0.5, 1.0, 0.5, 1.0],  # another number of samples
        [None, 1.5, 1.0, 0.5, 1.0],
        [None, 0.5, 1.0, -0.1, 1.0],
        [None, 0.5, 1.0, math.nan, 1.0],
        [math.nan, 0.5, 1.0, 0.5, 1.0],
    ],
)
def test_rows_that_are_not_what_was_asked_for_are_not_used(tmp_path, monkeypatch, row):
    right = host._own_scores

    def wrong(job, data):
        told = right(job, data)
        if data.client not in (1, 3):
            return told
        return torch.tensor([float(told[0]) if v is None else v for v in row], dtype=torch.float64)

    monkeypatch.setattr(host, "_own_scores", wrong)
    seen = Recorder()
    job = build(load(settings_of(eval={"own": True})))
    result = run_job(job, tmp_path / "run", seen)
    assert [line["scores"]["own"]["count"] for line in seen.lines] == [3, 3]
    assert [line["scores"]["own_train"]["n"] for line in seen.lines] == [sum(job.task.sizes[k] for k in (0, 2, 4))] * 2
    told = [text for text in seen.warnings if "client 1 trained a model whose scores were not used: refused" in text]
    assert len(told) == 2
    assert all("(and 1 more)" in text for text in told)
    assert (seen.lines[0]["replied"], result["status"]) == (NUM_CLIENTS, "finished")


def test_a_round_that_does_not_count_has_no_own_scores(tmp_path):
    settings = settings_of("tests.own:FailsLate", {"own": True})
    settings["faults"] = {"min_replies": "all"}
    seen = Recorder()
    run_here(load(settings), output=tmp_path / "run", observer=seen)
    assert [line["committed"] for line in seen.lines] == [True, False]
    assert seen.lines[0]["scores"]["own"]["count"] == NUM_CLIENTS
    assert seen.lines[1]["scores"] is None


@pytest.mark.parametrize(
    ("algorithm", "split", "how", "text"),
    [
        ("fedavg", {}, {"own": True}, r"eval\.own: .* eval\.split is auto \(global\); set task\.split\.test=0\.2"),
        ("fedavg", TEST, {"own": True, "split": "global"}, r"eval\.own: .* eval\.split is global; set"),
        ("fedavg", TEST, {"own": True, "split": "val"}, r"eval\.split: clients have no val part"),
        ("fedavg", {"test": 0.001}, {"own": True}, r"eval\.split: no client has a test part; .* or use train"),
        ("centralised", TEST, {"own": True}, r"eval\.own: no client of Centralised trains a model"),
        ("fedavg", TEST, {"model": "sent", "clients": "unselected"}, r"eval\.model: sent, but clients that are not"),
        ("fedavg", TEST, {"where": "server", "clients": "unselected"}, r"eval\.clients: unselected is about scor"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused(algorithm, split, how, text):
    with pytest.raises(ValueError, match=text):
        build(load(settings_of(algorithm, how, split=split)))


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"fraction": 0.5}, r"eval: fraction: 0\.5 is a share of the clients that were not selected"),
        ({"clients": "selected", "fraction": 0.5}, r"eval: fraction: 0\.5 is a share"),
        ({"clients": "unselected", "fraction": 0}, r"eval\.fraction"),
        ({"clients": "unselected", "fraction": 1.5}, r"eval\.fraction"),
        ({"cumulative_train": True}, r"eval: cumulative_train: true is about .* set eval\.own: true"),
        ({"clients": "others"}, r"eval\.clients"),
    ],
)
def test_a_wrong_section_is_refused(how, text):
    with pytest.raises(ConfigError, match=text):
        load(settings_of(eval=how))


def test_runs_that_do_not_use_it_are_as_they_were():
    job = build(load(settings_of()))
    assert [f.name for f in job.methods["update"].reply.fields] == ["y", "n"]
