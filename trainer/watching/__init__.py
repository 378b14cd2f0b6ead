"""What a run shows of itself: its log, its speed, pictures of what is selected."""
