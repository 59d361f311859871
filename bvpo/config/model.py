"""[model]: the policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from bvpo.config.ranges import FILLED


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The policy at the start of training, which is also the reference."""

    path: Annotated[str, FILLED]
    """Model to align: a local folder or a Hub name. Weights load from safetensors only."""
    revision: Annotated[str | None, FILLED] = None
    """Hub branch, tag or commit of the model; none takes the default branch."""
    format: Annotated[str, FILLED] = "auto"
    """Reasoning format: how the model opens and closes its trace. 'auto' detects it and refuses when unsure."""
    custom_format: dict[str, Any] = field(default_factory=dict)
    """A reasoning format of your own (with format = 'auto'); docs/formats.md lists its keys."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Only for sources you trust."""
    tokenizer: Annotated[str | None, FILLED] = None
    """Tokenizer folder or Hub name when it is not the model's own."""
