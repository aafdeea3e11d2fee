"""The server over HTTP, in the shape of OpenAI's API. It needs the extra ``serve``."""

from .adapters import Adapters
from .app import App
from .limits import Limits
from .run import listen, serve

__all__ = ["Adapters", "App", "Limits", "listen", "serve"]
