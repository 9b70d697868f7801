"""
Makers for drop-ins: a word, and the dotted path of what it makes.

    from crabtwist.plugins import ProviderMaker

    acme = ProviderMaker("acme", "acme_crabtwist.provider:AcmeProvider")

in a file of any name in a `twisted/plugins` directory is a whole drop-in.  A path is
"package.module:Name" or "package.module.Name" and is imported when a configuration names the word.
What it leads to is called to make the thing; its attribute `Settings`, if it has one, is the settings
class.

This module imports little, for twistd loads it to list its commands.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import attrs
from twisted.plugin import IPlugin
from zope.interface import implementer

from crabtwist.errors import ConfigurationError
from crabtwist.interfaces import IExtensionMaker, ILedgerMaker, IProviderMaker, IStorageMaker


@attrs.frozen
class NoSettings:
    """The settings of what takes none."""


class _Maker:
    """What all makers do: find what is at `path`, when it is wanted."""

    path: str

    def settings_class(self) -> type[attrs.AttrsInstance]:
        """Return the factory's `Settings`.  Raises `ConfigurationError`."""
        return _settings_class(self.path)


class _PlainMaker(_Maker):
    def make(self, settings: object, services: object) -> Any:
        """Return a new one.  Raises `ConfigurationError`."""
        return _factory(self.path)(settings, services)


@implementer(IPlugin, IProviderMaker)
@attrs.frozen
class ProviderMaker(_Maker):
    """Makes providers by calling what is at `path` with `(name, settings, services)`."""

    kind: str
    path: str

    def make(self, name: str, settings: object, services: object) -> Any:
        """Return a new provider.  Raises `ConfigurationError`."""
        return _factory(self.path)(name, settings, services)


@implementer(IPlugin, IExtensionMaker)
@attrs.frozen
class ExtensionMaker(_PlainMaker):
    """Makes an extension by calling what is at `path` with `(settings, services)`."""

    name: str
    path: str


@implementer(IPlugin, IStorageMaker)
@attrs.frozen
class StorageMaker(_PlainMaker):
    """Makes a store by calling what is at `path` with `(settings, services)`."""

    kind: str
    path: str


@implementer(IPlugin, ILedgerMaker)
@attrs.frozen
class LedgerMaker(_PlainMaker):
    """Makes a ledger by calling what is at `path` with `(settings, services)`."""

    kind: str
    path: str


def _factory(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        return attrgetter(name)(importlib.import_module(module))  # type: ignore[no-any-return] # checked by use
    except Exception as error:
        # A module's own code may raise anything while it is imported.
        raise ConfigurationError([f"{path}: cannot be imported: {type(error).__name__}: {error}"]) from error


def _settings_class(path: str) -> type[attrs.AttrsInstance]:
    found = getattr(_factory(path), "Settings", NoSettings)
    if not (isinstance(found, type) and attrs.has(found)):
        raise ConfigurationError([f"{path}: its `Settings` must be an attrs class"])
    return found
