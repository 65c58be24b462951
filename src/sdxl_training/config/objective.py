"""What is learnt: the schema of objective, loss weight, loss shape, noise and coupling. Nothing here imports torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdxl_training.config.section import Fraction, Positive, Section, SigmaData

Preset = Literal["nai_v3", "nyaflow", "sd3_flow", "edm", "sdxl_base"]
Terminal = Literal["official", "official_patched", "plus_one", "floor"]


# --- objective -------------------------------------------------------------------------------------------------------


class _Objective(Section):
    accept_mismatch: bool = Field(
        default=False,
        description="Whether to go on where the base model was clearly trained to predict something else.",
    )


class Epsilon(_Objective):
    """Predict the noise (Ho et al. 2020): what SDXL itself was trained with."""

    type: Literal["epsilon"] = Field(default="epsilon", description="Predict the noise.")


class VPrediction(_Objective):
    """Predict v = a eps - b x0 (Salimans & Ho 2022)."""

    type: Literal["v_prediction"] = Field(default="v_prediction", description="Predict v = a eps - b x0.")
    zero_terminal_snr: bool = Field(
        default=True, description="Whether the last level is pure noise (Lin et al. 2023, algorithm 1)."
    )


class CleanPrediction(_Objective):
    """Predict the clean latent."""

    type: Literal["x0"] = Field(default="x0", description="Predict the clean latent.")
    zero_terminal_snr: bool = Field(
        default=False, description="Whether the last level is pure noise (Lin et al. 2023, algorithm 1)."
    )


class FlowMatching(_Objective):
    """Learn the velocity noise minus data of straight paths (Lipman et al. 2023; Liu et al. 2023)."""

    type: Literal["flow_matching"] = Field(
        default="flow_matching", description="Learn the velocity, noise minus data, of straight paths."
    )
    mode: Literal["preconditioned", "raw"] = Field(
        default="preconditioned",
        description="preconditioned keeps SDXL's input scale and labels, and makes a v-prediction checkpoint; "
        "raw is what nyaflow does.",
    )
    zero_terminal_snr: bool = Field(
        default=True, description="Preconditioned: whether labels and export follow the table that ends in pure noise."
    )


class Edm(_Objective):
    """The preconditioned denoiser of Karras et al. 2022."""

    type: Literal["edm"] = Field(default="edm", description="Karras et al. 2022; at sigma_data 1 it predicts v.")
    sigma_data: SigmaData = Field(default=1.0, description="Standard deviation of the latents the network is told of.")
    label: Literal["timestep", "c_noise"] = Field(
        default="timestep", description="What the network reads: SDXL's timestep, or ln(sigma) / 4."
    )
    zero_terminal_snr: bool = Field(
        default=False, description="label timestep: whether it comes from the table that ends in pure noise."
    )


# --- loss weight -----------------------------------------------------------------------------------------------------


class _LossWeight(Section):
    normalise: bool = Field(default=False, description="Whether the mean weight over the density is brought to 1.")


class NoLossWeight(_LossWeight):
    """The objective's own weight."""

    type: Literal["none"] = Field(default="none", description="The objective's own weight.")


class MinSnrLossWeight(_LossWeight):
    """min(SNR, gamma) in x0 space (Hang et al. 2023)."""

    type: Literal["min_snr"] = Field(default="min_snr", description="Weight min(SNR, gamma) in x0 space.")
    gamma: Positive = Field(default=5.0, description="SNR above which the weight stops growing.")
    terminal: Terminal | None = Field(
        default=None,
        description="Weight at SNR 0: official, official_patched, plus_one or floor; "
        "null: plus_one where SNR 0 is trained, else official.",
    )
    minimum: Fraction = Field(default=0.01, description="Least weight; only terminal: floor uses it.")


class SoftMinSnrLossWeight(_LossWeight):
    """gamma SNR / (gamma + SNR) in x0 space (k-diffusion)."""

    type: Literal["soft_min_snr"] = Field(default="soft_min_snr", description="Min-SNR without its corner.")
    gamma: Positive = Field(default=5.0, description="The most an error of x0 can count.")


class DebiasedLossWeight(_LossWeight):
    """sqrt(SNR) in x0 space (Yu et al. 2023)."""

    type: Literal["debiased"] = Field(default="debiased", description="Weight sqrt(SNR) in x0 space, for every head.")


class DebiasedKohyaLossWeight(_LossWeight):
    """Debiased estimation as sd-scripts computes it."""

    type: Literal["debiased_kohya"] = Field(
        default="debiased_kohya", description="As sd-scripts: for v it is the plain loss on x0."
    )


class P2LossWeight(_LossWeight):
    """SNR / (k + SNR)^gamma in x0 space (Choi et al. 2022)."""

    type: Literal["p2"] = Field(default="p2", description="Weight SNR / (k + SNR)^gamma in x0 space.")
    k: Positive = Field(default=1.0, description="SNR around which the weight turns.")
    gamma: float = Field(
        default=1.0, ge=0, le=10, description="How hard low noise is held down; 0 is epsilon's own weight."
    )


class TruncatedSnrLossWeight(_LossWeight):
    """max(SNR, 1) in x0 space (Salimans & Ho 2022)."""

    type: Literal["snr_trunc"] = Field(default="snr_trunc", description="Weight max(SNR, 1) in x0 space.")


