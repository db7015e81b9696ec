"""Private data: every format, every sentence of an error, the masks, and the order of batches."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from noren.errors import DataError
from noren.training.batches import IGNORED, batches, collate, encode, padding_id
from noren.training.data import Data, Example, read_examples, split_holdout
from noren.training.examples import render_plain

LANGUAGE, CLASSES, QUESTIONS = "causal-lm", "sequence-classification", "question-answering"
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def characters(
    pair: bool = False, eos: bool = True, template: str | None = None, bos: bool = False
) -> PreTrainedTokenizerFast:
    """A fast tokenizer with a token for every printable ASCII character: tokens count as characters."""
    special = ["<unk>", "<bos>", "<eos>", "[CLS]", "[SEP]"]
    vocabulary = {token: index for index, token in enumerate([*special, "\n", *map(chr, range(32, 127))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if pair:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 3), ("[SEP]", 4)],
        )
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if pair else ["input_ids", "attention_mask"]
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<eos>" if eos else None,
        model_input_names=inputs,
    )
    made.chat_template = template
    return made


def learned(tokenizer: Any, row: dict[str, list[int]]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens([t for t in row["labels"] if t != IGNORED]))


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(tmp_path: Path, path: str, **options: Any) -> list[str]:
    found, labels = read_examples(Data(path=path, **options), LANGUAGE, tmp_path)
    assert labels == []
    return [example.text for example in found]


def refusal(tmp_path: Path, path: str, task: str = LANGUAGE, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_examples(Data(path=path, **options), task, tmp_path)
    return str(caught.value)


# The document


class Run(msgspec.Struct):
    data: Data


@pytest.mark.parametrize(
    ("field", "value"),
    [("holdout", 1.0), ("holdout", -0.1), ("limit", 0), ("max_length", 1), ("path", " "), ("label", "")],
)
def test_a_field_out_of_range_is_refused_with_its_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        Data(**{"path": "x.txt", field: value})
    with pytest.raises(msgspec.ValidationError, match=rf"{field}.*at `\$\.data`"):
        msgspec.convert({"data": {"path": "x.txt", field: value}}, Run)


def test_an_unknown_field_or_format_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field `colour`"):
        msgspec.convert({"path": "x", "colour": "red"}, Data)
    with pytest.raises(msgspec.ValidationError, match=r"\$\.format"):
        msgspec.convert({"path": "x", "format": "xml"}, Data)


# Formats


def test_text_with_blank_lines_is_cut_in_paragraphs(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "\nOne line\nand another.\n\n \nA second.\n\nA third.\n\n")
    assert texts(tmp_path, "a.txt") == ["One line\nand another.", "A second.", "A third."]


def test_text_without_blank_lines_is_cut_in_lines(tmp_path: Path) -> None:
    write(tmp_path, "a.md", b"\xef\xbb\xbfone\r\ntwo\r\nthree\r\n")
    found, _ = read_examples(Data(path="a.md"), LANGUAGE, tmp_path)
    assert [(e.text, e.where.rpartition(", ")[2]) for e in found] == [
        ("one", "line 1"),
        ("two", "line 2"),
        ("three", "line 3"),
    ]


def test_jsonl_holds_texts_prompts_or_conversations(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"text": "plain"}, {"prompt": "Q?", "response": "A."}, {"prompt": "Q: ", "response": "A."}]
    write(tmp_path, "a.jsonl", "\n\n".join(json.dumps(row) for row in [*rows, {"messages": turns}]))
    found, _ = read_examples(Data(path="a.jsonl"), LANGUAGE, tmp_path)
    assert [(e.prompt, e.text) for e in found[:3]] == [(None, "plain"), ("Q?\n", "A."), ("Q: ", "A.")]
    assert found[3].messages == (("user", "Hi"), ("assistant", "Hello"))
    assert found[3].text == "user: Hi\nassistant: Hello\n"
    assert [e.where.rpartition(" ")[2] for e in found] == ["1", "3", "5", "7"]


def test_a_line_separator_inside_json_is_not_an_end_of_line(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", '{"text": "a\u2028b"}\n{"text": "c"}\n')
    assert texts(tmp_path, "a.jsonl") == ["a\u2028b", "c"]


@pytest.mark.parametrize("shape", ["list", "lines", "indented"])
def test_a_json_file_may_hold_a_list_or_lines(tmp_path: Path, shape: str) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    lines = "\n".join(map(json.dumps, rows))
    write(tmp_path, "a.json", lines if shape == "lines" else json.dumps(rows, indent=2 * (shape == "indented")))
    assert texts(tmp_path, "a.json") == ["one", "two"]


def test_csv_reads_quotes_long_cells_and_line_breaks(tmp_path: Path) -> None:
    long = "x" * 200_000
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["n", "text"], ["1", 'say "a, b"\nand c'], [], ["2", long]])
    before = csv.field_size_limit()
    found, _ = read_examples(Data(path="a.csv"), LANGUAGE, tmp_path)
    assert [e.text for e in found] == ['say "a, b"\nand c', long]
    assert [e.where.rpartition(" ")[2] for e in found] == ["2", "5"]
    assert csv.field_size_limit() == before


def test_tsv_takes_quotation_marks_as_text_and_names_labels(tmp_path: Path) -> None:
    write(tmp_path, "a.tsv", 'sentence\tlabel\n"open quote\t10\nfine\t9\nwell\t10\n')
    data = Data(path="a.tsv", text="sentence")
    found, labels = read_examples(data, CLASSES, tmp_path)
    assert labels == ["9", "10"]
    assert [(e.text, e.label) for e in found] == [('"open quote', 1), ("fine", 0), ("well", 1)]
    some, same = read_examples(msgspec.structs.replace(data, limit=1, holdout=0), CLASSES, tmp_path)
    assert (some, same) == (found[:1], labels)


def test_a_table_without_a_header_is_read_by_numbers(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", '"1","good"\n"2","bad"\n')
    found, labels = read_examples(Data(path="a.csv", text="2", label="1"), CLASSES, tmp_path)
    assert labels == ["1", "2"]
    assert [(e.text, e.label) for e in found] == [("good", 0), ("bad", 1)]


def test_labels_may_be_numbers_truths_or_names(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": value} for value in (True, 3, "spam ", 0.5)]
    write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    found, labels = read_examples(Data(path="a.jsonl"), CLASSES, tmp_path)
    assert labels == ["0.5", "3", "spam", "true"]
    assert [e.label for e in found] == [3, 1, 2, 0]


def test_a_folder_of_one_kind_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path, "d/b.txt", "second\n")
    write(tmp_path, "d/a.txt", "first\n")
    write(tmp_path, "d/README.md", "about")
    write(tmp_path, "d/.hidden.csv", "")
    assert texts(tmp_path, "d") == ["first", "second"]
    write(tmp_path, "d/c.jsonl", '{"text": "third"}')
    assert texts(tmp_path, "d", format="jsonl", holdout=0) == ["third"]
    assert texts(tmp_path, str(tmp_path / "d" / "a.txt"), holdout=0) == ["first"]


def test_format_overrules_the_suffix(tmp_path: Path) -> None:
    write(tmp_path, "a.log", "one\ntwo\n")
    assert texts(tmp_path, "a.log", format="text") == ["one", "two"]


def squad(**changes: Any) -> dict[str, Any]:
    qa = {"question": "Who?", "answers": [{"text": "Ada", "answer_start": 8}, {"text": "x"}], "id": "1"}
    return {
        "version": "1.1",
        "data": [{"paragraphs": [{"context": "It was, Ada.", "qas": [qa | changes, qa]}]}],
    }


def test_squad_layout_and_flat_questions_agree(tmp_path: Path) -> None:
    write(tmp_path, "squad.json", json.dumps(squad()))
    nested, _ = read_examples(Data(path="squad.json", question="q"), QUESTIONS, tmp_path)
    flat = {"question": "Who?", "context": "It was, Ada."}
    answers: list[dict[str, Any]] = [
        {"answer": "Ada"},
        {"answer": "Ada", "answer_start": 8},
        {"answer": {"text": ["Ada"], "answer_start": [8]}},
    ]
    write(tmp_path, "flat.jsonl", "\n".join(json.dumps(flat | answer) for answer in answers))
    write(tmp_path, "flat.csv", 'question,context,answer,answer_start\nWho?,"It was, Ada.",Ada,8\n')
    expected = Example(text="Who?", context="It was, Ada.", answer="Ada", answer_start=8)
    assert nested == [expected] * 2
    assert read_examples(Data(path="flat.jsonl"), QUESTIONS, tmp_path)[0] == [expected] * 3
    assert read_examples(Data(path="flat.csv", holdout=0), QUESTIONS, tmp_path)[0] == [expected]


# The datasets package


def labelled() -> Any:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["spam", "ham"])}
    )
    return datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 0]}, features=features)


def test_a_folder_saved_by_datasets_is_read_offline(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = labelled()
    rows.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": rows, "test": rows.select([0, 1])}).save_to_disk(str(tmp_path / "splits"))
    found, labels = read_examples(Data(path="plain"), CLASSES, tmp_path)
    assert labels == ["ham", "spam"]
    assert [(e.text, e.label) for e in found] == [("a", 1), ("b", 0), ("c", 1)]
    assert texts(tmp_path, "splits", split="test") == ["a", "b"]
    sentence = refusal(tmp_path, "splits", split="dev")
    assert "no split 'dev'" in sentence and "train, test" in sentence


def test_a_folder_that_load_dataset_understands_is_streamed_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = labelled()
    (tmp_path / "hub" / "data").mkdir(parents=True)
    rows.to_parquet(str(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet"))
    write(tmp_path, "hub/README.md", "A card.")
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    found, labels = read_examples(Data(path="hub"), CLASSES, tmp_path)
    assert labels == ["ham", "spam"]
    assert [e.text for e in found] == ["a", "b", "c"]
    assert not list(cache.rglob("*.arrow")), "private rows were copied to the cache"
    assert "split 'dev'" in refusal(tmp_path, "hub", split="dev")


def test_an_id_goes_to_datasets_and_a_missing_package_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = labelled()
    asked: list[tuple[str, str]] = []

    def answer(name: str, split: str) -> Any:
        asked.append((name, split))
        return rows

    monkeypatch.setattr("datasets.load_dataset", answer)
    assert texts(tmp_path, "owner/name", split="test") == ["a", "b", "c"]
    assert asked == [("owner/name", "test")]

    def unreachable(name: str, split: str) -> None:
        raise ConnectionError("no hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    assert "no such file or folder, and the id cannot be read" in refusal(tmp_path, "owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert 'pip install "noren[datasets]"' in refusal(tmp_path, "owner/name")


# Errors


BAD_FILES: list[tuple[str, str | bytes, str, tuple[str, ...]]] = [
    ("a.xml", "<a/>", LANGUAGE, ("unknown suffix '.xml'", ".jsonl", "set format")),
    ("a.jsonl", '{"text": "a"}\n{"text": \n', LANGUAGE, ("line 2", "not JSON", "remove the line")),
    ("a.jsonl", '{"text": "a"}\n["b"]\n', LANGUAGE, ("line 2", "list where an object is needed")),
    ("a.json", '[{"text": "a"},\n{"text" "b"}]', LANGUAGE, ("line 2", "not JSON")),
    ("a.json", '[{"text": "a"}, 3]', LANGUAGE, ("row 2", "int where an object is needed")),
    ("a.jsonl", '{"text": "a"}\n\n{"text": " "}\n', LANGUAGE, ("line 3", "empty text", "remove the row")),
    ("a.jsonl", '{"text": null}\n', LANGUAGE, ("line 1", "empty text")),
    ("a.jsonl", '{"text": 5}\n', LANGUAGE, ("line 1", "must be text, not int")),
    ("a.jsonl", '{"body": "a"}\n', LANGUAGE, ("no column 'text'", "'body'", "prompt and response")),
    ("a.jsonl", '{"prompt": "a", "reply": "b"}\n', LANGUAGE, ("no column 'response'", "'reply'")),
    ("a.jsonl", '{"prompt": "a", "response": ""}\n', LANGUAGE, ("line 1", "empty response")),
    ("a.jsonl", '{"messages": "hi"}\n', LANGUAGE, ("line 1", "list of messages")),
    ("a.jsonl", '{"messages": [{"role": "user"}]}\n', LANGUAGE, ("line 1", "message 1", "role and content")),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', LANGUAGE, ("nothing to learn",)),
    ("a.csv", "text,label\na,\n", CLASSES, ("line 2", "no label", "label the row or remove it")),
    ("a.csv", "text,class\na,1\n", CLASSES, ("no column 'label'", "'text', 'class'", "set label")),
    ("a.jsonl", '{"text": "a", "label": [1]}\n', CLASSES, ("line 1", "text or a number")),
    ("a.csv", "text,label\na,b,c\n", CLASSES, ("line 2", "3 cells", "has 2")),
    ("a.csv", 'text,label\n"a,1\nb,2\n', CLASSES, ("line 2", "not CSV")),
    ("a.csv", "text,text\na,1\n", CLASSES, ("line 1", "names text twice")),
    ("a.tsv", "text\tlabel\na\t1\nb\n", CLASSES, ("line 3", "1 cells", "has 2")),
    ("a.txt", "one\ntwo\n", CLASSES, ("no column 'label'",)),
    ("a.txt", b"one\ntw\xf6\n", LANGUAGE, ("line 2", "not UTF-8", "0xf6", "save the file as UTF-8")),
    ("a.txt", " \n\n", LANGUAGE, ("a.txt", "no examples")),
    ("a.csv", "text\n", LANGUAGE, ("no examples",)),
    ("a.jsonl", "", LANGUAGE, ("no examples",)),
    ("a.json", "", LANGUAGE, ("no examples",)),
    ("a.txt", "one\n", LANGUAGE, ("1 example,", "at least 2", "set holdout to 0")),
    (
        "a.json",
        '{"data": [{"paragraphs": [{"qas": []}]}]}',
        QUESTIONS,
        ("data[0].paragraphs[0]", "'context'"),
    ),
    ("a.json", json.dumps(squad(answers=[])), QUESTIONS, ("qas[0]", "no answer", "remove")),
    (
        "a.json",
        json.dumps(squad(answers=[{"text": "Ada", "answer_start": 7}])),
        QUESTIONS,
        ("answer_start = 7",),
    ),
    ("a.json", json.dumps(squad(answers=[{"text": "Bob"}])), QUESTIONS, ("does not occur",)),
    (
        "a.json",
        json.dumps(squad(answers=[{"text": "Ada", "answer_start": "x"}])),
        QUESTIONS,
        ("whole number",),
    ),
]


@pytest.mark.parametrize(("name", "content", "task", "parts"), BAD_FILES)
def test_an_error_names_file_place_and_remedy(
    tmp_path: Path, name: str, content: str | bytes, task: str, parts: tuple[str, ...]
) -> None:
    path = write(tmp_path, name, content)
    sentence = refusal(tmp_path, name, task)
    assert str(path) in sentence
    for part in parts:
        assert part in sentence


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "d/train.jsonl", "")
    assert "did you mean train.jsonl?" in refusal(tmp_path, "d/trian.jsonl")
    assert "the folder holds: train.jsonl" in refusal(tmp_path, "d/x.csv")
    assert "nor is there a folder" in refusal(tmp_path, "e/train.jsonl")
    assert "did you mean train.jsonl?" in refusal(tmp_path, "d/train")  # and the hub is not asked
    assert "no such file" in refusal(tmp_path, "name", format="csv")


def test_a_folder_of_mixed_kinds_an_empty_one_and_a_wrong_format(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    assert "the folder is empty" in refusal(tmp_path, "d")
    write(tmp_path, "d/a.txt", "a")
    write(tmp_path, "d/b.csv", "text\nb\n")
    sentence = refusal(tmp_path, "d")
    assert "2 kinds (csv, text)" in sentence and "a.txt, b.csv" in sentence and "set format" in sentence
    assert "no file of the format 'tsv'" in refusal(tmp_path, "d", format="tsv")


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    assert "causal-lm" in refusal(tmp_path, "x.txt", "translation")
    with pytest.raises(DataError, match="translation"):
        encode([], characters(), "translation", 8)


def test_errors_quote_no_data(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", '{"question": "secret1", "context": "secret2", "answer": "secret3"}\n')
    assert "secret" not in refusal(tmp_path, "a.jsonl", QUESTIONS)
    write(tmp_path, "b.jsonl", '{"text": "secret", "label": null}\n')
    assert "secret" not in refusal(tmp_path, "b.jsonl", CLASSES)
    write(tmp_path, "c.jsonl", '{"text": "secret}\n')
    assert "secret" not in refusal(tmp_path, "c.jsonl")


# Held-out examples and the order of batches


@pytest.mark.parametrize(("count", "share", "held"), [(10, 0.1, 1), (10, 0.25, 2), (2, 0.01, 1), (3, 0.99, 2)])
def test_split_holdout_parts_the_same_way_each_time(count: int, share: float, held: int) -> None:
    examples = [Example(text=str(index)) for index in range(count)]
    train, test = split_holdout(examples, share, seed=1)
    assert (train, test) == split_holdout(examples, share, seed=1)
    assert len(test) == held
    assert sorted([*train, *test], key=lambda e: int(e.text)) == examples
    assert [e.text for e in train] == sorted((e.text for e in train), key=int)


def test_split_holdout_by_seed_and_without() -> None:
    examples = [Example(text=str(index)) for index in range(50)]
    assert split_holdout(examples, 0.2, 1) != split_holdout(examples, 0.2, 2)
    assert split_holdout(examples, 0, 1) == (examples, [])
    with pytest.raises(DataError, match="at least 2"):
        split_holdout(examples[:1], 0.5, 1)


def test_batches_cover_each_row_once_in_an_order_of_their_own() -> None:
    rows = [{"input_ids": [index]} for index in range(10)]
    first = batches(rows, 4, seed=7, epoch=0)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(index for batch in first for index in batch) == list(range(10))
    assert first == batches(rows, 4, seed=7, epoch=0)
    assert first != batches(rows, 4, seed=7, epoch=1) and first != batches(rows, 4, seed=8, epoch=0)
    assert first == [[1, 8, 6, 4], [9, 7, 2, 5], [0, 3]], "the order of a run must not change with a release"
    assert batches([], 4, seed=7, epoch=0) == []
    with pytest.raises(ValueError, match="batch_size"):
        batches(rows, 0, seed=7, epoch=0)


# Tokens


def test_the_prompt_is_masked_and_the_end_is_learned() -> None:
    tokenizer = characters(bos=True)
    encoded = encode([Example(text="yes", prompt="ok?\n"), Example(text="all")], tokenizer, LANGUAGE, 64)
    assert learned(tokenizer, encoded.rows[0]) == "yes<eos>"
    assert tokenizer.convert_ids_to_tokens(encoded.rows[0]["input_ids"])[:2] == ["<bos>", "o"]
    assert [label == IGNORED for label in encoded.rows[0]["labels"]] == [True] * 5 + [False] * 4
    assert learned(tokenizer, encoded.rows[1]).endswith("all<eos>")
    assert (encoded.dropped, encoded.truncated) == (0, 0)


def test_a_token_that_reaches_from_the_prompt_into_the_text_is_learned() -> None:
    words = Tokenizer(models.WordLevel({"?": 0, "ab": 1, "cd": 2, "abcd": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    row = encode([Example(prompt="cd ab", text="cd cd")], tokenizer, LANGUAGE, 8).rows[0]
    assert row == {"input_ids": [2, 3, 2], "labels": [IGNORED, 3, 2]}


def test_truncation_drops_what_has_nothing_left_to_learn() -> None:
    tokenizer = characters()
    examples = [
        Example(text="x", prompt="p" * 8),
        Example(text="abcdefghij", prompt="p"),
        Example(text="short"),
    ]
    encoded = encode(examples, tokenizer, LANGUAGE, 8)
    assert (len(encoded.rows), encoded.dropped, encoded.truncated) == (2, 1, 1)
    assert learned(tokenizer, encoded.rows[0]) == "abcdefg"
    assert len(encoded.rows[0]["input_ids"]) == 8
    with pytest.raises(DataError, match=r"none of the 1 examples .*max_length = 8"):
        encode(examples[:1], tokenizer, LANGUAGE, 8)
    # A single token is never predicted: what it would follow is not there.
    with pytest.raises(DataError, match="none of the 1"):
        encode([Example(text="x")], characters(eos=False), LANGUAGE, 8)
    assert encode([], tokenizer, LANGUAGE, 8).rows == []


CHAT = (("system", "s"), ("user", "hi"), ("assistant", "yo"), ("user", "and"), ("assistant", "so"))


def chat(messages: tuple[tuple[str, str], ...] = CHAT) -> Example:
    return Example(text=render_plain(messages), messages=messages, where="chats.jsonl, line 4")


def test_a_conversation_without_a_template_learns_every_answer() -> None:
    tokenizer = characters()
    row = encode([chat()], tokenizer, LANGUAGE, 256).rows[0]
    assert learned(tokenizer, row) == " yo\n so\n<eos>"
    row = encode([chat(CHAT[:4])], tokenizer, LANGUAGE, 256).rows[0]
    assert learned(tokenizer, row) == " yo\n"


def test_a_conversation_with_a_template_is_rendered_by_it() -> None:
    tokenizer = characters(template=CHATML, bos=True)
    row = encode([chat()], tokenizer, LANGUAGE, 256).rows[0]
    assert learned(tokenizer, row) == "yo<|end|>so<|end|>"
    whole = "<|system|>s<|end|><|user|>hi<|end|><|assistant|>yo<|end|><|user|>and<|end|><|assistant|>so<|end|>"
    assert "".join(tokenizer.convert_ids_to_tokens(row["input_ids"])) == whole


def test_a_template_that_refuses_is_a_data_error() -> None:
    tokenizer = characters(template="{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match=r"chats\.jsonl, line 4.*no system role"):
        encode([chat()], tokenizer, LANGUAGE, 64)


def test_a_tokenizer_without_offsets_masks_the_same() -> None:
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    row = encode([Example(text="yes", prompt="ok?\n")], slow, LANGUAGE, 64).rows[0]
    assert learned(slow, row) == "yes</s>"
    row = encode([chat()], slow, LANGUAGE, 256).rows[0]
    assert learned(slow, row) == " yo\n so\n</s>"
    encoded = encode([Example(text="abcdefgh", label=1)], slow, CLASSES, 4)
    assert encoded.rows[0]["label"] == [1] and len(encoded.rows[0]["input_ids"]) == 4
    with pytest.raises(DataError, match="fast tokenizer"):
        encode([Example(text="q", context="c", answer="c", answer_start=0)], slow, QUESTIONS, 64)


def test_classification_keeps_special_tokens_and_types() -> None:
    tokenizer = characters(pair=True)
    encoded = encode([Example(text="abcdef", label=2), Example(text="g", label=0)], tokenizer, CLASSES, 5)
    assert tokenizer.convert_ids_to_tokens(encoded.rows[0]["input_ids"]) == ["[CLS]", "a", "b", "c", "[SEP]"]
    assert encoded.rows[0]["token_type_ids"] == [0] * 5
    assert (encoded.rows[0]["label"], encoded.rows[1]["label"]) == ([2], [0])
    assert (encoded.dropped, encoded.truncated) == (0, 1)
    batch = collate(encoded.rows, 0)
    assert batch["labels"].tolist() == [2, 0]


def test_question_offsets_point_at_the_answer() -> None:
    tokenizer = characters(pair=True)
    context = "It was Ada, then Bob."
    examples = [
        Example(text="Who?", context=context, answer=answer, answer_start=context.index(answer.strip()) - pad)
        for answer, pad in (("Ada", 0), (" Ada ", 1), ("Bob", 0))
    ]
    encoded = encode(examples, tokenizer, QUESTIONS, 64)
    for row, example in zip(encoded.rows, examples, strict=True):
        span = slice(row["start_positions"][0], row["end_positions"][0] + 1)
        assert example.answer is not None
        found = "".join(tokenizer.convert_ids_to_tokens(row["input_ids"][span]))
        assert found == example.answer.strip()
        assert row["token_type_ids"][span] == [1] * 3
    short = encode(examples, tokenizer, QUESTIONS, 20)
    assert (len(short.rows), short.dropped, short.truncated) == (2, 1, 2)
    assert [len(row["input_ids"]) for row in short.rows] == [20, 20]
    assert tokenizer.convert_ids_to_tokens(short.rows[0]["input_ids"])[-2:] == ["t", "[SEP]"]
    assert len(short.rows[0]["token_type_ids"]) == 20
    with pytest.raises(DataError, match="a whole answer"):
        encode(examples, tokenizer, QUESTIONS, 7)


# Padding


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_pads_each_field_on_its_side(side: Any) -> None:
    rows = [
        {"input_ids": [7, 8, 9], "labels": [IGNORED, 8, 9], "token_type_ids": [0, 1, 1]},
        {"input_ids": [5], "labels": [5], "token_type_ids": [1]},
    ]
    batch = collate(rows, 3, side)
    left = side == "left"
    assert batch["input_ids"].tolist() == [[7, 8, 9], [3, 3, 5] if left else [5, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1] if left else [1, 0, 0]]
    assert batch["labels"].tolist()[1] == ([IGNORED, IGNORED, 5] if left else [5, IGNORED, IGNORED])
    assert batch["token_type_ids"].tolist()[1] == ([0, 0, 1] if left else [1, 0, 0])
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    spans = [{"input_ids": [1] * n, "start_positions": [1], "end_positions": [2]} for n in (5, 3)]
    moved = collate(spans, 0, side)
    assert moved["start_positions"].tolist() == [1, 3 if left else 1]
    assert moved["end_positions"].tolist() == [2, 4 if left else 2]


def test_collate_needs_rows_and_a_pad_id_is_always_found() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        collate([], 0)
    tokenizer = characters()
    assert padding_id(tokenizer) == tokenizer.eos_token_id == 2
    tokenizer.pad_token = "<unk>"
    assert padding_id(tokenizer) == 0
    assert padding_id(characters(eos=False)) == 0


# Real files


REAL = os.environ.get("NOREN_DATA")
real = pytest.mark.skipif(not REAL, reason="NOREN_DATA names no folder with data/sst2, data/gsm8k, ...")


@real
@pytest.mark.parametrize(
    ("path", "task", "columns", "count", "labels"),
    [
        ("data/sst2/train.tsv", CLASSES, {"text": "sentence"}, 67_349, ["0", "1"]),
        ("data/ag_news/small_train.csv", CLASSES, {"text": "1", "label": "2"}, 5_000, ["0", "1", "2", "3"]),
        ("data/gsm8k/train.jsonl", LANGUAGE, {"prompt": "question", "response": "answer"}, 7_473, []),
        ("data/tinyshakespeare/input.txt", LANGUAGE, {}, 7_222, []),
        ("data/xquad_en/xquad.en.json", QUESTIONS, {}, 1_190, []),
        ("data/xquad_en", QUESTIONS, {"format": "jsonl"}, 2_380, []),
    ],
)
def test_real_files_are_read_whole(
    path: str, task: str, columns: dict[str, str], count: int, labels: list[str]
) -> None:
    data = msgspec.convert({"path": path, **columns}, Data)
    examples, names = read_examples(data, task, Path(REAL or ""))
    assert (len(examples), names) == (count, labels)
    few = examples[:200]
    encoded = encode(few, characters(pair=task != LANGUAGE), task, 4096)
    assert (len(encoded.rows), encoded.dropped) == (len(few), 0)
    assert collate(encoded.rows[:4], 0)["input_ids"].shape[0] == 4
