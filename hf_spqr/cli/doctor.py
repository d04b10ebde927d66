"""``hf-spqr doctor``: what is installed, what was compiled and whether it computes right, what is registered."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from hf_spqr.cli.common import JsonOption, out_console, print_json
from hf_spqr.report.records import library_versions

AMX_FLAGS = ("amx_tile", "amx_bf16", "amx_int8")
ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512_vnni", "avx512_bf16",
             *AMX_FLAGS, "asimd", "asimddp")  # fmt: skip
"""As Linux names them; the last two are ARM's NEON and its integer dot product."""
OPTIONAL = ("datasets", "matplotlib", "lm_eval", "peft", "compressed_tensors")


def doctor_command(json: JsonOption = False) -> None:
    """Say what this installation can do, and why it cannot do more.

    The compiled kernels are tried on small random layers, on the CPU and on every GPU, against PyTorch.

    Exit code 0 when models can be quantized and loaded (through the PyTorch reference where the kernels are missing),
    1 when something essential is broken.

    [bold]Examples[/bold]

      hf-spqr doctor

      hf-spqr doctor --json
    """
    data: dict[str, Any] = {
        "versions": library_versions(),
        "optional": {name: importlib.util.find_spec(name) is not None for name in OPTIONAL},
        "kernels": kernels(),
        "cpu": cpu(),
        "cuda": cuda(),
        "transformers": registration(),
        "autoload": autoload(),
    }
    data["tried"] = tried(data)
    data["ok"] = data["transformers"]["registered"] and not any(found["wrong"] for found in data["tried"].values())
    data["advice"] = advice(data)
    if json:
        print_json(data)
    else:
        show(data)
    if not data["ok"]:
        raise typer.Exit(1)


def kernels() -> dict[str, Any]:
    """Whether the compiled extension is there and loads, the reason when not, and the level that its kernels use."""
    spec = importlib.util.find_spec("hf_spqr._C")
    if spec is None or spec.origin is None:
        reason = "not built: hf-spqr was installed where no C++20 compiler or no torch was found"
        return {"compiled": False, "file": None, "level": None, "reason": reason}
    try:
        torch = importlib.import_module("torch")
        importlib.import_module("hf_spqr._C")
    except (ImportError, OSError) as error:
        reason = f"built, but it cannot be loaded: {error}"
        return {"compiled": False, "file": spec.origin, "level": None, "reason": reason}
    return {"compiled": True, "file": spec.origin, "level": torch.ops.hf_spqr.cpu_isa(), "reason": None}


def cpu() -> dict[str, Any]:
    """Name, instruction sets that the kernels can use, cores and torch's threads."""
    import torch

    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):  # x86, ARM
                flags = set(value.split())
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": name,
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
    }


def cuda() -> dict[str, Any]:
    """Whether torch was built for CUDA, which devices it sees, and whether our kernels for them were loaded."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        ops = importlib.import_module("hf_spqr.ops")
        loaded, reason = ops.COMPILED_CUDA, ops.WHY_NOT.get("_C_cuda")
    except Exception as error:  # reported with the registration
        loaded, reason = False, f"{type(error).__name__}: {error}"
    return {"built": torch.version.cuda, "devices": devices, "kernels": loaded, "reason": reason}


def tried(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each device with compiled kernels: how many products were compared with PyTorch's, and which were wrong."""
    devices = ["cpu"] if data["kernels"]["compiled"] else []
    devices += [f"cuda:{i}" for i in range(len(data["cuda"]["devices"]))] if data["cuda"]["kernels"] else []
    if not devices or not data["transformers"]["registered"]:
        return {}
    check = importlib.import_module("hf_spqr.bench.check")
    findings: dict[str, dict[str, Any]] = {}
    for device in devices:
        try:
            findings[device] = asdict(check.check_kernels(device))
        except Exception as error:  # an error of the driver, or a kernel that cannot be launched
            findings[device] = {"products": 0, "wrong": [f"{type(error).__name__}: {error}"]}
    return findings


def registration() -> dict[str, Any]:
    """Whether ``import hf_spqr`` registers the methods with Transformers."""
    try:
        importlib.import_module("hf_spqr.integrations")
        from transformers.quantizers import auto

        methods = [name for name in ("hf_spqr", "omniquant") if name in auto.AUTO_QUANTIZER_MAPPING]
    except Exception as error:  # whatever is broken, the doctor's job is to say so
        return {"registered": False, "methods": [], "reason": f"{type(error).__name__}: {error}"}
    reason = None if "hf_spqr" in methods else "import hf_spqr did not register the method"
    return {"registered": "hf_spqr" in methods, "methods": methods, "reason": reason}


