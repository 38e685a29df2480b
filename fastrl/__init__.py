"""fastrl: fast kernels and a thin trainer for RL post-training of language models."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fastrl")
except PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "0+unknown"
