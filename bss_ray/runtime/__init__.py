"""Parts that every process of a run needs: time limits, logs, threads, events, profiles."""
