"""Publish a quantized model: one commit with weights, config, tokenizer, report and model card, or nothing at all."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_spqr.errors import CheckpointError, HfSpqrError
from hf_spqr.integrations.beside import copy_beside
from hf_spqr.integrations.sentence_transformers import module_folders
from hf_spqr.integrations.verify import check_folder
from hf_spqr.nn import PackedExperts, PackedLinear
from hf_spqr.quantize.tokenizer import tokenizer_beside
from hf_spqr.report.card import MADE_HERE, PLOT_NAME, SHORT, check_evaluation, hub_name, model_card
from hf_spqr.report.checkpoint import INDEX, SINGLE, CheckpointReport, inspect_checkpoint, weight_files
from hf_spqr.report.model_classes import auto_class
from hf_spqr.report.records import LayerReport, QuantizationReport

__all__ = ["PushError", "Pushed", "install", "push_folder", "push_to_hub"]

CARD = "README.md"
WEIGHTS = (SINGLE, "model-*-of-*.safetensors", INDEX, "pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Weight files of an earlier push that this one replaces; left over, they would be loaded or just lie there."""
PLACEHOLDER = "# Model Card for Model ID"
"""The title of the card that Transformers makes, to be filled in."""
NEVER = (".*", "*.tmp", "__pycache__")


class PushError(HfSpqrError):
    """The upload failed; the repository is as it was before."""


@dataclass(frozen=True)
class Pushed:
    """What was published: repository, commit, its files, and files of an earlier push that it removed."""

    repo_id: str
    oid: str
    commit_url: str
    files: list[str]
    removed: list[str]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Pushed:
    """Upload a model folder that hf_spqr wrote, with a model card, as one commit.

    Files are uploaded first and appear together with the commit at the end: whatever fails before leaves the
    repository as it was, and a second call goes on where the first stopped (what the server has is not sent again).
    A README.md in the folder is published as it is; without one the card is made from quantization_report.json, unless
    the repository has a README.md of somebody's own words.

    license: by default that of the base model, where its card can be read. evaluation: see
    :func:`hf_spqr.report.card.model_card`. trust_remote_code: run a model's own code, which checks the files more
    thoroughly and is needed where a folder has no report. The other arguments are those of ``huggingface_hub``.

    Raises:
        CheckpointError: the folder is no complete quantized model. Nothing was sent.
        ConfigError: ``evaluation`` is none. Nothing was sent.
        PushError: the server or the network failed, somebody else pushed meanwhile, or ``repo_id`` is no name.
            Nothing was published.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = Path(folder)
    files = complete_files(folder, trust_remote_code)
    check_evaluation(evaluation)
    api = HfApi(token=token)
    with _failures_named(repo_id), tempfile.TemporaryDirectory() as staging:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head, there = _newest(api, repo_id, revision)
        extra: dict[str, Path] = {}
        if CARD not in there or not _is_foreign(api.hf_hub_download(repo_id, CARD, revision=revision)):
            extra = _card_files(
                folder, Path(staging), repo_id, api, base_model, license, tags, evaluation, trust_remote_code
            )
        names = sorted({*(path.relative_to(folder).as_posix() for path in files), *extra})
        removed = [n for n in there if n not in names and any(fnmatch(n, pattern) for pattern in WEIGHTS)]
        operations: list[Any] = [
            *(CommitOperationAdd(name, extra.get(name, folder / name)) for name in names),
            *(CommitOperationDelete(name) for name in removed),
        ]
        with _doubts_named(api, repo_id, revision, head):
            done = api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message or "Upload quantized model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head,
            )
    return Pushed(repo_id, done.oid, done.commit_url, names, removed)


def _newest(api: Any, repo_id: str, revision: str | None) -> tuple[str | None, list[str]]:
    """The newest commit of a branch and its files; None and no files where there is no such branch."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        head = api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        return None, []
    return head.sha, [sibling.rfilename for sibling in head.siblings or []]


