"""Reasoning models small enough to enumerate: every trace and every answer has a probability that can be written down.

A policy maps its parameters, one flat float64 vector, to the logits of each decision: at the nodes of a tree of traces, and
of the answer after each trace. From these come exact log-probabilities (:class:`LogProbs`) and their Jacobians. Two
policies: :class:`Tabular`, softmax over a table, with a smoothness constant that can be proven, and :class:`Transformer`, a
one-layer attention model that shares its parameters between prompts, traces and answers. Nothing is sampled here.

Shapes: X prompts, R traces (number 0 is the empty one), Y answers, N nodes of the trace tree, C choices at a node, D most
steps of a trace, P parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

F64 = torch.float64
EMPTY = 0
"""The number of the empty trace."""
EVERY = slice(None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TraceTree:
    """Traces as paths: step d of trace r makes choice ``choices[r, d]`` at node ``nodes[r, d]``, where ``on_path[r, d]``.

    ``lengths`` [R] counts scored tokens, the closing marker included.
    """

    nodes: Tensor
    choices: Tensor
    on_path: Tensor
    lengths: Tensor
    num_nodes: int
    num_choices: int

    @property
    def num_traces(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogProbs:
    """log pi of every choice [X, N, C], of every trace [X, R], and of every answer after its trace [X, R, Y]."""

    steps: Tensor
    traces: Tensor
    answers: Tensor

    @property
    def joint(self) -> Tensor:
        """log pi(r, y | x): [X, R, Y]."""
        return self.traces[:, :, None] + self.answers

    @property
    def marginal(self) -> Tensor:
        """log pi(y | x) = log sum_r pi(r, y | x): [X, Y]; what the ideal loss compares."""
        return self.joint.logsumexp(1)


class Policy(Protocol):
    """What the laboratory needs of a model."""

    @property
    def tree(self) -> TraceTree: ...
    @property
    def answer_lengths(self) -> Tensor: ...
    @property
    def num_prompts(self) -> int: ...
    @property
    def num_params(self) -> int: ...

    def initial(self, generator: torch.Generator) -> Tensor:
        """Random parameters [P]."""
        ...

    def logits(self, theta: Tensor, prompts: slice = EVERY) -> tuple[Tensor, Tensor]:
        """Of the choices [X, N, C] and of the answers [X, R, Y], of these prompts."""
        ...

    def jacobian(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the log-probs of choices [X, N, C, P] and of answers given their trace [X, R, Y, P]."""
        ...


def log_probs(tree: TraceTree, choice_logits: Tensor, answer_logits: Tensor) -> LogProbs:
    """Exact log-probabilities from logits; differentiable."""
    steps = choice_logits.log_softmax(-1)
    return LogProbs(steps=steps, traces=sum_over_path(tree, steps), answers=answer_logits.log_softmax(-1))


def sum_over_path(tree: TraceTree, values: Tensor) -> Tensor:
    """[X, N, C, ...] per choice -> [X, R, ...] summed over each trace's steps."""
    taken = values[:, tree.nodes, tree.choices]  # [X, R, D, ...]
    shape = (1, *tree.on_path.shape, *([1] * (taken.ndim - 3)))
    # where, not a product: a choice off the path may be impossible (-inf)
    return torch.where(tree.on_path.reshape(shape), taken, torch.zeros((), dtype=values.dtype)).sum(2)


