"""Metrics, the section `eval`, reports for selectors, and which rows are whose: by hand and on whole runs."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

import fldist
from fldist.algorithm import Algorithm, ClientScores, State, on_client
from fldist.algorithms.fedavg import FedAvg
from fldist.algorithms.scaffold import Scaffold
from fldist.config import ConfigError, build, load
from fldist.data.client_data import ClientData
from fldist.data.datasets import Dataset, Digits
from fldist.data.prepare import ClientSplit
from fldist.data.task import Task
from fldist.kinds import Scalar, Weights
from fldist.models.evaluate import Evaluation, Scores, evaluate, warm_up_metrics
from fldist.models.train import warm_up
from fldist.runner import run_here
from fldist.runtime.host import Host
from fldist.runtime.launch import Unsupervised
from fldist.runtime.output import Output
from fldist.runtime.server import ServerLoop
from fldist.runtime.summary import over_clients
from fldist.seeding import Streams
from fldist.selection import Candidates, ClientReport, Selector
from fldist.wire.local import LocalServer
from tests.conftest import Recorder
from tests.test_laws import CNN, CNN_BYTES, NUM_CLIENTS, SEED, assert_same_bits, config, final_model, ordinary

ALL = ("accuracy", "loss", "top5", "f1", "precision", "recall", "auc")
MLP_BYTES = 4 * (64 * 8 + 8 + 8 * 10 + 10)


@pytest.fixture(autouse=True, scope="module")
def _imports():
    """Let no test pay for what torch and scikit-learn import at their first use."""
    warm_up()
    warm_up_metrics(Evaluation(metrics=ALL))
    Digits().load()


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(n, classes, seed=0):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def score(outputs, labels, **how):
    """Scores of outputs as they are."""
    return evaluate(nn.Identity(), [(outputs, labels)], Evaluation(**{"metrics": ALL, **how}))


# ---- metrics
def test_accuracy_and_loss_by_hand():
    outputs = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 3.0, 1.0], [1.0, 0.0, 0.0]])
    got = score(outputs, torch.tensor([0, 1, 1, 2]))
    losses = [
        math.log(math.exp(2) + 2) - 2,
        math.log(2 + math.e) - 0,
        math.log(1 + math.exp(3) + math.e) - 3,
        math.log(math.e + 2) - 0,
    ]
    assert got.n == 4
    assert got.accuracy == got.values["accuracy"] == 0.5
    assert got.loss == got.values["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)


def test_top5_counts_the_five_largest():
    rank = torch.tensor([0, 3, 4, 5, 6])  # place of the label among the outputs, from 0
    outputs = -torch.arange(7.0).repeat(5, 1)
    assert score(outputs, rank).values["top5"] == 3 / 5
    assert score(outputs, rank).accuracy == 1 / 5


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_top5_of_five_classes_or_fewer_is_1(classes):
    assert score(drawn(9, classes), labels_of(9, classes)).values["top5"] == 1.0


def by_class(outputs, labels, average):
    """Precision, recall and F1 from counts, 0 where undefined."""
    predicted = outputs.double().numpy().argmax(1)
    truth = labels.numpy()
    if average == "micro":
        return dict.fromkeys(("precision", "recall", "f1"), float((predicted == truth).mean()))
    figures, supports = [], []
    for c in sorted(set(truth) | set(predicted)):
        hit = ((predicted == c) & (truth == c)).sum()
        precision = hit / (predicted == c).sum() if (predicted == c).any() else 0.0
        recall = hit / (truth == c).sum() if (truth == c).any() else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        figures.append((precision, recall, f1))
        supports.append((truth == c).sum())
    weights = np.array(supports, dtype=np.float64) if average == "weighted" else np.ones(len(supports))
    means = (np.array(figures) * (weights / weights.sum())[:, None]).sum(0)
    return dict(zip(("precision", "recall", "f1"), means.tolist(), strict=True))


@pytest.mark.parametrize("average", ["weighted", "macro", "micro"])
@pytest.mark.parametrize("seed", [1, 2])
def test_precision_recall_and_f1_by_hand(average, seed):
    """One class is never predicted, another never there."""
    labels = labels_of(40, 5, seed) % 4
    outputs = drawn(40, 5, seed=seed) + 1.5 * nn.functional.one_hot(labels, 5)
    outputs[:, 2] = -9.0
    outputs[0, 4] = 9.0
    assert set(labels.tolist()) == {0, 1, 2, 3}
    assert set(outputs.argmax(1).tolist()) == {0, 1, 3, 4}
    got = score(outputs, labels, average=average).values
    for name, value in by_class(outputs, labels, average).items():
        assert got[name] == pytest.approx(value, abs=1e-9), name
    if average == "weighted":
        assert got["recall"] == pytest.approx(got["accuracy"], abs=1e-12)
        assert abs(got["recall"] - got["precision"]) > 1e-3
        assert abs(got["f1"] - got["recall"]) > 1e-3


def auc_by_ranks(outputs, labels):
    """Share of (positive, negative) pairs in order, ties half, every (sample, class) pair one decision."""
    truth = nn.functional.one_hot(labels, outputs.shape[1]).bool().numpy().ravel()
    values = outputs.double().numpy().ravel()
    positive, negative = values[truth][:, None], values[~truth][None, :]
    return float(((positive > negative) + 0.5 * (positive == negative)).mean())


@pytest.mark.parametrize("classes", [2, 4])
def test_auc_is_that_of_all_decisions_together_ties_half(classes):
    labels = labels_of(30, classes)
    outputs = drawn(30, classes) + nn.functional.one_hot(labels, classes)
    assert score(outputs, labels).values["auc"] == pytest.approx(auc_by_ranks(outputs, labels), abs=1e-9)
    tied = (2 * outputs).round() / 2
    assert len(set(tied.flatten().tolist())) < 20
    assert score(tied, labels).values["auc"] == pytest.approx(auc_by_ranks(tied, labels), abs=1e-9)
    perfect = nn.functional.one_hot(labels, classes).float()
    assert score(perfect, labels).values["auc"] == 1.0
    assert score(-perfect, labels).values["auc"] == 0.0
    assert score(torch.zeros(30, classes), labels).values["auc"] == 0.5


def test_outputs_that_are_not_numbers_have_no_auc_and_no_loss():
    labels = labels_of(12, 3)
    outputs = drawn(12, 3)
    outputs[3, 1] = math.nan
    got = score(outputs, labels)
    assert math.isnan(got.values["auc"])
    assert math.isnan(got.loss)
    assert got.n == 12


def test_no_samples_have_no_scores():
    got = evaluate(nn.Identity(), [], Evaluation(metrics=ALL))
    assert got.n == 0
    assert set(got.values) == set(ALL)
    assert all(math.isnan(v) for v in got.values.values())


def test_accuracy_and_loss_are_always_reported_and_first():
    assert Evaluation(metrics=("f1", "loss", "top5")).names == ("accuracy", "loss", "f1", "top5")
    assert Evaluation(metrics=()).names == ("accuracy", "loss")
    got = score(drawn(4, 3), labels_of(4, 3), metrics=("recall",))
    assert list(got.values) == ["accuracy", "loss", "recall"]


def normalised(seed=0):
    """A BatchNorm with statistics far from the data's, and a classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    module[0].running_mean += torch.tensor([1.0, -1.0, 0.5, 2.0])
    module[0].running_var *= torch.tensor([0.5, 2.0, 4.0, 1.0])
    return module


