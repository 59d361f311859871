"""Tiny tokenizers that behave like the reasoning families' own.

Real classes (``tokenizers`` byte-level BPE in a ``transformers`` fast tokenizer), a few hundred tokens, nothing
downloaded. The chat templates are short stand-ins written for these tests: they end a prompt, switch thinking and
delete traces from history as the public ones do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bvpo.formats import FORMATS, ReasoningFormat

# GPT-4's and Qwen's way of cutting text before merging: punctuation takes following newlines with it.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LEARNT = (
    "think",
    "response",
    "assistant",
    "answer",
    "thought",
    "process",
    "Here",
    "is",
    "my",
    "so",
    "Yes",
    "Hi",
    "final",
    "analysis",
)
_NEWLINES = (("<", "/"), ("Ċ", "Ċ"), (">", "ĊĊ"), (">", "Ċ"), (":", "ĊĊ"), (".", "Ċ"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One fixture: ``special`` and ``plain`` are added tokens (``plain`` ones survive skip_special_tokens)."""

    format: str
    template: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    bos: str | None = None
    eos: str
    adds_bos: bool = False  # encode(text) puts the bos in front by itself
    nfc: bool = False
    # What such a model writes after the prompt of each view, for the golden tables.
    trace: str = "I think so.\n"
    answer: str = "\n\nYes."
    empty_answer: str = "Yes."


def _turns(
    user: str,
    assistant: str,
    system: str = "{{ m.content }}",
    before: str = "",
    start: str = "",
    close: str = "</think>",
) -> str:
    """A template body: turns in order; history loses its traces, as in most families; ``close=""`` keeps them."""
    kept = "{% set c = m.content.split('" + close + "')[-1] %}" if close else "{% set c = m.content %}"
    return (
        before
        + "{% for m in messages %}{% if m.role == 'system' %}"
        + system
        + "{% elif m.role == 'user' %}"
        + user
        + "{% else %}"
        + kept
        + assistant
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + start
        + "{% endif %}"
    )


def _chatml(start: str, before: str = "", close: str = "</think>") -> str:
    turn = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    return _turns(
        turn,
        "{{ '<|im_start|>assistant\n' + c + '<|im_end|>\n' }}",
        turn,
        before=before,
        start="{{ '<|im_start|>assistant\n' }}" + start,
        close=close,
    )


def _deepseek(start: str) -> str:
    return _turns(
        "{{ '<｜User｜>' + m.content }}",
        "{{ '<｜Assistant｜>' + c + eos_token }}",
        before="{{ bos_token }}",
        start=start,
    )


def _llama3(start: str) -> str:
    def turn(role: str, text: str) -> str:
        return "{{ '<|start_header_id|>" + role + "<|end_header_id|>\n\n' + " + text + " + '<|eot_id|>' }}"

    system = turn("system", "m.content.replace('/no_think', '').replace('/think', '')")
    return _turns(
        turn("user", "m.content"),
        turn("assistant", "c"),
        system,
        before="{{ bos_token }}",
        start="{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}" + start,
    )


_OFF = "enable_thinking is defined and not enable_thinking"
_EMPTY_QWEN = "{{ '<think>\n\n</think>\n\n' }}"
_GLM = _turns(
    "{{ '<|user|>\n' + m.content }}{% if " + _OFF + " %}{{ '/nothink' }}{% endif %}",
    "{{ '<|assistant|>\n<think></think>\n' + c }}",
    "{{ '<|system|>\n' + m.content }}",
    before="[gMASK]<sop>",
    start="{{ '<|assistant|>' }}{% if " + _OFF + " %}{{ '\n<think></think>' }}{% endif %}",
)
_NANO_V2 = (
    "{% set ns = namespace(off=false) %}{% for m in messages %}{% if '/no_think' in m.content %}"
    "{% set ns.off = true %}{% endif %}{% endfor %}"
) + _turns(
    "{{ '<SPECIAL_11>User\n' + m.content + '\n' }}",
    "{{ '<SPECIAL_11>Assistant\n' + c + '\n<SPECIAL_12>\n' }}",
    "{{ '<SPECIAL_10>System\n' + m.content.replace('/no_think', '').replace('/think', '').strip() + '\n' }}",
    start="{{ '<SPECIAL_11>Assistant\n' }}{% if ns.off %}{{ '<think></think>' }}{% else %}{{ '<think>\n' }}{% endif %}",
)
_SUPER_V1_5 = "{% set off = messages[0].role == 'system' and '/no_think' in messages[0].content %}" + _llama3(
    "{% if off %}" + _EMPTY_QWEN + "{% endif %}"
)
_HARMONY = _turns(
    "{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}",
    "{# <|channel|>analysis<|message|> #}{{ '<|start|>assistant<|channel|>final<|message|>' + c + '<|end|>' }}",
    "{{ '<|start|>developer<|message|>' + m.content + '<|end|>' }}",
    before="{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}",
    start="{{ '<|start|>assistant' }}",
)
_MISTRAL = _turns(
    "{{ '[INST]' + m.content + '[/INST]' }}",
    "{{ c + eos_token }}",
    "{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}",
    before="{{ bos_token }}",
)


