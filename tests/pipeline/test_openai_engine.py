"""The HTTP engine against a real HTTP server: samples equal the embedded engine's, and no fault loses or invents one."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from itertools import islice, pairwise
from pathlib import Path

import pytest
from http_fixtures import QUICK, by_key, connected, requests, server, tiny_engine
from models_fixtures import tiny_tokenizer
from servers.completions_server import always, fault_at, sometimes

from bvpo.engines.base import Request, Sampling, create_engine
from bvpo.engines.http.endpoints import EndpointsLost, RetryPolicy, api_key, base_url, retry_after
from bvpo.engines.http.engine import create
from bvpo.strict import UserError


@cache
def _expected(batch):
    return by_key(list(tiny_engine().generate(batch)))


def expected(batch):
    """What the engine behind the servers gives without HTTP."""
    return _expected(tuple(batch))


@pytest.fixture(scope="module")
def shared():
    """One server and one engine that has passed its preflight, for tests that break neither for good."""
    http = server(most_requests=20_000, fresh=True)
    with connected([http], max_attempts=3) as engine:
        engine.preflight()
        yield http, engine


@pytest.fixture
def pair(shared):
    """The shared server and engine, and the number of the next request."""
    http, engine = shared
    http.most_open = 0
    yield http, engine, len(http.seen)
    http.script = lambda number: None


# ---------------------------------------------------------------------------------------------------------------------
# the same samples


def test_the_server_gives_what_the_engine_behind_it_gives(pair):
    """Mutations: send the seed plus one; leave top_p, top_k or stop_token_ids out of the body; drop the stop token."""
    plain, cut, stopping = (
        requests(6),
        requests(6, top_p=0.7, top_k=9),
        requests(9, tokens=24, stop_token_ids=(7, 40, 90, 201)),
    )
    batch = [
        Request(key=f"{name}-{r.key}", prompt_ids=r.prompt_ids, seed=r.seed, params=r.params)
        for name, some in (("plain", plain), ("cut", cut), ("stopping", stopping))
        for r in some
    ]
    found = by_key(list(pair[1].generate(batch)))
    want = expected(batch)
    assert found.keys() == want.keys()
    for key, generation in want.items():
        assert found[key].token_ids == generation.token_ids, key
        assert (found[key].text, found[key].finish, found[key].error) == (generation.text, generation.finish, None)
        assert found[key].logprobs == pytest.approx(generation.logprobs, abs=1e-4)
    assert {g.finish for g in found.values()} == {"stop", "length"}


def test_the_same_with_one_or_two_endpoints_and_whatever_is_in_flight():
    """Mutations: make the sent seed depend on the endpoint or on the number of open requests; never use the second one."""
    batch = requests(30)
    first, second = server(fresh=True), server(fresh=True)
    with connected([first, second]) as engine:
        two = by_key(list(engine.generate(batch)))
        shares = [len(s.seen) for s in (first, second)]
    with connected([server(fresh=True)], concurrency=3) as engine:
        one = by_key(list(engine.generate(batch)))
        alone = list(engine.generate(batch[17:18]))
    assert one == two
    assert alone[0].token_ids == one["k17"].token_ids
    assert min(shares) >= 10 + 20, shares  # 26 or so of them are preflight


def test_every_parameter_is_spelled_out(pair):
    """A server fills what is left out from generation_config.json. Mutation: leave a field out when it is off."""
    http, engine, _ = pair
    list(engine.generate(requests(1, tokens=5, temperature=0.8)))
    body = http.seen[-1]
    off = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert (off | {"presence_penalty": 0.0, "frequency_penalty": 0.0}).items() <= body.items()
    assert (body["n"], body["seed"], body["temperature"], body["max_tokens"]) == (1, 10**12, 0.8, 5)
    assert body["skip_special_tokens"] is False and body["add_special_tokens"] is False


# ---------------------------------------------------------------------------------------------------------------------
# streaming, concurrency, stopping


def test_results_come_as_they_finish_and_an_early_end_cancels_the_rest():
    """Mutations: yield in request order; do not cancel open requests when the caller stops."""
    http = server()
    with connected([http], concurrency=4, timeout_s=600.0) as engine:
        engine.preflight()
        http.script = lambda number: "hang" if number >= 0 and http.seen[number]["seed"] == 10**12 else None
        stream = engine.generate(requests(12))
        first = [next(stream).key for _ in range(11)]
        assert "k0" not in first and len(set(first)) == 11
        stream.close()
        deadline = time.monotonic() + 30
        while engine._pool.endpoints[0].in_flight and time.monotonic() < deadline:  # type: ignore[union-attr]
            time.sleep(0.01)
        assert engine._pool.endpoints[0].in_flight == 0  # type: ignore[union-attr]
        again = list(engine.generate(requests(3)[1:]))
        assert {g.finish for g in again} == {"length"}


def test_concurrency_and_lookahead_are_bounded():
    """Mutations: ignore ``concurrency``; pull all requests before the first answer."""
    http = server()
    pulled = 0

    def counted():
        nonlocal pulled
        for request in requests(40):
            pulled += 1
            yield request

    with connected([http], concurrency=5) as engine:
        engine.preflight()
        http.most_open = 0
        stream = engine.generate(counted())
        list(islice(stream, 3))
        assert pulled <= 5 + 3
        list(stream)
        assert pulled == 40
        assert 2 <= http.most_open <= 5


_INTERRUPTED = """
import sys
sys.path[:0] = {path!r}
from bvpo.engines.base import Request, Sampling
from bvpo.engines.http.engine import create
engine = create(endpoints={url!r})
engine.preflight()
print("ready", flush=True)
try:
    list(engine.generate([Request(key="a", prompt_ids=(1, 2, 3), seed=1, params=Sampling(max_new_tokens=4))]))
