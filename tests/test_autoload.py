"""Plain from_pretrained finds the methods without ``import hf_spqr``, when torch calls the entry point."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_spqr_autoload

ROOT = Path(hf_spqr_autoload.__file__).parent


def run(code: str, **environment: str) -> str:
    variables = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **environment}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=variables, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_only_the_standard_library_is_imported():
    tree = ast.parse(Path(hf_spqr_autoload.__file__).read_text())
    imported = {n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)}
    imported |= {alias.name for n in tree.body if isinstance(n, ast.Import) for alias in n.names}
    assert {name.split(".")[0] for name in imported} <= set(sys.stdlib_module_names)
    assert "torch" not in run("import hf_spqr_autoload, sys; hf_spqr_autoload.init(); print(*sys.modules)").split()


LOOKUP = """
import sys
import hf_spqr_autoload
{before}
hf_spqr_autoload.init()
hf_spqr_autoload.init()
import transformers
from transformers.quantizers import auto
print("early", "hf_spqr" in sys.modules, any(type(f).__name__ == "_Finder" for f in sys.meta_path))
print("known", "gptq" in auto.AUTO_QUANTIZER_MAPPING, "nonsense" in auto.AUTO_QUANTIZER_MAPPING)
print("still", "hf_spqr" in sys.modules)
config = auto.AutoQuantizationConfig.from_dict({{"quant_method": "hf_spqr", "bits": 4}})
print(type(config).__name__, config.bits, auto.AUTO_QUANTIZER_MAPPING["hf_spqr"].__name__)
"""


@pytest.mark.parametrize("before", ["", "import transformers.quantizers.auto"])
def test_lookup_of_the_method_imports_the_package(before):
    lines = run(LOOKUP.format(before=before)).splitlines()
    assert lines == ["early False False", "known True False", "still False", "SpQRConfig 4 SpQRQuantizer"]


def test_a_broken_package_does_not_break_transformers(tmp_path):
    (tmp_path / "hf_spqr").mkdir()
    (tmp_path / "hf_spqr" / "__init__.py").write_text("raise RuntimeError('broken')")
    code = f"""
import sys
import hf_spqr_autoload
hf_spqr_autoload.init()
sys.path.insert(0, {str(tmp_path)!r})
from transformers.quantizers import auto
print("hf_spqr" in auto.AUTO_QUANTIZER_MAPPING, "gptq" in auto.AUTO_QUANTIZER_MAPPING)
"""
    assert run(code).split() == ["False", "True"]


def test_entry_point_is_declared():
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."torch.backends"]\nhf_spqr = "hf_spqr_autoload:init"' in text


@pytest.mark.parametrize("first", ["import torch", "import transformers.quantizers.auto  # which imports torch"])
def test_plain_load_and_switch(tmp_path, first):
    """The whole way, with an installed entry point simulated by metadata on the path."""
    info = tmp_path / "hf_spqr_test-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-spqr-test\nVersion: 0.1\n")
    (tmp_path / "one_more.py").touch()
    (info / "entry_points.txt").write_text("[torch.backends]\nhf_spqr_test = hf_spqr_autoload:init\n")
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]
{first}
from transformers.quantizers import auto
import one_more
print("hf_spqr" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
"""
    assert run(code, TORCH_DEVICE_BACKEND_AUTOLOAD="1").split() == ["True"]
    assert run(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0").split() == ["False"]
