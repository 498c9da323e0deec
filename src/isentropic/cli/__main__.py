"""``python -m isentropic.cli``, for launchers."""

from .main import main

raise SystemExit(main())