except KeyboardInterrupt:
    engine.close()
    print("interrupted", flush=True)
"""


def test_ctrl_c_ends_it_at_once(tmp_path: Path):
    """Mutation: wait for results in a way that signals cannot interrupt (a lock held by the loop's thread)."""
    http = server()
    http.script = lambda number: "hang" if number >= 0 and http.seen[number]["prompt"] == [1, 2, 3] else None
    path = [p for p in sys.path if p.endswith(("/tests",)) or p == os.getcwd()] + [os.getcwd()]
    program = tmp_path / "run.py"
    program.write_text(_INTERRUPTED.format(path=path, url=http.url))
    process = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 60
        while http.open_requests == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "interrupted\n"
        assert process.wait(60) == 0
        assert time.monotonic() - began < 60  # the hung request would take its whole timeout
    finally:
        process.kill()
        http.stop()


# ---------------------------------------------------------------------------------------------------------------------
# faults

TRANSIENT = (
    *("429", "503", "500", "garbage", "half", "drop", "no_choice", "two_choices", "no_ids", "other_finish"),
    *("id_out_of_range", "nan_logprob", "short_logprobs", "wrong_count", "list", "text_is_number", "other_prompt"),
    "early_length",
)


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_passing_fault_changes_nothing(pair, fault: str):
    """Mutations: accept the damaged answer (any check of ``Wire.read``); give up at once; another seed on retry."""
    http, engine, start = pair
    batch = requests(6, tokens=6)
    http.script = fault_at(start, start + 3, start + 6, fault=fault)
    found = by_key(list(engine.generate(batch)))
    assert {k: g.token_ids for k, g in found.items()} == {k: g.token_ids for k, g in expected(batch).items()}
    assert len(http.seen) - start == 9


VERDICTS = {
    "500": "HTTP 500: internal error",
    "garbage": "not JSON: b'<html>gateway</html>'",
    "no_choice": "0 choices, asked for 1",
    "two_choices": "2 choices, asked for 1",
    "no_ids": "no token ids",
    "other_finish": "finish_reason is 'abort'",
    "id_out_of_range": "token id 1000000000 is outside the vocabulary",
    "nan_logprob": "log-probability nan",
    "short_logprobs": "1 log-probabilities for 12 tokens",
    "wrong_count": "counts 13 new tokens and returns 12",
    "other_prompt": "read other prompt tokens",
    "early_length": "finish_reason is length after 1 of 12 tokens",
}


@pytest.mark.parametrize("fault", VERDICTS)
def test_a_lasting_fault_is_a_verdict_for_the_request_it_hits(pair, fault: str):
    """Mutations: raise instead of yielding an error generation; keep ids of a failed one; lose the reason."""
    http, engine, start = pair
    batch = requests(3)
    http.script = lambda number: fault if number >= start and http.seen[number]["seed"] == batch[1].seed else None
    found = by_key(list(engine.generate(batch)))
    assert sum(body["seed"] == batch[1].seed for body in http.seen[start:]) == 3
    assert [found[k].finish for k in ("k0", "k2")] == ["length", "length"]
    failed = found["k1"]
    assert (failed.finish, failed.token_ids, failed.text) == ("error", (), "")
    assert failed.error is not None and VERDICTS[fault] in failed.error and "\n" not in failed.error


def test_rubbish_for_everyone_ends_the_run_instead_of_failing_every_request():
    """Mutation: no limit on unusable answers in a row (then 100,000 error records)."""
    http = server()
    with connected([http]) as engine:
        start = engine.preflight() and len(http.seen)
        http.script = always("garbage", after=start)
        with pytest.raises(EndpointsLost, match=r"32 unusable answers in a row.*not JSON.*requests were not answered"):
            list(engine.generate(requests(60)))
        assert len(http.seen) - start <= 32 + 64


def test_a_refused_request_is_not_sent_again(pair):
    """Mutations: retry 4xx; end the run for one request that is too long."""
    http, engine, start = pair
    long = Request(key="long", prompt_ids=(5,) * 1100, seed=1, params=Sampling(max_new_tokens=4))
    found = by_key(list(engine.generate([long, *requests(2)])))
    assert len(http.seen) - start == 3
    assert found["long"].error is not None and "HTTP 400: Input length (1100) exceeds" in found["long"].error
    assert found["k0"].error is None


def test_retry_after_is_honoured_by_all_requests_to_the_endpoint():
    """Mutations: ignore Retry-After; make only the request that got the 429 wait."""
    http = server(retry_after="0.4")
    times: list[float] = []
    with connected([http], concurrency=2) as engine:
        start = engine.preflight() and len(http.seen)

        def script(number: int) -> str | None:
            if number >= start:
                times.append(time.monotonic())
            return "429" if number == start else None

        http.script = script
        found = by_key(list(engine.generate(requests(6))))
    assert {g.error for g in found.values()} == {None}
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert max(pauses) >= 0.38, pauses


def test_an_endpoint_that_dies_midway_hands_its_work_over(caplog: pytest.LogCaptureFixture):
    """Mutations: never put an endpoint aside; lose the requests that were open on it; let the other one have them all at
    once."""
    dying, staying = server(), server()
    batch = requests(40)
    with (
        connected([dying, staying], concurrency=4, retry_base_s=0.001) as engine,
        caplog.at_level(logging.WARNING),
    ):
        start = engine.preflight() and len(dying.seen)
        dying.script = fault_at(start + 6, fault="die")
        staying.script = fault_at(*range(start + 20, start + 24), fault="slow")
        staying.most_open = 0
        found = by_key(list(engine.generate(batch)))
    assert {k: g.token_ids for k, g in found.items()} == {k: g.token_ids for k, g in expected(batch).items()}
    assert f"{dying.url} is put aside" in caplog.text
    assert staying.most_open <= 4


def test_many_calls_broken_off_at_once_are_one_sign_of_trouble():
    """Mutation: count every broken call instead of every round (a hiccup of the network then ends the run)."""
    http = server()
    batch = requests(12)
    with connected([http], concurrency=12) as engine:
        start = engine.preflight() and len(http.seen)
        http.script = fault_at(*range(start, start + 12), fault="late_drop")
        found = by_key(list(engine.generate(batch)))
    assert {k: g.token_ids for k, g in found.items()} == {k: g.token_ids for k, g in expected(batch).items()}


def test_when_all_endpoints_are_dead_it_says_so_and_loses_nothing():
    """Mutations: yield error generations for unanswered requests; swallow answers that came before."""
    batch = requests(40)
    servers = [server(), server()]
    answered = {}
    with connected(servers, concurrency=4) as engine:
        engine.preflight()
        for each in servers:
            each.script = fault_at(len(each.seen) + 6, fault="die")
        with pytest.raises(EndpointsLost) as caught:
            for generation in engine.generate(batch):
                answered[generation.key] = generation
    message = str(caught.value)
    assert all(s.url in message for s in servers) and "\n" not in message
    assert "run again to go on" in message
    assert 6 <= len(answered) < 40
    assert {g.error for g in answered.values()} == {None}
    with connected([server()]) as engine:
        rest = by_key(list(engine.generate([r for r in batch if r.key not in answered])))
    assert {k: g.token_ids for k, g in (answered | rest).items()} == {
        k: g.token_ids for k, g in expected(batch).items()
    }


def test_a_hanging_server_is_found_out_and_replaced():
    """Mutations: no timeout; wait out several timeouts although the server's list of models is silent too."""
    hanging, staying = server(), server()
    batch = requests(12)
    with connected([hanging, staying], concurrency=2) as engine:
        start = engine.preflight() and len(hanging.seen)
        engine._pool.endpoints[0]._policy = RetryPolicy(timeout_s=0.5, probe_timeout_s=0.3, base_s=0.01)  # type: ignore[union-attr]
        hanging.script = always("hang", after=-1)
        found = by_key(list(engine.generate(batch)))
        assert len(hanging.seen) - start <= 2, "each of its two places waited for once"
    assert {k: g.token_ids for k, g in found.items()} == {k: g.token_ids for k, g in expected(batch).items()}


def test_a_server_that_only_hangs_on_some_requests_is_not_given_up():
    """Mutation: put an endpoint aside at the first timeout."""
    http = server()
    batch = requests(12)
    with connected([http], concurrency=4) as engine:
        start = engine.preflight() and len(http.seen)
        engine._pool.endpoints[0]._policy = RetryPolicy(timeout_s=1.0, probe_timeout_s=60.0, base_s=0.01)  # type: ignore[union-attr]
        http.script = fault_at(start, start + 5, fault="hang")
        found = by_key(list(engine.generate(batch)))
    assert {k: g.token_ids for k, g in found.items()} == {k: g.token_ids for k, g in expected(batch).items()}


@pytest.mark.slow
def test_a_bad_network_all_the_way():
    """A quarter of all answers is lost, each in another way. Mutation: any unsafe step of the retry loop."""
    faults = ("500", "half", "drop", "garbage", "429")
    batch = requests(60)
    servers = [server(), server()]
    with connected(servers, concurrency=8, max_attempts=20) as engine:
        engine.preflight()
        for salt, each in enumerate(servers):
            scripts = [sometimes(fault, 0.05, after=len(each.seen)) for fault in faults]
            each.script = lambda number, scripts=scripts, salt=salt: next(
                (f for i, s in enumerate(scripts) if number >= 0 and (f := s(number * 31 + i * 1009 + salt * 77))), None
            )
        found = by_key(list(engine.generate(batch)))
    assert {k: g.token_ids for k, g in found.items()} == {k: g.token_ids for k, g in expected(batch).items()}


# ---------------------------------------------------------------------------------------------------------------------
# keys, identity, estimates, settings


def test_the_key_comes_from_the_environment_and_is_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Mutations: log or fingerprint the key; repeat a server's complaint that quotes it; take a key nobody named."""
    secret = "sk-very-secret-123"
    monkeypatch.setenv("MY_KEY", secret)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    caplog.set_level(logging.DEBUG)
    with connected([server(key=secret)], api_key_env="MY_KEY") as engine:
        assert len(list(engine.generate(requests(2)))) == 2
        shown = [str(engine.fingerprint()), repr(engine), repr(engine._settings)]
    monkeypatch.setenv("MY_KEY", secret + "-old")
    with (
        connected([server(key=secret)], api_key_env="MY_KEY") as engine,
        pytest.raises(EndpointsLost, match="401") as caught,
    ):
        engine.preflight()
    shown += [str(caught.value), caplog.text]
    assert not any(secret in text for text in shown)
    with connected([server(key=secret)]) as engine, pytest.raises(EndpointsLost, match="401") as caught:
        engine.preflight()
    assert "sk-of-another-service" not in str(caught.value)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UserError, match="MY_KEY"):
        api_key("MY_KEY")


