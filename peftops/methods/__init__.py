"""Every PEFT method: one file here is one method, and no other part of attaching it knows its name.

A file holds the paper, the equation, a frozen dataclass with the method's options, and a class of one of three
bases: an :class:`~peftops.nn.Adapter` changes what a layer computes, a :class:`~peftops.nn.Select` trains
parameters that a layer has, a :class:`~peftops.nn.Prompt` puts vectors before what the model reads.
``@register(Config)`` is all that makes ``attach(model, Config(...))`` use it.

Three hooks, and no more, are for methods that one layer at a time does not fit: ``build`` makes the adapters of
all layers together, ``prepare`` changes the model before they are put in, ``begin`` the layer that one stands on.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
