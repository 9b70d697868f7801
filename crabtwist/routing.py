"""Model and key in, deployments in the order to ask them out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import Any

import attrs

from crabtwist.dialects.operations import Operation
from crabtwist.errors import Refusal
from crabtwist.health import Health
from crabtwist.pricing import PriceBook


@attrs.frozen(eq=False)
class Deployment:
    """
    One model as served by one provider.

    `provider` is an `IProvider`.  `served` is the model's name here, `upstream_model` its name there.
    `weight` is its share of the first attempts, 0 for a last resort.  Up to `max_retries` further
    attempts are made at it, none started later than `retry_deadline_seconds` after the first.
    `head_timeout_seconds` is how long the response head may take, `idle_timeout_seconds` how long the
    upstream may be silent between two bytes.
    """

    provider: Any
    served: str
    upstream_model: str
    weight: int = 1
    max_retries: int = 2
    retry_deadline_seconds: float = 30.0
    head_timeout_seconds: float = 600.0
    idle_timeout_seconds: float = 300.0

    @property
    def name(self) -> str:
        """What health and logs call it."""
        return f"{self.provider.name}/{self.upstream_model}"

    def serves(self, operation: Operation) -> bool:
        """Tell whether its provider speaks the operation's dialect and has the operation."""
        return operation.dialect.name in self.provider.dialects and operation.name in self.provider.operations


def _by_served(deployments: Iterable[Deployment]) -> dict[str, tuple[Deployment, ...]]:
    models: dict[str, tuple[Deployment, ...]] = {}
    for deployment in deployments:
        models[deployment.served] = (*models.get(deployment.served, ()), deployment)
    return models


@attrs.frozen(eq=False)
class Registry:
    """
    Everything that is served, immutable.

    A reload makes a new one; a request reads it once, so it never sees two.  `models` maps a served
    name to its deployments in the order of the configuration; `prices` are what they cost.
    """

    models: Mapping[str, Sequence[Deployment]] = attrs.field(converter=_by_served)
    aliases: Mapping[str, str] = attrs.field(factory=dict)
    prices: PriceBook = attrs.field(factory=PriceBook)

    def resolve(self, asked: str) -> str:
        """Return the model that a name stands for: itself, unless it is an alias."""
        return self.aliases.get(asked, asked)

    def names(self) -> list[str]:
        """Return every name that may be asked for: models in their order, then aliases."""
        return [*self.models, *self.aliases]

    def candidates(self, asked: str, operation: Operation) -> list[Deployment]:
        """
        Return the deployments that could answer.

        Raises `Refusal` (404): for a model that nobody serves, and for one that nobody serves in the
        caller's dialect.
        """
        model = self.resolve(asked)
        deployments = self.models.get(model)
        if not deployments:
            raise Refusal(404, "model_not_found", f"model {asked!r} is not served here; see GET /v1/models")
        candidates = [deployment for deployment in deployments if deployment.serves(operation)]
        if not candidates:
            raise Refusal(
                404,
                "operation_not_served",
                f"model {asked!r} is served here, but none of its upstreams offers {operation.name!r} "
                f"in the {operation.dialect.name} dialect",
            )
        return candidates


def order(candidates: Sequence[Deployment], random: Random, health: Health, now: float) -> list[Deployment]:
    """
    Return the deployments in the order to ask them.

    Those that are well first: one drawn by weight, then the others by falling weight (equal ones as
    they came).  Those that are cooling down last, the soonest recovered first.
    """
    if len(candidates) == 1:
        return [*candidates]
    cooling = {each: health.cool_until(each.name, now) for each in candidates}
    well = [each for each in candidates if not cooling[each]]
    first = _draw(well, random)
    rest = sorted((each for each in well if each is not first), key=lambda each: -each.weight)
    ill = sorted((each for each in candidates if cooling[each]), key=lambda each: cooling[each])
    return [*([first] if first else []), *rest, *ill]


def _draw(deployments: Sequence[Deployment], random: Random) -> Deployment | None:
    weights = [deployment.weight for deployment in deployments]
    if len(deployments) < 2 or not any(weights):
        return deployments[0] if deployments else None
    return random.choices(deployments, weights)[0]
