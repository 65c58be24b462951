"""Objective, levels, weights and noise in the configuration: presets, what is refused by name, what is noted."""

from itertools import product
from pathlib import Path
from typing import get_args

import pytest
import torch

from sdxl_training.assemble.objective import build_coupling, build_noise, build_objective
from sdxl_training.config import ConfigError, load_config, notes, write_resolved
from sdxl_training.config.levels import LevelDensity, LevelShift
from sdxl_training.config.objective import Coupling, LossShape, LossWeight, Objective, Preset, trains_pure_noise
from sdxl_training.config.presets import PRESETS
from sdxl_training.objectives.densities import DENSITIES
from sdxl_training.objectives.objective import OBJECTIVES
from sdxl_training.objectives.shapes import SHAPES
from sdxl_training.objectives.shifts import SHIFTS
from sdxl_training.objectives.weights import WEIGHTS
from sdxl_training.records import UserError

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SOURCES = "data:\n  sources:\n    - path: pictures\n"
FILLED_FIRST = "data.cache.mode=first"
LONE = (FILLED_FIRST, "training.batch_size=1")


def types_of(family):
    return [option.model_fields["type"].default for option in get_args(family)]


def load(tmp_path, *overrides, text=SOURCES):
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def the_problem(tmp_path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides)
    (problem,) = caught.value.problems
    return problem


# --- the tables ------------------------------------------------------------------------------------------------------


def test_schema_and_tables_name_the_same_things():
    """Each family is one visible table; a row that no file can name, or a name without a row, is a mistake."""
    assert set(types_of(Objective)) == set(OBJECTIVES)
    assert set(types_of(LevelDensity)) == {*DENSITIES, "adaptive"}
    assert set(types_of(LevelShift)) == set(SHIFTS)
    assert set(types_of(LossWeight)) == {*WEIGHTS, "learned"}
    assert set(types_of(LossShape)) == set(SHAPES)
    assert set(get_args(Preset)) == set(PRESETS)


OBJECTIVE_SETTINGS = [
    *(f"{{type: {name}}}" for name in types_of(Objective)),
    "{type: flow_matching, mode: raw}",
    "{type: edm, label: c_noise, sigma_data: 0.5}",
    "{type: x0, zero_terminal_snr: true}",
]


@pytest.mark.parametrize("objective", OBJECTIVE_SETTINGS)
def test_every_combination_is_built_or_refused_by_name(tmp_path, objective):
    for density, weight in product(types_of(LevelDensity), types_of(LossWeight)):
        overrides = (f"training.objective={objective}", f"training.level_density={{type: {density}}}")
        try:
            loaded = load(tmp_path, *overrides, f"training.loss_weight={{type: {weight}}}")
        except ConfigError as refused:
            assert weight == "debiased_kohya"
            (problem,) = refused.problems
            assert "use debiased" in problem.text
            continue
        built = build_objective(loaded.config, CPU)
        levels = built.path.at(built.density.log_sigma(torch.tensor([0.3], dtype=torch.float64), built.path))
        assert built.loss_weight.weight(built.head, levels.a_B, levels.b_B).isfinite().all()


@pytest.mark.parametrize("coupling", types_of(Coupling))
def test_couplings_are_built(tmp_path, coupling):
    config = load(tmp_path, FILLED_FIRST, f"training.coupling={{type: {coupling}}}").config
    assert (build_coupling(config) is None) == (coupling in ("independent", "nearest_of"))
    assert build_noise(config).nearest_of == (4 if coupling == "nearest_of" else 1)


@pytest.mark.parametrize("mode", ["ahead", "none"])
@pytest.mark.parametrize("coupling", sorted(set(types_of(Coupling)) - {"independent"}))
def test_a_coupling_needs_the_cache_filled_first(tmp_path, coupling, mode):
    problem = the_problem(tmp_path, f"data.cache.mode={mode}", f"training.coupling={{type: {coupling}}}")
    assert problem.place == "training.coupling.type"
    assert f"set data.cache.mode: first (it is {mode})" in problem.text


@pytest.mark.parametrize("shift", ["{type: none}", "{type: fixed, factor: 4}", "{type: per_bucket, factor: 2}"])
def test_normalised_weights_know_the_shift(tmp_path, shift):
    """The mean is 1 under the levels that are really drawn, for square pictures of data.resolution."""
    overrides = ("training.objective.type=flow_matching", f"training.level_shift={shift}")
    config = load(tmp_path, *overrides, "training.loss_weight={type: min_snr, normalise: true}").config
    built = build_objective(config, CPU)
    uniform = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_sigma = built.density.log_sigma(uniform, built.path) + built.shift.log_factor((1024, 1024))
    levels = built.path.at(log_sigma.clamp(*built.path.log_sigma_range))
    weights = built.loss_weight.weight(built.head, levels.a_B, levels.b_B)
    assert float(weights.double().mean()) == pytest.approx(1.0, abs=0.01)


