"""
The configuration file: TOML in, one frozen `Config` out, or every complaint at once.

Names in the file and attributes here are the same.  Times are seconds.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs

from crabtwist.discovery import M, Makers, own_settings, pick
from crabtwist.errors import ConfigurationError
from crabtwist.interfaces import IExtensionMaker, ILedgerMaker, IProviderMaker, IStorageMaker
from crabtwist.keys import EVERY_MODEL, KeySettings, KeyTerms, check_distinct, unheeded
from crabtwist.pricing import ModelSettings
from crabtwist.settings import (
    UNUSABLE,
    did_you_mean,
    expand,
    fault_in,
    key_path,
    model_name,
    read,
    word,
)
from crabtwist.tables import GatewaySettings, LedgerSettings, ProviderSettings, ServedModel


@attrs.frozen
class ConfiguredProvider:
    """One `[providers.NAME]`: `common` are everybody's settings, `settings` its maker's own."""

    name: str
    maker: IProviderMaker
    common: ProviderSettings
    settings: object


@attrs.frozen
class ConfiguredExtension:
    """One `[extensions.NAME]`."""

    name: str
    maker: IExtensionMaker
    settings: object


@attrs.frozen
class ConfiguredStorage:
    """The `[storage]`."""

    kind: str
    maker: IStorageMaker
    settings: object


@attrs.frozen
class ConfiguredLedger:
    """The `[ledger]`: `common` are every ledger's settings, `settings` its maker's own."""

    kind: str
    maker: ILedgerMaker
    common: LedgerSettings
    settings: object


@attrs.frozen(kw_only=True)
class Config(GatewaySettings):
    """
    A whole configuration, checked; comparable, and safe to print.

    Providers, keys and extensions are in the order of the file.  `ledger` is None for the kind "none".
    """

    providers: tuple[ConfiguredProvider, ...]
    keys: tuple[KeySettings, ...]
    aliases: Mapping[str, str]
    models: Mapping[str, ModelSettings]
    extensions: tuple[ConfiguredExtension, ...]
    storage: ConfiguredStorage
    ledger: ConfiguredLedger | None


@attrs.frozen
class _Models:
    models: tuple[ServedModel, ...]


_SECTIONS = ("providers", "keys", "aliases", "models", "extensions", "storage", "ledger")
_COMMON = frozenset(field.name for field in attrs.fields(ProviderSettings))
_COMMON_OF_LEDGERS = frozenset({"kind", *(field.name for field in attrs.fields(LedgerSettings))})

#: What is embedded: one file beside the configuration, and nothing to install.
EMBEDDED = "sqlite"
#: The kind of ledger that is none.
NO_LEDGER = "none"


def load(path: str | os.PathLike[str], environ: Mapping[str, str], makers: Makers) -> Config:
    """
    Return the configuration in the file at `path`, its `${VAR}` filled from `environ`.

    Makers' settings classes are imported, nothing is made.  Raises `ConfigurationError` with everything
    that is wrong: one complaint if the file cannot be read or is not TOML, else one for each fault.
    """
    complaints: list[str] = []
    try:
        document = expand(tomllib.loads(_text(path)), environ, "", complaints)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError([f"{path}: is not valid TOML: {error}"]) from error
    assert isinstance(document, dict)
    config = _read_document(document, makers, complaints)
    if config is None or complaints:
        raise ConfigurationError(complaints)
    return config


def _text(path: str | os.PathLike[str]) -> str:
    try:
        # An editor's byte order mark is no part of the text.
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigurationError([f"{path}: cannot be read: {error.strerror or error}"]) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigurationError([f"{path}: line {line} is not UTF-8; save the file as UTF-8"]) from error


def _read_document(document: dict[str, object], makers: Makers, complaints: list[str]) -> Config | None:
    rest = {key: value for key, value in document.items() if key not in _SECTIONS}
    gateway = read(GatewaySettings, rest, "", complaints, elsewhere=_SECTIONS)
    providers = _providers(document, makers, complaints)
    keys = _keys(document, complaints)
    aliases = _aliases(document, complaints)
    models = _models(document, complaints)
    extensions = _extensions(document, makers, complaints)
    storage = _storage(document, makers, complaints)
    ledger = _ledger(document, makers, complaints)
    served = _served(document)
    if served is not None:
        _check_aliases(aliases, served, complaints)
        _check_terms(keys, served | aliases.keys(), _table(document, "extensions", []), complaints)
    check_distinct(keys, complaints)
    if gateway is not None:
        _check_access(gateway, keys, complaints, any_keys=bool(document.get("keys")))
    if complaints or gateway is None or storage is None:
        return None
    return Config(
        **attrs.asdict(gateway, recurse=False),
        providers=tuple(providers),
        keys=tuple(keys.values()),
        aliases=MappingProxyType(aliases),
        models=MappingProxyType(models),
        extensions=tuple(extensions),
        storage=storage,
        ledger=ledger,
    )


# --- sections ----------------------------------------------------------------------------------------


def _table(document: dict[str, object], section: str, complaints: list[str]) -> dict[str, object]:
    table = document.get(section, {})
    if isinstance(table, dict):
        return table
    complaints.append(f"{section}: must be a table; begin it with [{section}]")
    return {}


def _tables(document: dict[str, object], section: str, complaints: list[str]) -> dict[str, dict[str, object]]:
    found = {}
    for name, table in _table(document, section, complaints).items():
        where = key_path(section, name)
        fault = fault_in(word, name)
        if fault:
            complaints.append(f"{where}: the name {fault}")
        elif isinstance(table, dict):
            found[name] = table
        elif table is not UNUSABLE:
            complaints.append(f"{where}: must be a table; begin it with [{where}]")
    return found


def _keys(document: dict[str, object], complaints: list[str]) -> dict[str, KeySettings]:
    """Return the keys that can be read, by their paths."""
    tables = document.get("keys", [])
    if not (isinstance(tables, list) and all(isinstance(table, dict) for table in tables)):
        complaints.append("keys: must be an array of tables; begin each with [[keys]]")
        return {}
    read_ones = {f"keys[{i}]": read(KeySettings, t, f"keys[{i}]", complaints) for i, t in enumerate(tables)}
    return {where: key for where, key in read_ones.items() if key is not None}


def _aliases(document: dict[str, object], complaints: list[str]) -> dict[str, str]:
    found = {}
    for name, target in _table(document, "aliases", complaints).items():
        where = key_path("aliases", name)
        fault = fault_in(model_name, name)
        if fault or name == EVERY_MODEL:
            complaints.append(f"{where}: the name {fault or 'means all models'}")
        elif isinstance(target, str):
            found[name] = target
        elif target is not UNUSABLE:
            complaints.append(f"{where}: must be a string, the name of a model that a provider serves")
    return found


def _providers(
    document: dict[str, object], makers: Makers, complaints: list[str]
) -> list[ConfiguredProvider]:
    if document.get("providers", {}) == {}:
        complaints.append("providers: there are none; add at least one [providers.NAME]")
    tables = _tables(document, "providers", complaints)
    found = [read_provider(name, table, makers, complaints) for name, table in tables.items()]
    return [provider for provider in found if provider is not None]


def read_provider(
    name: str, table: Mapping[str, object], makers: Makers, complaints: list[str]
) -> ConfiguredProvider | None:
    """Return what a table says of a provider, None after complaining, each time with the key's path."""
    where = key_path("providers", name)
    common_table = {"kind": name, **{key: value for key, value in table.items() if key in _COMMON}}
    common = read(ProviderSettings, common_table, where, complaints)
    if common is not None:
        _check_models(common.models, f"{where}.models", complaints)
    said_by = f"{where}.kind" if "kind" in table else f"{where} (without a `kind`, the name is the kind)"
    maker = pick(makers.providers, common_table["kind"], "provider kind", said_by, makers, complaints)
    if maker is None:
        return None
    own_table = {key: value for key, value in table.items() if key not in _COMMON}
    settings = own_settings(maker, own_table, where, complaints, _COMMON)
    if common is None or settings is None:
        return None
    return ConfiguredProvider(name, maker, common, settings)


