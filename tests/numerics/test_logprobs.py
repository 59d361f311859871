"""The chunked head against plain torch: values, gradients of hidden states, weight and bias, soft cap and scale."""

from __future__ import annotations

import pytest
import torch

from bvpo.training.logprobs import Head, HeadTransform, token_kl, token_logps

TRANSFORMS = [
    HeadTransform(),
    HeadTransform(scale=0.5),
    HeadTransform(softcap=3.0),
    HeadTransform(scale=2.0, softcap=2.0),
]


def tensors(seed=0, rows=11, hidden=5, vocab=13, bias=True, frozen=False):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, hidden, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64, requires_grad=not frozen)
    b = torch.randn(vocab, generator=generator, dtype=torch.float64, requires_grad=not frozen) if bias else None
    return h, w, b, torch.randint(0, vocab, (rows,), generator=generator)


def plain_logits(h, w, b, transform):
    logits = h @ w.T * 1.0
    logits = (logits + b if b is not None else logits) * transform.scale
    return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_logps_and_gradients_equal_plain_torch(transform, frozen):
    """Mutations: scale applied before the bias' gradient; the frozen path forgetting the incoming gradient."""
    h, w, b, targets = tensors(frozen=frozen)
    weights = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    ours = token_logps(h, targets, Head(weight=w, bias=b, transform=transform), chunk=4)
    theirs = plain_logits(h, w, b, transform).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    wanted = [h] if frozen else [h, w, b]
    for one, other in zip(
        torch.autograd.grad((ours * weights).sum(), wanted),
        torch.autograd.grad((theirs * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_kl_and_gradients_equal_plain_torch(transform):
    """Mutations: the two distributions exchanged; a gradient reaching the reference."""
    from bvpo.method.losses import kl_from_logits

    h, w, b, _ = tensors()
    ref_h, ref_w, ref_b, _ = tensors(seed=1)
    head = Head(weight=w, bias=b, transform=transform)
    ours = token_kl(h, head, ref_h, Head(weight=ref_w, bias=ref_b, transform=transform), chunk=4)
    theirs = kl_from_logits(plain_logits(ref_h, ref_w, ref_b, transform), plain_logits(h, w, b, transform))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weights = torch.linspace(-1, 2, len(ours), dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((ours * weights).sum(), [h, w, b], retain_graph=True),
        torch.autograd.grad((theirs * weights).sum(), [h, w, b]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert not torch.autograd.grad(ours.sum(), [ref_h], allow_unused=True)[0]


def test_gradcheck():
    """Mutation: any sign error in the hand-written backward."""
    h, w, b, targets = tensors(rows=3, hidden=2, vocab=4)
    transform = HeadTransform(scale=1.5, softcap=4.0)

    def function(h, w, b):
        return token_logps(h, targets, Head(weight=w, bias=b, transform=transform), chunk=2)

    assert torch.autograd.gradcheck(function, (h, w, b))


def test_peak_memory_does_not_hold_all_logits():
    """4,000 rows by 3,000 words would be 48 MB of float32 logits; chunks of 50 rows need 1/80 of that. Mutation: logits
    saved for backward."""
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest.append(out.numel())
            return out

    h = torch.randn(4000, 8, requires_grad=True)
    w = torch.randn(3000, 8, requires_grad=True)
    with Watch():
        logps = token_logps(
            h, torch.zeros(4000, dtype=torch.long), Head(weight=w, bias=None, transform=HeadTransform()), 50
        )
        logps.sum().backward()
    assert max(largest) <= 50 * 3000
