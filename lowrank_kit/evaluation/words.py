"""Exact match and F1 of words, as SQuAD counts them (arXiv 1606.05250, arXiv 1806.03822)."""

from lm_eval.tasks.qasper.metrics import f1_abstractive, normalize_answer


def compute_exact(gold: str, predicted: str) -> int:
    """1 where both are the same words, but for case, punctuation and articles; else 0."""
    return int(normalize_answer(gold) == normalize_answer(predicted))


def compute_f1(gold: str, predicted: str) -> float:
    """Harmonic mean of precision and recall of the words that are left; of no words, those are right that are none."""
    if not normalize_answer(gold).split() or not normalize_answer(predicted).split():
        return float(compute_exact(gold, predicted))
    return float(f1_abstractive([predicted], [gold]))
