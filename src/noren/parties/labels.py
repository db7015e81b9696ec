"""The labels of a classification run, set in the client's config before its head is built."""

from __future__ import annotations

from noren.errors import ConfigError
from noren.partition.blocks import HEADS
from noren.partition.stage import Slice


def set_labels(part: Slice, labels: list[str], pad_id: int | None) -> None:
    """Make the classifier that is about to be built one of `labels`; `pad_id` pads where the model names no token.

    Raises ConfigError if the classifier is another party's, or in the checkpoint already, with another number of them.
    """
    config, count = part.config, int(part.config.num_labels)
    there = any(name.split(".")[0] in HEADS[part.task] for name in part.tensors)
    if count != len(labels) and (there or not part.plan.u_shaped):
        whose = "the model's classifier" if there else f"the classifier at {part.plan.spans[-1].party!r}"
        raise ConfigError(
            f"the data has {len(labels)} labels ({', '.join(labels[:8])}), {whose} has {count}; use data with "
            "the model's labels, or a U-shaped plan and a model without a classifier"
        )
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    if config.pad_token_id is None:
        config.pad_token_id = pad_id
