"""`python -m sdxl_training.config`: write src/config.yaml and config.schema.json anew from the schema."""

from pathlib import Path

from sdxl_training.config.reference import editor_schema, reference_yaml

HERE = Path(__file__).resolve().parent
FILES = {HERE.parent.parent / "config.yaml": reference_yaml, HERE / "config.schema.json": editor_schema}

if __name__ == "__main__":
    for path, text in FILES.items():
        path.write_text(text(), encoding="utf-8")
        print(f"wrote {path.name}")
