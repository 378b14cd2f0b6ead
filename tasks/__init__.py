"""Tasks: worlds, pictures, conversations and metrics, a folder each."""

from .task import Task, load_task


__all__ = ["Task", "load_task"]
