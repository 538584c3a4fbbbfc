"""What devices say of a new release's quality on their own rows: one word each, randomised before it leaves.

A device that serves a new release tries it on labelled rows of its own, beside the release before it, which
answers the same rows in the shadow. What it found is one of three words; what it *says* is drawn anew::

    truth            fine | drifts | worse         by the bounds of the question
    said             the truth with probability p, each other word with q
    p = e^ε / (e^ε + 2),  q = 1 / (e^ε + 2)        three-ary randomised response (Warner 1965; Kairouz 2014)

so that whatever the rows are, no word is more than e^ε times as likely as with other rows: ε-local
differential privacy for all rows of the device together. A device answers one question of one release once,
and says the same ever after, so asking again tells nothing new.

The coordinator knows p and q, and counts. With a true share θ of devices that find it bad, a word other than
``fine`` is said with probability r(θ) = 2q + (p - q)·θ. It holds the count against r(max_bad), exactly
(binomial tail): a release *looks bad* at 5 %, which is enough when as many have answered as are needed; of
fewer answers it *is* bad at 0.1 %. A suspicion is cleared only at 50 %.

Pure; the device draws with its system's generator.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from random import Random
from typing import Annotated, Final, Literal

from pydantic import Field

from lepton_fl.plan import Frozen

Word = Literal["fine", "drifts", "worse"]
WORDS: Final[tuple[Word, ...]] = ("fine", "drifts", "worse")

LOOKS_BAD: Final = 0.05  # such a count, or a higher one, by chance, if the share were just ``max_bad``
IS_BAD: Final = 0.001
CLEARED: Final = 0.5  # a suspicion ends here, so that it does not flicker
POWER: Final = 0.99  # with which a release that is bad everywhere has to be noticed
MOST: Final = 100_000  # answers; nobody needs more to decide

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Question(Frozen):
    """What a device is asked; its digest is its name, and equal questions have one answer.

    Attributes:
        epsilon: Of the answer. A device gives exactly this one or none.
        max_drop: ``worse``: the score is lower than that of the release before by more than this.
        min_score: ``worse``, too: the score is below this; None = no floor. For a score of which less is
            better (a loss), above it.
        max_drift: ``drifts``: so large a share of rows is decided otherwise than by the release before. Of
            numbers: root mean square difference, in standard deviations of the release before.
    """

    epsilon: Annotated[float, Field(gt=0, le=20, allow_inf_nan=False)] = 1.0
    max_drop: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    min_score: Annotated[float, Field(allow_inf_nan=False)] | None = None
    max_drift: Share = 0.3


class Trial(Question):
    """A question, and how the answers are judged.

    Attributes:
        max_bad: Share of devices that may truly find the release bad.
        min_answers: So many have to answer in each stage; more where :func:`needed` says so.
    """

    max_bad: Annotated[float, Field(gt=0, lt=1)] = 0.2
    min_answers: Annotated[int, Field(ge=1, le=MOST)] = 5

    @property
    def question(self) -> Question:
        """What devices are asked."""
        return Question(**{name: getattr(self, name) for name in Question.model_fields})


def truth(
    question: Question, *, score: float, before: float | None, drift: float, lower_is_better: bool = False
) -> Word:
    """What a device finds.

    Args:
        question: The bounds.
        score: Of the new release on the device's rows.
        before: The same of the release before; None = there was none.
        drift: See ``Question.max_drift``; 0 where there was none before.
        lower_is_better: Of the score.
    """
    sign = -1.0 if lower_is_better else 1.0
    if not math.isfinite(score):
        return "worse"
    if before is not None and sign * (before - score) > question.max_drop:
        return "worse"
    if question.min_score is not None and sign * (question.min_score - score) > 0:
        return "worse"
    return "drifts" if drift > question.max_drift else "fine"


def probabilities(epsilon: float) -> tuple[float, float]:
    """(p, q): with which the truth, and each other word, is said."""
    rest = math.exp(-epsilon)
    return 1 / (1 + 2 * rest), rest / (1 + 2 * rest)


def said(word: Word, epsilon: float, rng: Random) -> Word:
    """What leaves the device; ``rng`` is the system's generator (``random.SystemRandom``)."""
    p, _ = probabilities(epsilon)
    if rng.random() < p:
        return word
    return rng.choice([other for other in WORDS if other != word])


def shares(counts: Mapping[str, int], epsilon: float) -> dict[Word, float]:
    """Unbiased estimates of the true shares; with few answers they may lie outside of 0 to 1."""
    total = sum(counts.get(word, 0) for word in WORDS)
    p, q = probabilities(epsilon)
    return {word: (counts.get(word, 0) / total - q) / (p - q) if total else 0.0 for word in WORDS}


def counted(answers: Iterable[str]) -> dict[str, int]:
    """How often each word was said; what is none is not counted."""
    return dict(Counter(word for word in answers if word in WORDS))


def doubt(trial: Trial, counts: Mapping[str, int]) -> float:
    """How likely so many bad words, or more, are if only ``max_bad`` of the devices find the release bad."""
    total = sum(counts.values())
    return upper_tail(total, total - counts.get("fine", 0), _rate(trial.epsilon, trial.max_bad))


def needed(trial: Trial) -> int:
    """How many answers a stage needs: enough to notice a release that is bad everywhere, 99 times of 100."""
    return max(trial.min_answers, _least(trial.epsilon, trial.max_bad))


def upper_tail(n: int, k: int, r: float) -> float:
    """P(X >= k) of a binomial(n, r)."""
    if k <= 0:
        return 1.0
    terms = (
        math.exp(
            math.lgamma(n + 1)
            - math.lgamma(i + 1)
            - math.lgamma(n - i + 1)
            + i * math.log(r)
            + (n - i) * math.log1p(-r)
        )
        for i in range(k, n + 1)
    )
    return min(1.0, math.fsum(terms))


def tail_bound(n: float, k: float, r: float) -> float:
    """P(X >= k) of a binomial(n, r) is at most this, for any n at once (Hoeffding 1963, theorem 1)."""
    if k <= n * r:
        return 1.0
    if r == 0:
        return 0.0
    good = (n - k) * math.log((1 - k / n) / (1 - r)) if k < n else 0.0
    return math.exp(-k * math.log(k / n / r) - good)


def _rate(epsilon: float, share: float) -> float:
    """r(θ) of the module's text."""
    p, q = probabilities(epsilon)
    return 2 * q + (p - q) * share


@lru_cache(maxsize=64)  # it is asked at every look at a rollout
def _least(epsilon: float, max_bad: float) -> int:
    fine, bad = _rate(epsilon, max_bad), _rate(epsilon, 1.0)
    low, high = 0, 1
    while not _noticed(high, fine, bad):
        if high >= MOST:
            return MOST
        low, high = high, 2 * high
    while high - low > 1:  # the power grows with n but for the steps of whole numbers: a few answers more
        middle = (low + high) // 2
        low, high = (low, middle) if _noticed(middle, fine, bad) else (middle, high)
    return high


def _noticed(n: int, fine: float, bad: float) -> bool:
    """Whether n answers of devices that all find it bad look bad often enough."""
    low, high = 0, n + 1  # the least k whose tail is below the level lies in (low, high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if upper_tail(n, middle, fine) < LOOKS_BAD else (middle, high)
    return high <= n and upper_tail(n, high, bad) >= POWER
