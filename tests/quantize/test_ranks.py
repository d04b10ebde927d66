"""Several processes quantize a model together: SpQR as one process does, to the bit; what fails, fails on all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from hf_spqr import CalibrationError, NonFiniteError, OmniQuantConfig, RankError, SpQRConfig
from hf_spqr.nn import PackedExperts, PackedLinear
from hf_spqr.quantize import quantize_model
from hf_spqr.quantize.ranks import Ranks
from tests.ranks import run_ranks
from tests.tiny_models import byte_tokenizer, tiny_model

pytestmark = pytest.mark.slow

COMMON = {"bits": 3, "nsamples": 24, "seqlen": 256}  # three batches of 2048 tokens: ranks get one and two
CASES = {
    "default": ("llama", {}),
    "biases, sequential": ("qwen2", {"true_sequential": True, "act_order": False}),
    "budget": ("llama", {"target_bits": 5.5}),
    "experts": ("mixtral", {"bits": 4}),
    "experts, budget": ("qwen3_moe", {"bits": 4, "target_bits": 6.0, "true_sequential": True}),
    "shared, latent": ("deepseek_v3", {"bits": 4}),
    "encoder-decoder": ("t5", {}),
}
OMNIQUANT = OmniQuantConfig(3, 32, nsamples=12, seqlen=64, epochs=4, batch_size=4)


def texts() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    return ["".join(chr(97 + int(i)) for i in torch.randint(0, 26, (700,), generator=generator)) for _ in range(12)]


def base(kind: str) -> torch.nn.Module:
    if kind != "t5":
        return tiny_model(kind)
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 258}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def quantized(kind: str, config: SpQRConfig | OmniQuantConfig) -> dict[str, object]:
    """All tensors of the quantized model and what the report says, times left out."""
    model = base(kind)
    config.dataset = texts()
    report = quantize_model(model, config, tokenizer=byte_tokenizer(), progress=False)
    layers = [(x.name, x.nbytes, x.outliers, x.error, x.undersampled) for x in report.layers]
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "packed": sum(isinstance(m, PackedLinear | PackedExperts) for m in model.modules()),
        "layers": layers,
        "notes": report.notes,
        "config": report.config,
        "tokens": report.calibration.tokens,
    }


def on_a_rank() -> dict[str, object]:
    return {name: quantized(kind, SpQRConfig(**{**COMMON, **fields})) for name, (kind, fields) in CASES.items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, object]]:
    return run_ranks(on_a_rank)


@pytest.mark.parametrize("name", CASES)
def test_spqr_is_that_of_one_process(name, ranks):
    kind, fields = CASES[name]
    alone = quantized(kind, SpQRConfig(**{**COMMON, **fields}))
    assert alone["packed"] >= 4
    for rank in ranks:
        got = rank[name]
        assert got["tensors"].keys() == alone["tensors"].keys()
        different = [key for key, tensor in alone["tensors"].items() if not torch.equal(got["tensors"][key], tensor)]
        assert not different
        assert {key: got[key] for key in got if key != "tensors"} == {k: alone[k] for k in alone if k != "tensors"}


def learn() -> dict[str, dict[str, object]]:
    return {kind: quantized(kind, OMNIQUANT) for kind in ("llama", "mixtral")}


def test_omniquant_divides_the_samples_of_a_step():
    """Sums of gradients have another order, so that numbers differ, but no more than learning makes of rounding."""
    alone, (one, other) = learn(), run_ranks(learn)
    for kind, first in one.items():
        assert all(torch.equal(first["tensors"][name], tensor) for name, tensor in other[kind]["tensors"].items())
        assert [name for name, *_ in first["layers"]] == [name for name, *_ in alone[kind]["layers"]]
        losses, expected = (
            [float(note.split("before and ")[1].split()[0]) for note in result["notes"] if "training" in note]
            for result in (first, alone[kind])
        )
        assert len(losses) == 2
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0.05, atol=0)


def quantize_and_save(base: Path, out: Path) -> dict[str, torch.Tensor]:
    config = SpQRConfig(**COMMON, dataset=texts(), tokenizer=byte_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    model.save_pretrained(out)  # Transformers writes on rank 0 only
    if dist.is_initialized():
        dist.barrier()
    return AutoModelForCausalLM.from_pretrained(out).state_dict()


def test_inside_from_pretrained(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    alone = quantize_and_save(tmp_path / "base", tmp_path / "alone")
    for got in run_ranks(quantize_and_save, tmp_path / "base", tmp_path / "together"):
        assert got.keys() == alone.keys() and all(torch.equal(got[name], alone[name]) for name in alone)
    assert {p.name for p in (tmp_path / "together").iterdir()} == {p.name for p in (tmp_path / "alone").iterdir()}


def fail_on_one(what: str) -> tuple[type, str, bool]:
    model, config = tiny_model("llama"), SpQRConfig(**COMMON)
    config.dataset = texts() if what != "few batches" else texts()[:1]
    rank = dist.get_rank()
    if what == "weight" and rank == 1:
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = math.nan
    if what == "activation" and rank == 1:
        model.model.layers[1].input_layernorm.weight.data.fill_(3e38)  # times what is about 1
    if what == "data" and rank == 0:
        config.dataset = []
    try:
        quantize_model(model, config, tokenizer=byte_tokenizer(), progress=False)
    except Exception as error:
        return type(error), str(error), getattr(error, "everywhere", False)
    return type(None), "", False


def fail() -> dict[str, tuple[type, str, bool]]:
    return {what: fail_on_one(what) for what in ("weight", "activation", "data", "few batches")}


def test_what_fails_on_one_rank_fails_on_all():
    first, second = run_ranks(fail)
    assert second["weight"][0] is NonFiniteError and "layers.1.mlp.up_proj" in second["weight"][1]
    assert first["weight"][0] is RankError and "rank 1: NonFiniteError: model.layers.1" in first["weight"][1]
    assert second["activation"][0] is NonFiniteError and first["activation"][0] is RankError
    assert first["data"][0] is CalibrationError and "rank 0: CalibrationError" in second["data"][1]
    for rank in (first, second):
        assert rank["few batches"][0] is CalibrationError and "fewer processes" in rank["few batches"][1]
        assert all(everywhere for _, _, everywhere in rank.values())


def test_one_process_alone():
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
    assert ranks.part([1, 2, 3]) == [1, 2, 3] and ranks.exchange({"a": 1}) == {"a": 1} and ranks.join([1]) == [1]
    with pytest.raises(NonFiniteError) as caught, ranks.together():
        raise NonFiniteError("x")
    assert not caught.value.everywhere


def test_owners_share_the_cost():
    ranks = Ranks()
    ranks.size = 2
    costs = {"q": 3.0, "k": 1.0, "v": 1.0, "down": 6.0, "up": 3.0, "gate": 3.0}
    owners = ranks.owners(costs)
    loads = [sum(costs[name] for name, owner in owners.items() if owner == rank) for rank in (0, 1)]
    assert sorted(loads) == [8, 9]
