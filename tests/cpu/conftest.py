from collections.abc import Callable

import pytest

from tests.cpu import emulated
from tests.cuda import emulator


@pytest.fixture(scope="session")
def run_emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """``run(cases) -> results`` on the AMX kernels with emulated tiles."""
    if (reason := emulated.missing()) is not None:
        pytest.skip(reason)
    program = emulated.build(emulator.ROOT / "build" / "emulator")
    folder = tmp_path_factory.mktemp("amx")
    return lambda cases: emulator.run(program, cases, folder)