# --- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_is_written_out_in_the_resolved_file(tmp_path, preset):
    loaded = load(tmp_path, text=f"{SOURCES}training: {{preset: {preset}}}\n")
    for section, values in PRESETS[preset].items():
        for key, value in values.items() if isinstance(values, dict) else ():
            assert getattr(getattr(loaded.config.training, section), key) == value
            assert loaded.origins[f"training.{section}.{key}"] == f"preset {preset}"
    resolved = tmp_path / "config.resolved.yaml"
    write_resolved(loaded, resolved)
    assert f"  # preset {preset}" in resolved.read_text(encoding="utf-8")
    assert load_config(resolved).config == loaded.config
    build_objective(loaded.config, CPU)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("how", ["in the file", "by --set"])
def test_a_preset_means_the_same_over_any_base(tmp_path, preset, how):
    """Also over a base that spells every setting out, as src/config.yaml does, and over another preset."""
    for base in (ROOT / "src" / "config.yaml", ROOT / "examples" / "miniature.yaml", tmp_path / "other.yaml"):
        (tmp_path / "other.yaml").write_text(f"{SOURCES}training: {{preset: sd3_flow, noise: {{offset: 0.1}}}}\n")
        line = f"training: {{preset: {preset}}}\n" if how == "in the file" else ""
        overrides = () if line else (f"training.preset={preset}",)
        training = load(tmp_path, *overrides, text=f"base: {base}\n{SOURCES}{line}").config.training
        for section, values in PRESETS[preset].items():
            for key, value in values.items() if isinstance(values, dict) else ():
                assert getattr(getattr(training, section), key) == value, (base, section, key)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_train_what_their_preset_says(example):
    training = load_config(example, ["data.sources=[{path: x}]"]).config.training
    if training.preset:
        for section, values in PRESETS[training.preset].items():
            for key, value in values.items() if isinstance(values, dict) else ():
                assert getattr(getattr(training, section), key) == value


def test_the_configured_terminal_policy_is_built(tmp_path):
    assert build_objective(load(tmp_path, "training.preset=nai_v3").config, CPU).loss_weight.terminal == "plus_one"


def test_what_a_file_says_lies_over_the_preset(tmp_path):
    text = f"{SOURCES}training:\n  preset: nai_v3\n  loss_weight: {{gamma: 3.0}}\n  level_density: {{type: mode}}\n"
    training = load(tmp_path, "training.objective.zero_terminal_snr=false", text=text).config.training
    assert (training.loss_weight.gamma, training.loss_weight.terminal) == (3.0, "plus_one")
    assert training.level_density.type == "mode"
    assert training.objective.zero_terminal_snr is False
    assert training.preset == "nai_v3"


def test_a_preset_may_come_from_the_command_line(tmp_path):
    assert load(tmp_path, "training.preset=nyaflow").config.training.objective.mode == "raw"


def test_an_unknown_preset_lists_the_names(tmp_path):
    problem = the_problem(tmp_path, "training.preset=novelai")
    assert (problem.place, "nai_v3" in problem.text) == ("training.preset", True)


# --- refusals and notes ----------------------------------------------------------------------------------------------

V_ZT = "training.objective={type: v_prediction}"
V = "training.objective={type: v_prediction, zero_terminal_snr: false}"
FLOW = "training.objective={type: flow_matching}"


