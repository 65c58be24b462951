"""The files that repeat the schema, and the examples."""

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from sdxl_training.config import data as data_module
from sdxl_training.config import load_config
from sdxl_training.config import schema as schema_module
from sdxl_training.config.__main__ import FILES
from sdxl_training.config.data import Source
from sdxl_training.config.schema import Section, default_values
from sdxl_training.config.tree import parse_yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
NAMES = vars(schema_module) | vars(data_module)
SECTIONS = [each for each in NAMES.values() if isinstance(each, type) and issubclass(each, Section)]
TEXT = (ROOT / "src" / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_written_files_are_up_to_date(path):
    assert path.read_text(encoding="utf-8") == FILES[path](), "run: python -m sdxl_training.config"


def test_config_yaml_holds_exactly_the_defaults():
    values = parse_yaml(TEXT, "config.yaml").plain()
    source = Source(path="path/to/pictures").model_dump(mode="json")
    assert values["data"].pop("sources") == [source]
    assert source.keys() == Source.model_fields.keys()
    assert values == json.loads(json.dumps(default_values()))


def test_config_yaml_names_every_setting_of_every_type_with_its_default_and_a_sentence():
    lines = [line.strip() for line in TEXT.splitlines()]
    for section in SECTIONS:
        for key, field in section.model_fields.items():
            if isinstance(field.default, BaseModel) or field.is_required():
                continue
            named = [line.removeprefix("- ").removeprefix("# ") for line in lines if re.search(rf"\b{key}:", line)]
            assert any(line.startswith(f"{key}:") for line in named), f"{section.__name__}.{key}"
            assert str(field.description)[:30] in TEXT, f"{section.__name__}.{key}"


def test_config_yaml_is_readable():
    assert max(map(len, TEXT.splitlines())) <= 120
    assert "discriminator" not in TEXT


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_setting_has_one_sentence(section):
    for key, field in section.model_fields.items():
        assert field.description, key
        assert field.description.endswith("."), key


def test_only_the_path_of_a_source_has_no_default():
    required = {
        f"{each.__name__}.{key}" for each in SECTIONS for key, field in each.model_fields.items() if field.is_required()
    }
    assert required == {"Config.data", "Data.sources", "Source.path"}


def test_the_editor_schema_requires_nothing_and_knows_base():
    text = (ROOT / "src/sdxl_training/config/config.schema.json").read_text(encoding="utf-8")
    assert '"required"' not in text
    assert "base" in json.loads(text)["properties"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load(path):
    loaded = load_config(path)
    assert loaded.config.global_config.run_name == path.stem


def test_there_are_examples():
    assert {"miniature", "full_finetune", "nai_v3", "flow_sdxl"} <= {path.stem for path in EXAMPLES}
