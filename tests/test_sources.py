"""Text as people have it: names, columns, folders, sizes, compressed files, chats."""

import bz2
import gzip
import json
import lzma
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from conftest import EXAMPLE
from datasets import Dataset, DatasetDict

from prism_refactor.calibration import sources
from prism_refactor.calibration.settings import Calibration
from prism_refactor.calibration.sources import Source
from prism_refactor.calibration.text import load_tokenizer, token_rows
from prism_refactor.errors import InputError, UsageError
from prism_refactor.evaluation.windows import read_windows
from prism_refactor.models.checkpoint import Checkpoint

TEXTS = [f"Document {number} tells of a mill and a river. " * 20 for number in range(12)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(name, column="text", seed=0):
    """All documents of a source, sorted."""
    found = [record[column] for record in Source.parse(str(name)).records(column, seed)]
    return sorted(text if text is None or isinstance(text, str) else "".join(text.chunks()) for text in found)


@pytest.mark.parametrize(
    "name", ["a[0-9].jsonl", "b*.jsonl", "c?.jsonl", "d{x,y}.jsonl", "e 1(test).jsonl", "f#%20.jsonl", "g:5.jsonl", "h[en]"]
)
def test_a_name_is_no_pattern(tmp_path, name):
    path = tmp_path / name
    if path.suffix:
        path.write_text(lines({"text": text} for text in TEXTS))
    else:
        path.mkdir()
        (path / "x.jsonl").write_text(lines({"text": text} for text in TEXTS))
    for other in ("a1.jsonl", "bb.jsonl", "cc.jsonl", "dx.jsonl"):
        (tmp_path / other).write_text(lines([{"text": "another file"}]))
    assert read(path) == sorted(TEXTS)
    assert Source.parse(f"{path}:7").samples == 7
    assert Source.parse(f"{path}:7").name == str(path)
    if path.is_dir():
        (path / "test.jsonl").write_text(lines([{"text": "held out"}]))
        assert read(f"{path}(test)") == ["held out"]
        assert Source.parse(f"{path}(test):7") == Source(str(path), None, "test", 7)


@pytest.mark.parametrize("shape", ["lines", "list", "indented", "one after the other", "bom", "blank lines", "no last line end"])
def test_json_in_every_shape(tmp_path, shape):
    rows = [{"text": f'{text} \u6cb3 \\ "quoted" [x, {{y}}]', "n": number} for number, text in enumerate(TEXTS)]
    text = {
        "lines": lines(rows),
        "list": json.dumps(rows),
        "indented": json.dumps(rows, indent=2, ensure_ascii=False),
        "one after the other": "\n".join(json.dumps(row, indent=2) for row in rows),
        "bom": "\ufeff" + lines(rows),
        "blank lines": "\n\n" + lines(rows).replace("\n", "\r\n\r\n"),
        "no last line end": lines(rows).rstrip(),
    }[shape]
    for suffix in (".json", ".jsonl"):
        path = tmp_path / f"x{suffix}"
        path.write_text(text, encoding="utf-8")
        assert read(path) == sorted(row["text"] for row in rows)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_json_that_is_read_in_small_pieces(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("prism_refactor.calibration.sources._CHUNK", chunk)
    rows = [{"text": 'a \u6cb3 "b"', "other": [1, -2.5e3, True, None, {"deep": ["x"]}]}, {"text": "c\\n"}]
    for text in (json.dumps(rows), lines(rows), json.dumps(rows, indent=1)):
        (tmp_path / "x.jsonl").write_text(text)
        assert read(tmp_path / "x.jsonl") == sorted(row["text"] for row in rows)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.json", '[{"text": "a"}, {"text": "b"}', "the list does not end"),
        ("x.json", '[{"text": "a"} {"text": "b"}]', "no comma"),
        ("x.json", '[{"text": "a"}]]', "something stands behind the list"),
        ("x.json", '[[{"text": "a"}]]', "a record is list"),
        ("x.jsonl", '{"text": "a"},\n{"text": "b"}', "line 1: no JSON"),
        ("x.jsonl", '{"text": "a"}\n{"text": "b', "line 2: no JSON: Unterminated string"),
        ("x.csv", 'text\n"a\nb\n', "unexpected end of data"),
        ("x.csv", "id,text\n1,first half, second half\n", "line 2: has not as many fields"),
        ("x.tsv", "id\ttext\n1\n", "line 2: has not as many fields"),
    ],
)
def test_a_broken_file_is_not_read_as_a_whole_one(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=says):
        read(tmp_path / name)


