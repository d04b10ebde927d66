"""A Hub on the loopback interface, and the promise that nothing else is reached."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http
from transformers import PreTrainedModel
from transformers.utils import hub as transformers_hub

import hf_spqr
from hf_spqr.integrations.transformers import attach
from tests.hub.loopback import TOKEN, LoopbackHub
from tests.tiny_models import byte_tokenizer, tiny_model


@pytest.fixture(autouse=True)
def nothing_but_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection to another address fails, names are not looked up, and proxies are not used."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not ipaddress.ip_address(address[0]).is_loopback:
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)

    def guarded_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in ("127.0.0.1", "::1", "localhost", None):
            raise AssertionError(f"a test tried to look up {host}")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["lfs", "xet"])
def hub(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """The Hub that huggingface_hub and transformers talk to during a test."""
    storage = None
    if request.param == "xet":
        pytest.importorskip("hf_xet")
        storage = tmp_path / "xet"
        storage.mkdir()
    with LoopbackHub(storage) as server:
        assert ipaddress.ip_address(server.server.server_address[0]).is_loopback
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_XET": request.param == "lfs",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_ETAG_TIMEOUT": 5,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet_cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        _http.close_session()
        yield server
        _http.close_session()


@pytest.fixture(scope="session")
def make_model(texts: list[str]) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        model = tiny_model("llama", torch.float32)
        config = hf_spqr.SpQRConfig(dataset=texts, nsamples=2, seqlen=32)
        hf_spqr.quantize_model(model, config, tokenizer=byte_tokenizer(), progress=False)
        attach(model, config)
        return model

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    return make_model()


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    """The quantized model as a folder with tokenizer and report."""
    path = tmp_path / "model"
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    model.quantization_report.save(path)
    return path