@contextmanager
def _doubts_named(api: Any, repo_id: str, revision: str | None, head: str | None) -> Iterator[None]:
    """Raise PushError where the connection broke and the repository has another commit than ``head`` now."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (HTTPError, OSError) as error:
        answer = getattr(error, "response", None)
        if answer is not None and answer.status_code < 500:
            raise
        try:
            if _newest(api, repo_id, revision)[0] == head:
                raise error
        except (HTTPError, OSError) as again:
            if again is error:
                raise
        raise PushError(
            f"The connection to {repo_id} broke at the end: the model may have been published. Push again to be sure;"
            f" that does no harm. ({type(error).__name__}: {error})"
        ) from error


@contextmanager
def _failures_named(repo_id: str) -> Iterator[None]:
    """Raise PushError, which says what to do, for what the server and the network do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    failed = (
        f"The upload to {repo_id} failed and nothing was published. Push again: files that the server already has are"
        " not sent twice."
    )
    try:
        yield
    except HFValidationError as error:
        raise PushError(f"{repo_id!r} cannot be the name of a repository: {error}") from error
    except HfHubHTTPError as error:
        status = None if error.response is None else error.response.status_code
        if status == 412:
            raise PushError(f"{repo_id} was changed by somebody else during the upload. Push again.") from error
        if status == 401:
            raise PushError(
                f"There is no token that may write to {repo_id}, so nothing was published: `hf auth login`, HF_TOKEN"
                f" or token= gives one. ({error})"
            ) from error
        raise PushError(f"{failed} ({error})") from error
    except (HTTPError, OSError, RuntimeError) as error:  # HTTPError is also what no connection raises
        raise PushError(f"{failed} ({type(error).__name__}: {error})") from error


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "50GB",
    **options: Any,
) -> Pushed:
    """Save ``model`` to a temporary folder and :func:`push_folder` it. What ``model.push_to_hub`` does.

    tokenizer: published beside the weights; by default the one of ``model.name_or_path``, where there is one.
    options: those of :func:`push_folder`.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        report = getattr(model, "quantization_report", None)
        source = getattr(model, "name_or_path", None)
        if report is None and source and Path(source).is_dir():
            report = QuantizationReport.load(source)
        if report is not None:
            report.save(folder)
        if tokenizer is None:
            tokenizer = tokenizer_beside(model)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if source:
            copy_beside(source, Path(folder))
        return push_folder(folder, repo_id, **options)


def install() -> None:
    """Make ``push_to_hub`` of packed models publish the model card and the tokenizer too, and all in one commit.

    In the class, not in each model: a model that held a method of its own would refer to itself, and its memory would
    outlive ``del model``.
    """
    original = PreTrainedModel.push_to_hub
    if getattr(original, "knows_packed_models", False):
        return

    @wraps(original)
    def push(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        packed = any(isinstance(module, PackedLinear | PackedExperts) for module in self.modules())
        adapter = getattr(self, "_hf_peft_config_loaded", False)  # then only the adapter is saved and pushed
        return (push_to_hub if packed and not adapter else original)(self, *args, **kwargs)

    push.knows_packed_models = True  # type: ignore[attr-defined]
    PreTrainedModel.push_to_hub = push  # type: ignore[assignment, method-assign]


def complete_files(folder: Path, trust_remote_code: bool = False) -> list[Path]:
    """The files of a complete quantized model in ``folder``, hidden ones left out.

    Raises CheckpointError when config.json or a weight file is missing or damaged, nothing is quantized, or the files
    do not hold what config.json describes.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a model folder.")
    if (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} has {SINGLE} and {INDEX}: two models. Remove one of them.")
    weights = weight_files(folder)
    if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} lacks {SINGLE}: the model is incomplete.")
    if not inspect_checkpoint(folder, trust_remote_code).layers:
        raise CheckpointError(f"{folder} has no packed layers: push takes models that hf_spqr has quantized.")
    check_folder(folder, weights, trust_remote_code)
    modules = [folder / name for name in module_folders(folder)]  # which may have weights of their own
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(fnmatch(part, pattern) for part in path.relative_to(folder).parts for pattern in NEVER)
        and (path.suffix != ".safetensors" or path in weights or any(map(path.is_relative_to, modules)))
    ]


def _is_foreign(card: str) -> bool:
    """Whether somebody wrote the card in their own words: it has text, and is none that was made here."""
    text = Path(card).read_text(encoding="utf-8")
    words = re.sub(r"\A\s*---\n.*?\n---\s*", "", text, flags=re.DOTALL)
    return bool(words.strip()) and MADE_HERE not in text and PLACEHOLDER not in text


def _card_files(
    folder: Path,
    staging: Path,
    repo_id: str,
    api: Any,
    base_model: str | None,
    license: str | None,
    tags: list[str] | None,
    evaluation: Mapping[str, Any] | None,
    trust_remote_code: bool,
) -> dict[str, Path]:
    """Card and plot by their names in the repository; nothing where the folder has its own card."""
    if (folder / CARD).is_file():
        return {}
    checkpoint = inspect_checkpoint(folder, trust_remote_code)
    report = QuantizationReport.load(folder)
    if report is None:
        report = _report_of(checkpoint, folder)
    base_model = base_model or hub_name(report.base_model)
    if license is None and base_model is not None:
        license = _license_of(base_model, api)
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map")
    loader, task = auto_class(checkpoint.architecture, auto_map)
    made = {CARD: staging / CARD}
    if plot := _plot(report, staging / PLOT_NAME):
        made[PLOT_NAME] = plot
    text = model_card(
        report, repo_id, checkpoint=checkpoint, base_model=base_model, license=license, tags=tags or (),
        evaluation=evaluation, plot=PLOT_NAME if plot else None, loader=loader, task=task,
        own_code=auto_map is not None,
    )  # fmt: skip
    made[CARD].write_text(text, encoding="utf-8")
    return made


def _report_of(checkpoint: CheckpointReport, folder: Path) -> QuantizationReport:
    """A report of what the files show, for a model that has none of its own."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    method = str(checkpoint.quant_method)
    layers = [
        LayerReport(
            layer.name, layer.shape, SHORT.get(method, method), layer.bits or 0, layer.group_size or -1, layer.nbytes,
            layer.outliers,
        )
        for layer in checkpoint.layers
    ]  # fmt: skip
    notes = ["The run that quantized this model left no report; these numbers are counted from its files."]
    return QuantizationReport(method, config, layers=layers, notes=notes, versions={}, hardware="")


def _plot(report: QuantizationReport, path: Path) -> Path | None:
    """The picture of the errors; None without matplotlib or without measured errors."""
    from hf_spqr.report.plot import plot_report

    if not any(layer.error is not None for layer in report.layers):
        return None
    try:
        return plot_report(report, path)
    except ImportError:
        return None


def _license_of(base_model: str, api: Any) -> str | None:
    """The licence that the base model's card declares; None when it cannot be read."""
    from huggingface_hub.errors import HTTPError

    try:
        data = api.model_info(base_model).card_data
    except (HTTPError, OSError):
        return None
    return None if data is None else data.get("license")
