"""
Finds the makers among Twisted's plugins, and words it well when one cannot be found.

Twisted only logs a drop-in that cannot be imported, and goes on.  Here its fault is kept, to be told to
whoever misses what was in it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

import attrs
import twisted.plugins
from twisted.logger import Logger
from twisted.plugin import CachedDropin, getCache
from twisted.python.modules import getModule
from zope.interface.interface import InterfaceClass

from crabtwist.errors import ConfigurationError
from crabtwist.interfaces import IExtensionMaker, ILedgerMaker, IMaker, IProviderMaker, IStorageMaker
from crabtwist.settings import did_you_mean, read

M = TypeVar("M", bound=IMaker)

_STALE = (
    "If it was installed just now, delete the dropin.cache file beside its drop-in"
    " (uv and others keep old file times, so that the cache looks newer)."
)

_log = Logger()

_SORTS = {
    "providers": IProviderMaker,
    "extensions": IExtensionMaker,
    "storages": IStorageMaker,
    "ledgers": ILedgerMaker,
}

#: What Twisted remembers of a plugin package: module names (the last part) to what they hold.
_Cache = Mapping[str, CachedDropin]


@attrs.frozen
class Makers:
    """
    Every maker there is, by its word, sorted.

    `failed` maps the full names of the drop-in modules that could not be loaded to the reason, `modules` what
    was found ("providers.NAME", "extensions.NAME", ...) to those that it is from.
    """

    providers: Mapping[str, IProviderMaker] = MappingProxyType({})
    extensions: Mapping[str, IExtensionMaker] = MappingProxyType({})
    storages: Mapping[str, IStorageMaker] = MappingProxyType({})
    ledgers: Mapping[str, ILedgerMaker] = MappingProxyType({})
    failed: Mapping[str, str] = MappingProxyType({})
    modules: Mapping[str, str] = MappingProxyType({})


def discover(package: ModuleType | None = None) -> Makers:
    """
    Return all makers in `package`, `twisted.plugins` if it is None.

    Raises `ConfigurationError` when two makers of one sort have the same word.
    """
    package = package or twisted.plugins
    cache = _cache(package)
    failed = _unimportable(package, cache)
    complaints: list[str] = []
    found = {sort: _named(interface, cache, failed, complaints) for sort, interface in _SORTS.items()}
    if complaints:
        raise ConfigurationError(complaints)
    makers: dict[str, Any] = {sort: _only_makers(named) for sort, named in found.items()}
    modules = {f"{sort}.{word}": module for sort in found for word, (_, module) in found[sort].items()}
    return Makers(**makers, failed=MappingProxyType(failed), modules=MappingProxyType(modules))


def _only_makers(named: Mapping[str, tuple[Any, str]]) -> Mapping[str, Any]:
    return MappingProxyType({word: maker for word, (maker, _) in named.items()})


def missing(sort: str, word: str, known: Iterable[str], failed: Mapping[str, str]) -> str:
    """
    Return what to say when no maker of a sort ("provider kind", "extension", ...) has this word.

    `known` are the words that there are, `failed` is `Makers.failed`.
    """
    known = sorted(known)
    sentences = [
        f"there is no {sort} {json.dumps(word)}{did_you_mean(word, known) or '.'}",
        f"There are: {', '.join(known)}." if known else "There are none at all.",
        *(f"The drop-in {module} could not be loaded: {why}." for module, why in failed.items()),
        _STALE,
    ]
    return " ".join(sentences)


def pick(
    known: Mapping[str, M], word: object, sort: str, where: str, makers: Makers, complaints: list[str]
) -> M | None:
    """
    Return the maker with this word among `known`, None after a complaint if there is none.

    `sort` and `where` are for that complaint: what was sought, and the path of the key that names it.
    What is no string has been complained of before.
    """
    if not isinstance(word, str):
        return None
    if word not in known:
        complaints.append(f"{where}: {missing(sort, word, known, makers.failed)}")
    return known.get(word)


def own_settings(
    maker: IMaker, table: Mapping[str, object], where: str, complaints: list[str], common: Collection[str]
) -> attrs.AttrsInstance | None:
    """
    Return `table` as an instance of the maker's settings class, None after complaining.

    `common` are the keys of such tables that belong to the gateway; the settings class may not have
    them.  `where` is the table's path.
    """
    try:
        cls: type[attrs.AttrsInstance] = maker.settings_class()
        taken = {field.alias for field in attrs.fields(cls)} & set(common)
        if not taken:
            return read(cls, table, where, complaints, elsewhere=common)
        complaints.append(f"{where}: its drop-in may not have settings called {sorted(taken)}")
    except ConfigurationError as error:
        complaints.extend(f"{where}: {complaint}" for complaint in error.complaints)
    except Exception as error:
        # A stranger's drop-in may fail in any way; the other complaints are told all the same.
        complaints.append(f"{where}: the settings of its drop-in cannot be had: {_reason(error)}")
    return None


def _cache(package: ModuleType) -> _Cache:
    found: _Cache = getCache(package)
    return found


def _named(
    interface: InterfaceClass, cache: _Cache, failed: dict[str, str], complaints: list[str]
) -> dict[str, tuple[Any, str]]:
    """Return the makers of a sort and the modules that they are from, by their words, sorted."""
    attribute = "kind" if "kind" in interface else "name"
    found: dict[str, tuple[Any, str]] = {}
    for dropin in sorted(cache.values(), key=lambda dropin: dropin.moduleName):
        for maker in _provided(interface, dropin, failed):
            word = str(getattr(maker, attribute, ""))
            other, module = found.setdefault(word, (maker, dropin.moduleName))
            if other is not maker:
                complaints.append(
                    f'two makers ({interface.__name__}) are called "{word}",'
                    f" in {module} and in {dropin.moduleName}; remove one of the drop-ins"
                )
    return {word: found[word] for word in sorted(found)}


def _provided(interface: InterfaceClass, dropin: CachedDropin, failed: dict[str, str]) -> list[Any]:
    # As `twisted.plugin.getPlugins` does it, which does not tell the module that a plugin is from.
    found = []
    for plugin in dropin.plugins:
        try:
            maker = interface(plugin, None)
        except Exception as error:
            # Importing a drop-in runs a stranger's code, which may raise anything.
            if dropin.moduleName not in failed:
                _log.failure("The drop-in {module} could not be loaded", module=dropin.moduleName)
            failed[dropin.moduleName] = _reason(error)
        else:
            found += [] if maker is None else [maker]
    return found


def _unimportable(package: ModuleType, cache: _Cache) -> dict[str, str]:
    # Twisted has tried (and logged) those that are not in its cache; trying again tells the reason.
    failed = {}
    for module in getModule(package.__name__).iterModules():
        if module.name.rpartition(".")[2] not in cache:
            try:
                module.load()
            except (Exception, SystemExit) as error:
                failed[module.name] = _reason(error)
    return failed


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
