"""What the name of a metric in a third-party log tells: a loss, held-out data, or one of our metrics under another name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

from tune_ssim.records.record import LOSS, TOTAL_NORM

MAX_NAMES = 10_000  # cached names; bounds memory for a log whose names never repeat
# Words of a name, in any order, with any separators or in camel case: `kl_loss`, `Loss/KL`, `klLoss`.
WORD = re.compile(r"[A-Z]+\d*(?![a-z])|[A-Z]?[a-z]+\d*")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# A metric with one of these words is a loss or a part of one. A word that begins or ends with `loss` (losses, dloss) counts too.
LOSS_WORDS = _set(
    "loss nll kl kld kldiv mse rmse mae bce ce xent crossentropy elbo l1 l2 huber hinge lpips perplexity ppl bpd recon"
    " reconstruction"
)
# A metric that also has one of these is a setting, a count, a time, a gradient, a statistic of samples, or the best value so far,
# which begins at infinity.
NO_LOSS_WORDS = _set(
    "scale scaler scaling weight weights coef coeff coefficient coefficients lambda beta gain lr best lowest min minimum max"
    " maximum target threshold limit count time seconds patience grad gradient norm dbg smoke"
)
# The same of a name that ends in `loss`: `best_loss` and `smoke/flow_loss` are no loss, `gradient_loss` and `scale_loss` are.
NO_LAST_LOSS_WORDS = _set("best lowest min minimum max maximum dbg smoke")
# The same of a name that begins with it: `loss_weight` and `loss_min` are no loss, `loss_gradient` is.
NO_FIRST_LOSS_WORDS = NO_LOSS_WORDS - {"gradient", "target"}
LOSS_WORD = _set("loss losses")
# A metric with one of these is the weight of a loss term, which may be annealed.
WEIGHT_WORDS = _set("weight coef coeff coefficient lambda beta alpha anneal annealing gain")
NO_WEIGHT_WORDS = _set("norm grad gradient decay dbg update ratio mean std adam")
HELD_OUT_WORDS = _set("val valid validation eval evaluation test dev heldout holdout")

# Words that say nothing about which loss it is: those of Lightning, Hugging Face and MMEngine, then those of other producers (avr:
# kohya's sd-scripts; mean: a summarised metric of EDM and StyleGAN).
TRAINING_WORDS = _set("train training total step")
AVERAGE_WORDS = _set("avr avg average averaged mean running smoothed batch iter iteration overall current")
# A metric with one of these words may be the training loss if it is the only one. A KL, a distance of samples or a perplexity may
# not.
ONLY_LOSS_WORDS = _set("loss losses nll mse mae bce ce xent crossentropy elbo")
# gnorm: fairseq, AllenNLP. grdn: LeRobot. actor, policy: verl.
NORM_WORDS = _set("norm gnorm gradnorm grdn")
OTHER_NORM_WORDS = _set("grad grads gradient gradients global total train training before pre preclip unclipped model actor policy")
# The two terms of a VAE, if a log has both: its reconstruction, and its KL, weighted or not.
VAE_WORDS = {
    "loss_reconstruction": _set("recon recons reconstruction reconstruct rec"),
    "kl_raw": _set("kl kld kldiv"),
}
OTHER_VAE_WORDS = _set("loss mse bce nll l1 l2 div divergence term raw error vae") | TRAINING_WORDS | AVERAGE_WORDS


@lru_cache(MAX_NAMES)
def words_of(name: str) -> frozenset[str]:
    """`Train/kl_loss` and `KLLossTrain` have the words train, kl, loss."""
    return frozenset(word.lower() for word in WORD.findall(name))


@lru_cache(MAX_NAMES)
def is_loss_like(name: str) -> bool:
    """Whether a metric is a loss, or a part of one."""
    words = words_of(name)
    if "snr" in words:
        words -= {"min"}  # min-SNR weighting (Hang et al. 2023)
    if not words.isdisjoint(_no_loss_words(name)):
        return False
    return not words.isdisjoint(LOSS_WORDS) or any(word.startswith(LOSS) or word.endswith(LOSS) for word in words)


def _no_loss_words(name: str) -> frozenset[str]:
    """The words with which this name is not that of a loss: fewer if the name begins or ends with `loss`."""
    group, _, inner = name.rpartition("/")
    if not words_of(group).isdisjoint(NO_LOSS_WORDS):
        return NO_LOSS_WORDS  # `time/loss`
    words = [word.lower() for word in WORD.findall(inner)]
    if not LOSS_WORD.isdisjoint(words[-1:]):
        return NO_LAST_LOSS_WORDS
    begins_with_loss = not LOSS_WORD.isdisjoint(words[:1]) or not LOSS_WORD.isdisjoint(words_of(group))
    return NO_FIRST_LOSS_WORDS if begins_with_loss else NO_LOSS_WORDS


@lru_cache(MAX_NAMES)
def is_norm_like(name: str) -> bool:
    """Whether a metric is the gradient's norm, not clipped, under any of its names."""
    return _is_norm(words_of(name))


