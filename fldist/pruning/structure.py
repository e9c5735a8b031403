"""Which units a network has, which weights come into and go out of each, and what a mask does to whole units.

A unit is a row of a linear layer or a filter of a convolution whose output goes to exactly one next linear layer or
convolution, by way of activations, pooling, dropout, BatchNorm and a flatten only. Units are found by following one
forward pass; where the way cannot be followed there are no units, and `Structure.unanalysed` says why. Removing
units physically is `compact.py`; masks of single weights are none of this file's business.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fldist.params import Layout, Slot
from fldist.pruning import masks


@dataclass(frozen=True)
class Span:
    """One tensor of the flat block of parameters, cut by units: [before, units, after] from `offset` on."""

    name: str
    offset: int
    before: int
    units: int
    after: int

    def of(self, flat: Tensor) -> Tensor:
        """The tensor's part of a flat block [P], as a view [before, units, after]."""
        end = self.offset + self.before * self.units * self.after
        return flat[self.offset : end].view(self.before, self.units, self.after)


@dataclass(frozen=True)
class ChannelNorm:
    """A BatchNorm between two layers: its gamma and beta, [1, units, 1] each, where it has them."""

    layer: str
    weight: Span | None
    bias: Span | None

    @property
    def spans(self) -> tuple[Span, ...]:
        """Gamma and beta, as far as they exist."""
        return tuple(span for span in (self.weight, self.bias) if span is not None)


@dataclass(frozen=True)
class Hidden:
    """The hidden units between two layers.

    layer: the module that makes them; next_layer: the one that reads them. weight: [1, units, fan-in]; bias:
    [1, units, 1] or None; outgoing: the next layer's weight, [its outputs, units, columns times kernel size]. columns:
    how many inputs of the next layer a unit is: H W of a linear layer behind a flatten, else 1. norms: BatchNorms on
    the way, in order; functions: everything else on the way. zero: whether the functions behind the last BatchNorm
    (all functions, without one) map 0 to 0.
    """

    layer: str
    next_layer: str
    weight: Span
    bias: Span | None
    norms: tuple[ChannelNorm, ...]
    functions: tuple[str, ...]
    zero: bool
    outgoing: Span
    columns: int

    @property
    def units(self) -> int:
        """How many there are."""
        return self.weight.units

    @property
    def incoming(self) -> tuple[Span, ...]:
        """Weight and bias of the layer that makes them."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def spans(self) -> tuple[Span, ...]:
        """Every tensor that belongs to the units: incoming, BatchNorm's, outgoing."""
        return (*self.incoming, *(span for norm in self.norms for span in norm.spans), self.outgoing)

    def kept(self, mask: Tensor) -> Tensor:
        """The units [units] of which a mask [P] keeps anything."""
        return _any(self.spans, mask)

    def silent(self, mask: Tensor) -> Tensor:
        """The units [units] whose output is 0 whatever the input, in training and evaluation, by mask [P] alone.

        Without BatchNorm: all incoming weights and the bias are masked and the activation keeps 0. Behind a BatchNorm
        such a unit is beta - gamma mean / std, which is not 0: there its gamma and beta must be masked (then the
        incoming weights do not matter).
        """
        if not self.zero:
            return torch.zeros(self.units, dtype=torch.bool, device=mask.device)
        if not self.norms:
            return ~_any(self.incoming, mask)
        last = self.norms[-1]
        if last.weight is None:
            return torch.zeros(self.units, dtype=torch.bool, device=mask.device)
        return ~_any(last.spans, mask)


