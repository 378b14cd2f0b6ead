"""What keeps a run going: engines, adapters, whole checkpoints, exact resume."""