@pytest.mark.parametrize("how", ["running", "batch"])
def test_batch_norm_uses_running_statistics_or_each_batchs_own(how):
    x, labels = drawn(11, 4), labels_of(11, 3)
    batches = [(x[:6], labels[:6]), (x[6:], labels[6:])]
    module = normalised()
    kept = {n: t.clone() for n, t in module.state_dict().items()}
    loss = correct = 0.0
    for part, wanted in batches:
        values = part.double()
        if how == "running":
            mean, var = kept["0.running_mean"].double(), kept["0.running_var"].double()
        else:
            mean, var = values.mean(0), values.var(0, unbiased=False)
        z = (values - mean) / (var + 1e-5).sqrt()
        outputs = z @ kept["1.weight"].double().T + kept["1.bias"].double()
        loss += float(cross_entropy(outputs, wanted, reduction="sum"))
        correct += float((outputs.argmax(1) == wanted).sum())
    got = evaluate(module, batches, Evaluation(batch_norm=how))
    assert got.loss == pytest.approx(loss / 11, abs=1e-6)
    assert got.accuracy == correct / 11
    if how == "running":
        assert_same_bits(kept, dict(module.state_dict()))
    other = evaluate(normalised(), batches, Evaluation(batch_norm="batch" if how == "running" else "running"))
    assert abs(other.loss - got.loss) > 1e-3


class Counted(nn.Module):
    """A module, and how often it was called."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


BATCHSTAT = ("accuracy_batchstat", "top5", "f1")


def test_accuracy_by_batch_statistics_is_that_of_batch_norm_batch_and_changes_nothing():
    """Beside the scores by running statistics, which are as they are without it."""
    x, labels = drawn(61, 4), labels_of(61, 3)
    batches = [(x[:40], labels[:40]), (x[40:], labels[40:])]
    module = Counted(normalised())
    kept = {n: t.clone() for n, t in module.state_dict().items()}
    got = evaluate(module, batches, Evaluation(metrics=BATCHSTAT))
    assert module.calls == 4
    assert_same_bits(kept, dict(module.state_dict()))
    assert module.inner[0].track_running_stats
    plain = evaluate(module, batches, Evaluation(metrics=BATCHSTAT[1:]))
    assert module.calls == 6
    assert got.values == {**plain.values, "accuracy_batchstat": got.values["accuracy_batchstat"]}
    wanted = evaluate(normalised(), batches, Evaluation(batch_norm="batch"))
    assert got.values["accuracy_batchstat"] == wanted.accuracy != got.accuracy


@pytest.mark.parametrize(
    ("module", "how"),
    [
        (nn.Linear(4, 3), "running"),
        (nn.Sequential(nn.GroupNorm(2, 4), nn.Linear(4, 3)), "running"),
        (normalised(), "batch"),
    ],
)
def test_accuracy_by_batch_statistics_takes_no_second_pass_where_it_is_the_accuracy(module, how):
    counted = Counted(module)
    batches = [(drawn(30, 4), labels_of(30, 3))]
    got = evaluate(counted, batches, Evaluation(metrics=BATCHSTAT, batch_norm=how))
    assert counted.calls == 1
    assert 0 < got.values["accuracy_batchstat"] == got.accuracy < 1


def test_a_batch_of_one_has_no_statistics():
    batches = [(drawn(6, 4), labels_of(6, 3)), (drawn(1, 4), labels_of(1, 3))]
    got = evaluate(normalised(), batches, Evaluation(metrics=BATCHSTAT))
    assert math.isnan(got.values["accuracy_batchstat"])
    assert got.n == 7
    assert not math.isnan(got.accuracy)
    none = evaluate(normalised(), [], Evaluation(metrics=BATCHSTAT))
    assert math.isnan(none.values["accuracy_batchstat"])
    with pytest.raises(ValueError, match=r"accuracy_batchstat needs batches of at least two samples; raise eval\."):
        Evaluation(metrics=BATCHSTAT, batch_size=1)


@pytest.mark.parametrize("how", ["running", "batch"])
@pytest.mark.parametrize("training", [True, False])
def test_evaluation_restores_the_modules_mode_and_makes_no_graph(training, how):
    module = normalised().train(training)
    evaluate(module, [(drawn(6, 4), labels_of(6, 3))], Evaluation(batch_norm=how, metrics=BATCHSTAT))
    assert [m.training for m in module.modules()] == [training] * 3
    assert all(p.grad is None for p in module.parameters())


def test_dropout_is_off_during_evaluation():
    module = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 3)).train()
    x, labels = drawn(20, 4), labels_of(20, 3)
    expected = float(cross_entropy(module[1](x), labels).detach())
    assert evaluate(module, [(x, labels)]).loss == pytest.approx(expected, abs=1e-6)
    assert evaluate(module, [(x, labels)], Evaluation(batch_norm="batch")).loss == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("model", ["mlp", CNN])
def test_the_batch_size_does_not_change_the_scores(model):
    scores = []
    for size in (1, 7, 360, 5000):
        settings = config(model=model, eval={"batch_size": size, "metrics": list(ALL)})
        task = build(load(settings)).task
        got = [task.evaluate(task.init_params()), task.evaluate_client(task.init_params(), 1, "train")]
        assert [s.n for s in got] == [360, task.sizes[1]]
        scores.append([v for s in got for v in s.values.values()])
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], abs=1e-6)


# ---- figures over clients
def test_means_and_deviation_over_clients_by_hand():
    scores = {
        0: Scores(1, {"accuracy": 1.0, "loss": 2.0}),
        4: Scores(3, {"accuracy": 0.0, "loss": 4.0}),
        7: Scores(4, {"accuracy": 0.5, "loss": 9.0}),
        8: Scores(0, {"accuracy": math.nan, "loss": math.nan}),
    }
    got = over_clients(scores)
    assert (got["count"], got["n"]) == (3, 8)
    assert got["samples"] == pytest.approx({"accuracy": 3 / 8, "loss": 50 / 8})
    assert got["equal"] == pytest.approx({"accuracy": 0.5, "loss": 5.0})
    assert got["std"] == pytest.approx({"accuracy": math.sqrt(1 / 6), "loss": math.sqrt((9 + 1 + 16) / 3)})


def test_a_figure_that_one_client_lacks_is_the_mean_of_the_others():
    scores = {0: Scores(2, {"accuracy": 0.5, "auc": math.nan}), 1: Scores(6, {"accuracy": 1.0, "auc": 0.75})}
    got = over_clients(scores)
    assert got["samples"] == {"accuracy": 7 / 8, "auc": 0.75}
    assert got["equal"]["auc"] == 0.75
    assert got["std"]["auc"] == 0.0
    none = over_clients({0: Scores(2, {"auc": math.nan})})
    assert all(math.isnan(none[k]["auc"]) for k in ("samples", "equal", "std"))


# ---- the section `eval` on whole runs
def rows_of(directory, name):
    path = Path(directory) / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(directory, algorithm="fedavg", eval=None, task=None, **settings):
    """A run of the digits; its result, its lines of rounds.jsonl and of clients.jsonl."""
    whole = config(algorithm, eval={} if eval is None else eval, **settings)
    whole["task"].update(task or {})
    result = fldist.run(whole, output=directory)
    assert result["status"] == "finished"
    return result, rows_of(directory, "rounds.jsonl"), rows_of(directory, "clients.jsonl")


def task_of(task=None, **settings):
    whole = config(**settings)
    whole["task"].update(task or {})
    return build(load(whole)).task


def run_job(job, directory, observer=None, name="own"):
    """Run a job with parts of this file in it."""
    directory.mkdir()
    link = LocalServer(Host(job).serve, job.calls())
    facts = {"backend": "in-process", "world_size": 1}
    named = {"algorithm": {"name": name}}
    nobody = Unsupervised(survives_loss=True)
    options = {"ranks": [0], "supervisor": nobody, "facts": facts, "config": named}
    return ServerLoop(job, link, Output(directory), observer or Recorder(), **options).run()


def plainly(state, x, y):
    """Accuracy and loss of the settings' mlp with these values by name."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    module.load_state_dict(state)
    with torch.no_grad():
        outputs = module(x)
    return float((outputs.argmax(1) == y).double().mean()), float(cross_entropy(outputs, y))


