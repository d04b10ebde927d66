"""``import hf_spqr`` is quick and registers all the same, before and after torch and Transformers are imported."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import hf_spqr

ROOT = Path(hf_spqr.__file__).parents[1]
HEAVY = "print(sorted({'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules)))"
LOOKUP = """
tables = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
print(*(table.get("omniquant").__name__ for table in tables))
"""


def python(code: str) -> list[str]:
    """Lines that ``code`` prints, run where no entry point imports or registers anything."""
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("use", ["dir(hf_spqr)", "hf_spqr.ConfigError", "from hf_spqr import CheckpointError"])
def test_the_import_loads_nothing_heavy(use: str) -> None:
    assert python(f"import sys, hf_spqr\n{use}\n{HEAVY}") == ["[]"]


@pytest.mark.parametrize(
    "call",
    [
        *(f"{name} --help" for name in ("quantize", "eval", "inspect", "bench")),
        *(f"{name} -h" for name in ("convert", "export", "push", "doctor")),
        "--help", "--version", "", "quantize", "quantize a b --bits many -d text.txt", "eval a --no-such-option",
        "inspect /nowhere/model",
    ],
)  # fmt: skip
def test_help_and_wrong_calls_load_nothing_heavy(call: str) -> None:
    code = f"""
import sys
from hf_spqr.cli import main
try:
    main({call.split()!r})
except SystemExit as stop:
    print(stop.code or 0)
{HEAVY}
"""
    *_, status, heavy = python(code)
    assert heavy == "[]"
    assert int(status) == (1 if "nowhere" in call else 0 if call.endswith(("-h", "--help", "--version")) else 2)


def test_version_is_that_of_the_package() -> None:
    assert python("from hf_spqr.cli import main; main(['--version'])") == [f"hf-spqr {hf_spqr.__version__}"]
    assert f'\nversion = "{hf_spqr.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("first", ["", "import torch", "import transformers", "import transformers.quantizers.auto"])
def test_registers_whatever_was_imported_before(first: str) -> None:
    lines = python(f"{first}\nimport hf_spqr\nfrom transformers.quantizers import auto\n{LOOKUP}")
    assert lines == ["OmniQuantConfig OmniQuantQuantizer"]


def test_tables_that_somebody_holds_already_get_the_methods() -> None:
    code = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as held\nimport hf_spqr\nprint(*held)"
    assert {"hf_spqr", "omniquant"} <= set(python(code)[0].split())


@pytest.mark.parametrize("order", ["torch, hf_spqr", "hf_spqr, torch"])
def test_ops_are_there_with_torch(order: str) -> None:
    """As a program that torch.export saved needs them."""
    assert python(f"import {order}\nprint(torch.ops.hf_spqr.spqr_linear.default)") == ["hf_spqr.spqr_linear.default"]


@pytest.mark.parametrize(("version", "enough"), [("4.57.3", False), ("5.16.1", False), ("5.17.0.dev0", True)])
def test_an_older_transformers_is_named(version: str, enough: bool) -> None:
    code = f"import transformers\ntransformers.__version__ = {version!r}\ntry:\n    import hf_spqr.integrations\n"
    said = python(f"{code}except ImportError as error:\n    print(error)")
    assert (said == []) == enough
    assert enough or "needs Transformers 5.17 or newer, and " + version in said[0]


def test_public_names() -> None:
    assert set(hf_spqr.__all__) <= set(dir(hf_spqr))
    for name in hf_spqr.__all__:
        assert getattr(hf_spqr, name).__name__ == name
    with pytest.raises(AttributeError, match="'hf_spqr' has no attribute 'SpqrConfig'"):
        _ = hf_spqr.SpqrConfig
    config = hf_spqr.SpQRConfig(bits=4)
    assert pickle.loads(pickle.dumps(config)) == config
