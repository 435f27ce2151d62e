"""slimline: the smallest, fastest version of your transformer that provably stays within your quality limit."""

__version__ = "0.1.0"
