"""An adapter and its base as one plain model folder, which every engine can load.

In: the folder of a PEFT adapter. Out: a Hugging Face model folder with the adapter added into the weights; it is made once
per content of the adapter. It changes no adapter and trains nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

from bvpo.strict import UserError, read_json

logger = logging.getLogger(__name__)

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_SOURCE = "merged_from.json"


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter and not a whole model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def base_of(adapter: Path) -> str:
    """Folder or Hub name of the model that the adapter was trained on."""
    return str(read_json(adapter / "adapter_config.json").get("base_model_name_or_path", ""))


def merge_adapter(adapter: Path, target: Path, *, trust_remote_code: bool = False) -> None:
    """Writes the merged model into ``target``, which is replaced, unless it was made of this very adapter."""
    digest = hashlib.sha256()
    for name in _ADAPTER_FILES:
        if not (adapter / name).is_file():
            raise UserError(f"{adapter / name}: no such file; an adapter needs it")
        digest.update((adapter / name).read_bytes())
    source = json.dumps({"adapter": digest.hexdigest()})
    if (target / _SOURCE).is_file() and (target / _SOURCE).read_text(encoding="utf-8") == source:
        return
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    from bvpo.models import loading

    logger.info("merging the adapter %s into its base, as %s", adapter, target)
    shutil.rmtree(target, ignore_errors=True)
    with loading(f"{adapter}: the adapter cannot be loaded"):
        model = AutoPeftModelForCausalLM.from_pretrained(str(adapter), trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(str(adapter), trust_remote_code=trust_remote_code)
    model.merge_and_unload().save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / _SOURCE).write_text(source, encoding="utf-8")  # last: a folder without it is not whole