def test_an_archive_of_several_files_is_refused(tmp_path):
    for name, members in (("a.jsonl.zip", ["x/", "x/one.jsonl"]), ("b.jsonl.zip", ["one.jsonl", "two.jsonl"])):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member in members:
                archive.writestr(member, "" if member.endswith("/") else lines([{"text": member}]))
    assert read(tmp_path / "a.jsonl.zip") == ["x/one.jsonl"]
    with pytest.raises(InputError, match="holds 2 files; unpack it"):
        read(tmp_path / "b.jsonl.zip")


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": b}\n')
    with pytest.raises(InputError, match=r"x\.jsonl: cannot be read: line 3: no JSON"):
        read(tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl").write_text('"a"\n"b"\n')
    with pytest.raises(InputError, match="a record is str, not an object"):
        read(tmp_path / "y.jsonl")
    (tmp_path / "z.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"z\.jsonl: cannot be read: .*utf-8"):
        read(tmp_path / "z.jsonl")


@pytest.mark.parametrize("second", [{"source": "web"}, {"id": "abc"}, {"meta": {"a": 1}}, {"meta": [1, "x"]}, {"meta": None}])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_other_columns_may_differ_from_file_to_file(tmp_path, second, kind):
    first = {"id": 7, "meta": "x"}
    for name, more in (("a", first), ("b", second)):
        rows = [{"text": text} | more for text in TEXTS]
        if kind == "jsonl":
            (tmp_path / f"{name}.jsonl").write_text(lines(rows))
        elif more.get("meta") != [1, "x"]:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    assert set(read(tmp_path)) == set(TEXTS)


def test_text_that_is_not_utf_8_is_named(tmp_path):
    """Also where a file is one document, which is read last."""
    for number, raw in enumerate((b"caf\xe9 au lait", "\ufeffcaf\u00e9".encode("utf-16"), gzip.compress(b"words " * 1000)[:-20])):
        path = tmp_path / f"x{number}.txt{'.gz' if number == 2 else ''}"
        path.write_bytes(raw)
        with pytest.raises(InputError, match=rf"{path.name}: cannot be read"):
            token_rows([str(path)], load_tokenizer(EXAMPLE), 2, 8, 0)


def test_half_a_pair_of_surrogates_is_a_half_character(tmp_path):
    """As scraped text has it where a picture was cut."""
    tokenizer = load_tokenizer(EXAMPLE)
    (tmp_path / "x.jsonl").write_text('{"text": "cut here \\ud83d and whole \\ud83d\\ude00 there"}\n' * 9)
    found = tokenizer.decode(token_rows([str(tmp_path)], tokenizer, 1, 64, 0).flatten())
    assert "cut here \ufffd and whole \U0001f600 there" in found


def test_null_in_the_first_rows_of_a_column(tmp_path):
    (tmp_path / "x.jsonl").write_text(lines([{"text": None}] * 30 + [{"text": "words"}]))
    assert [text for text in (record["text"] for record in Source.parse(str(tmp_path)).records("text", 0)) if text] == ["words"]


COMPRESSORS = {
    ".gz": gzip.compress,
    ".zst": lambda raw: zstandard.ZstdCompressor().compress(raw),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("compressed", ["", *COMPRESSORS, ".zip"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".txt", ".csv", ".tsv"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_files_are_read_compressed_or_not(tmp_path, kind, compressed, as_folder):
    table = {".csv": ",", ".tsv": "\t"}
    if kind in table:
        text = f"id{table[kind]}text\n" + "".join(f'{n}{table[kind]}"{text}"\n' for n, text in enumerate(TEXTS))
    else:
        text = {".jsonl": lines({"text": text} for text in TEXTS), ".json": json.dumps([{"text": text} for text in TEXTS])}.get(
            kind, TEXTS[0]
        )
    path = tmp_path / f"Part-1.of.2{kind}{compressed}"
    if compressed == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"x{kind}", text)
    else:
        path.write_bytes(COMPRESSORS.get(compressed, bytes)(text.encode()))
    assert read(tmp_path if as_folder else path) == sorted([TEXTS[0]] if kind == ".txt" else TEXTS)


UNREAD = ["x.arrow", "x.feather", "x.jsonl.7z", "x.parquet.gz", "x.xlsx", "x.pkl", "x.tar.gz", "x.bin.zst", "x.docx", "x.jsonl.incomplete"]


@pytest.mark.parametrize("name", UNREAD)
def test_files_that_are_not_read_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(InputError, match=name.rpartition(".")[2]):
        read(tmp_path / name)
    (tmp_path / "a.jsonl").write_text(lines([{"text": "x"}]))
    with pytest.raises(InputError, match=name):
        read(tmp_path)


@pytest.mark.parametrize(
    "beside",
    [
        "dataset_infos.json",
        ".git/x.jsonl",
        ".cache/huggingface/x.json",
        "LICENSE.txt",
        "README.md",
        "requirements.txt",
        "load.py",
        "__pycache__/x.json",
    ],
)
def test_what_lies_beside_the_data_is_not_read(tmp_path, beside):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part-0.jsonl").write_text(lines({"text": text} for text in TEXTS))
    path = tmp_path / beside
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"text": "junk"}')
    assert read(tmp_path) == sorted(TEXTS)


@pytest.mark.parametrize(
    "names",
    [
        ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"],
        ["train.jsonl", "test.jsonl"],
        ["train/a.jsonl", "test/a.jsonl", "dev/a.jsonl"],
        ["part.jsonl", "eval.jsonl"],
        ["en_training.jsonl.gz", "en_valid.jsonl.gz"],
        ["how-to-test-a-dog.jsonl", "test/a.jsonl"],
    ],
)
def test_of_a_folder_with_splits_one_is_read(tmp_path, names):
    for number, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"text": text} for text in (TEXTS if number == 0 else ["held out"])]
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_bytes(gzip.compress(lines(rows).encode()) if name.endswith(".gz") else lines(rows).encode())
    assert read(tmp_path) == sorted(TEXTS)
    other = "test" if any("test" in name for name in names) else "validation"
    assert read(f"{tmp_path}({other})") == ["held out"]
    with pytest.raises(InputError, match="no split nothing; it has"):
        read(f"{tmp_path}(nothing)")


def test_a_folder_of_several_other_splits_says_which(tmp_path):
    for name in ("test", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(lines([{"text": name}]))
    with pytest.raises(InputError, match=r"no split train; it has .*\(test\), .*\(validation\)"):
        read(tmp_path)
    (tmp_path / "dev.jsonl").unlink()
    assert read(tmp_path) == ["test"]


def test_linked_folders_are_read_and_broken_links_named(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.ndjson").write_text(lines([{"text": "linked"}]))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "above").symlink_to(tmp_path / "data")
    assert read(tmp_path / "data") == ["linked"]
    (tmp_path / "data" / "gone.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"gone\.jsonl: the file it links to is missing"):
        read(tmp_path / "data")


def test_files_that_name_no_split_are_the_trainings(tmp_path, caplog):
    for name in ("train-0", "more", "how-to-train-dogs", "test-drive", "test"):
        (tmp_path / f"{name}.jsonl").write_text(lines([{"text": name}]))
    with caplog.at_level("INFO", "prism_refactor"):
        assert read(tmp_path) == ["how-to-train-dogs", "more", "test-drive", "train-0"]
    assert "the split train is read: 4 of 5 files" in caplog.text


def test_what_save_to_disk_has_written(tmp_path):
    rows = Dataset.from_list([{"text": text, "n": 1} for text in TEXTS])
    rows.save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == sorted(TEXTS)
    DatasetDict({"train": rows, "test": Dataset.from_list([{"text": "held out"}])}).save_to_disk(tmp_path / "several")
    assert read(tmp_path / "several") == sorted(TEXTS)
    assert read(f"{tmp_path / 'several'}(test)") == ["held out"]
    for name, has in (("several", "train, test"), ("one", "train")):
        with pytest.raises(InputError, match=f"no split dev; it has {has}"):
            read(f"{tmp_path / name}(dev)")


def test_a_file_has_no_split_or_subset(tmp_path):
    (tmp_path / "x.jsonl").write_text(lines([{"text": "x"}]))
    for name in (f"{tmp_path}/x.jsonl(test)", f"{tmp_path}/x.jsonl[en]"):
        with pytest.raises(UsageError):
            read(name)


CHAT = [{"role": "user", "content": "Where does the river end?"}, {"role": "assistant", "content": "In the sea."}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", ["text", "messages", "turns"])
def test_chats_go_through_the_models_template(tmp_path, kind, column):
    tokenizer = load_tokenizer(EXAMPLE)
    rows = [{"turns" if column == "turns" else "messages": CHAT, "n": 1}] * 20
    path = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        path.write_text(lines(rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        token_rows([str(path)], tokenizer, 2, 8, 0, column)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    found = tokenizer.decode(token_rows([str(path)], tokenizer, 100, 16, 0, column).flatten())
    assert "<user> Where does the river end?\n<assistant> In the sea." in found
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(InputError, match=r"refuses a chat of the text: .*no system"):
        token_rows([str(path)], tokenizer, 2, 8, 0, column)


def test_of_a_long_document_what_is_needed_is_read(tmp_path, monkeypatch):
    """However long it is: characters made tokens are counted."""
    tokenizer, seen = load_tokenizer(EXAMPLE), []
    text = "The river runs past an old mill. " * 200_000
    (tmp_path / "x.txt").write_text(text)
    (tmp_path / "x.jsonl").write_text(lines([{"text": text}]))
    (tmp_path / "line.txt").write_text("x" * 2_000_000)

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, **options):
            seen.append(len(text))
            return tokenizer(text, **options)

    for name in ("x.txt", "x.jsonl", "line.txt"):
        seen.clear()
        rows = token_rows([str(tmp_path / name)], Counting(), 2, 128, 0)
        assert rows.shape == (2, 128)
        assert sum(seen) <= 1 << 17
    monkeypatch.setattr("prism_refactor.evaluation.windows.load_tokenizer", lambda _: Counting())
    seen.clear()
    windows = read_windows(Calibration(datasets=(str(tmp_path / "x.txt"),), max_seq_length=64), Checkpoint(EXAMPLE), most=256)
    assert windows.tokens == 255
    assert sum(seen) <= 1 << 17


def test_pieces_of_a_document_are_its_text(tmp_path, monkeypatch):
    """At whatever place it is cut, the tokens are those of the whole text: cuts are before spaces."""
    tokenizer = load_tokenizer(EXAMPLE)
    text = "".join(TEXTS)
    (tmp_path / "x.txt").write_text(text)
    whole = tokenizer(text)["input_ids"]
    monkeypatch.setattr("prism_refactor.calibration.text._PIECE", 50)
    monkeypatch.setattr("prism_refactor.calibration.sources._CHUNK", 33)
    rows = token_rows([str(tmp_path / "x.txt")], tokenizer, 10_000, 64, 0)
    assert rows.flatten().tolist() == whole[: rows.numel()]


def test_a_turn_of_calls_alone_is_part_of_a_chat(tmp_path):
    tokenizer = load_tokenizer(EXAMPLE)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content or m.tool_calls[0].name }}\n{% endfor %}"
    turns = [CHAT[0], {"role": "assistant", "tool_calls": [{"name": "map"}]}, CHAT[1]]
    (tmp_path / "x.jsonl").write_text(lines([{"messages": turns}] * 20))
    assert "<assistant> map" in tokenizer.decode(token_rows([str(tmp_path / "x.jsonl")], tokenizer, 9, 32, 0).flatten())


def test_chats_are_read_as_the_server_reads_them(tmp_path):
    """Parts of a content are one text, arguments of calls are objects; rows without messages are none."""
    tokenizer = load_tokenizer(EXAMPLE)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}"
        "{% for c in m.tool_calls or [] %}{% for name, value in c.function.arguments.items() %}{{ name }}={{ value }}{% endfor %}"
        "{% endfor %}{{ '|' }}{% endfor %}"
    )
    call = {"function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    parts = [{"type": "text", "text": "Is it "}, {"type": "text", "text": "cold?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    (tmp_path / "x.jsonl").write_text(lines([{"messages": None}, {"messages": []}, *[{"messages": turns}] * 20]))
    found = tokenizer.decode(token_rows([str(tmp_path)], tokenizer, 9, 32, 0).flatten())
    assert "user: Is it cold?|assistant: city=Ulm" in found
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    (tmp_path / "x.jsonl").write_text(lines([{"messages": picture}]))
    with pytest.raises(InputError, match="a part of a message is image_url, not text"):
        token_rows([str(tmp_path)], tokenizer, 9, 32, 0)


def test_what_is_not_read_takes_no_memory(tmp_path):
    (tmp_path / "x.jsonl").write_text(lines([{"text": "short", "html": "x" * 1000, "domain": "web"}]))
    (record,) = Source.parse(str(tmp_path / "x.jsonl")).records("text", 0)
    assert record == {"text": "short", "domain": "web"}


def test_the_buffer_of_the_shuffle_is_small_for_large_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("prism_refactor.calibration.sources._BUFFER_CHARACTERS", 3 * len(TEXTS[0]))
    taken = []

    def watched(path, column):
        for number, text in enumerate(TEXTS):
            taken.append(number)
            yield {column: text}

    monkeypatch.setitem(sources.READERS, ".jsonl", watched)
    (tmp_path / "x.jsonl").touch()
    records = Source.parse(str(tmp_path / "x.jsonl")).records("text", 0)
    next(records)
    assert len(taken) == 4
    assert len({record["text"] for record in records}) == len(TEXTS) - 1


def test_a_shuffle_is_repeated_by_its_seed(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text(lines({"text": f"{name} {text}"} for text in TEXTS))
    orders = [[record["text"] for record in Source.parse(str(tmp_path)).records("text", seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert len(set(orders[0])) == 36


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.txt", "x.jsonl.gz"])
def test_of_a_large_file_the_beginning_is_read(tmp_path, monkeypatch, name):
    """Of 24 million characters a few million, whatever the file is."""
    text = "The river runs past an old mill. " * 30
    rows = [{"text": text}] * 24_000
    content = {"x.json": json.dumps(rows), "x.txt": text * 24_000}.get(name) or lines(rows)
    (tmp_path / name).write_bytes(gzip.compress(content.encode(), 1) if name.endswith("gz") else content.encode())
    read_characters = []

    class Counting:
        def __init__(self, path):
            self.stream = opened(path)

        def read(self, most):
            found = self.stream.read(most)
            read_characters.append(len(found))
            return found

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

    opened = sources._opened
    monkeypatch.setattr(sources, "_opened", Counting)
    assert token_rows([str(tmp_path / name)], load_tokenizer(EXAMPLE), 2, 128, 0).shape == (2, 128)
    assert 0 < sum(read_characters) < 4_000_000
