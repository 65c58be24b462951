"""Draw the plots of objectives.md from the trainer's own code: no formula is written down here a second time.

    python docs/plot_objectives.py      # needs the extra `benchmarks`; writes docs/images/objectives_*.png

Shape legend: N points of a curve, T = 1000 timesteps, S steps of a sampler.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sdxl_training.assemble.objective import build_objective
from sdxl_training.config import load_config
from sdxl_training.objectives.densities import (
    CosMap,
    Karras,
    LevelDensity,
    LogNormal,
    Mode,
    Uniform,
)
from sdxl_training.objectives.grids import Grid, Linear, Native, Trailing
from sdxl_training.objectives.grids import Karras as KarrasGrid
from sdxl_training.objectives.heads import FlowVelocityHead, VelocityHead
from sdxl_training.objectives.objective import Objective
from sdxl_training.objectives.paths import (
    EDMPath,
    FlowPath,
    NoisePath,
    PreconditionedFlowPath,
    VariancePreservingPath,
)
from sdxl_training.objectives.weights import (
    P2,
    CosMapWeight,
    Debiased,
    EDMWeight,
    LossWeight,
    MinSNR,
    NoWeight,
    Problem,
    Sigmoid,
    SoftMinSNR,
    TerminalPolicy,
    TruncatedSNR,
)

IMAGES = Path(__file__).parent / "images"
WIDTH_IN, DPI, COLOURS_KEPT = 9.6, 150, 96
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a6d00", "#7f7f7f")
PRESETS = ("sdxl_base", "nai_v3", "edm", "nyaflow", "sd3_flow")
PLAIN, ZERO_TERMINAL = VariancePreservingPath(False), VariancePreservingPath(True)
TIMESTEP_T = torch.arange(1000)
Curve = tuple[NDArray[numpy.float64], NDArray[numpy.float64]]


# --- what is plotted -------------------------------------------------------------------------------------------------


def density_curve(density: LevelDensity, path: NoisePath, log_shift: float = 0.0) -> Curve:
    """Return (ln sigma, probability per unit of it): the slope of the distribution function, by differences."""
    uniform_N = (torch.arange(999, dtype=torch.float64) + 0.5) / 999
    log_sigma_N = density.log_sigma(uniform_N, _without_stairs(path)) + log_shift
    log_sigma, uniform = log_sigma_N.numpy(), uniform_N.numpy()
    inside = numpy.isfinite(log_sigma)
    return log_sigma[inside], numpy.gradient(uniform[inside], log_sigma[inside])


def _without_stairs(path: NoisePath) -> NoisePath:
    """Return a path whose clock ticks in fractions of SDXL's timesteps, where `path` has a thousand levels."""
    stairs = isinstance(path, VariancePreservingPath) and not isinstance(path, PreconditionedFlowPath)
    return EDMPath(1.0, "timestep", path.zero_terminal_snr) if stairs else path


def weight_on_v(objective: Objective, log_sigma_N: Tensor) -> NDArray[numpy.float64]:
    """Return what the objective's weight is as a weight on the squared error of v, whatever its head predicts."""
    if not isinstance(objective.loss_weight, NoWeight):
        return _on_v(objective.loss_weight, log_sigma_N)
    a_N, b_N = (value_N.double() for value_N in _signal_and_noise(log_sigma_N))
    return VelocityHead().native_weight(objective.head.own_b2_weight(a_N, b_N), a_N, b_N).numpy()


