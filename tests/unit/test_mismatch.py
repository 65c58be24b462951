"""The guard at step 0: what a network was trained to predict is recognised; an untrained one predicts nothing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdxl_training.objectives.densities import Uniform
from sdxl_training.objectives.objective import Objective, make_objective
from sdxl_training.objectives.weights import NoWeight
from sdxl_training.records import Batch, Conditioning
from sdxl_training.training.mismatch import READINGS, Fit, MismatchError, judge, measure_fit

VARIANCE = 0.8
CONFIGURED: dict[str, tuple[str, dict[str, Any]]] = {
    "epsilon": ("epsilon", {}),
    "v_prediction": ("v_prediction", {"zero_terminal_snr": True}),
    "flow_matching (raw)": ("flow_matching", {"mode": "raw", "zero_terminal_snr": True}),
    "preconditioned": ("flow_matching", {"mode": "preconditioned", "zero_terminal_snr": True}),
    "edm": ("edm", {"sigma_data": 1.0, "label": "timestep", "zero_terminal_snr": False}),
    "x0": ("x0", {"zero_terminal_snr": False}),
    "c_noise": ("edm", {"sigma_data": 0.5, "label": "c_noise", "zero_terminal_snr": False}),
}


def objective_called(name: str) -> Objective:
    return make_objective(*CONFIGURED[name], Uniform(), NoWeight())


class Trained(nn.Module):
    """Knows the pictures: answers as `reading` wants with an x0 that is right but for a share of the noise's power."""

    def __init__(self, objective: Objective, batch: Batch, share: float) -> None:
        super().__init__()
        self.objective, self.batch, self.share = objective, batch, share
        self.log_sigma_N = torch.linspace(-3.4, 2.6, 20001, dtype=torch.float64)
        self.labels_N = objective.path.at(self.log_sigma_N).label_B.double()

    def forward(self, x_BCHW: Tensor, label_B: Tensor, **_: Any) -> tuple[Tensor]:
        nearest_B = torch.searchsorted(self.labels_N, label_B.double()).clamp(max=len(self.labels_N) - 1)
        levels = self.objective.path.at(self.log_sigma_N[nearest_B])
        a, b = (value_B[:, None, None, None] for value_B in (levels.a_B, levels.b_B))
        found = self.batch.latents_BCHW + self.share * torch.randn_like(x_BCHW) * VARIANCE**0.5
        eps = (x_BCHW - a * found) / b
        return (self.objective.head.target(found, eps, a, b),)


class Untrained(nn.Module):
    """A fresh U-Net says next to nothing."""

    def forward(self, x_BCHW: Tensor, label_B: Tensor, **_: Any) -> tuple[Tensor]:
        return (0.05 * torch.randn_like(x_BCHW),)


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 4, 8, 8, generator=generator) * VARIANCE**0.5
    noise = torch.randn(8, 4, 8, 8, generator=generator)
    text = Conditioning(torch.zeros(8, 2, 2), torch.zeros(8, 2), torch.zeros(8, 6))
    return Batch(latents, noise, text, torch.ones(8), tuple(range(8)), (0,) * 8, 0, tuple(range(8)), 8)


def fit_of(model: nn.Module, configured: str, batch: Batch) -> Fit:
    torch.manual_seed(1)
    return measure_fit(model, objective_called(configured), [batch], nullcontext())


@pytest.mark.parametrize("share", [0.2, 0.45])
@pytest.mark.parametrize("trained", READINGS)
@pytest.mark.parametrize("configured", CONFIGURED)
def test_a_trained_model_is_recognised(batch: Batch, trained: str, configured: str, share: float) -> None:
    model = Trained(objective_called(trained), batch, share)
    fit = fit_of(model, configured, batch)
    assert min(fit.scores, key=fit.scores.__getitem__) == trained
    same = {"preconditioned": "v_prediction", "edm": "v_prediction"}.get(configured, configured)
    if same == trained:
        assert fit.other is None
        assert "read as" in judge(fit, accept_mismatch=False)
    else:
        assert fit.other == trained
        with pytest.raises(MismatchError, match=rf"predicts {trained[:8]}.*accept_mismatch: true"):
            judge(fit, accept_mismatch=False)
        said = judge(fit, accept_mismatch=True)
        assert said.startswith(f"switch of objective: the base model predicts {trained}, this run trains")


@pytest.mark.parametrize("configured", CONFIGURED)
def test_an_untrained_model_may_learn_anything(batch: Batch, configured: str) -> None:
    assert fit_of(Untrained(), configured, batch).other is None


def test_the_score_is_relative_to_a_linear_filter(batch: Batch) -> None:
    """A network that knows x0 up to a share s of its standard deviation leaves s^2 of the data's variance."""
    model = Trained(objective_called("v_prediction"), batch, 0.5)
    fit = fit_of(model, "v_prediction", batch)
    log_sigma = torch.linspace(*(torch.tensor([0.5, 5.0]).log().tolist()), 8)
    signal = float(batch.latents_BCHW.square().mean())
    filters = (2 * log_sigma).exp() * signal / ((2 * log_sigma).exp() + signal)
    expected = (0.25 * VARIANCE / filters).log().mean().exp()
    assert fit.scores["v_prediction"] == pytest.approx(float(expected), rel=0.05)


def test_cutting_the_pictures_into_batches_changes_nothing(batch: Batch) -> None:
    model = Untrained()
    halves = [
        Batch(
            batch.latents_BCHW[part], batch.noise_BCHW[part],
            Conditioning(torch.zeros(4, 2, 2), torch.zeros(4, 2), torch.zeros(4, 6)),
            torch.ones(4), (0,) * 4, (0,) * 4, 0, (0,) * 4, 4,
        )
        for part in (slice(0, 4), slice(4, 8))
    ]  # fmt: skip
    model.forward = lambda x_BCHW, label_B, **_: (x_BCHW,)  # type: ignore[method-assign]
    one = measure_fit(model, objective_called("epsilon"), [batch], nullcontext())
    two = measure_fit(model, objective_called("epsilon"), halves, nullcontext())
    for name, score in one.scores.items():
        assert two.scores[name] == pytest.approx(score, rel=0.05)  # the linear filter is that of each batch's variance
