"""Data: shards with stable row ids, from any Ray Dataset; and the embedded dataset AV-Digits."""
