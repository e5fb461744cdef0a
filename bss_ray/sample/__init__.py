"""The sampler: one exact global order per epoch, drawn from scores that are distributed over holders."""
