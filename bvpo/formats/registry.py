"""The reasoning formats that ship with bvpo, one entry per family.

Whitespace is part of the facts. ``verified`` says what was read on which public chat template or parser, ``lead`` what
comes from elsewhere; nothing here was checked against model weights. Adding a family: one entry here, one
fixture in ``tests/formats_fixtures.py``, and ``docs/formats.md`` regenerated.
"""

from __future__ import annotations

from bvpo.formats.spec import Detection, ReasoningFormat

_THINK = ("<think>", "</think>")
_QWEN_EMPTY = ("<think>\n\n", "</think>\n\n")
_HARMONY_FINAL = "<|channel|>final<|message|>"

R1_DISTILL = ReasoningFormat(
    name="r1-distill",
    models="DeepSeek-R1-Distill-Qwen-*, DeepSeek-R1-Distill-Llama-*, DeepSeek-R1",
    verified="prompt ending, history, no switch: TRL deepseek_r1_distill.jinja and llama.cpp's copy",
    lead="both forms: BVPO paper, C.3",
    # The template ends "<think>\n"; the paper samples and trains after "<think>", so the newline is left to the model.
    open="<think>",
    close=("</think>",),
    empty_open="<think>",
    empty_close="</think>",
    detect=Detection(
        trace_ends=("<｜Assistant｜><think>\n",), empty_ends=("<｜Assistant｜><think>\n",), tokens=("<｜Assistant｜>",)
    ),
)

R1_0528_QWEN3 = ReasoningFormat(
    name="r1-0528-qwen3",
    models="DeepSeek-R1-0528-Qwen3-8B, DeepSeek-R1-0528; R1 distills before February 2025",
    lead="prompt ending: public copies of the R1-0528 template; both forms: BVPO paper, C.3",
    open="<think>",
    close=("</think>",),
    empty_open="<think>",
    empty_close="</think>",
    detect=Detection(
        trace_ends=("<｜Assistant｜>",), empty_ends=("<｜Assistant｜>",), tokens=("<｜Assistant｜>", *_THINK)
    ),
)

QWEN3 = ReasoningFormat(
    name="qwen3",
    models="Qwen3-0.6B ... Qwen3-235B-A22B (hybrid, April 2025)",
    verified="prompt endings with the switch on and off: TRL qwen3.jinja",
    open="<think>\n",
    close=("</think>",),
    empty_open=_QWEN_EMPTY[0],
    empty_close=_QWEN_EMPTY[1],
    trace_kwargs={"enable_thinking": True},
    empty_kwargs={"enable_thinking": False},
    detect=Detection(
        trace_ends=("<|im_start|>assistant\n",),
        empty_ends=("<|im_start|>assistant\n<think>\n\n</think>\n\n",),
        tokens=("<|im_start|>", *_THINK),
    ),
)

QWEN3_5 = ReasoningFormat(
    name="qwen3.5",
    models="Qwen3.5, Qwen3.6, Qwen3.8 (thinking and non-thinking defaults)",
    verified="prompt endings: TRL qwen3_5_think.jinja, qwen3_5_nothink.jinja, qwen3_6.jinja, qwen3_8.jinja",
    open="<think>\n",
    close=("</think>",),
    empty_open=_QWEN_EMPTY[0],
    empty_close=_QWEN_EMPTY[1],
    trace_kwargs={"enable_thinking": True},
    empty_kwargs={"enable_thinking": False},
    detect=Detection(
        trace_ends=("<|im_start|>assistant\n<think>\n",),
        empty_ends=("<|im_start|>assistant\n<think>\n\n</think>\n\n",),
        tokens=("<|im_start|>", *_THINK),
    ),
)

QWQ = ReasoningFormat(
    name="qwq",
    models="QwQ-32B, Qwen3-*-Thinking-2507 (no switch)",
    verified="prompt ending, no switch: llama.cpp Qwen-QwQ-32B.jinja",
    lead="empty block: Qwen3's",
    open="<think>\n",
    close=("</think>",),
    empty_open=_QWEN_EMPTY[0],
    empty_close=_QWEN_EMPTY[1],
    detect=Detection(
        trace_ends=("<|im_start|>assistant\n<think>\n",),
        empty_ends=("<|im_start|>assistant\n<think>\n",),
        tokens=("<|im_start|>", *_THINK),
    ),
)