def _granite(thoughts: str) -> str:
    turn = "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}"
    ask = '{% if thinking %}{{ "<|start_of_role|>system<|end_of_role|>' + thoughts + '<|end_of_text|>\n" }}{% endif %}'
    return _turns(turn, turn, turn, before=ask, start="{{ '<|start_of_role|>assistant<|end_of_role|>' }}")


_HUNYUAN = (
    _turns(
        "{{ m.content + '<|extra_0|>' }}",
        "{{ c + '<|eos|>' }}",
        "{{ m.content + '<|extra_4|>' }}",
        before="{{ '<|startoftext|>' }}",
    )
    + "{% if "
    + _OFF
    + " %}{{ '<think>\n\n</think>\n' }}{% endif %}"
)
_PHI_TURN = "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"
_PHI = _turns(
    _PHI_TURN,
    _PHI_TURN,
    _PHI_TURN,
    before="{{ '<|im_start|>system<|im_sep|><think> {Thought section} </think> {Solution}<|im_end|>' }}",
    start="{{ '<|im_start|>assistant<|im_sep|>' }}",
)
_MINIMAX = _turns(
    "{{ ']~b]user\n' + m.content + '[e~[\n' }}",
    "{{ ']~b]ai\n' + c + '[e~[\n' }}",
    "{{ ']~b]system\n' + m.content + '[e~[\n' }}",
    before="{{ ']~!b[' }}",
    start="{{ ']~b]ai\n<think>\n' }}",
)
_SEED_TURN = "{{ '<seed:bos>' + m.role + '\n' + m.content + '<seed:eos>' }}"
_SEED = _turns(
    _SEED_TURN,
    _SEED_TURN,
    _SEED_TURN,
    before="{% if thinking_budget is defined %}{{ '<seed:bos>systemNo thinking.<seed:eos>' }}{% endif %}",
    start="{{ '<seed:bos>assistant\n' }}{% if thinking_budget is defined %}"
    "{{ '<seed:think><seed:cot_budget_reflect>' }}{% endif %}",
)

