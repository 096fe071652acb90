"""CALVIN's language annotations are read as data: nothing in the file runs, and what is not plain data is refused."""

from __future__ import annotations

import contextlib
import io
import os
import pickle  # noqa: TID251 (what must be refused is made with it)
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robodual.training.annotations import DatasetError, Span, find_annotations, read_annotations, write_annotations
from robodual.training.object_array import ObjectArrayError, read_object

HEADER = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"


def npy(program: bytes) -> bytes:
    header = HEADER.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + program


def stored(tmp_path: Path, content: object, protocol: int = 4, legacy: bool = False) -> Path:
    """The bytes that NumPy writes for an object array, of any protocol, and with NumPy 1's module names."""
    program = pickle.dumps(np.array(content, dtype=object), protocol=protocol)
    if legacy:
        program = pickle.dumps(np.array(content, dtype=object), protocol=2).replace(b"numpy._core", b"numpy.core")
    path = tmp_path / "auto_lang_ann.npy"
    path.write_bytes(npy(program))
    return path


def published(spans: list[tuple[Any, Any]]) -> dict[str, Any]:
    return {
        "language": {
            "ann": [f"do thing {i}" for i in range(len(spans))],
            "task": ["lift_red_block_table"] * len(spans),
            "emb": np.arange(len(spans) * 6, dtype=np.float32).reshape(len(spans), 1, 6),
        },
        "info": {"episodes": [], "indx": spans},
    }


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("legacy", [False, True])
def test_reads_what_numpy_writes(tmp_path: Path, protocol: int, legacy: bool) -> None:
    path = stored(tmp_path, published([(np.int64(100), 164), (200, np.int64(264))]), protocol, legacy)
    assert read_annotations(path) == [
        Span(100, 164, "lift_red_block_table", "do thing 0"),
        Span(200, 264, "lift_red_block_table", "do thing 1"),
    ]


def test_spans_may_be_an_array(tmp_path: Path) -> None:
    content = published([(1, 2)]) | {"info": {"episodes": [], "indx": np.array([[5, 60]])}}
    assert read_annotations(stored(tmp_path, content))[0].end == 60


def test_what_is_written_is_read_back_and_numpy_reads_it_too(tmp_path: Path) -> None:
    spans = [Span(0, 63, "open_drawer", "open the drawer"), Span(70, 120, "close_drawer", "shut the drawer – é")]
    path = write_annotations(tmp_path, spans)
    assert find_annotations(tmp_path) == path
    assert read_annotations(path) == spans
    content = np.load(path, allow_pickle=True).item()
    assert content["info"]["indx"] == [(0, 63), (70, 120)]
    assert content["language"]["emb"].shape == (2, 1, 384)
    assert list(path.parent.iterdir()) == [path]


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5), st.binary(max_size=5)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=values, protocol=st.integers(3, 4))
def test_any_plain_value_survives(tmp_path: Path, value: object, protocol: int) -> None:
    box = np.empty((), dtype=object)
    box[()] = {"value": value}
    (tmp_path / "value.npy").write_bytes(npy(pickle.dumps(box, protocol=protocol)))
    assert read_object(tmp_path / "value.npy") == {"value": value}


@pytest.mark.parametrize("array", [np.arange(6).reshape(2, 3), np.asfortranarray(np.eye(3)), np.array([">u2"] * 2),
                                   np.arange(3, dtype=">u2"), np.array([True, False])], ids=str)  # fmt: skip
def test_arrays_of_plain_dtypes_survive(tmp_path: Path, array: np.ndarray) -> None:
    box = np.empty((), dtype=object)
    box[()] = [array]
    (tmp_path / "value.npy").write_bytes(npy(pickle.dumps(box, protocol=3)))
    (read,) = read_object(tmp_path / "value.npy")
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype


class Hostile:
    """Runs a command when an ordinary reader rebuilds it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"echo ran > {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 3, 4])
def test_a_hostile_file_is_refused_by_name_and_never_runs(tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "witness"
    box = np.empty((), dtype=object)
    box[()] = {"language": Hostile(witness)}
    path = tmp_path / "auto_lang_ann.npy"
    path.write_bytes(npy(pickle.dumps(box, protocol=protocol)))
    with pytest.raises(ObjectArrayError, match=r"system|not plain data"):
        read_annotations(path)
    assert not witness.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(V1+1\ntR.",
        b"c__main__\n__dict__\n.",
        b"(V1+1\niposix\nsystem\n.",
        b"cnumpy\nndarray\n(I3\ntR.",
        b"\x80\x02cnumpy\ndtype\n(U\x02O8I0\nI1\ntRq\x00}b.",
        b"\x80\x04\x82\x01.",  # a registered extension
        b"P1\n.",  # a persistent id
        b"].",
        b".",
        b"",
        b"\x80\x04K\x01K\x02e.",
        b"\x80\x04j\xff\xff\xff\xff.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fab.",
        b"\x80\x04)R.",
    ],
)
def test_malformed_programs_are_refused(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "auto_lang_ann.npy"
    path.write_bytes(npy(program))
    with pytest.raises(ObjectArrayError, match=r"auto_lang_ann\.npy"):
        read_object(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_an_error_and_nothing_else(tmp_path: Path, data: st.DataObject) -> None:
    good = bytearray(stored(tmp_path, published([(1, 65)] * 3)).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.npy"
    path.write_bytes(bytes(good[: data.draw(st.integers(1, len(good)))]))
    with contextlib.suppress(DatasetError, ObjectArrayError):  # damage inside a string may go unnoticed
        read_annotations(path)


def test_other_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ObjectArrayError, match=r"collections\.OrderedDict"):
        read_object(stored(tmp_path, {"a": OrderedDict(b=1)}))
    np.save(tmp_path / "plain.npy", np.zeros(3))
    with pytest.raises(ObjectArrayError, match="expected one object"):
        read_object(tmp_path / "plain.npy")
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(2))
    (tmp_path / "zip.npy").write_bytes(buffer.getvalue())
    with pytest.raises(ObjectArrayError, match=r"not a \.npy file"):
        read_object(tmp_path / "zip.npy")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"language": {}}, r"no language\.ann"),
        ("text", r"no language\.ann"),
        (published([(1, 2)]) | {"info": {"indx": []}}, "as many of each"),
        (published([(9, 2)]), "info.indx"),
        (published([(1.5, 2)]), "info.indx"),
        (published([(1, 2, 3)]), "info.indx"),
    ],
)
def test_annotations_of_another_layout_are_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_annotations(stored(tmp_path, content))


def test_a_folder_without_annotations_says_what_to_copy(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="copy the data set's lang_annotations"):
        find_annotations(tmp_path)
