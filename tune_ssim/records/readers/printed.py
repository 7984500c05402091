"""Built-in patterns for printed lines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from tune_ssim.records import EPOCH, TOTAL_NORM
from tune_ssim.records.metric_names import HELD_OUT_WORDS, TRAINING_WORDS, is_held_out, is_loss_like, usual_names
from tune_ssim.records.readers.line_shape import NUMBER, Places, Span
from tune_ssim.records.readers.values import Names, text_number, without_windows

# `loss: 0.3`, `loss=0.3`, `loss 0.3`, `'loss': '0.3'`, `loss is 0.3`. A number followed by a unit (`0.3s`) does not match.
# Neither does a date or a time. For lower-case text.
PAIR = re.compile(
    rf"(?<![\w./-])([a-z_][\w./-]*)['\"]?(?: (?:is|was|of))?\s{{0,8}}(?:[:= ~→]|->)\s{{0,8}}['\"]?({NUMBER})(?![\w.]|[-:]\d)"
)
# `loss: 0.5 (nan)`, `loss 0.5 ± nan`, `loss [nan]`: a number that is not finite and that no name precedes. For lower-case text.
NOT_FINITE = r"[-+]?(?:nan|inf(?:inity)?)(?!\w)"
BARE_NAN = re.compile(rf"(?:(?<=[/±])|(?<=[/±] )){NOT_FINITE}|(?<![\w.+-]){NOT_FINITE}(?!\s{{0,2}}[a-z(-])")
WORD = re.compile(r"[a-z_][\w./-]*")
# `loss avg 0.5`, `loss 0.5 (avg 0.4)`, `losses: total 0.5`: names that belong to the loss before them.
AVERAGES = ("avg", "avr", "average", "mean")
LOSS_BEFORE = re.compile(r"([a-z_][\w./-]*?)(?:es)?['\"]?[\s:,(\[{|]{1,4}$")
# `tensor(0.5, grad_fn=<MulBackward0>)`, `np.float64(0.5)`: as PyTorch and NumPy print a number. For lower-case text.
WRAPPED = re.compile(rf"(?:tensor|array|(?:np\.|numpy\.)?float\d\d)\(\[?\s?({NUMBER})\s?\]?(?:,[^()]{{0,80}})?\)")
# `train_loss=nan.0` in the progress bar of Lightning, which pads numbers with zeros. For lower-case text.
PADDED_NAN = re.compile(r"(?<![\w.])(nan|inf)\.0*(?!\w)")
# A loss that is no number: `loss: --`, `loss=None`, `loss N/A`, `loss ****`. For lower-case text.
NO_NUMBER = re.compile(r"(?<![a-z])loss['\"]?\s{0,8}[:= ]\s{0,8}['\"]?(?:-{1,9}|\*{1,40}|n/?a|null|none|#+)(?![\w.-])")
DICT = re.compile(r"\{\s{0,8}['\"]\w")
# Words before a name that belong to it: `val loss 0.3`, `kl loss: 0.1`. In `acc nan loss 0.1` there are none.
QUALIFIERS = re.compile(r"(?<![\w./-])((?:(?!nan |inf |infinity )[a-z][a-z_]{0,30} ){1,2})$")
CODE = ("dict(", "namespace(")  # settings

# 12, 12,000 or 1.2k.
STEP = r"(\d{1,3}(?:,\d{3})+(?![\d,])|\d{1,9}(?:\.\d{1,3})?[kmb](?!\w)|\d{1,19}(?![\d.]))"
# The epoch, and the step in it, as `12/100`: `Epoch: [3][12/100]` (torchvision), `Train: [3/300][12/100]` (Swin), `Train: 3
# [12/100` (timm), `Epoch(train) [3][12/100]` (MMEngine), `Train Epoch: 3 [12/100` (PyTorch examples), `[3/25][12/100]` (DCGAN),
# `[Epoch 3/200] [Batch 12/100]` (PyTorch-GAN), `epoch 003:  12 / 100` (fairseq).
OF = r"\s{0,4}/\s{0,4}\d{1,19}"
EPOCH_STEP = re.compile(
    r"(?:(?<![\w/-])(?:train(?:ing)?\s{1,4})?(?:epoch(?:\(train\))?|train(?:ing)?(?=\s{0,4}:))[\s:=#]{0,8}\[?\s{0,8}|(?<![\w\]/])\[)"
    rf"(\d{{1,9}})(?:{OF})?\]?[\s:,|]{{0,8}}(?:\[?batch\s{{0,4}}|\[|(?<=\s))\s{{0,8}}(\d{{1,19}}){OF}(?!\d)"
)
AN_EPOCH = re.compile(r"(?<![\w/-])epoch(?:\(train\))?['\"]?[\s:=#]{0,8}\[?\s{0,8}(\d{1,9})(?![\d.])")
A_BATCH = re.compile(r"(?<![\w/-])batch(?:_idx)?[\s:=#\[(]{1,8}(\d{1,19})(?![\d.])")
# The step as `12/100` at the start of a line or in brackets.
A_STEP_OF = re.compile(rf"(?:^\W{{0,4}}|\[\s{{0,8}})(\d{{1,19}}){OF}(?![\d/.])")
# A line that is nothing but the epoch: Keras, and the transfer learning tutorial of PyTorch.
EPOCH_HEADER = re.compile(rf"\W{{0,20}}epoch\s{{0,4}}:?\s{{0,4}}\[?(\d{{1,9}})(?:{OF})?\]?\W{{0,200}}")
# `48/48 [====] - 3s 6ms/step - loss: 0.9` (Keras 2), `48/48 ━━━━ 3s 6ms/step - loss: 0.9` (Keras 3): the numbers are means over the
# epoch so far.
KERAS = re.compile(r"\s{0,8}(\d{1,19})/(\d{1,19})\s{1,4}(?:\[[=>.]{1,200}\]|[━╸╺ ]{2,200}|-)\s")
HELD_OUT = "|".join(sorted(HELD_OUT_WORDS, key=len, reverse=True))
# A line about held-out data: `Validation: …`, `[val] …`, `Epoch(val) …`, `Test set: …`.
HELD_OUT_LINE = re.compile(rf"[(\[]\s?(?:{HELD_OUT})\s?[)\]]|(?<![\w./-])(?:{HELD_OUT})(?:\s(?:set|on|epoch|step|iter)\b|\s?[:|>])")
BEGINS_HELD_OUT = re.compile(r"\W{0,20}(?:val|valid|validation|eval|evaluation)\b")
# `Epoch 1:  50%|#####     | 5/10 [00:01<00:07, 1.48s/it, loss=0.131]` and `5it [00:01, 1.48s/it, loss=0.131]` of tqdm.
BAR = re.compile(r"(?:\d{1,3}%\|[^|]{0,200}\|\s{0,8}(\d{1,19})/(?:\d{1,19}|\?)|(?<![\w.])(\d{1,19})it)\s\[([^\]\r\n]{0,2000})\]?")
MORE_STEPS = ("train_step", "global step", "num_updates", "iters")  # num_updates: fairseq. iters: CycleGAN
NOT_MEASURED = ("v_num", "ppid")  # in the bars of Lightning


class Row(NamedTuple):
    """A printed row: step, or None, and metric → number, none if the loss is printed as `--`. is_aside: it is of no step of the
    training, and only tells what is not finite (a validation, a summary)."""

    step: str | None
    values: dict[str, float]
    is_aside: bool = False


class Printed:
    """A built-in pattern."""

    has_shape = True  # whether the rows are found by the form of one line alone

    def __init__(self, names: Names) -> None: ...

    def look(self, line: str) -> str:
        """The text that is searched."""
        return line

    def places(self, text: str) -> Places | None:
        """The positions of step and metrics in that text; None if it is not a row."""
        raise NotImplementedError

    def read(self, line: str) -> Row | None:
        """None if the line is not a row."""
        text = self.look(line)
        places = self.places(text)
        if places is None or not places.metrics:
            return None
        step = None if places.step is None else text[slice(*places.step)]
        return Row(step, {name: float(text[slice(*number)]) for name, _, number in places.metrics})


class KeyValues(Printed):
    """Matches `step 12 | loss 0.31 | grad_norm: 1.2`, `Step: 12, Loss=0.31`, `Epoch [3][12/100] loss 0.3`, and dictionaries as
    printed by Hugging Face's Trainer. Names become lower case. A line needs a step, unless it is a dictionary, or names a loss and
    the epoch, or follows a line that is only the epoch."""

    def __init__(self, names: Names) -> None:
        self._steps = [_step_pattern(some) for some in (names.given_steps, names.printed_steps) if some]
        self._names = names
        self._not_metrics = {name.lower() for name in names.printed_steps} | set(MORE_STEPS)
        self._marks = {"step", "iter", "num_updates", *(name.lower() for name in names.given_steps)}
        self._epoch: float | None = None  # of the latest line that is nothing but an epoch

    def look(self, line: str) -> str:
        text = _with_plain_numbers(line)
        if "%|" in text and (bar := BAR.search(text)):
            return text[bar.end() :]  # a line printed after a progress bar
        return text

    def places(self, text: str) -> Places | None:
        found = self._places(text)
        return found if found is not None and found.step is not None else None

    def read(self, line: str) -> Row | None:
        text = self.look(line)
        if (header := EPOCH_HEADER.fullmatch(text)) is not None:
            self._epoch = float(header[1])
            return None
        found = self._places(text)
        if found is not None and found.step is not None and not found.metrics and NO_NUMBER.search(text):
            return Row(text[slice(*found.step)], {})
        if found is None or not found.metrics:
            return None
        values = {name: float(text[slice(*number)]) for name, _, number in found.metrics}
        if found.step is not None:
            return Row(text[slice(*found.step)], values) if values.keys() - {EPOCH} else None
        keras = KERAS.match(text)
        has_loss = any(is_loss_like(name) and not is_held_out(name) for name in values)
        if keras is None and has_loss and (counter := A_STEP_OF.search(text)):
            return Row(counter[1], values if self._epoch is None else {EPOCH: self._epoch, **values})
        is_dict = text.rstrip().endswith("}") and DICT.search(text) is not None
        if not is_dict and not any(map(is_loss_like, values)):
            return None
        if EPOCH not in values and self._epoch is not None:
            values[EPOCH] = self._epoch
        is_partial = keras is not None and keras[1] != keras[2]
        return Row(None, values, is_aside=is_partial or (EPOCH not in values and not is_dict))

    def _places(self, text: str) -> Places | None:
        if any([code in text for code in CODE]):  # noqa: C419  (faster)
            return None
        pairs = _pairs(text, self._not_metrics)
        has_mark = any([mark in text for mark in self._marks])  # noqa: C419  (faster)
        step = next((found.span("step") for steps in self._steps if (found := steps.search(text))), None) if has_mark else None
        if step is not None and self._names.given_steps:
            self._names.used.update(name.lower() for name in self._names.given_steps if self._steps[0].search(text))
        epoch = None
        if (both := EPOCH_STEP.search(text)) is not None:
            epoch, step = both.span(1), step or both.span(2)
        elif (one := AN_EPOCH.search(text)) is not None:
            epoch = one.span(1)
            if step is None and (batch := A_BATCH.search(text)):
                step = batch.span(1)
        if epoch is not None and not any(name == EPOCH for name, _, _ in pairs):
            pairs = [(EPOCH, (epoch[0], epoch[0]), epoch), *pairs]
        return Places(step, pairs)


def _with_plain_numbers(line: str) -> str:
    """The line in lower case, with `1.#INF`, `nan.0` and `tensor(0.5)` as plain numbers."""
    text = without_windows(line.lower())
    if "nan." in text or "inf." in text:
        text = PADDED_NAN.sub(r"\1", text)
    return WRAPPED.sub(r"\1", text) if "tensor(" in text or "float" in text or "array(" in text else text


def _step_pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    names = (*names, *MORE_STEPS) if "step" in names else names
    either = "|".join(re.escape(name.lower()) for name in names)
    sign = r"(?:\((?:train|training)\)\s{0,8}\[\s{0,8}|['\"]?\s{0,8}[:=#\[( ]?\s{0,8}['\"]?)"
    return re.compile(rf"(?<![\w/-])(?:{either}){sign}(?P<step>{STEP})")


def _pairs(text: str, not_metrics: set[str]) -> list[tuple[str, Span, Span]]:
    """Name, span of the name and span of the number of each metric. Two metrics of one name get the words before it, and so does a
    metric of held-out data."""
    found: list[tuple[str, Span, Span, list[str]]] = []
    for pair in PAIR.finditer(text):
        name = _of_loss(text, pair, found[-1] if found else None)
        found.append((name, pair.span(1), pair.span(2), _qualifiers(text, pair.start()) if name == pair[1] else []))
    if "nan" in text or "inf" in text:
        found += _bare_nans(text, found)
    found = [one for one in found if one[0] not in not_metrics and not one[0].endswith(".py")]  # train.py:12 of a logger
    if not found:
        return []
    counts = Counter(name for name, _, _, _ in found)
    head = text[: found[0][1][0] - sum(len(word) + 1 for word in found[0][3])]
    is_held_out_line = "train" not in head and HELD_OUT_LINE.search(head) is not None
    is_held_out_line = is_held_out_line or ("train" not in text and BEGINS_HELD_OUT.match(text) is not None)
    pairs = []
    for name, place, number, words in found:
        if not HELD_OUT_WORDS.isdisjoint(words) or counts[name] > 1:
            name = "_".join([*(word for word in words if word not in TRAINING_WORDS), name])
        if is_held_out_line and name != EPOCH and not is_held_out(name):
            name = f"val_{name}"
        pairs.append((name, place, number))
    return pairs


def _of_loss(text: str, pair: re.Match[str], previous: tuple[str, Span, Span, list[str]] | None) -> str:
    """The name of a pair, with that of the loss to which an average or a total belongs."""
    name = pair[1]
    if name not in AVERAGES and name != "total":
        return name
    if previous is not None and name in AVERAGES and not text[previous[2][1] : pair.start()].strip(" ,(["):
        return f"{previous[0]}_{name}"
    before = LOSS_BEFORE.search(text, max(0, pair.start() - 64), pair.start())
    return f"{before[1]}_{name}" if before is not None and is_loss_like(before[1]) else name


def _bare_nans(text: str, found: Sequence[tuple[str, Span, Span, list[str]]]) -> list[tuple[str, Span, Span, list[str]]]:
    """The losses with a number that is not finite and does not follow their name directly. found: those with one that does."""
    starts, nans = {number[0] for _, _, number, _ in found}, []
    for nan in BARE_NAN.finditer(text):
        before = next((one for one in reversed(found) if one[2][1] <= nan.start()), ("", (0, 0), (0, 0), []))
        words = [word for word in WORD.finditer(text, before[2][1], nan.start()) if word[0] not in ("is", "was", "of")]
        name, place = (words[-1][0], words[-1].span()) if words else (before[0], before[1])
        if nan.start() not in starts and name and is_loss_like(name):
            nans.append((f"{name}_avg", place, nan.span(), list[str]()))
    return nans


def _qualifiers(text: str, at: int) -> list[str]:
    found = QUALIFIERS.search(text, max(0, at - 64), at)
    return found[1].split() if found else []


class ProgressBars(Printed):
    """Matches progress bars of tqdm that show a loss: the step is the bar's, and each further bar is an epoch. For logs that hold
    their numbers nowhere else."""

    has_shape = False

    def __init__(self, names: Names) -> None:
        self._newest = -1
        self._bars = 0  # finished

    def read(self, line: str) -> Row | None:
        text = _with_plain_numbers(line)
        bar = BAR.search(text) if "[" in text else None
        if bar is None:
            return None
        head, tail = text[: bar.start()], bar[3]
        pairs = [*PAIR.finditer(head), *PAIR.finditer(tail)]
        values = {pair[1]: float(pair[2]) for pair in pairs if pair[1] not in NOT_MEASURED and pair[1] != EPOCH}
        if not any(is_loss_like(name) for name in values) and TOTAL_NORM not in usual_names(values).values():
            return None
        step = int(bar[1] or bar[2])
        if HELD_OUT_LINE.search(head) or BEGINS_HELD_OUT.match(head):
            return Row(None, {name if is_held_out(name) else f"val_{name}": value for name, value in values.items()}, is_aside=True)
        self._bars += step < self._newest
        self._newest = step
        epoch = AN_EPOCH.search(head)
        return Row(str(step), {**values, EPOCH: float(epoch[1]) if epoch else float(self._bars)})


# `(step=0000120) Train Loss mse: 0.4123, Train Loss ce: 0.5511, Train Steps/Sec: 0.08, ` is the format of BAGEL's
# train/pretrain_unified_navit.py; `(step=0000500/epoch=0001) Train Loss: 0.1158` is that of the DiT family.
BAGEL_STEP = re.compile(r"\(step=(\d{1,19})[^()]{0,80}\) ")
BAGEL_NAMES = {"mse": "loss_flow", "ce": "loss_ce", "ssim": "loss_ssim", "pixel": "loss_pixel"}


class Bagel(Printed):
    """Matches BAGEL's lines. `Train Loss KEY` becomes KEY, translated to our name where BAGEL's differs (`mse` is the flow
    loss); `Train Loss` becomes `loss`, `Train Steps/Sec` becomes `steps_per_sec`."""

    def __init__(self, names: Names) -> None:
        self._given = names.given

    def places(self, text: str) -> Places | None:
        found = BAGEL_STEP.search(text) if "(step=" in text else None
        if found is None:
            return None
        metrics, at = [], found.end()
        for part in text[at:].split(","):
            name, colon, number = part.partition(": ")
            begin = at + len(name) + len(colon)
            if colon and text_number(number) is not None:
                metrics.append((self._ours(name.strip()), (at, at + len(name)), (begin, begin + len(number))))
            at += len(part) + 1
        return Places(found.span(1), metrics)

    def _ours(self, name: str) -> str:
        name = name.removeprefix("Train ")
        if name.startswith("Loss "):
            name = name.removeprefix("Loss ")
            return name if name in self._given else BAGEL_NAMES.get(name, name)
        return name.lower().replace("/", "_per_").replace(" ", "_")


# The surest first.
PRINTED: dict[str, type[Printed]] = {"bagel": Bagel, "key_values": KeyValues, "progress_bars": ProgressBars}
