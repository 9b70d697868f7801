"""Running the extensions: order, refusals, and what becomes of those that crash, hang or misspell."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from crabtwist.errors import ConfigurationError, ConnectFailed, Refusal, Refused
from crabtwist.extension import Extension
from crabtwist.hooks import HOOK_TIMEOUT_SECONDS, Hooks
from crabtwist.interfaces import IExtension
from crabtwist.sse import Event
from crabtwist.testing import make_context
from crabtwist.values import AdminAction, Answer, Outcome

CONTEXT = make_context()
ANSWER = Answer(200, (), b"{}")
OUTCOME = Outcome(200, "upstream", "complete", None, None, (), None, None, 0.0, 0, 0)
EVENT = Event("message", b"{}", "", None, 0, 0)
ERROR = ConnectFailed("refused")


class Crash(Exception):
    """What a broken extension raises."""


def crash(*_: object) -> Any:
    """Be a hook that breaks."""
    raise Crash


def extension(name: str = "one", **hooks: Callable[..., Any]) -> Extension:
    """Return an extension that overrides these hooks, given without `self`."""
    methods = {each: staticmethod(hook) for each, hook in hooks.items()}
    made: Extension = type("Made", (Extension,), {"name": name, **methods})()
    return made


class HooksTestCase(SynchronousTestCase):
    """Hooks on a clock, and what they did."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.seen: list[str] = []

    def hooks(self, *extensions: Any) -> Hooks:
        """Return the hooks of these extensions."""
        return Hooks(extensions, self.clock)

    def noting(self, word: str, result: Any = None) -> Callable[..., Any]:
        """Return a hook that notes that it was called, and returns this."""

        def note(*_: object) -> Any:
            self.seen.append(word)
            return result

        return note

    def run_(self, telling: Awaitable[Any]) -> Deferred[Any]:
        """Return the Deferred of what the hooks are asked."""
        return Deferred.fromCoroutine(telling)  # type: ignore[arg-type] # they are coroutines


class MakingTests(HooksTestCase):
    """What is found out at start."""

    def test_contract(self) -> None:
        """The extension that everybody starts from keeps the contract, and does nothing."""
        verifyObject(IExtension, Extension())
        hooks = self.hooks(Extension())
        self.successResultOf(self.run_(hooks.request(CONTEXT)))
        self.assertIsNone(self.successResultOf(self.run_(hooks.cached(CONTEXT, b""))))

    def test_misspelt(self) -> None:
        """A method that looks like a hook and is none is complained of, with the nearest name."""
        for slip, meant in (("on_requests", "on_request"), ("on_chunks", "on_chunk"), ("on_ended", "on_end")):
            error = self.assertRaises(ConfigurationError, self.hooks, extension("acme", **{slip: crash}))
            self.assertEqual(
                [f"extensions.acme: {slip!r} is no hook; did you mean {meant!r}?"], error.complaints
            )

    def test_unlike_anything(self) -> None:
        """Also one that is like no hook."""
        error = self.assertRaises(ConfigurationError, self.hooks, extension(on_zzz=crash))
        self.assertIn("'on_zzz' is no hook", str(error))

    def test_wants(self) -> None:
        """Answers are kept and streams parsed only for those who watch them."""
        hooks = self.hooks(Extension(), extension(on_end=crash))
        self.assertEqual((False, False), (hooks.want_answers, hooks.want_events))
        self.assertTrue(self.hooks(extension(on_response=crash)).want_answers)
        self.assertTrue(self.hooks(extension(on_chunk=crash)).want_events)

    def test_inherited(self) -> None:
        """A hook that a base class overrides is overridden."""
        base = type(extension(on_chunk=crash))
        self.assertTrue(self.hooks(type("Derived", (base,), {})()).want_events)

    def test_set_on_the_object(self) -> None:
        """So is one that the object itself has."""
        made: Any = Extension()
        made.on_chunk = crash
        self.assertTrue(self.hooks(made).want_events)

    def test_without_the_base_class(self) -> None:
        """An extension that only keeps the contract works like any other."""

        @implementer(IExtension)
        class Own:
            name = "own"
            on_request = self.noting("request")
            on_cache_lookup = on_response = on_chunk = on_error = on_end = self.noting("other")
            on_admin_action = self.noting("admin")
            admin_routes = dict

        hooks = self.hooks(Own())
        self.successResultOf(self.run_(hooks.request(CONTEXT)))
        hooks.ended(CONTEXT, OUTCOME)
        self.assertEqual(["request", "other"], self.seen)