@pytest.mark.parametrize(
    ("overrides", "place", "words"),
    [
        (["training.level_density={type: karras, sigma_min: 5, sigma_max: 5}"], "level_density.sigma_min", "below"),
        (["training.level_density={type: karras, sigma_max: 80}"], "level_density.sigma_max", "at most 14.6146"),
        (["training.level_density={type: karras, sigma_min: 0.002}"], "level_density.sigma_min", "at least 0.029"),
        (["training.level_density={type: histogram, bars: [0, 0, 0]}"], "level_density.bars", "above 0 and finite"),
        (["training.level_density={type: histogram, bars: [1, -1]}"], "level_density.bars.1", "at least 0"),
        (["training.level_density={type: histogram, bars: [1, .nan]}"], "level_density.bars.1", "a number"),
        (["training.level_density={type: histogram, bars: [1.0e+308, 1.0e+308]}"], "level_density.bars", "finite"),
        (
            ["training.level_density={type: adaptive, base: {type: histogram, bars: [0, 0]}}"],
            "level_density.base.bars",
            "above 0 and finite",
        ),
        (
            ["training.level_density={type: histogram, bars: [1, 0]}", "training.loss_weight={type: sigmoid}"],
            "loss_weight.type",
            "empty bars",
        ),
        (["training.level_density={type: mode, scale: 2}"], "level_density.scale", "from -1"),
        (["training.level_density={type: logit_norml}"], "level_density.type", "did you mean logit_normal"),
        ([FLOW, "training.level_shift={type: fixed, factor: 0}"], "level_shift.factor", "above 0"),
        ([FLOW, "training.level_density={type: karras, sigma_max: 1.0e+9}"], "level_density.sigma_max", "from 0.0001"),
        (["training.level_density={type: karras, rho: 0.001}"], "level_density.rho", "from 0.1"),
        (["training.loss_weight={type: sigmoid, bias: 1000}"], "loss_weight.bias", "from -50"),
        (
            [FLOW, "training.level_shift={type: per_bucket}", "training.loss_weight={type: sigmoid}"],
            "loss_weight.type",
            "use a fixed shift",
        ),
        (["training.level_shift={type: fixed}"], "level_shift.type", "14.6"),
        ([V, "training.level_shift={type: per_bucket}"], "level_shift.type", "zero_terminal_snr: true"),
        ([FLOW, "training.loss_weight={type: debiased_kohya}"], "loss_weight.type", "use debiased"),
        (
            ["training.loss_weight={type: min_snr, terminal: plus_one}"],
            "loss_weight.terminal",
            "not defined for epsilon",
        ),
        (
            [V, "training.loss_weight={type: min_snr, terminal: official_patched}"],
            "loss_weight.terminal",
            "has no effect",
        ),
        ([V_ZT, FILLED_FIRST, "training.coupling={type: nearest_of}"], "coupling.type", "leans toward the picture"),
        ([FLOW, FILLED_FIRST, "training.coupling={type: nearest_of}"], "coupling.type", "leans toward the picture"),
        (
            ["training.objective={type: flow_matching, mode: raw, zero_terminal_snr: false}"],
            "objective.zero_terminal_snr",
            "has no effect",
        ),
        (
            ["training.objective={type: edm, label: c_noise, zero_terminal_snr: true}"],
            "objective.zero_terminal_snr",
            "has no effect",
        ),
        (["training.objective={type: edm, sigma_data: 0}"], "objective.sigma_data", "from 0.001"),
        (["training.loss_shape={type: huber}"], "loss_shape.type", "must be l1, mse, pseudo_huber"),
        (["training.noise.pyramid=1"], "noise.pyramid", "below 1"),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path, overrides, place, words):
    problem = the_problem(tmp_path, *overrides)
    assert problem.place == f"training.{place}"
    assert words in problem.text
    assert str(problem.origin) == "--set"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([V_ZT, "training.loss_weight={type: min_snr, terminal: official}"], "plus_one trains it"),
        ([V_ZT, "training.loss_weight={type: debiased}"], "hardly trained"),
        ([FLOW, "training.loss_weight={type: soft_min_snr}"], "hardly trained"),
        ([V_ZT, "training.noise.offset=0.05"], "cure the same thing"),
        ([FLOW, "training.noise.pyramid=0.3"], "cure the same thing"),
        (["training.level_density={type: logit_normal}"], "0.4% of its levels are noisier"),
        (["training.level_density={type: log_normal_sigma}"], "2.6% of its levels are cleaner"),
        ([V_ZT, "training.level_density={type: log_normal_sigma}"], "2.6% of its levels are cleaner"),
        (["training.level_density={type: adaptive, base: {type: cosmap}}"], "4.3%"),
        ([*LONE, "training.coupling={type: optimal_transport}"], "no noise to exchange"),
        ([*LONE, "training.coupling={type: conditional_transport}"], "no noise to exchange"),
        (["training.batch_size=1", "training.stratified_levels=true"], "changes nothing"),
    ],
)
def test_what_is_doubtful_is_noted(tmp_path, overrides, words):
    assert words in " ".join(notes(load(tmp_path, *overrides).config))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_give_no_reason_for_a_note(tmp_path, preset):
    assert notes(load(tmp_path, f"training.preset={preset}").config) == []


def test_pure_noise_is_trained_exactly_where_the_path_gets_there(tmp_path):
    """The rules in the schema, which cannot import torch, and the paths agree."""
    for objective in OBJECTIVE_SETTINGS:
        config = load(tmp_path, f"training.objective={objective}").config
        highest = build_objective(config, CPU).path.log_sigma_range[1]
        assert trains_pure_noise(config.training.objective) == (highest > 9)


def test_a_weight_without_a_mean_cannot_be_normalised(tmp_path):
    """Min-SNR as published gives SNR 0 no weight, and here nothing else is trained."""
    bars = ", ".join(["0"] * 999 + ["1"])
    overrides = (V_ZT, f"training.level_density={{type: histogram, bars: [{bars}]}}")
    weight = "training.loss_weight={type: min_snr, terminal: official, normalise: true}"
    with pytest.raises(UserError, match="cannot be brought to 1"):
        build_objective(load(tmp_path, *overrides, weight).config, CPU)
