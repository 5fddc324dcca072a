"""RULE: unlearn a target by refusal boundary optimisation (NeurIPS 2025)."""
