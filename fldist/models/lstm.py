"""Recurrent networks on sequences of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from fldist.models.layers import Init, initialised

Width = Annotated[int, Field(ge=1)]


class NextChar(nn.Module):
    """Embedding, LSTM layers, and a linear layer on the last one's output at the last position."""

    def __init__(self, symbols: int, embedding: int, hidden: int, layers: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.linear = nn.Linear(hidden, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Integers [B, length] in 0..symbols-1 -> logits [B, classes]."""
        outputs, _ = self.lstm(self.embedding(tokens))  # [B, length, hidden]
        logits: Tensor = self.linear(outputs[:, -1])
        return logits


@dataclass(frozen=True)
class NextCharLstm:
    """The next character of a text: embedding of 8, two LSTM layers of 256, linear to the classes.

    819,920 parameters with 80 symbols. symbols: how many the embedding knows (default: as many as there are classes,
    since what comes next is one of them). init: of the linear layer; embedding and LSTM keep PyTorch's values, as in
    the code of AutoFLIP (Interno et al., arXiv 2405.10271), `NextCharLSTM`. The sizes are those of LEAF's Shakespeare
    task (Caldas et al., arXiv 1812.01097).
    """

    embedding: Width = 8
    hidden: Width = 256
    layers: Width = 2
    symbols: Width | None = None
    init: Init = "default"

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """shape: one sample's shape, [length]; ValueError for any other."""
        if len(shape) != 1:
            raise ValueError(
                f"task.model: next_char_lstm needs sequences of tokens [length]; the data's shape is {tuple(shape)}; "
                "choose another model: mlp, or cnn for images"
            )
        symbols = classes if self.symbols is None else self.symbols
        return initialised(NextChar(symbols, self.embedding, self.hidden, self.layers, classes), self.init)