def assert_scored(lines, state, task, split):
    """These lines of clients.jsonl are what this model reaches on the clients' parts."""
    assert lines
    for line in lines:
        if split == "global":
            x, y = next(task.test_batches(10_000))
        else:
            x, y = task.rows(line["client"], split)
        accuracy, loss = plainly(state, x, y)
        assert line["n"] == len(y)
        assert line["accuracy"] == pytest.approx(accuracy, abs=1e-9)
        assert line["loss"] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("where", "split", "scored"),
    [
        ("auto", "auto", {"global"}),
        ("auto", "train", {"global", "clients"}),
        ("server", "auto", {"global"}),
        ("clients", "train", {"clients"}),
        ("both", "train", {"global", "clients"}),
    ],
)
def test_who_scores_the_model(tmp_path, where, split, scored):
    result, lines, of_clients = run(tmp_path / "run", eval={"where": where, "split": split})
    assert [set(line["scores"]) for line in lines] == [scored] * 2
    assert len(of_clients) == (2 * NUM_CLIENTS if "clients" in scored else 0)
    assert (tmp_path / "run" / "clients.jsonl").exists() == ("clients" in scored)
    assert ("evaluate" in result["bytes"]["by_phase"]) == ("clients" in scored)
    state = load_file(tmp_path / "run" / "model" / "model.safetensors")
    task = task_of()
    accuracy, loss = plainly(state, *next(task.test_batches(10_000)))
    if "global" in scored:  # the headline
        assert lines[-1]["scores"]["global"] == pytest.approx({"accuracy": accuracy, "loss": loss}, abs=1e-6)
        assert (lines[-1]["accuracy"], lines[-1]["loss"]) == pytest.approx((accuracy, loss), abs=1e-6)
    else:
        mean = lines[-1]["scores"]["clients"]["samples"]
        assert (lines[-1]["accuracy"], lines[-1]["loss"]) == (mean["accuracy"], mean["loss"])
        assert abs(mean["loss"] - loss) > 1e-4
    assert result["final"] == {k: lines[-1][k] for k in ("accuracy", "loss", "scores")}
    assert result["best"]["accuracy"] == max(line["accuracy"] for line in lines)


@pytest.mark.parametrize("asked", [{"split": "train"}, {"model": "sent"}, {"clients": "selected"}])
def test_what_is_asked_of_clients_is_never_left_out_silently(asked):
    key, value = next(iter(asked.items()))
    with pytest.raises(ValueError, match=rf"eval\.{key}: {value} is about scoring at clients; use eval\.where: both"):
        build(load(config(eval={"where": "server", **asked})))
    assert build(load(config(eval={"where": "auto", **asked}))).evaluation.where == "both"
    assert build(load(config(eval={"where": "server", "model": "global"}))).evaluation.where == "server"


@pytest.mark.parametrize(("every", "scored"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (7, [5]), (0, [])])
def test_how_often_is_scored(tmp_path, every, scored):
    result, lines, of_clients = run(tmp_path / "run", eval={"every": every, "where": "both"}, rounds=5)
    assert [line["round"] for line in lines if line["scores"] is not None] == scored
    assert sorted({line["round"] for line in of_clients}) == scored
    assert (result["final"]["accuracy"] is None) == (not scored)
    down = result["bytes"]["by_phase"].get("evaluate", {"down": 0})["down"]
    assert down == len(scored) * NUM_CLIENTS * MLP_BYTES


SPLITS = {"split": {"val": 0.2, "test": 0.25}}


@pytest.mark.parametrize("split", ["train", "val", "test", "global"])
def test_what_is_scored_at_the_clients(tmp_path, split):
    """The global model after aggregation, in the last round the final one."""
    _, lines, of_clients = run(tmp_path / "run", eval={"where": "clients", "split": split}, task=SPLITS)
    task = task_of(SPLITS)
    last = [line for line in of_clients if line["round"] == 2]
    assert [line["client"] for line in last] == list(range(NUM_CLIENTS))
    assert_scored(last, load_file(tmp_path / "run" / "model" / "model.safetensors"), task, split)
    total = NUM_CLIENTS * 360 if split == "global" else sum(task.count(k, split) for k in range(NUM_CLIENTS))
    assert lines[-1]["scores"]["clients"]["n"] == total


def test_split_auto_is_the_clients_test_part_if_there_is_one(tmp_path):
    for name, task, n in (("with", SPLITS, None), ("without", {}, 360)):
        _, _, of_clients = run(tmp_path / name, eval={"where": "clients"}, task=task, rounds=1)
        counts = [task_of(SPLITS).count(k, "test") if n is None else n for k in range(NUM_CLIENTS)]
        assert [line["n"] for line in of_clients] == counts


@pytest.mark.parametrize("weights", ["samples", "equal"])
def test_weights_and_deviation_are_those_of_the_clients_lines(tmp_path, weights):
    evaluation = {"where": "clients", "split": "test", "weights": weights, "metrics": ["top5", "f1"]}
    result, lines, of_clients = run(tmp_path / "run", eval=evaluation, task=SPLITS, rounds=3)
    for line in lines:
        rows = [row for row in of_clients if row["round"] == line["round"]]
        got = line["scores"]["clients"]
        n = np.array([row["n"] for row in rows], dtype=np.float64)
        assert (got["count"], got["n"]) == (NUM_CLIENTS, int(n.sum()))
        for name in ("accuracy", "loss", "top5", "f1"):
            values = np.array([row[name] for row in rows])
            assert got["samples"][name] == pytest.approx((values * n).sum() / n.sum(), abs=1e-12)
            assert got["equal"][name] == pytest.approx(values.mean(), abs=1e-12)
            assert got["std"][name] == pytest.approx(values.std(), abs=1e-12)
            assert values.std() > 0
        assert abs(got["samples"]["loss"] - got["equal"]["loss"]) > 1e-6
        assert line["accuracy"] == got[weights]["accuracy"]
        assert line["loss"] == got[weights]["loss"]
    assert result["final"]["loss"] == lines[-1]["scores"]["clients"][weights]["loss"]


