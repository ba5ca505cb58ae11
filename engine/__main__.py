"""`python -m handloom` is the command `handloom`."""

from .cli.command import main

raise SystemExit(main())
