"""Who may answer, and in which order they are asked."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.dialects.operations import OPERATIONS
from crabtwist.errors import Refusal
from crabtwist.health import Health
from crabtwist.routing import Deployment, Registry, order
from crabtwist.testing import FakeProvider

MESSAGES = OPERATIONS["messages"]
EMBEDDINGS = OPERATIONS["embeddings"]


def deployment(name: str, weight: int = 1, served: str = "m", **provider: Any) -> Deployment:
    """Return a deployment at a provider of its own."""
    return Deployment(FakeProvider(name, **provider), served, "up", weight)


def names(deployments: list[Deployment]) -> list[str]:
    """Return the names of the deployments' providers."""
    return [each.provider.name for each in deployments]


class RegistryTests(SynchronousTestCase):
    """Who may answer."""

    def refusal(self, registry: Registry, asked: str, operation: Any = MESSAGES) -> Refusal:
        """Return why nobody may."""
        refusal: Refusal = self.assertRaises(Refusal, registry.candidates, asked, operation)
        return refusal

    def test_candidates(self) -> None:
        """All deployments of a model, in the order of the configuration, and nobody else's."""
        registry = Registry([deployment("a"), deployment("x", served="other"), deployment("b", 0)])
        self.assertEqual(["a", "b"], names(registry.candidates("m", MESSAGES)))

    def test_name(self) -> None:
        """Health and logs know a deployment by its provider and its name there."""
        self.assertEqual("a/up", deployment("a").name)

    def test_dialect(self) -> None:
        """Only those that speak the caller's dialect are candidates."""
        registry = Registry([deployment("o", dialects=["openai"]), deployment("a", dialects=["anthropic"])])
        self.assertEqual(["a"], names(registry.candidates("m", MESSAGES)))
        self.assertEqual(["o"], names(registry.candidates("m", EMBEDDINGS)))

    def test_operation(self) -> None:
        """Only those that have the operation are."""
        registry = Registry([deployment("a", operations=["messages"]), deployment("b")])
        self.assertEqual(["b"], names(registry.candidates("m", EMBEDDINGS)))

    def test_unknown_model(self) -> None:
        """A model that nobody serves is not found, and the caller is told where to look."""
        refusal = self.refusal(Registry([deployment("a")]), "nope")
        self.assertEqual((404, "model_not_found"), (refusal.status, refusal.slug))
        self.assertIn("'nope'", refusal.message)
        self.assertIn("/v1/models", refusal.message)

    def test_not_in_this_dialect(self) -> None:
        """A model that is served, but not so, is a 404 that says what is missing."""
        refusal = self.refusal(Registry([deployment("a", dialects=["anthropic"])]), "m", EMBEDDINGS)
        self.assertEqual((404, "operation_not_served"), (refusal.status, refusal.slug))
        self.assertIn("'embeddings' in the openai dialect", refusal.message)

    def test_aliases(self) -> None:
        """An alias stands for its model, once: it is no alias of an alias."""
        registry = Registry([deployment("a")], {"fast": "m", "faster": "fast"})
        self.assertEqual(("m", "m"), (registry.resolve("fast"), registry.resolve("m")))
        self.assertEqual(["a"], names(registry.candidates("fast", MESSAGES)))
        self.assertEqual("model_not_found", self.refusal(registry, "faster").slug)

    def test_alias_of_nothing(self) -> None:
        """A refusal speaks of the name that was asked for, not of what it stands for."""
        self.assertIn("'fast'", self.refusal(Registry([], {"fast": "gone"}), "fast").message)

    def test_names(self) -> None:
        """Models come in their order, each once, and then the aliases."""
        registry = Registry(
            [deployment("a", served="z"), deployment("b"), deployment("c", served="z")], {"y": "m"}
        )
        self.assertEqual(["z", "m", "y"], registry.names())


class OrderTests(SynchronousTestCase):
    """In which order they are asked."""

    def order(self, *deployments: Deployment, seed: int = 0, health: Health | None = None) -> list[str]:
        """Return the order at the time 100."""
        return names(order(deployments, Random(seed), health or Health(), 100.0))

    def cooling(self, **seconds: float) -> Health:
        """Return a health in which some deployments cool down, each for its time from 100 on."""
        health = Health(failures=1, seconds=1)
        for name, left in seconds.items():
            health.failed(f"{name}/up", 99.0 + left)
        return health

    def test_shares(self) -> None:
        """First attempts are shared out by weight."""
        deployments = [deployment("a", 1), deployment("b", 2), deployment("c", 7)]
        random = Random(1)
        first = Counter(order(deployments, random, Health(), 0.0)[0].provider.name for _ in range(10_000))
        for name, share in (("a", 1000), ("b", 2000), ("c", 7000)):
            self.assertApproximates(share, first[name], 200)

    def test_shares_among_candidates(self) -> None:
        """Weights are shares of those that can answer: who cannot takes nobody's place."""
        registry = Registry(
            [deployment("o", 98, dialects=["openai"]), deployment("a", 1), deployment("b", 1)]
        )
        candidates, random = registry.candidates("m", MESSAGES), Random(1)
        first = Counter(order(candidates, random, Health(), 0.0)[0].provider.name for _ in range(2000))
        self.assertApproximates(1000, first["a"], 100)

    def test_falling_weight(self) -> None:
        """After the first come the others by falling weight, equal ones as they were written."""
        deployments = [deployment("a", 1), deployment("b", 5), deployment("c", 5), deployment("d", 9)]
        for seed in range(50):
            first, *rest = self.order(*deployments, seed=seed)
            self.assertEqual([name for name in "dbca" if name != first], rest)

    def test_last_resort(self) -> None:
        """A weight of 0 never comes first while there is another."""
        for seed in range(200):
            self.assertEqual(["b", "a"], self.order(deployment("a", 0), deployment("b", 1), seed=seed))

    def test_only_last_resorts(self) -> None:
        """Where all weights are 0 the order is the configuration's."""
        self.assertEqual(["a", "b"], self.order(deployment("a", 0), deployment("b", 0)))

    def test_cooling(self) -> None:
        """Those that cool down are asked last, the soonest recovered first, whatever their weight."""
        deployments = [deployment("a", 9), deployment("b", 8), deployment("c", 1), deployment("d", 0)]
        for seed in range(50):
            health = self.cooling(a=0.5, b=0.2)
            self.assertEqual(["c", "d", "b", "a"], self.order(*deployments, seed=seed, health=health))

    def test_last_resort_before_the_cooling(self) -> None:
        """A last resort that is well is asked before a favourite that is not."""
        health = self.cooling(a=0.5)
        self.assertEqual(["b", "a"], self.order(deployment("a", 9), deployment("b", 0), health=health))

    def test_all_cooling(self) -> None:
        """When all cool down they are asked all the same."""
        health = self.cooling(a=0.5, b=0.2)
        self.assertEqual(["b", "a"], self.order(deployment("a"), deployment("b"), health=health))

    @given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=6), st.integers())
    @settings(deadline=None)
    def test_nobody_is_lost(self, made: list[tuple[int, bool]], seed: int) -> None:
        """Whatever the weights and cool-downs, everybody is asked once."""
        deployments = [deployment(str(index), weight) for index, (weight, _) in enumerate(made)]
        health = self.cooling(**{str(index): 0.5 for index, (_, ill) in enumerate(made) if ill})
        ordered = self.order(*deployments, seed=seed, health=health)
        self.assertEqual(sorted(names(deployments)), sorted(ordered))
