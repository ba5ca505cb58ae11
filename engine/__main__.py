"""`python -m handloom` is the command `handloom`."""

from .cli import main

raise SystemExit(main())
