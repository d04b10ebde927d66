"""Push and pull over HTTP: LFS and Xet, private repositories, failures."""

import json
import socket

import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_spqr.errors import CheckpointError, ConfigError
from hf_spqr.integrations.hub import PushError, push_folder, push_to_hub
from hf_spqr.report.card import PLOT_NAME
from tests.architectures.matrix import METHODS, assert_same
from tests.architectures.rows import ARCHITECTURES
from tests.tiny_models import byte_tokenizer, tiny_model

IDS = torch.arange(40)[None] * 5 % 258


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def remove_tensor(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_what_is_pulled_is_what_was_pushed_to_the_bit(hub, model, folder):
    pytest.importorskip("matplotlib")  # the card shows a picture
    pushed = push_folder(folder, "tester/tiny-SpQR")
    assert pushed.repo_id == "tester/tiny-SpQR" and pushed.oid == hub.repos["tester/tiny-SpQR"].branches["main"]
    pulled = AutoModelForCausalLM.from_pretrained("tester/tiny-SpQR")
    assert torch.equal(logits(pulled), logits(model))
    state, again = model.state_dict(), pulled.state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert (
        AutoTokenizer.from_pretrained("tester/tiny-SpQR")("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]
    )
    files = hub.repos["tester/tiny-SpQR"].files()
    expected = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "quantization_report.json"}
    assert expected | {PLOT_NAME} <= set(files)
    assert f"({PLOT_NAME})" in ModelCard.load("tester/tiny-SpQR").text
    assert hub.count("PUT", "/lfs/") == (0 if hub.xet else len([f for f in files.values() if f.large]))
    assert hub.count("POST", "/commit/") == 1


def test_the_method_of_the_model(hub, make_model):
    model = make_model()

    model.push_to_hub("tester/m", tokenizer=byte_tokenizer(), max_shard_size="60KB", tags=["mine"])
    files = hub.repos["tester/m"].files()
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1 and "tokenizer.json" in files
    card = ModelCard.load("tester/m")
    assert "mine" in card.data.tags and "bits per weight" in card.text.lower()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("tester/m")), logits(model))
    model.push_to_hub("tester/m", tokenizer=byte_tokenizer())
    files = hub.repos["tester/m"].files()
    assert [name for name in files if "safetensors" in name] == ["model.safetensors"]


def test_what_is_not_a_packed_model_is_pushed_as_by_transformers(hub, make_model):
    model = make_model().dequantize()
    model.push_to_hub("tester/plain")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("tester/plain")), logits(model))
    peft = pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)  # what add_adapter asks for
    model = make_model()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    model.push_to_hub("tester/adapter")
    assert "adapter_model.safetensors" in hub.repos["tester/adapter"].files()


def test_private_needs_the_token(hub, folder, monkeypatch):
    push_folder(folder, "tester/secret", private=True)
    assert hub.repos["tester/secret"].private
    AutoModelForCausalLM.from_pretrained("tester/secret")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / ".." / "other"))
    with pytest.raises(OSError, match=r"not a (valid|local)"):
        AutoModelForCausalLM.from_pretrained("tester/secret")
    with pytest.raises(PushError, match="nothing was published: `hf auth login`"):
        push_folder(folder, "tester/secret")


@pytest.mark.parametrize("stage", ["/preupload/", "/commit/", "lfs/objects/batch", "xet-write-token"])
def test_a_failed_upload_publishes_nothing_and_can_be_resumed(hub, folder, stage):
    if (stage == "xet-write-token") != (hub.xet is not None) and stage in ("lfs/objects/batch", "xet-write-token"):
        pytest.skip("not on this way")
    push_folder(folder, "tester/r")
    before = hub.repos["tester/r"].branches["main"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    hub.fail(stage, 403, times=50)
    with pytest.raises(PushError, match="nothing was published"):
        push_folder(folder, "tester/r")
    assert hub.repos["tester/r"].branches["main"] == before
    hub.faults.clear()
    sent = len(hub.blobs)
    pushed = push_folder(folder, "tester/r")
    if stage == "/commit/" and hub.xet is None:
        assert len(hub.blobs) == sent  # the weights were there already and were not sent again
    assert hub.repos["tester/r"].branches["main"] == pushed.oid != before
    pulled = AutoModelForCausalLM.from_pretrained("tester/r")
    assert torch.equal(pulled.model.norm.weight, tensors["model.norm.weight"])


def test_a_passing_error_of_the_server_is_retried(hub, folder):
    hub.fail("/preupload/", 503)
    push_folder(folder, "tester/again")
    assert hub.count("POST", "/preupload/") >= 2


def test_a_server_that_is_not_there(hub, folder, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(PushError, match=r"nothing was published.*ConnectError"):
            push_folder(folder, "tester/x")


def test_somebody_else_pushed_meanwhile(hub, folder, monkeypatch):
    push_folder(folder, "tester/c")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    create = HfApi.create_commit

    def late(self, repo_id, operations, **options):
        repo = hub.repos[repo_id]
        repo.commit("main", dict(repo.files()))
        return create(self, repo_id, operations, **options)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(PushError, match="somebody else"):
        push_folder(folder, "tester/c")


def test_a_branch(hub, folder):
    push_folder(folder, "tester/b")
    first = hub.repos["tester/b"].branches["main"]
    (folder / "extra.txt").write_text("more")
    push_folder(folder, "tester/b", revision="v2")
    assert hub.repos["tester/b"].branches["main"] == first
    assert "extra.txt" in hub.repos["tester/b"].files("v2")


def test_a_pull_request(hub, folder):
    push_folder(folder, "tester/pr")
    before = hub.repos["tester/pr"].branches["main"]
    (folder / "extra.txt").write_text("more")
    push_folder(folder, "tester/pr", create_pr=True)
    assert hub.repos["tester/pr"].branches["main"] == before
    assert "extra.txt" in hub.repos["tester/pr"].files("refs/pr/1")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), r"lacks model\.safetensors"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "is truncated"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}'),
            "two models",
        ),
        (lambda f: change_config(f, num_hidden_layers=3), r"lacks model\.layers\.2\."),
        (lambda f: change_config(f, num_hidden_layers=1), "fewer blocks than the files hold"),
        (lambda f: change_config(f, intermediate_size=128), "'packed' should be"),
        (lambda f: change_config(f, hidden_size="wide"), "describes no model"),
        (lambda f: remove_tensor(f, "model.layers.1.mlp.up_proj.outlier"), r"lacks model\.layers\.1\.mlp\.up_proj"),
        (lambda f: remove_tensor(f, "model.layers.1.input_layernorm.weight"), "lacks model.layers.1.input_layernorm"),
    ],
)
def test_an_incomplete_folder_is_not_pushed(hub, folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        push_folder(folder, "tester/x")
    assert not hub.repos


def test_an_unquantized_model_is_not_pushed(hub, tmp_path):
    tiny_model().save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="no packed layers"):
        push_folder(tmp_path / "plain", "tester/x")


