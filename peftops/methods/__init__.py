"""Every PEFT method: one file here is one method, and the code that attaches it does not know its name.

A file holds the paper, the equation, a frozen dataclass with the method's options, and a class of one of three
bases: an :class:`~peftops.nn.Adapter` changes what a layer computes, a :class:`~peftops.nn.Select` trains
parameters that a layer has, a :class:`~peftops.nn.Prompt` puts vectors before what the model reads.
``@register(Config)`` makes ``attach(model, Config(...))`` use the class; nothing else is needed.

There are three hooks for methods that cannot work on one layer at a time: ``build`` makes the adapters of all layers
together, ``prepare`` changes the model before the adapters are put in, and ``begin`` changes the layer under an
adapter.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