def autograd_jacobian(policy: Policy, theta: Tensor) -> tuple[Tensor, Tensor]:
    """:meth:`Policy.jacobian` of any policy, one prompt after the other (the backward passes of a prompt at once)."""
    theta = theta.detach().requires_grad_()
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    for prompt in range(policy.num_prompts):
        parts = [part[0].log_softmax(-1) for part in policy.logits(theta, slice(prompt, prompt + 1))]
        flat = torch.cat([part.flatten() for part in parts])
        (jacobian,) = torch.autograd.grad(flat, theta, torch.eye(len(flat), dtype=F64), is_grads_batched=True)
        split = jacobian.split([part.numel() for part in parts])
        for kept, part, block in zip(rows, parts, split, strict=True):
            kept.append(block.reshape(*part.shape, -1).detach())
    return torch.stack(rows[0]), torch.stack(rows[1])


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Tabular:
    """Softmax over a table: logit of (r, y) after x is  t[x, r, y] + share * s[x, y].

    ``s`` is what an answer's probability has in common over traces; without it the empty trace would teach the others
    nothing. One node, whose choices are the traces. Lengths are made up: they only matter to losses that read them.
    """

    num_prompts: int
    num_traces: int
    num_answers: int
    share: float = 0.5
    tree: TraceTree = field(init=False)
    answer_lengths: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tree", _flat_tree(self.num_traces))
        object.__setattr__(self, "answer_lengths", 2 + 3 * torch.arange(self.num_answers) % 7)

    @property
    def num_params(self) -> int:
        return self.num_prompts * self._block

    @property
    def _block(self) -> int:
        return (self.num_traces + 1) * self.num_answers

    def initial(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.num_params, generator=generator, dtype=F64)

    def smoothness(self, beta: float) -> float:
        """L of the marginal DPO loss, over all parameters: its gradient is Lipschitz with this constant.

        With m = log pi(y_w | x) - log pi(y_l | x): the normaliser cancels, grad m is a difference of two distributions on
        disjoint columns of t, and share * (e_w - e_l) on s, so |grad m|^2 <= 2 (1 + share^2). The Hessian of m is the
        difference of two covariances of one-hot vectors on disjoint columns; it vanishes on s, and a one-hot covariance
        has norm <= 1/2. The loss has slope <= beta and curvature <= beta^2 / 4 in m, and prompts have parameters of their
        own, each with weight 1 / X.
        """
        return (beta**2 / 4 * 2 * (1 + self.share**2) + beta / 2) / self.num_prompts

    def _table(self, theta: Tensor) -> Tensor:
        blocks = theta.view(self.num_prompts, self.num_traces + 1, self.num_answers)
        return blocks[:, :-1] + self.share * blocks[:, -1:]

    def logits(self, theta: Tensor, prompts: slice = EVERY) -> tuple[Tensor, Tensor]:
        table = self._table(theta)[prompts]
        return table.logsumexp(-1)[:, None], table

    def jacobian(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """In closed form: :func:`autograd_jacobian` is the same, and slower."""
        table = self._table(theta)
        x, r, y = table.shape
        answers = table.softmax(-1)
        joint = table.flatten(1).softmax(-1)
        # d log pi(y | r) = e_ry - pi(. | r) in row r; d log pi(r) = pi(. | r) in row r, minus the whole table's joint
        row = torch.eye(r, dtype=F64)
        d_answers = torch.einsum("rk,yj->ryjk", row, torch.eye(y, dtype=F64)).transpose(-1, -2)[None]
        d_answers = d_answers - torch.einsum("rk,xrj->xrkj", row, answers)[:, :, None]
        d_traces = torch.einsum("rk,xrj->xrkj", row, answers) - joint.view(x, 1, r, y)
        return self._to_params(d_traces)[:, None], self._to_params(d_answers)

    def _to_params(self, d_table: Tensor) -> Tensor:
        """[X, ..., R, Y] derivatives by the own prompt's table -> [X, ..., P]."""
        shared = self.share * d_table.sum(-2, keepdim=True)
        own = torch.cat([d_table, shared], dim=-2).flatten(-2)  # [X, ..., block]
        out = own.new_zeros(*own.shape[:-1], self.num_prompts, self._block)
        for prompt in range(self.num_prompts):
            out[prompt, ..., prompt, :] = own[prompt]
        return out.flatten(-2)


def _flat_tree(num_traces: int) -> TraceTree:
    """One decision: which trace."""
    return TraceTree(
        nodes=torch.zeros(num_traces, 1, dtype=torch.long),
        choices=torch.arange(num_traces)[:, None],
        on_path=torch.ones(num_traces, 1, dtype=torch.bool),
        lengths=1 + 7 * torch.arange(num_traces) % 29,  # the empty trace is its closing marker
        num_nodes=1,
        num_choices=num_traces,
    )


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Transformer:
    """One layer of softmax attention and a feed-forward layer over the tokens  prompt, trace symbols, closing marker.

    Traces are all strings of at most ``depth`` symbols; after ``depth`` the marker is certain. The answer is one token.
    ``reluctance`` is taken from the marker's logit right after the prompt: reasoning models rarely answer at once.
    ``tokens`` [X, R, depth + 2] are the sequences that are run.
    """

    num_prompts: int
    num_symbols: int
    depth: int
    num_answers: int
    width: int
    reluctance: float = 2.0
    tree: TraceTree = field(init=False)
    answer_lengths: Tensor = field(init=False)
    tokens: Tensor = field(init=False)

    def __post_init__(self) -> None:
        strings = _strings(self.num_symbols, self.depth)
        object.__setattr__(self, "tree", _string_tree(strings, self.num_symbols, self.depth))
        object.__setattr__(self, "answer_lengths", torch.ones(self.num_answers, dtype=torch.long))
        object.__setattr__(self, "tokens", _tokens(strings, self.num_prompts, self.num_symbols, self.depth))

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        d, outputs = self.width, self.num_symbols + 1 + self.num_answers
        return {
            "tokens": (self.num_prompts + self.num_symbols + 1, d),
            "positions": (self.depth + 2, d),
            "query": (d, d),
            "key": (d, d),
            "value": (d, d),
            "out": (d, d),
            "up": (d, 2 * d),
            "down": (2 * d, d),
            "head": (d, outputs),
        }

    @property
    def num_params(self) -> int:
        return sum(math.prod(shape) for shape in self._shapes.values())

    def initial(self, generator: torch.Generator) -> Tensor:
        parts = []
        for name, shape in self._shapes.items():
            scale = 1.0 if name in ("tokens", "positions") else 1 / math.sqrt(shape[0])
            parts.append(scale * torch.randn(math.prod(shape), generator=generator, dtype=F64))
        return torch.cat(parts)

    def logits(self, theta: Tensor, prompts: slice = EVERY) -> tuple[Tensor, Tensor]:
        split = theta.split([math.prod(shape) for shape in self._shapes.values()])
        w = {n: part.view(s) for (n, s), part in zip(self._shapes.items(), split, strict=True)}
        hidden = w["tokens"][self.tokens[prompts]] + w["positions"]
        normed = _rms(hidden)
        scores = (normed @ w["query"]) @ (normed @ w["key"]).transpose(-1, -2) / math.sqrt(self.width)
        future = torch.ones(self.depth + 2, self.depth + 2, dtype=torch.bool).triu(1)
        hidden = hidden + scores.masked_fill(future, -math.inf).softmax(-1) @ (normed @ w["value"]) @ w["out"]
        hidden = hidden + F.gelu(_rms(hidden) @ w["up"], approximate="tanh") @ w["down"]
        outputs = _rms(hidden) @ w["head"]
        lengths = self.tree.lengths
        # after the last symbol of a trace stands the choice of the next token, after its marker the answer
        next_token = outputs[:, torch.arange(self.tree.num_nodes), lengths[: self.tree.num_nodes] - 1]
        answer = outputs[:, torch.arange(len(lengths)), lengths]
        offset = torch.zeros(self.tree.num_nodes, self.num_symbols + 1, dtype=F64)
        offset[EMPTY, -1] = self.reluctance
        return next_token[..., : self.num_symbols + 1] - offset, answer[..., self.num_symbols + 1 :]

    def jacobian(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        return autograd_jacobian(self, theta)


def _strings(num_symbols: int, depth: int) -> list[tuple[int, ...]]:
    """Every string of at most ``depth`` symbols, by length: those that can go on, the nodes, come first."""
    found: list[tuple[int, ...]] = [()]
    for string in found:
        if len(string) < depth:
            found.extend((*string, symbol) for symbol in range(num_symbols))
    return found


def _string_tree(strings: list[tuple[int, ...]], num_symbols: int, depth: int) -> TraceTree:
    """A decision after every string that can go on: the next symbol, or the closing marker (the last choice)."""
    number = {string: place for place, string in enumerate(strings)}
    shape = (len(strings), depth + 1)
    nodes, choices = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    on_path = torch.zeros(shape, dtype=torch.bool)
    for r, string in enumerate(strings):
        close = [num_symbols] if len(string) < depth else []
        for d, choice in enumerate([*string, *close]):
            nodes[r, d], choices[r, d], on_path[r, d] = number[string[:d]], choice, True
    return TraceTree(
        nodes=nodes,
        choices=choices,
        on_path=on_path,
        lengths=torch.tensor([len(string) + 1 for string in strings]),
        num_nodes=sum(len(string) < depth for string in strings),
        num_choices=num_symbols + 1,
    )


def _tokens(strings: list[tuple[int, ...]], num_prompts: int, num_symbols: int, depth: int) -> Tensor:
    """[X, R, depth + 2]: prompt, symbols, closing marker, padding (which causal attention never sees)."""
    close = num_prompts + num_symbols
    rows = [
        [x, *(num_prompts + symbol for symbol in string), *[close] * (depth + 1 - len(string))]
        for x in range(num_prompts)
        for string in strings
    ]
    return torch.tensor(rows).view(num_prompts, len(strings), depth + 2)


def _rms(hidden: Tensor) -> Tensor:
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
