"""The version of the package, where every stage can read it without importing the package's face."""

__version__ = "0.1.0.dev0"
