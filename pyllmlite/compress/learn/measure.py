"""A student beside its teacher, over the whole vocabulary, on text that neither was trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.compress.compare import Distributions, Score
from pyllmlite.compress.learn.records import Record
from pyllmlite.compress.learn.teacher_logits import distributions, predicted_tokens

if TYPE_CHECKING:
    from pyllmlite.model.build import Built

# Token ids and the number of the last that are predicted, to logits [predicted, vocab].
Predict = Callable[[list[int], int], np.ndarray]


def compare_with_teacher(
    teacher: Built, student: Predict, records: list[Record], seq_len: int
) -> Score:
    """KL(teacher || student) and how often their likeliest tokens agree, on the teacher's answers.

    Args:
        teacher: Of :func:`~pyllmlite.compress.learn.teacher_logits.open_scorer`.
    """
    score = Score()
    made = [predicted_tokens(record, seq_len) for record in records]
    sequences = [one for one in made if one[1]]
    for index, logits in distributions(teacher, sequences):
        tokens, predicted = sequences[index]
        theirs = Distributions.of(logits)
        ours = Distributions.of(student(tokens, predicted))
        score.add(theirs, theirs.probabilities(), ours, np.array(tokens[-predicted:]))
    return score


def module_predictions(module: Any) -> Predict:
    """By a torch module, on its device."""
    import torch

    from pyllmlite.compress.learn.head import Head

    head = Head(module)
    device = next(module.parameters()).device

    def predict(tokens: list[int], predicted: int) -> np.ndarray:
        with torch.no_grad():
            hidden = head.body(torch.tensor([tokens[:-1]], device=device))
            return head(hidden[0, -predicted:]).cpu().numpy()

    return predict


def engine_predictions(built: Built) -> Predict:
    """By a model in the engine."""

    def predict(tokens: list[int], predicted: int) -> np.ndarray:
        ((_, logits),) = distributions(built, [(tokens, predicted)])
        return logits

    return predict
