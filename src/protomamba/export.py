"""A checkpoint as a folder for transformers: MambaForCausalLM, and its tokenizer's files where the run has text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint.transformers_folder import refuse_inexpressible, write_transformers_folder
from protomamba.config import ModelConfig
from protomamba.data.tokenizer import TOKENIZER_FILE, tokenizer_from_json
from protomamba.errors import UserError
from protomamba.model.pretrained import build_model
from protomamba.storage import atomic_file

BYTES_EOS_NAME = "<|endoftext|>"


def export_transformers(source: Path, out_dir: Path) -> list[Path]:
    """Write a checkpoint's model and tokenizer for `from_pretrained`; returns the files written.

    Raises UserError for a file that is no sound checkpoint, and as `write_transformers_folder` does.
    """
    loaded = checkpoint.load(source)
    refuse_inexpressible(ModelConfig(**loaded.section("model")))
    model = build_model(loaded)
    description = loaded.config.get("tokenizer")
    return write_transformers_folder(
        out_dir,
        model.config,
        model.state_dict(),
        eos_token=tokenizer_from_json(description).eos_token if description else None,
        tokenizer_files=tokenizer_files(description) if description else None,
    )


def export_weights(source: Path, out_dir: Path) -> list[Path]:
    """Write a checkpoint's model alone, for `SequenceModel.from_pretrained` and --init-from, and its tokenizer's
    files where the run has text; returns the files written. Raises UserError."""
    loaded = checkpoint.load(source)
    files = build_model(loaded).save_pretrained(out_dir)
    description = loaded.config.get("tokenizer")
    if description:
        for name, text in tokenizer_files(description).items():
            with atomic_file(out_dir / name) as file:
                file.write(text.encode())
            files.append(out_dir / name)
    return files


def tokenizer_files(description: str) -> dict[str, str]:
    """Name -> content of the files `AutoTokenizer.from_pretrained` reads, from a tokenizer's `to_json`."""
    fields = json.loads(description)
    source = fields["tokenizer"] if "tokenizer" in fields else byte_tokenizer_json(fields["eos"])
    special = {"eos_token": _token_name(json.loads(source), fields["eos"])} if fields["eos"] is not None else {}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    return {
        TOKENIZER_FILE: source,
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }


def byte_tokenizer_json(eos: int | None) -> str:
    """Bytes as tokens 0 to 255, said in the language of `tokenizers`: byte-level BPE without a single merge."""
    added = {"id": eos, "content": BYTES_EOS_NAME, "special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [] if eos is None else [{**added, **flags}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": byte_alphabet(), "merges": []},
    }
    return json.dumps(tokenizer, ensure_ascii=False)


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's `bytes_to_unicode`).

    A byte that is a printable character of Latin-1 stands for itself; the others take the code points from 256 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte if byte in printable else 256 + others.index(byte)): byte for byte in range(256)}


def _token_name(tokenizer: dict[str, Any], number: int) -> str:
    """What a tokenizer.json calls a token. A vocabulary is name -> number, or a list of [name, score] in order."""
    names = {token["id"]: token["content"] for token in tokenizer.get("added_tokens") or []}
    vocab = tokenizer["model"].get("vocab", {})
    names |= {n: name for name, n in vocab.items()} if isinstance(vocab, dict) else dict(enumerate(v[0] for v in vocab))
    if number not in names:
        raise UserError(f"tokenizer: has no token {number}, which should end a document")
    return str(names[number])
