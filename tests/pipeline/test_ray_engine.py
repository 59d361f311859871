"""The Ray engine: the samples of the engine inside it, each once, whatever dies.

Most tests run the real driver and the real workers on a stand-in for Ray that answers in random order and lets actors die
on command; the last ones start Ray on this machine.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from look_fixtures import Experiment, questions, save_talking_model

from bvpo.engines import ray as ray_module
from bvpo.engines.base import ENGINES, Caps, Generation, Request, Sampling, create_engine
from bvpo.engines.ray_worker import Worker
from bvpo.experiment import RecordStore, read_manifest
from bvpo.records import Sample
from bvpo.strict import UserError

PARAMS = Sampling(max_new_tokens=4)


def requests(count: int, per_prompt: int = 5) -> list[Request]:
    return [Request(key=f"k{i}", prompt_ids=(i // per_prompt,), seed=i, params=PARAMS) for i in range(count)]


def expected(batch: Iterable[Request]) -> dict[str, tuple[int, ...]]:
    return {request.key: (request.seed, *request.prompt_ids) for request in batch}


# ------------------------------------------------------------------------------------------------ a stand-in for Ray


class Death(Exception):
    """Ends the actor it is raised in."""


class RayError(Exception):
    """The stand-in's error; ``cause`` is what was raised in the actor, unless the actor died."""

    def __init__(self, text: str, cause: BaseException | None = None) -> None:
        super().__init__(text)
        if cause is not None:
            self.cause = cause


class ScriptedEngine:
    """Draws a function of the request, a few at a time, in random order; ``eager`` reads all its requests at once."""

    caps = Caps(token_prompts=True, seed=True, logprobs=True, batch_invariant=True)

    def __init__(self, machine: str = "a", eager: bool = False, deadly: Iterable[str] = (), error: str = "") -> None:
        self.machine, self.eager, self.deadly, self.error = machine, eager, set(deadly), error
        self.dice = random.Random(0)

    def fingerprint(self) -> dict[str, Any]:
        return {"engine": "scripted", "machine": self.machine}

    def generate(self, requests: Iterable[Request]) -> Iterator[Generation]:
        source = iter(requests)
        held: list[Request] = list(source) if self.eager else []
        while True:
            while not self.eager and len(held) < 7 and (request := next(source, None)) is not None:
                held.append(request)
            if not held:
                return
            if self.error:
                raise UserError(self.error)
            if self.deadly & {request.key for request in held}:
                raise Death
            request = held.pop(self.dice.randrange(len(held)))
            yield Generation(
                key=request.key, token_ids=(request.seed, *request.prompt_ids), text="", finish="length", logprobs=None
            )

    def close(self) -> None:
        pass


class Call:
    """A method call on an actor that happens when its answer is looked at."""

    def __init__(self, actor: Any, name: str, arguments: tuple[Any, ...]) -> None:
        self.actor, self.name, self.arguments = actor, name, arguments


class FakeActor:
    def __init__(self, cluster: FakeRay) -> None:
        self.cluster, self.worker, self.alive, self.held = cluster, Worker(), True, 0
        self.number = len(cluster.actors)
        cluster.actors.append(self)

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: Call(self, name, arguments))


class FakeRay:
    """What the engine uses of Ray. ``dies(actor, method)`` decides on deaths before a call is answered."""

    def __init__(self, *, seed: int = 0, resources: dict[str, float] | None = None) -> None:
        self.dice = random.Random(seed)
        self.resources = resources or {"CPU": 4}
        self.actors: list[FakeActor] = []
        self.asked: list[dict[str, Any]] = []  # options of the actors
        self.given: Counter[int] = Counter()
        self.most_held = 0
        self.connected: dict[str, Any] | None = None
        self.never_ready: set[int] = set()
        self.dies: Callable[[FakeActor, str], bool] = lambda actor, method: False
        self.exceptions = SimpleNamespace(RayError=RayError)

    def is_initialized(self) -> bool:
        return self.connected is not None

    def init(self, **options: Any) -> None:
        self.connected = options

    def shutdown(self) -> None:
        self.connected = None

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, cls: type) -> Any:
        assert cls is Worker

        def options(**wanted: Any) -> Any:
            self.asked.append(wanted)
            return SimpleNamespace(remote=lambda: FakeActor(self))

        return SimpleNamespace(options=options)

    def wait(self, calls: list[Call], timeout: float | None = None) -> tuple[list[Call], list[Call]]:
        possible = [call for call in calls if call.actor.number not in self.never_ready]
        if not possible:
            assert timeout is not None, "waits for ever"
            return [], calls
        chosen = self.dice.choice(possible)
        return [chosen], [call for call in calls if call is not chosen]

    def kill(self, actor: FakeActor) -> None:
        actor.alive = False

    def get(self, call: Call) -> Any:
        actor = call.actor
        if not actor.alive or self.dies(actor, call.name):
            actor.alive = False
            raise RayError("pid: 7\nThe actor is dead because its worker process has died.")
        if call.name == "exchange":
            self.given[actor.number] += len(call.arguments[0])
            actor.held += len(call.arguments[0])
            self.most_held = max(self.most_held, actor.held)
        try:
            answer = getattr(actor.worker, call.name)(*call.arguments)
        except Death:
            actor.alive = False
            raise RayError("The actor is dead because of a request.") from None
        except Exception as error:
            raise RayError(str(error), cause=error) from error
        actor.held -= len(answer) if call.name == "exchange" else 0
        return answer


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeRay]:
    """Makes a stand-in and puts it in Ray's place."""
    monkeypatch.setattr("bvpo.engines.ray_worker._ANSWER_EVERY_S", 0.0)
    monkeypatch.setitem(ENGINES, "scripted", f"{__name__}:scripted")

    def make(**options: Any) -> FakeRay:
        fake = FakeRay(**options)
        monkeypatch.setattr(ray_module, "import_ray", lambda: fake)
        return fake

    return make