@dataclass(frozen=True)
class Structure:
    """The hidden units of a network, layer by layer in the order of execution, and what was not analysed, and why.

    Positions are those of `layout.params`: flat indices over all parameters in the order of `named_parameters()`.
    """

    layout: Layout
    hidden: tuple[Hidden, ...]
    unanalysed: tuple[str, ...]

    @property
    def num_units(self) -> int:
        """Hidden units of all layers."""
        return sum(group.units for group in self.hidden)

    @classmethod
    def of(cls, module: nn.Module, sample_shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Structure:
        """Find a module's units by following a forward pass of two samples [2, *sample_shape] of this dtype.

        The pass is made on a copy on the meta device, so nothing is calculated and nothing drawn; once in training and
        once in evaluation mode, and what is not the same in both is not analysed. The module is left as it is. What
        it reads of its hidden layers in other ways (forward hooks, attributes it sets) is not seen.
        """
        layout = Layout.of(module)
        found: list[tuple[Hidden, ...]] = []
        for training in (False, True):
            try:
                steps = _follow(module, torch.empty((2, *sample_shape), dtype=dtype, device="meta"), training)
            except Exception as error:  # a user's module may raise anything
                mode = "training" if training else "evaluation"
                reason = str(error).partition("\n")[0]
                return cls(layout, (), (f"{type(module).__name__} cannot be followed in {mode} mode: {reason}",))
            hidden, reasons = _Reader(module, layout, steps).read()
            found.append(hidden)
        both = tuple(group for group in found[0] if group in found[1])
        others = [f"{g.layer}: its output takes another way in training" for g in found[0] if g not in found[1]]
        return cls(layout, both, (*reasons, *others))

    def without(self, names: Collection[str]) -> Structure:
        """The structure in which no unit owns a part of these tensors: those that are to be kept dense.

        ValueError for a name that is no parameter.
        """
        known = {slot.name for slot in self.layout.params}
        for name in names:
            if name not in known:
                raise ValueError(f"exclude: the model has no parameter {name!r}; it has {', '.join(sorted(known))}")
        kept: list[Hidden] = []
        reasons = list(self.unanalysed)
        for group in self.hidden:
            closed = [span.name for span in group.spans if span.name in names]
            if closed:
                reasons.append(f"{group.layer}: {', '.join(closed)} is kept dense")
            else:
                kept.append(group)
        return Structure(self.layout, tuple(kept), tuple(reasons))


# ---- masks and whole units
def close_dead_units(mask: Tensor, structure: Structure) -> Tensor:
    """Mask also what a mask [P] (bool, True = kept) has made useless; the function computed stays the same.

    A unit that is silent (see `Hidden.silent`) has its outgoing weights masked; a unit whose outgoing weights are all
    masked has its incoming weights, bias, gamma and beta masked; until nothing changes. Running statistics of a
    BatchNorm are no parameters and stay. Returns a new mask, a subset of the one given.
    """
    closed = _checked(mask, structure).clone()
    changed = True
    while changed:
        changed = False
        for group in structure.hidden:
            changed |= _close(closed, (group.outgoing,), group.silent(closed))
        for group in reversed(structure.hidden):
            unread = ~_any((group.outgoing,), closed)
            changed |= _close(closed, group.spans[:-1], unread)
    return closed


def unit_scores(guidance: Tensor, structure: Structure) -> list[Tensor]:
    """Each hidden unit's score, [units] float64 for every layer of `structure.hidden`.

    It is the mean of the guidance [P] over the unit's incoming weights and bias. ValueError where one is not finite.
    """
    _check_length("guidance", guidance, structure)
    scores = []
    for group in structure.hidden:
        parts = [span.of(guidance).sum(dim=(0, 2), dtype=torch.float64) for span in group.incoming]
        score = torch.stack(parts).sum(dim=0) / sum(span.before * span.after for span in group.incoming)
        if not bool(score.isfinite().all()):
            raise ValueError(f"guidance: the scores of {group.layer} are not all finite; there is no order to prune by")
        scores.append(score)
    return scores


def prune_units(mask: Tensor, guidance: Tensor, structure: Structure, quantile: float) -> Tensor:
    """Mask whole hidden units whose score is at most the `quantile` of all hidden units' scores.

    mask: [P] bool, True = kept; guidance: [P]; quantile: T_s in [0, 1), interpolated linearly over the scores of all
    layers together; 0 prunes nothing. A pruned unit's incoming weights, bias, gamma, beta and outgoing weights are
    masked. Units of the output layer are never pruned, as they are not hidden. ValueError when a layer would lose all
    its units, and when there is no unit to prune. Returns a new mask, a subset of the one given.
    """
    if not 0.0 <= quantile < 1.0:
        raise ValueError(f"unit quantile: {quantile} is not in [0, 1); 0 prunes no unit")
    pruned = _checked(mask, structure).clone()
    if quantile == 0.0:
        return pruned
    if not structure.hidden:
        why = "; ".join(structure.unanalysed) or "it has no hidden layer"
        raise ValueError(f"unit quantile: {quantile} cannot be: the model has no units to prune ({why}); set it to 0")
    scores = unit_scores(guidance, structure)
    threshold = masks.quantile(torch.cat(scores), quantile)
    lost = [score <= threshold for score in scores]
    for group, units in zip(structure.hidden, lost, strict=True):
        if bool(units.all()):
            raise ValueError(
                f"unit quantile: {quantile} would prune all {group.units} units of {group.layer}; lower it"
            )
    for group, units in zip(structure.hidden, lost, strict=True):
        _close(pruned, group.spans, units)
    return pruned


def _any(spans: Collection[Span], mask: Tensor) -> Tensor:
    """The units [units] of which any entry of these tensors is kept."""
    kept = [span.of(mask).any(dim=2).any(dim=0) for span in spans]
    return torch.stack(kept).any(dim=0)


def _close(mask: Tensor, spans: Collection[Span], units: Tensor) -> bool:
    """Mask these units' [units] entries of tensors in place; whether any was kept."""
    rows = units.nonzero().flatten()
    if not len(rows):
        return False
    changed = False
    for span in spans:
        view = span.of(mask)
        if bool(view.index_select(1, rows).any()):
            view.index_fill_(1, rows, False)
            changed = True
    return changed


def _checked(mask: Tensor, structure: Structure) -> Tensor:
    _check_length("mask", mask, structure)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: {mask.dtype} instead of torch.bool; True is kept")
    return mask


def _check_length(what: str, flat: Tensor, structure: Structure) -> None:
    expected = structure.layout.num_params
    if flat.shape != (expected,):
        raise ValueError(f"{what}: shape {tuple(flat.shape)}, not [{expected}], the parameters")


# ---- following a forward pass
@dataclass
class _Step:
    """One call of the forward pass: of a module of torch.nn without children, or of a function outside of such.

    inputs: the steps whose tensors it reads (0 is the sample); others: whether it reads further tensors; shapes of
    its first input and of its output, None where that is not one tensor; zero: whether it maps 0 to 0, None where
    that is not asked of it.
    """

    name: str
    module: nn.Module | None
    inputs: list[int]
    others: bool
    reads: tuple[int, ...] | None
    shape: tuple[int, ...] | None
    weights: list[str]
    zero: bool | None = None


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # the alpha kinds do not keep 0
_ELEMENTWISE = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
)
_POOLS = {
    **{nn.MaxPool1d: 1, nn.AvgPool1d: 1, nn.AdaptiveMaxPool1d: 1, nn.AdaptiveAvgPool1d: 1},
    **{nn.MaxPool2d: 2, nn.AvgPool2d: 2, nn.AdaptiveMaxPool2d: 2, nn.AdaptiveAvgPool2d: 2},
    **{nn.MaxPool3d: 3, nn.AvgPool3d: 3, nn.AdaptiveMaxPool3d: 3, nn.AdaptiveAvgPool3d: 3},
}
_ELEMENTWISE_FUNCTIONS = frozenset(
    ["relu", "relu_", "leaky_relu", "elu", "gelu", "silu", "tanh", "tanh_", "sigmoid", "sigmoid_"]
)
_DROPOUT_FUNCTIONS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d"})
_POOL_FUNCTIONS = {
    f"{name}{d}d": d for name in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool") for d in (1, 2, 3)
}


