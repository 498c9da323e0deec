"""These tests run in verl's own environment (`make test-verl`); elsewhere they are not collected."""

from importlib.metadata import PackageNotFoundError, version

try:
    version("verl")
except PackageNotFoundError:
    # Not by import: this directory would be found as a package of that name.
    collect_ignore_glob = ["*"]
