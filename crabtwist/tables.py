"""The tables of the configuration file that are the gateway's own, as settings classes."""

from __future__ import annotations

from typing import ClassVar

import attrs
from attrs.validators import and_, deep_iterable

from crabtwist.settings import (
    ONE_IS_ENOUGH,
    Secret,
    header_word,
    long_enough,
    model_name,
    not_blank,
    not_empty,
    not_negative,
    positive,
)


@attrs.frozen(kw_only=True)
class ServedModel:
    """
    A model that a provider serves: `name` to clients, `upstream` (the same by default) to the provider.

    A plain string in the file stands for a table with only a name.
    """

    SHORTHAND: ClassVar[str] = "name"

    name: str = attrs.field(validator=model_name)
    upstream: str = attrs.field(
        default=attrs.Factory(lambda self: self.name, takes_self=True), validator=model_name
    )


@attrs.frozen(kw_only=True)
class ProviderSettings:
    """
    The keys that every `[providers.NAME]` may have.

    `weight` 0 means that the provider is asked only when all others failed.  `timeout` lasts from the
    request until the response head, `idle_timeout` from one byte of the body to the next.
    No attempt at it starts later than `retry_deadline` after the first; `connection_wait` bounds the wait
    for one of `max_connections` to become free.
    """

    kind: str
    models: tuple[ServedModel, ...] = attrs.field(validator=not_empty)
    weight: int = attrs.field(default=1, validator=not_negative)
    max_retries: int = attrs.field(default=2, validator=not_negative)
    retry_deadline: float = attrs.field(default=30.0, validator=not_negative)
    timeout: float = attrs.field(default=600.0, validator=positive)
    connect_timeout: float = attrs.field(default=10.0, validator=positive)
    idle_timeout: float = attrs.field(default=300.0, validator=positive)
    max_connections: int = attrs.field(default=1000, validator=positive)
    connection_wait: float = attrs.field(default=10.0, validator=not_negative)


#: A journal that is smaller would have no room for what runs at once.
LEAST_JOURNAL_BYTES = 2**20


def _roomy(_instance: object, _attribute: object, value: int) -> None:
    if value < LEAST_JOURNAL_BYTES:
        raise ValueError(f"must be {LEAST_JOURNAL_BYTES} or more")


@attrs.frozen(kw_only=True)
class LedgerSettings:
    """
    The keys that `[ledger]` may have whatever its kind, unless that is "none".

    `journal` is the folder of what no ledger has confirmed yet, from the configuration's folder on.  Records
    older than `keep_days`, and those beyond the newest `keep_records`, are forgotten; 0 keeps all.
    """

    journal: str = attrs.field(default="crabtwist-journal", validator=not_blank)
    journal_max_bytes: int = attrs.field(default=268435456, validator=_roomy)
    keep_days: int = attrs.field(default=400, validator=not_negative)
    keep_records: int = attrs.field(default=10000000, validator=not_negative)


@attrs.frozen(kw_only=True)
class GatewaySettings:
    """
    The keys at the top of the file.

    `listen` holds endpoint strings or host:port.  `shutdown_timeout` is how long requests may go on
    after the order to stop; `hook_timeout` how long a guard or a cache may take before it counts as
    crashed; `client_stall_timeout` how long a client may leave its answer unread; `commit_seconds` how
    long a stream's head waits for its first event; `ping_seconds` the silence after which a stream is
    kept alive.  Extensions are shown plain answers of up to `max_answer_copy_bytes`.  After
    `cooldown_failures` failures in a row a deployment is asked last for `cooldown_seconds`.
    `allow_anonymous` serves everybody, and excludes keys.  `secret_key` protects what the admin API keeps in
    the store; without one nothing can be made there.
    """

    listen: tuple[str, ...] = attrs.field(
        default=("127.0.0.1:5632",),
        validator=and_(not_empty, deep_iterable(not_blank)),
        metadata=ONE_IS_ENOUGH,
    )
    admin_token: Secret | None = attrs.field(default=None, validator=header_word)
    secret_key: Secret | None = attrs.field(default=None, validator=long_enough)
    allow_anonymous: bool = False
    shutdown_timeout: float = attrs.field(default=30.0, validator=not_negative)
    hook_timeout: float = attrs.field(default=10.0, validator=positive)
    client_stall_timeout: float = attrs.field(default=300.0, validator=positive)
    commit_seconds: float = attrs.field(default=10.0, validator=not_negative)
    ping_seconds: float = attrs.field(default=15.0, validator=positive)
    max_body_bytes: int = attrs.field(default=33554432, validator=positive)
    max_head_bytes: int = attrs.field(default=32768, validator=positive)
    head_timeout: float = attrs.field(default=15.0, validator=positive)
    body_timeout: float = attrs.field(default=120.0, validator=positive)
    keep_alive_timeout: float = attrs.field(default=75.0, validator=positive)
    max_json_depth: int = attrs.field(default=64, validator=positive)
    max_event_bytes: int = attrs.field(default=1048576, validator=positive)
    max_answer_copy_bytes: int = attrs.field(default=1048576, validator=not_negative)
    cooldown_failures: int = attrs.field(default=3, validator=positive)
    cooldown_seconds: float = attrs.field(default=30.0, validator=not_negative)
    inject_stream_usage: bool = True
