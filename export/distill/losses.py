"""What training minimizes, over target positions only.

Cross-entropy with the data's tokens, and the forward Kullback-Leibler divergence from the teacher's softened
distribution (Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean of -log p(label).

    Parameters
    ----------
    logits
        float [n, vocabulary], of target positions.
    labels
        int64 [n].
    smoothing
        Share of the target distribution spread evenly over the vocabulary, 0 to 1.
    """
    return functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def forward_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 * mean KL(teacher_T || student_T), where p_T = softmax(logits / T).

    T^2 keeps the gradient's size independent of the temperature (section 2.1 of the paper).

    Parameters
    ----------
    student, teacher
        float logits [n, vocabulary]; no gradient flows into the teacher.
    temperature
        T, over 0.
    """
    wanted = functional.log_softmax(teacher.detach().float() / temperature, dim=-1)
    given = functional.log_softmax(student.float() / temperature, dim=-1)
    return functional.kl_div(given, wanted, reduction="batchmean", log_target=True) * temperature**2
