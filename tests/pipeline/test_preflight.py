"""The preflight against servers that each fall short in one way: every shortcoming is found, named and acted upon."""

from __future__ import annotations

import logging

import pytest
from http_fixtures import by_key, connected, requests, server, tiny_engine, tokenizer_folder
from models_fixtures import tiny_tokenizer

from bvpo.engines.base import Request, Sampling
from bvpo.engines.http.chat import ChatRequest
from bvpo.engines.http.checks import CHECKS, Policy
from bvpo.engines.http.endpoints import EndpointsLost
from bvpo.formats import FORMATS, view_prompt
from bvpo.records import Message
from bvpo.strict import UserError

TALK = (Message(role="user", content="Say hi."),)


def outcomes(engine):
    (report,) = engine.preflight().reports.values()
    return {f.check: f.outcome for f in report.findings}


def test_a_capable_server_passes_everything_with_few_requests():
    """Mutations: any check that fails on a right server; caps that promise less than was seen; an endless preflight."""
    with connected([http := server(fresh=True)]) as engine:
        found = outcomes(engine)
        caps = engine.caps
        assert len(http.seen) <= 30
        assert max(body["max_tokens"] for body in http.seen) <= 16
        list(engine.generate(requests(2)))
        assert len(http.seen) <= 32, "the preflight runs once"
    chat_only = {"reasoning_apart", "prefix", "agreement"}
    assert found == dict.fromkeys(CHECKS.keys() - chat_only, "ok")
    assert caps.token_prompts and caps.seed and caps.logprobs and caps.batch_invariant


REFUSED = {
    "ignores_seed": "same_seed",
    "constant_seed": "temperature",
    "greedy": "temperature",
    "warm": "greedy",
    "ignores_stop": "stop",
    "drops_stop_token": "stop",
    "ignores_max_tokens": "preflight",
    "no_ids": "token_ids",
    "other_vocabulary": "vocabulary",
    "chat_only": "prompt_tokens",
}


@pytest.mark.parametrize("trait", REFUSED)
def test_an_incapable_server_is_refused(trait: str):
    """Mutations: drop the check; downgrade instead of refusing; refuse without naming the reason."""
    with connected([server(trait)]) as engine:
        with pytest.raises(UserError, match=REFUSED[trait]) as caught:
            engine.preflight()
        with pytest.raises(UserError):
            list(engine.generate(requests(1)))
    assert "\n" not in str(caught.value)
    assert engine._settings.endpoints[0] in str(caught.value)


DOWNGRADED = {
    "busy_drift": "concurrency",
    "ignores_n": "n",
    "no_logprobs": "logprobs",
    "tempered_logprobs": "logprobs",
    "ignores_top_k": "top_k",
    "narrow_seeds": "wide_seeds",
}


@pytest.mark.parametrize("trait", DOWNGRADED)
def test_a_lesser_shortcoming_is_told_and_worked_around(trait: str, caplog: pytest.LogCaptureFixture):
    """Mutations: drop the check; downgrade silently; promise in ``caps`` what failed; use what failed all the same."""
    check = DOWNGRADED[trait]
    with connected([http := server(trait)]) as engine, caplog.at_level(logging.WARNING):
        found = outcomes(engine)
        generations = by_key(list(engine.generate(requests(3))))
        (cut,) = engine.generate(requests(1, top_k=5))
        caps, body = engine.caps, http.seen[-1]
    assert [name for name, outcome in found.items() if outcome != "ok"] == [check]
    assert found[check] == "downgraded" and f" {check}: " in caplog.text
    assert {g.error for g in generations.values()} == {None}
    assert caps.logprobs == (check != "logprobs") == (generations["k0"].logprobs is not None)
    assert caps.batch_invariant == (check != "concurrency")
    assert (cut.error is None) == (check != "top_k")
    if check == "wide_seeds":
        assert body["seed"] < 2**31


def test_the_user_may_waive_or_insist():
    """Mutations: ignore ``allow`` or ``require``; waive what cannot be waived."""
    with connected([server("ignores_seed")], allow=["same_seed"]) as engine:
        assert outcomes(engine)["same_seed"] == "downgraded"
        assert not engine.caps.seed and not engine.caps.batch_invariant
        assert engine.fingerprint()["drawn"] == []
    with connected([server("no_logprobs")], require=["logprobs"]) as engine, pytest.raises(UserError, match="logprobs"):
        engine.preflight()
    for name, check in CHECKS.items():
        if check.may_allow:
            assert Policy(allow=(name,)).finding(name, "it fails").outcome == "downgraded"
            assert Policy(require=(name,)).finding(name, "it fails").outcome == "refused"
        else:
            with pytest.raises(UserError, match="cannot be waived"):
                Policy(allow=(name,))


# ---------------------------------------------------------------------------------------------------------------------
# ways of asking