def autoload() -> dict[str, Any]:
    """Whether plain ``from_pretrained`` finds the methods without ``import hf_spqr``."""
    names = [point.name for point in metadata.entry_points(group="torch.backends")]
    if "hf_spqr" not in names:
        return {"active": False, "reason": "the entry point is not installed; pip install hf-spqr (or -e .)"}
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        return {"active": False, "reason": "switched off by TORCH_DEVICE_BACKEND_AUTOLOAD=0"}
    if importlib.util.find_spec("hf_spqr_autoload") is None:
        return {"active": False, "reason": "hf_spqr_autoload.py is missing; reinstall hf-spqr"}
    return {"active": True, "reason": None}


def advice(data: dict[str, Any]) -> list[str]:
    """What would help, in the order of importance."""
    hints = []
    if not data["transformers"]["registered"]:
        hints.append(f"transformers does not know the method: {data['transformers']['reason']}")
    if not data["kernels"]["compiled"]:
        hints.append(
            "models run through the PyTorch reference, which is slow. Install a C++20 compiler (g++ 11 or clang 14) "
            "and torch, then: pip install --force-reinstall --no-deps --no-cache-dir hf-spqr (or -e .)"
        )
    for device, found in data["tried"].items():
        if found["wrong"]:
            more = f" and {len(found['wrong']) - 1} more" if len(found["wrong"]) > 1 else ""
            hints.append(
                f"the compiled kernels are wrong on {device} ({found['wrong'][0]}{more}). Load models with "
                'quantization_config=SpQRConfig(backend="reference") or OmniQuantConfig(backend="reference"), which '
                "do without, and report this with the output of: hf-spqr doctor --json"
            )
    level = data["kernels"]["level"]
    if level not in (None, "amx") and set(AMX_FLAGS) <= set(data["cpu"]["isa"]):
        hints.append(
            f"the processor has AMX, but the kernels use {level}: they were compiled by something older than g++ 11, "
            "clang 12 or binutils 2.35, or the system refuses AMX to this process (Linux before 5.16)"
        )
    if data["cuda"]["devices"] and not data["cuda"]["kernels"]:
        hints.append(
            "models on a GPU run through the PyTorch reference, which is slow: the CUDA kernels were not loaded "
            f"({data['cuda']['reason']}). Install a CUDA toolkit with nvcc, then reinstall with HF_SPQR_CUDA=1"
        )
    if not data["autoload"]["active"]:
        hints.append(f"write `import hf_spqr` before from_pretrained; autoload is off: {data['autoload']['reason']}")
    return hints


def show(data: dict[str, Any]) -> None:
    """Print the findings for people."""
    console = out_console()
    yes, no = "[green]yes[/green]", "[yellow]no[/yellow]"

    def line(title: str, text: str) -> None:
        console.print(f"[bold]{title:<14}[/bold]{text}", soft_wrap=True)

    line("versions", ", ".join(f"{name} {version}" for name, version in data["versions"].items()))
    line("platform", f"{platform.platform()}, {sys.executable}")
    compiled = data["kernels"]
    found = f"{yes} {compiled['file']}, using {compiled['level']}"
    line("kernels", found if compiled["compiled"] else f"{no} {compiled['reason']}")
    isa = " ".join(data["cpu"]["isa"]) or "none known"
    line("cpu", f"{data['cpu']['name']}, {data['cpu']['cores']} cores, {data['cpu']['threads']} torch threads")
    line("instructions", f"{isa} (torch: {data['cpu']['torch_capability']})")
    built, devices = data["cuda"]["built"], data["cuda"]["devices"]
    line(
        "cuda",
        f"{yes} {', '.join(devices)}" if devices else f"{no} " + ("no device" if built else "torch is CPU only"),
    )
    if devices:
        line("cuda kernels", yes if data["cuda"]["kernels"] else f"{no} {data['cuda']['reason']}")
    for device, checked in data["tried"].items():
        wrong = f"[red]wrong[/red] {escape('; '.join(checked['wrong'][:3]))}"
        right = f"{yes} {checked['products']} products on {device} agree with PyTorch's"
        line("tried", wrong if checked["wrong"] else right)
    registered = data["transformers"]
    line("registered", f"{yes} {', '.join(registered['methods'])}" if registered["methods"] else f"{no}")
    loaded = data["autoload"]
    line("autoload", yes if loaded["active"] else f"{no} {loaded['reason']}")
    line("optional", ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in data["optional"].items()))
    for hint in data["advice"]:
        console.print(f"[yellow]note:[/yellow] {escape(hint)}", soft_wrap=True)
    console.print("[green]ready[/green]" if data["ok"] else "[red]not usable[/red]")
