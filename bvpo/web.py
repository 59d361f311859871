"""What every model server is told and believed, be it one that samples or one that judges.

In: addresses, keys, raw answers. Out: addresses without credentials, a key only where it belongs, texts without any part
of it, and JSON objects of bounded size or a :class:`BadAnswer`. It knows no prompts and loads the client on use.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any
from urllib.parse import quote, urlsplit

from bvpo.strict import UserError

OPENAI_URL = "https://api.openai.com/v1"
ADDRESS = "an address with http:// or https://, without a password or a query"
MOST_BYTES = 64 * 2**20  # of an answer: the longest responses with log-probabilities take a tenth
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PART = 8  # characters of a key that nobody repeats by chance
# What our own client says about itself and the request; all else comes from variables that were meant for OpenAI.
_OWN_HEADERS = ("host", "accept", "accept-encoding", "connection", "content-type", "content-length", "user-agent")


class BadAnswer(Exception):
    """A server answered, but not with what was asked for; the message is one line."""


# --- addresses and keys ----------------------------------------------------------------------------------------------


def is_address(url: str) -> bool:
    """Whether a server can be named so: what stands in an address is logged, so nothing secret may."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not set("@?#") & set(url)


def environment_url() -> str:
    """``OPENAI_BASE_URL``, checked; empty where it is not set."""
    url = os.environ.get("OPENAI_BASE_URL", "").strip()
    if url and not is_address(url):
        raise UserError(f"the environment variable OPENAI_BASE_URL: expected {ADDRESS}")
    return url


def named_key(variable: str, setting: str) -> str:
    """The key in the environment variable that a setting names."""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"{setting}: the environment variable {variable} is not set")
    return key


def is_openais(url: str) -> bool:
    """Whether ``OPENAI_API_KEY`` belongs to this address: OpenAI's own, or the one that OPENAI_BASE_URL names beside it."""
    own = environment_url()
    return _origin(url) == _origin(OPENAI_URL) or bool(own and _origin(url) == _origin(own))


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def redact(text: str, key: str | None) -> str:
    """The text without the key and without any part of it that is long enough to be one, also where it was encoded."""
    if not key:
        return text
    size = min(_PART, len(key))
    escaped = "".join(c if c.isalnum() else f"\\u{ord(c):04x}" for c in key)
    forms = {_lower(form) for form in (key, quote(key, safe=""), json.dumps(key)[1:-1], escaped)}
    parts = {form[i : i + size] for form in forms for i in range(len(form) - size + 1)}
    lower, out, done = _lower(text), [], 0
    for start in range(len(text) - size + 1):
        if lower[start : start + size] in parts:
            if start > done or not out:
                out += [text[done:start], "***"]
            done = start + size
    return "".join([*out, text[done:]])


def _lower(text: str) -> str:
    """Lower case of ASCII alone, so that no place moves."""
    return "".join(c.lower() if c.isascii() else c for c in text)


# --- the client ------------------------------------------------------------------------------------------------------


def http_client(url: str, key: str, total_s: float | None = None) -> Any:
    """The HTTP client for one server: it reads no more than :data:`MOST_BYTES` of an answer and waits for one no longer than
    ``total_s``, and sends the key and nothing else that the environment holds for another service."""
    import openai

    own = is_openais(url)

    class Client(openai.DefaultAsyncHttpxClient):
        async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            if not own:
                kept = (*_OWN_HEADERS, "authorization")
                for name in [n for n in request.headers if n not in kept and not n.startswith("x-stainless-")]:
                    del request.headers[name]
                request.headers["authorization"] = f"Bearer {key}"
            async with asyncio.timeout(total_s):
                response = await super().send(request, stream=True, **options)
                return response if stream else await _whole(response)

    # A proxy from the environment must not swallow calls to this machine.
    return Client(trust_env=urlsplit(url).hostname not in _LOOPBACK)


async def _whole(response: Any) -> Any:
    """The response, read; one beyond :data:`MOST_BYTES` is cut just above, which :func:`parse_object` refuses."""
    content = bytearray()
    try:
        async for chunk in response.aiter_bytes(2**16):
            content += chunk[: MOST_BYTES + 1 - len(content)]
            if len(content) > MOST_BYTES:
                break
    finally:
        await response.aclose()
    headers = [
        (n, v) for n, v in response.headers.multi_items() if n.lower() not in ("content-encoding", "content-length")
    ]
    request = response.request
    return type(response)(response.status_code, headers=headers, content=bytes(content), request=request)


# --- answers ---------------------------------------------------------------------------------------------------------


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object of an answer."""
    if len(raw) > MOST_BYTES:
        raise BadAnswer(f"more than {MOST_BYTES // 2**20} MB")
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise BadAnswer(f"not JSON: {show_short(raw[:60])}") from None
    if not isinstance(value, dict):
        raise BadAnswer(f"{show_short(value)}, expected a JSON object")
    return value


def only_choice(answer: dict[str, Any]) -> dict[str, Any]:
    """The one choice that was asked for."""
    choices = answer.get("choices")
    if not isinstance(choices, list):
        raise BadAnswer(f"choices is {show_short(choices)}, expected a list")
    if len(choices) != 1:
        raise BadAnswer(f"{len(choices)} choices, asked for 1")
    if not isinstance(choices[0], dict):
        raise BadAnswer(f"the choice is {show_short(choices[0])}, expected an object")
    return choices[0]


def usage_count(answer: dict[str, Any], name: str) -> int | None:
    """A token count of the answer's usage, where it has one."""
    usage = answer.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int else None


def show_short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