class GuardTests(HooksTestCase):
    """Guards."""

    def guard(self, *guards: Callable[..., Any]) -> Deferred[Any]:
        """Ask guards."""
        made = [extension(f"guard{index}", on_request=guard) for index, guard in enumerate(guards)]
        return self.run_(self.hooks(*made).request(CONTEXT))

    def refusal(self, asked: Deferred[Any]) -> Refusal:
        """Return why a request was refused."""
        refusal: Refusal = self.failureResultOf(asked, Refusal).value
        return refusal

    def test_order(self) -> None:
        """Guards are asked in the order of the configuration, each after the one before has answered."""
        slow: Deferred[None] = Deferred()
        asked = self.guard(self.noting("a", slow), self.noting("b", succeed(None)), self.noting("c"))
        self.assertEqual(["a"], self.seen)
        slow.callback(None)
        self.successResultOf(asked)
        self.assertEqual(["a", "b", "c"], self.seen)

    def test_first_refusal(self) -> None:
        """The first refusal ends it, in the guard's words; nobody else is asked."""

        def refuse(_context: object) -> None:
            raise Refused(429, "rate_limit_error", "slow down", {"retry-after": "3"})

        refusal = self.refusal(self.guard(self.noting("a"), refuse, self.noting("c")))
        self.assertEqual((429, "refused", "slow down"), (refusal.status, refusal.slug, refusal.message))
        self.assertEqual((["a"], {"retry-after": "3"}), (self.seen, refusal.headers))

    def test_context(self) -> None:
        """A guard is shown the request's context."""
        contexts: list[object] = []
        self.successResultOf(self.guard(contexts.append))
        self.assertEqual([CONTEXT], contexts)

    def test_async(self) -> None:
        """A guard may be an `async def` that waits, and refuses later."""
        answer: Deferred[None] = Deferred()

        async def later(_context: object) -> None:
            await answer
            raise Refused(403, None, "no")

        asked = self.guard(later, self.noting("b"))
        self.assertNoResult(asked)
        answer.callback(None)
        self.assertEqual((403, []), (self.refusal(asked).status, self.seen))

    def test_crash(self) -> None:
        """A guard that crashes has not said yes: the request is refused, and the log says why."""

        async def crash_later(_context: object) -> None:
            raise Crash

        guards: list[Callable[..., Any]] = [crash, lambda _: fail(Crash()), crash_later]
        for guard in guards:
            refusal = self.refusal(self.guard(guard, self.noting("b")))
            self.assertEqual((500, "guard_failed"), (refusal.status, refusal.slug))
            self.assertIn("'guard0'", refusal.message)
            self.assertEqual(([], 1), (self.seen, len(self.flushLoggedErrors(Crash))))

    def test_hangs(self) -> None:
        """Nor has one that says nothing in time; what it waits for is cancelled."""
        cancelled: list[object] = []
        asked = self.guard(lambda _: Deferred(cancelled.append), self.noting("b"))
        self.clock.advance(HOOK_TIMEOUT_SECONDS - 0.1)
        self.assertNoResult(asked)
        self.clock.advance(0.1)
        self.assertEqual(("guard_failed", 1), (self.refusal(asked).slug, len(cancelled)))
        self.assertEqual(([], 1), (self.seen, len(self.flushLoggedErrors())))

    def test_hangs_and_says_yes_when_cancelled(self) -> None:
        """A yes that has to be wrung from it is none."""

        async def stubborn(_context: object) -> None:
            try:
                await Deferred()
            except CancelledError:
                return

        asked = self.guard(stubborn)
        self.clock.advance(HOOK_TIMEOUT_SECONDS)
        self.assertEqual("guard_failed", self.refusal(asked).slug)
        self.flushLoggedErrors()

    def test_no_clock_left(self) -> None:
        """A guard that answers leaves no timer behind."""
        answer: Deferred[None] = Deferred()
        asked = self.guard(lambda _: answer)
        answer.callback(None)
        self.successResultOf(asked)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_cancelled(self) -> None:
        """A client that leaves cancels what a guard waits for; that is no crash."""
        cancelled: list[object] = []

        async def waits(_context: object) -> None:
            await Deferred(cancelled.append)

        guards: list[Callable[..., Any]] = [waits, lambda _: Deferred(cancelled.append)]
        for guard in guards:
            asked = self.guard(guard, self.noting("b"))
            asked.cancel()
            self.failureResultOf(asked, CancelledError)
        self.assertEqual((2, [], []), (len(cancelled), self.seen, self.clock.getDelayedCalls()))