def test_the_fingerprint_names_the_weights_and_not_the_address():
    """Mutations: put URLs into the fingerprint; leave out what the preflight drew."""
    prints = []
    for seed in (0, 0, 1):
        with connected([server(seed=seed)]) as engine:
            prints.append(engine.fingerprint())
    assert prints[0] == prints[1]
    assert prints[2] != prints[0]
    assert "127.0.0.1" not in str(prints)


def test_the_rate_is_measured_on_what_was_sent_first():
    """Mutation: estimate before anything was measured."""
    with connected([server()]) as engine:
        before = engine.estimate(requests(10))
        assert before.seconds is None and before.most_new_tokens == 120
        list(engine.generate(requests(10)))
        after = engine.estimate(requests(100))
    assert after.new_tokens == 1200 and after.seconds is not None and 0 < after.seconds < 60
    assert "first 10 requests" in after.line()


def test_it_is_registered_and_strict_about_options():
    """Mutations: forget the registry line; accept an unknown option, address, check or choice."""
    engine = create_engine("openai", {"endpoints": ["http://127.0.0.1:1"], "model": "m"})
    engine.close()
    for options, message in (
        ({"endpoints": []}, "at least one address"),
        ({"endpoints": ["http://a:1", "http://a:1/v1/"]}, "appears twice"),
        ({"endpoints": "http://a:1", "allow": ["same_sed"]}, "did you mean 'same_seed'"),
        ({"endpoints": "http://a:1", "allow": ["stop"]}, "cannot be waived"),
        ({"endpoints": "http://a:1", "dialect": "vlm"}, "did you mean 'vllm'"),
        ({"endpoints": "http://a:1", "api": "chat"}, "set tokenizer"),
        ({"endpoints": "http://a:1", "timeout_s": 0.0}, "timeout_s"),
        ({"endpoints": "http://a:1", "concurency": 3}, "did you mean 'concurrency'"),
    ):
        with pytest.raises(UserError, match=message):
            create_engine("openai", options)


