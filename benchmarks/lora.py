"""LoRA on packed layers: the loss of every step, perplexity before and after, and reload and merge checked.

    python -m benchmarks.lora                 # results/lora.json, and docs/lora.svg if matplotlib is there

The demo model, which learned Python's standard library, is quantized with 2-bit codes by both methods. Adapters on
all of its linear layers are then trained through PEFT on another kind of text, the pages of docs/; the packed weights
stay as they are. Perplexity is that of two pages that are left out. The unquantized model gets the same training.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_spqr
from benchmarks.machine import save
from hf_spqr.calibration.data import calibration_windows
from hf_spqr.evaluate import perplexity

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "examples" / "demo-model"
CALIBRATION = ROOT / "examples" / "demo-calibration.jsonl"
TEST = ("cli.md", "format.md")
SEQLEN = 256
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUANTIZED = {"dataset": str(CALIBRATION), "nsamples": 32, "seqlen": SEQLEN}
CONFIGS = {
    "unquantized": lambda: None,
    "SpQR 2 bit, groups of 16": lambda: hf_spqr.SpQRConfig(2, 16, target_bits=3.0, **QUANTIZED),
    "OmniQuant 2 bit, groups of 32": lambda: hf_spqr.OmniQuantConfig(bits=2, group_size=32, epochs=1, **QUANTIZED),
}


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def pages(left_out: bool) -> list[str]:
    """The pages to train on, or those that are left out."""
    return [page.read_text() for page in sorted((ROOT / "docs").glob("*.md")) if (page.name in TEST) == left_out]


def heldout(model: nn.Module) -> float:
    """Perplexity of the pages that are left out."""
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    return perplexity(model, tokenizer, pages(True), protocol="concatenated", seqlen=SEQLEN).perplexity


@torch.no_grad()
def logits(model: nn.Module, windows: list[torch.Tensor]) -> torch.Tensor:
    model.eval()
    return model(torch.cat(windows[:2])).logits


def train(model: nn.Module, windows: list[torch.Tensor], steps: int, batch: int, rate: float) -> list[float]:
    """The loss in nats per token of every step; AdamW, the rate falls linearly to 0."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(0)
    losses = []
    model.train()
    for _ in range(steps):
        ids = torch.cat([windows[i] for i in torch.randint(len(windows), (batch,), generator=generator)])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(round(float(loss.detach()), 4))
    return losses


def run(config: Any, folder: Path, windows: list[torch.Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """Quantize, train, save the adapter, load it again, merge it; all numbers of one row."""
    whole = AutoModelForCausalLM.from_pretrained(BASE, quantization_config=config)
    whole.save_pretrained(folder / "model")
    model = load(folder / "model")
    before = heldout(model)
    torch.manual_seed(0)
    adapters = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=LAYERS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, adapters)
    start = time.perf_counter()
    losses = train(adapted, windows, options.steps, options.batch, options.rate)
    seconds = time.perf_counter() - start
    trained = logits(adapted, windows)
    adapted.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(load(folder / "model"), folder / "adapter")
    dense = load(folder / "model")
    dense = dense.dequantize() if config is not None else dense
    merged = PeftModel.from_pretrained(dense, folder / "adapter").merge_and_unload()
    return {
        "bits_per_weight": 16 if config is None else whole.quantization_report.bits_per_weight,
        "perplexity_before": before,
        "perplexity_after": heldout(adapted),
        "perplexity_merged": heldout(merged),
        "reloaded_equal": torch.equal(logits(again, windows), trained),
        "merged_max_difference": float((logits(merged, windows) - trained).abs().max()),
        "trainable_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "seconds_per_step": seconds / options.steps,
        "loss": losses,
    }


def smooth(losses: list[float], width: int = 10) -> list[float]:
    """Means over the last ``width`` steps."""
    return [sum(losses[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(losses))]


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "hf_spqr"}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for name, found in runs.items():
        (line,) = axes.plot(smooth(found["loss"]), label=name, linewidth=1.5)
        axes.plot(found["loss"], color=line.get_color(), alpha=0.2, linewidth=0.8)
    axes.set(xlabel="step", ylabel="training loss, nats per token")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--only", choices=CONFIGS, help="one of the models; nothing is written")
    options = parser.parse_args()
    windows = calibration_windows(pages(False), AutoTokenizer.from_pretrained(BASE), nsamples=10_000, seqlen=SEQLEN)
    runs = {}
    for name in [options.only] if options.only else CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = run(CONFIGS[name](), Path(folder), windows, options)
        print(name, {key: value for key, value in runs[name].items() if key != "loss"}, flush=True)
        print("  loss at every 20th step:", [round(loss, 3) for loss in smooth(runs[name]["loss"])[::20]], flush=True)
    if options.only:
        return
    settings = {key: value for key, value in vars(options).items() if key != "only"}
    print(save("lora", {"settings": {**settings, "windows": len(windows), "seqlen": SEQLEN}, "runs": runs}))
    try:
        plot(runs, ROOT / "docs" / "lora.svg")
    except ImportError:
        print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
