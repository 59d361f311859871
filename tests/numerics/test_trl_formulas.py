"""Our losses against the code that TRL 1.16 runs, on a tiny Qwen2 model built here.

Each test drives a real ``DPOTrainer`` (for SimPO the experimental ``CPOTrainer``) on a padded batch and compares loss,
gradients and logged rewards with ours, computed from teacher-forced log-probs of single, unpadded sequences.

TRL's fused LM head (``trl.kernels.ChunkedLogProbFunction``) works in float32 whatever the model's dtype. The float64
tests therefore put a float64 head in its place and nothing else: trainer, collator, backbone and loss stay TRL's. One
test leaves TRL untouched and uses the float32 tolerances.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bvpo.config import LossConfig
from bvpo.method.losses import PairLogps, pair_loss

trl = pytest.importorskip("trl", reason="TRL is not installed: there is nothing to compare with")

pytestmark = pytest.mark.filterwarnings("ignore")

VOCAB = 40
PAD, EOS = VOCAB - 2, VOCAB - 1
BETA, SMOOTHING = 0.3, 0.15

# prompt, chosen, rejected token ids: both orders of length, and one-token answers
PAIRS = [
    ([1, 2, 3], [4, 5, 11, 12, 30], [6]),
    ([7, 8], [9], [10, 14, 15]),
    ([3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5]),
]

# TRL's loss type, our settings
DPO_LOSSES = [
    ("sigmoid", LossConfig(name="dpo", beta=BETA)),
    ("sigmoid_norm", LossConfig(name="dpo_norm", beta=BETA)),
    ("ipo", LossConfig(name="ipo", beta=BETA)),
    ("hinge", LossConfig(name="hinge", beta=BETA)),
    ("robust", LossConfig(name="robust", beta=BETA, label_smoothing=SMOOTHING)),
]


class Float64Head:
    """Stands in for TRL's float32 LM head: same arguments, same five outputs, plain torch in the model's own dtype."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
        assert bias is None and softcap is None and temperature == logit_scale == 1.0
        logits = hidden @ weight.T
        logps = logits.log_softmax(-1)
        picked = logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        top1 = logits.argmax(-1) == targets
        return picked, -(logps.exp() * logps).sum(-1).detach(), None, logits.mean(-1).detach(), top1


@pytest.fixture
def float64_head(monkeypatch):
    from trl.trainer import utils

    if not hasattr(utils, "_ChunkedLogProbFunction"):
        pytest.skip("this TRL has another LM head: the float64 comparison does not apply to it")
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Float64Head)


def tiny_model(seed: int, dtype: torch.dtype = torch.float64):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config).to(dtype)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {f"w{i}": i for i in range(VOCAB - 2)} | {"<pad>": PAD, "<eos>": EOS}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def text_pairs():
    from datasets import Dataset

    def text(ids):
        return "".join(f" w{i}" for i in ids)

    return Dataset.from_list([{"prompt": text(p), "chosen": text(c), "rejected": text(r)} for p, c, r in PAIRS])


def trainer_settings(folder) -> dict:
    return {"output_dir": str(folder), "use_cpu": True, "report_to": [], "bf16": False, "gradient_checkpointing": False}


def dpo_trainer(folder, policy, reference, loss_type: str, label_smoothing: float = 0.0):
    args = trl.DPOConfig(**trainer_settings(folder), loss_type=[loss_type], beta=BETA, label_smoothing=label_smoothing)
    trainer = trl.DPOTrainer(
        policy, ref_model=reference, args=args, train_dataset=text_pairs(), processing_class=tokenizer()
    )
    rows = [trainer.train_dataset[i] for i in range(len(PAIRS))]
    assert [r["chosen_ids"] for r in rows] == [[*c, EOS] for _, c, _ in PAIRS], "TRL trains on other tokens than we do"
    return trainer, rows


