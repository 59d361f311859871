"""vLLM in this process: the same requests and generations as every engine, without a server in between.

In: requests of token ids. Out: generations, window by window (``LLM.generate`` returns when a window is finished; for a
stream, serve the model and use the HTTP engine). An optional extra for an environment of its own: vLLM pins versions of
torch and transformers that training does not share. It is imported when the engine is first used.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from bvpo.engines.base import Caps, Generation, Request
from bvpo.engines.http.wire import Vocabulary
from bvpo.models import ModelPlan, ModelSource, identify, plan_model
from bvpo.strict import UserError

logger = logging.getLogger(__name__)


def create(
    *,
    model: str,
    revision: str | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
    max_model_len: int | None = None,
    window: int = 1024,
    engine_args: Mapping[str, Any] | None = None,
) -> VllmEngine:
    """An engine for the model at ``model``; vLLM loads it when it is first needed.

    ``engine_args`` are further arguments of ``vllm.LLM``, by their own names.
    """
    if window < 1:
        raise UserError(f"vllm engine: window: got {window}, expected an integer of at least 1")
    own: dict[str, Any] = {
        "model": model,
        "revision": revision,
        "tokenizer": tokenizer,
        "trust_remote_code": trust_remote_code,
        "dtype": dtype,
        "tensor_parallel_size": tensor_parallel_size,
        "gpu_memory_utilization": gpu_memory_utilization,
        "max_model_len": max_model_len,
    }
    for name in engine_args or {}:
        if name in own:
            raise UserError(f"vllm engine: engine_args: {name!r} is an option of its own; set {name}")
    source = ModelSource(
        path=model,
        revision=revision,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
        device="cpu",  # only the configuration is read here; the GPU is vLLM's to initialise
    )
    return VllmEngine(plan_model(source), own | dict(engine_args or {}), window)


class VllmEngine:
    """See the module's docstring; build one with :func:`create`."""

    def __init__(self, plan: ModelPlan, arguments: dict[str, Any], window: int) -> None:
        self._plan = plan
        self._arguments = arguments
        self._window = window
        self._llm: Any = None

    @property
    def caps(self) -> Caps:
        # vLLM's own switch; without it, another batch may round logits differently.
        invariant = os.environ.get("VLLM_BATCH_INVARIANT") == "1"
        return Caps(token_prompts=True, seed=True, logprobs=True, batch_invariant=invariant)

    def fingerprint(self) -> dict[str, Any]:
        changing = {
            name: self._arguments[name] for name in sorted(self._arguments) if name not in ("model", "tokenizer")
        }
        return {"engine": "vllm", **identify(self._plan), "arguments": changing, "vllm": _vllm().__version__}

    def generate(self, requests: Iterable[Request]) -> Iterator[Generation]:
        llm = self._model()
        waiting = iter(requests)
        while batch := list(islice(waiting, self._window)):
            fitting = []
            for request in batch:
                problem = self._problem(llm, request)
                if problem is None:
                    fitting.append(request)
                else:
                    yield Generation.failed(request.key, problem)
            yield from self._sample(llm, fitting)

    def close(self) -> None:
        self._llm = None

    def _model(self) -> Any:
        if self._llm is None:
            given = {name: value for name, value in self._arguments.items() if value is not None}
            self._llm = _vllm().LLM(**given)
        return self._llm

    def _problem(self, llm: Any, request: Request) -> str | None:
        """Why vLLM would refuse this request; it would refuse the whole window with it."""
        limit = llm.llm_engine.model_config.max_model_len
        if not request.prompt_ids:
            return "prompt_ids: got no tokens, expected at least one"
        if len(request.prompt_ids) >= limit:
            return f"prompt_ids: got {len(request.prompt_ids)} tokens, expected fewer than the model's {limit}"
        vocab = llm.llm_engine.model_config.get_vocab_size()
        outside = next((i for i in request.prompt_ids if not 0 <= i < vocab), None)
        return None if outside is None else f"prompt_ids: got token {outside}, expected ids from 0 to {vocab - 1}"

    def _sample(self, llm: Any, requests: Sequence[Request]) -> Iterator[Generation]:
        if not requests:
            return
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        params = [sampling_params(request) for request in requests]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        vocabulary = Vocabulary(llm.get_tokenizer())
        for request, output in zip(requests, outputs, strict=True):
            yield read_output(request, output, vocabulary)


def sampling_params(request: Request) -> Any:
    """vLLM's parameters for one request; what is off is said to be off."""
    params = request.params
    return _vllm().SamplingParams(
        n=1,
        seed=request.seed,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k or -1,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        max_tokens=params.max_new_tokens,
        stop_token_ids=list(params.stop_token_ids),
        logprobs=0,  # of the sampled token only
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
    )


def read_output(request: Request, output: Any, vocabulary: Vocabulary) -> Generation:
    """One ``RequestOutput`` as a generation; what is not a finished sample of this prompt becomes an error."""
    if tuple(output.prompt_token_ids) != request.prompt_ids:
        return Generation.failed(request.key, "vLLM read other prompt tokens than it was given")
    if len(output.outputs) != 1:
        return Generation.failed(request.key, f"vLLM gave {len(output.outputs)} outputs for n = 1")
    choice = output.outputs[0]
    if choice.finish_reason not in ("stop", "length"):
        return Generation.failed(request.key, f"vLLM ended the request: {choice.finish_reason}")
    ids = tuple(choice.token_ids)
    # vLLM decodes token by token, which shows half characters differently from every other engine.
    text = vocabulary.decode(ids[:-1] if choice.finish_reason == "stop" else ids)
    logprobs = None
    if choice.logprobs is not None:
        logprobs = tuple(min(0.0, at[i].logprob) for i, at in zip(ids, choice.logprobs, strict=True))
    return Generation(key=request.key, token_ids=ids, text=text, finish=choice.finish_reason, logprobs=logprobs)


def _vllm() -> Any:
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"the vllm engine needs vLLM, which is not installed here; it wants an environment of its own ({error})"
        ) from error
    return vllm
