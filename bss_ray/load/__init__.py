"""From row ids to batches on a device."""
