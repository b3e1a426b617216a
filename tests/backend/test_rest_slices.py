"""Promise: no document of a client's, and none made for one, holds up the others: one call does little at a time.

A call into C keeps the interpreter's lock until it returns, in whatever thread. So what is counted is how much each
gets.
"""

from __future__ import annotations

import base64
import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.backend.errors import InferenceError
from proxy.backend.execution import Output
from proxy.backend.repository import Repository
from proxy.backend.services.rest import control, jsontensors, jsontext
from proxy.backend.services.rest.exchange import _gathered
from proxy.backend.services.rest.faults import HttpError
from proxy.backend.services.rest.jsontensors import to_tensor, to_written
from proxy.backend.services.rest.jsontext import dumps, dumps_in_pieces, loads, weigh
from tests.backend.models import ECHO, write_model
from tests.backend.test_rest import Rest, serve

SLICE, WRITTEN = jsontensors._SLICE, jsontensors._WRITTEN
LARGEST_PIECE = 6 * max(SLICE, 24 * WRITTEN)  # bytes: a character may take six


# -- reading


class Key(str):
    """Counts how often one is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Key.compared += 1
        return str.__eq__(self, other)


def test_a_key_that_is_there_twice_is_found_in_one_go() -> None:
    names = [Key(number) for number in range(5000)]
    with pytest.raises(InferenceError, match="key '4999' is there twice"):
        jsontext._object([(name, 1) for name in (*names, Key(4999))])
    assert Key.compared < 100


CROWDS = {
    "lists and objects": b"[[1]" + b",[1]" * jsontext.MOST_LISTS + b"]",
    "objects": b"[{}" + b",{}" * jsontext.MOST_LISTS + b"]",
    "quotes": b'[""' + b',""' * (jsontext.MOST_QUOTES // 2) + b"]",
    "lists of no numbers": b"[[]" + b",[]" * jsontext._MOST_SILENT + b"]",
    "lists beside numbers in strings": b'["1"' + b',[],[],[],"1"' * (jsontext._MOST_SILENT // 3 + 1) + b"]",
}


@pytest.mark.parametrize("document", CROWDS.values(), ids=list(CROWDS))
def test_crowds_that_the_parser_reads_without_a_break_are_refused(document: bytes) -> None:
    with pytest.raises(HttpError, match=r"JSON has \d+ .*, more than \d+; don't nest") as refused:
        weigh(memoryview(document))
    assert refused.value.status == 413
    weigh(memoryview(document[: len(document) // 2]))


def test_a_batch_of_images_row_by_row_is_read() -> None:
    document = json.dumps({"data": [[[1, 2, 3]] * 224] * 1000}).encode()
    assert weigh(memoryview(document)) > 12 * len(document)


@pytest.mark.parametrize("unit", [b"[]", b"{}", b'"ab"', b"1.5", b"300", b"null", b'{"a":1}', b"[1]"])
def test_what_a_document_takes_is_counted(unit: bytes) -> None:
    taken = sys.getsizeof(json.loads(unit)) + 8
    assert weigh(memoryview(b"[" + b",".join([unit] * 1000) + b"]")) >= 1000 * taken


def test_a_refusal_over_http(tmp_path: Path) -> None:
    config = 'input { name: "IN" data_type: TYPE_INT32 dims: -1 } output { name: "OUT" data_type: TYPE_INT32 dims: -1 }'
    path = write_model(tmp_path / "models", "m", config, {"1/model.py": ECHO}).parent
    for rest in serve(Repository(path)):
        for endpoint in ("infer", "generate"):
            text = rest.refused(f"/v2/models/m/{endpoint}", CROWDS["lists of no numbers"])
            assert text.startswith("413 JSON has 131074 lists of no numbers, more than 131072")
        assert rest.quiet() == 0


LONG = 2 * SLICE + 3


@pytest.mark.parametrize("kind", ["INT8", "UINT64", "INT64", "FP32", "FP64", "BOOL"])
def test_a_long_list_means_what_a_short_one_means(kind: str) -> None:
    dtype = np.dtype(jsontensors.DATATYPES[kind].dtype)
    values = (np.arange(LONG) % 2).astype(dtype)
    if kind == "UINT64":
        values[SLICE + 1] = 2**64 - 1
    raw, _ = to_tensor("x", kind, (LONG,), values.tolist())
    assert raw is not None
    assert bytes(raw) == values.tobytes()
    rows = np.resize(values, (LONG, 2))
    raw, _ = to_tensor("x", kind, (LONG, 2), rows.tolist())
    assert raw is not None
    assert bytes(raw) == rows.tobytes()


FAULTS: dict[str, tuple[str, list[Any], str]] = {
    "kind": ("INT32", [*([1] * (LONG - 1)), "x"], f"element {LONG - 1} is 'x'"),
    "range": ("INT8", [*([1] * (LONG - 1)), 128], "128 is no INT8"),
    "lists": ("INT8", [*([1] * (LONG - 1)), [1]], "lists beside elements"),
    "lengths": ("INT8", [*([[1]] * (LONG - 1)), [1, 2]], "lists of different lengths"),
    "infinite": ("FP32", [*([1.0] * (LONG - 1)), float("1e999")], f"element {LONG - 1} is too large for FP32"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_a_fault_at_the_end_of_a_long_list(fault: tuple[str, list[Any], str]) -> None:
    kind, values, says = fault
    with pytest.raises(InferenceError, match=says):
        to_tensor("x", kind, (LONG,), values)


def test_slices_are_all_of_a_list_and_none_is_long() -> None:
    parts = list(jsontensors._sliced(list(range(LONG))))
    assert [value for part in parts for value in part] == list(range(LONG))
    assert max(map(len, parts)) <= SLICE


def test_what_the_model_does_not_take_is_not_read(tmp_path: Path) -> None:
    """The dataplane says what is wrong; that `data` isn't a list, too, is found when it is read."""
    config = 'input { name: "IN" data_type: TYPE_INT32 dims: 2 } output { name: "OUT" data_type: TYPE_INT32 dims: 2 }'
    path = write_model(tmp_path / "models", "m", config, {"1/model.py": ECHO}).parent
    right = {"name": "IN", "datatype": "INT32", "shape": [2], "data": "unread"}
    for rest in serve(Repository(path)):

        def refused(rest: Rest = rest, **changed: Any) -> str:
            return rest.refused("/v2/models/m/infer", {"inputs": [{**right, **changed}]})

        assert "data is 'unread'" in refused()
        assert "expects 'INT32'" in refused(datatype="FP32")
        assert "expects [2]" in refused(shape=[3])
        assert "expects 1" in refused(shape=[1, 2])
        assert "not an input" in refused(name="X")