def _check_models(models: Iterable[ServedModel], where: str, complaints: list[str]) -> None:
    seen: dict[str, int] = {}
    for index, model in enumerate(models):
        first = seen.setdefault(model.name, index)
        if first != index:
            complaints.append(f'{where}[{index}]: "{model.name}" is in the list already, at [{first}]')
        if model.name == EVERY_MODEL:
            complaints.append(f'{where}[{index}]: no model can be called "*", which means all models')


def _models(document: dict[str, object], complaints: list[str]) -> dict[str, ModelSettings]:
    found = {}
    for name, table in _table(document, "models", complaints).items():
        where = key_path("models", name)
        if not isinstance(table, dict):
            complaints.append(f"{where}: must be a table; begin it with [{where}]")
            continue
        settings = read(ModelSettings, table, where, complaints)
        if settings is not None:
            found[name] = settings
            complaints += [f"{where}: {fault}" for fault in settings.faults(name)]
    return found


def _extensions(
    document: dict[str, object], makers: Makers, complaints: list[str]
) -> list[ConfiguredExtension]:
    found = []
    for name, table in _tables(document, "extensions", complaints).items():
        where = key_path("extensions", name)
        maker = pick(makers.extensions, name, "extension", where, makers, complaints)
        if maker is not None:
            settings = own_settings(maker, table, where, complaints, ())
            found += [] if settings is None else [ConfiguredExtension(name, maker, settings)]
    return found


