"""Tasks: worlds, pictures, conversations and metrics, a folder each."""
