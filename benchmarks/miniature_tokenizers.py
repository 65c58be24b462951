"""Which vocabulary lets every word of the demo's captions be one token?

    python benchmarks/miniature_tokenizers.py       # writes the miniature's two tokenizer folders

The vocabulary is CLIP's byte alphabet, one chain of merges per word, and the two special tokens; any other text falls
apart into letters but is never unknown. The tokenizers differ as SDXL's do: the second one pads with "!" (id 0).
"""

from __future__ import annotations

import json
from pathlib import Path

from sdxl_training.data.demo_set import EXTRA_SHARES, PALETTE, RADIUS_OF_SIZE, SHAPES

FOLDER = Path(__file__).parents[1] / "src" / "sdxl_training" / "model" / "miniature"
WORDS = (*PALETTE, *SHAPES, "background", *RADIUS_OF_SIZE, *EXTRA_SHARES)
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 32


def byte_alphabet() -> list[str]:
    """Return the 256 characters that stand for bytes: printable Latin-1 for itself, then U+0100 onwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def merges_of(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Chain merges that make each word one token; later ones have lower rank and cannot undo earlier words."""
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:
            at = 0
            while at < len(pieces) - 1:
                if (pieces[at], pieces[at + 1]) == (left, right):
                    pieces[at : at + 2] = [left + right]
                at += 1
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
    return merges


def write_tokenizer(folder: Path, pad_token: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    letters, merges = byte_alphabet(), merges_of(WORDS)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges), START, END]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad_token,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
    }
    special = {name: config[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)}, indent=None)
    _write_json(folder / "tokenizer_config.json", config, indent=2)
    _write_json(folder / "special_tokens_map.json", special, indent=2)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_json(path: Path, content: dict[str, object] | dict[str, int], indent: int | None) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_tokenizer(FOLDER / "tokenizer", pad_token=END)
    write_tokenizer(FOLDER / "tokenizer_2", pad_token="!")