def test_addresses():
    """Mutations: double /v1; accept credentials in the address."""
    assert base_url("http://127.0.0.1:8000") == base_url("http://127.0.0.1:8000/v1/") == "http://127.0.0.1:8000/v1"
    assert base_url("https://api.example.org/openai/v1") == "https://api.example.org/openai/v1"
    for bad in ("127.0.0.1:8000", "ftp://a", "http://"):
        with pytest.raises(UserError, match="expected an address"):
            base_url(bad)
    with pytest.raises(UserError, match="expected an address") as caught:
        base_url("http://me:hunter2@host:1/v1")
    assert "hunter2" not in str(caught.value)


def test_waits_grow_are_bounded_and_repeatable():
    """Mutations: no cap; jitter from a global random source; ignore a date in Retry-After."""
    policy = RetryPolicy(base_s=1.0, cap_s=8.0)
    waits = [policy.wait("key", attempt) for attempt in range(1, 40)]
    assert all(full / 2 <= wait <= full for wait, full in zip(waits, [1, 2, 4, *[8] * 36], strict=True))
    assert waits == [RetryPolicy(base_s=1.0, cap_s=8.0).wait("key", attempt) for attempt in range(1, 40)]
    assert policy.wait("key", 5) != policy.wait("other", 5)
    assert retry_after({"retry-after": "7"}, 0.0) == 7
    assert retry_after({"retry-after-ms": "250"}, 0.0) == 0.25
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, 20.0) == 40
    assert retry_after({"retry-after": "soon"}, 0.0) is None


def test_closing_ends_its_thread():
    """Mutation: leave the event loop running."""
    engine = create(endpoints="http://127.0.0.1:9", model="m", **QUICK)
    before = set(threading.enumerate())
    with pytest.raises(EndpointsLost, match="cannot connect"):
        engine.preflight()
    assert len(set(threading.enumerate()) - before) >= 1
    engine.close()
    assert not any(t.name == "bvpo-http" for t in set(threading.enumerate()) - before)


def test_a_prompt_that_does_not_start_with_bos_is_sent_as_it_is(pair):
    """Mutation: put a BOS before every prompt."""
    bos = tiny_tokenizer().bos_token_id
    request = Request(key="a", prompt_ids=(30, 31, 32), seed=3, params=Sampling(max_new_tokens=6))
    assert bos not in request.prompt_ids
    http, engine, _ = pair
    found = list(engine.generate([request]))
    assert http.seen[-1]["prompt"] == [30, 31, 32]
    assert found[0].token_ids == expected([request])["a"].token_ids
