"""Every problem at once: line, place, value, rule, remedy, nearest name."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl_training.config import ConfigError, load_config, notes
from sdxl_training.config.explain import SYNONYMS, _names
from sdxl_training.config.schema import Config

SOURCES = "data:\n  sources:\n    - path: pictures\n"
LIST = "data.buckets={generator: list, sizes: [[64, 64], [64, 128]]}"


def problems(tmp_path, text, overrides=()):
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value


def one(tmp_path, text, overrides=()):
    (problem,) = problems(tmp_path, text, overrides).problems
    return problem


def training(text):
    return f"{SOURCES}training:\n  {text}\n"


def test_the_message_is_the_one_of_the_design(tmp_path):
    error = problems(tmp_path, training("gradient_clip: 1.0\n  precision: fp8\n  batch_size: 2.5"))
    first, *rows = str(error).splitlines()
    assert first == f"{tmp_path / 'my.yaml'}: 3 problems"
    assert rows == [
        "  line 5  training.gradient_clip      unknown key; did you mean training.max_grad_norm?",
        "  line 6  training.precision = fp8    must be bf16, fp32 or fp16",
        "  line 7  training.batch_size = 2.5   must be a whole number of at least 1",
    ]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.lr", "training.optimizer.learning_rate"),
        ("training.learning_rate", "training.optimizer.learning_rate"),
        ("training.max_step", "training.max_steps"),
        ("trainning.max_steps", "training"),
        ("training.optimizer.weigth_decay", "training.optimizer.weight_decay"),
        ("data.caption_dropout", "data.captions.caption_dropout"),
        ("global_config.checkpoints.every_step", "global_config.checkpoints.every_steps"),
        ("data.sources.0.repeat", "data.sources.0.repeats"),
        ("data.max_side_px", "data.buckets.max_side_px"),
        ("training.max_token_length", "data.captions.max_tokens"),
        ("data.weighted_captions", "data.captions.weights"),
        ("data.caption_prefix", "data.sources.0.add_tags.front"),
        ("data.captions.enable_wildcard", "data.captions.alternatives"),
    ],
)
def test_misspelt_keys_get_the_nearest_name(tmp_path, key, meant):
    problem = one(tmp_path, SOURCES, [f"{key}=1"])
    assert problem.text == f"unknown key; did you mean {meant}?"
    assert str(problem.origin) == "--set"


def test_a_key_like_no_other_gets_no_guess(tmp_path):
    assert one(tmp_path, training("zzz: 1")).text == "unknown key; delete it"


def test_synonyms_name_places_that_exist():
    schema = Config.model_json_schema()
    assert set(SYNONYMS.values()) <= set(_names(schema, schema, ()))


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("optimizer: {learning_rate: fast}", "must be a number above 0"),
        ("optimizer: {learning_rate: 0}", "must be a number above 0"),
        ("optimizer: {learning_rate: .nan}", "must be a number above 0"),
        ("optimizer: {learning_rate: '1e-5'}", "must be a number above 0"),
        ("optimizer: {betas: [0.9, 1.0]}", "must be a number of at least 0 and below 1"),
        ("optimizer: {betas: [0.9]}", "must be a list of exactly 2 items"),
        ("schedule: {final_fraction: 1.5}", "must be a number from 0 to 1"),
        ("ema: {decay: 1}", "must be a number above 0 and below 1"),
        ("max_grad_norm: 0", "must be a number above 0 or null"),
        ("batch_size: true", "must be a whole number of at least 1"),
        ("memory: {gradient_checkpointing: yes}", "must be true or false"),
        ("memory: fast", "must be a mapping of settings"),
        ("memory:", "is empty; give it settings below, or delete the line"),
        ("schedule: cosine", "must be a mapping with type: constant or type: cosine"),
        ("objective: {type: flow}", "must be edm, epsilon, flow_matching, v_prediction or x0"),
        ("optimizer: {type: lion, momentum: 1}", "must be adamw or sgd"),
        ("loss_weight: {type: none, gamma: 5}", "belongs to type: min_snr, p2 or soft_min_snr, not to none"),
    ],
)
def test_wrong_values_are_answered_with_the_rule(tmp_path, setting, rule):
    problem = one(tmp_path, training(setting))
    assert problem.text.split("; did you mean")[0] == rule
    assert problem.origin.line == 5


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("global_config.run_name=a/b", "must be a plain folder name: no / or \\, no leading dot or space"),
        ("global_config.run_name=..", "must be a plain folder name: no / or \\, no leading dot or space"),
        ("global_config.run_name=7", "must be text; put it in quotes"),
        ("global_config.device=gpu", "must be auto, cpu, cuda or cuda:N with a number N"),
        ("data.sources=[]", "must be a list of at least 1 item"),
        ("data.buckets.step_px=20", "must be a whole number of at least 8 and divisible by 8"),
        ("data.sources.3.path=x", "there is no item 3: the list has 1, counted from 0"),
        ("training.max_steps", "must read section.key=value"),
    ],
)
def test_overrides_are_checked_the_same_way(tmp_path, override, rule):
    problem = one(tmp_path, SOURCES, [override])
    assert (problem.text, str(problem.origin)) == (rule, "--set")


def test_a_config_without_pictures_is_told_so(tmp_path):
    problem = one(tmp_path, "training: {batch_size: 2}")
    assert (problem.place, problem.text) == ("data.sources", "is required: Places with pictures; at least one")


def test_epsilon_at_snr_0_is_explained(tmp_path):
    problem = one(tmp_path, training("objective: {type: epsilon, zero_terminal_snr: true}"))
    assert "epsilon cannot be trained at SNR 0" in problem.text
    assert "use type: v_prediction" in problem.text


@pytest.mark.parametrize(
    ("overrides", "place", "words"),
    [
        (["data.resolution=1000"], "data.resolution", "multiple of data.buckets.step_px = 64; nearest: 1024"),
        (["data.buckets.min_side_px=1088"], "data.buckets.min_side_px", "at most data.resolution = 1024"),
        (["data.buckets.max_side_px=960"], "data.buckets.max_side_px", "at least data.resolution = 1024"),
        (["training.max_steps=100"], "training.schedule.warmup_steps", "at most training.max_steps = 100"),
        (
            ["training.loss_weight={type: min_snr, minimum: 0.1}"],
            "training.loss_weight.minimum",
            "has no effect unless",
        ),
        (["global_config.previews.prompts=[]"], "global_config.previews.prompts", "at least one prompt"),
        (["global_config.previews={grid: karras, shift: 2.0}"], "global_config.previews.shift", "no effect with grid"),
        (
            ["global_config.previews.grid=native", "training.preset=nyaflow"],
            "global_config.previews.grid",
            "use linear or karras",
        ),
        (["data.buckets.generator=list"], "data.buckets.sizes", "at least one [height, width] for generator: list"),
        (["data.buckets.sizes=[[64, 64]]"], "data.buckets.sizes", "needs generator: list"),
        ([LIST, "data.lower_resolutions=[512]"], "data.lower_resolutions", "no effect with generator: list"),
        (["data.buckets.resolutions=each"], "data.buckets.resolutions", "needs data.lower_resolutions"),
        (["data.lower_resolutions=[512, 1024]"], "data.lower_resolutions.1", "below data.resolution = 1024"),
        (["data.lower_resolutions=[520]"], "data.lower_resolutions.0", "a multiple of step_px = 64"),
        (["data.buckets={generator: sdxl, step_px: 128}"], "data.buckets.generator", "a step_px that divides 64"),
        (
            ["data.buckets.generator=sdxl", "data.lower_resolutions=[512]"],
            "data.buckets.generator",
            "sdxl at 512 needs a step_px that divides 32; choose one, or generator: area",
        ),
        *(
            ([LIST, f"data.buckets.{name}=128"], f"data.buckets.{name}", "no effect with generator: list")
            for name in ("step_px", "min_side_px", "max_side_px")
        ),
        (
            ["training.pixels_per_batch=1048576", "training.batch_size=8"],
            "training.batch_size",
            "no effect beside training.pixels_per_batch",
        ),
        (["data.crop.variants=2"], "data.crop.variants", "no effect with position: centre; set position: random"),
        (
            ["data.crop.position=random"],
            "data.crop.variants",
            "one random crop for ever, since data.cache.mode: ahead keeps its latent; keep several",
        ),
        (
            ["data.crop.position=random", "data.cache.mode=first"],
            "data.crop.variants",
            "or set data.cache.mode: none, which cuts anew at each visit",
        ),
        (["data.crop.seed=3"], "data.crop.seed", "no effect with position: centre; set position: random"),
        (["training.pixels_per_batch=1048575"], "training.pixels_per_batch", "data.resolution squared = 1048576"),
        (
            [LIST, "training.pixels_per_batch=8191"],
            "training.pixels_per_batch",
            "the largest of data.buckets.sizes = 8192",
        ),
        (["global_config.previews.shift=0"], "global_config.previews.shift", "from 0.01"),
        (["data.captions={kind: prose, tag_dropout: 0.1}"], "data.captions.tag_dropout", "no effect with kind: prose"),
        (["data.captions={kind: prose, keep_first: 2}"], "data.captions.keep_first", "no effect with kind: prose"),
        (
            ["data.captions={kind: prose, keep_first: 2, templates: ['{caption}!']}"],
            "data.captions.keep_first",
            "no template with {tags}; delete this line",
        ),
        (["data.captions.max_tokens=77"], "data.captions.max_tokens", "must be 75, 150 or 225"),
        (["data.captions.templates=[a picture]"], "data.captions.templates.0", "text with {caption} or {tags}"),
        (["data.captions.templates=['{tags} {name}']"], "data.captions.templates.0", "and no other braces"),
        (["data.captions.templates=['{tags}', '{}{tags}']"], "data.captions.templates.1", "and no other braces"),
        (["data.captions.templates='{tags}'"], "data.captions.templates", "must be a list"),
        (["data.sources.0.add_tags.front=['new, ']"], "data.sources.0.add_tags.front.0", "without blanks at its ends"),
        (["data.sources.0.add_tags.back=['']"], "data.sources.0.add_tags.back.0", "text in one line without blanks"),
    ],
)
def test_rules_between_settings(tmp_path, overrides, place, words):
    problem = one(tmp_path, SOURCES, overrides)
    assert problem.place == place
    assert words in problem.text
    assert str(problem.origin) == "--set", "the origin is the setting that was written, not a default it breaks with"


TABLE, COLUMNS = "table: names.csv", "columns: {captions: [text]}"


@pytest.mark.parametrize(
    ("source", "place", "words"),
    [
        (f"path: x.tar, {TABLE}", "table", "with type: tar (by the path's ending) delete this line"),
        (f"path: X.TAR, {COLUMNS}", "columns", "no effect with type: tar (by the path's ending) and no table"),
        (f"path: 'x-{{0..3}}.parquet', {TABLE}", "table", "with type: parquet (by the path's ending)"),
        (f"path: s3://a/x.parquet, {TABLE}", "table", "with type: parquet (by the path's ending)"),
        (f"path: x, type: tar, {TABLE}", "table", "with type: tar delete this line"),
        (f"path: x.tar, type: folder, {COLUMNS}", "columns", "no effect with type: folder and no table"),
        (f"path: x, {COLUMNS}", "columns", "and no table"),
    ],
)
def test_settings_of_a_source_take_effect(tmp_path, source, place, words):
    problem = one(tmp_path, f"data: {{sources: [{{{source}}}]}}\n")
    assert problem.place == f"data.sources.0.{place}"
    assert words in problem.text
    assert problem.origin.line == 1


@pytest.mark.parametrize(
    "source",
    [
        f"path: x.parquet, {COLUMNS}",
        f"path: x, {TABLE}, {COLUMNS}",
        f"path: x.tar, type: folder, {TABLE}",
        f"path: 's3://bucket/pictures', {TABLE}, {COLUMNS}",
    ],
)
def test_tables_and_columns_where_they_belong(tmp_path, source):
    (tmp_path / "my.yaml").write_text(f"data: {{sources: [{{{source}}}]}}\n", encoding="utf-8")
    assert load_config(tmp_path / "my.yaml")


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.loss_weight={type: min_snr, terminal: floor}", "training.loss_weight.minimum=0.1"],
        ["global_config.previews.prompts=[]", "global_config.previews.every_steps=0"],
        ["training.objective.type=flow_matching", "training.level_density.type=logit_normal"],
        ["training.precision=fp16", "global_config.device=cpu"],
        [LIST, "data.resolution=1000", "training.pixels_per_batch=8192"],
        ["data.lower_resolutions=[512, 768]", "data.buckets.resolutions=each"],
        ["data.buckets={generator: sdxl, step_px: 32}", "data.lower_resolutions=[512]"],
        ["data.crop={position: random, variants: 2}"],
        ["data.crop={position: random}", "data.cache.mode=none"],
        ["training.pixels_per_batch=1048576"],
        ["training.pixels_per_batch=1048576", "training.batch_size=4"],
        [LIST, "data.buckets.step_px=64"],
        ["data.captions={kind: prose, keep_first: 1, tag_dropout: 0.0, shuffle: false}"],
        ["data.captions={kind: prose, keep_first: 2, tag_dropout: 0.5, templates: ['{caption}', '{tags}: {caption}']}"],
        ['data.captions={max_tokens: 225, templates: ["{caption}\\n{tags}"]}', "data.sources.0.add_tags.front=[a b]"],
    ],
)
def test_the_remedies_work(tmp_path, overrides):
    path = tmp_path / "my.yaml"
    path.write_text(SOURCES, encoding="utf-8")
    assert load_config(path, overrides)


def test_rules_are_reported_beside_wrong_values_unless_they_judge_by_one(tmp_path):
    text = training("gradient_clip: 1\n  max_steps: 100\n  optimizer: {betas: [2, 0.9]}")
    places = [problem.place for problem in problems(tmp_path, text).problems]
    assert places == ["training.gradient_clip", "training.schedule.warmup_steps", "training.optimizer.betas.0"]
    text = training("max_steps: few\n  schedule: {warmup_steps: 20000}")
    assert [problem.place for problem in problems(tmp_path, text).problems] == ["training.max_steps"]


def test_problems_of_a_base_name_the_base(tmp_path):
    (tmp_path / "base.yaml").write_text("training: {lr: 1}\n", encoding="utf-8")
    message = str(problems(tmp_path, "base: base.yaml\n" + training("max_stepz: 3")))
    assert "  line 6       training.max_stepz   unknown key; did you mean training.max_steps?" in message
    assert "  base.yaml:1  training.lr          unknown key; did you mean training.optimizer.learning_rate?" in message


def test_a_broken_file_is_one_problem_with_its_line(tmp_path):
    problem = one(tmp_path, "training:\n\tbatch_size: 1\n")
    assert problem.origin.line == 2
    assert "indent with spaces" in problem.text
    assert one(tmp_path, "a: 1\na: 2").text == "a is given twice, first on line 1; keep one"
    assert "must hold sections" in one(tmp_path, "- 1").text


def test_a_missing_base_does_not_hide_the_rest(tmp_path):
    places = [problem.place for problem in problems(tmp_path, "base: gone.yaml\ntraining: {batch_size: 0}").problems]
    assert places == ["base", "training.batch_size"]


def test_official_weights_at_snr_0_are_legal_but_noted(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(SOURCES, encoding="utf-8")
    assert notes(load_config(path).config) == []
    overrides = ["training.objective.type=v_prediction", "training.loss_weight={type: min_snr, terminal: official}"]
    (note,) = notes(load_config(path, overrides).config)
    assert "plus_one" in note


def test_dots_in_a_file_s_keys_are_explained(tmp_path):
    assert "write a dot as a section" in one(tmp_path, SOURCES + "training.max_steps: 3\n").text


SCHEMA = Config.model_json_schema()
NAMES = st.sampled_from([*_names(SCHEMA, SCHEMA, ()), "training.zzz", "data.sources.1.path", "training.objective.x.y"])
VALUES = st.sampled_from(
    [
        "",
        "-1",
        "0",
        "1e99",
        "x",
        "'8'",
        "true",
        "[]",
        "[1]",
        "[[a]]",
        "{}",
        "{type: 5}",
        "{type: [a]}",
        "{type: none}",
        "{a: b}",
    ]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(NAMES, VALUES), max_size=4))
def test_any_values_anywhere_are_accepted_or_explained(tmp_path, assignments):
    path = tmp_path / "my.yaml"
    path.write_text(SOURCES, encoding="utf-8")
    try:
        load_config(path, [f"{name}={value}" for name, value in assignments])
        found = None
    except ConfigError as error:
        found = error.problems
    assert found is None or (found and all(problem.text and str(problem.origin) for problem in found))
