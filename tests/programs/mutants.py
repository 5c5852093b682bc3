"""What makes something else of a random attention: of its scores, weights, product or operands."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.programs.masks import positions

NO_ATTENTION = (
    "softmax over queries",
    "cumulative scores",
    "heads mixed",
    "sorted",
    "rolled scores",
    "top keys",
    "two softmaxes",
    "squared weights",
    "thresholded weights",
    "weights transposed",
    "weights rolled",
    "weights flipped",
    "mean of heads",
    "a key left out",
    "running weights",
)
# What is no attention after a softmax, and may be one without.
OF_ELEMENTS = ("squared weights", "thresholded weights", "two softmaxes", "weights transposed")
MORE_THAN_ATTENTION = (
    "renormalised weights",
    "weights returned",
    "scores returned",
    "weights multiplied",
    "weights masked",
    "weights detached",
    "scores detached",
    "V written after the softmax",
    "K written after the scores",
    "first score written",
    "second product",
    "dropout of nothing",
    "row mean off",
    "first key's score off",
    "first query's scores off",
    "queries rolled",
    "heads of weights flipped",
    "batches of weights flipped",
    "weights of one head for all",
)


def other_scores(s: Tensor, mutant: str) -> Tensor:
    if mutant == "cumulative scores":
        return s.clamp(min=-50).cumsum(-1)
    if mutant == "sorted":
        return s.sort(-1).values
    if mutant == "heads mixed":
        return s + s.clamp(min=-50).mean(-3, keepdim=True)
    if mutant == "rolled scores":
        return s.roll(1, -1)
    if mutant == "top keys":
        return s.masked_fill(s < s.topk(min(3, s.shape[-1]), -1).values[..., -1:], -1e4)
    if mutant == "scores detached":
        return s.detach()
    if mutant == "row mean off":
        return s - s.clamp(min=-50).mean(-1, keepdim=True)
    if mutant == "first key's score off":
        return s - s[..., :1].clamp(min=-50)
    if mutant == "first query's scores off":
        return s - s[..., :1, :].clamp(min=-50)
    if mutant == "queries rolled":
        return s.roll(1, -2)
    if mutant == "first score written":
        s = s * 1
        s[..., 0] = 0.5
    return s


def other_weights(p: Tensor, mutant: str) -> Tensor:
    if mutant == "two softmaxes":
        return p.nan_to_num().softmax(-1)
    if mutant == "squared weights":
        return p * p
    if mutant == "renormalised weights":
        p = p * (positions(p)[1] % 3 + 1).to(p.dtype)
        return p / p.sum(-1, keepdim=True)
    if mutant == "thresholded weights":
        return torch.relu(p - 0.05)
    if mutant == "weights rolled":
        return p.roll(1, -1)
    if mutant == "weights flipped":
        return p.flip(-1)
    if mutant == "running weights":
        return p.cumsum(-1)
    if mutant == "heads of weights flipped":
        return p.flip(-3)
    if mutant == "batches of weights flipped":
        return p.flip(0)
    if mutant == "weights of one head for all":
        return p[..., :1, :, :].expand_as(p)
    if mutant == "weights multiplied":
        return p * (positions(p)[1] % 3).to(p.dtype)
    if mutant == "weights masked":
        return p.masked_fill(positions(p)[1] % 2 == 1, 0.0)
    if mutant == "weights detached":
        return p.detach()
    if mutant == "dropout of nothing":
        return torch.nn.functional.dropout(p, 0.0, training=True)
    return p
