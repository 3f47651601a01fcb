"""The language that methods and data sets share: tasks, cases, predictions, geometry, run folders, comparison."""

__version__ = "0.1.0"
