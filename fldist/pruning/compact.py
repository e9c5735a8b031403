"""The smaller network that is left when closed units are taken out, and the way of values there and back.

It computes what the masked network computes, in training too. What is masked is decided elsewhere (`structure.py`
for whole units); scattered zeros stay where they are.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fldist import blocks
from fldist.params import Layout, Params, Slot, Travel
from fldist.pruning.structure import Hidden, Structure

_TRAVELS: tuple[Travel, ...] = ("all", "floats", "params")


class Compaction:
    """A network without the hidden units of which a mask keeps nothing; made by `of`.

    survivors: by layer of `structure.hidden`, the numbers of the units that stay, int64, ascending; whole: the layout
    of the network as it was; layout: the smaller one's, in which the tensors have the same names and order.
    """

    def __init__(self, module: nn.Module, structure: Structure, survivors: tuple[Tensor, ...]) -> None:
        self.survivors = survivors
        self.whole = structure.layout
        self._template = module
        self._structure = structure
        rows: dict[str, Tensor] = {}  # tensor -> what stays of its first dimension
        columns: dict[str, Tensor] = {}  # tensor -> what stays of its second
        for group, units in zip(structure.hidden, survivors, strict=True):
            for name in _tensors_by_unit(group):
                rows[name] = units
            columns[group.outgoing.name] = units
        index: list[Tensor] = []
        shapes: dict[str, tuple[int, ...]] = {}
        for slot in self.whole.params + self.whole.buffers:
            positions = torch.arange(slot.offset, slot.offset + slot.numel).view(slot.shape)
            if slot.name in rows:
                positions = positions.index_select(0, rows[slot.name])
            if slot.name in columns:
                positions = _of_columns(positions, columns[slot.name], self._units_read_by(slot.name))
            shapes[slot.name] = tuple(positions.shape)
            index.append(positions.flatten())
        self.layout = _smaller(self.whole, shapes)
        # positions of the smaller float block's entries in the whole one, [P' + B'], by device
        self._index = {torch.device("cpu"): torch.cat(index)}

    @classmethod
    def of(cls, module: nn.Module, mask: Tensor, structure: Structure) -> Compaction:
        """Take out the units whose weights, bias, gamma, beta and outgoing weights are all masked.

        mask: [P] bool, True = kept, best closed by `close_dead_units`, so that no unit is half dead and stays;
        structure: of this module. A layer with no unit left keeps its first one, whose weights are all masked. The
        module is kept as a template. ValueError when mask, module and structure do not fit each other.
        """
        layout = structure.layout
        if Layout.of(module) != layout:
            raise ValueError("compaction: the structure is another module's; make it by Structure.of of this one")
        if mask.shape != (layout.num_params,) or mask.dtype != torch.bool:
            raise ValueError(
                f"compaction: a mask of shape {tuple(mask.shape)} and {mask.dtype}, not [{layout.num_params}] and "
                "torch.bool"
            )
        return cls(module, structure, tuple(_survivors(group, mask) for group in structure.hidden))

    @property
    def num_removed(self) -> int:
        """How many units are taken out."""
        return self._structure.num_units - sum(len(units) for units in self.survivors)

    def module(self) -> nn.Module:
        """A smaller module of its own, with the template's values in what stays."""
        module = copy.deepcopy(self._template)
        self.shrink(Params.of(module, self.whole)).bind(module)
        layers = dict(module.named_modules())
        for group, units in zip(self._structure.hidden, self.survivors, strict=True):
            _set_outputs(layers[group.layer], len(units))
            _set_inputs(layers[group.next_layer], len(units) * group.columns)
            for norm in group.norms:
                layers[norm.layer].num_features = len(units)
        return module

    def shrink(self, params: Params) -> Params:
        """A model of the whole network (or the part of it that travels), without the units taken out.

        Nothing is masked by it: entries outside the mask that stay keep their values.
        """
        small = self._part(params.layout, self.whole, self.layout)
        index = self._at(params.device)[: small.num_floats]
        floats = blocks.empty(small.num_floats, device=params.device)
        torch.index_select(params.floats, 0, index, out=floats)
        return Params(small, floats, params.ints.clone())

    def expand(self, small: Params, base: Params) -> Params:
        """A model of the smaller network in the place where it was taken from; all else as in `base`.

        base: of the whole network, the same part of it as `small`; its masked entries are usually zero. Integers are
        those of `small`.
        """
        part = self._part(small.layout, self.layout, self.whole)
        if base.layout != part:
            raise ValueError(f"expand: the base has {base.layout.num_floats} floats, not {part.num_floats}")
        floats = blocks.copy(base.floats)
        floats.index_copy_(0, self._at(base.device)[: small.layout.num_floats], small.floats)
        return Params(part, floats, small.ints.clone())

    def shrink_mask(self, mask: Tensor) -> Tensor:
        """What a mask [P], or any other value by parameter, says of the parameters that stay: [P']."""
        if mask.shape != (self.whole.num_params,):
            raise ValueError(f"mask: shape {tuple(mask.shape)}, not [{self.whole.num_params}], the parameters")
        return mask.index_select(0, self._at(mask.device)[: self.layout.num_params])

    def _at(self, device: torch.device) -> Tensor:
        """The index on a device, brought there once."""
        if device not in self._index:
            self._index[device] = self._index[torch.device("cpu")].to(device)
        return self._index[device]

    def _part(self, given: Layout, whole: Layout, other: Layout) -> Layout:
        """The part of `other` that corresponds to a part of `whole`; ValueError for another network's."""
        for travel in _TRAVELS:
            if given == whole.restricted(travel):
                return other.restricted(travel)
        raise ValueError(
            f"compaction: Params of {given.num_floats} floats are not of the network expected, which has "
            f"{whole.num_floats}"
        )

    def _units_read_by(self, name: str) -> int:
        return next(group.units for group in self._structure.hidden if group.outgoing.name == name)


