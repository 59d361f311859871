"""[score]: what tells a good answer from a bad one."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from bvpo.config.ranges import FILLED, POSITIVE, Problems, Range, at_least
from bvpo.web import ADDRESS, is_address

_ADDRESS = Range(lambda v: not v or is_address(v), ADDRESS)
_SCORER_SECTIONS = {"armorm": "reward_model", "classifier": "reward_model", "function": "function", "judge": "judge"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelConfig:
    """The reward model of the scorers 'armorm' and 'classifier', run in this process with its own chat template."""

    model: Annotated[str, FILLED] = "RLHFlow/ArmoRM-Llama3-8B-v0.1"
    """Reward model: a local folder or a Hub name. Weights load from safetensors only."""
    revision: Annotated[str | None, FILLED] = None
    """Hub branch, tag or commit of the reward model; none takes the default branch."""
    trust_remote_code: bool = False
    """Run Python code shipped with the reward model (scorer 'classifier' only). Only for sources you trust."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the weights; 'auto' takes bf16 on GPUs that have it, else fp32. A linear head runs in fp32."""
    device: Annotated[str, FILLED] = "auto"
    """Device such as cuda, cuda:1 or cpu; 'auto' takes the GPU if there is one."""
    max_length: Annotated[int | None, at_least(2)] = None
    """Longest conversation in tokens, >= 2; a longer one fails, it is never cut. none takes the model's own limit."""
    batch_tokens: Annotated[int, at_least(1)] = 16384
    """Tokens of a batch, padding included, >= 1; a longer conversation goes alone. Never changes a score's meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionScorerConfig:
    """A Python function as the scorer."""

    path: str = ""
    """The function: 'package.module:name' or 'folder/file.py:name'. It takes (messages, answer) and returns a number
    or None; see docs/scoring.md."""
    batch_size: Annotated[int | None, at_least(1)] = None
    """Answers per call, >= 1: the function then takes two lists and returns one. none calls it once per answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """A language model as the judge, behind any OpenAI-compatible endpoint."""

    model: str = ""
    """Name of the judge as the endpoint knows it; a dated version keeps scores comparable."""
    base_url: Annotated[str, _ADDRESS] = ""
    """Address of the endpoint, such as http://127.0.0.1:8000/v1; empty takes OPENAI_BASE_URL, else OpenAI's own."""
    api_key_env: str = ""
    """Environment variable that holds the key; empty sends OPENAI_API_KEY, to OpenAI's own address or that of
    OPENAI_BASE_URL and to no other. Keys are never read from files, logged or stored."""
    mode: Literal["pointwise", "pairwise"] = "pointwise"
    """'pointwise' rates each answer; 'pairwise' compares the answers to a prompt, each two in both orders, and scores
    the share of comparisons won."""
    template: str = ""
    """Text file with the judge's instructions, holding {prompt} and {answer} ({answer_a}, {answer_b}); empty takes ours."""
    pattern: str = ""
    """Regular expression with one group that finds the verdict in the reply; empty takes [[7]] or [[A]], [[B]], [[C]]."""
    rating_min: Annotated[float, at_least(0)] = 1.0
    """Lowest rating of 'pointwise', >= 0; a rating outside the range is a failure."""
    rating_max: Annotated[float, POSITIVE] = 10.0
    """Highest rating of 'pointwise', above the lowest."""
    temperature: Annotated[float | None, at_least(0)] = 0.0
    """Sampling temperature of the judge, >= 0; none leaves it to the endpoint."""
    max_tokens: Annotated[int | None, at_least(1)] = 1024
    """Longest reply in tokens, >= 1; none leaves it to the endpoint."""
    request: dict[str, Any] = field(default_factory=dict)
    """Any other field of the request body, such as request.seed or request.max_completion_tokens."""
    concurrency: Annotated[int, at_least(1)] = 16
    """Requests in flight, >= 1."""
    retries: Annotated[int, at_least(0)] = 5
    """Repeats of a request that failed for a passing reason (rate limit, connection, server error), >= 0."""
    timeout: Annotated[float, POSITIVE] = 300.0
    """Seconds until a request counts as failed, > 0."""
    cache: str = ""
    """Folder of the judge's replies, to share between experiments; empty keeps them in the experiment's folder."""
    price_input: Annotated[float | None, at_least(0)] = None
    """US dollars per million prompt tokens, >= 0, for the estimate before the run."""
    price_output: Annotated[float | None, at_least(0)] = None
    """US dollars per million reply tokens, >= 0, for the estimate before the run."""

    def contradictions(self) -> Problems:
        found: list[tuple[str, str]] = []
        if self.mode == "pairwise":
            for name in ("rating_min", "rating_max"):
                if getattr(self, name) != getattr(JudgeConfig(), name):
                    found.append((name, "set, but mode 'pairwise' never reads it"))
        elif self.rating_max <= self.rating_min:
            found.append(("rating_max", f"got {self.rating_max:g}, expected more than rating_min {self.rating_min:g}"))
        for key in self.request:
            if key in ("model", "messages", "temperature", "max_tokens", "n", "stream"):
                found.append((f"request.{key}", "is set by bvpo itself; leave it out"))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig:
    """Scoring: what tells a good final answer from a bad one. Only the answer is scored, never the trace."""

    scorer: Literal["armorm", "classifier", "function", "judge"] = "armorm"
    """'armorm': the multi-objective reward model of the paper; 'classifier': any reward model with one output;
    'function': your own; 'judge': a language model."""
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    function: FunctionScorerConfig = field(default_factory=FunctionScorerConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def contradictions(self) -> Problems:
        """Settings of a scorer that is not used, and what the used one cannot do without."""
        used = _SCORER_SECTIONS[self.scorer]
        found: list[tuple[str, str]] = []
        for section in sorted(set(_SCORER_SECTIONS.values()) - {used}):
            given = getattr(self, section)
            for f in fields(given):
                if getattr(given, f.name) != getattr(type(given)(), f.name):
                    found.append((f"{section}.{f.name}", f"set, but scorer {self.scorer!r} never reads it"))
        if self.scorer == "function" and not self.function.path:
            found.append(("function.path", "not set, but scorer 'function' needs it"))
        if self.scorer == "judge" and not self.judge.model:
            found.append(("judge.model", "not set, but scorer 'judge' needs it"))
        if self.scorer == "classifier" and self.reward_model.model == RewardModelConfig().model:
            found.append(("reward_model.model", "not set, but scorer 'classifier' needs a model with one output"))
        if self.scorer == "armorm" and self.reward_model.trust_remote_code:
            found.append(("reward_model.trust_remote_code", "set, but scorer 'armorm' never runs the model's own code"))
        return found