# ---- which model
@pytest.mark.parametrize("rounds", [1, 2])
def test_the_model_sent_is_the_one_before_aggregation(tmp_path, rounds):
    """Scored by the clients that were sent it, at no cost of weights."""
    settings = {"rounds": rounds, "clients": {"per_round": 2}}
    evaluation = {"where": "clients", "model": "sent", "split": "train"}
    result, _, of_clients = run(tmp_path / "run", eval=evaluation, **settings)
    if rounds == 1:
        state = dict(task_of().init_params().named())
    else:
        before = {**config(**settings), "rounds": rounds - 1}
        state = final_model(before, tmp_path / "before")
    messages = rows_of(tmp_path / "run", "messages.jsonl")
    trained = {m["client"] for m in messages if m["round"] == rounds and m["phase"] == "train"}
    last = [line for line in of_clients if line["round"] == rounds]
    assert {line["client"] for line in last} == trained
    assert len(trained) == 2
    assert_scored(last, state, task_of(), "train")
    after = plainly(load_file(tmp_path / "run" / "model" / "model.safetensors"), *task_of().rows(last[0]["client"]))
    assert abs(after[1] - last[0]["loss"]) > 1e-3
    kinds = {m["kind"] for m in messages if m["row"] == "kind" and m["phase"] == "evaluate"}
    assert kinds == {"report"}
    assert {m["client"] for m in messages if m["round"] == rounds and m["phase"] == "evaluate"} == trained
    assert result["bytes"]["by_phase"]["evaluate"]["down"] == 0


@dataclass(frozen=True)
class Sometimes(FedAvg):
    """Sends a model in odd rounds only."""

    def round(self, server, clients):
        if server.round % 2:
            super().round(server, clients)
        else:
            clients.selected().call(self.tally)

    @on_client
    def tally(self, me, data) -> "Count":
        return Count(7)


def test_a_model_sent_in_an_earlier_round_is_not_the_one_sent(tmp_path):
    settings = config(rounds=3, eval={"where": "clients", "model": "sent", "split": "train"})
    seen = Recorder()
    job = dataclasses.replace(build(load(settings)), algorithm=Sometimes())
    run_job(job, tmp_path / "run", seen)
    assert [line["accuracy"] is None for line in seen.lines] == [False, True, False]
    said = "round 2: no client could be scored: error: evaluate_client on host 0: ValueError: eval.model"
    assert any(said in text for text in seen.warnings)


@dataclass(frozen=True)
class Personal(FedAvg):
    """FedAvg whose clients also keep the model that they trained last; it is 0 before."""

    def init_client(self, task, client):
        return State(y=task.init_params().zeros_like())

    @on_client
    def update(self, me, data, x: Weights) -> "Kept":
        me.y = data.train(x).params
        return Kept(me.y, data.n)

    def personal_model(self, me, data):
        return me.y


class Kept(NamedTuple):
    y: Weights
    n: Scalar


def test_the_personal_model_is_the_committed_one_of_this_round(tmp_path):
    """Clients that have not trained yet are scored as well, with what they have."""
    settings = config(rounds=1, clients={"per_round": 2}, eval={"where": "both", "split": "train"})
    job = dataclasses.replace(build(load(settings)), algorithm=Personal())
    assert job.evaluation.model == "personal"
    result = run_job(job, tmp_path / "run")
    trained = {m["client"] for m in rows_of(tmp_path / "run", "messages.jsonl") if m["phase"] == "train"}
    task = job.task
    lines = rows_of(tmp_path / "run", "clients.jsonl")
    assert len(lines) == NUM_CLIENTS
    for line in lines:
        state = task.init_params().zeros_like()
        if line["client"] in trained:
            k = line["client"]
            state = ClientData(task, k, Streams(SEED, 1, k)).train(task.init_params()).params
        assert_scored([line], dict(state.named()), task, "train")
    assert result["bytes"]["by_phase"]["evaluate"] == {"down": 0, "up": NUM_CLIENTS * 8 * 3}
    assert result["final"]["accuracy"] == result["final"]["scores"]["global"]["accuracy"]


# ---- bytes
@pytest.mark.parametrize("per_round", [2, 5])
@pytest.mark.parametrize("who", ["all", "selected"])
@pytest.mark.parametrize(("metrics", "num"), [([], 2), (["f1", "top5", "accuracy"], 4)])
def test_bytes_of_scoring_the_global_model(tmp_path, who, per_round, metrics, num):
    """One model down and 8 (1 + M) up for every client; training's bytes are what they were."""
    evaluation = {"where": "clients", "clients": who, "metrics": metrics, "split": "train"}
    clients = {"per_round": per_round}
    result, _, of_clients = run(tmp_path / "run", eval=evaluation, model=CNN, clients=clients)
    scored = 2 * (NUM_CLIENTS if who == "all" else per_round)
    assert len(of_clients) == scored
    by_phase = result["bytes"]["by_phase"]
    assert by_phase["evaluate"] == {"down": scored * CNN_BYTES, "up": scored * 8 * (1 + num)}
    train = {"down": 2 * per_round * CNN_BYTES, "up": 2 * per_round * (CNN_BYTES + 8)}
    assert by_phase["train"] == result["bytes"]["logical"] == train
    assert "report" not in result["bytes"]["by_kind"]


@pytest.mark.parametrize(("algorithm", "model"), [("fedavg", "sent"), ("local", "personal")])
def test_bytes_of_scoring_what_clients_have(tmp_path, algorithm, model):
    evaluation = {"where": "clients", "model": model, "metrics": ["auc"]}
    result, _, of_clients = run(tmp_path / "run", algorithm, eval=evaluation, clients={"per_round": 3})
    scored = 2 * (3 if model == "sent" else NUM_CLIENTS)
    assert len(of_clients) == scored
    assert result["bytes"]["by_phase"]["evaluate"] == {"down": 0, "up": scored * 8 * 4}


def test_clients_without_samples_of_the_split_are_not_asked(tmp_path):
    """floor(0.25 n) of 3 samples is none."""
    partition = {"name": "tests.test_family:Sizes", "sizes": [40, 3, 60]}
    task = {"partition": partition, "split": {"test": 0.25}}
    clients = {"num_clients": 3}
    result, lines, of_clients = run(tmp_path / "run", eval={"where": "clients"}, task=task, clients=clients)
    assert [(line["client"], line["n"]) for line in of_clients if line["round"] == 1] == [(0, 10), (2, 15)]
    assert result["bytes"]["by_phase"]["evaluate"]["up"] == 2 * 2 * 24
    assert lines[0]["selected"] == 3


# ---- evaluation changes nothing
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
@pytest.mark.parametrize("batch_norm", ["running", "batch"])
def test_training_is_the_same_with_and_without_evaluation(tmp_path, algorithm, batch_norm):
    models, hashes = [], []
    for name, evaluation in (
        ("none", {"every": 0}),
        ("both", {"where": "both", "split": "train", "batch_norm": batch_norm}),
        ("sent", {"where": "clients", "model": "sent", "split": "test", "metrics": ["accuracy_batchstat"]}),
    ):
        settings = config(algorithm, model=CNN, rounds=3, clients={"per_round": 2}, eval=evaluation)
        settings["task"]["split"] = {"test": 0.2}
        result = fldist.run(settings, output=tmp_path / name)
        models.append(load_file(tmp_path / name / "model" / "model.safetensors"))
        hashes.append(result["state_hash"])
    assert hashes[0] == hashes[1] == hashes[2]
    for other in models[1:]:
        assert_same_bits(models[0], other)


