"""Splits a byte stream into lines of text, for any bytes and any chunking."""

from __future__ import annotations

import re

# A longer line is not a log line (an image, a printed model, a file without newlines) and is skipped.
MAX_LINE_BYTES = 4 * 1024 * 1024

# Colours and cursor movements (ECMA-48 CSI), window titles (OSC).
ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)")
BACKSPACES = re.compile("\b+")


class Lines:
    """`feed` takes bytes and returns complete lines.

    A carriage return also ends a line, so each state of a progress bar is a line. Terminal colours, NUL bytes and a
    byte-order mark are removed; invalid UTF-8 becomes U+FFFD. Buffers at most MAX_LINE_BYTES."""

    def __init__(self) -> None:
        self.too_long = 0  # skipped lines, which `feed` did not return
        self._part = bytearray()  # the incomplete last line
        self._skipping = False  # inside a line that is too long
        self._after_return = False  # the last byte was \r, so a \n now belongs to the same line end
        self._at_start = True

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
        """The last line, if it has no newline."""
        part, self._skipping = bytes(self._part), False
        self._part.clear()
        return self._split(part + b"\n") if part else []

    def begin_anew(self) -> None:
        """Resets for the start of a new file; an incomplete line is dropped."""
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
        """The lines of bytes that end with a line end."""
        text = data.decode("utf-8", "replace")
        if self._at_start:
            text = text.lstrip("\ufeff\ufffd")  # a UTF-16 byte-order mark is not valid UTF-8
            self._at_start = False
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if "\x1b" in text:
            text = ANSI.sub("", text)
        if "\b" in text:  # Keras overwrites its progress bar
            text = BACKSPACES.sub("\n", text)
        if "\0" in text:
            text = text.replace("\0", "")
        return text[:-1].split("\n")