def is_held_out(name: str) -> bool:
    """Whether a metric is of held-out data."""
    return not words_of(name).isdisjoint(HELD_OUT_WORDS)


@lru_cache(MAX_NAMES)
def is_loss_weight(name: str) -> bool:
    """Whether a metric is the weight of a term of the loss."""
    words = words_of(name)
    return not words.isdisjoint(WEIGHT_WORDS) and words.isdisjoint(NO_WEIGHT_WORDS)


def usual_names(metrics: Iterable[str], known: Iterable[str] = ()) -> dict[str, str]:
    """Common names of our metrics in the log → our names, if ours is missing and exactly one metric matches.

    For the loss the closest names count: `train_loss`, else `avr_loss`, else the only loss in the log whatever its name
    (`vae_loss`). known: our names that also count with their words in another order (`caption_loss` is `loss_caption`)."""
    words = {name: words_of(name) for name in metrics}
    losses = {name: found for name, found in words.items() if not found & HELD_OUT_WORDS and is_loss_like(name)}
    vae = {ours: [name for name in words if name == ours or _is_term(losses.get(name, frozenset()), ours)] for ours in VAE_WORDS}
    candidates = vae if all(len(found) == 1 for found in vae.values()) else {}
    for ours in known:
        plain = words_of(ours)
        candidates.setdefault(ours, [name for name, found in words.items() if found - TRAINING_WORDS == plain])
    terms = [found[0] for ours, found in candidates.items() if len(found) == 1 and ours not in words]
    candidates[LOSS] = _losses(losses, terms)
    candidates[TOTAL_NORM] = [name for name, found in words.items() if _is_norm(found)]
    found: dict[str, str] = {}
    for ours, names in candidates.items():
        if ours not in words and len(names) == 1:
            found.setdefault(names[0], ours)
    return found


def _losses(losses: Mapping[str, frozenset[str]], terms: Collection[str]) -> list[str]:
    """The metrics whose names are the closest to `loss`. losses: name → its words. terms: names of known terms of it."""
    for others in (TRAINING_WORDS, TRAINING_WORDS | AVERAGE_WORDS):
        if found := [name for name, words in losses.items() if LOSS in words and words <= {LOSS} | others]:
            return found
    if any(name.startswith(LOSS) for name in losses):
        return []  # our own names of the terms
    return [name for name, words in losses.items() if words & ONLY_LOSS_WORDS and name not in terms]


def _is_term(words: frozenset[str], ours: str) -> bool:
    return bool(words & VAE_WORDS[ours]) and words <= VAE_WORDS[ours] | OTHER_VAE_WORDS


def _is_norm(words: frozenset[str]) -> bool:
    """Whether these are the words of the gradient's norm, not clipped."""
    if words & {"before", "pre"}:
        words -= {"clip", "clipping"}
    return bool(words & NORM_WORDS) and words <= NORM_WORDS | OTHER_NORM_WORDS
