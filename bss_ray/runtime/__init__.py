"""What every process of a run needs: limits to waits, logs, threads, events, profiles."""
