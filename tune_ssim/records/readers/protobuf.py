"""Decodes the scalars of a TensorBoard event, without TensorFlow and without the 2 s import of tensorboardX.

Wire format: https://protobuf.dev/programming-guides/encoding. Messages: tensorboard/compat/proto/event.proto,
summary.proto, tensor.proto.
"""

from __future__ import annotations

import struct
from typing import Any

# Field numbers.
EVENT_STEP, EVENT_SUMMARY = 2, 5
SUMMARY_VALUE = 1
VALUE_TAG, VALUE_SIMPLE, VALUE_TENSOR = 1, 2, 8
TENSOR_DTYPE, TENSOR_SHAPE, TENSOR_CONTENT = 1, 2, 4
TENSOR_FLOATS, TENSOR_DOUBLES, TENSOR_INTS, TENSOR_INT64S, TENSOR_BOOLS, TENSOR_HALVES = 5, 6, 7, 10, 11, 13
SHAPE_DIM, DIM_SIZE = 2, 1

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

# DataType → struct's letter, little-endian: float, double, int32, uint8, int16, int8, int64, bool, uint16, half.
LETTERS = {1: "f", 2: "d", 3: "i", 4: "B", 5: "h", 6: "b", 9: "q", 10: "?", 17: "H", 19: "e"}
BFLOAT16 = 14
HALVES = {19, BFLOAT16}


def scalars(event: bytes) -> tuple[int, list[tuple[str, float]]]:
    """(step, [(tag, value)]) of an Event; the list is empty for images, text and graphs. Raises ValueError for bytes that are
    not a valid message."""
    step, found = 0, []
    for number, wire, value in fields(event):
        if number == EVENT_STEP and wire == VARINT:
            step = value
        elif number == EVENT_SUMMARY and wire == BYTES:
            for inner, inner_wire, message in fields(value):
                if inner == SUMMARY_VALUE and inner_wire == BYTES:
                    tag, scalar = _value(message)
                    if scalar is not None:
                        found.append((tag, scalar))
    return step, found


def fields(data: bytes) -> list[tuple[int, int, Any]]:
    """The fields of a message as (field number, wire type, value); value is an int for a varint, else bytes.

    Raises ValueError for an invalid message."""
    found = []
    at, end = 0, len(data)
    while at < end:
        key = data[at]
        at += 1
        if key > 127:
            key, at = _varint(data, at - 1)
        wire = key & 7
        value: Any
        if wire == VARINT:
            value, at = _varint(data, at)
        else:
            if wire == BYTES:
                size, at = _varint(data, at)
            elif wire == FIXED32:
                size = 4
            elif wire == FIXED64:
                size = 8
            else:
                raise ValueError(f"wire type {wire}")
            value = data[at : at + size]
            if len(value) != size:
                raise ValueError("a field is cut off")
            at += size
        found.append((key >> 3, wire, value))
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70 and at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
    raise ValueError("a varint does not end")


def _value(message: bytes) -> tuple[str, float | None]:
    """Tag and number of a Summary.Value; the number is None if the value is not a scalar."""
    tag, scalar = "", None
    for number, wire, value in fields(message):
        if number == VALUE_TAG and wire == BYTES:
            tag = value.decode("utf-8", "replace")
        elif number == VALUE_SIMPLE and wire == FIXED32:
            scalar = struct.unpack("<f", value)[0]
        elif number == VALUE_TENSOR and wire == BYTES:
            scalar = _tensor(value)
    return tag, scalar


def _tensor(message: bytes) -> float | None:
    """The value of a scalar TensorProto, else None."""
    dtype, number = 0, None
    for field, wire, value in fields(message):
        if field == TENSOR_DTYPE and wire == VARINT:
            dtype = value
        elif field == TENSOR_SHAPE and wire == BYTES:
            if any(inner == SHAPE_DIM for inner, _, _ in fields(value)):
                return None
        elif field == TENSOR_CONTENT and wire == BYTES:
            number = _of_bytes(dtype, value)
        elif field in (TENSOR_FLOATS, TENSOR_DOUBLES):
            number = _of_bytes(1 if field == TENSOR_FLOATS else 2, value if wire != VARINT else b"")
        elif field in (TENSOR_INTS, TENSOR_INT64S, TENSOR_BOOLS, TENSOR_HALVES):
            whole = value if wire == VARINT else _varint(value, 0)[0]
            if field == TENSOR_HALVES:
                number = _of_bytes(dtype, struct.pack("<H", whole & 0xFFFF))
            else:
                number = float(whole - 2**64 if whole >= 2**63 else whole)
    return number


def _of_bytes(dtype: int, data: bytes) -> float | None:
    if dtype == BFLOAT16:  # the upper half of a float
        dtype, data = 1, b"\0\0" + data
    letter = LETTERS.get(dtype)
    if letter is None or len(data) != struct.calcsize(letter):
        return None
    return float(struct.unpack("<" + letter, data)[0])