def preset_objective(preset: str) -> Objective:
    """Return the objective that a configuration with nothing but this preset trains."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preset.yaml"
        path.write_text(f"training: {{preset: {preset}}}\ndata: {{sources: [{{path: pictures}}]}}\n", encoding="utf-8")
        return build_objective(load_config(path).config, torch.device("cpu"))


def preset_curve(preset: str) -> Curve:
    """Return (ln sigma, density times weight on v), with area 1: how much each level counts in expectation."""
    objective = preset_objective(preset)
    log_sigma, density = density_curve(objective.density, objective.path, objective.shift.log_factor((1024, 1024)))
    product = density * weight_on_v(objective, torch.from_numpy(log_sigma))
    return log_sigma, product / numpy.trapezoid(product, log_sigma)


# --- the figures -----------------------------------------------------------------------------------------------------


def plot_densities() -> Figure:
    """Draw the densities by name, and what the presets make of density and weight together."""
    figure, (by_name, by_preset) = _figure(3.9, 1, 2)
    flow = FlowPath()
    curves: Mapping[str, Curve] = {
        "uniform: SDXL timesteps": density_curve(Uniform(), PLAIN),
        "uniform: flow time": density_curve(Uniform(), flow),
        "logit_normal 0, 1": density_curve(LogNormal(0.0, 1.0), flow),
        "logit_normal 0, 1, shift 3": density_curve(LogNormal(0.0, 1.0), flow, float(numpy.log(3.0))),
        "log_normal_sigma -1.2, 1.2": density_curve(LogNormal(-1.2, 1.2), flow),
        "mode 1.29": density_curve(Mode(1.29), flow),
        "cosmap": density_curve(CosMap(), flow),
        "karras, rho 7": density_curve(Karras(0.0291672, 14.6146412, 7.0), flow),
    }
    _draw_curves(by_name, curves)
    by_name.set(title="How often a level is drawn", ylabel="probability per unit of ln σ", ylim=(0, 1))
    _draw_curves(by_preset, {preset: preset_curve(preset) for preset in PRESETS})
    by_preset.set(title="How much it counts: density × weight on v, area 1", ylim=(0, 0.55))
    for axes in (by_name, by_preset):
        _log_sigma_axis(axes, top="flow time t = σ / (1 + σ)")
        axes.legend(loc="upper left", handlelength=1.6)
    return figure


def plot_weights() -> Figure:
    """Draw the weights on v over ln sigma, and Min-SNR's four answers to SNR 0 over the timestep."""
    figure, (schemes, policies) = _figure(4.2, 1, 2)
    log_sigma_N = torch.linspace(-5.2, 5.2, 600, dtype=torch.float64)
    named: Mapping[str, LossWeight] = {
        "none (v)": NoWeight(),
        "min_snr 5, official": MinSNR(5.0, "official"),
        "min_snr 5, plus_one": MinSNR(5.0, "plus_one"),
        "soft_min_snr 5": SoftMinSNR(5.0),
        "debiased": Debiased(),
        "p2, k 1, gamma 1": P2(1.0, 1.0),
        "snr_trunc": TruncatedSNR(),
        "edm, sigma_data 0.5": EDMWeight(0.5),
        "cosmap": CosMapWeight(),
    }
    _draw_curves(schemes, {name: (log_sigma_N.numpy(), _on_v(weight, log_sigma_N)) for name, weight in named.items()})
    flow = NoWeight().weight(FlowVelocityHead(), *_signal_and_noise(log_sigma_N))
    schemes.plot(log_sigma_N, flow, color=COLOURS[0], ls="--", label="none (flow)")
    table_T = PLAIN.table.log_sigma_T
    sigmoid = Sigmoid(Problem(PLAIN, VelocityHead(), Uniform()), bias=0.0)
    schemes.plot(table_T, _on_v(sigmoid, table_T), color="black", ls=":", label="sigmoid 0, timesteps")
    schemes.set(title="Weight on the squared error of v", ylabel="weight", ylim=(0, 4.3))
    _log_sigma_axis(schemes, top="ln SNR = -2 ln σ")
    schemes.set_xlim(-8.2, 5.2)
    schemes.legend(loc="upper left", handlelength=1.5)
    _plot_policies(policies)
    return figure


def _plot_policies(axes: Axes) -> None:
    log_sigma_T = ZERO_TERMINAL.table.log_sigma_T
    drawn: tuple[tuple[TerminalPolicy, str, str, float], ...] = (
        ("official", "official", COLOURS[1], 3.2),
        ("floor", "floor, minimum 0.01", COLOURS[7], 1.4),
        ("plus_one", "plus_one", COLOURS[2], 1.8),
    )
    for terminal, label, colour, width in drawn:
        weight_T = _on_v(MinSNR(5.0, terminal, 0.01), log_sigma_T)
        seen = weight_T > 0
        axes.semilogy(TIMESTEP_T[seen], weight_T[seen], color=colour, lw=width, label=label)
    patched_T = _on_v(MinSNR(5.0, "official_patched"), log_sigma_T)
    axes.semilogy([999], patched_T[-1:], "D", color=COLOURS[3], ms=6, label="official_patched: official, but 1 at 999")
    axes.annotate("official: exactly 0\nat timestep 999", (998, 3e-7), (530, 5e-7), arrowprops={"arrowstyle": "->"})
    axes.set(title="min_snr 5 on v, zero terminal SNR", xlabel="timestep", ylim=(1e-7, 8), xlim=(-10, 1020))
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 0.25))


def plot_schedules() -> Figure:
    """Draw SDXL's table plain and rescaled, the labels of flow times, and the grids pictures are drawn through."""
    figure, (signal, sigma, labels, grids) = _figure(7.2, 2, 2)
    for path, name, colour in ((PLAIN, "plain", COLOURS[1]), (ZERO_TERMINAL, "zero terminal SNR", COLOURS[0])):
        signal.plot(TIMESTEP_T, path.table.alphas_bar_T.sqrt(), color=colour, label=name)
        log_sigma_T = path.table.finite_T
        sigma.semilogy(TIMESTEP_T[: len(log_sigma_T)], log_sigma_T.exp(), color=colour, label=name)
    ends = [float(path.table.alphas_bar_T[-1].sqrt()) for path in (PLAIN, ZERO_TERMINAL)]
    signal.annotate(f"ends at {ends[0]:.3f}", (999, ends[0]), (730, 0.42), arrowprops={"arrowstyle": "->"})
    signal.annotate(f"ends at {ends[1]:g}", (999, ends[1]), (640, -0.045), arrowprops={"arrowstyle": "->"})
    signal.set(title="Signal left: a = √ᾱ", xlabel="timestep", ylim=(-0.07, 1.03))
    end = float(PLAIN.table.log_sigma_T[-1].exp())
    last = float(ZERO_TERMINAL.table.finite_T[-1].exp())
    sigma.annotate(f"ends at {end:.2f}", (999, end), (560, 60), arrowprops={"arrowstyle": "->"})
    sigma.annotate(f"{last:.0f} at 998, then ∞", (998, last), (330, 1100), arrowprops={"arrowstyle": "->"})
    sigma.set(title="Noise level: σ = b / a", xlabel="timestep")
    _plot_labels(labels)
    _plot_grids(grids)
    for axes in (signal, sigma, labels):
        axes.legend(loc="lower left" if axes is signal else "lower right" if axes is sigma else "upper left")
    return figure


