"""Generation: `generate` for prompts, `Session` for chats, `Settings` for how."""

from moai_core.generation.engine import Completion, generate
from moai_core.generation.sampling import Settings
from moai_core.generation.session import Session

__all__ = ["Completion", "Session", "Settings", "generate"]