def scripted(
    *,
    model: str,
    revision: str | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    eager: bool = False,
    deadly: tuple[str, ...] = (),
    error: str = "",
    machines: tuple[str, ...] = ("a",),
    tensor_parallel_size: int = 1,
) -> ScriptedEngine:
    machine = machines[_started[0] % len(machines)]
    _started[0] += 1
    return ScriptedEngine(machine, eager, deadly, error)


_started = [0]


def make_engine(actors: int | None = 3, in_flight: int = 512, engine: str = "scripted", **inner: Any) -> Any:
    return create_engine(
        "ray", {"model": "m", "engine": engine, "actors": actors, "in_flight": in_flight, "inner": inner}
    )


def drawn(generations: Iterable[Generation]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for generation in generations:
        assert generation.key not in found, "a request was answered twice"
        assert generation.error is None
        found[generation.key] = generation.token_ids
    return found


# ------------------------------------------------------------------------------------------------ the same samples


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_every_request_is_answered_once_whatever_dies(cluster: Any, seed: int, eager: bool) -> None:
    """Mutations: the requests of a dead actor forgotten, or handed out although they were answered; an engine that has read
    its requests not started again."""
    fake = cluster(seed=seed)
    fake.dies = lambda actor, method: method == "exchange" and fake.dice.random() < 0.05
    batch = requests(200)
    engine = make_engine(in_flight=40, eager=eager)
    assert drawn(engine.generate(iter(batch))) == expected(batch)
    assert len(fake.actors) > 3, "nothing died"
    fake.dies = lambda actor, method: False
    assert drawn(engine.generate(batch[:9])) == expected(batch[:9])  # and it goes on
    engine.close()
    assert not any(actor.alive for actor in fake.actors) and fake.connected is None


def test_work_is_shared_bounded_and_prompts_stay_together(cluster: Any) -> None:
    """Mutations: all requests pulled at once; the first actor filled before the second gets any; samples of a prompt torn
    apart, so that each actor computes it."""
    fake = cluster()
    pulled = 0

    def counted() -> Iterator[Request]:
        nonlocal pulled
        for request in requests(300):
            pulled += 1
            yield request

    engine = make_engine(in_flight=20)
    stream = engine.generate(counted())
    next(stream)
    assert pulled <= 3 * 20 + 1
    list(stream)
    assert pulled == 300 and fake.most_held <= 20
    engine.close()

    fake = cluster()
    engine = make_engine(in_flight=512)
    where: dict[int, set[int]] = {}
    real = fake.get

    def get(call: Call) -> Any:
        for request in call.arguments[0] if call.name == "exchange" else ():
            where.setdefault(request.prompt_ids[0], set()).add(call.actor.number)
        return real(call)

    fake.get = get
    list(engine.generate(requests(60)))
    assert sorted(fake.given.values()) == [20, 20, 20]
    assert all(len(actors) == 1 for actors in where.values())


def test_it_is_the_engine_inside(cluster: Any) -> None:
    """Mutation: a fingerprint of its own, so that the same samples would be refused or drawn again without Ray."""
    cluster()
    engine = make_engine()
    assert engine.fingerprint() == {"engine": "scripted", "machine": "a"}
    assert engine.caps == ScriptedEngine.caps


# ------------------------------------------------------------------------------------------------ deaths


@pytest.mark.parametrize("in_flight", [512, 16, 1])
def test_a_request_that_kills_its_actors_fails_alone(cluster: Any, in_flight: int) -> None:
    """Mutations: retried for ever, or its neighbours failed with it."""
    fake = cluster()
    batch = requests(400)
    engine = make_engine(actors=2, in_flight=in_flight, deadly=("k123",))
    found = {generation.key: generation for generation in engine.generate(batch)}
    assert found.keys() == {request.key for request in batch}
    failed = {key: generation.error for key, generation in found.items() if generation.error}
    assert list(failed) == ["k123"]
    assert failed["k123"] == ("5 Ray actors died while they drew it, the last: The actor is dead because of a request.")
    assert len(fake.actors) == 2 + 5


def test_actors_that_keep_dying_end_the_run(cluster: Any) -> None:
    """Mutation: an endless loop of restarts, or an error record for every request of a broken cluster."""
    fake = cluster()
    fake.dies = lambda actor, method: method == "exchange" and len(fake.actors) > 3
    engine = make_engine()
    found: list[Generation] = []
    with pytest.raises(UserError, match=r"actors keep dying, the last: The actor is dead .*; what was drawn is kept"):
        for generation in engine.generate(requests(1000)):
            found.append(generation)
            if len(found) == 50:
                fake.actors[0].alive = False
    assert len(fake.actors) < 30
    assert sum(generation.error is not None for generation in found) <= 3


def test_an_actor_that_does_not_start(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One place of three: the others do the work. All of them: one line. Mutations: restarts for ever; the run ended by
    one broken machine."""
    fake = cluster()
    fake.dies = lambda actor, method: method == "start" and (actor.number == 1 or actor.number > 2)
    batch = requests(60)
    assert drawn(make_engine().generate(batch)) == expected(batch)
    assert len(fake.actors) == 3 + 4 and "going on with 2" in caplog.text
    fake = cluster()
    fake.dies = lambda actor, method: True
    with pytest.raises(UserError, match="actors keep dying, the last: The actor is dead because"):
        make_engine().fingerprint()
    assert len(fake.actors) < 20


def test_no_room_is_told_instead_of_waited_for(cluster: Any) -> None:
    """At the start, and when the machines are gone later. Mutation: a wait without end."""
    fake = cluster()
    fake.never_ready = {2}
    engine = make_engine()
    with pytest.raises(
        UserError, match=r"2 of 3 actors were ready after 600 s; each takes 1 CPUs and 0 GPUs, the cluster"
    ):
        engine.fingerprint()
    fake = cluster()
    engine = make_engine()
    stream = engine.generate(requests(300))
    next(stream)
    fake.dies, fake.never_ready = (lambda actor, method: True), set(range(3, 99))
    with pytest.raises(UserError, match="all actors died, and none could be started"):
        list(stream)


def test_what_the_engine_refuses_is_refused_as_it_is(cluster: Any) -> None:
    """Mutation: a refusal by the inner engine taken for a death, or buried in Ray's traceback."""
    fake = cluster()
    with pytest.raises(UserError, match=r"^the model is not for us$"):
        list(make_engine(error="the model is not for us").generate(requests(5)))
    with pytest.raises(UserError, match=r"unknown option 'egaer'; did you mean 'eager'\?"):
        make_engine(egaer=True).fingerprint()
    assert len(fake.actors) == 6


def test_machines_that_differ_are_refused(cluster: Any) -> None:
    """Also when one joins later. Mutation: the fingerprint of the first actor taken for all."""
    cluster()
    _started[0] = 0
    with pytest.raises(UserError, match=r"would not draw the same samples: machine: 'a' and 'b'$"):
        make_engine(machines=("a", "a", "b")).fingerprint()
    fake = cluster()
    _started[0] = 0
    engine = make_engine(machines=("a", "a", "a", "b"))
    engine.fingerprint()
    fake.actors[1].alive = False
    with pytest.raises(UserError, match="would not draw the same samples"):
        list(engine.generate(requests(300)))


def test_an_early_end_stops_the_actors(cluster: Any) -> None:
    """Mutation: actors that go on working for nobody after ctrl-C, or an engine that is useless afterwards."""
    fake = cluster()
    engine = make_engine()
    stream = engine.generate(requests(100))
    next(stream)
    stream.close()
    assert not any(actor.alive for actor in fake.actors)
    assert drawn(engine.generate(requests(20))) == expected(requests(20))


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("resources", "inner", "engine", "actors", "gpus"),
    [
        ({"CPU": 16, "GPU": 4}, {}, "scripted", 4, 1),
        ({"CPU": 16, "GPU": 4}, {"tensor_parallel_size": 2}, "scripted", 2, 2),
        ({"CPU": 3}, {}, "scripted", 3, 0),
    ],
)
def test_one_actor_per_gpu_or_cpu(
    cluster: Any, resources: Any, inner: Any, engine: str, actors: int, gpus: float
) -> None:
    """Mutation: GPUs left idle, or shared by actors that each take all of its memory."""
    fake = cluster(resources=resources)
    make_engine(actors=None, engine=engine, **inner).fingerprint()
    assert len(fake.asked) == actors
    assert all((one["num_gpus"], one["num_cpus"], one["max_restarts"]) == (gpus, 1, 0) for one in fake.asked)


def test_where_it_connects(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations: a cluster that was named and not used; one shut down that is not ours; usage statistics sent."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    fake = cluster()
    engine = make_engine(actors=5)
    engine.fingerprint()
    assert fake.connected is not None and fake.connected["address"] == "local" and fake.connected["num_cpus"] >= 5
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    fake = cluster()
    make_engine().fingerprint()
    assert fake.connected == {"address": "ray://head:10001", "logging_level": "ERROR"}
    engine = make_engine()
    engine.fingerprint()
    engine.close()
    assert fake.connected is not None  # it was connected before this engine came


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "embeded"}, "got 'embeded'; did you mean 'embedded'"),
        ({"engine": "ray"}, "got 'ray'"),
        ({"in_flight": 0}, "in_flight: got 0"),
        ({"actors": 0}, "actors: got 0"),
        ({"inner": {"revision": "x"}}, "inner.revision: is an option of its own; set revision"),
        ({"engine": "openai", "inner": {"api": "chat"}}, "without Ray"),
        ({"actor": 2}, "unknown option 'actor'; did you mean 'actors'?"),
    ],
)
def test_mistakes_are_told(cluster: Any, options: dict[str, Any], message: str) -> None:
    """Mutation: a check removed."""
    cluster()
    with pytest.raises(UserError, match=re.escape(message)):
        create_engine("ray", {"model": "m", **options})