def _plot_labels(axes: Axes) -> None:
    time_N = torch.linspace(0.0005, 0.9995, 800, dtype=torch.float64)
    paths: Mapping[str, NoisePath] = {
        "raw: 1000 t": FlowPath(),
        "preconditioned, plain table": PreconditionedFlowPath(False),
        "preconditioned, zero terminal SNR": PreconditionedFlowPath(True),
    }
    for (name, path), colour in zip(paths.items(), (COLOURS[6], COLOURS[1], COLOURS[0]), strict=True):
        axes.plot(time_N, path.at(torch.logit(time_N)).label_B, color=colour, label=name)
    axes.set(title="Label the network reads in flow matching", xlabel="flow time t", ylabel="label", ylim=(-30, 1240))


def _plot_grids(axes: Axes, steps: int = 28) -> None:
    rows: tuple[tuple[str, Grid, NoisePath, str], ...] = (
        ("native, zero terminal", Native(), ZERO_TERMINAL, COLOURS[0]),
        ("trailing, zero terminal", Trailing(), ZERO_TERMINAL, COLOURS[0]),
        ("trailing, plain", Trailing(), PLAIN, COLOURS[1]),
        ("karras, plain", KarrasGrid(), PLAIN, COLOURS[1]),
        ("linear", Linear(), FlowPath(), COLOURS[6]),
        ("linear, shift 3", Linear(3.0), FlowPath(), COLOURS[6]),
    )
    far_right = 6.0
    for height, (name, grid, path, colour) in enumerate(rows):
        log_sigma_S = grid.log_sigma(path, steps).numpy()
        finite = numpy.isfinite(log_sigma_S)
        axes.plot(log_sigma_S[finite], numpy.full(finite.sum(), height), "o", color=colour, ms=3.6, alpha=0.75)
        if not finite.all():
            axes.plot([far_right], [height], ">", color=colour, ms=6)
        axes.text(-4.1, height - 0.3, name, fontsize=8.5, color=colour)
    axes.set_yticks([])
    axes.set(title=f"Levels of a picture in {steps} steps (▸: σ = ∞)", xlabel="ln σ", xlim=(-4.3, far_right + 0.4))
    axes.set_ylim(len(rows) - 0.6, -0.75)


# --- how it is drawn -------------------------------------------------------------------------------------------------


def _figure(height_in: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained", facecolor="white")
    panels: list[Axes] = [*figure.subplots(rows, columns).flat]
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _draw_curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    for (name, (x, y)), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot(x, y, color=colour, lw=1.6, label=name)


def _log_sigma_axis(axes: Axes, top: str) -> None:
    """Write ln sigma below, another measure of it above, and mark where SDXL's plain table ends."""
    axes.set(xlabel="ln σ   (dotted: ends of SDXL's table)", xlim=(-5.2, 5.2))
    for end in PLAIN.log_sigma_range:
        axes.axvline(end, color="grey", ls=":", lw=1, zorder=0)
    upper = axes.secondary_xaxis("top")
    upper.set_xlabel(top, fontsize=8.5)
    if "SNR" in top:
        ticks = [-6, -4, -2, 0, 2, 4]
        upper.set_xticks(ticks, [f"{-2 * tick}" for tick in ticks], fontsize=8)
        return
    times = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
    upper.set_xticks([float(torch.logit(torch.tensor(t))) for t in times], [f"{t:g}" for t in times], fontsize=8)


def _signal_and_noise(log_sigma_N: Tensor) -> tuple[Tensor, Tensor]:
    levels = ZERO_TERMINAL.at(log_sigma_N)
    return levels.a_B, levels.b_B


def _on_v(weight: LossWeight, log_sigma_N: Tensor) -> NDArray[numpy.float64]:
    return weight.weight(VelocityHead(), *_signal_and_noise(log_sigma_N)).double().numpy()


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of few colours: a third of the size, and no difference to the eye."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    Image.open(drawn).convert("RGB").quantize(COLOURS_KEPT).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Write the three files."""
    IMAGES.mkdir(exist_ok=True)
    figures = {"densities": plot_densities, "weights": plot_weights, "schedules": plot_schedules}
    matplotlib.rc("font", size=9.5)
    matplotlib.rc("axes", titlesize=10.5)
    matplotlib.rc("legend", fontsize=8.5)
    for name, draw in figures.items():
        save(draw(), IMAGES / f"objectives_{name}.png")


if __name__ == "__main__":
    main()
