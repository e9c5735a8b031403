"""What Flower's clients do in the comparison.

It is a module of its own because Ray pickles a ClientApp that the main script defines by value: what such a script
keeps between messages, data above all, is lost with every message. What is imported stays in the actor's process.
"""

from __future__ import annotations

import functools

import workload
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

training = ClientApp()
exchange = ClientApp()


@functools.cache
def model() -> nn.Sequential:
    """This process's model, which every client's values are loaded into."""
    return workload.lenet5()


@training.train()
def train(message: Message, context: Context) -> Message:
    """Local SGD from the model that was sent."""
    model().load_state_dict(message.content["arrays"].to_torch_state_dict())
    steps = workload.train(model(), int(context.node_config["partition-id"]), message.content["config"]["epochs"])
    metrics = MetricRecord({"num-examples": workload.SAMPLES, "steps": steps})
    return Message(RecordDict({"arrays": ArrayRecord(model().state_dict()), "metrics": metrics}), reply_to=message)


@exchange.train()
def add(message: Message, context: Context) -> Message:
    """Add 1 to what was sent."""
    (values,) = message.content["arrays"].to_numpy_ndarrays()
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": ArrayRecord([values + 1]), "metrics": metrics}), reply_to=message)
