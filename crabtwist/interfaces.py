"""
The contracts between the gateway and what is plugged into it.

This module imports zope.interface alone: `twisted.plugin` loads it in every trial and twistd of the
environment, also in those that have nothing to do with us.

Makers are what is discovered (`twisted.plugin.getPlugins(IProviderMaker)` and so on, in
`twisted.plugins`): a word and the dotted path of what it makes, loaded only when a configuration names
it.  Making has no side effects.  What needs starting or stopping also provides
`twisted.application.service.IService` and is started before the first request; if an extension's
`startService` returns a Deferred, the start waits for it, and fails with it.
"""

from __future__ import annotations

from zope.interface import Attribute, Interface


class IMaker(Interface):
    """What all three kinds of maker have."""

    def settings_class():  # type: ignore[no-untyped-def]
        """
        Return the frozen attrs class that this maker's table in the configuration is read into.

        Its fields are the keys that the table may have; see `crabtwist.settings` for the types.
        Importing it may fail, which is reported with the maker's name.
        """


class IProviderMaker(IMaker):
    """Makes the providers of one kind."""

    kind = Attribute("The word after `kind =` in `[providers.NAME]`: lower case, unique among all makers.")

    def make(name, settings, services):  # type: ignore[no-untyped-def]
        """
        Return an `IProvider` for `[providers.NAME]`.

        `name` is NAME; `settings` an instance of the settings class; `services` an `IServices`.
        May raise `crabtwist.errors.ConfigurationError`.
        """


class IProvider(Interface):
    """An upstream."""

    name = Attribute("Its name in the configuration.")
    kind = Attribute("Its maker's kind.")
    dialects = Attribute("The dialects that it speaks natively: a frozenset of names.")
    operations = Attribute("The operations that it serves: a frozenset of names.")

    def open(call):  # type: ignore[no-untyped-def]
        """
        Send one `crabtwist.values.Call` upstream.

        Returns a Deferred that fires with a `twisted.web.iweb.IResponse` when the response head has come,
        whatever its status, or fails with a `crabtwist.errors.UpstreamError`; any other failure is
        logged and counts as a broken connection.  Cancelling it, or stopping the body's producer later,
        closes the connection at once.  Called once per attempt; it never retries by itself, but for a
        kept connection that turns out to be dead.  If the response has `raw_headers`
        (`crabtwist.values.Headers`), they are read in place of its `headers`, which know no order.
        """

    def list_models():  # type: ignore[no-untyped-def]
        """Return a Deferred of the list of the model names that the upstream says it serves."""


class IServices(Interface):
    """What the gateway lends to those that it makes."""

    clock = Attribute("The reactor, or a fake one: the only clock that plugins should read.")
    storage = Attribute("The configured `IStorage`, for extensions; None for providers and for stores.")
    directory = Attribute("A `pathlib.Path`: the configuration's folder, where relative paths begin.")

    def show(name, what, read):  # type: ignore[no-untyped-def]
        """
        Have the metrics show a gauge `crabtwist_NAME`: `read` returns its number whenever somebody looks.

        `what` says what it is.  For extensions and stores, which are made once; each name once.
        """

    def agent(*, ca_file=None):  # type: ignore[no-untyped-def]
        """
        Return a new `twisted.web.iweb.IAgent` with its own pool of connections.

        Its timeouts and bounds are those of the provider's table in the configuration, the defaults for
        extensions and stores.  It speaks
        HTTP/1.1, verifies TLS (against `ca_file`, the path of a PEM file, when that is not None), follows
        no redirects, keeps no cookies, decodes nothing, and fails with our errors.
        """


class IExtensionMaker(IMaker):
    """Makes one extension."""

    name = Attribute("The word in `[extensions.NAME]`: lower case, unique among all makers.")

    def make(settings, services):  # type: ignore[no-untyped-def]
        """Return an `IExtension`.  May raise `crabtwist.errors.ConfigurationError`."""


