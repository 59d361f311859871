"""A small HTTP server in vLLM's dialect over the embedded engine, which can also misbehave on purpose.

``CompletionsServer(engine)`` answers ``/v1/completions`` as vLLM does (token-id and text prompts, seeds ``seed + j`` for
choice j, stop tokens and strings, log-probabilities, token ids), ``/v1/chat/completions`` with the reasoning apart,
``/v1/models``, ``/version`` and ``/health``. ``traits`` are shortcomings it always has; ``script`` decides per completion
request (numbered from 0; -1 is any GET) on a fault. Standard library only, loopback only, at most ``most_requests``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from bvpo.engines.base import Engine, Generation, Request, Sampling
from bvpo.formats import FORMATS, render
from bvpo.records import Message

# What a server of this dialect knows; strict servers refuse the rest.
OPENAI_FIELDS = frozenset(
    (
        *("model", "prompt", "n", "seed", "max_tokens", "temperature", "top_p", "stream", "logprobs", "stop"),
        *("presence_penalty", "frequency_penalty"),
    )
)

TRAITS = frozenset(
    {
        "ignores_seed",  # every sample is new
        "constant_seed",  # all seeds are the same one
        "narrow_seeds",  # keeps 31 bits of a seed
        "busy_drift",  # other samples when several requests are open
        "ignores_n",
        "greedy",  # temperature is ignored
        "warm",  # temperature 0 is ignored
        "ignores_stop",
        "drops_stop_token",  # the ids end before the stop token
        "ignores_max_tokens",
        "ignores_top_k",
        "ignores_top_p",
        "no_ids",
        "no_logprobs",
        "tempered_logprobs",  # after temperature and truncation, as vLLM's processed_logprobs
        "adds_bos",  # in front of whatever comes
        "text_only",  # token-id prompts are refused
        "strict",  # unknown fields are refused with 422
        "other_vocabulary",  # the text does not fit the ids
        "no_usage",
        "chat_only",
        "mixed_reasoning",  # the chat answer holds the trace inside the content
        "old_reasoning_name",  # reasoning_content instead of reasoning
        "no_prefix",  # continue_final_message is ignored
        "spelled_ids",  # ids only as logprobs.tokens "token_id:N"
    }
)

Script = Callable[[int], str | None]


class CompletionsServer:
    """Serves until :meth:`stop`; ``url`` is its base URL. ``seen`` holds the bodies of completion requests, in order."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        *,
        traits: Sequence[str] = (),
        script: Script = lambda number: None,
        model: str = "tiny",
        key: str | None = None,
        format_name: str = "r1-distill",
        most_requests: int = 2000,
        retry_after: str = "0",
        port: int = 0,
        memory: dict[Any, Generation] | None = None,
    ) -> None:
        assert set(traits) <= TRAITS, set(traits) - TRAITS
        self.tokenizer, self.traits, self.script, self.model = tokenizer, frozenset(traits), script, model
        self.key, self.format, self.most_requests, self.retry_after = (
            key,
            FORMATS[format_name],
            most_requests,
            retry_after,
        )
        self.seen: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.open_requests = self.most_open = 0
        self.cut_off = 0  # answers that nobody waited for
        self.lock = threading.Lock()
        self.released = threading.Event()  # ends hanging requests
        self.connections: set[socket.socket] = set()
        self._work: queue.Queue[tuple[list[Request], queue.Queue[list[Generation]]] | None] = queue.Queue()
        self._engine = engine
        # Samples are a function of the request: a memory that tests share saves drawing the same ones again.
        self._memory = memory
        server = self
        handler = type("Handler", (_Handler,), {"owner": server})
        self._http = _Server(("127.0.0.1", port), handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._threads = [
            threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True),
            threading.Thread(target=self._sample, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> CompletionsServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if not self.released.is_set():
            self.released.set()
            self._leave()
        self._work.put(None)

    def die(self) -> None:
        """Close the door at once, as a killed process does; what is open breaks off."""
        self.released.set()
        self._http.socket.close()  # here: whoever connects after the first broken answer is refused
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        threading.Thread(target=self._leave, daemon=True).start()

    def _leave(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def sample(self, requests: list[Request]) -> list[Generation]:
        """Through the one thread that owns the engine, together with whatever else is waiting."""
        memory = {} if self._memory is None else self._memory
        missing = [r for r in requests if r not in memory]
        drawn: list[Generation] = []
        if missing:
            answer: queue.Queue[list[Generation]] = queue.Queue()
            self._work.put((missing, answer))
            drawn = answer.get()
        now = dict(zip(missing, drawn, strict=True))
        memory.update(now)
        return [now[r] if r in now else memory[r] for r in requests]

    def _sample(self) -> None:
        while True:
            item = self._work.get()
            if item is None:
                return
            items = [item]
            while not self._work.empty():
                if (more := self._work.get()) is None:
                    return
                items.append(more)
            numbered = [
                replace(r, key=f"{i}.{j}") for i, (requests, _) in enumerate(items) for j, r in enumerate(requests)
            ]
            done = {g.key: g for g in self._engine.generate(numbered)}
            for i, (requests, answer) in enumerate(items):
                answer.put([done[f"{i}.{j}"] for j in range(len(requests))])


class _Server(ThreadingHTTPServer):
    """A client that goes away, or an answer that breaks off because the server dies, is told nobody: its traceback would
    stand in the stderr of a test."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        dying = self.RequestHandlerClass.owner.released.is_set()  # type: ignore[attr-defined]
        if not (dying or isinstance(sys.exception(), OSError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection; requests of a kept-alive connection come one after another."""

    owner: CompletionsServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: two would wait 40 ms for each other
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.owner.connections.add(self.connection)

    def finish(self) -> None:
        self.owner.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        own = self.owner
        if own.released.is_set():
            return self._break_off()
        own.paths.append(self.path)
        if own.key is not None and self.headers.get("Authorization") != f"Bearer {own.key}":
            return self._error(401, f"Incorrect API key provided: {self.headers.get('Authorization')}")
        context = own._engine._plan.config.max_position_embeddings  # type: ignore[attr-defined]
        card = {"id": own.model, "object": "model", "root": "/models/tiny", "max_model_len": context}
        if own.script(-1) == "hang":
            own.released.wait(60)
            return self._break_off()
        answers = {
            "/v1/models": {"object": "list", "data": [card]},
            "/version": {"version": "0.0-test"},
            "/health": {},
        }
        if self.path in answers:
            return self._send(200, answers[self.path])
        return self._error(404, f"no {self.path}")

    def do_POST(self) -> None:
        own = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with own.lock:
            number = len(own.seen)
            own.seen.append(body)
            own.paths.append(self.path)
            own.open_requests += 1
            own.most_open = max(own.most_open, own.open_requests)
        try:
            if number >= own.most_requests:
                return self._error(400, "more requests than this test allows")
            if own.key is not None and self.headers.get("Authorization") != f"Bearer {own.key}":
                return self._error(401, f"Incorrect API key provided: {self.headers.get('Authorization')}")
            if own.released.is_set():
                return self._break_off()
            if not self._misbehave(own.script(number)):
                return None
            if self.path == "/v1/chat/completions":
                return self._chat(body)
            if self.path != "/v1/completions" or "chat_only" in own.traits:
                return self._error(404, f"no {self.path}")
            return self._complete(body, own.script(number))
        except (BrokenPipeError, ConnectionResetError):
            own.cut_off += 1
        finally:
            with own.lock:
                own.open_requests -= 1

    def _misbehave(self, fault: str | None) -> bool:
        """False: the request is dealt with."""
        own = self.owner
        if fault in ("429", "503"):
            self._error(int(fault), "too many requests", {"Retry-After": own.retry_after} if own.retry_after else {})
        elif fault == "500":
            self._error(500, "internal error")
        elif fault == "garbage":
            self._raw(200, b"<html>gateway</html>")
        elif fault == "half":
            self._raw(200, b'{"choices": [{"te', length=4000)
            self._break_off()
        elif fault == "die":
            own.die()
            self._break_off()
        elif fault == "drop":
            self._break_off()
        elif fault == "late_drop":
            time.sleep(0.3)
            self._break_off()
        elif fault == "hang":
            own.released.wait(60)
            self._break_off()
        elif fault == "slow":
            time.sleep(0.3)
            return True
        else:
            return True
        return False

    def _complete(self, body: dict[str, Any], fault: str | None) -> None:
        own, traits = self.owner, self.owner.traits
        unknown = set(body) - OPENAI_FIELDS
        if "strict" in traits and unknown:
            return self._error(422, f"Unexpected fields in the request: {sorted(unknown)}")
        prompt = body["prompt"]
        if not isinstance(prompt, str) and "text_only" in traits:
            return self._error(400, "prompt must be a string.")
        ids = self._prompt_ids(body, prompt)
        if len(ids) >= 1024:
            return self._error(400, f"Input length ({len(ids)}) exceeds model's maximum context length (1024).")
        count = 1 if "ignores_n" in traits else body.get("n", 1)
        requests = [self._request(body, ids, j) for j in range(count)]
        generations = own.sample(requests)
        choices = [self._choice(body, ids, j, g) for j, g in enumerate(generations)]
        new_tokens = sum(len(g.token_ids) for g in generations)
        usage = {"prompt_tokens": len(ids), "completion_tokens": new_tokens, "total_tokens": len(ids) + new_tokens}
        answer = {"id": "cmpl-1", "object": "text_completion", "model": own.model, "choices": choices, "usage": usage}
        if "no_usage" in traits:
            del answer["usage"]
        _spoil(answer, fault)
        return self._send(200, answer)

    def _prompt_ids(self, body: dict[str, Any], prompt: str | list[int]) -> list[int]:
        tokenizer, traits = self.owner.tokenizer, self.owner.traits
        known = "strict" not in traits and body.get("add_special_tokens") is False and "text_only" not in traits
        ids = tokenizer.encode(prompt, add_special_tokens=not known) if isinstance(prompt, str) else list(prompt)
        return [tokenizer.bos_token_id, *ids] if "adds_bos" in traits else ids

    def _request(self, body: dict[str, Any], ids: list[int], choice: int) -> Request:
        own, traits = self.owner, self.owner.traits
        seed = body.get("seed", 0) + choice
        if "narrow_seeds" in traits:
            seed %= 2**31
        if "constant_seed" in traits:
            seed = 1
        if "ignores_seed" in traits:
            seed = time.monotonic_ns()
        if "busy_drift" in traits:
            time.sleep(0.05)
            seed += time.monotonic_ns() if own.open_requests > 1 else 0
        temperature = 0.0 if "greedy" in traits else body["temperature"]
        if "warm" in traits:
            temperature = max(temperature, 0.7)
        stop = () if "ignores_stop" in traits else tuple(body.get("stop_token_ids", ()))
        params = Sampling(
            max_new_tokens=body["max_tokens"] + 3 * ("ignores_max_tokens" in traits),
            temperature=temperature,
            top_p=1.0 if "ignores_top_p" in traits else body["top_p"],
            top_k=0 if "ignores_top_k" in traits else max(0, body.get("top_k", 0)),
            stop_token_ids=stop,
        )
        return Request(key="", prompt_ids=tuple(ids), seed=seed, params=params)

    def _choice(self, body: dict[str, Any], prompt: list[int], index: int, generation: Generation) -> dict[str, Any]:
        own, traits = self.owner, self.owner.traits
        assert generation.error is None, generation.error
        ids, text, finish = list(generation.token_ids), generation.text, generation.finish
        logprobs = list(generation.logprobs or ())
        for stop in body.get("stop", ()):  # strings: cut at the first one
            if stop in text:
                text, finish = text[: text.index(stop)], "stop"
        if "drops_stop_token" in traits and finish == "stop":
            ids, logprobs = ids[:-1], logprobs[:-1]
        if "other_vocabulary" in traits:
            text = text.swapcase() + "?"
        if "tempered_logprobs" in traits:
            logprobs = [x / max(body["temperature"], 0.1) for x in logprobs]
        plain = "strict" in traits or "no_ids" in traits
        eos = own.tokenizer.eos_token_id
        choice: dict[str, Any] = {"index": index, "text": text, "finish_reason": finish, "logprobs": None}
        choice["stop_reason"] = ids[-1] if ids and finish == "stop" and ids[-1] != eos else None
        if body.get("logprobs") is not None and "no_logprobs" not in traits:
            spelled = body.get("return_tokens_as_token_ids") and not plain
            tokens = [f"token_id:{i}" if spelled else own.tokenizer.decode([i]) for i in ids]
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": []}
        if body.get("return_token_ids") and not plain and "spelled_ids" not in traits:
            choice["token_ids"], choice["prompt_token_ids"] = ids, prompt
        return choice

    def _chat(self, body: dict[str, Any]) -> None:
        """The trace view with the reasoning apart; a continued assistant turn if it is asked for."""
        own, fmt = self.owner, self.owner.format
        messages = [Message(role=m["role"], content=m["content"]) for m in body["messages"]]
        prefix, asked = "", messages[-1].role == "assistant"
        if messages[-1].role == "assistant":
            prefix = messages.pop().content
            if "no_prefix" in own.traits or not body.get("continue_final_message"):
                prefix = ""
        text = fmt.unopened(render(own.tokenizer, fmt, messages, "trace"), "trace") + prefix
        if not prefix:
            text = render(own.tokenizer, fmt, messages, "trace")
        ids = own.tokenizer.encode(text, add_special_tokens=False)
        generation = own.sample([self._request(body, ids, 0)])[0]
        # A random model never closes a trace: the first half of what it says counts as the trace.
        half = len(generation.text) // 2
        reasoning, content = generation.text[:half], generation.text[half:]
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if "mixed_reasoning" in own.traits:
            message["content"] = f"{reasoning}</think>{content}"
        elif asked:  # without the prefix it looks the same: only the count of prompt tokens tells
            message["content"] = generation.text
        else:
            name = "reasoning_content" if "old_reasoning_name" in own.traits else "reasoning"
            message[name] = reasoning
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(generation.token_ids)}
        choice = {"index": 0, "message": message, "finish_reason": generation.finish}
        return self._send(200, {"id": "chatcmpl-1", "model": own.model, "choices": [choice], "usage": usage})

    def _send(self, status: int, answer: Any) -> None:
        self._raw(status, json.dumps(answer).encode())

    def _error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        error = {"message": message, "type": "error", "param": None, "code": status}
        self._raw(status, json.dumps({"error": error}).encode(), headers=headers)

    def _raw(self, status: int, data: bytes, length: int | None = None, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def _break_off(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def _spoil(answer: dict[str, Any], fault: str | None) -> None:
    """Damage an answer that is otherwise right."""
    choice = answer["choices"][0]
    if fault == "no_choice":
        answer["choices"] = []
    elif fault == "two_choices":
        answer["choices"] = [choice, dict(choice, index=1)]
    elif fault == "no_ids":
        choice["token_ids"] = choice["logprobs"] = None
    elif fault == "other_finish":
        choice["finish_reason"] = "abort"
    elif fault == "id_out_of_range":
        choice["token_ids"], choice["logprobs"] = [10**9, *choice["token_ids"][1:]], None
    elif fault == "nan_logprob":
        choice["logprobs"]["token_logprobs"][0] = float("nan")
    elif fault == "short_logprobs":
        choice["logprobs"] = {"tokens": ["a"], "token_logprobs": [-1.0]}
    elif fault == "wrong_count":
        answer["usage"]["completion_tokens"] += 1
    elif fault == "list":
        answer.clear()
    elif fault == "text_is_number":
        choice["text"] = 3
    elif fault == "other_prompt":
        choice["prompt_token_ids"] = choice["prompt_token_ids"][1:]
    elif fault == "early_length":
        choice["finish_reason"] = "length"
        choice["token_ids"], choice["logprobs"] = choice["token_ids"][:1], None
        answer["usage"]["completion_tokens"] = 1


def fault_at(*numbers: int, fault: str) -> Script:
    """A script with one fault at these requests."""
    return lambda number: fault if number in numbers else None


def always(fault: str, after: int = 0) -> Script:
    """A script with one fault at every request from number ``after`` on."""
    return lambda number: fault if number >= after else None


def sometimes(fault: str, share: float, after: int = 0) -> Script:
    """A script with one fault at a fixed, scattered share of the requests."""

    def script(number: int) -> str | None:
        digest = hashlib.blake2b(str(number).encode(), digest_size=4).digest()
        return fault if number >= after and int.from_bytes(digest, "big") < share * 2**32 else None

    return script
