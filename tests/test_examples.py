from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import polars as pl
import pytest

from curate import atomic, examples
from curate.errors import CurateError, DataError, UsageError
from curate.examples import DataSpec, flag_overlap, load_examples, open_examples, source_dataset
from curate.tokens import BOS, EOS

PAIRS = [{"prompt": f"{i} plus 1?", "response": f"it is {i + 1}", "kind": i % 2} for i in range(9)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_set_has_the_columns_of_the_design(tmp_path: Path) -> None:
    """The table holds row, id, source, lengths, hashes and text, and the columns asked for."""
    spec = DataSpec(path=jsonl(tmp_path / "sums.jsonl", PAIRS), columns=("kind",))
    found = load_examples(spec)
    assert found.table.columns == [
        *("row", "source_row", "id", "source", "tokens", "tokens_full", "targets", "truncated"),
        *("content_hash", "token_hash", "text", "kind"),
    ]
    assert found.table["row"].to_list() == list(range(9))
    assert found.table["kind"].to_list() == [row["kind"] for row in PAIRS]
    assert found.table["source"].unique().to_list() == ["sums"]
    text = "0 plus 1?\nit is 1"
    assert found.table["text"][0] == text
    assert found.tokens(0)[0].tolist() == [BOS, *text.encode(), EOS]
    assert found.table["tokens"].to_list() == found.lengths.tolist()
    assert (found.pad_id, found.vocab_size, len(found)) == (256, 259, 9)


def test_ids_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    """The same rows in another order have the same ids, repeated rows numbered among themselves."""
    rows = [*PAIRS, PAIRS[3], PAIRS[3]]
    one = load_examples(DataSpec(path=jsonl(tmp_path / "a.jsonl", rows), source="s"))
    two = load_examples(DataSpec(path=jsonl(tmp_path / "b.jsonl", rows[::-1]), source="s"))
    assert sorted(one.ids()) == sorted(two.ids())
    assert dict(zip(one.ids(), one.table["text"], strict=True)) == dict(
        zip(two.ids(), two.table["text"], strict=True)
    )
    base = one.ids([3])[0]
    assert one.ids([9, 10]) == [f"{base}#2", f"{base}#3"]
    assert base == f"s:{one.table['content_hash'][3][:12]}"


def test_ids_do_not_depend_on_the_context(tmp_path: Path) -> None:
    """A shorter context changes what the model sees (the content hash), never whose row it is."""
    path = jsonl(tmp_path / "a.jsonl", [{"text": "same start, end A"}, {"text": "same start, B"}])
    whole, short = (load_examples(DataSpec(path=path, max_tokens=n)) for n in (None, 8))
    assert whole.ids() == short.ids()
    assert len(set(short.table["content_hash"])) == 1
    assert short.table["truncated"].to_list() == [True, True]
    assert short.table["tokens"].to_list() == [8, 8]
    assert short.table["tokens_full"].to_list() == whole.table["tokens"].to_list()


def test_the_users_ids_are_kept_and_checked(tmp_path: Path) -> None:
    """A named id column is used as it is; repeated or empty ids are refused by row."""
    rows = [{"text": "a", "key": 7}, {"text": "b", "key": 8}]
    assert load_examples(DataSpec(path=_named(tmp_path, rows), id="key")).ids() == ["7", "8"]
    for bad, words in (
        (7, "row 1: the id '7' .* was there before"),
        (None, "row 1: the id column"),
    ):
        path = _named(tmp_path, [rows[0], {"text": "b", "key": bad}])
        with pytest.raises(DataError, match=words):
            load_examples(DataSpec(path=path, id="key"))


def _named(directory: Path, rows: list[dict[str, Any]]) -> str:
    return jsonl(directory / f"rows-{len(list(directory.iterdir()))}.jsonl", rows)


def test_every_dropped_row_keeps_its_reason(tmp_path: Path) -> None:
    """Empty texts, and rows whose context ends before their targets, are dropped and counted."""
    rows = [
        {"prompt": "p", "response": "fine"},
        {"prompt": "p", "response": " "},
        {"prompt": "p", "response": None},
        {"prompt": "long" * 10, "response": "cut off"},
    ]
    spec = DataSpec(path=jsonl(tmp_path / "a.jsonl", rows), mask_prompt=True, max_tokens=20)
    found = load_examples(spec, tmp_path / "set")
    assert found.table["source_row"].to_list() == [0]
    assert found.dropped.select("source_row", "reason").rows() == [
        (1, "response is empty"),
        (2, "response is empty"),
        (3, "no targets within the first 20 of 50 tokens"),
    ]
    assert open_examples(tmp_path / "set").dropped.equals(found.dropped)
    with pytest.raises(DataError, match=r"none of the 2 rows .* 2 × response is empty"):
        load_examples(
            spec.model_copy(
                update={"where": DataSpec.of({"path": "x", "where": {"rows": "1:3"}}).where}
            )
        )


def test_masked_prompts_leave_the_response_as_target(tmp_path: Path) -> None:
    """With mask_prompt the targets are the response and the end; without, all but the first."""
    path = jsonl(tmp_path / "a.jsonl", PAIRS)
    masked = load_examples(DataSpec(path=path, mask_prompt=True))
    plain = load_examples(DataSpec(path=path))
    assert masked.table["targets"][0] == len("it is 1") + 1
    assert plain.table["targets"][0] == plain.table["tokens"][0] - 1
    labels = masked.tokens(0)[1]
    assert bytes(labels[labels >= 0][:-1].tolist()) == b"it is 1"


def test_messages_are_read_as_conversations(tmp_path: Path) -> None:
    """A messages column becomes one text, the assistant's turns its targets when masked."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": []}])
    found = load_examples(DataSpec(path=path, mask_prompt=True, eos=False))
    assert found.table["text"].to_list() == ["user: hi\nassistant: yo\n"]
    assert found.table["targets"].to_list() == [3]
    assert found.dropped["reason"].to_list() == ["messages is empty"]
    with pytest.raises(
        DataError, match=r"row 0: messages is .* expected a list of role and content"
    ):
        load_examples(DataSpec(path=_named(tmp_path, [{"messages": [{"who": "x"}]}])))


def test_token_columns_are_taken_as_they_are(tmp_path: Path) -> None:
    """Token columns need no tokenizer; padding at either end is taken off, labels are kept."""
    rows = [
        {"input_ids": [0, 5, 6, 0], "labels": [-100, 5, 9, -100], "attention_mask": [0, 1, 1, 0]},
        {"input_ids": [300, 4], "labels": [-100, -100], "attention_mask": [1, 1]},
        {"input_ids": [], "labels": [], "attention_mask": []},
    ]
    found = load_examples(DataSpec(path=jsonl(tmp_path / "a.jsonl", rows), tokenizer=None))
    assert [array.tolist() for array in found.tokens(0)] == [[5, 6], [5, 9]]
    assert found.dropped["reason"].to_list() == [
        "no targets: nothing to predict",
        "input_ids is empty",
    ]
    assert (found.pad_id, found.vocab_size, found.table["text"][0]) == (0, 7, None)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids but 1 labels"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "attention_mask has a hole"),
        ({"input_ids": [1.5, 2.0]}, "must hold integers"),
        ({"input_ids": [-1, 2]}, "input_ids holds -1"),
        ({"input_ids": [1, 2], "labels": [-1, 2]}, "labels holds -1"),
        ({"text": 5}, "column 'text' holds int"),
    ],
)
def test_columns_of_the_wrong_kind_are_refused(
    row: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """A row that cannot be read as it stands is refused by number, with what was seen."""
    with pytest.raises(DataError, match=f"row 0: .*{words}"):
        load_examples(DataSpec(path=jsonl(tmp_path / "a.jsonl", [row])))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": "respones"}, "no column 'respones' .*did you mean 'response'"),
        ({"id": "kin"}, "named by `id`.*did you mean 'kind'"),
        ({"columns": ("kin",)}, "named by `columns`.*did you mean 'kind'"),
        ({"prompt": "prompt"}, "`response` is missing"),
        ({"prompt": "prompt", "response": "response", "text": "kind"}, "cannot be given together"),
        ({"text": "response", "mask_prompt": True}, "mask_prompt needs"),
        ({"tokenizer": None}, "is not a tokenizer"),
    ],
)
def test_a_spec_that_does_not_fit_is_one_clear_line(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Misnamed columns come with the nearest that exists; contradictions say what to leave out."""
    path = jsonl(tmp_path / "a.jsonl", PAIRS)
    with pytest.raises(UsageError, match=words) as caught:
        load_examples(DataSpec(path=path, **options))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_names_of_the_tools_own_columns_are_not_taken(tmp_path: Path) -> None:
    """A user's column that would hide one of the table's is refused; the id itself may be kept."""
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a", "loss": 1.0, "id": "x"}])
    with pytest.raises(UsageError, match=r"'loss' .* one of the tool's own names"):
        load_examples(DataSpec(path=path, columns=("loss",)))
    assert load_examples(DataSpec(path=path, id="id", columns=("id", "text"))).ids() == ["x"]


def test_unusual_columns_ask_to_be_named(tmp_path: Path) -> None:
    """Where no usual column is there, the error lists what there is and what can be named."""
    with pytest.raises(DataError, match=r"has none of the usual columns \(it has body\)"):
        load_examples(DataSpec(path=jsonl(tmp_path / "a.jsonl", [{"body": "x"}])))


def test_source_is_a_column_a_constant_or_the_file(tmp_path: Path) -> None:
    """Rows are labelled by a source column, else by the constant given, else by their file."""
    path = jsonl(tmp_path / "web.jsonl", [{"text": "a", "origin": "x"}, {"text": "b"}])
    assert load_examples(DataSpec(path=path, source="origin")).table["source"].to_list() == [
        "x",
        "web",
    ]
    assert load_examples(DataSpec(path=path, source="mine")).table["source"][0] == "mine"
    assert load_examples(DataSpec(path=path)).table["source"][0] == "web"


def test_a_persisted_set_is_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written in several parts and opened again, a set equals the one in memory, mapped."""
    monkeypatch.setattr(examples, "PART_ROWS", 2)
    monkeypatch.setattr("curate.intake.CHUNK_ROWS", 2)
    spec = DataSpec(path=jsonl(tmp_path / "a.jsonl", PAIRS), role="query", where={"rows": "1:"})
    memory = load_examples(spec, name="q")
    load_examples(spec, tmp_path / "set", name="q")
    stored = open_examples(tmp_path / "set")
    assert len(stored.parts) == 4
    assert stored.table.equals(memory.table)
    assert stored.ids([5, 2]) == [memory.table["id"][5], memory.table["id"][2]]
    for row in range(len(memory)):
        for one, two in zip(stored.tokens(row), memory.tokens(row), strict=True):
            assert np.array_equal(one, two)
            assert isinstance(one, np.memmap)
    same = ("name", "role", "spec", "fingerprint", "pad_id", "vocab_size")
    assert all(getattr(stored, key) == getattr(memory, key) for key in same)
    assert all(atomic.sha256(tmp_path / "set" / n) == h for n, h in stored.files.items())
    whole = source_dataset(spec).select(stored.table["source_row"].to_list())
    assert whole["prompt"][:] == [row["prompt"] for row in PAIRS[1:]]


def test_a_load_that_was_cut_short_is_no_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk midway leaves no set, even over an older one, and says what to do."""
    spec = DataSpec(path=jsonl(tmp_path / "a.jsonl", PAIRS))
    load_examples(spec, tmp_path / "set")

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(CurateError, match="no space left"):
            load_examples(spec, tmp_path / "set")
    with pytest.raises(CurateError, match=r"holds no whole set.*load the data again"):
        open_examples(tmp_path / "set")
    assert load_examples(spec, tmp_path / "set").table.equals(load_examples(spec).table)


def test_a_set_that_grew_keeps_its_rows(tmp_path: Path) -> None:
    """Known rows keep their numbers in a source that was shuffled and grew; a lost row is told."""
    first = load_examples(DataSpec(path=_named(tmp_path, [*PAIRS[:4], PAIRS[0]]), source="s"))
    grown = DataSpec(path=_named(tmp_path, [*PAIRS[::-1], PAIRS[0]]), source="s")
    second = load_examples(grown, known_ids=first.ids())
    assert second.ids()[:5] == first.ids()
    assert second.table["content_hash"][:5].equals(first.table["content_hash"])
    assert sorted(second.ids()) == sorted(load_examples(grown).ids())
    with pytest.raises(DataError, match="has lost 1 of 5 rows"):
        load_examples(DataSpec(path=_named(tmp_path, PAIRS), source="s"), known_ids=first.ids())


def test_training_rows_that_are_queries_are_flagged(tmp_path: Path) -> None:
    """A training row with the tokens of a query is flagged by its set, masked or not."""
    train = load_examples(DataSpec(path=_named(tmp_path, PAIRS)))
    masked = DataSpec(path=_named(tmp_path, PAIRS[2:4]), mask_prompt=True, role="query")
    queries = [
        load_examples(masked, name="q"),
        load_examples(DataSpec(path=_named(tmp_path, PAIRS[3:4])), name="other"),
    ]
    flags = flag_overlap(train, queries)
    assert flags.schema == {"row": pl.Int64, "leaks": pl.List(pl.String)}
    assert flags["leaks"].to_list() == [[], [], ["q"], ["q", "other"], *[[]] * 5]
    assert flag_overlap(train, []).schema == flags.schema
    assert flag_overlap(train, [])["leaks"].to_list() == [[]] * 9


def test_progress_ends_at_the_number_of_rows(tmp_path: Path) -> None:
    """Progress counts source rows, dropped ones too, up to all of them."""
    seen: list[tuple[int, int]] = []
    rows = [*PAIRS, {"prompt": "x", "response": ""}]
    spec = DataSpec(path=jsonl(tmp_path / "a.jsonl", rows))
    load_examples(spec, progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (10, 10)
