"""Loss weights against kohya's sd-scripts, from which most settings for SDXL are copied.

Its formulas are written here anew from what its options are documented to do, in float32 and from a table of SNR as it
has them. Where the two differ on purpose, the difference is tested too, so that nobody meets it by surprise.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdxl_training.objectives.heads import CleanHead, EpsilonHead, Head, VelocityHead
from sdxl_training.objectives.paths import VariancePreservingPath
from sdxl_training.objectives.weights import P2, Debiased, DebiasedKohya, LossWeight, MinSNR, NoWeight

GAMMAS = (1.0, 5.0, 20.0)
HEADS: dict[str, Head] = {"epsilon": EpsilonHead(), "v": VelocityHead()}


def kohya_snr(zero_terminal_snr: bool = False) -> Tensor:
    """SNR of each timestep in float32; with the betas of `--zero_terminal_snr` where asked."""
    betas_T = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    signal_T = (1 - betas_T).cumprod(0)
    if zero_terminal_snr:
        root_T = signal_T.sqrt()
        signal_T = ((root_T - root_T[-1]) * root_T[0] / (root_T[0] - root_T[-1])) ** 2
    return (signal_T.sqrt() / (1 - signal_T).sqrt()) ** 2


def ours(loss_weight: LossWeight, head: Head, zero_terminal_snr: bool = False) -> Tensor:
    levels = VariancePreservingPath(zero_terminal_snr).at_timesteps(torch.arange(1000))
    return loss_weight.weight(head, levels.a_B, levels.b_B)


def limited(snr_T: Tensor) -> Tensor:
    """Debiased estimation and the loss scale cut SNR off at 1000, which touches timestep 0 alone."""
    return snr_T.clamp(max=1000)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("head", HEADS)
def test_min_snr_gamma(head: str, gamma: float) -> None:
    """--min_snr_gamma: min(SNR, gamma) / SNR, with --v_parameterization / (SNR + 1)."""
    snr_T = kohya_snr()
    theirs_T = snr_T.clamp(max=gamma) / (snr_T + 1 if head == "v" else snr_T)
    assert torch.allclose(ours(MinSNR(gamma), HEADS[head]), theirs_T, rtol=1e-4)


def test_min_snr_after_the_rescale_is_ours_alone() -> None:
    """sd-scripts computes its SNR before `--zero_terminal_snr` rescales the betas, so its weights are those of the old
    table: most wrong where it is noisiest. A gamma found there refers to that SNR."""
    theirs_T = kohya_snr().clamp(max=5.0) / (kohya_snr() + 1)
    ours_T = ours(MinSNR(5.0), VelocityHead(), zero_terminal_snr=True)
    rescaled_T = kohya_snr(zero_terminal_snr=True)
    assert torch.allclose(ours_T, rescaled_T.clamp(max=5.0) / (rescaled_T + 1), rtol=1e-3, atol=1e-9)
    assert float(theirs_T[999]) == pytest.approx(0.00466, abs=1e-5)
    assert float(ours_T[999]) == 0.0


def test_debiased_estimation_of_epsilon() -> None:
    """--debiased_estimation_loss: 1 / sqrt(SNR). Exact `debiased` is the same but for the limit at timestep 0."""
    theirs_T = limited(kohya_snr()).rsqrt()
    assert torch.allclose(ours(DebiasedKohya(), EpsilonHead()), theirs_T, rtol=1e-4)
    exact_T = ours(Debiased(), EpsilonHead())
    assert torch.allclose(exact_T[1:], theirs_T[1:], rtol=1e-4)
    assert float(exact_T[0] / theirs_T[0]) == pytest.approx((1000 / 1175.47) ** 0.5, rel=1e-4)


def test_debiased_estimation_of_v() -> None:
    """1 / (SNR + 1), which is the plain loss on x0: another weight than sqrt(SNR) / (SNR + 1), `debiased` for v."""
    snr_T = kohya_snr()
    theirs_T = 1 / (limited(snr_T) + 1)
    ours_T = ours(DebiasedKohya(), VelocityHead())
    assert torch.allclose(ours_T, theirs_T, rtol=1e-4)

    path = VariancePreservingPath(False)
    levels = path.at_timesteps(torch.arange(1, 1000))
    b2_B = levels.b_B.double().square()
    as_x0_B = VelocityHead().native_weight(b2_B, levels.a_B.double(), levels.b_B.double()).float()
    assert torch.allclose(ours_T[1:], as_x0_B, rtol=1e-4)
    assert torch.equal(ours(NoWeight(), CleanHead()), torch.ones(1000))

    exact_T = ours(Debiased(), VelocityHead())
    assert torch.allclose(exact_T, snr_T.sqrt() / (snr_T + 1), rtol=1e-4)
    ratio_T = exact_T[1:] / theirs_T[1:]
    assert torch.allclose(ratio_T, snr_T[1:].sqrt(), rtol=2e-4)
    assert float(ratio_T.max()) > 20
    assert float(ratio_T.min()) < 0.07


def test_v_loss_scaled_like_noise_prediction_is_epsilons_own_weight() -> None:
    """--scale_v_pred_loss_like_noise_pred: SNR / (SNR + 1) on v. It has no name here: it is p2 with gamma 0."""
    snr_T = limited(kohya_snr())
    theirs_T = snr_T / (snr_T + 1)
    levels = VariancePreservingPath(False).at_timesteps(torch.arange(1000))
    a, b = levels.a_B.double(), levels.b_B.double()
    epsilons_own_B = VelocityHead().native_weight(EpsilonHead().own_b2_weight(a, b), a, b).float()
    assert torch.allclose(epsilons_own_B, theirs_T, rtol=3e-4)
    assert torch.allclose(ours(P2(1.0, 0.0), VelocityHead()), theirs_T, rtol=3e-4)


def test_zero_terminal_table_is_theirs() -> None:
    signal_T = VariancePreservingPath(True).table.alphas_bar_T
    theirs_T = kohya_snr(zero_terminal_snr=True).double()
    assert torch.allclose(signal_T, theirs_T / (1 + theirs_T), atol=1e-6)