class CacheTests(HooksTestCase):
    """Caches."""

    def look(self, *caches: Callable[..., Any]) -> Deferred[Any]:
        """Look into caches."""
        made = [extension(f"cache{index}", on_cache_lookup=cache) for index, cache in enumerate(caches)]
        return self.run_(self.hooks(*made).cached(CONTEXT, b"body"))

    def test_first_answer(self) -> None:
        """The first cache that has an answer gives it; the others are not asked."""
        looked = self.look(self.noting("a"), self.noting("b", succeed(ANSWER)), self.noting("c", ANSWER))
        self.assertIs(ANSWER, self.successResultOf(looked))
        self.assertEqual(["a", "b"], self.seen)

    def test_arguments(self) -> None:
        """A cache is shown the context and the request's bytes."""
        shown: list[object] = []
        self.successResultOf(self.look(lambda *arguments: shown.extend(arguments)))
        self.assertEqual([CONTEXT, b"body"], shown)

    def test_crash(self) -> None:
        """A cache that crashes has nothing; the next one is asked."""
        looked = self.look(crash, lambda *_: fail(Crash()), lambda *_: ANSWER)
        self.assertIs(ANSWER, self.successResultOf(looked))
        self.assertEqual(2, len(self.flushLoggedErrors(Crash)))

    def test_hangs(self) -> None:
        """So has one that says nothing in time."""
        looked = self.look(lambda *_: Deferred())
        self.clock.advance(HOOK_TIMEOUT_SECONDS)
        self.assertIsNone(self.successResultOf(looked))
        self.assertEqual(1, len(self.flushLoggedErrors()))

    def test_cancelled(self) -> None:
        """A client that leaves is not a cache that has nothing."""
        looked = self.look(lambda *_: Deferred(), self.noting("b"))
        looked.cancel()
        self.failureResultOf(looked, CancelledError)
        self.assertEqual([], self.seen)


class WatcherTests(HooksTestCase):
    """Watchers."""

    def tell(self, *extensions: Extension) -> None:
        """Tell watchers everything that they can be told."""
        hooks = self.hooks(*extensions)
        hooks.responded(CONTEXT, b"body", ANSWER)
        hooks.chunk(CONTEXT, EVENT)
        hooks.failed(CONTEXT, ERROR)
        hooks.ended(CONTEXT, OUTCOME)

    def test_arguments(self) -> None:
        """Each hook gets what the contract says."""
        told: list[tuple[object, ...]] = []

        def hook(*arguments: object) -> None:
            told.append(arguments)

        self.tell(extension(on_response=hook, on_chunk=hook, on_error=hook, on_end=hook))
        expected = [(CONTEXT, b"body", ANSWER), (CONTEXT, EVENT), (CONTEXT, ERROR), (CONTEXT, OUTCOME)]
        self.assertEqual(expected, told)

    def test_order(self) -> None:
        """Watchers are told in the order of the configuration, without waiting for each other."""
        never: Deferred[None] = Deferred()
        self.tell(extension("a", on_end=self.noting("a", never)), extension("b", on_end=self.noting("b")))
        self.assertEqual(["a", "b"], self.seen)

    def test_crash(self) -> None:
        """A watcher that crashes changes nothing: the log says who, the others are told."""
        hooks = dict.fromkeys(("on_response", "on_chunk", "on_error", "on_end"), crash)
        with capturedLogs() as events:
            self.tell(extension("bad", **hooks), extension("good", on_end=self.noting("b")))
        self.assertEqual((["b"], ["bad"] * 4), (self.seen, [event["extension"] for event in events]))
        self.assertEqual(4, len(self.flushLoggedErrors(Crash)))

    def test_admin_action(self) -> None:
        """Admin actions are shown to those who watch them; one that crashes is logged with the action."""
        action, shown = AdminAction(0.0, "ops", "keys.create", "visitor", "done"), list[object]()
        bad = extension("bad", on_admin_action=crash)
        with capturedLogs() as events:
            self.hooks(bad, extension(on_admin_action=shown.append)).administered(action)
        self.assertEqual(([action], "keys.create"), (shown, events[0]["subject"]))
        self.assertEqual(1, len(self.flushLoggedErrors(Crash)))

    def test_fails_later(self) -> None:
        """A watcher's Deferred that fails, or its `async def`, is logged when it does."""
        later: Deferred[None] = Deferred()

        async def crash_later(*_: object) -> None:
            await later

        self.tell(extension(on_end=lambda *_: later), extension(on_error=crash_later))
        self.assertEqual([], self.flushLoggedErrors())
        later.errback(Crash())
        self.assertEqual(1, len(self.flushLoggedErrors(Crash)))

    def test_answer_of_a_watcher(self) -> None:
        """What a watcher returns otherwise is nobody's business."""
        self.tell(extension(on_end=lambda *_: 7, on_chunk=lambda *_: "x"))
        self.assertEqual([], self.flushLoggedErrors())