class IExtension(Interface):
    """
    A guard or a watcher on every request's way.

    Hooks run in the order of the configuration and may return Deferreds.  Subclass
    `crabtwist.extension.Extension` and override what is needed; a hook that is not overridden
    costs nothing.
    """

    name = Attribute("Its maker's name.")

    def admin_routes():  # type: ignore[no-untyped-def]
        """
        Return what it shows to whoever has the admin token; asked once, before anything is started.

        A mapping of paths ("totals", "a/b") to callables: `GET /v1/admin/extensions/NAME/PATH` calls one
        with the query's parameters, a mapping of text to text, and answers with what it returns, or a
        Deferred or coroutine of that, as JSON.  It may raise `crabtwist.errors.Refusal`.
        """

    def on_request(context):  # type: ignore[no-untyped-def]
        """
        Before the cache and any upstream.

        May raise `crabtwist.errors.Refused`: the first refusal ends the request.  Any other exception
        refuses it too, with a 500: a guard that crashed has not said yes.
        """

    def on_cache_lookup(context, body):  # type: ignore[no-untyped-def]
        """
        After every guard said yes.  `body` is the request's bytes.

        Returns a `crabtwist.values.Answer` to give instead of asking an upstream, or None.  May also
        return a `crabtwist.recording.Recording`, the same one for several requests: the first that gets it
        asks an upstream, all are given what comes, and once it is complete it can be given again.
        """

    def on_response(context, body, response):  # type: ignore[no-untyped-def]
        """
        After a complete, successful, plain answer; `response` is a `crabtwist.values.Answer`.

        Not called for streams, nor for answers larger than `max_answer_copy_bytes`.
        """

    def on_chunk(context, event):  # type: ignore[no-untyped-def]
        """
        Each event of a stream, a `crabtwist.sse.Event`, in order, as it comes from the upstream.

        Must not return a Deferred: the bytes do not wait.  Also called for the first event of an attempt
        that is then given up for it, and for the chunk that is kept from the client
        (`inject_stream_usage`); not for an event larger than `max_event_bytes`.
        """

    def on_error(context, error):  # type: ignore[no-untyped-def]
        """A failed attempt, or a stream that broke: `error` is a `crabtwist.errors.UpstreamError`."""

    def on_end(context, outcome):  # type: ignore[no-untyped-def]
        """
        Exactly once for every request that was read, however it ended.

        Refused, answered from a cache, failed, abandoned by its client or complete; `outcome` is a
        `crabtwist.values.Outcome`.  The answer does not wait for what this returns.
        """

    def on_admin_action(action):  # type: ignore[no-untyped-def]
        """
        After somebody did something to the gateway itself, or tried to: a `crabtwist.values.AdminAction`.

        It has happened, so there is nothing to refuse; nothing waits for what this returns.
        """


class IStorageMaker(IMaker):
    """Makes the stores of one kind."""

    kind = Attribute("The word after `kind =` in `[storage]`: lower case, unique among all makers.")

    def make(settings, services):  # type: ignore[no-untyped-def]
        """Return an `IStorage`.  Opens nothing yet; may raise `ConfigurationError`."""