def test_a_second_bos_is_noticed():
    """A server that puts a BOS before whatever comes. Mutations: no count of prompt tokens; give up where text without our
    own BOS would be read rightly."""
    with (
        connected([server("adds_bos")], prompts="ids") as engine,
        pytest.raises(UserError, match=r"read 60 prompt tokens, sent 59"),
    ):
        engine.preflight()
    with connected([http := server("adds_bos")]) as engine:
        found = by_key(list(engine.generate(requests(3))))
        assert isinstance(http.seen[-1]["prompt"], str) and "<｜begin" not in http.seen[-1]["prompt"]
        (other,) = engine.generate([Request(key="b", prompt_ids=(30, 31), seed=1, params=Sampling(max_new_tokens=3))])
    want = by_key(list(tiny_engine().generate(requests(3))))
    assert {k: g.token_ids for k, g in found.items()} == {k: g.token_ids for k, g in want.items()}
    assert "this prompt has none" in (other.error or "")


def test_text_prompts_get_one_bos_and_give_the_same_samples():
    """A server that takes text only and puts a BOS before it. Mutations: do not strip ours; strip it for servers that add
    none; report prompts as token ids."""
    batch = requests(4)
    with connected([http := server("text_only")]) as engine:
        assert not engine.caps.token_prompts and engine.caps.seed
        found = by_key(list(engine.generate(batch)))
        assert all(isinstance(body["prompt"], str) for body in http.seen[-4:])
    want = by_key(list(tiny_engine().generate(batch)))
    assert {k: g.token_ids for k, g in found.items()} == {k: g.token_ids for k, g in want.items()}
    with connected([http := server()], prompts="text") as engine:
        kept = by_key(list(engine.generate(batch)))
        assert http.seen[-1]["prompt"].startswith(tiny_tokenizer().bos_token)
    assert {k: g.token_ids for k, g in kept.items()} == {k: g.token_ids for k, g in want.items()}


def test_a_prompt_that_does_not_survive_as_text_is_refused():
    """Mutation: send the text without encoding it again."""
    tokenizer = tiny_tokenizer()
    whole = tokenizer.encode("think", add_special_tokens=False)
    letters = [tokenizer.convert_tokens_to_ids(c) for c in "think"]
    assert len(whole) == 1 and tokenizer.decode(letters) == "think"
    split = Request(key="a", prompt_ids=(tokenizer.bos_token_id, *letters), seed=1, params=Sampling(max_new_tokens=3))
    with connected([server()], prompts="text") as engine:
        (generation,) = engine.generate([split])
    assert generation.error is not None and "does not survive as text" in generation.error


def test_without_ids_only_an_explicit_flag_goes_on_and_it_is_told(caplog: pytest.LogCaptureFixture):
    """Mutations: re-tokenise silently; keep log-probabilities of other tokens; call the ids sampled in the fingerprint."""
    traits = ("strict", "no_ids", "text_only")
    with connected([server(*traits)]) as engine, pytest.raises(UserError, match="set allow_retokenise"):
        engine.preflight()
    with connected([server(*traits)], tokenizer=None) as engine, pytest.raises(UserError, match="prompt_tokens"):
        engine.preflight()
    with connected([server(*traits)], allow_retokenise=True) as engine, caplog.at_level(logging.WARNING):
        generations = list(engine.generate(requests(3)))
        fingerprint, caps = engine.fingerprint(), engine.caps
    assert "returns no token ids" in caplog.text and "not into as many as the server sampled" in caplog.text
    assert fingerprint["token_ids"] == "retokenised"
    assert not caps.token_prompts and not caps.logprobs
    assert all(g.token_ids and g.logprobs is None and g.error is None for g in generations)


def test_ids_from_log_probabilities():
    """Older vLLM names ids only as token_id:N. Mutation: look for token_ids only."""
    with connected([server("spelled_ids")]) as engine:
        assert engine.caps.token_prompts
        found = by_key(list(engine.generate(requests(3))))
    want = by_key(list(tiny_engine().generate(requests(3))))
    assert {k: g.token_ids for k, g in found.items()} == {k: g.token_ids for k, g in want.items()}


def test_a_server_that_counts_nothing_still_shows_the_prompt_it_read():
    """Mutation: insist on ``usage`` although ``prompt_token_ids`` says more."""
    with connected([server("no_usage")]) as engine:
        assert outcomes(engine)["prompt_tokens"] == "ok"
    with (
        connected([server("no_usage", "spelled_ids")]) as engine,
        pytest.raises(UserError, match="does not say how many prompt tokens"),
    ):
        engine.preflight()


# ---------------------------------------------------------------------------------------------------------------------
# which model, which endpoints


def test_the_model_must_be_served():
    """Mutations: send a name nobody serves; pick one of several."""
    with connected([server(model="one")]) as engine:
        assert engine.preflight().model == "one"
    with connected([server(model="one")], model="onne") as engine, pytest.raises(UserError, match="did you mean 'one'"):
        engine.preflight()


