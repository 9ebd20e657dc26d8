"""Typed values: what may be sent, where the key comes from, and that what was carried comes back or is refused."""

from __future__ import annotations

import datetime
import decimal
import enum
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, NamedTuple, NotRequired, Optional, TypedDict, TypeVar, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.core import records
from shardq.core.message import Batch, Message, Ownership
from shardq.core.records import RecordBatch
from shardq.core.values import ValueType
from shardq.errors import InvalidKey, InvalidValue, UsageError

T = TypeVar("T")


class Order(msgspec.Struct):
    order_id: str
    amount: int = 0
    at: datetime.datetime | None = None


class Special(Order):
    discount: float = 0.0


class Refund(msgspec.Struct, tag=True):
    order_id: str


class Payment(msgspec.Struct, tag=True):
    order_id: str


class Row(msgspec.Struct, array_like=True):
    user: bytes
    n: int


class Numbered(msgspec.Struct):
    number: int


class Page(msgspec.Struct, Generic[T]):
    items: list[T]


@dataclass
class Visit:
    user: str | None
    pages: list[str] = field(default_factory=list)


class Event(TypedDict):
    name: str
    note: NotRequired[str]


class Point(NamedTuple):
    x: int
    y: int


class Colour(enum.Enum):
    RED = "red"


class Custom:
    pass


NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)

OPTIONAL: Any = Optional[Order]  # noqa: UP045 - the older spelling of Order | None is another object

KINDS: list[tuple[Any, Any]] = [
    (Order, Order("a", 1, NOW)),
    (Order, Order("a", at=NOW.replace(tzinfo=None))),
    (Order | None, None),
    (Order | None, Order("a")),
    (OPTIONAL, Order("a")),
    (Order | str, "text"),
    (Order | str, Order("a")),
    (Refund | Payment, Payment("a")),
    (Row, Row(b"\xff", 1)),
    (Page[int], Page([1, 2])),
    (Visit, Visit("u", ["/"])),
    (Event, {"name": "n"}),
    (Event, {"name": "n", "note": "x"}),
    (Point, Point(1, 2)),
    (Colour, Colour.RED),
    (int, 5),
    (str, "text"),
    (bytes, b"\xff"),
    (float, 1.5),
    (list[Order], [Order("a"), Order("b")]),
    (dict[str, int], {"a": 1}),
    (dict[int, str], {1: "a"}),
    (set[int], {1, 2}),
    (tuple[int, str], (1, "a")),
    (uuid.UUID, uuid.UUID(int=5)),
    (decimal.Decimal, decimal.Decimal("1.50")),
    (datetime.datetime, NOW),
    (Annotated[int, msgspec.Meta(ge=0)], 0),
    (Any, {"any": [1]}),
]


def carried(value: Any) -> Any:
    """The value as a reader without a type gets it."""
    raw = records.encode(RecordBatch(0, None, [None], [records.pack_value(value)], None))
    return records.decode(raw).values[0]


