"""What several papers measure with: ROUGE, refusal, confidence intervals."""
