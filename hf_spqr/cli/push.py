"""``hf-spqr push``: publish a quantized model on the Hub."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_spqr.cli.common import (
    CommandError,
    JsonOption,
    TrustOption,
    bold,
    check_model,
    err_console,
    out_console,
    print_json,
)


def push_command(
    model: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that hf-spqr quantize wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="Repository on the Hub, user/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch to push to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Commit message.")] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Repository of the unquantized model, for the card.")
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", help="Licence, for the card. Default: the base model's.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="A tag for the card; may be repeated.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--evaluation", help="Output of `hf-spqr eval --json`, for the card.")
    ] = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Upload a quantized model in one commit, with a model card made from its report.

    The token is that of `hf auth login` or HF_TOKEN. When something fails nothing is published, and the same command
    goes on where it stopped. A README.md in FOLDER is taken as it is; without one the card is made, unless the
    repository has a README.md of your own words.

    [bold]Examples[/bold]

      hf-spqr push out/model-SpQR me/model-SpQR-3bit --base-model me/model

      hf-spqr eval out/model-SpQR --base me/model -d heldout.jsonl --json \\
          > eval.json

      hf-spqr push out/model-SpQR me/model-SpQR-3bit --private \\
          --evaluation eval.json
    """
    check_model(str(model))
    if not model.is_dir():
        raise CommandError(f"{model} is not a folder; give the folder that hf-spqr quantize wrote")
    from hf_spqr.integrations.hub import push_folder

    pushed = push_folder(
        model,
        repo_id,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        base_model=base_model,
        license=license,
        tags=tag,
        evaluation=read_evaluation(evaluation),
        trust_remote_code=trust_remote_code,
    )
    if json:
        print_json(asdict(pushed))
        return
    for name in pushed.removed:
        err_console().print(f"note: removed {name}, which an earlier push left", markup=False, soft_wrap=True)
    if "README.md" not in pushed.files:
        err_console().print("note: the README.md of the repository was left as it is", markup=False, soft_wrap=True)
    out_console().print(f"{bold(pushed.repo_id)}  {len(pushed.files)} files, {pushed.commit_url}")


def read_evaluation(path: Path | None) -> dict[str, Any] | None:
    """The JSON object in ``path``; CommandError when it is none."""
    if path is None:
        return None
    try:
        data = json_module.loads(path.read_text(encoding="utf-8"))
    except json_module.JSONDecodeError as error:
        raise CommandError(f"{path} is not JSON ({error}); give the output of `hf-spqr eval --json`") from None
    if not isinstance(data, dict):
        raise CommandError(f"{path} is not a JSON object; give the output of `hf-spqr eval --json`")
    return data
