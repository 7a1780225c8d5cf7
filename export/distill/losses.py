"""The training loss, over target positions only.

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


def forward_kl_top_k(student: Tensor, log_probs: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Return `forward_kl` with all tokens except the teacher's k best as one; never more than the full KL.

    Parameters
    ----------
    student
        float logits [n, vocabulary].
    log_probs, tokens
        float and int64 [n, k]: the teacher's best tokens, softened with the same temperature.
    temperature
        T, over 0.
    """
    given = functional.log_softmax(student.float() / temperature, dim=-1)
    wanted = log_probs.float()
    best = (wanted.exp() * (wanted - given.gather(1, tokens))).sum(-1)
    if tokens.shape[1] == student.shape[1]:
        return best.mean() * temperature**2
    others = (1 - wanted.exp().sum(-1)).clamp(min=1e-6)
    given_others = given.scatter(1, tokens, float("-inf")).logsumexp(-1)
    return (best + others * (others.log() - given_others)).mean() * temperature**2