def test_endpoints_with_other_weights_are_refused(caplog: pytest.LogCaptureFixture):
    """Mutation: compare no samples between endpoints."""
    with connected([server(), server(seed=1)]) as engine, pytest.raises(UserError, match="agreement"):
        engine.preflight()
    with connected([server(), server(seed=1)], allow=["agreement"]) as engine, caplog.at_level(logging.WARNING):
        assert len(engine.fingerprint()["drawn"]) == 2
    assert "answer the same request differently" in caplog.text


def test_an_endpoint_that_is_not_there_is_put_aside_at_the_start():
    """Mutations: fail the run for one missing endpoint; go on without any."""
    gone = server()
    gone.stop()
    with connected([gone, server()]) as engine:
        assert len(engine.preflight().reports) == 1
        assert {g.error for g in engine.generate(requests(4))} == {None}
    with connected([gone]) as engine, pytest.raises(EndpointsLost, match="cannot connect"):
        engine.preflight()


def test_a_passing_fault_does_not_spoil_the_preflight():
    """Mutation: ask each preflight question once only."""
    http = server()
    http.script = lambda number: "500" if number in (0, 5, 12) else "429" if number == 9 else None
    with connected([http]) as engine:
        assert set(outcomes(engine).values()) == {"ok"}


# ---------------------------------------------------------------------------------------------------------------------
# chat endpoints


def chat_requests(count: int = 2, tokens: int = 10) -> list[ChatRequest]:
    fmt = FORMATS["r1-distill"]
    return [
        ChatRequest(
            key=f"{view}{i}",
            prompt_ids=view_prompt(tiny_tokenizer(), fmt, TALK, view).prompt_ids,
            seed=i,
            params=Sampling(max_new_tokens=tokens, temperature=1.0),
            messages=TALK,
            view=view,
        )
        for view in ("trace", "empty")
        for i in range(count)
    ]


CHAT = {"api": "chat", "format": "r1-distill", "allow_retokenise": True}


@pytest.mark.parametrize("trait", [(), ("old_reasoning_name",)])
def test_a_chat_endpoint_serves_both_views(trait: tuple[str, ...]):
    """Mutations: read only one of the two names of the reasoning; lose the closing marker; answer the empty view as if it
    were the trace view."""
    tokenizer, fmt = tiny_tokenizer(), FORMATS["r1-distill"]
    with connected([http := server("chat_only", *trait)], **CHAT) as engine:
        assert outcomes(engine)["prefix"] == "ok"
        assert not engine.caps.token_prompts and engine.caps.seed
        found = by_key(list(engine.generate(chat_requests())))
        bodies = [b for b in http.seen if b["max_tokens"] == 10]
    assert {g.error for g in found.values()} == {None}
    for key, generation in found.items():
        split = fmt.split(generation.text, "trace" if key.startswith("trace") else "empty")
        assert split.closed and tokenizer.decode(generation.token_ids) == generation.text
        assert (split.trace is None) == key.startswith("empty")
    continued = [b for b in bodies if b.get("continue_final_message")]
    assert len(continued) == 2 and continued[0]["messages"][-1]["content"].endswith("<think></think>")


def test_a_chat_endpoint_that_does_not_continue_serves_the_trace_view_only():
    """Mutations: trust continue_final_message without counting the prompt's tokens; sample the empty view all the same."""
    with connected([server("chat_only", "no_prefix")], **CHAT) as engine:
        assert outcomes(engine)["prefix"] == "downgraded"
        found = by_key(list(engine.generate(chat_requests())))
    assert [found[k].error for k in ("trace0", "trace1")] == [None, None]
    assert all("continues the forced empty trace" in (found[k].error or "") for k in ("empty0", "empty1"))


def test_a_chat_endpoint_is_refused_where_it_cannot_be_right():
    """Mutations: take a trace that is not apart; use a chat endpoint without the flag; accept requests of ids only."""
    mixed = connected([server("chat_only", "mixed_reasoning")], **CHAT)
    with mixed as engine, pytest.raises(UserError, match="reasoning_apart"):
        engine.preflight()
    unasked = connected([server("chat_only")], **(CHAT | {"allow_retokenise": False}))
    with unasked as engine, pytest.raises(UserError, match="never returns what was sampled"):
        engine.preflight()
    with connected([server("chat_only")], **CHAT) as engine:
        (generation,) = engine.generate(requests(1))
    assert "needs the conversation" in (generation.error or "")
    with (
        pytest.raises(UserError, match="needs the model's tokenizer"),
        connected([server()], api="chat", tokenizer=None),
    ):
        pass


def test_the_tokenizer_folder_is_the_servers_own():
    """The fixtures agree with each other: what the engine loads from disk is what the server encodes with."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer_folder())
    assert loaded.get_vocab() == tiny_tokenizer().get_vocab()
