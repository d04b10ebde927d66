"""Every form of calibration data becomes token sequences, and too little data is said clearly."""

import json
import logging

import pytest
import torch

from hf_spqr.calibration import data
from hf_spqr.calibration.data import calibration_batches, calibration_windows, iter_documents, tokenize_document
from hf_spqr.errors import CalibrationError


def test_strings_are_joined_and_cut(tokenizer, texts):
    windows = calibration_windows(texts, tokenizer, nsamples=4, seqlen=32)
    assert [tuple(w.shape) for w in windows] == [(1, 32)] * 4
    assert all(w.dtype == torch.int64 for w in windows)
    whole = [t for text in texts for t in tokenize_document(text, tokenizer)]
    assert len(calibration_windows(texts, tokenizer, nsamples=1000, seqlen=32)) == len(whole) // 32


def test_seed_fixes_the_order(tokenizer, texts):
    first = torch.cat(calibration_windows(texts, tokenizer, nsamples=4, seqlen=32, seed=0))
    again = torch.cat(calibration_windows(texts, tokenizer, nsamples=4, seqlen=32, seed=0))
    other = torch.cat(calibration_windows(texts, tokenizer, nsamples=4, seqlen=32, seed=1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_documents_are_marked_as_in_training(tokenizer):
    class WithStart:
        bos_token_id, eos_token_id = 256, 257

        def __call__(self, text, verbose=True):
            return {"input_ids": [256, *text.encode()]}

    assert tokenize_document("ab", WithStart()) == [256, 97, 98]
    assert tokenize_document("ab", tokenizer)[-1] == tokenizer.eos_token_id  # adds no special tokens itself
    assert tokenize_document("", tokenizer) == []


@pytest.mark.parametrize(
    "dataset",
    [
        [[1, 2, 3, 4, 5], [6, 7, 8]],
        [torch.tensor([1, 2, 3, 4, 5]), torch.tensor([[6, 7, 8]])],
        [{"input_ids": [1, 2, 3, 4, 5]}, {"input_ids": torch.tensor([6, 7, 8]), "attention_mask": [1, 1, 1]}],
        {"input_ids": [[1, 2, 3, 4, 5], [6, 7, 8]]},
    ],
    ids=["lists", "tensors", "dicts", "columns"],
)
def test_token_ids_keep_their_boundaries(dataset):
    windows = calibration_windows(dataset, nsamples=8, seqlen=3)
    assert sorted(w.tolist()[0] for w in windows) == [[1, 2, 3], [4, 5], [6, 7, 8]]


def test_one_tensor_of_sequences():
    ids = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    windows = calibration_windows(ids, nsamples=2, seqlen=4)
    assert len(windows) == 2 and windows[0].dtype == torch.int64
    assert all(window.tolist()[0] in ids.tolist() for window in windows)  # each row is a document
    assert [w.tolist() for w in calibration_windows(ids[0], nsamples=2, seqlen=4)] == [[[0, 1, 2, 3]]]


def test_files(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("line one\nline two\n")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n\n{"story": "y"}\n"z"\n')
    (tmp_path / "c.json").write_text(json.dumps([{"text": "x"}, "y", {"input_ids": [1, 2]}]))
    (tmp_path / "d.json").write_text(json.dumps({"rows": ["p", "q"]}))
    assert list(iter_documents(tmp_path / "a.txt")) == ["line one\nline two\n"]
    assert list(iter_documents(str(tmp_path / "b.jsonl"))) == ["x", "y", "z"]
    x, y, ids = iter_documents(tmp_path / "c.json")
    assert (x, y, ids.tolist()) == ("x", "y", [1, 2])
    assert list(iter_documents(tmp_path / "d.json")) == ["p", "q"]
    assert calibration_windows(tmp_path / "a.txt", tokenizer, nsamples=1, seqlen=8)[0].shape == (1, 8)


def test_datasets_objects(tokenizer):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"id": 1, "text": "some text"}, {"id": 2, "text": "more text"}])
    assert list(iter_documents(rows)) == ["some text", "more text"]
    assert list(iter_documents(rows.to_iterable_dataset())) == ["some text", "more text"]
    split = datasets.DatasetDict({"train": rows})
    with pytest.raises(CalibrationError, match="one split"):
        list(iter_documents(split))


