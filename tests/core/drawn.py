"""Messages with whatever their types allow, drawn by hypothesis."""

from typing import Any

from hypothesis import strategies as st
from msgspec import inspect

NAMES = ["r", "s", "r-0", "frontend-0", "tokenizer-0", "prefill-0", "decode-0", "scheduler", "x"]
"""Some mean somebody."""


def messages(union: Any) -> st.SearchStrategy[Any]:
    """Of an inbox."""
    info = inspect.type_info(union)
    kinds = info.types if isinstance(info, inspect.UnionType) else (info,)
    return st.one_of([_of(kind) for kind in kinds])


_KNOWN: dict[type, st.SearchStrategy[Any]] = {}


def _struct(info: inspect.StructType) -> st.SearchStrategy[Any]:
    required = {f.name: _of(f.type) for f in info.fields if f.required}
    optional = {f.name: _of(f.type) for f in info.fields if not f.required}
    made = st.fixed_dictionaries(required, optional=optional)
    return made.map(lambda members: info.cls(**members))


def _of(info: Any) -> st.SearchStrategy[Any]:
    match info:
        case inspect.StructType(cls=cls):
            if cls not in _KNOWN:  # one may have others of its kind in it
                _KNOWN[cls] = st.deferred(lambda: _struct(info))
            return _KNOWN[cls]
        case inspect.UnionType(types=types):
            return st.one_of([_of(kind) for kind in types])
        case inspect.EnumType(cls=cls):
            return st.sampled_from(list(cls))
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.IntType(ge=ge, le=le):
            low, high = -(2**31) if ge is None else ge, 2**63 - 1 if le is None else le
            return st.integers(low, min(high, 20)) | st.integers(low, high)
        case inspect.FloatType(ge=ge, le=le):
            return st.floats(0 if ge is None else ge, 1e6 if le is None else le)
        case inspect.StrType(max_length=longest):
            return st.sampled_from(NAMES) | st.text(min_size=1, max_size=min(longest or 9, 9))
        case inspect.BytesType():
            return st.binary(max_size=9) | st.integers(0, 8).map(lambda n: bytes(16 * n))
        case inspect.ListType(item_type=item, max_length=longest):
            return st.lists(_of(item), max_size=min(longest or 3, 3))
        case inspect.VarTupleType(item_type=item, max_length=longest):
            return st.lists(_of(item), max_size=min(longest or 3, 3)).map(tuple)
        case inspect.TupleType(item_types=items):
            return st.tuples(*(_of(item) for item in items))
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(_of(key), _of(value), max_size=3)
        case inspect.AnyType():
            return st.sampled_from([None, 1, "x", [], {}])
        case inspect.Metadata(type=inner):
            return _of(inner)
    raise AssertionError(info)
