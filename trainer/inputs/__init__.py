"""From conversations to batches: preparation, collation, image features, order."""
