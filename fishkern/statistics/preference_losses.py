"""Losses of preference pairs, each of one pair alone, from the log-probabilities of its two answers.

``c`` and ``r`` are the chosen and the rejected answer, ``x`` the prompt, ``w`` the reference model, ``s`` the sigmoid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of the answers of ``N`` pairs, each the sum over the tokens of the answer.

    Args:
        chosen: By the model, ``[N]``, differentiable.
        rejected: By the model, ``[N]``, differentiable.
        reference_chosen: By the reference model, ``[N]``; zeros where there is none.
        reference_rejected: By the reference model, ``[N]``; zeros where there is none.
        chosen_tokens: How many log-probabilities ``chosen`` is the sum of, ``[N]``, at least 1: one for each token of
            the answer but for the first one of a row, which nothing predicts.
        rejected_tokens: The same of ``rejected``.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """``log p(c|x) - log w(c|x)`` and ``log p(r|x) - log w(r|x)``, ``[N]`` each."""
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Mean log-probabilities of a token by the model, ``[N]`` each."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


PairLoss = Callable[[PairLogps, float], Tensor]
"""From log-probabilities and ``beta`` to one loss for each pair, ``[N]``."""


def dpo_logits(logps: PairLogps, beta: float) -> Tensor:
    """Logit of the chosen answer being the better one, in DPO.

    ``beta (log p(c|x)/w(c|x) - log p(r|x)/w(r|x))``; the loss is ``-log s`` of it, equation 7 of Rafailov et al.,
    https://arxiv.org/abs/2305.18290.

    Args:
        logps: Of the pairs.
        beta: Strength of the bond to the reference model.

    Returns:
        ``[N]``.
    """
    chosen, rejected = logps.log_ratios
    return beta * (chosen - rejected)


def simpo_logits(logps: PairLogps, beta: float) -> Tensor:
    """Logit of the chosen answer being the better one, in SimPO, which has no reference model.

    ``beta (log p(c|x) / |c| - log p(r|x) / |r|)``, from which the margin is subtracted; the loss is ``-log s``,
    equation 6 of Meng et al., https://arxiv.org/abs/2405.14734.

    Args:
        logps: Of the pairs.
        beta: Scale of the reward.

    Returns:
        ``[N]``.
    """
    chosen, rejected = logps.means
    return beta * (chosen - rejected)


def ipo_losses(logps: PairLogps, beta: float) -> Tensor:
    """Compute IPO: ``(h - 1 / (2 beta))^2``.

    Equation 17 of Azar et al., https://arxiv.org/abs/2310.12036, where ``beta`` is ``tau`` and ``h`` the difference of
    the log ratios, here each divided by the tokens of its answer, as the authors do and TRL with them.

    Args:
        logps: Of the pairs.
        beta: Strength of the bond to the reference model.

    Returns:
        ``[N]``.
    """
    chosen, rejected = logps.log_ratios
    h = chosen / logps.chosen_tokens - rejected / logps.rejected_tokens
    return (h - 1 / (2 * beta)).square()


def hinge_losses(logps: PairLogps, beta: float) -> Tensor:
    """Compute the hinge of DPO's logit ``z``: ``max(0, 1 - z)``, as in Liu et al., https://arxiv.org/abs/2309.06657.

    Args:
        logps: Of the pairs.
        beta: As in :func:`dpo_logits`.

    Returns:
        ``[N]``.
    """
    return (1 - dpo_logits(logps, beta)).relu()


def orpo_losses(logps: PairLogps, beta: float) -> Tensor:
    """Compute ORPO, which has no reference model: ``-log p(c) - beta log s(log odds p(c) - log odds p(r))``.

    Equation 6 of Hong et al., https://arxiv.org/abs/2403.07691, where ``beta`` is ``lambda``. As there, ``log p`` is
    the mean over the tokens of an answer, and ``odds p = p / (1 - p)``.

    Args:
        logps: Of the pairs.
        beta: Weight of the odds ratio.

    Returns:
        ``[N]``.
    """
    chosen, rejected = logps.means
    # log(1 - p) by expm1: 1 - exp(log p) has no digits left where an answer is nearly certain
    odds = (chosen - rejected) - ((-chosen.expm1()).log() - (-rejected.expm1()).log())
    return -chosen - beta * F.logsigmoid(odds)


LOGITS: dict[str, PairLoss] = {"sigmoid": dpo_logits, "simpo": simpo_logits}
"""Losses that are ``-log s`` of a logit, which makes them the likelihood of which answer is the better one."""

LOSSES: dict[str, PairLoss] = {"ipo": ipo_losses, "hinge": hinge_losses, "orpo": orpo_losses}

WITHOUT_REFERENCE = frozenset(("simpo", "orpo"))
