"""Loading: bases, overrides, origins, filled-in choices, and the resolved file."""

import pytest

from sdxl_training.config import ConfigError, load_config, write_resolved
from sdxl_training.config.levels import LogitNormalDensity
from sdxl_training.config.objective import Epsilon, FlowMatching, NoLossWeight
from sdxl_training.config.schema import AdamW, Config
from sdxl_training.records import UserError

SOURCES = "data:\n  sources:\n    - path: pictures\n"


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="my.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def test_a_source_is_all_that_is_needed(write):
    loaded = load_config(write(SOURCES))
    assert loaded.config.training.optimizer == AdamW()
    assert loaded.origins["data.sources.0.path"] == "my.yaml:3"
    assert loaded.origins["data.sources.0.repeats"] == "default"
    assert loaded.origins["training.optimizer.betas"] == "default"


def test_a_family_without_type_keeps_the_default_type(write):
    config = load_config(write(SOURCES + "training:\n  optimizer: {learning_rate: 1e-4}\n")).config
    assert config.training.optimizer == AdamW(learning_rate=1e-4)


def test_bases_chain_by_key_and_lists_replace(write):
    write("training: {batch_size: 7, max_steps: 900}\ndata: {sources: [{path: a}, {path: b}]}\n", "deep/first.yaml")
    write("base: deep/first.yaml\ntraining:\n  max_steps: 800\n", "second.yaml")
    loaded = load_config(write("base: second.yaml\n" + SOURCES))
    assert loaded.config.training.batch_size == 7
    assert loaded.config.training.max_steps == 800
    assert [source.path for source in loaded.config.data.sources] == ["pictures"]
    assert loaded.origins["training.batch_size"] == "deep/first.yaml:1"
    assert loaded.origins["training.max_steps"] == "second.yaml:3"
    assert loaded.origins["data.sources.0.path"] == "my.yaml:4"


def test_a_family_of_another_type_replaces_the_base_s(write):
    write(SOURCES + "training:\n  objective: {type: v_prediction, zero_terminal_snr: false}\n", "base.yaml")
    config = load_config(write("base: base.yaml\ntraining: {objective: {type: epsilon}}")).config
    assert config.training.objective == Epsilon()


def test_circles_of_bases_are_refused(write):
    write("base: my.yaml\n", "other.yaml")
    with pytest.raises(ConfigError, match=r"other.yaml:1 +base = my.yaml +goes round in a circle"):
        load_config(write("base: other.yaml\n" + SOURCES))


@pytest.mark.parametrize("flipped", [False, True])
def test_set_does_not_depend_on_order(write, flipped):
    overrides = [
        "training.level_density={type: logit_normal}",
        "training.level_density.mean=0.5",
        "training.objective.type=flow_matching",
        "training.loss_weight.type=none",
        "data.sources.1.path=more",
        "training.optimizer.betas.0=0.8",
        "global_config.run_name='7'",
    ]
    loaded = load_config(write(SOURCES), overrides[::-1] if flipped else overrides)
    training = loaded.config.training
    assert training.level_density == LogitNormalDensity(mean=0.5)
    assert (training.objective, training.loss_weight) == (FlowMatching(), NoLossWeight())
    assert [source.path for source in loaded.config.data.sources] == ["pictures", "more"]
    assert training.optimizer.betas == (0.8, 0.999)
    assert loaded.config.global_config.run_name == "7"
    assert loaded.origins["training.level_density.mean"] == "--set"
    assert loaded.origins["training.optimizer.betas"] == "--set"
    assert loaded.origins["data.sources.0.path"] == "my.yaml:3"


@pytest.mark.parametrize(
    ("objective", "terminal", "expected"),
    [
        ("{type: v_prediction}", "null", "plus_one"),
        ("{type: v_prediction, zero_terminal_snr: false}", "null", "official"),
        ("{type: epsilon}", "null", "official"),
        ("{type: flow_matching}", "null", "plus_one"),
        ("{type: v_prediction}", "official_patched", "official_patched"),
    ],
)
def test_the_terminal_policy_is_written_out(write, objective, terminal, expected):
    text = f"{SOURCES}training: {{objective: {objective}, loss_weight: {{type: min_snr, terminal: {terminal}}}}}\n"
    assert load_config(write(text)).config.training.loss_weight.terminal == expected


def test_the_cache_folder_is_written_out(write):
    assert load_config(write(SOURCES), ["global_config.output_dir=out"]).config.data.cache.path == "out/cache"
    assert load_config(write(SOURCES), ["data.cache.path=/big/disk"]).config.data.cache.path == "/big/disk"


def test_the_resolved_file_reads_back_to_the_same_config(write, tmp_path):
    text = SOURCES + (
        "      repeats: 3\n    - path: 'odd # name: \"x\"\\n'\n  captions: {separator: '; '}\n"
        "global_config: {run_name: 'true', previews: {prompts: ['a, \"b\"', \"two\\nlines \\U0001F98A\"]}}\n"
        "training: {optimizer: {learning_rate: 3e-7}, max_grad_norm: null}\n"
    )
    loaded = load_config(write(text), ["training.ema={type: none}"])
    resolved = tmp_path / "config.resolved.yaml"
    write_resolved(loaded, resolved)
    again = load_config(resolved)
    assert again.config == loaded.config
    assert set(again.origins) == set(loaded.origins)
    assert all(origin.startswith("config.resolved.yaml:") for origin in again.origins.values())
    lines = resolved.read_text(encoding="utf-8").splitlines()
    assert "    type: none  # --set" in lines
    assert "    learning_rate: 3e-7  # my.yaml:8" in lines
    assert "  batch_size: 4  # default" in lines


def test_a_missing_file_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.yaml: cannot be read: No such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_configs_are_frozen(write):
    config: Config = load_config(write(SOURCES)).config
    with pytest.raises(ValueError, match="frozen"):
        config.training.batch_size = 3
