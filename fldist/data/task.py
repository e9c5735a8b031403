"""The task: data, partition and models, the same at every rank because all of it follows from the configuration."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fldist.data.augment import add_noise
from fldist.data.datasets import Dataset
from fldist.data.partition import Noise, Rows, rows_by_owner
from fldist.data.prepare import ClientSplit, Preparation, Public, Subset
from fldist.models.evaluate import Evaluation, Scores, evaluate
from fldist.models.layers import adapted, feature_dim, features_and_logits
from fldist.models.train import LocalTraining, Network, has_batch_norm
from fldist.params import Layout, Params, Travel
from fldist.pruning.compact import Compaction
from fldist.pruning.flops import Macs
from fldist.pruning.structure import Structure
from fldist.seeding import forked, generator, numpy_generator

CPU = torch.device("cpu")
Build = Callable[[tuple[int, ...], int], nn.Module]
Split = Literal["train", "val", "test"]
Readout = Callable[[nn.Module], nn.Module]


class Partition(Protocol):
    """A way to split rows; see `partition.py`. One with `noise_of(client, num_clients)` also blurs the features; one
    whose `by` is "owner" is given the owner of each row instead of its label."""

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """Labels [n] -> K arrays of row numbers."""


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model's structure: a module that stands for it, its layout, its initial values, whether it has BatchNorm.

    device: where its modules calculate; template and initial values lie on the CPU whatever it is.
    Nobody calculates with `template`; who needs a module borrows one, so that a training, an evaluation in the
    midst of it and another network of the same architecture never meet on one.
    """

    name: str
    template: nn.Module
    layout: Layout
    initial: Params
    batch_norm: bool
    device: torch.device = CPU
    _free: list[nn.Module] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, module: nn.Module, device: torch.device = CPU) -> Architecture:
        """That of a module, which is its template and has its initial values."""
        layout = Layout.of(module)
        return cls(name, module, layout, Params.of(module, layout), has_batch_norm(module), device)

    def copy(self) -> nn.Module:
        """A module of its own, on the device."""
        return copy.deepcopy(self.template).to(self.device)

    @contextlib.contextmanager
    def module(self) -> Iterator[nn.Module]:
        """A module of this architecture for the time of a `with`; its values are whatever they are."""
        module = self._free.pop() if self._free else self.copy()
        try:
            yield module
        finally:
            self._free.append(module)


@dataclass(frozen=True, eq=False)
class Compacted:
    """The network that is left under a mask, keep [P], and the way of values there and back."""

    keep: Tensor
    compaction: Compaction
    architecture: Architecture