class SigmoidLossWeight(_LossWeight):
    """sigmoid(bias - ln SNR) on epsilon under uniform ln SNR (Kingma & Gao 2023)."""

    type: Literal["sigmoid"] = Field(default="sigmoid", description="sigmoid(bias - ln SNR) per ln SNR, on epsilon.")
    bias: float = Field(
        default=0.0, ge=-50, le=50, description="ln SNR at which the sigmoid is one half; 0 is no recommendation."
    )


class EdmLossWeight(_LossWeight):
    """SNR + 1 / sigma_data^2 in x0 space (Karras et al. 2022)."""

    type: Literal["edm"] = Field(default="edm", description="Weight SNR + 1 / sigma_data^2 in x0 space.")
    sigma_data: SigmaData = Field(default=0.5, description="Standard deviation of the data; 1 is v-prediction's own.")


class CosMapLossWeight(_LossWeight):
    """2 / (pi (1 - 2 t + 2 t^2)) on the flow velocity."""

    type: Literal["cosmap"] = Field(default="cosmap", description="The cosmap density as a weight on the velocity.")


class LearnedLossWeight(Section):
    """exp(-u(sigma)), u learned beside the network (Karras et al. 2024, EDM2)."""

    type: Literal["learned"] = Field(
        default="learned", description="Every level brings itself to unit expected loss by a learned log-variance."
    )
    learning_rate: float = Field(default=1e-2, gt=0, le=1, description="Peak learning rate of the log-variance alone.")


# --- loss shape, noise, coupling -------------------------------------------------------------------------------------


class MeanSquaredShape(Section):
    """error^2."""

    type: Literal["mse"] = Field(default="mse", description="The squared error.")


class AbsoluteShape(Section):
    """|error|."""

    type: Literal["l1"] = Field(default="l1", description="The absolute error.")


class _Threshold(Section):
    threshold: Positive = Field(default=0.1, description="Error beyond which the loss grows linearly, at pure noise.")
    schedule: Literal["constant", "exponential", "snr"] = Field(
        default="snr", description="Threshold over the noise level; all but constant rise to 1 where it is clean."
    )


class PseudoHuberShape(_Threshold):
    """2 c (sqrt(error^2 + c^2) - c) (Khrapov et al. 2024)."""

    type: Literal["pseudo_huber"] = Field(default="pseudo_huber", description="Squared below the threshold, smooth.")


class SmoothL1Shape(_Threshold):
    """error^2 below the threshold, linear beyond."""

    type: Literal["smooth_l1"] = Field(default="smooth_l1", description="Squared below the threshold, linear beyond.")


class NoiseShape(Section):
    """Additions to standard normal noise; 0 is off."""

    offset: float = Field(
        default=0.0, ge=0, le=10, description="Extra noise per channel as a whole; SDXL was finished at 0.05."
    )
    pyramid: float = Field(default=0.0, ge=0, lt=1, description="Extra noise at half, quarter, ... resolution.")
    input_perturbation: float = Field(
        default=0.0, ge=0, le=10, description="Extra noise in the input that is not in the target."
    )


class IndependentCoupling(Section):
    """Each picture keeps the noise that was drawn for it."""

    type: Literal["independent"] = Field(default="independent", description="Each picture keeps its own noise.")


class OptimalTransportCoupling(Section):
    """Minibatch optimal transport (Pooladian et al. 2023; Tong et al. 2023)."""

    type: Literal["optimal_transport"] = Field(
        default="optimal_transport", description="Noises of the global batch go to the nearest pictures."
    )


class ConditionalTransportCoupling(Section):
    """Optimal transport that prefers partners of like captions (after Cheng & Schwing 2025)."""

    type: Literal["conditional_transport"] = Field(
        default="conditional_transport", description="The same, but rather between pictures of like captions."
    )
    strength: float = Field(
        default=4.0, ge=0, le=1e6, description="Cost of unlike tags in standard deviations of the distance."
    )


class NearestOfCoupling(Section):
    """The nearest of several noises (Li et al. 2025, "Improved Immiscible Diffusion")."""

    type: Literal["nearest_of"] = Field(
        default="nearest_of", description="Of several noises the nearest is kept; it is no longer normal."
    )
    draws: int = Field(default=4, ge=2, description="Noises drawn for each picture.")


Objective = Epsilon | VPrediction | CleanPrediction | FlowMatching | Edm
LossWeight = (
    NoLossWeight
    | MinSnrLossWeight
    | SoftMinSnrLossWeight
    | DebiasedLossWeight
    | DebiasedKohyaLossWeight
    | P2LossWeight
    | TruncatedSnrLossWeight
    | SigmoidLossWeight
    | EdmLossWeight
    | CosMapLossWeight
    | LearnedLossWeight
)
LossShape = MeanSquaredShape | AbsoluteShape | PseudoHuberShape | SmoothL1Shape
Coupling = IndependentCoupling | OptimalTransportCoupling | ConditionalTransportCoupling | NearestOfCoupling


def trains_pure_noise(objective: Objective) -> bool:
    """Whether levels of SNR 0, or as near to it as one likes, are part of the objective's path."""
    if isinstance(objective, (VPrediction, CleanPrediction)):
        return objective.zero_terminal_snr
    return isinstance(objective, (FlowMatching, Edm))


def min_snr_terminal(objective: Objective, weight: MinSnrLossWeight) -> Terminal:
    """Return the chosen terminal policy, or the one that null stands for.

    The published formula gives SNR 0 no weight, so it is not used where that level is trained.
    """
    if weight.terminal is not None:
        return weight.terminal
    return "plus_one" if trains_pure_noise(objective) else "official"