# -- writing


def string(text: bytes) -> bytes:
    return struct.pack("<I", len(text)) + text


def written(*outputs: Output) -> Any:
    """The document, of which no piece is large."""
    pieces = list(dumps_in_pieces({"a": [{"data": to_written(one, "")} for one in outputs], "b": {}, "c": []}))
    assert max(map(len, pieces)) <= LARGEST_PIECE
    return json.loads(b"".join(pieces))


@pytest.mark.parametrize("count", [0, 1, WRITTEN - 1, WRITTEN, WRITTEN + 1, 5 * WRITTEN + 2])
@pytest.mark.parametrize("kind", ["BOOL", "INT8", "UINT64", "FP32", "FP64"])
def test_numbers_are_written_slice_by_slice(kind: str, count: int) -> None:
    values = np.random.default_rng(1).integers(0, 2, count).astype(jsontensors.DATATYPES[kind].dtype)
    output = Output("OUT", kind, (count,), values.tobytes())
    assert written(output, output) == {"a": [{"data": values.tolist()}] * 2, "b": {}, "c": []}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["", "a", "é", "\x00", "😀", '"\\\n', "\u2028"]), st.sampled_from([1, 3, 70_000])),
        max_size=8,
    ),
    st.sampled_from([0, WRITTEN + 1]),
)
def test_strings_are_written_slice_by_slice(parts: list[tuple[str, int]], more: int) -> None:
    texts = [text * count for text, count in parts] + ["x"] * more
    output = Output("OUT", "BYTES", (len(texts),), b"".join(string(text.encode()) for text in texts))
    assert written(output)["a"][0]["data"] == texts


