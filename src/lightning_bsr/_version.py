"""The version, read by the build and by ``lightning-bsr --version``."""

__version__ = "0.1.0"