@dataclass(frozen=True)
class Meddler(Scaffold):
    """Its clients write to their state while they are scored, and draw random numbers."""

    @on_client
    def evaluate_client(self, me, data, model: Weights | None) -> ClientScores:
        me.c = me.c.zeros_like()
        data.streams.generator("order")
        torch.rand(3)
        return ClientScores(torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64))


def test_what_clients_write_while_they_are_scored_is_not_kept(tmp_path):
    hashes = []
    for every in (0, 1):
        settings = config("scaffold", rounds=3, clients={"per_round": 3}, eval={"every": every, "where": "clients"})
        job = dataclasses.replace(build(load(settings)), algorithm=Meddler())
        hashes.append(run_job(job, tmp_path / str(every))["state_hash"])
    assert hashes[0] == hashes[1]


def test_scoring_on_several_ranks_is_scoring_on_one(tmp_path, hosts):
    evaluation = {"where": "both", "model": "sent", "metrics": ["top5"]}
    settings = config("scaffold", clients={"per_round": 3}, eval=evaluation)
    settings["task"]["split"] = {"test": 0.2}
    alone = fldist.run(settings, output=tmp_path / "alone")
    many = run_here(load(settings), nproc=3, output=tmp_path / "many", spawn=hosts)
    lines = rows_of(tmp_path / "alone", "clients.jsonl")
    assert len(lines) == 2 * 3
    assert lines == rows_of(tmp_path / "many", "clients.jsonl")
    assert alone["final"] == many["final"]
    assert alone["bytes"]["by_phase"] == many["bytes"]["by_phase"]
    assert alone["state_hash"] == many["state_hash"]


# ---- what cannot be
def evaluation_of(algorithm="fedavg", task=None, clients=None, **evaluation):
    settings = config(algorithm, eval=evaluation, clients=clients)
    settings["task"].update(task or {})
    return build(load(settings)).evaluation


def test_what_auto_means():
    got = evaluation_of()
    assert (got.where, got.model, got.split) == ("server", "global", "global")
    got = evaluation_of(task=SPLITS)
    assert (got.where, got.model, got.split) == ("server", "global", "test")
    got = evaluation_of("local")
    assert (got.where, got.model, got.split) == ("clients", "personal", "global")
    got = evaluation_of("fedavg", {"merged": True, **SPLITS})
    assert (got.where, got.model, got.split) == ("clients", "global", "test")
    got = evaluation_of("local", {"merged": True, **SPLITS})
    assert (got.where, got.model, got.split) == ("clients", "personal", "test")