def _survivors(group: Hidden, mask: Tensor) -> Tensor:
    """The units [units'] of which the mask keeps anything; the first one, if there is none."""
    units = group.kept(mask).nonzero().flatten().cpu()
    return units if len(units) else torch.zeros(1, dtype=torch.int64)


def _tensors_by_unit(group: Hidden) -> list[str]:
    """Parameters and buffers whose first dimension is the group's units."""
    names = [span.name for span in group.spans if span is not group.outgoing]
    for norm in group.norms:
        names += [f"{norm.layer}.running_mean", f"{norm.layer}.running_var"]
    return names


def _of_columns(positions: Tensor, units: Tensor, of: int) -> Tensor:
    """The columns that belong to these units, of a weight's positions [out, of * columns, ...]."""
    out, inputs, *kernel = positions.shape
    kept = positions.view(out, of, inputs // of, *kernel).index_select(1, units)
    return kept.view(out, len(units) * (inputs // of), *kernel)


def _smaller(whole: Layout, shapes: dict[str, tuple[int, ...]]) -> Layout:
    """The layout with the same tensors in other shapes."""
    made: list[Slot] = []
    offset = 0
    for slot in whole.params + whole.buffers:
        shape = shapes[slot.name]
        numel = torch.Size(shape).numel()
        made.append(Slot(slot.name, shape, offset, numel))
        offset += numel
    count = len(whole.params)
    return Layout(tuple(made[:count]), tuple(made[count:]), whole.integers)


def _set_outputs(layer: nn.Module, count: int) -> None:
    if isinstance(layer, nn.Linear):
        layer.out_features = count
    else:
        assert isinstance(layer, nn.modules.conv._ConvNd)
        layer.out_channels = count


def _set_inputs(layer: nn.Module, count: int) -> None:
    if isinstance(layer, nn.Linear):
        layer.in_features = count
    else:
        assert isinstance(layer, nn.modules.conv._ConvNd)
        layer.in_channels = count
