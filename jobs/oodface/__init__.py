"""OODFace: face recognition under thirty corruptions and appearance variations, at five severities each."""