def test_hub_names_go_through_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"text": "from the hub"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(iter_documents("org/name")) == ["from the hub"]
    assert list(iter_documents("org/name:config:validation")) == ["from the hub"]
    assert asked == [
        (("org/name", None), {"split": "train", "streaming": True}),
        (("org/name", "config"), {"split": "validation", "streaming": True}),
    ]


def test_what_fails_while_a_data_set_is_read_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def rows():
        yield {"text": "first"}
        raise RuntimeError("the schema differs\nfrom that of another file\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows())
    with pytest.raises(CalibrationError, match=r"'org/name' is neither .* can be read: the schema differs$"):
        list(iter_documents("org/name"))


def test_a_corpus_in_one_document_is_drawn_from_everywhere(tokenizer, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 50)
    text = "".join(f"line number {i}\n" for i in range(200))
    windows = calibration_windows([text], tokenizer, nsamples=8, seqlen=64)
    numbers = [int(n) for w in windows for n in tokenizer.decode(w[0]).split() if n.isdigit()]
    assert max(numbers) - min(numbers) > 100


def test_little_data_is_used_and_said(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        windows = calibration_windows(["short text"], tokenizer, nsamples=8, seqlen=64)
    assert [tuple(w.shape) for w in windows] == [(1, 11)]
    assert "has 11 tokens" in caplog.text and "nsamples=8" in caplog.text and "512" in caplog.text


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (None, "No calibration data"),
        ([], "less than two tokens"),
        ([""], "less than two tokens"),
        ([5, 6, 7], "Item . of the dataset is a single number: pass a list of lists"),
        (["text"], "pass tokenizer="),
        (7, "dataset is a int"),
        ([{"label": 1}], "no text and no input_ids"),
        ([{"text": None, "url": "a"}], "Item 0 of the dataset has no text in 'text': leave such items out"),
        ([{"id": "a1", "body": "long text"}], "several texts .body, id.: call the field that holds the text 'text'"),
        ([[0.5, 1.0]], "must be integers"),
        ([object()], "neither text nor"),
        ("missing-file.jsonl", "does not exist"),
        ("./no/such/file", "does not exist"),
    ],
)
def test_errors(dataset, message, tokenizer):
    with pytest.raises(CalibrationError, match=message):
        calibration_windows(dataset, None if message == "pass tokenizer=" else tokenizer)


def test_damaged_files(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": ')
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("a.jsonl", "b.txt"):
        with pytest.raises(CalibrationError, match="cannot be read"):
            list(iter_documents(tmp_path / name))


def test_the_damaged_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('"good"\n\n{"text": 1,}\n')
    with pytest.raises(CalibrationError, match=r"a\.jsonl cannot be read: line 3 is not JSON"):
        list(iter_documents(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    (tmp_path / name).write_text("x" if name == "a.txt" else '["x"]' if name == "a.json" else '"x"', "utf-8-sig")
    assert list(iter_documents(tmp_path / name)) == ["x"]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(CalibrationError, match="is a folder: give one of its files"):
        list(iter_documents(tmp_path))


def test_batches_stack_equal_lengths():
    windows = [torch.zeros(1, n, dtype=torch.int64) for n in (4, 4, 4, 3, 4)]
    shapes = [tuple(b.shape) for b in calibration_batches(windows, tokens_per_batch=8)]
    assert shapes == [(2, 4), (1, 4), (1, 3), (1, 4)]
    assert [b.shape for b in calibration_batches(windows[:1], tokens_per_batch=1)] == [(1, 4)]