class Task:
    """What is learnt, by how many clients, on which rows.

    Rows are numbered over the training samples and, behind them, the test samples of the data set. seed: the run's
    seed (initial weights); partition_seed: that of the subset, the partition and the clients' splits;
    travel: which part of a model's state is exchanged (`all`, `floats`, `params`; what does not travel keeps its
    initial value); merged: training and test samples are divided among the clients together, and there is no
    global test set; client_models: name and builder of the clients' models, client i has number i mod their count
    (none: everyone has the task's); feature_dim: how many features the classifier of every model takes, behind an
    adapter (None: as the model has it); num_outputs: of every model (None: one a class). Builders are always asked for
    models of as many outputs as there are classes; where features or outputs are to be others, the classifier is
    replaced (`layers.adapted`). own_init: every client's initial model is drawn on its own; device: where samples are
    given out and networks calculate. All that is drawn at random is drawn on the CPU, initial models lie there.

    Where clients are owners of rows (partition `natural`) and the data say whose each test row is, a client's test part
    is its owner's test rows, and the global test set those of all clients.
    """

    def __init__(
        self,
        *,
        dataset: Dataset,
        partition: Partition,
        num_clients: int,
        build: Build,
        local: LocalTraining,
        seed: int,
        partition_seed: int,
        travel: Travel = "all",
        subset: Subset | None = None,
        merged: bool = False,
        split: ClientSplit | None = None,
        preparation: Preparation | None = None,
        evaluation: Evaluation | None = None,
        public: Public | None = None,
        public_dataset: Dataset | None = None,
        client_models: Sequence[tuple[str, Build]] = (),
        feature_dim: int | None = None,
        num_outputs: int | None = None,
        own_init: bool = False,
        model_name: str = "model",
        device: torch.device = CPU,
    ) -> None:
        self.dataset = dataset
        self.device = device
        self.num_clients = num_clients
        self.local = local
        self.evaluation = evaluation or Evaluation()
        self.preparation = preparation or Preparation()
        self.split = split or ClientSplit()
        self.seed = seed
        self.travel: Travel = travel
        if dataset.kind == "tokens":
            self.preparation.refuse_tokens()
        self.shape = self.preparation.shape(dataset.shape)
        self.notes: list[str] = list(dataset.notes)
        scale = self.preparation.scale(dataset)
        self._scale = (scale[0].to(device), scale[1].to(device)) if scale is not None else None
        self._divide(partition, partition_seed, subset or Subset(), merged, public or Public(), public_dataset)
        self.num_outputs = self.num_classes if num_outputs is None else num_outputs
        self._feature_dim = feature_dim
        self.architectures: list[Architecture] = []
        self._builds = [(model_name, build)]
        for name, other in client_models:
            if name not in [n for n, _ in self._builds]:
                self._builds.append((name, other))
        for index in range(len(self._builds)):
            self.architectures.append(self._architecture(index))
        names = [a.name for a in self.architectures]
        self._cycle = [names.index(name) for name, _ in client_models] or [0]
        self.own_init = own_init
        self._structures: dict[Architecture, Structure] = {}
        self._compacted: dict[Architecture, Compacted] = {}
        self._macs: dict[Architecture, Macs] = {}
        self._try_out()

    def _try_out(self) -> None:
        """Refuse at the start what every client would stumble over, and say what is left unused."""
        blank = torch.zeros(1, *self.shape)
        augment = self.preparation.augment
        if augment.active:
            augment(blank, torch.Generator())
        for noise in (self._noise or [])[-1:]:
            try:
                add_noise(blank, noise.std, noise.cell, torch.Generator())
            except ValueError as error:
                raise ValueError(f"task.partition: feature_noise does not fit these samples: {error}") from None
        norm = any(a.batch_norm for a in self.architectures)
        if norm and self.local.batch_size == 1:
            raise ValueError("local.batch_size: BatchNorm cannot train on batches of 1; raise it, or use norm: group")
        alone = [client for client, n in enumerate(self.sizes) if n == 1]
        if norm and alone:
            shown = ", ".join(map(str, alone[:20])) + (" ..." if len(alone) > 20 else "")
            self.notes.append(f"clients with one sample, on which BatchNorm cannot train, send what they got: {shown}")
        if self.local.optimizer == "adam" and self.local.momentum:
            self.notes.append(f"local.momentum: {self.local.momentum} is not used by adam")

    # ---- rows
    def _divide(
        self,
        partition: Partition,
        partition_seed: int,
        subset: Subset,
        merged: bool,
        public: Public,
        public_dataset: Dataset | None,
    ) -> None:
        """Decide which row is whose: public, each client's, of the global test set."""
        data = self.dataset
        rng = numpy_generator(partition_seed, "subset")
        pool = subset.rows("train", len(data.train_y), rng)
        test = subset.rows("test", len(data.test_y), rng) + len(data.train_y)
        self._labels = np.concatenate([data.train_y, data.test_y])
        self._public_from = public_dataset
        left_out = np.delete(np.arange(len(data.train_y)), pool)
        beside = public_dataset is None and subset.train is not None  # then clients have the same with and without them
        source = len(public_dataset.train_y) if public_dataset is not None else len(left_out if beside else pool)
        if public.n > source:
            whose = "rows that task.subset.train leaves out" if beside else "training rows"
            raise ValueError(f"task.public.n: {public.n} of {source} {whose} cannot be taken; lower it")
        drawn = np.sort(numpy_generator(public.seed, "public").permutation(source)[: public.n])
        if beside:
            self._public_rows = left_out[drawn]
        elif public_dataset is None:
            self._public_rows, pool = pool[drawn], np.delete(pool, drawn)
            if not len(pool):
                raise ValueError(f"task.public.n: {public.n} public rows leave none to train on; lower it")
        else:
            if public_dataset.kind != data.kind:
                raise ValueError(
                    f"task.public.data: its samples are {public_dataset.kind}, the task's {data.kind}; "
                    "choose a data set of the same kind"
                )
            shape = self.preparation.shape(public_dataset.shape)
            if shape != self.shape:
                raise ValueError(
                    f"task.public.data: its samples have shape {shape}, the task's {self.shape}; channels must agree, "
                    "and task.resize makes sizes agree"
                )
            self._public_rows = drawn
        self._test_rows = test[:0] if merged else test
        if merged:
            pool = np.concatenate([pool, test])
        owner = self._owners(merged) if getattr(partition, "by", "label") == "owner" else None
        key = self._labels if owner is None else owner
        split = partition.split(key[pool], self.num_clients, numpy_generator(partition_seed, "partition"))
        whole = [pool[rows] for rows in split]
        self._splits = [
            self.split.of(rows, numpy_generator(partition_seed, "split", client)) for client, rows in enumerate(whole)
        ]
        self.client_names: tuple[str, ...] = ()
        self._own_test = owner is not None and data.test_owner is not None and not merged
        if owner is not None:
            chosen = owner[[rows[0] for rows in whole]]
            self.client_names = tuple(data.owners[o] if data.owners else str(o) for o in chosen)
            if self._own_test:
                self._give_test_rows(owner, chosen)
        self.parts = [parts["train"] for parts in self._splits]
        self.sizes = [len(rows) for rows in self.parts]
        self.num_train = sum(self.sizes)
        noise_of = getattr(partition, "noise_of", None)
        self._noise: list[Noise] | None = None
        if noise_of is not None:
            if data.kind == "tokens":
                raise ValueError(
                    "task.partition: feature_noise adds noise to values, and the samples are tokens; use iid, which "
                    "divides the rows alike"
                )
            self._noise = [noise_of(client, self.num_clients) for client in range(self.num_clients)]
        self._note_unused(pool, whole)

    def _owners(self, merged: bool) -> Rows:
        """The owner of each row, -1 where a test row has none."""
        data = self.dataset
        if data.train_owner is None:
            raise ValueError(
                "task.partition: natural makes owners of rows clients, and these data do not say whose a row is; use "
                "another partition, such as dirichlet, or data with owners, such as roles or leaf"
            )
        if data.test_owner is None:
            if merged:
                raise ValueError(
                    "task.merged: these data do not say whose a test row is, as natural must know; remove it"
                )
            return np.concatenate([data.train_owner, np.full(len(data.test_y), -1)])
        return np.concatenate([data.train_owner, data.test_owner])

    def _give_test_rows(self, owner: Rows, chosen: Rows) -> None:
        """Make the test rows of each client's owner its test part, and those of all of them the global test set."""
        if self.split.test:
            raise ValueError(
                f"task.split.test: {self.split.test}, but under natural the clients have test rows of their own in "
                "these data; remove it"
            )
        own = [self._test_rows[rows] for rows in rows_by_owner(owner[self._test_rows], chosen)]
        for parts, rows in zip(self._splits, own, strict=True):
            parts["test"] = rows
        self._test_rows = np.sort(np.concatenate(own))
        if not len(self._test_rows):
            raise ValueError(
                f"task.subset.test: none of the test rows taken is of one of the {len(own)} clients; raise it, or use "
                "task.subset.choice=random"
            )

    def _note_unused(self, pool: Rows, whole: list[Rows]) -> None:
        """Say which classes nobody holds, and how many rows lie idle."""
        held = np.unique(self._labels[np.concatenate(whole)])
        absent = np.setdiff1d(np.unique(self._labels[pool]), held).tolist()
        if absent:
            shown = ", ".join(map(str, absent[:20])) + (" ..." if len(absent) > 20 else "")
            self.notes.append(f"nobody holds a sample of class {shown}: the partition left them out")
        unused = len(pool) - sum(len(rows) for rows in whole)
        if unused:
            self.notes.append(f"{unused} of {len(pool)} training rows are nobody's under this partition")

    def _raw(self, rows: Rows) -> NDArray[np.generic]:
        """Stored values of rows, as a fresh array."""
        data = self.dataset
        first = len(data.train_y)
        late = rows >= first
        if not late.any():
            return np.asarray(data.train_x[rows])
        if late.all():
            return np.asarray(data.test_x[rows - first])
        both = np.empty((len(rows), *data.shape), dtype=data.train_x.dtype)
        both[~late] = data.train_x[rows[~late]]
        both[late] = data.test_x[rows[late] - first]
        return both

    def normal(self, x: Tensor) -> Tensor:
        """Normalise values of 0..1 as `task.normalize` says."""
        if self._scale is None:
            return x
        mean, std = self._scale
        return (x - mean) / std

    def unit(self, x: Tensor) -> Tensor:
        """Values of 0..1 of those that `normal` gave, on the CPU."""
        if self._scale is None:
            return x.cpu()
        mean, std = (t.cpu() for t in self._scale)
        return x.cpu() * std + mean

    def unit_rows(self, client: int, split: Split = "train") -> tuple[Tensor, Tensor]:
        """A client's samples x [n, ...] in 0..1 (or tokens) and labels y [n], before augmentation and normalisation."""
        return self._given_out(self._splits[client][split])

    def _given_out(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Samples in 0..1 (or tokens) and labels of rows, on the task's device."""
        x, y = self.preparation.read(self._raw(rows), self.dataset.kind), torch.from_numpy(self._labels[rows])
        return x.to(self.device), y.to(self.device)

    def rows(self, client: int, split: Split = "train") -> tuple[Tensor, Tensor]:
        """A client's samples x [n, ...] and labels y [n] as its model sees them, in fresh tensors.

        Under feature noise every client and split has one draw of it here; training draws anew at every batch.
        """
        x, y = self.unit_rows(client, split)
        noise = self.noise_of(client)
        if noise is not None:
            x = add_noise(x, noise.std, noise.cell, generator(self.seed, f"noise-{split}", client))
        return self.normal(x), y

    def labels(self, client: int, split: Split = "train") -> Tensor:
        """A client's labels [n], without reading its samples."""
        return torch.from_numpy(self._labels[self._splits[client][split]])

    def pooled(self) -> tuple[Tensor, Tensor]:
        """All clients' training samples in 0..1 and their labels, in the order of the data set, without noise."""
        return self._given_out(np.sort(np.concatenate(self.parts)))

    def noise_of(self, client: int) -> Noise | None:
        """The noise on a client's features, if the partition has any."""
        if self._noise is None or self._noise[client].std == 0.0:
            return None
        return self._noise[client]

    def count(self, client: int, split: Split = "train") -> int:
        """How many samples a client's split has."""
        return len(self._splits[client][split])

    def has_part(self, split: Split) -> bool:
        """Whether clients have such a part: one that `task.split` asks for, or test rows that came with their owner."""
        return split == "train" or bool(getattr(self.split, split)) or (split == "test" and self._own_test)

    def label_counts(self) -> NDArray[np.int64]:
        """Training samples by client and class, [K, C]."""
        counts = np.zeros((self.num_clients, self.num_classes), dtype=np.int64)
        for client, rows in enumerate(self.parts):
            counts[client] = np.bincount(self._labels[rows], minlength=self.num_classes)
        return counts

    def public(self) -> tuple[Tensor, Tensor]:
        """The public samples x [n, ...] and labels y [n], equal at server and clients; they never travel."""
        rows = self._public_rows
        if self._public_from is None:
            x, y = self._given_out(rows)
            return self.normal(x), y
        other = self._public_from
        x = self.preparation.read(np.asarray(other.train_x[rows]), other.kind).to(self.device)
        return self.normal(x), torch.from_numpy(np.asarray(other.train_y[rows])).to(self.device)

    @property
    def num_test(self) -> int:
        """Samples of the global test set; 0 when it was merged with the training set."""
        return len(self._test_rows)

    def num_scored(self, client: int, split: Split | Literal["global"]) -> int:
        """How many samples a client scores a model on."""
        if split != "global":
            return self.count(client, split)
        return self.num_test * (self.num_clients if self._noise is not None else 1)

    def test_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The global test set in batches; under feature noise, one noisy copy of it for every client."""
        copies: list[Noise | None] = list(self._noise) if self._noise is not None else [None]
        for number, noise in enumerate(copies):
            rng = generator(self.seed, "noise-global", number)
            for start, stop in spans(self.num_test, size):
                rows = self._test_rows[start:stop]
                x, y = self._given_out(rows)
                if noise is not None:
                    x = add_noise(x, noise.std, noise.cell, rng)
                yield self.normal(x), y

    def blank(self, n: int) -> Tensor:
        """n samples of zeros, of the shape and type that a model takes, on the task's device."""
        return torch.zeros(n, *self.shape, dtype=sample_type(self.dataset), device=self.device)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.dataset.classes

    @functools.cached_property
    def feature_dim(self) -> int:
        """K, how many features the classifiers of all clients' models take; ValueError where they differ in it."""
        widths = {made.name: feature_dim(made.template) for made in self.client_architectures}
        if len(set(widths.values())) > 1:
            told = ", ".join(f"{width} ({name})" for name, width in widths.items())
            raise ValueError(f"task.feature_dim: the clients' models have features of several sizes, {told}; set it")
        return next(iter(widths.values()))

    # ---- models
    def _architecture(self, index: int) -> Architecture:
        with forked(self.seed, "init", *([index] if index else [])):
            module = self._module(index)
        return Architecture.of(self._builds[index][0], module, self.device)

    def _module(self, index: int) -> nn.Module:
        """A model of an architecture, its initial values drawn from the global generator."""
        name, build = self._builds[index]
        module = build(self.shape, self.num_classes)
        if self._feature_dim is None and self.num_outputs == self.num_classes:
            return module
        key = "task.model" if self._feature_dim is None else "task.feature_dim"
        try:
            module = adapted(module, self._feature_dim, self.num_outputs).eval()
            with torch.no_grad():
                features, outputs = features_and_logits(module, self.blank(2).cpu())
        except Exception as error:  # of a model of the user's own, whatever it does
            why = str(error).partition("\n")[0].removeprefix("task.model: ")
            raise ValueError(f"{key}: the classifier of {name} cannot be replaced: {why}") from None
        if features.shape != (2, feature_dim(module)) or outputs.shape != (2, self.num_outputs):
            raise ValueError(
                f"{key}: the classifier of {name} cannot be replaced: the model goes on behind its last linear layer, "
                "or gives it more than one row of features a sample; it must end in a linear classifier (nn.Linear)"
            )
        return module.train()

    def architecture(self, client: int | Architecture | None = None) -> Architecture:
        """A client's architecture, or the server's; one that is given itself is given back."""
        if isinstance(client, Architecture):
            return client
        return self.architectures[0 if client is None else self._cycle[client % len(self._cycle)]]

    @property
    def client_architectures(self) -> list[Architecture]:
        """The clients' architectures, in the order of the first client of each."""
        return list(dict.fromkeys(self.architecture(client) for client in range(self.num_clients)))

    @property
    def layout(self) -> Layout:
        """The layout of the server's model."""
        return self.architectures[0].layout

    def layout_of(self, client: int) -> Layout:
        """The layout of a client's model."""
        return self.architecture(client).layout

    def init_params(self, client: int | None = None, *, whole: bool = False) -> Params:
        """The initial model, the same wherever it is asked for, on the CPU: the part that travels, or the whole.

        client: of this client's architecture; with `own_init`, drawn for it alone.
        """
        made = self.architecture(client)
        travel: Travel = "all" if whole else self.travel
        if client is None or not self.own_init:
            return made.initial.restricted(travel).clone()
        with forked(self.seed, "own-init", client):
            return Params.of(self._module(self.architectures.index(made)), made.layout).restricted(travel)

    def full(self, part: Params, client: int | Architecture | None = None) -> Params:
        """Fresh blocks of the whole model, on the task's device: `part`, and initial values where it has none."""
        made = self.architecture(client)
        if part.layout == made.layout:
            return part.clone() if part.device == self.device else part.to(self.device)
        full = made.initial.clone() if self.device == CPU else made.initial.to(self.device)
        full.write(part)
        return full

    def structure(self, client: int | None = None) -> Structure:
        """The hidden units of a client's model (None: of the server's)."""
        made = self.architecture(client)
        if made not in self._structures:
            self._structures[made] = Structure.of(made.template, self.shape, sample_type(self.dataset))
        return self._structures[made]

    def macs(self, keep: Tensor | None = None) -> Macs:
        """The multiply-accumulates of the server's model; of the compacted one, where a mask bool [P] is given."""
        made = self.architecture() if keep is None else self.compacted(keep).architecture
        if made not in self._macs:
            while len(self._macs) > 1:  # a compacted one goes with its mask
                self._macs.popitem()
            self._macs[made] = Macs.of(made.template, self.shape, sample_type(self.dataset))
        return self._macs[made]

    def compacted(self, keep: Tensor, client: int | None = None) -> Compacted:
        """A client's model without the hidden units of which a mask bool [P] keeps nothing; the latest is kept."""
        made = self.architecture(client)
        keep = keep.cpu()
        known = self._compacted.get(made)
        if known is None or not torch.equal(known.keep, keep):
            compaction = Compaction.of(made.template, keep, self.structure(client))
            small, initial = compaction.module(), compaction.shrink(made.initial)
            known = Compacted(
                keep, compaction, Architecture(made.name, small, initial.layout, initial, made.batch_norm, made.device)
            )
            self._compacted[made] = known
        return known

    @contextlib.contextmanager
    def network(
        self,
        params: Params,
        client: int | Architecture | None = None,
        frozen: Sequence[str] = (),
        batch_norm: Literal["batch", "running"] = "batch",
    ) -> Iterator[Network]:
        """A network with these values (what does not travel: initial ones) to train for the time of a `with`.

        `network.params` are fresh blocks, and stay valid afterwards. Several may be open at once.
        """
        with self.architecture(client).module() as module:
            network = Network(module, self.full(params, client), frozen, batch_norm)
            try:
                yield network
            finally:
                network.release()

    def frozen_copy(self, model: Params, client: int | Architecture | None = None) -> nn.Module:
        """A module of its own with these values, in eval mode, that takes no gradients."""
        module = self.architecture(client).copy()
        self.full(model, client).bind(module)
        return module.eval().requires_grad_(False)

    # ---- evaluation
    def evaluate(self, model: Params) -> Scores:
        """Score a model of the server's architecture on the global test set."""
        return self._score(model, None, self.test_batches(self.evaluation.batch_size))

    def evaluate_client(
        self,
        model: Params,
        client: int,
        split: Split | Literal["global"],
        architecture: Architecture | None = None,
        readout: Readout | None = None,
    ) -> Scores:
        """Score a client's model on one of its splits, or on the global test set.

        architecture: instead of its own; readout: makes of the model's module the one whose outputs are scored.
        """
        size = self.evaluation.batch_size
        of = architecture or client
        if split == "global":
            return self._score(model, of, self.test_batches(size), readout)
        x, y = self.rows(client, split)
        # clones: a slice's address could change the bits of a matrix product
        batches = ((x[start:stop].clone(), y[start:stop]) for start, stop in spans(len(y), size))
        return self._score(model, of, batches, readout)

    def _score(
        self,
        model: Params,
        client: int | Architecture | None,
        batches: Iterator[tuple[Tensor, Tensor]],
        readout: Readout | None = None,
    ) -> Scores:
        with self.architecture(client).module() as module:
            self.full(model, client).bind(module)
            return evaluate(module if readout is None else readout(module), batches, self.evaluation)


def sample_type(dataset: Dataset) -> torch.dtype:
    """The type of what a model takes: int64 tokens, or float32."""
    return torch.int64 if dataset.kind == "tokens" else torch.float32


def spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of consecutive batches; a last batch of one joins the one before, for BatchNorm's sake."""
    start = 0
    while start < total:
        stop = total if total - start <= size + 1 else start + size
        yield start, stop
        start = stop