class IStorage(Interface):
    """
    Shared keys and counters.

    Keys and values are bytes.  The first argument of every method is a namespace, an ASCII word of the
    caller's own, kept apart from the key so that no text of a client's can reach into another's.
    """

    between_nodes = Attribute("Whether other nodes see the same: True for a server, False for a file.")

    def open():  # type: ignore[no-untyped-def]
        """
        Return a Deferred that fires when the store can be used.

        A failure stops the start: no port is opened.
        """

    def close():  # type: ignore[no-untyped-def]
        """Return a Deferred that fires when everything is written and let go."""

    def get(namespace, key):  # type: ignore[no-untyped-def]
        """Return a Deferred of the value, or of None."""

    def set(namespace, key, value, ttl_seconds=None):  # type: ignore[no-untyped-def]
        """Store a value, for `ttl_seconds` if given."""

    def increment(namespace, key, delta, ttl_seconds=None):  # type: ignore[no-untyped-def]
        """
        Add `delta`, an int, to a counter that begins at 0; atomic, also between processes.

        Returns a Deferred of the new total.  `ttl_seconds` counts from the counter's beginning.
        """

    def list(namespace, prefix=b""):  # type: ignore[no-untyped-def]
        """Return a Deferred of the (key, value) pairs whose keys begin so, sorted; counters excluded."""

    def delete(namespace, key):  # type: ignore[no-untyped-def]
        """Forget a value, a counter or a board; forgetting what is not there is fine."""

    def post(namespace, member, notes, ttl_seconds=None):  # type: ignore[no-untyped-def]
        """
        Put up one member's notes, and read everybody's.

        Under each key there may be a board: one note (bytes) for each member (bytes), kept apart from
        values and counters.  `notes` maps keys to what `member` has to say there, in place of what it said
        before; posting the same again changes nothing, so a call that failed may be repeated.  Returns a
        Deferred of a mapping of the same keys to the boards, mappings of members to notes, this one's
        included.  `ttl_seconds` counts for the whole board from its latest note, whoever's.
        """

    def boards(namespace):  # type: ignore[no-untyped-def]
        """Return a Deferred of all boards of a namespace, as `post` does; for a start, not for every day."""


class ILedgerMaker(IMaker):
    """Makes the ledgers of one kind."""

    kind = Attribute("The word after `kind =` in `[ledger]`: lower case, unique among all makers.")

    def make(settings, services):  # type: ignore[no-untyped-def]
        """Return an `ILedger`.  Opens nothing yet; may raise `ConfigurationError`."""


class ILedger(Interface):
    """
    The record of every request: appended to, read, and in the end forgotten.

    Records are `crabtwist.records.Record`.  Times are Unix time in microseconds, days those of UTC.
    """

    def open():  # type: ignore[no-untyped-def]
        """
        Return a Deferred that fires when the ledger can be used.

        Brings a file or schema of an older version up to date; fails with
        `crabtwist.errors.ConfigurationError` for one of a newer version.
        """

    def close():  # type: ignore[no-untyped-def]
        """Return a Deferred that fires when everything is written and let go."""

    def append(records):  # type: ignore[no-untyped-def]
        """
        Add a sequence of records, all or none, and their sums to the totals.

        A record whose id is there already changes nothing, so what failed or was cancelled may be tried
        again.  The Deferred fires with how many were new, when a power cut can no longer take them.
        """

    def get(request_id):  # type: ignore[no-untyped-def]
        """Return a Deferred of the record of a request, or of None."""

    def records(  # type: ignore[no-untyped-def]
        *,
        principal=None,
        model=None,
        provider=None,
        reason=None,
        since=None,
        until=None,
        before=None,
        limit=100,
    ):
        """
        Return a Deferred of a `crabtwist.records.Page`, newest accepted first.

        Filters that are None do not filter; `principal` "" finds the requests without a key.  `since`
        (included) and `until` (excluded) bound `accepted_at`.  `before` is that of the page before this
        one.  Fails with ValueError for a `before` that is none.
        """

    def totals(by, *, since=None, until=None):  # type: ignore[no-untyped-def]
        """
        Return a Deferred of a list of `crabtwist.records.Total`, sorted by what they are by.

        `by` holds any of "principal", "model", "provider" and "day"; without any there is one total, of
        everything, if there is anything.  `since` (included) and `until` (excluded) are
        `datetime.date`.  Totals stay when the records that they sum up are pruned.  Fails with ValueError
        for other words.
        """

    def prune(*, older_than=None, max_records=None, step=500):  # type: ignore[no-untyped-def]
        """
        Forget the oldest records, those accepted before `older_than` and those beyond `max_records`.

        At most `step` at once, so that nothing else waits for long.  Returns a Deferred of how many were
        forgotten.  What is forgotten and then appended again counts twice: deliver before pruning.
        """