_V3_1 = _turns(
    "{{ '<｜User｜>' + m.content }}",
    "{{ '<｜Assistant｜></think>' + c + eos_token }}",
    before="{{ bos_token }}",
    start="{{ '<｜Assistant｜>' }}{% if thinking %}{{ '<think>' }}{% else %}{{ '</think>' }}{% endif %}",
)
_GLM_4_7 = _turns(
    "{{ '<|user|>' + m.content }}",
    "{{ '<|assistant|></think>' + c }}",
    "{{ '<|system|>' + m.content }}",
    before="[gMASK]<sop>",
    start="{{ '<|assistant|>' }}{% if " + _OFF + " %}{{ '</think>' }}{% else %}{{ '<think>' }}{% endif %}",
)
_KIMI = _turns(
    "{{ '<|im_user|>user<|im_middle|>' + m.content + '<|im_end|>' }}",
    "{{ '<|im_assistant|>assistant<|im_middle|><think></think>' + c + '<|im_end|>' }}",
    "{{ '<|im_system|>system<|im_middle|>' + m.content + '<|im_end|>' }}",
    start="{{ '<|im_assistant|>assistant<|im_middle|>' }}",
    close="",
)
_SMOL = _chatml(
    "{% if " + _OFF + " %}{{ '<think>\n\n</think>\n' }}{% endif %}",
    before="{{ '<|im_start|>system\nToday Date: ' + strftime_now('%d %B %Y') + '<|im_end|>\n' }}",
    close="",
)
_LFM = "{{ bos_token }}{% set preserve_thinking = false %}{# <think> <|tool_call_start|>[ #}" + _chatml("")
_GEMMA = _turns(
    "{{ '<|turn>user\n' + m.content + '<turn|>\n' }}",
    "{{ '<|turn>model\n' + c + '<turn|>\n' }}",
    "{{ '<|turn>system\n' + m.content + '<turn|>\n' }}",
    before="{{ bos_token }}{% if enable_thinking %}{{ '<|turn>system\n<|think|>\n<turn|>\n' }}{% endif %}",
    start="{{ '<|turn>model\n' }}",
    close="<channel|>",
)
_GEMMA_LARGE = _GEMMA + "{% if not enable_thinking %}{{ '<|channel>thought\n<channel|>' }}{% endif %}"
_EXAONE = _turns(
    "{{ '[|user|]' + m.content }}",
    "{{ '\n[|assistant|]' + c + '[|endofturn|]\n' }}",
    "{{ '[|system|]' + m.content + '[|endofturn|]\n' }}",
    start="{{ '\n[|assistant|]<thought>\n' }}",
    close="</thought>",
)
_PHI_MINI = (
    "{{ '<|system|>Your name is Phi, an AI math expert developed by Microsoft.<|end|>' }}{% for m in messages %}"
    "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_THINK = ("<think>", "</think>")
_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_DEEPSEEK = Family(
    format="r1-distill",
    template=_deepseek("{{ '<｜Assistant｜><think>\n' }}"),
    special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    plain=("<｜User｜>", "<｜Assistant｜>", *_THINK),
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    adds_bos=True,
    trace="\nI think so.\n",
    empty_answer="\n\nYes.",
)
_QWEN = Family(
    format="qwen3",
    template=_chatml("{% if " + _OFF + " %}" + _EMPTY_QWEN + "{% endif %}"),
    special=_CHATML_TOKENS,
    plain=_THINK,
    eos="<|im_end|>",
    nfc=True,
)
_LLAMA = Family(
    format="nemotron-v1.5",
    template=_SUPER_V1_5,
    special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    adds_bos=True,
)
_GRANITE = Family(
    format="granite",
    template=_granite("Use 'Here is my thought process:' and 'Here is my response:'."),
    special=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
    bos="<|end_of_text|>",
    eos="<|end_of_text|>",
    trace=" I think so.\n",
    answer="\n\nYes.",
)

FAMILIES: dict[str, Family] = {
    "r1-distill": replace(_DEEPSEEK, nfc=True),
    "r1-distill-llama": replace(_DEEPSEEK, special=("<pad>", *_DEEPSEEK.special)),
    "r1-0528-qwen3": replace(_DEEPSEEK, format="r1-0528-qwen3", template=_deepseek("{{ '<｜Assistant｜>' }}")),
    "qwen3": _QWEN,
    "qwen3.5": replace(
        _QWEN,
        format="qwen3.5",
        template=_chatml("{% if " + _OFF + " %}" + _EMPTY_QWEN + "{% else %}{{ '<think>\n' }}{% endif %}"),
    ),
    "qwen3.5-nothink": replace(
        _QWEN,
        format="qwen3.5",
        template=_chatml("{% if enable_thinking %}{{ '<think>\n' }}{% else %}" + _EMPTY_QWEN + "{% endif %}"),
    ),
    "qwq": replace(_QWEN, format="qwq", template=_chatml("{{ '<think>\n' }}")),
    "glm-4.5": Family(
        format="glm-4.5",
        template=_GLM,
        special=("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
        plain=_THINK,
        eos="<|endoftext|>",
        trace="I think so.",
        answer="\nYes.",
        empty_answer="\nYes.",
    ),
    "nemotron": replace(
        _QWEN,
        format="nemotron",
        template=_chatml("{% if " + _OFF + " %}{{ '<think></think>' }}{% else %}{{ '<think>\n' }}{% endif %}"),
        nfc=False,
    ),
    "nemotron-v2": Family(
        format="nemotron-v2",
        template=_NANO_V2,
        special=("<s>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"),
        bos="<s>",
        eos="<SPECIAL_12>",
    ),
    "nemotron-v1.5": _LLAMA,
    "nemotron-v1": replace(_LLAMA, format="nemotron-v1", template=_llama3("")),
    "gpt-oss": Family(
        format="gpt-oss",
        template=_HARMONY,
        special=("<|startoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
        bos="<|startoftext|>",
        eos="<|return|>",
        trace="I think so.",
        answer="Yes.",
    ),
    "magistral": Family(
        format="magistral",
        template=_MISTRAL,
        special=("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]"),
        bos="<s>",
        eos="</s>",
        adds_bos=True,
        trace="I think so.",
        answer="Yes.",
    ),
    "granite": _GRANITE,
    "granite-3.3": replace(
        _GRANITE,
        format="granite-3.3",
        template=_granite("Write thoughts between <think></think>, the response between <response></response>."),
    ),
    "hunyuan": Family(
        format="hunyuan",
        template=_HUNYUAN,
        special=("<|startoftext|>", "<|eos|>", "<|extra_0|>", "<|extra_4|>"),
        bos="<|startoftext|>",
        eos="<|eos|>",
        answer="Yes.\n",
        empty_answer="Yes.\n",
    ),
    "phi-4-reasoning": Family(
        format="phi-4-reasoning",
        template=_PHI,
        special=("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>", *_THINK),
        bos="<|endoftext|>",
        eos="<|im_end|>",
        trace="\nI think so.\n",
        empty_answer="\n\nYes.",
    ),
    "minimax-m2": Family(
        format="minimax-m2",
        template=_MINIMAX,
        special=("]~!b[", "]~b]", "[e~["),
        plain=_THINK,
        bos="]~!b[",
        eos="[e~[",
    ),
    "seed-oss": Family(
        format="seed-oss",
        template=_SEED,
        special=("<seed:bos>", "<seed:eos>"),
        plain=("<seed:think>", "</seed:think>", "<seed:cot_budget_reflect>", "</seed:cot_budget_reflect>"),
        bos="<seed:bos>",
        eos="<seed:eos>",
        trace="I think so.",
        answer="Yes.",
    ),
    "deepseek-v3.1": replace(
        _DEEPSEEK,
        format="deepseek-v3.1",
        template=_V3_1,
        trace="I think so.",
        answer="Yes.",
        empty_answer="Yes.",
    ),
    "glm-4.7": Family(
        format="glm-4.7",
        template=_GLM_4_7,
        special=("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
        plain=_THINK,
        eos="<|endoftext|>",
        trace="I think so.",
        answer="Yes.",
    ),
    "kimi-k2-thinking": Family(
        format="kimi-k2-thinking",
        template=_KIMI,
        special=("[EOS]", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>"),
        plain=_THINK,
        eos="[EOS]",
        trace="I think so.",
        answer="Yes.",
    ),
    # No marker is a token of its own.
    "olmo-3-think": replace(
        _QWEN,
        format="olmo-3-think",
        template=_chatml("{{ '<think>' }}", close=""),
        plain=(),
        eos="<|endoftext|>",
        nfc=False,
    ),
    "smollm3": replace(_QWEN, format="smollm3", template=_SMOL, answer="\nYes.", nfc=False),
    "lfm2.5": replace(
        _QWEN,
        format="lfm2.5",
        template=_LFM,
        special=("<|startoftext|>", *_CHATML_TOKENS),
        bos="<|startoftext|>",
        adds_bos=True,
        nfc=False,
        trace="I think so.",
        answer="Yes.",
    ),
    "gemma-4": Family(
        format="gemma-4",
        template=_GEMMA,
        special=("<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"),
        bos="<bos>",
        eos="<eos>",
        adds_bos=True,
        answer="Yes.",
    ),
    "exaone-deep": Family(
        format="exaone-deep",
        template=_EXAONE,
        special=("[BOS]", "[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
        plain=("<thought>", "</thought>"),
        bos="[BOS]",
        eos="[|endofturn|]",
    ),
    "phi-4-mini-reasoning": Family(
        format="phi-4-mini-reasoning",
        template=_PHI_MINI,
        special=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        trace="\nI think so.\n",
        empty_answer="Yes.",
    ),
}
FAMILIES["gemma-4-large"] = replace(FAMILIES["gemma-4"], template=_GEMMA_LARGE)


def _merges() -> list[tuple[str, str]]:
    pairs = list(_NEWLINES)
    for word in _LEARNT:
        pairs += [(word[:i], word[i]) for i in range(1, len(word))]
        pairs.append(("Ġ", word))
    return list(dict.fromkeys(pairs))


def build_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the family's added tokens and chat template."""
    merges = _merges()
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(dict.fromkeys(pieces))}, merges=merges))
    if family.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in family.special])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in family.plain])
    if family.adds_bos:
        assert family.bos is not None
        bos = (family.bos, backend.token_to_id(family.bos))
        backend.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[bos])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos)
    tokenizer.chat_template = family.template
    return tokenizer


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return build_tokenizer(FAMILIES[name])


def format_of(name: str) -> ReasoningFormat:
    return FORMATS[FAMILIES[name].format]
