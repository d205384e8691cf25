"""Tests. A package, since packages of others install a `tests` of their own, which would hide a folder."""