def shown(value: object) -> str:
    """A test's name: the same in every process, so without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


@pytest.mark.parametrize(("kind", "value"), KINDS, ids=shown)
def test_every_kind_goes_out_and_comes_back(kind: Any, value: Any) -> None:
    declared = ValueType(kind)
    declared.check(value)
    back = declared.convert(carried(value))
    assert back == value
    assert type(back) is type(value)
    assert declared.convert(back) == value, "converting again changes nothing"


def test_readers_without_a_type_get_maps() -> None:
    assert carried(Order("a", 1)) == {"order_id": "a", "amount": 1, "at": None}
    assert carried(Visit("u")) == {"user": "u", "pages": []}
    assert ValueType().convert({"a": 1}) == {"a": 1}
    ValueType().check(object())


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        (Order, {"order_id": "a"}, "a value of type dict is no Order"),
        (Order, Numbered(1), "a value of type Numbered is no Order"),
        (Order, None, "a value of type NoneType is no Order"),
        (Order, Order, "a value of type StructMeta is no Order"),
        (Special, Order("a"), "a value of type Order is no Special"),
        (Visit, {"user": "u"}, "a value of type dict is no Visit"),
        (Event, {"note": "x"}, "a value of type dict is no Event"),
        (Event, [("name", "x")], "a value of type list is no Event"),
        (int, True, "a value of type bool is no int"),
        (int, "5", "a value of type str is no int"),
        (bytes, "abcd", "a value of type str is no bytes"),
        (list[Order], [Order("a"), 5], "a value of type list is no list"),
        (Order | None, 5, "a value of type int is no "),
        (Order | None, {"order_id": "a"}, "a value of type dict is no "),
        (OPTIONAL, {"order_id": "a"}, "a value of type dict is no "),
        (Refund | Payment, {"type": "Refund", "order_id": "a"}, "a value of type dict is no "),
        (Order | str, 5, "a value of type int is no "),
        (Annotated[int, msgspec.Meta(ge=0)], -1, "a value of type int is no "),
    ],
    ids=shown,
)
def test_values_of_another_type_are_refused(kind: Any, value: Any, says: str) -> None:
    with pytest.raises(InvalidValue, match=says):
        ValueType(kind).check(value)


def test_a_subclass_is_of_the_type() -> None:
    ValueType(Order).check(Special("a"))


@pytest.mark.parametrize(
    ("kind", "raw", "says"),
    [
        (Order, {"amount": 1}, "the value is no Order: Object missing required field `order_id`"),
        (Order, {"order_id": 5}, r"Expected `str`, got `int` - at `\$\.order_id`"),
        (Order, b"bytes", "Expected `object`, got `bytes`"),
        (Order, {"order_id": b"a"}, "Expected `str`, got `bytes`"),
        (Event, {}, "the value is no Event"),
        (int, True, "Expected `int`, got `bool`"),
        (bytes, "abcd", "Expected `bytes`, got `str`"),
        (list[int], [1, "2"], r"at `\$\[1\]`"),
    ],
    ids=shown,
)
def test_what_does_not_fit_says_where(kind: Any, raw: Any, says: str) -> None:
    with pytest.raises(InvalidValue, match=says):
        ValueType(kind).convert(raw)


@given(
    st.recursive(
        st.none() | st.integers() | st.text() | st.binary(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_whatever_was_carried_is_converted_or_refused(raw: Any) -> None:
    for kind in (Order, Visit, Event, Row, Point, list[Order], int, bytes):
        try:
            ValueType(kind).convert(raw)
        except InvalidValue:
            continue


@pytest.mark.parametrize("error", [ValueError("too small"), KeyError("x"), RuntimeError()], ids=shown)
def test_a_types_own_refusal_is_told(error: Exception) -> None:
    class Picky(msgspec.Struct):
        n: int

        def __post_init__(self) -> None:
            raise error

    with pytest.raises(InvalidValue, match=str(error) or "RuntimeError"):
        ValueType(Picky).convert({"n": 1})


# -- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "key", "value", "expected"),
    [
        (Order, "order_id", Order("a"), "a"),
        (Order, lambda order: f"{order.order_id}/{order.amount}", Order("a", 2), "a/2"),
        (Row, "user", Row(b"\xff", 1), b"\xff"),
        (Visit, "user", Visit("u"), "u"),
        (Visit, "user", Visit(None), None),
        (Event, "name", {"name": "n"}, "n"),
        (Event, "note", {"name": "n", "note": "x"}, "x"),
        (Numbered, "number", Numbered(991), "991"),
        (Order | None, "order_id", Order("a"), "a"),
        (None, "user_id", {"user_id": "u"}, "u"),
        (None, "order_id", Order("a"), "a"),
        (dict[str, str], "user_id", {"user_id": "u"}, "u"),
        (Order, None, Order("a"), None),
    ],
    ids=shown,
)
def test_the_key_is_in_the_value(kind: Any, key: Any, value: Any, expected: Any) -> None:
    declared = ValueType(kind, key)
    assert declared.key_of(value) == expected
    assert declared.pair(value if key else (None, value)) == (expected, value)


def _fails(_: Any) -> str:
    raise LookupError("no such user")


@pytest.mark.parametrize(
    ("kind", "key", "value", "says"),
    [
        (Event, "note", {"name": "n"}, "type dict has no key by the field 'note'.*give the key with key="),
        (None, "user_id", {"user": "u"}, "no key by the field 'user_id'"),
        (None, "user_id", 5, "no key by the field 'user_id'"),
        (None, "user_id", ("k", {"user_id": "u"}), "type tuple has no key by the field 'user_id'"),
        (Order | None, "order_id", None, "no key by the field 'order_id'"),
        (Order, _fails, Order("a"), "no key by the key function.*LookupError: no such user"),
        (Order, lambda order: order.amount, Order("a"), "is int: declare key= as a function"),
        (Order, lambda _: True, Order("a"), "is bool"),
        (Order, "amount", Order("a", True), "is bool"),
        (Order, "at", Order("a", at=NOW), "'at' is datetime: declare key= as a function"),
    ],
    ids=shown,
)
def test_a_value_without_a_sound_key(kind: Any, key: Any, value: Any, says: str) -> None:
    with pytest.raises(InvalidKey, match=says):
        ValueType(kind, key).key_of(value)


def test_pairs_where_values_are_expected_are_told_apart() -> None:
    with pytest.raises(InvalidValue, match=r"send_many takes values, not \(key, value\) pairs"):
        ValueType(Order, "order_id").pair(("k", Order("a")))
    with pytest.raises(InvalidValue, match="is no Order"):
        ValueType(Order).pair(("k", 5))
    for item in (Order("a"), 5, ("k",), None):
        with pytest.raises(InvalidValue, match=r"send_many takes \(key, value\) pairs"):
            ValueType(Order).pair(item)
    assert ValueType(Order).pair(("k", Order("a"))) == ("k", Order("a"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ValueType(Custom), "Custom can't be .*: use a msgspec.Struct"),
        (lambda: ValueType("Order"), "type=Order can't be"),
        (lambda: ValueType(5), "type=5 can't be"),
        (lambda: ValueType(Order | Visit), "more than one dict-like type"),
        (lambda: ValueType(Order, "order"), "Order has no such field; it has order_id, amount, at"),
        (lambda: ValueType(Visit, "id"), "Visit has no such field; it has user, pages"),
        (lambda: ValueType(Event, "id"), "Event has no such field; it has name, note"),
        (lambda: ValueType(Order, cast("Any", 5)), "neither the name of a field nor a function"),
        (lambda: ValueType(None, cast("Any", b"user")), "neither the name of a field nor a function"),
    ],
    ids=[
        "class",
        "text",
        "number",
        "two structs",
        "struct field",
        "dataclass field",
        "dict field",
        "key 5",
        "key bytes",
    ],
)
def test_wrong_declarations_say_what_is_right(make: Callable[[], ValueType], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


# -- messages ---------------------------------------------------------------------------------------------------------


def test_messages_that_do_not_fit_are_sorted_out() -> None:
    batch = Batch(Ownership("q", "g", 0, 1, "n"), "1-1", 3)
    values = [{"order_id": "a"}, {"order": "b"}, {"order_id": "c", "amount": 3}]
    messages = [Message(None, value, None, 0, index, batch) for index, value in enumerate(values)]
    fit, misfits = ValueType(Order).sort(messages)
    assert [message.value for message in fit] == [Order("a"), Order("c", 3)]
    assert [(message.value, str(error)) for message, error in misfits] == [
        ({"order": "b"}, "the value is no Order: Object missing required field `order_id`")
    ]
