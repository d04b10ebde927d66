"""PEP 517 backend: setuptools' own, with the torch of the target environment made visible.

pip runs a build with the interpreter of the environment that it installs into, but hides that environment's packages.
Before each hook we append the folder that holds torch to the *end* of `sys.path`, so that setup.py can compile against
exactly the torch that will load the result, while the isolated setuptools keeps priority. Where no torch is found the
build continues and setup.py makes a wheel without compiled kernels.

Builds of one checkout share its folder `build` and wait for each other.
"""

import importlib.machinery
import os
import sys
import sysconfig
from contextlib import contextmanager

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  (PEP 517 hooks that need no change)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def _candidates():
    """Folders that may hold torch: one named by the user, the interpreter's own, the active environment's."""
    explicit = os.environ.get("HF_SPQR_TORCH_SITE")
    if explicit:
        yield explicit
    yield sysconfig.get_path("purelib")
    yield sysconfig.get_path("platlib")
    for venv in _environments():
        yield os.path.join(venv, "lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")
        yield os.path.join(venv, "Lib", "site-packages")


def _environments():
    """The active one (uv hides its name, but not its place on the PATH), and .venv, which uv uses unasked."""
    if os.environ.get("VIRTUAL_ENV"):
        yield os.environ["VIRTUAL_ENV"]
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if os.path.exists(os.path.join(os.path.dirname(folder), "pyvenv.cfg")):
            yield os.path.dirname(folder)
    yield os.path.join(os.path.dirname(os.path.dirname(__file__)), ".venv")


def _expose_torch():
    find = importlib.machinery.PathFinder.find_spec
    if find("torch") is not None:
        return  # no isolation, or torch was put into the build environment
    for path in _candidates():
        if path and find("torch", [path]) is not None:
            sys.path.append(path)
            return


@contextmanager
def _alone():
    folder = os.open(os.path.dirname(__file__), os.O_RDONLY) if fcntl else None
    try:
        if folder is not None:
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        if folder is not None:
            os.close(folder)


def _wrapped(name):
    hook = getattr(_setuptools, name)

    def run(*args, **kwargs):
        _expose_torch()
        with _alone():
            return hook(*args, **kwargs)

    run.__name__ = name
    return run


for _hook in (
    "get_requires_for_build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "prepare_metadata_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "build_wheel",
    "build_editable",
    "build_sdist",
):
    globals()[_hook] = _wrapped(_hook)