@pytest.mark.parametrize(
    ("algorithm", "task", "evaluation", "text"),
    [
        ("local", {}, {"where": "server"}, r"eval\.where: server, but Local has no global model; use clients"),
        ("local", {}, {"where": "both"}, r"eval\.where: both, but Local has no global model"),
        ("local", {}, {"model": "global"}, r"eval\.model: global, but Local has no global model; use personal"),
        ("fedavg", {}, {"model": "personal"}, r"eval\.model: personal, but clients of FedAvg have no models of their"),
        ("fedavg", {"merged": True, **SPLITS}, {"where": "server"}, r"eval\.where: server, .*no global test set"),
        ("fedavg", {"merged": True, **SPLITS}, {"where": "both"}, r"eval\.where: both, .*no global test set"),
        ("fedavg", {"merged": True}, {}, r"no global test set; give clients one: task\.split\.test"),
        ("fedavg", {"merged": True, **SPLITS}, {"split": "global"}, r"no global test set"),
        ("fedavg", {}, {"where": "clients", "split": "val"}, r"eval\.split: clients have no val part; set task\.split"),
        ("fedavg", {}, {"where": "both", "split": "test"}, r"eval\.split: clients have no test part"),
        ("fedavg", {"split": {"test": 0.1}}, {"where": "both", "split": "val"}, r"clients have no val part"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused(algorithm, task, evaluation, text):
    with pytest.raises(ValueError, match=text):
        evaluation_of(algorithm, task, **evaluation)


@pytest.mark.parametrize(
    "evaluation",
    [
        {"every": -1},
        {"metrics": ["f2"]},
        {"where": "here"},
        {"weights": "size"},
        {"batch_size": 0},
        {"averag": "macro"},
    ],
)
def test_a_wrong_section_is_refused_by_its_key(evaluation):
    with pytest.raises(ConfigError, match=rf"eval\.{next(iter(evaluation))}"):
        load(config(eval=evaluation))


@dataclass(frozen=True)
class Odd(FedAvg):
    """Clients whose scores are not what was asked for."""

    row: tuple[float, ...] = ()

    @on_client
    def evaluate_client(self, me, data, model: Weights | None) -> ClientScores:
        right = super().evaluate_client(me, data, model).scores
        if data.client == 0:
            return ClientScores(right[:2])
        if data.client == 1:
            return ClientScores(right[None])
        if data.client == 2:
            raise ZeroDivisionError("no scores")
        if data.client == 3:
            return ClientScores(torch.tensor(self.row, dtype=torch.float64))
        return ClientScores(right)


def odd(tmp_path, row):
    settings = config(eval={"where": "clients", "split": "train"})
    job = dataclasses.replace(build(load(settings)), algorithm=Odd(row))
    seen = Recorder()
    result = run_job(job, tmp_path / "run", seen)
    return result, seen, rows_of(tmp_path / "run", "clients.jsonl"), job.task


@pytest.mark.parametrize("row", [(0.0, 1.0, 1.0), (math.nan, 1.0, 1.0), (-3.0, 1.0, 1.0), ()])
def test_scores_that_were_not_asked_for_are_refused(tmp_path, row):
    result, seen, lines, task = odd(tmp_path, row)
    assert result["status"] == "finished"
    assert [line["client"] for line in lines] == [4, 4]
    assert lines[0]["n"] == task.sizes[4]
    assert [line["scores"]["clients"]["count"] for line in seen.lines] == [1, 1]
    warned = [text for text in seen.warnings if "could not be scored" in text]
    assert len(warned) == 2
    assert all("and 3 more" in text for text in warned)
    assert result["final"]["accuracy"] == lines[-1]["accuracy"]
    for line in seen.lines:  # the training replies are all in
        assert (line["replied"], line["missing"]) == (NUM_CLIENTS, {})


@pytest.mark.parametrize("row", [(math.inf, 1.0, 1.0), (10.0, 1.0, 1e200)])
def test_scores_beyond_all_bounds_end_nothing(tmp_path, row):
    result, _, _, _ = odd(tmp_path, row)
    assert result["status"] == "finished"


@dataclass(frozen=True)
class Mute(FedAvg):
    """Clients that cannot be scored from round 2 on."""

    @on_client
    def evaluate_client(self, me, data, model: Weights | None) -> ClientScores:
        if data.round > 1:
            raise ZeroDivisionError("no scores")
        return super().evaluate_client(me, data, model)


def test_a_round_in_which_nobody_can_be_scored_goes_on(tmp_path):
    settings = config(eval={"where": "clients", "split": "train"}, rounds=3)
    seen = Recorder()
    job = dataclasses.replace(build(load(settings)), algorithm=Mute())
    result = run_job(job, tmp_path / "run", seen)
    assert [line["accuracy"] is None for line in seen.lines] == [False, True, True]
    assert sum("no client could be scored" in text for text in seen.warnings) == 2
    assert result["final"]["accuracy"] == seen.lines[0]["accuracy"]


# ---- reports for selectors
@dataclass(frozen=True)
class Fixed(Selector):
    """Two clients a round in a fixed order; notes what it is told."""

    told: list = field(default_factory=list)

    TURNS: ClassVar = ([0, 1], [1, 2], [3, 4])

    def select(self, state, candidates):
        self.told.append((candidates, dict(candidates.reports)))
        return self.TURNS[len(self.told) - 1]


@dataclass(frozen=True)
class Curious(Fixed):
    wants_reports: ClassVar[bool] = True


def chosen(tmp_path, selector, algorithm=None, name="run", **settings):
    whole = config(rounds=3, clients={"per_round": 2}, **settings)
    job = dataclasses.replace(build(load(whole)), selector=selector, algorithm=algorithm or FedAvg())
    return job, run_job(job, tmp_path / name)


def trained_plainly(task, state, number, client, epochs):
    """Parameters after plain training; n, sum of squared losses and mean loss of the first epoch."""
    x, y = task.rows(client)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    module.load_state_dict(state)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    order = Streams(SEED, number, client).generator("order")
    squares = total = 0.0
    for epoch in range(epochs):
        for rows in torch.randperm(len(y), generator=order).split(64):
            losses = cross_entropy(module(x[rows]), y[rows], reduction="none")
            if epoch == 0:
                squares += float(losses.detach().double().square().sum())
                total += float(losses.detach().double().sum())
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
    return module.state_dict(), (len(y), squares, total / len(y))


def test_a_selector_is_told_of_the_last_training_of_every_client(tmp_path):
    selector = Curious()
    job, _ = chosen(tmp_path, selector, local={"epochs": 2})
    task = job.task
    assert [sorted(reports) for _, reports in selector.told] == [[], [0, 1], [0, 1, 2]]
    for candidates, _ in selector.told:
        assert isinstance(candidates, Candidates)
        assert list(candidates.ids) == list(range(NUM_CLIENTS))
        assert list(candidates.sizes) == task.sizes
        assert candidates.count == 2
    x = dict(task.init_params().named())
    expected = {}
    for number, clients in ((1, (0, 1)), (2, (1, 2))):
        ends = {}
        for k in clients:
            ends[k], expected[k] = trained_plainly(task, x, number, k, epochs=2)
        weights = {k: task.sizes[k] / sum(task.sizes[c] for c in clients) for k in clients}
        x = {n: sum(weights[k] * ends[k][n] for k in clients) for n in x}
        reports = selector.told[number][1]
        for k, wanted in expected.items():
            got = reports[k]
            assert isinstance(got, ClientReport)
            assert (got.n, got.squares, got.loss) == pytest.approx(wanted, rel=1e-5)
            assert 0 < got.seconds < 60
            assert math.isnan(got.joules)
            assert abs(got.squares / got.n - got.loss**2) > 1e-3  # no square of a mean
    assert selector.told[1][1][1] != selector.told[2][1][1]  # client 1 has trained again
    assert selector.told[1][1][0][:4] == selector.told[2][1][0][:4]


def test_a_report_is_40_bytes_of_its_own_kind_and_changes_nothing(tmp_path):
    evaluation = {"where": "clients", "split": "train"}
    _, quiet = chosen(tmp_path, Fixed(), name="quiet", eval=evaluation)
    _, told = chosen(tmp_path, Curious(), name="told", eval=evaluation)
    messages = 3 * 2
    assert "report" not in quiet["bytes"]["by_kind"]
    assert told["bytes"]["by_kind"] == {
        **quiet["bytes"]["by_kind"],
        "report": {"down": 0, "up": 40 * messages},
    }
    assert told["bytes"]["by_kind"]["weights"] == {"down": messages * MLP_BYTES, "up": messages * MLP_BYTES}
    assert told["bytes"]["by_phase"]["evaluate"] == quiet["bytes"]["by_phase"]["evaluate"]
    assert told["bytes"]["by_phase"]["evaluate"]["up"] == 3 * NUM_CLIENTS * 24
    assert told["state_hash"] == quiet["state_hash"]
    rows = [r for r in rows_of(tmp_path / "told", "messages.jsonl") if r.get("kind") == "report"]
    assert {r["logical_bytes"] for r in rows if r["phase"] == "train"} == {40}


def test_a_selector_that_wants_none_is_told_nothing(tmp_path):
    selector = Fixed()
    chosen(tmp_path, selector)
    assert [reports for _, reports in selector.told] == [{}, {}, {}]


class Count(NamedTuple):
    count: Scalar


@dataclass(frozen=True)
class Idle(Algorithm):
    """A method that does not train; what the algorithm itself sees of reports."""

    seen: list = field(default_factory=list)

    def init_server(self, task):
        return State(x=task.init_params())

    def round(self, server, clients):
        got = clients.selected().call(self.tally)
        self.seen.append((got.reports, dict(got.count)))

    @on_client
    def tally(self, me, data) -> Count:
        return Count(7)


def test_a_method_that_does_not_train_reports_no_losses(tmp_path):
    algorithm, selector = Idle(), Curious()
    job, _ = chosen(tmp_path, selector, algorithm)
    for turn, (reports, counts) in zip(Fixed.TURNS, algorithm.seen, strict=True):
        assert sorted(reports) == turn
        assert counts == dict.fromkeys(turn, 7)
        for k, report in reports.items():
            assert report.n == job.task.sizes[k]
            assert math.isnan(report.squares)
            assert math.isnan(report.loss)


@dataclass(frozen=True)
class Half(FedAvg):
    """Trains with a loss of its own, half of cross-entropy."""

    @on_client
    def update(self, me, data, x: Weights) -> Kept:
        def loss(module, batch):
            return 0.5 * cross_entropy(module(batch.x), batch.y)

        return Kept(data.train(x, loss=loss).params, data.n)


def test_squares_are_of_the_cross_entropy_whatever_is_trained(tmp_path):
    """With a single batch all losses are taken at the model that was sent."""
    selector = Curious()
    job, _ = chosen(tmp_path, selector, Half(), local={"batch_size": 2000})
    for k in (0, 1):
        report = selector.told[1][1][k]
        images, labels = job.task.rows(k)
        losses = cross_entropy(ordinary(job.task.init_params())(images), labels, reduction="none")
        assert report.squares == pytest.approx(float(losses.detach().double().square().sum()), rel=1e-5)
        assert report.loss == pytest.approx(0.5 * float(losses.detach().mean()), rel=1e-5)
        assert report.n == len(labels)


# ---- rows: whose they are
@dataclass(frozen=True)
class Numbered:
    """A data set of this file whose samples tell their row: training rows 0.., test rows behind them."""

    train: int = 97
    test: int = 23
    first: int = 0
    channels: int = 1
    classes: int = 4

    def load(self) -> Dataset:
        def samples(start, n):
            rows = np.arange(start, start + n, dtype=np.float32)
            labels = np.random.default_rng(start).integers(self.classes, size=n)
            return np.tile(rows[:, None, None, None], (1, self.channels, 2, 2)), labels

        train, test = samples(self.first, self.train), samples(self.first + self.train, self.test)
        return Dataset(*train, *test, self.classes)


def numbered(num_clients=5, seed=SEED, fields=None, **task):
    """A task on numbered rows."""
    data = {"name": "tests.test_evaluate:Numbered", **(fields or {})}
    return {
        "seed": seed,
        "rounds": 2,
        "clients": {"num_clients": num_clients},
        "task": {"data": data, "model": {"name": "mlp", "hidden": [3]}, **task},
        "eval": {"every": 0},
    }


def rows_in(x):
    return [int(v) for v in x[:, 0, 0, 0]]


def parts_of(settings, split="train"):
    task = build(load(settings)).task
    return [rows_in(task.rows(k, split)[0]) for k in range(task.num_clients)]


def test_the_parts_of_a_client_are_disjoint_and_all_it_has():
    """n - floor(n f) or so: by the rounding of what is kept."""
    partition = {"name": "dirichlet", "alpha": 1.0}
    whole = parts_of(numbered(partition=partition))
    for rounding in ("floor", "ceil"):
        settings = numbered(partition=partition, split={"val": 0.1, "test": 0.25, "rounding": rounding})
        task = build(load(settings)).task
        for k, rows in enumerate(whole):
            n = len(rows)
            parts = {s: rows_in(task.rows(k, s)[0]) for s in ("train", "val", "test")}
            kept = [
                math.floor(n * f + 1e-9) if rounding == "floor" else n - math.floor(n * (1 - f)) for f in (0.1, 0.25)
            ]
            assert [len(parts["val"]), len(parts["test"])] == kept
            assert [task.count(k, s) for s in parts] == [len(p) for p in parts.values()]
            assert task.sizes[k] == len(parts["train"]) == n - sum(kept)
            assert sorted(parts["train"] + parts["val"] + parts["test"]) == rows
            for s, part in parts.items():
                labels = Numbered().load().train_y[part]
                assert task.rows(k, s)[1].tolist() == task.labels(k, s).tolist() == labels.tolist()
        assert task.num_train == sum(task.sizes)
        assert task.label_counts().sum() == task.num_train


@pytest.mark.parametrize("n", [*range(1, 41), 100, 1437])
def test_three_quarters_to_train_rounded_down(n):
    """The split of PFLlib and HtFLlib (Zhang et al., arXiv 2312.04992): n_train = floor(0.75 n)."""
    train, val, test = ClientSplit(test=0.25, rounding="ceil").sizes(n)
    assert (train, val, test) == (3 * n // 4, 0, n - 3 * n // 4)
    assert ClientSplit(test=0.25).sizes(n) == (n - n // 4, 0, n // 4)


def test_fractions_are_taken_exactly():
    for hundredths in range(1, 100):
        assert ClientSplit(test=hundredths / 100).sizes(100)[2] == hundredths
        assert ClientSplit(val=hundredths / 100, rounding="ceil").sizes(100)[1] == hundredths
    with pytest.raises(ValueError, match=r"leave nothing to train on"):
        ClientSplit(val=0.5, test=0.5)


def test_the_parts_are_drawn_by_the_partition_seed():
    split = {"test": 0.4}
    first = parts_of(numbered(split=split), "test")
    assert first == parts_of(numbered(split=split), "test")
    assert first == parts_of(numbered(seed=99, partition_seed=SEED, split=split), "test")
    assert first != parts_of(numbered(partition_seed=7, split=split), "test")
    whole = parts_of(numbered())
    places = [[w.index(r) for r in t] for w, t in zip(whole, first, strict=True)]
    assert all(p != list(range(len(p))) for p in places)  # not simply the first rows
    assert len(whole[0]) == len(whole[1])
    assert places[0] != places[1]  # each client draws for itself


def test_training_reads_the_training_part_only(tmp_path):
    """FedAvg of one client with a test part is FedAvg of a client that has only the rest."""
    settings = numbered(num_clients=1, split={"test": 0.3}, normalize={"mean": [48.0], "std": [30.0]})
    got = final_model(settings, tmp_path / "run")
    task = build(load(settings)).task
    x, y = task.rows(0)
    assert len(y) == 97 - 29
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4))
    module.load_state_dict(dict(task.init_params().named()))
    for number in (1, 2):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        order = Streams(SEED, number, 0).generator("order")
        for rows in torch.randperm(len(y), generator=order).split(32):
            optimizer.zero_grad()
            cross_entropy(module(x[rows]), y[rows]).backward()
            optimizer.step()
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6)


def test_images_are_in_0_to_1_or_brought_to_minus_1_to_1():
    """Everything that a model sees: a client's rows, the test set, the public rows."""
    seen = {}
    for normalize in ("unit", "symmetric"):
        task = build(load(config(task={"data": "digits", "public": {"n": 9}, "normalize": normalize}))).task
        seen[normalize] = [task.rows(1)[0], next(task.test_batches(50))[0], task.public()[0]]
    for unit, symmetric in zip(*seen.values(), strict=True):
        assert (float(unit.min()), float(unit.max())) == (0.0, 1.0)
        assert torch.equal(symmetric, 2 * unit - 1)


# ---- public rows
def public_of(settings):
    x, y = build(load(settings)).task.public()
    return rows_in(x), y.tolist()


def test_public_rows_are_nobodys():
    settings = numbered(public={"n": 20, "seed": 4})
    rows, labels = public_of(settings)
    assert len(set(rows)) == len(rows) == 20
    assert labels == Numbered().load().train_y[rows].tolist()
    parts = parts_of(settings)
    held = [row for part in parts for row in part]
    assert not set(rows) & set(held)
    assert sorted(rows + held) == list(range(97))
    assert build(load(settings)).task.num_test == 23
    assert rows != list(range(20))


def test_public_rows_follow_from_their_seed_alone():
    """So that both ends have the same without sending them, in every run."""
    rows, _ = public_of(numbered(public={"n": 20, "seed": 4}))
    assert rows == public_of(numbered(public={"n": 20, "seed": 4}))[0]
    assert rows == public_of(numbered(seed=77, num_clients=3, public={"n": 20, "seed": 4}))[0]
    assert rows != public_of(numbered(public={"n": 20, "seed": 5}))[0]
    assert public_of(numbered())[0] == []


@dataclass(frozen=True)
class Reads(Idle):
    @on_client
    def tally(self, me, data) -> Count:
        x, y = data.public
        return Count(float((x[:, 0, 0, 0] * (1 + y)).sum()))


def test_clients_see_the_public_rows_of_the_server(tmp_path):
    settings = numbered(public={"n": 20})
    algorithm = Reads()
    server = build(load(settings)).task
    job = dataclasses.replace(build(load(settings)), algorithm=algorithm)
    result = run_job(job, tmp_path / "run")
    x, y = server.public()
    expected = float((x[:, 0, 0, 0] * (1 + y)).sum())
    assert algorithm.seen[0][1] == dict.fromkeys(range(5), expected)
    assert result["bytes"]["logical"] == {"down": 0, "up": 2 * 5 * 8}


@pytest.mark.parametrize("merged", [False, True])
def test_more_public_rows_than_there_are_cannot_be_taken(merged):
    with pytest.raises(ValueError, match=r"task\.public\.n: 98 of 97 training rows cannot be taken; lower it"):
        build(load(numbered(public={"n": 98}, merged=merged)))
    with pytest.raises(ValueError, match=r"task\.public\.n: 48 of 47 rows that task\.subset\.train leaves out"):
        build(load(numbered(public={"n": 48}, subset={"train": 50}, merged=merged)))


def test_public_rows_of_another_data_set():
    other = {"name": "tests.test_evaluate:Numbered", "train": 40, "test": 3, "first": 1000}
    settings = numbered(public={"n": 30, "data": other}, normalize={"mean": [0.0], "std": [1.0]})
    rows, labels = public_of(settings)
    assert len(set(rows)) == 30
    assert all(1000 <= row < 1040 for row in rows)
    assert labels == Numbered(40, 3, 1000).load().train_y[[row - 1000 for row in rows]].tolist()
    assert sorted(row for part in parts_of(settings) for row in part) == list(range(97))
    with pytest.raises(ValueError, match=r"task\.public\.n: 41 of 40"):
        build(load(numbered(public={"n": 41, "data": other})))
    with pytest.raises(ValueError, match=r"task\.public\.data: .*channels must agree"):
        build(load(numbered(public={"n": 5, "data": {**other, "channels": 3}})))


# ---- merged, subset
def test_merged_rows_are_all_divided_and_none_is_global():
    settings = numbered(merged=True, split={"test": 0.25, "rounding": "ceil"})
    task = build(load(settings)).task
    assert task.num_test == 0
    assert list(task.test_batches(10)) == []
    held = []
    data = Numbered().load()
    labels = np.concatenate([data.train_y, data.test_y])
    for k in range(5):
        n = task.count(k) + task.count(k, "test")
        assert task.count(k) == 3 * n // 4
        for split in ("train", "test"):
            x, y = task.rows(k, split)
            rows = rows_in(x)
            assert y.tolist() == labels[rows].tolist()
            held += rows
    assert sorted(held) == list(range(120))


def test_merged_rows_are_scored_at_the_clients(tmp_path):
    task = {"merged": True, "split": {"test": 0.25}}
    result, lines, of_clients = run(tmp_path / "run", task=task, rounds=1)
    assert set(lines[0]["scores"]) == {"clients"}
    n = [
        build(load({**config(), "task": {**config()["task"], **task}})).task.count(k, "test")
        for k in range(NUM_CLIENTS)
    ]
    assert [line["n"] for line in of_clients] == n
    correct = sum(round(line["accuracy"] * line["n"]) for line in of_clients)
    assert result["final"]["accuracy"] == pytest.approx(correct / sum(n), abs=1e-12)  # correct over all


def test_public_rows_are_taken_before_merging():
    settings = numbered(merged=True, public={"n": 20}, split={"test": 0.25})
    rows, _ = public_of(settings)
    held = [r for split in ("train", "test") for part in parts_of(settings, split) for r in part]
    assert all(row < 97 for row in rows)
    assert sorted(rows + held) == list(range(120))


def test_a_subset_is_the_first_rows_or_drawn():
    def held(seed=SEED, **subset):
        task = build(load(numbered(partition_seed=seed, subset=subset))).task
        train = sorted(r for k in range(5) for r in rows_in(task.rows(k)[0]))
        return train, [r for x, _ in task.test_batches(7) for r in rows_in(x)]

    assert held() == (list(range(97)), list(range(97, 120)))
    assert held(train=30, test=8) == (list(range(30)), list(range(97, 105)))
    assert held(test=8) == (list(range(97)), list(range(97, 105)))
    train, test = held(train=30, test=8, choice="random")
    assert len(set(train)) == 30
    assert len(set(test)) == 8
    assert train != list(range(30))
    assert test != list(range(97, 105))
    assert max(train) < 97 <= min(test)
    assert (train, test) == held(train=30, test=8, choice="random")
    other = held(seed=SEED + 1, train=30, test=8, choice="random")
    assert train != other[0]
    assert test != other[1]
    for which, n in (("train", 98), ("test", 24)):
        with pytest.raises(ValueError, match=rf"task\.subset\.{which}: {n} rows of {n - 1} cannot be taken"):
            held(**{which: n})


# ---- what a user should know
def warned(settings, directory):
    seen = Recorder()
    run_job(build(load(settings)), directory, seen)
    return seen


def test_a_class_that_nobody_holds_is_noted(tmp_path):
    settings = numbered(num_clients=3, partition={"name": "classes", "per_client": 1})
    task = build(load(settings)).task
    assert not task.label_counts()[:, 3].any()
    assert any("nobody holds a sample of class 3" in note for note in task.notes)
    assert any("nobody holds a sample of class 3" in text for text in warned(settings, tmp_path / "run").warnings)
    unused = sum(Numbered().load().train_y == 3)
    assert any(note.startswith(f"{unused} of 97 training rows are nobody's") for note in task.notes)
    assert build(load(numbered())).task.notes == []


def test_a_client_without_samples_is_noted_and_never_called(tmp_path):
    partition = {"name": "tests.test_family:Sizes", "sizes": [40, 0, 57]}
    settings = numbered(num_clients=3, partition=partition)
    settings.update(rounds=6, clients={"num_clients": 3, "per_round": 2})
    settings["eval"] = {"where": "clients", "split": "global"}
    seen = warned(settings, tmp_path / "run")
    assert any(text.startswith("clients 1 hold no training samples") for text in seen.warnings)
    assert {row["client"] for row in rows_of(tmp_path / "run", "messages.jsonl")} == {0, 2}
    assert all((line["selected"], line["replied"]) == (2, 2) for line in seen.lines)
    assert {row["client"] for row in rows_of(tmp_path / "run", "clients.jsonl")} == {0, 2}


MODEL_FILE = """
from torch import nn

class Thing(nn.Sequential):
    def __init__(self, shape, classes):
        super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))

class Short(nn.Sequential):
    def __init__(self, shape, classes):
        super().__init__(nn.Flatten(), nn.Linear(64, classes - 1))

class Fits(nn.Sequential):
    def __init__(self, shape, classes):
        super().__init__(nn.Flatten(), nn.Linear(64, classes))
"""


@pytest.mark.parametrize("where", ["task", "clients"])
def test_a_model_that_does_not_fit_the_data_is_refused_before_any_round(tmp_path, where):
    (tmp_path / "mine.py").write_text(MODEL_FILE)

    def settings(name):
        model = f"{tmp_path}/mine.py:{name}"
        if where == "task":
            return config("fedavg", model=model, rounds=1)
        return config("local", rounds=1, clients={"models": [model]})

    key = r"task\.model" if where == "task" else r"clients\.models\.0"
    with pytest.raises(ConfigError, match=rf"{key}: .*Thing does not take samples of shape \(1, 8, 8\) .*channels"):
        fldist.run(settings("Thing"), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        ConfigError, match=rf"{key}: .*Short must give 10 outputs a sample, one a class; it gives \(9,\)"
    ):
        fldist.run(settings("Short"), output=tmp_path / "run")
    assert fldist.run(settings("Fits"), output=tmp_path / "run")["status"] == "finished"


def test_a_task_of_one_class_of_models_knows_whose_is_which():
    models = [{"name": "mlp", "hidden": [8]}, {"name": "mlp", "hidden": [4]}]
    task = build(load(config("local", clients={"models": models}))).task
    assert isinstance(task, Task)
    assert [task.architecture(k).name for k in range(4)] == ["mlp(hidden=[8])", "mlp(hidden=[4])"] * 2
    assert len(task.architectures) == 2  # the first is that of the section `task` as well
