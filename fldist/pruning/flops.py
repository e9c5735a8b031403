"""Arithmetic of a network: multiply-accumulates (MACs) of a forward pass by weight, and what training costs by them.

Counted are the products of linear layers, convolutions and recurrent layers, which are all but a few percent of the
work; not what has no weights (activations, pooling, normalisation, optimizer) and no look-ups (embeddings). How many
samples are trained for how many epochs, exploration included, is for the caller to count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fldist.params import Layout
from fldist.pruning.compact import Compaction

FLOPS_PER_MAC = 6
"""Of training: a multiplication and an addition, forward, for the inputs' gradients and for the weights'.

The usual count; it includes the gradient of the samples themselves, which nobody calculates."""


@dataclass(frozen=True)
class Macs:
    """The multiply-accumulates of a forward pass of one sample.

    uses: by name of a weight, how often each of its entries is multiplied: once in a linear layer, once for every
    pixel that a convolution makes (padding included, as dense kernels calculate), once for every step of a recurrent
    layer. uncounted: weights of other layers, whose products are missing here.
    """

    layout: Layout
    uses: Mapping[str, int]
    uncounted: tuple[str, ...]

    @classmethod
    def of(cls, module: nn.Module, sample_shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Macs:
        """Count a forward pass of one sample of this shape and dtype; made on the meta device, it calculates nothing.

        ValueError for a layer whose weight is no parameter of the module (parametrized ones), and for a module that
        cannot be run there, such as one that decides by the values of its input.
        """
        layout = Layout.of(module)
        names = {id(tensor): name for name, tensor in module.named_parameters()}
        uses: dict[str, int] = {}

        def count(layer: nn.Module, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
            def hook(_: nn.Module, args: tuple[Any, ...], result: Any) -> None:
                for attribute, times in _products(layer, args[0], result).items():
                    weight = names.get(id(getattr(layer, attribute)))
                    if weight is None:
                        raise ValueError(f"{name}: its {attribute} is no parameter of the model; it cannot be counted")
                    uses[weight] = uses.get(weight, 0) + times

            return hook

        meta = copy.deepcopy(module).to("meta").eval()
        originals = dict(module.named_modules())
        looked_up: set[str] = set()
        for name, layer in meta.named_modules():
            if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd | nn.RNNBase):
                layer.register_forward_hook(count(originals[name], name))
            elif isinstance(layer, nn.Embedding | nn.EmbeddingBag):
                looked_up.add(names[id(originals[name].weight)])
        try:
            with torch.no_grad():
                meta(torch.empty((1, *sample_shape), dtype=dtype, device="meta"))
        except Exception as error:  # a user's module may raise anything
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{type(module).__name__} cannot be followed: {reason}") from error
        silent = [s.name for s in layout.params if len(s.shape) > 1 and s.name not in uses and s.name not in looked_up]
        return cls(layout, uses, tuple(silent))

    @property
    def by_weight(self) -> dict[str, int]:
        """MACs of each weight, in the order of the parameters."""
        return {s.name: self.uses[s.name] * s.numel for s in self.layout.params if s.name in self.uses}

    @property
    def total(self) -> int:
        """MACs of one sample."""
        return sum(self.by_weight.values())

    def under(self, mask: Tensor) -> int:
        """MACs of one sample if what a mask [P] (bool) closes cost nothing: each weight's times its density."""
        if mask.shape != (self.layout.num_params,):
            raise ValueError(f"mask: shape {tuple(mask.shape)}, not [{self.layout.num_params}], the parameters")
        total = 0
        for slot in self.layout.params:
            if slot.name in self.uses:
                kept = int(torch.count_nonzero(mask[slot.offset : slot.offset + slot.numel]))
                total += self.uses[slot.name] * kept
        return total


def _products(layer: nn.Module, x: Tensor, result: Any) -> dict[str, int]:
    """How often each entry of each weight of a layer is multiplied in a call, by the weight's attribute."""
    if isinstance(layer, nn.RNNBase):
        steps = x.shape[1 if layer.batch_first else 0] if x.dim() == 3 else x.shape[0]
        return {name: steps for name, tensor in layer.named_parameters(recurse=False) if tensor.dim() > 1}
    if isinstance(layer, nn.Linear):
        return {"weight": result.numel() // layer.out_features}
    assert isinstance(layer, nn.modules.conv._ConvNd)
    if layer.transposed:
        return {"weight": x.numel() // layer.in_channels}
    return {"weight": result.numel() // layer.out_channels}


@dataclass(frozen=True)
class TrainingFlops:
    """Floating-point operations of training: 6 for each MAC of a forward pass, of one sample or of `times` many.

    dense: without a mask; theoretical: every weight's share times its density; realised: what dense kernels do, that
    is, those of the compacted network where there is one.
    """

    dense: int
    theoretical: int
    realised: int

    @classmethod
    def of(cls, macs: Macs, mask: Tensor | None = None, compacted: Macs | None = None) -> TrainingFlops:
        """Of one sample, under a mask [P] (None: dense), in a compacted network (None: in the whole one)."""
        counts = (macs.total, macs.total if mask is None else macs.under(mask), (compacted or macs).total)
        return cls(*(FLOPS_PER_MAC * count for count in counts))

    def times(self, samples: int, epochs: int = 1) -> TrainingFlops:
        """Of so many samples, each trained so many times."""
        count = samples * epochs
        return TrainingFlops(count * self.dense, count * self.theoretical, count * self.realised)

    def __add__(self, other: TrainingFlops) -> TrainingFlops:
        return TrainingFlops(
            self.dense + other.dense, self.theoretical + other.theoretical, self.realised + other.realised
        )


def training_flops(
    module: nn.Module,
    sample_shape: Sequence[int],
    mask: Tensor | None = None,
    compaction: Compaction | None = None,
    dtype: torch.dtype = torch.float32,
) -> TrainingFlops:
    """What training costs for one sample, under a mask [P] (None: dense), in a compacted network (None: in whole)."""
    small = None if compaction is None else Macs.of(compaction.module(), sample_shape, dtype)
    return TrainingFlops.of(Macs.of(module, sample_shape, dtype), mask, small)