GLM_4_5 = ReasoningFormat(
    name="glm-4.5",
    models="GLM-4.5, GLM-4.5-Air, GLM-4.6",
    verified="prompt endings, /nothink: TRL glm4moe.jinja, llama.cpp GLM-4.6.jinja; end of turn: TRL glm4moe_training.jinja",
    open="\n<think>",
    close=("</think>",),
    empty_open="\n<think>",
    empty_close="</think>",
    turn_end="<|user|>",
    trace_kwargs={"enable_thinking": True},
    empty_kwargs={"enable_thinking": False},  # the template also puts /nothink behind the user's text
    detect=Detection(
        trace_ends=("<|assistant|>",),
        empty_ends=("/nothink<|assistant|>\n<think></think>",),
        tokens=("<|assistant|>", "<|user|>", *_THINK),
    ),
)

NEMOTRON = ReasoningFormat(
    name="nemotron",
    models="NVIDIA-Nemotron-3 Nano, Super, Ultra; Nemotron-3.5 Lightning; Granite 4.2",
    verified="prompt endings: TRL nemotron_3_{nano,super,ultra}.jinja, nemotron_3_5_lightning.jinja; "
    "Granite 4.2: Ollama model/renderers/granite_thinking.go, vLLM granite_thinking parser",
    open="<think>\n",
    close=("</think>",),
    empty_open="<think>",
    empty_close="</think>",
    trace_kwargs={"enable_thinking": True},
    empty_kwargs={"enable_thinking": False},
    detect=Detection(
        trace_ends=("<|im_start|>assistant\n<think>\n",),
        empty_ends=("<|im_start|>assistant\n<think></think>",),
        tokens=("<|im_start|>", *_THINK),
    ),
)

NEMOTRON_V2 = ReasoningFormat(
    name="nemotron-v2",
    models="NVIDIA-Nemotron-Nano-9B-v2, -12B-v2",
    verified="switch, empty block: llama.cpp NVIDIA-Nemotron-Nano-v2.jinja",
    lead="one newline after <think>: public code (that template has two)",
    open="<think>\n",
    close=("</think>",),
    empty_open="<think>",
    empty_close="</think>",
    turn_end="<SPECIAL_12>",
    trace_system="/think",  # the template takes both words out again, so that the two prompts agree up to the block
    empty_system="/no_think",
    detect=Detection(
        trace_ends=("<SPECIAL_11>Assistant\n<think>\n", "<SPECIAL_11>Assistant\n<think>\n\n"),
        empty_ends=("<SPECIAL_11>Assistant\n<think></think>",),
        tokens=("<SPECIAL_11>", "<SPECIAL_12>"),
    ),
)

NEMOTRON_V1_5 = ReasoningFormat(
    name="nemotron-v1.5",
    models="Llama-3_3-Nemotron-Super-49B-v1_5",
    verified="prompt endings, switch: llama.cpp nvidia-Llama-3_3-Nemotron-Super-49B-v1_5.jinja",
    lead="opening newline: the family's other members",
    open="<think>\n",
    close=("</think>",),
    empty_open=_QWEN_EMPTY[0],
    empty_close=_QWEN_EMPTY[1],
    trace_system="/think",
    empty_system="/no_think",
    detect=Detection(
        trace_ends=("<|start_header_id|>assistant<|end_header_id|>\n\n",),
        empty_ends=("<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n\n</think>\n\n",),
        tokens=("<|start_header_id|>",),
    ),
)

NEMOTRON_V1 = ReasoningFormat(
    name="nemotron-v1",
    models="Llama-3.1-Nemotron-Nano-8B-v1, Llama-3.3-Nemotron-Super-49B-v1, Ultra-253B-v1",
    lead="switch: Llama-Nemotron report; empty block: public code that prefills it; template not read",
    open="<think>\n",
    close=("</think>",),
    empty_open="<think>\n",
    empty_close="</think>",
    trace_system="detailed thinking on",
    empty_system="detailed thinking off",
)