@pytest.mark.parametrize(
    "text", [b"\xff" * 3, b"a" * 70_000 + b"\xc3", b"a" * 70_000 + b"\xff", b"\xff" + bytes(70_000)]
)
def test_strings_that_are_no_text_are_told_by_their_number(text: bytes) -> None:
    output = Output("OUT", "BYTES", (2,), string(b"a") + string(text))
    with pytest.raises(InferenceError, match=r"output 'OUT': element 1 is not UTF-8.*; use bytes"):
        list(dumps_in_pieces(to_written(output, "use bytes")))


def test_one_element_without_its_list() -> None:
    output = Output("OUT", "BYTES", (1,), string(b"a" * 200_000))
    pieces = list(dumps_in_pieces({"OUT": to_written(output, "", bare=True)}))
    assert json.loads(b"".join(pieces)) == {"OUT": "a" * 200_000}


def test_small_pieces_are_sent_together_but_not_all_at_once() -> None:
    pieces = [b"x" * 1000] * 1000
    sent = list(_gathered(pieces))
    assert b"".join(sent) == b"".join(pieces)
    assert len(sent) < 20
    assert max(map(len, sent)) < 2**17


def test_files_of_a_load_are_decoded_part_by_part() -> None:
    data = bytes(range(256)) * 3000
    text = base64.b64encode(data).decode()
    parts = list(control._decoded_parts(text))
    assert b"".join(parts) == data
    assert max(map(len, parts)) <= control._PART
    assert control._decoded("x", "") == b""
    for wrong in (text[: control._PART - 4] + "QQ==" + text, text[:-1] + "*", text + "Q", "QQ=="[::-1]):
        with pytest.raises(InferenceError, match="parameter 'x' is not base64"):
            control._decoded("x", wrong)


# -- numbers


def floats(kind: str, text: bytes) -> Any:
    raw, _ = to_tensor("x", kind, (1,), loads(b"[" + text + b"]"))
    assert raw is not None
    return np.frombuffer(raw, jsontensors.DATATYPES[kind].dtype)[0]


@pytest.mark.parametrize("padding", ["", " " * jsontext.LONG_TO_PARSE])
@pytest.mark.parametrize("kind", ["FP32", "FP64"])
def test_infinity_is_what_is_written_so(kind: str, padding: str) -> None:
    behind = padding.encode()
    for text, value in ((b"Infinity", math.inf), (b"-Infinity", -math.inf)):
        assert floats(kind, text + behind) == value
    assert math.isnan(floats(kind, b"NaN" + behind))
    for text in (b"1e999", b"-1e400", b"1" + b"0" * 400 + b".0"):
        with pytest.raises(InferenceError, match=rf"element 0 is too large for {kind}; write Infinity"):
            floats(kind, text + behind)


@pytest.mark.parametrize("padding", ["", " " * jsontext.LONG_TO_PARSE])
def test_zero_keeps_its_sign(padding: str) -> None:
    behind = padding.encode()
    for text, negative in ((b"-0", True), (b"-0.0", True), (b"0", False), (b"0.0", False)):
        for kind in ("FP32", "FP64"):
            assert bool(np.signbit(floats(kind, text + behind))) == negative
    assert floats("INT8", b"-0" + behind) == 0
    with pytest.raises(InferenceError, match=r"element 0 is -0\.0"):
        floats("INT8", b"-0.0" + behind)


# -- configurations


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Rest]:
    config = (
        'input { name: "IN" data_type: TYPE_INT32 dims: -1 } output { name: "OUT" data_type: TYPE_INT32 dims: -1 }'
        'parameters { key: "k" value { string_value: "%s" } }' % ("x" * 300_000)
    )
    for name in ("a", "b"):
        write_model(tmp_path / "models", name, config, {"1/model.py": ECHO})
    yield from serve(Repository(tmp_path / "models"))


def test_the_json_of_a_large_configuration_is_made_once(large: Rest) -> None:
    endpoint: Any = large.service._routes._of_model["config"]["GET"]
    first = large.json("/v2/models/a/config")
    made = dict(endpoint.__self__._shown)
    assert large.json("/v2/models/a/config") == first
    assert large.json("/v2/models/a/versions/1/config") == first
    assert list(endpoint.__self__._shown.values()) == list(made.values()) == [dumps(first)]
    assert large.json("/v2/models/b/config")["name"] == "b"
    assert large.quiet() == 0


def test_a_large_configuration_is_counted(large: Rest) -> None:
    large.budget.limit = 200_000
    assert large.refused("/v2/models/a/config").startswith("429 ")
    assert large.quiet() == 0