def _storage(document: dict[str, object], makers: Makers, complaints: list[str]) -> ConfiguredStorage | None:
    table = _table(document, "storage", complaints)
    found = _of_kind(table, "storage", makers.storages, makers, complaints, {"kind"})
    return None if found is None else ConfiguredStorage(*found)


def _ledger(document: dict[str, object], makers: Makers, complaints: list[str]) -> ConfiguredLedger | None:
    """Return the ledger; None if there is to be none, or after complaining."""
    table = _table(document, "ledger", complaints)
    if table.get("kind") == NO_LEDGER:
        complaints.extend(
            f'{key_path("ledger", key)}: means nothing with kind = "none", which keeps no records; remove it'
            for key in table
            if key != "kind"
        )
        return None
    common_table = {key: table[key] for key in table if key in _COMMON_OF_LEDGERS - {"kind"}}
    common = read(LedgerSettings, common_table, "ledger", complaints)
    # Only for the complaint about a kind that there is not.
    known: dict[str, Any] = {**makers.ledgers, NO_LEDGER: None}
    found = _of_kind(table, "ledger", known, makers, complaints, _COMMON_OF_LEDGERS)
    if common is None or found is None:
        return None
    kind, maker, settings = found
    return ConfiguredLedger(kind, maker, common, settings)


def _of_kind(
    table: dict[str, object],
    section: str,
    known: Mapping[str, M],
    makers: Makers,
    complaints: list[str],
    common: Collection[str],
) -> tuple[str, M, object] | None:
    """
    Return the kind, the maker and its settings that a section names, None after complaining.

    `common` are the keys that are not the maker's.
    """
    kind = table.get("kind", EMBEDDED)
    if not isinstance(kind, str) and kind is not UNUSABLE:
        complaints.append(f"{section}.kind: must be a string")
    maker = pick(known, kind, f"{section} kind", f"{section}.kind", makers, complaints)
    if maker is None:
        return None
    own_table = {key: value for key, value in table.items() if key not in common}
    settings = own_settings(maker, own_table, section, complaints, common)
    return None if settings is None else (str(kind), maker, settings)


# --- what must agree ---------------------------------------------------------------------------------


def _served(document: dict[str, object]) -> set[str] | None:
    """Return the names of all models served, None if some cannot be read (and are complained of)."""
    ignored: list[str] = []
    tables = _tables(document, "providers", ignored)
    models = [read(_Models, {"models": table.get("models")}, "", ignored) for table in tables.values()]
    return None if ignored or None in models else {m.name for each in models if each for m in each.models}


def _check_aliases(aliases: dict[str, str], served: set[str], complaints: list[str]) -> None:
    for alias, target in aliases.items():
        where = key_path("aliases", alias)
        if alias in served:
            complaints.append(
                f"{where}: a provider serves a model of that name; call the alias something else"
            )
        if target == alias:
            complaints.append(f"{where}: names itself; name a model that a provider serves")
        elif target in aliases:
            complaints.append(
                f'{where}: "{target}" is an alias too, and aliases are not followed further;'
                " name a model that a provider serves"
            )
        elif target not in served:
            complaints.append(f'{where}: no provider serves "{target}"{did_you_mean(target, served)}')


def _check_terms(
    keys: dict[str, KeySettings], known: set[str], extensions: Collection[str], complaints: list[str]
) -> None:
    for where, key in keys.items():
        complaints.extend(models_complaints(key, where, known))
        complaints.extend(unheeded(key, where, extensions))


def models_complaints(terms: KeyTerms, where: str, known: set[str]) -> list[str]:
    """Return complaints of models that nobody serves; `where` is the path of a key, `known` what there is."""
    path = key_path(where, "models")
    return [
        f'{path}[{index}]: there is no model or alias "{name}"{did_you_mean(name, known)}'
        for index, name in enumerate(terms.models)
        if name != EVERY_MODEL and name not in known
    ]


def _check_access(
    gateway: GatewaySettings, keys: dict[str, KeySettings], complaints: list[str], *, any_keys: bool
) -> None:
    if any_keys and gateway.allow_anonymous:
        complaints.append("allow_anonymous: would let everybody past the keys; remove it, or all [[keys]]")
    if not (any_keys or gateway.allow_anonymous):
        complaints.append(
            "keys: there are none, so nobody could be served; add [[keys]] with a name and a key,"
            " or set allow_anonymous = true to serve everybody who can connect"
        )
    complaints.extend(
        f"{where}.key: is the same as admin_token; generate another"
        for where, key in keys.items()
        if key.key == gateway.admin_token
    )
