"""Face models: find faces, bring them to a model's template, embed them on any device."""
