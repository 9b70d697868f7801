"""What a doctor looks at where a gateway runs: itself, its clock, its stores, its upstreams."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from crabtwist.cli.client import Client, Said
from crabtwist.cli.faults import Fault, Unreachable
from crabtwist.cli.findings import Finding, fine, problem, warning
from crabtwist.cli.place import is_this_machine

#: Clocks that are further apart are worth a word.
CLOCK_SECONDS = 5.0


def look_at_gateway(client: Client, now: datetime | None = None) -> Iterator[Finding]:
    """Look at the gateway at a place; `now` is the time here. Raises a `Fault` if nobody answers."""
    place = client.place
    alive = client.look("/health")
    if alive.status != 200 or not isinstance(alive.content, dict) or "status" not in alive.content:
        words = f"what answers at {place.url} is no crabtwist (its /health has the status {alive.status})"
        raise Unreachable(words, slug="not_a_gateway")
    yield fine(f"a gateway answers at {place.url} ({place.url_from})")
    yield from _clock(alive, now or datetime.now(UTC))
    yield from _ready(client.look("/ready"))
    if place.url.startswith("http:") and not is_this_machine(place.url):
        yield warning(
            f"{place.url} is asked without TLS",
            "Whoever is on the way reads the admin token, the keys and every prompt.",
            "Ask by https, or through a tunnel.",
        )
    yield from _inside(client)


def _clock(alive: Said, now: datetime) -> Iterator[Finding]:
    try:
        there = parsedate_to_datetime(alive.headers["date"])
    except (KeyError, ValueError):
        return
    # The header has no fractions of a second.
    seconds = (now - there).total_seconds()
    if abs(seconds) > CLOCK_SECONDS:
        behind = "behind" if seconds > 0 else "ahead of"
        yield warning(
            f"the gateway's clock is {abs(seconds):.0f} s {behind} the one here",
            "Limits, days and months of budgets, and the expiry of keys go by the clocks of the nodes.",
            "Keep the clocks in step (NTP), at least those of all nodes.",
        )
    else:
        yield fine("the gateway's clock agrees with the one here")


def _ready(ready: Said) -> Iterator[Finding]:
    if ready.status == 200:
        yield fine("it is ready for requests")
        return
    status = ready.content.get("status") if isinstance(ready.content, dict) else f"status {ready.status}"
    yield problem(
        f"it is not ready for requests: {status}",
        "Requests are refused, or sent to upstreams that have just failed.",
        "See what follows about its upstreams, and its log; one that drains is being stopped.",
    )


# --- with the admin token ----------------------------------------------------------------------------


def _inside(client: Client) -> Iterator[Finding]:
    try:
        health = client.get("health")
    except Fault as fault:
        yield problem(
            f"it cannot be looked into: {fault.message}",
            "Its stores and upstreams are not looked at.",
            "Give the admin token of this gateway.",
        )
        return
    yield from _storage(health)
    yield from _undelivered(health)
    for provider in client.get("providers")["providers"]:
        yield _upstream(client, provider["name"])
    yield from _cooling(client.get("models"))


def _storage(health: dict[str, Any]) -> Iterator[Finding]:
    storage = health.get("storage") or {}
    if storage.get("answers", True):
        yield fine(f"its storage ({storage.get('kind')}) answers")
        return
    yield problem(
        f"its storage ({storage.get('kind')}) does not answer",
        "Nodes do not hear of each other, and no keys and providers can be made; requests go on.",
        "See whether it runs and can be reached from the gateway's machine.",
    )


def _undelivered(health: dict[str, Any]) -> Iterator[Finding]:
    ledger = health.get("ledger") or {}
    undelivered = ledger.get("undelivered") or 0
    if undelivered:
        yield warning(
            f"{undelivered} records are in its journal and not yet in its ledger ({ledger.get('kind')})",
            "Usage and logs do not show them; if that goes on, the journal gets full.",
            "A few that pass are fine. If they stay, see whether the ledger can be reached, and the log.",
        )
    elif ledger:
        yield fine(f"its ledger ({ledger.get('kind')}) has every record")


def _upstream(client: Client, name: str) -> Finding:
    try:
        models = client.get("providers", name, "models")["models"]
    except Fault as fault:
        return problem(
            f"the provider {name}: {fault.message}",
            "What it should answer fails, or goes to other providers of the same model.",
            "See whether its address and credential are right, and whether it can be reached from there.",
        )
    return fine(f"the provider {name} answers, and lists {len(models)} models")


def _cooling(models: dict[str, Any]) -> Iterator[Finding]:
    for model in models["models"]:
        for deployment in model["deployments"]:
            if deployment.get("cooling_until"):
                yield warning(
                    f"{model['name']} at {deployment['provider']} has failed, and cools down until "
                    f"{deployment['cooling_until']}",
                    "It is asked last until then.",
                    "See `crabtwist logs` for what it answered.",
                )