class _Recorder(TorchFunctionMode):
    """Writes down the steps of a forward pass, and which tensors of earlier steps each reads."""

    def __init__(self, module: nn.Module, sample: Tensor) -> None:
        super().__init__()
        self.steps = [_Step("the sample", None, [], False, None, tuple(sample.shape), [])]
        self._made: dict[int, int] = {id(sample): 0}  # step that made a tensor, by the tensor's identity
        self._alive: list[Tensor] = [sample]  # so that no identity comes twice
        self._depth = 0
        self._weights = {id(tensor): name for name, tensor in module.named_parameters(remove_duplicate=False)}
        for name, layer in module.named_modules():
            if next(layer.children(), None) is None and type(layer).__module__.startswith("torch.nn."):
                layer.register_forward_pre_hook(self._enter)
                layer.register_forward_hook(self._leave(name), with_kwargs=True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((args, kwargs)))
        shape = tuple(inputs[0].shape) if inputs and not self._depth else None
        result = func(*args, **kwargs)
        if self._depth or not inputs:
            return result
        name = str(getattr(func, "__name__", func))
        step = self._note(name, None, inputs, shape, result)
        if name in _ELEMENTWISE_FUNCTIONS and not step.others and len(step.inputs) == 1:
            at_zero = [torch.zeros(1) if isinstance(value, Tensor) else value for value in args]
            named = {key: torch.zeros(1) if isinstance(value, Tensor) else value for key, value in kwargs.items()}
            step.zero = bool((func(*at_zero, **named) == 0.0).all())
        return result

    def _enter(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._depth += 1

    def _leave(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def leave(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            inputs = list(_tensors((args, kwargs)))
            self._note(name, layer, inputs, tuple(inputs[0].shape) if inputs else None, result)
            self._depth -= 1

        return leave

    def _note(
        self, name: str, module: nn.Module | None, inputs: list[Tensor], reads: tuple[int, ...] | None, result: Any
    ) -> _Step:
        known = [self._made[id(tensor)] for tensor in inputs if id(tensor) in self._made]
        weights = [self._weights[id(tensor)] for tensor in inputs if id(tensor) in self._weights]
        shape = tuple(result.shape) if isinstance(result, Tensor) else None
        step = _Step(name, module, known, len(known) < len(inputs), reads, shape, weights)
        self.steps.append(step)
        for tensor in _tensors(result):
            self._made[id(tensor)] = len(self.steps) - 1  # in place: the same tensor, of a new step
            self._alive.append(tensor)
        return step

    def end(self, result: Any) -> None:
        """The last step: what the module returned is read."""
        self._note("the output", None, list(_tensors(result)), None, None)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _follow(module: nn.Module, sample: Tensor, training: bool) -> list[_Step]:
    """The steps of a forward pass on the meta device; the last one is the output."""
    meta = copy.deepcopy(module).to("meta").train(training)
    recorder = _Recorder(meta, sample)
    with torch.no_grad(), recorder:
        result = meta(sample)
    recorder.end(result)
    return recorder.steps


class _Reader:
    """Finds hidden units in the steps of a forward pass."""

    def __init__(self, module: nn.Module, layout: Layout, steps: list[_Step]) -> None:
        self._slots = {slot.name: slot for slot in layout.params}
        self._steps = steps
        self._modules = dict(module.named_modules())
        self._users: dict[int, list[int]] = {number: [] for number in range(len(steps))}
        for number, step in enumerate(steps):
            for source in step.inputs:
                self._users[source].append(number)
        self._elsewhere = {name for step in steps for name in step.weights}
        names: dict[int, int] = {}
        for _, tensor in module.named_parameters(remove_duplicate=False):
            names[id(tensor)] = names.get(id(tensor), 0) + 1
        self._shared = {name for name, tensor in module.named_parameters() if names[id(tensor)] > 1}

    def read(self) -> tuple[tuple[Hidden, ...], tuple[str, ...]]:
        """Hidden units in the order of execution, and a reason for every other layer that has weights."""
        hidden: list[Hidden] = []
        reasons: dict[str, str] = {}
        outputs: set[str] = set()
        for number, step in enumerate(self._steps):
            if step.module is None or type(step.module) not in (nn.Linear, *_CONVOLUTIONS):
                continue
            found = self._layer_problem(step) or self._behind(number)
            if isinstance(found, Hidden):
                hidden.append(found)
            elif found == "the output":
                outputs.add(step.name)
            else:
                reasons[step.name] = found
        done = {group.layer for group in hidden} | outputs
        told = []
        for name, layer in self._modules.items():
            if name in reasons:
                told.append(f"{name}: {reasons[name]}")
            elif name not in done and any(tensor.dim() > 1 for tensor in layer.parameters(recurse=False)):
                told.append(f"{name or 'the module'}: {type(layer).__name__} is not analysed")
        return tuple(hidden), tuple(told)

    def _layer_problem(self, step: _Step) -> str | None:
        """Why a linear layer or convolution can neither make nor read hidden units, if so."""
        layer = self._modules[step.name]
        assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if sum(other.name == step.name and other.module is not None for other in self._steps) > 1:
            return "it is called more than once"
        names = [_full(step.name, name) for name, _ in layer.named_parameters(recurse=False)]
        if any(name in self._elsewhere or name in self._shared or name not in self._slots for name in names):
            return "its weights are used elsewhere too"
        if _full(step.name, "weight") not in names:
            return "its weight is calculated from something else"
        if _hooked(layer):
            return "it has forward hooks"
        if len(step.inputs) != 1 or step.others or step.reads is None:
            return "it does not read one tensor"
        if not isinstance(layer, nn.Linear) and layer.groups > 1:
            return f"its channels are in {layer.groups} groups"
        dims = 2 if isinstance(layer, nn.Linear) else 2 + len(layer.kernel_size)
        if len(step.reads) != dims:
            return f"it reads {len(step.reads)} dimensions instead of {dims}"
        return None

    def _behind(self, number: int) -> Hidden | str:
        """The units that a layer makes, or why it has none: `the output` when it is the output layer."""
        start = self._steps[number]
        assert start.shape is not None
        units = start.shape[1]
        shape = start.shape  # of the tensor on its way
        norms: list[ChannelNorm] = []
        functions: list[str] = []
        zero = True
        while True:
            users = self._users[number]
            if len(users) != 1:
                several = ", ".join(self._steps[user].name for user in users)
                return f"its output goes to {len(users)} places ({several})" if users else "its output is not used"
            number = users[0]
            step = self._steps[number]
            if step.name == "the output":
                return "the output"
            if len(step.inputs) != 1 or step.others:
                return f"its output goes into {step.name} together with something else"
            module, layer = step.module, self._modules.get(step.name)
            if module is not None and type(module) in (nn.Linear, *_CONVOLUTIONS):
                problem = self._layer_problem(step)
                if problem:
                    return f"its output goes to {step.name}, which cannot lose inputs: {problem}"
                return self._hidden(start, step, units, norms, functions, zero)
            if layer is not None and module is not None and _hooked(layer):
                return f"its output goes through {step.name}, which has forward hooks"
            if step.shape is None:
                return f"its output goes through {step.name}, which gives more than a tensor"
            kept = self._keeps_zero(step, units, shape)
            if kept is None:
                what = step.name if module is None else f"{step.name} ({type(module).__name__})"
                return f"its output goes through {what}, which is not analysed"
            if module is not None and type(module) in _NORMS:
                norms.append(self._norm(step.name, units))
                zero = True
            else:
                functions.append(step.name if module is None else type(module).__name__)
                zero = zero and kept
            shape = step.shape

    def _keeps_zero(self, step: _Step, units: int, shape: tuple[int, ...]) -> bool | None:
        """Whether a step maps a unit that is 0 to 0; None when it may mix units. shape: of what it reads."""
        module, name = step.module, step.name
        if module is None:
            if step.zero is not None:
                return step.zero
            if name in _DROPOUT_FUNCTIONS:
                return True
            pooled = _POOL_FUNCTIONS.get(name)
            flattens = name == "flatten"
        else:
            kind = type(module)
            if kind in _ELEMENTWISE:
                return bool((module(torch.zeros(1)) == 0.0).all())
            if kind in _DROPOUTS:
                return True
            if isinstance(module, _NORMS):
                fits = kind in _NORMS and module.num_features == units == shape[1]
                return True if fits and self._free(name) else None
            pooled = _POOLS.get(kind)
            flattens = kind is nn.Flatten
        if pooled is not None:
            return True if len(shape) == pooled + 2 and shape[1] == units else None
        if flattens:
            return True if step.shape == (shape[0], math.prod(shape[1:])) else None
        return None

    def _free(self, name: str) -> bool:
        """Whether a normalisation is used once and has its tensors to itself."""
        own = [_full(name, tensor) for tensor, _ in self._modules[name].named_parameters(recurse=False)]
        once = sum(step.name == name and step.module is not None for step in self._steps) == 1
        return once and not any(tensor in self._elsewhere or tensor in self._shared for tensor in own)

    def _norm(self, name: str, units: int) -> ChannelNorm:
        return ChannelNorm(name, self._rows(name, "weight", units), self._rows(name, "bias", units))

    def _rows(self, layer: str, tensor: str, units: int) -> Span | None:
        """A tensor of a layer with one row for each unit, if the layer has it."""
        slot = self._slots.get(_full(layer, tensor))
        return None if slot is None else _span(slot, 1, units)

    def _hidden(
        self, start: _Step, end: _Step, units: int, norms: list[ChannelNorm], functions: list[str], zero: bool
    ) -> Hidden:
        weight = self._rows(start.name, "weight", units)
        assert weight is not None
        read = self._slots[_full(end.name, "weight")]
        return Hidden(
            layer=start.name,
            next_layer=end.name,
            weight=weight,
            bias=self._rows(start.name, "bias", units),
            norms=tuple(norms),
            functions=tuple(functions),
            zero=zero,
            outgoing=_span(read, read.shape[0], units),
            columns=read.shape[1] // units,
        )


def _full(layer: str, tensor: str) -> str:
    return f"{layer}.{tensor}" if layer else tensor


def _span(slot: Slot, before: int, units: int) -> Span:
    assert slot.numel % (before * units) == 0, f"{slot.name} cannot be cut into {units} units"
    return Span(slot.name, slot.offset, before, units, slot.numel // (before * units))


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)
