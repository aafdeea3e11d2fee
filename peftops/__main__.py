"""``python -m peftops`` is the command ``peftops``."""

from .cli import main

raise SystemExit(main())
