"""Decodes the scalars of a TensorBoard event, without TensorFlow and without the 2 s import of tensorboardX.

Wire format: https://protobuf.dev/programming-guides/encoding. Messages: tensorboard/compat/proto/event.proto,
summary.proto, tensor.proto.
"""

from __future__ import annotations

import struct
from typing import Any

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
SIZES = {FIXED64: 8, FIXED32: 4}

# Keys of fields as they are encoded: the field number, and the wire type in the lowest three bits.
EVENT_STEP, EVENT_SUMMARY = 2 << 3 | VARINT, 5 << 3 | BYTES
SUMMARY_VALUE = 1 << 3 | BYTES
VALUE_TAG, VALUE_SIMPLE, VALUE_TENSOR = 1 << 3 | BYTES, 2 << 3 | FIXED32, 8 << 3 | BYTES
TENSOR_DTYPE, TENSOR_SHAPE, TENSOR_CONTENT = 1 << 3 | VARINT, 2 << 3 | BYTES, 4 << 3 | BYTES
SHAPE_DIM = 2
# Field numbers, because a number in such a field may be packed (bytes) or not.
TENSOR_FLOATS, TENSOR_DOUBLES, TENSOR_INTS, TENSOR_INT64S, TENSOR_BOOLS, TENSOR_HALVES = 5, 6, 7, 10, 11, 13

# DataType → struct's letter: float, double, int32, uint8, int16, int8, int64, bool, uint16, half.
LETTERS = {1: "f", 2: "d", 3: "i", 4: "B", 5: "h", 6: "b", 9: "q", 10: "?", 17: "H", 19: "e"}
BFLOAT16 = 14


def scalars(event: bytes) -> tuple[int, list[tuple[str, float]]]:
    """(step, [(tag, value)]) of an Event; the list is empty for images, text and graphs. Raises ValueError for bytes that are
    not a valid message."""
    step, found = 0, []
    for key, value in fields(event):
        if key == EVENT_STEP:
            step = value
        elif key == EVENT_SUMMARY:
            for inner, message in fields(value):
                if inner == SUMMARY_VALUE:
                    tag, scalar = _value(message)
                    if scalar is not None:
                        found.append((tag, scalar))
    return step, found


def fields(data: bytes) -> list[tuple[int, Any]]:
    """The fields of a message as (key, value); the value is an int for a varint, else bytes. Raises ValueError for an invalid
    message."""
    found = []
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        value: Any
        if wire == VARINT:
            value, at = _varint(data, at)
        elif wire == BYTES or wire in SIZES:
            size, at = _varint(data, at) if wire == BYTES else (SIZES[wire], at)
            value = data[at : at + size]
            if len(value) != size:
                raise ValueError("a field is cut off")
            at += size
        else:
            raise ValueError(f"wire type {wire}")
        found.append((key, value))
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
    for key, value in fields(message):
        if key == VALUE_TAG:
            tag = value.decode("utf-8", "replace")
        elif key == VALUE_SIMPLE:
            scalar = struct.unpack("<f", value)[0]
        elif key == VALUE_TENSOR:
            scalar = _tensor(value)
    return tag, scalar


def _tensor(message: bytes) -> float | None:
    """The value of a scalar TensorProto, else None."""
    dtype, number = 0, None
    for key, value in fields(message):
        field = key >> 3
        if key == TENSOR_DTYPE:
            dtype = value
        elif key == TENSOR_SHAPE:
            if any(inner >> 3 == SHAPE_DIM for inner, _ in fields(value)):
                return None
        elif key == TENSOR_CONTENT:
            number = _unpacked(dtype, value)
        elif field in (TENSOR_FLOATS, TENSOR_DOUBLES) and isinstance(value, bytes):
            number = _unpacked(1 if field == TENSOR_FLOATS else 2, value)
        elif field in (TENSOR_INTS, TENSOR_INT64S, TENSOR_BOOLS, TENSOR_HALVES):
            whole = value if isinstance(value, int) else _varint(value, 0)[0]
            if field == TENSOR_HALVES:
                number = _unpacked(dtype, struct.pack("<H", whole & 0xFFFF))
            else:
                number = float(whole - 2**64 if whole >= 2**63 else whole)
    return number


def _unpacked(dtype: int, data: bytes) -> float | None:
    if dtype == BFLOAT16:  # the upper half of a float
        dtype, data = 1, b"\0\0" + data
    letter = LETTERS.get(dtype)
    if letter is None or len(data) != struct.calcsize(letter):
        return None
    return float(struct.unpack("<" + letter, data)[0])