def test_without_ray_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: an ImportError with a traceback."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'bvpo\[ray\]'"):
        create_engine("ray", {"model": "m"})


# ------------------------------------------------------------------------------------------------ Ray itself


def kill_one_worker_at(samples: Path, num_records: int, killed: list[int]) -> None:
    """Waits for so many records and kills one of the actor processes that this process's cluster runs. The processes are
    looked up before: that can take longer than the rest of the sampling."""
    import psutil

    deadline, workers = time.monotonic() + 90, []
    while time.monotonic() < deadline:
        if len(workers) < 2:
            workers = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::Worker")]
        elif sum(path.read_bytes().count(b"\n") for path in samples.glob("*.jsonl")) >= num_records:
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.append(workers[0].pid)
            return
        time.sleep(0.005)


@pytest.mark.slow
def test_sampling_on_a_cluster_with_an_actor_killed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`bvpo sample` with and without Ray: half of the prompts are drawn by the embedded engine, the rest by two actors on a
    local cluster, one of which is killed. Mutations: records lost, doubled or changed by the death; samples or settings
    that depend on Ray; a cluster that outlives the run."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    model = save_talking_model(tmp_path / "model")
    folders = []
    for name in ("whole", "spread"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(model)
        toml = "num_samples = 6\noptions.max_batch_rows = 4\noptions.min_batch_rows = 1\n"
        folders.append(Experiment(tmp_path / name, questions(20), toml).make("prompts"))
    whole, spread = folders
    assert whole.run("sample") == 0
    assert spread.run("sample", "--limit", "4") == 0
    spread.config.write_text(
        spread.config.read_text().replace("options.", "options.inner.")
        + 'engine = "ray"\noptions.actors = 2\noptions.in_flight = 24\n'
    )
    killed: list[int] = []
    num_before = len(spread.samples)
    watcher = threading.Thread(target=kill_one_worker_at, args=(spread.folder / "samples", 10, killed))
    watcher.start()
    assert spread.run("sample") == 0
    watcher.join()
    assert killed, "no actor was there to be killed"
    assert not ray.is_initialized()
    assert "a Ray actor died with" in capfd.readouterr().err
    assert num_before == 4 * 2 * 6
    store = RecordStore(spread.folder / "samples", Sample)
    assert (len(store), store.stats().num_duplicates, store.verify()) == (240, 0, [])
    for key, sample in whole.samples.items():
        other = store.get(key)
        assert other is not None
        assert (other.token_ids, other.text, other.finish) == (sample.token_ids, sample.text, sample.finish)
        assert other.logprobs == pytest.approx(sample.logprobs, abs=1e-4)
    entry = read_manifest(spread.folder).stage("sample")
    assert entry is not None and entry.finished is not None and entry.counts["samples"] == 240


@pytest.mark.slow
def test_errors_cross_processes_as_they_are() -> None:
    """The stand-in's errors are Ray's. Mutation: an error type that Ray wraps in another way."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    engine = create_engine("ray", {"model": "nowhere", "actors": 1, "num_cpus": 0.5})
    try:
        with pytest.raises(UserError, match=r"^model 'nowhere': cannot load it with AutoConfig") as caught:
            engine.fingerprint()
        assert "\n" not in str(caught.value)
    finally:
        engine.close()
    assert not ray.is_initialized()
