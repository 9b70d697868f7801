"""The doors that show the gateway itself: its configuration, models, plugins and health, and its cache."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import attrs
from twisted.internet.defer import CancelledError, maybeDeferred

from crabtwist.admin_providers import MASK
from crabtwist.bookkeeping import Bookkeeping
from crabtwist.config import NO_LEDGER, Config
from crabtwist.errors import Refusal
from crabtwist.routing import Deployment
from crabtwist.settings import Secret
from crabtwist.tables import GatewaySettings
from crabtwist.web.admin.endpoint import ADMIN, Endpoint, about
from crabtwist.web.admin.inside import Inside
from crabtwist.web.admin.times import rfc3339

#: How long the store has to answer, before it counts as one that does not.
PATIENCE_SECONDS = 3.0

_USER_IN_URL = re.compile(r"(?<=://)[^/?#@\s]*@")


@attrs.frozen(slots=False)
class Cleared:
    """How many answers this node's cache had."""

    cleared: int


@attrs.frozen(kw_only=True, slots=False)
class DeploymentShown:
    """One model as served by one provider."""

    provider: str
    upstream_model: str
    weight: int
    cooling_until: str | None = attrs.field(metadata=about("null when it is well"))


@attrs.frozen(slots=False)
class Model:
    """One model, and who serves it."""

    name: str
    deployments: tuple[DeploymentShown, ...]


@attrs.frozen(slots=False)
class Models:
    """All that is served."""

    models: tuple[Model, ...]
    aliases: Mapping[str, str]


@attrs.frozen(slots=False)
class Plugin:
    """One maker: the word for it, the drop-in that it is from, and the path of what it makes."""

    name: str
    module: str
    path: str


@attrs.frozen(kw_only=True, slots=False)
class Plugins:
    """All makers by sort; `failed` are the drop-ins that could not be loaded, with why."""

    providers: tuple[Plugin, ...]
    extensions: tuple[Plugin, ...]
    storages: tuple[Plugin, ...]
    ledgers: tuple[Plugin, ...]
    failed: Mapping[str, str]


@attrs.frozen(slots=False)
class StorageHealth:
    """Whether the store answers."""

    kind: str
    answers: bool


@attrs.frozen(slots=False)
class LedgerHealth:
    """How many records the ledger has not confirmed yet, and how many were dropped for want of room."""

    kind: str
    undelivered: int
    dropped: int


@attrs.frozen(kw_only=True, slots=False)
class Health:
    """How this node is."""

    version: str
    started_at: str
    uptime_seconds: float
    draining: bool
    usable: bool = attrs.field(metadata=about("whether some deployment is not cooling down"))
    listening: tuple[str, ...]
    storage: StorageHealth
    ledger: LedgerHealth | None
    nodes: int = attrs.field(metadata=about("how many are alive on this store, as far as was heard"))


def state_endpoints(inside: Inside) -> list[Endpoint]:
    """Return the endpoints of the gateway itself."""
    return [
        Endpoint(
            "POST",
            f"{ADMIN}cache/clear",
            "Forget all cached answers",
            lambda _asked: _clear(inside),
            action="cache.clear",
            description="In the memory of this node; answers in the store stay until their time is over.",
            answer=Cleared,
            refusals={404: "there is no cache"},
        ),
        Endpoint(
            "GET",
            f"{ADMIN}config",
            "Show the configuration as it runs",
            lambda _asked: config_shown(inside.config()),
            description=f"As the file has it, with all defaults.  Secrets are shown as {MASK!r}.",
            answer=dict[str, Any],
        ),
        Endpoint(
            "GET",
            f"{ADMIN}models",
            "List the models, and who serves them",
            lambda _asked: _models(inside),
            answer=Models,
        ),
        Endpoint(
            "GET",
            f"{ADMIN}plugins",
            "List the plugins that there are",
            lambda _asked: _plugins(inside),
            answer=Plugins,
        ),
        Endpoint(
            "GET",
            f"{ADMIN}health",
            "Show how this node is",
            lambda _asked: _health(inside),
            answer=Health,
        ),
    ]


