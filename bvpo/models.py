"""Loading a causal language model and its tokenizer into this process, and naming exactly what was loaded.

In: where the model is and how to hold it. Out: the objects, and an identity (Hub commit or hash of the files) that needs no
model in memory. Weights come from safetensors only; remote code runs only if asked for.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bvpo.config import ModelConfig
from bvpo.files import hash_folder
from bvpo.strict import UserError

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """``path`` is a folder or a Hub id; ``dtype`` "auto" is float32 on CPU and the checkpoint's own elsewhere."""

    path: str
    revision: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *_DTYPES):
            raise UserError(f"model dtype: got {self.dtype!r}, expected one of auto, {', '.join(_DTYPES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """A source with everything decided before its weights are read."""

    source: ModelSource
    config: Any
    device: torch.device
    dtype: torch.dtype


def plan_model(source: ModelSource) -> ModelPlan:
    """Read the configuration (no weights) and decide device and dtype."""
    config = _from_pretrained(AutoConfig, source.path, source)
    device = _device(source.device)
    dtype = _DTYPES.get(source.dtype)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else config.get_text_config(decoder=True).dtype or torch.float32
    return ModelPlan(source=source, config=config, device=device, dtype=dtype)


def load_model(plan: ModelPlan) -> tuple[Any, Any]:
    """The model, in evaluation mode on its device, and the tokenizer."""
    source = plan.source
    path = source.tokenizer or source.path
    options = {"revision": _revision(source, path), "trust_remote_code": source.trust_remote_code}
    tokenizer = read_tokenizer(f"model {path!r}: cannot load it with AutoTokenizer", path, **options)
    model = _from_pretrained(AutoModelForCausalLM, source.path, source, dtype=plan.dtype, use_safetensors=True)
    model = model.to(plan.device).eval()
    with loading(f"model {source.path!r}: it fails on a prompt of two tokens"), torch.inference_mode():
        model(torch.zeros((1, 2), dtype=torch.long, device=plan.device))
    logger.info("loaded %s (%s on %s)", source.path, str(plan.dtype).removeprefix("torch."), plan.device)
    return model, tokenizer


def load_tokenizer(model: ModelConfig, field: str = "model.path") -> Any:
    """The named tokenizer, or the model's own at the model's revision; ``field`` is the setting that needs it."""
    path = model.tokenizer or model.path
    revision = model.revision if path == model.path else None  # one from elsewhere has revisions of its own
    failure = f"{field}: the tokenizer {path!r} cannot be loaded"
    return read_tokenizer(failure, path, revision=revision, trust_remote_code=model.trust_remote_code)


def _from_pretrained(auto_class: Any, path: str, source: ModelSource, **options: Any) -> Any:
    with loading(f"model {path!r}: cannot load it with {auto_class.__name__}"):
        return auto_class.from_pretrained(
            path, revision=_revision(source, path), trust_remote_code=source.trust_remote_code, **options
        )


def _revision(source: ModelSource, path: str) -> str | None:
    """A tokenizer kept elsewhere has revisions of its own."""
    return source.revision if path == source.path else None


def read_tokenizer(failure: str, path: str, **options: Any) -> Any:
    """The tokenizer of a folder or of the Hub, tried on a word: one with a broken setting loads and fails when used."""
    with loading(failure):
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        ids = tokenizer.encode("a b", add_special_tokens=False)
        tokenizer.decode([*ids, *filter(None, (tokenizer.bos_token_id, tokenizer.eos_token_id))])
        tokenizer(["a", "a b"], add_special_tokens=False)
    return tokenizer


@contextmanager
def loading(failure: str) -> Iterator[None]:
    """For one call of a library that reads a model's files: whatever it raises is the fault of those files, and becomes one
    line that starts with ``failure``. Libraries raise every kind there is for them, a Rust panic included."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason:
            reason = "it runs code of its own; read that code, and set trust_remote_code if you trust it"
        raise UserError(f"{failure}: {reason[:400]}") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        present = device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count())
    except RuntimeError:
        present = False
    if not present:
        raise UserError(f"model device: got {name!r}, expected auto, cpu, or a cuda device that is present")
    return torch.device(name)


def identify(plan: ModelPlan) -> dict[str, Any]:
    """Hub commit where there is one, else a hash of the files; a tokenizer from elsewhere is named too."""
    source, commit = plan.source, getattr(plan.config, "_commit_hash", None)
    assert commit or Path(source.path).is_dir(), "a configuration came neither from the Hub nor from a folder"
    named = {"model": source.path, "revision": commit} if commit else {"content": hash_folder(Path(source.path))}
    if source.tokenizer is not None:
        folder = Path(source.tokenizer)
        named["tokenizer"] = hash_folder(folder) if folder.is_dir() else source.tokenizer
    return named


def hash_parameters(model: torch.nn.Module) -> str:
    """SHA-256 over the parameters of a model that was built or trained in this process."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    return {"torch": str(torch.__version__), "transformers": transformers.__version__}


def context_length(config: Any) -> int | None:
    """How many tokens the model may see, or ``None`` if its configuration does not say.

    Rotary embeddings that are rescaled when the longest sequence of the batch passes a length ("dynamic", "longrope") make
    a sample depend on its neighbours; below that length they do not, so that is then the limit.
    """
    text_config = config.get_text_config(decoder=True)
    limit = getattr(text_config, "max_position_embeddings", None)
    parameters = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    for rope in nested or [parameters]:
        if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings")
            original = original or getattr(text_config, "original_max_position_embeddings", None)
            limit = original or limit
    return limit