def teacher_forced(model, prompt: list[int], completion: list[int]) -> Tensor:
    """Summed log-prob of the completion, from the full logits of this one sequence."""
    ids = torch.tensor([prompt + completion])
    logps = model(input_ids=ids).logits[0].log_softmax(-1)
    return logps[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None]).sum()


def our_logps(policy, reference, pairs=PAIRS) -> PairLogps:
    def sums(model, side):
        return torch.stack([teacher_forced(model, pair[0], pair[side] + [EOS]) for pair in pairs])

    with torch.no_grad():
        ref = {"ref_chosen": sums(reference, 1), "ref_rejected": sums(reference, 2)} if reference is not None else {}
    return PairLogps(
        chosen=sums(policy, 1),
        rejected=sums(policy, 2),
        chosen_lengths=torch.tensor([len(c) + 1 for _, c, _ in pairs]),
        rejected_lengths=torch.tensor([len(r) + 1 for _, _, r in pairs]),
        **ref,
    )


def gradient(model, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_equal(policy, theirs: Tensor, ours: Tensor, loss_tolerance: float, grad_tolerance: float) -> None:
    assert abs(theirs.item() - ours.item()) <= loss_tolerance * max(1.0, abs(ours.item()))
    their_gradient, our_gradient = gradient(policy, theirs).double(), gradient(policy, ours).double()
    assert our_gradient.norm() > 1e-3, "a vanishing gradient would compare equal to anything"
    assert (their_gradient - our_gradient).norm() <= grad_tolerance * our_gradient.norm()


@pytest.mark.parametrize(("loss_type", "config"), DPO_LOSSES, ids=lambda v: v if isinstance(v, str) else "")
def test_dpo_trainer_float64(loss_type, config, float64_head, tmp_path):
    """Loss and gradient equal DPOTrainer's (1e-9 and 1e-8), and so do the logged rewards.

    Goes red when: ipo sums instead of averages, or averages without EOS; hinge drops the 1; robust swaps its terms;
    a reward is scaled by anything but beta.
    """
    policy, reference = tiny_model(0), tiny_model(1)
    trainer, rows = dpo_trainer(tmp_path, policy, reference, loss_type, config.label_smoothing)
    theirs = trainer.compute_loss(policy, trainer.data_collator(rows))
    assert theirs.dtype == torch.float64, "the float64 head is not in use"
    ours = pair_loss(config, our_logps(policy, reference))
    logged = trainer._metrics["train"]
    assert logged["rewards/chosen"][-1] == pytest.approx(ours.chosen_rewards.mean().item(), abs=1e-9)
    assert logged["rewards/rejected"][-1] == pytest.approx(ours.rejected_rewards.mean().item(), abs=1e-9)
    assert_equal(policy, theirs, ours.loss.mean(), 1e-9, 1e-8)


@pytest.mark.parametrize(("loss_type", "config"), DPO_LOSSES, ids=lambda v: v if isinstance(v, str) else "")
def test_dpo_trainer_as_shipped(loss_type, config, tmp_path):
    """The same with nothing of TRL replaced, in float32.

    Goes red when: the float64 stand-in above hides a difference of TRL's own head.
    """
    policy, reference = tiny_model(0, torch.float32), tiny_model(1, torch.float32)
    trainer, rows = dpo_trainer(tmp_path, policy, reference, loss_type, config.label_smoothing)
    theirs = trainer.compute_loss(policy, trainer.data_collator(rows))
    assert_equal(policy, theirs, pair_loss(config, our_logps(policy, reference)).loss.mean(), 2e-5, 1e-4)


def test_trl_sigmoid_ignores_label_smoothing(float64_head, tmp_path):
    """TRL 1.16's "sigmoid" reads no label_smoothing (docs/losses.md says so): our smoothed DPO is not what it computes.

    Goes red when: TRL starts to read it, and the docs have to change.
    """
    policy, reference = tiny_model(0), tiny_model(1)
    trainer, rows = dpo_trainer(tmp_path, policy, reference, "sigmoid", SMOOTHING)
    theirs = trainer.compute_loss(policy, trainer.data_collator(rows)).item()
    logps = our_logps(policy, reference)
    smoothed = LossConfig(name="dpo", beta=BETA, label_smoothing=SMOOTHING)
    assert theirs == pytest.approx(pair_loss(LossConfig(beta=BETA), logps).loss.mean().item(), abs=1e-9)
    assert abs(theirs - pair_loss(smoothed, logps).loss.mean().item()) > 1e-2


def test_label_smoothing_is_trls_aot_of_one_pair(float64_head, tmp_path):
    """cDPO against TRL: "aot_unpaired" sorts a batch before the smoothed loss, and sorting one pair changes nothing.

    Goes red when: dpo's label_smoothing swaps its weights or its signs.
    """
    policy, reference = tiny_model(0), tiny_model(1)
    trainer, rows = dpo_trainer(tmp_path, policy, reference, "aot_unpaired", SMOOTHING)
    config = LossConfig(name="dpo", beta=BETA, label_smoothing=SMOOTHING)
    for row, pair in zip(rows, PAIRS, strict=True):
        theirs = trainer.compute_loss(policy, trainer.data_collator([row]))
        ours = pair_loss(config, our_logps(policy, reference, [pair])).loss.mean()
        assert_equal(policy, theirs, ours, 1e-9, 1e-8)


CPO_LOSSES = [
    ("simpo", {"simpo_gamma": 0.7}, LossConfig(name="simpo", beta=BETA, gamma=0.7)),
    ("sigmoid", {"label_smoothing": SMOOTHING}, LossConfig(name="dpo", beta=BETA, label_smoothing=SMOOTHING)),
    ("ipo", {}, LossConfig(name="ipo", beta=BETA)),
    ("hinge", {}, LossConfig(name="hinge", beta=BETA)),
]


@pytest.mark.parametrize(("loss_type", "extra", "config"), CPO_LOSSES, ids=[name for name, *_ in CPO_LOSSES])
def test_cpo_trainer_float64(loss_type, extra, config, tmp_path):
    """SimPO as TRL has it; and DPO, IPO, hinge with a reference that gives every response probability 1 (CPO).

    Goes red when: gamma is taken as SimPO's ratio gamma / beta, gamma is added, or lengths leave out EOS.
    """
    cpo = pytest.importorskip("trl.experimental.cpo", reason="this TRL has no CPOTrainer: no SimPO to compare with")
    policy = tiny_model(0)
    args = cpo.CPOConfig(
        **trainer_settings(tmp_path),
        loss_type=loss_type,
        beta=BETA,
        cpo_alpha=0.0,
        remove_unused_columns=False,
        **extra,
    )
    trainer = cpo.CPOTrainer(policy, args=args, train_dataset=text_pairs(), processing_class=tokenizer())
    rows = [trainer.train_dataset[i] for i in range(len(PAIRS))]
    assert [r["chosen_input_ids"] for r in rows] == [p + c + [EOS] for p, c, _ in PAIRS]
    theirs, metrics = trainer.get_batch_loss_metrics(policy, trainer.data_collator(rows))

    logps = our_logps(policy, None)
    if loss_type == "simpo":
        ours = pair_loss(config, logps)
        assert metrics["rewards/chosen"] == pytest.approx(ours.chosen_rewards.mean().item(), abs=1e-9)
        assert metrics["rewards/rejected"] == pytest.approx(ours.rejected_rewards.mean().item(), abs=1e-9)
    else:
        certain = torch.zeros(len(PAIRS), dtype=torch.float64)
        fields = {name: getattr(logps, name) for name in ("chosen", "rejected", "chosen_lengths", "rejected_lengths")}
        ours = pair_loss(config, PairLogps(**fields, ref_chosen=certain, ref_rejected=certain))
    assert_equal(policy, theirs, ours.loss.mean(), 1e-9, 1e-8)
