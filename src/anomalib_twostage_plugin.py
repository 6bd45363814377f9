# SPDX-License-Identifier: Apache-2.0
"""Makes a stock ``anomalib`` know this package's model and datamodule.

anomalib has no plugin mechanism, but nothing in it works before ``import torch``, and PyTorch calls the entry points
of the group ``torch.backends`` at the end of that import. :func:`register` is such an entry point. It only starts to
watch; nothing of anomalib or of ``anomalib_twostage`` is imported until the program itself imports ``anomalib.models``
or ``anomalib.data``:

1. A meta path finder, which never finds anything, notices the first import below ``anomalib``.
2. The import system binds every submodule on its package once that submodule has finished loading. While waiting,
   ``anomalib`` therefore has a module class that notices new attributes. No loader or spec is touched, and it also
   works when torch is first imported by a half-loaded ``anomalib.models``.
3. When one of the two is bound and no other part of anomalib is half loaded, ``anomalib_twostage`` is imported. Its
   last line calls :func:`register` again, which now adds the model and the datamodule to anomalib, and takes the
   finder and the class away.

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

__all__ = ["register"]

_FACE = "anomalib_twostage"
_WAITED_FOR = ("data", "models")  # parts of anomalib that look up names

_stepped_aside = False


def register() -> None:
    """Add the model and the datamodule to anomalib, now or as soon as anomalib is imported.

    Safe to call any number of times. Never raises: a failure is reported by one warning.

    Example:
        >>> from anomalib_twostage_plugin import register
        >>> register()
    """
    if _stepped_aside:
        return
    face = sys.modules.get(_FACE)
    if face is not None and hasattr(face, "SampleTextures") and hasattr(face, "TwoStageSuperpixel"):
        _add(face)
        return
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
    _watch()
    _import_face()  # if anomalib was there before


class _Finder:
    """Meta path finder that finds nothing and waits for ``anomalib``."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> None:  # noqa: ARG004
        """Start to watch ``anomalib`` before its first submodule is imported."""
        if fullname.startswith("anomalib."):
            _watch()


class _WatchedPackage(ModuleType):
    """Class for the package ``anomalib``, whose finished submodules the registration waits for."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if isinstance(value, ModuleType):
            _import_face()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        """Pickle by name: cloudpickle does that for plain modules only."""
        return import_module, (self.__name__,)


def _watch() -> None:
    package = sys.modules.get("anomalib")
    if isinstance(package, _WatchedPackage) or not isinstance(package, ModuleType):
        return
    if type(package) is ModuleType:
        package.__class__ = _WatchedPackage
    else:
        msg = f"the module anomalib is a {type(package).__name__}"
        _step_aside(TypeError(msg))


def _stop_watching() -> None:
    # A new list, because an import may be going through the old one right now.
    sys.meta_path = [finder for finder in sys.meta_path if finder is not _Finder]
    package = sys.modules.get("anomalib")
    if isinstance(package, _WatchedPackage):
        package.__class__ = ModuleType  # type: ignore[assignment]


def _import_face() -> None:
    """Import the face, which registers, if anomalib is ready for it and nobody imports it already."""
    package = sys.modules.get("anomalib")
    if package is None or _FACE in sys.modules:
        return
    names = [name.split(".") for name in list(sys.modules) if name.startswith("anomalib.")]
    parts = {name[1] for name in names if len(name) == 2}
    # A part that is half loaded is not bound yet. The face may need it; once it is bound, that comes back here.
    if parts.isdisjoint(_WAITED_FOR) or parts - vars(package).keys():
        return
    try:
        import_module(_FACE)
    except Exception as error:
        _step_aside(error)


def _add(face: ModuleType) -> None:
    try:
        models, data = import_module("anomalib.models"), import_module("anomalib.data")
        # The import alone is enough for the command line, list_models() and get_model("two_stage_superpixel"), which
        # go through the subclasses of AnomalibModule. A class path without dots is looked up in these two modules, one
        # with dots in a whitelist; an anomalib without it is not one this package knows.
        models.ALLOWED_MODULES.update({_FACE, f"{_FACE}.model.lightning_model"})
        vars(models).setdefault("TwoStageSuperpixel", face.TwoStageSuperpixel)
        vars(data).setdefault("SampleTextures", face.SampleTextures)
    except Exception as error:
        _step_aside(error)
    else:
        _stop_watching()


def _step_aside(error: Exception) -> None:
    global _stepped_aside
    _stepped_aside = True
    _stop_watching()
    version = getattr(sys.modules.get("anomalib"), "__version__", "of unknown version")
    msg = (
        f"anomalib-twostage could not make TwoStageSuperpixel and SampleTextures known to anomalib {version} "
        f"({type(error).__name__}: {error}). anomalib works on without them. "
        'It is made for anomalib 2.7: pip install "anomalib>=2.7,<2.8". '
        "If that is there, install anomalib-twostage anew from the file or address that it came from. "
        "To silence: pip uninstall anomalib-twostage."
    )
    try:
        warnings.warn(msg, stacklevel=2)
    except Warning:  # warnings are errors here, but an import must not fail
        print(msg, file=sys.stderr)