def _clear(inside: Inside) -> Cleared:
    kept = inside.extension("cache")
    if kept is None:
        raise Refusal(404, "no_cache", "there is no cache; [extensions.cache] would be one")
    number = len(kept)
    kept.clear()
    return Cleared(number)


# The configuration.


def config_shown(config: Config) -> dict[str, Any]:
    """Return a configuration as its file would have it with every default, secrets masked."""
    top = {field.name: masked(getattr(config, field.name)) for field in attrs.fields(GatewaySettings)}
    storage, ledger = config.storage, config.ledger
    return {
        **top,
        "providers": {each.name: masked(each.common) | masked(each.settings) for each in config.providers},
        "keys": masked(config.keys),
        "aliases": masked(config.aliases),
        "models": masked(config.models),
        "extensions": {each.name: masked(each.settings) for each in config.extensions},
        "storage": {"kind": storage.kind} | masked(storage.settings),
        "ledger": {"kind": NO_LEDGER}
        if ledger is None
        else {"kind": ledger.kind} | masked(ledger.common) | masked(ledger.settings),
    }


def masked(value: Any) -> Any:
    """Return settings as JSON has them, without their secrets, and without users in URLs."""
    if isinstance(value, Secret):
        return MASK
    if isinstance(value, str):
        return _USER_IN_URL.sub(f"{MASK}@", value)
    if attrs.has(type(value)):
        return {field.name: masked(getattr(value, field.name)) for field in attrs.fields(type(value))}
    if isinstance(value, Mapping):
        return {str(name): masked(each) for name, each in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [masked(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


# What there is.


def _models(inside: Inside) -> Models:
    registry, now = inside.gateway.registry, inside.gateway.clock.seconds()

    def shown(deployment: Deployment) -> DeploymentShown:
        cooling_until = inside.gateway.health.cool_until(deployment.name, now)
        return DeploymentShown(
            provider=deployment.provider.name,
            upstream_model=deployment.upstream_model,
            weight=deployment.weight,
            cooling_until=rfc3339(cooling_until) if cooling_until else None,
        )

    models = (Model(name, tuple(map(shown, each))) for name, each in registry.models.items())
    return Models(tuple(models), registry.aliases)


def _plugins(inside: Inside) -> Plugins:
    makers = inside.makers

    def shown(sort: str) -> tuple[Plugin, ...]:
        found: Mapping[str, Any] = getattr(makers, sort)
        return tuple(
            Plugin(name, makers.modules.get(f"{sort}.{name}", ""), str(getattr(maker, "path", "")))
            for name, maker in found.items()
        )

    return Plugins(
        providers=shown("providers"),
        extensions=shown("extensions"),
        storages=shown("storages"),
        ledgers=shown("ledgers"),
        failed=makers.failed,
    )


# How it is.


async def _health(inside: Inside) -> Health:
    gateway, config = inside.gateway, inside.config()
    answers = await _answers(inside)
    return Health(
        version=own_version(),
        started_at=rfc3339(inside.started_at),
        uptime_seconds=gateway.clock.seconds() - inside.started_at,
        draining=gateway.draining,
        usable=gateway.usable,
        listening=tuple(inside.listening()),
        storage=StorageHealth(config.storage.kind, answers),
        ledger=_ledger_health(config, gateway.books),
        nodes=inside.nodes(),
    )


def _ledger_health(config: Config, books: Bookkeeping | None) -> LedgerHealth | None:
    if config.ledger is None or books is None:
        return None
    return LedgerHealth(config.ledger.kind, books.journal.undelivered, books.dropped)


async def _answers(inside: Inside) -> bool:
    asking = maybeDeferred(inside.storage.get, "health", b"")
    try:
        await asking.addTimeout(PATIENCE_SECONDS, inside.gateway.clock)
    except CancelledError:
        raise
    except Exception:
        # Whatever it says: it is no answer.
        return False
    return True


@cache
def own_version() -> str:
    """Return the version of the package, "unknown" where it was not installed."""
    try:
        return version("crabtwist")
    except PackageNotFoundError:
        return "unknown"
