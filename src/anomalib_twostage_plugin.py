# SPDX-License-Identifier: Apache-2.0
"""Makes a stock ``anomalib`` know this package's model and datamodule.

anomalib has no plugin mechanism, but nothing in it works before ``import torch``, and PyTorch calls the entry points
of the group ``torch.backends`` at the end of that import. :func:`register` is such an entry point. It only starts to
watch; nothing of anomalib or of this package's model is imported until the program itself imports ``anomalib.models``
or ``anomalib.data``:

1. A meta path finder, which never finds anything, notices the first import below ``anomalib``.
2. The import system binds every submodule on its package once that submodule has finished loading. While waiting,
   ``anomalib`` therefore has a module class that notices new attributes. No loader or spec is touched, and it also
   works when torch is first imported by a half-loaded ``anomalib.models``.
3. When ``anomalib.models`` (``anomalib.data``) is bound, the model (datamodule) is added to it, and once both are
   there the finder and the class are taken away again.

Whatever goes wrong, the import that is running must not fail: the plugin warns once and steps aside.

``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns PyTorch's autoload off; ``import anomalib_twostage`` then registers instead.
This module needs the standard library only, because every program that imports torch pays for it.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["WatchedPackage", "register"]

_FACE = "anomalib_twostage"


class WatchedPackage(ModuleType):
    """Class for a package whose finished submodules may be what the registration waits for."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if isinstance(value, ModuleType):
            _register_loaded()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        """Pickle by name: cloudpickle does that for plain modules only."""
        return import_module, (self.__name__,)


class _Finder:
    """Meta path finder that finds nothing and waits for ``anomalib``."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> None:  # noqa: ARG004
        """Start to watch ``anomalib`` before its first submodule is imported."""
        if fullname.startswith("anomalib."):
            _watch()


def register() -> None:
    """Add the model and the datamodule to anomalib, now or as soon as anomalib is imported.

    Safe to call any number of times. Never raises: a failure is reported by one warning.

    Example:
        >>> from anomalib_twostage_plugin import register
        >>> register()
    """
    if not _waiting:
        return
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
    _watch()
    _register_loaded()


def _add_datamodule(data: ModuleType) -> None:
    # get_datamodule() looks in anomalib.data, the command line among the subclasses of AnomalibDataModule.
    vars(data).setdefault("SampleTextures", import_module(_FACE).SampleTextures)


def _add_model(models: ModuleType) -> None:
    # An anomalib without this whitelist is not one this package knows, so ask for it before importing the model.
    allowed_modules = models.ALLOWED_MODULES
    # The import alone is enough for the command line, list_models() and get_model("two_stage_superpixel"), which go
    # through the subclasses of AnomalibModule. A class path without dots is looked up in anomalib.models.
    vars(models).setdefault("TwoStageSuperpixel", import_module(_FACE).TwoStageSuperpixel)
    allowed_modules.update({_FACE, f"{_FACE}.model.lightning_model"})


# What is still to be added, by the module it has to wait for.
_waiting: dict[str, Callable[[ModuleType], None]] = {
    "anomalib.data": _add_datamodule,
    "anomalib.models": _add_model,
}


def _watch() -> None:
    package = sys.modules.get("anomalib")
    if isinstance(package, WatchedPackage) or not isinstance(package, ModuleType):
        return
    if type(package) is ModuleType:
        package.__class__ = WatchedPackage
    else:
        msg = f"the module anomalib is a {type(package).__name__}"
        _step_aside(TypeError(msg))


def _stop_watching() -> None:
    # A new list, because an import may be going through the old one right now.
    sys.meta_path = [finder for finder in sys.meta_path if finder is not _Finder]
    package = sys.modules.get("anomalib")
    if isinstance(package, WatchedPackage):
        package.__class__ = ModuleType  # type: ignore[assignment]


def _is_loading(name: str) -> bool:
    # Private, but there is no public way to ask. Should it go, a half-loaded module ends in the warning, no worse.
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False)


def _register_loaded() -> None:
    """Add what can be added; the rest keeps waiting."""
    loaded = [name for name in _waiting if name in sys.modules]
    if not loaded:
        return
    # If a module of this package was the first to import anomalib, it is only half there now, and the model could not
    # be imported. Its own binding on the package, once it is finished, comes back here. The same holds for anomalib.
    if any(_is_loading(name) for name in list(sys.modules) if name in _waiting or name.startswith(f"{_FACE}.")):
        return
    for name in loaded:
        add = _waiting.pop(name, None)  # popped first, because the import of the model comes back here too
        if add is None:
            continue
        try:
            add(sys.modules[name])
        except Exception as error:
            _step_aside(error)
    if not _waiting:
        _stop_watching()


def _step_aside(error: Exception) -> None:
    _waiting.clear()
    _stop_watching()
    version = getattr(sys.modules.get("anomalib"), "__version__", "of unknown version")
    msg = (
        f"anomalib-twostage could not make TwoStageSuperpixel and SampleTextures known to anomalib {version} "
        f"({type(error).__name__}: {error}). anomalib works on without them. "
        'To repair: pip install --upgrade "anomalib>=2.7" anomalib-twostage. '
        "To silence: pip uninstall anomalib-twostage."
    )
    try:
        warnings.warn(msg, stacklevel=2)
    except Warning:  # warnings are errors here, but an import must not fail
        print(msg, file=sys.stderr)