def test_a_wrong_evaluation_makes_no_repository(hub, folder):
    with pytest.raises(ConfigError, match="hf-spqr eval"):
        push_folder(folder, "tester/x", evaluation={"acc": 1})
    assert "tester/x" not in hub.repos


def test_ones_own_card_and_hidden_files(hub, folder):
    (folder / "README.md").write_text("my own words")
    (folder / ".secret").write_text("x")
    pushed = push_folder(folder, "tester/own")
    assert hub.repos["tester/own"].files()["README.md"].content == b"my own words"
    assert ".secret" not in pushed.files


@pytest.mark.parametrize(
    ("card", "kept"),
    [
        ("---\nlicense: mit\n---\n", False),
        ("---\nlicense: mit\n---\n# Mine\nOwn words.\n", True),
        ("Own words.", True),
        ("# Model Card for Model ID\n", False),
    ],
    ids=["metadata only", "metadata and words", "words", "what Transformers makes"],
)
def test_what_is_in_the_repository_already(hub, model, folder, card, kept):
    HfApi().create_repo("tester/old")
    there = {"README.md": card, "adapter_model.safetensors": "a", "sub/model.safetensors": "b", "model.bin": "c"}
    for name, content in there.items():
        HfApi().upload_file(path_or_fileobj=content.encode(), path_in_repo=name, repo_id="tester/old")
    before = hub.repos["tester/old"].files()
    for _ in range(2):  # the second time the card is that of the first
        pushed = push_folder(folder, "tester/old")
        assert not pushed.removed and ("README.md" in pushed.files) != kept
    files = hub.repos["tester/old"].files()
    assert all(files[name] == before[name] for name in there if name != "README.md")
    assert (files["README.md"].content == card.encode()) == kept
    (folder / "README.md").write_text("of the folder")
    push_folder(folder, "tester/old")
    assert hub.repos["tester/old"].files()["README.md"].content == b"of the folder"


def test_base_model_and_licence_come_from_the_report_and_its_card(hub, model, folder):
    HfApi().create_repo("tester/base")
    HfApi().upload_file(
        path_or_fileobj=b"---\nlicense: apache-2.0\n---\n", path_in_repo="README.md", repo_id="tester/base"
    )
    report = json.loads((folder / "quantization_report.json").read_text())
    (folder / "quantization_report.json").write_text(json.dumps({**report, "base_model": "tester/base"}))
    push_folder(folder, "tester/q")
    card = ModelCard.load("tester/q")
    assert card.data.base_model == "tester/base" and card.data.license == "apache-2.0"


def test_pushing_a_pulled_model_again(hub, folder):
    push_folder(folder, "tester/one")
    pulled = AutoModelForCausalLM.from_pretrained("tester/one")
    push_to_hub(pulled, "tester/two")
    assert "tokenizer.json" in hub.repos["tester/two"].files()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("tester/two")), logits(pulled))


@pytest.mark.parametrize(
    ("kind", "loader", "task"),
    [("t5", "AutoModelForSeq2SeqLM", None), ("llava", "AutoModelForImageTextToText", "image-text-to-text")],
)
def test_the_card_of_another_kind_of_model_loads_it(hub, kind, loader, task, tmp_path):
    base = next(architecture for architecture in ARCHITECTURES if architecture.kind == kind).build()
    base.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 32}')
    load = getattr(transformers, loader).from_pretrained
    model = load(tmp_path, quantization_config=METHODS["SpQR"]())
    model.push_to_hub(f"tester/{kind}", tokenizer=byte_tokenizer())
    card = ModelCard.load(f"tester/{kind}")
    assert card.data.pipeline_tag == task
    assert f'model = {loader}.from_pretrained("tester/{kind}")' in card.text
    assert ("AutoProcessor.from_pretrained" in card.text) == (kind == "llava")
    assert_same(load(f"tester/{kind}"), model)
    assert hub.repos[f"tester/{kind}"].files()["preprocessor_config.json"].content == b'{"size": 32}'
