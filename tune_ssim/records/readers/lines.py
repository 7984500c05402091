"""Bytes become lines of text, whatever the bytes are and in whatever pieces they come."""

from __future__ import annotations

import re

# A longer line is no line of a log (a picture, a model that was printed, a file without newlines); it is passed over.
MAX_LINE_BYTES = 4 * 1024 * 1024

# Colours and cursor movements (ECMA-48 CSI), window titles (OSC).
ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)")


class Lines:
    """`feed` bytes and get the lines that are complete. A carriage return ends a line too, so that each state of a
    progress bar is one; terminal colours, NUL bytes and a byte-order mark are taken out; bytes that are no UTF-8 become
    U+FFFD. Holds at most MAX_LINE_BYTES."""

    def __init__(self) -> None:
        self.too_long = 0  # lines passed over, not in what `feed` returned
        self._part = bytearray()  # of a line that is not complete
        self._skipping = False  # inside a line that is too long
        self._after_return = False  # the last byte was \r: a \n now ends no further line
        self._at_start = True

    def __len__(self) -> int:
        """Bytes held back."""
        return len(self._part)

    def feed(self, data: bytes) -> list[str]:
        if self._after_return and data[:1] == b"\n":
            data = data[1:]
        if not data:
            return []
        self._after_return = data.endswith(b"\r")
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        if self._skipping:
            if not end:
                return []
            begin = min(at for at in (data.find(b"\n"), data.find(b"\r")) if at >= 0) + 1
            self._skipping = False
            data, end = data[begin:], end - begin
        if not end:
            self._hold(data)
            return []
        complete = bytes(self._part) + data[:end]
        self._part.clear()
        self._hold(data[end:])
        return self._split(complete)

    def finish(self) -> list[str]:
        """A last line that no newline ended."""
        part, self._skipping = bytes(self._part), False
        self._part.clear()
        return self._split(part + b"\n") if part else []

    def begin_anew(self) -> None:
        """The next bytes are the beginning of a file; an unfinished line is lost."""
        self._part.clear()
        self._skipping = self._after_return = False
        self._at_start = True

    def _hold(self, data: bytes) -> None:
        self._part += data
        if len(self._part) > MAX_LINE_BYTES:
            self._part.clear()
            self._skipping = True
            self.too_long += 1

    def _split(self, data: bytes) -> list[str]:
        """Of bytes that end with a line's end."""
        text = data.decode("utf-8", "replace")
        if self._at_start:
            text = text.lstrip("\ufeff\ufffd")  # of UTF-16 the mark is no UTF-8
            self._at_start = False
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if "\x1b" in text:
            text = ANSI.sub("", text)
        if "\0" in text:
            text = text.replace("\0", "")
        return text[:-1].split("\n")