GPT_OSS = ReasoningFormat(
    name="gpt-oss",
    models="gpt-oss-20b, gpt-oss-120b",
    verified="prompt ending, markers, no switch: TRL gptoss.jinja",
    lead="jumping to the final channel: LLaMA-Factory",
    open="<|channel|>analysis<|message|>",
    close=("<|end|><|start|>assistant" + _HARMONY_FINAL,),
    # Not an emptied analysis message but none: the choice of channel is what is forced and scored.
    empty_open="",
    empty_close=_HARMONY_FINAL,
    turn_end="<|return|>",
    detect=Detection(
        trace_ends=("<|start|>assistant",),
        empty_ends=("<|start|>assistant",),
        tokens=("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        template_has=("<|channel|>analysis<|message|>", _HARMONY_FINAL),  # other families share some of these tokens
    ),
)

MAGISTRAL = ReasoningFormat(
    name="magistral",
    models="Magistral-Small-2507 and later, Ministral-3-*-Reasoning",
    lead="markers: vLLM mistral_reasoning_parser.py; prompt ending and empty block: template not read",
    # The family's own system message asks for the trace; it belongs in the conversation.
    open="[THINK]",
    close=("[/THINK]",),
    empty_open="[THINK]",
    empty_close="[/THINK]",
    detect=Detection(trace_ends=("[/INST]",), empty_ends=("[/INST]",), tokens=("[/INST]", "[THINK]", "[/THINK]")),
)

GRANITE = ReasoningFormat(
    name="granite",
    models="granite-3.2-*-instruct",
    lead="markers: vLLM granite_reasoning_parser.py; switch and system text: public copies of the template",
    open="Here is my thought process:",
    close=("Here is my response:", "Here's my response:"),
    empty_open="",  # its switch leaves no trace to empty: nothing is forced, so nothing of it is scored
    empty_close="",
    trace_kwargs={"thinking": True},
    empty_kwargs={"thinking": False},
    detect=Detection(
        trace_ends=("<|start_of_role|>assistant<|end_of_role|>",),
        empty_ends=("<|start_of_role|>assistant<|end_of_role|>",),
        tokens=("<|start_of_role|>",),
        template_has=("Here is my thought process:", "Here is my response:"),
    ),
)

GRANITE_3_3 = ReasoningFormat(
    name="granite-3.3",
    models="granite-3.3-*-instruct",
    verified="prompt ending, switch, markers: llama.cpp ibm-granite-granite-3.3-2B-Instruct.jinja",
    lead="what follows </think>",
    open="<think>",
    close=("</think><response>", "</think>\n<response>", "</think>\n\n<response>", "</think>"),
    empty_open="",
    empty_close="",
    answer_close="</response>",
    trace_kwargs={"thinking": True},
    empty_kwargs={"thinking": False},
    detect=Detection(
        trace_ends=("<|start_of_role|>assistant<|end_of_role|>",),
        empty_ends=("<|start_of_role|>assistant<|end_of_role|>",),
        tokens=("<|start_of_role|>",),
        template_has=("<think></think>", "<response></response>"),
    ),
)

HUNYUAN = ReasoningFormat(
    name="hunyuan",
    models="Hunyuan-A13B-Instruct",
    verified="markers: vLLM hunyuan_a13b_reasoning_parser.py; prompt endings: vLLM tool_chat_template_hunyuan_a13b.jinja",
    lead="forcing <answer> with the empty block: the same parser's sequence",
    open="<think>\n",
    close=("</think>\n<answer>\n", "</think>"),
    empty_open="<think>\n\n",
    empty_close="</think>\n<answer>\n",
    answer_close="</answer>",
    trace_kwargs={"enable_thinking": True},
    empty_kwargs={"enable_thinking": False},
    detect=Detection(
        trace_ends=("<|extra_0|>",),
        empty_ends=("<|extra_0|><think>\n\n</think>\n",),
        tokens=("<|extra_0|>", "<|extra_4|>"),
    ),
)

PHI_4_REASONING = ReasoningFormat(
    name="phi-4-reasoning",
    models="Phi-4-reasoning, Phi-4-reasoning-plus",
    lead="markers, prompt ending: public copies of the template; empty block: none seen",
    open="<think>",
    close=("</think>",),
    empty_open="<think>",
    empty_close="</think>",
    turn_end="<|im_end|>",
    detect=Detection(
        trace_ends=("<|im_start|>assistant<|im_sep|>",),
        empty_ends=("<|im_start|>assistant<|im_sep|>",),
        tokens=("<|im_sep|>",),
        template_has=("<think>", "{Thought section}"),
    ),
)

MINIMAX_M2 = ReasoningFormat(
    name="minimax-m2",
    models="MiniMax-M2",
    verified="prompt ending, no switch, layout: llama.cpp unsloth-MiniMax-M2.jinja",
    lead="empty block: none seen",
    open="<think>\n",
    close=("</think>",),
    empty_open=_QWEN_EMPTY[0],
    empty_close=_QWEN_EMPTY[1],
    turn_end="[e~[",
    detect=Detection(
        trace_ends=("]~b]ai\n<think>\n",), empty_ends=("]~b]ai\n<think>\n",), tokens=("]~b]", "[e~[", *_THINK)
    ),
)

_SEED_NO_BUDGET = (
    "The current thinking budget is 0, so I will directly start answering the question.</seed:cot_budget_reflect>\n"
)

SEED_OSS = ReasoningFormat(
    name="seed-oss",
    models="Seed-OSS-36B-Instruct",
    verified="prompt endings, switch: llama.cpp ByteDance-Seed-OSS.jinja",
    lead="rest of the zero-budget block: ms-swift seed.py",
    open="<seed:think>",
    close=("</seed:think>",),
    empty_open="<seed:think><seed:cot_budget_reflect>" + _SEED_NO_BUDGET,
    empty_close="</seed:think>",
    turn_end="<seed:eos>",
    empty_kwargs={"thinking_budget": 0},
    template_tails=("<seed:think><seed:cot_budget_reflect>",),
    detect=Detection(
        trace_ends=("<seed:bos>assistant\n",),
        empty_ends=("<seed:bos>assistant\n<seed:think><seed:cot_budget_reflect>",),
        tokens=("<seed:bos>", "<seed:think>", "</seed:think>"),
    ),
)

DEEPSEEK_V3_1 = ReasoningFormat(
    name="deepseek-v3.1",
    models="DeepSeek-V3.1, DeepSeek-V3.1-Terminus",
    verified="prompt endings, switch, history: llama.cpp deepseek-ai-DeepSeek-V3.1.jinja",
    lead="Terminus: same endings, template not read",
    open="<think>",
    close=("</think>",),
    empty_open="",  # the family closes a trace that it never opened
    empty_close="</think>",
    trace_kwargs={"thinking": True},
    empty_kwargs={"thinking": False},
    detect=Detection(
        trace_ends=("<｜Assistant｜><think>",),
        empty_ends=("<｜Assistant｜></think>",),
        tokens=("<｜Assistant｜>", *_THINK),
    ),
)

GLM_4_7 = ReasoningFormat(
    name="glm-4.7",
    models="GLM-4.7, GLM-4.7-Flash, GLM-5",
    verified="prompt endings, switch: Ollama model/renderers/glm47.go and the template's last lines in public code",
    lead="end of turn: GLM-4.5's",
    open="<think>",
    close=("</think>",),
    empty_open="",
    empty_close="</think>",
    turn_end="<|user|>",
    trace_kwargs={"enable_thinking": True},
    empty_kwargs={"enable_thinking": False},
    detect=Detection(
        trace_ends=("<|assistant|><think>",),
        empty_ends=("<|assistant|></think>",),
        tokens=("<|assistant|>", "<|user|>", *_THINK),
    ),
)

KIMI_K2_THINKING = ReasoningFormat(
    name="kimi-k2-thinking",
    models="Kimi-K2-Thinking",
    verified="prompt ending, no switch, history: llama.cpp moonshotai-Kimi-K2-Thinking.jinja",
    lead="empty block: what that template writes for earlier turns",
    open="<think>",
    close=("</think>",),
    empty_open="<think>",
    empty_close="</think>",
    turn_end="<|im_end|>",
    detect=Detection(
        trace_ends=("<|im_assistant|>assistant<|im_middle|>",),
        empty_ends=("<|im_assistant|>assistant<|im_middle|>",),
        tokens=("<|im_assistant|>", "<|im_middle|>", "<|im_end|>"),
        template_has=("<think></think>",),  # the Instruct models' template has everything else
    ),
)

OLMO_3_THINK = ReasoningFormat(
    name="olmo-3-think",
    models="Olmo-3-7B-Think, Olmo-3-32B-Think, Olmo-3.1-32B-Think",
    verified="prompt ending, no switch: Ollama model/renderers/olmo3_think.go; markers, which are ordinary text: "
    "vLLM olmo3_reasoning_parser.py",
    lead="empty block: none seen",
    open="<think>",
    close=("</think>",),
    empty_open="<think>",
    empty_close="</think>",
    turn_end="<|im_end|>",
    detect=Detection(
        trace_ends=("<|im_start|>assistant\n<think>",),
        empty_ends=("<|im_start|>assistant\n<think>",),
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
)

SMOLLM3 = ReasoningFormat(
    name="smollm3",
    models="SmolLM3-3B",
    verified="prompt endings, switch: public copy of the template, in a BFCL handler for SmolLM3",
    lead="opening newline: the empty block's",
    open="<think>\n",
    close=("</think>",),
    empty_open="<think>\n\n",
    empty_close="</think>\n",  # one newline, where Qwen3 has two
    turn_end="<|im_end|>",
    trace_kwargs={"enable_thinking": True},
    empty_kwargs={"enable_thinking": False},
    detect=Detection(
        trace_ends=("<|im_start|>assistant\n",),
        empty_ends=("<|im_start|>assistant\n<think>\n\n</think>\n",),
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
)

LFM2_5 = ReasoningFormat(
    name="lfm2.5",
    models="LFM2.5 checkpoints that reason (the others ship the same template)",
    verified="prompt ending, no switch, history: TRL lfm2_2_5.jinja, lfm2_2_5_v2.jinja, llama.cpp LFM2.5-8B-A1B",
    lead="empty block: none seen",
    open="<think>",
    close=("</think>",),
    empty_open="<think>",
    empty_close="</think>",
    turn_end="<|im_end|>",
    detect=Detection(
        trace_ends=("<|im_start|>assistant\n",),
        empty_ends=("<|im_start|>assistant\n",),
        tokens=("<|im_start|>", "<|im_end|>", "<|startoftext|>"),
        template_has=("<think>", "preserve_thinking", "<|tool_call_start|>["),
    ),
)

GEMMA_4 = ReasoningFormat(
    name="gemma-4",
    models="gemma-4-*-it",
    verified="prompt endings, switch, history: TRL gemma4.jinja, gemma4_v2.jinja ... gemma4_v5.jinja; "
    "empty block: llama.cpp gemma4.jinja, google-gemma-4-31B-it-interleaved.jinja",
    open="<|channel>thought\n",
    close=("<channel|>",),
    empty_open="<|channel>thought\n",
    empty_close="<channel|>",
    turn_end="<turn|>",
    trace_kwargs={"enable_thinking": True},
    empty_kwargs={"enable_thinking": False},
    detect=Detection(
        trace_ends=("<|turn>model\n",),
        # the larger models' template writes the empty block, the smaller ones' does not
        empty_ends=("<|turn>model\n", "<|turn>model\n<|channel>thought\n<channel|>"),
        tokens=("<|turn>", "<turn|>", "<|channel>", "<channel|>"),
        template_has=("<|think|>",),
    ),
)

EXAONE_DEEP = ReasoningFormat(
    name="exaone-deep",
    models="EXAONE-Deep-2.4B, -7.8B, -32B",
    verified="prompt ending, no switch, history: the template in the README of LG-AI-EXAONE/EXAONE-Deep",
    lead="empty block: none seen",
    open="<thought>\n",
    close=("</thought>",),
    empty_open="<thought>\n\n",
    empty_close="</thought>\n\n",
    turn_end="[|endofturn|]",
    detect=Detection(
        trace_ends=("\n[|assistant|]<thought>\n",),
        empty_ends=("\n[|assistant|]<thought>\n",),
        tokens=("[|assistant|]", "[|endofturn|]"),
    ),
)

PHI_4_MINI_REASONING = ReasoningFormat(
    name="phi-4-mini-reasoning",
    models="Phi-4-mini-reasoning",
    verified="prompt ending, no switch, system text: public copies of the template",
    lead="markers: DeepSeek-R1's, of which it is a distillation; empty block: public code that prefills it",
    open="<think>",
    close=("</think>",),
    empty_open=_QWEN_EMPTY[0],
    empty_close=_QWEN_EMPTY[1],
    turn_end="<|end|>",
    detect=Detection(
        trace_ends=("<|end|><|assistant|>",),
        empty_ends=("<|end|><|assistant|>",),
        tokens=("<|assistant|>", "<|end|>"),
        template_has=("Your name is Phi, an AI math expert",),  # the instruct models end a prompt the same way
    ),
)

FORMATS: dict[str, ReasoningFormat] = {
    fmt.name: fmt
    for fmt in (
        R1_DISTILL,
        R1_0528_QWEN3,
        QWEN3,
        QWEN3_5,
        QWQ,
        GLM_4_5,
        NEMOTRON,
        NEMOTRON_V2,
        NEMOTRON_V1_5,
        NEMOTRON_V1,
        GPT_OSS,
        MAGISTRAL,
        GRANITE,
        GRANITE_3_3,
        HUNYUAN,
        PHI_4_REASONING,
        MINIMAX_M2,
        SEED_OSS,
        DEEPSEEK_V3_1,
        GLM_4_7,
        KIMI_K2_THINKING,
        OLMO_3_THINK,
        SMOLLM3,
        LFM2_5,
        GEMMA_4,
        EXAONE_DEEP,
        PHI_4_MINI_REASONING,
    )
}
