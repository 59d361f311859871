"""The tiny model's tokenizer: one token per word, exact round trip, and the markers and chat template of R1's distills.

In: how large problems may be. Out: a ``PreTrainedTokenizerFast``. A token is a word with the space
before it, so decoding gives the very text back and pieces of text can be encoded one by one.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bvpo.tiny.corpus import CHECK, CONCLUSION, EQUALS, FILLERS, RETRACTION
from bvpo.tiny.reward import CLOSER, HESITATION, OPENERS, PHRASE
from bvpo.tiny.tasks import CUP_NAMES, ORDINALS, STYLES, TASKS, UNITS

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|endoftext|>"
MARKERS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)


def words(modulus: int, cups: int, longest: int) -> list[str]:
    """Every word of prompts, traces and answers, in a fixed order."""
    numbers = [str(number) for number in range(modulus + 1)]
    asked = ["mod", *ORDINALS[:longest], *CUP_NAMES[:cups], *UNITS, *STYLES]
    thought = [EQUALS, CONCLUSION, CHECK, RETRACTION, *FILLERS]
    answered = [*OPENERS, HESITATION, *PHRASE, CLOSER]
    return [*numbers, *asked, *thought, *answered]


def make_tokenizer(modulus: int, cups: int, longest: int) -> PreTrainedTokenizerFast:
    """The tokenizer for problems up to these sizes; ``longest`` is the most numbers or swaps.

    ``AutoTokenizer`` reads every tokenizer beside a Qwen2 model as a byte-level BPE, whatever the folder says, so this is
    one: with nothing but its added tokens, which stay as they are. Padding has the name that Qwen2's class would add.
    """
    tokenizer = Tokenizer(models.BPE({"Ġ": 0, "Ċ": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([PAD, BOS, EOS])
    tokenizer.add_tokens(list(MARKERS))
    texts = ["\n", *TASKS, *(f" {word}" for word in words(modulus, cups, longest))]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=PAD,
        clean_up_tokenization_spaces=False,
    )
