"""How adapters get on a model, switch, merge and leave: the same for every method.

A method names its config with :func:`register`; :func:`attach` finds the layers that the config means, lets the
method make an adapter of each, and puts them in, or changes nothing. It knows no method by name.
"""

from .attachment import activate, attach, detach, disabled
from .merging import MergeReport, merge, unmerge
from .registry import METHODS, build, each_target, register
from .state import Attachment, adapted_layers, attachment, hosts, state_of

__all__ = [
    "METHODS",
    "Attachment",
    "MergeReport",
    "activate",
    "adapted_layers",
    "attach",
    "attachment",
    "build",
    "detach",
    "disabled",
    "each_target",
    "hosts",
    "merge",
    "register",
    "state_of",
    "unmerge",
]
